"""Time the loss inside training steps of the example's autoencoder, where PyTorch's threads have just been at work.

python -m bench.training_step                        (needs the extras torch, bench and demo; some minutes)
python -m bench.training_step --json FILE --write README.md

A step is forward, loss, backward, and Adam's update; what is timed is the loss: from the logits to its value and to the gradient
that the decoder is given. Rows take turns, a step each, in an order drawn anew in each round; nothing is waited for.
"""

from __future__ import annotations

import argparse
import datetime
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from rich.console import Console
from rich.progress import track
from tabulate import tabulate

import fastloss as fl
from examples.vae_torch import VAE, cut, load_photographs
from fastloss.bench import machine
from fastloss.bench.report import duration

SHAPE = (64, 3, 256, 256)
ROUNDS = 9
LEAST = 4  # times as fast as eager: what fastloss is to reach
BEGIN, END = "<!-- training step: written by python -m bench.training_step --write -->", "<!-- end of training step -->"
# of what the decoder returns: squared error is taken of probabilities
LOSSES: dict[str, tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]] = {
    "BCE": (fl.binary_cross_entropy_with_logits, F.binary_cross_entropy_with_logits, lambda logits: logits),
    "MSE": (fl.mse_loss, F.mse_loss, torch.sigmoid),
}


def rows(ours: Callable[..., Any], theirs: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    """Return the ways to compute a loss."""
    return {
        "fastloss": ours,
        "fastloss, in place": lambda output, images: ours(output, images, inplace_grad=True),
        "torch eager": theirs,
        "torch.compile": torch.compile(theirs, fullgraph=True, dynamic=False),
    }


class Training:
    """The example's model, and batches of crops of its photographs."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model, self.photographs = VAE(), load_photographs()
        self.optimiser = torch.optim.Adam(self.model.parameters(), lr=1e-4)
        self.random = torch.Generator().manual_seed(0)

    def step(self, loss: Callable[..., Any], activation: Callable[..., Any]) -> tuple[float, float]:
        """Take a step; return the seconds of the loss, and of all."""
        images = cut(self.photographs, SHAPE[0], SHAPE[-1], self.random) / 255
        start = time.perf_counter()
        output = activation(self.model(images)[0])
        begin = time.perf_counter()
        value = loss(output * 1 if activation is torch.sigmoid else output, images)
        (slope,) = torch.autograd.grad(value, output)
        end = time.perf_counter()
        output.backward(slope)
        self.optimiser.step()
        self.optimiser.zero_grad()
        return end - begin, time.perf_counter() - start
