"""Dumped rollouts of any framework -> what each baseline would have done to them.

From a dump there are no scores, only their norms, so what can be replayed is the size of the gradient's contributions:
the second moment mean_i (w_i (R_i - b) ||s_i||)^2, relative to the group mean's. Two numbers per baseline, because
the first alone flatters:

    second_moment_ratio    in sample: each baseline as a trainer uses it, from the rewards it is subtracted from
    held_out_ratio         both baselines computed without the sample they are subtracted from

The in-batch OPOB *minimizes* the first by definition, so there it reads at most 1 on any data, noise included. Held
out and under full importance weights, every estimate has the same mean (claim C7): the ratio orders variances, can come
out above 1, and alone can say whether a baseline would have helped.

Intervals are percentile bootstrap over groups, the unit that is drawn independently, with the same resamples for all
baselines. With few groups they are too narrow,
as percentile intervals of few repeats are; the output says so.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from vcposim.baselines import baseline
from vcposim.catalogue import CATALOGUE
from vcposim.catalogue import weighting as named_weighting
from vcposim.catalogue.loading import estimator_named
from vcposim.control import step_scale
from vcposim.diagnostics import Diagnostic
from vcposim.errors import InputError
from vcposim.estimators import Resolved
from vcposim.gauges.panel import HALF, PanelSums, leverage_diagnostic
from vcposim.gauges.tails import MIN_SAMPLES
from vcposim.replay.checks import BY_THE_RUN, OWN_CAUSE, Finding
from vcposim.replay.contributions import Table, bootstrap_ratios, tabulate, units
from vcposim.replay.corrections import CorrectionRanking, rank
from vcposim.replay.dumps import Dump, pooled
from vcposim.replay.storage import by_code, counts, distinct, give_back, heaviest, largest, pieces
from vcposim.replay.tracks import Slice, first_alarms
from vcposim.results import Interval, Records, Result
from vcposim.weights import Weighting

DEFAULT_BASELINES = (
    "zero",
    "group_mean",
    "leave_one_out",
    "length_weighted",
    "on_policy_optimal",
    "opob",
    "opob_leave_one_out",
    "opob_released",
    "leverage_damped_mean",
)
NEEDS_SCORES = {
    "opob_truncated": "needs the scores themselves, a dump has only their norms",
    "population": "is an oracle, it needs a problem with exact moments",
}
"""baselines that no dump can have"""
LEAST_GROUPS = 10
"""informative groups without which nothing is concluded"""
FEW_GROUPS = 60
"""below this, the bootstrap's intervals are known to be too narrow"""
LIMITED = frozenset({"truncate", "clip", "mask"})
MOST_STEPS = 5000
"""steps that are sliced by unasked"""
NEAR_ONE = 1.5
"""a mean weight farther from 1 than this factor says that E[(w - 1)^2] is no chi2: its samples miss the target"""


@dataclass(frozen=True)
class ReplayedBaseline:
    """One baseline on all groups."""

    baseline: str
    per_group: np.ndarray
    """(g,) the baseline, for per-sample baselines the mean of b_i; NaN where a group is too small for it"""
    second_moment_ratio: Interval
    held_out_ratio: Interval | None


@dataclass(frozen=True)
class Replay(Result):
    """What the dump says, ready to print, draw or dump; groups in order of appearance."""

    n: int
    labels: Sequence[Hashable]
    size: np.ndarray
    """(g,) responses per group"""
    mean_reward: np.ndarray
    ess_fraction: np.ndarray
    """(g,) of the untouched sequence weights within each group"""
    max_leverage: np.ndarray
    """(g,)"""
    informative: int
    """groups in which rewards differ, so that the group mean learns something"""
    carrying: int
    """those of them in which this also has a weight above 0"""
    log_ratio: np.ndarray
    """(n,) in the order of the file, nats"""
    diagnostics: dict[str, Diagnostic]
    rows: list[ReplayedBaseline]
    weighting: Weighting
    cap: float
    norm_source: str
    notes: list[str]
    seed: int
    resamples: int
    layout: str = ""
    findings: tuple[Finding, ...] = ()
    """what is wrong with the data"""
    slices: dict[str, list[Slice]] = field(default_factory=dict)
    """column -> its values in order"""
    ranking: CorrectionRanking | None = None
    skipped: dict[str, list[str]] = field(default_factory=dict)
    place: Sequence[str] = ()
    """(n,) where each trajectory stands in the file"""
    lags: tuple[Any, ...] = ()
    """the lags that the file states"""

    def row(self, name: str) -> ReplayedBaseline | None:
        """The row of a baseline, if it was asked for."""
        return next((row for row in self.rows if row.baseline == name), None)

    def records(self) -> Records:
        """A row a baseline: its second moment relative to the group mean's, in sample and held out, with intervals."""
        rows = Records()
        for row in self.rows:
            record: dict[str, Any] = {"baseline": row.baseline}
            for name in ("second_moment_ratio", "held_out_ratio"):
                value: Interval | None = getattr(row, name)
                ends = (None, None, None) if value is None else map(float, value)
                record |= dict(zip((name, f"{name}_low", f"{name}_high"), ends, strict=True))
            rows.append(record)
        return rows


