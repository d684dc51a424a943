"""T3 (claim C3): the effective sample size lies between 1 and n, and does not depend on the scale of the weights.

Statement. ess(w) = (sum w)^2 / sum w^2 with sum w^2 > 0. Then

    ess(w) <= n          for any real weights, with equality iff all are equal;
    1 <= ess(w)          for w >= 0,           with equality iff a single sample has weight;
    ess(c w) = ess(w)    for c != 0;
    ess(w) = n rho(w)    with rho = E[w]^2 / E[w^2] the fraction under the measure 1/n, and rho <= 1 under any measure.

Source. Kish 1965; Kong 1992.

Proof. n sum w^2 - (sum w)^2 = n sum (w_i - mean)^2 >= 0, zero iff every w_i is the mean. (sum w)^2 - sum w^2 is the
sum of the products w_i w_k over pairs i != k: not negative, and zero iff no two samples have weight."""

from __future__ import annotations

import random
from fractions import Fraction
from functools import cache
from typing import Any

import numpy as np

from proofs.claims import Claim
from proofs.logic import (
    INT,
    REAL,
    SEQUENCE,
    Formula,
    Theorem,
    arithmetic,
    generalize,
    generalize_conclusion,
    specialize,
    variable,
    z3,
)
from proofs.setting import instance, rational, simplex
from proofs.sums import both, every, implies, induct, pointwise, prove, sequence, total
from proofs.symbolic import vector
from vcposim.diagnostics import ess_fraction_of_weights, ess_of_weights

# ---- layer 1 -----------------------------------------------------------------------------------------------------


def _weights(rng: random.Random, n: int) -> np.ndarray[Any, Any]:
    return np.array([Fraction(rng.randint(0, 9), rng.randint(1, 9)) for _ in range(n)], dtype=object)


def bounds_exact() -> str:
    """1 <= ESS <= n, with equality for a lone weight and for equal weights only."""
    rng = random.Random(0)
    for n in [*range(1, 8)] * 20:
        w = _weights(rng, n)
        if (w != 0).any():
            ess = ess_of_weights(w)
            assert 1 <= ess <= n
            assert (ess == n) == (w == w[0]).all()
            assert (ess == 1) == ((w != 0).sum() == 1)
    return "140 random batches of 1 to 7"


def equality_exact() -> str:
    """n equal weights have ESS n, a lone weight has 1."""
    for n in range(1, 8):
        assert ess_of_weights(np.array([Fraction(3, 7)] * n, dtype=object)) == n
        lone = np.array([Fraction(0)] * (n - 1) + [Fraction(5, 2)], dtype=object)
        assert ess_of_weights(lone) == 1
    return "equal weights and lone weights, n = 1 to 7"


def scale_exact() -> str:
    """A common factor on the weights leaves ESS as it is."""
    rng = random.Random(1)
    for n in range(1, 30):
        w, c = _weights(rng, n), Fraction(rng.randint(1, 9), rng.randint(1, 9))
        assert ess_of_weights(w * c) == ess_of_weights(w)
    return "29 random batches"


def fraction_exact() -> str:
    """The fraction is ESS / n for draws, and in [0, 1] under any measure."""
    rng = random.Random(2)
    for n in range(1, 30):
        w, measure = _weights(rng, n), simplex(rng, n)
        uniform = np.array([Fraction(1, n)] * n, dtype=object)
        assert ess_fraction_of_weights(w, uniform) * n == ess_of_weights(w)
        assert 0 <= ess_fraction_of_weights(w, measure) <= 1
    return "29 random batches and measures"


# ---- layer 2 -----------------------------------------------------------------------------------------------------


class Weights:
    """N weights W, N unknown, and what the shipped function makes of them."""

    def __init__(self) -> None:
        self.N, self.W = variable("N", INT), variable("W", SEQUENCE)
        self.ess = ess_of_weights(vector(self.W, self.N)).term
        self.sum = total(lambda i: self.W[i], self.N)
        self.squares = total(lambda i: self.W[i] * self.W[i], self.N)
        self.n = z3.ToReal(self.N)
        self.nonnegative = every(lambda i: self.W[i] >= 0, self.N)


@cache
def sum_of_squares_positive() -> Theorem:
    """|- for all f, n >= 0: sum f(i)^2 >= 0."""
    f = variable("f", SEQUENCE)
    return induct(lambda n: total(lambda i: f[i] * f[i], n) >= 0, over=[f])


@cache
def square_within_sum() -> Theorem:
    """|- for all f, i, n: 0 <= i < n -> f(i)^2 <= sum f^2."""
    f, i = variable("f", SEQUENCE), variable("i", INT)
    return induct(
        lambda n: implies(both(i >= 0, i < n), f[i] * f[i] <= total(lambda k: f[k] * f[k], n)),
        over=[f, i],
        step=lambda k: [sum_of_squares_positive()(f, k)],
    )


