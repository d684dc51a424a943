"""A report card: which laws an estimator keeps and breaks, and its exact bias and variance beside the catalogue's.

`vcposim check` prints it. Unlike a test it does not stop at the first broken law, and it tries the laws that are not
claimed too: what an estimator could claim is as telling as what it may not.
"""

import sys
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np

from vcposim.batch import Batch, DenseScores
from vcposim.catalogue import CATALOGUE, Entry
from vcposim.errors import InputError
from vcposim.laboratory.standard_problems import GROUP_SIZE, STANDARD, UNKNOWN, exact_moments, standard_problem
from vcposim.testing.kit import CLAIMED, NOT_CLAIMED, JudgedEstimator, Trial, Violation, subject_of, trials
from vcposim.testing.laws import LAWS, Broken, Subject, as_numpy
from vcposim.testing.strategies import case_of

VIOLATED = "violated"
CardRow = dict[str, Any]


@dataclass(frozen=True)
class LawFinding:
    """What came of one law: `holds`, `violated`, `not claimed` or `does not apply`."""

    law: str
    status: str
    violation: Violation | None = None
    """the smallest counterexample; of a law that is not claimed, any: the reason not to"""
    tried: bool = True

    def to_json(self) -> CardRow:
        """Every field, and what the law says."""
        seen = self.violation
        found = None if seen is None else {"size": seen.size, "case": seen.case, "saw": seen.saw}
        return {
            "law": self.law,
            "status": self.status,
            "statement": LAWS[self.law].statement,
            "source": LAWS[self.law].source,
            "tried": self.tried,
            "counterexample": found,
            "reproduce": None if seen is None else seen.reproduction,
        }


def findings(asked: Iterable[Trial], progress: Callable[[str], None] = lambda law: None) -> list[LawFinding]:
    """Try every law that can be tried."""
    found = []
    for trial in asked:
        progress(trial.law)
        if not LAWS[trial.law].fits(trial.subject):
            found.append(LawFinding(trial.law, trial.status, tried=False))
            continue
        try:
            trial()
        except Violation as violation:
            status = VIOLATED if trial.status == CLAIMED else NOT_CLAIMED
            found.append(LawFinding(trial.law, status, violation))
        else:
            found.append(LawFinding(trial.law, trial.status))
    return found


def passed(found: Iterable[LawFinding]) -> bool:
    """Whether every law that is claimed holds."""
    return all(one.status != VIOLATED for one in found)


def library_for(estimator: JudgedEstimator, needs: Iterable[str] = ()) -> str:
    """`numpy`, or `torch` if the estimator answers only that: it is shown one small batch of each.

    Raises `InputError` with what it said if it answers neither.
    """
    said = []
    for name in ("numpy", "torch"):
        if name not in sys.modules:
            continue  # its module has not imported torch, so it is no torch function
        subject, _ = subject_of(estimator, needs, convert=name)
        if subject.per_token:
            given: CardRow = {
                "ratio": [["1/2", 2], [1, 1]],
                "score": [[[1], [1]], [[-1], [0]]],
                "token_mask": [[1, 1], [1, 0]],
                "token_probability": [["1/2", "1/3"], ["1/2", "1/2"]],
                "anchor_ratio": [[1, 1], [1, 1]],
            }
        else:
            given = {"ratio": [2, "1/2"], "score": [[1], [-1]]}
        given |= {"reward": [1, 0], "length": [2, 1]}
        if subject.per_prompt:
            given = {k: [x] for k, x in given.items()} | {"grouped": True}
        small = case_of(**given)
        try:
            with warnings.catch_warnings(action="ignore"):  # a question: what it says of the wrong kind is no news
                subject.of(small)
        except (Broken, InputError) as error:
            said.append(f"given {name} arrays, {error}")
        else:
            return name
    raise InputError(
        f"estimator: {estimator} does not answer a small batch: {'; '.join(said)}. It takes a Batch and returns "
        "one coefficient a sample (..., n) or a token (..., n, t); --needs names the optional fields that it reads"
    )


def measured(mine: Subject) -> tuple[list[CardRow], str]:
    """`beside_the_catalogue`, and what went wrong if it could not be asked there: then without it."""
    try:
        return beside_the_catalogue(mine), ""
    except Broken as error:
        return beside_the_catalogue(None), f"{mine.name} does not answer the standard problems: {error}"


def beside_the_catalogue(mine: Subject | None) -> list[CardRow]:
    """Exact moments on every standard problem, of an estimator and of all of the catalogue that can be asked.

    Rows hold `problem`, `estimator`, `mine`, and relative to the squared norm of the gradient, `squared_bias`,
    `variance` (of the mean over a group) and `mse`.
    """
    rows = []
    for problem in STANDARD:
        if mine is not None and not mine.needs & UNKNOWN:
            rows.append(_row(problem, mine, mine=True))
        known = (_known_row(problem, name, entry) for name, entry in CATALOGUE.items())
        rows += [row.copy() for row in known if row is not None]
    return rows


@cache
def _known_row(problem: str, name: str, entry: Entry) -> CardRow | None:
    # seconds for all of them, and the same whoever stands beside them; `entry`: another one of that name is another row
    subject, _ = subject_of(name)
    return None if subject.needs & UNKNOWN else _row(problem, subject, mine=False)


def _row(problem: str, subject: Subject, *, mine: bool) -> CardRow:
    def asked(batch: Batch) -> Any:
        c = subject.raw(batch)
        if not mine or subject.per_prompt:
            return c
        # groups stand side by side here: each must have the coefficients that it has alone, and numbers
        last, scores = batch.reward.shape[0] - 1, batch.scores
        assert isinstance(scores, DenseScores)
        for g in (0, last // 3, last):
            one: dict[str, Any] = {name: x[g : g + 1] for name, x in vars(batch).items() if hasattr(x, "dtype")}
            alone = replace(batch, **one, scores=replace(scores, score=scores.score[g : g + 1]))
            if not np.allclose(as_numpy(subject.raw(alone))[0], as_numpy(c)[g], equal_nan=True):
                raise Broken("a group has other coefficients alone than beside others")
        if not np.all(np.isfinite(as_numpy(c))):
            raise Broken("a coefficient is no number")
        return c

    with np.errstate(all="ignore"):
        found = exact_moments(
            asked,
            standard_problem(problem),
            GROUP_SIZE,
            per_token=subject.per_token,
            grouped=subject.per_prompt,
            convert=subject.library.convert,
        )
    size = float(np.sum(found.gradient**2))
    return {
        "problem": problem,
        "estimator": subject.name.strip("'"),
        "mine": mine,
        "squared_bias": float(np.sum(found.bias**2)) / size,
        "variance": float(found.variance_of_mean) / size,
        "mse": float(found.mse) / size,
    }


def catalogue_card(name: str, examples: int) -> list[LawFinding]:
    """The findings of one entry, on what it claims by itself."""
    return findings(trials(name, examples=examples))
