"""Every gauge of one batch, side by side: is it still about the target policy, and would we know?

    ess_fraction_*       how many of the samples count; one number per level and treatment, never one "ESS"
    mean_weight          1 in expectation; below it, the target does things the behavior policy never tried
    max_share            the heaviest sample's share of the weight
    khat                 whether the numbers above can be trusted at this n
    kl_*, chi2           distances between behavior and target policy
    max_leverage         the largest share one sample has in its own group's off-policy optimal baseline

A panel pools all samples of a batch, whatever the group: the scope at which VCPO reads its ESS is the minibatch. Only
leverage is per group. Thresholds are stated where they are set, and hang together: log-normal weights with an ESS
fraction of 1/2 have chi2 = 1 and KL = (log 2) / 2.

Each ESS, mean and distance carries the n that its own weights' k-hat asks for (`tails.required_samples`).
"""

import math
from dataclasses import replace
from typing import Any

import numpy as np

from vcposim import diagnostics as d
from vcposim.arrays import LOG, Array, require_weights
from vcposim.batch import Batch
from vcposim.diagnostics import Diagnostic
from vcposim.errors import InputError
from vcposim.estimators import Estimator
from vcposim.gauges.tails import khat, required_samples, tail_index
from vcposim.weights import at_level

HALF = 0.5
"""ESS fraction below which more than half of the samples were generated for nothing"""


def panel(batch: Batch, cap: float = 8.0) -> dict[str, Diagnostic]:
    """All diagnostics that `batch` permits, by name; samples of measure zero are padding.

    Token-level ESS needs token ratios, the geometric one also lengths, the gradient-weighted one and leverage need
    scores. `cap` truncates `ess_fraction_sequence_truncated`. Accepts arrays of any library.

    Raises `InputError` for a batch of exact ratios, an empty one, NaN or +inf log-ratios, a cap that is not positive.
    """
    if batch.log_ratio is None:
        raise InputError("batch: a panel needs floats; pass log_ratio instead of ratio")
    real = np.asarray(batch.measure) > 0
    # measure counts draws in units of one draw; a population has no draws, its measure is kept
    measure, unit = np.asarray(batch.measure), np.asarray(batch.unit)
    count = (measure / np.where(unit == 0, 1.0, unit) * np.ones_like(measure))[real]
    sequence = at_level(batch, "sequence", LOG)
    length = np.asarray(batch.token_length())[real] if batch.per_token or batch.length is not None else None
    norm = None if batch.scores is None else np.sqrt(np.asarray(batch.scores.sq_norm(sequence * 0 + 1))[real])
    out = sample_panel(np.asarray(sequence)[real], count=count, length=length, norm=norm, cap=cap)
    if batch.per_token:
        tokens = np.asarray(batch.log_ratio)[real]
        mask = np.ones_like(tokens) if batch.token_mask is None else np.asarray(batch.token_mask)[real]
        weight = (mask * count[:, None])[mask > 0]
        out |= _keyed(ess_diagnostic("token", tokens[mask > 0], weight / weight.sum()))
    if batch.scores is not None:
        per_token: dict[str, Any] = dict.fromkeys(("token_mask", "log_prob", "collision", "anchor_log_ratio"))
        whole = replace(batch, log_ratio=sequence, **per_token)
        out |= _keyed(leverage_diagnostic(float(np.asarray(Estimator().leverage(whole))[real].max())))
    return out


