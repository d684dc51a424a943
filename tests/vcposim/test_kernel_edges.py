"""What mutation testing found untested (tests/README.md): refusals of each limit, values on a boundary, odd layouts."""

import math
import re
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from tests.kit.statistical import as_numpy, assert_near
from tests.kit.strategies import exact
from vcposim import baselines
from vcposim.arrays import LINEAR, LOG, namespace
from vcposim.baselines import (
    BASELINES,
    LENGTH,
    OPOB,
    PLAIN,
    RELEASED,
    SCORE,
    Evidence,
    Monomial,
    leave_one_out,
    mean,
    mean_given_reward,
    optimal_token_baseline,
    weighted_quantile,
)
from vcposim.batch import Batch, DenseScores, ScoreNorms
from vcposim.control import (
    Seen,
    ess_rule,
    length_signal_scale,
    limit_alignment,
    matched_constant,
    scheduled,
    snr_of_groups,
    spike_scale,
    staleness_scale,
    step_scale,
)
from vcposim.diagnostics import Diagnostic, ess_fraction, weight_sums
from vcposim.errors import InputError
from vcposim.estimators import Estimator, FunctionEstimator, estimator_of, of_trajectories, told, whiten
from vcposim.learning.step_rules import Control
from vcposim.moments import SCALARS, Sums, descent_efficiency, moments, trace_covariance
from vcposim.second_moment import (
    SecondMomentClip,
    SecondMomentMask,
    SecondMomentMaskAnySign,
    cap_of_mean,
    harmful,
    pooled,
    real,
)
from vcposim.surrogates import (
    Clip,
    DecoupledClip,
    DivergenceDamping,
    DivergenceMask,
    GammaShape,
    GaussianTrust,
    GeometricMeanClip,
    LoglinearAnchor,
    NegativeSequenceMask,
    ProbabilityBand,
    Product,
    ProductOfTruncated,
    QuadraticPull,
    Reject,
    SigmoidGate,
    SignedTruncation,
    TaperNegatives,
    Tempered,
    TotalVariationFilter,
    probabilities,
)
from vcposim.weights import Weighting, mixture_log_ratio, no_correction

INF, NAN = math.inf, math.nan

LIMITS: list[tuple[Callable[..., Any], dict[str, Any], list[str]]] = [
    (Clip, {}, ["low", "high"]),
    (DecoupledClip, {}, ["low", "high"]),
    (GeometricMeanClip, {}, ["low", "high"]),
    (TaperNegatives, {}, ["floor", "cap"]),
    (NegativeSequenceMask, {}, ["delta"]),
    (Reject, {"cap": 2.0}, ["floor", "cap"]),
    (ProductOfTruncated, {}, ["cap"]),
    (DivergenceMask, {}, ["low", "high", "cap"]),
    (SecondMomentMask, {}, ["budget"]),
    (SecondMomentMaskAnySign, {}, ["budget"]),
    (SecondMomentClip, {}, ["budget"]),
    (LoglinearAnchor, {"lag": 4.0}, ["low", "high"]),
    (Tempered, {}, ["exponent", "cap"]),
    (TotalVariationFilter, {"limit": 0.1}, ["limit", "cap"]),
    (SigmoidGate, {}, ["positive", "negative"]),
    (ProbabilityBand, {}, ["limit", "pull"]),
    (QuadraticPull, {}, ["tau"]),
]


@pytest.mark.parametrize(
    ("make", "given", "name"), [(make, given, name) for make, given, names in LIMITS for name in names]
)
def test_each_limit_of_a_surrogate_is_checked_by_its_name(make: Any, given: dict[str, Any], name: str):
    for bad in (-1.0, NAN):
        with pytest.raises(InputError, match=rf"^{name}: {bad} is not a non-negative number$"):
            make(**{**given, name: bad})
    make(**{**given, name: 0.0})


@pytest.mark.parametrize(
    "refused",
    [
        lambda: Clip(dual=1.0),
        lambda: GaussianTrust(0.0),
        lambda: GaussianTrust(INF),
        lambda: GammaShape(positive=(0.0, 1.0)),
        lambda: GammaShape(positive=(INF, 1.0)),
        lambda: GammaShape(negative=(1.0, INF)),
        lambda: GammaShape(negative=(1.0, -1.0)),
        lambda: Estimator(epsilon=INF),
        lambda: Estimator(reference_penalty=INF),
        lambda: Estimator(baseline_shift=INF),
        lambda: Estimator(baseline_shift=-INF),
        lambda: Estimator(baseline=INF),
        lambda: Estimator(baseline=-INF),
        lambda: Weighting("clip", cap=0.0),
        lambda: Weighting("truncate", cap=INF),
        lambda: Weighting("mask", cap=2.0, floor=-1.0),
        lambda: Weighting("importance", floor=0.5),
        lambda: DivergenceDamping(INF),
        lambda: SignedTruncation(positive=(-0.1, 1.0)),
        lambda: SignedTruncation(negative=(1.1, 1.0)),
        lambda: SignedTruncation(negative=(1.0, -0.1)),
        lambda: Monomial(weight=3, score=2),
        lambda: Monomial(score=1),
        lambda: Monomial(ratio=-2),
        lambda: Monomial(length=2),
        lambda: Monomial(weight=2),
        lambda: length_signal_scale(np.ones(3), 1.0),
        lambda: length_signal_scale(np.ones(3), INF),
    ],
)
def test_limits_out_of_range_are_refused(refused: Callable[[], Any]):
    with pytest.raises(InputError):
        refused()


def test_limits_on_the_edge_of_their_range_are_taken():
    Clip(dual=1.5)
    GaussianTrust(1e-3)
    GammaShape(positive=(0.5, 0.0), negative=(0.5, 0.5))
    Weighting("mask", cap=2.0, floor=0.0)
    Weighting("mask", cap=2.0, floor=2.0)
    LoglinearAnchor(1.0)
    SignedTruncation(positive=(0.0, 0.0), negative=(1.0, 0.5))
    Clip(level="geometric", times_length=True)
    Monomial()
    Monomial(weight=2, score=2)
    Monomial(score=2, length=1)
    length_signal_scale(np.ones(3), 1.5)


NEED_LOGARITHMS = [
    DecoupledClip(),
    GeometricMeanClip(),
    DivergenceMask(),
    GaussianTrust(),
    GammaShape(),
    SecondMomentMask(),
    SecondMomentMaskAnySign(),
    SecondMomentClip(),
    LoglinearAnchor(4.0),
    Tempered(),
    TotalVariationFilter(0.1),
    SigmoidGate(),
    ProbabilityBand(),
    DivergenceDamping(),
]


