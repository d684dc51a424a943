"""T9 (claims C8, C10): in-batch OPOB is leave-one-out OPOB times a soft mask on dominating samples.

Statement. For any weights a_i, measure p, and the mass `unit` of one draw, let A = E[a] and

    b = E[a R] / A     h_i = unit a_i / A     b_{-i} = the same mean with one draw of sample i left out

    R_i - b = (1 - h_i) (R_i - b_{-i})                                       (leverage identity)

With the OPOB's weight a_i = w_i^2 ||s_i||^2, the contribution c_i s_i of sample i satisfies

    ||c_i s_i||^2 <= A_{-i}^2 (R_i - b_{-i})^2 / (unit^2 a_i),               A_{-i} = A - unit a_i,

where A_{-i} and b_{-i} do not depend on w_i: the larger its weight, the *less* a sample moves the gradient.

Source. The identity is the one of leverage in least squares (Hoaglin & Welsch 1978); that VCPO's in-batch baseline
obeys it is this project's observation.

Proof. Leaving out one draw takes unit a_i from A and unit a_i R_i from E[a R]. The shipped code never subtracts: it
adds what comes before i to what comes after i (`sum_of_others`), so the first step is that this is the same number."""

from __future__ import annotations

import random
from collections.abc import Callable
from fractions import Fraction
from functools import cache
from typing import Any

import numpy as np

from proofs.claims import Claim
from proofs.logic import (
    INT,
    REAL,
    SEQUENCE,
    SUM,
    Formula,
    Theorem,
    arithmetic,
    generalize,
    propositional,
    specialize,
    sum_next,
    variable,
)
from proofs.setting import Symbolic, coefficients, estimator, instance, problems, rational, rational_array, simplex
from proofs.sums import both, every, implies, induct, pointwise, prove, sequence, total
from proofs.symbolic import scalar, vector
from vcposim.arrays import expectation, sum_of_others
from vcposim.baselines import leverage, leverage_damped, weighted_mean, weighted_mean_of_others

# ---- layer 1 -----------------------------------------------------------------------------------------------------


def others_exact() -> str:
    """The sum of the others and the sample itself give the whole sum."""
    rng = random.Random(0)
    for n in range(1, 20):
        x = rational_array(rng, n)
        assert (sum_of_others(x) + x == x.sum()).all()
    return "19 random arrays"


def identity_exact() -> str:
    """The baseline of the others is the full one, moved by h / (1 - h) times the residual."""
    rng, checked = random.Random(1), 0
    for n in range(2, 12):
        reward, weight = rational_array(rng, n), rational_array(rng, n) ** 2
        for measure, unit in (
            (np.array([Fraction(1, n)] * n, dtype=object), Fraction(1, n)),
            (simplex(rng, n), Fraction(1, 99)),
        ):
            unit = np.array([unit], dtype=object)
            if (expectation(weight, measure) - unit * weight != 0).all() and expectation(weight, measure) != 0:
                b, h = weighted_mean(reward, weight, measure), leverage(weight, measure, unit)
                others = weighted_mean_of_others(reward, weight, measure, unit)
                assert (reward - b == (1 - h) * (reward - others)).all()
                assert (leverage_damped(reward, others, h) == b).all()
                checked += 1
    return f"{checked} random groups"


def share_exact() -> str:
    """Leverages of a group are positive and add up to 1."""
    rng = random.Random(2)
    for n in range(1, 20):
        weight, measure = rational_array(rng, n) ** 2 + 1, np.array([Fraction(1, n)] * n, dtype=object)
        h = leverage(weight, measure, Fraction(1, n))
        assert h.sum() == 1
        assert (h > 0).all()
    return "19 random groups"


def vanishing_exact() -> str:
    """A sample whose weight grows without bound ends up with no contribution of its own."""
    (p,) = problems(1, seed=4, outcomes=(4, 4))
    sizes = []
    for factor in (1, 10, 100, 1000):
        ratio = p.ratio * np.array([Fraction(factor), 1, 1, 1], dtype=object)
        quarter = np.array([Fraction(1, 4)] * 4, dtype=object)
        batch = p.population(ratio=ratio, measure=quarter, unit=quarter[:1])
        sizes.append(batch.scored().sq_norm(coefficients(batch, "opob"))[0])
    assert sizes[1] > sizes[2] > sizes[3]
    assert sizes[3] < sizes[0] / 100
    return "||c s||^2 of one sample at 1, 10, 100, 1000 times its weight: " + ", ".join(
        f"{float(x):.2g}" for x in sizes
    )


