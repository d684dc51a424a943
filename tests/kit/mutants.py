"""Planted wrong versions of the kernel, each with the law that must kill it.

Most are errors that were really made: by us, in a framework's source, or in a published formula. A mutant that survives
its law shows that the law is too weak; `test_mutants.py` then fails.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.kit.properties import at_level, estimator
from vcposim import arrays, baselines, diagnostics, moments
from vcposim.arrays import expectation, namespace, safe_divide
from vcposim.batch import Batch, DenseScores
from vcposim.diagnostics import WeightSums
from vcposim.moments import Sums


@dataclass(frozen=True)
class Mutant:
    name: str
    killer: str
    """the law of `tests.kit.properties` that it must break"""
    version: Callable[..., Any]


MUTANTS: list[Mutant] = []


def mutant(killer: str) -> Callable[[Callable], Callable]:
    """Plant the decorated function; its docstring says what is wrong with it."""

    def plant(version: Callable[..., Any]) -> Callable[..., Any]:
        MUTANTS.append(Mutant(version.__name__, killer, version))
        return version

    return plant


# ---------------------------------------------------------------------------------------------------------- arrays


@mutant("sum_of_others_is_a_loop")
def own_sample_included_in_sum(x):
    return namespace(x).sum(x, axis=-1, keepdims=True) + x * 0


@mutant("sum_of_others_keeps_every_digit")
def total_minus_own(x):
    return namespace(x).sum(x, axis=-1, keepdims=True) - x


@mutant("log_expectation_is_the_log_of_the_expectation")
def log_of_plain_exp(log_x, measure):
    with np.errstate(over="ignore", divide="ignore"):
        return np.log(np.sum(np.exp(log_x) * measure))


@mutant("log_expectation_is_the_log_of_the_expectation")
def expectation_of_the_log(log_x, measure):
    return np.sum(np.where(log_x > -np.inf, log_x, 0.0) * measure)


@mutant("saturating_exp_is_exp_and_finite")
def exp_that_overflows(log_x):
    with np.errstate(over="ignore"):
        return np.exp(log_x)


@mutant("saturating_exp_is_exp_and_finite")
def exp_clamped_at_twenty(log_x):
    """A framework's clamp: silently another weight beyond e^20."""
    return np.exp(np.clip(log_x, -20, 20))


@mutant("sample_measure_is_one_over_the_real_samples")
def padding_counted_in_the_group(mask):
    unit = mask[:1] * 0 + 1
    return mask * unit / len(mask), unit / len(mask)


@mutant("token_scores_are_loops")
class SumOfTokenSquares(DenseScores):
    """||sum_t s_t||^2 taken as sum_t ||s_t||^2: right only if tokens' scores are orthogonal."""

    def sq_norm(self, weight):
        total = self._expand(weight) ** 2
        return total.sum(axis=-1).sum(axis=-1) if self.per_token else total.sum(axis=-1)


# --------------------------------------------------------------------------------------------------------- weights


@mutant("truncate_is_a_minimum")
def truncated_on_the_wrong_side(x, scale, cap):
    return np.maximum(x, scale.write(cap))


@mutant("truncate_is_a_minimum")
def cap_not_written_on_the_log_scale(x, scale, cap):
    return np.minimum(x, cap)


@mutant("clip_is_two_sided")
def floor_and_cap_swapped(x, scale, floor, cap):
    return np.minimum(np.maximum(x, scale.write(cap)), scale.write(floor))


@mutant("clip_is_two_sided")
def clip_forgets_the_floor(x, scale, floor, cap):
    return np.minimum(x, scale.write(cap))


@mutant("mask_keeps_or_drops")
def mask_that_truncates(x, scale, cap, floor=0):
    return np.minimum(x, scale.write(cap))


@mutant("mask_keeps_or_drops")
def mask_of_the_light_ones(x, scale, cap, floor=0):
    return np.where(x >= scale.write(cap), x, scale.zero)


@mutant("self_normalized_weights_average_to_one")
def normalized_to_sum_to_one(x, scale, measure):
    mean = scale.mean(x, measure * 0 + 1)
    return scale.over(x, mean)


def _geometric(batch: Batch, level: str, wrong: Callable[[Any, Any], Any]) -> Any:
    return wrong(batch, batch.token_length()) if level == "geometric" else at_level(batch, level)


@mutant("geometric_level_is_a_root_of_the_sequence_weight")
def weight_divided_by_length(batch, level):
    return _geometric(batch, level, lambda b, length: at_level(b, "sequence") / length)


