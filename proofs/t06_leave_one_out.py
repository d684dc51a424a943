"""T6 (claims C7, C8): baselines made from the batch itself. Leave-one-out is unbiased at every batch size; in-batch is
not.

Statement. N independent draws, weights with E[w s] = 0.

    b_{-i} does not change when the data of sample i do                            (it looks at the others only)
    E[ (1/N) sum_i w_i (R_i - b_{-i}) s_i ] = E[w R s]     for any such baseline, at every N >= 2
    E[ (1/N) sum_i w_i (R_i - mean) s_i ]   = (1 - 1/N) E[w R s]   exactly, off policy too
    in-batch OPOB: biased by no such simple factor (witness)

Source. Leave-one-out: Kool et al. 2019; RLOO, arXiv 2402.14740. The shrinkage off policy is this project's observation.

Proof. Given the others, b_{-i} is a number, so T1 applies to sample i; then average over the others. For the mean,
R_i - mean = (1 - 1/N)(R_i - mean of the others): the leverage identity (T9) with equal weights. That batches of any
size have the product law is layer 3's part; layer 1 enumerates all batches of small sizes, in both ways."""

from __future__ import annotations

import random
from fractions import Fraction
from functools import cache
from typing import Any

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
    generalize_conclusion,
    propositional,
    specialize,
    variable,
    z3,
)
from proofs.setting import Symbolic, coefficients, estimator, instance, mean_estimate, problems, rational
from proofs.sums import both, implies, induct, pointwise, prove, sequence, total
from proofs.symbolic import scalar, vector
from proofs.t01_unbiased import baseline_symbolic
from proofs.t07_independence import batch_moments
from proofs.t09_leverage import Group, group_instance, identity_symbolic
from vcposim.baselines import leverage
from vcposim.batch import Batch
from vcposim.moments import batch_sums

# ---- layer 1 -----------------------------------------------------------------------------------------------------

SIZES = ((2, 2), (2, 3), (2, 4), (3, 2), (3, 3), (4, 2))
"""(outcomes, draws): all batches of these are enumerated"""


def mean_over_batches(batch: Batch, mass: Any, baseline: str) -> Any:
    """E[batch gradient] of the shipped estimator over enumerated batches: (p,)."""
    return batch_sums(batch, coefficients(batch, baseline), mass).estimate


def unbiased_exact() -> str:
    """Baselines of the other samples leave the mean of the estimate at the gradient."""
    checked = 0
    for outcomes, draws in SIZES:
        for p in problems(3, seed=outcomes, outcomes=(outcomes, outcomes)):
            for baseline in ("leave_one_out", "opob_leave_one_out"):
                for batch, mass in (p.batches(draws), p.counted_batches(draws)):
                    assert mass.sum() == 1
                    assert (mean_over_batches(batch, mass, baseline) == p.gradient).all()
                checked += 1
    return f"{checked} problems, sizes and baselines; all ordered batches and all count vectors"


def shrinks_exact() -> str:
    """The group mean shrinks it by 1 - 1/N."""
    checked = 0
    for outcomes, draws in SIZES:
        for p in problems(3, seed=outcomes, outcomes=(outcomes, outcomes)):
            for batch, mass in (p.batches(draws), p.counted_batches(draws)):
                assert (mean_over_batches(batch, mass, "group_mean") == (1 - Fraction(1, draws)) * p.gradient).all()
            checked += 1
    return f"{checked} problems and sizes; all ordered batches and all count vectors"


def opob_biased_exact() -> str:
    """OPOB computed from its own batch is biased, and not by that factor."""
    (p,) = problems(1, seed=8, outcomes=(3, 3), dimension=1)
    mean = batch_moments(p, 3, "opob").mean
    ratio = [m / g for m, g in zip(mean, p.gradient, strict=True)]
    assert all(r not in (1, Fraction(2, 3)) for r in ratio)
    return f"N = 3: the mean is {float(ratio[0]):.3f} times the gradient, neither 1 nor 1 - 1/3"


# ---- layer 2 -----------------------------------------------------------------------------------------------------