# ---- layer 2 -----------------------------------------------------------------------------------------------------


@cache
def mirrored_sum() -> Theorem:
    """|- 0 <= m <= N -> sum_{k < m} f(N - 1 - k) = sum_{k < N} f - sum_{k < N - m} f."""
    f, N = variable("f", SEQUENCE), variable("N", INT)
    mirror = sequence(lambda k: f[N - 1 - k])
    return induct(
        lambda m: implies(both(m <= N), SUM(mirror, m) == SUM(f, N) - SUM(f, N - m)),
        over=[f, N],
        step=lambda m: [sum_next(f, N - m - 1)],
    )


@cache
def others_symbolic() -> Theorem:
    """|- 0 <= i < N -> sum_of_others(x)_i + x_i = sum x, for the shipped function."""
    x, N, i = variable("x", SEQUENCE), variable("N", INT), variable("i", INT)
    left = sum_of_others(vector(x, N)).at(i) + x[i]
    goal = implies(both(i >= 0, i < N), left == total(lambda k: x[k], N))
    facts = [mirrored_sum()(x, N, N - 1 - i), sum_next(x, i)]
    return generalize(arithmetic(goal, *facts), x, N, i)


class Group:
    """Rewards R and weights A of N samples under a measure P; one draw has mass `unit`."""

    def __init__(self) -> None:
        self.N, self.i, self.unit = variable("N", INT), variable("i", INT), variable("unit", REAL)
        self.R, self.A, self.P = (variable(name, SEQUENCE) for name in "RAP")

    @property
    def everything(self) -> list[Formula]:
        """All variables, for statements over all of them."""
        return [self.N, self.i, self.unit, self.R, self.A, self.P]

    @property
    def arrays(self) -> tuple[Any, Any, Any, Any]:
        """Rewards, weights and measure as arrays (N,), and the mass of one draw."""
        return vector(self.R, self.N), vector(self.A, self.N), vector(self.P, self.N), scalar(self.unit)

    @property
    def inside(self) -> Formula:
        """0 <= i < N."""
        return both(self.i >= 0, self.i < self.N)

    @property
    def total_weight(self) -> Formula:
        """E[a]."""
        return total(lambda k: self.P[k] * self.A[k], self.N)

    @property
    def others_weight(self) -> Formula:
        """E[a] - unit a_i."""
        return self.total_weight - self.unit * self.A[self.i]

    def left_out(self) -> list[Theorem]:
        """|- what `weighted_mean_of_others` sums at i: sum_of_others(x p)_i = E[x] - x_i p_i, for x = a R, a, R, 1."""
        made = []
        for x in (
            lambda k: self.A[k] * self.R[k],
            lambda k: self.A[k],
            lambda k: self.R[k],
            lambda k: self.R[k] * 0 + 1,
        ):
            made.append(others_symbolic()(sequence(lambda k: x(k) * self.P[k]), self.N, self.i))  # noqa: B023
        return made

    def mass_of_others(self, x: Callable[[Formula], Formula]) -> Formula:
        """What `weighted_mean_of_others` sums at i: the mass of x without one draw of i."""
        array, measure = vector(sequence(x), self.N), vector(self.P, self.N)
        return (sum_of_others(array * measure) + array * (measure - scalar(self.unit))).at(self.i)

    def of_others(self) -> Formula:
        """b_{-i} by the shipped function."""
        return weighted_mean_of_others(*self.arrays).at(self.i)


@cache
def identity_symbolic() -> Theorem:
    """|- E[a] != 0, E[a] != unit a_i -> R_i - b = (1 - h_i)(R_i - b_{-i}), for the shipped b, h and b_{-i}."""
    g = Group()
    R, A, P, unit = g.arrays
    b, h, others = weighted_mean(R, A, P).term, leverage(A, P, unit).at(g.i), g.of_others()
    reward, share = g.R[g.i], g.unit * g.A[g.i]
    full, weighted = g.total_weight, total(lambda k: g.P[k] * (g.A[k] * g.R[k]), g.N)
    given = both(g.inside, full != 0, g.others_weight != 0)
    facts = [
        prove(implies(given, b * full == weighted)),
        prove(implies(given, h * full == share)),
        _of_others_equation(g, given),
        prove(implies(given, both(full != 0, full - share != 0))),
        _identity()(b, h, others, full, weighted, share, reward),
    ]
    goal = implies(given, reward - b == (1 - h) * (reward - others))
    return generalize(propositional(goal, *facts), *g.everything)


