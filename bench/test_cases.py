"""The cases of `cases.table` under pytest-benchmark.

`pytest bench` times fastloss; `pytest bench --benchmark-disable` calls every row once on few elements. To compare rows with each
other in interleaved rounds, use `python -m bench`. To compare fastloss with its own earlier times, use the options
`--benchmark-autosave` and `--benchmark-compare` of pytest-benchmark.
"""

from __future__ import annotations

import pytest

from bench.batch import Batch
from bench.row import expected


@pytest.mark.filterwarnings("default")  # other libraries may warn
def test_case(benchmark, suite, case):
    left_out = len(suite.record.content["left_out"])
    batch = Batch(case)
    rows = [row for row, _ in suite.record.check(case, suite.rows(batch), expected(batch))]  # calls each row once
    assert suite.record.content["left_out"][left_out:] == []
    limit = next(row for row in rows if row.name.startswith("limit"))

    def setup():  # leaves caches and memory as other work would
        limit.run()

    benchmark.group = f"{case.loss}, {case.part}"
    benchmark.extra_info["rows"] = [row.name for row in rows]
    benchmark.pedantic(rows[0].run, setup=setup, rounds=21, warmup_rounds=2)
