"""`Partial`: the results of an interrupted run, in two files beside the output, with which a later run continues."""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import fastloss as fl
from fastloss.core.exact import Exact
from fastloss.score.batches import Scores

SAVED_EVERY = 2.0  # seconds


class Partial:
    """The losses of the images so far, in one file, and in another the sums of their total and what they were computed from.

    The state is JSON and not a pickle, so that a file beside the output is never executed.
    """

    def __init__(self, out: Path, total: fl.Accumulator, origin: Mapping[str, Any]) -> None:
        self.values, self.state = (out.with_name(f"{out.name}.{kind}") for kind in ("part", "state"))
        self.total, self.origin, self.saved = total, dict(origin), time.monotonic()

    def open(self, resume: bool) -> None:
        """Continue an interrupted run, or start anew.

        Raises:
            ValueError: the interrupted run had other arguments or files, or another process is at work on the same output.
        """
        self.file = self.values.open("ab")
        try:
            self.lock()
            if resume and self.state.exists():
                self.restore(json.loads(self.state.read_text()))
            self.file.truncate(8 * self.total.samples)
            self.save()
        except BaseException:
            self.close()
            raise

    def lock(self) -> None:
        """Raise ValueError if another process holds the files, otherwise hold them."""
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{self.values} is in use by another process that computes the same output") from None

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over the sums of an interrupted run."""
        for name in {**state["origin"], **self.origin}:
            before, now = state["origin"].get(name), self.origin.get(name)
            if before != now:
                raise ValueError(f"{self.state} is from a run whose {name} was {before}; it is {now} now; to start anew, omit --resume")
        if self.values.stat().st_size < 8 * state["samples"]:
            raise ValueError(f"{self.values} has {self.values.stat().st_size} bytes for {state['samples']} images; start anew")
        self.total.samples = state["samples"]
        self.total._sums = {name: Exact(*map(tuple, sums)) for name, sums in state["sums"].items()}

    def add(self, scores: Scores) -> None:
        """Add the losses of the next images."""
        self.total.merge_state(scores)
        self.file.write(scores.values.tobytes())
        if time.monotonic() - self.saved > SAVED_EVERY:
            self.save()

    def save(self) -> None:
        """Write everything that a later run needs."""
        self.file.flush()
        new = self.state.with_name(f"{self.state.name}.new")
        new.write_text(json.dumps({"origin": self.origin, "samples": self.total.samples, "sums": self.total._sums}))
        os.replace(new, self.state)
        self.saved = time.monotonic()

    def close(self) -> None:
        """Let other processes write to the files."""
        self.file.close()

    def remove(self) -> None:
        """Delete the files."""
        self.values.unlink(missing_ok=True)
        self.state.unlink(missing_ok=True)
