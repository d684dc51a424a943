"""What multiplies the advantage when it looks at the advantage: clips, gates, masks, soft weights.

PPO and its descendants are written as losses, min(r A, clip(r) A) and the like. Their gradient is what counts, and it
can be taken once, on paper: grad r = r grad log pi, so differentiating f(r) A gives (r f'(r) A) grad log pi. A clip
turns into a **gate**, 1 where the loss still moves with r and 0 where it is flat:

    PPO     r 1[not (A > 0 and r > 1 + high)] 1[not (A < 0 and r < 1 - low)]

A gate only closes on the *harmful* side, where the step would carry the ratio further out; that is what makes it depend
on the sign of A, and why it is no `Weighting`. A `Surrogate` maps a batch and its advantages to the factor, (..., n) on
the score of each trajectory or (..., n, t) on the score of each token, that stands in for the weight:

    c_it = factor_it(A) A_i

Where the published loss already is `sg(factor) A log pi` (CISPO, TOPR, VESPO, DPPO), the factor is read off.

The clips and masks that only compare run on exact rationals; those that need log or exp ask for `log_ratio`. The three
forms of M2PO, whose gate depends on all tokens at once, are next door in `second_moment`.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

from vcposim.arrays import LINEAR, LOG, Array, Scale, namespace, safe_divide
from vcposim.batch import Batch, over_tokens
from vcposim.errors import InputError, unknown_name
from vcposim.weights import LEVELS, at_level, value_of

Needs = tuple[str, ...]

LEVEL_NEEDS: dict[str, Needs] = {"token": ("tokens",), "sequence": (), "geometric": ("length",)}


class Surrogate(Protocol):
    """A function of a batch and its advantages (..., n) or (..., n, t); what it says of padding is zeroed later.

    One that looks at the rewards themselves says so, `reads_rewards = True`: a shift of the rewards is then no matter
    of the baseline alone. One that counts tokens or responses one by one, where others weigh them by their measure,
    says `counts_heads = True`: exact moments then show it batches as drawn. `families` says which of
    `vcposim.catalogue.entries.FAMILIES` it makes an entry belong to.
    """

    @property
    def needs(self) -> Needs:
        """Optional fields of the batch it cannot do without: `tokens` (token ratios), `length`, `log_prob`, ..."""
        ...

    def __call__(self, batch: Batch, advantage: Array) -> Array:
        """The factor: (..., n) or (..., n, t)."""
        ...


@runtime_checkable
class Penalized(Surrogate, Protocol):
    """A surrogate that also adds to the coefficient, whatever the advantage is: c = factor A + penalty."""

    def penalty(self, batch: Batch, advantage: Array) -> Array:
        """What is added: (..., n) or (..., n, t)."""
        ...


@dataclass(frozen=True)
class Clip:
    """PPO's clip at any level: ratio * 1[not (A > 0 and r > 1 + high)] 1[not (A < 0 and (r < 1 - low or r > dual))].

    Gradient of min(r A, clip(r, 1 - low, 1 + high) A) (PPO, arXiv 1707.06347); `high` > `low` is clip-higher (DAPO,
    2503.14476); `dual` > 1 floors the loss of A < 0 at dual * A (1912.09729). At level `geometric`, r = w^(1/L) and
    grad r = (r / L) grad log pi(tau): GSPO (2507.18071), whose 1/L is part of the gradient. `times_length` multiplies
    the loss of a response by its length, which cancels that: LUSPO (2602.05261).

    Raises `InputError` for an unknown level, a negative `low` or `high`, or `dual` <= 1.
    """

    low: float = 0.2
    high: float = 0.2
    dual: float = math.inf
    level: str = "token"
    times_length: bool = False
    families: ClassVar[tuple[str, ...]] = ("clip",)

    def __post_init__(self) -> None:
        require_level(self.level)
        require_not_negative(low=self.low, high=self.high)
        if not self.dual > 1:
            raise InputError(f"dual: {self.dual} is not above 1; dual clip floors the loss of A < 0 at dual * A")
        if self.times_length and self.level != "geometric":
            raise InputError(f"times_length: level {self.level!r} has no 1/L to cancel; use level 'geometric'")

    @property
    def needs(self) -> Needs:
        """See `Surrogate`."""
        return LEVEL_NEEDS[self.level]

    def __call__(self, batch: Batch, advantage: Array) -> Array:
        """The factor: (..., n, t) at token level, else (..., n)."""
        x, scale = ratio_at(batch, self.level)
        a = over_tokens(advantage, x)
        keep = unclipped(x, scale, a, self.low, self.high) & ~((a < 0) & (x > scale.write(self.dual)))
        factor = only(keep, value_of(x, batch, scale))
        per_token = self.level == "geometric" and not self.times_length
        return safe_divide(factor, batch.token_length(), factor * 0) if per_token else factor


@dataclass(frozen=True)
class DecoupledClip:
    """Decoupled PPO: r 1[r' = pi/anchor is not clipped]: clip around an anchor, correct from the behavior policy.

    Gradient of (anchor/mu) min(r' A, clip(r', 1 - low, 1 + high) A), (anchor/mu) r' = r (arXiv 2110.00641; AReaL,
    2505.24298).
    """

    low: float = 0.2
    high: float = 0.2
    needs: ClassVar[Needs] = ("tokens", "anchor_log_ratio")
    families: ClassVar[tuple[str, ...]] = ("clip",)

    def __post_init__(self) -> None:
        require_not_negative(low=self.low, high=self.high)

    def __call__(self, batch: Batch, advantage: Array) -> Array:
        """The factor: (..., n, t)."""
        x, anchor = log_ratio_at(batch, "token", self), batch.given("anchor_log_ratio")
        keep = unclipped(anchor, LOG, over_tokens(advantage, x), self.low, self.high)
        return only(keep, weight_of(x, batch))


@dataclass(frozen=True)
class LoglinearAnchor:
    """A-3PO: decoupled PPO whose anchor lies between pi and mu, log-linearly, by the lag d (arXiv 2512.06547).

    log anchor = log mu + (1 - 1/d) log(pi/mu), so r' = pi/anchor = r^(1/d) and no forward pass is needed for it; a clip
    of r' to [1 - low, 1 + high] lets r itself go to (1 + high)^d. `corrected` keeps anchor/mu in front, as the paper's
    loss has it; AReaL multiplies it in only where rejection sampling is configured, and otherwise has r' alone.

    `lag` is in updates; where it differs between tokens, so do the anchors: this takes one for all.

    Raises `InputError` for a lag below 1, or a negative bound.
    """

    lag: float
    low: float = 0.2
    high: float = 0.2
    corrected: bool = True
    needs: ClassVar[Needs] = ("tokens",)
    families: ClassVar[tuple[str, ...]] = ("clip",)

    def __post_init__(self) -> None:
        require_not_negative(low=self.low, high=self.high)
        if not 1 <= self.lag < math.inf:
            raise InputError(f"lag: {self.lag} is not a finite number of updates of at least 1; on policy use Clip")

    def __call__(self, batch: Batch, advantage: Array) -> Array:
        """The factor: (..., n, t)."""
        x = log_ratio_at(batch, "token", self)
        keep = unclipped(x / self.lag, LOG, over_tokens(advantage, x), self.low, self.high)
        return only(keep, weight_of(x if self.corrected else x / self.lag, batch))


@dataclass(frozen=True)
class GeometricMeanClip:
    """GMPO: (1/L) exp(mean_t log r_t clipped to [-low, high]) 1[token not clipped] (arXiv 2507.20673).

    Gradient of A times the geometric mean of token ratios, each clipped on its harmful side only and in log space: the
    bounds are e^-low and e^high. The paper's wide clip is (e^-0.4, e^0.4).
    """

    low: float = 0.4
    high: float = 0.4
    needs: ClassVar[Needs] = ("tokens",)
    families: ClassVar[tuple[str, ...]] = ("clip",)

    def __post_init__(self) -> None:
        require_not_negative(low=self.low, high=self.high)

    def __call__(self, batch: Batch, advantage: Array) -> Array:
        """The factor: (..., n, t)."""
        x = log_ratio_at(batch, "token", self)
        xp, a = namespace(x), over_tokens(advantage, x)
        clipped = xp.where(a > 0, xp.minimum(x, self.high), xp.where(a < 0, xp.maximum(x, -self.low), x))
        mean = LOG.root(xp.sum(batch.on_tokens(clipped), axis=-1), batch.token_length())
        factor = safe_divide(weight_of(mean, batch), batch.token_length(), mean * 0)
        return only(clipped == x, over_tokens(factor, x))


@dataclass(frozen=True)
class TaperNegatives:
    """TOPR: 1 for A >= 0, clip(w, floor, cap) for A < 0 (arXiv 2503.14286, canonical limits 0 and 1).

    w is the sequence ratio and A the reward itself in the paper; verl splits by the sign of the centered advantage and
    takes w^(1/L), level `geometric`: a different estimator under the same name.
    """

    floor: float = 0
    cap: float = 1
    level: str = "sequence"
    families: ClassVar[tuple[str, ...]] = ("truncate",)

    def __post_init__(self) -> None:
        require_level(self.level)
        require_not_negative(floor=self.floor, cap=self.cap)

    @property
    def needs(self) -> Needs:
        """See `Surrogate`."""
        return LEVEL_NEEDS[self.level]

    def __call__(self, batch: Batch, advantage: Array) -> Array:
        """The factor: (..., n, t) at token level or if advantages are per token, else (..., n)."""
        x, scale = ratio_at(batch, self.level)
        xp, a = namespace(x), over_tokens(advantage, x)
        tapered = xp.maximum(xp.minimum(x, scale.write(self.cap)), scale.write(self.floor))
        factor = over_tokens(value_of(tapered, batch, scale), a)
        return xp.where(a < 0, factor, 1)


@dataclass(frozen=True)
class NegativeSequenceMask:
    """0 for A < 0 and mean_t log(mu/pi) > delta, else 1: off-policy failures teach nothing (arXiv 2512.02556).

    By itself without a ratio; DeepSeek-V3.2 multiplies it into PPO's clip, `Product((Clip(), NegativeSequenceMask()))`.
    """

    delta: float = 1e-4
    needs: ClassVar[Needs] = ("length",)
    families: ClassVar[tuple[str, ...]] = ("mask",)

    def __post_init__(self) -> None:
        require_not_negative(delta=self.delta)

    def __call__(self, batch: Batch, advantage: Array) -> Array:
        """The factor: (..., n), or (..., n, t) if advantages are per token."""
        x, scale = ratio_at(batch, "geometric")
        # written so that a NaN has drifted: a mask fails closed
        drifted = over_tokens(~(x >= scale.write(math.exp(-self.delta))), advantage)
        return only(~(drifted & (advantage < 0)), advantage * 0 + 1)


@dataclass(frozen=True)
class Reject:
    """1[floor <= ratio <= cap], no ratio in front: rejection by token, sequence or geometric mean (verl).

    verl's default floor is 1/cap, two-sided. There, rejected tokens also leave the denominator of a token mean; here
    they stay in it. The "MIS" with the ratio in front is `Weighting("mask", ...)`.
    """

    cap: float
    floor: float = 0.0
    level: str = "sequence"
    families: ClassVar[tuple[str, ...]] = ("mask",)

    def __post_init__(self) -> None:
        require_level(self.level)
        require_not_negative(floor=self.floor, cap=self.cap)

    @property
    def needs(self) -> Needs:
        """See `Surrogate`."""
        return LEVEL_NEEDS[self.level]

    def __call__(self, batch: Batch, advantage: Array) -> Array:
        """The factor: (..., n, t) at token level, else (..., n)."""
        x, scale = ratio_at(batch, self.level)
        keep = (x <= scale.write(self.cap)) & (x >= scale.write(self.floor))
        return only(keep, over_tokens(batch.reward * 0 + 1, x))


@dataclass(frozen=True)
class Tempered:
    """min(w, cap)^exponent: between no ratio (exponent 0) and truncated importance weights (exponent 1).

    Its mean is the gradient at no policy unless the exponent is 0 and pi = mu, or 1 without a cap.
    """

    exponent: float = 0.5
    cap: float = 8.0
    level: str = "sequence"
    families: ClassVar[tuple[str, ...]] = ("soft", "truncate")

    def __post_init__(self) -> None:
        require_level(self.level)
        require_not_negative(exponent=self.exponent, cap=self.cap)

    @property
    def needs(self) -> Needs:
        """See `Surrogate`."""
        return LEVEL_NEEDS[self.level]

    def __call__(self, batch: Batch, advantage: Array) -> Array:
        """The factor: (..., n, t) at token level, else (..., n)."""
        x = log_ratio_at(batch, self.level, self)
        return weight_of(self.exponent * namespace(x).minimum(x, LOG.write(self.cap)), batch)


@dataclass(frozen=True)
class ProductOfTruncated:
    """prod_t min(r_t, cap): tokens truncated, then multiplied (Retrace, V-trace traces); TIS truncates the product."""

    cap: float = 1.0
    needs: ClassVar[Needs] = ("tokens",)
    families: ClassVar[tuple[str, ...]] = ("truncate",)

    def __post_init__(self) -> None:
        require_not_negative(cap=self.cap)

    def __call__(self, batch: Batch, advantage: Array) -> Array:
        """The factor: (..., n)."""
        x, scale = ratio_at(batch, "token")
        truncated = namespace(x).minimum(x, scale.write(self.cap))
        return scale.value(scale.product(truncated, batch.token_mask), batch.measure)


@dataclass(frozen=True)
class DivergenceMask:
    """DPPO: min(r, cap) 1[pi(y) has not moved too far from mu(y)], far being a divergence, not a ratio.

    On the sampled token y against all others (arXiv 2602.04879), three shipped variants and one more:

        binary_tv          drops pi - mu > high for A > 0, mu - pi > low for A <= 0
        binary_kl          drops KL(Bernoulli(mu) || Bernoulli(pi)) > limit, moved in the same harmful direction
        binary_kl_anchor   the same from the anchor policy instead of mu (TRL's experimental binary_kl_recompute)
        symmetric_tv       drops |pi - mu| beyond the limits whatever the sign of A (prime-rl, for a time)

    The 1e-8 is the released code's. Raises `InputError` for an unknown divergence or negative limits.
    """

    divergence: str = "binary_tv"
    low: float = 0.15
    high: float = 0.15
    cap: float = 20.0
    families: ClassVar[tuple[str, ...]] = ("mask", "truncate")

    def __post_init__(self) -> None:
        if self.divergence not in DIVERGENCES:
            raise unknown_name("divergence", self.divergence, DIVERGENCES)
        require_not_negative(low=self.low, high=self.high, cap=self.cap)

    @property
    def needs(self) -> Needs:
        """See `Surrogate`."""
        return ("tokens", "log_prob") + (("anchor_log_ratio",) if self.divergence == "binary_kl_anchor" else ())

    def __call__(self, batch: Batch, advantage: Array) -> Array:
        """The factor: (..., n, t)."""
        x, log_prob = log_ratio_at(batch, "token", self), batch.given("log_prob")
        xp, a = namespace(x), over_tokens(advantage, x)
        moved = batch.given("anchor_log_ratio") if self.divergence == "binary_kl_anchor" else x
        pi, mu = xp.exp(log_prob), xp.exp(xp.minimum(log_prob - moved, 0.0))  # no rounding above 1
        if self.divergence.startswith("binary_kl"):
            far = (1 - mu) * xp.log((1 - mu + 1e-8) / (1 - pi + 1e-8)) - mu * moved
            up, down = ~(far <= self.high) & (pi > mu), ~(far <= self.low) & (pi < mu)
        else:
            up, down = pi - mu > self.high, mu - pi > self.low
        if self.divergence != "symmetric_tv":
            up, down = up & (a > 0), down & (a <= 0)
        return only(~(up | down), weight_of(xp.minimum(x, LOG.write(self.cap)), batch))


@dataclass(frozen=True)
class TotalVariationFilter:
    """min(r_t, cap) 1[not (mean_t |r_t - 1| > limit and A log r_t > 0)]: open-instruct's, after VACO (2603.01365).

    The mean estimates twice the total variation between pi and mu along the response; where it is too large, tokens
    whose step would raise it are dropped. By allenai/open-instruct's code (`rho_mask_tv_divergence`), which has no
    default limit; VACO itself also realigns advantages with a critic. |log r_t| is held at 10 in the mean, as there.
    """

    limit: float
    cap: float = 2.0
    needs: ClassVar[Needs] = ("tokens",)
    families: ClassVar[tuple[str, ...]] = ("mask", "truncate")

    def __post_init__(self) -> None:
        require_not_negative(limit=self.limit, cap=self.cap)

    def __call__(self, batch: Batch, advantage: Array) -> Array:
        """The factor: (..., n, t)."""
        x = log_ratio_at(batch, "token", self)
        xp = namespace(x)
        away = batch.on_tokens(abs(xp.exp(xp.minimum(xp.maximum(x, -10.0), 10.0)) - 1))
        variation = safe_divide(xp.sum(away, axis=-1), batch.token_length(), batch.reward * 0)
        # a NaN is not within the limit
        far = over_tokens(~(variation <= self.limit), x)
        harmful = over_tokens(advantage, x) * x > 0
        return only(~(far & harmful), weight_of(xp.minimum(x, LOG.write(self.cap)), batch))


DIVERGENCES = ("binary_tv", "binary_kl", "binary_kl_anchor", "symmetric_tv")


@dataclass(frozen=True)
class GaussianTrust:
    """GIPO: r exp(-(log r / sigma)^2 / 2), a soft gate centered at r = 1 (arXiv 2603.03955).

    Gradient of sg(exp(-(log r / sigma)^2 / 2)) r A, as shipped; at most exp(sigma^2 / 2).

    Raises `InputError` for a sigma that is not finite and positive.
    """

    sigma: float = 1.0
    needs: ClassVar[Needs] = ("tokens",)
    families: ClassVar[tuple[str, ...]] = ("soft",)

    def __post_init__(self) -> None:
        if not 0 < self.sigma < math.inf:
            raise InputError(f"sigma: {self.sigma} is not a finite positive number; it is a spread of log-ratios")

    def __call__(self, batch: Batch, advantage: Array) -> Array:
        """The factor: (..., n, t)."""
        x = log_ratio_at(batch, "token", self)
        z = bounded(x) / self.sigma
        return weight_of(bounded(x) - z * z / 2, batch)


@dataclass(frozen=True)
class SignedTruncation:
    """DISPO: r held in [1 - low, 1 + high], with bounds of its own for each sign of A (arXiv 2602.00983).

    Gradient of sg(clip(r)) A log pi, the objective as four readers of the paper write it; the bounds are those that one
    of them gives: wide where A < 0, for a tight cap there ends in repetition and a tight floor in empty responses.

    Raises `InputError` for a low outside [0, 1] or a negative high.
    """

    positive: tuple[float, float] = (0.2, 10.0)
    negative: tuple[float, float] = (1.0, 100.0)
    needs: ClassVar[Needs] = ("tokens",)
    families: ClassVar[tuple[str, ...]] = ("truncate",)

    def __post_init__(self) -> None:
        for name in ("positive", "negative"):
            low, high = getattr(self, name)
            if not (0 <= low <= 1 and high >= 0):
                raise InputError(f"{name}: {(low, high)} is not a pair of low in [0, 1] and high >= 0; see the formula")

    def __call__(self, batch: Batch, advantage: Array) -> Array:
        """The factor: (..., n, t)."""
        x, scale = ratio_at(batch, "token")
        xp = namespace(x)

        def held(low: float, high: float) -> Array:
            return xp.maximum(xp.minimum(x, scale.write(1 + high)), scale.write(1 - low))

        factor = xp.where(over_tokens(advantage, x) < 0, held(*self.negative), held(*self.positive))
        return value_of(factor, batch, scale)


@dataclass(frozen=True)
class GammaShape:
    """VESPO: w^k exp(lam (1 - w)), w the sequence ratio, (k, lam) by the sign of A (arXiv 2602.10693).

    1 at w = 1 with its maximum at w = k / lam: a soft truncation above and a damping below. Defaults are the released
    code's fallbacks; its docstring states others (2, 1.5) and (4, 2.5).

    Raises `InputError` for a k that is not positive, or a negative rate.
    """

    positive: tuple[float, float] = (2.0, 3.0)
    negative: tuple[float, float] = (3.0, 2.0)
    needs: ClassVar[Needs] = ()
    families: ClassVar[tuple[str, ...]] = ("soft",)

    def __post_init__(self) -> None:
        for name in ("positive", "negative"):
            k, rate = getattr(self, name)
            if not (0 < k < math.inf and 0 <= rate < math.inf):
                raise InputError(f"{name}: {(k, rate)} is not a pair of a positive power and a non-negative rate")

    def __call__(self, batch: Batch, advantage: Array) -> Array:
        """The factor: (..., n), or (..., n, t) if advantages are per token."""
        x = bounded(log_ratio_at(batch, "sequence", self))

        def shape(k: float, rate: float) -> Array:
            return over_tokens(weight_of(k * x + rate * (1 - weight_of(x, batch)), batch), advantage)

        return namespace(x).where(advantage < 0, shape(*self.negative), shape(*self.positive))


@dataclass(frozen=True)
class SigmoidGate:
    """SAPO: r sech^2(tau (r - 1) / 2), tau by the sign of A (arXiv 2511.20347; TRL, verl and others alike).

    Gradient of (4 / tau) sigmoid(tau (r - 1)) A. At tau = 1 it has its maximum, 1.575, at r = 2.06, so tokens up to
    r = 3.466 are amplified before larger ones are damped.
    """

    positive: float = 1.0
    negative: float = 1.05
    needs: ClassVar[Needs] = ("tokens",)
    families: ClassVar[tuple[str, ...]] = ("soft",)

    def __post_init__(self) -> None:
        require_not_negative(positive=self.positive, negative=self.negative)

    def __call__(self, batch: Batch, advantage: Array) -> Array:
        """The factor: (..., n, t)."""
        x = bounded(log_ratio_at(batch, "token", self))
        xp, a = namespace(x), over_tokens(advantage, x)
        z = xp.where(a > 0, self.positive + 0 * x, self.negative) * abs(weight_of(x, batch) - 1)
        # 4 sigmoid(z) (1 - sigmoid(z)) in logarithms: z reaches the range of exp
        return weight_of(x + math.log(4) - z - 2 * xp.log(1 + xp.exp(-z)), batch)


@dataclass(frozen=True)
class DivergenceDamping:
    """DRPO: r [1 - sign(A) (pi - mu) / epsilon] (arXiv 2606.09821).

    Gradient of r A - |A| mu (r - 1)^2 / (2 epsilon). At the released epsilon = 12.5 the bracket stays within 1 +- 0.08:
    probabilities cannot differ by more than 1, so it never turns a step around.

    Raises `InputError` for an epsilon that is not finite and positive.
    """

    epsilon: float = 12.5
    needs: ClassVar[Needs] = ("tokens", "log_prob")
    families: ClassVar[tuple[str, ...]] = ("soft",)

    def __post_init__(self) -> None:
        if not 0 < self.epsilon < math.inf:
            raise InputError(f"epsilon: {self.epsilon} is not a finite positive number; it divides pi - mu")

    def __call__(self, batch: Batch, advantage: Array) -> Array:
        """The factor: (..., n, t)."""
        x = log_ratio_at(batch, "token", self)
        a, (pi, mu) = over_tokens(advantage, x), probabilities(batch, x)
        moved = (pi - mu) / self.epsilon
        return weight_of(x, batch) * (1 - namespace(x).where(a < 0, -moved, moved))


@dataclass(frozen=True)
class ProbabilityBand:
    """prime-rl's IPO: r 1[|pi - mu| <= limit] A - pull log r, the pull on every token (its code, July 2026).

    Gradient of 1[kept] r A - (pull / 2) (log r)^2; `DivergenceMask("symmetric_tv")` with no cap and with the pull.
    """

    limit: float = 0.1
    pull: float = 2e-3
    needs: ClassVar[Needs] = ("tokens", "log_prob")
    families: ClassVar[tuple[str, ...]] = ("mask", "pull")

    def __post_init__(self) -> None:
        require_not_negative(limit=self.limit, pull=self.pull)

    def __call__(self, batch: Batch, advantage: Array) -> Array:
        """The factor: (..., n, t)."""
        x = log_ratio_at(batch, "token", self)
        pi, mu = probabilities(batch, x)
        return only(abs(pi - mu) <= self.limit, weight_of(x, batch))

    def penalty(self, batch: Batch, advantage: Array) -> Array:
        """What is added to the coefficient: (..., n, t)."""
        return -self.pull * bounded(log_ratio_at(batch, "token", self))


@dataclass(frozen=True)
class QuadraticPull:
    """A - tau log(pi/mu): no ratio in front, a squared log-ratio as penalty (Kimi k1.5, arXiv 2501.12599, eq. 3).

    At level `sequence`, of the response: gradient of A log pi - (tau / 2) (log w)^2. At level `token`, the sum of the
    squares of tokens instead of the square of their sum, as ROLL's `kimi15` and Tinker's `dro` compute it.

    Raises `InputError` for a negative tau, or a level that is neither.
    """

    tau: float = 0.1
    level: str = "sequence"
    families: ClassVar[tuple[str, ...]] = ("pull",)

    def __post_init__(self) -> None:
        require_not_negative(tau=self.tau)
        if self.level not in ("token", "sequence"):
            raise unknown_name("level", self.level, ("token", "sequence"))

    @property
    def needs(self) -> Needs:
        """See `Surrogate`."""
        return LEVEL_NEEDS[self.level]

    def __call__(self, batch: Batch, advantage: Array) -> Array:
        """The factor, 1: (..., n) or (..., n, t)."""
        return advantage * 0 + 1

    def penalty(self, batch: Batch, advantage: Array) -> Array:
        """What is added to the coefficient: (..., n), or (..., n, t) at token level."""
        return -self.tau * bounded(log_ratio_at(batch, self.level, self))


@dataclass(frozen=True)
class Product:
    """The product of several factors, as where a mask is multiplied into a clip.

    Raises `InputError` for a factor that also adds a penalty: a product has none.
    """

    factors: tuple[Surrogate, ...]

    def __post_init__(self) -> None:
        for factor in self.factors:
            if isinstance(factor, Penalized):
                raise InputError(f"factors: {type(factor).__name__} adds a penalty, and a product has none; drop it")

    @property
    def needs(self) -> Needs:
        """See `Surrogate`."""
        return tuple(dict.fromkeys(need for factor in self.factors for need in factor.needs))

    @property
    def families(self) -> tuple[str, ...]:
        """See `Surrogate`."""
        return tuple(dict.fromkeys(name for factor in self.factors for name in getattr(factor, "families", ())))

    @property
    def counts_heads(self) -> bool:
        """See `Surrogate`: as soon as one of them does."""
        return any(getattr(factor, "counts_heads", False) for factor in self.factors)

    def __call__(self, batch: Batch, advantage: Array) -> Array:
        """The factor: (..., n), or (..., n, t) as soon as one of them is."""
        product = advantage * 0 + 1
        for factor in self.factors:
            value = factor(batch, advantage)
            product = over_tokens(product, value) * over_tokens(value, product)
        return product


def unclipped(x: Array, scale: Scale, advantage: Array, low: float, high: float) -> Array:
    """Where min(r A, clip(r, 1 - low, 1 + high) A) still moves with r; x is r on a scale: same -> same."""
    above = (advantage > 0) & (x > scale.write(1 + high))
    below = (advantage < 0) & (x < scale.write(1 - low))
    return ~(above | below)


def only(keep: Array, x: Array) -> Array:
    """x where kept, else 0: same -> same."""
    return namespace(x).where(keep, x, 0)


def bounded(log_ratio: Array) -> Array:
    """log-ratios in [-1e6, 1e6], past exp's range but with squares that are numbers: same -> same."""
    xp = namespace(log_ratio)
    return xp.minimum(xp.maximum(log_ratio, -1e6), 1e6)


def probabilities(batch: Batch, log_ratio: Array) -> tuple[Array, Array]:
    """pi and mu of each token from log pi and the log-ratio; neither above 1 by rounding: (..., n, t) each."""
    xp, log_prob = namespace(log_ratio), batch.given("log_prob")

    def both() -> tuple[Array, Array]:
        return xp.exp(log_prob), xp.exp(xp.minimum(log_prob - log_ratio, 0.0))

    return batch.once("probabilities", both) if log_ratio is batch.log_ratio else both()


def weight_of(log_weight: Array, batch: Batch) -> Array:
    """exp, saturating, of log-weights (..., n) or (..., n, t); zero on samples of measure zero: same -> same."""
    return value_of(log_weight, batch, LOG)


def ratio_at(batch: Batch, level: str) -> tuple[Array, Scale]:
    """The batch's ratios at a level: (..., n) or (..., n, t) for `token`; and the scale they are written on."""
    scale = LOG if batch.ratio is None else LINEAR
    return at_level(batch, level, scale), scale


def log_ratio_at(batch: Batch, level: str, who: object) -> Array:
    """The batch's log-ratios at a level, for formulas without an exact form: (..., n) or (..., n, t).

    Raises `InputError` for a batch of exact ratios.
    """
    if batch.ratio is not None:
        raise InputError(f"ratio: {type(who).__name__} needs logarithms; pass log_ratio instead")
    return at_level(batch, level, LOG)


def require_level(level: str) -> None:
    """Refuse unknown levels."""
    if level not in LEVELS:
        raise unknown_name("level", level, LEVELS)


def require_not_negative(**limits: float) -> None:
    """Refuse limits that are negative or NaN."""
    for name, value in limits.items():
        if not value >= 0:
            raise InputError(f"{name}: {value} is not a non-negative number")
