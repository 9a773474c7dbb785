"""Run the benchmarks: `python -m bench`, or on a GPU `python -m bench --device cuda`."""

from __future__ import annotations

import argparse
import sys


def main() -> int:
    """Pass the arguments to the benchmark of the chosen device and return its exit status."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    chosen, rest = parser.parse_known_args()
    try:
        if chosen.device == "cuda":
            from bench import gpu  # works without the packages for tables and pictures, which the CPU benchmarks need

            return gpu.main(rest)
        from bench import command

        return command.main(rest)
    except ModuleNotFoundError as missing:
        print(f"the benchmarks need {missing.name}, which is not installed: pip install '.[bench]'", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
