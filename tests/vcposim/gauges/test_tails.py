"""k-hat and Pareto smoothing: against the formulas, against known tails, and at every degenerate end."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.kit.statistical import SEARCHED, SINGLE, assert_mean_equals, assert_near, near
from tests.kit.strategies import extreme_log_ratio
from vcposim.batch import Batch
from vcposim.errors import InputError
from vcposim.gauges.tails import (
    MIN_SAMPLES,
    fit,
    khat,
    khat_threshold,
    pareto_smooth,
    required_samples,
    tail_index,
    tail_length,
)
from vcposim.weights import Weighting


def log_normal(n: int, spread: float, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=n) * spread


@pytest.mark.parametrize("k", [0.3, 0.6, 1.0, 2.0])
def test_khat_is_the_shape_of_a_pareto_tail(k: float) -> None:
    # w = u^(-k) is Pareto with shape k; the library's prior pulls by at most (0.5 - k) 10 / (tail + 10)
    draws = []
    for seed in range(40):
        log_weight = -k * np.log(np.random.default_rng([seed, 7]).random(20_000))
        m = tail_length(20_000)
        draws.append((tail_index(log_weight) * (m + 10) - 5) / m)  # the prior undone: unbiased up to O(1/m)
    assert_mean_equals(np.array(draws), k, detect=0.1 * (1 + k), false_fail=1e-6)


def test_tail_length_is_the_librarys() -> None:
    from arviz_stats.base import array_stats

    assert all(tail_length(n) == array_stats._get_ps_tails(n, 1, "right") for n in range(MIN_SAMPLES, 3000))


@given(
    seed=st.integers(0, 2**32),
    n=st.integers(MIN_SAMPLES, 3000),
    spread=st.sampled_from([0.01, 0.3, 1.0, 3.0, 20.0]),
    kind=st.sampled_from(["normal", "pareto", "student", "bounded", "ties"]),
)
def test_fit_and_smoothing_are_the_librarys(seed: int, n: int, spread: float, kind: str) -> None:
    from arviz_stats.base import array_stats

    rng = np.random.default_rng(seed)
    log_weight = {
        "normal": lambda: spread * rng.normal(size=n),
        "pareto": lambda: -spread * np.log(rng.random(n)),
        "student": lambda: spread * rng.standard_t(2, n),
        "bounded": lambda: np.log(rng.random(n)) * spread,
        "ties": lambda: np.round(spread * rng.normal(size=n), 1),
    }[kind]()
    ours = fit(log_weight)
    assert tail_index(log_weight) == near(ours.khat, allow=0.0)
    if not math.isfinite(ours.khat):
        return  # the library has no word for these
    smoothed, shape = array_stats.psislw(-log_weight)
    assert ours.khat == near(float(shape))
    # the library's weights are normalized; which of several equal ones gets which quantile is nobody's promise
    ours_sorted, theirs = np.sort(ours.log_weight), np.sort(smoothed)
    assert_near(ours_sorted - ours_sorted[0], theirs - theirs[0], allow=SEARCHED)


def test_threshold_and_required_samples_are_inverse() -> None:
    assert khat_threshold(100) == near(0.5)
    assert khat_threshold(10**9) == 0.7
    assert khat_threshold(1) == -math.inf
    for n in (20, 100, 1000):
        assert required_samples(khat_threshold(n)) == near(n)
    assert required_samples(-3) == 10
    assert required_samples(1.0) == required_samples(7.0) == required_samples(math.inf) == math.inf
    assert required_samples(-math.inf) == 10
    assert required_samples(math.nan) == MIN_SAMPLES
    assert required_samples(1 - 1e-4) == math.inf  # 10^10000 is no float


@given(shift=st.floats(-1e4, 1e4), spread=st.sampled_from([0.01, 1.0, 5.0]), n=st.integers(25, 400))
def test_smoothing_commutes_with_a_factor_on_all_weights(shift: float, spread: float, n: int) -> None:
    log_weight = log_normal(n, spread, n)
    moved, still = fit(log_weight + shift), fit(log_weight)
    # adding the shift rounds the input by 1e-12; where the tail is narrow k-hat feels that relative to the spread
    assert moved.khat == near(still.khat, allow=SEARCHED / spread)
    assert_near(moved.log_weight - shift, still.log_weight, allow=SEARCHED)


@given(spread=st.sampled_from([0.01, 1.0, 5.0, 40.0]), n=st.integers(25, 400))
def test_smoothing_touches_the_tail_alone_keeps_order_and_the_maximum(spread: float, n: int) -> None:
    log_weight = log_normal(n, spread, n)
    smoothed, order = fit(log_weight).log_weight, np.argsort(log_weight)
    body, tail = order[: -tail_length(n)], order[-tail_length(n) :]
    assert_near(smoothed[body], log_weight[body])
    assert np.abs(smoothed[tail] - log_weight[tail]).max() > 1e-6 * spread
    assert np.all(np.diff(smoothed[order]) >= -1e-10)
    assert smoothed.max() <= log_weight.max() + 1e-10


def test_smoothing_lowers_the_variance_of_the_mean_weight() -> None:
    # the reason to do it; E[w] = 1 and log w has spread 2.5, so that k-hat is near 0.7
    rng = np.random.default_rng(3)
    log_weight = rng.normal(size=(300, 200)) * 2.5 - 2.5**2 / 2
    raw = np.exp(log_weight).mean(axis=-1)
    smooth = np.exp(pareto_smooth(log_weight, np.full((300, 200), 1 / 200))).mean(axis=-1)
    assert np.mean((smooth - 1) ** 2) < 0.5 * np.mean((raw - 1) ** 2)


@pytest.mark.parametrize(
    ("log_weight", "expected"),
    [
        (np.zeros(100), -math.inf),
        (np.minimum(log_normal(300, 1), 0.0), -math.inf),
        (log_normal(24, 1), math.nan),
        (np.zeros(24), math.nan),
        (np.repeat([0.0, 1.0, 2.0], [50, 40, 10]), math.nan),
        (log_normal(300, 1e3), math.inf),
        (log_normal(300, 1e4), math.inf),
        (np.concatenate([np.full(270, -math.inf), log_normal(24, 1)]), math.nan),
    ],
)
def test_where_there_is_no_fit_khat_says_so_and_weights_stay(log_weight: np.ndarray, expected: float) -> None:
    smoothed, shape = fit(log_weight)
    assert shape == expected or (math.isnan(expected) and math.isnan(shape))
    np.testing.assert_array_equal(smoothed, log_weight)
    assert khat(log_weight).alarming == (expected != -math.inf)


@given(extreme_log_ratio(60))
def test_extremes_never_give_a_healthy_khat_or_a_nan_weight(log_weight: np.ndarray) -> None:
    smoothed, shape = fit(log_weight)
    assert not np.isnan(smoothed).any()
    np.testing.assert_array_equal(smoothed == -math.inf, log_weight == -math.inf)
    top = np.sort(log_weight)[::-1]
    if top[0] == 1e4 and top[1] < 8e3:
        assert shape == math.inf


def test_zero_weights_are_draws_of_no_tail() -> None:
    log_weight = log_normal(100, 2)
    with_zeros = np.concatenate([log_weight, np.full(30, -math.inf)])
    assert tail_index(with_zeros) == tail_index(log_weight)


def test_padding_is_left_alone_and_out_of_the_fit() -> None:
    log_weight, measure = np.full((2, 60), 5e3), np.zeros((2, 60))
    log_weight[0, :40], measure[0, :40] = log_normal(40, 2), 1 / 40
    log_weight[1], measure[1] = log_normal(60, 2, 1), 1 / 60
    smoothed = pareto_smooth(log_weight, measure)
    np.testing.assert_array_equal(smoothed[0, 40:], 5e3)
    np.testing.assert_array_equal(smoothed[0, :40], fit(log_weight[0, :40]).log_weight)
    np.testing.assert_array_equal(smoothed[1], fit(log_weight[1]).log_weight)
    assert khat(log_weight[:1], measure[:1]).value == tail_index(log_weight[0, :40])


def test_input_is_not_written_to() -> None:
    log_weight = log_normal(100, 2)
    log_weight.setflags(write=False)
    kept = log_weight.copy()
    pareto_smooth(log_weight, np.full(100, 0.01))
    khat(log_weight)
    np.testing.assert_array_equal(log_weight, kept)


def test_it_is_a_weighting() -> None:
    log_ratio = np.stack([log_normal(80, 2, seed) for seed in range(3)])
    weight = Weighting("pareto_smooth", smooth=pareto_smooth)(Batch(reward=log_ratio * 0, log_ratio=log_ratio))
    assert_near(weight.value, np.exp([fit(row).log_weight for row in log_ratio]), scale=0)


def test_torch_tensors_come_back_as_torch_tensors() -> None:
    torch = pytest.importorskip("torch")
    log_weight = torch.tensor(log_normal(100, 2), dtype=torch.float32)
    smoothed = pareto_smooth(log_weight, torch.full((100,), 0.01))
    assert smoothed.dtype == torch.float32
    assert_near(smoothed.numpy(), fit(log_weight.numpy()).log_weight, allow=SINGLE)


@pytest.mark.parametrize("bad", [np.array([0.0, math.nan]), np.array([0.0, math.inf]), np.empty((2, 0))])
def test_what_is_no_weight_is_refused(bad: np.ndarray) -> None:
    for call in (lambda: khat(bad), lambda: pareto_smooth(bad, np.ones(bad.shape))):
        with pytest.raises(InputError, match="log_weight") as error:
            call()
        assert "\n" not in str(error.value)
