"""What VCPO does to the step: the learning rate follows the effective sample size.

    eta_k = eta * min(1, rho / rho_ref)^p     rho = ESS / n of the *untruncated* sequence weights of the minibatch

p = 1/2 for Adam-family optimizers, 1 for SGD (arXiv 2602.17616). A brake fails closed: whatever is not a number in
(0, 1] (NaN, overflow, an empty batch) gives a step of zero, never a full one.

Its rivals follow, pure functions that fail closed in the same way. All but `limit_alignment` return a multiplier in
[0, 1] on the learning rate; multipliers of several rules multiply.

`STEP_RULES` at the end is the one table of rules by name: the catalogue lists it, the laboratory's learner and the
trainer of `llm_bridge` read it and nothing else. To add a rule, write its formula and an entry there; a rule says what
it makes of what a learner has `Seen`, and `multiplier` makes a 0 of anything that is no number.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from vcposim.arrays import Array, namespace, safe_divide
from vcposim.errors import InputError, unknown_name

EXPONENTS = {"adam": 0.5, "sgd": 1.0}
"""The paper's exponent for each optimizer family."""


def step_scale(ess_fraction: Array, *, reference: float = 1.0, exponent: float = 0.5) -> Array:
    """min(1, rho / rho_ref)^p, in [0, 1]; 0 where rho is not in (0, 1]: (...) -> (...).

    `reference` in (0, 1]: the ESS fraction at which the full step is taken. `exponent` >= 0.

    Raises `InputError` for a reference or an exponent out of range.

    >>> import numpy as np
    >>> step_scale(np.array([1.0, 0.25, np.nan, 0.0, np.inf]))
    array([1. , 0.5, 0. , 0. , 0. ])
    """
    if not 0 < reference <= 1:
        raise InputError(f"reference: {reference} is not in (0, 1]; it is an ESS fraction")
    if not 0 <= exponent < float("inf"):
        raise InputError(f"exponent: {exponent} is not a finite non-negative number; use 0.5 for Adam, 1 for SGD")
    xp = namespace(ess_fraction)
    # a fraction a few ulps above 1 is rounding, anything beyond is an overflow
    usable = (ess_fraction > 0) & (ess_fraction <= 1 + 1e-3)
    safe = xp.where(usable, ess_fraction, 1.0)
    return xp.where(usable, xp.minimum(safe / reference, 1.0) ** exponent, 0.0)


def matched_constant(scales: Array) -> Array:
    """The mean multiplier of another rule's run, the control a claim of benefit must beat: (..., k) -> (...).

    A run at this constant takes as long a way as the adaptive one did; what is left is the adaptation. (Replaying the
    run's own `scales` in order, on other data, is the sharper control: same schedule, no information.) A multiplier
    outside [0, 1] counts as the 0 that a brake makes of it.

    >>> import numpy as np
    >>> matched_constant(np.array([1.0, 0.5, np.nan, 0.5]))
    np.float64(0.5)
    """
    xp = namespace(scales)
    return xp.mean(xp.where((scales >= 0) & (scales <= 1), scales, 0.0), axis=-1)


def snr_scale(snr: Array) -> Array:
    """snr / (1 + snr), in [0, 1]; 0 where the SNR is negative or NaN: (...) -> (...).

    snr = ||E g||^2 / tr Cov g of the batch gradient. For an objective of smoothness M, the expected gain of a step
    eta g is at least eta ||E g||^2 - eta^2 M (||E g||^2 + tr Cov g) / 2, largest at eta = (1/M) snr / (1 + snr). That
    the SNR should govern the step is arXiv 2511.23310's; this form is derived here, not checked against theirs.

    >>> import numpy as np
    >>> snr_scale(np.array([0.0, 1.0, np.inf, np.nan]))
    array([0. , 0.5, 1. , 0. ])
    """
    xp = namespace(snr)
    usable = snr >= 0
    safe = xp.where(usable, xp.minimum(snr, 1e30), 0.0)
    return safe / (1 + safe)


def lag_scale(lag: Array) -> Array:
    """1 / max(lag, 1) for lags in updates; 0 where a lag is negative or NaN: (...) -> (...) (arXiv 1511.05950).

    >>> import numpy as np
    >>> lag_scale(np.array([0.0, 1.0, 4.0, np.nan]))
    array([1.  , 1.  , 0.25, 0.  ])
    """
    xp = namespace(lag)
    usable = lag >= 0
    return xp.where(usable, 1 / xp.maximum(xp.where(usable, lag, 1.0), 1.0), 0.0)


