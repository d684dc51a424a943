"""Surrogates that look at the whole prefix of a token: cumulative ratios, budgets, filters.

A token was drawn after its prefix, so R_t = prod_{j<=t} r_j, and not r_t alone, is how much likelier the policy has
become to arrive at it. Positions count the policy's tokens from 1; padding stands at the end.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

from vcposim.arrays import LOG, Array, namespace
from vcposim.batch import Batch, over_tokens
from vcposim.errors import InputError
from vcposim.surrogates import (
    Needs,
    bounded,
    log_ratio_at,
    only,
    probabilities,
    require_not_negative,
    unclipped,
    weight_of,
)


@dataclass(frozen=True)
class PrefixClip:
    """R_t 1[log R_t within bounds that widen as t^power], R_t the ratio of the prefix up to and including t.

    Closed for A > 0 above `high` t^power, and for A < 0 below -`low` t^power or above `dual` t^power. The objective
    stops the gradient at the prefix, so that grad R_t = R_t grad log pi(y_t): CTPO (arXiv 2605.07331), whose release
    adds the dual clip. Infinite bounds leave R_t A: per-decision importance sampling of an advantage given by the
    prefix (Precup, Sutton and Singh 2000). With the reward of a whole response it is biased: what follows t is not
    weighted. `mean`: R_t^(1/t) in place of R_t, the release's other mode, whose spread falls with t.

    Raises `InputError` for a negative bound, or a power that is not finite.
    """

    low: float = math.inf
    high: float = math.inf
    dual: float = math.inf
    power: float = 0.5
    mean: bool = False
    needs: ClassVar[Needs] = ("tokens",)

    def __post_init__(self) -> None:
        require_not_negative(low=self.low, high=self.high, dual=self.dual)
        if not -math.inf < self.power < math.inf:
            raise InputError(f"power: {self.power} is not finite; 0.5 widens the bounds as the spread of log R_t")

    @property
    def families(self) -> tuple[str, ...]:
        """See `Surrogate`."""
        return ("importance",) if min(self.low, self.high, self.dual) == math.inf else ("clip",)

    def __call__(self, batch: Batch, advantage: Array) -> Array:
        """The factor: (..., n, t)."""
        x = bounded(log_ratio_at(batch, "token", self))
        total, at = prefix_sum(x, batch), position(x, batch)
        total, width = total / at if self.mean else total, at**self.power
        a = over_tokens(advantage, x)
        above = ((a > 0) & (total > self.high * width)) | ((a < 0) & (total > self.dual * width))
        return only(~(above | ((a < 0) & (total < -self.low * width))), weight_of(total, batch))


@dataclass(frozen=True)
class PrefixBudget:
    """CPPO: r_t 1[A (r_t - 1) <= 0, or Z_t <= min(delta, delta + budget W_{t-1} - S_{t-1})] (arXiv 2606.10968).

    Z_t = w_t |pi - mu| of the sampled token, w_t falling linearly from 1 to `last` along the response, S and W the sums
    of Z and w over the prefix, masked tokens included (eq. 8 to 11). Without weights and with an infinite budget it is
    DPPO's mask.

    Raises `InputError` for an infinite budget where prefixes without tokens would multiply it by 0.
    """

    delta: float = 0.15
    budget: float = 0.015
    last: float = 0.8
    needs: ClassVar[Needs] = ("tokens", "log_prob")
    families: ClassVar[tuple[str, ...]] = ("mask",)

    def __post_init__(self) -> None:
        require_not_negative(delta=self.delta, budget=self.budget, last=self.last)
        if self.budget == math.inf:
            raise InputError("budget: inf times a prefix without tokens is no number; use a large one")

    def __call__(self, batch: Batch, advantage: Array) -> Array:
        """The factor: (..., n, t)."""
        x = log_ratio_at(batch, "token", self)
        xp, (pi, mu), at = namespace(x), probabilities(batch, x), position(x, batch)
        rest = xp.maximum(over_tokens(batch.token_length(), x) * (at * 0 + 1.0) - 1, 1.0)
        w = 1 - (1 - self.last) * (at - 1) / rest
        z = w * abs(pi - mu)
        before_z, before_w = (prefix_sum(y, batch) - batch.on_tokens(y) for y in (z, w))
        limit = xp.minimum(self.delta + 0 * z, self.delta + self.budget * before_w - before_z)
        a = over_tokens(advantage, x)
        harmless = ((a >= 0) & (x <= 0)) | ((a <= 0) & (x >= 0))
        return only(harmless | (z <= limit), weight_of(x, batch))


@dataclass(frozen=True)
class KalmanClip:
    """KPO: PPO's clip on exp(xhat_t), xhat a scalar Kalman filter of the log-ratios (arXiv 2602.10609).

    K_t = (K_{t-1} + q) / (K_{t-1} + q + 1) with K_0 = 0, xhat_t = (1 - K_t) xhat_{t-1} + K_t log r_t; q is the noise of
    the state over that of the observation. At the released q = 1e-6 no gain exceeds 1e-3: of one token's log-ratio at
    most that passes, and of a constant drift 0.5% after 100 tokens, which is why its clip can be 3e-4.
    """

    noise: float = 1e-6
    low: float = 3e-4
    high: float = 4e-4
    needs: ClassVar[Needs] = ("tokens",)
    families: ClassVar[tuple[str, ...]] = ("clip",)

    def __post_init__(self) -> None:
        require_not_negative(noise=self.noise, low=self.low, high=self.high)

    def __call__(self, batch: Batch, advantage: Array) -> Array:
        """The factor: (..., n, t)."""
        x = batch.on_tokens(bounded(log_ratio_at(batch, "token", self)))
        gain, state, seen = 0.0, x[..., 0] * 0, []
        for t in range(x.shape[-1]):
            gain = min(max((gain + self.noise) / (gain + self.noise + 1), 1e-6), 1 - 1e-6)
            state = (1 - gain) * state + gain * x[..., t]
            seen.append(state)
        xp = namespace(x)
        filtered = xp.minimum(xp.stack(seen, axis=-1), 10.0)
        keep = unclipped(filtered, LOG, over_tokens(advantage, x), self.low, self.high)
        return only(keep, weight_of(filtered, batch))


@dataclass(frozen=True)
class LeastPrefix:
    """MinPRO: min(m_t r_t, cap), m_t = min_{j<t} r_j the least ratio of the prefix, 1 without one (arXiv 2601.22718).

    m_t r_t stands in for the ratio of the prefix, prod_{j<=t} r_j: one token of the prefix that the policy has given up
    damps all that follow, but nothing multiplies up with the length. Gradient of sg(clip(m_t r_t)) A log pi as two
    readers of the paper write it; neither gives its bounds: the cap is ours, and there is no floor, which would undo
    the damping.
    """

    cap: float = 1.2
    needs: ClassVar[Needs] = ("tokens",)
    families: ClassVar[tuple[str, ...]] = ("truncate",)

    def __post_init__(self) -> None:
        require_not_negative(cap=self.cap)

    def __call__(self, batch: Batch, advantage: Array) -> Array:
        """The factor: (..., n, t)."""
        x = bounded(log_ratio_at(batch, "token", self))
        xp, known = namespace(x), batch.on_tokens(x)
        counts = batch.on_tokens(xp.ones_like(x)) > 0
        # 1e6 is the largest of bounded log-ratios, so an empty prefix yields to the first token
        prefix = least_before(xp.where(counts, known, 1e6), 1e6)
        prefix = xp.where(position(x, batch) > 1, prefix, prefix * 0)
        return weight_of(xp.minimum(prefix + x, LOG.write(self.cap)), batch)


@dataclass(frozen=True)
class LargestK3:
    """1[max_t (r_t - 1 - log r_t) <= limit]: rejection of responses by their worst token (`seq_max_k3` of verl)."""

    limit: float
    needs: ClassVar[Needs] = ("tokens",)
    families: ClassVar[tuple[str, ...]] = ("mask",)

    def __post_init__(self) -> None:
        require_not_negative(limit=self.limit)

    def __call__(self, batch: Batch, advantage: Array) -> Array:
        """The factor: (..., n), or (..., n, t) if advantages are per token."""
        x = bounded(log_ratio_at(batch, "token", self))
        k3 = batch.on_tokens(weight_of(x, batch) - 1 - x)
        worst = over_tokens(namespace(k3).max(k3, axis=-1), advantage)
        return only(worst <= self.limit, advantage * 0 + 1)


def prefix_sum(x: Array, batch: Batch) -> Array:
    """sum_{j<=t} x_j over the policy's tokens: (..., n, t), same -> same."""
    return namespace(x).cumulative_sum(batch.on_tokens(x), axis=-1)


def least_before(x: Array, start: float) -> Array:
    """min_{j<t} x_j, and `start` where nothing precedes: (..., n, t), same -> same.

    By doubling: each pass looks twice as far back, so the logarithm of t of them do.
    """
    xp, far = namespace(x), 1
    least = xp.concat([x[..., :1] * 0 + start, x[..., :-1]], axis=-1)
    while far < x.shape[-1]:
        least = xp.concat([least[..., :far], xp.minimum(least[..., far:], least[..., :-far])], axis=-1)
        far *= 2
    return least


def position(x: Array, batch: Batch) -> Array:
    """1, 2, ... over the policy's tokens, at least 1 on padding: (..., n, t)."""
    xp = namespace(x)
    return batch.once("position", lambda: xp.maximum(prefix_sum(xp.ones_like(x), batch), 1.0))
