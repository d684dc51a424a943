"""Effective sample size and its companions."""

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.kit.backends import FLOAT_BACKENDS, Backend, name_of
from tests.kit.properties import Law, laws_of, log_weights
from tests.kit.statistical import as_numpy, assert_mean_equals, assert_rounding_only
from tests.kit.strategies import exact, extreme_log_ratio
from vcposim import diagnostics as d
from vcposim.diagnostics import Diagnostic, WeightSums, ess, ess_fraction, weight_sums
from vcposim.errors import InputError


@pytest.mark.parametrize("law", laws_of("diagnostics"), ids=lambda x: x.name)
def test_law(law: Law):
    law.run()


@given(log_weights)
def test_ess_is_between_one_and_n(x: np.ndarray):
    assert 1 <= ess(x) <= len(x)
    assert 0 < ess_fraction(x) <= 1


@pytest.mark.parametrize("n", [1, 6, 13, 43, 49, 98, 1000])
def test_ess_at_the_ends_of_its_range(n: int):
    """All equal: n. One alone: exactly 1, also where rounding would leave 1 - 1 ulp (n = 49)."""
    assert_rounding_only(np.asarray(ess(np.full(n, -9999.0))), np.asarray(float(n)), ulp=8)
    assert ess(np.append(np.full(n - 1, -np.inf), 0.0)) >= 1
    assert_rounding_only(np.asarray(ess(np.append(np.full(n - 1, -np.inf), 1e4))), np.asarray(1.0), ulp=8)


@pytest.mark.parametrize("backend", FLOAT_BACKENDS, ids=name_of)
def test_ess_on_every_backend(backend: Backend):
    x = backend.floats([[0.0, 1e4, 1e4, -math.inf], [-1e4, -1e4, -1e4, -1e4], [0.0, 0.0, -math.inf, -math.inf]])
    assert as_numpy(ess(x)).tolist() == [2, 4, 2]
    assert as_numpy(ess_fraction(x)).tolist() == [0.5, 1, 0.5]
    assert as_numpy(d.max_share(x)).tolist() == [0.5, 0.25, 0.5]
    assert_rounding_only(as_numpy(d.log_mean_weight(x))[1:], np.array([-1e4, math.log(0.5)]), ulp=2**30)


@given(st.integers(1, 5).flatmap(extreme_log_ratio).filter(lambda x: np.any(x > -np.inf)), st.integers(1, 4))
def test_padding_does_not_count(x: np.ndarray, padding: int):
    """With measure 0 on the padding, the fraction is that of the real samples, whatever the padding holds."""
    padded = np.append(x, [1e4, -np.inf, 0.0, 50.0][:padding])
    measure = np.append(np.full(len(x), 1 / len(x)), np.zeros(padding))
    want = np.asarray(ess_fraction(x))
    assert_rounding_only(np.asarray(ess_fraction(padded, measure)), want, ulp=32)
    assert_rounding_only(np.asarray(d.max_share(padded, measure)), np.asarray(d.max_share(x)), ulp=32)
    whole = weight_sums(padded, (measure > 0).astype(float))
    assert whole.count == len(x)
    assert_rounding_only(np.asarray(whole.ess_fraction()), want, ulp=32)


@pytest.mark.parametrize("function", [ess, ess_fraction, d.max_share, d.log_mean_weight])
@pytest.mark.parametrize(
    ("x", "says"),
    [
        (np.array([0.0, np.nan]), "log_weight: contains NaN; remove or recompute the log-probabilities"),
        (np.array([0.0, np.inf]), r"log_weight: contains \+inf .behavior probability zero.; recompute"),
        (np.zeros(0), r"log_weight: empty \(shape \(0,\)\); pass at least one log-weight"),
        (np.zeros((3, 0)), r"log_weight: empty \(shape \(3, 0\)\)"),
    ],
)
def test_bad_log_weights_are_refused_everywhere(function: Any, x: np.ndarray, says: str):
    with pytest.raises(InputError, match=says):
        function(x)


