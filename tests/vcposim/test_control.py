"""The brake: the step follows the effective sample size, and stops where there is none."""

import math

import numpy as np
import pytest

from tests.kit.backends import FLOAT_BACKENDS, Backend, name_of
from tests.kit.properties import Law, laws_of
from tests.kit.statistical import as_numpy, assert_rounding_only
from vcposim.control import EXPONENTS, step_scale
from vcposim.diagnostics import ess_fraction, weight_sums
from vcposim.errors import InputError


@pytest.mark.parametrize("law", laws_of("control"), ids=lambda x: x.name)
def test_law(law: Law):
    law.run()


@pytest.mark.parametrize("backend", FLOAT_BACKENDS, ids=name_of)
def test_on_every_backend(backend: Backend):
    rho = backend.floats([1.0, 0.25, 0.0, math.nan, math.inf, -math.inf, -1.0, 2.0])
    assert as_numpy(step_scale(rho)).tolist() == [1, 0.5, 0, 0, 0, 0, 0, 0]
    assert as_numpy(step_scale(rho, exponent=1.0)).tolist() == [1, 0.25, 0, 0, 0, 0, 0, 0]
    assert as_numpy(step_scale(rho, reference=0.25)).tolist() == [1, 1, 0, 0, 0, 0, 0, 0]
    assert as_numpy(step_scale(rho, exponent=0.0)).tolist() == [1, 1, 0, 0, 0, 0, 0, 0]


def test_a_single_number():
    assert float(step_scale(np.float64(0.25))) == 0.5


def test_paper_exponents():
    assert EXPONENTS == {"adam": 0.5, "sgd": 1.0}


def test_rounding_above_one_is_still_a_full_step():
    assert float(step_scale(np.float64(1 + 1e-12))) == 1


def test_from_log_weights_to_step():
    """Two of four samples carry all weight: rho = 1/2, a step of sqrt(1/2); nothing sampled: no step."""
    rho = ess_fraction(np.array([1e4, 1e4, -1e4, -math.inf]))
    assert_rounding_only(np.asarray(step_scale(rho)), np.asarray(math.sqrt(0.5)), ulp=4)
    assert float(step_scale(weight_sums(np.zeros(0)).ess_fraction())) == 0


@pytest.mark.parametrize("reference", [0.0, -0.5, 1.5, math.nan, math.inf])
def test_a_reference_that_is_no_fraction_is_refused(reference: float):
    with pytest.raises(InputError, match=rf"reference: {reference} is not in \(0, 1\]; it is an ESS fraction"):
        step_scale(np.array([0.5]), reference=reference)


@pytest.mark.parametrize("exponent", [-1.0, math.nan, math.inf])
def test_an_exponent_out_of_range_is_refused(exponent: float):
    with pytest.raises(InputError, match=rf"exponent: {exponent} is not a finite non-negative number"):
        step_scale(np.array([0.5]), exponent=exponent)


def test_what_is_no_array_is_refused():
    with pytest.raises(InputError, match="expected an array, got float"):
        step_scale(0.5)
