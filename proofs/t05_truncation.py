"""T5 (claims C2, C7): what truncating the weights costs, and the baseline that then is best.

Statement. Let v = min(w, c) with E[w s] = 0, and let (x)+ = max(x, 0). For every b,

    E[v (R - b) s] - E[w R s] = - E[(w - c)+ (R - b) s]

so the bias depends on b: a baseline is no longer free. For *any* weights v, with a = v^2 n^2, the variance is least at

    b' = (E[a R] - <E[v s R], E[v s]>) / (E[a] - ||E[v s]||^2)

and Var(b) - Var(b') = (b - b')^2 (E[a] - ||E[v s]||^2). The mean squared distance to the true gradient g is least at
another point, b'' = (E[a R] - <E[v s], g>) / E[a], with MSE(b) - MSE(b'') = (b - b'')^2 E[a].

Source. Truncation: Ionides 2008; VCPO (arXiv 2602.17616) truncates at 8. The minimizers are this project's.

Proof. v = w - (w - c)+, and E[w (R - b) s] does not depend on b (T1). The rest is two parabolas.
"""

from __future__ import annotations

import random
from fractions import Fraction
from functools import cache
from typing import Any

import numpy as np

from proofs.claims import Claim
from proofs.logic import INT, REAL, SEQUENCE, Formula, Theorem, arithmetic, generalize, specialize, variable
from proofs.setting import (
    RationalProblem,
    Symbolic,
    baseline_value,
    coefficients,
    instance,
    mean_estimate,
    number,
    problems,
    rational,
    simplex,
    variance,
)
from proofs.sums import both, every, implies, induct, pointwise, prove, sequence, total
from proofs.symbolic import REAL_ALGEBRA, Length, Parameter, SymbolicArray, matrix, vector
from proofs.t02_optimal_baseline import contribution_at, trace_covariance_expanded
from proofs.t03_ess import sum_of_squares_positive
from vcposim.arrays import expectation, namespace
from vcposim.batch import Batch, DenseScores
from vcposim.moments import batch_sums, moments, trace_covariance
from vcposim.weights import Weighting


def truncated(cap: Any) -> Weighting:
    """min(w, cap), as shipped."""
    return Weighting("truncate", cap=cap)


def excess_mean(batch: Batch, cap: Any, baseline: Any) -> Any:
    """E[(w - c)+ (R - b) s]: (p,)."""
    excess = namespace(batch.ratio).maximum(batch.ratio - cap, batch.ratio * 0)
    return batch.scored().combine(excess * (batch.reward - baseline) * batch.measure)


def spread(batch: Batch, weight: Any) -> Any:
    """E[a] - ||E[v s]||^2, for weights v."""
    xp = namespace(weight)
    mean = batch.scored().combine(weight * batch.measure)
    return expectation(batch.scored().sq_norm(weight), batch.measure) - xp.sum(mean * mean, axis=-1)


def draw_mse(batch: Batch, mass: Any, gradient: Any, baseline: Any, **options: Any) -> Any:
    """E||v (R - b) s - g||^2 by the shipped moments; `batch` holds one draw in each replication."""
    sums = batch_sums(batch, coefficients(batch, baseline, **options), mass)
    return number(moments(sums, gradient, drawn=False).mse)


# ---- layer 1 -----------------------------------------------------------------------------------------------------


def _cases(count: int, seed: int) -> Any:
    rng = random.Random(seed)
    for p in problems(count, seed=seed, outcomes=(2, 6)):
        yield p, p.population(), rational(rng), Fraction(rng.randint(1, 8), 4)


def bias_exact() -> str:
    """Truncation at `cap` shifts the mean by -E[(w - cap)^+ (R - b) s]."""
    for p, batch, b, cap in _cases(60, 5):
        shift = mean_estimate(batch, coefficients(batch, b, weighting=truncated(cap))) - p.gradient
        assert (shift == -excess_mean(batch, cap, b)).all()
    return "60 random problems"


def biased_exact() -> str:
    """A problem where the shift is not 0."""
    array = lambda *x: np.array(x, dtype=object)  # noqa: E731
    third = Fraction(1, 3)
    mu, pi = array(third, 2 * third), array(2 * third, third)
    p = RationalProblem(
        mu, pi, array(Fraction(0), Fraction(0)), array([third], [-2 * third]), array(Fraction(1), Fraction(1))
    )
    moved = mean_estimate(p.population(), coefficients(p.population(), Fraction(1), weighting=truncated(Fraction(1))))
    assert moved[0] == Fraction(1, 9)
    return "all rewards 0, so the gradient is 0; with b = 1 and cap 1 the estimate averages 1/9"


