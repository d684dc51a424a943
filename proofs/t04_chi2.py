"""T4 (claims C3, C4): what the effective sample size measures, and what it does not.

Statement. With E[w] = 1:

    E[w^2] = 1 + chi2(pi || mu)            rho = 1 / (1 + chi2)

and for *fixed* weights c on B uncorrelated variables Y_k of mean zero and equal variance v,

    Var( sum c_k Y_k / sum c_k ) = v / ess(c).

What does not follow is that the variance of an off-policy *gradient* goes as 1/ESS: there the weights are random and
multiply an integrand that depends on the same outcome. `T4.gradient` shows two problems with the same w, hence the same
ESS, whose gradient variances differ by a factor 81; and a third whose ESS is worse and whose variance is zero.

Source. Kong 1992 derives the rule by a delta method that neglects exactly this dependence.

Proof. E[(w - 1)^2] multiplied out. The second is T7 with the weights c_k / sum c.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np

from proofs.claims import Claim
from proofs.logic import REAL, Theorem, variable
from proofs.setting import RationalProblem, Symbolic, instance, problems, variance
from proofs.sums import both, implies, prove, sequence, total
from proofs.symbolic import vector
from proofs.t07_independence import Uncorrelated, equal_variance_instance, weighted_sum_symbolic
from vcposim.arrays import expectation
from vcposim.diagnostics import chi2_of_weights, ess_fraction_of_weights, ess_of_weights


def chi2_exact() -> str:
    """E_mu[w^2] = 1 + chi2, and the ESS fraction of the population is 1 / (1 + chi2)."""
    for p in problems(60):
        assert expectation(p.ratio * p.ratio, p.mu) == 1 + chi2_of_weights(p.ratio, p.mu)
        assert ess_fraction_of_weights(p.ratio, p.mu) == 1 / (1 + chi2_of_weights(p.ratio, p.mu))
    return "60 random problems"


def _unit_mean(s: Symbolic) -> Any:
    """sum P = 1 and E[w] = 1."""
    return both(s.distribution, expectation(vector(s.W, s.N), vector(s.P, s.N)).term == 1)


def chi2_symbolic() -> Theorem:
    """|- sum P = 1, E[w] = 1 -> E[w^2] = 1 + chi2."""
    s = Symbolic()
    w, p = vector(s.W, s.N), vector(s.P, s.N)
    goal = implies(_unit_mean(s), expectation(w * w, p).term == 1 + chi2_of_weights(w, p).term)
    return prove(goal, over=s.everything)


def fraction_symbolic() -> Theorem:
    """|- sum P = 1, E[w] = 1, E[w^2] > 0 -> rho (1 + chi2) = 1."""
    s = Symbolic()
    w, p = vector(s.W, s.N), vector(s.P, s.N)
    rho, chi2 = ess_fraction_of_weights(w, p).term, chi2_of_weights(w, p).term
    given = both(_unit_mean(s), total(lambda i: s.P[i] * (s.W[i] * s.W[i]), s.N) > 0)
    return prove(implies(given, rho * (1 + chi2) == 1), over=s.everything)


def mean_exact() -> str:
    """The variance of a mean of independent draws with weights c is that of one over ess(c)."""
    checked = 0
    for p in problems(12, outcomes=(2, 3)):
        value = p.reward - (p.mu * p.reward).sum()
        for n in (1, 2, 3):
            c = np.array([Fraction(k + 1, 2) for k in range(n)], dtype=object)
            batch, mass = p.batches(n)
            y = batch.reward - (p.mu * p.reward).sum()
            mean = (c * y).sum(axis=-1) / c.sum()
            assert (mass * mean * mean).sum() == (p.mu * value * value).sum() / ess_of_weights(c)
            checked += 1
    return f"{checked} problems and sizes, all ordered batches"


def mean_symbolic() -> Theorem:
    """|- Y uncorrelated with variance v, sum c != 0 -> E[(sum c_k Y_k / sum c)^2] = v / ess(c)."""
    u, v = Uncorrelated(), variable("v", REAL)
    add = total(lambda k: u.C[k], u.B)
    shared = u.but(C=sequence(lambda k: u.C[k] / add), V=sequence(lambda k: v))
    mean = u.mean(lambda i: u.combination(i, u.B) / add * (u.combination(i, u.B) / add))
    nonzero = both(add != 0, total(lambda k: u.C[k] * u.C[k], u.B) != 0)
    goal = implies(both(shared.given, nonzero), mean == v / ess_of_weights(vector(u.C, u.B)).term)
    return prove(goal, weighted_sum_symbolic()(*shared.everything), over=[*u.everything, v])


# ---- no theorem --------------------------------------------------------------------------------------------------


def gradient_exact() -> str:
    """Softmax policies on two actions: s = (1 - pi_0, -pi_0)."""
    mu, pi = (Fraction(1, 10), Fraction(9, 10)), (Fraction(1, 2), Fraction(1, 2))
    rare, common = _problem(mu, pi, (1, 0)), _problem(mu, pi, (0, 1))
    ess = ess_fraction_of_weights(rare.ratio, rare.mu)
    assert ess == ess_fraction_of_weights(common.ratio, common.mu)
    high, low = variance(rare.population(), 0), variance(common.population(), 0)
    assert high == 81 * low > 0
    far = _problem((Fraction(1, 100), Fraction(99, 100)), pi, (Fraction(1, 50), Fraction(-99, 50)))
    worse = ess_fraction_of_weights(far.ratio, far.mu)
    assert worse < ess
    assert variance(far.population(), 0) == 0
    return f"rho = {ess}: variance {high} or {low}, by the reward alone; rho = {float(worse):.3f}: variance 0"


def _problem(mu: tuple[Fraction, ...], pi: tuple[Fraction, ...], reward: tuple[Any, ...]) -> RationalProblem:
    def array(x: Any) -> Any:
        return np.array(x, dtype=object)

    score = array([[1 - pi[0]], [-pi[0]]])
    return RationalProblem(array(mu), array(pi), array([Fraction(r) for r in reward]), score, array([Fraction(1)] * 2))


_CHI2 = ("diagnostics.chi2_of_weights", "arrays.expectation")

CLAIMS = [
    Claim(
        "T4.chi2",
        "E[w^2] = 1 + chi2(pi || mu)",
        _CHI2,
        ("C3",),
        "E[w] = 1",
        chi2_exact,
        chi2_symbolic,
        instance,
        ("Ew2_chi2",),
    ),
    Claim(
        "T4.fraction",
        "rho = 1 / (1 + chi2)",
        (*_CHI2, "diagnostics.ess_fraction_of_weights"),
        ("C3",),
        "E[w] = 1, E[w^2] > 0",
        chi2_exact,
        fraction_symbolic,
        instance,
    ),
    Claim(
        "T4.mean",
        "Var(sum c_k Y_k / sum c) = Var(Y) / ess(c)",
        ("diagnostics.ess_of_weights",),
        ("C4",),
        "c fixed; Y_k uncorrelated, mean zero, equal variance",
        mean_exact,
        mean_symbolic,
        equal_variance_instance,
        ("var_weighted_mean",),
    ),
    Claim(
        "T4.gradient",
        "no theorem: the variance of an off-policy gradient goes as 1/ESS. Weights and integrand depend on "
        "the same outcome: equal ESS with variances a factor 81 apart, and a lower ESS with variance zero",
        ("diagnostics.ess_fraction_of_weights", "moments.trace_covariance"),
        ("C4",),
        exact=gradient_exact,
        kind="no theorem",
    ),
]
