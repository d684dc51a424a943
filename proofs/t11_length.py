"""T11 (claim C7): dividing each sequence by its length (per-sequence 1/L) takes away what made baselines free.

Statement. With the factor 1/L_i per trajectory the estimate is E[(w/L)(R - b) s]. E[w s] = 0 does not make E[w s / L]
zero (witness), so the estimate moves with b by -b E[w s / L]. For that loss the weights are v = w / L, and the
baseline of least variance is the one of T5 for these weights:

    b' = (E[a R] - <E[v s R], E[v s]>) / (E[a] - ||E[v s]||^2),   a = v^2 n^2,
    Var(b) - Var(b') = (b - b')^2 (E[a] - ||E[v s]||^2)

Source. The bias of 1/L: Dr. GRPO, arXiv 2503.20783. That VCPO's released scripts divide by L while their OPOB does not:
by reading. The minimizer: this project.

Proof. T5 holds for any weights.
"""

from __future__ import annotations

import random
from fractions import Fraction
from typing import Any

import numpy as np

from proofs.claims import Claim
from proofs.logic import REAL, Theorem, arithmetic, generalize, variable
from proofs.setting import (
    RationalProblem,
    Symbolic,
    coefficients,
    instance,
    mean_estimate,
    number,
    problems,
    rational,
    variance,
)
from proofs.sums import both, implies, prove, sequence
from proofs.t05_truncation import lever, spread, variance_gap_at_bottom, with_weights
from vcposim.arrays import Array, expectation, safe_divide
from vcposim.baselines import minimum_variance
from vcposim.batch import Batch


def length_weight(batch: Batch) -> Array:
    """v = w / L: (..., n)."""
    return batch.ratio * safe_divide(batch.reward * 0 + 1, batch.token_length(), 0)


def best_baseline(batch: Batch) -> Any:
    """The shipped `minimum_variance`, at the weights of the loss with 1/L."""
    v = length_weight(batch)
    a = batch.scored().sq_norm(v)
    return number(
        minimum_variance(
            weighted_reward=expectation(a * batch.reward, batch.measure, keepdims=True),
            weighted=expectation(a, batch.measure, keepdims=True),
            mean_weighted_reward=batch.scored().combine(v * (batch.measure * batch.reward)),
            mean_weighted=batch.scored().combine(v * batch.measure),
            default=expectation(batch.reward, batch.measure, keepdims=True),
        )
    )


def biased_exact() -> str:
    """A problem where division by length makes the estimate move with the baseline."""
    half = Fraction(1, 2)
    array = lambda *x: np.array([Fraction(v) for v in x], dtype=object)  # noqa: E731
    p = RationalProblem(array(half, half), array(half, half), array(0, 0), array(half, -half)[:, None], array(1, 2))
    batch = p.population()
    means = [mean_estimate(batch, coefficients(batch, b, normalizer="length"))[0] for b in (Fraction(0), Fraction(1))]
    assert (p.mu[:, None] * p.score).sum() == 0
    assert means == [0, -Fraction(1, 8)]
    return "on policy, lengths 1 and 2, all rewards 0: with b = 1 the estimate averages -1/8"


def best_exact() -> str:
    """Its variance is a parabola in b around the length-weighted optimum."""
    rng = random.Random(3)
    for p in problems(60, seed=3, outcomes=(2, 6)):
        batch, b = p.population(), rational(rng)
        best, width = best_baseline(batch), spread(batch, length_weight(batch))
        excess = variance(batch, b, normalizer="length") - variance(batch, best, normalizer="length")
        assert excess == (b - best) ** 2 * width or width == 0
    return "60 random problems"


def best_symbolic() -> Theorem:
    """|- Var(b) - Var(b') = (b - b')^2 spread for the shipped estimator with 1/L, b' the shipped minimizer at w/L."""
    s, b = Symbolic(), variable("b", REAL)
    batch = s.batch()
    best, width = best_baseline(batch), spread(batch, length_weight(batch)).term
    weight = length_weight(batch)
    bottom = prove(implies(both(s.sized, width != 0), best * width == lever(s.batch(ratio=weight))))
    var = lambda x: variance(batch, x, normalizer="length")  # noqa: E731
    goal = implies(both(s.distribution, width != 0), var(b) - var(best) == (b - best) * (b - best) * width)
    known = variance_gap_at_bottom()(*with_weights(s, sequence(weight.at)), b, best)
    return generalize(arithmetic(goal, known, bottom), *s.everything, b)


CLAIMS = [
    Claim(
        "T11.biased",
        "E[w s / L] need not vanish: with 1/L per sequence the estimate moves with b",
        ("estimators.Estimator.coefficients", "moments.batch_sums"),
        ("C7",),
        exact=biased_exact,
        coq=("length_biased",),
        kind="witness",
    ),
    Claim(
        "T11.best",
        "for the loss with 1/L, minimum_variance at v = w/L is the minimizer, with the gap of T5.variance",
        ("estimators.Estimator.coefficients", "baselines.minimum_variance", "moments.trace_covariance"),
        ("C7", "C10"),
        "any weights w, any lengths; E[a] != ||E[v s]||^2 with v = w/L, a = v^2 n^2",
        best_exact,
        best_symbolic,
        instance,
        ("min_variance_gap",),
    ),
]
