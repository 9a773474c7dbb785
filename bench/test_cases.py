"""Every case of record: `pytest bench` times fastloss, `pytest bench --benchmark-disable` runs every row once, on few elements.

`python -m bench` compares rows with each other, in interleaved rounds; this is for following one row over time, with
pytest-benchmark's own `--benchmark-autosave` and `--benchmark-compare`.
"""

from __future__ import annotations

import pytest

from bench import cases
from bench.batch import Batch
from bench.row import expected


@pytest.mark.filterwarnings("default")  # other libraries' are theirs
@pytest.mark.parametrize("case", cases.table(), ids=str)
def test_case(benchmark, suite, case):
    case = case.tiny if benchmark.disabled else case
    left_out = len(suite.record.content["left_out"])
    batch = Batch(case)
    rows = [row for row, _ in suite.record.check(case, suite.rows(batch), expected(batch))]  # which runs each once
    assert suite.record.content["left_out"][left_out:] == []
    limit = next(row for row in rows if row.name.startswith("limit"))

    def setup():  # caches and memory as behind other work
        limit.run()

    benchmark.group = f"{case.loss}, {case.part}"
    benchmark.extra_info["rows"] = [row.name for row in rows]
    benchmark.pedantic(rows[0].run, setup=setup, rounds=21, warmup_rounds=2)
