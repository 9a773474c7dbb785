"""`fastloss score`: the losses of files, the same bits after an interrupt, memory, pictures, errors in one line."""

from __future__ import annotations

import csv
import math
import os
import re
import signal
import subprocess
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import pytest
import zarr
from PIL import Image
from pyarrow import parquet

import fastloss as fl
from fastloss import __main__
from fastloss.score import batches, statistics, thumbnails
from fastloss.score.batches import Scores
from tests.labels import misplaced
from tests.ulp import SUM, assert_close

BCE = fl.binary_cross_entropy_with_logits
SHAPE = (23, 3, 12, 10)
SCALE = 1 / 255


@pytest.fixture
def folder(tmp_path, rng, monkeypatch):
    """Make the current folder one with logits and images, and batches of a few images."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(batches, "BATCH_BYTES", 4 * 1800)
    np.save("x.npy", (3 * rng.standard_normal(SHAPE)).astype(np.float32))
    np.save("y.npy", rng.integers(0, 256, SHAPE, dtype=np.uint8))
    return tmp_path


def score(*arguments, x="x.npy", y="y.npy", loss="binary_cross_entropy_with_logits", out="out.csv"):
    """Run the command in this process."""
    return __main__.main(["score", str(x), str(y), "--loss", loss, "--out", str(out), *map(str, arguments)])


def rows(path="out.csv"):
    """Return the rows of the output, without the header."""
    with Path(path).open(newline="") as file:
        return list(csv.reader(file))[1:]


def losses(path="out.csv"):
    """Return the losses of the output; NaN where there is none."""
    return np.array([float(row[-1] or "nan") for row in rows(path)])


def total(text):
    """Return the total that the summary shows."""
    return float(re.search(r"images together\s*│\s*(\S+)", text)[1])


# --- results ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum", "batchmean"])
def test_losses_of_images_and_of_all(folder, capsys, reduction):
    x, y = np.load("x.npy"), np.load("y.npy")
    assert score("--target-scale", SCALE, "--reduction", reduction) == 0
    of_image = "sample_mean" if reduction == "mean" else "sample_sum"
    np.testing.assert_array_equal(losses(), BCE(x, y, target_scale=SCALE, reduction=of_image))
    assert [row[0] for row in rows()] == [str(k) for k in range(len(x))]
    want = fl.Accumulator(BCE, reduction=reduction, target_scale=SCALE)
    want.update(x, y)
    assert total(capsys.readouterr().out) == want.compute()
    assert sorted(path.name for path in folder.iterdir()) == ["out.csv", "x.npy", "y.npy"]


@pytest.mark.parametrize("name", ["binary_cross_entropy_with_logits", "sigmoid_focal_loss", "huber_loss", "dice_bce_with_logits_loss"])
@pytest.mark.parametrize("excluded", [False, True])
def test_every_kind_of_loss_with_its_options(folder, capsys, rng, name, excluded):
    x, y = np.load("x.npy"), np.load("y.npy")
    own = {"sigmoid_focal_loss": {"alpha": -1.0}, "huber_loss": {"delta": 0.5}, "dice_bce_with_logits_loss": {"smooth": 0.25}}.get(name, {})
    weight, mask = rng.random(SHAPE, dtype=np.float32), rng.random((len(x), 1, *SHAPE[2:])) < 0.5
    np.save("weight.npy", weight)
    np.save("mask.npy", mask)
    given = [text for option, value in own.items() for text in (f"--{option}", value)]
    files = ["--mask", "mask.npy", "--weight", "weight.npy", "--ignore-index", 7] if excluded else []
    options = {"target_scale": SCALE, **own, **({"weight": weight, "mask": mask, "ignore_index": 7} if excluded else {})}
    assert score("--target-scale", "1/255", *given, *files, loss=name) == 0
    loss = getattr(fl, name)
    np.testing.assert_array_equal(losses(), loss(x, y, reduction="sample_mean", **options))
    want = fl.Accumulator(loss, reduction="mean", target_scale=SCALE, **own)
    want.update(x, y, **{option: options[option] for option in ("weight", "mask", "ignore_index") if option in options})
    assert total(capsys.readouterr().out) == want.compute()


def test_arrays_that_are_the_same_for_all_images(folder):
    x, y = np.load("x.npy"), np.load("y.npy")
    np.save("pos.npy", pos_weight := np.array([1, 2, 3], np.float32).reshape(3, 1, 1))
    np.save("mask.npy", mask := np.arange(SHAPE[-1]) < 4)
    assert score("--target-scale", SCALE, "--pos-weight", "pos.npy", "--mask", "mask.npy") == 0
    options = {"target_scale": SCALE, "pos_weight": pos_weight, "mask": mask}
    np.testing.assert_array_equal(losses(), BCE(x, y, reduction="sample_mean", **options))


def test_dice_of_a_data_set_that_is_one_image(folder, capsys):
    x, y = np.load("x.npy"), np.load("y.npy")
    assert score("--target-scale", SCALE, "--no-per-sample", loss="dice_with_logits_loss") == 0
    np.testing.assert_array_equal(losses(), fl.dice_with_logits_loss(x, y, reduction="sample_mean", target_scale=SCALE))
    want = fl.Accumulator(fl.dice_with_logits_loss, target_scale=SCALE, per_sample=False)
    want.update(x, y)
    assert total(capsys.readouterr().out) == want.compute()


def test_images_without_elements_that_count_have_no_loss(folder, capsys):
    mask = np.ones(SHAPE, bool)
    mask[[0, 5]] = False
    np.save("mask.npy", mask)
    for loss in ("binary_cross_entropy_with_logits", "dice_with_logits_loss"):
        assert score("--target-scale", SCALE, "--mask", "mask.npy", "--png", "out.png", loss=loss) == 0
        assert [int(row[0]) for row in rows() if not row[-1]] == [0, 5]
        assert "without elements that count: 2 images" in capsys.readouterr().out
    np.save("mask.npy", np.zeros(SHAPE, bool))
    assert score("--target-scale", SCALE, "--mask", "mask.npy", "--png", "out.png") == 0
    assert np.isnan(losses()).all()


# --- classes ----------------------------------------------------------------------------------------------------------

CLASSES = 5
ENTRIES = (SHAPE[0], *SHAPE[2:])


@pytest.fixture
def masks(folder, rng):
    """Add logits of classes and class indices, of which some are 255, to the folder; return both."""
    z, t = (3 * rng.standard_normal((SHAPE[0], CLASSES, *SHAPE[2:]))).astype(np.float32), rng.integers(0, CLASSES, ENTRIES, dtype=np.uint8)
    t[rng.random(ENTRIES) < 0.2] = 255
    t[4] = 255
    np.save("z.npy", z)
    np.save("t.npy", t)
    return z, t


def score_classes(*arguments, x="z.npy", y="t.npy", loss="cross_entropy", **files):
    """Run the command with a loss of classes, whose targets of 255 are ignored."""
    return score("--ignore-index", 255, *arguments, x=x, y=y, loss=loss, **files)


@pytest.mark.parametrize("reduction", ["mean", "sum", "batchmean"])
@pytest.mark.parametrize(
    ("loss", "own"),
    [
        ("cross_entropy", {"label_smoothing": 0.1}),
        ("focal_cross_entropy_loss", {"gamma": 0.5}),
        ("dice_softmax_loss", {"smooth": 0.5}),
        ("dice_cross_entropy_loss", {"ce_weight": 0.5}),
    ],
)
def test_losses_of_classes(masks, capsys, rng, loss, own, reduction):
    z, t = masks
    options = {
        "weight": rng.uniform(0.5, 2, CLASSES).astype(np.float32), "mask": rng.random(ENTRIES) < 0.7,
        "pixel_weight": rng.random(ENTRIES, dtype=np.float32),
    }  # fmt: skip
    for name, x in options.items():
        np.save(f"{name}.npy", x)
    files = [text for name in options for text in (f"--{name.replace('_', '-')}", f"{name}.npy")]
    given = [text for name, x in own.items() for text in (f"--{name.replace('_', '-')}", x)]
    assert score_classes(*given, *files, "--reduction", reduction, loss=loss) == 0
    of_image = "sample_mean" if reduction == "mean" else "sample_sum"
    with pytest.warns(RuntimeWarning) if reduction == "mean" else nullcontext():
        want = getattr(fl, loss)(z, t, reduction=of_image, ignore_index=255, **own, **options)
    want[4] = np.nan  # all of its pixels are ignored
    np.testing.assert_array_equal(losses(), want)
    whole = fl.Accumulator(getattr(fl, loss), reduction=reduction, ignore_index=255, weight=options.pop("weight"), **own)
    whole.update(z, t, **options)
    assert total(capsys.readouterr().out) == whole.compute()


def test_classes_of_a_data_set_that_is_one_image(masks, capsys):
    np.save("weight.npy", weight := np.linspace(0.5, 2, CLASSES))
    assert score_classes("--no-per-sample", "--weight", "weight.npy", loss="dice_softmax_loss") == 0
    want = fl.dice_softmax_loss(*masks, weight, per_sample=False, ignore_index=255)
    assert_close(total(capsys.readouterr().out), want, SUM[np.dtype(np.float32)])


def palette_masks(t):
    """Write class indices as pictures with a palette."""
    for k, mask in enumerate(t):
        picture = Image.fromarray(mask)
        picture.putpalette(np.random.default_rng(0).permutation(768).astype(np.uint8).tobytes())  # makes it one of mode P
        picture.save(f"masks/{k:02}.png")
    return "z.npy", "masks", []


def grey_masks(t):
    """Write class indices as grey pictures."""
    for k, mask in enumerate(t):
        Image.fromarray(mask).save(f"masks/{k:02}.png")
    return "z.npy", "masks", []


def zarr_masks(t):
    """Write class indices, and the logits, as Zarr arrays in other chunks."""
    for name, images, x in (("z", 5, np.load("z.npy")), ("t", 3, t)):
        zarr.create_array(f"{name}.zarr", shape=x.shape, chunks=(images, *x.shape[1:]), dtype=x.dtype)[:] = x
    return "z.zarr", "t.zarr", []


def raw_masks(t):
    """Write class indices, and the logits, as raw numbers."""
    np.load("z.npy").tofile("z.raw")
    t.astype(np.int64).tofile("t.raw")
    shape = ",".join(map(str, (SHAPE[0], CLASSES, *SHAPE[2:])))
    return "z.raw", "t.raw", ["--dtype", "float32", "--target-dtype", "int64", "--shape", shape]


@pytest.mark.parametrize("make", [palette_masks, grey_masks, zarr_masks, raw_masks])
def test_class_indices_in_other_files(masks, capsys, make):
    assert score_classes() == 0
    want = total(capsys.readouterr().out), losses()
    Path("masks").mkdir()
    x, y, options = make(masks[1])
    assert score_classes(*options, x=x, y=y, out="other.csv") == 0
    assert total(capsys.readouterr().out) == want[0]
    np.testing.assert_array_equal(losses("other.csv"), want[1])


@pytest.mark.parametrize("is_raw", [False, True])
def test_probabilities_of_classes(masks, rng, is_raw):
    y = np.moveaxis(rng.dirichlet(np.ones(CLASSES), ENTRIES), -1, 1).astype(np.float32)
    (y.tofile if is_raw else lambda path: np.save(path, y))("y.raw" if is_raw else "y.npy")
    options = ["--dtype", "float32"] if is_raw else []
    assert score("--png", "out.png", *options, x="z.npy", y="y.raw" if is_raw else "y.npy", loss="cross_entropy") == 0
    np.testing.assert_array_equal(losses(), fl.cross_entropy(masks[0], y, reduction="sample_mean"))


VOC = {0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0), 3: (128, 128, 0), 4: (0, 0, 128), 15: (192, 128, 128), 255: (224, 224, 192)}


def test_classes_have_the_colours_of_pascal_voc(masks, monkeypatch):
    np.testing.assert_array_equal(thumbnails.class_colours(np.array([list(VOC)], np.uint8))[0], list(VOC.values()))
    (z, t), colours = masks, np.zeros((256, 3), np.uint8)
    colours[list(VOC)] = list(VOC.values())
    figures = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, path, **_: (figures.append(figure), Path(path).touch()))
    assert score_classes("--png", "out.png", "--worst", 2) == 0
    assert [misplaced(figure) for figure in figures] == [[]]
    shown = [axes.images[0].get_array() for axes in figures[0].axes if axes.images]
    worst = np.argsort(-np.nan_to_num(losses()))[:2]
    for k, (image, target) in zip(worst, zip(shown[::2], shown[1::2], strict=True), strict=True):
        np.testing.assert_array_equal(image, colours[z[k].argmax(axis=0)])
        np.testing.assert_array_equal(target, colours[t[k]])


def as_colours(t):
    """Write class indices as colours, which tell no index."""
    Path("masks").mkdir()
    for k, mask in enumerate(t):
        Image.fromarray(np.stack([mask] * 3, axis=-1)).save(f"masks/{k:02}.png")


WRONG_CLASSES = {  # by case: what is done to the class indices, files, further arguments, and the message
    "a class too many": (lambda t: np.save("t.npy", np.where(np.arange(23)[:, None, None] == 17, 5, t)), {}, [],
                         r"target\[17, 0, 0\] is 5; accepted: class indices from 0 to 4, and ignore_index=255"),
    "masks in colours": (as_colours, {"y": "masks"}, [], r"target \(23, 12, 10, 3\); accepted as targets: class indices, of an integer"),
    "shape of masks": (lambda t: np.save("t.npy", t[:, 1:]), {}, [], r"target \(23, 11, 10\); accepted as targets: class indices"),
    "a prediction as pictures": (as_colours, {"x": "masks"}, [], r"input: masks is a folder, but no Zarr array"),
    "fractions": (lambda t: np.save("t.npy", t.astype(float)), {"loss": "focal_cross_entropy_loss"}, [],
                  r"target has a floating-point dtype; accepted: class indices"),
    "weights": (lambda t: np.save("w.npy", np.ones(4)), {}, ["--weight", "w.npy"], r"weight has shape \(4,\); accepted: \(5,\), a weight"),
    "scale": (lambda t: None, {}, ["--target-scale", "1/255"], r"unknown option target_scale; accepted: "),
    "one sample": (lambda t: [np.save("z.npy", np.zeros(5)), np.save("t.npy", np.uint8(3))], {}, [],
                   r"input has shape \(5,\); accepted: at least one image"),
    "no picture": (lambda t: [np.save("z.npy", np.zeros((23, 5, 9))), np.save("t.npy", t[:, 0, :9])], {}, ["--png", "p.png"],
                   r"--png: an image has shape \(5, 9\); accepted: \(C, H, W\) with C classes"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG_CLASSES)
def test_wrong_use_of_losses_of_classes(masks, folder, capsys, case):
    spoil, files, options, message = WRONG_CLASSES[case]
    spoil(masks[1])
    before = set(folder.iterdir())
    assert score_classes(*options, **files) == 2
    assert re.search(message, one_line(capsys))
    assert set(folder.iterdir()) == before


# --- files ------------------------------------------------------------------------------------------------------------


def make_raw():
    np.load("x.npy").tofile("x.raw")
    np.load("y.npy").tofile("y.raw")
    shape = ",".join(map(str, SHAPE))
    return "x.raw", "y.raw", ["--dtype", "float32", "--target-dtype", "uint8", "--shape", shape]


def make_zarr():
    for name, images in (("x", 5), ("y", 3)):
        array = np.load(f"{name}.npy")
        zarr.create_array(f"{name}.zarr", shape=array.shape, chunks=(images, 2, 12, 10), dtype=array.dtype)[:] = array
    return "x.zarr", "y.zarr", []


def make_pictures():
    Path("pictures").mkdir()
    Path("pictures/notes.txt").write_text("no picture")
    for k, y in enumerate(np.load("y.npy")):
        Image.fromarray(np.ascontiguousarray(y.transpose(1, 2, 0))).save(f"pictures/{k:02}.png")
    return "x.npy", "pictures", []


@pytest.mark.parametrize("make", [make_raw, make_zarr, make_pictures])
def test_other_files_give_the_same_bits(folder, capsys, make):
    assert score("--target-scale", SCALE) == 0
    want = total(capsys.readouterr().out), losses()
    x, y, options = make()
    assert score("--target-scale", SCALE, *options, x=x, y=y, out="other.csv") == 0
    assert total(capsys.readouterr().out) == want[0]
    np.testing.assert_array_equal(losses("other.csv"), want[1])
    if make is make_pictures:
        assert [row[1] for row in rows("other.csv")] == [f"{k:02}.png" for k in range(SHAPE[0])]


def test_grey_pictures_and_channels_last(folder):
    gray, colours = np.load("y.npy")[:, 0], np.load("y.npy").transpose(0, 2, 3, 1)
    x = np.load("x.npy")
    for k in range(len(x)):
        for name, picture in (("gray", gray[k]), ("colours", np.ascontiguousarray(colours[k]))):
            Path(name).mkdir(exist_ok=True)
            Image.fromarray(picture).save(f"{name}/{k:02}.png")
    for name, shaped, target in (("gray", x[:, :1], gray[:, None]), ("colours", np.ascontiguousarray(x.transpose(0, 2, 3, 1)), colours)):
        np.save("shaped.npy", shaped)
        assert score("--target-scale", SCALE, x="shaped.npy", y=name) == 0
        want = BCE(shaped, np.ascontiguousarray(target), target_scale=SCALE, reduction="sample_mean")
        np.testing.assert_array_equal(losses(), want)


def test_bfloat16(folder):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    x, y = np.load("x.npy").astype(ml_dtypes.bfloat16), np.load("y.npy")
    x.tofile("x.raw")
    assert score("--target-scale", SCALE, "--dtype", "bfloat16", "--shape", ",".join(map(str, SHAPE)), x="x.raw") == 0
    np.testing.assert_array_equal(losses(), BCE(x, y, target_scale=SCALE, reduction="sample_mean"))


def test_parquet(folder):
    mask = np.ones(SHAPE, bool)
    mask[4] = False
    np.save("mask.npy", mask)
    assert score("--target-scale", SCALE, "--mask", "mask.npy", out="out.parquet") == 0
    table = parquet.read_table("out.parquet").to_pydict()
    assert table["image"] == list(range(SHAPE[0]))
    assert [k for k, x in enumerate(table["loss"]) if x is None] == [4]
    want = BCE(np.load("x.npy"), np.load("y.npy"), target_scale=SCALE, mask=mask, reduction="sample_sum") / np.prod(SHAPE[1:])
    assert [x for x in table["loss"] if x is not None] == [x for k, x in enumerate(want) if k != 4]


# --- statistics -------------------------------------------------------------------------------------------------------


def test_the_worst_images_are_named(folder, capsys):
    _, y, _ = make_pictures()
    assert score("--target-scale", SCALE, "--worst", 3, y=y) == 0
    order = np.argsort(-losses())[:3]
    assert re.findall(r"image (\d+), (\S+)", capsys.readouterr().out) == [(str(k), f"{k:02}.png") for k in order]


@pytest.mark.parametrize("count", [0, 1, 2, 1000, 5003])
def test_statistics_of_a_file_are_those_of_the_array(tmp_path, rng, monkeypatch, count):
    monkeypatch.setattr(statistics, "CHUNK", 700)
    x = np.round(rng.standard_normal(count) * 10 ** rng.uniform(-9, 9, count), 3)
    x[rng.random(count) < 0.1] = np.nan
    x[rng.random(count) < 0.01] = np.inf
    x.tofile(tmp_path / "values")
    values, numbers = statistics.Values(tmp_path / "values"), x[~np.isnan(x)]
    shares = (0.0, 0.01, 0.25, 0.5, 0.77, 0.99, 1.0)
    want = np.quantile(numbers, shares, method="inverted_cdf") if numbers.size else [math.nan] * len(shares)
    np.testing.assert_array_equal(values.quantiles(shares), want)
    assert (values.images, values.count) == (count, numbers.size)
    order = [k for k in np.argsort(-x, kind="stable") if not np.isnan(x[k])][:20]
    assert values.worst(20) == [(k, x[k]) for k in order]
    finite = numbers[np.isfinite(numbers)]
    counts, edges = values.histogram(9)
    np.testing.assert_array_equal(counts, np.histogram(finite, edges)[0])
    assert counts.sum() == finite.size


# --- interrupts -------------------------------------------------------------------------------------------------------


@contextmanager
def interrupted_after(count, monkeypatch):
    """Send Ctrl-C to this process while a batch is added."""
    calls = []
    add = Scores._add

    def add_and_interrupt(self, *arguments):
        add(self, *arguments)
        calls.append(self)
        if len(calls) == count:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Scores, "_add", add_and_interrupt)
        yield


@pytest.mark.parametrize("loss", ["binary_cross_entropy_with_logits", "dice_with_logits_loss"])
def test_resuming_gives_the_same_bytes(folder, capsys, monkeypatch, loss):
    monkeypatch.setattr(batches, "BATCH_BYTES", 1800)
    fl.set_num_threads(1)
    assert score("--target-scale", SCALE, loss=loss) == 0
    want = total(capsys.readouterr().out), Path("out.csv").read_bytes()
    Path("out.csv").unlink()
    done = []
    for count in (4, 5):
        with interrupted_after(count, monkeypatch):
            assert score("--target-scale", SCALE, "--resume", loss=loss) == 130
        assert "interrupted; the same command with --resume goes on" in capsys.readouterr().err
        assert not Path("out.csv").exists()
        done.append(Path("out.csv.part").stat().st_size // 8)
    assert 0 < done[0] < done[1] < SHAPE[0]
    assert score("--target-scale", SCALE, "--resume", loss=loss) == 0
    assert (total(capsys.readouterr().out), Path("out.csv").read_bytes()) == want
    assert not list(folder.glob("out.csv.*"))


def test_resuming_computes_only_what_is_missing(folder, monkeypatch):
    fl.set_num_threads(1)
    with interrupted_after(3, monkeypatch):
        assert score("--target-scale", SCALE) == 130
    done = Path("out.csv.part").stat().st_size // 8
    first = []
    read = batches.Batches.read
    monkeypatch.setattr(batches.Batches, "read", lambda self, a, b: (first.append(a), read(self, a, b))[1])
    assert score("--target-scale", SCALE, "--resume") == 0
    assert min(first) == done > 0


def test_numbers_after_the_last_state_are_dropped(folder, monkeypatch, capsys):
    with interrupted_after(3, monkeypatch):
        assert score("--target-scale", SCALE) == 130
    with Path("out.csv.part").open("ab") as file:  # written after the state, by a process that was killed
        file.write(b"half a num")
    assert score("--target-scale", SCALE, "--resume") == 0
    np.testing.assert_array_equal(losses(), BCE(np.load("x.npy"), np.load("y.npy"), target_scale=SCALE, reduction="sample_mean"))


def test_other_arguments_or_files_are_not_resumed(folder, monkeypatch, capsys):
    with interrupted_after(2, monkeypatch):
        assert score("--target-scale", SCALE) == 130
    kept = Path("out.csv.part").read_bytes(), Path("out.csv.state").read_bytes()
    capsys.readouterr()
    assert score("--target-scale", 0.5, "--resume") == 2
    assert "is from a run whose target_scale was 0.00392" in capsys.readouterr().err
    os.utime("x.npy", (1, 1))
    assert score("--target-scale", SCALE, "--resume") == 2
    assert re.search(r"whose input was .*x.npy: float32 .* changed 1000000000 now", one_line(capsys))
    assert (Path("out.csv.part").read_bytes(), Path("out.csv.state").read_bytes()) == kept
    assert score("--target-scale", SCALE) == 0


def test_two_processes_do_not_write_the_same_output(folder, monkeypatch, capsys):
    begun = []
    add = Scores._add

    def add_and_run_another(self, *arguments):
        add(self, *arguments)
        if not begun:
            begun.append(self)
            begun.append(run_process("x.npy", "y.npy", "--loss", "mse_loss", "--out", "out.csv"))

    monkeypatch.setattr(Scores, "_add", add_and_run_another)
    monkeypatch.setattr(batches.Batches, "prepare", lambda self: None)
    assert score("--target-scale", SCALE) == 0
    assert begun[1].returncode == 2
    assert "in use by another process" in begun[1].stderr
    np.testing.assert_array_equal(losses(), BCE(np.load("x.npy"), np.load("y.npy"), target_scale=SCALE, reduction="sample_mean"))


# --- processes --------------------------------------------------------------------------------------------------------


def run_process(*arguments, command=(sys.executable, "-m", "fastloss"), **options):
    """Run the command in a process of its own."""
    path = os.pathsep.join(filter(None, (str(Path(fl.__file__).parents[1]), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": path} | options.pop("env", {})
    return subprocess.run([*command, "score", *arguments], capture_output=True, text=True, check=False, env=environment, **options)


@pytest.mark.parametrize("command", [(sys.executable, "-m", "fastloss"), ("fastloss",)], ids=["module", "script"])
def test_the_command(folder, command):
    folder_of_scripts = Path(sys.executable).parent
    found = [str(folder_of_scripts / command[0])] if len(command) == 1 else list(command)
    options = ["--loss", "binary_cross_entropy_with_logits", "--target-scale", "1/255", "--out", "out.csv"]
    done = run_process("x.npy", "y.npy", *options, command=found)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    np.testing.assert_array_equal(losses(), BCE(np.load("x.npy"), np.load("y.npy"), target_scale=SCALE, reduction="sample_mean"))


def test_a_missing_package_is_named(folder):
    (folder / "pyarrow.py").write_text("raise ModuleNotFoundError(\"No module named 'pyarrow'\", name='pyarrow')")
    done = run_process("x.npy", "y.npy", "--loss", "mse_loss", "--out", "out.csv")
    assert (done.returncode, done.stderr) == (1, "fastloss score needs pyarrow, which is not installed: pip install 'fastloss[files]'\n")


def test_memory_does_not_depend_on_the_size(tmp_path):
    """More than 300 MB in files, with nothing compiled before: what the system counts for the process is less."""
    shape = (400, 3, 224, 224)
    zarr.create_array(tmp_path / "x.zarr", shape=shape, chunks=(16, *shape[1:]), dtype="f4", fill_value=1.0)
    zarr.create_array(tmp_path / "y.zarr", shape=shape, chunks=(16, *shape[1:]), dtype="u1", fill_value=7)
    options = ["--loss", "binary_cross_entropy_with_logits", "--target-scale", "1/255", "--out", "out.parquet", "--png", "out.png"]
    command = [sys.executable, "-m", "fastloss", "score", "x.zarr", "y.zarr", *options]
    # started by a small process: the system counts the memory of the process that a child was forked from as the child's
    code = "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=sys.stderr); "
    code += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    environment = os.environ | {"FASTLOSS_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", code, *command], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) * 1024 < 300e6 < np.prod(shape) * 5


# --- pictures ---------------------------------------------------------------------------------------------------------


def test_the_picture(folder, monkeypatch):
    figures = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, path, **_: (figures.append(figure), Path(path).touch()))
    assert score("--target-scale", SCALE, "--png", "out.png", "--worst", 5) == 0
    assert [misplaced(figure) for figure in figures] == [[]]
    worst = np.argsort(-losses())[:5]
    titles = [axes.get_title(loc="left") for axes in figures[0].axes if axes.get_title(loc="left")]
    assert titles == [f"image {k}\n{losses()[k]:.4g}" for k in worst]
    shown = [axes.images[0].get_array() for axes in figures[0].axes if axes.images]
    for k, (image, target) in zip(worst, zip(shown[::2], shown[1::2], strict=True), strict=True):
        probability = fl.reference.sigmoid(np.load("x.npy")[k].astype(float)).transpose(1, 2, 0)
        np.testing.assert_array_equal(image, (255 * probability + 0.5).astype(np.uint8))
        np.testing.assert_array_equal(target, np.load("y.npy")[k].transpose(1, 2, 0))


@pytest.mark.parametrize("shape", [(40, 30), (1, 40, 30), (40, 30, 3), (19, 40, 30), (3, 600, 20)])
def test_pictures_of_any_shape(folder, rng, shape):
    np.save("x.npy", rng.standard_normal((3, *shape)))
    np.save("y.npy", rng.random((3, *shape)))
    for loss in ("binary_cross_entropy_with_logits", "mse_loss"):
        assert score("--png", "out.png", loss=loss) == 0
        assert Path("out.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        Path("out.png").unlink()


# --- errors -----------------------------------------------------------------------------------------------------------


def one_line(capsys):
    """Return what was written to stderr, without the line's end."""
    text = capsys.readouterr().err
    assert text.count("\n") == 1
    assert text.startswith("fastloss score: ")
    return text[:-1]