@dataclass(frozen=True)
class ReplayOptions:
    """What is asked of a dump; all of it is checked when it is put together, before anything is read.

    `cap` is the limit of truncating treatments and of the truncated ESS. Groups below `min_group` are left out. `by`:
    columns to slice by, of `dump.slices`; step and lag are sliced by unasked. `corrections` ranks the catalogue;
    `estimators` (names of it, `file.py:function`, `module:function`) restrict the ranking to those named, and add
    functions of your own to it.

    Raises `InputError` for unknown names and numbers out of range.
    """

    baselines: Sequence[str] = DEFAULT_BASELINES
    weighting: str = "importance"
    cap: float = 8.0
    floor: float | None = None
    resamples: int = 2000
    seed: int = 0
    min_group: int = 1
    by: Sequence[str] = ()
    corrections: bool = False
    estimators: Sequence[str] = ()
    weigh: Weighting = field(init=False)
    asked: dict[str, Resolved] | None = field(init=False)
    """what is to be ranked, None for the catalogue"""

    def __post_init__(self) -> None:
        for name in dict.fromkeys(self.baselines):
            baseline(name)
            if list(self.baselines).count(name) > 1:
                raise InputError(f"baseline: {name!r} is given twice; name each once")
        if not self.names:
            raise InputError("baseline: none is left to replay; name at least one that needs only norms, such as opob")
        if self.resamples < 100:
            raise InputError(f"bootstrap: {self.resamples} resamples cannot place a 95% interval; use 100 or more")
        if self.seed < 0:
            raise InputError(f"seed: {self.seed} is negative; use 0 or more")
        if self.min_group < 1:
            raise InputError(f"min_group: {self.min_group} is not positive; use 1 to keep every group")
        limits: dict[str, Any] = {"cap": self.cap, "floor": self.floor} if self.weighting in LIMITED else {}
        object.__setattr__(self, "weigh", named_weighting(self.weighting, **limits))
        PanelSums(0, self.cap)  # refuses a cap of the ESS that is none
        object.__setattr__(self, "asked", _asked(self.estimators))

    @property
    def names(self) -> list[str]:
        """The baselines that a dump can have."""
        return [name for name in self.baselines if name not in NEEDS_SCORES]