@pytest.mark.parametrize(
    ("x", "measure"),
    [
        (np.full(3, -np.inf), None),
        (np.array([[0.0, 0.0], [-np.inf, -np.inf]]), None),
        (np.array([0.0, -np.inf]), np.array([0.0, 1.0])),
    ],
)
def test_no_weight_at_all_has_no_ess(x: np.ndarray, measure: np.ndarray | None):
    with pytest.raises(InputError, match="a group has no weight at all"):
        ess_fraction(x, measure)


def test_no_weight_at_all_has_a_log_mean_of_minus_infinity(recwarn):
    assert d.log_mean_weight(np.full(2, -np.inf)) == -np.inf
    assert not recwarn.list


def test_ratio_space_and_log_space_agree():
    rng = np.random.default_rng(0)
    x = rng.normal(scale=2, size=(4, 30))
    measure = rng.dirichlet(np.ones(30), size=4)
    w = np.exp(x)
    assert_rounding_only(ess_fraction(x, measure), d.ess_fraction_of_weights(w, measure), ulp=256)
    assert_rounding_only(ess(x), d.ess_of_weights(w), ulp=256)
    assert_rounding_only(d.max_share(x, measure), d.max_share_of_weights(w, measure), ulp=256)
    assert_rounding_only(np.exp(d.log_mean_weight(x, measure)), (w * measure).sum(axis=-1), ulp=256)


def test_ess_by_hand():
    """w = (1, 2, 3): 36 / 14; with measure (1/2, 1/2, 0): (3/2)^2 / (5/2)."""
    w = exact([1, 2, 3])
    half = exact([Fraction(1, 2), Fraction(1, 2), 0])
    assert d.ess_of_weights(w) == Fraction(36, 14)
    assert d.ess_fraction_of_weights(w, half) == Fraction(9, 10)
    assert d.chi2_of_weights(w, half) == Fraction(1, 2)
    assert d.max_share_of_weights(w, half) == Fraction(2, 3)


def test_nothing_has_a_share_of_nothing():
    zero = exact([0, 0])
    assert d.ess_of_weights(zero) == d.ess_fraction_of_weights(zero, zero) == d.max_share_of_weights(zero, zero) == 0


def test_ess_is_blind_to_a_missed_mode_and_the_mean_weight_is_not():
    """Target mass the behavior never samples: the observed weights are all 1/2, ESS reads n, mean(w) reads 1/2."""
    x = np.full(100, math.log(0.5))
    assert_rounding_only(np.asarray(ess(x)), np.asarray(100.0), ulp=8)
    assert_rounding_only(np.asarray(d.log_mean_weight(x)), np.asarray(math.log(0.5)), ulp=8)


def test_ess_fraction_estimates_one_over_one_plus_chi2():
    """Log-normal weights with sigma 1/2: rho -> e^(-1/4). 400 batches of 1000; detects an error of 1%, at 1e-9.

    The plug-in value is optimistic by O(1/n), here below a third of what the test detects.
    """
    x = np.random.default_rng(3).normal(scale=0.5, size=(400, 1000))
    assert_mean_equals(ess_fraction(x), math.exp(-0.25), detect=0.01)


@pytest.mark.parametrize("kl", [d.kl_behavior_target, d.kl_low_variance])
def test_kl_estimates_average_to_the_divergence(kl: Any):
    """KL(mu || pi) of two Bernoullis, exactly, under the behavior's measure."""
    target, behavior = np.array([0.2, 0.8]), np.array([0.6, 0.4])
    want = float((behavior * np.log(behavior / target)).sum())
    assert_rounding_only(np.asarray(kl(np.log(target / behavior), behavior)), np.asarray(want), ulp=16, scale=1.0)


