"""What is subtracted from the reward: a baseline leaves the mean of w (R - b) s alone (if it does not look at the
sample) and changes its variance.

All in-batch baselines here are weighted means of the group's rewards; they differ in the weight:

    group_mean          1                      what GRPO and REINFORCE-style trainers subtract
    length_weighted     L_i                    OPO, length as a stand-in for ||s_i||^2
    on_policy_optimal   ||s_i||^2              minimises the variance when w = 1
    opob                w_i^2 ||s_i||^2        minimises the variance off policy
    opob_released       wbar_i^2 w_i^2 ||s_i||^2   what the reference code of VCPO computes

`leave_one_out` and `opob_leave_one_out` are the same means without sample i, so that b does not look at the sample
it is subtracted from and the estimate stays unbiased. The two are tied by the **leverage identity**
R_i - b = (1 - h_i)(R_i - b_{-i}), h_i being sample i's share of the weight: in-batch is leave-one-out times a
soft mask on dominating samples. `leverage_damped_mean` isolates that mask: (1 - h_i)(R_i - mean).

Three kinds look further than one group's rewards and scores (`SPECIAL_BASELINES`): robust aggregations of the released
OPOB weights (they order the rewards), means over the prompts of a batch, and the optimal *token* baseline.

Every function is (..., n) -> (..., 1) for one baseline a group, (..., n) for one a sample, (..., 1, t) for one a token.
"""

from collections.abc import Callable
from dataclasses import dataclass

from vcposim.arrays import Array, expectation, indistinguishable, namespace, safe_divide, sum_of_others, where
from vcposim.errors import unknown_name


def weighted_mean(reward: Array, weight: Array, measure: Array) -> Array:
    """b = E[a R] / E[a]; the plain mean where no sample has weight: (..., n) -> (..., 1).

    That fallback keeps b equivariant under reward shifts; where all weights vanish the estimate is zero whatever b is.
    """
    default = expectation(reward, measure, keepdims=True)
    total = expectation(weight, measure, keepdims=True)
    return safe_divide(expectation(weight * reward, measure, keepdims=True), total, default)


def weighted_mean_of_others(reward: Array, weight: Array, measure: Array, unit: Array) -> Array:
    """b_{-i} = sum_{j != i} a_j R_j / sum_{j != i} a_j, leaving out one unit of mass: (..., n) -> (..., n).

    Where the others have no weight, their plain mean; where there are no others, R_i itself: no information, no step.
    Sums of others are formed without subtraction, so a dominating sample costs no precision.
    """

    def others(x: Array) -> Array:
        return sum_of_others(x * measure) + x * (measure - unit)

    one = reward * 0 + 1
    default = safe_divide(others(reward), others(one), reward)
    return safe_divide(others(weight * reward), others(weight), default)


def leverage(weight: Array, measure: Array, unit: Array) -> Array:
    """h_i = unit a_i / E[a], the share of one draw in the weight (claims C8, C10): (..., n) -> (..., n) in [0, 1].

    Where no sample has weight, the share in the plain mean, `unit`.
    """
    total = expectation(weight, measure, keepdims=True)
    return safe_divide(weight * unit, total, weight * 0 + unit)


def leverage_damped(reward: Array, baseline: Array, share: Array) -> Array:
    """b_i with R_i - b_i = (1 - h_i)(R_i - b): any baseline, damped by leverage: (..., n) -> (..., n)."""
    return reward - (1 - share) * (reward - baseline)


def minimum_variance(
    weighted_reward: Array, weighted: Array, mean_weighted_reward: Array, mean_weighted: Array, default: Array
) -> Array:
    """b = (E[a R] - <E[w s R], E[w s]>) / (E[a] - ||E[w s]||^2), a = ||w s||^2: minimises tr Cov of w (R - b) s.

    Exact for any weights; where E[w s] = 0 (full importance weights) it is the OPOB. `weighted_reward` E[a R] and
    `weighted` E[a] are (..., 1), the means E[w s R] and E[w s] are (..., p).
    """
    xp = namespace(weighted, mean_weighted)
    cross = xp.sum(mean_weighted_reward * mean_weighted, axis=-1, keepdims=True)
    square = xp.sum(mean_weighted * mean_weighted, axis=-1, keepdims=True)
    spread = weighted - square
    equal = indistinguishable(spread, weighted)  # all w_i s_i of the group alike: no baseline changes their spread
    return where(equal, default, (weighted_reward - cross) / where(equal, spread * 0 + 1, spread))


