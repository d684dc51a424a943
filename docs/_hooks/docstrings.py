"""Docstrings as they are written here, made into what Sphinx reads.

A docstring of this project is plain text that reads well in a terminal: `names` in single backticks, doctests, indented
examples, bullets, and the sections `Raises:`, `Attributes:` and their like. reStructuredText would take the stars, bars
and underscores of its formulas for markup, so they are escaped here.

>>> print("\\n".join(restructured(["Sum of |w|*n_i, see `ess`.", "", "Raises:", "    InputError: if `w` is empty."])))
Sum of \\|w\\|\\*n\\_i, see ``ess``.
<BLANKLINE>
**Raises:**
<BLANKLINE>
- ``InputError``: if ``w`` is empty.
"""

import importlib
import re
from typing import Any

from sphinx.application import Sphinx

SECTION = re.compile(r"(Args|Arguments|Attributes|Raises|Returns|Yields|Example|Examples|Source|Note)s?:$")
ITEM = re.compile(r"([*\w.\[\], |]+?)( \([^)]*\))?: (.*)")


def escape(text: str) -> str:
    """Prose without markup but for code in backticks."""
    parts = re.split(r"(`+)(.+?)\1", text)
    out = []
    for k in range(0, len(parts), 3):
        # *emphasis* is meant, a star between factors is not
        for i, piece in enumerate(re.split(r"((?<![\w*)])\*{1,2}[A-Za-z][^*]*[\w.]\*{1,2}(?![\w*]))", parts[k])):
            out.append(piece if i % 2 else re.sub(r"([\\*_|`])", r"\\\1", piece))
        if k + 2 < len(parts):
            code = parts[k + 2]
            # "``x`s" needs something that ends the markup
            # and nothing that is no space may stand right before it either
            stuck = re.search(r"[\w\])}|]$", parts[k])
            out.append(
                f"{chr(92) + ' ' if stuck else ''}``{code}``" + ("\\ " if re.match(r"[\w|(\[]", parts[k + 3]) else "")
            )
    return "".join(out)


def paragraphs(lines: list[str]) -> list[list[str]]:
    """Runs of lines that are not blank."""
    found: list[list[str]] = [[]]
    for line in lines:
        if line.strip():
            found[-1].append(line.rstrip())
        elif found[-1]:
            found.append([])
    return [one for one in found if one]


def indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def restructured(lines: list[str]) -> list[str]:
    """The lines of a docstring as reStructuredText."""
    out: list[str] = []
    before_is_literal = False
    for block in paragraphs(joined_code(lines)):
        literal = False
        head = block[0].strip()
        if head.startswith(">>>"):
            shift = indent(block[0])
            out += [line[shift:] for line in block]
        elif indent(block[0]) >= 2 and not head.startswith("- "):
            out += ([] if before_is_literal else ["::", ""]) + [f"    {line}" for line in block]
            literal = True
        elif SECTION.match(head) and len(block) > 1 and indent(block[1]) > indent(block[0]):
            out += [f"**{head}**", "", *items(block[1:])]
        else:
            out += prose(block)
        out.append("")
        before_is_literal = literal
    return out[:-1] if out else out


def joined_code(lines: list[str]) -> list[str]:
    """Lines in which code between backticks does not break; reST knows no other."""
    out: list[str] = []
    for line in lines:
        if out and out[-1].count("`") % 2 and line.strip() and not out[-1].lstrip().startswith(">>>"):
            out[-1] = f"{out[-1].rstrip()} {line.strip()}"
        else:
            out.append(line)
    return out


def items(lines: list[str]) -> list[str]:
    """`name: what it is`, with lines that go on deeper, as bullets."""
    shift = min(indent(line) for line in lines)
    out: list[str] = []
    for line in lines:
        text = line[shift:]
        match = ITEM.match(text)
        if not text.startswith(" ") and match:
            out.append(f"- ``{match[1]}``{match[2] or ''}: {escape(match[3])}")
        elif out:
            out.append(f"  {escape(text.strip())}")
        else:
            out.append(f"- {escape(text.strip())}")
    return out


def prose(block: list[str]) -> list[str]:
    """A paragraph, with bullets and tables as they are."""
    out: list[str] = []
    bullet = False
    for line in block:
        text = line.strip()
        if re.match(r"- \S", text):
            out += ([""] if out and not bullet else []) + [f"- {escape(text[2:])}"]
            bullet = True
        elif bullet and line.startswith(" "):
            out.append(f"  {escape(text)}")
        elif indent(line) >= 4 and out and not bullet:  # aligned examples below a line
            if not out[-1].startswith("|"):
                out.append("")
            out.append("| " + escape(text))
        else:
            out += ([""] if bullet or (out and out[-1].startswith("| ")) else []) + [escape(text)]
            bullet = False
    return out


def process(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    if re.match(
        r"(Alias for field number|str\(object=|int\(\[x\]\)|Create and return a new|Initialize self)",
        "".join(lines[:1]),
    ):
        lines[:] = []
    lines[:] = [*restructured(lines), ""]


def plainly(app: Sphinx, env: Any, node: Any, contnode: Any) -> Any:
    """A name that exists and has no entry of its own (a type variable, a union) is shown without a link."""
    if node.get("refdomain") != "py":
        return None
    module, _, name = str(node["reftarget"]).rpartition(".")
    try:
        getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        return None  # Sphinx says that it is missing
    return contnode


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("autodoc-process-docstring", process)
    app.connect("missing-reference", plainly)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
