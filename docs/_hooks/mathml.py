"""Formulas as MathML, made when the site is built: no script, no font and no network in the reader's browser."""

from typing import Any

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx


def mathml(latex: str, display: str = "inline") -> str:
    r"""The formula; bars of a norm are as high as a letter, which exponents need to stand where they belong.

    >>> "stretchy" in mathml(r"\lVert s \rVert^2")
    True
    """
    found = convert(latex, display=display)
    return found.replace("<mo>&#x02016;</mo>", '<mo stretchy="false">&#x02016;</mo>')


def inline(self: Any, node: nodes.math) -> None:
    self.body.append(mathml(node.astext()))
    raise nodes.SkipNode


def block(self: Any, node: nodes.math_block) -> None:
    # a long formula scrolls by itself, and what scrolls has to be reachable by keyboard
    self.body.append(f'<div class="formula" tabindex="0">{mathml(node.astext(), "block")}</div>\n')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_html_math_renderer("mathml", (inline, None), (block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