@dataclass(frozen=True)
class Evidence:
    """What a baseline may look at; `Estimator` fills it from a batch and its weights. Shapes (..., n)."""

    reward: Array
    measure: Array
    unit: Array
    score_sq_norm: Callable[[], Array]
    """||s_i||^2"""
    weighted_sq_norm: Callable[[], Array]
    """||w_i s_i||^2 up to one factor per group: the OPOB's weight"""
    ratio_sq: Callable[[], Array]
    """the untouched sequence ratio squared, up to one factor per group"""
    length: Callable[[], Array]
    mean_score: Callable[[Array], Array]
    """x -> E[w x s] on the same factor: (..., n) -> (..., p)"""
    population: Callable[[], Array]
    token_sq_norm: Callable[[], Array]
    """||grad_logits log pi(y_t)||^2 = 1 - 2 pi(y_t) + sum_v pi(v)^2: (..., n, t)"""
    token_weight_sq: Callable[[], Array]
    """w_it^2 on one factor per group: (..., n, t), or (..., n, 1) from weights per trajectory"""
    on_tokens: Callable[[Array], Array]
    """zeros on padding: (..., n, t), same -> same"""
    prompt_measure: Callable[[], Array]
    """the measure, if the groups are the prompts of one batch: (..., group, n)"""
    batch_sq_norm: Callable[[], Array]
    """||w_i s_i||^2 up to one factor for the whole batch: (..., group, n)"""


def _opob_truncated(e: Evidence) -> Array:
    a = e.weighted_sq_norm()
    return minimum_variance(
        weighted_reward=expectation(a * e.reward, e.measure, keepdims=True),
        weighted=expectation(a, e.measure, keepdims=True),
        mean_weighted_reward=e.mean_score(e.reward),
        mean_weighted=e.mean_score(e.reward * 0 + 1),
        default=weighted_mean(e.reward, a, e.measure),
    )


def _damped_mean(e: Evidence) -> Array:
    one = e.reward * 0 + 1
    share = leverage(e.weighted_sq_norm(), e.measure, e.unit)
    return leverage_damped(e.reward, weighted_mean(e.reward, one, e.measure), share)


BASELINES: dict[str, Callable[[Evidence], Array]] = {
    "zero": lambda e: e.reward * 0,
    "group_mean": lambda e: weighted_mean(e.reward, e.reward * 0 + 1, e.measure),
    "leave_one_out": lambda e: weighted_mean_of_others(e.reward, e.reward * 0 + 1, e.measure, e.unit),
    "length_weighted": lambda e: weighted_mean(e.reward, e.length(), e.measure),
    "on_policy_optimal": lambda e: weighted_mean(e.reward, e.score_sq_norm(), e.measure),
    "opob": lambda e: weighted_mean(e.reward, e.weighted_sq_norm(), e.measure),
    "opob_leave_one_out": lambda e: weighted_mean_of_others(e.reward, e.weighted_sq_norm(), e.measure, e.unit),
    "opob_truncated": _opob_truncated,
    "opob_released": lambda e: weighted_mean(e.reward, e.weighted_sq_norm() * e.ratio_sq(), e.measure),
    "leverage_damped_mean": _damped_mean,
    "population": lambda e: e.population(),
}
"""name -> baseline; add one here and it is in the catalogue, the command line, the proofs' registry and the tests"""


def weighted_quantile(reward: Array, weight: Array, measure: Array, quantile: float) -> Array:
    """The smallest R_j with sum_{R_i <= R_j} a_i >= quantile sum_i a_i; the mean without weight: (..., n) -> (..., 1).

    At 1/2 the lower weighted median. By all pairs, n^2: groups are small, and nothing has to be sorted.
    """
    xp = namespace(reward, weight)
    mass = weight * measure
    below = reward[..., None, :] <= reward[..., :, None]
    cumulated = xp.sum(xp.where(below, mass[..., None, :], 0), axis=-1)
    total = xp.sum(mass, axis=-1, keepdims=True)
    eligible = (cumulated >= quantile * total) & (mass > 0)
    found = xp.min(xp.where(eligible, reward, float("inf")), axis=-1, keepdims=True)
    return where(total > 0, found, expectation(reward, measure, keepdims=True))


def winsorized_mean(reward: Array, weight: Array, measure: Array, tail: float) -> Array:
    """b = E[a R'] / E[a], R' the reward held between its weighted quantiles tail and 1 - tail: (..., n) -> (..., 1)."""
    xp = namespace(reward, weight)
    low = weighted_quantile(reward, weight, measure, tail)
    high = weighted_quantile(reward, weight, measure, 1 - tail)
    return weighted_mean(xp.minimum(xp.maximum(reward, low), high), weight, measure)