@mutant("geometric_level_is_a_root_of_the_sequence_weight")
def arithmetic_mean_of_token_ratios(batch, level):
    """Mean of r_t instead of exp of the mean of log r_t."""
    return _geometric(batch, level, lambda b, length: at_level(b, "token").sum(axis=-1) / length)


@mutant("sequence_level_is_the_product_of_real_tokens")
def padding_multiplied_in(batch, level):
    if batch.ratio is not None:
        return np.prod(batch.ratio, axis=-1)
    return np.exp(np.sum(batch.log_ratio, axis=-1))


@mutant("token_level_weighs_tokens")
def sequence_for_token_level(batch, level):
    whole = at_level(batch, "sequence")
    return whole[..., None] + batch.ratio * 0


# ------------------------------------------------------------------------------------------------------- baselines


@mutant("weighted_mean_is_a_loop")
def divided_by_the_count(reward, weight, measure):
    return expectation(weight * reward, measure, keepdims=True)


@mutant("weighted_mean_follows_shifts_and_scales")
def zero_where_nothing_has_weight(reward, weight, measure):
    total = expectation(weight, measure, keepdims=True)
    return safe_divide(expectation(weight * reward, measure, keepdims=True), total, 0)


@mutant("leave_one_out_does_not_look_at_its_own_reward")
def own_sample_included(reward, weight, measure, unit):
    return baselines.weighted_mean(reward, weight, measure) + reward * 0


@mutant("leave_one_out_is_a_loop")
def wrong_denominator(reward, weight, measure, unit):
    """Sum of the others over the mean of all."""
    total = expectation(weight, measure, keepdims=True)
    return safe_divide(arrays.sum_of_others(weight * reward * measure), total, reward)


@mutant("leverage_identity")
def leverage_of_the_square(weight, measure, unit):
    return baselines.leverage(weight * weight, measure, unit)


@mutant("leverages_are_shares")
def leverage_without_the_unit(weight, measure, unit):
    return safe_divide(weight, expectation(weight, measure, keepdims=True), weight * 0 + unit)


@mutant("damping_multiplies_the_advantage")
def damped_by_the_share_itself(reward, baseline, share):
    return reward - share * (reward - baseline)


@mutant("minimum_variance_has_the_least_variance")
def mean_of_the_weighted_score_forgotten(weighted_reward, weighted, mean_weighted_reward, mean_weighted, default):
    return safe_divide(weighted_reward, weighted, default)


# ------------------------------------------------------------------------------------------------------ estimators


def _with_baseline(batch: Batch, weight_of: Callable[[Any, Any], Any]) -> Any:
    """w (R - b) with b the mean under weight_of(w, ||s||^2)."""
    w, score = batch.ratio, batch.scores.score
    a = weight_of(w, (score * score).sum(axis=-1))
    return w * (batch.reward - baselines.weighted_mean(batch.reward, a, batch.measure))


@mutant("opob_has_the_least_variance_of_all_baselines")
def missing_square_of_the_weight(batch):
    return _with_baseline(batch, lambda w, norm: w * norm)


@mutant("opob_has_the_least_variance_of_all_baselines")
def score_norms_forgotten(batch):
    return _with_baseline(batch, lambda w, norm: w * w)


@mutant("opob_is_its_formula")
def released_double_weight(batch):
    """The reference code's measured norm already holds w; then w^2 multiplies again."""
    return _with_baseline(batch, lambda w, norm: w * w * w * w * norm)


@mutant("opob_is_its_formula")
def unsquared_norm(batch):
    score = batch.scores.score
    a = batch.ratio**2 * abs(score).sum(axis=-1)
    return batch.ratio * (batch.reward - baselines.weighted_mean(batch.reward, a, batch.measure))


@mutant("on_policy_it_is_its_host")
def weight_counts_the_reward(batch):
    """b = E[w^2 n^2 R^2] / E[w^2 n^2 R]: a plausible slip that is right for 0/1 rewards."""
    return _with_baseline(batch, lambda w, norm: w * w * norm * batch.reward)


@mutant("truncation_aware_has_the_least_variance_under_truncation")
def plain_opob_under_truncation(batch):
    w = np.minimum(batch.ratio, 47 / 31)
    score = batch.scores.score
    a = w * w * (score * score).sum(axis=-1)
    return w * (batch.reward - baselines.weighted_mean(batch.reward, a, batch.measure))


@mutant("unbiased_by_enumeration")
def leave_one_out_that_includes_itself(batch):
    return estimator("opob")(batch)


