"""The command line: `python -m fastloss demo` and `python -m fastloss bench`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main() -> int:
    """Run a command and return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m fastloss", description="Losses on large image batches, and their gradients.")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="train an autoencoder on real photographs, once with cross-entropy and once with squared error")
    demo.add_argument("--steps", type=positive, default=1000, help="gradient steps for each of the two trainings (default: %(default)s)")
    demo.add_argument("--png", type=Path, default=Path("fastloss-demo.png"), help="where the picture goes (default: %(default)s)")
    # what it takes depends on packages that only it needs, and so it reads its arguments itself
    commands.add_parser("bench", add_help=False, help="time the losses against NumPy, other libraries, and what the memory allows")
    arguments, rest = parser.parse_known_args()
    if rest and arguments.command != "bench":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        if arguments.command == "bench":
            device = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
            device.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
            where, others = device.parse_known_args(rest)
            if where.device == "cuda":
                from fastloss.bench import gpu  # which needs none of the packages that the other does

                return gpu.main(others)
            from fastloss.bench import command

            return command.main(rest)
        from fastloss import demo as program
    except ModuleNotFoundError as missing:
        needed = f"{missing.name}, which is not installed: pip install 'fastloss[{arguments.command}]'"
        print(f"the {arguments.command} needs {needed}", file=sys.stderr)
        return 1
    return program.run(arguments.steps, arguments.png)


def positive(text: str) -> int:
    """Return a whole number from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
