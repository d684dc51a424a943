"""Which correction for this batch? Every estimator of the catalogue that the columns allow, or yours, side by side.

From a dump there are no scores, only their norms. Two things can be said all the same. With scores of tokens taken as
orthogonal (a proxy, and named one), an estimator's coefficients c_it have the second moment

    M(c) = sum_i sum_t q_it c_it^2,          q_it = ||s_i||^2 / L_i,

and against the untruncated importance-weighted c* = w (R - mean), whose mean is the gradient, the triangle inequality
bounds how far the estimate is off on average, whatever the directions of the scores:

    bias    = sum_i ||alpha c_i - c*_i|| / sum_i ||c*_i||,      ||c_i||^2 = sum_t q_it c_it^2
    spread  = alpha^2 M(c) / (sum_i ||c*_i||)^2
    risk    = bias^2 + spread

with alpha the scale that fits c to c* best: a constant factor belongs to the learning rate. Estimators are ranked by
risk. It is a bound and not an error; it says which ones give up much of the correction, and which ones pay for all of
it with a few samples. Intervals are percentile bootstrap over groups, the same resamples for all.

Token-level estimators see the tokens of the first groups only, as many as fit `CELLS`; the answer says how many.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from vcposim.arrays import Array
from vcposim.batch import Batch, ScoreNorms, sample_measure
from vcposim.catalogue import CATALOGUE
from vcposim.errors import InputError
from vcposim.estimators import Estimator, Resolved
from vcposim.replay.dumps import Dump
from vcposim.results import Interval
from vcposim.weights import Weighting

CELLS = 300_000
"""groups x responses x tokens that are looked at together"""

TWIN = {
    "zero": "zero",
    "group_mean": "leave_one_out",
    "leave_one_out": "leave_one_out",
    "opob": "opob_leave_one_out",
    "opob_leave_one_out": "opob_leave_one_out",
}
"""baseline -> the same without the sample it is subtracted from, where the kernel has it: for held-out moments"""

UNTRUNCATED = Estimator(Weighting("importance"), "group_mean")


@dataclass(frozen=True)
class Correction:
    """One estimator of the catalogue on this batch."""

    name: str
    risk: Interval
    bias: float
    """bound on the distance to the untruncated estimate, relative to its size"""
    spread: float
    """second moment of the batch gradient, in the same unit"""
    kept: float
    """share of tokens (or trajectories) with an advantage whose coefficient is not 0"""
    changed: float | None
    """share of tokens (or trajectories) whose ratio was clipped, masked or replaced; None: no ratio, or a function"""
    second_moment_ratio: float
    """M(c) relative to the group mean's under untruncated weights, in sample"""
    held_out_ratio: float | None
    """the same with both baselines computed without the sample"""
    effective: float
    """effective samples of ||c_i||, as a fraction of n"""
    cosine: float
    """of the estimate and the untruncated one, scores taken as orthogonal"""


@dataclass(frozen=True)
class CorrectionRanking:
    """All of them, best first, and what was looked at."""

    rows: list[Correction]
    groups: int
    """groups that were looked at"""
    per_token: bool
    absent: dict[str, list[str]]
    """what a column would add: its name -> estimators that need it"""


