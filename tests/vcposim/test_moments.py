"""Means, variances and their sums, taken once."""

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.kit.backends import FLOAT_BACKENDS, Backend, name_of
from tests.kit.properties import Law, exact_moments, laws_of
from tests.kit.statistical import as_numpy, assert_mean_equals, assert_rounding_only, near
from tests.kit.strategies import Arms, as_float, bandits, cases, exact
from vcposim.batch import Batch, DenseScores
from vcposim.estimators import Estimator
from vcposim.moments import Moments, Sums, batch_sums, moments, norm, sq_norm, trace_covariance
from vcposim.weights import Weighting


@pytest.mark.parametrize("law", laws_of("moments"), ids=lambda x: x.name)
def test_law(law: Law):
    law.run()


def test_worked_example():
    """Two equally likely batches of two unit scores; contributions (1, 3) and (0, -2), by hand."""
    batch = Batch(
        reward=exact([[1, 3], [0, -2]]), ratio=exact([[1, 1], [1, 1]]), scores=DenseScores(exact([[[1], [1]]] * 2))
    )
    sums = batch_sums(batch, Estimator().coefficients(batch), exact([Fraction(1, 2), Fraction(1, 2)]))
    m = moments(sums, exact([1]), drawn=False)
    assert (sums.mass, list(sums.estimate)) == (1, [Fraction(1, 2)])
    assert sums.estimate_sq_norm == Fraction(4 + 1, 2)
    assert sums.contribution_sq_norm == Fraction(1 + 9 + 0 + 4, 4)
    assert list(m.mean) == [Fraction(1, 2)]
    assert list(m.bias) == [Fraction(-1, 2)]
    assert m.variance_of_mean == Fraction(5, 2) - Fraction(1, 4)
    assert m.variance_per_sample == Fraction(14, 4) - Fraction(1, 4)
    assert m.mse == Fraction(9, 4) + Fraction(1, 4)
    drawn = moments(batch_sums(batch, Estimator().coefficients(batch)), exact([1]), drawn=True)
    assert drawn.variance_of_mean == 2 * Fraction(9, 4)  # Bessel: 2 / (2 - 1)
    assert drawn.variance_per_sample == Fraction(14, 4) - Fraction(1, 4) + Fraction(9, 4)


def of(mean: list[float], gradient: list[float], variance: float = 1.0) -> Moments:
    return Moments(np.array(gradient), np.array(mean), np.float64(4 * variance), np.float64(variance))


def test_properties():
    m = of([3.0, 4.0], [3.0, 0.0], 2.0)
    assert list(m.bias) == [0.0, 4.0]
    assert m.relative_bias == 4 / 3
    assert m.mse == 2.0 + 16.0
    assert m.snr == 25 / 2
    assert m.descent_efficiency == 9**2 / (9 * (2 + 25))
    assert_rounding_only(np.asarray(m.cosine), np.asarray(9 / 15), ulp=4)


@pytest.mark.parametrize(
    ("given", "name", "want"),
    [
        (of([1.0], [0.0]), "descent_efficiency", 0.0),
        (of([0.0], [1.0], 0.0), "descent_efficiency", 0.0),
        (of([-2.0], [1.0], 0.0), "descent_efficiency", 1.0),
        (of([1.0], [0.0]), "relative_bias", math.inf),
        (of([0.0], [0.0]), "relative_bias", 0.0),
        (of([2.0], [2.0]), "relative_bias", 0.0),
        (of([1.0], [1.0], 0.0), "snr", math.inf),
        (of([0.0], [1.0], 0.0), "snr", 0.0),
        (of([0.0, 0.0], [1.0, 1.0]), "cosine", 0.0),
        (of([1.0, 1.0], [0.0, 0.0]), "cosine", 0.0),
        (of([-1.0, 0.0], [2.0, 0.0]), "cosine", -1.0),
    ],
)
def test_degenerate_cases(given: Moments, name: str, want: float):
    assert getattr(given, name) == want


def test_shrinking_lowers_the_error_and_leaves_the_descent_efficiency():
    half, m = of([1.5, 2.0], [3.0, 0.0], 5.0), of([3.0, 4.0], [3.0, 0.0], 20.0)
    assert half.mse < m.mse / 2
    assert_rounding_only(np.asarray(half.descent_efficiency), np.asarray(m.descent_efficiency), ulp=4)


@given(bandits(largest=3), st.sampled_from(["zero", "group_mean", "opob", "leave_one_out"]))
def test_independent_contributions_average_by_n(bandit: Arms, name: str):
    """variance_of_mean = variance_per_sample / n for a constant baseline; not for baselines made in the batch."""
    batch, mass = bandit.all_batches(2)
    per_sample, of_mean = exact_moments(batch, Estimator(baseline=name).coefficients(batch), mass, bandit.gradient)
    if name == "zero":
        assert_rounding_only(np.asarray(of_mean), np.asarray(per_sample / 2), ulp=64, scale=per_sample + 1)


def test_in_batch_baselines_couple_contributions():
    bandit = Arms(exact(["1/2", "1/2"]), exact(["1/2", "1/2"]), exact([0, 1]))
    batch, mass = bandit.all_batches(2)
    per_sample, of_mean = exact_moments(batch, Estimator(baseline="group_mean").coefficients(batch), mass, None)
    assert abs(of_mean - per_sample / 2) > 0.1 * per_sample


