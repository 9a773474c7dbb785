"""The command line: `python -m fastloss demo`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main() -> int:
    """Run a command and return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m fastloss", description="Losses on large image batches, and their gradients.")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="train an autoencoder on photographs, once with cross-entropy and once with squared error")
    demo.add_argument("--steps", type=positive, default=1000, help="gradient steps for each of the two trainings (default: %(default)s)")
    demo.add_argument("--png", type=Path, default=Path("fastloss-demo.png"), help="file for the picture (default: %(default)s)")
    arguments = parser.parse_args()
    try:
        from fastloss import demo as program
    except ModuleNotFoundError as missing:
        print(f"the demo needs {missing.name}, which is not installed: pip install 'fastloss[demo]'", file=sys.stderr)
        return 1
    return program.run(arguments.steps, arguments.png)


def positive(text: str) -> int:
    """Parse a whole number of 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
