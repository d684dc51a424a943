"""How long responses are: the law of the number of tokens, of which generation time is made.

A batch is done when its longest response is, so the tail of this law decides what synchronous training costs. Four
laws: `fixed`, `log_normal`, `pareto`, and `empirical` (resampled from what was measured). All give integers from 1 to
`max_tokens`, the limit at which a sampler cuts a response off; a draw x of the continuous law is ceil(x) tokens.

Responses to one prompt resemble each other in length. `log_normal` has that as a correlation, `empirical` resamples
whole groups where it is told the groups; the other laws draw every response by itself.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtr

from vcposim.arrays import Array
from vcposim.errors import InputError

LONGEST = 1 << 24
"""no response is longer, in tokens, whatever the law"""


@dataclass(frozen=True)
class Lengths:
    """A law of response lengths: `name`, `draw(rng, groups, size)` -> (groups, size) integers, `cdf(m)` = P(L <= m).

    `independent` says whether responses of a group are.
    """

    name: str
    draw: Callable[[np.random.Generator, int, int], Array]
    cdf: Callable[[Array], Array]
    max_tokens: int
    independent: bool = True

    @property
    def mean(self) -> float:
        """E[L], tokens, exact."""
        return self.longest(1)

    def longest(self, n: int) -> float:
        """E[max of n independent lengths] = sum_{m >= 0} 1 - F(m)^n, tokens, exact.

        Raises `InputError` for n < 1.
        """
        if n < 1:
            raise InputError(f"n: {n} is not positive; the longest of at least one response exists")
        # blocks, and an end once what follows cannot matter
        total, start = 0.0, 0
        while start < self.max_tokens:
            stop = min(self.max_tokens, max(2 * start, 4096))
            left = -np.expm1(n * _log(self.cdf(np.arange(start, stop, dtype=float))))
            total, start = total + float(left.sum()), stop
            if left[-1] * (self.max_tokens - stop) < 1e-12 * total:
                break
        return total


def fixed(tokens: int) -> Lengths:
    """Always the same length."""
    _require_tokens("length", tokens)
    count = int(tokens)
    return Lengths(
        f"fixed {count}",
        lambda rng, groups, size: np.full((groups, size), count),
        lambda m: (np.asarray(m) >= count).astype(float),
        count,
    )


def log_normal(mean: float, sd: float, max_tokens: int = LONGEST, correlation: float = 0.0) -> Lengths:
    """log L is normal, so that L has this mean and sd (tokens) before the cut; `correlation` of log L within a group.

    Raises `InputError` for a mean below 1, a negative sd, or a correlation out of [0, 1].
    """
    _require_mean(mean, max_tokens)
    if not 0 <= sd < math.inf:
        raise InputError(f"length sd: {sd} is not a finite non-negative number of tokens")
    if not 0 <= correlation <= 1:
        raise InputError(f"length correlation: {correlation} is not in [0, 1]; 0 means independent")
    spread = math.sqrt(math.log1p((sd / mean) ** 2))
    center = math.log(mean) - spread**2 / 2

    def draw(rng: np.random.Generator, groups: int, size: int) -> Array:
        # group by group, so that how many are drawn at once changes nothing
        normal = rng.standard_normal((groups, size + 1))
        mixed = math.sqrt(correlation) * normal[:, :1] + math.sqrt(1 - correlation) * normal[:, 1:]
        return _cut(np.exp(center + spread * mixed), max_tokens)

    def cdf(m: Array) -> Array:
        z = (_log(m) - center) / spread if spread else np.where(np.asarray(m) >= mean, np.inf, -np.inf)
        return _capped(ndtr(z), m, max_tokens)

    name = f"log-normal, mean {mean:g}, sd {sd:g}"
    return Lengths(name, draw, cdf, max_tokens, independent=correlation == 0)


def pareto(mean: float, tail: float, max_tokens: int = LONGEST) -> Lengths:
    """P(L > x) = (low / x)^tail with `low` so that the mean (tokens, before the cut) is as given; `tail` > 1.

    Raises `InputError` for a mean below 1 or a tail of 1 or less, which has no mean.
    """
    _require_mean(mean, max_tokens)
    if not 1 < tail < math.inf:
        raise InputError(f"length tail: {tail} gives no finite mean; use an index above 1, smaller is heavier")
    low = mean * (tail - 1) / tail

    def draw(rng: np.random.Generator, groups: int, size: int) -> Array:
        return _cut(low * (1 - rng.random((groups, size))) ** (-1 / tail), max_tokens)

    def cdf(m: Array) -> Array:
        return _capped(-np.expm1(-tail * np.maximum(_log(np.asarray(m) / low), 0)), m, max_tokens)

    return Lengths(f"Pareto, mean {mean:g}, tail {tail:g}", draw, cdf, max_tokens)


def empirical(tokens: Sequence[float], group: Sequence[int] | None = None, max_tokens: int = LONGEST) -> Lengths:
    """Resampled with replacement from measured lengths; with the `group` of each, a group's draws share one prompt.

    Raises `InputError` for no lengths, lengths below 1, or groups that do not match.
    """
    measured = np.asarray(tokens, dtype=float)
    if not measured.size:
        raise InputError("lengths: none given; measure at least one response")
    if not np.all((measured >= 1) & (measured <= LONGEST)):
        worst = measured[~((measured >= 1) & (measured <= LONGEST))][0]
        raise InputError(f"lengths: {worst:g} is not between 1 and {LONGEST} tokens; drop empty responses")
    measured = _cut(measured, max_tokens)
    ordered = np.sort(measured)
    if group is not None and len(group) != measured.size:
        raise InputError(f"group: {len(group)} entries for {measured.size} lengths; give one each")
    code = np.zeros(measured.size, dtype=int) if group is None else np.unique(group, return_inverse=True)[1]
    by_group = measured[np.argsort(code, kind="stable")]
    size_of = np.bincount(code)
    first = np.cumsum(size_of) - size_of
    # a prompt counts by its responses, so that the law of one length is that of the measured ones
    prompt_cdf = np.cumsum(size_of) / measured.size

    def draw(rng: np.random.Generator, groups: int, size: int) -> Array:
        uniform = rng.random((groups, size + 1))
        prompt = np.minimum(np.searchsorted(prompt_cdf, uniform[:, 0], side="right"), len(first) - 1)
        within = (uniform[:, 1:] * size_of[prompt][:, None]).astype(int)
        return by_group[first[prompt][:, None] + within]

    def cdf(m: Array) -> Array:
        return np.searchsorted(ordered, m, side="right") / ordered.size

    name = f"{measured.size} measured, mean {measured.mean():.4g}, sd {measured.std():.4g}"
    return Lengths(name, draw, cdf, int(ordered[-1]), independent=len(first) == 1)


def _cut(x: Array, max_tokens: int) -> Array:
    return np.minimum(np.maximum(np.ceil(x), 1), max_tokens).astype(int)


def _capped(cdf: Array, m: Array, max_tokens: int) -> Array:
    whole = np.floor(np.asarray(m, dtype=float))
    return np.where(whole >= max_tokens, 1.0, np.where(whole < 1, 0.0, cdf))


def _log(x: Array) -> Array:
    with np.errstate(divide="ignore"):
        return np.log(x)


def _require_tokens(name: str, tokens: float) -> None:
    if not (1 <= tokens <= LONGEST and tokens == int(tokens)):
        raise InputError(f"{name}: {tokens} is not a whole number of tokens from 1 to {LONGEST}")


def _require_mean(mean: float, max_tokens: int) -> None:
    _require_tokens("max_tokens", max_tokens)
    if not 1 <= mean <= LONGEST:
        raise InputError(f"length mean: {mean} is not between 1 and {LONGEST} tokens; give the mean response")
