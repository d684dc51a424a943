"""verl's options as entries of the catalogue; see `conformance` for what a row claims."""

import math

import numpy as np

from tests.golden.conformance import Gauge, Row, batch
from tests.golden.problem import GROUP, GROUPS, Problem
from vcposim.diagnostics import ess_fraction
from vcposim.gauges.panel import panel
from vcposim.surrogates import Clip, DivergenceMask, Reject
from vcposim.weights import Weighting

Array = np.ndarray


def sample_std(problem: Problem) -> Array:
    """(B, 1), each prompt's standard deviation with N - 1."""
    return np.repeat(problem.reward.reshape(GROUPS, GROUP).std(-1, ddof=1), GROUP)[:, None]


def whitened_over_tokens(problem: Problem, x: Array) -> Array:
    """(B,) -> (B, T), as verl's `masked_whiten`: mean and N - 1 variance over tokens, 1e-8 inside the root."""
    token = np.repeat(x, problem.length.astype(int))
    return (x - token.mean())[:, None] / np.sqrt(token.var(ddof=1) + 1e-8) * problem.mask


def raw_reward(problem: Problem, _: Array) -> Array:
    """R itself."""
    return problem.reward[:, None] * problem.mask


def tail_without_baseline(problem: Problem, ours: Array) -> Array:
    """B_t = 0 where only the longest response of a prompt is alive."""
    alive = problem.mask.reshape(GROUPS, GROUP, -1).sum(1)
    alone = np.repeat(alive == 1, GROUP, axis=0) * problem.mask
    return np.where(alone > 0, problem.reward[:, None], ours)


def ratio(problem: Problem, name: str = "pi/anchor") -> Array:
    """(B, T), token ratios."""
    return np.exp(np.asarray(batch(problem, name).log_ratio)).reshape(problem.mask.shape)


def sequence_ratio(problem: Problem) -> Array:
    """(B, 1), pi/behavior of whole responses."""
    return np.exp((np.log(ratio(problem, "pi/behavior")) * problem.mask).sum(-1, keepdims=True))


def sapo(problem: Problem, _: Array) -> Array:
    """4 sigmoid' (tau (r - 1)) r A, tau 1 for A > 0, else 1.05; averaged over tokens, then responses."""
    a, r = problem.centered[:, None], ratio(problem)
    gate = 1 / (1 + np.exp(-np.where(a > 0, 1.0, 1.05) * (r - 1)))
    return 4 * gate * (1 - gate) * r * a * problem.mask / (len(a) * problem.length[:, None])


def dro(problem: Problem, _: Array) -> Array:
    """A - beta log r, over tokens."""
    return (problem.centered[:, None] - 0.1 * np.log(ratio(problem))) * problem.mask / problem.length.sum()


def truncated_then_normalized(problem: Problem, _: Array) -> Array:
    """min(w, 2) over its mean over the batch."""
    w = np.minimum(sequence_ratio(problem), 2.0)
    return w / w.mean() * problem.centered[:, None] * problem.mask / len(w)


def without_rejected_responses(problem: Problem, ours: Array) -> Array:
    """1/B becomes 1/(responses kept)."""
    return ours * len(ours) / np.any(ours != 0, axis=-1).sum()


def without_rejected_tokens(problem: Problem, ours: Array) -> Array:
    """1/sum L becomes 1/(tokens kept)."""
    return ours * problem.length.sum() / np.count_nonzero(ours)


def bounds_on_inverse(problem: Problem, _: Array) -> Array:
    """0.25 <= behavior/pi <= 2, over the tokens kept."""
    r = ratio(problem, "pi/behavior")
    keep = (r >= 0.5) * (r <= 4.0) * problem.mask
    return keep * problem.centered[:, None] / keep.sum()


NO_DUAL = "loss_mode=vanilla, clip_ratio_c=1e9"
BYPASS = "loss_mode=bypass_mode, loss_type="
SUM = "loss_agg_mode=seq-mean-token-sum"
OTB = "adv_estimator=optimal_token_baseline"
LEFT = "rejected responses leave the mean"
REJECTED = "rejected tokens leave the denominator"
DUAL = "dual clip at `clip_ratio_c` = 3.0 is on unless turned off"