def variance_exact() -> str:
    """The variance of the truncated estimator is a parabola in b around its own optimum."""
    for _, batch, b, cap in _cases(60, 6):
        weighting = truncated(cap)
        best = baseline_value(batch, "opob_truncated", weighting=weighting)
        width = spread(batch, np.minimum(batch.ratio, cap))
        excess = variance(batch, b, weighting=weighting) - variance(batch, best, weighting=weighting)
        assert excess == (b - best) ** 2 * width or width == 0
    return "60 random problems"


def mse_exact() -> str:
    """The mean squared error of the truncated estimator is a parabola in b around an optimum of its own."""
    for p, batch, b, cap in _cases(40, 7):
        draws, mass = p.batches(1)
        mse = lambda x: draw_mse(draws, mass, p.gradient, x, weighting=truncated(cap))  # noqa: E731, B023
        v = np.minimum(batch.ratio, cap)
        a = batch.scored().sq_norm(v)
        mean = batch.scored().combine(v * batch.measure)
        best = (expectation(a * batch.reward, p.mu) - (mean * p.gradient).sum()) / expectation(a, p.mu)
        assert mse(b) - mse(best) == (b - best) ** 2 * expectation(a, p.mu)
    return "40 random problems"


# ---- layer 2 -----------------------------------------------------------------------------------------------------


def bias_symbolic() -> Theorem:
    """|- E[w s_j] = 0 -> E[min(w, c) (R - b) s_j] - E[w R s_j] = -E[(w - c)+ (R - b) s_j]."""
    s, b, c, j = Symbolic(), variable("b", REAL), variable("c", REAL), variable("j", INT)
    batch = s.batch()
    mean = lambda x, **options: mean_estimate(batch, coefficients(batch, x, **options)).at(j)  # noqa: E731
    over = excess_mean(batch, c, b).at(j)
    cut = coefficients(batch, b, weighting=truncated(Parameter(c)))
    excess = namespace(batch.ratio).maximum(batch.ratio - c, batch.ratio * 0)
    split = pointwise(
        sequence(lambda i: s.S[i][j] * cut.at(i) * s.P[i]),
        sequence(lambda i: s.S[i][j] * (s.W[i] * (s.R[i] - b) - excess.at(i) * (s.R[i] - b)) * s.P[i]),
        s.N,
    )
    goal = implies(both(s.sized, s.balanced_at(j)), mean(b, weighting=truncated(Parameter(c))) - mean("zero") == -over)
    return prove(goal, split, over=[*s.everything, b, c, j])


@cache
def any_weight_parabola() -> Theorem:
    """|- for all w and b: Var(b) = E[a R^2] - 2 b E[a R] + b^2 E[a] - sum_j (E[w R s_j] - b E[w s_j])^2."""
    s, b = Symbolic(), variable("b", REAL)
    a = s.weight_of
    x = sequence(lambda i: sequence(lambda j: contribution_at(s, b, i, j)))
    mean = lambda j: (  # noqa: E731
        total(lambda i: s.P[i] * s.W[i] * s.R[i] * s.S[i][j], s.N)
        - b * total(lambda i: s.P[i] * s.W[i] * s.S[i][j], s.N)
    )
    right = (
        total(lambda i: s.P[i] * a(i) * s.R[i] * s.R[i], s.N)
        - 2 * b * total(lambda i: s.P[i] * a(i) * s.R[i], s.N)
        + b * b * total(lambda i: s.P[i] * a(i), s.N)
        - total(lambda j: mean(j) * mean(j), s.d)
    )
    goal = implies(s.distribution, variance(s.batch(), b) == right)
    return prove(goal, trace_covariance_expanded()(s.P, x, s.N, s.d), over=[*s.everything, b])


def with_weights(s: Symbolic, weight: Formula) -> list[Formula]:
    """The variables of the setting, with another sequence of weights."""
    return [weight if v.eq(s.W) else v for v in s.everything]