def shrinkage(error: Array, spread: Array) -> Array:
    """lam = error / (error + spread): the share of the common mean, from the mean error and the spread of means."""
    return safe_divide(error, error + spread, error * 0)


def number_of_prompts(measure: Array) -> Array:
    """How many prompts have samples: (..., group, n) -> (..., 1, 1)."""
    return namespace(measure).sum(_present(measure), axis=-2, keepdims=True)


def mean_of_prompts(x: Array, measure: Array) -> Array:
    """The mean of one number a prompt: (..., group, 1), (..., group, n) -> (..., 1, 1)."""
    total = namespace(x).sum(x * _present(measure), axis=-2, keepdims=True)
    return safe_divide(total, number_of_prompts(measure), total * 0)


def mean_of_other_prompts(x: Array, measure: Array) -> Array:
    """The mean over the other prompts, 0 if there are none: (..., group, 1), (..., group, n) -> (..., group, 1)."""
    xp, present = namespace(x), _present(measure)
    flip = (*range(x.ndim - 2), x.ndim - 1, x.ndim - 2)
    total, count = (xp.permute_dims(sum_of_others(xp.permute_dims(y, flip)), flip) for y in (x * present, present))
    return safe_divide(total, count, total * 0)


def _present(measure: Array) -> Array:
    mass = namespace(measure).sum(measure, axis=-1, keepdims=True)
    return where(mass > 0, mass * 0 + 1, mass * 0)


def optimal_token_baseline(reward: Array, weight: Array, measure: Array) -> Array:
    """B_t = sum_i W_it R_i / sum_i W_it, the plain mean without weight: (..., n), (..., n, t) -> (..., 1, t).

    For a terminal reward, the reward-to-go R_i at every t. Where one response alone is alive, B_t = R_i: no gradient.
    """
    xp = namespace(reward, weight)
    mass = weight * measure[..., None]
    total = xp.sum(mass, axis=-2, keepdims=True)
    default = total * 0 + expectation(reward, measure, keepdims=True)[..., None]
    return safe_divide(xp.sum(mass * reward[..., None], axis=-2, keepdims=True), total, default)


def _released_weight(e: Evidence) -> Array:
    return e.weighted_sq_norm() * e.ratio_sq()


def _group_mean(e: Evidence) -> Array:
    return weighted_mean(e.reward, e.reward * 0 + 1, e.measure)


def _error_of_mean(e: Evidence) -> Array:
    # unbiased variance within a group over its n: (..., 1); 0 for groups of one, which tell nothing, and populations
    deviation = e.reward - _group_mean(e)
    variance = expectation(deviation * deviation, e.measure, keepdims=True)
    draw = expectation(e.unit + e.reward * 0, e.measure, keepdims=True)
    return safe_divide(variance * draw, 1 - draw, variance * 0)


def _batch_mean(e: Evidence) -> Array:
    return mean_of_prompts(_group_mean(e), e.prompt_measure())


def _shrunk_mean(e: Evidence) -> Array:
    mean, center, prompts = _group_mean(e), _batch_mean(e), e.prompt_measure()
    spread = mean_of_prompts((mean - center) * (mean - center), prompts)
    share = shrinkage(mean_of_prompts(_error_of_mean(e), prompts), spread)
    return (1 - share) * mean + share * center


def _shrunk_mean_of_others(e: Evidence) -> Array:
    # from deviations: a variance as a difference of moments is safe where the mean is small beside the spread
    prompts, center = e.prompt_measure(), _batch_mean(e)
    deviation = _group_mean(e) - center
    others = mean_of_other_prompts(deviation, prompts)
    spread = mean_of_other_prompts(deviation * deviation, prompts) - others * others
    share = shrinkage(mean_of_other_prompts(_error_of_mean(e), prompts), where(spread > 0, spread, spread * 0))
    share = share * (1 - 1 / number_of_prompts(prompts))
    return (1 - share) * BASELINES["leave_one_out"](e) + share * (others + center)


def mean_given_reward(x: Array, reward: Array, measure: Array) -> Array:
    """E[x | R = R_i] over all prompts and samples of a batch: (..., group, n) -> (..., group, n).

    By all pairs; rewards of a verifier are equal to the bit. Where the rewards are all different it is x itself.
    """
    xp = namespace(x, reward)
    flat = (*reward.shape[:-2], reward.shape[-2] * reward.shape[-1])
    value, level, mass = (xp.reshape(y, flat) for y in (x, reward, xp.broadcast_to(measure, reward.shape)))
    same = xp.where(level[..., None, :] == level[..., :, None], mass[..., None, :], mass[..., None, :] * 0)
    total = xp.sum(same, axis=-1)
    return xp.reshape(safe_divide(xp.sum(same * value[..., None, :], axis=-1), total, value * 0), reward.shape)