def rank(
    dump: Dump, resamples: int = 1000, seed: int = 0, estimators: Mapping[str, Resolved] | None = None
) -> CorrectionRanking | None:
    """The ranking of the catalogue, or of `estimators` by name; None where no group has rewards that differ and weights
    above 0.

    Raises `InputError` where a function of a batch fails on this one.
    """
    batch, groups = _batch(dump)
    if batch is None:
        return None
    token = batch.per_token
    q = _sq_norm(dump, batch)
    scaled, log_scale = _safe(batch)
    with np.errstate(all="ignore"):
        target, held_target = (
            _on_cells(e.coefficients(scaled), batch)
            for e in (UNTRUNCATED, replace(UNTRUNCATED, baseline="leave_one_out"))
        )
    size = np.sqrt(_sum(q * target * target, token))
    if not size.sum() > 0:
        return None
    rng = np.random.default_rng(seed)
    counts = np.stack([np.bincount(rng.integers(groups, size=groups), minlength=groups) for _ in range(resamples)])
    live = np.abs(batch.reward - _mean(batch)) > 0
    live = (live[..., None] & (batch.given("token_mask") > 0)) if token else live & (batch.measure > 0)
    rows: list[Correction] = []
    absent: dict[str, list[str]] = {}
    have = {"grouped", "length"} | {name for name in OF_TOKENS if getattr(batch, name) is not None}
    have |= {"tokens"} if token else set()
    have |= {"reference_log_ratio"} if batch.reference_log_ratio is not None else set()
    catalogue: Mapping[str, Resolved] = {name: entry.estimator for name, entry in CATALOGUE.items()}
    for name, estimator in (catalogue if estimators is None else estimators).items():
        lacking = [need for need in sorted(estimator.needs) if need not in have and need in COLUMN_OF]
        for column in dict.fromkeys(COLUMN_OF[need] for need in lacking):
            absent.setdefault(column, []).append(name)
        if lacking:
            continue
        try:
            with np.errstate(all="ignore"):
                c = _on_cells(_coefficients(name, estimator, batch), batch)
        except NeedsScores:
            absent.setdefault("scores themselves", []).append(name)
            continue
        if np.all(np.isfinite(c)):
            rows.append(_measured(name, estimator, c, target, held_target, log_scale, q, size, batch, live, counts))
        else:
            absent.setdefault("log-ratios in range (its coefficients are no numbers here)", []).append(name)
    rows.sort(key=lambda row: (math.isnan(row.risk.value), row.risk.value))
    return CorrectionRanking(rows, groups, token, absent)


class NeedsScores(InputError):
    """An estimator that cannot do with the norms of the scores."""


def _coefficients(name: str, estimator: Resolved, batch: Batch) -> Array:
    """c_i or c_it; a function that does not ask for tokens sees whole trajectories."""
    if isinstance(estimator, Estimator):
        try:
            return estimator.coefficients(batch)
        except InputError as error:
            raise NeedsScores(str(error)) from None
    if not estimator.needs & {"tokens", *OF_TOKENS}:
        batch = _whole(batch)
    try:
        return estimator.coefficients(batch)
    except InputError:
        raise
    except Exception as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(f"--estimator: {name} fails on a batch of shape {batch.reward.shape} ({said})") from None


def _whole(batch: Batch) -> Batch:
    """The batch without its tokens: log-ratios of trajectories (g, n)."""
    if not batch.per_token:
        return batch
    total = np.sum(np.asarray(batch.log_ratio) * batch.token_mask, axis=-1)
    return _of_trajectories(batch, total)


def _of_trajectories(batch: Batch, log_ratio: Array) -> Batch:
    return replace(batch, log_ratio=log_ratio, token_mask=None, log_prob=None, collision=None, anchor_log_ratio=None)


OF_TOKENS = ("log_prob", "collision", "anchor_log_ratio")
"""optional fields of `Batch`, one number a token"""

COLUMN_OF = {
    "tokens": "log_prob and behavior_log_prob a token",
    "log_prob": "log_prob and behavior_log_prob a token",
    "collision": "sum_v pi(v)^2 a token (collision)",
    "anchor_log_ratio": "log-probabilities of the anchor (proximal) policy a token (anchor_log_prob)",
    "reference_log_ratio": "log-probabilities of the reference policy (reference_log_prob)",
}
"""what an estimator needs -> the column that would bring it"""