@cache
def only_at() -> Theorem:
    """|- f(k) = 0 for all k != i, 0 <= i < N -> sum f = f(i)."""
    f, i, N = variable("f", SEQUENCE), variable("i", INT), variable("N", INT)
    elsewhere = zero_elsewhere(f, i, N)
    rule = induct(
        lambda n: implies(both(elsewhere, n <= N, i >= 0), SUM(f, n) == z3.If(i < n, f[i], 0)),
        step=lambda k: [specialize(elsewhere, k)],
    )
    goal = implies(both(elsewhere, i >= 0, i < N), SUM(f, N) == f[i])
    return generalize(arithmetic(goal, rule(N)), f, i, N)


def zero_elsewhere(f: Formula, i: Formula, N: Formula) -> Formula:
    """f(k) = 0 for all 0 <= k < N but i."""
    k = z3.FreshInt("k")
    return z3.ForAll([k], implies(both(k >= 0, k < N, k != i), f[k] == 0))


def ignores_symbolic() -> Theorem:
    """|- R', a' agree with R, a except at i, which is one draw -> b_{-i} is the same for both."""
    g, R2, A2 = Group(), variable("R'", SEQUENCE), variable("A'", SEQUENCE)
    other = Group()
    other.N, other.i, other.unit, other.P, other.R, other.A = g.N, g.i, g.unit, g.P, R2, A2
    k = z3.FreshInt("k")
    agree = z3.ForAll([k], implies(both(k >= 0, k < g.N, k != g.i), both(g.R[k] == R2[k], g.A[k] == A2[k])))
    someone = total(lambda k: g.P[k], g.N) != g.unit
    given = both(g.inside, agree, g.P[g.i] == g.unit, someone)
    same = []
    for x, y in (
        (lambda k: g.A[k] * g.R[k], lambda k: A2[k] * R2[k]),
        (lambda k: g.A[k], lambda k: A2[k]),
        (lambda k: g.R[k], lambda k: R2[k]),
    ):
        difference = sequence(lambda k: x(k) * g.P[k] - y(k) * g.P[k])  # noqa: B023
        known = [*g.left_out(), *other.left_out(), _same_off(agree, g, difference)]
        same.append(prove(implies(given, g.mass_of_others(x) == g.mass_of_others(y)), *known))
    same.append(prove(implies(given, g.mass_of_others(lambda k: g.R[k] * 0 + 1) != 0), *g.left_out()))
    goal = implies(given, g.of_others() == other.of_others())
    return generalize(arithmetic(goal, *same), *g.everything, R2, A2)


def _same_off(agree: Formula, g: Group, difference: Formula) -> Theorem:
    """|- agree -> the sum of the difference is its value at i."""
    k = variable("k", INT)
    zero = arithmetic(
        implies(agree, implies(both(k >= 0, k < g.N, k != g.i), difference[k] == 0)), specialize(agree, k)
    )
    zero_all = generalize_conclusion(zero, k)
    return prove(
        implies(both(agree, g.inside), SUM(difference, g.N) == difference[g.i]),
        zero_all, only_at()(difference, g.i, g.N),
    )  # fmt: skip


def independent_symbolic() -> Theorem:
    """|- sum nu = 1, E[w s_j] = 0 -> sum_t nu_t E[w (R - b_t) s_j] = E[w R s_j], for b a function of other data t."""
    s, j, M = Symbolic(), variable("j", INT), variable("M", INT)
    nu, b = variable("nu", SEQUENCE), variable("b", SEQUENCE)
    batch = s.batch()
    mean = lambda x: mean_estimate(batch, coefficients(batch, x)).at(j)  # noqa: E731
    given = both(s.sized, s.balanced_at(j))
    known = baseline_symbolic()
    same = pointwise(
        sequence(lambda t: nu[t] * mean(b[t])), sequence(lambda t: nu[t] * mean("zero")), M, given=given,
        by=lambda t: [known(*s.everything, b[t], j)],
    )  # fmt: skip
    goal = implies(
        both(given, M >= 0, total(lambda t: nu[t], M) == 1), total(lambda t: nu[t] * mean(b[t]), M) == mean("zero")
    )
    pulled = prove(
        implies(
            both(M >= 0, s.sized, total(lambda t: nu[t], M) == 1),
            total(lambda t: nu[t] * mean("zero"), M) == mean("zero"),
        )
    )
    return generalize(arithmetic(goal, same, pulled), *s.everything, nu, b, j, M)


