"""T14 (claims C6, C10): two ways to subtract more noise than one number a group can.

Statement. With E[w s] = 0 and a baseline b_j for each coordinate j,

    b_j* = E[w^2 s_j^2 R] / E[w^2 s_j^2]        Var(b) - Var(b*) = sum_j (b_j - b_j*)^2 E[w^2 s_j^2]

so it is never worse than OPOB, which is the case of equal b_j. And since E[w] = 1, the vector lambda (w - 1) may be
subtracted from any contribution x without moving its mean:

    lambda_j* = E[x_j (w - 1)] / E[(w - 1)^2]
    tr Cov(x - lambda (w - 1)) = tr Cov x + sum_j (lambda_j^2 - 2 lambda_j lambda_j*) chi2

which at lambda* is tr Cov x - chi2 ||lambda*||^2: never worse either.

Source. Per-coordinate baselines: Peters & Schaal 2008. Weights as control variates: Owen & Zhou 2000.

Proof. The trace is a sum over coordinates, each a parabola in its own coefficient.
"""

from __future__ import annotations

import random
from functools import cache
from typing import Any

from proofs.claims import Claim
from proofs.logic import INT, REAL, SEQUENCE, Formula, Theorem, arithmetic, generalize, specialize, variable
from proofs.setting import (
    RationalProblem,
    Symbolic,
    baseline_value,
    coefficients,
    contribution,
    instance,
    problems,
    rational,
    rational_array,
    variance,
)
from proofs.sums import both, every, exchange, implies, induct, pointwise, prove, sequence, total
from proofs.symbolic import REAL_ALGEBRA, Length, SymbolicArray, vector
from proofs.t02_optimal_baseline import trace_covariance_expanded
from vcposim.arrays import expectation
from vcposim.baselines import weighted_mean
from vcposim.diagnostics import chi2_of_weights
from vcposim.moments import trace_covariance

# ---- layer 1 -----------------------------------------------------------------------------------------------------


def coordinate_variance(p: RationalProblem, baseline: Any) -> Any:
    """tr Cov of w (R - b_j) s_j with one baseline a coordinate: the shipped estimator, one coordinate at a time."""
    batch = p.population()
    columns = [contribution(batch, coefficients(batch, b))[:, j : j + 1] for j, b in enumerate(baseline)]
    return sum(trace_covariance(x, p.mu) for x in columns)


def coordinate_weight(p: RationalProblem, j: int) -> Any:
    """w^2 s_j^2."""
    return p.ratio**2 * p.score[:, j] ** 2


def coordinates_exact() -> str:
    """The best baseline a coordinate, and what another one costs."""
    rng = random.Random(1)
    for p in problems(40, seed=1, outcomes=(2, 6)):
        d = p.score.shape[1]
        best = [weighted_mean(p.reward, coordinate_weight(p, j), p.mu).item() for j in range(d)]
        b = [rational(rng) for _ in range(d)]
        gap = sum((b[j] - best[j]) ** 2 * expectation(coordinate_weight(p, j), p.mu) for j in range(d))
        assert coordinate_variance(p, b) - coordinate_variance(p, best) == gap
        batch = p.population()
        assert coordinate_variance(p, best) <= variance(batch, baseline_value(batch, "opob"))
    return "40 random problems"


def control_exact() -> str:
    """Subtracting the best multiple of w - 1 takes chi2 times its square off the variance."""
    for p in problems(40, seed=2, outcomes=(2, 6)):
        batch = p.population()
        x = contribution(batch, coefficients(batch, "opob"))
        chi2, excess = chi2_of_weights(p.ratio, p.mu), p.ratio - 1
        if chi2:
            best = (p.mu[:, None] * x * excess[:, None]).sum(axis=0) / chi2
            after = trace_covariance(x - excess[:, None] * best, p.mu)
            assert after == trace_covariance(x, p.mu) - chi2 * (best * best).sum()
            assert (p.mu * excess).sum() == 0
    return "40 random problems, on top of OPOB"


# ---- layer 2 -----------------------------------------------------------------------------------------------------


