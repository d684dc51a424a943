"""proofs/README.md, rendered from the claims, so that it cannot fall behind them (a test compares)."""
# ruff: noqa: E501 (tables in Markdown)

from __future__ import annotations

import importlib
from pathlib import Path

from proofs.claims import FAMILIES, Claim

HEAD = """# Proofs

What is claimed about the shipped functions, and how each claim is settled. `python -m proofs` checks all of it and prints
the verdicts; this page is generated (`python -m proofs --readme`) from the same registry.

| layer | what it covers | files |
|---|---|---|
| 1 exact | `fractions.Fraction` through the shipped functions: identities as `==`, all batches of small sizes, counterexamples | `setting.py`, `surd.py` |
| 2 symbolic | arrays of unknown length through the shipped functions; the formula that comes back is proved by induction, z3 and cvc5 | `symbolic.py`, `logic.py` (the proof kernel: trusted), `sums.py`, `evaluate.py`, `second_opinion.py` |
| 3 Coq | finite probability spaces, batches of any size, no axioms; and a generated file in which Coq checks that the shipped functions are its definitions | `coq/Vcposim.v`, `coq_export.py`, `coq_layer.py` |

How to read a file: its docstring says the statement in mathematics, the source, and the proof in words; the functions
below it do what the proof says. In layer 2, a comment `|- A -> B` is the theorem that the function returns. `prove` multiplies
out every sum it meets and leaves arithmetic to the solver; `induct`, `pointwise` and `exchange` are the steps about sums.

What must be trusted: for layer 1 Python; for layer 2 `logic.py` and z3's answers (`unsat`), asked again of cvc5; for layer 3 Coq.
What is *not* proved: rounding. Floats are the business of `tests/`.

To add a claim: write its file or function, and a `Claim` in the `CLAIMS` of its family; `tests/proofs` then requires that
every shipped function it names really runs when it is checked.
"""


def path() -> Path:
    """The file that holds the table."""
    return Path(__file__).parent / "README.md"


def render(claims: list[Claim]) -> str:
    """The page."""
    out = [HEAD]
    for family in FAMILIES:
        module = importlib.import_module(family)
        title = (module.__doc__ or "").split("\n")[0]
        out += [f"\n## {title}\n", f"File: `{family.split('.')[1]}.py`\n", _table(module.CLAIMS)]
    return "\n".join(out) + "\n"


def _table(claims: list[Claim]) -> str:
    rows = [
        "| claim | statement | assumptions | kind | layers | use in the code | Coq |",
        "|---|---|---|---|---|---|---|",
    ]
    for c in claims:
        layers = " ".join(str(k) for k, layer in enumerate((c.exact, c.symbolic, c.coq), 1) if layer)
        cells = (c.name, c.statement, c.assumptions, c.kind, layers or "none",
                 ", ".join(f"`{s}`" for s in c.shipped), ", ".join(f"`{s}`" for s in c.coq))  # fmt: skip
        rows.append("| " + " | ".join(x.replace("|", "\\|") for x in cells) + " |")
    return "\n".join(rows)
