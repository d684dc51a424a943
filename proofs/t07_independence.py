"""T7 (claims C4, C8): the variance of an average of independent estimates.

Statement. Y_1 .. Y_B of mean zero, uncorrelated, with variances v_k, and any fixed weights c:

    Var( sum_k c_k Y_k ) = sum_k c_k^2 v_k

so n draws of one law have Var(mean) = v / n, and G independent groups have sum_g v_g / G^2. With an in-batch baseline
the contributions of one group are *not* independent, and the variance of their mean is not their variance over n
(`T7.in_batch`): this is why `vcposim.moments` reports the two separately.

Proof. Induction on the number of terms: E[(T + c Y)^2] = E[T^2] + 2 c E[T Y] + c^2 E[Y^2], and E[T Y] = 0 because T
is made of terms that are uncorrelated with Y."""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Callable
from fractions import Fraction
from functools import cache
from typing import Any

import numpy as np

from proofs.claims import Claim
from proofs.logic import INT, MATRIX, REAL, SEQUENCE, Formula, Theorem, specialize, sum_empty, sum_next, variable, z3
from proofs.setting import RationalProblem, coefficients, problems, rational
from proofs.sums import both, implies, induct, pointwise, prove, sequence, total
from proofs.symbolic import REAL_ALGEBRA, Length, SymbolicArray, vector
from vcposim.arrays import expectation
from vcposim.batch import Batch
from vcposim.moments import Moments, batch_sums, moments

# ---- layer 1 -----------------------------------------------------------------------------------------------------


def batch_moments(p: RationalProblem, size: int, baseline: Any) -> Moments:
    """Exact moments of the shipped estimator on batches of that size: all K^size of them, each with its probability."""
    batch, mass = p.batches(size)
    return moments(batch_sums(batch, coefficients(batch, baseline), mass), p.gradient, drawn=False)


def mean_exact() -> str:
    """The mean of n independent contributions has 1/n of their variance."""
    rng, checked = random.Random(1), 0
    for p in problems(10, outcomes=(2, 4)):
        for n in (1, 2, 3, 4):
            m = batch_moments(p, n, rational(rng))
            assert m.variance_of_mean == m.variance_per_sample / n
            checked += 1
    return f"{checked} problems and sizes, all ordered batches"


def groups_exact() -> str:
    """The average of two independent groups has a quarter of the sum of their variances."""
    checked = 0
    for p, q in itertools.pairwise(problems(10, seed=2, outcomes=(2, 3), dimension=1)):
        (first, m1), (second, m2) = p.batches(2), q.batches(3)
        g1, g2 = (_estimates(b) for b in (first, second))
        average = (g1[:, None] + g2[None, :]) / 2
        mass = m1[:, None] * m2[None, :]
        center = (mass * average).sum()
        spread = (mass * (average - center) ** 2).sum()
        groups = ((first, m1), (second, m2))
        sums = [batch_sums(b, coefficients(b, "leave_one_out"), m) for b, m in groups]
        both_groups = sum(moments(x, None, drawn=False).variance_of_mean for x in sums)
        assert spread == both_groups / 4
        checked += 1
    return f"{checked} pairs of groups, all pairs of batches"


def _estimates(batch: Batch) -> np.ndarray[Any, Any]:
    c = coefficients(batch, "leave_one_out")
    return batch.scored().combine(c * batch.measure)[..., 0]


def in_batch_exact() -> str:
    """With the group mean, contributions are dependent and 1/n is wrong."""
    (p,) = problems(1, seed=3, outcomes=(3, 3))
    m = batch_moments(p, 2, "group_mean")
    ratio = m.variance_of_mean / (m.variance_per_sample / 2)
    assert ratio != 1
    return f"two draws, group mean: variance of the mean is {float(ratio):.3f} of variance / 2"


def sum_exact() -> str:
    """E[(sum c_k Y_k)^2] = sum c_k^2 E[Y^2] for independent centered draws."""
    rng, checked = random.Random(4), 0
    for p in problems(10, outcomes=(2, 3)):
        c = np.array([rational(rng) for _ in range(3)], dtype=object)
        batch, mass = p.batches(3)
        center = expectation(p.reward, p.mu)
        combined = expectation(batch.reward - center, c)
        assert expectation(combined**2, mass) == (c * c).sum() * expectation((p.reward - center) ** 2, p.mu)
        checked += 1
    return f"{checked} problems, all ordered batches of 3"