def sample_panel(
    log_ratio: Any, *, count: Any = None, length: Any = None, norm: Any = None, cap: float = 8.0
) -> dict[str, Diagnostic]:
    """The diagnostics of n trajectories: `log_ratio` (n,) in nats, `count` (n,) how many draws each stands for
    (default 1), `length` (n,) in tokens, `norm` (n,) of the scores ||s_i||.

    Raises `InputError` as `panel` does.
    """
    if not 0 < cap < math.inf:
        raise InputError(f"cap: {cap} is not a positive number; ratios are truncated at it, VCPO uses 8")
    log_ratio = np.asarray(log_ratio, dtype=np.float64)
    require_weights("log_ratio", log_ratio)
    count = np.ones_like(log_ratio) if count is None else np.asarray(count, dtype=np.float64)
    measure = count / count.sum()
    found = [
        ess_diagnostic("sequence", log_ratio, measure),
        ess_diagnostic("sequence_truncated", np.minimum(log_ratio, math.log(cap)), measure),
    ]
    if length is not None:
        found.append(ess_diagnostic("geometric", log_ratio / np.asarray(length), measure))
    if norm is not None and np.any(np.asarray(norm) > 0):
        found.append(gradient_ess_diagnostic(log_ratio, norm, measure))
    tail = khat(log_ratio)
    log_mean = float(d.log_mean_weight(log_ratio, measure))
    with np.errstate(over="ignore"):  # an infinite distance is the answer, not an accident
        low_variance = float(d.kl_low_variance(log_ratio, measure))
        chi2 = float(d.chi2_of_weights(np.exp(log_ratio), measure))
    found += [
        Diagnostic(
            "mean_weight",
            math.exp(log_mean) if log_mean < 709 else math.inf,
            HALF,
            high_is_bad=False,
            required=tail.required,
            meaning="1 in expectation; what is missing is the target's probability of things never sampled",
        ),
        Diagnostic(
            "log_mean_weight",
            log_mean,
            math.log(2),
            high_is_bad=True,
            required=tail.required,
            meaning="0 in expectation, nats; well above it the two log-probabilities are not of the same tokens",
        ),
        Diagnostic(
            "max_share",
            1.0 if log_mean == -math.inf else float(d.max_share(log_ratio, measure)),
            1 / math.sqrt(measure.shape[0]),
            high_is_bad=True,
            meaning="share of the heaviest sample; above 1/sqrt(n) it alone outweighs the noise of all the others",
        ),
        tail,
        Diagnostic(
            "kl_behavior_target",
            float(d.kl_behavior_target(log_ratio, measure)),
            math.log(2) / 2,
            high_is_bad=True,
            meaning="KL(behavior || target) per trajectory, nats: mean of -log w, unbiased, can be negative",
        ),
        Diagnostic(
            "kl_low_variance",
            low_variance,
            math.log(2) / 2,
            high_is_bad=True,
            required=tail.required,
            meaning="the same KL, nats: mean of w - 1 - log w, never negative",
        ),
        Diagnostic(
            "chi2",
            chi2,
            1.0,
            high_is_bad=True,
            required=tail.required,
            meaning="mean of (w - 1)^2; the ESS fraction estimates 1 / (1 + chi2)",
        ),
    ]
    return {one.name: one for one in found}


def ess_diagnostic(level: str, log_weight: Array, measure: Array, threshold: float = HALF) -> Diagnostic:
    """ESS / n of `log_weight` (n,) under `measure` (n,), 0 if none has weight; alarming below `threshold`."""
    nothing = bool(np.all(log_weight == -math.inf))
    value = 0.0 if nothing else float(d.ess_fraction(log_weight, measure))
    return Diagnostic(
        name=f"ess_fraction_{level}",
        value=value,
        threshold=threshold,
        high_is_bad=False,
        required=required_samples(tail_index(log_weight)),
        meaning=f"share of the samples that count, by {level.replace('_', ' ')} weights",
    )


def gradient_ess_diagnostic(log_ratio: Array, norm: Array, measure: Array) -> Diagnostic:
    """ESS / n of w_i ||s_i||: how many samples the *gradient* has, not the weights: (n,) -> diagnostic.

    (E[w ||s||])^2 / E[w^2 ||s||^2]. Norms alone keep it below 1 on policy, so it is alarming below half of its
    on-policy value. C4 speaks of the weights' own ESS; the two part where weights and norms are dependent.
    """
    with np.errstate(divide="ignore"):
        log_norm = np.log(np.asarray(norm, dtype=np.float64))
    on_policy = float(d.ess_fraction(log_norm, measure))
    return ess_diagnostic("gradient", log_ratio + log_norm, measure, HALF * on_policy)


def leverage_diagnostic(value: float) -> Diagnostic:
    """Largest leverage; above one half a sample's baseline is mostly its own reward, and cancels it."""
    return Diagnostic(
        name="max_leverage",
        value=value,
        threshold=HALF,
        high_is_bad=True,
        meaning="largest share of one sample in its own group's OPOB; its advantage shrinks by that much",
    )


def _keyed(one: Diagnostic) -> dict[str, Diagnostic]:
    return {one.name: one}
