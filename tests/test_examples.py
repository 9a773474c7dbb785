"""The PyTorch examples run, learn, draw their pictures, and follow the same curve with PyTorch's losses."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread
from sklearn.datasets import load_digits

from tests.ulp import TRAINING, assert_close

torch = pytest.importorskip("torch")

from examples import last_layer_torch, segmentation_classes_torch, segmentation_torch, vae_torch  # noqa: E402
from tests.labels import misplaced  # noqa: E402

DIGITS = ["--data", "digits", "--batch", "32"]
PHOTOGRAPHS = ["--data", "photographs", "--size", "32", "--batch", "4"]
TRAININGS = [
    (vae_torch, [*DIGITS, "--loss", "bce"]),
    (vae_torch, [*PHOTOGRAPHS, "--loss", "mse"]),
    (last_layer_torch, ["labels", "--labels", "300", "--parts", "800", "--batch", "32", "--rate", "0.01"]),
    (last_layer_torch, ["decoder", "--batch", "64"]),
    (last_layer_torch, ["segmentation", "--size", "16", "--batch", "4", "--rate", "0.01"]),
    (segmentation_torch, ["--size", "32", "--batch", "4"]),
    (segmentation_classes_torch, ["--size", "32", "--batch", "4"]),
]


@pytest.fixture(autouse=True)
def threads():
    """Restore the numbers of threads after an example."""
    import fastloss as fl

    before = torch.get_num_threads(), fl.get_num_threads()
    yield
    torch.set_num_threads(before[0])
    fl.set_num_threads(before[1])


@pytest.fixture
def figures(monkeypatch):
    """Return the list of saved figures."""
    saved, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **options: (saved.append(figure), save(figure, *args, **options)))
    return saved


def losses(history):
    return history.totals if isinstance(history, vae_torch.History) else history.losses


@pytest.mark.parametrize(("example", "options"), TRAININGS)
def test_learns_and_draws(example, options, tmp_path, capsys, figures):
    picture = tmp_path / "picture.png"
    history = example.main([*options, "--threads", "1", "--steps", "60", "--out", str(picture)])
    assert np.mean(losses(history)[-10:]) < 0.9 * np.mean(losses(history)[:3])
    if example is not last_layer_torch:  # which does not time the loss alone
        assert all(0 < loss < step for loss, step in zip(history.loss_seconds, history.step_seconds, strict=True))
    assert imread(picture).std() > 0.1
    assert [misplaced(figure) for figure in figures] == [[]]
    assert f"picture: {picture}" in capsys.readouterr().out.replace("\n", "")


@pytest.mark.parametrize(("example", "options"), TRAININGS)
def test_the_same_training_by_torch(example, options, tmp_path):
    rest = ["--threads", "1", "--steps", "4", "--out", str(tmp_path / "x.png")]
    runs = [example.main([*options, *rest, "--by", by]) for by in ("fastloss", "torch")]
    assert_close(losses(runs[0]), losses(runs[1]), TRAINING)


@pytest.mark.parametrize("data", [DIGITS, PHOTOGRAPHS])
def test_no_reconstruction_is_below_the_entropy(data, tmp_path):
    history = vae_torch.main([*data, "--threads", "1", "--steps", "4", "--out", str(tmp_path / "x.png")])
    assert all(0 < floor < value for floor, value in zip(history.floors, history.reconstructions, strict=True))


def test_samples_look_like_digits():
    options = vae_torch.parse(["--batch", "64", "--steps", "300"])
    torch.set_num_threads(1)
    torch.manual_seed(0)
    data, model = vae_torch.Digits(seed=0), vae_torch.VAE(colours=1)
    vae_torch.train(model, data, options, lambda _: None)
    model.eval()
    with torch.inference_mode():
        samples = vae_torch.sample(model, (256, 32, 1, 1), torch.Generator().manual_seed(1))
    digits = load_digits()
    distances = torch.cdist(samples.flatten(1), torch.from_numpy(digits.data / data.largest).float())
    apart = torch.cdist(data.held_out.flatten(1) / data.largest, data.training.flatten(1) / data.largest)
    assert distances.min(dim=1).values.mean() < 1.5 * apart.min(dim=1).values.mean()
    assert set(digits.target[distances.argmin(dim=1)]) == set(range(10))


@pytest.mark.parametrize(
    ("example", "arguments", "message"),
    [
        (vae_torch, ["--data", "photographs", "--size", "50"], "'50' is not a multiple of 8 from 16 to 256"),
        (vae_torch, ["--size", "64"], "--size is for photographs: digits have 8 x 8 pixels"),
        (vae_torch, ["--beta", "-1"], "'-1' is not a finite number from 0 on"),
        (vae_torch, ["--by", "jax"], "invalid choice: 'jax'"),
        (segmentation_torch, ["--size", "40"], "'40' is not a multiple of 16 from 32 to 256"),
        (segmentation_torch, ["--batch", "0"], "'0' is not a whole number from 1 on"),
        (segmentation_classes_torch, ["--size", "60"], "'60' is not a multiple of 8 from 16 to 384"),
        (last_layer_torch, ["poems"], "invalid choice: 'poems'"),
        (last_layer_torch, ["segmentation", "--size", "400"], "'400' is not a whole number from 16 to 384"),
        (segmentation_torch, ["--out", "nowhere/x.png"], "'nowhere/x.png' is not the name of a .png in a folder that exists"),
    ],
)
def test_errors_name_bad_options(example, arguments, message, capsys):
    with pytest.raises(SystemExit):
        example.main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("example", "options"), [(vae_torch, DIGITS), (vae_torch, PHOTOGRAPHS), *TRAININGS[-3:]])
def test_a_script_runs_by_itself(example, options, tmp_path):
    arguments = [sys.executable, example.__file__, *options, "--steps", "1", "--threads", "1"]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (picture,) = tmp_path.iterdir()
    assert f"picture: {picture.name}" in done.stdout