def _of_others_equation(g: Group, given: Formula) -> Theorem:
    """|- given -> b_{-i} (E[a] - unit a_i) = E[a R] - unit a_i R_i."""
    others, reward, share = g.of_others(), g.R[g.i], g.unit * g.A[g.i]
    above, below = g.mass_of_others(lambda k: g.A[k] * g.R[k]), g.mass_of_others(lambda k: g.A[k])
    full, weighted = g.total_weight, total(lambda k: g.P[k] * (g.A[k] * g.R[k]), g.N)
    o, n, d, x, y = (variable(name, REAL) for name in ("o", "n", "d", "x", "y"))
    replaced = prove(implies(both(o * d == n, n == y, d == x), o * x == y), over=[o, n, d, x, y])
    facts = [
        prove(implies(given, above == weighted - share * reward), *g.left_out()),
        prove(implies(given, below == full - share), *g.left_out()),
        prove(implies(given, below != 0), *g.left_out()),
        arithmetic(implies(below != 0, others * below == above)),
        replaced(others, above, below, full - share, weighted - share * reward),
    ]
    return propositional(implies(given, others * (full - share) == weighted - share * reward), *facts)


@cache
def _identity() -> Theorem:
    """|- b A = B, h A = c, o (A - c) = B - c R, A != 0, A != c -> R - b = (1 - h)(R - o)."""
    b, h, o, A, B, c, R = (variable(name, REAL) for name in ("b", "h", "o", "A", "B", "c", "R"))
    given = both(b * A == B, h * A == c, o * (A - c) == B - c * R, both(A != 0, A - c != 0))
    p, y = variable("p", REAL), variable("y", REAL)
    scaled = prove(implies(h * A == c, (1 - h) * y * A == (A - c) * y), over=[h, A, c, y])
    cancelled = prove(implies(both(A != 0, p * A == y * A), p == y), over=[p, A, y])
    times_A = prove(implies(given, (R - b) * A == (1 - h) * (R - o) * A), scaled(h, A, c, R - o))
    divided = cancelled(R - b, A, (1 - h) * (R - o))
    return prove(implies(given, R - b == (1 - h) * (R - o)), times_A, divided, over=[b, h, o, A, B, c, R])


def damped_symbolic() -> Theorem:
    """|- the same through the shipped `leverage_damped`: damping the leave-one-out mean gives the in-batch mean."""
    g = Group()
    R, A, P, unit = g.arrays
    damped = leverage_damped(R, weighted_mean_of_others(R, A, P, unit), leverage(A, P, unit)).at(g.i)
    goal = implies(both(g.inside, g.total_weight != 0, g.others_weight != 0), damped == weighted_mean(R, A, P).term)
    return generalize(arithmetic(goal, identity_symbolic()(*g.everything)), *g.everything)


def share_symbolic() -> Theorem:
    """|- E[a] != 0, p = unit -> sum_i h_i = 1."""
    g = Group()
    draws = g.P
    uniform = every(lambda k: draws[k] == g.unit, g.N)
    _, A, P, unit = g.arrays
    h = leverage(A, P, unit)
    same = pointwise(
        sequence(lambda k: g.A[k] * g.P[k]), sequence(lambda k: g.A[k] * g.unit), g.N, given=uniform,
        by=lambda k: [specialize(uniform, k)],
    )  # fmt: skip
    goal = implies(both(g.N >= 0, uniform, g.total_weight != 0), total(h.at, g.N) == 1)
    return prove(goal, same, over=g.everything)


def vanishing_symbolic() -> Theorem:
    """|- a_i > 0, others' weight > 0 -> unit^2 a_i ||c_i s_i||^2 <= A_{-i}^2 (R_i - b_{-i})^2, for in-batch OPOB."""
    s, i = Symbolic(), variable("i", INT)
    batch = s.batch()
    a = sequence(lambda k: batch.scored().sq_norm(batch.ratio).at(k))
    values = [s.N, i, s.unit, s.R, a, s.P]
    full = total(lambda k: s.P[k] * a[k], s.N)
    others = full - s.unit * a[i]
    b_others = estimator("opob_leave_one_out").baseline_value(batch).at(i)
    size = batch.scored().sq_norm(coefficients(batch, "opob")).at(i)
    given = both(s.sized, i >= 0, i < s.N, s.unit > 0, a[i] > 0, others > 0)
    away, off = s.R[i] - b_others, s.R[i] - estimator("opob").baseline_value(batch).term
    h = estimator("opob").leverage(batch).at(i)
    facts = [
        prove(implies(given, off == (1 - h) * away), identity_symbolic()(*values)),
        prove(implies(given, h * full == s.unit * a[i])),
        prove(implies(given, size == a[i] * off * off)),
        prove(implies(given, both(s.unit > 0, a[i] > 0, others > 0))),
        prove(implies(given, others == full - s.unit * a[i])),
    ]
    bound = _damped_square()(a[i], others, full, s.unit, h, off, away, size)
    goal = implies(given, s.unit * s.unit * a[i] * size <= others * others * (away * away))
    return generalize(propositional(goal, *facts, bound), *s.everything, i)


