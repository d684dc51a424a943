"""Surrogates whose factor depends on all tokens, or all responses, of a pool at once.

The pool is a prompt's group, or the whole batch if it is `grouped`; in a training run it is the micro-batch that the
framework reduces over, so what these compute depends on how a batch is cut: see `vcposim.second_moment` for three more.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from vcposim.arrays import LOG, Array, log_expectation, namespace, safe_divide
from vcposim.baselines import MEDIAN, weighted_mean_of_others, weighted_quantile
from vcposim.batch import Batch, over_tokens
from vcposim.errors import InputError
from vcposim.second_moment import pooled, unpooled
from vcposim.surrogates import Needs, bounded, log_ratio_at, only, require_not_negative, unclipped, weight_of


@dataclass(frozen=True)
class EssCap:
    """P3O: min(r, ESS) A - (1 - ESS) (1 - 1/r), ESS = (sum r)^2 / (n sum r^2) over the tokens of the pool.

    Gradient of sg(min(r, ESS)) A log pi - (1 - ESS) (log r + 1/r - 1), arXiv 2605.12380 with its released code: a cap
    below 1 even where r = 1, and the k3 estimate of KL(pi || mu) on the sampler's tokens; beyond |log r| = 10 its 1/r
    has no gradient. Where a ratio is not finite ESS is 0: nothing is learned and tokens are pulled back. The release
    takes 1 instead, so that the cap is loosest and the pull off just when ratios overflow; `fails_open` shows that
    (without the 1e-8 that it adds to the mean of r^2).

    `anchored` is P4O: the lesser of this ESS and that of pi/anchor, and a pull towards a mixture of both policies.
    """

    anchored: bool = False
    fails_open: bool = False
    families: ClassVar[tuple[str, ...]] = ("truncate", "pull", "pooled")
    counts_heads: ClassVar[bool] = True

    @property
    def needs(self) -> Needs:
        """See `Surrogate`."""
        return ("tokens", "anchor_log_ratio") if self.anchored else ("tokens",)

    def __call__(self, batch: Batch, advantage: Array) -> Array:
        """The factor: (..., n, t)."""
        x = log_ratio_at(batch, "token", self)
        xp, ess = namespace(x), self._ess(batch, x)
        if self.anchored:
            ess = xp.minimum(ess, self._ess(batch, batch.given("anchor_log_ratio")))
        return xp.minimum(weight_of(x, batch), ess)

    def penalty(self, batch: Batch, advantage: Array) -> Array:
        """What is added to the coefficient, -(1 - ESS)(1 - q/pi): (..., n, t)."""
        x = log_ratio_at(batch, "token", self)
        xp, ess = namespace(x), self._ess(batch, x)
        if self.anchored:
            anchor = batch.given("anchor_log_ratio")
            away, away_anchor = 1 - ess, 1 - self._ess(batch, anchor)
            mixed = away * weight_of(-bounded(x), batch) + away_anchor * weight_of(-bounded(anchor), batch)
            q_over_pi = safe_divide(mixed, away + away_anchor + 0 * mixed, mixed * 0 + 1)
            ess = xp.minimum(ess, 1 - away_anchor)
        else:
            q_over_pi = weight_of(-bounded(x), batch)
        near = (q_over_pi >= math.exp(-10)) & (q_over_pi <= math.exp(10))
        return -(1 - ess) * (1 - only(near | (q_over_pi != q_over_pi), q_over_pi))

    def _ess(self, batch: Batch, x: Array) -> Array:
        """In [0, 1], (..., 1, 1), or (..., 1, 1, 1) for the whole batch."""
        xp, counted = namespace(x), _counted(batch, x)
        y, counts = pooled(xp.where(counted, x, -math.inf), batch), pooled(counted, batch)
        n = xp.sum(xp.where(counts, xp.ones_like(y), 0.0), axis=-1, keepdims=True)
        top = xp.max(y, axis=-1, keepdims=True)
        # a NaN fails the comparisons, so does a pool without tokens
        sound = (top < math.inf) & (top > -math.inf)
        if self.fails_open:  # exp as frameworks compute it, infinite beyond its range
            largest = math.log(float(xp.finfo(y.dtype).max))
            weight = xp.where(y > largest, math.inf, xp.exp(xp.minimum(y, largest)))
        else:
            weight = xp.exp(y - xp.where(sound, top, 0.0))
        first, second = xp.sum(weight, axis=-1, keepdims=True), xp.sum(weight * weight, axis=-1, keepdims=True)
        if self.fails_open:
            sound = (first < math.inf) & (second < math.inf)
        ess = safe_divide(first * first, xp.where(sound, n * second, 1.0), n * 0)
        return _per_pool(xp.where(sound, xp.minimum(ess, 1.0), float(self.fails_open)), batch)


@dataclass(frozen=True)
class BalancedClip:
    """BAPO: PPO's clip with bounds raised until positive tokens outweigh negative ones (arXiv 2510.18927).

    With pos = sum_{A>=0} min(r, high) A and neg = -sum_{A<0} max(r, low) A over the pool, the lower bound goes up in
    steps from low[0] to low[1], then the upper one, while pos / neg < target. Then as `Clip`, with its dual clip. A
    higher lower bound masks *more* negative tokens. Bounds and step of the released configuration; its README states
    0.6 to 0.9 and 1.2 to 3 and calls target a share of the whole, where the code compares the ratio of the two.

    Raises `InputError` for bounds that do not rise, or a step that is not positive.
    """

    low: tuple[float, float] = (0.6, 0.8)
    high: tuple[float, float] = (1.2, 2.0)
    step: float = 0.05
    target: float = 1.0
    dual: float = 3.0
    needs: ClassVar[Needs] = ("tokens",)
    families: ClassVar[tuple[str, ...]] = ("clip", "pooled")
    counts_heads: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("low", "high"):
            first, last = getattr(self, name)
            if not 0 <= first <= last < math.inf:
                raise InputError(f"{name}: {(first, last)} is not a rising pair of finite bounds")
        if not 0 < self.step < math.inf:
            raise InputError(f"step: {self.step} is not a finite positive number")
        require_not_negative(target=self.target, dual=self.dual)

    def __call__(self, batch: Batch, advantage: Array) -> Array:
        """The factor: (..., n, t)."""
        x = log_ratio_at(batch, "token", self)
        xp, r, a = namespace(x), weight_of(x, batch), over_tokens(advantage, x) + 0 * x
        counted = _counted(batch, x)
        mass = xp.where(counted, a, 0.0)
        r_known = xp.where(counted, r, 0.0)

        def total(x: Array) -> Array:
            return _per_pool(xp.sum(pooled(x, batch), axis=-1, keepdims=True), batch)

        def up(high: Array) -> Array:
            return total(xp.where(mass >= 0, xp.minimum(r_known, high) * mass, 0.0))

        def down(low: Array) -> Array:
            return total(xp.where(mass < 0, -xp.maximum(r_known, low) * mass, 0.0))

        def short(up: Array, down: Array) -> Array:
            return (down > 0) & (up < self.target * (down + 1e-8))

        start = total(mass * 0)
        low, high = start + self.low[0], start + self.high[0]
        positive = up(high)
        for _ in range(_steps(self.low, self.step)):
            low = xp.where(short(positive, down(low)), xp.minimum(low + self.step, self.low[1]), low)
        negative = down(low)
        for _ in range(_steps(self.high, self.step)):
            high = xp.where(short(up(high), negative), xp.minimum(high + self.step, self.high[1]), high)
        closed = ((a > 0) & (r > high)) | ((a < 0) & ((r < low) | (r > self.dual)))
        return only(~closed, r)


def _steps(bounds: tuple[float, float], step: float) -> int:
    return math.ceil((bounds[1] - bounds[0]) / step - 1e-9)


@dataclass(frozen=True)
class CovariancePenalty:
    """KL-Cov: r A - beta sign(log r) on the tokens of largest covariance, r A elsewhere (arXiv 2505.22617).

    Covariance of a token: (A - mean A)(log pi - mean log pi) over the pool; of n tokens max(1, floor(share n)) are
    penalized, ties all. Gradient of r A - beta |log r|: not of a KL divergence, and 0 at r = 1.
    """

    share: float = 2e-4
    beta: float = 0.1
    needs: ClassVar[Needs] = ("tokens", "log_prob")
    families: ClassVar[tuple[str, ...]] = ("pull", "pooled")
    counts_heads: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_not_negative(share=self.share, beta=self.beta)

    def __call__(self, batch: Batch, advantage: Array) -> Array:
        """The factor: (..., n, t)."""
        return weight_of(log_ratio_at(batch, "token", self), batch)

    def penalty(self, batch: Batch, advantage: Array) -> Array:
        """What is added to the coefficient: (..., n, t)."""
        x = log_ratio_at(batch, "token", self)
        xp, counts, n, covariance = _covariance(batch, x, advantage)
        ordered = xp.sort(xp.where(counts, -covariance, math.inf), axis=-1)
        rank = xp.cumulative_sum(xp.ones_like(ordered), axis=-1)
        last = xp.max(
            xp.where(rank <= xp.maximum(xp.floor(self.share * n), 1.0), ordered, -math.inf), axis=-1, keepdims=True
        )
        # by rounding alone two tokens of one kind would differ, and which is first would matter
        tie = 1e-12 * xp.max(xp.where(counts, abs(covariance), 0.0), axis=-1, keepdims=True)
        chosen = unpooled(counts & (-covariance <= last + tie), x)
        sign = xp.where(x > 0, 1.0, xp.where(x < 0, -1.0, x * 0))
        return only(chosen, -self.beta * sign)


@dataclass(frozen=True)
class CovarianceClip:
    """Clip-Cov: PPO's clip, and k of the tokens whose covariance is between `lower` and `upper` dropped at random
    (arXiv 2505.22617, as verl ships it): here with the chance to survive, 1 - k/|S|, in the place of the draw.

    S holds the tokens of the pool with lower < (A - mean A)(log pi - mean log pi) < upper that the clip left open;
    k = min(|S|, max(1, floor(share n))) of n tokens. The factor is the draw's mean given the batch: the same mean, less
    variance, and no random numbers. A pool of few tokens always loses one, at 100 tokens fifty times the share.

    `ratio=False` is what is left of it where pi = mu: the chances alone, for what it equals on policy.

    Raises `InputError` for bounds in the wrong order.
    """

    share: float = 2e-4
    lower: float = 1.0
    upper: float = 5.0
    low: float = 0.2
    high: float = 0.2
    ratio: bool = True
    needs: ClassVar[Needs] = ("tokens", "log_prob")
    families: ClassVar[tuple[str, ...]] = ("clip", "mask", "pooled")
    counts_heads: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_not_negative(share=self.share, low=self.low, high=self.high)
        if not self.lower < self.upper:
            raise InputError(f"lower: {self.lower} is not below upper, {self.upper}")

    def __call__(self, batch: Batch, advantage: Array) -> Array:
        """The factor: (..., n, t)."""
        x = log_ratio_at(batch, "token", self)
        x = x if self.ratio else x * 0
        xp, counts, n, covariance = _covariance(batch, x, advantage)
        keep = unclipped(x, LOG, over_tokens(advantage, x), self.low, self.high)
        within = counts & pooled(keep, batch) & (covariance > self.lower) & (covariance < self.upper)
        size = xp.sum(xp.where(within, xp.ones_like(covariance), 0.0), axis=-1, keepdims=True)
        dropped = xp.minimum(size, xp.maximum(xp.floor(self.share * n), 1.0))
        chance = 1 - safe_divide(dropped, size, size * 0)
        survives = unpooled(xp.where(within, chance, 1.0), x)
        return only(keep, weight_of(x, batch)) * survives


def _covariance(batch: Batch, x: Array, advantage: Array) -> tuple[Any, Array, Array, Array]:
    """(A - mean A)(log pi - mean log pi) of each token over its pool, with what counts and how many do: pooled axes."""
    xp, counts, log_prob = namespace(x), pooled(_counted(batch, x), batch), batch.given("log_prob")
    one = xp.where(counts, xp.ones_like(pooled(x, batch)), 0.0)
    n = xp.sum(one, axis=-1, keepdims=True)

    def deviation(y: Array) -> Array:
        known = xp.where(counts, pooled(y, batch), 0.0)
        return known - safe_divide(xp.sum(known, axis=-1, keepdims=True), n, n * 0)

    return xp, counts, n, deviation(over_tokens(advantage, x) + 0 * log_prob) * deviation(log_prob)


@dataclass(frozen=True)
class GroupExpectation:
    """GEPO: (p_i / E) / L_i, clipped as PPO's ratio, E = sum_j q_j^2 / sum_j q_j over the group (arXiv 2508.17850).

    p and q are the geometric means of a response's token probabilities under the policy and the sampler, as in the
    released code; the paper writes the probabilities of whole responses. One number for all q_j keeps a small q_i from
    making a large weight, and makes it no ratio: where pi = mu, p_i / E is not 1 but grows with p_i. E is over the
    responses of a prompt, as in eq. 2; the release takes all responses of a device.

    `ratio=False` is what is left of it where pi = mu.
    """

    low: float = 0.2
    high: float = 0.2
    ratio: bool = True
    needs: ClassVar[Needs] = ("tokens", "log_prob")
    families: ClassVar[tuple[str, ...]] = ("clip", "pooled")

    def __post_init__(self) -> None:
        require_not_negative(low=self.low, high=self.high)

    def __call__(self, batch: Batch, advantage: Array) -> Array:
        """The factor: (..., n), or (..., n, 1) if advantages are per token."""
        x, log_pi = bounded(log_ratio_at(batch, "token", self)), batch.given("log_prob")
        xp, length = namespace(x), batch.token_length()
        log_mu = xp.minimum(log_pi - x, 0.0) if self.ratio else log_pi

        def geometric(y: Array) -> Array:
            return safe_divide(xp.sum(batch.on_tokens(y), axis=-1), length, batch.reward * 0)

        q, m = geometric(log_mu), batch.measure
        shared = log_expectation(2 * q, m, keepdims=True) - log_expectation(q, m, keepdims=True)
        away = geometric(log_pi) - shared
        keep = unclipped(over_tokens(away, advantage), LOG, advantage, self.low, self.high)
        each = safe_divide(weight_of(away, batch), length, batch.reward * 0)
        return only(keep, over_tokens(each, advantage))


@dataclass(frozen=True)
class MedianDeviation:
    """MC-GRPO: 1 / (MAD + epsilon), MAD the median of |R - median R| (arXiv 2601.22582, with its released code).

    For baseline `group_median`. Where more than half of the rewards agree MAD is 0, and the coefficient of the others
    is their distance over epsilon: 1,000 for a reward of 1 among zeros at the released 1e-3.

    Raises `InputError` for an epsilon that is not finite and positive.
    """

    epsilon: float = 1e-3
    needs: ClassVar[Needs] = ()
    families: ClassVar[tuple[str, ...]] = ("normalizer",)

    def __post_init__(self) -> None:
        if not 0 < self.epsilon < math.inf:
            raise InputError(
                f"epsilon: {self.epsilon} is not a finite positive number; the MAD it is added to can be 0"
            )

    def __call__(self, batch: Batch, advantage: Array) -> Array:
        """The factor: (..., n), or (..., n, 1) if advantages are per token."""
        one, m = batch.reward * 0 + 1, batch.measure
        away = abs(batch.reward - weighted_quantile(batch.reward, one, m, MEDIAN))
        return over_tokens(one / (weighted_quantile(away, one, m, MEDIAN) + self.epsilon), advantage)


@dataclass(frozen=True)
class LengthPower:
    """Delta-L normalisation: L^-alpha / mean_j L_j^-alpha, over all responses of the pool (arXiv 2509.07558).

    alpha = 1 is the paper's for short answers, 0.75 for mathematics, 0 is Dr. GRPO. The weights sum to n, so they leave
    a mean alone only where lengths carry no information about the gradient.
    """

    alpha: float = 1.0
    needs: ClassVar[Needs] = ("length",)
    families: ClassVar[tuple[str, ...]] = ("normalizer", "pooled")

    def __post_init__(self) -> None:
        require_not_negative(alpha=self.alpha)

    def __call__(self, batch: Batch, advantage: Array) -> Array:
        """The factor: (..., n), or (..., n, 1) if advantages are per token."""
        xp, length = namespace(batch.reward), batch.token_length()
        power = xp.where(length > 0, length * (batch.reward * 0 + 1.0), 1.0) ** -self.alpha
        axes = (-2, -1) if batch.grouped else -1
        mass = xp.where(length > 0, batch.measure, 0.0)
        mean = xp.sum(power * mass, axis=axes, keepdims=True) / xp.sum(mass, axis=axes, keepdims=True)
        return over_tokens(power / mean, advantage)


@dataclass(frozen=True)
class InfluenceCap:
    """No response moves the policy more than `times` the others of its group do on average.

    1 where |A_i| ||s_i|| <= times mean_{j != i} |A_j| ||s_j||, and less, so that it is just that, where it is more. A
    ratio takes no part. On a baseline that gives failures an advantage of 0 a lone success would be held at nothing;
    use it on a mean.
    """

    times: float = 4.0
    needs: ClassVar[Needs] = ("scores",)
    families: ClassVar[tuple[str, ...]] = ("truncate", "pooled")

    def __post_init__(self) -> None:
        require_not_negative(times=self.times)

    def __call__(self, batch: Batch, advantage: Array) -> Array:
        """The factor: (..., n). Advantages are one a response.

        Raises `InputError` for advantages one a token.
        """
        if advantage.ndim > batch.reward.ndim:
            raise InputError("InfluenceCap: it takes one advantage a response; use a baseline of the group")
        one = batch.reward * 0 + 1
        size = abs(advantage) * namespace(advantage).sqrt(batch.scored().sq_norm(one))
        limit = self.times * weighted_mean_of_others(size, one, batch.measure, batch.unit)
        return namespace(size).minimum(safe_divide(limit, size, one), 1.0)


@dataclass(frozen=True)
class SuccessRate:
    """MaxRL: 1 / (mean R + epsilon) before R - mean R, for rewards that are successes (arXiv 2602.02710).

    On policy, for R in {0, 1} of probability p, n draws and epsilon -> 0 the mean is [1 - (1-p)^(n-1)] / p times the
    gradient of p: that of a likelihood truncated after n - 1 terms, not of the expected reward. A group whose mean is
    not positive, or with a negative reward, has no success rate: factor 0.
    """

    epsilon: float = 1e-6
    needs: ClassVar[Needs] = ()
    reads_rewards: ClassVar[bool] = True
    families: ClassVar[tuple[str, ...]] = ("normalizer",)

    def __post_init__(self) -> None:
        require_not_negative(epsilon=self.epsilon)

    def __call__(self, batch: Batch, advantage: Array) -> Array:
        """The factor: (..., n), or (..., n, 1) if advantages are per token."""
        xp, reward = namespace(batch.reward), batch.reward
        mean = xp.sum(reward * batch.measure, axis=-1, keepdims=True)
        least = xp.min(xp.where(batch.measure > 0, reward, 0.0), axis=-1, keepdims=True)
        valid = (mean > 0) & (least >= 0)
        factor = only(valid, 1 / (xp.where(valid, mean, 1.0) + self.epsilon)) + 0 * reward
        return over_tokens(factor, advantage)


def _counted(batch: Batch, x: Array) -> Array:
    """Where a token is the policy's and its response counts, whatever its ratio is: (..., n, t)."""
    counts = (over_tokens(batch.measure, x) > 0) & namespace(x).ones_like(x, dtype=namespace(x).bool)
    return counts if batch.token_mask is None else counts & (batch.token_mask > 0)


def _per_pool(value: Array, batch: Batch) -> Array:
    """One number a pool against its tokens: (*pool, 1) -> (*pool, 1, 1) or (*pool, 1, 1, 1), that for a whole batch."""
    return namespace(value).reshape(value, (*value.shape[:-1], *[1] * (3 if batch.grouped else 2)))
