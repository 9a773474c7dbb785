"""The examples, run as a user would."""

from __future__ import annotations

import importlib.util
import runpy
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from tests.ulp import TRAINING, assert_close

EXAMPLES = Path(__file__).parent.parent / "examples"
SMALL = ("--size", "32", "--batch", "8", "--steps", "40")
TRAININGS = {"vae_torch bce": (), "vae_torch mse": ("--loss", "mse"), "segmentation_torch": ()}


def load(name):
    """Return an example as a module, without running it."""
    pytest.importorskip("torch")
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look
    spec.loader.exec_module(module)
    return module


def losses(history):
    return np.array(history.totals if hasattr(history, "totals") else history.losses)


def assert_picture(path):
    """Assert that a file is a picture of more than one colour."""
    pixels = matplotlib.image.imread(path)
    assert min(pixels.shape[:2]) > 400
    assert pixels[..., :3].std() > 0.1


@pytest.mark.parametrize("training", TRAININGS)
def test_a_training_learns_and_draws(training, tmp_path, capsys):
    example = load(training.split()[0])
    history = example.main([*SMALL, *TRAININGS[training], "--out", str(tmp_path / "picture.png")])
    assert losses(history)[-5:].mean() < 0.9 * losses(history)[:5].mean()
    assert all(0 < loss < step for loss, step in zip(history.loss_seconds, history.step_seconds, strict=True))
    assert_picture(tmp_path / "picture.png")
    assert "the loss by fastloss" in capsys.readouterr().out


@pytest.mark.parametrize("training", TRAININGS)
def test_fastloss_and_torch_take_the_same_steps(training, tmp_path):
    example = load(training.split()[0])
    ours, theirs = (
        losses(example.main(["--size", "32", "--steps", "5", *TRAININGS[training], "--by", by, "--out", str(tmp_path / f"{by}.png")]))
        for by in ("fastloss", "torch")
    )
    assert_close(ours, theirs, TRAINING)


def test_bce_does_not_end_below_its_floor(tmp_path):
    history = load("vae_torch").main([*SMALL, "--out", str(tmp_path / "picture.png")])
    assert all(floor < value for floor, value in zip(history.floors, history.reconstructions, strict=True))


@pytest.mark.parametrize("name", ["vae_torch", "segmentation_torch"])
def test_a_script_runs_by_itself(name, tmp_path):
    pytest.importorskip("torch")
    arguments = ["--size", "32", "--batch", "2", "--steps", "1", "--threads", "1", "--seed", "7"]
    done = subprocess.run(
        [sys.executable, EXAMPLES / f"{name}.py", *arguments], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    (picture,) = tmp_path.iterdir()
    assert_picture(picture)
    assert f"picture: {picture.name}" in done.stdout


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("vae_torch", ["--size", "50"], "argument --size: '50' is not a multiple of 8 from 16 to 256"),
        ("vae_torch", ["--size", "264"], "argument --size: '264' is not a multiple of 8 from 16 to 256"),
        ("vae_torch", ["--steps", "0"], "argument --steps: '0' is not a whole number from 1 on"),
        ("vae_torch", ["--loss", "l1"], "argument --loss: invalid choice: 'l1'"),
        ("vae_torch", ["--beta", "-1"], "argument --beta: '-1' is not a finite number from 0 on"),
        ("vae_torch", ["--beta", "nan"], "argument --beta: 'nan' is not a finite number from 0 on"),
        ("segmentation_torch", ["--size", "72"], "argument --size: '72' is not a multiple of 16 from 32 to 256"),
        ("segmentation_torch", ["--batch", "many"], "argument --batch: 'many' is not a whole number from 1 on"),
        ("segmentation_torch", ["--by", "numpy"], "argument --by: invalid choice: 'numpy'"),
        ("segmentation_torch", ["--out", "nowhere/x.png"], "argument --out: 'nowhere/x.png' is not the name of a .png in a folder"),
    ],
)
def test_a_wrong_argument_is_named(name, arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        load(name).main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_the_numpy_example_learns(capsys):
    runpy.run_path(str(EXAMPLES / "autoencoder_numpy.py"), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    first, last = (float(line.split()[-1]) for line in (lines[0], lines[-1]))
    assert last < 0.5 * first