def staleness_scale(lag: Array, full: float) -> Array:
    """min(1, full / lag) for lags in updates; 0 where a lag is negative or NaN: (...) -> (...).

    The largest stable step is proportional to 1/S where stale rollouts limit it (arXiv 2607.01083, by its abstract: the
    bias of an update is O(S eta)); `full` is the lag at which that begins. At 1 it is `lag_scale`.

    Raises `InputError` for a `full` that is not positive.

    >>> import numpy as np
    >>> staleness_scale(np.array([0.0, 4.0, 16.0, np.nan]), full=4.0)
    array([1.  , 1.  , 0.25, 0.  ])
    """
    require_positive("full", full)
    xp = namespace(lag)
    usable = lag >= 0
    return xp.where(usable, full / xp.maximum(xp.where(usable, lag, full), full), 0.0)


def length_signal_scale(
    length: Array, factor: float, *, first: int = 50, period: float = 1.8, least: float = 0.1
) -> Array:
    """Halved every `period` T updates after the surge at T, not below `least`: mean lengths so far (..., k) -> (...).

    A surge is the first update, after the `first` ones, whose responses are on average longer than `factor` times the
    mean of those: long responses announce a mismatch before the reward falls (arXiv 2602.01826; the numbers are those
    of a third party's reimplementation, which takes factor 3). 0 where the last length is no finite number; others that
    are none count nowhere.

    Raises `InputError` for a factor that is not above 1.

    >>> import numpy as np
    >>> float(length_signal_scale(np.array([1.0] * 50 + [5.0] * 200), 3.0))  # T = 51: two halvings by update 250
    0.25
    """
    if not 1 < factor < float("inf"):
        raise InputError(f"factor: {factor} is not above 1; a surge is longer than what it is compared with")
    xp = namespace(length)
    known = (length >= 0) & (length < float("inf"))
    one = xp.where(known, xp.ones_like(length), 0.0)
    lengths, number = xp.where(known, length, 0.0), xp.cumulative_sum(xp.ones_like(length), axis=-1)
    early = number <= first
    counted = xp.sum(xp.where(early, one, 0.0), axis=-1, keepdims=True)
    usual = safe_divide(
        xp.sum(xp.where(early, lengths, 0.0), axis=-1, keepdims=True), counted, counted * 0 + float("inf")
    )
    surged = ~early & known & (lengths > factor * usual)
    at = xp.min(xp.where(surged, number, float("inf")), axis=-1)
    now = number[..., -1]
    since = xp.where(at < float("inf"), now - at, 0.0) / (period * xp.where(at < float("inf"), at, 1.0))
    scale = xp.maximum(0.5 ** xp.floor(since), xp.ones_like(since) * least)
    return xp.where(known[..., -1], scale, 0.0)


def norm_scale(norm: Array, limit: float) -> Array:
    """min(1, limit / norm): global-norm clipping as a multiplier; 0 where the norm is no finite number: (...) -> (...).

    Raises `InputError` for a limit that is not positive.

    >>> import numpy as np
    >>> norm_scale(np.array([0.5, 4.0, np.inf]), limit=1.0)
    array([1.  , 0.25, 0.  ])
    """
    require_positive("limit", limit)
    xp = namespace(norm)
    usable = (norm >= 0) & (norm < float("inf"))
    return xp.where(usable, limit / xp.maximum(xp.where(usable, norm, limit), limit), 0.0)


def spike_scale(norm: Array, typical: Array, factor: float) -> Array:
    """1 if norm <= factor * typical, else 0: skip the step on a spike or on what is no number: (...) -> (...).

    `typical` is a norm to compare with, such as a running median; none yet is +inf.

    Raises `InputError` for a factor that is not positive.

    >>> import numpy as np
    >>> spike_scale(np.array([1.0, 9.0, np.nan]), np.array([1.0, 1.0, 1.0]), factor=5.0)
    array([1., 0., 0.])
    """
    require_positive("factor", factor)
    xp = namespace(norm, typical)
    usable = (norm >= 0) & (norm < float("inf")) & (norm <= factor * typical)
    return xp.where(usable, xp.ones_like(norm), 0.0)


