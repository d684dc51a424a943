"""T8 (claim C11): the best step size under noise, and what the effective sample size has to do with it.

Statement. The objective is L-smooth, X an unbiased estimate of its gradient G, V = tr Cov X. One step eta X gains at
least

    gain(eta) = eta |G|^2 - (L/2) eta^2 (|G|^2 + V)       on average, and
    gain(eta*) - gain(eta) = (L/2)(|G|^2 + V)(eta - eta*)^2,      eta* = |G|^2 / (L (|G|^2 + V)).

If moreover V = V1 / (n rho) (a premise, not a theorem: see T4.gradient), then with scale = min(1, rho) as shipped,

    scale eta*(1) <= eta*(rho) <= (1 + n |G|^2 / V1) scale eta*(1)

so for SGD the linear rule is safe, and right up to the factor 1 + n |G|^2 / V1, which is near 1 when noise dominates.

Source. The rule: VCPO, arXiv 2602.17616. The quadratic bound: Bottou, Curtis & Nocedal 2018.

No theorem backs the square root for Adam: Adam divides by a running root mean square of past gradients, so its step is
no function of the mean and variance of one gradient. For SGD the square root can overshoot (`T8.sqrt_overshoots`).
"""

from __future__ import annotations

import random
from fractions import Fraction
from typing import Any

import numpy as np

from proofs.claims import Claim
from proofs.logic import (
    INT,
    MATRIX,
    REAL,
    SEQUENCE,
    Formula,
    Theorem,
    generalize,
    propositional,
    specialize,
    variable,
    z3,
)
from proofs.setting import instance, problems, rational, rational_array
from proofs.sums import both, every, exchange, implies, pointwise, prove, sequence, total
from proofs.symbolic import Parameter, matrix, scalar, vector
from proofs.t02_optimal_baseline import trace_covariance_expanded
from vcposim.arrays import expectation
from vcposim.control import step_scale
from vcposim.moments import trace_covariance


def gain(eta: Any, signal: Any, noise: Any, smoothness: Any) -> Any:
    """eta |G|^2 - (L/2) eta^2 (|G|^2 + V)."""
    return eta * signal - smoothness * eta * eta * (signal + noise) / 2


def best_step(signal: Any, noise: Any, smoothness: Any) -> Any:
    """eta* = |G|^2 / (L (|G|^2 + V))."""
    return signal / (smoothness * (signal + noise))


def best_at_ess(samples: Any, signal: Any, noise: Any, smoothness: Any) -> Any:
    """eta* with V = V1 / samples."""
    return samples * signal / (smoothness * (samples * signal + noise))


# ---- layer 1 -----------------------------------------------------------------------------------------------------


def bound_exact() -> str:
    """The guaranteed gain of a step: the mean over draws equals `gain` of signal and noise."""
    rng = random.Random(0)
    for p in problems(40):
        x, eta, smooth = rational_array(rng, *p.score.shape), rational(rng), Fraction(rng.randint(1, 9), 4)
        mean = (p.mu[:, None] * x).sum(axis=0)
        gained = expectation(eta * (x * mean).sum(axis=-1) - smooth * eta**2 / 2 * (x * x).sum(axis=-1), p.mu)
        assert gained == gain(eta, (mean * mean).sum(), trace_covariance(x, p.mu), smooth)
    return "40 random problems"


def _positive(rng: random.Random) -> Fraction:
    return Fraction(rng.randint(1, 20), rng.randint(1, 20))


def best_exact() -> str:
    """`best_step` maximizes it: another step loses L/2 (G^2 + V) (eta - eta*)^2."""
    rng = random.Random(1)
    for _ in range(100):
        signal, noise, smooth, eta = (_positive(rng) for _ in range(4))
        best = best_step(signal, noise, smooth)
        gap = gain(best, signal, noise, smooth) - gain(eta, signal, noise, smooth)
        assert gap == smooth / 2 * (signal + noise) * (eta - best) ** 2
    return "100 random settings"


def linear_exact() -> str:
    """The linear step scale is within a factor 1 + n G^2 / V of the best step."""
    rng = random.Random(2)
    for _ in range(100):
        n, signal, noise, smooth = (_positive(rng) for _ in range(4))
        rho = Fraction(rng.randint(1, 20), 20)
        scale = step_scale(np.array([rho], dtype=object), reference=1, exponent=1)[0]
        full, best = best_at_ess(n, signal, noise, smooth), best_at_ess(n * rho, signal, noise, smooth)
        assert scale == rho
        assert scale * full <= best <= (1 + n * signal / noise) * scale * full
    return "100 random settings"


