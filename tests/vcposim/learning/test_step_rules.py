"""Step rules: multipliers in [0, 1] that say what they say and never fail open."""

import numpy as np
import pytest

from tests.kit.statistical import assert_near
from vcposim.control import (
    STEP_RULES,
    Seen,
    StepRule,
    lag_scale,
    length_signal_scale,
    limit_alignment,
    matched_constant,
    multiplier,
    norm_scale,
    snr_of_groups,
    snr_scale,
    spike_scale,
    staleness_scale,
    step_scale,
)
from vcposim.errors import InputError
from vcposim.learning.lags import Lag
from vcposim.learning.learner import Learner
from vcposim.learning.run_records import Run
from vcposim.learning.step_rules import Control
from vcposim.learning.tasks import task

BAD = np.array([np.nan, -1.0, -np.inf])
NOT_A_NORM = np.array([np.nan, np.inf, -1.0, -np.inf])

MULTIPLIERS = {
    "ess": (step_scale, np.array([np.nan, np.inf, -1.0, 0.0, 2.0])),
    "snr": (snr_scale, BAD),
    "lag": (lag_scale, BAD),
    "staleness": (lambda x: staleness_scale(x, 4.0), BAD),
    "length_signal": (lambda x: length_signal_scale(x[..., None], 3.0), NOT_A_NORM),
    "norm_clip": (lambda x: norm_scale(x, 1.0), NOT_A_NORM),
    "skip_spike": (lambda x: spike_scale(x, 1.0, 3.0), NOT_A_NORM),
    "skip_spike, unknown typical": (lambda x: spike_scale(np.ones_like(x), x, 3.0), np.array([np.nan, -1.0, -np.inf])),
    "matched_constant": (lambda x: matched_constant(x[..., None]), np.array([np.nan, np.inf, -1.0, 1.5])),
}
"""name -> (rule, what it must not understand)"""


@pytest.mark.parametrize(("rule", "bad"), MULTIPLIERS.values(), ids=MULTIPLIERS)
def test_a_multiplier_fails_closed(rule, bad):
    np.testing.assert_array_equal(rule(bad), np.zeros_like(bad))


@pytest.mark.parametrize(("rule", "bad"), MULTIPLIERS.values(), ids=MULTIPLIERS)
def test_a_multiplier_stays_in_the_unit_interval(rule, bad):
    x = np.concatenate([np.geomspace(1e-300, 1e300, 601), [0.0, np.inf]])
    with np.errstate(over="ignore"):
        scale = rule(x)
    assert (scale >= 0).all()
    assert (scale <= 1).all()
    assert scale.max() > 0


BROKEN = Seen(
    0,
    *(np.array([x]) for x in (np.nan, np.nan, np.inf, np.nan)),
    np.full((1, 3, 2), np.nan),
    np.array([np.nan]),
    np.array([[1.0, np.nan]]),
)
"""an update of which nothing is a number"""

UNINFORMED = {"none": 1.0, "constant": 0.5, "replay": 0.25}
"""what rules say that look at nothing, so find nothing wrong: there the brake in front of them must stop"""


@pytest.mark.parametrize("name", STEP_RULES)
def test_a_rule_of_the_table_that_looks_at_something_fails_closed(name):
    rule = STEP_RULES[name]
    if rule.turn is not None:
        with np.errstate(invalid="ignore"):
            nothing = rule.turn(np.array([[np.nan, 1.0]]), np.array([[1.0, 0.0]]), Control(name, value=0.5))
        np.testing.assert_array_equal(nothing, [[0.0, 0.0]])
    else:
        scale = Control(name, value=2.0 if name == "length_signal" else 0.5, schedule=(0.25,)).scale(BROKEN)
        assert scale.tolist() == [UNINFORMED.get(name, 0.0)]


@pytest.mark.parametrize("name", ["snr", "token_ess", "length_signal"])
def test_a_rule_without_what_it_needs_makes_no_step(name):
    one = np.ones(1)
    assert Control(name, value=2.0).scale(Seen(0, one, one, one, one)).tolist() == [0.0]


def test_staleness_is_the_lag_rule_from_its_full_step_on():
    lag = np.arange(40.0)
    np.testing.assert_array_equal(staleness_scale(lag, 1.0), lag_scale(lag))
    assert staleness_scale(lag, 8.0).tolist() == [min(1.0, 8.0 / x) if x else 1.0 for x in lag]


