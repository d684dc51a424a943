"""What a replay, or a run's metrics, say as JSON: the answers of `vcposim replay --json`.

A number that does not exist (NaN, infinity) is None. Who reads an answer back finds every field here.
"""

import math
from typing import Any

import numpy as np

from vcposim.diagnostics import Diagnostic
from vcposim.replay.corrections import CorrectionRanking
from vcposim.replay.metrics import LoggedRun, metrics_summary
from vcposim.replay.replay import Replay, ReplayedBaseline, summary
from vcposim.replay.tracks import Slice, Track, first_alarms
from vcposim.results import Interval


def to_json(found: Replay) -> dict[str, Any]:
    """The machine-readable form of a replay."""
    return {
        "n": found.n,
        "groups": len(found.labels),
        "diagnostics": _levels(found.diagnostics),
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
        "layout": found.layout,
        "summary": summary(found),
        "findings": [one._asdict() for one in found.findings],
        "slices": {name: [_slice_json(one) for one in slices] for name, slices in found.slices.items()},
        "first_alarms": {name: first_alarms(slices) for name, slices in found.slices.items()},
        "corrections": None if found.ranking is None else _ranking_json(found.ranking),
        "skipped": found.skipped,
        "notes": found.notes,
    }


def _levels(diagnostics: dict[str, Diagnostic]) -> dict[str, float | dict[str, float | None] | None]:
    values = {name: _number(one.value) for name, one in diagnostics.items()}
    prefix = "ess_fraction_"
    levels = {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}
    return {"ess_fraction": levels, **{n: v for n, v in values.items() if not n.startswith(prefix)}}


def _slice_json(one: Slice) -> dict[str, Any]:
    return {
        "value": one.value,
        "n": one.n,
        "groups": one.groups,
        "mean_reward": _number(one.mean_reward),
        "diagnostics": _levels(one.diagnostics),
        "alarms": [name for name, gauge in one.diagnostics.items() if gauge.alarming],
    }


def _ranking_json(ranking: CorrectionRanking) -> dict[str, Any]:
    rows = []
    for row in ranking.rows:
        numbers = {n: _number(v) for n, v in vars(row).items() if isinstance(v, float) and not isinstance(v, Interval)}
        optional = {
            n: None if v is None else _number(v) for n, v in vars(row).items() if n in ("changed", "held_out_ratio")
        }
        rows.append({"name": row.name, "risk": _interval(row.risk), **numbers, **optional})
    return {"groups": ranking.groups, "per_token": ranking.per_token, "rows": rows, "absent": ranking.absent}


def _row_json(row: ReplayedBaseline) -> dict[str, Any]:
    held_out = row.held_out_ratio
    return {
        "baseline": row.baseline,
        "per_group": _numbers(row.per_group),
        "second_moment_ratio": _interval(row.second_moment_ratio),
        "held_out_ratio": None if held_out is None else _interval(held_out),
    }


def _interval(one: Interval) -> dict[str, float | None]:
    return {key: _number(x) for key, x in one._asdict().items()}


def _number(x: float) -> float | None:
    return float(x) if math.isfinite(x) else None


def _numbers(x: np.ndarray) -> list[float | None]:
    return [_number(value) for value in x.tolist()]


def metrics_json(found: LoggedRun) -> dict[str, Any]:
    """The machine-readable form of a run's metrics."""

    def plain(one: Track) -> dict[str, Any]:
        values = [_number(v) for v in one.value]
        limit = None if one.limit is None else one.limit[0]
        return {"step": one.at, "value": values, "limit": limit, "high_is_bad": one.high_is_bad, "alarms": one.alarms}

    return {
        "kind": "metrics",
        "steps": found.steps,
        "gauges": {one.name: plain(one) for one in found.gauges},
        "reward": None if found.reward is None else plain(found.reward),
        "collapsed_at": found.collapsed_at,
        "keys": {gauge: key._asdict() for gauge, key in found.keys.items()},
        "first_alarms": found.first_alarms,
        "cannot_be_judged": found.unjudged,
        "summary": metrics_summary(found),
        "skipped": found.skipped,
        "notes": found.notes,
    }