def _reward_stratified(e: Evidence) -> Array:
    """OPOB with a_i = w_i^2 ||s_i||^2 replaced by the batch's mean of it among responses of the same reward.

    E[E[a | R] R] = E[a R] (tower rule), so one prompt's population baseline is OPOB's (T15.tower). Within a single
    group it *is* OPOB: what it gains comes from sharing the levels' means between groups, two numbers a batch for a
    reward in {0, 1}, which hang less on one heavy weight. Across prompts of different a these are a model, no identity.
    """
    a = mean_given_reward(e.batch_sq_norm(), e.reward, e.prompt_measure())
    return weighted_mean(e.reward, a, e.measure)


def _token_weight_inside(e: Evidence) -> Array:
    step = e.on_tokens(e.token_weight_sq() * e.token_sq_norm())
    return e.on_tokens(namespace(step).cumulative_sum(step, axis=-1))


def _token_weight_outside(e: Evidence) -> Array:
    step = e.on_tokens(e.token_sq_norm())
    return e.on_tokens(e.token_weight_sq() * namespace(step).cumulative_sum(step, axis=-1))


def _zero_where_alone(e: Evidence) -> Array:
    # verl's handle_zero_tail: where one response alone is alive its baseline is 0, so that its tail keeps R
    token = e.token_sq_norm()
    alive = e.on_tokens(_present(e.measure[..., None]) + token * 0)
    count = namespace(token).sum(alive, axis=-2, keepdims=True)
    found = optimal_token_baseline(e.reward, _token_weight_inside(e), e.measure)
    return where(count > 1, found, found * 0)


SPECIAL_BASELINES: dict[str, tuple[Callable[[Evidence], Array], frozenset[str]]] = {
    "opob_released_median": (
        lambda e: weighted_quantile(e.reward, _released_weight(e), e.measure, 0.5),
        frozenset({"scores"}),
    ),
    "opob_released_winsorized": (
        lambda e: winsorized_mean(e.reward, _released_weight(e), e.measure, 0.05),
        frozenset({"scores"}),
    ),
    "opob_stratified": (_reward_stratified, frozenset({"scores", "grouped"})),
    "batch_mean": (_batch_mean, frozenset({"grouped"})),
    "shrinkage": (_shrunk_mean_of_others, frozenset({"grouped"})),
    "shrinkage_in_sample": (_shrunk_mean, frozenset({"grouped"})),
    "otb": (
        lambda e: optimal_token_baseline(e.reward, _token_weight_inside(e), e.measure),
        frozenset({"tokens", "log_prob", "collision"}),
    ),
    "otb_zero_tail": (_zero_where_alone, frozenset({"tokens", "log_prob", "collision"})),
    "otb_outside": (
        lambda e: optimal_token_baseline(e.reward, _token_weight_outside(e), e.measure),
        frozenset({"tokens", "log_prob", "collision"}),
    ),
}
"""name -> (baseline, what it needs of a batch): those that order rewards, span prompts, or work per token"""

_NEEDS = {
    "length_weighted": frozenset({"length"}),
    "population": frozenset({"population_baseline"}),
    **{name: frozenset({"scores"}) for name in BASELINES if name.startswith(("opob", "on_policy", "leverage"))},
}

NEEDS_TWO = frozenset({"leave_one_out", "opob_leave_one_out", "shrinkage"})
"""baselines that a group of one cannot have"""

KEEPS_THE_ZERO = frozenset({"zero", "otb_zero_tail"})
"""baselines that do not move with the reward: adding a constant to all rewards changes the update"""

INDEPENDENT = frozenset({"zero", "leave_one_out", "opob_leave_one_out", "population"})
"""baselines that do not look at the sample they are subtracted from (given the group is drawn independently)"""


def baseline(name: str) -> Callable[[Evidence], Array]:
    """The baseline of that name; `InputError` with the nearest name otherwise."""
    if name in SPECIAL_BASELINES:
        return SPECIAL_BASELINES[name][0]
    if name not in BASELINES:
        raise unknown_name("baseline", name, [*BASELINES, *SPECIAL_BASELINES])
    return BASELINES[name]


def baseline_needs(name: str) -> frozenset[str]:
    """What the baseline of that name needs of a batch besides rewards and ratios."""
    return SPECIAL_BASELINES[name][1] if name in SPECIAL_BASELINES else _NEEDS.get(name, frozenset())