@pytest.mark.parametrize("kl", [d.kl_behavior_target, d.kl_low_variance])
def test_kl_ignores_padding(kl: Any, recwarn):
    x, m = np.array([0.3, -np.inf, 1e4]), np.array([1.0, 0.0, 0.0])
    assert kl(x, m) == kl(x[:1], m[:1])
    assert not recwarn.list


@pytest.mark.parametrize("kl", [d.kl_behavior_target, d.kl_low_variance])
def test_kl_to_a_target_that_excludes_a_sample_is_infinite(kl: Any):
    assert kl(np.array([0.0, -np.inf]), np.array([0.5, 0.5])) == np.inf


def test_a_part_without_samples_is_neutral(recwarn):
    """A rank without trajectories, or with padding only, changes nothing; alone, its ESS is NaN, not 0 or 1."""
    part = weight_sums(np.array([1e4, 9999.0, -np.inf]))
    for nothing in (weight_sums(np.zeros(0)), weight_sums(np.array([5.0]), np.array([0.0]))):
        for merged in (part.merge(nothing), nothing.merge(part)):
            assert [float(x) for x in merged] == [float(x) for x in part]
        assert np.isnan(nothing.ess_fraction())
        assert np.isnan(nothing.merge(nothing).ess_fraction())
        assert np.isnan(nothing.log_mean())
    assert not recwarn.list


def test_weights_of_zero_count_as_samples():
    """-inf log-weights are samples without weight: they lower the fraction."""
    both = weight_sums(np.array([0.0])).merge(weight_sums(np.array([-np.inf])))
    assert both.ess_fraction() == 0.5
    assert both.count == 2
    assert np.isnan(weight_sums(np.array([-np.inf])).ess_fraction())


def test_sums_of_wrong_weights_are_not_a_number():
    """NaN or +inf on any rank makes the merged ESS NaN, so that the brake fails closed."""
    good = weight_sums(np.zeros(4))
    with np.errstate(invalid="ignore"):
        for bad in (math.nan, math.inf):
            try:
                merged = good.merge(weight_sums(np.array([0.0, bad])))
            except (InputError, RuntimeWarning):
                continue  # refusing is as closed
            assert np.isnan(merged.ess_fraction())


@pytest.mark.parametrize("backend", FLOAT_BACKENDS, ids=name_of)
def test_weight_sums_on_every_backend(backend: Backend):
    x = [[1e4, 1e4 - 1], [-3.0, -math.inf]]
    merged = weight_sums(backend.floats(x[0])).merge(weight_sums(backend.floats(x[1])))
    want = (1 + math.exp(-1)) ** 2 / (1 + math.exp(-2)) / 4
    assert_rounding_only(as_numpy(merged.ess_fraction()), np.asarray(want), ulp=16)
    assert_rounding_only(as_numpy(merged.log_mean()), np.asarray(1e4 + math.log((1 + math.exp(-1)) / 4)), ulp=4)


def test_sums_are_true_sums_on_their_scale():
    x = np.array([0.5, -0.2, 1.3])
    sums = weight_sums(x)
    assert isinstance(sums, WeightSums)
    factor = np.exp(sums.log_scale)
    assert_rounding_only(sums.total * factor, np.exp(x).sum(), ulp=8)
    assert_rounding_only(sums.square * factor**2, np.exp(2 * x).sum(), ulp=8)


@pytest.mark.parametrize(
    ("value", "high_is_bad", "alarming"),
    [
        (0.6, False, False),
        (0.4, False, True),
        (0.6, True, True),
        (0.4, True, False),
        (0.5, True, True),
        (0.5, False, True),
    ],
)
def test_a_diagnostic_knows_its_wrong_side(value: float, high_is_bad: bool, alarming: bool):
    assert Diagnostic("x", value, threshold=0.5, high_is_bad=high_is_bad).alarming is alarming


@pytest.mark.parametrize("high_is_bad", [True, False])
def test_a_diagnostic_that_is_not_a_number_is_alarming(high_is_bad: bool):
    assert Diagnostic("x", math.nan, threshold=0.5, high_is_bad=high_is_bad).alarming
