"""The computed part of `simulations/LOG.md`, a page a claim, and the check of the numbers that are written by hand.

The part between the marks is made by `python -m simulations log` from `claims.py`, the committed proofs and summaries;
no number of it is typed. Below it stand dated findings in words; each paragraph names in backticks what its numbers
come from (an experiment, or a committed file), and `python -m simulations check` finds those that are not there.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from simulations import claims
from simulations.summaries import Section
from vcposim.errors import InputError

ROOT = Path(__file__).parents[1]
START, END = "<!-- computed: python -m simulations log -->", "<!-- end of what is computed -->"


# --- a page a claim ---------------------------------------------------------------------------------------------------


def computed(rows: Sequence[Mapping[str, Any]], sections: Sequence[Section]) -> str:
    """All claims as Markdown: a table of one line each, then each with its witnesses."""
    lines = ["| claim | word | number that decides | decided by |", "|---|---|---|---|"]
    for row in rows:
        claim = claims.BY_ID[row["claim"]]
        place = _link(row["decided_by"]) if row["decided_by"] else ""
        anchor = re.sub(r"[^\w -]", "", f"{claim.id} {claim.title}".lower()).replace(" ", "-")
        lines.append(
            f"| [{claim.id}](#{anchor}) {claim.title} | **{row['verdict']}** | {_cell(row['number'])} | {place} |"
        )
    conditions = {f"{s.id}/{v.key}": v.condition for s in sections for v in s.verdicts}
    for row in rows:
        claim = claims.BY_ID[row["claim"]]
        lines += ["", f"### {claim.id} {claim.title}", "", f"**{row['verdict']}**. {claim.statement}"]
        lines.append(f"([Source, and what would refute it](CLAIMS.md#{claim.id.lower()}).)")
        seen = [w for w in row["witnesses"] if w["source"] != "none"]
        if seen:
            lines += ["", "| witness | word | what it says | number |", "|---|---|---|---|"]
        for w in sorted(seen, key=lambda w: w["beside"]):
            condition = conditions.get(w["source"], "")
            says = w["statement"] + (f"; *if* {condition}" if condition else "")
            kind = w["kind"] + ", beside the claim" * w["beside"]
            lines.append(f"| {kind}, {_link(w['source'])} | {w['word']} | {_cell(says)} | {_cell(w['number'])} |")
        missing = [w["kind"] for w in row["witnesses"] if w["source"] == "none"]
        lines += ["", f"No witness: {', '.join(missing)}."] if missing else []
    return "\n".join(lines)


def _link(source: str) -> str:
    """A theorem or a question of an experiment, with a link to where its numbers are."""
    experiment, _, key = source.partition("/")
    return f"[{experiment}](results/{experiment}.json) {key}" if key else f"[{source}](../proofs/README.md)"


def _cell(text: str) -> str:
    """Text that a cell of a table holds as it is."""
    return re.sub(r"([|*<\[\]])", r"\\\1", text).replace("\\*if\\*", "*if*")


def rewritten(text: str, part: str) -> str:
    """The page with its computed part replaced.

    Raises:
        InputError: if the marks are not there, once each and in order.
    """
    if text.count(START) != 1 or text.count(END) != 1 or text.index(START) > text.index(END):
        raise InputError(f"FILE: needs one line {START!r} and below it one {END!r}; put them where the claims belong")
    return f"{text[: text.index(START)]}{START}\n\n{part}\n\n{text[text.index(END) :]}"


# --- numbers written by hand ------------------------------------------------------------------------------------------

NUMBER = re.compile(r"(?<![\w.,-])-?\d+\.\d{2,}(?:[eE][-+]?\d+)?(?![\w.]*\d)")
ANY = re.compile(r"-?\d+\.?\d*(?:[eE][-+]?\d+)?")
MARGIN = 0.5000001
"""of the last digit written; a summary's own numbers are rounded too"""


def numbers_without_a_source(text: str, sections: Iterable[Section]) -> list[str]:
    """Numbers with two decimals or more that what their paragraph names does not hold, in their order.

    A paragraph names sources in backticks: experiments, whose verdicts are searched (their numbers, conditions, notes
    and comparisons, not the points of figures: among thousands of those any number is found), and committed files.
    Signs are ignored: "worse by 0.02" is -0.02. A number is held if one of the source rounds to it. The computed part
    is made of summaries and left out.
    """
    by_id = {s.id: s for s in sections}
    before, _, rest = text.partition(START)
    found: list[str] = []
    for paragraph in re.split(r"\n\s*\n", before + rest.partition(END)[2] if rest else before):
        numbers = [m.group() for m in NUMBER.finditer(paragraph)]
        if numbers:
            held = [value for name in re.findall(r"`([^`\s]+)`", paragraph) for value in _numbers_of(name, by_id)]
            found += [number for number in numbers if not _holds(held, number)]
    return list(dict.fromkeys(found))


def _numbers_of(name: str, by_id: Mapping[str, Section]) -> list[float]:
    """The sizes of all numbers in a named source; none if it is no source."""
    file = ROOT / name
    if name in by_id:
        read = ("name", "value", "low", "high")  # what a reader reads, not p-values or powers
        text = json.dumps(
            [
                (v.number, v.condition, v.note, [{k: x for k, x in c.items() if k in read} for c in v.comparisons])
                for v in by_id[name].verdicts
            ]
        )
    elif file.suffix in (".md", ".json", ".jsonl") and ROOT in file.resolve().parents and file.is_file():
        text = file.read_text()
    else:
        return []
    return [abs(float(x)) for x in ANY.findall(text)]


def _holds(held: Sequence[float], number: str) -> bool:
    """Whether some value rounds to the number as it is written."""
    mantissa, _, exponent = number.lower().partition("e")
    unit = 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))
    return any(abs(v - abs(float(number))) <= MARGIN * unit for v in held)