@pytest.mark.parametrize("surrogate", NEED_LOGARITHMS, ids=lambda s: type(s).__name__)
def test_what_needs_logarithms_says_so_by_its_name(surrogate: Any):
    one = exact([[1], [1]])
    batch = Batch(reward=exact([1, 0]), ratio=one, log_prob=one, anchor_log_ratio=one)
    with pytest.raises(
        InputError, match=f"^ratio: {type(surrogate).__name__} needs logarithms; pass log_ratio instead$"
    ):
        surrogate(batch, exact([1, 0]))


@pytest.mark.parametrize("surrogate", [ProbabilityBand(), QuadraticPull(), QuadraticPull(level="token")])
def test_a_penalty_needs_logarithms_and_says_so_by_its_name(surrogate: Any):
    batch = Batch(reward=exact([1, 0]), ratio=exact([[1], [1]]), log_prob=exact([[1], [1]]))
    with pytest.raises(InputError, match=f"^ratio: {type(surrogate).__name__} needs logarithms"):
        surrogate.penalty(batch, exact([1, 0]))


def test_shapes_are_refused_by_the_field_they_came_in():
    with pytest.raises(InputError, match=r"^ratio: shape \(3,\) is neither \(2,\) nor \(2,\) \+ \(t,\)$"):
        Batch(reward=exact([1, 0]), ratio=exact([1, 1, 1]))


def test_norms_need_no_mask():
    batch = two(log_ratio=np.zeros((2, 3)), token_mask=np.ones((2, 3)), scores=ScoreNorms(np.ones(2)))
    assert batch.scored() is batch.scores


SAYS = {
    "scores: only norms are known, this needs the scores; pass DenseScores or leave it out": lambda: ScoreNorms(
        np.ones(2)
    ).combine(np.ones(2)),
    "scores: only trajectory norms are known; token-level weights need per-token scores": lambda: ScoreNorms(
        np.ones(2)
    ).sq_norm(np.ones((2, 1))),
    "length: this needs the number of tokens of each trajectory; pass length": lambda: two().token_length(),
    "scores: this needs score norms; pass DenseScores(score) or ScoreNorms(score_sq_norm)": lambda: two().scored(),
    "log_ratio: give exactly one of log_ratio (floats) and ratio (exact arithmetic)": lambda: Batch(reward=np.ones(2)),
    "baseline: 'population' is an oracle; it needs a problem with exact moments": lambda: Estimator(
        baseline="population"
    ).coefficients(two()),
    "level: 'token' needs log-ratios of shape (..., n, t); this batch has one per trajectory": lambda: Weighting(
        "importance", "token"
    )(two()),
    "weight: 2 axes for scores of 2; token-level weights need per-token scores (..., n, t, p) and per_token=True": (
        lambda: DenseScores(np.ones((2, 1))).combine(np.ones((2, 1)))
    ),
    "unit: give the mass of one draw along with measure (1/n for draws, 0 for a population)": lambda: two(
        measure=np.full(2, 0.5)
    ),
    "log_prob: this needs log pi of every token; pass log_prob of shape (..., n, t)": lambda: two().given("log_prob"),
    "log_weight: a group has no weight at all (all -inf or masked); drop it, or check the ratios": lambda: ess_fraction(
        np.full(2, -INF)
    ),
}


@pytest.mark.parametrize("says", SAYS)
def test_messages_are_these_words(says: str):
    with pytest.raises(InputError, match=f"^{re.escape(says)}$"):
        SAYS[says]()


def two(**changes: Any) -> Batch:
    return Batch(**{"reward": np.array([1.0, 0.0]), "log_ratio": np.zeros(2), **changes})


class Ring:
    """Array-like whose namespace is its own, as that of the proofs' symbols is."""

    shape = (1,)

    def __init__(self, name: str) -> None:
        self.own = ModuleType(name)

    def __array_namespace__(self, api_version: str | None = None) -> Any:
        return self.own


def test_arrays_of_one_type_may_have_different_namespaces():
    for x in (Ring("one"), Ring("other")):
        assert namespace(x) is namespace(1.0, x) is x.own


def test_arrays_of_two_libraries_are_refused():
    with pytest.raises(TypeError, match="Multiple namespaces"):
        namespace(Ring("one"), np.ones(1))


# ------------------------------------------------------------------------------------------------- on the boundary


def test_a_ratio_on_its_limit_is_inside():
    batch = Batch(reward=exact([1] * 4), ratio=exact([8, "1/8", 9, "1/9"]))
    assert Reject(8, Fraction(1, 8))(batch, exact([1] * 4)).tolist() == [1, 1, 0, 0]
    batch = Batch(reward=exact([1] * 4), ratio=exact(["6/5", "4/5", "7/5", "3/5"]))
    clip = Clip(Fraction(1, 5), Fraction(1, 5), level="sequence")
    assert clip(batch, exact([1] * 4)).tolist() == [Fraction(6, 5), Fraction(4, 5), 0, Fraction(3, 5)]
    assert clip(batch, exact([-1] * 4)).tolist() == [Fraction(6, 5), Fraction(4, 5), Fraction(7, 5), 0]


def test_dual_clip_is_for_negative_advantages_only():
    batch = Batch(reward=exact([1] * 3), ratio=exact([3, 3, 2]))
    factor = Clip(10, 10, dual=2, level="sequence")(batch, exact(["1/2", "-1/2", "-1/2"]))
    assert factor.tolist() == [3, 0, 2]


def test_no_drift_at_all_is_not_masked():
    assert NegativeSequenceMask(0.0)(two(length=np.ones(2)), np.array([-1.0, -1.0])).tolist() == [1, 1]


def test_quantiles_are_lower_ones():
    reward, one = np.array([0.0, 1.0]), np.ones(2)
    assert weighted_quantile(reward, one, one / 2, 0.5).tolist() == [0]
    assert weighted_quantile(np.array([0.0, 1.0, 5.0]), np.ones(3), np.ones(3) / 3, 0.5).tolist() == [1]
    # reward -1 has no weight, so it is no quantile, though nothing of the mass is needed below it
    assert weighted_quantile(np.array([-1.0, 0.0, 1.0]), np.array([0.0, 1, 1]), np.ones(3) / 3, 0.0).tolist() == [0]
    assert weighted_quantile(reward, one * 0, one / 2, 0.5).tolist() == [0.5]