@given(bandits())
def test_population_moments_are_those_of_one_draw(bandit: Arms):
    """One enumerated group under the behavior's measure: its contribution's variance, and no variance of its mean."""
    outcome = bandit.population()
    c = Estimator(baseline="opob").coefficients(outcome)
    m = moments(batch_sums(outcome, c), bandit.gradient, drawn=False)
    contribution = c[:, None] * bandit.score
    assert list(m.mean) == list(bandit.gradient)
    assert m.variance_per_sample == trace_covariance(contribution, bandit.behavior)
    assert m.variance_of_mean == 0
    assert m.mse == 0


@given(cases(lead=(2, 2)), cases(lead=(2, 2), per_token=True))
def test_leading_axes_are_replications(plain: Any, tokens: Any):
    """(2, 2, n) sums equal those of its four groups added one by one, at trajectory and token level."""
    for case, level in ((plain, "sequence"), (tokens, "token")):
        estimator = Estimator(Weighting("importance", level), "opob")
        whole = batch_sums(case.batch(), estimator.coefficients(case.batch()))
        parts = [batch_sums(g.batch(), estimator.coefficients(g.batch())) for g in case.groups()]
        added = parts[0]
        for part in parts[1:]:
            added = added.merge(part)
        assert whole.mass == added.mass == 4
        for got, want in zip(whole, added, strict=True):
            assert np.all(np.asarray(got) == np.asarray(want))


@given(cases(lead=(2,), per_token=True))
def test_token_coefficients_make_token_sums(case: Any):
    """estimate = sum_i m_i sum_t c_it s_it and the square of that sum over t, by loops."""
    batch = case.batch()
    c = Estimator(Weighting("importance", "token")).coefficients(batch)
    sums = batch_sums(batch, c)
    n, parameters = case.size, range(case.score.shape[-1])
    part = [[sum(c[g, i] @ case.score[g, i, :, k : k + 1]) for k in parameters] for g in range(2) for i in range(n)]
    assert list(sums.estimate) == [sum(row[k] for row in part) / n for k in parameters]
    assert sums.contribution_sq_norm == sum(x * x for row in part for x in row) / n


def test_one_draw_has_no_variance():
    """NaN, never a silent 0."""
    m = moments(Sums(np.float64(1), np.ones(2), np.float64(2), np.float64(2)), np.ones(2), drawn=True)
    assert np.isnan(m.variance_of_mean)
    assert np.isnan(m.variance_per_sample)
    assert np.isnan(m.mse)


def test_variances_are_never_negative_by_rounding():
    x = np.full((7, 3, 1), 0.1)
    batch = Batch(reward=np.full((7, 3), 0.1), log_ratio=np.zeros((7, 3)), scores=DenseScores(x))
    m = moments(batch_sums(batch, Estimator().coefficients(batch)), np.array([0.01]), drawn=True)
    assert 0 <= m.variance_of_mean == near(0, scale=1e-4)  # the squares that cancel are 0.01^2
    assert 0 <= m.variance_per_sample == near(0, scale=1e-4)


def test_mse_of_drawn_moments_includes_what_the_mean_does_not_know():
    """E of `mse` from 3 drawn batches is the exact MSE plus E||mean - E mean||^2 = variance_of_mean / 3.

    3000 repetitions, false-fail rate 1e-9; the missing third would be an error of 25%, the test detects 20%.
    """
    rng = np.random.default_rng(7)
    bandit = Arms(exact(["1/2", "1/3", "1/6"]), exact(["1/3"] * 3), exact([1, 0, 2]))
    batch, mass = bandit.all_batches(2)
    estimator = Estimator(baseline="leave_one_out")
    _, of_mean = exact_moments(batch, estimator.coefficients(batch), mass, bandit.gradient)
    arm = rng.choice(3, p=as_float(bandit.behavior), size=(3000, 3, 2))
    parts = [as_float(bandit.reward)[arm], np.log(as_float(bandit.ratio))[arm], as_float(bandit.score)[arm]]
    draw = []
    for reward, log_ratio, score in zip(*parts, strict=True):
        drawn = Batch(reward=reward, log_ratio=log_ratio, scores=DenseScores(score))
        sums = batch_sums(drawn, estimator.coefficients(drawn))
        draw.append(moments(sums, as_float(bandit.gradient), drawn=True).mse)
    assert_mean_equals(draw, of_mean * (1 + 1 / 3), detect=0.2 * of_mean)


@pytest.mark.parametrize("backend", FLOAT_BACKENDS, ids=name_of)
def test_norms(backend: Backend):
    x = backend.floats([[3.0, 4.0], [0.0, 0.0]])
    assert as_numpy(sq_norm(x)).tolist() == [25, 0]
    assert as_numpy(norm(x)).tolist() == [5, 0]


def test_merge_is_associative_and_commutative_with_arrays_of_parameters():
    a, b, c = (Sums(Fraction(k), exact([k, 2 * k]), Fraction(k, 3), Fraction(5, k)) for k in (1, 2, 3))
    want = [Fraction(6), [6, 12], Fraction(2), Fraction(5) + Fraction(5, 2) + Fraction(5, 3)]
    for merged in (a.merge(b).merge(c), a.merge(b.merge(c)), c.merge(a).merge(b)):
        assert [merged.mass, list(merged.estimate), merged.estimate_sq_norm, merged.contribution_sq_norm] == want
