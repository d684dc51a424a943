"""Plain text into Markdown: what is written for a terminal must read the same on a page."""

import re
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any


def plain(text: str) -> str:
    r"""Text in which nothing but code between backticks is markup.

    >>> plain("E[w_i] <= `n_i` |x|*2")
    'E\\[w\\_i\\] \\<= `n_i` \\|x\\|\\*2'
    """
    parts = re.split(r"(`[^`]+`)", str(text))
    return "".join(p if k % 2 else re.sub(r"([\\*_\[\]<>|${}~^#])", r"\\\1", p) for k, p in enumerate(parts))


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table; cells are Markdown, one line each, and may hold bars only as code or escaped."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        lines.append("| " + " | ".join(_cell(x) for x in row) + " |")
    return "\n".join(lines) + "\n"


def _cell(x: Any) -> str:
    text = " ".join(str(x).split())
    return re.sub(r"(?<!\\)\|", r"\\|", text) or " "


def fence(code: str, language: str = "text") -> str:
    """A code block."""
    return f"```{language}\n{code.rstrip()}\n```\n"


def wrapped(command: str, width: int = 78) -> str:
    r"""A long command over several lines, as a shell takes it.

    >>> print(wrapped("vcposim plan --devices 8 --groups 16", 24))
    vcposim plan --devices 8 \
      --groups 16
    """
    return " \\\n  ".join(textwrap.wrap(command, width, break_long_words=False, break_on_hyphens=False))


def number(x: float | None) -> str:
    """Three digits, and none for what is zero but for rounding.

    >>> number(0.12345), number(3e-31), number(1234.5)
    ('0.123', '0', '1.23e+03')
    """
    if x is None:
        return "—"
    return "0" if abs(x) < 1e-12 else f"{x:.3g}"
