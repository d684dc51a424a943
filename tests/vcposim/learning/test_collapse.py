"""Collapse: the definition on curves drawn by hand, AUROC against SciPy, and detectors that must not see the truth."""

from typing import Any

import numpy as np
import pytest
from scipy.stats import mannwhitneyu

from tests.kit.statistical import SEARCHED, assert_mean_equals, assert_near, near
from vcposim.errors import InputError
from vcposim.learning.collapse import (
    DETECTORS,
    NOT_COLLAPSED,
    Cases,
    auroc,
    cases,
    collapse_step,
    danger,
    lead_time,
    trailing_mean,
    variation,
)


def curve(*parts: tuple[float, int]) -> np.ndarray:
    return np.concatenate([np.full(n, value) for value, n in parts])[:, None]


@pytest.mark.parametrize(
    ("value", "step"),
    [
        (curve((0.1, 30), (0.9, 30), (0.2, 40)), 60),
        (curve((0.1, 100)), NOT_COLLAPSED),  # never rose, never fell
        (curve((0.9, 30), (0.2, 40), (0.9, 30)), NOT_COLLAPSED),  # recovered
        (curve((0.9, 30), (0.2, 20), (0.6, 10), (0.2, 40)), 60),  # the last fall counts
        (curve((0.9, 85), (0.2, 15)), NOT_COLLAPSED),  # too short to call
        (curve((0.9, 80), (0.2, 20)), 80),
        (curve((0.03, 10), (0.0, 90)), 10),  # lost what it was given
        (curve((0.9, 30), (0.45, 70)), NOT_COLLAPSED),  # exactly half is not below half
    ],
)
def test_collapse_is_what_it_says(value: np.ndarray, step: int) -> None:
    assert collapse_step(value, fraction=0.5, stay=20).tolist() == [step]


def test_collapse_is_judged_run_by_run() -> None:
    both = np.hstack([curve((0.9, 30), (0.2, 70)), curve((0.1, 100))])
    assert collapse_step(both).tolist() == [30, NOT_COLLAPSED]


def test_an_absolute_threshold_is_another_definition() -> None:
    """Mutant: below one half of 1 instead of one half of its own best; it calls a run collapsed that only rose."""
    rising = np.linspace(0.05, 0.4, 100)[:, None]
    mutant = np.where((rising < 0.5).all(axis=0), 0, NOT_COLLAPSED)
    assert mutant.tolist() == [0]
    assert collapse_step(rising).tolist() == [NOT_COLLAPSED]


@pytest.mark.parametrize(("change", "message"), [({"fraction": 1.0}, "fraction: 1.0"), ({"stay": 101}, "stay: 101")])
def test_errors(change: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        collapse_step(curve((0.5, 100)), **change)


def test_unknown_detector() -> None:
    with pytest.raises(InputError, match="did you mean 'low_ess'"):
        danger("low_es", {})


def test_trailing_statistics_look_back_only() -> None:
    x = np.random.default_rng(0).exponential(size=(40, 3))
    for k in (0, 3, 25):
        part = x[max(0, k - 9) : k + 1]
        assert_near(trailing_mean(x, 10)[k], part.mean(axis=0), scale=0)
        assert_near(variation(x, 10)[k], part.std(axis=0) / part.mean(axis=0), allow=SEARCHED)
    later = x.copy()
    later[26:] = 1e6
    assert np.array_equal(trailing_mean(later, 10)[:26], trailing_mean(x, 10)[:26])


def test_no_detector_sees_the_exact_value_or_the_future() -> None:
    rng = np.random.default_rng(1)
    names = ("ess_fraction", "truncated_ess_fraction", "mean_weight", "khat", "max_share", "kl", "chi2", "entropy")
    fields = {name: rng.uniform(0.1, 1, size=(50, 4)) for name in (*names, "gradient_norm", "reward")}
    fields |= {"step_size": np.full(4, 0.1), "max_lag": np.arange(4.0)}
    later = {k: v if v.ndim == 1 else np.concatenate([v[:30], v[30:] * 7]) for k, v in fields.items()}
    for name in DETECTORS:  # "value" and "true_ess_fraction" are not among the fields: asking for them is a KeyError
        assert np.array_equal(danger(name, fields)[:30], danger(name, later)[:30])


def test_auroc_is_mann_whitney() -> None:
    rng = np.random.default_rng(2)
    score, positive = rng.integers(0, 6, size=60).astype(float), rng.random(60) < 0.3
    case = Cases(np.arange(60), positive, np.zeros(60))
    found = auroc(score, case, np.zeros(60))
    assert found is not None
    u = mannwhitneyu(score[positive], score[~positive]).statistic
    assert found.value == near(u / (positive.sum() * (~positive).sum()))
    assert found.low < found.value < found.high


def test_strata_never_mix_configurations() -> None:
    """A score that knows only the configuration is worth much pooled and exactly nothing within."""
    configuration = np.repeat([0, 1], 50)
    positive = np.random.default_rng(3).random(100) < np.where(configuration == 0, 0.1, 0.8)
    case = Cases(np.arange(100), positive, np.zeros(100))
    pooled = auroc(configuration.astype(float), case, np.zeros(100))
    within = auroc(configuration.astype(float), case, configuration)
    assert pooled is not None
    assert within is not None
    assert pooled.low > 0.6
    assert (within.low, within.value, within.high) == (0.5, 0.5, 0.5)


def test_without_both_kinds_there_is_no_auroc() -> None:
    case = Cases(np.arange(4), np.ones(4, bool), np.zeros(4))
    assert auroc(np.arange(4.0), case, np.zeros(4)) is None


def test_intervals_cover() -> None:
    """Cluster bootstrap: with three equal cases a run, the 95% interval covers 0.5 about as often as it says.

    Counting cases as independent instead would make it about 1.7 times too narrow, and cover 75% of the time.
    """
    rng = np.random.default_rng(4)
    covered = []
    for _ in range(400):
        score, positive = rng.normal(size=60), rng.random(60) < 0.4
        case = Cases(np.tile(np.arange(60), 3), np.tile(positive, 3), np.repeat([0, 1, 2], 60))
        found = auroc(np.tile(score, 3), case, case.landmark)
        assert found is not None
        covered.append(float(found.low <= 0.5 <= found.high))
    assert_mean_equals(np.array(covered), 0.94, detect=0.12, support=None)


def test_cases_are_runs_at_risk() -> None:
    case = cases(np.array([NOT_COLLAPSED, 15, 40, 5]), landmarks=(10, 20), horizon=10)
    assert case.run.tolist() == [0, 1, 2, 0, 2]
    assert case.positive.tolist() == [False, True, False, False, False]


def test_lead_time_judges_on_other_runs() -> None:
    score = np.zeros((50, 8))
    score[10:, 0] = score[20:, 1] = 5.0  # alarms in the two collapsing runs of the judged half
    score[:, 2] = 1.0
    collapse = np.array([30, 25, NOT_COLLAPSED, NOT_COLLAPSED, 40, NOT_COLLAPSED, NOT_COLLAPSED, NOT_COLLAPSED])
    calibrate = np.arange(8) >= 4
    found = lead_time(score, collapse, calibrate)
    assert found is not None
    assert found.lead.tolist() == [20, 5]
    assert (found.detected, found.false_alarm) == (1.0, 0.5)  # run 2 is above the threshold of the calibration half
    assert lead_time(score, np.full(8, NOT_COLLAPSED), calibrate) is None