def shrinks_symbolic() -> Theorem:
    """|- N >= 2, every sample a draw of mass 1/N -> c_i(group mean) = (1 - 1/N) c_i(leave one out), as shipped."""
    s, i = Symbolic(), variable("i", INT)
    n = z3.ToReal(s.N)
    uniform, one = sequence(lambda k: 1 / n), sequence(lambda k: s.R[k] * 0 + 1)
    batch = s.batch(measure=vector(uniform, s.N), unit=scalar(1 / n))
    given = both(s.sized, s.N >= 2, i >= 0, i < s.N)
    inside = s.R[i] - estimator("group_mean").baseline_value(batch).term
    outside = s.R[i] - estimator("leave_one_out").baseline_value(batch).at(i)
    h = leverage(vector(one, s.N), batch.measure, batch.unit).at(i)
    facts = [
        prove(implies(given, inside == (1 - h) * outside), identity_symbolic()(s.N, i, 1 / n, s.R, one, uniform)),
        prove(implies(given, h == 1 / n)),
        _scaled()(inside, outside, h, 1 / n, s.W[i]),
    ]
    shrunk, whole = (coefficients(batch, name).at(i) for name in ("group_mean", "leave_one_out"))
    goal = implies(given, shrunk == (1 - 1 / n) * whole)
    return generalize(propositional(goal, *facts), *s.everything, i)


@cache
def _scaled() -> Theorem:
    """|- x = (1 - h) y, h = q -> w x = (1 - q) w y."""
    x, y, h, q, w = (variable(name, REAL) for name in ("x", "y", "h", "q", "w"))
    return prove(implies(both(x == (1 - h) * y, h == q), w * x == (1 - q) * (w * y)), over=[x, y, h, q, w])


def independent_instance(rng: random.Random) -> dict[str, Any]:
    """Random rationals, with a law `nu` of a baseline of three values that is independent of the sample."""
    nu = [Fraction(1, 6), Fraction(1, 3), Fraction(1, 2)]
    return {**instance(rng), "M": 3, "nu": nu, "b": [rational(rng) for _ in nu]}


def ignores_instance(rng: random.Random) -> dict[str, Any]:
    """A group, and the same with another reward and weight at sample i."""
    values = group_instance(rng)
    changed = lambda x: [rational(rng) if k == values["i"] else v for k, v in enumerate(x)]  # noqa: E731
    return {**values, "R'": changed(values["R"]), "A'": changed(values["A"])}


_OTHERS = ("baselines.weighted_mean_of_others", "arrays.sum_of_others")

CLAIMS = [
    Claim(
        "T6.ignores",
        "b_{-i} does not change when the data of sample i do",
        _OTHERS,
        ("C7", "C8"),
        "sample i is one draw and not the only one; any weights a",
        symbolic=ignores_symbolic,
        instance=ignores_instance,
        coq=("loo_opob_ignores",),
    ),
    Claim(
        "T6.independent",
        "a baseline made of independent data leaves the mean alone",
        ("estimators.Estimator.coefficients", "moments.batch_sums"),
        ("C7",),
        "E[w s] = 0",
        symbolic=independent_symbolic,
        instance=independent_instance,
        coq=("independent_baseline_unbiased",),
    ),
    Claim(
        "T6.unbiased",
        "leave_one_out and opob_leave_one_out are unbiased at every batch size",
        (*_OTHERS, "estimators.Estimator.coefficients", "moments.batch_sums"),
        ("C7", "C8"),
        "E[w s] = 0; independent draws, N >= 2",
        exact=unbiased_exact,
        coq=("loo_unbiased", "loo_opob_unbiased"),
    ),
    Claim(
        "T6.shrinks",
        "with the group mean the estimate is (1 - 1/N) times the leave-one-out one, so its mean is "
        "(1 - 1/N) of the gradient",
        (*_OTHERS, "baselines.weighted_mean", "estimators.Estimator.coefficients"),
        ("C7", "C8"),
        "N >= 2 draws, any weights",
        shrinks_exact,
        shrinks_symbolic,
        instance,
        ("inbatch_shrinks",),
    ),
    Claim(
        "T6.opob_biased",
        "in-batch OPOB is biased, by no simple factor",
        ("baselines.weighted_mean", "estimators.Estimator.coefficients", "moments.moments"),
        ("C7", "C8"),
        exact=opob_biased_exact,
        kind="witness",
    ),
]