@cache
def least_variance() -> Theorem:
    """|- for all w, b: Var(b) - Var(b') = (b - b')^2 spread, with b' the shipped minimizer, if spread != 0."""
    s, b = Symbolic(), variable("b", REAL)
    batch = s.batch()
    best, width = baseline_value(batch, "opob_truncated"), spread(batch, batch.ratio).term
    bottom = prove(implies(both(s.sized, width != 0), best * width == lever(batch)))
    goal = implies(
        both(s.distribution, width != 0), variance(batch, b) - variance(batch, best) == (b - best) * (b - best) * width
    )
    return generalize(arithmetic(goal, variance_gap_at_bottom()(*s.everything, b, best), bottom), *s.everything, b)


def lever(batch: Batch) -> Formula:
    """E[a R] - <E[v s R], E[v s]> for the weights v that the batch holds as ratios, a = v^2 n^2."""
    v, measure, scores = batch.ratio, batch.measure, batch.scored()
    with_reward, without = scores.combine(v * batch.reward * measure), scores.combine(v * measure)
    weighted = expectation(scores.sq_norm(v) * batch.reward, measure)
    return (weighted - namespace(v).sum(with_reward * without, axis=-1)).term


@cache
def variance_gap_at_bottom() -> Theorem:
    """|- for all w, b, m with m spread = E[a R] - <E[w R s], E[w s]>: Var(b) - Var(m) = (b - m)^2 spread."""
    s, b, m = Symbolic(), variable("b", REAL), variable("m", REAL)
    batch = s.batch()
    width = spread(batch, batch.ratio).term
    goal = implies(
        both(s.distribution, m * width == lever(batch)),
        variance(batch, b) - variance(batch, m) == (b - m) * (b - m) * width,
    )
    curve = any_weight_parabola()
    return prove(goal, curve(*s.everything, b), curve(*s.everything, m), over=[*s.everything, b, m])


def variance_symbolic() -> Theorem:
    """|- the same for w = min(w, c), through the shipped truncation."""
    s, b, c = Symbolic(), variable("b", REAL), variable("c", REAL)
    batch, weighting = s.batch(), truncated(Parameter(c))
    cut = namespace(batch.ratio).minimum(batch.ratio, c)
    best, width = baseline_value(batch, "opob_truncated", weighting=weighting), spread(batch, cut).term
    excess = variance(batch, b, weighting=weighting) - variance(batch, best, weighting=weighting)
    goal = implies(both(s.distribution, width != 0), excess == (b - best) * (b - best) * width)
    known = least_variance()(*with_weights(s, sequence(cut.at)), b)
    return generalize(arithmetic(goal, known), *s.everything, b, c)


@cache
def variance_positive() -> Theorem:
    """|- P >= 0 -> tr Cov X >= 0, for all P, X, N, d."""
    s = Symbolic()
    N, d, P, X = s.N, s.d, s.P, s.S
    nonnegative = every(lambda i: P[i] >= 0, N)
    row = lambda i: sequence(lambda j: X[i][j] - total(lambda k: X[k][j] * P[k], N))  # noqa: E731
    term = lambda i: total(lambda j: row(i)[j] * row(i)[j], d) * P[i]  # noqa: E731
    rule = induct(
        lambda n: implies(both(nonnegative, n <= N, d >= 0), total(term, n) >= 0),
        step=lambda k: [specialize(nonnegative, k), sum_of_squares_positive()(row(k), d)],
    )
    left = trace_covariance(matrix(X, N, d), vector(P, N)).term
    return prove(implies(both(N >= 0, d >= 0, nonnegative), left >= 0), rule(N), over=[P, X, N, d])


def _draws(s: Symbolic) -> Batch:
    """Every outcome as a batch of one."""
    samples, coordinates = Length(s.N), Length(s.d)
    reward = SymbolicArray(REAL_ALGEBRA, (samples, 1), lambda i, _: s.R[i])
    ratio = SymbolicArray(REAL_ALGEBRA, (samples, 1), lambda i, _: s.W[i])
    score = SymbolicArray(REAL_ALGEBRA, (samples, 1, coordinates), lambda i, _, j: s.S[i][j])
    return Batch(reward=reward, ratio=ratio, scores=DenseScores(score))


def mse_symbolic() -> Theorem:
    """|- P >= 0, E[a] > 0 -> MSE(b) - MSE(b'') = (b - b'')^2 E[a], for any weights and any vector g."""
    s, b, g = Symbolic(), variable("b", REAL), variable("g", SEQUENCE)
    norm = total(lambda i: s.P[i] * s.weight_of(i), s.N)
    best = _mse_lever(s, g) / norm
    goal = implies(
        both(s.distribution, _nonnegative(s), norm > 0),
        _draw_mse(s, g, b) - _draw_mse(s, g, best) == (b - best) * (b - best) * norm,
    )
    known = _mse_gap_at_bottom()(*s.everything, g, b, best)
    return generalize(arithmetic(goal, known), *s.everything, g, b)


