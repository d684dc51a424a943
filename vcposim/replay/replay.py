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
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from vcposim.baselines import NEEDS_TWO, baseline
from vcposim.catalogue import weighting as named_weighting
from vcposim.diagnostics import Diagnostic, WeightSums
from vcposim.errors import InputError
from vcposim.gauges.panel import HALF, leverage_diagnostic, sample_panel
from vcposim.gauges.tails import MIN_SAMPLES
from vcposim.replay.contributions import HELD_OUT, Interval, Table, bootstrap_ratios, tabulate
from vcposim.replay.dumps import Dump
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


@dataclass(frozen=True)
class Row:
    """One baseline on all groups."""

    baseline: str
    per_group: np.ndarray
    """(g,) the baseline, for per-sample baselines the mean of b_i; NaN where a group is too small for it"""
    second_moment_ratio: Interval
    held_out_ratio: Interval | None


@dataclass(frozen=True)
class Replay:
    """What the dump says, ready to print, draw or dump; groups in order of appearance."""

    n: int
    labels: list[Hashable]
    size: np.ndarray
    """(g,) responses per group"""
    mean_reward: np.ndarray
    ess_fraction: np.ndarray
    """(g,) of the untouched sequence weights within each group"""
    max_leverage: np.ndarray
    """(g,)"""
    informative: int
    """groups in which rewards differ, so that the group mean learns something"""
    log_ratio: np.ndarray
    """(n,) in the order of the file, nats"""
    diagnostics: dict[str, Diagnostic]
    rows: list[Row]
    weighting: Weighting
    cap: float
    norm_source: str
    notes: list[str]
    seed: int
    resamples: int

    def row(self, name: str) -> Row | None:
        """The row of a baseline, if it was asked for."""
        return next((row for row in self.rows if row.baseline == name), None)


def replay(
    dump: Dump,
    *,
    baselines: Sequence[str] = DEFAULT_BASELINES,
    weighting: str = "importance",
    cap: float = 8.0,
    floor: float | None = None,
    resamples: int = 2000,
    seed: int = 0,
    min_group: int = 1,
) -> Replay:
    """Replay `baselines` on a dump, under sequence weights treated by `weighting`.

    `cap` is the limit of truncating treatments and of the truncated ESS. Groups below `min_group` are left out.

    Raises `InputError` for unknown names, numbers out of range, or a dump with no group left.
    """
    notes: list[str] = []
    names = _known(baselines, notes)
    if resamples < 100:
        raise InputError(f"bootstrap: {resamples} resamples cannot place a 95% interval; use 100 or more")
    if seed < 0:
        raise InputError(f"seed: {seed} is negative; use 0 or more")
    limits: dict[str, Any] = {"cap": cap, "floor": floor} if weighting in LIMITED else {}
    weigh = named_weighting(weighting, **limits)
    dump = _kept_groups(dump, min_group, notes)
    size = np.bincount(dump.group)
    table = tabulate(dump, size, names, weigh)
    ratio = bootstrap_ratios(np.concatenate([table.in_sample, table.held_out]), resamples, seed)
    rows = [
        Row(name, table.per_group[k], ratio[k], ratio[len(names) + k] if name in (*HELD_OUT, "zero") else None)
        for k, name in enumerate(names)
    ]
    diagnostics = sample_panel(dump.log_ratio, length=dump.length, norm=np.sqrt(dump.score_sq_norm), cap=cap)
    if dump.tokens is not None:
        diagnostics["ess_fraction_token"] = _token_ess(dump.tokens)
    diagnostics["max_leverage"] = leverage_diagnostic(float(table.max_leverage.max()))
    return Replay(
        n=dump.group.size,
        labels=dump.labels,
        size=size,
        mean_reward=table.mean_reward,
        ess_fraction=table.ess_fraction,
        max_leverage=table.max_leverage,
        informative=table.informative,
        log_ratio=dump.log_ratio,
        diagnostics=diagnostics,
        rows=rows,
        weighting=weigh,
        cap=cap,
        norm_source=dump.norm_source,
        notes=notes + _explanations(dump, size, table, rows, weigh),
        seed=seed,
        resamples=resamples,
    )


def to_json(found: Replay) -> dict[str, Any]:
    """The machine-readable form; what does not exist (NaN, infinity) is None."""
    values = {name: _number(one.value) for name, one in found.diagnostics.items()}
    prefix = "ess_fraction_"
    levels = {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}
    others = {name: value for name, value in values.items() if not name.startswith(prefix)}
    return {
        "n": found.n,
        "groups": len(found.labels),
        "diagnostics": {"ess_fraction": levels, **others},
        "thresholds": {
            name: {
                "threshold": _number(one.threshold),
                "high_is_bad": one.high_is_bad,
                "required": _number(one.required),
                "alarming": one.alarming,
            }
            for name, one in found.diagnostics.items()
        },
        "rows": [_row_json(row) for row in found.rows],
        "per_group": {
            "group": found.labels,
            "n": found.size.tolist(),
            "mean_reward": _numbers(found.mean_reward),
            "ess_fraction": _numbers(found.ess_fraction),
            "max_leverage": _numbers(found.max_leverage),
        },
        "weighting": {"treatment": found.weighting.treatment, "level": "sequence", "cap": found.weighting.cap},
        "norm_source": found.norm_source,
        "bootstrap": {"method": "percentile", "level": 0.95, "resamples": found.resamples, "seed": found.seed},
        "notes": found.notes,
    }


