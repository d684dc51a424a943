"""Runs the claims through the layers and gives each a verdict.

A claim is settled if every layer that it names passes. cvc5's second opinion runs beside the rest, on the obligations
of layer 2 as they come; an obligation that cvc5 calls *satisfiable* contradicts z3 and fails the claim, one that it
cannot decide in time is counted and shown."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from proofs import coq_layer, second_opinion
from proofs.claims import Claim, LayerOutcome, run_exact, run_symbolic
from proofs.logic import z3

LAYERS = ("exact", "symbolic", "coq")


@dataclass
class ClaimResult:
    """A claim and what became of it in each layer that was run."""

    claim: Claim
    outcomes: dict[str, LayerOutcome] = field(default_factory=dict)

    @property
    def failed(self) -> bool:
        """Whether any layer that ran did not pass."""
        return any(not outcome.passed for outcome in self.outcomes.values())

    @property
    def verdict(self) -> str:
        """`proved`, `counterexample`, `no theorem`, `exact` (layer 1 alone), `not run` or `FAILED`."""
        if self.failed:
            return "FAILED"
        if self.claim.kind == "no theorem":
            return "no theorem"
        if not self.outcomes:
            return "not run"
        if self.claim.kind == "witness":
            return "counterexample"
        return "proved" if {"symbolic", "coq"} & self.outcomes.keys() else "exact"

    @property
    def layers(self) -> str:
        """Numbers of the layers that passed."""
        return " ".join(
            str(k) for k, layer in enumerate(LAYERS, 1) if layer in self.outcomes and self.outcomes[layer].passed
        )

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        claim = self.claim
        return {
            "claim": claim.name,
            "statement": claim.statement,
            "assumptions": claim.assumptions,
            "kind": claim.kind,
            "verdict": self.verdict,
            "layers": {name: {"passed": o.passed, "detail": o.detail} for name, o in self.outcomes.items()},
            "shipped": list(claim.shipped),
            "rows": list(claim.rows),
        }


@dataclass
class Report:
    """Everything that was run, and remarks on what was not."""

    results: list[ClaimResult]
    confirmed: int = 0
    contradicted: int = 0
    asked: int = 0
    undecided: list[str] = field(default_factory=list)
    """claims with an obligation on which cvc5 gives up"""
    notes: list[str] = field(default_factory=list)

    @property
    def failed(self) -> bool:
        """Whether any claim failed."""
        return any(result.failed for result in self.results)


def run(claims: list[Claim], layers: tuple[str, ...] = LAYERS, *, need_coq: bool = False) -> Report:
    """All the claims through all the layers."""
    report = Report([ClaimResult(claim) for claim in claims])
    coq = coq_layer.start() if "coq" in layers else None
    if "symbolic" in layers:
        _symbolic(report)
    if "exact" in layers:
        for result in report.results:
            if result.claim.exact:
                result.outcomes["exact"] = run_exact(result.claim)
    if coq is not None:
        found = coq.finish()
        if found.skipped or found.assumptions:
            report.notes.append(found.skipped or found.summary)
        for result in report.results:
            if result.claim.coq and found.skipped and need_coq:
                result.outcomes["coq"] = LayerOutcome(False, found.skipped)
            if result.claim.coq and not found.skipped:
                result.outcomes["coq"] = found.of(result.claim.coq)
    return report


def _symbolic(report: Report) -> None:
    if z3 is None:
        report.notes.append("layer 2 skipped: z3 is not installed (pip install 'vcposim[proofs]')")
        return
    cvc5 = second_opinion.SecondOpinion() if second_opinion.available() else None
    if cvc5 is None:
        report.notes.append("second opinion skipped: cvc5 is not installed (pip install 'vcposim[proofs]')")
    for result in report.results:
        if result.claim.symbolic:
            outcome = result.outcomes["symbolic"] = run_symbolic(result.claim)
            if cvc5 is not None and outcome.passed:  # a claim that has failed needs no second opinion
                cvc5.ask(outcome.obligations)
    if cvc5 is not None:
        answers = cvc5.answers()
        counts = Counter(answers.values())
        report.asked, report.confirmed, report.contradicted = len(answers), counts["unsat"], counts["sat"]
        refuted = {text for text, answer in answers.items() if answer == "sat"}
        for result in report.results:
            symbolic = result.outcomes.get("symbolic")
            if symbolic and any(answers.get(text) == "unknown" for text in symbolic.obligations):
                report.undecided.append(result.claim.name)
            if symbolic and symbolic.obligations & refuted:
                result.outcomes["symbolic"] = LayerOutcome(False, "cvc5 contradicts z3 on an obligation")