@cache
def product_within_pairs() -> Theorem:
    """|- f >= 0, 0 <= i < k < n -> sum f >= f(i) and (sum f)^2 - sum f^2 >= 2 f(i) f(k), and both sums are >= 0."""
    f, i, k, N = variable("f", SEQUENCE), variable("i", INT), variable("k", INT), variable("N", INT)
    nonnegative = every(lambda j: f[j] >= 0, N)
    add, squares = (lambda n: total(lambda j: f[j], n)), (lambda n: total(lambda j: f[j] * f[j], n))
    return induct(
        lambda n: implies(
            both(nonnegative, n <= N, i >= 0, i < k),
            both(
                add(n) >= 0,
                add(n) * add(n) >= squares(n),
                implies(i < n, add(n) >= f[i]),
                implies(k < n, add(n) * add(n) - squares(n) >= 2 * f[i] * f[k]),
            ),
        ),
        over=[f, i, k, N],
        step=lambda j: [specialize(nonnegative, j), specialize(nonnegative, i)],
    )


def _deviation(w: Weights) -> Formula:
    """The sequence w_i - mean(w)."""
    return sequence(lambda i: w.W[i] - w.sum / w.n)


def _spread(w: Weights) -> Theorem:
    """|- n > 0 -> n sum (w_i - mean)^2 = n sum w^2 - (sum w)^2."""
    d = _deviation(w)
    return prove(implies(w.N > 0, w.n * total(lambda i: d[i] * d[i], w.N) == w.n * w.squares - w.sum * w.sum))


def _equation(w: Weights) -> Theorem:
    """|- sum w^2 > 0 -> ess sum w^2 = (sum w)^2, for the shipped ess."""
    return prove(implies(both(w.N >= 0, w.squares > 0), w.ess * w.squares == w.sum * w.sum))


def upper_symbolic() -> Theorem:
    """|- n > 0, sum w^2 > 0 -> ess <= n."""
    w = Weights()
    goal = implies(both(w.N > 0, w.squares > 0), w.ess <= w.n)
    positive = sum_of_squares_positive()(_deviation(w), w.N)
    return generalize(arithmetic(goal, _spread(w), positive, _equation(w)), w.N, w.W)


def equal_symbolic() -> Theorem:
    """|- n > 0, sum w^2 > 0 -> (ess = n if and only if every weight is the mean)."""
    w, i = Weights(), variable("i", INT)
    sized = both(w.N > 0, w.squares > 0)
    alike = every(lambda k: w.W[k] == w.sum / w.n, w.N)
    d = _deviation(w)
    one = arithmetic(
        implies(both(sized, w.ess == w.n), implies(both(i >= 0, i < w.N), w.W[i] == w.sum / w.n)),
        _spread(w), square_within_sum()(d, i, w.N), _equation(w),
    )  # fmt: skip
    no_spread = pointwise(
        sequence(lambda k: d[k] * d[k]), sequence(lambda k: z3.RealVal(0)), w.N, given=both(w.N > 0, alike),
        by=lambda k: [specialize(alike, k)],
    )  # fmt: skip
    converse = prove(implies(both(sized, alike), w.ess == w.n), no_spread, _spread(w), _equation(w))
    goal = implies(sized, (w.ess == w.n) == alike)
    return generalize(arithmetic(goal, generalize_conclusion(one, i), converse), w.N, w.W)


def lower_symbolic() -> Theorem:
    """|- w >= 0, sum w^2 > 0 -> ess >= 1."""
    w = Weights()
    goal = implies(both(w.N >= 0, w.nonnegative, w.squares > 0), w.ess >= 1)
    pairs = product_within_pairs()(w.W, 0, 1, w.N, w.N)
    return generalize(arithmetic(goal, pairs, _equation(w)), w.N, w.W)


def lone_symbolic() -> Theorem:
    """|- w >= 0, sum w^2 > 0, ess = 1 -> of any two samples one has no weight."""
    w, i, k = Weights(), variable("i", INT), variable("k", INT)
    given = both(w.N >= 0, w.nonnegative, w.squares > 0, w.ess == 1, i >= 0, i < k, k < w.N)
    goal = implies(given, w.W[i] * w.W[k] == 0)
    facts = [product_within_pairs()(w.W, i, k, w.N, w.N), specialize(w.nonnegative, i), specialize(w.nonnegative, k)]
    return generalize(arithmetic(goal, *facts, _equation(w)), w.N, w.W, i, k)


def scale_symbolic() -> Theorem:
    """|- c != 0, sum w^2 != 0 -> ess(c w) = ess(w)."""
    w, c = Weights(), variable("c", REAL)
    scaled = ess_of_weights(vector(w.W, w.N) * c).term
    return prove(implies(both(w.N >= 0, c != 0, w.squares != 0), scaled == w.ess), over=[w.N, w.W, c])