def length_signal_loop(lengths, factor, first=50, period=1.8, least=0.1):
    """As a trainer would run it, an update at a time."""
    out, surge = [], None
    for k, length in enumerate(lengths, start=1):
        usual = sum(lengths[:first]) / first
        if surge is None and k > first and length > factor * usual:
            surge = k
        scale = 1.0
        if surge is not None:
            for _ in range(int((k - surge) / (period * surge))):
                scale /= 2
        out.append(max(scale, least))
    return out


@pytest.mark.parametrize("surge", [51, 110, 400])
def test_a_length_signal_halves_the_step_after_the_surge_and_not_before(surge):
    lengths = np.where(np.arange(1, 900) < surge, 100.0, 500.0) + np.random.default_rng(0).normal(size=899)
    found = [float(length_signal_scale(lengths[:k], 3.0)) for k in range(1, 900)]
    assert found == length_signal_loop(lengths.tolist(), 3.0)
    assert set(found[: surge + int(1.8 * surge) - 1]) == {1.0}
    assert min(found) < 1.0 or surge == 400


def test_the_learner_brakes_by_tokens_and_reads_its_lengths():
    """The ESS of tokens is nearer to 1 than that of responses; lengths that never change are no signal."""
    runs = [Run("token_tis", lag=Lag(8), step_size=0.1, control=Control(c, 1.0, value=2.0)) for c in RULES]
    records = list(Learner(task("exact_match_8"), runs, groups=2, group_size=4).updates(12))
    scale = dict(zip(RULES, np.stack([r.step_scale for r in records]).T, strict=True))
    assert np.all(scale["length_signal"] == 1.0)
    assert scale["token_ess"][-4:].max() < 1.0
    assert scale["ess"][-4:].mean() < scale["token_ess"][-4:].mean()
    assert scale["staleness"].tolist() == [1.0, 1.0, 1.0, *(2.0 / min(k, 8) for k in range(3, 12))]


RULES = ("length_signal", "token_ess", "ess", "staleness")


