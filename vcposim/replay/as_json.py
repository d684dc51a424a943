"""What a replay, or a run's metrics, say as JSON: the answers of `vcposim replay --json`.

A number that does not exist (NaN, infinity) is None. Who reads an answer back finds every field here.
"""

import json
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from vcposim.diagnostics import Diagnostic
from vcposim.replay.metrics import LoggedRun, metrics_summary
from vcposim.replay.replay import Replay, ReplayedBaseline, summary
from vcposim.replay.storage import Stored, forget
from vcposim.replay.tracks import Slice, Track, first_alarms
from vcposim.results import Interval


def to_json(found: Replay) -> dict[str, Any]:
    """The machine-readable form of a replay."""
    return _plain(_answer(found))  # type: ignore[no-any-return]


def json_text(found: Replay) -> Iterator[str]:
    """The same as text, in parts: an answer that lists a million groups is never held whole."""
    return _text(_answer(found))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(x) for key, x in value.items()}
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return [_plain(x) for x in value]
    return [x for part in _parts(value) for x in part] if isinstance(value, COLUMNS) else value


def _text(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        between = "{"
        for key, x in value.items():
            yield f"{between}{json.dumps(key)}: "
            yield from _text(x)
            between = ", "
        yield "}" if value else "{}"
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        for k, x in enumerate(value):
            yield ", " if k else "["
            yield from _text(x)
        yield "]"
    elif isinstance(value, COLUMNS) and len(value):
        for k, part in enumerate(_parts(value)):
            yield (", " if k else "[") + json.dumps(part, allow_nan=False)[1:-1]
        yield "]"
    else:
        yield json.dumps([] if isinstance(value, COLUMNS) else value, allow_nan=False)


AT_ONCE = 1 << 16
COLUMNS = (np.ndarray, Stored)
"""a number or a name a group, in the answer before it is text"""


def _parts(column: np.ndarray | Stored) -> Iterator[list[Any]]:
    """Lists of some of the entries, as JSON knows them."""
    for start in range(0, len(column), AT_ONCE):
        part = column[start : start + AT_ONCE]
        yield (
            [_number(x) if isinstance(x, float) else x for x in part.tolist()]
            if isinstance(part, np.ndarray)
            else list(part)
        )
        forget(column if isinstance(column, np.ndarray) else None)


def _answer(found: Replay) -> dict[str, Any]:
    corrections: dict[str, Any] | None = None
    if found.ranking is not None:
        rows = []
        for row in found.ranking.rows:
            numbers = {n: v for n, v in vars(row).items() if isinstance(v, float) and not isinstance(v, Interval)}
            numbers |= {n: getattr(row, n) for n in ("changed", "held_out_ratio")}  # a number or none
            told = {n: None if v is None else _number(v) for n, v in numbers.items()}
            rows.append({"name": row.name, "risk": _interval(row.risk), **told})
        ranking = found.ranking
        corrections = {"groups": ranking.groups, "per_token": ranking.per_token, "rows": rows, "absent": ranking.absent}
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
            "n": found.size,
            "mean_reward": found.mean_reward,
            "ess_fraction": found.ess_fraction,
            "max_leverage": found.max_leverage,
        },
        "weighting": {"treatment": found.weighting.treatment, "level": "sequence", "cap": found.weighting.cap},
        "norm_source": found.norm_source,
        "bootstrap": {"method": "percentile", "level": 0.95, "resamples": found.resamples, "seed": found.seed},
        "layout": found.layout,
        "summary": summary(found),
        "findings": [one._asdict() for one in found.findings],
        "slices": {name: [_slice_json(one) for one in slices] for name, slices in found.slices.items()},
        "first_alarms": {name: first_alarms(slices) for name, slices in found.slices.items()},
        "corrections": corrections,
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


def _row_json(row: ReplayedBaseline) -> dict[str, Any]:
    held_out = row.held_out_ratio
    return {
        "baseline": row.baseline,
        "per_group": row.per_group,
        "second_moment_ratio": _interval(row.second_moment_ratio),
        "held_out_ratio": None if held_out is None else _interval(held_out),
    }


def _interval(one: Interval) -> dict[str, float | None]:
    return {key: _number(x) for key, x in one._asdict().items()}


def _number(x: float) -> float | None:
    return float(x) if math.isfinite(x) else None


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
