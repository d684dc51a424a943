"""A verdict is a function of records: what is asked is data, and one function turns estimates into words.

A question says which statistic decides it, on which side of which boundary the claim lies, and how large a difference
matters. Its comparisons are estimates with seed-clustered intervals (`simulations.stats`). `judge` gives the word:

- **holds**: every comparison lies on the claimed side of the boundary, its interval excludes the other side;
- **fails**: a comparison surely lies on the other side;
- **holds if** (questions over places, `over="where"`): surely so at some places, surely not at others; it names them;
- **undecided**: neither; it says how many seeds would decide;
- **not judged**: the records have nothing to compare.

"Surely" is Holm's correction over all comparisons of one experiment, at 5% together. The boundary is the reference plus
the margin that matters, so a gain too small to matter does not hold, and a loss too small to matter does not fail.

    judge([
        Question(
            "beats_mean", "C10", "OPOB learns better than the group mean",
            Rule("success probability, OPOB minus mean", ">", 0.0, margin=0.02),
            [Comparison("groups of 8", of_seeds(pairs, bounds=DIFFERENCE))],
        )
    ])
"""

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

from simulations.stats import Estimate
from vcposim.comparison.statistics import LEVEL, WORDS, holm, verdict
from vcposim.errors import InputError

WITNESSES = ("proof", "exact", "simulated", "transformer")
STUDENT = "Student's, over seeds"
EXACT = "none: computed exactly"


@dataclass(frozen=True)
class Rule:
    """What is claimed of a statistic: that it lies on `side` of `reference + margin`.

    Attributes:
        statistic: what is estimated, with its unit.
        side: ">" or "<", the claimed side.
        reference: the value that means "no difference".
        margin: the difference that matters, signed: beyond the reference on the claimed side for "better", on the
            other side for "not worse".
        method: how the interval is made.

    Raises:
        InputError: for another side.
    """

    statistic: str
    side: str
    reference: float
    margin: float = 0.0
    method: str = STUDENT

    def __post_init__(self) -> None:
        if self.side not in ("<", ">"):
            raise InputError(f"Rule.side: {self.side!r} is no side; use '<' or '>'")

    @property
    def boundary(self) -> float:
        """reference + margin, in the statistic's unit."""
        return self.reference + self.margin

    def claims(self, value: float) -> bool:
        """Whether a value lies on the claimed side."""
        return value > self.boundary if self.side == ">" else value < self.boundary

    def __str__(self) -> str:
        margin = f" {'+' if self.margin > 0 else '-'} {abs(self.margin):g}" if self.margin else ""
        return f"{self.statistic} {self.side} {self.reference:g}{margin}"


@dataclass(frozen=True)
class Comparison:
    """One estimate that a question depends on; None where the records do not give one."""

    name: str
    estimate: Estimate | None


@dataclass(frozen=True)
class Question:
    """A claim as an experiment can test it.

    Attributes:
        key: unique in its experiment, the same in both sizes.
        claim: row of the claims table.
        statement: a sentence that is true or false.
        rule: what decides.
        comparisons: at least one to be judged.
        over: "all" if the sentence says it of every comparison, "where" if it may depend on the place.
        witness: "exact", "simulated" or "transformer".
        note: other numbers for the reader.
        beside: the sentence belongs to the claim's subject and is neither the claim nor its contrary: it is shown with
            the claim and does not judge it.
    """

    key: str
    claim: str
    statement: str
    rule: Rule
    comparisons: Sequence[Comparison]
    over: str = "all"
    witness: str = "simulated"
    note: str = ""
    beside: bool = False


class JudgedComparison(TypedDict, total=False):
    """A comparison with its own word, in plain data; without an estimate it has a name and a word alone."""

    name: str
    word: str
    value: float
    low: float
    high: float
    seeds: int
    p: float | None
    """after the correction for all comparisons of the experiment; None of what is exact"""
    distance: float | None
    """of the value from the boundary, in standard errors; None where there is none, or of none"""
    needed: int | None
    """seeds that would decide"""
    power: float | None


@dataclass(frozen=True)
class Verdict:
    """What the records say about one claim: a sentence, a word, the number, and the condition it holds under.

    `judge` makes them. `rule` and `comparisons` are plain data for summaries and pages.

    Raises:
        InputError: if the word is not one of `WORDS`, `number` is empty, or "holds if" names no condition.
    """

    claim: str
    statement: str
    verdict: str
    number: str
    condition: str = ""
    key: str = ""
    witness: str = "simulated"
    rule: dict[str, Any] | None = None
    comparisons: list[JudgedComparison] = field(default_factory=list)
    decided_by: int | None = None
    """which comparison"""
    note: str = ""
    beside: bool = False

    def __post_init__(self) -> None:
        if not (self.claim[:1] == "C" and self.claim[1:].isdecimal() and self.claim[1] != "0"):
            raise InputError(f"Verdict.claim: {self.claim!r} is not a claim of the project; write it like 'C4'")
        if self.verdict not in WORDS:
            raise InputError(f"Verdict.verdict: {self.verdict!r} is not a verdict; use one of {', '.join(WORDS)}")
        if not self.number:
            raise InputError(f"Verdict.number: empty for {self.claim}; a verdict comes with its number")
        if self.verdict == "holds if" and not self.condition:
            raise InputError(f"Verdict.condition: empty for {self.claim}; 'holds if' says under which condition")