ADVANTAGES = [
    Row(
        "adv_estimator=grpo",
        "grpo",
        flags={"epsilon": 1e-6},
        note="sample std (N - 1); ours is the population's",
        explained=lambda p, _: p.centered[:, None] / (sample_std(p) + 1e-6) * p.mask,
    ),
    Row(
        "adv_estimator=grpo_vectorized",
        "grpo",
        flags={"epsilon": 1e-6},
        note="sample std (N - 1), in float32",
        explained=lambda p, _: p.centered[:, None] / (sample_std(p) + 1e-6) * p.mask,
    ),
    Row("adv_estimator=grpo, norm_adv_by_std_in_grpo=False", "dr_grpo"),
    Row(
        "adv_estimator=grpo, norm_adv_by_std_in_grpo=False, one response a prompt",
        "dr_grpo",
        groups=GROUPS * GROUP,
        note="a prompt with one response keeps its reward as advantage; ours is 0",
        explained=raw_reward,
    ),
    Row("adv_estimator=rloo", "rloo"),
    Row(
        "adv_estimator=rloo, one response a prompt",
        "rloo",
        groups=GROUPS * GROUP,
        note="a prompt with one response keeps its reward as advantage; ours is 0",
        explained=raw_reward,
    ),
    Row("adv_estimator=rloo_vectorized", "rloo"),
    Row(
        "adv_estimator=rloo_vectorized, one response a prompt",
        "rloo",
        groups=GROUPS * GROUP,
        note="0, where adv_estimator=rloo has R",
    ),
    Row("adv_estimator=opo", "opo"),
    Row(
        "adv_estimator=gpg",
        "dr_grpo",
        note="times B / (number of rewards that are not exactly 0)",
        explained=lambda p, ours: ours * len(p.reward) / np.count_nonzero(p.reward),
    ),
    Row(
        "adv_estimator=reinforce_plus_plus",
        "reinforce_plus_plus_token",
        note="sample variance over tokens, 1e-8 under the root; gamma = 1",
        explained=lambda p, _: whitened_over_tokens(p, p.reward),
    ),
    Row(
        "adv_estimator=reinforce_plus_plus_baseline",
        "reinforce_plus_plus_baseline_token",
        note="sample variance over tokens, 1e-8 under the root",
        explained=lambda p, _: whitened_over_tokens(p, p.centered),
    ),
    Row(f"{OTB}, handle_zero_tail=False", "otb_on_policy", ratio="anchor/behavior", note="pi in W is the anchor"),
    Row(
        OTB,
        "otb_on_policy",
        ratio="anchor/behavior",
        note="by default the longest response has no baseline where it is alone alive: A = R there; ours is 0",
        explained=tail_without_baseline,
    ),
    Row(
        f"{OTB}, handle_zero_tail=False, rollout_is=token",
        "otb",
        ratio="anchor/behavior",
        baseline_only=True,
        note="the squared weight is inside the cumulative sum; it is not in the advantage but in the loss",
    ),
]