def test_an_outcome_drawn_twice_counts_twice():
    reward, weight = np.array([0.0, 1.0, 2.0]), np.array([1.0, 3.0, 2.0])
    counts, order = np.array([3, 1, 1]), [0, 0, 0, 1, 2]
    for q in (0.05, 0.3, 0.5, 0.7, 0.95):
        want = weighted_quantile(reward[order], weight[order], np.ones(5) / 5, q)
        assert weighted_quantile(reward, weight, counts / 5, q).tolist() == want.tolist()
    token = np.stack([weight, weight[::-1]], axis=-1)
    want = optimal_token_baseline(reward[order], token[order], np.ones(5) / 5)
    assert_near(optimal_token_baseline(reward, token, counts / 5), want)


def test_a_position_without_weight_has_the_mean_for_its_baseline():
    weight = np.array([[1.0, 0.0], [3.0, 0.0]])
    assert optimal_token_baseline(np.array([0.0, 1.0]), weight, np.ones(2) / 2).tolist() == [[0.75, 0.5]]


def test_a_token_without_drift_counts_in_the_second_moment():
    assert cap_of_mean(np.array([0.0, 1.0]), np.array([True, True]), 0.25).tolist() == [0.5]
    x, a = np.array([1.0, -1.0, 0.0, 1.0, -1.0, 1.0, -1.0, 0.0]), np.array([1.0, 1.0, 1.0, -1.0, -1.0, 0.0, 0.0, -1.0])
    assert harmful(x, a).tolist() == [True, False, False, False, True, False, False, False]


def test_a_probability_of_one_is_far_but_no_nan():
    batch = two(log_ratio=np.full((2, 1), 0.5), log_prob=np.zeros((2, 1)))
    keep = DivergenceMask("binary_kl", high=100.0)(batch, np.ones(2))
    assert_near(keep, math.exp(0.5))


def test_a_divergence_on_its_limit_is_kept():
    log_prob, moved = np.log([[0.5], [0.25]]), np.log([[2.0], [0.5]])
    batch, a = two(log_ratio=moved, log_prob=log_prob), np.array([1.0, -1.0])
    pi, mu = np.exp(log_prob), np.exp(log_prob - moved)
    up, down = (pi - mu)[0, 0], (mu - pi)[1, 0]
    assert np.all(DivergenceMask("binary_tv", low=down, high=up)(batch, a) > 0)
    far = (1 - mu) * np.log((1 - mu + 1e-8) / (1 - pi + 1e-8)) - mu * moved
    assert np.all(DivergenceMask("binary_kl", low=far[1, 0], high=far[0, 0])(batch, a) > 0)
    assert np.all(DivergenceMask("binary_kl", low=far[1, 0] / 2, high=far[0, 0] / 2)(batch, a) == 0)


def test_a_token_on_the_cap_of_the_second_moment_is_kept():
    batch = two(log_ratio=np.array([[0.5], [-0.5]]))
    assert np.all(SecondMomentClip(0.25)(batch, np.array([1.0, -1.0])) > 0)


def test_step_rules_on_the_edge_of_what_they_take():
    assert matched_constant(np.array([1.0, 0.5])) == 0.75
    assert step_scale(np.array(1 + 1e-3)) == 1
    assert spike_scale(np.array([0.0, 0.5, INF]), np.array([1.0, 1.0, INF]), 2.0).tolist() == [1, 1, 0]
    with np.errstate(invalid="ignore"):
        turned = limit_alignment(np.array([[3.0, 1.0], [INF, 1.0]]), np.array([[2.0, 0.0], [2.0, 0.0]]), 0.0)
    assert turned.tolist() == [[0, 1], [0, 0]]
    with np.errstate(over="ignore"):  # each number is finite, their size is not
        assert limit_alignment(np.full(2, 1e308), np.zeros(2), 0.5).tolist() == [0, 0]


# --------------------------------------------------------------------------------------------------------- formulas


def test_equal_rewards_have_no_advantage_at_all():
    c = Estimator(Weighting("none"), "group_mean", "group_std").coefficients(
        Batch(reward=np.full(3, 0.1), log_ratio=np.zeros(3))
    )
    assert c.tolist() == [0, 0, 0]


def test_token_weights_reach_the_mean_score():
    rng = np.random.default_rng(3)
    scores = DenseScores(rng.normal(size=(3, 2, 4)), per_token=True)
    batch = Batch(reward=np.arange(3.0), log_ratio=rng.normal(size=(3, 2)), scores=scores)
    ones = Batch(reward=np.arange(3.0), log_ratio=np.zeros((3, 2)), scores=scores)
    token = Estimator(Weighting("truncate", "token", cap=2.0), "opob_truncated")
    assert np.isfinite(token.coefficients(batch)).all()
    whole = Estimator(Weighting("none"), "opob_truncated").coefficients(ones)
    assert_near(token.coefficients(ones), np.stack([whole, whole], axis=-1))


def test_the_width_of_a_gaussian_gate():
    factor = GaussianTrust(2.0)(two(log_ratio=np.array([[1.0], [-2.0]])), np.ones(2))
    assert_near(factor[:, 0], [math.exp(1 - 1 / 8), math.exp(-2 - 1 / 2)])


@pytest.mark.parametrize("surrogate", [Clip(level="geometric"), GeometricMeanClip()])
def test_a_trajectory_without_tokens_has_no_coefficient(surrogate: Any):
    mask = np.array([[1.0, 1.0], [0.0, 0.0]])
    batch = two(reward=np.array([1.0, 2.0]), log_ratio=np.zeros((2, 2)), token_mask=mask)
    factor = surrogate(batch, np.ones(2))
    assert np.all(factor[1] == 0)
    assert np.all(factor[0] != 0)


def test_tokens_are_counted_whatever_the_reward():
    batch = two(reward=np.array([3.0, 5.0]), log_ratio=np.zeros((2, 4)))
    assert batch.token_length().tolist() == [4, 4]


@pytest.mark.parametrize("normalizer", ["length", "group_std_length"])
def test_no_advantage_is_divided_by_a_length_of_zero(normalizer: str):
    batch = two(reward=np.array([2.0, 3.0]), length=np.array([2.0, 0.0]))
    c = Estimator(Weighting("none"), 0.0, normalizer).coefficients(batch)
    assert c[1] == 0
    assert c[0] > 0