def _batch(dump: Dump) -> tuple[Batch | None, int]:
    """The first groups that fit, padded: (g, n), or (g, n, t) where there are tokens."""
    order = np.argsort(dump.group, kind="stable")
    size = np.bincount(dump.group)
    starts = np.cumsum(size) - size
    tokens = {one.row: one for one in dump.kept}
    whole = [g for g in range(size.size) if all(int(i) in tokens for i in order[starts[g] : starts[g] + size[g]])]
    chosen: list[int] = []
    n = t = 0
    for g in whole or range(size.size):
        rows = order[starts[g] : starts[g] + size[g]]
        wide = max(n, size[g])
        long = max(t, *(tokens[int(i)].log_prob.size for i in rows)) if whole else 1
        if chosen and (len(chosen) + 1) * wide * long > CELLS:
            break
        chosen.append(g)
        n, t = wide, long
    index = np.zeros((len(chosen), n), dtype=int)
    here = np.zeros((len(chosen), n))
    for k, g in enumerate(chosen):
        index[k, : size[g]] = order[starts[g] : starts[g] + size[g]]
        here[k, : size[g]] = 1
    if not len(chosen):
        return None, 0
    measure, unit = sample_measure(here)
    reference = dump.reference_log_ratio
    batch = Batch(
        reward=dump.reward[index] * here,
        log_ratio=np.where(here > 0, dump.log_ratio[index], 0.0),
        length=np.where(here > 0, dump.length[index], 0.0),
        scores=ScoreNorms(dump.score_sq_norm[index] * here / (dump.score_sq_norm.max() or 1.0)),
        measure=measure,
        unit=unit,
        grouped=True,
        reference_log_ratio=None if reference is None else np.where(here > 0, reference[index], 0.0),
    )
    if not whole or t == 0:
        return batch, len(chosen)
    beside = dump.kept[0].beside
    log_ratio, log_prob, mask = np.zeros((3, len(chosen), n, t))
    anchor = np.zeros_like(mask) if "anchor_log_prob" in beside else None
    collision = np.ones_like(mask) if "collision" in beside else None
    for k, g in enumerate(chosen):
        for j in range(size[g]):
            one = tokens[int(index[k, j])]
            cells = (k, j, slice(one.log_prob.size))
            log_ratio[cells] = one.log_prob - one.behavior_log_prob
            log_prob[cells], mask[cells] = one.log_prob, 1
            if anchor is not None:
                anchor[cells] = one.log_prob - one.beside["anchor_log_prob"]
            if collision is not None:
                collision[cells] = one.beside["collision"]
    batch = replace(
        batch,
        log_ratio=log_ratio,
        # of a file of ratios the log-probabilities were set to the ratio over 0
        log_prob=None if dump.layout == "log_ratio" else log_prob,
        token_mask=mask,
        anchor_log_ratio=anchor,
        collision=collision,
    )
    return batch, len(chosen)


def _safe(batch: Batch) -> tuple[Batch, float]:
    """The batch with sequence ratios divided by the largest, so that their squares stay in range, and its logarithm."""
    x: Any = batch.log_ratio
    total: Any = np.sum(x * batch.token_mask, axis=-1) if batch.per_token else x
    total = np.where(batch.measure > 0, total, -math.inf)
    top = float(total.max())
    top = top if math.isfinite(top) else 0.0
    flat = np.where(batch.measure > 0, total - top, 0.0)
    return _of_trajectories(batch, flat), top


def _on_cells(c: Array, batch: Batch) -> Array:
    """Coefficients on tokens where there are tokens, 0 on padding."""
    c = np.asarray(c)
    if batch.per_token:
        mask = batch.given("token_mask") if batch.token_mask is not None else np.ones_like(batch.given_ratio)
        c = c[..., None] if c.ndim == 2 else c
        return np.where(mask > 0, c * np.ones_like(batch.given_ratio), 0.0)
    return np.where(batch.measure > 0, c, 0.0)


def _sq_norm(dump: Dump, batch: Batch) -> Array:
    norm = batch.scored().sq_norm(np.ones_like(batch.reward))
    if not batch.per_token:
        return norm
    return (norm / np.maximum(batch.token_length(), 1))[..., None] * batch.token_mask


def _mean(batch: Batch) -> Array:
    return np.sum(batch.measure * batch.reward, axis=-1, keepdims=True)