def replay(dump: Dump, options: ReplayOptions | None = None, **single: Any) -> Replay:
    """Replay baselines on a dump, under sequence weights: `options`, or `single` ones of them.

    Without groups or rewards only the weights are read: no rows, no leverage.

    Raises `InputError` for unknown names, numbers out of range, or a dump with no group left.
    """
    q = ReplayOptions(**single) if options is None else options
    names, cap, min_group, resamples = q.names, q.cap, q.min_group, q.resamples
    notes = [f"baseline {name} is left out: it {NEEDS_SCORES[name]}" for name in q.baselines if name in NEEDS_SCORES]
    size = counts(dump.group)
    if size.max() < min_group:
        raise InputError(f"min_group: no group has {min_group} responses, the largest has {size.max()}; lower it")
    if size.min() < min_group:
        kept = size >= min_group
        notes.append(f"{int((~kept).sum())} groups with fewer than {min_group} responses are left out")
        dump = dump.select(kept[dump.group])
        size = counts(dump.group)
    diagnostics = _gauges(dump, cap)
    table, rows, ranking = None, [], None
    if dump.has_group and dump.has_reward:
        rng = np.random.default_rng(q.seed)
        table = tabulate(dump, size, names, q.weigh, units(size.size, rng))
        sums = np.concatenate([table.in_sample, table.held_out])
        ratio = bootstrap_ratios(sums, table.held.ravel(), resamples, rng)
        rows = [
            ReplayedBaseline(
                name, table.per_group[k], ratio[k], ratio[len(names) + k] if baseline(name).has_held_out else None
            )
            for k, name in enumerate(names)
        ]
        diagnostics["max_leverage"] = leverage_diagnostic(largest(table.max_leverage))
        notes += _explanations(dump, size, table, rows, q.weigh)
        give_back()
        ranking = rank(dump, resamples, q.seed, q.asked) if q.corrections else None
        give_back()
    else:
        if q.estimators:
            notes.append("estimators cannot be ranked: that takes groups and rewards")
        if dump.norm_source != "score_sq_norm":
            notes.append(f"the dump has no score_sq_norm: {dump.norm_source} stands in for ||s||^2 everywhere")
    unknown = np.full(size.size if table is None else 0, math.nan)
    return Replay(
        n=dump.group.size,
        labels=dump.labels,
        size=size,
        mean_reward=unknown if table is None else table.mean_reward,
        ess_fraction=unknown if table is None else table.ess_fraction,
        max_leverage=unknown if table is None else table.max_leverage,
        informative=0 if table is None else table.informative,
        carrying=0 if table is None else table.carrying,
        log_ratio=dump.log_ratio,
        diagnostics=diagnostics,
        rows=rows,
        weighting=q.weigh,
        cap=cap,
        norm_source=dump.norm_source,
        notes=[*dump.notes, *notes],
        seed=q.seed,
        resamples=resamples,
        layout=dump.layout,
        findings=dump.findings,
        slices=_sliced(dump, q.by, cap),
        ranking=ranking,
        skipped=dump.skipped,
        place=dump.place,
        lags=tuple(sorted(dump.slices["lag"][1], key=_ordered)) if "lag" in dump.slices else (),
    )


def _asked(estimators: Sequence[str]) -> dict[str, Resolved] | None:
    """What is to be ranked, None for the catalogue; functions without names of it are ranked among all of it."""
    if not estimators:
        return None
    named = {name: estimator_named(name) for name in estimators}
    own = [name for name in named if name not in CATALOGUE]
    rivals = CATALOGUE if len(own) == len(named) else {}
    return {**{name: one.estimator for name, one in rivals.items()}, **named}


def _gauges(dump: Dump, cap: float, rows: Any = None) -> dict[str, Diagnostic]:
    """All gauges of the weights, of all trajectories or of some; chi2 withheld where the samples cannot know it."""
    sums = PanelSums(dump.log_ratio.size if rows is None else len(rows), cap)
    for log_ratio, length, sq_norm in pieces(dump.log_ratio, dump.length, dump.score_sq_norm, rows=rows):
        # an empty response has no token to average over; its log-ratio is 0
        sums.add(log_ratio, length=np.maximum(length, 1), norm=np.sqrt(sq_norm))
    found = sums.diagnostics()
    if dump.tokens is not None:
        found["ess_fraction_token"] = Diagnostic(
            name="ess_fraction_token",
            value=float(pooled(dump.tokens, rows).ess_fraction()),
            threshold=HALF,
            high_is_bad=False,
            meaning="share of the tokens that count, by token weights; blind to how ratios multiply along a trajectory",
        )
    log_mean = found["log_mean_weight"].value
    if not abs(log_mean) <= math.log(NEAR_ONE):
        found["chi2"] = replace(
            found["chi2"],
            value=math.nan,
            meaning="withheld: the mean weight is not near 1, so the mean of (w - 1)^2 is no chi2; read the ESS",
        )
    return found


