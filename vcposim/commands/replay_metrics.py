"""`vcposim replay` on metrics alone: the gauges that a run logged, on a terminal and on a page."""

import math
from html import escape
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vcposim.commands.output import print_whole
from vcposim.commands.replay_page import against, assembled
from vcposim.pages.parts import prose, table
from vcposim.replay.metrics import LoggedRun, metrics_summary
from vcposim.replay.tracks import Track


def render_metrics(found: LoggedRun, console: Console) -> None:
    """Five lines, every gauge with its limit and first alarm, and what cannot be told from metrics."""
    console.print(f"metrics of {len(found.steps)} steps, no rollouts")
    for line in metrics_summary(found):
        console.print(line, markup=False, style="bold")
    shown = Table(title="What the run logged", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    shown.add_column("gauge", no_wrap=True)
    for name in ("first", "last", "worst", "at step", "limit", "first alarm"):
        shown.add_column(name, justify="right")
    shown.add_column("key")
    for one in [*found.gauges, *([found.reward] if found.reward else [])]:
        first = Text(_alarm(one), style="" if one.first_alarm is None else "bold red")
        shown.add_row(one.name, *_course(one), _limit(one), first, _key(found, one))
    print_whole(console, shown)
    for name, why in found.unjudged.items():
        console.print(f"cannot be judged: {name}, {why}", style="dim", markup=False)
    for note in found.notes:
        console.print(f"note: {note}", markup=False)


def metrics_page(found: LoggedRun, title: str) -> str:
    """The same on a page, every gauge against step and the reward below."""
    specs: dict[str, Any] = {}
    reward = [] if found.reward is None else [found.reward]
    rows = [
        list(map(escape, [one.name, *_course(one), _limit(one), _alarm(one), _key(found, one)]))
        for one in [*found.gauges, *reward]
    ]
    head = ("gauge", "first", "last", "worst", "at step", "limit", "first alarm", "key")
    told = "".join(f"<li>{escape(name)}: {prose(why)}</li>" for name, why in found.unjudged.items())
    notes = "".join(f"<li>{escape(note)}</li>" for note in found.notes)
    sections = {
        "run": ("Gauges against step", against("step", found.gauges, reward, specs)),
        "gauges": ("What the run logged", table("What the run logged", head, rows)),
        "unjudged": ("What metrics cannot tell", f"<ul>{told}</ul>"),
        **({"notes": ("Notes", f"<ul>{notes}</ul>")} if notes else {}),
    }
    what = f"Metrics of {len(found.steps)} steps, no rollouts"
    return assembled(title, what, metrics_summary(found), sections, specs)


def _course(one: Track) -> list[str]:
    """First, last and worst value, and the worst one's step."""
    finite = [(s, v) for s, v in zip(one.at, one.value, strict=True) if math.isfinite(v)]
    if not finite:
        return ["—"] * 4
    judged = one.limit is not None
    worst, at = ("—", "—")
    if judged:
        step, value = (max if one.high_is_bad else min)(finite, key=lambda pair: pair[1])
        worst, at = f"{value:.3g}", str(step)
    return [f"{finite[0][1]:.3g}", f"{finite[-1][1]:.3g}", worst, at]


def _limit(one: Track) -> str:
    return "none" if one.limit is None else f"{'<' if one.high_is_bad else '>'} {one.limit[-1]:.3g}"


def _alarm(one: Track) -> str:
    return "—" if one.first_alarm is None else f"step {one.first_alarm}"


def _key(found: LoggedRun, one: Track) -> str:
    key = found.keys.get(one.name)
    return "computed" if key is None else key.key
