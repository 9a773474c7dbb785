"""The examples in PyTorch run, learn, draw what they say, and are the same training with PyTorch's losses."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from matplotlib.image import imread

from tests.ulp import TRAINING, assert_close

torch = pytest.importorskip("torch")

from examples import segmentation_torch, vae_torch  # noqa: E402

SMALL = ["--size", "32", "--batch", "4", "--threads", "1"]


@pytest.fixture(autouse=True)
def threads():
    """Put back the threads that an example has set."""
    import fastloss as fl

    before = torch.get_num_threads(), fl.get_num_threads()
    yield
    torch.set_num_threads(before[0])
    fl.set_num_threads(before[1])


def losses(history):
    return history.totals if isinstance(history, vae_torch.History) else history.losses


@pytest.mark.parametrize(("example", "options"), [(vae_torch, ["--loss", "bce"]), (vae_torch, ["--loss", "mse"]), (segmentation_torch, [])])
def test_learns_and_draws(example, options, tmp_path, capsys):
    picture = tmp_path / "picture.png"
    history = example.main([*SMALL, *options, "--steps", "60", "--out", str(picture)])
    assert np.mean(losses(history)[-10:]) < 0.9 * np.mean(losses(history)[:3])
    assert all(0 < loss < step for loss, step in zip(history.loss_seconds, history.step_seconds, strict=True))
    assert imread(picture).std() > 0.1
    assert f"picture: {picture}" in capsys.readouterr().out.replace("\n", "")


@pytest.mark.parametrize(("example", "options"), [(vae_torch, ["--loss", "bce"]), (vae_torch, ["--loss", "mse"]), (segmentation_torch, [])])
def test_the_same_training_by_torch(example, options, tmp_path):
    runs = [example.main([*SMALL, *options, "--steps", "4", "--by", by, "--out", str(tmp_path / "x.png")]) for by in ("fastloss", "torch")]
    assert_close(losses(runs[0]), losses(runs[1]), TRAINING)


def test_no_reconstruction_is_below_the_entropy(tmp_path):
    history = vae_torch.main([*SMALL, "--steps", "4", "--out", str(tmp_path / "x.png")])
    assert all(floor < value for floor, value in zip(history.floors, history.reconstructions, strict=True))


@pytest.mark.parametrize(
    ("example", "arguments", "message"),
    [
        (vae_torch, ["--size", "50"], "'50' is not a multiple of 8 from 16 to 256"),
        (vae_torch, ["--beta", "-1"], "'-1' is not a finite number from 0 on"),
        (vae_torch, ["--by", "jax"], "invalid choice: 'jax'"),
        (segmentation_torch, ["--size", "40"], "'40' is not a multiple of 16 from 32 to 256"),
        (segmentation_torch, ["--batch", "0"], "'0' is not a whole number from 1 on"),
        (segmentation_torch, ["--out", "nowhere/x.png"], "'nowhere/x.png' is not the name of a .png in a folder that exists"),
    ],
)
def test_bad_flags_are_named(example, arguments, message, capsys):
    with pytest.raises(SystemExit):
        example.main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("example", [vae_torch, segmentation_torch])
def test_a_script_runs_by_itself(example, tmp_path):
    arguments = [sys.executable, example.__file__, "--size", "32", "--batch", "2", "--steps", "1", "--threads", "1"]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (picture,) = tmp_path.iterdir()
    assert f"picture: {picture.name}" in done.stdout
