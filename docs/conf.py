"""Configure the documentation's build, `python -m sphinx -W docs docs/_build`. Neither the build nor the pages need a network."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from types import ModuleType
from typing import Any

from docutils import nodes
from math_core import LatexError, LatexToMathML
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.util.docutils import SphinxTranslator

import fastloss
import fastloss.torch

project = "fastloss"
version = release = fastloss.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["_build"]
default_role = "py:obj"  # docstrings put names and formulas between single backticks; names of the package become links
nitpicky = True  # a broken reference is an error,
nitpick_ignore_regex = [("py:obj", ".*")]  # unless it has the default role

myst_enable_extensions = ["amsmath", "dollarmath", "substitution"]
myst_heading_anchors = 3
autodoc_typehints = "none"
napoleon_use_rtype = False
copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True

html_theme = "pydata_sphinx_theme"
html_title = "fastloss"
html_static_path = ["_static"]
html_css_files = ["fastloss.css"]
html_math_renderer = "mathml"
html_copy_source = False
html_show_copyright = False
html_context = {"default_mode": "auto"}
html_sidebars: dict[str, list[str]] = {"**": []}  # every page is in the header
html_theme_options = {
    "header_links_before_dropdown": 7,
    "footer_start": [],
    "footer_end": [],
    "show_toc_level": 2,
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}


def is_loss(member: object) -> bool:
    """Return whether a public object is a loss: an instance, and so neither a class nor a function."""
    return not inspect.isclass(member) and not inspect.isfunction(member)


def directives(module: ModuleType, name: str, kind: Callable[[object], bool]) -> str:
    """Write an autodoc directive for each public object of a kind."""
    lines = [f".. {name}:: {module.__name__}.{member}" for member in module.__all__ if kind(getattr(module, member))]
    return "\n".join(["```{eval-rst}", *lines, "```"])


myst_substitutions = {
    "losses": directives(fastloss, "autofunction", is_loss),  # a loss is called like a function, and has a function's signature
    "torch_modules": directives(fastloss.torch, "autoclass", inspect.isclass),
    "torch_functions": directives(fastloss.torch, "autofunction", inspect.isfunction),
}


def to_restructured_text(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Mark a docstring's formulas and code as literal blocks, and escape bars in its sentences.

    These blocks are the indented paragraphs, and the lines under "Example:".
    """
    marked: list[str] = []
    above, literal = "", False
    for line in lines:
        text = line
        if line.strip():
            literal = literal and indent(line) > indent(above)
            starts = above == "Example:" or (bool(marked) and not marked[-1].strip())
            if not literal and starts and indent(line) > indent(above):
                marked += ["", " " * indent(above) + "::", ""]
                literal = True
            if not literal:
                above = line
                text = re.sub(r"(`[^`]*`)|\|", lambda found: found[1] or r"\|", line)
        marked.append(text)
    lines[:] = marked


def indent(line: str) -> int:
    """Count the spaces before a line's text."""
    return len(line) - len(line.lstrip())


def write_formula(translator: SphinxTranslator, node: nodes.math | nodes.math_block) -> None:
    """Write a formula as MathML, which browsers show without a script or an additional font."""
    is_block = isinstance(node, nodes.math_block)
    try:
        formula = LatexToMathML().convert_with_local_state(node.astext(), displaystyle=is_block)
    except LatexError as error:
        logging.getLogger(__name__).warning("%s: %s", error, node.astext(), location=node)
    else:
        translator.body.append(f'<div class="formula">{formula}</div>' if is_block else formula)
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, Any]:
    """Add the renderer of formulas and the reader of docstrings."""
    app.add_html_math_renderer("mathml", (write_formula, None), (write_formula, None))
    app.connect("autodoc-process-docstring", to_restructured_text, priority=400)  # before napoleon's listener, whose priority is 500
    return {"parallel_read_safe": True, "parallel_write_safe": True}
