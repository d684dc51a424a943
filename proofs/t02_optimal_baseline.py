"""T2 (claim C6): OPOB is the unique scalar baseline of least variance, and every other pays an exact square.

Statement. With E[w s] = 0, n^2 = ||s||^2, Var(b) = tr Cov(w (R - b) s) and D = E[w^2 n^2] != 0:

    b* = E[w^2 n^2 R] / E[w^2 n^2]        Var(b) - Var(b*) = (b - b*)^2 D

so b* is the minimiser, the only one when D > 0. On policy it is E[n^2 R] / E[n^2].

Source. VCPO, arXiv 2602.17616 (per group, off policy); the same formula for off-policy contextual bandits in 2405.05736
and for importance-weighted PGPE in 1301.3966; on policy Weaver & Tao 2001, Greensmith et al. 2004.

Proof. tr Cov x = E||x||^2 - ||E x||^2 (two sums exchanged). By T1 the second term does not depend on b; the first is
the parabola E[w^2 n^2 R^2] - 2 b E[w^2 n^2 R] + b^2 D. A parabola exceeds its value at its bottom by (b - b*)^2 D."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache
from typing import Any

from proofs.claims import Claim
from proofs.logic import (
    INT,
    MATRIX,
    REAL,
    SEQUENCE,
    Formula,
    Theorem,
    arithmetic,
    generalize,
    specialize,
    variable,
    variables,
)
from proofs.setting import Symbolic, baseline_value, coefficients, instance, problems, rational, variance
from proofs.sums import both, every, exchange, implies, pointwise, prove, sequence, total
from proofs.symbolic import matrix, vector
from proofs.t01_unbiased import baseline_symbolic
from vcposim.arrays import expectation
from vcposim.batch import Batch
from vcposim.moments import trace_covariance


def noise(batch: Batch) -> Any:
    """D = E[w^2 n^2], through the shipped scores and expectation."""
    return expectation(batch.scored().sq_norm(batch.ratio), batch.measure)


# ---- layer 1 -----------------------------------------------------------------------------------------------------


def gap_exact() -> str:
    """Variance at b exceeds that at OPOB by (b - b*)^2 E[w^2 ||s||^2]."""
    rng = random.Random(1)
    for p in problems(60):
        batch, b = p.population(), rational(rng)
        best = baseline_value(batch, "opob")
        assert variance(batch, b) - variance(batch, best) == (b - best) ** 2 * noise(batch)
    return "60 random problems"


def unique_exact() -> str:
    """Any other baseline has a larger variance, if some weighted score is not 0."""
    rng, counted = random.Random(2), 0
    for p in problems(60, seed=1):
        batch, b = p.population(), rational(rng)
        best = baseline_value(batch, "opob")
        if noise(batch) > 0 and b != best:
            assert variance(batch, b) > variance(batch, best)
            counted += 1
    return f"{counted} random problems"


def on_policy_exact() -> str:
    """On policy, OPOB is the classical optimal baseline."""
    for p in problems(60, seed=2):
        batch = p.on_policy().population()
        assert baseline_value(batch, "opob") == baseline_value(batch, "on_policy_optimal")
    return "60 random problems"


# ---- layer 2 -----------------------------------------------------------------------------------------------------


@cache
def trace_covariance_expanded() -> Theorem:
    """|- sum P = 1 -> tr Cov X = E||X||^2 - ||E X||^2, for all P, X, N, d, by the shipped `trace_covariance`."""
    N, d = variables("N d", INT)
    P, X = variable("P", SEQUENCE), variable("X", MATRIX)
    mean = sequence(lambda j: total(lambda i: P[i] * X[i][j], N))
    cross = sequence(lambda i: sequence(lambda j: P[i] * X[i][j] * mean[j]))
    left = trace_covariance(matrix(X, N, d), vector(P, N)).term
    right = second_moment(P, X, N, d) - total(lambda j: mean[j] * mean[j], d)
    hypotheses = both(N >= 0, d >= 0, total(lambda i: P[i], N) == 1)
    return prove(implies(hypotheses, left == right), exchange()(cross, d, N), over=[P, X, N, d])


def second_moment(P: Formula, X: Formula, N: Formula, d: Formula) -> Formula:
    """E||X||^2."""
    return total(lambda i: P[i] * total(lambda j: X[i][j] * X[i][j], d), N)


@cache
def parabola() -> tuple[Symbolic, Theorem]:
    """The setting, and |- Var(b) = E[a R^2] - 2 b E[a R] + b^2 E[a] - ||E[w R s]||^2 with a = w^2 n^2, for all b."""
    s, b = Symbolic(), variable("b", REAL)
    batch = s.batch()
    x = sequence(lambda i: sequence(lambda k: contribution_at(s, b, i, k)))
    mean_sq = lambda b: sequence(lambda k: _square(total(lambda i: s.P[i] * contribution_at(s, b, i, k), s.N)))  # noqa: E731
    a = s.weight_of
    right = (
        total(lambda i: s.P[i] * a(i) * s.R[i] * s.R[i], s.N)
        - 2 * b * total(lambda i: s.P[i] * a(i) * s.R[i], s.N)
        + b * b * total(lambda i: s.P[i] * a(i), s.N)
        - total(lambda k: mean_sq(0)[k], s.d)
    )
    unbiased = baseline_symbolic()
    mean_stays = pointwise(
        mean_sq(b), mean_sq(0), s.d, given=both(s.sized, s.balanced),
        by=lambda k: [specialize(s.balanced, k), unbiased(*s.everything, b, k)],
    )  # fmt: skip
    goal = implies(both(s.distribution, s.balanced), variance(batch, b) == right)
    return s, prove(goal, trace_covariance_expanded()(s.P, x, s.N, s.d), mean_stays, over=[*s.everything, b])


def contribution_at(s: Symbolic, b: Any, i: Formula, j: Formula) -> Formula:
    """Coordinate j of what the shipped estimator makes of outcome i."""
    return coefficients(s.batch(), b if not isinstance(b, int) else "zero").at(i) * s.S[i][j]


def _square(x: Formula) -> Formula:
    return x * x


@cache
def gap_at_bottom() -> Theorem:
    """|- for all b, m with m D = E[a R]: Var(b) - Var(m) = (b - m)^2 D."""
    s, curve = parabola()
    b, m = variable("b", REAL), variable("m", REAL)
    batch = s.batch()
    D, weighted = noise(batch).term, total(lambda i: s.P[i] * s.weight_of(i) * s.R[i], s.N)
    goal = implies(
        both(s.distribution, s.balanced, m * D == weighted),
        variance(batch, b) - variance(batch, m) == (b - m) * (b - m) * D,
    )
    return prove(goal, curve(*s.everything, b), curve(*s.everything, m), over=[*s.everything, b, m])


@cache
def gap_symbolic() -> Theorem:
    """|- E[w s] = 0, D != 0 -> Var(b) - Var(b*) = (b - b*)^2 D, with b* the shipped OPOB."""
    s, b = Symbolic(), variable("b", REAL)
    batch = s.batch()
    best, D = baseline_value(batch, "opob"), noise(batch).term
    weighted = total(lambda i: s.P[i] * s.weight_of(i) * s.R[i], s.N)
    bottom = prove(implies(both(s.sized, D != 0), best * D == weighted))
    goal = implies(
        both(s.distribution, s.balanced, D != 0),
        variance(batch, b) - variance(batch, best) == (b - best) * (b - best) * D,
    )
    return generalize(arithmetic(goal, gap_at_bottom()(*s.everything, b, best), bottom), *s.everything, b)


def unique_symbolic() -> Theorem:
    """|- E[w s] = 0, D > 0, b != b* -> Var(b) > Var(b*)."""
    s, b = Symbolic(), variable("b", REAL)
    batch = s.batch()
    best, D = baseline_value(batch, "opob"), noise(batch).term
    goal = implies(both(s.distribution, s.balanced, D > 0, b != best), variance(batch, b) > variance(batch, best))
    return generalize(arithmetic(goal, gap_symbolic()(*s.everything, b)), *s.everything, b)


def on_policy_symbolic() -> Theorem:
    """|- w_i = 1 for all i, E[n^2] != 0 -> the shipped OPOB is the shipped on-policy optimum."""
    s = Symbolic()
    ones = every(lambda i: s.W[i] == 1, s.N)
    n2 = lambda i: total(lambda j: s.S[i][j] * s.S[i][j], s.d)  # noqa: E731

    def same(summand: Callable[[Formula, Formula], Formula]) -> Theorem:
        weighted, plain = sequence(lambda i: summand(i, s.weight_of(i))), sequence(lambda i: summand(i, n2(i)))
        return pointwise(weighted, plain, s.N, given=both(s.d >= 0, ones), by=lambda i: [specialize(ones, i)])

    facts = [same(lambda i, a: s.P[i] * a), same(lambda i, a: s.P[i] * a * s.R[i])]
    norm = total(lambda i: s.P[i] * n2(i), s.N)
    batch = s.batch()
    goal = implies(
        both(s.sized, ones, norm != 0), baseline_value(batch, "opob") == baseline_value(batch, "on_policy_optimal")
    )
    return prove(goal, *facts, over=s.everything)


def on_policy_instance(rng: random.Random) -> dict[str, Any]:
    """Random rationals with all ratios 1."""
    values = instance(rng)
    return {**values, "W": [1] * values["N"]}


_SHIPPED = (
    "estimators.Estimator.coefficients",
    "baselines.weighted_mean",
    "batch.DenseScores.sq_norm",
    "moments.trace_covariance",
    "arrays.expectation",
)

CLAIMS = [
    Claim(
        "T2.gap",
        "Var(b) - Var(b*) = (b - b*)^2 E[w^2 n^2] for every number b, b* the OPOB",
        shipped=_SHIPPED,
        rows=("C6",),
        assumptions="E[w s] = 0, E[w^2 n^2] != 0; Var = trace of the covariance of one contribution",
        exact=gap_exact,
        symbolic=gap_symbolic,
        instance=instance,
        coq=("opob_gap",),
    ),
    Claim(
        "T2.unique",
        "Var(b) > Var(b*) for every b != b*",
        shipped=_SHIPPED,
        rows=("C6",),
        assumptions="E[w s] = 0, E[w^2 n^2] > 0",
        exact=unique_exact,
        symbolic=unique_symbolic,
        instance=instance,
        coq=("opob_optimal", "opob_unique"),
    ),
    Claim(
        "T2.on_policy",
        "with all weights 1, OPOB is E[n^2 R] / E[n^2]",
        shipped=("baselines.weighted_mean", "batch.DenseScores.sq_norm", "baselines.Evidence.weighted_sq_norm"),
        rows=("C6", "C10"),
        assumptions="w = 1, E[n^2] != 0",
        exact=on_policy_exact,
        symbolic=on_policy_symbolic,
        instance=on_policy_instance,
    ),
]
