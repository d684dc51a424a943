"""T1 (claims C2, C7): importance weights leave the policy gradient unbiased, and so does any baseline.

Statement. Outcomes i have probability mu_i under the behavior policy, weight w_i = pi_i / mu_i, reward R_i and score
s_i = grad log pi_i, so that E_mu[w s] = E_pi[s] = 0. For every number b:

    E_mu[w (R - b) s] = E_mu[w R s] = E_pi[R s]

Source. Williams 1992 (a baseline on policy); Kahn & Marshall 1953 (importance sampling).

Proof. The left side is E[w R s_j] - b E[w s_j] coordinate by coordinate, and the second mean is zero. Without the
weights it is not zero, and the estimate moves with b (`T1.no_correction`)."""

from __future__ import annotations

import random
from fractions import Fraction
from typing import Any

import numpy as np

from proofs.claims import Claim
from proofs.logic import INT, REAL, SEQUENCE, Theorem, specialize, variable
from proofs.setting import Symbolic, coefficients, instance, mean_estimate, problems, rational
from proofs.sums import both, every, implies, pointwise, prove, sequence, total
from vcposim.batch import Batch
from vcposim.weights import Weighting


def mean(batch: Batch, baseline: Any, **options: Any) -> Any:
    """E[c s] of the shipped estimator: (p,)."""
    return mean_estimate(batch, coefficients(batch, baseline, **options))


def baseline_exact() -> str:
    """E[c s] does not move with a constant baseline."""
    rng = random.Random(1)
    for p in problems(100):
        b = rational(rng)
        assert (mean(p.population(), b) == mean(p.population(), 0)).all()
    return "100 random problems"


def baseline_symbolic() -> Theorem:
    """|- E[w s_j] = 0 -> E[w (R - b) s_j] = E[w R s_j], for all N, d, j, b."""
    s, b, j = Symbolic(), variable("b", REAL), variable("j", INT)
    batch = s.batch()
    goal = implies(both(s.sized, s.balanced_at(j)), mean(batch, b).at(j) == mean(batch, "zero").at(j))
    return prove(goal, over=[*s.everything, b, j])


def gradient_exact() -> str:
    """With ratios as weights, E[c s] is the policy gradient."""
    for p in problems(100):
        assert (mean(p.population(), 0) == p.gradient).all()
    return "100 random problems"


def gradient_symbolic() -> Theorem:
    """|- (mu_i w_i = pi_i for all i) -> E_mu[w R s_j] = sum_i pi_i R_i s_ij."""
    s, j, pi = Symbolic(), variable("j", INT), variable("Q", SEQUENCE)
    ratio = every(lambda i: s.P[i] * s.W[i] == pi[i], s.N)
    term = sequence(lambda i: s.P[i] * s.W[i] * s.R[i] * s.S[i][j])
    target = sequence(lambda i: pi[i] * s.R[i] * s.S[i][j])
    same = pointwise(term, target, s.N, given=ratio, by=lambda i: [specialize(ratio, i)])
    goal = implies(both(s.sized, ratio), mean(s.batch(), "zero").at(j) == total(lambda i: target[i], s.N))
    return prove(goal, same, over=[*s.everything, pi, j])


def gradient_instance(rng: random.Random) -> dict[str, Any]:
    """Random rationals for which target probabilities are measure times ratio."""
    values = instance(rng)
    return {**values, "Q": [p * w for p, w in zip(values["P"], values["W"], strict=True)]}


def softmax_exact() -> str:
    """A softmax policy's score has mean 0 under it."""
    rng = random.Random(2)
    for n in range(1, 8):
        pi = np.array([Fraction(rng.randint(1, 9)) for _ in range(n)], dtype=object)
        pi = pi / pi.sum()
        score = np.where(np.eye(n, dtype=bool), Fraction(1), Fraction(0)) - pi  # d log pi_i / d logit_j
        assert ((pi[:, None] * score).sum(axis=0) == 0).all()
    return "softmax policies of 1 to 7 actions"


def no_correction_exact() -> str:
    """Without weights the estimate moves with the baseline: by -E_mu[s] for each unit."""
    (p,) = problems(1, seed=3, outcomes=(3, 3))
    none = Weighting("none")
    shift = mean(p.population(), Fraction(1), weighting=none) - mean(p.population(), Fraction(0), weighting=none)
    assert (shift == -(p.mu[:, None] * p.score).sum(axis=0)).all()
    assert (shift != 0).any()
    return f"the estimate moves by {[str(x) for x in shift]} when b moves by 1"


_ESTIMATOR = ("estimators.Estimator.coefficients", "weights.importance", "moments.batch_sums")
_BALANCED = "E[w s] = 0, as for untouched sequence ratios"

CLAIMS = [
    Claim(
        "T1.baseline",
        "E[w (R - b) s] = E[w R s] for every number b",
        shipped=_ESTIMATOR,
        rows=("C2", "C7"),
        assumptions=f"{_BALANCED}; b independent of the sample",
        exact=baseline_exact,
        symbolic=baseline_symbolic,
        instance=instance,
        coq=("baseline_unbiased",),
    ),
    Claim(
        "T1.gradient",
        "E_mu[w R s] = E_pi[R s], the policy gradient",
        shipped=_ESTIMATOR,
        rows=("C2",),
        assumptions="mu_i w_i = pi_i for every outcome (mu > 0 wherever pi is)",
        exact=gradient_exact,
        symbolic=gradient_symbolic,
        instance=gradient_instance,
        coq=("is_unbiased",),
    ),
    Claim(
        "T1.softmax",
        "E_pi[s] = 0 for softmax scores s_ij = 1[i = j] - pi_j, so the assumption of T1 can be met",
        shipped=(),
        rows=("C7",),
        assumptions="sum pi = 1",
        exact=softmax_exact,
        coq=("softmax_score",),
    ),
    Claim(
        "T1.no_correction",
        "without importance weights a baseline moves the mean off policy, by -b E_mu[s]",
        shipped=("estimators.Estimator.coefficients", "weights.no_correction", "moments.batch_sums"),
        rows=("C2", "C7"),
        exact=no_correction_exact,
        kind="witness",
    ),
]
