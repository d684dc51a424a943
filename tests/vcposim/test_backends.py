"""Every treatment x level x baseline x normalizer, on every array library, against its slow twin."""

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, given, note, settings
from hypothesis import strategies as st

from tests.kit import slow
from tests.kit.backends import BACKENDS, EXACT, FLOAT_BACKENDS, Backend, name_of
from tests.kit.statistical import as_numpy, assert_rounding_only
from tests.kit.strategies import Case, cases
from vcposim.baselines import BASELINES
from vcposim.batch import Batch, DenseScores
from vcposim.estimators import NORMALIZERS, Estimator
from vcposim.moments import batch_sums, moments
from vcposim.weights import LEVELS, TREATMENTS, Weighting

CAP, FLOOR = Fraction(47, 31), Fraction(31, 53)  # primes that no generated ratio hits: no ties to break by rounding
LIMITS: dict[str, dict[str, Fraction]] = {
    "none": {},
    "importance": {},
    "truncate": {"cap": CAP},
    "clip": {"cap": CAP, "floor": FLOOR},
    "mask": {"cap": CAP},
    "self_normalize": {},
}


def test_the_table_above_names_every_treatment():
    assert LIMITS.keys() == TREATMENTS.keys()


def well_posed(group: Case, baseline: str, normalizer: str, weight: dict[str, Any], level: str) -> bool:
    """Not a 0/0 that rounding decides; those have tests of their own (constant reward, every draw the same)."""
    if "std" in normalizer:
        real = [x for i, x in enumerate(group.reward) if group.sample_mask is None or group.sample_mask[i]]
        return len(set(real)) > 1
    if baseline == "opob_truncated":
        b, _ = slow.coefficients(group, weight, "zero", "none", level)
        ones = Case(**{**vars(group), "reward": group.reward * 0 + 1})
        w, _ = slow.coefficients(ones, weight, "zero", "none", level)
        ws = [slow.weighted(group.score[i], w[i], group.score.ndim == 3) for i in range(len(b))]
        mask = group.sample_mask
        m = [Fraction(1) if mask is None else mask[i] for i in range(len(b))]
        n, second = sum(m), sum(m[i] * slow.square(ws[i]) for i in range(len(b)))
        mean = [sum(m[i] * ws[i][k] for i in range(len(b))) / n for k in range(len(ws[0]))]
        return second / n - slow.square(mean) > second / n / 1000
    return True


def groups_of(x: Any, case: Case) -> np.ndarray:
    x = as_numpy(x)
    return x.reshape(-1, *x.shape[case.reward.ndim - 1 :])


def check(case: Case, weighting: dict[str, Any], level: str, baseline: str, normalizer: str) -> None:
    """All backends against one slow twin."""
    twins = [
        slow.coefficients(group, weighting, baseline, normalizer, level)
        if well_posed(group, baseline, normalizer, weighting, level)
        else None
        for group in case.groups()
    ]
    for backend in BACKENDS:
        if backend.exact and ("std" in normalizer or level == "geometric"):
            continue  # roots: not for Fractions
        note(f"{backend.name} {weighting['treatment']} {level} {baseline} {normalizer}")
        limits = {k: v if backend.exact else float(v) for k, v in weighting.items() if k != "treatment"}
        estimator = Estimator(Weighting(weighting["treatment"], level, **limits), baseline, normalizer)
        c = groups_of(estimator.coefficients(case.batch(backend)), case)
        for got, twin, group in zip(c, twins, case.groups(), strict=True):
            if twin is None:
                continue
            want = np.array(twin[0], dtype=object)
            if group.sample_mask is not None:
                real = group.sample_mask.reshape(-1, *(1,) * (got.ndim - 1)) > 0
                got, want = np.where(real, got, 0), np.where(real, want, 0)
            assert not backend.exact or all(isinstance(x, Fraction | int) for x in got.ravel())
            assert_rounding_only(got, want, ulp=2**11, scale=twin[1])


# seconds a level; the fast selection takes one treatment
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    "treatment", [pytest.param(t, marks=[] if t == "clip" else pytest.mark.slow) for t in TREATMENTS]
)
def test_coefficients_equal_their_slow_twin(treatment: str, level: str):
    if (treatment, level) == ("self_normalize", "token"):
        pytest.skip("not defined per token: see test_weights.py")

    @settings(max_examples=4, phases=[Phase.explicit, Phase.generate])  # shrinking 30 combinations takes minutes
    @given(st.data())
    def trial(data: st.DataObject):
        lead = data.draw(st.sampled_from([(), (2,), (1, 2)]))
        ragged = data.draw(st.booleans())
        case = data.draw(cases(lead=lead, per_token=level != "sequence", ragged=ragged, smallest=1 if ragged else 2))
        for baseline in (name for name, b in BASELINES.items() if b.ordinary):
            for normalizer in (name for name, x in NORMALIZERS.items() if "grouped" not in x.needs):
                check(case, {"treatment": treatment, **LIMITS[treatment]}, level, baseline, normalizer)

    trial()


@pytest.mark.parametrize("backend", FLOAT_BACKENDS, ids=name_of)
@given(case=cases(lead=(3,)))
@settings(max_examples=10)
def test_moments_agree_on_every_backend(backend: Backend, case: Case):
    def of(b: Backend) -> dict[str, Any]:
        batch = case.batch(b)
        m = moments(batch_sums(batch, Estimator(baseline="opob").coefficients(batch)), b(case.score[0, 0]), drawn=True)
        names = ("mean", "bias", "variance_per_sample", "variance_of_mean", "mse")
        return {name: as_numpy(getattr(m, name)) for name in names}

    def size() -> float:
        batch = case.batch(EXACT)
        c = Estimator(baseline="zero").coefficients(batch)
        return float(max(1, np.max(batch_sums(batch, c).contribution_sq_norm), np.max(abs(case.reward)) ** 2))

    got, want = of(backend), of(FLOAT_BACKENDS[0])
    for name, value in want.items():
        assert_rounding_only(got[name], value, ulp=2**11, scale=100 * size())


@pytest.mark.parametrize("backend", FLOAT_BACKENDS, ids=name_of)
@given(case=cases(lead=(2,)))
@settings(max_examples=5)
def test_dtype_and_inputs_are_left_alone(backend: Backend, case: Case):
    batch = case.batch(backend)
    before = {name: as_numpy(getattr(batch, name)).copy() for name in ("reward", "log_ratio", "measure")}
    c = Estimator(Weighting("truncate", cap=2.0), "opob_leave_one_out", "group_std", epsilon=1e-6).coefficients(batch)
    assert c.dtype == batch.reward.dtype
    assert type(c) is type(batch.reward)
    for name, value in before.items():
        np.testing.assert_array_equal(as_numpy(getattr(batch, name)), value)


def test_a_lone_group_is_a_group_of_many():
    """Leading axes are only bookkeeping: (n,), (1, n) and (2, 1, n) hold the same coefficients."""
    reward, log_ratio = np.array([0.0, 1.0, 3.0]), np.array([0.5, -1.0, 2.0])
    score = np.array([[1.0, 2.0], [0.5, 0.0], [-1.0, 1.0]])

    def c(lead: tuple[int, ...]) -> np.ndarray:
        spread = [np.broadcast_to(x, (*lead, *x.shape)) for x in (reward, log_ratio, score)]
        return Estimator(baseline="opob").coefficients(
            Batch(reward=spread[0], log_ratio=spread[1], scores=DenseScores(spread[2]))
        )

    for lead in [(1,), (2, 1), (4, 2)]:
        for row in c(lead).reshape(-1, 3):
            assert_rounding_only(row, c(()), ulp=4)