def limit_alignment(gradient: Array, previous: Array, limit: float) -> Array:
    """g, its part along the previous gradient cut until their cosine is <= limit: (..., p), (..., p) -> (..., p).

    Where cos(g, previous) > limit, the part of g along `previous` is shortened to limit / sqrt(1 - limit^2) times the
    part across it, which stays. So this turns the step, it is no multiplier. Gradient alignment control (arXiv
    2603.01501) projects where consecutive stale gradients align; its thresholds could not be checked. Zero where either
    is not finite.

    Raises `InputError` for a limit outside [0, 1).

    >>> import numpy as np
    >>> limit_alignment(np.array([3.0, 1.0]), np.array([2.0, 0.0]), limit=0.0)
    array([0., 1.])
    """
    if not 0 <= limit < 1:
        raise InputError(f"limit: {limit} is not in [0, 1); it is a cosine")
    xp = namespace(gradient, previous)
    size = xp.sqrt(xp.sum(previous * previous, axis=-1, keepdims=True))
    unit = previous / xp.where(size > 0, size, 1.0)
    along = xp.sum(gradient * unit, axis=-1, keepdims=True)
    across = gradient - along * unit
    most = limit / (1 - limit * limit) ** 0.5 * xp.sqrt(xp.sum(across * across, axis=-1, keepdims=True))
    turned = across + xp.minimum(along, most) * unit
    finite = xp.sum(abs(turned), axis=-1, keepdims=True) + size < float("inf")
    return xp.where(finite, turned, 0.0)


def require_positive(name: str, value: float) -> None:
    """Refuse a limit that is not a finite positive number."""
    if not 0 < value < float("inf"):
        raise InputError(f"{name}: {value} is not a finite positive number")


def snr_of_groups(group_gradient: Array) -> Array:
    """||E g||^2 / tr Cov g of the mean over m groups, both estimated without bias from them: (r, m, p) -> (r,).

    0 where the estimate of ||E g||^2 is negative, or nothing is known (one group, or no gradient at all).
    """
    xp, count = namespace(group_gradient), group_gradient.shape[1]
    if count < 2:
        return xp.zeros_like(group_gradient[:, 0, 0])
    mean = xp.mean(group_gradient, axis=1)
    noise = xp.sum(xp.var(group_gradient, axis=1, correction=1), axis=-1) / count
    # ||mean||^2 exceeds ||E g||^2 by the noise of the mean, on average
    signal = xp.maximum(xp.sum(mean * mean, axis=-1) - noise, 0.0)
    return safe_divide(signal, xp.where(noise > 0, noise, 0.0), signal * 0)


MEMORY = 0.95
"""of the running mean of gradient norms that a spike is measured by"""


class Seen(NamedTuple):
    """What a rule may look at in one update of r runs."""

    step: int
    ess_fraction: Array
    """(r,), of untruncated sequence weights over the whole batch"""
    lag: Array
    """(r,), mean over the batch, in updates"""
    norm: Array
    """(r,), of the gradient before any clipping"""
    typical_norm: Array
    """(r,), running mean of norms before this update; infinite at the first"""
    group_gradient: Array | None = None
    """(r, groups, p), given to a rule that `needs` it"""
    token_ess_fraction: Array | None = None
    """(r,), of the ratios of all tokens of the batch, untruncated; given to a rule that `needs` it"""
    length: Array | None = None
    """(r, k), mean length of the responses of this and all earlier updates, tokens; given to a rule that `needs` it"""


class Settings(Protocol):
    """The numbers of a rule; which of them it reads, its entry says."""

    @property
    def exponent(self) -> float:
        """Of `ess`."""
        ...

    @property
    def reference(self) -> float:
        """The ESS fraction of a full step, in (0, 1]."""
        ...

    @property
    def value(self) -> float:
        """The one number of the rules that have one."""
        ...

    @property
    def schedule(self) -> tuple[float, ...]:
        """Multipliers, one an update."""
        ...


def full_step(seen: Seen, settings: Settings) -> Array:
    """1, whatever was seen: (r,)."""
    return namespace(seen.norm).ones_like(seen.norm)


def ess_rule(exponent: float | None = None) -> Callable[[Seen, Settings], Array]:
    """`step_scale` with a fixed exponent, or with the settings': as a rule."""
    return lambda seen, s: step_scale(
        seen.ess_fraction, reference=s.reference, exponent=s.exponent if exponent is None else exponent
    )


def scheduled(seen: Seen, settings: Settings) -> Array:
    """The multiplier of this update in a schedule whose last entry stays: (r,)."""
    return settings.schedule[min(seen.step, len(settings.schedule) - 1)] * full_step(seen, settings)


@dataclass(frozen=True)
class StepRule:
    """A rule for the size or the direction of the step: all that anything needs to know of it."""

    formula: str
    scale: Callable[[Seen, Settings], Array] = full_step
    """the multiplier on the learning rate (r,)"""
    turn: Callable[[Array, Array, Settings], Array] | None = None
    """the gradient to follow, from this one and the previous: (r, p), (r, p) -> (r, p)"""
    value: str = ""
    """what `Settings.value` is to it, if anything"""
    scheduled: bool = False
    """whether it reads `Settings.schedule`"""
    needs: frozenset[str] = frozenset()
    """optional fields of `Seen` it looks at; and `ess_fraction`, whose reference it reads"""
    references: tuple[str, ...] = ()
    """keys of `vcposim.catalogue.references.SOURCES`; empty for standard practice"""


