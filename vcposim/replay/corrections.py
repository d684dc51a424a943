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

import contextlib
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from vcposim.arrays import Array
from vcposim.batch import Batch, ScoreNorms, SharedBatch, sample_measure
from vcposim.catalogue import CATALOGUE
from vcposim.errors import InputError
from vcposim.estimators import NORMALIZERS, Estimator, Resolved
from vcposim.pooled import BalancedClip, CovarianceClip, InfluenceCap
from vcposim.replay.contributions import in_units, resampled, units
from vcposim.replay.dumps import Dump
from vcposim.replay.storage import by_code, counts, largest, picked
from vcposim.results import Interval
from vcposim.surrogates import Penalized, Product
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
    yard = _Yardstick.of(dump, batch)
    if yard is None:
        return None
    rng = np.random.default_rng(seed)
    unit = units(groups, rng)
    rows: list[Correction] = []
    sums: list[Array] = []
    absent: dict[str, list[str]] = {}
    have = {"grouped", "length"} | {name for name in OF_TOKENS if getattr(batch, name) is not None}
    have |= {"tokens"} if batch.per_token else set()
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
            row, of_groups = yard.measure(name, estimator, c)
            rows.append(row)
            sums.append(in_units(of_groups, unit))
        else:
            absent.setdefault("log-ratios in range (its coefficients are no numbers here)", []).append(name)
    rows = [replace(row, risk=risk) for row, risk in zip(rows, _risks(sums, resamples, rng), strict=True)]
    # what is the same but for rounding stays in the order of the catalogue
    rows.sort(key=lambda row: (math.isnan(row.risk.value), float(f"{row.risk.value:.12g}")))
    return CorrectionRanking(rows, groups, batch.per_token, absent)


def _risks(sums: Sequence[Array], resamples: int, rng: np.random.Generator) -> list[Interval]:
    """bias^2 + spread of each estimator from its sums (3, u) a unit of groups, with intervals over these."""
    if not sums:
        return []
    flat = np.concatenate(sums)
    drawn = resampled(flat, resamples, rng)
    with np.errstate(all="ignore"):
        top, distance, moment = flat.sum(axis=-1).reshape(-1, 3).T
        values = (distance / top) ** 2 + moment / top**2
        all_risks = (drawn[:, 1::3] / drawn[:, ::3]) ** 2 + drawn[:, 2::3] / drawn[:, ::3] ** 2
    found = []
    for value, risks in zip(values.tolist(), all_risks.T, strict=True):
        usable = risks[np.isfinite(risks)]
        low, high = np.quantile(usable, (0.025, 0.975)) if usable.size and flat.shape[-1] > 1 else (math.nan, math.nan)
        found.append(Interval(value=value, low=float(low), high=float(high)))
    return found


BY_SIZE = (BalancedClip, CovarianceClip, InfluenceCap)
"""surrogates that look at the sizes of advantages, not at their signs alone"""


def scales_with_advantage(estimator: Estimator) -> bool:
    """Whether an advantage that is larger by any factor makes its coefficients larger by that factor, and no others."""
    surrogate = estimator.surrogate
    factors = surrogate.factors if isinstance(surrogate, Product) else (surrogate,)
    signs = all(x is None or (known(x) and not isinstance(x, (*BY_SIZE, Penalized))) for x in factors)
    return (
        signs and known(estimator) and not NORMALIZERS[estimator.normalizer].centers and not estimator.reference_penalty
    )