def _sliced(dump: Dump, by: Sequence[str], cap: float) -> dict[str, list[Slice]]:
    """Every gauge of every value of the columns asked for; unasked, of step and lag where there are several."""
    out: dict[str, list[Slice]] = {}
    several = {name: len(dump.slices[name][1]) for name in ("step", "lag", "version") if name in dump.slices}
    unasked = [name for name in ("step",) if 1 < several.get(name, 1) <= MOST_STEPS]
    unasked += [name for name in ("lag", "version") if 1 < several.get(name, 1) <= 20][:1]
    for name in dict.fromkeys(by or unasked):
        if name not in dump.slices:
            have = ", ".join(dump.slices) or "no column"
            raise InputError(f"--by: {name!r} is not in the first record, or has too many values; to slice by: {have}")
        code, values = dump.slices[name]
        size = counts(code, len(values))
        order, ends = by_code(code, size), np.cumsum(size)
        found = []
        for k in sorted(range(len(values)), key=lambda k: _ordered(values[k])):
            if not size[k]:
                continue
            rows = order[int(ends[k] - size[k]) : int(ends[k])]
            groups = distinct(dump.group, key=lambda g: g, rows=rows).size
            reward = math.nan
            if dump.has_reward:
                reward = sum(float(x.sum()) for (x,) in pieces(dump.reward, rows=rows)) / len(rows)
            found.append(Slice(values[k], len(rows), groups, reward, _gauges(dump, cap, rows)))
        out[name] = found
    return out


def _ordered(value: Any) -> tuple[int, float, str]:
    try:
        return (0, float(value), "")
    except (TypeError, ValueError, OverflowError):
        return (1, 0.0, str(value))


def _explanations(
    dump: Dump, size: Any, table: Table, rows: Sequence[ReplayedBaseline], weighting: Weighting
) -> list[str]:
    notes = []
    if weighting.treatment != "importance":
        notes.append(
            f"under {weighting.treatment!r} weights means differ too: ratios order second moments, not variances"
        )
    if weighting.smooth is not None and size.min() < MIN_SAMPLES:
        notes.append(f"groups of fewer than {MIN_SAMPLES} have no tail to smooth: their weights are untouched")
    if dump.norm_source != "score_sq_norm":
        notes.append(f"the dump has no score_sq_norm: {dump.norm_source} stands in for ||s||^2 everywhere")
    if not largest(dump.score_sq_norm) > 0:
        notes.append(f"every {dump.norm_source} is 0: no contribution has a size, ratios are undefined")
    alone = int((size < 2).sum())
    if alone:
        short = [row.baseline for row in rows if baseline(row.baseline).needs_two]
        skipped = f", {', '.join(short)} skip them" if short else ""
        notes.append(f"{alone} groups have a single response: the group mean leaves them no advantage{skipped}")
    equal = len(size) - table.informative
    if equal:
        notes.append(
            f"{equal} of {len(size)} groups have equal rewards throughout: the group mean learns nothing there"
        )
    if len(size) < FEW_GROUPS:
        notes.append(f"{len(size)} groups are few: bootstrap intervals over so few are narrower than their 95% says")
    if table.carrying < table.informative:
        notes.append(
            f"in {table.informative - table.carrying} of the {table.informative} groups with rewards that differ the "
            "weights of those rewards are 0 (cut off, or out of range beside the heaviest): they say nothing here"
        )
    if table.carrying < 2:
        notes.append("fewer than two groups carry a weighted advantage: no interval can be placed around a ratio")
    return notes


def verdict(found: Replay) -> str:
    """One sentence: would the off-policy optimal baseline have helped here?"""
    row = found.row("opob_leave_one_out") or found.row("opob")
    if not found.rows:
        return "Would OPOB have helped here? It cannot be told: the file has no groups or no rewards."
    if row is None or row.held_out_ratio is None:
        return "Would OPOB have helped here? Not asked: add opob to the baselines."
    low, value, high = row.held_out_ratio
    if math.isnan(value):
        why = "no group has rewards that differ" if not found.informative else "every weight is 0"
        return f"Would OPOB have helped here? It cannot be told: {why}."
    said = f"held out, a contribution's second moment is {value:.3f} of the group mean's"
    if found.carrying < LEAST_GROUPS:
        few = f"{found.informative} with rewards that differ"
        few += "" if found.carrying == found.informative else f", {found.carrying} of them with weight"
        return f"Would OPOB have helped here? Too few groups to tell ({few}): {said}."
    said += f" (95% interval {low:.3f} to {high:.3f}, {found.informative} groups with rewards that differ)"
    if high < 1:
        return f"Would OPOB have helped here? Yes: {said}."
    if low > 1:
        # in sample R_i - b = (1 - h_i)(R_i - b_{-i}), which can read better than the group mean
        row = found.row("opob")
        gains = row is not None and row.second_moment_ratio.value < 1
        gain = " What it gains in sample, it gains by damping the samples that dominate it." if gains else ""
        return f"Would OPOB have helped here? Not by what it subtracts, that would have hurt: {said}.{gain}"
    return f"Would OPOB have helped here? No evidence either way: {said}, which covers 1."


