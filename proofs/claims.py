"""What a claim is, and what it takes for it to count as settled.

A claim names the shipped functions it is about and gives, layer by layer, how it is established:

- `exact`: runs the shipped functions on rational numbers and asserts; returns in words what was covered; -
`symbolic`: returns a `Theorem`, whose statement came from running the shipped functions on symbols, together with
`instance`, which gives rational values for its variables: the statement is evaluated on some of them, and one at
least   must meet its hypotheses, so that a theorem about nothing does not pass; - `coq`: names of lemmas of `coq/`.

Some claims are negative: a `witness` is a counterexample, evaluated. Where the field has a rule of thumb and no theorem
can be stated, the claim says `no theorem` and why.
"""

from __future__ import annotations

import importlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from proofs.logic import Theorem, obligations

FAMILIES = tuple(
    f"proofs.{name}"
    for name in [
        "t01_unbiased",
        "t02_optimal_baseline",
        "t03_ess",
        "t04_chi2",
        "t05_truncation",
        "t06_leave_one_out",
        "t07_independence",
        "t08_step",
        "t09_leverage",
        "t10_released",
        "t11_length",
        "t12_merge",
        "t13_group_std",
        "t14_control_variates",
        "t15_descent",
        "t16_collapse",
        "t17_centering",
    ]
)

Kind = Literal["theorem", "witness", "no theorem"]


@dataclass(frozen=True)
class Claim:
    """One row of the table."""

    name: str
    """family and short name, as in `T2.gap`"""
    statement: str
    shipped: tuple[str, ...]
    """functions of vcposim the claim is about, as in `baselines.leverage`; they run when the claim is checked"""
    rows: tuple[str, ...]
    """rows of claims.md, as in `C6`"""
    assumptions: str = "none"
    exact: Callable[[], str] | None = None
    symbolic: Callable[[], Theorem] | None = None
    instance: Callable[[random.Random], dict[str, Any]] | None = None
    coq: tuple[str, ...] = ()
    kind: Kind = "theorem"

    @property
    def family(self) -> str:
        """What stands before the dot: `T2` of `T2.gap`."""
        return self.name.split(".")[0]


def all_claims() -> list[Claim]:
    """Every claim of every family, in order."""
    return [claim for family in FAMILIES for claim in importlib.import_module(family).CLAIMS]


def select(names: list[str] | None) -> list[Claim]:
    """The claims of the given families or names (all if none are given); `ValueError` if one is unknown."""
    claims = all_claims()
    if not names:
        return claims
    unknown = [n for n in names if not any(n in (c.name, c.family) for c in claims)]
    if unknown:
        raise ValueError(
            f"--only: unknown claim {unknown[0]!r}; known: {', '.join(dict.fromkeys(c.family for c in claims))}"
        )
    return [c for c in claims if c.name in names or c.family in names]


@dataclass(frozen=True)
class LayerOutcome:
    """What became of a claim in one layer."""

    passed: bool
    detail: str
    obligations: frozenset[str] = frozenset()


def run_exact(claim: Claim) -> LayerOutcome:
    """Layer 1."""
    assert claim.exact is not None
    try:
        return LayerOutcome(True, claim.exact())
    except Exception as error:  # a broken formula may fail in any way; every way is a failure of the claim
        return LayerOutcome(False, f"{type(error).__name__}: {error}".splitlines()[0])


def run_symbolic(claim: Claim) -> LayerOutcome:
    """Layer 2: the theorem, and its statement on rational numbers."""
    assert claim.symbolic is not None
    try:
        theorem = claim.symbolic()
        if not isinstance(theorem, Theorem):
            return LayerOutcome(False, f"not a theorem: {theorem!r}")
        met = sensible(claim, theorem)
    except Exception as error:
        return LayerOutcome(False, f"{type(error).__name__}: {error}".splitlines()[0][:200])
    asked = frozenset(obligations(theorem))
    return LayerOutcome(True, f"{len(asked)} obligations, {met} instances", asked)


def sensible(claim: Claim, theorem: Theorem, tries: int = 6) -> int:
    """How many of `tries` rational instances meet the hypotheses; AssertionError if none does, or one refutes it."""
    from proofs.evaluate import evaluate

    assert claim.instance is not None, (
        f"{claim.name}: no instances, so nobody knows whether the theorem is about anything"
    )
    rng, met = random.Random(0), 0
    for _ in range(tries):
        hypotheses, conclusion = evaluate(theorem, claim.instance(rng))
        assert conclusion or not hypotheses, f"{claim.name}: proved, yet false on an instance"
        met += hypotheses
    assert met, f"{claim.name}: no instance meets the hypotheses"
    return met
