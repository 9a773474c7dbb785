"""The table of cases under pytest-benchmark, and the results of record; the cases themselves are in `fastloss.bench`."""