def _row_json(row: Row) -> dict[str, Any]:
    held_out = row.held_out_ratio
    return {
        "baseline": row.baseline,
        "per_group": _numbers(row.per_group),
        "second_moment_ratio": {key: _number(x) for key, x in row.second_moment_ratio._asdict().items()},
        "held_out_ratio": None if held_out is None else {key: _number(x) for key, x in held_out._asdict().items()},
    }


def _number(x: float) -> float | None:
    return float(x) if math.isfinite(x) else None


def _numbers(x: Any) -> list[float | None]:
    return [_number(value) for value in x.tolist()]


def _known(baselines: Sequence[str], notes: list[str]) -> list[str]:
    names = [name for name in baselines if name not in NEEDS_SCORES]
    for name in dict.fromkeys(baselines):
        baseline(name)
        if name in NEEDS_SCORES:
            notes.append(f"baseline {name} is left out: it {NEEDS_SCORES[name]}")
        if list(baselines).count(name) > 1:
            raise InputError(f"baseline: {name!r} is given twice; name each once")
    if not names:
        raise InputError("baseline: none is left to replay; name at least one that needs only norms, such as opob")
    return names


def _kept_groups(dump: Dump, min_group: int, notes: list[str]) -> Dump:
    if min_group < 1:
        raise InputError(f"min_group: {min_group} is not positive; use 1 to keep every group")
    size = np.bincount(dump.group)
    kept = size >= min_group
    if kept.all():
        return dump
    if not kept.any():
        raise InputError(f"min_group: no group has {min_group} responses, the largest has {size.max()}; lower it")
    notes.append(f"{int((~kept).sum())} groups with fewer than {min_group} responses are left out")
    rows = kept[dump.group]
    if dump.tokens is not None:
        notes.append("the token-level ESS still counts them")
    return replace(
        dump,
        labels=[label for label, keep in zip(dump.labels, kept, strict=True) if keep],
        group=(np.cumsum(kept) - 1)[dump.group[rows]],
        **{name: getattr(dump, name)[rows] for name in ("reward", "log_ratio", "length", "score_sq_norm")},
    )


def _token_ess(tokens: WeightSums) -> Diagnostic:
    return Diagnostic(
        name="ess_fraction_token",
        value=float(tokens.ess_fraction()),
        threshold=HALF,
        high_is_bad=False,
        meaning="share of the tokens that count, by token weights; blind to how ratios multiply along a trajectory",
    )


def _explanations(dump: Dump, size: Any, table: Table, rows: Sequence[Row], weighting: Weighting) -> list[str]:
    notes = []
    if weighting.treatment != "importance":
        notes.append(
            f"under {weighting.treatment!r} weights means differ too: ratios order second moments, not variances"
        )
    if weighting.smooth is not None and size.min() < MIN_SAMPLES:
        notes.append(f"groups of fewer than {MIN_SAMPLES} have no tail to smooth: their weights are untouched")
    if dump.norm_source != "score_sq_norm":
        notes.append(f"the dump has no score_sq_norm: {dump.norm_source} stands in for ||s||^2 everywhere")
    if not np.any(dump.score_sq_norm > 0):
        notes.append(f"every {dump.norm_source} is 0: no contribution has a size, ratios are undefined")
    alone = int((size < 2).sum())
    if alone:
        short = [row.baseline for row in rows if row.baseline in NEEDS_TWO]
        skipped = f", {', '.join(short)} skip them" if short else ""
        notes.append(f"{alone} groups have a single response: the group mean leaves them no advantage{skipped}")
    equal = len(size) - table.informative
    if equal:
        notes.append(
            f"{equal} of {len(size)} groups have equal rewards throughout: the group mean learns nothing there"
        )
    if len(size) < FEW_GROUPS:
        notes.append(f"{len(size)} groups are few: bootstrap intervals over so few are narrower than their 95% says")
    if equal > len(size) - 2:
        notes.append("fewer than two groups have differing rewards: no interval can be placed around a ratio")
    return notes


def verdict(found: Replay) -> str:
    """One sentence: would the off-policy optimal baseline have helped here?"""
    row = found.row("opob_leave_one_out") or found.row("opob")
    if row is None or row.held_out_ratio is None:
        return "Would OPOB have helped here? Not asked: add opob to the baselines."
    value, low, high = row.held_out_ratio
    if math.isnan(value):
        return "Would OPOB have helped here? It cannot be told: no group has rewards that differ."
    said = f"held out, a contribution's second moment is {value:.3f} of the group mean's"
    if found.informative < LEAST_GROUPS:
        few = f"{found.informative} with rewards that differ"
        return f"Would OPOB have helped here? Too few groups to tell ({few}): {said}."
    said += f" (95% interval {low:.3f} to {high:.3f}, {found.informative} groups with rewards that differ)"
    if high < 1:
        return f"Would OPOB have helped here? Yes: {said}."
    if low > 1:
        gain = (
            " What it gains in sample, it gains by damping the samples that dominate it."
            if _gains_in_sample(found)
            else ""
        )
        return f"Would OPOB have helped here? Not by what it subtracts, that would have hurt: {said}.{gain}"
    return f"Would OPOB have helped here? No evidence either way: {said}, which covers 1."


def _gains_in_sample(found: Replay) -> bool:
    """Whether the in-batch OPOB reads better than the group mean in sample: R_i - b = (1 - h_i)(R_i - b_{-i})."""
    row = found.row("opob")
    return row is not None and row.second_moment_ratio.value < 1
