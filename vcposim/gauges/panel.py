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
from vcposim.diagnostics import Diagnostic, WeightSums, weight_sums
from vcposim.errors import InputError
from vcposim.estimators import Estimator
from vcposim.gauges.tails import Heaviest, khat_diagnostic, required_samples
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
    log_ratio = np.asarray(log_ratio, dtype=np.float64)
    sums = PanelSums(log_ratio.size, cap)
    sums.add(log_ratio, count=count, length=length, norm=norm)
    return sums.diagnostics()


class PanelSums:
    """The same of n trajectories that come in pieces, in memory that does not grow with n: sums, and the largest.

    Raises `InputError` as `panel` does.
    """

    def __init__(self, n: int, cap: float = 8.0):
        if not 0 < cap < math.inf:
            raise InputError(f"cap: {cap} is not a positive number; ratios are truncated at it, VCPO uses 8")
        self.n, self.log_cap = n, math.log(cap)
        self.levels: dict[str, tuple[WeightSums, Heaviest]] = {}
        self.kl = self.kl_low_variance = self.chi2 = 0.0
        self.log_heaviest = -math.inf

    def add(self, log_ratio: Any, *, count: Any = None, length: Any = None, norm: Any = None) -> None:
        """A piece, (m,) each: as `sample_panel` takes them."""
        x = np.asarray(log_ratio, dtype=np.float64)
        require_weights("log_ratio", x)
        count = np.ones_like(x) if count is None else np.asarray(count, dtype=np.float64)
        self._add("sequence", x, count)
        self._add("sequence_truncated", np.minimum(x, self.log_cap), count)
        if length is not None:
            self._add("geometric", x / np.asarray(length), count)
        if norm is not None:
            with np.errstate(divide="ignore"):
                log_norm = np.log(np.asarray(norm, dtype=np.float64))
            self._add("gradient", x + log_norm, count)
            self._add("norm", log_norm, count)
        with np.errstate(over="ignore", divide="ignore"):  # an infinite distance is the answer, not an accident
            self.kl += float(d.kl_behavior_target(x, count))
            self.kl_low_variance += float(d.kl_low_variance(x, count))
            self.chi2 += float(d.chi2_of_weights(np.exp(x), count))
            self.log_heaviest = max(self.log_heaviest, float((x + np.log(count)).max()))

    def _add(self, level: str, log_weight: Array, count: Array) -> None:
        if level in ("geometric", "gradient"):
            require_weights(level, log_weight)
        new = level not in self.levels
        sums, heaviest = (None, Heaviest(self.n)) if new else self.levels[level]
        more = weight_sums(log_weight, count)
        heaviest.add(log_weight)
        self.levels[level] = (more if sums is None else sums.merge(more), heaviest)

    def diagnostics(self) -> dict[str, Diagnostic]:
        """All of them, by name, of the pieces added."""
        if not self.levels:
            require_weights("log_ratio", np.zeros(0))
        sequence, heaviest = self.levels["sequence"]
        shape = heaviest.tail_index()
        tail = khat_diagnostic(shape, self.n)
        levels = [name for name in ("sequence", "sequence_truncated", "geometric") if name in self.levels]
        found = [_ess(level, *self.levels[level]) for level in levels]
        if "norm" in self.levels and self.levels["norm"][0].total > 0:
            # (E[w ||s||])^2 / E[w^2 ||s||^2]: how many samples the *gradient* has, not the weights. Norms alone keep it
            # below 1 on policy, so it is alarming below half of its on-policy value. C4 speaks of the weights' own ESS;
            # the two part where weights and norms are dependent.
            on_policy = float(self.levels["norm"][0].ess_fraction())
            found.append(_ess("gradient", *self.levels["gradient"], HALF * on_policy))
        with np.errstate(divide="ignore"):
            log_mean = float(sequence.log_mean())
        nothing = log_mean == -math.inf
        count = float(sequence.count)
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
                1.0 if nothing else math.exp(self.log_heaviest - float(sequence.log_scale)) / float(sequence.total),
                1 / math.sqrt(self.n),
                high_is_bad=True,
                required=2,  # one sample has all of the weight
                meaning="share of the heaviest sample; above 1/sqrt(n) it alone outweighs the noise of all the others",
            ),
            tail,
            Diagnostic(
                "kl_behavior_target",
                self.kl / count,
                math.log(2) / 2,
                high_is_bad=True,
                meaning="KL(behavior || target) per trajectory, nats: mean of -log w, unbiased, can be negative",
            ),
            Diagnostic(
                "kl_low_variance",
                self.kl_low_variance / count,
                math.log(2) / 2,
                high_is_bad=True,
                required=tail.required,
                meaning="the same KL, nats: mean of w - 1 - log w, never negative",
            ),
            Diagnostic(
                "chi2",
                self.chi2 / count,
                1.0,
                high_is_bad=True,
                required=tail.required,
                meaning="mean of (w - 1)^2; the ESS fraction estimates 1 / (1 + chi2)",
            ),
        ]
        return {one.name: one for one in found}


def ess_diagnostic(level: str, log_weight: Array, measure: Array, threshold: float = HALF) -> Diagnostic:
    """ESS / n of `log_weight` (n,) under `measure` (n,), 0 if none has weight; alarming below `threshold`."""
    heaviest = Heaviest(log_weight.size)
    heaviest.add(log_weight)
    return _ess(level, weight_sums(log_weight, measure), heaviest, threshold)


def _ess(level: str, sums: WeightSums, heaviest: Heaviest, threshold: float = HALF) -> Diagnostic:
    return Diagnostic(
        name=f"ess_fraction_{level}",
        value=min(float(sums.ess_fraction()), 1.0) if sums.total > 0 else 0.0,
        threshold=threshold,
        high_is_bad=False,
        required=required_samples(heaviest.tail_index()),
        meaning=f"share of the samples that count, by {level.replace('_', ' ')} weights",
    )


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