def known(part: Any) -> bool:
    """Whether it is of a class of this package: of yours, nobody knows what it looks at."""
    return type(part).__module__.startswith("vcposim.")


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
    size = counts(dump.group)
    order, starts = by_code(dump.group, size), np.cumsum(size) - size
    tokens = {one.row: one for one in dump.kept}

    def rows_of(g: int) -> Any:
        rows = order[int(starts[g]) : int(starts[g] + size[g])]
        return np.arange(rows.start, rows.stop) if isinstance(rows, range) else rows

    groups = (g for g in range(size.size) if all(int(i) in tokens for i in rows_of(g))) if tokens else iter(())
    first = next(groups, None)
    whole = first is not None
    chosen: list[int] = []
    n = t = 0
    for g in itertools.chain([first], groups) if first is not None else range(size.size):
        wide = max(n, size[g])
        long = max(t, *(tokens[int(i)].log_prob.size for i in rows_of(g))) if whole else 1
        if chosen and (len(chosen) + 1) * wide * long > CELLS:
            break
        chosen.append(g)
        n, t = wide, long
    index = np.zeros((len(chosen), n), dtype=int)
    here = np.zeros((len(chosen), n))
    for k, g in enumerate(chosen):
        index[k, : size[g]] = rows_of(g)
        here[k, : size[g]] = 1
    if not len(chosen):
        return None, 0
    measure, unit = sample_measure(here)
    reference = dump.reference_log_ratio
    batch: Batch = SharedBatch(
        reward=picked(dump.reward, index) * here,
        log_ratio=np.where(here > 0, picked(dump.log_ratio, index), 0.0),
        length=np.where(here > 0, picked(dump.length, index), 0.0),
        scores=ScoreNorms(picked(dump.score_sq_norm, index) * here / (largest(dump.score_sq_norm) or 1.0)),
        measure=measure,
        unit=unit,
        grouped=True,
        reference_log_ratio=None if reference is None else np.where(here > 0, picked(reference, index), 0.0),
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
    """Coefficients (g, n), or (g, n, t) with zeros on padding, or (g, n, 1) the same on all tokens of a trajectory."""
    c = np.asarray(c)
    if not batch.per_token:
        return np.where(batch.measure > 0, c, 0.0)
    mask = batch.given("token_mask") > 0
    if c.ndim == 2 or c.shape[-1] == 1:
        return np.where(mask.any(axis=-1, keepdims=True), c.reshape(*c.shape[:2], 1), 0.0)
    return c if mask.all() else np.where(mask, c, 0.0)


@dataclass
class _Yardstick:
    """What coefficients of one batch are measured with: g groups of n trajectories, t tokens each or none."""

    batch: Batch
    cells: Array
    """(g, n, t) whether a token is one, or (g, n, 1)"""
    count: Array
    """(g, n) tokens"""
    live: Array
    """as `cells`: tokens of trajectories with an advantage"""
    q: Array
    """(g, n) squared norm of a token's score"""
    target: Array
    """(g, n) untruncated coefficients, relative to the largest weight"""
    size: Array
    """(g, n) ||c*_i||"""
    held_total: float
    """second moment of the untruncated coefficients with the mean of the others"""
    unscaled: float
    """the largest weight^-2: `target` is relative to it, an estimator's own coefficients are not"""
    others: Array
    """(g, n) square of what subtracting the mean of the others makes of the advantage, instead of that of all"""
    plain: dict[Estimator, tuple[Array, Array] | None] = field(default_factory=dict)
    """coefficients of untreated ratios, which many estimators share, and how far rounding may move them"""

    @classmethod
    def of(cls, dump: Dump, batch: Batch) -> "_Yardstick | None":
        """That of a batch; None where no trajectory has a weighted advantage."""
        scaled, log_scale = _safe(batch)
        with np.errstate(all="ignore"):
            target, held = (
                np.where(batch.measure > 0, e.coefficients(scaled), 0.0)
                for e in (UNTRUNCATED, replace(UNTRUNCATED, baseline="leave_one_out"))
            )
        real = batch.measure > 0
        cells = batch.given("token_mask") > 0 if batch.per_token else real[..., None]
        count = cells.sum(axis=-1)
        q = batch.scored().sq_norm(np.ones_like(batch.reward)) / np.maximum(count, 1)
        size = np.sqrt(q * count) * np.abs(target)
        if not size.sum() > 0:
            return None
        advantage, without = (
            batch.reward - e.baseline_value(scaled)
            for e in (UNTRUNCATED, replace(UNTRUNCATED, baseline="leave_one_out"))
        )
        return cls(
            batch=batch,
            cells=cells,
            count=count,
            live=cells & (np.abs(advantage) > 0)[..., None],
            q=q,
            target=target,
            size=size,
            held_total=float((q * count * held * held).sum()),
            # the target was scaled down by e^log_scale
            unscaled=float(np.exp(-2 * log_scale)),
            others=np.divide(without, advantage, out=np.ones_like(advantage), where=advantage != 0) ** 2,
        )

    def sq_norm(self, c: Array) -> Array:
        """||c_i||^2 = sum_t q_it c_it^2 of coefficients on cells: -> (g, n)."""
        c = c if c.ndim == 3 else c[..., None]
        return self.q * (np.vecdot(c, c) if c.shape == self.cells.shape else self.count * c[..., 0] ** 2)

    def product(self, c: Array) -> Array:
        """sum_t q_it c_it c*_it: -> (g, n)."""
        c = c if c.ndim == 3 else c[..., None]
        return self.q * self.target * (c.sum(axis=-1) if c.shape == self.cells.shape else self.count * c[..., 0])

    def distance(self, c: Array) -> Array:
        """||c_i - c*_i||: -> (g, n)."""
        off = (c if c.ndim == 3 else c[..., None]) - self.target[..., None]
        if off.shape == self.cells.shape and not self.cells.all():
            off *= self.cells
        return np.sqrt(self.sq_norm(off))

    def share(self, cells: Array) -> float:
        """Of the live tokens, those where `cells` is true; NaN where nothing lives."""
        cells = cells if cells.ndim == 3 else cells[..., None]
        alive = np.count_nonzero(self.live)
        return np.count_nonzero(self.live & cells) / alive if alive else math.nan

    def measure(self, name: str, estimator: Resolved, c: Array) -> tuple[Correction, Array]:
        """One estimator's row, its risk not yet placed, and its sums (3, g): size of c*, distance, second moment."""
        own, both = self.sq_norm(c), self.product(c)
        total = own.sum()
        alpha = both.sum() / total if total > 0 else 0.0
        sums = np.stack([self.size.sum(-1), self.distance(alpha * c).sum(-1), alpha**2 * own.sum(-1)])
        with np.errstate(all="ignore"):
            top, distance, moment = sums.sum(axis=-1)
            effective = np.sqrt(own).sum() ** 2 / max(total, 1e-300) / max((self.batch.measure > 0).sum(), 1)
            all_target = (self.size**2).sum()
            cosine = both.sum() / math.sqrt(max(total * all_target, 1e-300))
        row = Correction(
            name=name,
            risk=Interval(value=math.nan, low=math.nan, high=math.nan),
            bias=float(distance / top),
            spread=float(moment / top**2),
            kept=self.share(c != 0),
            changed=self._changed(estimator, c) if isinstance(estimator, Estimator) else None,
            second_moment_ratio=float(total / all_target * self.unscaled) if all_target > 0 else math.nan,
            held_out_ratio=self._held_out(estimator, own) if isinstance(estimator, Estimator) else None,
            effective=float(effective),
            cosine=float(cosine),
        )
        return row, sums

    def _held_out(self, estimator: Estimator, own: Array) -> float | None:
        twin = TWIN.get(str(estimator.baseline))
        if twin is None or estimator.baseline_shift or not self.held_total > 0:
            return None
        with np.errstate(all="ignore"), contextlib.suppress(InputError):
            if estimator.baseline == "group_mean" and scales_with_advantage(estimator):
                own = own * self.others
            elif twin != estimator.baseline:
                c = _on_cells(replace(estimator, baseline=twin).coefficients(self.batch), self.batch)
                own = self.sq_norm(c)
            return float(own.sum() / self.held_total * self.unscaled)
        return None

    def _changed(self, estimator: Estimator, c: Array) -> float | None:
        """Share of live tokens whose coefficient is not that of the untreated ratio of its level."""
        if estimator.surrogate is None and estimator.weighting.treatment in ("none", "importance"):
            return None if estimator.weighting.treatment == "none" else 0.0
        levels = (estimator.weighting.level,) if estimator.surrogate is None else ("token", "sequence", "geometric")
        shares = []
        for level in levels:
            if level == "token" and not self.batch.per_token:
                continue
            # an off-policy optimal baseline moves with its weights; only the ratio in front is compared here
            plain = self._plain(replace(estimator, weighting=Weighting("importance", level), surrogate=None))
            if plain is not None:
                x, rounding = plain
                with np.errstate(all="ignore"):
                    off = c - x
                    shares.append(self.share(np.abs(off, out=off) > rounding))
                if not shares[-1] > 0:
                    break  # no level leaves fewer
        return min(shares, default=None)

    def _plain(self, estimator: Estimator) -> tuple[Array, Array] | None:
        if estimator not in self.plain:
            self.plain[estimator] = None
            with np.errstate(all="ignore"), contextlib.suppress(InputError):
                x = _on_cells(estimator.coefficients(self.batch), self.batch)
                self.plain[estimator] = x, 1e-9 * np.abs(x)
        return self.plain[estimator]
