"""Collapse: what it is, and how well a number seen earlier foretells it.

**Definition.** A run has *collapsed at update c* if from c to its end its value stays below `fraction` (one half) of
the best value it had had by then, and that lasts for at least `stay` updates. The value is exact, E_pi[R], so sampling
noise neither makes nor hides a collapse; the start counts as a best, so a warm-started run that loses what it was given
has collapsed. A dip that recovers is none, and neither is a run that never rose.

**Detectors** are what a practitioner can log: no exact value enters. They are oriented so that high means danger.
`step_size_times_lag` knows nothing of the run, only its configuration; `low_reward` is the reward itself. Both are
what a predictor has to beat.

**Scores.** At *landmark* updates, runs not yet collapsed are split into those that collapse within `horizon` updates
and the others; AUROC is the probability that the detector, averaged over the last `WINDOW` updates, is higher in one of
the former. Pairs are only formed within a landmark (pooled over configurations), or within a landmark and a
configuration: pooled numbers can be high because some configurations are bad, within ones cannot. **Lead time** is from
the first alarm to the collapse, with the alarm threshold set on other runs.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from vcposim.arrays import Array
from vcposim.errors import InputError, unknown_name

LearningTrace = Mapping[str, Array]
"""fields of `learning.run_records.UpdateRecord`, stacked over updates: (update, run); `step_size` (run,)"""

NOT_COLLAPSED = -1


def collapse_step(value: Array, *, fraction: float = 0.5, stay: int = 20) -> Array:
    """The update at which each run collapsed, `NOT_COLLAPSED` if it did not: (update, run) -> (run,) integers.

    Raises `InputError` for a fraction outside (0, 1) or fewer updates than `stay`.
    """
    if not 0 < fraction < 1:
        raise InputError(f"fraction: {fraction} is not in (0, 1)")
    if value.shape[0] < stay or stay < 1:
        raise InputError(f"stay: {stay} is not in 1..{value.shape[0]}, the updates there are")
    below = value < fraction * np.maximum.accumulate(value, axis=0)
    # updates since which a run has been below without interruption, counted from the end
    lasting = np.cumprod(below[::-1], axis=0).sum(axis=0)
    return np.where(lasting >= stay, value.shape[0] - lasting, NOT_COLLAPSED)


def variation(x: Array, window: int) -> Array:
    """Standard deviation over mean of the last `window` updates: (update, run) -> (update, run); 0 of all zeros."""
    mean, square = trailing_mean(x, window), trailing_mean(x * x, window)
    spread = np.sqrt(np.maximum(square - mean * mean, 0))
    return np.divide(spread, mean, out=np.zeros_like(mean), where=mean > 0)


def trailing_mean(x: Array, window: int) -> Array:
    """Mean over the last `window` updates, fewer at the start: (update, run) -> (update, run).

    Raises `InputError` for a window of less than one update.
    """
    if window < 1:
        raise InputError(f"window: {window} is less than 1 update")
    total = np.concatenate([np.zeros((1, *x.shape[1:])), np.cumsum(x, axis=0)])
    end = np.arange(1, len(x) + 1)
    begin = np.maximum(end - window, 0)
    return (total[end] - total[begin]) / (end - begin)[:, None]


WINDOW = 10

DETECTORS: dict[str, Callable[[LearningTrace], Array]] = {
    "low_ess": lambda t: -t["ess_fraction"],
    "low_truncated_ess": lambda t: -t["truncated_ess_fraction"],
    "mean_weight_off_1": lambda t: np.abs(np.log(np.maximum(t["mean_weight"], 1e-300))),
    "khat": lambda t: t["khat"],
    "max_share": lambda t: t["max_share"],
    "kl": lambda t: t["kl"],
    "chi2": lambda t: np.log1p(t["chi2"]),
    "low_entropy": lambda t: -t["entropy"],
    "gradient_norm": lambda t: t["gradient_norm"],
    "gradient_variation": lambda t: variation(t["gradient_norm"], WINDOW),
    "low_reward": lambda t: -t["reward"],
    "step_size_times_lag": lambda t: np.broadcast_to(t["step_size"] * t["max_lag"], t["reward"].shape),
}
"""name -> danger (update, run)"""


def danger(name: str, trace: LearningTrace) -> Array:
    """A detector of that name, averaged over the last `WINDOW` updates: (update, run).

    Raises `InputError` for a detector nobody knows.
    """
    if name not in DETECTORS:
        raise unknown_name("detector", name, DETECTORS)
    return trailing_mean(np.asarray(DETECTORS[name](trace), dtype=float), WINDOW)


class Cases(NamedTuple):
    """Run-landmark pairs: which run, whether it collapses within the horizon, at which landmark (case,)."""

    run: Array
    positive: Array
    landmark: Array


def cases(collapse: Array, landmarks: Sequence[int], horizon: int) -> Cases:
    """Runs at risk at each landmark, that is not yet collapsed: (run,) -> (case,)."""
    found = []
    for landmark in landmarks:
        run = np.flatnonzero((collapse == NOT_COLLAPSED) | (collapse > landmark))
        soon = (collapse[run] != NOT_COLLAPSED) & (collapse[run] <= landmark + horizon)
        found.append((run, soon, np.full(run.shape, landmark)))
    return Cases(*(np.concatenate(part) for part in zip(*found, strict=True)))


class Auroc(NamedTuple):
    """Area under the ROC curve with a 95% interval (units resampled), and the pairs it compares."""

    value: float
    low: float
    high: float
    pairs: int
    replicate: Array
    """the area in each resample, the same resamples for every detector; NaN where one has no pair"""

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


def auroc(
    score: Array, case: Cases, stratum: Array, *, unit: Array | None = None, resamples: int = 200, seed: int = 0
) -> Auroc | None:
    """P(score of a positive > score of a negative of its stratum), ties half: (case,) each; None without any pair.

    Mann-Whitney's U over all strata together. The bootstrap resamples units, not cases: `unit` (run,) numbers what was
    randomised, as the seed that runs share; without it each run is its own.
    """
    rng = np.random.default_rng(seed)
    unit = np.arange(int(case.run.max()) + 1) if unit is None else np.asarray(unit)
    units = int(unit.max()) + 1
    count = np.vstack([np.ones(units), rng.multinomial(units, np.full(units, 1 / units), size=resamples)])[:, unit]
    wins, pairs, plain = np.zeros(resamples + 1), np.zeros(resamples + 1), 0
    for s in np.unique(stratum):
        up, down = (np.flatnonzero((stratum == s) & (case.positive == sign)) for sign in (True, False))
        if up.size == 0 or down.size == 0:
            continue
        win = (score[up, None] > score[down]) + 0.5 * (score[up, None] == score[down])
        first, second = count[:, case.run[up]], count[:, case.run[down]]
        wins += np.sum((first @ win) * second, axis=1)
        pairs += first.sum(axis=1) * second.sum(axis=1)
        plain += up.size * down.size
    if plain == 0:
        return None
    value = np.divide(wins, pairs, out=np.full(wins.shape, np.nan), where=pairs > 0)
    known = value[1:][pairs[1:] > 0]
    low, high = np.quantile(known, (0.025, 0.975)) if known.size else (value[0], value[0])
    return Auroc(float(value[0]), float(low), float(high), plain, value[1:])


class Lead(NamedTuple):
    """What an alarm gives at a threshold set on other runs."""

    threshold: float
    false_alarm: float
    """share of healthy runs with an alarm at any update"""
    detected: float
    """share of collapsing runs with an alarm before the collapse"""
    lead: Array
    """updates from first alarm to collapse, one for each run detected"""


def lead_time(
    score: Array, collapse: Array, calibrate: Array, *, false_alarm: float = 0.1, start: int = 0
) -> Lead | None:
    """Alarms of a detector (update, run), threshold from the healthy runs of `calibrate` (run,), judged on the others.

    The threshold lets `false_alarm` of the healthy calibration runs through. Updates before `start` raise no alarm.
    None where a side has no healthy or no collapsing run.
    """
    healthy = collapse == NOT_COLLAPSED
    judged_healthy, judged_lost = healthy & ~calibrate, ~healthy & ~calibrate
    if not (np.any(healthy & calibrate) and judged_healthy.any() and judged_lost.any()):
        return None
    peak = score[start:].max(axis=0)
    threshold = float(np.quantile(peak[healthy & calibrate], 1 - false_alarm))
    alarm = score > threshold
    alarm[:start] = False
    first = np.where(alarm.any(axis=0), alarm.argmax(axis=0), len(score))
    ahead = (collapse - first)[judged_lost]
    return Lead(
        threshold, float(np.mean(peak[judged_healthy] > threshold)), float(np.mean(ahead > 0)), ahead[ahead > 0]
    )