_ESS = frozenset({"ess_fraction"})

STEP_RULES: dict[str, StepRule] = {
    "none": StepRule(formula="1"),
    "ess": StepRule(
        formula="min(1, rho / rho_ref)^p, rho = ESS / n, p = 1/2 for Adam's family and 1 for SGD",
        scale=ess_rule(),
        needs=_ESS,
        references=("vcpo",),
    ),
    "ess_sqrt": StepRule(formula="ess with p = 1/2", scale=ess_rule(0.5), needs=_ESS, references=("vcpo",)),
    "ess_linear": StepRule(formula="ess with p = 1", scale=ess_rule(1.0), needs=_ESS, references=("vcpo",)),
    "constant": StepRule(
        formula="value; set to the mean multiplier of another rule's run, the control that rule must beat",
        scale=lambda seen, s: s.value * full_step(seen, s),
        value="the multiplier",
    ),
    "token_ess": StepRule(
        formula="ESS / n of all tokens' ratios: what P3O's cap makes of a whole update whose ratios are above it",
        # no tokens, no ESS, no step
        scale=lambda seen, s: (
            0 * full_step(seen, s)
            if seen.token_ess_fraction is None
            else step_scale(seen.token_ess_fraction, exponent=1.0)
        ),
        needs=frozenset({"token_ess_fraction"}),
        references=("p3o",),
    ),
    "replay": StepRule(
        formula="the multipliers of another rule's run, in order: its schedule without its information",
        scale=scheduled,
        scheduled=True,
    ),
    "lag": StepRule(
        formula="1 / max(lag, 1)", scale=lambda seen, s: lag_scale(seen.lag), references=("staleness_aware",)
    ),
    "staleness": StepRule(
        formula="min(1, full / lag)",
        scale=lambda seen, s: staleness_scale(seen.lag, s.value),
        value="the largest lag of a full step",
        references=("staleness_law",),
    ),
    "length_signal": StepRule(
        formula="max(0.1, 1/2^floor((k - T) / 1.8 T)) from update T on, the first with lengths over factor times usual",
        # no lengths, no step
        scale=lambda seen, s: (
            0 * full_step(seen, s) if seen.length is None else length_signal_scale(seen.length, s.value)
        ),
        value="the factor on the usual length that is a surge",
        needs=frozenset({"length"}),
        references=("length_signal",),
    ),
    "snr": StepRule(
        formula="snr / (1 + snr), of the groups' gradients",
        # no gradients of groups, no SNR, no step
        scale=lambda seen, s: (
            0 * full_step(seen, s) if seen.group_gradient is None else snr_scale(snr_of_groups(seen.group_gradient))
        ),
        needs=frozenset({"group_gradient"}),
        references=("snr_adaptive",),
    ),
    "norm_clip": StepRule(
        formula="min(1, limit / ||g||), on the learning rate (Adam divides a clipped gradient's scale away)",
        scale=lambda seen, s: norm_scale(seen.norm, s.value),
        value="the limit of the norm",
    ),
    "skip_spike": StepRule(
        formula="1[||g|| <= factor * typical], typical: a running mean",
        scale=lambda seen, s: spike_scale(seen.norm, seen.typical_norm, s.value),
        value="the factor on the typical norm",
    ),
    "gradient_alignment": StepRule(
        formula="g cut along the previous gradient until cos <= limit",
        turn=lambda gradient, previous, s: limit_alignment(gradient, previous, s.value),
        value="the largest cosine",
        references=("gradient_alignment",),
    ),
}
"""name -> rule; add one here and both learners have it"""


def step_rule(name: str) -> StepRule:
    """The rule of that name; `InputError` with the nearest name otherwise: no learner goes on without its brake."""
    if name not in STEP_RULES:
        raise unknown_name("step_rule", name, STEP_RULES)
    return STEP_RULES[name]


def multiplier(name: str, seen: Seen, settings: Settings) -> Array:
    """What the rule of that name makes of what was seen: (r,), 0 wherever that is no finite non-negative number.

    Raises `InputError` for an unknown rule, or settings that its formula refuses.
    """
    scale = step_rule(name).scale(seen, settings)
    return namespace(scale).where((scale >= 0) & (scale < float("inf")), scale, 0.0)