@cache
def trace_by_coordinate() -> Theorem:
    """|- sum P = 1 -> tr Cov X = sum_j (E[X_j^2] - E[X_j]^2)."""
    s = Symbolic()
    P, X, N, d = s.P, s.S, s.N, s.d
    square = sequence(lambda i: sequence(lambda j: P[i] * X[i][j] * X[i][j]))
    mean = lambda j: total(lambda i: P[i] * X[i][j], N)  # noqa: E731
    moment = lambda j: total(lambda i: P[i] * X[i][j] * X[i][j], N)  # noqa: E731
    left = trace_covariance(_matrix(X, N, d), vector(P, N)).term
    goal = implies(s.distribution, left == total(lambda j: moment(j) - mean(j) * mean(j), d))
    facts = [trace_covariance_expanded()(P, X, N, d), exchange()(square, d, N)]
    return prove(goal, *facts, over=[P, X, N, d])


def _matrix(X: Formula, N: Formula, d: Formula) -> SymbolicArray:
    return SymbolicArray(REAL_ALGEBRA, (Length(N), Length(d)), lambda i, j: X[i][j])


class Coordinates:
    """The setting, with a baseline B_j a coordinate; contributions by the shipped estimator, one at a time."""

    def __init__(self) -> None:
        self.s, self.B = Symbolic(), variable("B", SEQUENCE)

    def x(self, B: Formula) -> Formula:
        """The matrix w_i (R_i - B_j) s_ij."""
        batch = self.s.batch()
        return sequence(lambda i: sequence(lambda j: coefficients(batch, B[j]).at(i) * self.s.S[i][j]))

    def variance(self, B: Formula) -> Formula:
        """tr Cov of them, by the shipped function."""
        return trace_covariance(_matrix(self.x(B), self.s.N, self.s.d), vector(self.s.P, self.s.N)).term

    def norm(self, j: Formula) -> Formula:
        """D_j = E[w^2 s_j^2]."""
        s = self.s
        return total(lambda i: s.P[i] * (s.W[i] * s.W[i] * (s.S[i][j] * s.S[i][j])), s.N)

    def best(self, j: Formula) -> Formula:
        """b_j* by the shipped weighted mean."""
        s = self.s
        w, sj = vector(s.W, s.N), vector(s.column(j), s.N)
        return weighted_mean(vector(s.R, s.N), w * w * (sj * sj), vector(s.P, s.N)).term

    @property
    def given(self) -> Formula:
        """The hypotheses: a distribution, scores with mean 0, and no coordinate without noise."""
        return both(self.s.distribution, self.s.balanced, every(lambda j: self.norm(j) > 0, self.s.d))


@cache
def coordinate_parabola() -> Theorem:
    """|- E[w s_j] = 0, m D_j = E[w^2 s_j^2 R] -> Var_j(b) - Var_j(m) = (b - m)^2 D_j, one coordinate."""
    c, b, m, j = Coordinates(), variable("b", REAL), variable("m", REAL), variable("j", INT)
    s = c.s
    batch = s.batch()
    term = lambda v, i: coefficients(batch, v).at(i) * s.S[i][j]  # noqa: E731
    spread = lambda v: (  # noqa: E731
        total(lambda i: s.P[i] * term(v, i) * term(v, i), s.N)
        - total(lambda i: s.P[i] * term(v, i), s.N) * total(lambda i: s.P[i] * term(v, i), s.N)
    )
    weighted = total(lambda i: s.P[i] * (s.W[i] * s.W[i] * (s.S[i][j] * s.S[i][j])) * s.R[i], s.N)
    goal = implies(
        both(s.distribution, s.balanced_at(j), m * c.norm(j) == weighted),
        spread(b) - spread(m) == (b - m) * (b - m) * c.norm(j),
    )
    return prove(goal, over=[*s.everything, b, m, j])


