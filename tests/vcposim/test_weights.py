"""From ratios to weights: treatments, levels, limits."""

import itertools
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from tests.kit.backends import FLOAT_BACKENDS, Backend, name_of
from tests.kit.properties import Law, laws_of
from tests.kit.statistical import as_numpy, assert_near, assert_rounding_only
from tests.kit.strategies import exact
from vcposim.batch import Batch
from vcposim.errors import InputError
from vcposim.weights import TREATMENTS, Weighting, mixture_log_ratio

EXTREME = [0.0, 1e4, -1e4, 5.0, -math.inf]


@pytest.mark.parametrize("law", laws_of("weights"), ids=lambda x: x.name)
def test_law(law: Law):
    law.run()


def of(log_ratio: Any, **changes: Any) -> Batch:
    log_ratio = np.asarray(log_ratio, dtype=float)
    return Batch(reward=np.zeros(len(log_ratio)), log_ratio=log_ratio, **changes)


LIMITS: dict[str, dict[str, float]] = {
    "truncate": {"cap": 8.0},
    "clip": {"cap": 8.0, "floor": 0.5},
    "mask": {"cap": 8.0},
}
LITERAL = {
    "none": lambda w: np.ones_like(w),
    "importance": lambda w: w,
    "truncate": lambda w: np.minimum(w, 8.0),
    "clip": lambda w: np.clip(w, 0.5, 8.0),
    "mask": lambda w: np.where(w <= 8.0, w, 0.0),
    "self_normalize": lambda w: w / w.mean(),
}


@pytest.mark.parametrize("treatment", TREATMENTS)
def test_treatments_are_their_literal_numpy(treatment: str):
    log_ratio = np.random.default_rng(0).normal(scale=3, size=50)
    got = Weighting(treatment, **LIMITS.get(treatment, {}))(of(log_ratio))
    assert_rounding_only(got.value, LITERAL[treatment](np.exp(log_ratio)), ulp=128)
    positive = got.value > 0
    factor = got.relative[positive] / got.value[positive]
    assert_rounding_only(factor, np.full(positive.sum(), factor[0]), ulp=128)
    assert got.relative.max() == 1


@pytest.mark.parametrize("treatment", TREATMENTS)
@pytest.mark.parametrize("backend", FLOAT_BACKENDS, ids=name_of)
def test_extreme_log_ratios_stay_finite_and_ordered(backend: Backend, treatment: str):
    """|log w| of 10^4 neither overflows nor becomes NaN, and a weight's order survives monotone treatments."""
    batch = Batch(reward=backend.floats(np.zeros(5)), log_ratio=backend.floats(EXTREME))
    weight = Weighting(treatment, **LIMITS.get(treatment, {}))(batch)
    value, relative = as_numpy(weight.value), as_numpy(weight.relative)
    assert np.all(np.isfinite(value) & np.isfinite(relative) & (value >= 0) & (relative >= 0) & (relative <= 1))
    if treatment != "mask":
        assert np.all(np.diff(value[np.argsort(EXTREME)]) >= 0)


def test_limits_act_at_the_limit():
    """A weight equal to a limit is kept as it is: min, max and <= agree there."""
    at = exact([Fraction(8), Fraction(1, 2)])
    batch = Batch(reward=at * 0, ratio=at)
    for weighting in (
        Weighting("mask", cap=Fraction(8), floor=Fraction(1, 2)),  # type: ignore[arg-type]
        Weighting("truncate", cap=Fraction(8)),  # type: ignore[arg-type]
        Weighting("clip", cap=Fraction(8), floor=Fraction(1, 2)),  # type: ignore[arg-type]
    ):
        assert list(weighting(batch).value) == list(at)


@pytest.mark.parametrize("level", ["sequence", "geometric"])
def test_on_policy_every_weight_is_one(level: str):
    tokens = np.zeros((3, 4, 5))
    batch = Batch(reward=np.zeros((3, 4)), log_ratio=tokens)
    for treatment in TREATMENTS:
        assert np.all(Weighting(treatment, level, **LIMITS.get(treatment, {}))(batch).value == 1)