def _nonnegative(s: Symbolic) -> Formula:
    return every(lambda i: s.P[i] >= 0, s.N)


def _mse_lever(s: Symbolic, g: Formula) -> Formula:
    """E[a R] - <E[w s], g>."""
    mean = lambda j: total(lambda i: s.P[i] * s.W[i] * s.S[i][j], s.N)  # noqa: E731
    weighted = total(lambda i: s.P[i] * s.weight_of(i) * s.R[i], s.N)
    return weighted - total(lambda j: mean(j) * g[j], s.d)


def _draw_mse(s: Symbolic, g: Formula, baseline: Formula) -> Formula:
    return draw_mse(_draws(s), vector(s.P, s.N), vector(g, s.d), baseline)


@cache
def _mse_gap_at_bottom() -> Theorem:
    """|- for all b, m with m E[a] = E[a R] - <E[w s], g>: MSE(b) - MSE(m) = (b - m)^2 E[a]."""
    s, b, m, g = Symbolic(), variable("b", REAL), variable("m", REAL), variable("g", SEQUENCE)
    norm = total(lambda i: s.P[i] * s.weight_of(i), s.N)
    facts = []
    for value in (b, m):
        x = sequence(lambda i: sequence(lambda j: contribution_at(s, value, i, j)))  # noqa: B023
        facts += [trace_covariance_expanded()(s.P, x, s.N, s.d), variance_positive()(s.P, x, s.N, s.d)]
    goal = implies(
        both(s.distribution, _nonnegative(s), m * norm == _mse_lever(s, g)),
        _draw_mse(s, g, b) - _draw_mse(s, g, m) == (b - m) * (b - m) * norm,
    )
    return prove(goal, *facts, over=[*s.everything, g, b, m])


def mse_instance(rng: random.Random) -> dict[str, Any]:
    """Random rationals, with a gradient of two coordinates."""
    return {**instance(rng), "g": [rational(rng), rational(rng)]}


def any_weights_instance(rng: random.Random) -> dict[str, Any]:
    """Weights that do not average the score to zero."""
    values = instance(rng)
    return {**values, "W": [Fraction(rng.randint(1, 9), 4) for _ in values["W"]], "P": list(simplex(rng, values["N"]))}


_TRUNCATED = ("weights.truncate", "weights.Weighting.__call__", "estimators.Estimator.coefficients")

CLAIMS = [
    Claim(
        "T5.bias",
        "E[min(w,c) (R - b) s] - E[w R s] = -E[(w - c)+ (R - b) s]",
        (*_TRUNCATED, "moments.batch_sums"),
        ("C2", "C7"),
        "E[w s] = 0",
        bias_exact,
        bias_symbolic,
        instance,
        ("truncation_bias",),
    ),
    Claim(
        "T5.witness",
        "truncation makes a zero gradient look like 1/9",
        (*_TRUNCATED, "moments.batch_sums"),
        ("C2", "C7"),
        exact=biased_exact,
        coq=("truncation_biased",),
        kind="witness",
    ),
    Claim(
        "T5.variance",
        "opob_truncated is the minimizer of Var, with gap (b - b')^2 (E[a] - ||E[v s]||^2)",
        (*_TRUNCATED, "baselines.minimum_variance", "baselines.Evidence.weighted_sq_norm", "moments.trace_covariance"),
        ("C7",),
        "any weights v, a = v^2 n^2; E[a] != ||E[v s]||^2",
        variance_exact,
        variance_symbolic,
        any_weights_instance,
        ("min_variance_gap",),
    ),
    Claim(
        "T5.mse",
        "MSE(b) - MSE(b'') = (b - b'')^2 E[a], b'' = (E[a R] - <E[v s], g>) / E[a]",
        ("moments.batch_sums", "moments.moments", "moments.Moments.mse", "estimators.Estimator.coefficients"),
        ("C7",),
        "one draw; any weights v, any g; p >= 0, E[a] > 0",
        mse_exact,
        mse_symbolic,
        mse_instance,
        ("min_mse_gap",),
    ),
]
