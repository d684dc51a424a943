"""What is subtracted from the reward: a baseline leaves the mean of w (R - b) s alone (if it does not look at the
sample) and changes its variance.

All in-batch baselines here are weighted means of the group's rewards; they differ in the weight:

    group_mean          1                  what GRPO subtracts (arXiv 2402.03300), and most trainers
    length_weighted     L_i                OPO, length as a stand-in for ||s_i||^2 (arXiv 2505.23585)
    on_policy_optimal   ||s_i||^2          minimises the variance when w = 1 (Weaver & Tao 2001, arXiv 1301.2315)
    opob                w_i^2 ||s_i||^2    minimises the variance off policy (VCPO, arXiv 2602.17616; for
                                           parameter-based exploration before, arXiv 1301.3966)
    opob_released       wbar_i^2 w_i^2 ||s_i||^2   what the reference code of VCPO computes

`leave_one_out` (RLOO, arXiv 2402.14740) and `opob_leave_one_out` are the same means without sample i, so that b does
not look at the sample it is subtracted from and the estimate stays unbiased. The two are tied by the **leverage
identity** R_i - b = (1 - h_i)(R_i - b_{-i}), h_i being sample i's share of the weight: in-batch is leave-one-out times
a soft mask on dominating samples. `leverage_damped_mean` isolates that mask: (1 - h_i)(R_i - mean).

Three kinds look further than one group's rewards and scores: robust aggregations of the released OPOB weights (they
order the rewards), means over the prompts of a batch (shrinkage: arXiv 2511.03710), and the optimal *token* baseline
(arXiv 2602.07078).

Every function is (..., n) -> (..., 1) for one baseline a group, (..., n) for one a sample, (..., 1, t) for one a token.
`BASELINES` at the end holds all that is known of each by name. The weight of a weighted mean is written once, as a
`Monomial`; the mean, the mean without sample i, and the logarithm of the weight follow from it.
"""

from collections.abc import Callable
from dataclasses import dataclass

from vcposim.arrays import (
    LINEAR,
    LOG,
    Array,
    expectation,
    indistinguishable,
    namespace,
    safe_divide,
    sum_of_others,
    where,
)
from vcposim.batch import Batch, over_tokens
from vcposim.errors import InputError, unknown_name
from vcposim.weights import Weight, at_level


def weighted_mean(reward: Array, weight: Array, measure: Array) -> Array:
    """b = E[a R] / E[a]; the plain mean where no sample has weight: (..., n) -> (..., 1).

    That fallback keeps b equivariant under reward shifts; where all weights vanish the estimate is zero whatever b is.
    """
    default = expectation(reward, measure, keepdims=True)
    total = expectation(weight, measure, keepdims=True)
    return safe_divide(expectation(weight * reward, measure, keepdims=True), total, default)


def weighted_mean_of_others(reward: Array, weight: Array, measure: Array, unit: Array) -> Array:
    """b_{-i} = sum_{j != i} a_j R_j / sum_{j != i} a_j: (..., n), unit (..., 1) or () -> (..., n).

    One unit of mass is left out. Where the others have no weight, their plain mean; where there are no others, R_i
    itself: no information, no step.
    Sums of others are formed without subtraction, so a dominating sample costs no precision.
    """

    def others(x: Array) -> Array:
        return sum_of_others(x * measure) + x * (measure - unit)

    one = reward * 0 + 1
    default = safe_divide(others(reward), others(one), reward)
    return safe_divide(others(weight * reward), others(weight), default)


def leverage(weight: Array, measure: Array, unit: Array) -> Array:
    """h_i = unit a_i / E[a], one draw's share in [0, 1] (C8, C10): (..., n), unit (..., 1) or () -> (..., n).

    Where no sample has weight, the share in the plain mean, `unit`.
    """
    total = expectation(weight, measure, keepdims=True)
    return safe_divide(weight * unit, total, weight * 0 + unit)


def leverage_damped(reward: Array, baseline: Array, share: Array) -> Array:
    """b_i with R_i - b_i = (1 - h_i)(R_i - b): any baseline, damped by leverage: same -> same."""
    return reward - (1 - share) * (reward - baseline)