def test_the_weight_of_no_correction_is_one_however_it_is_written():
    assert no_correction(np.array([3.0, 5.0]), LINEAR).tolist() == [1, 1]
    assert no_correction(np.array([3.0, 5.0]), LOG).tolist() == [0, 0]  # logarithms


def test_weights_of_exact_tokens_are_their_own_stand_in():
    weight = Weighting("truncate", "token", cap=2)(Batch(reward=exact([1, 0]), ratio=exact([[3, 1], [1, "1/2"]])))
    assert weight.value.tolist() == [[2, 1], [1, Fraction(1, 2)]]
    assert weight.relative.tolist() == weight.value.tolist()


def test_a_number_is_the_baseline_of_every_sample():
    batch = Batch(reward=np.array([1.0, 0.0, 3.0]), log_ratio=np.zeros(3))
    assert Estimator(Weighting("none"), 0.5).coefficients(batch).tolist() == [0.5, -0.5, 2.5]


def test_the_unit_that_was_given_stays():
    assert two(unit=np.array([0.25])).unit.tolist() == [0.25]
    assert two().unit.tolist() == [0.5]


@pytest.mark.parametrize(
    "surrogate",
    [
        Clip(high=INF, level="sequence"), Clip(high=INF), GeometricMeanClip(high=INF), TaperNegatives(cap=9.0),
        ProductOfTruncated(cap=9.0), DecoupledClip(), DivergenceMask(), GaussianTrust(), GammaShape(),
    ],
    ids=lambda s: f"{type(s).__name__} {getattr(s, 'level', '')}",
)  # fmt: skip
def test_samples_of_measure_zero_have_no_factor(surrogate: Any):
    """Whatever stands in their place."""
    x, zero = np.array([[0.1, 0.2], [0.3, 0.1]]), np.zeros((2, 2))
    batch = two(
        log_ratio=x, log_prob=zero - 1, anchor_log_ratio=zero, measure=np.array([1.0, 0.0]), unit=np.array([1.0])
    )
    factor = surrogate(batch, np.array([-1.0, -1.0]))
    assert np.all(factor[1] == 0)
    assert np.all(factor[0] > 0)


def test_a_sample_of_measure_zero_does_not_set_the_scale_of_ratios():
    scores, reward = ScoreNorms(np.ones(3)), np.array([1.0, 0.0, 5.0])
    measure = np.array([0.5, 0.5, 0.0])
    batch = Batch(reward=reward, log_ratio=np.array([0.5, 0.0, 900.0]), measure=measure, unit=0.5, scores=scores)
    alone = Batch(reward=reward[:2], log_ratio=batch.log_ratio[:2], scores=ScoreNorms(np.ones(2)))
    released = Estimator(Weighting("truncate", cap=8.0), "opob_released")
    assert_near(released.coefficients(batch)[:2], released.coefficients(alone))


def test_nothing_over_nothing_is_no_weight():
    assert LINEAR.over(np.array([0.0, 1.0]), np.array([0.0, 2.0])).tolist() == [0, 0.5]


def test_roots_of_plain_numbers():
    x, degree = np.array([4.0, 8.0, 5.0, 7.0]), np.array([2.0, 3.0, 1.0, 0.0])
    assert_near(LINEAR.root(x, degree), [2, 2, 5, 1])  # without tokens the ratio is 1


def test_ess_is_at_most_one():
    found = [float(ess_fraction(np.full(n, x))) for n in range(1, 60) for x in (0.1, -0.3, 1.7)]
    assert max(found) <= 1


def test_a_variance_is_never_negative():
    """0.1 thrice: E||x||^2 - ||E x||^2 rounds below zero."""
    x = np.array([0.1])
    sums = Sums(np.array(3.0), 3 * x, np.array(3 * 0.1 * 0.1 * (1 - 1e-15)), np.array(3 * 0.1 * 0.1 * (1 - 1e-15)))
    found = moments(sums, x, drawn=False)
    assert found.variance_of_mean == found.variance_per_sample == 0


def test_epsilon_is_added_to_the_spread():
    x = np.array([[0.0, 2.0]])
    assert whiten(x, np.full((1, 2), 0.5), 0.5).tolist() == [[-1 / 1.5, 1 / 1.5]]


def test_equal_rewards_are_white_already():
    x = np.full((2, 3), 0.1)
    assert whiten(x, np.full((2, 3), 1 / 6), 0.0).tolist() == (x * 0).tolist()


def test_padding_does_not_decide_what_is_flat():
    x = np.array([[1e-3, -1e-3, 1e30]])
    assert np.abs(whiten(x, np.array([[0.5, 0.5, 0.0]]), 0.0)[0, :2]).tolist() == [1, 1]
    x[0, 2] = 0
    assert np.abs(whiten(1e-20 * x, np.array([[0.5, 0.5, 0.0]]), 0.0)[0, :2]).tolist() == [1, 1]


# ----------------------------------------------------------------------------------------------- made anew, by hand


def heavy() -> Batch:
    """Two prompts of three responses, no two numbers alike, and one of no measure whose weight is the largest."""
    return Batch(
        reward=np.array([[1.0, 0.0, 3.0], [2.0, 5.0, -1.0]]),
        log_ratio=np.log([[2.0, 0.5, 1.5], [0.25, 9.0, 3.0]]),
        length=np.array([[1.0, 2.0, 4.0], [3.0, 1.0, 2.0]]),
        measure=np.array([[0.2, 0.3, 0.5], [0.5, 0.0, 0.5]]),
        unit=0.1,
        scores=ScoreNorms(np.array([[4.0, 1.0, 9.0], [2.0, 3.0, 5.0]])),
        grouped=True,
    )


WEIGHTS = {
    "group_mean": (PLAIN, lambda w, s, length: 1.0),
    "length_weighted": (LENGTH, lambda w, s, length: length),
    "on_policy_optimal": (SCORE, lambda w, s, length: s),
    "opob": (OPOB, lambda w, s, length: w * w * s),
    "opob_released": (RELEASED, lambda w, s, length: w**4 * s),
}