@mutant("unbiased_by_enumeration")
def truncated_but_called_unbiased(batch):
    return estimator("opob_leave_one_out", "truncate", cap=1)(batch)


@mutant("unbiased_by_enumeration")
def sum_for_mean(batch):
    return batch.reward.shape[-1] * estimator("opob_leave_one_out")(batch)


@mutant("group_mean_shrinks_the_gradient_by_one_sample")
def mean_of_all_groups(batch):
    return batch.ratio * (batch.reward - batch.reward.sum() / batch.reward.size)


@mutant("reward_shift_changes_nothing")
def baseline_with_an_epsilon(batch):
    """b = sum a R / (sum a + 1e-8): pulls b to zero where weights are small, as the reference code does."""
    w, score = batch.ratio, batch.scores.score
    a = w * w * (score * score).sum(axis=-1)
    total = expectation(a, batch.measure, keepdims=True) + 1e-8
    return w * (batch.reward - expectation(a * batch.reward, batch.measure, keepdims=True) / total)


@mutant("reward_scale_scales")
def advantage_clipped(batch):
    return np.minimum(estimator("opob")(batch), 1)


@mutant("weight_scale_scales")
def normalized_after_weighting(batch):
    """(wA - mean) / spread of wA: the weights' scale is lost."""
    c = estimator("opob")(batch)
    spread = abs(c).sum(axis=-1, keepdims=True)
    return safe_divide(c, spread, 0)


@mutant("groups_do_not_see_each_other")
def baseline_over_the_whole_batch(batch):
    mean = batch.reward.sum() / batch.reward.size
    return batch.ratio * (batch.reward - mean)


@mutant("samples_have_no_order")
def first_sample_as_the_baseline(batch):
    return batch.ratio * (batch.reward - batch.reward[..., :1])


@mutant("padding_is_inert")
def padding_in_the_mean(batch):
    n = batch.reward.shape[-1]
    return batch.ratio * (batch.reward - batch.reward.sum(axis=-1, keepdims=True) / n)


@mutant("masked_tokens_are_inert")
def token_mask_forgotten(batch):
    return estimator("zero")(Batch(reward=batch.reward, ratio=batch.ratio, scores=batch.scores))


@mutant("finite_under_extreme_log_ratios")
def exponential_first(batch):
    with np.errstate(all="ignore"):
        w = np.exp(batch.log_ratio)
        a = w * w * (batch.scores.score**2).sum(axis=-1)
        return w * (batch.reward - (a * batch.reward).sum() / a.sum())


@mutant("group_std_is_the_population_one")
def sample_standard_deviation(reward, measure):
    return np.std(reward, axis=-1, ddof=min(1, len(reward) - 1), keepdims=True)


# --------------------------------------------------------------------------------------------------------- moments


def _moments(outcome: Batch, c: Any, mass: Any, gradient: Any, **wrong: Callable[[Sums], Any]) -> moments.Moments:
    sums = moments.batch_sums(outcome, c, mass)
    true = moments.moments(sums, gradient, drawn=False)
    return moments.Moments(**{**vars(true), **{name: f(sums) for name, f in wrong.items()}})


@mutant("moments_are_the_textbook_ones")
def uncentered_variance(outcome, c, mass, gradient):
    return _moments(outcome, c, mass, gradient, variance_per_sample=lambda s: s.contribution_sq_norm / s.mass)


@mutant("moments_are_the_textbook_ones")
def per_sample_over_n_for_variance_of_mean(outcome, c, mass, gradient):
    """Right for independent contributions only; an in-batch baseline couples them."""
    per_sample = _moments(outcome, c, mass, gradient).variance_per_sample
    return _moments(outcome, c, mass, gradient, variance_of_mean=lambda s: per_sample / c.shape[-1])


@mutant("moments_are_the_textbook_ones")
def mass_ignored(outcome, c, mass, gradient):
    return _moments(outcome, c, mass * 0 + 1 / len(mass), gradient)


@mutant("merged_sums_are_the_sums_of_the_whole")
def sums_averaged(self, other):
    return Sums(*((a + b) / 2 for a, b in zip(self, other, strict=True)))


@mutant("moments_of_draws_are_unbiased")
def no_bessel_correction(sums, gradient, *, drawn):
    return moments.moments(sums, gradient, drawn=False)


@mutant("trace_covariance_is_a_loop")
def second_moment_for_variance(vector, measure):
    return expectation((vector * vector).sum(axis=-1), measure)