# ---- layer 2 -----------------------------------------------------------------------------------------------------


class Uncorrelated:
    """B variables Y_k on N atoms of probability P, uncorrelated, with variances V_k; weights C. N and B unknown."""

    def __init__(self) -> None:
        self.N, self.B = variable("N", INT), variable("B", INT)
        self.P, self.C, self.V = (variable(name, SEQUENCE) for name in "PCV")
        self.Y = variable("Y", MATRIX)

    @property
    def everything(self) -> list[Formula]:
        """All variables, for statements over all of them."""
        return [self.N, self.B, self.P, self.C, self.V, self.Y]

    def but(self, **changes: Formula) -> Uncorrelated:
        """The same with other sequences."""
        other = copy.copy(self)
        other.__dict__.update(changes)
        return other

    def mean(self, value: Callable[[Formula], Formula]) -> Formula:
        """E[value], by the shipped `expectation`."""
        x = SymbolicArray(REAL_ALGEBRA, (Length(self.N),), value)
        return expectation(x, vector(self.P, self.N)).term

    @property
    def uncorrelated(self) -> Formula:
        """E[Y_k Y_m] is V_k if k = m, else 0, for all k, m < B."""
        k, m = z3.FreshInt("k"), z3.FreshInt("m")
        inside = both(k >= 0, k < self.B, m >= 0, m < self.B)
        covariance = self.mean(lambda i: self.Y[k][i] * self.Y[m][i])
        return z3.ForAll([k, m], implies(inside, covariance == z3.If(k == m, self.V[k], 0)))

    @property
    def given(self) -> Formula:
        """The hypotheses: sizes are not negative, sequences are uncorrelated."""
        return both(self.N >= 0, self.B >= 0, self.uncorrelated)

    def combination(self, i: Formula, n: Formula) -> Formula:
        """T_n at atom i: sum_{k < n} c_k Y_k(i)."""
        return total(lambda k: self.C[k] * self.Y[k][i], n)

    def unrolled(self, i: Formula) -> Formula:
        """The terms c_k Y_k(i) of T_n at atom i, as a sequence in k."""
        return sequence(lambda k: self.C[k] * self.Y[k][i])


def _grown(u: Uncorrelated, n: Formula, factor: Callable[[Formula, Formula], Formula]) -> Theorem:
    """|- n >= 0 -> E[T_{n+1} factor(T_{n+1})] with T_{n+1} written T_n + c_n Y_n."""
    longer = lambda i: u.combination(i, n + 1)  # noqa: E731
    split = lambda i: u.combination(i, n) + u.C[n] * u.Y[n][i]  # noqa: E731
    return pointwise(
        sequence(lambda i: longer(i) * factor(i, longer(i)) * u.P[i]),
        sequence(lambda i: split(i) * factor(i, split(i)) * u.P[i]),
        u.N,
        given=n >= 0,
        by=lambda i: [sum_next(u.unrolled(i), n)],
    )


def _nothing(u: Uncorrelated, factor: Callable[[Formula, Formula], Formula]) -> Theorem:
    """|- E[T_0 factor(T_0)] = 0."""
    empty = lambda i: u.combination(i, z3.IntVal(0))  # noqa: E731
    return pointwise(
        sequence(lambda i: empty(i) * factor(i, empty(i)) * u.P[i]),
        sequence(lambda i: z3.RealVal(0)),
        u.N,
        by=lambda i: [sum_empty(u.unrolled(i))],
    )


@cache
def cross_symbolic() -> Theorem:
    """|- for all m, n: n <= m < B -> E[T_n Y_m] = 0."""
    u, m = Uncorrelated(), variable("m", INT)
    by = lambda i, t: u.Y[m][i]  # noqa: E731
    return induct(
        lambda n: implies(both(u.given, n <= m, m < u.B), u.mean(lambda i: u.combination(i, n) * u.Y[m][i]) == 0),
        over=[*u.everything, m],
        base=[_nothing(u, by)],
        step=lambda n: [_grown(u, n, by), specialize(u.uncorrelated, n, m)],
        expand=True,
    )