@pytest.mark.parametrize(("name", "weight", "by_hand"), [(name, *x) for name, x in WEIGHTS.items()])
def test_means_and_means_of_others_made_anew_are_those_of_the_table(name: str, weight: Monomial, by_hand: Any):
    batch = heavy()
    e = Evidence(batch, Weighting("importance")(batch))
    made, others = mean(weight), leave_one_out(weight)
    w, n2, length = np.exp(batch.log_ratio), batch.scored().sq_norm(np.ones((2, 3))), batch.length
    for g in range(2):
        m, r = batch.measure[g], batch.reward[g]
        a = np.array([by_hand(w[g, i] * (m[i] > 0), n2[g, i], length[g, i]) for i in range(3)])
        assert_near(made(e)[g], [np.sum(m * a * r) / np.sum(m * a)])
        rest = [m - 0.1 * (np.arange(3) == i) for i in range(3)]
        assert_near(others(e)[g], [np.sum(x * a * r) / np.sum(x * a) for x in rest])
    assert (made.weight, made.needs, made.per, made.needs_two, made.independent) == (
        weight, weight.needs, "group", False, False,
    )  # fmt: skip
    assert (others.weight, others.needs, others.per, others.needs_two, others.independent) == (
        weight, weight.needs, "sample", True, True,
    )  # fmt: skip
    for twin in (made, others):
        held = BASELINES.get({id(made): name, id(others): OF_OTHERS.get(name, "")}[id(twin)])
        assert held is None or replace(twin, value=held.value) == held


OF_OTHERS = {"group_mean": "leave_one_out", "opob": "opob_leave_one_out"}


def test_logarithms_of_weights_start_from_nothing():
    assert PLAIN.log() == 0
    assert OPOB.log(1.0, 3.0) == 8
    assert RELEASED.log(1.0, 3.0, 5.0) == 18
    assert LENGTH.log(log_length=7.0) == 7


def test_weights_of_a_batch_are_free_of_overflow_and_blind_where_there_is_no_measure():
    batch = heavy()
    w, n2 = np.exp(batch.log_ratio), batch.scored().sq_norm(np.ones((2, 3)))
    counted = np.where(batch.measure > 0, w, 0)
    want = (counted / counted.max()) ** 2 * n2  # one factor for both prompts, not one each
    assert_near(Evidence(batch, Weighting("importance")(batch)).batch_sq_norm(), want)
    apart = Batch(
        reward=np.stack([batch.reward] * 2),
        log_ratio=np.stack([batch.log_ratio, batch.log_ratio + 1]),
        measure=np.stack([batch.measure] * 2),
        unit=0.1,
        scores=ScoreNorms(np.stack([n2, n2])),
        grouped=True,
    )
    assert_near(Evidence(apart, Weighting("importance")(apart)).batch_sq_norm(), [want, want])
    ratios = replace(batch, log_ratio=None, ratio=w)  # on this scale what has no measure keeps its ratio
    assert_near(Evidence(ratios, Weighting("importance")(ratios)).batch_sq_norm(), want)
    nothing = replace(batch, log_ratio=batch.log_ratio - INF)
    assert Evidence(nothing, Weighting("importance")(nothing)).batch_sq_norm().tolist() == [[0.0] * 3] * 2


def test_means_given_the_reward():
    reward = np.array([[0.0, 1.0], [1.0, 2.0], [5.0, 5.0]])
    x = np.array([[3.0, 1.0], [7.0, 4.0], [2.0, 2.0]])
    measure = np.array([[0.5, 0.25], [0.75, 0.25], [0.0, 0.0]])
    want = [[3.0, 5.5], [5.5, 4.0], [0.0, 0.0]]
    assert mean_given_reward(x, reward, measure).tolist() == want
    again = mean_given_reward(np.stack([x, 2 * x]), np.stack([reward] * 2), np.stack([measure] * 2))
    assert again.tolist() == [want, (2 * np.array(want)).tolist()]


