"""The setting that most claims share, once for each layer.

K outcomes (trajectories of one prompt) are drawn from a behavior policy mu and weighed towards a target policy pi:

    mu_k > 0, sum mu = 1      w_k = pi_k / mu_k      reward R_k      score s_k in R^d with E_pi[s] = E_mu[w s] = 0

`Symbolic` holds it for unknown K and d, `RationalProblem` with rational numbers. Both give the *same kind of*
`vcposim.Batch`, so one line such as `variance(batch, b)` is the law in both layers."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np

from proofs.logic import INT, MATRIX, REAL, SEQUENCE, Formula, variable, z3
from proofs.sums import every, sequence, total
from proofs.symbolic import Parameter, SymbolicArray, matrix, scalar, vector
from vcposim.arrays import Array, namespace
from vcposim.batch import Batch, DenseScores
from vcposim.estimators import Estimator
from vcposim.moments import batch_sums, trace_covariance

# ---- formulas that claims are about, for any kind of batch -------------------------------------------------------


def contribution(batch: Batch, coefficient: Array) -> Array:
    """c_i s_i: (..., n, p)."""
    return batch.scored().score * namespace(coefficient).expand_dims(coefficient, axis=-1)  # type: ignore[attr-defined]


def coefficients(batch: Batch, baseline: Any, **options: Any) -> Array:
    """c_i of the shipped `Estimator` with that baseline, a name or a number (rational or symbolic): (..., n)."""
    return estimator(baseline, **options).coefficients(batch)


def estimator(baseline: Any, **options: Any) -> Estimator:
    """The shipped `Estimator`; its float defaults of zero become exact zeros."""
    exact_zeros = {"epsilon": 0, "baseline_shift": 0}
    return Estimator(baseline=Parameter(baseline) if is_term(baseline) else baseline, **{**exact_zeros, **options})


def baseline_value(batch: Batch, name: str, **options: Any) -> Any:
    """The number b that the shipped baseline of that name takes on a batch of one group."""
    return number(estimator(name, **options).baseline_value(batch))


def number(x: Any) -> Any:
    """The only element of an array, rational or symbolic; numbers as they are."""
    if isinstance(x, SymbolicArray):
        return x.term
    return x.item() if isinstance(x, np.ndarray) else x


def is_term(x: Any) -> bool:
    """Whether x is a z3 term."""
    return z3 is not None and z3.is_expr(x)


def variance(batch: Batch, baseline: Any, **options: Any) -> Any:
    """tr Cov of one contribution c s, by the shipped estimator and the shipped `trace_covariance`."""
    c = coefficients(batch, baseline, **options)
    return number(trace_covariance(contribution(batch, c), batch.measure))


def mean_estimate(batch: Batch, coefficient: Array) -> Array:
    """sum_i measure_i c_i s_i by the shipped `batch_sums`: (..., n) -> (p,)."""
    return batch_sums(batch, coefficient).estimate


# ---- layer 2 -----------------------------------------------------------------------------------------------------


class Symbolic:
    """N outcomes with d-dimensional scores, N and d unknown."""

    def __init__(self) -> None:
        self.N, self.d = variable("N", INT), variable("d", INT)
        self.P, self.W = variable("P", SEQUENCE), variable("W", SEQUENCE)
        self.R, self.L = variable("R", SEQUENCE), variable("L", SEQUENCE)
        self.S = variable("S", MATRIX)
        self.unit = variable("unit", REAL)

    @property
    def everything(self) -> list[Formula]:
        """The variables, to be generalized over."""
        return [self.N, self.d, self.P, self.W, self.R, self.L, self.S, self.unit]

    def batch(self, **changes: Any) -> Batch:
        """The outcomes as one batch under the measure P; one draw has mass `unit`."""
        fields = {
            "reward": vector(self.R, self.N),
            "ratio": vector(self.W, self.N),
            "length": vector(self.L, self.N),
            "scores": DenseScores(matrix(self.S, self.N, self.d)),
            "measure": vector(self.P, self.N),
            "unit": scalar(self.unit),
        }
        return Batch(**{**fields, **changes})  # type: ignore[arg-type]

    @property
    def sized(self) -> Formula:
        """N, d >= 0."""
        return z3.And(self.N >= 0, self.d >= 0)

    @property
    def distribution(self) -> Formula:
        """N, d >= 0 and sum P = 1."""
        return z3.And(self.sized, total(lambda i: self.P[i], self.N) == 1)

    def balanced_at(self, j: Formula) -> Formula:
        """E[w s_j] = 0: the score of a policy averages to zero under that policy."""
        return total(lambda i: self.P[i] * (self.W[i] * self.S[i][j]), self.N) == 0

    @property
    def balanced(self) -> Formula:
        """E[w s_j] = 0 for every coordinate j < d."""
        return every(self.balanced_at, self.d)

    def column(self, j: Formula) -> Formula:
        """i -> s_ij."""
        return sequence(lambda i: self.S[i][j])

    def weight_of(self, i: Formula) -> Formula:
        """The OPOB's weight w_i^2 ||s_i||^2."""
        return self.W[i] * self.W[i] * total(lambda j: self.S[i][j] * self.S[i][j], self.d)


def index_sequence(x: SymbolicArray) -> Formula:
    """The sequence of a one-axis array's elements."""
    return sequence(x.at)