# ----------------------------------------------------------------------------------------------------- diagnostics


@mutant("ess_is_its_definition")
def ess_without_the_square(log_weight):
    w = np.exp(log_weight - log_weight.max())
    return w.sum() / np.sum(w * w)


@mutant("ess_is_its_definition")
def fraction_for_ess(log_weight):
    return diagnostics.ess_fraction(log_weight)


@mutant("ess_ignores_the_scale_of_the_weights")
def ess_of_overflowing_weights(log_weight):
    with np.errstate(all="ignore"):
        return diagnostics.ess_of_weights(np.exp(log_weight))


@mutant("ess_ignores_the_scale_of_the_weights")
def ess_with_an_absolute_epsilon(log_weight):
    """(sum w)^2 / (sum w^2 + 1e-8), as released: light batches read as degenerate."""
    w = arrays.saturating_exp(log_weight)
    return w.sum() * (w.sum() / ((w * w).sum() + 1e-8))


@mutant("ess_counts_the_equal_heavy_ones")
def ess_of_clamped_weights(log_weight):
    return diagnostics.ess(np.clip(log_weight, -20, 20))


@mutant("ess_refuses_what_is_no_weight")
def ess_of_nan_is_one(log_weight):
    with np.errstate(all="ignore"):
        w = np.exp(log_weight - log_weight.max())
        return np.nan_to_num(w.sum() ** 2 / np.sum(w * w), nan=1.0)


@mutant("ess_fraction_is_one_over_one_plus_chi2")
def one_over_the_mean_of_squares_of_target(weight, measure):
    return 1 / (1 + diagnostics.chi2_of_weights(weight * weight, measure))


@mutant("merged_weight_sums_are_those_of_the_whole")
def square_rescaled_once(self, other):
    scale = np.maximum(self.log_scale, other.log_scale)
    top = np.where(scale == -np.inf, 0.0, scale)
    a, b = np.exp(self.log_scale - top), np.exp(other.log_scale - top)
    count = self.count + other.count
    return WeightSums(scale, count, self.total * a + other.total * b, self.square * a + other.square * b)


@mutant("merged_weight_sums_are_those_of_the_whole")
def merged_without_rescaling(self, other):
    scale = np.maximum(self.log_scale, other.log_scale)
    return WeightSums(scale, self.count + other.count, self.total + other.total, self.square + other.square)


@mutant("merged_weight_sums_are_those_of_the_whole")
def average_of_two_ess(self, other):
    fraction = (self.ess_fraction() + other.ess_fraction()) / 2
    count = self.count + other.count
    total = self.total + other.total
    return WeightSums(np.maximum(self.log_scale, other.log_scale), count, total, total * total / (fraction * count))


@mutant("kl_low_variance_is_k3")
def kl_with_the_ratio_upside_down(log_ratio, measure):
    return expectation(np.expm1(-log_ratio) + log_ratio, measure)


@mutant("max_share_is_the_largest_share")
def share_without_the_measure(weight, measure):
    return np.max(weight, axis=-1) / np.sum(weight, axis=-1)


# --------------------------------------------------------------------------------------------------------- control


@mutant("a_brake_fails_closed")
def brake_that_fails_open(ess_fraction, *, reference=1.0, exponent=0.5):
    """Python's min(1.0, nan) is 1.0: a NaN ESS gives the full step, as in the reference code."""
    ratio = [min(1.0, float(x) / reference) for x in ess_fraction]
    return np.array([x**exponent if x > 0 else 0.0 for x in ratio])


@mutant("a_brake_fails_closed")
def overflow_is_a_full_step(ess_fraction, *, reference=1.0, exponent=0.5):
    safe = np.where(ess_fraction > 0, np.minimum(ess_fraction / reference, 1.0), 0.0)
    return np.where(safe > 0, safe**exponent, 0.0)


@mutant("step_scale_is_a_clipped_power")
def exponents_swapped(ess_fraction, *, reference=1.0, exponent=0.5):
    return np.minimum(1.0, ess_fraction / reference) ** (1.5 - exponent)


@mutant("step_scale_is_a_clipped_power")
def step_larger_than_one(ess_fraction, *, reference=1.0, exponent=0.5):
    return (ess_fraction / reference) ** exponent


@mutant("step_scale_is_monotone")
def step_grows_as_ess_falls(ess_fraction, *, reference=1.0, exponent=0.5):
    return np.minimum(1.0, reference / ess_fraction / 2**40) ** exponent