def overshoots_exact() -> str:
    """A setting where the square-root scale loses and the linear one gains."""
    rho, signal, noise, smooth = Fraction(1, 16), Fraction(1), Fraction(99), Fraction(1)
    scale = Fraction(float(step_scale(np.array([rho], dtype=object), reference=1, exponent=0.5)[0]))
    assert scale == Fraction(1, 4)
    full = best_at_ess(1, signal, noise, smooth)
    loss, kept = (gain(x * full, signal, noise / rho, smooth) for x in (scale, rho))
    assert loss < 0 < kept
    return (
        f"noise 99 times the signal, rho = 1/16: the square-root step gains {loss}, the linear step {float(kept):.2g}"
    )


def range_exact() -> str:
    """The scale lies in [0, 1], and is 0 for every rho outside (0, 1]."""
    rhos = np.array([Fraction(k, 20) for k in range(-5, 41)], dtype=object)
    scale = step_scale(rhos, reference=Fraction(11, 20), exponent=1)
    assert all(0 <= s <= 1 for s in scale)
    assert all(s == 0 for s, rho in zip(scale, rhos, strict=True) if not 0 < rho <= 1)
    return "46 values of rho inside and outside (0, 1]"


# ---- layer 2 -----------------------------------------------------------------------------------------------------


def bound_symbolic() -> Theorem:
    """|- E X = G -> E[eta <G, X> - (L/2) eta^2 ||X||^2] = gain(eta), with V the shipped trace of the covariance."""
    N, d = variable("N", INT), variable("d", INT)
    P, X, G = variable("P", SEQUENCE), variable("S", MATRIX), variable("g", SEQUENCE)
    eta, L = variable("eta", REAL), variable("L", REAL)
    mean = lambda j: total(lambda i: X[i][j] * P[i], N)  # noqa: E731
    unbiased = every(lambda j: mean(j) == G[j], d)
    square = lambda i: total(lambda j: X[i][j] * X[i][j], d)  # noqa: E731
    gained = total(lambda i: P[i] * (eta * total(lambda j: G[j] * X[i][j], d) - L / 2 * eta * eta * square(i)), N)
    signal = total(lambda j: G[j] * G[j], d)
    V = trace_covariance(matrix(X, N, d), vector(P, N)).term
    cross = sequence(lambda i: sequence(lambda j: P[i] * G[j] * X[i][j]))
    facts = [trace_covariance_expanded()(P, X, N, d), exchange()(cross, d, N)]
    for factor in (lambda j: G[j], mean):
        facts.append(pointwise(
            sequence(lambda j: factor(j) * mean(j)), sequence(lambda j: G[j] * G[j]), d, given=unbiased,  # noqa: B023
            by=lambda j: [specialize(unbiased, j)],
        ))  # fmt: skip
    goal = implies(both(N >= 0, d >= 0, total(lambda i: P[i], N) == 1, unbiased), gained == gain(eta, signal, V, L))
    return prove(goal, *facts, over=[N, d, P, X, G, eta, L])


def best_symbolic() -> Theorem:
    """|- L > 0, |G|^2 > 0, V >= 0 -> gain(eta*) - gain(eta) = (L/2)(|G|^2 + V)(eta - eta*)^2."""
    signal, V, L, eta = _numbers("G2 V L eta")
    best = best_step(signal, V, L)
    gap = gain(best, signal, V, L) - gain(eta, signal, V, L)
    goal = implies(both(signal > 0, V >= 0, L > 0), gap == L / 2 * (signal + V) * (eta - best) * (eta - best))
    return prove(goal, over=[signal, V, L, eta])


def _numbers(names: str) -> list[Formula]:
    return [variable(name, REAL) for name in names.split()]


def linear_symbolic() -> Theorem:
    """|- 0 < rho <= 1 -> scale eta*(1) <= eta*(rho) <= (1 + n |G|^2 / V1) scale eta*(1), scale as shipped."""
    n, signal, V1, L, rho = _numbers("n G2 V L rho")
    scale = step_scale(scalar(rho), reference=1, exponent=1).term
    full, best, ratio = best_at_ess(n, signal, V1, L), best_at_ess(n * rho, signal, V1, L), n * signal / V1
    positive = both(n > 0, signal > 0, V1 > 0, L > 0, rho > 0, rho <= 1)
    defined = (
        scale == rho,
        ratio * V1 == n * signal,
        full * (L * (n * signal + V1)) == n * signal,
        best * (L * (rho * (n * signal) + V1)) == rho * (n * signal),
        both(n * signal > 0, V1 > 0, L > 0, rho > 0, rho <= 1),
    )
    facts = [prove(implies(positive, equation)) for equation in defined]
    goal = implies(positive, both(scale * full <= best, best <= (1 + ratio) * (scale * full)))
    rule = _between()(scale, rho, ratio, V1, n * signal, L, full, best)
    return generalize(propositional(goal, *facts, rule), n, signal, V1, L, rho)