# ---- layers 1 and 2: rational instances --------------------------------------------------------------------------


def rational(rng: random.Random, size: int = 9) -> Fraction:
    """A small rational number of either sign."""
    return Fraction(rng.randint(-size, size), rng.randint(1, size))


def rational_array(rng: random.Random, *shape: int) -> np.ndarray[Any, Any]:
    """Small rationals of either sign, in an object array of the shape asked for: -> (...)."""
    flat = np.array([rational(rng) for _ in range(math.prod(shape))], dtype=object)
    return flat.reshape(shape)


def simplex(rng: random.Random, n: int, size: int = 9) -> np.ndarray[Any, Any]:
    """A probability vector with positive rational entries: (n,)."""
    raw = np.array([Fraction(rng.randint(1, size)) for _ in range(n)], dtype=object)
    return raw / raw.sum()


@dataclass(frozen=True)
class RationalProblem:
    """Rational mu, pi, R, s (E_pi[s] = 0 exactly) and lengths, for K outcomes."""

    mu: np.ndarray[Any, Any]
    pi: np.ndarray[Any, Any]
    reward: np.ndarray[Any, Any]
    score: np.ndarray[Any, Any]
    length: np.ndarray[Any, Any]

    @property
    def ratio(self) -> np.ndarray[Any, Any]:
        """w = pi / mu: (K,)."""
        return self.pi / self.mu

    @property
    def gradient(self) -> np.ndarray[Any, Any]:
        """The exact policy gradient E_pi[R s]: (p,)."""
        return ((self.pi * self.reward)[:, None] * self.score).sum(axis=0)

    def on_policy(self) -> RationalProblem:
        """The same rewards and scores with mu = pi."""
        return replace(self, mu=self.pi)

    def population(self, **changes: Any) -> Batch:
        """All outcomes once, each with its probability; leaving one draw out takes nothing away."""
        fields = {"measure": self.mu, "unit": np.array([Fraction(0)], dtype=object)}
        return self._batch(np.arange(len(self.mu)), **{**fields, **changes})

    def batches(self, size: int) -> tuple[Batch, np.ndarray[Any, Any]]:
        """All m = K^size ordered batches (m, size), and the probability of each: (m,)."""
        draws = np.array(list(itertools.product(range(len(self.mu)), repeat=size)))
        return self._batch(draws), self.mu[draws].prod(axis=1)

    def counted_batches(self, size: int) -> tuple[Batch, np.ndarray[Any, Any]]:
        """The same expectation from the distinct batches, outcome k drawn n_k times, multinomial: (m,)."""
        counts = np.array(list(_compositions(size, len(self.mu))), dtype=object)
        ways = np.array([math.factorial(size) // math.prod(map(math.factorial, row)) for row in counts], dtype=object)
        mass = ways * np.prod(self.mu**counts, axis=1)
        every_outcome = np.broadcast_to(np.arange(len(self.mu)), counts.shape)
        one = np.array([Fraction(1, size)], dtype=object)
        return self._batch(every_outcome, measure=counts * one, unit=one), mass

    def _batch(self, draws: np.ndarray[Any, Any], **changes: Any) -> Batch:
        fields = {
            "reward": self.reward[draws],
            "ratio": self.ratio[draws],
            "length": self.length[draws],
            "scores": DenseScores(self.score[draws]),
        }
        return Batch(**{**fields, **changes})


def _compositions(total: int, parts: int) -> Iterator[tuple[int, ...]]:
    if parts == 1:
        yield (total,)
        return
    for first in range(total + 1):
        for rest in _compositions(total - first, parts - 1):
            yield (first, *rest)


def random_problem(rng: random.Random, outcomes: int, dimension: int, *, binary: bool = False) -> RationalProblem:
    """A random rational problem; `binary` makes rewards 0 or 1, with both present."""
    mu, pi = simplex(rng, outcomes), simplex(rng, outcomes)
    score = rational_array(rng, outcomes, dimension)
    score = score - (pi[:, None] * score).sum(axis=0)
    reward = rational_array(rng, outcomes)
    if binary:
        reward = np.array([Fraction(k % 2) for k in range(outcomes)], dtype=object)
    length = np.array([Fraction(rng.randint(1, 5)) for _ in range(outcomes)], dtype=object)
    return RationalProblem(mu, pi, reward, score, length)


def problems(
    count: int, *, seed: int = 0, outcomes: tuple[int, int] = (1, 6), dimension: int = 3
) -> Iterator[RationalProblem]:
    """`count` random problems."""
    rng = random.Random(seed)
    for _ in range(count):
        yield random_problem(rng, rng.randint(*outcomes), rng.randint(1, dimension))


def instance(rng: random.Random, outcomes: int = 3, dimension: int = 2) -> dict[str, Any]:
    """Rational values for the variables of `Symbolic`: to evaluate a statement of layer 2 on."""
    p = random_problem(rng, outcomes, dimension)
    return {
        "N": outcomes,
        "d": dimension,
        "P": list(p.mu),
        "W": list(p.ratio),
        "R": list(p.reward),
        "L": list(p.length),
        "S": [list(row) for row in p.score],
        "unit": Fraction(1, outcomes),
        "b": rational(rng),
        "c": Fraction(rng.randint(1, 5), 2),
        "i": rng.randrange(outcomes),
        "j": rng.randrange(dimension),
    }