LOSSES = [
    Row(f"{NO_DUAL}", "ppo_clip", "1/sum L"),
    Row("loss_mode=vanilla, loss_agg_mode=token-mean", "dual_clip", "1/sum L", note=DUAL),
    Row("loss_mode=vanilla, loss_agg_mode=token-sum", "dual_clip", "1", note=DUAL),
    Row("loss_mode=vanilla, loss_agg_mode=seq-mean-token-sum", "dual_clip", "1/B", note=DUAL),
    Row("loss_mode=vanilla, loss_agg_mode=seq-mean-token-mean", "dual_clip", "1/(B L)", note=DUAL),
    Row("loss_mode=vanilla, loss_agg_mode=seq-mean-token-sum-norm", "dual_clip", "1/(B T)", note=DUAL),
    Row(
        "loss_mode=vanilla, clip_ratio_high=0.28",
        "dual_clip",
        "1/sum L",
        {"surrogate": Clip(0.2, 0.28, dual=3.0)},
        note=DUAL + "; so `clip_higher` alone needs clip_ratio_c very large",
    ),
    Row(
        "loss_mode=dppo_tv",
        "dppo_binary_tv",
        "1/sum L",
        {"surrogate": DivergenceMask("binary_tv", 0.2, 0.2, cap=3.0)},
        note="ActorConfig's defaults: limits 0.2 and truncation at 3; the function's own fallback of 20 is not reached",
    ),
    Row("loss_mode=dppo_tv, clip_ratio*=0.15, clip_ratio_c=20", "dppo_binary_tv", "1/sum L"),
    Row("loss_mode=dppo_kl, clip_ratio*=0.05, clip_ratio_c=20", "dppo_binary_kl", "1/sum L"),
    Row(
        "loss_mode=gspo, loss_agg_mode=seq-mean-token-mean",
        "gspo",
        "1/B",
        {"surrogate": Clip(0.1, 0.1, level="geometric")},
        note="clip_ratio* = 0.1 here; the entry's coefficient holds the 1/L",
    ),
    Row(
        "loss_mode=gspo, loss_agg_mode=token-mean",
        "gspo",
        "L/sum L",
        {"surrogate": Clip(0.1, 0.1, level="geometric")},
        note="clip_ratio* = 0.1 here; the default averaging turns GSPO's mean over responses into one over tokens",
    ),
    Row("loss_mode=cispo", "cispo_two_sided", "1/sum L"),
    Row(
        "loss_mode=geo_mean, clip_ratio*=0.4",
        "gmpo",
        "1/B",
        note="loss_agg_mode is ignored",
    ),
    Row("loss_mode=gpg", "dr_grpo", "1/sum L", note="no ratio at all"),
    Row(
        "loss_mode=sapo",
        None,
        note="4 sigmoid'(tau (r - 1)) r A, tau = 1 for A > 0, else 1.05; 1/(B L) whatever loss_agg_mode",
        explained=sapo,
    ),
    Row("loss_mode=dro, dro_beta=0.1", None, note="A - beta log r_t per token, no ratio; 1/sum L", explained=dro),
]

CORRECTIONS = [
    Row(
        f"{NO_DUAL}, rollout_is=token, rollout_is_threshold=2.0",
        "ppo_clip",
        "1/sum L",
        correction=Weighting("truncate", "token", cap=2.0),
        note="each factor has its own limits: truncated first, multiplied afterwards",
    ),
    Row(
        f"{NO_DUAL}, rollout_is=token, rollout_is_threshold=1000000000.0",
        "decoupled_ppo",
        "1/sum L",
        ratio="pi/behavior",
        note="without truncation",
    ),
    Row(
        f"{NO_DUAL}, rollout_is=sequence, rollout_is_threshold=2.0",
        "ppo_clip",
        "1/sum L",
        correction=Weighting("truncate", cap=2.0),
    ),
    Row(
        f"{NO_DUAL}, rollout_is=token, rollout_is_threshold=0.5_2.0",
        "ppo_clip",
        "1/sum L",
        correction=Weighting("mask", "token", cap=2.0, floor=0.5),
        note="IcePop in front of PPO; tokens of weight 0 stay in the denominator",
    ),
    Row(
        f"{BYPASS}ppo_clip, rollout_is=token, {SUM}",
        "dual_clip",
        "1/B",
        ratio="pi/behavior",
        note="the weights are logged but not applied",
    ),
    Row(
        f"{BYPASS}reinforce, rollout_is=token, {SUM}",
        "token_tis",
        "1/B",
        ratio="pi/behavior",
        note="the weight holds the current policy and is detached",
    ),
    Row(
        f"{BYPASS}reinforce, rollout_is=token, rollout_is_threshold=0.5_2.0, {SUM}",
        "icepop",
        "1/B",
        {"weighting": Weighting("mask", "token", cap=2.0, floor=0.5)},
        ratio="pi/behavior",
    ),
    Row(
        f"{BYPASS}reinforce, rollout_is=sequence, rollout_is_threshold=2.0, {SUM}",
        "sequence_tis",
        "1/B",
        {"weighting": Weighting("truncate", cap=2.0)},
        ratio="pi/behavior",
    ),
    Row(
        f"{BYPASS}reinforce, rollout_is=sequence, rollout_is_threshold=0.5_2.0, {SUM}",
        "sequence_mis",
        "1/B",
        {"weighting": Weighting("mask", cap=2.0, floor=0.5)},
        ratio="pi/behavior",
    ),
    Row(
        f"{BYPASS}reinforce, rollout_is=sequence, rollout_is_threshold=2.0, rollout_is_batch_normalize=True, {SUM}",
        "self_normalized",
        "1/B",
        ratio="pi/behavior",
        note="truncated at 2, then divided by the mean over the batch; ours divides untouched weights by their "
        "prompt's mean",
        explained=truncated_then_normalized,
    ),
    Row(
        f"{BYPASS}reinforce, rollout_rs=seq_sum_k1, rollout_rs_threshold=2.0, {SUM}",
        "sequence_rejection",
        "1/B",
        {"surrogate": Reject(2.0, 0.5)},
        ratio="pi/behavior",
        note=LEFT,
        explained=without_rejected_responses,
    ),
    Row(
        f"{BYPASS}reinforce, rollout_rs=seq_mean_k1, rollout_rs_threshold=0.8_1.25, {SUM}",
        "geometric_mis",
        "1/B",
        {"surrogate": Reject(1.25, 0.8, "geometric")},
        ratio="pi/behavior",
        note=LEFT,
        explained=without_rejected_responses,
    ),
    Row(
        f"{BYPASS}reinforce, rollout_rs=token_k1, rollout_rs_threshold=0.5_2.0, loss_agg_mode=token-mean",
        "token_rejection",
        "1/sum L",
        ratio="pi/behavior",
        note=REJECTED,
        explained=without_rejected_tokens,
    ),
    Row(
        f"{BYPASS}reinforce, rollout_rs=token_k1, rollout_rs_threshold=0.25_2.0, loss_agg_mode=token-mean",
        "token_rejection",
        "1/sum L",
        {"surrogate": Reject(2.0, 0.25, "token")},
        ratio="pi/behavior",
        note="the bounds of k1 are on behavior/pi, so these keep 0.5 <= r_t <= 4; and " + REJECTED,
        explained=bounds_on_inverse,
    ),
]