def judge(questions: Sequence[Question]) -> list[Verdict]:
    """The verdicts of one experiment, its comparisons corrected together.

    Raises:
        InputError: if two questions share a key.
    """
    keys = [q.key for q in questions]
    if len(set(keys)) != len(keys):
        raise InputError(f"judge: two questions share a key among {', '.join(keys)}; rename one")
    uncertain = [
        (q.key, i, c.estimate.p(q.rule.boundary))
        for q in questions
        for i, c in enumerate(q.comparisons)
        if c.estimate and not c.estimate.exact
    ]
    adjusted = dict(zip([(k, i) for k, i, _ in uncertain], holm([p for *_, p in uncertain]), strict=True))
    return [_verdict(q, adjusted) for q in questions]


def _verdict(q: Question, adjusted: dict[tuple[str, int], float]) -> Verdict:
    judged = [_judged(q.rule, c, adjusted.get((q.key, i))) for i, c in enumerate(q.comparisons)]
    about: dict[str, Any] = {
        "key": q.key,
        "witness": q.witness,
        "rule": {**vars(q.rule), "boundary": q.rule.boundary, "text": str(q.rule)},
        "comparisons": judged,
        "note": q.note,
        "beside": q.beside,
    }
    known = [i for i, c in enumerate(judged) if c["word"] != "not judged"]
    if not known:
        return Verdict(q.claim, q.statement, "not judged", "nothing to compare in these records", **about)
    by_word = {word: [i for i in known if judged[i]["word"] == word] for word in ("holds", "fails", "undecided")}
    word = verdict([c["word"] for c in judged], over=q.over)

    def certainty(i: int) -> float:
        distance = judged[i]["distance"]
        return math.inf if distance is None else abs(distance)

    def same_runs(i: int) -> bool:
        """Nothing varies and nothing differs: two names for one thing, as with and without ratios at lag 0."""
        return judged[i]["distance"] is None and judged[i]["value"] == q.rule.reference

    # the number shown: what is least certain of what holds, what is most certain of what fails
    if word == "holds":
        decisive = min(by_word["holds"], key=certainty)
    elif word in ("fails", "holds if"):
        decisive = max(by_word["fails"], key=lambda i: (not same_runs(i), certainty(i)))
    else:
        decisive = min(by_word["undecided"] or known, key=certainty)
    condition = ""
    if word == "holds if":
        condition = f"{where(judged, 'holds')}; not so: {where(judged, 'fails')}"
    return Verdict(
        q.claim, q.statement, word, _number(judged, decisive, by_word), condition, decided_by=decisive, **about
    )


def _judged(rule: Rule, comparison: Comparison, p: float | None) -> JudgedComparison:
    e = comparison.estimate
    if e is None:
        return {"name": comparison.name, "word": "not judged", "distance": None}
    sure = e.exact or (p is not None and p < LEVEL)
    word = ("holds" if rule.claims(e.value) else "fails") if sure else "undecided"
    low, value, high = e.interval
    distance = e.distance(rule.boundary)
    truth = rule.boundary + (abs(rule.margin) if rule.side == ">" else -abs(rule.margin))
    return {
        "name": comparison.name,
        "word": word,
        "value": value,
        "low": low,
        "high": high,
        "seeds": e.seeds,
        "p": p,
        "distance": distance if math.isfinite(distance) else None,
        "needed": max(needed, e.seeds + 1) if word == "undecided" and (needed := e.needed(rule.boundary)) else None,
        "power": None if e.exact or not rule.margin else e.power(rule.boundary, truth),
    }


def where(judged: Sequence[JudgedComparison], word: str) -> str:
    """The places with this word in as few conditions as say it exactly: `heavy tail and k = 16 or several_targets`.

    A place's name lists its factors, as in `exact_match_8, heavy tail, k = 16`. A condition is some of them, and true
    of no judged place that has another word; taken first is what covers most places, then what has fewest factors.
    """
    factors = [tuple(re.split(r"[,:] (?![^{]*\})", c["name"])) for c in judged]
    left = [f for f, c in zip(factors, judged, strict=True) if c["word"] == word]
    other = [f for f, c in zip(factors, judged, strict=True) if c["word"] not in (word, "not judged")]
    said = []
    while left:
        some = [c for f in left for size in range(1, len(f) + 1) for c in itertools.combinations(f, size)]
        pure = {c: None for c in some if not any(set(c) <= set(f) for f in other)} or {left[0]: None}
        best = max(pure, key=lambda c: (sum(set(c) <= set(f) for f in left), -len(c)))
        said.append(" and ".join(best))
        left = [f for f in left if not set(best) <= set(f)]
    return " or ".join(said if len(said) <= 6 else [*said[:5], f"{len(said) - 5} more"])


def shown(comparison: JudgedComparison) -> str:
    """A judged comparison's value with its interval."""
    if "value" not in comparison:
        return "nothing to compare"
    value, low, high = (three_digits(comparison[key]) for key in ("value", "low", "high"))
    return value if comparison["low"] == comparison["high"] else f"{value} [{low}, {high}]"


def three_digits(value: float) -> str:
    """A number to three significant digits, thousands written out: 0.0123, 1,230, 8.91e-13."""
    text = f"{value:.3g}"
    return f"{float(text):,.0f}" if 1e3 <= abs(float(text)) < 1e9 else text


def _number(judged: list[JudgedComparison], decisive: int, by_word: dict[str, list[int]]) -> str:
    c = judged[decisive]
    text = f"{shown(c)} ({c['name']})"
    if len(judged) > 1:
        text += "; " + ", ".join(f"{len(by_word[w])} {w}" for w in by_word if by_word[w]) + f" of {len(judged)}"
    if c["word"] == "undecided":
        text += f"; about {c['needed']:,} seeds would decide (has {c['seeds']})" if c["needed"] else "; on the boundary"
    return text