def cut(name, count):
    """Cut bytes off a file's end."""
    os.truncate(name, Path(name).stat().st_size - count)


def with_nan(name, index):
    """Put a NaN into an array."""
    array = np.load(name)
    array[index] = math.nan
    np.save(name, array)


def pictures(change):
    """Make pictures, and change the last one."""
    make_pictures()
    change(Path("pictures/22.png"))


def damaged_zarr():
    """Make a Zarr array with a damaged chunk."""
    make_zarr()
    chunk = max((path for path in Path("y.zarr").rglob("*") if path.is_file() and path.name != "zarr.json"), key=str)
    chunk.write_bytes(b"damaged")


RAW = ["--dtype", "float32", "--shape", "23,3,12,10"]
WRONG = {  # by case: what is done to the files, further arguments, and the message
    "missing": (None, {"x": "z.npy"}, [], r"input: z.npy does not exist"),
    "missing mask": (None, {}, ["--mask", "m.npy"], r"mask: m.npy does not exist"),
    "truncated": (lambda: cut("x.npy", 10), {}, [], r"x.npy has 33,238 bytes; float32 of shape .* takes 33,248 with its header"),
    "truncated header": (lambda: cut("x.npy", 33_200), {}, [], r"x.npy is not a .npy file, or its header is damaged"),
    "no array": (lambda: Path("x.npy").write_text("nothing"), {}, [], r"x.npy is not a .npy file, or its header is damaged"),
    "objects": (lambda: np.save("x.npy", np.array([None, {}])), {}, [], r"x.npy holds Python objects"),
    "Fortran order": (lambda: np.save("x.npy", np.asfortranarray(np.load("x.npy"))), {}, [], r"x.npy is in Fortran order"),
    "dtype": (lambda: np.save("x.npy", np.zeros(SHAPE, int)), {}, [], r"input has dtype int64; accepted: float16, bfloat16"),
    "byte order": (lambda: np.save("y.npy", np.zeros(SHAPE, ">f4")), {}, [], r"target has non-native byte order"),
    "dtype of mask": (lambda: np.save("m.npy", np.ones(SHAPE)), {}, ["--mask", "m.npy"], r"mask has dtype float64; accepted: bool"),
    "shape": (lambda: np.save("y.npy", np.zeros((23, 3, 12, 9))), {}, [], r"input has shape .* and target \(23, 3, 12, 9\)"),
    "shape of mask": (lambda: np.save("m.npy", np.ones((4, 1), bool)), {}, ["--mask", "m.npy"], r"mask .*\(4, 1\)"),
    "number of images": (lambda: np.save("y.npy", np.zeros((22, *SHAPE[1:]))), {}, [], r"target \(22, 3, 12, 10\)"),
    "no images": (lambda: [np.save(name, np.zeros((0, 3))) for name in ("x.npy", "y.npy")], {}, [], r"input has shape \(0, 3\)"),
    "no axis": (lambda: [np.save(name, np.zeros(())) for name in ("x.npy", "y.npy")], {}, [], r"input has shape \(\)"),
    "NaN": (lambda: with_nan("x.npy", (17, 1, 2, 3)), {}, [], r"image 17 is NaN: 1 of \d+ elements of its input .* input\[17, 1, 2, 3\]"),
    "target out of range": (None, {}, ["--target-scale", "1", "--validate"], r"target\[0, 0, 0, \d\] is"),
    "integers": (lambda: np.save("y.npy", 9 * (np.arange(23) == 19)[:, None, None, None] * np.ones(SHAPE, int)), {}, [],
                 r"target\[19, 0, 0, 0\] is 9; accepted: targets in \[0, 1\]; for images"),
    "large image": (lambda: [np.lib.format.open_memmap(f"{n}.npy", "w+", t, (2, 4, 2048, 2048)) for n, t in (("x", "f4"), ("y", "u1"))],
                    {}, [], r"an image takes 80.0 MiB, with its target; accepted: at most 64 MiB"),
    "raw without shape": (lambda: Path("x.raw").touch(), {"x": "x.raw"}, ["--dtype", "float32"], r"x.raw is neither .npy nor Zarr"),
    "raw": (lambda: Path("x.raw").write_bytes(bytes(7)), {"x": "x.raw"}, RAW, r"x.raw has 7 bytes; float32 of shape .* takes 33,120$"),
    "name of dtype": (None, {}, ["--dtype", "float31"], r"'float31' is not a dtype"),
    "pictures as input": (make_pictures, {"x": "pictures"}, [], r"input: pictures is a folder, but no Zarr array"),
    "folder without pictures": (lambda: Path("empty").mkdir(), {"y": "empty"}, [], r"empty is a folder without pictures"),
    "size of a picture": (lambda: pictures(lambda p: Image.new("RGB", (9, 9)).save(p)), {"y": "pictures"}, [],
                          r"22.png has uint8 of shape \(9, 9, 3\); 00.png has uint8 of shape \(12, 10, 3\)"),
    "truncated picture": (lambda: pictures(lambda p: cut(p, 60)), {"y": "pictures"}, [], r"22.png cannot be read as a picture"),
    "no picture": (lambda: pictures(lambda p: p.write_text("x")), {"y": "pictures"}, [], r"22.png cannot be read as a picture"),
    "number of pictures": (lambda: pictures(Path.unlink), {"y": "pictures"}, [], r"target \(22, 3, 12, 10\)"),
    "Zarr chunk": (damaged_zarr, {"x": "x.zarr", "y": "y.zarr"}, [], r"y.zarr: images \d+ to \d+ cannot be read"),
    "Zarr group": (lambda: zarr.create_group("group.zarr"), {"x": "group.zarr"}, [], r"group.zarr is not a Zarr array"),
    "Zarr shape": (lambda: zarr.create_array("y.zarr", shape=(23, 3), dtype="u1"), {"y": "y.zarr"}, [], r"and target \(23, 3\)"),
    "option": (None, {"loss": "mse_loss"}, ["--pos-weight", "2"], r"unknown option pos_weight; accepted: weight"),
    "number": (None, {"loss": "huber_loss"}, ["--delta", "-1"], r"delta is -1.0; accepted: more than 0"),
    "scale": (lambda: np.save("y.npy", np.zeros(SHAPE)), {}, [], r"target_scale multiplies integer targets"),
    "format": (None, {"out": "out.txt"}, [], r"--out out.txt: the name must end in .csv or .parquet"),
    "folder": (None, {"out": "nowhere/out.csv"}, [], r"the folder .*nowhere does not exist"),
    "no picture shape": (lambda: [np.save(name, np.zeros((4, 9))) for name in ("x.npy", "y.npy")], {}, ["--png", "p.png"],
                         r"--png: an image has shape \(9,\)"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_errors_are_one_line_and_leave_no_file(folder, capsys, case):
    spoil, files, options, message = WRONG[case]
    if spoil:
        spoil()
    before = set(folder.iterdir())
    scaled = ["--target-scale", SCALE] if np.load("y.npy", allow_pickle=True).dtype == np.uint8 and "--target-scale" not in options else []
    scaled = ["--target-scale", SCALE] if case == "scale" else scaled
    assert score(*scaled, *options, **files) == 2
    assert re.search(message, one_line(capsys))
    assert set(folder.iterdir()) == before


def test_a_file_that_is_truncated_or_changed_meanwhile(folder, capsys, monkeypatch):
    add, x = Scores._add, np.load("x.npy")
    for spoil, message in (
        (lambda: cut("x.npy", 2000), "x.npy was truncated after it had been opened"),
        (lambda: os.utime("x.npy", (1, 1)), "input changed while"),
    ):
        np.save("x.npy", x)
        monkeypatch.setattr(Scores, "_add", lambda self, *arguments, spoil=spoil: (add(self, *arguments), spoil())[0])
        with monkeypatch.context() as patch:
            patch.setattr(fl, "get_num_threads", lambda: 1)
            assert score("--target-scale", SCALE) == 2
        assert message in one_line(capsys)
        assert not list(folder.glob("out*"))


def test_an_error_of_the_output_loses_no_result(folder, capsys, monkeypatch):
    Path("out.csv").write_text("before")
    with monkeypatch.context() as patch:
        patch.setattr("matplotlib.figure.Figure.savefig", lambda _, path, **__: Path(path).write_text("half") and os.open("z", os.O_RDONLY))
        assert score("--target-scale", SCALE, "--png", "out.png") == 2
    assert "No such file or directory: 'z'" in one_line(capsys)
    assert Path("out.csv").read_text() == "before"
    assert {path.name for path in folder.glob("out*")} == {"out.csv", "out.csv.part", "out.csv.state"}
    monkeypatch.setattr(batches.Batches, "score", None)  # nothing is computed again
    assert score("--target-scale", SCALE, "--resume") == 0
    np.testing.assert_array_equal(losses(), BCE(np.load("x.npy"), np.load("y.npy"), target_scale=SCALE, reduction="sample_mean"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--loss", "nonsense"], "invalid choice: 'nonsense'"),
        (["--loss", "mse_loss", "--shape", "3,x"], "'3,x' is not a shape"),
        (["--loss", "mse_loss", "--target-scale", "1/0"], "'1/0' is not a number"),
        (["--loss", "mse_loss", "--worst", "-1"], "'-1' is not a whole number of 0 or more"),
    ],
)
def test_wrong_arguments(folder, capsys, arguments, message):
    with pytest.raises(SystemExit) as end:
        __main__.main(["score", "x.npy", "y.npy", "--out", "out.csv", *arguments])
    assert end.value.code == 2
    assert message in capsys.readouterr().err