@cache
def coordinates_symbolic() -> Theorem:
    """|- E[w s] = 0, D_j > 0 -> Var(b) - Var(b*) = sum_j (b_j - b_j*)^2 D_j, for every vector b."""
    c = Coordinates()
    s, B = c.s, c.B
    best = sequence(c.best)
    gap = sequence(lambda j: (B[j] - c.best(j)) * (B[j] - c.best(j)) * c.norm(j))
    spread = lambda V: sequence(lambda j: spread_at(s, c.x(V), j))  # noqa: E731
    positive = every(lambda j: c.norm(j) > 0, s.d)

    def at(j: Formula) -> list[Theorem]:
        weighted = total(lambda i: s.P[i] * (s.W[i] * s.W[i] * (s.S[i][j] * s.S[i][j])) * s.R[i], s.N)
        bottom = prove(implies(both(s.sized, c.norm(j) > 0), c.best(j) * c.norm(j) == weighted))
        return [
            coordinate_parabola()(*s.everything, B[j], c.best(j), j),
            bottom,
            specialize(positive, j),
            specialize(s.balanced, j),
        ]

    split = sequence(lambda j: spread(best)[j] + gap[j])
    same = pointwise(spread(B), split, s.d, given=c.given, by=at, expand=False)
    goal = implies(c.given, c.variance(B) - c.variance(best) == total(lambda j: gap[j], s.d))
    facts = [trace_by_coordinate()(s.P, c.x(V), s.N, s.d) for V in (B, best)]
    add = _sum_of_two()(spread(best), gap, s.d)
    return generalize(arithmetic(goal, *facts, same, add), *s.everything, B)


@cache
def _sum_of_two() -> Theorem:
    """|- sum (f + g) = sum f + sum g."""
    f, g, n = variable("f", SEQUENCE), variable("g", SEQUENCE), variable("n", INT)
    both_ = total(lambda i: f[i] + g[i], n)
    goal = implies(n >= 0, both_ == total(lambda i: f[i], n) + total(lambda i: g[i], n))
    return prove(goal, over=[f, g, n])


def never_worse_symbolic() -> Theorem:
    """|- Var(b*) <= Var of the shipped OPOB."""
    c = Coordinates()
    s = c.s
    opob = baseline_value(s.batch(), "opob")
    equal = sequence(lambda j: opob)
    gap = lambda j: (opob - c.best(j)) * (opob - c.best(j)) * c.norm(j)  # noqa: E731
    positive = every(lambda j: c.norm(j) > 0, s.d)
    x = variable("x", REAL)
    y = variable("y", REAL)
    square = generalize(arithmetic(implies(y > 0, x * x * y >= 0)), x, y)
    nonnegative = induct(
        lambda n: implies(both(positive, n <= s.d), total(gap, n) >= 0),
        step=lambda k: [specialize(positive, k), square(opob - c.best(k), c.norm(k))],
    )
    goal = implies(c.given, c.variance(sequence(c.best)) <= variance(s.batch(), opob))
    facts = [coordinates_symbolic()(*s.everything, equal), nonnegative(s.d)]
    return generalize(arithmetic(goal, *facts), *s.everything)


@cache
def control_at_bottom() -> Theorem:
    """|- E[w] = 1, m chi2 = E[X_j (w - 1)] -> Var(X_j - m (w - 1)) = Var(X_j) - m^2 chi2, for any X, one coordinate."""
    s, m, j = Symbolic(), variable("m", REAL), variable("j", INT)
    chi2 = chi2_of_weights(vector(s.W, s.N), vector(s.P, s.N)).term
    after = sequence(lambda i: sequence(lambda k: s.S[i][k] - m * (s.W[i] - 1)))
    goal = implies(
        both(_unit_mean(s), m * chi2 == _with_excess(s, s.S, j)),
        spread_at(s, after, j) == spread_at(s, s.S, j) - m * m * chi2,
    )
    return prove(goal, over=[*s.everything, m, j])


def _unit_mean(s: Symbolic) -> Formula:
    """sum P = 1, E[w] = 1."""
    return both(s.distribution, expectation(vector(s.W, s.N), vector(s.P, s.N)).term == 1)