def _between() -> Theorem:
    """|- x = s / (L (s + v)), e = r s / (L (r s + v)), q = s / v, 0 < r <= 1 -> r x <= e <= (1 + q) r x."""
    c, r, q, v, s, L, x, e = _numbers("c r q v s L x e")
    given = both(
        c == r,
        q * v == s,
        x * (L * (s + v)) == s,
        e * (L * (r * s + v)) == r * s,
        both(s > 0, v > 0, L > 0, r > 0, r <= 1),
    )
    same = prove(implies(given, e * (r * s + v) == r * x * (s + v)))
    sign = prove(implies(given, x > 0))
    low = prove(implies(given, r * x <= e), same, sign)
    high = prove(implies(given, e * v <= (s + v) * (r * x)), same, sign)
    top = prove(implies(given, e <= (1 + q) * (r * x)), high)
    goal = implies(given, both(c * x <= e, e <= (1 + q) * (c * x)))
    return prove(goal, low, top, over=[c, r, q, v, s, L, x, e])


def range_symbolic() -> Theorem:
    """|- 0 < ref <= 1 -> 0 <= scale <= 1; 0 unless 0 < rho <= 1.001; 1 for ref <= rho <= 1; growing with rho."""
    rho, more, ref = _numbers("rho more ref")
    scale = lambda x: step_scale(scalar(x), reference=Parameter(ref), exponent=1).term  # noqa: E731
    facts = both(
        scale(rho) >= 0,
        scale(rho) <= 1,
        implies(rho <= 0, scale(rho) == 0),
        implies(rho > z3.RealVal("1001/1000"), scale(rho) == 0),
        implies(both(ref <= rho, rho <= 1), scale(rho) == 1),
        implies(both(rho <= more, more <= 1), scale(rho) <= scale(more)),
    )
    return prove(implies(both(ref > 0, ref <= 1), facts), over=[rho, more, ref])


def step_instance(rng: random.Random) -> dict[str, Any]:
    """Random positive constants of the descent bound, and two ESS fractions in order."""
    names = ("n", "G2", "V", "L", "eta", "V1")
    rho, more = sorted(Fraction(rng.randint(1, 20), 20) for _ in range(2))
    return {**{name: _positive(rng) for name in names}, "rho": rho, "more": more, "ref": Fraction(11, 20)}


def bound_instance(rng: random.Random) -> dict[str, Any]:
    """Random rationals, with g the mean of the rows of S."""
    values = instance(rng)
    mean = [
        sum((p * row[j] for p, row in zip(values["P"], values["S"], strict=True)), Fraction(0))
        for j in range(values["d"])
    ]
    return {**values, "g": mean, "eta": rational(rng), "L": _positive(rng)}


CLAIMS = [
    Claim(
        "T8.bound",
        "E[eta <G, X> - (L/2) eta^2 ||X||^2] = eta |G|^2 - (L/2) eta^2 (|G|^2 + V)",
        ("moments.trace_covariance",),
        ("C11",),
        "E X = G, V = tr Cov X",
        bound_exact,
        bound_symbolic,
        bound_instance,
        ("expected_descent",),
    ),
    Claim(
        "T8.best",
        "eta* = |G|^2 / (L (|G|^2 + V)) is best, gap (L/2)(|G|^2 + V)(eta - eta*)^2",
        (),
        ("C11",),
        "L > 0, |G|^2 > 0, V >= 0; the quadratic bound",
        best_exact,
        best_symbolic,
        step_instance,
        ("step_gap",),
    ),
    Claim(
        "T8.linear",
        "scale eta*(1) <= eta*(rho) <= (1 + n |G|^2 / V1) scale eta*(1): linear for SGD",
        ("control.step_scale",),
        ("C11",),
        "0 < rho <= 1, exponent 1, reference 1; premise V = V1 / (n rho)",
        linear_exact,
        linear_symbolic,
        step_instance,
        ("step_ess", "linear_regime"),
    ),
    Claim(
        "T8.range",
        "step_scale is in [0, 1], grows with rho, and is 0 unless 0 < rho <= 1.001",
        ("control.step_scale",),
        ("C11", "C18"),
        "exponent 1, 0 < reference <= 1",
        range_exact,
        range_symbolic,
        step_instance,
    ),
    Claim(
        "T8.sqrt_overshoots",
        "the square-root rule can lose for SGD where the linear rule gains",
        ("control.step_scale",),
        ("C11",),
        exact=overshoots_exact,
        kind="witness",
    ),
    Claim(
        "T8.adam",
        "no theorem: the square root is right for Adam. Adam divides by a running root mean square of past "
        "gradients; its step is no function of one gradient's mean and variance, so T8 does not speak about it",
        (),
        ("C11",),
        kind="no theorem",
    ),
]