def test_levels_of_one_trajectory():
    """Token (2, 1/2, 4), sequence 4, geometric 4^(1/3); a masked token does not count."""
    tokens = np.log([[2.0, 0.5, 4.0, 1e9]])
    batch = Batch(reward=np.zeros(1), log_ratio=tokens, token_mask=np.array([[1.0, 1.0, 1.0, 0.0]]))
    assert_rounding_only(Weighting(level="token")(batch).value, np.array([[2.0, 0.5, 4.0, 0.0]]), ulp=4)
    assert_rounding_only(Weighting(level="sequence")(batch).value, np.array([4.0]), ulp=4)
    assert_rounding_only(Weighting(level="geometric")(batch).value, np.array([4 ** (1 / 3)]), ulp=4)


def test_geometric_level_of_trajectory_ratios_uses_the_length():
    batch = Batch(reward=np.zeros(2), log_ratio=np.log([8.0, 9.0]), length=np.array([3.0, 2.0]))
    assert_rounding_only(Weighting(level="geometric")(batch).value, np.array([2.0, 3.0]), ulp=8)


@pytest.mark.parametrize("level", ["sequence", "geometric"])
def test_padding_weighs_nothing_whatever_it_holds(level: str):
    """A padded trajectory of no tokens and a log-ratio of 10^4: no NaN, no weight, no effect on the others."""
    mask = np.array([[1.0, 1.0], [1.0, 0.0], [0.0, 0.0]])
    padded = Batch(
        reward=np.zeros(3),
        log_ratio=np.array([[0.1, 0.2], [0.3, 1e4], [1e4, -np.inf]]),
        token_mask=mask,
        measure=np.array([0.5, 0.5, 0.0]),
        unit=0.5,
    )
    alone = Batch(reward=np.zeros(2), log_ratio=np.array([[0.1, 0.2], [0.3, 0.0]]), token_mask=mask[:2])
    for treatment in TREATMENTS:
        weighting = Weighting(treatment, level, **LIMITS.get(treatment, {}))
        assert_rounding_only(weighting(padded).value, np.append(weighting(alone).value, 0.0), ulp=8)
        assert_rounding_only(weighting(padded).relative, np.append(weighting(alone).relative, 0.0), ulp=8)


def test_relative_token_weights_share_one_factor_a_group():
    log_ratio = np.random.default_rng(3).normal(scale=200, size=(2, 3, 4))
    batch = Batch(reward=np.zeros((2, 3)), log_ratio=log_ratio)
    relative = Weighting(level="token")(batch).relative
    want = np.exp(log_ratio - log_ratio.max(axis=(1, 2), keepdims=True))
    assert_rounding_only(relative, want, ulp=1024)
    assert relative.max(axis=(1, 2)).tolist() == [1, 1]


def test_a_group_without_weight_has_weights_of_zero():
    weight = Weighting()(of([-np.inf, -np.inf]))
    assert weight.value.tolist() == weight.relative.tolist() == [0, 0]
    assert Weighting("self_normalize")(of([-np.inf, -np.inf])).value.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"treatment": "truncated"}, "weighting: unknown name 'truncated'; did you mean 'truncate'?"),
        ({"level": "tokens"}, "level: unknown name 'tokens'; did you mean 'token'?"),
        ({"treatment": "truncate"}, "cap: weighting 'truncate' needs one, as in cap=8"),
        ({"treatment": "clip", "cap": 2.0}, "floor: weighting 'clip' needs one, as in floor=0.5"),
        ({"treatment": "truncate", "cap": 0.0}, "cap: 0.0 is not a finite positive number"),
        ({"treatment": "truncate", "cap": -1.0}, "cap: -1.0 is not a finite positive number"),
        ({"treatment": "truncate", "cap": math.nan}, "cap: nan is not a finite positive number"),
        ({"treatment": "mask", "cap": math.inf}, "cap: inf is not a finite positive number"),
        ({"treatment": "clip", "cap": 1.0, "floor": 2.0}, "floor: 2.0 is above cap 1.0; swap them"),
        ({"treatment": "importance", "cap": 8.0}, "cap: weighting 'importance' takes none; leave it out"),
        ({"treatment": "truncate", "cap": 8.0, "floor": 0.5}, "floor: weighting 'truncate' takes none; leave it out"),
        ({"treatment": "self_normalize", "level": "token"}, "level: 'self_normalize' compares trajectories"),
    ],
)
def test_wrong_limits_are_refused_by_name(given: dict[str, Any], says: str):
    with pytest.raises(InputError) as caught:
        Weighting(**given)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_token_level_needs_token_ratios():
    with pytest.raises(InputError, match=r"level: 'token' needs log-ratios of shape \(..., n, t\)"):
        Weighting(level="token")(of([0.0, 1.0]))