@pytest.mark.parametrize("said", [np.nan, -0.5, np.inf, -np.inf])
def test_a_rule_that_says_no_number_makes_no_step(monkeypatch, said):
    monkeypatch.setitem(STEP_RULES, "toy", StepRule(formula="nonsense", scale=lambda seen, s: seen.norm * 0 + said))
    one = np.ones(2)
    assert Control("toy").scale(Seen(0, one, one, one, one)).tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Control("esss"), "rule: unknown name 'esss'; did you mean 'ess'"),
        (lambda: multiplier("esss", BROKEN, Control()), "step_rule: unknown name 'esss'; did you mean 'ess'"),
        (lambda: Control("replay"), "schedule: empty; replay needs the multipliers of another run"),
        (lambda: Control("replay", schedule=(1.0, float("nan"))), "schedule: nan is not a finite non-negative"),
        (lambda: Control("constant", value=-1.0), "value: -1.0 is not"),
        (
            lambda: Control("gradient_alignment"),
            r"value: 1.0 is the largest cosine of gradient_alignment; limit",
        ),
        (
            lambda: Control("skip_spike", value=0.0),
            "value: 0.0 is the factor on the typical norm of skip_spike",
        ),
        (lambda: Control("ess", reference=2.0), "reference: 2.0 is not in"),
    ],
)
def test_a_rule_refuses_its_numbers_before_any_update(make, message):
    with pytest.raises(InputError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_the_snr_of_groups_is_that_of_the_mean_over_them():
    """Unbiased: E of the estimate's numerator is ||E g||^2, by enumeration of all pairs of three equally likely g."""
    g = np.array([[1.0, 0.0], [0.0, 2.0], [3.0, 1.0]])
    pairs = g[np.indices((3, 3)).reshape(2, -1).T]
    mean = pairs.mean(1)
    noise = pairs.var(1, ddof=1).sum(-1) / 2
    assert_near(((mean**2).sum(-1) - noise).mean(), (g.mean(0) ** 2).sum(), scale=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        want = np.where(noise > 0, np.maximum((mean**2).sum(-1) - noise, 0) / noise, 0.0)
    assert_near(snr_of_groups(pairs), want, scale=0)
    assert snr_of_groups(g[:, None]).tolist() == [0.0, 0.0, 0.0]


def test_matched_constant_goes_as_far_as_the_run_it_matches():
    scales = np.random.default_rng(0).random((3, 50))
    assert_near(matched_constant(scales) * 50, scales.sum(-1), scale=0)


@pytest.mark.parametrize("variance", [0.1, 1.0, 30.0])
def test_snr_scale_minimizes_the_expected_loss_of_a_quadratic(variance):
    """f(x) = M ||x||^2 / 2: E f(x - eta g) over eta is smallest at snr / (1 + snr) / M."""
    smoothness, gradient = 2.5, np.array([0.3, -0.7, 0.2])
    power = gradient @ gradient
    eta = np.linspace(0, 1, 200_001) / smoothness
    expected_gain = eta * power - eta**2 * smoothness * (power + variance) / 2

    def gain(scale):
        return scale / smoothness * power - (scale / smoothness) ** 2 * smoothness * (power + variance) / 2

    best = expected_gain.max()
    assert gain(float(snr_scale(np.array(power / variance)))) >= best
    # the mutant sqrt(snr / (1 + snr)) is elsewhere
    assert gain(np.sqrt(power / (power + variance))) < best


def test_lag_scale_divides_by_the_lag_from_one_on():
    assert_near(lag_scale(np.array([0, 1, 2, 8])), [1, 1, 1 / 2, 1 / 8], scale=0)


def test_norm_scale_leaves_a_gradient_of_the_limit_or_less():
    norm = np.array([0.0, 0.3, 1.0, 7.0, 1e200])
    assert_near(norm_scale(norm, 1.0) * norm, [0.0, 0.3, 1.0, 1.0, 1.0], scale=0)
    assert norm_scale(np.array(0.0), 1.0) == 1.0


def test_a_spike_is_judged_by_what_is_typical():
    np.testing.assert_array_equal(
        spike_scale(np.array([5.0, 5.1, 1e9]), np.array([1.0, 1.0, np.inf]), 5.0), [1.0, 0.0, 1.0]
    )


def cosine(a, b):
    return (a * b).sum(-1) / np.sqrt((a * a).sum(-1) * (b * b).sum(-1))


@pytest.mark.parametrize("limit", [0.0, 0.3, 0.9])
def test_alignment_is_cut_to_the_limit_and_nothing_else_changes(limit):
    rng = np.random.default_rng(0)
    previous = rng.normal(size=(200, 4))
    gradient = rng.normal(size=(200, 4)) + 0.8 * previous
    turned = limit_alignment(gradient, previous, limit)
    aligned = cosine(gradient, previous) > limit
    assert 20 < aligned.sum() < 200
    assert_near(cosine(turned, previous)[aligned], limit)
    assert_near(turned[~aligned], gradient[~aligned], scale=0)
    unit = previous / np.sqrt((previous**2).sum(-1, keepdims=True))

    def across(x):
        return x - (x * unit).sum(-1, keepdims=True) * unit

    assert_near(across(turned), across(gradient))


def test_opposed_gradients_are_left_alone_and_no_previous_one_limits_nothing():
    gradient = np.array([1.0, 2.0])
    assert_near(limit_alignment(gradient, np.array([-1.0, 0.0]), 0.0), gradient, scale=0)
    np.testing.assert_array_equal(limit_alignment(gradient, np.zeros(2), 0.0), gradient)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_alignment_of_what_is_not_finite_is_no_step(bad):
    good, broken = np.array([1.0, 2.0]), np.array([bad, 1.0])
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(limit_alignment(good, broken, 0.5), [0.0, 0.0])
        np.testing.assert_array_equal(limit_alignment(broken, good, 0.5), [0.0, 0.0])


@pytest.mark.parametrize("library", ["array_api_strict", "torch"])
def test_every_library_gives_the_same_multipliers(library):
    xp = pytest.importorskip(library)
    x = np.array([0.1, 1.0, 4.0, np.nan])
    for name, (rule, _) in MULTIPLIERS.items():
        if "typical" in name:  # the same rule once more, on an array of norms of its own
            continue
        assert_near(np.asarray(rule(xp.asarray(x))), rule(x), name, scale=0)
    g, p = np.array([1.0, 2.0, 0.5]), np.array([1.0, 1.0, 0.0])
    turned = limit_alignment(xp.asarray(g), xp.asarray(p), 0.2)
    assert_near(np.asarray(turned), limit_alignment(g, p, 0.2), scale=0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: norm_scale(np.array(1.0), 0.0), "limit: 0.0 is not a finite positive number"),
        (lambda: norm_scale(np.array(1.0), float("inf")), "limit: inf is not a finite positive number"),
        (lambda: spike_scale(np.array(1.0), np.array(1.0), float("nan")), "factor: nan is not"),
        (lambda: limit_alignment(np.ones(2), np.ones(2), 1.0), r"limit: 1.0 is not in \[0, 1\); it is a cosine"),
        (lambda: limit_alignment(np.ones(2), np.ones(2), -0.1), "limit: -0.1 is not"),
    ],
)
def test_a_wrong_setting_is_refused_in_one_line(make, message):
    with pytest.raises(InputError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)