@pytest.mark.parametrize("library", ["numpy", "array_api_strict", "torch"])
def test_means_given_the_reward_one_by_one_are_those_by_pairs(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    x, reward = rng.gamma(0.3, size=(40, 8)), rng.integers(0, 5, (40, 8)) / 4
    measure = rng.dirichlet(np.ones(8), 40)
    measure[reward == 0.75] = 0.0  # a level that no sample counts for
    reward[0], measure[0, 3] = rng.normal(size=8), 0.0  # rewards of one sample each, one of which does not count
    reward[1, :2] = 99  # of two
    x, reward, measure = (np.stack([y, y[::-1]]) for y in (x, reward, measure))  # two batches
    reward[1] += 10  # no reward in both
    pairs = mean_given_reward(x, reward, measure)
    monkeypatch.setattr(baselines, "MOST_PAIRED", 0)
    asarray = pytest.importorskip(library).asarray
    found = mean_given_reward(*(asarray(y.copy()) for y in (x, reward, measure)))
    assert_near(as_numpy(found), pairs)


def test_what_has_no_twin_without_a_sample_says_so():
    with pytest.raises(InputError, match=r"^baseline: it is no weighted mean, so it has no value without a sample$"):
        BASELINES["group_median"].held_out(None)  # type: ignore[arg-type]


def test_a_batch_is_asked_for_what_is_needed_and_for_nothing_else():
    whole = Batch(reward=np.ones(2), log_ratio=np.zeros((2, 3)), scores=ScoreNorms(np.ones(2)))
    for need in ("tokens", "length", "scores"):
        whole.require(need)
    bare = two()
    said = "tokens: this needs log-ratios of shape (..., n, t); this batch has one per trajectory"
    for need, words in (
        ("tokens", said),
        ("length", "length: this needs the number of tokens"),
        ("scores", "scores: this needs score norms"),
        ("log_prob", "log_prob: "),
        ("grouped", "grouped: "),
    ):
        with pytest.raises(InputError, match="^" + re.escape(words)):
            bare.require(need)


# ------------------------------------------------------------------------------------------------------ step rules


def seen(step: int = 0, rho: float = 0.25) -> Seen:
    one = np.ones(1)
    return Seen(step=step, ess_fraction=one * rho, lag=one, norm=one, typical_norm=one)


def test_an_exponent_of_the_rule_stands_and_that_of_the_settings_serves_where_there_is_none():
    settings = Control("ess", exponent=1.0, reference=0.5)
    assert ess_rule()(seen(), settings).tolist() == [0.5]
    assert ess_rule(2.0)(seen(), settings).tolist() == [0.25]
    assert ess_rule(0.0)(seen(), settings).tolist() == [1.0]


def test_the_last_entry_of_a_schedule_stays():
    settings = Control("replay", schedule=(0.5, 0.25, 0.125))
    assert [scheduled(seen(step), settings).tolist() for step in (0, 1, 2, 3, 9)] == [[0.5], [0.25]] + [[0.125]] * 3
    none = seen()._replace(norm=np.ones(0))
    assert scheduled(none, settings).tolist() == []


def test_steps_after_a_surge_of_length():
    calm = [1.0] * 50

    def scale(*lengths: float, factor: float = 3.0) -> float:
        return float(length_signal_scale(np.array([*calm, *lengths]), factor))

    assert scale(3.0, *[1.0] * 92) == 1  # as long is not longer
    assert [scale(3.5, *[1.0] * k) for k in (0, 91, 92)] == [1.0, 1.0, 0.5]  # T = 51, a period of 91.8 updates
    assert scale(*[1.0] * 49, 3.5, *[1.0] * 179) == 1  # T = 100: the surge is where it was, not where counting began
    assert scale(*[1.0] * 49, 3.5, *[1.0] * 180) == 0.5
    assert scale(3.5, *[1.0] * 400) == 0.1  # 1/16 is below the least
    assert scale(INF) == scale(NAN) == scale(-1.0) == 0
    assert scale(NAN, 3.5, 1.0) == 1
    assert float(length_signal_scale(np.array([*[1.0] * 49, 9.0, 3.6, *[1.0] * 90]), 3.0)) == 1  # update 50 is early
    assert float(length_signal_scale(np.array([*[NAN] * 48, 2.0, 0.0, 3.5, *[1.0] * 92]), 3.0)) == 0.5  # usual: 1
    assert float(length_signal_scale(np.array([*[NAN] * 50, 9.0, *[1.0] * 99]), 3.0)) == 1  # nothing to compare with
    assert float(length_signal_scale(np.array([1.0, 4.0, 1.0]), 3.0, first=1, period=0.5)) == 0.5
    assert float(length_signal_scale(np.ones(9), 3.0, first=1, period=0.5)) == 1  # no surge
    some = np.array([[*calm, 3.5, *[1.0] * 92], [*[NAN] * 50, 3.5, *[1.0] * 92]])
    assert length_signal_scale(some, 3.0).tolist() == [0.5, 1.0]
    both = np.array([[*calm, 3.5, *[1.0] * 92], [*calm, *[1.0] * 93]])
    assert length_signal_scale(both, 3.0).tolist() == [0.5, 1.0]
    with pytest.raises(
        InputError, match=r"^factor: 1\.0 is not above 1; a surge is longer than what it is compared with$"
    ):
        scale(factor=1.0)


def test_the_limit_of_a_staleness_rule_is_named():
    with pytest.raises(InputError, match=r"^full: 0\.0 is not a finite positive number$"):
        staleness_scale(np.ones(1), 0.0)


def test_signal_to_noise_of_groups():
    gradient = np.array(
        [[[1.0, 0.0, 2.0], [3.0, 4.0, 2.0]], [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]], [[0.0] * 3, [0.2] * 3]]
    )
    # noise of the mean (1 + 4 + 0), signal 4 + 4 + 4 less that; then no noise at all; then 0.03 and 0
    assert_near(snr_of_groups(gradient), [7 / 5, 0.0, 0.0])
    small = np.array([[[0.3], [0.5]]])
    assert_near(snr_of_groups(small), [(0.16 - 0.01) / 0.01])
    assert snr_of_groups(np.ones((2, 1, 1))).tolist() == [0.0, 0.0]


def test_records_of_a_diagnostic_and_of_moments():
    row = Diagnostic("k-hat", 0.9, 0.7, high_is_bad=True, required=25, meaning="heavy").records()
    want = {
        "diagnostic": "k-hat",
        "value": 0.9,
        "limit": "< 0.7",
        "alarming": True,
        "required": 25.0,
        "meaning": "heavy",
    }
    assert list(row) == [want]
    assert Diagnostic("ESS", 0.9, 0.3, high_is_bad=False).records()[0]["limit"] == "> 0.3"
    x = np.array([0.25])
    found = moments(Sums(np.array(2.0), 3 * x, np.array(1.0), np.array(2.0)), x, drawn=False)
    assert {name: found.records()[0][name] for name in SCALARS} == {
        name: float(getattr(found, name)) for name in SCALARS
    }


# -------------------------------------------------------------------------------------------------- on a boundary


def test_on_the_limit_of_a_filter_and_of_a_band():
    ratio = np.array([[2.0, 1.0], [1.0, 1.0]])
    batch = two(log_ratio=np.log(ratio), log_prob=np.log([[0.5, 0.5], [0.5, 0.5]]))
    up = np.array([1.0, 1.0])
    assert TotalVariationFilter(0.5)(batch, up).tolist() == [[2.0, 1.0], [1.0, 1.0]]  # its mean is the limit itself
    assert TotalVariationFilter(0.49)(batch, up).tolist() == [
        [0.0, 1.0],
        [1.0, 1.0],
    ]  # where log r = 0 nothing is harmed
    assert ProbabilityBand(0.25)(batch, up).tolist() == ratio.tolist()
    assert ProbabilityBand(0.2)(batch, up)[0].tolist() == [0.0, 1.0]
    far = two(log_ratio=np.array([[10.5, 0.0], [-10.5, 0.0]]))
    limit = math.expm1(10) / 2
    assert TotalVariationFilter(limit * (1 + 1e-9))(far, up)[0, 0] == 2  # held at 10
    assert TotalVariationFilter((1 - math.exp(-10)) / 2)(far, -up)[1, 0] > 0


def test_on_an_advantage_of_zero():
    batch = two(log_ratio=np.log([[20.0], [20.0]]), log_prob=np.log([[0.5], [0.5]]))
    zero = np.zeros(2)
    assert_near(SignedTruncation()(batch, zero), np.full((2, 1), 11.0))
    gate = SigmoidGate(positive=0.1, negative=0.2)
    assert_near(gate(batch, zero), gate(batch, -np.ones(2)))
    assert_near(gate(batch, np.ones(2))[0, 0], 20 / math.cosh(0.1 * 19 / 2) ** 2)
    assert_near(DivergenceDamping()(batch, zero), DivergenceDamping()(batch, np.ones(2)))


@pytest.mark.parametrize("lag", [0.5, INF, NAN])
def test_an_anchor_needs_a_lag(lag: float):
    with pytest.raises(InputError, match=rf"^lag: {lag} is not a finite number of updates of at least 1; on policy"):
        LoglinearAnchor(lag)