def test_geometric_level_needs_lengths():
    with pytest.raises(InputError, match="length: this needs the number of tokens"):
        Weighting(level="geometric")(of([0.0, 1.0]))


def test_smoothing_needs_floats():
    weighting = Weighting("smoothed", smooth=lambda x, measure: x)
    assert weighting(of([0.0, math.log(2)])).value.tolist() == [1.0, 2.0]
    with pytest.raises(InputError, match="needs floats; pass log_ratio instead of ratio"):
        weighting(Batch(reward=exact([0, 0]), ratio=exact([1, 2])))


def test_a_mixture_of_versions_is_unbiased_whichever_drew_a_sample():
    """All groups of three, two samples from one version and one from another: sequence IS by enumeration."""
    pi, versions = np.array([0.5, 0.3, 0.2]), np.array([[0.2, 0.3, 0.5], [0.05, 0.9, 0.05]])
    reward, drew = np.array([1.0, -0.4, 0.3]), np.array([0, 0, 1])
    share = np.array([2 / 3, 1 / 3])
    arms = np.array(list(itertools.product(range(3), repeat=3)))
    chance = versions[drew, arms].prod(axis=-1)
    log_ratio = np.log(pi / versions).T[arms]  # (batch, sample, version)
    score = np.eye(3)[arms] - pi

    def mean(log_weight):
        return np.einsum("b,bi,bip->p", chance, np.exp(log_weight) * reward[arms], score) / 3

    gradient = pi * (reward - pi @ reward)
    assert_near(mean(mixture_log_ratio(log_ratio, share)), gradient)
    # planted: shares that nobody drew, and the mean of the ratios instead of the ratio to the mean
    assert np.abs(mean(mixture_log_ratio(log_ratio, share[::-1])) - gradient).max() > 1e-2
    assert np.abs(mean(np.log(np.exp(log_ratio) @ share)) - gradient).max() > 1e-2
    own = np.take_along_axis(log_ratio, np.broadcast_to(drew[:, None], (27, 3, 1)), -1)[..., 0]
    assert_near(mean(own), gradient)  # each by its own version: unbiased too, but
    most = np.exp(mixture_log_ratio(log_ratio, share)).max()
    assert most < np.exp(own).max()


@pytest.mark.parametrize("library", ["array_api_strict", "torch"])
def test_a_mixture_of_versions_survives_what_no_exp_does(library):
    xp = pytest.importorskip(library)
    x = np.array([[2000.0, -2000.0], [-2000.0, -2001.0], [0.0, np.inf]])
    found = np.asarray(mixture_log_ratio(xp.asarray(x), xp.asarray(np.array([0.5, 0.5]))))
    assert_near(found, [np.log(2) - 2000, np.log(2) - 2001 + np.log(1 / (1 + np.exp(-1))), np.log(2)], scale=0)
    one = mixture_log_ratio(xp.asarray(x[:2]), xp.asarray(np.array([1.0, 0.0])))
    assert_near(np.asarray(one), x[:2, 0], scale=0)
