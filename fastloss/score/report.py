"""The results of a run: the table of all images in a CSV or Parquet file, and the summary in the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import csv
from rich.table import Table

import fastloss as fl
from fastloss.score.statistics import CHUNK, Values

FORMATS = (".csv", ".parquet")
QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)


def check_format(path: Path) -> None:
    """Raise ValueError for a path that no table can be written to."""
    if path.suffix not in FORMATS:
        raise ValueError(f"--out {path}: the name must end in {' or '.join(FORMATS)}")


def write_table(path: Path, suffix: str, values: Values, names: list[str] | None) -> None:
    """Write a row for each image: its index, its name if it has one, and its loss, which is empty if none of its elements counts."""
    schema = pa.schema([("image", pa.int64()), *([("name", pa.string())] if names else []), ("loss", pa.float64())])
    with make_writer(path, suffix, schema) as writer:
        for k, x in enumerate(values.chunks()):
            images = np.arange(k * CHUNK, k * CHUNK + len(x))
            losses = pa.array(x, from_pandas=True)  # NaN becomes null
            columns = [images, names[images[0] : images[-1] + 1], losses] if names else [images, losses]
            writer.write(pa.record_batch(columns, schema=schema))


def make_writer(path: Path, suffix: str, schema: Any) -> Any:
    """Return a writer of record batches to a file."""
    if suffix == ".csv":
        return csv.CSVWriter(path, schema)
    from pyarrow import parquet

    return parquet.ParquetWriter(path, schema)


def summary(total: fl.Accumulator, values: Values, worst: list[tuple[int, float]], names: list[str] | None) -> Table:
    """Make the table that is printed: the total, quantiles, and the worst images."""
    table = Table(title=f"{total.loss.__name__}, {total.reduction}")
    table.add_column("")
    table.add_column("loss", justify="right")
    table.add_row(f"all {values.images:,} images together", repr(float(total.compute())), end_section=not values.count)
    if empty := values.images - values.count:
        table.add_row(f"without elements that count: {empty:,} images", "")
    ends = values.quantiles((0.0, *QUANTILES, 1.0))
    for label, x in zip(("smallest", *(f"{share:.0%}" for share in QUANTILES), "largest"), ends, strict=True):
        table.add_row(label, f"{x:.6g}", end_section=label == "largest")
    for image, x in worst:
        table.add_row(title_of(image, names), f"{x:.6g}")
    return table


def title_of(image: int, names: list[str] | None) -> str:
    """Return an image's index, with its name if it has one."""
    return f"image {image}, {names[image]}" if names else f"image {image}"
