"""T10 (claim C9): the baseline that VCPO's released code computes, against the one that its formula defines.

The reference code measures the norm of a score that already carries the weight, and multiplies by w^2 again: its
baseline is the mean of R under the weight w^4 n^2 instead of w^2 n^2 (with truncation, wbar^2 w^2 n^2).

Statement. With E[w s] = 0, b* the OPOB, b' the released baseline and D = E[w^2 n^2] != 0:

    Var(b') - Var(b*) = (b' - b*)^2 D >= 0

with b' - b* = Cov_a(w^2, R) / E_a[w^2], mean and covariance under the law tilted by a = w^2 n^2. So the two agree
only where w^2 and R are uncorrelated under that law; and b' can be worse than the plain mean of the rewards
(witness).

Source. github mit-han-lab/vcpo, by reading; arXiv 2602.17616 for the formula.

Proof. T2 at b = b'. The difference is one fraction minus another.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np

from proofs.claims import Claim
from proofs.logic import Theorem, arithmetic, generalize
from proofs.setting import RationalProblem, Symbolic, baseline_value, instance, problems, variance
from proofs.sums import both, implies, prove, total
from proofs.t02_optimal_baseline import gap_symbolic, noise
from vcposim.arrays import expectation


def gap_exact() -> str:
    """The released baseline costs (b - b*)^2 E[w^2 ||s||^2] of variance."""
    for p in problems(60):
        batch = p.population()
        best, released = baseline_value(batch, "opob"), baseline_value(batch, "opob_released")
        assert variance(batch, released) - variance(batch, best) == (released - best) ** 2 * noise(batch)
    return "60 random problems"


def difference_exact() -> str:
    """It differs from OPOB by a covariance of w^2 and reward under the tilted measure."""
    for p in problems(60, seed=1):
        batch = p.population()
        a, square = batch.scored().sq_norm(batch.ratio), batch.ratio * batch.ratio
        if expectation(a, p.mu) > 0:
            tilted = p.mu * a / expectation(a, p.mu)
            covariance = expectation(square * p.reward, tilted) - expectation(square, tilted) * expectation(
                p.reward, tilted
            )
            difference = baseline_value(batch, "opob_released") - baseline_value(batch, "opob")
            assert difference == covariance / expectation(square, tilted)
    return "60 random problems"


def worse_exact() -> str:
    """Three actions of a softmax policy that has learned to take the last one, which alone is rewarded."""
    array = lambda *x: np.array([Fraction(v) for v in x], dtype=object)  # noqa: E731
    mu, pi = array(2, 3, 5) / 10, array(1, 1, 8) / 10
    score = np.where(np.eye(3, dtype=bool), Fraction(1), Fraction(0)) - pi
    batch = RationalProblem(mu, pi, array(0, 0, 1), score, array(1, 1, 1)).population()
    best, released, mean = (variance(batch, baseline_value(batch, b)) for b in ("opob", "opob_released", "group_mean"))
    assert best < mean < released / 5
    return f"Var: OPOB {float(best):.4f}, released {float(released):.4f}, mean {float(mean):.4f}"


def gap_symbolic_released() -> Theorem:
    """|- E[w s] = 0, D != 0 -> Var(b') - Var(b*) = (b' - b*)^2 D, both baselines as shipped."""
    s = Symbolic()
    batch = s.batch()
    best, released = baseline_value(batch, "opob"), baseline_value(batch, "opob_released")
    D = noise(batch).term
    goal = implies(
        both(s.distribution, s.balanced, D != 0),
        variance(batch, released) - variance(batch, best) == (released - best) * (released - best) * D,
    )
    return generalize(arithmetic(goal, gap_symbolic()(*s.everything, released)), *s.everything)


def difference_symbolic() -> Theorem:
    """|- (b' - b*) E[a w^2] E[a] = E[a w^2 R] E[a] - E[a R] E[a w^2]."""
    s = Symbolic()
    batch = s.batch()
    best, released = baseline_value(batch, "opob"), baseline_value(batch, "opob_released")
    a = s.weight_of
    mean = lambda f: total(lambda i: s.P[i] * f(i), s.N)  # noqa: E731
    D, D4 = mean(a), mean(lambda i: a(i) * s.W[i] * s.W[i])
    covariance = mean(lambda i: a(i) * s.W[i] * s.W[i] * s.R[i]) * D - mean(lambda i: a(i) * s.R[i]) * D4
    goal = implies(both(s.sized, D != 0, D4 != 0), (released - best) * D4 * D == covariance)
    return prove(goal, over=s.everything)


_SHIPPED = ("baselines.weighted_mean", "baselines.Evidence.weighted_sq_norm", "batch.DenseScores.sq_norm")

CLAIMS = [
    Claim(
        "T10.gap",
        "Var(released) - Var(OPOB) = (b' - b*)^2 E[w^2 n^2] >= 0",
        (*_SHIPPED, "moments.trace_covariance"),
        ("C9",),
        "E[w s] = 0, E[w^2 n^2] != 0",
        gap_exact,
        gap_symbolic_released,
        instance,
        ("opob_gap",),
    ),
    Claim(
        "T10.difference",
        "b' - b* = Cov_a(w^2, R) / E_a[w^2] under the law tilted by a = w^2 n^2",
        _SHIPPED,
        ("C9",),
        "E[w^2 n^2] != 0, E[w^4 n^2] != 0",
        difference_exact,
        difference_symbolic,
        instance,
    ),
    Claim(
        "T10.worse",
        "the released weights can lose to the plain mean of the rewards",
        (*_SHIPPED, "moments.trace_covariance"),
        ("C9",),
        exact=worse_exact,
        kind="witness",
    ),
]