def minimum_variance(
    weighted_reward: Array, weighted: Array, mean_weighted_reward: Array, mean_weighted: Array, default: Array
) -> Array:
    """b = (E[a R] - <E[w s R], E[w s]>) / (E[a] - ||E[w s]||^2), a = ||w s||^2: minimises tr Cov of w (R - b) s.

    Exact for any weights; where E[w s] = 0 (full importance weights) it is the OPOB. `weighted_reward` E[a R] and
    `weighted` E[a] are (..., 1), the means E[w s R] and E[w s] are (..., p):
    (..., 1), (..., 1), (..., p), (..., p), (..., 1) -> (..., 1).
    """
    xp = namespace(weighted, mean_weighted)
    cross = xp.sum(mean_weighted_reward * mean_weighted, axis=-1, keepdims=True)
    square = xp.sum(mean_weighted * mean_weighted, axis=-1, keepdims=True)
    spread = weighted - square
    equal = indistinguishable(spread, weighted)  # all w_i s_i of the group alike: no baseline changes their spread
    return where(equal, default, (weighted_reward - cross) / where(equal, spread * 0 + 1, spread))


@dataclass(frozen=True)
class Evidence:
    """What a baseline may look at, of a batch and its weights; computed when asked. Shapes (..., n) unless stated."""

    batch: Batch
    weight: Weight

    @property
    def reward(self) -> Array:
        """R_i: (..., n)."""
        return self.batch.reward

    @property
    def measure(self) -> Array:
        """The probability of each outcome: (..., n)."""
        return self.batch.measure

    @property
    def unit(self) -> Array:
        """The mass of one draw: (..., 1), or (1,) or () of all alike."""
        return self.batch.unit

    @property
    def one(self) -> Array:
        """1 for each sample: (..., n)."""
        return self.batch.reward * 0 + 1

    def length(self) -> Array:
        """L_i, tokens: (..., n)."""
        return self.batch.token_length()

    def score_sq_norm(self) -> Array:
        """||s_i||^2: (..., n)."""
        return self.batch.scored().sq_norm(self.one)

    def weighted_sq_norm(self) -> Array:
        """||w_i s_i||^2 up to one factor per group, the OPOB's weight: (..., n)."""
        return self.batch.scored().sq_norm(self.weight.relative)

    def ratio_sq(self) -> Array:
        """The untouched sequence ratio squared, up to one factor per group: (..., n)."""
        scale = LOG if self.batch.ratio is None else LINEAR
        ratio = scale.relative(at_level(self.batch, "sequence", scale), self.batch.measure)
        return ratio * ratio

    def mean_score(self, x: Array) -> Array:
        """E[w x s] on the factor of `weighted_sq_norm`: (..., n) -> (..., p)."""
        mass, relative = self.batch.measure * x, self.weight.relative
        return self.batch.scored().combine(relative * over_tokens(mass, relative))

    def population(self) -> Array:
        """The oracle: (..., 1).

        Raises `InputError` without one.
        """
        if self.batch.population_baseline is None:
            raise InputError("baseline: 'population' is an oracle; it needs a problem with exact moments")
        return self.batch.population_baseline

    def token_sq_norm(self) -> Array:
        """||grad_logits log pi(y_t)||^2 = 1 - 2 pi(y_t) + sum_v pi(v)^2: (..., n, t)."""
        log_prob, collision = self.batch.given("log_prob"), self.batch.given("collision")
        return 1 - 2 * namespace(log_prob).exp(log_prob) + collision

    def token_weight_sq(self) -> Array:
        """w_it^2 on one factor per group: (..., n, t), or (..., n, 1) of trajectories, or (..., n) without tokens."""
        relative = over_tokens(self.weight.relative, self.batch.given_ratio)
        return relative * relative

    def on_tokens(self, x: Array) -> Array:
        """Zeros on padding: (..., n, t), same -> same."""
        return self.batch.on_tokens(x)

    def prompt_measure(self) -> Array:
        """The measure, if the groups are the prompts of one batch: (..., group, n)."""
        self.batch.given("grouped")
        return self.batch.measure

    def batch_sq_norm(self) -> Array:
        """||w_i s_i||^2 up to one factor for the whole batch: (..., group, n)."""
        batch, value = self.batch, self.weight.value
        value = namespace(value).where(over_tokens(batch.measure, value) > 0, value, 0)
        # divided by the batch's largest weight first: no square overflows
        largest = namespace(value).max(abs(value), axis=tuple(range(batch.reward.ndim - 2, value.ndim)), keepdims=True)
        return batch.scored().sq_norm(safe_divide(value, largest, value * 0))