def summary(found: Replay) -> list[str]:
    """Five plain lines: is the data sound, how stale, what dominates, what to change, how sure."""
    d = found.diagnostics
    ess, mean = d["ess_fraction_sequence"].value, d["mean_weight"].value
    mistakes = [one.check for one in found.findings if one.check not in BY_THE_RUN]
    if found.findings:
        names = ", ".join(dict.fromkeys(one.check for one in found.findings))
        sound = f"Data: NOT sound as it stands ({names}); what follows may measure that instead of the run."
        if not mistakes:
            known = any(one.check == "follows the reward" for one in found.findings)
            known = known or all(one.check in OWN_CAUSE for one in found.findings)
            why = "" if known else ": far off policy, or wrong columns"
            sound = f"Data: no mistake is certain, but see the checks ({names}){why}."
    else:
        sound = "Data: no sign of a mistake in how it was written."
    alone = bool(found.rows) and found.n > 1 and int(found.size.max()) == 1
    if alone:
        sound += " But every group has a single response: a wrong key, and nothing said of groups means anything."
    lag = next((found.slices[n] for n in ("lag", "version") if n in found.slices), [])
    spread = f", at lag {found.lags[0]}" if len(found.lags) == 1 else ""
    spread += f"; {len(lag)} {'lags' if 'lag' in found.slices else 'versions'} mixed" if len(lag) > 1 else ""
    steps = found.slices.get("step", [])
    if len(steps) > 1:
        parts = [one.diagnostics["ess_fraction_sequence"].value for one in steps]
        spread += f"; ESS {parts[0]:.2f} at step {steps[0].value}, {parts[-1]:.2f} at step {steps[-1].value}"
        first = first_alarms(steps)
        early = min(first, key=lambda name: _ordered(first[name]), default=None)
        spread += f", first alarm at step {first[early]} ({early})" if early else ", no alarm at any step"
    if len(lag) > 1:
        parts = [one.diagnostics["ess_fraction_sequence"].value for one in lag]
        spread += f", ESS from {parts[0]:.2f} at {lag[0].value} to {parts[-1]:.2f} at {lag[-1].value}"
    stale = (
        f"Staleness: {ess:.0%} of the samples count (ESS of sequence weights), the mean weight is {mean:.3g} where 1 "
        f"is expected, KL {d['kl_behavior_target'].value:.3g} nats{spread}."
    )
    at = int(heaviest(found.log_ratio, 1)[0])
    where = f" ({found.place[at]})" if found.place else ""
    share = d["max_share"].value
    dominates = f"Dominates: the heaviest trajectory{where} has {share:.1%} of all weight"
    if "max_leverage" in d and not alone:
        dominates += f", the largest leverage in a group is {d['max_leverage'].value:.2f}"
    scale = float(step_scale(np.asarray(ess), exponent=0.5)) if ess > 0 else 0.0
    change = f"Change: scale the step by {scale:.2f} (square root of the ESS)"
    if mistakes:
        change = "Change: mend the data first; then read this again"
    elif found.ranking is not None and found.ranking.rows and not alone:
        best = found.ranking.rows[0]
        change += f"; {best.name} corrects best by its risk bound ({best.risk.value:.3g}, bias {best.bias:.2f})"
    if ess < HALF and not mistakes and lag and len(lag) > 1:
        change += "; cap the lag where the ESS falls below one half"
    required = max(d["khat"].required, d["ess_fraction_sequence"].required)
    enough = (
        "enough"
        if found.n >= required
        else f"too few, {required:.3g} are needed"
        if math.isfinite(required)
        else "never enough"
    )
    khat = d["khat"].value
    tail = "no tail to fit" if not math.isfinite(khat) else f"tail k-hat {khat:.2f}"
    groups = f", {found.informative} of {len(found.labels)} groups have rewards that differ" if found.rows else ""
    sure = f"How sure: {found.n} trajectories are {enough} ({tail}){groups}."
    return [sound, stale, dominates + ".", change + ".", sure]
