"""From ratios to weights: what multiplies the score after truncation, masking, clipping, normalisation.

Three levels. *Token*: each token's ratio r_t = pi/mu weighs its own score. *Sequence*: the whole trajectory's
w = prod_t r_t. *Geometric*: w^(1/L), the per-token average. A **treatment** limits the variance, at a price in bias:
only `importance` at sequence level is unbiased, `self_normalize` is consistent, the rest keep a bias whatever n is.

Each treatment is written once, on a `Scale`: floats travel as logarithms, so that |log w| of thousands is no
problem; exact rationals travel as they are.
"""

from collections.abc import Callable
from dataclasses import dataclass

from vcposim.arrays import LINEAR, LOG, Array, Scale, namespace
from vcposim.batch import Batch, over_tokens
from vcposim.errors import InputError, unknown_name

LEVELS = ("token", "sequence", "geometric")


def no_correction(x: Array, scale: Scale) -> Array:
    """1: the ratio is ignored: same -> same."""
    return namespace(x).zeros_like(x) + scale.write(1)


def importance(x: Array, scale: Scale) -> Array:
    """w: unbiased at sequence level (Kahn & Marshall 1953; REINFORCE off-policy): same -> same."""
    return x


def truncate(x: Array, scale: Scale, cap: float) -> Array:
    """min(w, cap) (truncated importance sampling; VCPO uses sequence level, cap 8, arXiv 2602.17616): same -> same."""
    return namespace(x).minimum(x, scale.write(cap))


def clip(x: Array, scale: Scale, floor: float, cap: float) -> Array:
    """max(floor, min(w, cap)) (as CISPO does per token, arXiv 2506.13585): same -> same."""
    xp = namespace(x)
    return xp.maximum(xp.minimum(x, scale.write(cap)), scale.write(floor))


def mask(x: Array, scale: Scale, cap: float, floor: float = 0) -> Array:
    """w 1[floor <= w <= cap] (masked importance sampling; per token IcePop, arXiv 2510.18855): same -> same."""
    keep = (x <= scale.write(cap)) & (x >= scale.write(floor))
    return namespace(x).where(keep, x, scale.zero)


def self_normalize(x: Array, scale: Scale, measure: Array) -> Array:
    """w / E[w] under the batch's measure, that is w_i n / sum_j w_j (consistent, biased at finite n): same -> same."""
    return scale.over(x, scale.mean(x, measure))


@dataclass(frozen=True)
class Treatment:
    """A function of ratios on a scale, and which limits it takes."""

    function: Callable[..., Array]
    required: frozenset[str] = frozenset()
    optional: frozenset[str] = frozenset()
    of_group: bool = False
    """whether it compares the trajectories of a group: it is given their measure, and has no token level"""


TREATMENTS: dict[str, Treatment] = {
    "none": Treatment(no_correction),
    "importance": Treatment(importance),
    "truncate": Treatment(truncate, frozenset({"cap"})),
    "clip": Treatment(clip, frozenset({"cap", "floor"})),
    "mask": Treatment(mask, frozenset({"cap"}), frozenset({"floor"})),
    "self_normalize": Treatment(self_normalize, of_group=True),
}
"""name -> treatment"""


@dataclass(frozen=True)
class Weight:
    """Weights of a batch, at sequence level (..., n) or token level (..., n, t)."""

    value: Array
    """what multiplies the score"""
    relative: Array
    """the same up to one positive factor per group, free of overflow: what scale-invariant baselines are built from"""