@cache
def weighted_sum_symbolic() -> Theorem:
    """|- E[(sum_k c_k Y_k)^2] = sum_k c_k^2 v_k."""
    u = Uncorrelated()
    by = lambda i, t: t  # noqa: E731
    square = lambda n: u.mean(lambda i: u.combination(i, n) * u.combination(i, n))  # noqa: E731
    weights = lambda n: total(lambda k: u.C[k] * u.C[k] * u.V[k], n)  # noqa: E731
    rule = induct(
        lambda n: implies(both(u.given, n <= u.B), square(n) == weights(n)),
        over=u.everything,
        base=[_nothing(u, by)],
        step=lambda n: [_grown(u, n, by), cross_symbolic()(*u.everything, n, n), specialize(u.uncorrelated, n, n)],
        expand=True,
    )
    goal = implies(u.given, square(u.B) == weights(u.B))
    return prove(goal, rule(*u.everything, u.B), over=u.everything)


def mean_symbolic() -> Theorem:
    """|- all v_k = v, B > 0 -> E[(sum_k Y_k / B)^2] = v / B."""
    u, v = Uncorrelated(), variable("v", REAL)
    n = z3.ToReal(u.B)
    same, share = sequence(lambda k: v), sequence(lambda k: 1 / n)
    special = u.but(C=share, V=same)
    mean = u.mean(lambda i: total(lambda k: u.Y[k][i], u.B) / n * (total(lambda k: u.Y[k][i], u.B) / n))
    goal = implies(both(special.given, u.B > 0), mean == v / n)
    return prove(goal, weighted_sum_symbolic()(*special.everything), over=[u.N, u.B, u.P, u.Y, v])


def uncorrelated_instance(rng: random.Random) -> dict[str, Any]:
    """Three uncorrelated signs on four equally likely atoms, scaled."""
    signs = ((1, 1, -1, -1), (1, -1, 1, -1), (1, -1, -1, 1))
    scale = [Fraction(rng.randint(1, 5), rng.randint(1, 3)) for _ in signs]
    return {
        "N": 4,
        "B": 3,
        "P": [Fraction(1, 4)] * 4,
        "Y": [[s * x for x in row] for s, row in zip(scale, signs, strict=True)],
        "V": [s * s for s in scale],
        "C": [rational(rng) for _ in signs],
    }


def equal_variance_instance(rng: random.Random) -> dict[str, Any]:
    """Uncorrelated sequences with one variance, and positive coefficients."""
    values = uncorrelated_instance(rng)
    v, signs = Fraction(9, 4), [[Fraction(3, 2) * (1 if x > 0 else -1) for x in row] for row in values["Y"]]
    return {**values, "Y": signs, "V": [v] * 3, "v": v, "C": [abs(c) + 1 for c in values["C"]]}


CLAIMS = [
    Claim(
        "T7.sum",
        "Var(sum c_k Y_k) = sum c_k^2 Var(Y_k)",
        ("arrays.expectation",),
        ("C4",),
        "Y_k uncorrelated, of mean zero; c fixed (not random)",
        sum_exact,
        weighted_sum_symbolic,
        uncorrelated_instance,
        ("var_wsum",),
    ),
    Claim(
        "T7.mean",
        "Var(mean of n draws) = Var / n",
        ("moments.moments", "moments.batch_sums", "arrays.expectation"),
        ("C4",),
        "independent draws, a baseline that is a number",
        mean_exact,
        mean_symbolic,
        equal_variance_instance,
        ("var_mean",),
    ),
    Claim(
        "T7.groups",
        "Var(mean of G groups) = sum_g Var_g / G^2, whatever happens inside a group",
        ("moments.moments", "moments.batch_sums", "baselines.weighted_mean_of_others"),
        ("C4", "C8"),
        "independent groups",
        groups_exact,
    ),
    Claim(
        "T7.in_batch",
        "with the group mean as baseline, Var(mean) is not Var / n",
        ("moments.moments",),
        ("C8",),
        exact=in_batch_exact,
        kind="witness",
    ),
]
