"""Expectations, divisions and exponentials: the arithmetic under every formula."""

import math
from fractions import Fraction

import numpy as np
import pytest

from tests.kit.backends import FLOAT_BACKENDS, Backend, name_of
from tests.kit.properties import Law, laws_of
from tests.kit.statistical import as_numpy, assert_rounding_only
from tests.kit.strategies import exact
from vcposim.arrays import (
    LINEAR,
    LOG,
    expectation,
    indistinguishable,
    log_expectation,
    namespace,
    require_weights,
    safe_divide,
    saturating_exp,
    sum_of_others,
)
from vcposim.errors import InputError, unknown_name


@pytest.mark.parametrize("law", laws_of("arrays"), ids=lambda x: x.name)
def test_law(law: Law):
    law.run()


def test_expectation_is_a_sum_under_a_measure_exactly():
    x, m = exact([[1, 2, 3], [4, 5, 6]]), exact([[Fraction(1, 2), Fraction(1, 3), Fraction(1, 6)]] * 2)
    assert list(expectation(x, m)) == [Fraction(5, 3), Fraction(14, 3)]
    assert expectation(x, m, keepdims=True).shape == (2, 1)


@pytest.mark.parametrize("backend", FLOAT_BACKENDS, ids=name_of)
def test_safe_divide_gives_the_default_at_zero_only(backend: Backend):
    top, bottom = backend.floats([1.0, 2.0, 0.0]), backend.floats([2.0, 0.0, 0.0])
    assert list(as_numpy(safe_divide(top, bottom, -7.0))) == [0.5, -7.0, -7.0]


def test_safe_divide_also_divides_plain_numbers():
    assert safe_divide(Fraction(1), Fraction(3), Fraction(9)) == Fraction(1, 3)
    assert safe_divide(Fraction(1), Fraction(0), Fraction(9)) == 9


@pytest.mark.parametrize("backend", FLOAT_BACKENDS, ids=name_of)
def test_squares_of_saturated_weights_are_finite(backend: Backend):
    """At the saturation point a square still has room for an advantage and a score norm (claim C18)."""
    weight = as_numpy(saturating_exp(backend.floats([1e4, 800.0, 0.0, -1e4, -math.inf])))
    assert np.all(np.isfinite(2 * weight * weight))
    assert weight[2] == 1
    assert list(weight[3:]) == [0, 0]
    assert np.isnan(as_numpy(saturating_exp(backend.floats([math.nan]))))[0]


@pytest.mark.parametrize("backend", FLOAT_BACKENDS, ids=name_of)
@pytest.mark.parametrize("shape", [(1,), (4,), (2, 3), (2, 1, 5)])
def test_sum_of_others_on_every_backend_and_shape(backend: Backend, shape: tuple[int, ...]):
    x = np.arange(math.prod(shape), dtype=float).reshape(shape) + 1
    want = x.sum(axis=-1, keepdims=True) - x  # exact: small integers
    np.testing.assert_array_equal(as_numpy(sum_of_others(backend.floats(x))), want)


@pytest.mark.parametrize("backend", FLOAT_BACKENDS, ids=name_of)
def test_log_expectation_of_nothing_is_minus_infinity_without_a_warning(backend: Backend, recwarn):
    x = backend.floats([[-math.inf, -math.inf], [0.0, 5.0]])
    m = backend.floats([[0.5, 0.5], [0.0, 0.0]])
    assert np.all(as_numpy(log_expectation(x, m)) == -np.inf)
    assert not recwarn.list


def test_log_expectation_ignores_what_has_no_measure():
    x = np.array([0.0, 1e4, np.log(3.0)])
    assert_rounding_only(np.asarray(log_expectation(x, np.array([0.5, 0.0, 0.5]))), np.asarray(math.log(2)), ulp=4)


def test_noise_is_told_from_a_difference():
    assert indistinguishable(np.array([3e-16, 1e-10, 0.0]), 1.0).tolist() == [True, False, True]
    assert not indistinguishable(Fraction(1, 10**30), Fraction(1))
    assert indistinguishable(Fraction(0), Fraction(1))


def test_scales_agree():
    """Each operation of the log scale is the log of the linear one."""
    x, y, m = np.array([0.5, 2.0, 3.0]), np.array([2.0, 0.25, 1.0]), np.array([0.2, 0.3, 0.5])
    lx, ly = np.log(x), np.log(y)
    assert_rounding_only(np.exp(LOG.over(lx, ly)), LINEAR.over(x, y), ulp=16)
    assert_rounding_only(np.exp(LOG.mean(lx, m)), LINEAR.mean(x, m), ulp=16)
    assert_rounding_only(np.exp(LOG.product(lx, None)), LINEAR.product(x, None), ulp=16)
    assert_rounding_only(np.exp(LOG.root(lx, np.array([1.0, 2.0, 3.0]))), x ** (1 / np.array([1.0, 2.0, 3.0])), ulp=16)
    assert_rounding_only(np.exp(LOG.write(8)), np.float64(LINEAR.write(8)), ulp=16)
    assert LOG.write(0) == LOG.zero == -math.inf
    assert LINEAR.zero == 0
    assert LOG.over(np.array([-np.inf]), np.array([-np.inf]))[0] == -np.inf


def test_relative_weights_differ_from_weights_by_one_factor():
    x, m = np.array([[3.0, 1.0, -2.0], [1e4, 1e4 - 1, 0.0]]), np.full((2, 3), 1 / 3)
    relative = LOG.relative(x, m)
    assert list(relative.max(axis=-1)) == [1, 1]
    assert_rounding_only(relative[0] * np.exp(3.0), np.exp(x[0]), ulp=16)
    assert_rounding_only(relative[1, 1], np.exp(-1.0), ulp=16)
    nothing = LOG.relative(np.full((1, 2), -np.inf), np.full((1, 2), 0.5))
    assert nothing.tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize(
    ("log_weight", "says"),
    [
        (np.zeros((2, 0)), r"log_ratio: empty \(shape \(2, 0\)\); pass at least one log-weight"),
        (np.array([0.0, np.nan]), "log_ratio: contains NaN; remove or recompute"),
        (np.array([0.0, np.inf]), r"log_ratio: contains \+inf .*; recompute behavior_log_prob"),
    ],
)
def test_what_is_no_log_weight_is_refused(log_weight: np.ndarray, says: str):
    with pytest.raises(InputError, match=says):
        require_weights("log_ratio", log_weight)


def test_minus_infinity_is_a_weight_of_zero():
    require_weights("log_ratio", np.array([-np.inf, 0.0]))


def test_what_is_no_array_is_refused():
    with pytest.raises(InputError, match=r"expected an array, got list; convert it first, as in numpy.asarray\(x\)"):
        namespace([1.0])


def test_unknown_name_suggests_the_nearest_and_lists_all():
    message = str(unknown_name("baseline", "grup_mean", ["zero", "group_mean"]))
    assert message == "baseline: unknown name 'grup_mean'; did you mean 'group_mean'? known: group_mean, zero"
    assert "did you mean" not in str(unknown_name("baseline", "xyzzy", ["zero", "group_mean"]))
    assert issubclass(InputError, ValueError)