@cache
def _damped_square() -> Theorem:
    """|- off = (1 - h) away, h F = u a, size = a off^2, a, A, u > 0, A = F - u a -> u^2 a size <= A^2 away^2."""
    a, A, F, u, h, off, away, size = (variable(name, REAL) for name in ("a", "A", "F", "u", "h", "off", "away", "size"))
    given = both(
        off == (1 - h) * away, h * F == u * a, size == a * off * off, both(u > 0, a > 0, A > 0), F - u * a == A
    )
    k, x = (1 - h) * (u * a), variable("x", REAL)
    within = arithmetic(implies(given, both(k >= 0, k <= A)))
    square = generalize(arithmetic(implies(both(x >= 0, x <= A), x * x <= A * A)), x, A)
    p, q, y = (variable(name, REAL) for name in "pqy")
    times = generalize(arithmetic(implies(p <= q, p * (y * y) <= q * (y * y))), p, q, y)
    left = arithmetic(implies(given, u * u * a * size == k * k * (away * away)))
    goal = implies(given, u * u * a * size <= A * A * (away * away))
    facts = [within, square(k, A), times(k * k, A * A, away), left]
    return generalize(arithmetic(goal, *facts), a, A, F, u, h, off, away, size)


def group_instance(rng: random.Random) -> dict[str, Any]:
    """Three random rewards and weights, one of them chosen."""
    n = 3
    return {
        "N": n,
        "i": rng.randrange(n),
        "unit": Fraction(1, n),
        "R": list(rational_array(rng, n)),
        "A": [rational(rng) ** 2 + 1 for _ in range(n)],
        "P": [Fraction(1, n)] * n,
        "x": list(rational_array(rng, n)),
    }


def batch_instance(rng: random.Random) -> dict[str, Any]:
    """Random rationals under the uniform measure."""
    values = instance(rng)
    return {**values, "P": [Fraction(1, values["N"])] * values["N"]}


CLAIMS = [
    Claim(
        "T9.others",
        "sum_of_others(x)_i + x_i = sum x",
        ("arrays.sum_of_others",),
        ("C8",),
        "0 <= i < n",
        others_exact,
        others_symbolic,
        group_instance,
    ),
    Claim(
        "T9.identity",
        "R_i - b = (1 - h_i)(R_i - b_{-i})",
        ("baselines.weighted_mean", "baselines.weighted_mean_of_others", "baselines.leverage", "arrays.sum_of_others"),
        ("C8", "C10"),
        "E[a] != 0, E[a] != unit a_i; any measure, any weights a",
        identity_exact,
        identity_symbolic,
        group_instance,
        ("leverage_identity",),
    ),
    Claim(
        "T9.damped",
        "damping the leave-one-out mean by leverage gives the in-batch mean",
        ("baselines.leverage_damped", "baselines.weighted_mean_of_others", "baselines.leverage"),
        ("C8", "C10"),
        "as T9.identity",
        identity_exact,
        damped_symbolic,
        group_instance,
    ),
    Claim(
        "T9.share",
        "sum_i h_i = 1",
        ("baselines.leverage",),
        ("C8",),
        "every sample is one draw; E[a] != 0",
        share_exact,
        share_symbolic,
        group_instance,
    ),
    Claim(
        "T9.vanishing",
        "||c_i s_i||^2 <= A_{-i}^2 (R_i - b_{-i})^2 / (unit^2 a_i) -> 0 as w_i grows",
        (
            "estimators.Estimator.coefficients",
            "estimators.Estimator.leverage",
            "baselines.weighted_mean",
            "baselines.weighted_mean_of_others",
            "batch.DenseScores.sq_norm",
        ),
        ("C8", "C10"),
        "in-batch OPOB; a_i = w_i^2 n_i^2 > 0, others' weight A_{-i} > 0",
        vanishing_exact,
        vanishing_symbolic,
        batch_instance,
        ("leverage_vanishing",),
    ),
]