def test_a_penalty_is_added():
    batch = two(log_ratio=np.array([2.0, -1.0]))
    estimator = Estimator(Weighting("none"), "zero", surrogate=QuadraticPull(0.5))
    assert estimator.coefficients(batch).tolist() == [1 - 0.5 * 2, 0.5]


def test_a_held_ratio_is_nothing_where_there_is_no_measure():
    batch = two(log_ratio=np.zeros((2, 1)), measure=np.array([1.0, 0.0]), unit=1.0)
    assert SignedTruncation()(batch, np.ones(2)).tolist() == [[1.0], [0.0]]


def test_a_level_that_a_pull_does_not_know_is_refused_with_those_it_knows():
    for level in ("token", "sequence"):
        QuadraticPull(level=level)
    with pytest.raises(InputError, match=r"^level: unknown name 'sequenec'; did you mean 'sequence'"):
        QuadraticPull(level="sequenec")
    with pytest.raises(InputError, match=r"^level: unknown name 'tokn'; did you mean 'token'"):
        QuadraticPull(level="tokn")


def test_a_product_names_the_factor_that_adds_a_penalty():
    with pytest.raises(InputError, match=r"^factors: QuadraticPull adds a penalty"):
        Product((Clip(), QuadraticPull()))


def test_a_probability_of_the_behavior_is_at_most_one():
    batch = two(log_ratio=np.full((2, 1), -3.0), log_prob=np.full((2, 1), -0.5))
    assert probabilities(batch, batch.log_ratio)[1].tolist() == [[1.0], [1.0]]


def test_a_shift_of_the_baseline_is_added():
    batch = two()
    plain, shifted = (Estimator(baseline="group_mean", baseline_shift=x).baseline_value(batch) for x in (0.0, 0.25))
    assert_near(shifted, plain + 0.25)


def test_versions_that_drew_nothing_or_cannot_have_drawn():
    share = np.array([0.0, 0.5, 0.5])
    with np.errstate(divide="ignore"):
        found = mixture_log_ratio(np.array([[-5.0, math.log(2), math.log(0.5)], [0.0, INF, INF]]), share)
    assert_near(found[0], math.log(0.8))
    assert found[1] == INF  # no version that drew could have drawn it: the mixture has no mass there


def test_samples_without_measure_have_no_weight_however_large():
    batch = heavy()
    weight = Weighting("importance")(replace(batch, log_ratio=np.where(batch.measure > 0, batch.log_ratio, 800.0)))
    assert weight.value[1, 1] == 0
    assert weight.relative[1, 1] == 0


def test_steps_of_no_length_have_no_efficiency():
    assert descent_efficiency(np.array(0.0), np.array(0.0), np.array(0.0)) == 0
    assert descent_efficiency(np.array(2.0), np.array(0.0), np.array(1.0)) == 0


# ------------------------------------------------------------------------------------------- functions of a stranger


def plain(batch: Batch) -> Any:
    """A coefficient a sample."""
    return batch.reward * 2


class Refuses:
    """Cannot be made without arguments."""

    def __init__(self) -> None:
        raise ValueError("no\n budget")

    def __call__(self, batch: Batch) -> Any:
        return batch.reward


class Doubles:
    """A class in place of its instance."""

    def __call__(self, batch: Batch) -> Any:
        return batch.reward * 2


class Nearly:
    """Has the method of an estimator and is none."""

    def coefficients(self, batch: Batch) -> Any:
        return batch.reward


def test_what_a_function_says_of_itself_is_looked_up():
    def own(batch: Batch) -> Any:
        return batch.reward

    assert (estimator_of(plain).needs, estimator_of(plain).exchangeable) == (frozenset(), False)
    own.needs, own.exchangeable = ("tokens", "scores"), 1
    found = estimator_of(own)
    assert (found.needs, found.exchangeable, found.name) == ({"tokens", "scores"}, True, "own")
    own.needs = "length"
    assert estimator_of(own).needs == {"length"}
    assert estimator_of(found) is found
    kept = Estimator()
    assert estimator_of(kept) is kept
    for bad in (3, ("tokens", 3)):
        own.needs = bad
        with pytest.raises(
            InputError, match=rf"^needs: {re.escape(repr(bad))} is no name and no tuple of names; write"
        ):
            estimator_of(own)
    with pytest.raises(InputError, match=r"^needs: unknown name 'tokns'; did you mean 'tokens'"):
        FunctionEstimator(plain, frozenset({"tokns"}))
    with pytest.raises(
        InputError, match=r"^estimator: Refuses\(\) raises ValueError: no budget \(line \d+ of test_kern"
    ):
        estimator_of(Refuses)
    with pytest.raises(
        InputError,
        match=r"^estimator: Nearly has .* derive it from that, or pass its method, as in mine\.coefficients$",
    ):
        estimator_of(Nearly())
    with pytest.raises(InputError, match=r"^estimator: 3 is no Estimator and no function of a Batch"):
        estimator_of(3)  # type: ignore[arg-type]
    assert told(ValueError("in\n words")) == "ValueError: in words"
    made = estimator_of(Doubles)
    assert isinstance(made, FunctionEstimator)
    assert made.coefficients(two()).tolist() == [2, 0]
    for size in (1, 2):
        estimator_of(plain).require(size)
    with pytest.raises(InputError, match=r"^group_size: 0 is not positive"):
        estimator_of(plain).require(0)


