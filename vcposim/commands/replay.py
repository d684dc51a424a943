"""`vcposim replay FILE`: what each baseline would have done on rollouts that a framework dumped."""

import argparse
import json
import math

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vcposim.baselines import BASELINES
from vcposim.catalogue import WEIGHTINGS
from vcposim.commands.output import add_output_options, save_figure, wants_figure
from vcposim.diagnostics import Diagnostic
from vcposim.replay.contributions import Interval
from vcposim.replay.dumps import FIELDS, parse_columns, read_dump
from vcposim.replay.replay import DEFAULT_BASELINES, Replay, replay, to_json, verdict

FIGURE = "vcposim-replay.png"
WIDE = 120
SHOWN_GROUPS = 30
SHOWN_BASELINES = ("group_mean", "length_weighted", "on_policy_optimal", "opob", "opob_leave_one_out")


def add_arguments(p: argparse.ArgumentParser) -> None:
    """What `vcposim replay` takes."""
    p.description = (
        "Diagnostics of dumped rollouts, and what each baseline would have done to them. "
        f"FILE is JSONL or Parquet, one trajectory a record, with the fields {', '.join(FIELDS)}."
    )
    p.add_argument("file", metavar="FILE", help="JSONL or Parquet, one trajectory a record")
    data = p.add_argument_group("data")
    data.add_argument(
        "--column", action="append", default=[], metavar="FIELD=NAME", help="the file's name of a field; repeatable"
    )
    data.add_argument("--min-group", type=int, default=1, metavar="N", help="leave out smaller groups (default 1)")
    what = p.add_argument_group("estimators")
    what.add_argument("--baseline", nargs="+", default=list(DEFAULT_BASELINES), metavar="B", help=", ".join(BASELINES))
    what.add_argument("--weighting", default="importance", metavar="W", help=", ".join(WEIGHTINGS))
    what.add_argument("--cap", type=float, default=8.0, help="limit of truncated weights and their ESS (default 8)")
    what.add_argument("--floor", type=float, help="smallest weight, for clip and mask")
    how = p.add_argument_group("intervals")
    how.add_argument("--bootstrap", type=int, default=2000, metavar="N", help="resamples of the groups (default 2000)")
    how.add_argument("--seed", type=int, default=0, help="seed of the bootstrap (default 0)")
    add_output_options(p, FIGURE)


def run(arguments: argparse.Namespace) -> None:
    """Read, replay, draw, print: output appears only when all of it could be made."""
    drawing = wants_figure(arguments, FIGURE)
    found = replay(
        read_dump(arguments.file, parse_columns(arguments.column)),
        baselines=arguments.baseline,
        weighting=arguments.weighting,
        cap=arguments.cap,
        floor=arguments.floor,
        resamples=arguments.bootstrap,
        seed=arguments.seed,
        min_group=arguments.min_group,
    )
    path = None
    if drawing:
        from vcposim.commands.figures import replay_figure  # here because matplotlib is slow to load

        path = save_figure(replay_figure(found), arguments.figure, FIGURE)
    if arguments.json:
        print(json.dumps(to_json(found), allow_nan=False))
        return
    render(found, Console())
    if path is not None:
        print(f"figure: {path}")


def render(found: Replay, console: Console) -> None:
    """The answer for a reader: gauges, groups, baselines, and one sentence."""
    limit = found.weighting.cap
    treatment = found.weighting.treatment + ("" if limit is None else f" (cap {limit:g})")
    console.print(f"{found.n} trajectories in {len(found.labels)} groups; weights: {treatment}, sequence level")
    console.print(f"||s||^2 from: {found.norm_source}", markup=False)
    wide = console.width >= WIDE
    console.print(_gauges(found, wide))
    for one in found.diagnostics.values():
        if one.alarming and not wide:
            console.print(f"ALARM {one.name}: {one.meaning}", markup=False)
    console.print(_groups(found))
    console.print(_baselines(found))
    console.print(
        "In sample, each baseline has seen the rewards it is subtracted from: opob minimizes that "
        "number by definition. Held out, both are computed without the sample: only that column can show harm. "
        f"Percentile bootstrap over groups, {found.resamples} resamples, seed {found.seed}.",
        style="dim",
        markup=False,
    )
    for note in found.notes:
        console.print(f"note: {note}", markup=False)
    console.print(verdict(found), style="bold", markup=False)


def _gauges(found: Replay, wide: bool) -> Table:
    table = _table("Is this batch still about the target policy?", "diagnostic", "value", "limit", "needs n", "")
    if wide:
        table.add_column("meaning")
    for one in found.diagnostics.values():
        required = math.ceil(one.required) if math.isfinite(one.required) else one.required
        limit = f"{'<' if one.high_is_bad else '>'} {_number(one.threshold)}"
        cells: list[str | Text] = [_number(one.value), limit, _number(required), _state(one, found.n)]
        if wide:
            cells.append(one.meaning)
        table.add_row(one.name, *cells)
    return table


def _table(title: str, first: str, *others: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column(first, no_wrap=True)
    for name in others:
        table.add_column(name, justify="right")
    return table


def _state(one: Diagnostic, n: int) -> Text:
    if math.isnan(one.value):
        return Text("ALARM: not estimable", style="bold red")
    if one.alarming:
        return Text("ALARM", style="bold red")
    return Text("ok") if n >= one.required else Text("n too small", style="yellow")


def _groups(found: Replay) -> Table:
    names = [row.baseline for row in found.rows if row.baseline in SHOWN_BASELINES]
    count = len(found.labels)
    more = f" (first {SHOWN_GROUPS} of {count}; --json has all)" if count > SHOWN_GROUPS else ""
    reward = [] if "group_mean" in names else ["mean reward"]
    # words may wrap, underscores may not: the names are the baselines' own
    headers = [name.replace("_", " ") for name in (*reward, *names)]
    table = _table(f"Baselines per group{more}", "group", "n", *headers, "max leverage", "ESS fraction")
    for i, label in enumerate(found.labels[:SHOWN_GROUPS]):
        values = [row.per_group[i] for row in found.rows if row.baseline in names]
        cells = [*([found.mean_reward[i]] if reward else []), *values, found.max_leverage[i], found.ess_fraction[i]]
        table.add_row(Text(_short(str(label))), str(found.size[i]), *map(_fixed, cells))
    return table


def _baselines(found: Replay) -> Table:
    title = "Mean of (w (R - b) ||s||)^2 relative to group_mean"
    table = _table(title, "baseline", "in sample [95%]", "held out [95%]")
    for row in found.rows:
        table.add_row(row.baseline, _interval(row.second_moment_ratio), _interval(row.held_out_ratio))
    return table


def _interval(x: Interval | None) -> Text:
    if x is None or math.isnan(x.value):
        return Text("—")
    if math.isnan(x.low):
        return Text(f"{x.value:.3f} [—]")
    return Text(f"{x.value:.3f} [{_fixed(x.low)}, {_fixed(x.high)}]")


def _short(label: str) -> str:
    return label if len(label) <= 20 else label[:19] + "…"


def _fixed(x: float) -> str:
    return "—" if math.isnan(x) else f"{x:.3f}"


def _number(x: float) -> str:
    return "—" if math.isnan(x) else f"{x:.3g}"