def fraction_symbolic() -> Theorem:
    """|- n > 0, sum w^2 != 0 -> ess = n rho under the measure 1/n."""
    w = Weights()
    array = vector(w.W, w.N)
    rho = ess_fraction_of_weights(array, (array * 0 + 1) / array.shape[0]).term
    return prove(implies(both(w.N > 0, w.squares > 0), w.ess == w.n * rho), over=[w.N, w.W])


@cache
def mean_square_positive() -> Theorem:
    """|- p >= 0 -> E[f^2] >= 0, for all p, f, N and n <= N."""
    p, f, N = variable("p", SEQUENCE), variable("f", SEQUENCE), variable("N", INT)
    nonnegative = every(lambda i: p[i] >= 0, N)
    return induct(
        lambda n: implies(both(nonnegative, n <= N), total(lambda i: p[i] * (f[i] * f[i]), n) >= 0),
        over=[p, f, N],
        step=lambda k: [
            specialize(nonnegative, k),
            generalize(arithmetic(implies(p[k] >= 0, p[k] * (f[k] * f[k]) >= 0))),
        ],
    )


def measure_symbolic() -> Theorem:
    """|- p >= 0, sum p = 1, E[w^2] > 0 -> rho <= 1."""
    w, p = Weights(), variable("P", SEQUENCE)
    rho = ess_fraction_of_weights(vector(w.W, w.N), vector(p, w.N)).term
    nonnegative = every(lambda i: p[i] >= 0, w.N)
    mean, square = total(lambda i: p[i] * w.W[i], w.N), total(lambda i: p[i] * w.W[i] * w.W[i], w.N)
    centered = sequence(lambda i: w.W[i] - mean)
    goal = implies(both(w.N >= 0, nonnegative, total(lambda i: p[i], w.N) == 1, square > 0), rho <= 1)
    return prove(goal, mean_square_positive()(p, centered, w.N, w.N), over=[w.N, w.W, p])


# ---- instances ---------------------------------------------------------------------------------------------------


def weights_instance(rng: random.Random) -> dict[str, Any]:
    """Random rational weights that are not negative, and two indices."""
    values = instance(rng)
    return {**values, "W": [abs(w) for w in values["W"]], "i": 0, "k": 1}


def alike_or_not_instance(rng: random.Random) -> dict[str, Any]:
    """The same, all weights equal in half of the instances."""
    values = weights_instance(rng)
    return {**values, "W": [Fraction(3, 2)] * values["N"] if rng.random() < 0.5 else values["W"]}


def lone_instance(rng: random.Random) -> dict[str, Any]:
    """Three weights, the middle one alone above 0."""
    return {**weights_instance(rng), "N": 3, "W": [Fraction(0), abs(rational(rng)) + 1, Fraction(0)]}


_ESS = ("diagnostics.ess_of_weights",)
_RHO = ("diagnostics.ess_fraction_of_weights",)

CLAIMS = [
    Claim(
        "T3.upper",
        "ess(w) <= n",
        _ESS,
        ("C3",),
        "sum w^2 > 0; weights of any sign",
        bounds_exact,
        upper_symbolic,
        weights_instance,
        ("ess_le_N",),
    ),
    Claim(
        "T3.equal",
        "ess(w) = n iff all weights are equal",
        _ESS,
        ("C3",),
        "sum w^2 > 0",
        equality_exact,
        equal_symbolic,
        alike_or_not_instance,
        ("ess_eq_N",),
    ),
    Claim(
        "T3.lower",
        "1 <= ess(w)",
        _ESS,
        ("C3",),
        "w >= 0, sum w^2 > 0",
        bounds_exact,
        lower_symbolic,
        weights_instance,
        ("ess_ge_1",),
    ),
    Claim(
        "T3.lone",
        "ess(w) = 1 iff a single sample has weight",
        _ESS,
        ("C3",),
        "w >= 0, sum w^2 > 0",
        equality_exact,
        lone_symbolic,
        lone_instance,
        ("ess_eq_1",),
    ),
    Claim(
        "T3.scale",
        "ess(c w) = ess(w)",
        _ESS,
        ("C3",),
        "c != 0, sum w^2 != 0",
        scale_exact,
        scale_symbolic,
        weights_instance,
        ("ess_scale",),
    ),
    Claim(
        "T3.fraction",
        "ess(w) = n rho(w) under the measure 1/n",
        (*_ESS, *_RHO),
        ("C3",),
        "n > 0, sum w^2 > 0",
        fraction_exact,
        fraction_symbolic,
        weights_instance,
    ),
    Claim(
        "T3.measure",
        "rho(w) <= 1 under any measure",
        _RHO,
        ("C3",),
        "p >= 0, sum p = 1, E[w^2] > 0",
        fraction_exact,
        measure_symbolic,
        weights_instance,
    ),
]
