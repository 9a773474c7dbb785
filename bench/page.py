"""Replace the part of a page that a command writes, the block between two comments; and the commands that measure such a part."""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench import machine


def marks(name: str, author: str) -> tuple[str, str]:
    """Return the comments at the begin and at the end of a block."""
    return f"<!-- {name}: written by {author} -->", f"<!-- end of {name} -->"


def has_block(text: str, name: str, author: str) -> bool:
    """Whether a page has both marks of a block, once each."""
    return all(text.count(mark) == 1 for mark in marks(name, author))


def replace_block(text: str, name: str, author: str, content: str) -> str:
    """Return a page's text with new content between the marks of a block. Raises `ValueError` if the page has no such block."""
    begin, end = marks(name, author)
    if not has_block(text, name, author):
        raise ValueError(f"the page needs, once each, a line {begin} and a line {end}")
    before, rest = text.split(begin)
    _, after = rest.split(end)
    return f"{before}{begin}\n\n{content}\n\n{end}{after}"


class Measurement(NamedTuple):
    """A measurement with a command, a results file, and a block in a page of its own."""

    command: str  # the name of its module
    description: str
    block: str  # the name of its block
    measure: Callable[[argparse.Namespace], dict[str, Any]]  # returns the results
    text: Callable[[dict[str, Any]], str]  # returns the tables of results in Markdown
    draw: Callable[[dict[str, Any], Path], None] | None = None  # draws the picture of results

    def filled(self, page: Path, content: dict[str, Any], source: Path | str) -> str:
        """Return a page's text with the tables of a results file between its marks."""
        return replace_block(page.read_text(), self.block, f"python -m {self.command} --write", self.markdown(content, source))

    def markdown(self, content: dict[str, Any], source: Path | str) -> str:
        """Return the tables of a results file, with the machine it was measured on."""
        origin = f"{machine.sentence(content['machine'])}; {content['date'][:10]}; all times are in `{source}`."
        return f"{self.text(content)}\n\n{origin}"

    def run(self, parser: argparse.ArgumentParser | None = None, arguments: Sequence[str] | None = None) -> None:
        """Measure or read, print, write, as the arguments of the command say."""
        parser = parser or argparse.ArgumentParser()
        parser.prog, parser.description = f"python -m {self.command}", self.description
        parser.add_argument("--threads", type=int, choices=range(1, machine.cpus() + 1), default=machine.cpus())
        parser.add_argument("--json", type=Path, metavar="FILE", help="write all times there")
        parser.add_argument("--show", type=Path, metavar="FILE", help="measure nothing: the tables of a file")
        parser.add_argument("--write", type=Path, metavar="PAGE", help="write the tables between this page's marks")
        if self.draw:
            parser.add_argument("--png", type=Path, metavar="FILE", help="draw the picture of the results there")
        options = parser.parse_args(arguments)
        content = json.loads(options.show.read_text()) if options.show else self.measured(options)
        if options.json:
            options.json.write_text(json.dumps(content, indent=1) + "\n")
        source = options.show or options.json or "memory"
        print(self.markdown(content, source))
        if options.write:
            options.write.write_text(self.filled(options.write, content, source))
        if self.draw and options.png:
            self.draw(content, options.png)

    def measured(self, options: argparse.Namespace) -> dict[str, Any]:
        """Measure; return the results with the date and the machine."""
        date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        return {"date": date, "machine": machine.description(options.threads), **self.measure(options)}