def _with_excess(s: Symbolic, X: Formula, j: Formula) -> Formula:
    """E[X_j (w - 1)]."""
    return total(lambda i: s.P[i] * X[i][j] * (s.W[i] - 1), s.N)


def control_symbolic() -> Theorem:
    """|- E[w] = 1, chi2 > 0 -> tr Cov(x - lambda* (w - 1)) = tr Cov x - chi2 ||lambda*||^2, x as shipped."""
    s, b = Symbolic(), variable("b", REAL)
    w, P = vector(s.W, s.N), vector(s.P, s.N)
    chi2, c = chi2_of_weights(w, P).term, coefficients(s.batch(), b)
    before = sequence(lambda i: sequence(lambda j: c.at(i) * s.S[i][j]))
    best = lambda j: _with_excess(s, before, j) / chi2  # noqa: E731
    after = sequence(lambda i: sequence(lambda j: before[i][j] - best(j) * (s.W[i] - 1)))
    gain = sequence(lambda j: best(j) * best(j) * chi2)
    given = both(_unit_mean(s), chi2 > 0)
    setting = [before if v.eq(s.S) else v for v in s.everything]

    def at(j: Formula) -> list[Theorem]:
        bottom = arithmetic(implies(chi2 > 0, best(j) * chi2 == _with_excess(s, before, j)))
        return [control_at_bottom()(*setting, best(j), j), bottom]

    spread = lambda X: sequence(lambda j: spread_at(s, X, j))  # noqa: E731
    lowered = sequence(lambda j: spread(after)[j] + gain[j])
    same = pointwise(spread(before), lowered, s.d, given=given, by=at, expand=False)
    var = lambda X: trace_covariance(_matrix(X, s.N, s.d), P).term  # noqa: E731
    goal = implies(given, var(after) == var(before) - total(lambda j: gain[j], s.d))
    facts = [trace_by_coordinate()(s.P, X, s.N, s.d) for X in (before, after)]
    return generalize(arithmetic(goal, *facts, same, _sum_of_two()(spread(after), gain, s.d)), *s.everything, b)


def spread_at(s: Symbolic, X: Formula, j: Formula) -> Formula:
    """E[X_j^2] - E[X_j]^2, written as `trace_by_coordinate` writes it."""
    mean = total(lambda i: s.P[i] * X[i][j], s.N)
    return total(lambda i: s.P[i] * X[i][j] * X[i][j], s.N) - mean * mean


def coordinates_instance(rng: random.Random) -> dict[str, Any]:
    """Random rationals, with two baselines."""
    return {**instance(rng), "B": list(rational_array(rng, 2))}


CLAIMS = [
    Claim(
        "T14.coordinates",
        "Var(b) - Var(b*) = sum_j (b_j - b_j*)^2 E[w^2 s_j^2], b_j* = E[w^2 s_j^2 R] / E[w^2 s_j^2]",
        ("baselines.weighted_mean", "estimators.Estimator.coefficients", "moments.trace_covariance"),
        ("C6", "C10"),
        "E[w s] = 0, E[w^2 s_j^2] > 0 for every j",
        coordinates_exact,
        coordinates_symbolic,
        coordinates_instance,
        ("coordinate_gap",),
    ),
    Claim(
        "T14.never_worse",
        "one optimal baseline a coordinate is never worse than OPOB",
        ("baselines.weighted_mean", "estimators.Estimator.coefficients", "moments.trace_covariance"),
        ("C6",),
        "as T14.coordinates",
        coordinates_exact,
        never_worse_symbolic,
        coordinates_instance,
    ),
    Claim(
        "T14.control",
        "tr Cov(x - lambda* (w - 1)) = tr Cov x - chi2 ||lambda*||^2, never worse",
        ("diagnostics.chi2_of_weights", "estimators.Estimator.coefficients", "moments.trace_covariance"),
        ("C10",),
        "E[w] = 1, chi2 > 0; lambda_j* = E[x_j (w - 1)] / chi2",
        control_exact,
        control_symbolic,
        instance,
        ("control_variate_gap",),
    ),
]
