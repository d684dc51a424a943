"""The panel: each gauge against plain arithmetic on well-behaved weights, and sane at the ends."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.kit.statistical import near
from tests.kit.strategies import extreme_log_ratio
from vcposim.batch import Batch, DenseScores, ScoreNorms, sample_measure
from vcposim.errors import InputError
from vcposim.gauges.panel import panel, sample_panel
from vcposim.gauges.tails import required_samples, tail_index

LEVELS = ("sequence", "sequence_truncated", "geometric", "gradient", "token")


def token_batch(seed: int = 0) -> Batch:
    rng = np.random.default_rng(seed)
    shape = (3, 20, 6)
    mask = (np.arange(6) < rng.integers(1, 7, size=shape[:2])[..., None]) * 1.0
    log_ratio = np.where(mask > 0, rng.normal(size=shape) * 0.5, 77.0)  # padding holds garbage
    score = rng.normal(size=(*shape[:2], 4)) * rng.lognormal(size=(*shape[:2], 1))
    return Batch(
        reward=rng.integers(0, 2, size=shape[:2]) * 1.0,
        log_ratio=log_ratio,
        token_mask=mask,
        scores=DenseScores(score),
    )


def ess_fraction(w: np.ndarray) -> float:
    return w.sum() ** 2 / (w**2).sum() / w.size


def test_every_gauge_is_its_formula() -> None:
    batch = token_batch()
    found = {name: one.value for name, one in panel(batch, cap=2.0).items()}
    mask, score = batch.token_mask, batch.scores.score
    token = np.exp(batch.log_ratio[mask > 0])
    log_w = (np.where(mask > 0, batch.log_ratio, 0)).sum(-1)
    w, n = np.exp(log_w), np.sqrt((score**2).sum(-1))
    a = (w * n) ** 2
    expected = {
        "ess_fraction_token": ess_fraction(token),
        "ess_fraction_sequence": ess_fraction(w),
        "ess_fraction_sequence_truncated": ess_fraction(np.minimum(w, 2)),
        "ess_fraction_geometric": ess_fraction(w ** (1 / mask.sum(-1))),
        "ess_fraction_gradient": ess_fraction(w * n),
        "mean_weight": w.mean(),
        "log_mean_weight": math.log(w.mean()),
        "max_share": w.max() / w.sum(),
        "khat": tail_index(log_w.reshape(-1)),
        "kl_behavior_target": -log_w.mean(),
        "kl_low_variance": (w - 1 - log_w).mean(),
        "chi2": ((w - 1) ** 2).mean(),
        "max_leverage": (a / a.sum(-1, keepdims=True)).max(),
    }
    assert found == near(expected)
    assert len({round(found[f"ess_fraction_{level}"], 3) for level in LEVELS}) == 5  # five different quantities


@given(sizes=st.lists(st.integers(1, 8), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_padding_changes_nothing(sizes: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    mask = (np.arange(max(sizes) + 2) < np.array(sizes)[:, None]) * 1.0
    measure, unit = sample_measure(mask)
    log_ratio, norm = rng.normal(size=mask.shape), rng.lognormal(size=mask.shape)
    garbage = np.where(mask > 0, log_ratio, 1e4)
    ragged = Batch(
        reward=mask * 0,
        log_ratio=garbage,
        scores=ScoreNorms(norm),
        length=np.where(mask > 0, 7.0, 1.0),
        measure=measure,
        unit=unit,
    )
    real = mask > 0
    flat = sample_panel(log_ratio[real], length=np.full(real.sum(), 7.0), norm=np.sqrt(norm[real]))
    found = panel(ragged)
    for name, one in flat.items():
        assert found[name].value == near(one.value, nan_ok=True), name
    a = np.exp(2 * log_ratio) * norm * mask
    assert found["max_leverage"].value == near((a / a.sum(-1, keepdims=True)).max())


def test_each_sample_counts_once_whatever_the_size_of_its_group() -> None:
    # pooling equal-mass groups would give the lone sample of the second group eight times the mass of the others
    mask = np.array([[1.0] * 8, [1.0] + [0.0] * 7])
    measure, unit = sample_measure(mask)
    log_ratio = np.log(np.array([[1.0] * 8, [3.0] + [1.0] * 7]))
    batch = Batch(reward=mask, log_ratio=log_ratio, measure=measure, unit=unit)
    assert panel(batch)["mean_weight"].value == near((8 + 3) / 9)


def test_a_population_is_weighed_by_its_probabilities() -> None:
    behavior, target = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.3, 0.5])
    batch = Batch(reward=behavior * 0, log_ratio=np.log(target / behavior), measure=behavior, unit=0 * behavior[:1])
    found = panel(batch)
    chi2 = (target**2 / behavior).sum() - 1
    assert found["chi2"].value == near(chi2)
    assert found["ess_fraction_sequence"].value == near(1 / (1 + chi2))
    assert found["mean_weight"].value == near(1)


@given(extreme_log_ratio(40))
def test_extremes_are_finite_or_alarming(log_ratio: np.ndarray) -> None:
    assume(np.isfinite(log_ratio).any())
    found = sample_panel(log_ratio, length=np.full(40, 3.0), norm=np.full(40, 2.0))
    for one in found.values():
        assert not math.isnan(one.value) or one.name == "khat"
        assert math.isfinite(one.value) or one.alarming or one.name in ("khat", "mean_weight", "kl_behavior_target")
    for level in ("sequence", "sequence_truncated", "geometric", "gradient"):
        assert 0.999 / 40 <= found[f"ess_fraction_{level}"].value <= 1
    assert found["ess_fraction_gradient"].value == near(found["ess_fraction_sequence"].value)
    if found["mean_weight"].value == math.inf:
        assert found["log_mean_weight"].alarming


def test_all_weights_zero_is_an_alarm_not_a_crash() -> None:
    found = sample_panel(np.full(30, -math.inf))
    assert found["ess_fraction_sequence"].value == 0
    assert found["max_share"].value == 1
    assert found["mean_weight"].value == 0
    assert all(found[name].alarming for name in ("ess_fraction_sequence", "max_share", "mean_weight", "khat"))


def test_equal_weights_alarm_nothing() -> None:
    found = sample_panel(np.zeros(64), length=np.full(64, 9.0), norm=np.full(64, 3.0))
    assert not any(one.alarming for one in found.values())
    assert all(one.required <= 64 for one in found.values())


def test_thresholds_hang_together_on_log_normal_weights() -> None:
    # spread sqrt(log 2): ESS fraction 1/2, chi2 1, KL (log 2) / 2: all at their thresholds, from either side
    n = 400_000
    z = np.random.default_rng(5).normal(size=n)
    for spread, bad in ((0.9, True), (0.75, False)):
        found = sample_panel(spread * z - spread**2 / 2)
        for name in ("ess_fraction_sequence", "chi2", "kl_behavior_target", "kl_low_variance"):
            assert found[name].alarming == bad, name


def test_required_samples_come_from_each_weights_own_tail() -> None:
    log_ratio = np.random.default_rng(1).normal(size=500) * 3
    found = sample_panel(log_ratio, length=np.full(500, 30.0))
    assert found["ess_fraction_sequence"].required == required_samples(tail_index(log_ratio))
    assert found["ess_fraction_sequence_truncated"].required < found["ess_fraction_sequence"].required
    assert found["ess_fraction_geometric"].required == required_samples(tail_index(log_ratio / 30))
    assert found["khat"].required == found["mean_weight"].required == required_samples(tail_index(log_ratio))


def test_gradient_ess_is_judged_against_its_on_policy_value() -> None:
    norm = np.random.default_rng(2).lognormal(size=400, sigma=1.5)
    one = sample_panel(np.zeros(400), norm=norm)["ess_fraction_gradient"]
    assert one.value < 0.5
    assert one.value == near(2 * one.threshold)
    assert not one.alarming


def test_what_is_absent_is_left_out() -> None:
    names = set(panel(Batch(reward=np.zeros(5), log_ratio=np.zeros(5))))
    assert not names & {"ess_fraction_token", "ess_fraction_geometric", "ess_fraction_gradient", "max_leverage"}


def test_fields_for_estimators_change_no_gauge() -> None:
    batch = token_batch()
    extra = replace(batch, log_prob=batch.log_ratio - 1, collision=batch.log_ratio * 0)
    assert panel(extra) == panel(batch)


def test_torch_batches_read_the_same() -> None:
    torch = pytest.importorskip("torch")
    batch = token_batch()
    twin = Batch(
        reward=torch.tensor(batch.reward),
        log_ratio=torch.tensor(batch.log_ratio),
        token_mask=torch.tensor(batch.token_mask),
        scores=DenseScores(torch.tensor(batch.scores.score)),
    )
    for name, one in panel(batch).items():
        assert panel(twin)[name].value == near(one.value), name


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: panel(Batch(reward=np.zeros(3), ratio=np.ones(3))), "log_ratio"),
        (lambda: sample_panel(np.array([0.0, math.nan])), "NaN"),
        (lambda: sample_panel(np.array([0.0, math.inf])), "inf"),
        (lambda: sample_panel(np.array([])), "empty"),
        (lambda: sample_panel(np.zeros(3), cap=0.0), "cap"),
        (lambda: sample_panel(np.zeros(3), cap=math.nan), "cap"),
    ],
)
def test_bad_input_is_one_line(call: object, words: str) -> None:
    with pytest.raises(InputError, match=words) as error:
        call()  # type: ignore[operator]
    assert "\n" not in str(error.value)
