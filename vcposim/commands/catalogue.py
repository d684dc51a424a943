"""`vcposim catalogue`: every named estimator with its formula and validity; one of them in full."""

import argparse
import json
import math
import os
import sys
from dataclasses import fields, is_dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vcposim.catalogue import CATALOGUE, FAMILIES, Entry, entry
from vcposim.catalogue.references import short
from vcposim.commands.completion import complete_with
from vcposim.errors import InputError, unknown_name

EXAMPLES = (
    "vcposim catalogue vcpo gspo",
    "vcposim catalogue --family unbiased",
)


def add_arguments(p: argparse.ArgumentParser) -> None:
    """What `vcposim catalogue` takes."""
    p.description = (
        "Every named estimator: the coefficient c that multiplies grad log pi, and when its mean is the gradient. "
        "With names, these entries in full. In formulas: R reward, w ratio of a trajectory, r_t of a token, L length, "
        "n group size, s score, rho = ESS / n."
    )
    p.epilog = "families:\n" + "\n".join(f"  {name:10} {says}" for name, says in FAMILIES.items())
    names = p.add_argument("name", nargs="*", metavar="NAME", help="entries to show in full, as in: vcpo rloo")
    complete_with(names, CATALOGUE)
    family = p.add_argument(
        "--family", nargs="+", default=[], metavar="F", help="only entries that belong to all of these (see below)"
    )
    complete_with(family, FAMILIES)
    p.add_argument("--json", action="store_true", help="one JSON object: name -> everything known about it")


def run(arguments: argparse.Namespace) -> None:
    """Choose, print."""
    for name in arguments.family:
        if name not in FAMILIES:
            raise unknown_name("family", name, FAMILIES)
    chosen = {name: entry(name) for name in arguments.name} or CATALOGUE
    chosen = {name: one for name, one in chosen.items() if set(arguments.family) <= set(one.families)}
    if not chosen:
        raise InputError(f"--family: no entry belongs to {' and '.join(arguments.family)}; ask for fewer")
    if arguments.json:
        print(json.dumps({name: as_json(one) for name, one in chosen.items()}, allow_nan=False))
    elif arguments.name:
        print("\n\n".join(in_full(name, one) for name, one in chosen.items()))
    else:
        print_table(chosen)


def as_json(one: Entry) -> dict[str, Any]:
    """Everything known about an entry, in plain values; the estimator as the Python that makes it."""
    return {
        "formula": one.formula,
        "unbiased": one.validity,
        "shift_invariant": one.shift_invariant,
        "families": list(one.families),
        "needs": sorted(one.estimator.needs),
        "breaks": list(one.breaks),
        "note": one.note,
        "references": {key: short(key) for key in one.references},
        "estimator": python(one.estimator),
        "host": None if one.host is None else name_of(one.host),
    }


def in_full(name: str, one: Entry) -> str:
    """An entry for a reader: a line a fact, nothing cut."""
    known = as_json(one)
    facts = {
        "coefficient": known["formula"],
        "unbiased": known["unbiased"],
        "where pi = mu": known["host"] or "the same formula" if "on_policy" in known["families"] else known["host"],
        "R + constant": "changes nothing" if known["shift_invariant"] else "changes it",
        "needs": ", ".join(["rewards", *(["ratios"] if "on_policy" not in known["families"] else []), *known["needs"]]),
        "family": ", ".join(known["families"]),
        "breaks": ", ".join(known["breaks"]),
        "note": known["note"],
        "sources": "; ".join(known["references"].values()),
        "in Python": known["estimator"],
    }
    return "\n".join([name, *(f"  {key:14} {value}" for key, value in facts.items() if value)])


def name_of(estimator: Any) -> str:
    """The catalogue's name of an estimator, or the Python that makes it where it has none."""
    return next((name for name, one in CATALOGUE.items() if one.estimator == estimator), python(estimator))


def python(x: Any) -> str:
    """The Python that makes a value: of a dataclass, only what is not its default.

    >>> python(entry("token_tis").estimator)
    "Estimator(weighting=Weighting(treatment='truncate', level='token', cap=2.0), baseline='group_mean')"
    """
    if callable(x) and hasattr(x, "__qualname__"):
        return x.__qualname__
    if isinstance(x, float) and not math.isfinite(x):
        return f"float('{x}')"
    if isinstance(x, tuple):
        return f"({', '.join(map(python, x))},)"
    if not is_dataclass(x):
        return repr(x)
    given = ((f.name, getattr(x, f.name)) for f in fields(x) if getattr(x, f.name) != f.default)
    return f"{type(x).__name__}({', '.join(f'{name}={python(value)}' for name, value in given)})"


def print_table(chosen: dict[str, Entry]) -> None:
    """One line an entry; names are never cut, formulas are printed as they are."""
    # into a file or a pipe, lines are as long as they need to be
    wide = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 400
    console = Console(width=wide)
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("name", no_wrap=True, min_width=max(map(len, chosen)))
    table.add_column("coefficient", overflow="fold")
    table.add_column("unbiased", overflow="fold")
    for name, one in chosen.items():
        table.add_row(Text(name), Text(one.formula), Text(one.unbiased.value))
    console.print(table)
    console.print(
        Text(f"{len(chosen)} estimators; vcposim catalogue NAME shows one in full, vcposim cite NAME its sources")
    )