def test_what_a_function_may_return():
    tokens = two(log_ratio=np.array([[0.5, 1.0], [2.0, 9.0]]), token_mask=np.array([[1.0, 1.0], [1.0, 0.0]]))

    def of(answer: Any, needs: tuple[str, ...] = ()) -> FunctionEstimator:
        return FunctionEstimator(lambda batch: answer(batch), frozenset(needs))

    assert estimator_of(plain).coefficients(two()).tolist() == [2, 0]
    assert of(lambda b: b.log_ratio * 1).coefficients(tokens).tolist() == [1.5, 2.0]  # products of tokens' ratios
    assert of(lambda b: b.token_length()).coefficients(tokens).tolist() == [2, 1]
    assert of(lambda b: b.log_ratio * 1, ("tokens",)).coefficients(tokens).shape == (2, 2)
    assert of(lambda b: b.reward * 1, ("tokens",)).coefficients(tokens).shape == (2,)
    groups = Batch(reward=np.ones((3, 2)), log_ratio=np.zeros((3, 2, 4)))
    assert of(lambda b: b.log_ratio * 1, ("tokens",)).coefficients(groups).shape == (3, 2, 4)
    for answer in (np.array([True, False]), np.array([1, 2]), np.ones(2, "float32")):
        assert of(lambda b, answer=answer: answer).coefficients(two()).tolist() == answer.tolist()
    wrong = {
        r"returned a list; return an array like batch\.reward, one coefficient a sample": lambda b: [1.0, 2.0],
        r"returned coefficients of shape \(3,\) for rewards .* or one a token if it needs tokens$": lambda b: np.ones(
            3
        ),
        r"returned coefficients of shape \(2, 2\) for rewards \(2,\)": lambda b: np.ones((2, 2)),
        r"returned coefficients of dtype float16; return real numbers, of 32 bits or more": lambda b: np.ones(
            2, "float16"
        ),
        r"returned coefficients of dtype complex128": lambda b: np.ones(2, complex),
        r"returned coefficients of dtype object": lambda b: np.array([1, 2], dtype=object),
        r"raises ZeroDivisionError: division by zero \(line \d+ of test_kernel_edges\.py\), on": lambda b: 1 / 0,
    }
    for said, answer in wrong.items():
        with pytest.raises(InputError, match="^estimator: <lambda> " + said):
            of(answer).coefficients(two())
    for need, said in (("tokens", "tokens: this needs log-ratios"), ("log_prob", "log_prob: ")):
        with pytest.raises(InputError, match="^" + said):
            of(plain, (need,)).coefficients(two())
    exactly = Batch(reward=exact([1, 0]), ratio=exact([2, 3]))
    assert estimator_of(plain).coefficients(exactly).tolist() == [2, 0]


def test_tokens_as_trajectories():
    log_ratio = np.array([[0.5, 1.0], [2.0, 9.0]])
    given = {"token_mask": np.array([[1.0, 1.0], [1.0, 0.0]]), "log_prob": -np.ones((2, 2))}
    scores = DenseScores(np.array([[[1.0], [2.0]], [[4.0], [7.0]]]), per_token=True)
    found = of_trajectories(two(log_ratio=log_ratio, scores=scores, collision=np.ones((2, 2)), **given))
    assert found.log_ratio is not None
    assert found.log_ratio.tolist() == [1.5, 2.0]
    assert found.length is not None
    assert found.length.tolist() == [2, 1]
    assert (found.token_mask, found.log_prob, found.collision, found.anchor_log_ratio) == (None,) * 4
    assert found.scored().sq_norm(np.ones(2)).tolist() == [9, 16]  # the padding's 7 is not in it
    exactly = of_trajectories(
        Batch(reward=exact([1, 0]), ratio=exact([[2, 3], [5, 7]]), anchor_log_ratio=np.ones((2, 2)))
    )
    assert exactly.ratio is not None
    assert exactly.ratio.tolist() == [6, 35]
    assert (exactly.log_ratio, exactly.anchor_log_ratio, exactly.scores) == (None, None, None)


# ---------------------------------------------------------------------------------------------------------- layouts


@pytest.mark.parametrize("baseline", ["shrinkage", "shrinkage_in_sample"])
@pytest.mark.parametrize("normalizer", ["none", "whiten", "whiten_token"])
def test_replications_of_a_batch_of_prompts_do_not_see_each_other(baseline: str, normalizer: str):
    rng = np.random.default_rng(0)
    reward, length = rng.normal(size=(3, 2, 4)), rng.integers(1, 5, size=(3, 2, 4)).astype(float)
    estimator = Estimator(Weighting("none"), baseline, normalizer, 1e-3)

    def coefficients(i: Any) -> np.ndarray:
        return estimator.coefficients(Batch(reward=reward[i], log_ratio=reward[i] * 0, length=length[i], grouped=True))

    for i in range(3):
        assert_near(coefficients(slice(None))[i], coefficients(i))


def test_a_large_replication_does_not_flatten_a_small_one():
    x = np.array([[[1.0, -1.0]], [[1e30, -1e30]]])
    assert whiten(x, np.full((2, 1, 2), 0.5), 0.0).tolist() == [[[1, -1]], [[1, -1]]]


def test_pools_of_replications_do_not_see_each_other():
    x = np.random.default_rng(1).normal(size=(2, 3, 2, 2))
    batch = Batch(reward=np.zeros((2, 3, 2)), log_ratio=x, grouped=True)
    assert pooled(x, batch).shape == (2, 12)
    surrogate = SecondMomentMaskAnySign(0.0)  # only the smallest of each pool stays
    assert (surrogate(batch, np.zeros((2, 3, 2))) != 0).sum(axis=(1, 2, 3)).tolist() == [1, 1]


def test_what_is_real_in_a_pool():
    x = np.array([[0.0, NAN], [1.0, 1.0], [2.0, 2.0]])
    mask, measure = np.array([[1.0, 1.0], [1.0, 0.0], [1.0, 1.0]]), np.array([0.5, 0.5, 0.0])
    given = {"reward": np.zeros(3), "log_ratio": x, "measure": measure, "unit": 0.5}
    assert real(Batch(**given), x).tolist() == [[True, False], [True, True], [False, False]]
    assert real(Batch(**given, token_mask=mask), x).tolist() == [[True, False], [True, False], [False, False]]


def test_trace_covariance_of_replications():
    rng = np.random.default_rng(2)
    vector, measure = rng.normal(size=(3, 4, 2)), rng.dirichlet(np.ones(4), size=3)
    want = [trace_covariance(v, m) for v, m in zip(vector, measure, strict=True)]
    assert_near(trace_covariance(vector, measure), want)
    x = vector[0] - measure[0] @ vector[0]
    assert_near(want[0], measure[0] @ (x * x).sum(axis=1))


def test_sums_of_those_present():
    log_weight, present = np.array([[0.0, 5.0], [1.0, 2.0]]), np.array([[1.0, 0.0], [1.0, 1.0]])
    some, all_there = weight_sums(log_weight, present), weight_sums(np.array([0.0, 1.0, 2.0]))
    for a, b in zip(some, all_there, strict=True):
        assert_near(a, b)
    torch = pytest.importorskip("torch")
    for a, b in zip(weight_sums(torch.tensor(log_weight), torch.tensor(present)), some, strict=True):
        assert_near(a, b)


def test_scores_of_masked_tokens_do_not_count():
    scores = DenseScores(np.array([[[1.0], [7.0]]]), per_token=True).masked(np.array([[1.0, 0.0]]))
    assert scores.combine(np.ones(1)).tolist() == [1]