def _sum(x: Array, token: bool) -> Array:
    return x.sum(axis=-1) if token else x


def _measured(
    name: str,
    estimator: Resolved,
    c: Array,
    target: Array,
    held_target: Array,
    log_scale: float,
    q: Array,
    size: Array,
    batch: Batch,
    live: Array,
    counts: Array,
) -> Correction:
    token = batch.per_token
    own = _sum(q * c * c, token)
    both, all_target = _sum(q * c * target, token), _sum(q * target * target, token)
    total = own.sum()
    alpha = both.sum() / total if total > 0 else 0.0
    off = np.sqrt(_sum(q * (alpha * c - target) ** 2, token))
    # per group: size of c*, distance, second moment
    sums = np.stack([size.sum(-1), off.sum(-1), alpha**2 * own.sum(-1)])
    drawn = counts @ sums.T
    with np.errstate(all="ignore"):
        risks = (drawn[:, 1] / drawn[:, 0]) ** 2 + drawn[:, 2] / drawn[:, 0] ** 2
        top, distance, moment = sums.sum(axis=-1)
        bias, spread = float(distance / top), float(moment / top**2)
        usable = risks[np.isfinite(risks)]
        low, high = np.quantile(usable, (0.025, 0.975)) if usable.size and counts.shape[1] > 1 else (math.nan, math.nan)
        norm = np.sqrt(own)
        effective = float(norm.sum() ** 2 / max(own.sum(), 1e-300) / max((batch.measure > 0).sum(), 1))
        # the target was scaled down by e^log_scale, the estimator's own coefficients were not
        unscaled = float(np.exp(-2 * log_scale))
        cosine = float(both.sum() / math.sqrt(max(total * all_target.sum(), 1e-300)))
    held = None
    twin = TWIN.get(str(estimator.baseline)) if isinstance(estimator, Estimator) else None
    if isinstance(estimator, Estimator) and twin is not None and not estimator.baseline_shift:
        try:
            with np.errstate(all="ignore"):
                other = _on_cells(replace(estimator, baseline=twin).coefficients(batch), batch)
            bottom = _sum(q * held_target * held_target, token).sum()
            held = float(_sum(q * other * other, token).sum() / bottom * unscaled) if bottom > 0 else None
        except InputError:
            held = None
    return Correction(
        name=name,
        risk=Interval(value=bias**2 + spread, low=float(low), high=float(high)),
        bias=bias,
        spread=spread,
        kept=float(np.mean(c[live] != 0)) if live.any() else math.nan,
        changed=_changed(estimator, c, batch, live) if isinstance(estimator, Estimator) else None,
        second_moment_ratio=float(total / all_target.sum() * unscaled) if all_target.sum() > 0 else math.nan,
        held_out_ratio=held,
        effective=effective,
        cosine=cosine,
    )


def _changed(estimator: Estimator, c: Array, batch: Batch, live: Array) -> float | None:
    """Share of live cells whose coefficient is not that of the untreated ratio of its level."""
    if estimator.surrogate is None and estimator.weighting.treatment in ("none", "importance"):
        return None if estimator.weighting.treatment == "none" else 0.0
    levels = (estimator.weighting.level,) if estimator.surrogate is None else ("token", "sequence", "geometric")
    shares = []
    for level in levels:
        if level == "token" and not batch.per_token:
            continue
        plain = replace(estimator, weighting=Weighting("importance", level), surrogate=None, baseline=_plain(estimator))
        try:
            with np.errstate(all="ignore"):
                x = _on_cells(plain.coefficients(batch), batch)
        except InputError:
            continue
        ratio = np.abs(c - x) > 1e-9 * np.abs(x)
        shares.append(float(np.mean(ratio[live])) if live.any() else math.nan)
    return min(shares, default=None)


def _plain(estimator: Estimator) -> str | float:
    # an off-policy optimal baseline moves with its weights; only the ratio in front is compared here
    return estimator.baseline
