"""Replace the part of a page that a command writes: the block between two comments."""

from __future__ import annotations


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