@dataclass(frozen=True)
class Monomial:
    """w^weight ||s||^score rho^ratio L^length, the weight of a reward in a mean, up to one factor a group.

    w is the weight after treatment, rho the untouched sequence ratio, L the tokens. Exponents are 0 or 2, of L 0 or 1;
    w comes with ||s||, since a token's weight has no meaning without its score.

    Raises `InputError` for other exponents.
    """

    weight: int = 0
    score: int = 0
    ratio: int = 0
    length: int = 0

    def __post_init__(self) -> None:
        if not {self.weight, self.score, self.ratio} <= {0, 2} or self.length not in (0, 1):
            raise InputError(f"exponents: {self} has others than 0 and 2 (0 and 1 of the length)")
        if self.weight and not self.score:
            raise InputError(f"exponents: {self} has the weight without the score; give score=2")

    def of(self, e: Evidence) -> Array:
        """The weight itself: (..., n)."""
        factors = [e.weighted_sq_norm()] if self.weight else [e.score_sq_norm()] if self.score else []
        factors += [e.ratio_sq()] if self.ratio else []
        factors += [e.length()] if self.length else []
        product = factors[0] if factors else e.one
        for factor in factors[1:]:
            product = product * factor
        return product

    def log(
        self,
        log_weight: Array | None = None,
        log_score: Array | None = None,
        log_ratio: Array | None = None,
        log_length: Array | None = None,
    ) -> Array:
        """Its logarithm from those of w, ||s||, rho and L, nats: (..., n); for ratios whose squares are no floats.

        What has exponent 0 is not looked at; 0 where that is all.
        """
        logs: tuple[Array, ...] = (log_weight, log_score, log_ratio, log_length)
        total: Array = 0.0
        for power, log in zip((self.weight, self.score, self.ratio, self.length), logs, strict=True):
            if power:
                total = total + power * log
        return total

    @property
    def needs(self) -> frozenset[str]:
        """What it needs of a batch."""
        return frozenset((["scores"] if self.score else []) + (["length"] if self.length else []))


@dataclass(frozen=True)
class Baseline:
    """All that is known of a baseline; calling it gives b."""

    value: Callable[[Evidence], Array]
    weight: Monomial | None = None
    """the weight of the weighted mean that it is, with or without sample i"""
    needs: frozenset[str] = frozenset()
    """what it needs of a batch besides rewards and ratios, as `Estimator.needs` says it"""
    per: str = "group"
    """whether there is one a `group`, one a `sample` or one a `token`"""
    needs_two: bool = False
    """whether a group of one cannot have it"""
    independent: bool = False
    """whether it does not look at the sample it is subtracted from (given the group is drawn independently)"""
    equivariant: bool = True
    """whether a constant added to all rewards is added to it"""
    norms_suffice: bool = True
    """whether ||s_i|| is all it needs of scores, not their sums"""
    counts_heads: bool = False
    """whether it counts responses, whatever their measure: then two draws are not one of twice the measure"""
    rational: bool = True
    """whether it takes sums, products and quotients alone, so that exact numbers and symbols pass through"""

    def __call__(self, e: Evidence) -> Array:
        """b: (..., 1) per group, (..., n) per sample, (..., 1, t) per token, (*batch, 1, 1) or (1,) of a batch."""
        return self.value(e)

    @property
    def ordinary(self) -> bool:
        """Whether it is a rational function of one group's rewards and scores, per trajectory."""
        return self.rational and not self.needs & {"grouped", "tokens"}

    @property
    def constant(self) -> bool:
        """Whether it is a number that no sample changes."""
        return self.independent and self.per == "group"

    @property
    def one_unknown(self) -> bool:
        """Whether it is one number a group, known as soon as the norms are: coefficients are then affine in it."""
        return self.per == "group" and self.needs == {"scores"} and self.norms_suffice

    @property
    def has_held_out(self) -> bool:
        """Whether `held_out` exists."""
        return self.weight is not None or self.constant

    def held_out(self, e: Evidence) -> Array:
        """The same without sample i: (..., n), or (..., 1) of a constant, which is what it is.

        Raises `InputError` for what is neither: a mask, an order or a spread has no such twin.
        """
        if self.weight is not None:
            return weighted_mean_of_others(e.reward, self.weight.of(e), e.measure, e.unit)
        if not self.constant:
            raise InputError("baseline: it is no weighted mean, so it has no value without a sample")
        return self.value(e)