ROWS = [*ADVANTAGES, *LOSSES, *CORRECTIONS]


def gauge(problem: Problem, name: str, cap: float = 8.0) -> float:
    """A gauge of our panel, on anchor/behavior."""
    return panel(batch(problem, "anchor/behavior"), cap)[name].value


def token_ess(problem: Problem, floor: float = 0.0) -> float:
    """ESS fraction of the applied token weights: truncated at 2, or zero outside [floor, 2]."""
    r = ratio(problem, "anchor/behavior")[problem.mask > 0]
    w = np.where((r >= floor) & (r <= 2), r, 0) if floor else np.minimum(r, 2)
    return float(w.mean() ** 2 / (w * w).mean())


def length_weighted_ess(problem: Problem) -> float:
    """ESS fraction of truncated sequence weights, each response counted as often as it has tokens."""
    log_w = (np.log(ratio(problem, "anchor/behavior")) * problem.mask).sum(-1)
    return float(ess_fraction(np.minimum(log_w, math.log(2)), problem.length / problem.length.sum()))


ESS = "rollout_is_eff_sample_size, rollout_is="
GAUGES = [
    Gauge(
        f"{ESS}token, rollout_is_threshold=1000000000.0",
        "ess_fraction_token",
        lambda p: gauge(p, "ess_fraction_token"),
        "a fraction, of tokens, without truncation",
    ),
    Gauge(
        f"{ESS}token, rollout_is_threshold=2.0",
        "ess_fraction_token",
        lambda p: gauge(p, "ess_fraction_token"),
        "verl's is of the weights after truncation",
        token_ess,
    ),
    Gauge(
        f"{ESS}token, rollout_is_threshold=0.5_2.0",
        "ess_fraction_token",
        lambda p: gauge(p, "ess_fraction_token"),
        "verl's is of the weights after masking, the zeros counted as samples",
        lambda p: token_ess(p, 0.5),
    ),
    Gauge(
        f"{ESS}sequence, rollout_is_threshold=2.0",
        "ess_fraction_sequence_truncated",
        lambda p: gauge(p, "ess_fraction_sequence_truncated", 2.0),
        "verl's mean is over tokens, so a response counts as often as it has tokens; VCPO's rule is defined for "
        "`ess_fraction_sequence`, untruncated",
        length_weighted_ess,
    ),
]

UNCOMPARED = """Not compared: `clip_cov` (drops tokens at random) and `kl_cov`, which have no entry; `gae` and `remax`
(a critic, a second reward); `gdpo` (several rewards), `grpo_passk`, `tir_optimal_token_baseline` (several turns); the
k2 and k3 rejections.
"""
"""said below the table"""
