"""The command line: `fastloss score`, `fastloss demo` and `fastloss cache`, or the same after `python -m`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from fastloss.kernel.cache import MOST_BYTES, kernel_cache
from fastloss.score.arguments import add_arguments, whole


def main(given: Sequence[str] | None = None) -> int:
    """Run a command, by default the one of the command line, and return its exit status."""
    parser = argparse.ArgumentParser(prog="fastloss", description="Losses on large image batches, and their gradients.")
    commands = parser.add_subparsers(dest="command", required=True)
    add_arguments(commands.add_parser("score", help="compute a loss of files larger than memory: of each image, and in total"))
    demo = commands.add_parser("demo", help="train an autoencoder on photographs, once with cross-entropy and once with squared error")
    demo.add_argument(
        "--steps", type=partial(whole, 1), default=1000, help="gradient steps for each of the two trainings (default: %(default)s)"
    )
    demo.add_argument("--png", type=Path, default=Path("fastloss-demo.png"), help="file for the picture (default: %(default)s)")
    kernels = commands.add_parser("cache", help="show the folder of compiled kernels, or delete them")
    kernels.add_argument("--clear", action="store_true", help="delete all kernels")
    arguments = parser.parse_args(given)
    if arguments.command == "score":
        return run_score(arguments, is_process=given is None)
    return show_cache(arguments.clear) if arguments.command == "cache" else run_demo(arguments.steps, arguments.png)


def run_score(arguments: argparse.Namespace, is_process: bool) -> int:
    """Compute the loss of files."""
    try:
        from fastloss.score import command

        return command.run(arguments, is_process)
    except ModuleNotFoundError as missing:
        print(f"fastloss score needs {missing.name}, which is not installed: pip install 'fastloss[files]'", file=sys.stderr)
        return 1


def run_demo(steps: int, picture: Path) -> int:
    """Train the demo's autoencoders."""
    try:
        from fastloss import demo as program
    except ModuleNotFoundError as missing:
        print(f"the demo needs {missing.name}, which is not installed: pip install 'fastloss[demo]'", file=sys.stderr)
        return 1
    return program.run(steps, picture)


def show_cache(clear: bool) -> int:
    """Print where compiled kernels are and how much memory they take, or delete them."""
    store = kernel_cache()
    if store.folder is None:
        print("there is no home folder, so no kernels are stored; accepted: a folder in FASTLOSS_CACHE_DIR")
    elif clear:
        print(f"deleted {count_files(store.clear())} from {store.folder}")
    else:
        entries = store.entries()
        size = sum(entry.size for entry in entries) / 2**20
        print(f"{store.folder}: {count_files(len(entries))}, {size:.2f} MiB of at most {MOST_BYTES >> 20}")
        with store.opened():
            print("".join(f"{fault}\n" for fault in store.faults), end="")
    return 0


def count_files(count: int) -> str:
    """Return a number of files in words."""
    return f"{count} file{'' if count == 1 else 's'}"


if __name__ == "__main__":
    sys.exit(main())