def mean(weight: Monomial) -> Baseline:
    """The mean of the group's rewards, weighted."""
    return Baseline(lambda e: weighted_mean(e.reward, weight.of(e), e.measure), weight, weight.needs)


def leave_one_out(weight: Monomial) -> Baseline:
    """The weighted mean of the others' rewards."""
    return Baseline(
        lambda e: weighted_mean_of_others(e.reward, weight.of(e), e.measure, e.unit),
        weight,
        weight.needs,
        per="sample",
        needs_two=True,
        independent=True,
    )


def _opob_truncated(e: Evidence) -> Array:
    a = e.weighted_sq_norm()
    return minimum_variance(
        weighted_reward=expectation(a * e.reward, e.measure, keepdims=True),
        weighted=expectation(a, e.measure, keepdims=True),
        mean_weighted_reward=e.mean_score(e.reward),
        mean_weighted=e.mean_score(e.one),
        default=weighted_mean(e.reward, a, e.measure),
    )


def _half_optimal(e: Evidence) -> Array:
    # halfway from the mean to n^2: shrinks what n^2 estimates with few responses towards what it estimates well
    return (_group_mean(e) + weighted_mean(e.reward, SCORE.of(e), e.measure)) / 2


def _damped_mean(e: Evidence) -> Array:
    share = leverage(e.weighted_sq_norm(), e.measure, e.unit)
    return leverage_damped(e.reward, weighted_mean(e.reward, e.one, e.measure), share)


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


MEDIAN = 0.5 - 1e-9
"""the quantile of the lower median; less than 1/2, for masses 1/n do not always add up to it"""


def winsorized_mean(reward: Array, weight: Array, measure: Array, tail: float) -> Array:
    """b = E[a R'] / E[a], R' the reward held between its weighted quantiles tail and 1 - tail: (..., n) -> (..., 1)."""
    xp = namespace(reward, weight)
    low = weighted_quantile(reward, weight, measure, tail)
    high = weighted_quantile(reward, weight, measure, 1 - tail)
    return weighted_mean(xp.minimum(xp.maximum(reward, low), high), weight, measure)


def shrinkage(error: Array, spread: Array) -> Array:
    """lam = error / (error + spread): the common mean's share, from mean error and spread of means: same -> same."""
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
    """B_t = sum_i W_it R_i / sum_i W_it, a plain mean without weight: (..., n), weight (..., n, t) -> (..., 1, t).

    For a terminal reward, the reward-to-go R_i at every t. Where one response alone is alive, B_t = R_i: no gradient.
    """
    xp = namespace(reward, weight)
    mass = weight * measure[..., None]
    total = xp.sum(mass, axis=-2, keepdims=True)
    default = total * 0 + expectation(reward, measure, keepdims=True)[..., None]
    return safe_divide(xp.sum(mass * reward[..., None], axis=-2, keepdims=True), total, default)


def _group_mean(e: Evidence) -> Array:
    return weighted_mean(e.reward, e.one, e.measure)


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
    return (1 - share) * weighted_mean_of_others(e.reward, e.one, e.measure, e.unit) + share * (others + center)


MOST_PAIRED = 2048
"""samples of a batch that are compared with each other pair by pair"""