@dataclass(frozen=True)
class Weighting:
    """How ratios become weights: a treatment at a level.

    `smooth` is for treatments that live outside the kernel (Pareto smoothing, `vcposim.gauges.tails`): a function from
    supported log-weights (..., n) and their measure to log-weights.

    Raises `InputError` for unknown names, a missing or non-positive `cap`, or token level without token ratios.
    """

    treatment: str = "importance"
    level: str = "sequence"
    cap: float | None = None
    floor: float | None = None
    smooth: Callable[[Array, Array], Array] | None = None

    def __post_init__(self) -> None:
        if self.smooth is None and self.treatment not in TREATMENTS:
            raise unknown_name("weighting", self.treatment, TREATMENTS)
        if self.level not in LEVELS:
            raise unknown_name("level", self.level, LEVELS)
        if self.level == "token" and self.of_group:
            raise InputError(f"level: {self.treatment!r} compares trajectories; use level 'sequence' or 'geometric'")
        treatment = TREATMENTS.get(self.treatment, Treatment(importance))
        for name, example in (("cap", 8), ("floor", 0.5)):
            value = getattr(self, name)
            if value is None:
                if name in treatment.required:
                    raise InputError(f"{name}: weighting {self.treatment!r} needs one, as in {name}={example}")
                continue
            if name not in treatment.required | treatment.optional:
                raise InputError(f"{name}: weighting {self.treatment!r} takes none; leave it out")
            if not 0 <= value < float("inf") or (name == "cap" and value == 0):
                raise InputError(f"{name}: {value} is not a finite positive number; ratios are positive")
        if self.floor is not None and self.cap is not None and self.floor > self.cap:
            raise InputError(f"floor: {self.floor} is above cap {self.cap}; swap them")

    @property
    def of_group(self) -> bool:
        """Whether the weight of a trajectory depends on the others of its group."""
        return self.smooth is not None or TREATMENTS[self.treatment].of_group

    def __call__(self, batch: Batch) -> Weight:
        """The weights of `batch` (gradients never flow through them)."""
        scale = LOG if batch.ratio is None else LINEAR
        x = at_level(batch, self.level, scale)
        measure = batch.measure if x.ndim == batch.reward.ndim else batch.measure[..., None]
        if self.smooth is None:
            limits = {"cap": self.cap, "floor": self.floor}
            given = {name: limit for name, limit in limits.items() if limit is not None}
            treatment = TREATMENTS[self.treatment]
            if treatment.of_group:
                given["measure"] = measure
            treated = treatment.function(x, scale, **given)
        elif scale is LOG:
            treated = self.smooth(x, measure)
        else:
            raise InputError(f"weighting: {self.treatment!r} needs floats; pass log_ratio instead of ratio")
        value = value_of(treated, batch, scale)
        if x.ndim == batch.reward.ndim:
            return Weight(value, scale.relative(treated, measure))
        if batch.token_mask is not None:
            value = value * batch.token_mask
        if scale is LINEAR:
            return Weight(value, value)
        # one shift for all tokens of a group: flatten (n, t), padding and unsupported samples aside
        xp = namespace(treated)
        real = measure * (1.0 if batch.token_mask is None else batch.token_mask)
        real = xp.broadcast_to(real, treated.shape)
        flat = (*treated.shape[:-2], -1)
        relative = scale.relative(xp.reshape(treated, flat), xp.reshape(real, flat))
        return Weight(value, xp.reshape(relative, treated.shape))


def mixture_log_ratio(log_ratio: Array, share: Array) -> Array:
    """log pi/mixture where versions mu_v drew shares of the batch: -log sum_v share_v exp(-log pi/mu_v): -> (...).

    The balance heuristic of multiple importance sampling (Veach and Guibas, SIGGRAPH 1995, 419-428): w = pi / sum_v
    share_v mu_v for every sample, whichever version drew it. The batch's mean of w f has mean E_pi f for any fixed
    shares, and w is at most 1/share_v times its ratio to version v. Feed it to any estimator as `Batch.log_ratio`.

    `log_ratio` (..., v) are log pi/mu_v of one trajectory (or token) to every version, `share` (v,) what each drew.

    >>> import numpy as np
    >>> mixture_log_ratio(np.log([[2.0, 0.5]]), np.array([0.5, 0.5]))  # log of 1 / (0.5 / 2 + 0.5 / 0.5)
    array([-0.22314355])
    """
    xp = namespace(log_ratio, share)
    inverse = xp.where(share > 0, -log_ratio, -float("inf"))
    top = xp.max(inverse, axis=-1, keepdims=True)
    top = xp.where(abs(top) < float("inf"), top, 0.0)
    return -(top[..., 0] + xp.log(xp.sum(share * xp.exp(inverse - top), axis=-1)))


def at_level(batch: Batch, level: str, scale: Scale) -> Array:
    """The batch's ratios at a level, on a scale: (..., n), or (..., n, t) for `token`.

    Raises `InputError` for token level without token ratios.
    """
    x = batch.log_ratio if batch.ratio is None else batch.ratio
    if level == "token":
        if not batch.per_token:
            raise InputError("level: 'token' needs log-ratios of shape (..., n, t); this batch has one per trajectory")
        return x
    total = batch.once("product", lambda: scale.product(x, batch.token_mask)) if batch.per_token else x
    return total if level == "sequence" else scale.root(total, batch.token_length())


def value_of(x: Array, batch: Batch, scale: Scale) -> Array:
    """The numbers that x (..., n) or (..., n, t) writes on a scale; on `LOG` zero on measure zero: same -> same."""

    def value() -> Array:
        return scale.value(x, over_tokens(batch.measure, x))

    return batch.once("value", value) if x is batch.given_ratio else value()