def mean_given_reward(x: Array, reward: Array, measure: Array) -> Array:
    """E[x | R = R_i] over all prompts and samples of a batch: (..., group, n) -> (..., group, n).

    By all pairs, or reward by reward above `MOST_PAIRED` samples: the pairs of 15,000 take gigabytes.
    Rewards of a verifier are equal to the bit. Where the rewards are all different it is x itself.
    """
    xp = namespace(x, reward)
    flat = (*reward.shape[:-2], reward.shape[-2] * reward.shape[-1])
    value, level, mass = (xp.reshape(y, flat) for y in (x, reward, xp.broadcast_to(measure, reward.shape)))
    if flat[-1] > MOST_PAIRED:
        kinds, counts = xp.unique_counts(level)
        alone = xp.take(counts, xp.reshape(xp.unique_inverse(level)[1], (-1,))) == 1
        found = xp.where(xp.reshape(alone, flat) & (mass > 0), value, value * 0)  # a sum of one is that one
        for one in kinds[counts > 1]:
            own = xp.where(level == one, mass, mass * 0)
            total = xp.sum(own, axis=-1, keepdims=True)
            found = xp.where(
                level == one, safe_divide(xp.sum(own * value, axis=-1, keepdims=True), total, total * 0), found
            )
        return xp.reshape(found, reward.shape)
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


PLAIN, LENGTH = Monomial(), Monomial(length=1)
SCORE, OPOB = Monomial(score=2), Monomial(weight=2, score=2)
RELEASED = Monomial(weight=2, score=2, ratio=2)

_SCORES, _TOKENS = frozenset({"scores"}), frozenset({"tokens", "log_prob", "collision"})
_GROUPED = frozenset({"grouped"})

BASELINES: dict[str, Baseline] = {
    "zero": Baseline(lambda e: e.reward * 0, independent=True, equivariant=False),
    "group_mean": mean(PLAIN),
    "leave_one_out": leave_one_out(PLAIN),
    "length_weighted": mean(LENGTH),
    "on_policy_optimal": mean(SCORE),
    "half_optimal": Baseline(_half_optimal, needs=_SCORES),
    "opob": mean(OPOB),
    "opob_leave_one_out": leave_one_out(OPOB),
    "opob_truncated": Baseline(_opob_truncated, needs=_SCORES, norms_suffice=False),
    "opob_released": mean(RELEASED),
    "leverage_damped_mean": Baseline(_damped_mean, needs=_SCORES, per="sample"),
    "population": Baseline(
        Evidence.population, needs=frozenset({"population_baseline"}), independent=True, equivariant=False
    ),
    "group_median": Baseline(lambda e: weighted_quantile(e.reward, e.one, e.measure, MEDIAN), rational=False),
    "opob_released_median": Baseline(
        lambda e: weighted_quantile(e.reward, RELEASED.of(e), e.measure, 0.5), needs=_SCORES, rational=False
    ),
    "opob_released_winsorized": Baseline(
        lambda e: winsorized_mean(e.reward, RELEASED.of(e), e.measure, 0.05), needs=_SCORES, rational=False
    ),
    "opob_stratified": Baseline(_reward_stratified, needs=_SCORES | _GROUPED, rational=False),
    "batch_mean": Baseline(_batch_mean, needs=_GROUPED),
    "shrinkage": Baseline(_shrunk_mean_of_others, needs=_GROUPED, per="sample", needs_two=True, independent=True),
    "shrinkage_in_sample": Baseline(_shrunk_mean, needs=_GROUPED),
    "otb": Baseline(
        lambda e: optimal_token_baseline(e.reward, _token_weight_inside(e), e.measure), needs=_TOKENS, per="token"
    ),
    "otb_zero_tail": Baseline(_zero_where_alone, needs=_TOKENS, per="token", equivariant=False, counts_heads=True),
    "otb_outside": Baseline(
        lambda e: optimal_token_baseline(e.reward, _token_weight_outside(e), e.measure), needs=_TOKENS, per="token"
    ),
}
"""name -> baseline; add one here and it is in the command line, the replay, the trainers and the tests"""


def baseline(name: str) -> Baseline:
    """The baseline of that name; `InputError` with the nearest name otherwise."""
    if name not in BASELINES:
        raise unknown_name("baseline", name, BASELINES)
    return BASELINES[name]
