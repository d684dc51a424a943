"""`vcposim replay`: what dumped rollouts say about a run, and what each correction would have done."""

import argparse
import glob
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vcposim.baselines import BASELINES
from vcposim.catalogue import CATALOGUE, WEIGHTINGS
from vcposim.commands.output import Output, add_output_options, output_of, page_path, print_whole, save_page
from vcposim.diagnostics import Diagnostic
from vcposim.errors import InputError
from vcposim.replay import (
    LAYOUTS,
    CorrectionRanking,
    Dump,
    Replay,
    ReplayOptions,
    Slice,
    first_alarms,
    parse_columns,
    read_dump,
    replay,
    summary,
    verdict,
)
from vcposim.replay.as_json import json_text, metrics_json
from vcposim.replay.containers import Progress
from vcposim.replay.inputs import find_inputs
from vcposim.replay.metrics import LoggedRun, find_metrics, metrics_summary, read_metrics
from vcposim.replay.names import FIELDS
from vcposim.replay.reading import check_reading
from vcposim.replay.replay import DEFAULT_BASELINES
from vcposim.results import Interval

EXAMPLES = ("vcposim replay --sample --no-figure",)
FIGURE = "vcposim-replay.png"
SAMPLE = Path(__file__).parents[1] / "replay" / "sample.jsonl"
"""14 prompts x 24 answers of SmolLM2-135M-Instruct to sums of two numbers, at lag 4"""
WIDE = 120
SHOWN_GROUPS = 30
SHOWN_BASELINES = ("group_mean", "length_weighted", "on_policy_optimal", "opob", "opob_leave_one_out")


def add_arguments(p: argparse.ArgumentParser) -> None:
    """What `vcposim replay` takes."""
    p.description = (
        "Reads rollouts that any framework dumped, checks them, and says how stale they are, what dominates, and what "
        "each baseline and correction would have done. FILE: JSON lines, a JSON array or columns, Parquet, Arrow, .pt "
        "(tensors and plain values), a Hugging Face dataset folder; compressed or not; a folder or a glob of these; - "
        f"for a pipe. Fields: {', '.join(FIELDS)}."
    )
    p.add_argument("file", metavar="FILE", nargs="*", help="files, folders, globs, or -")
    p.add_argument("--sample", action="store_true", help="the rollouts that come with vcposim, to see what comes out")
    data = p.add_argument_group("data")
    data.add_argument(
        "--column",
        action="append",
        default=[],
        metavar="FIELD=NAME",
        help="the file's name of a field; repeatable; "
        "a path (a.b, a.0.b, a.*.b) reaches into objects, none ignores the field",
    )
    data.add_argument(
        "--layout", metavar="NAME", help="a framework's layout (default: recognized); --layouts lists them"
    )
    data.add_argument("--layouts", action="store_true", help="list the known layouts and leave")
    data.add_argument(
        "--group", metavar="COLUMN[,COLUMN]", help="columns that name a group together; file stands for the file"
    )
    data.add_argument("--group-size", type=int, metavar="N", help="the rows are in order, N responses a prompt")
    data.add_argument(
        "--trajectory", metavar="COLUMN", help="what the rows of one trajectory share; none: nothing does"
    )
    data.add_argument(
        "--merge-reward", default="same", metavar="HOW", help="rewards of such rows: same (default), sum or last"
    )
    data.add_argument("--skip-bad", action="store_true", help="leave broken records out and count them by reason")
    data.add_argument("--min-group", type=int, default=1, metavar="N", help="leave out smaller groups (default 1)")
    logs = p.add_argument_group(
        "metrics alone",
        "TensorBoard event files, JSON lines, trainer_state.json, exports of W&B and trackio (CSV, JSON, Parquet) of "
        "verl, TRL, prime-rl or vcposim are recognized, and read for the gauges that they hold",
    )
    logs.add_argument("--metrics", action="store_true", help="FILE holds metrics (needed for a pipe)")
    logs.add_argument("--run", dest="run_name", metavar="NAME", help="which of several runs in one export")
    what = p.add_argument_group("estimators")
    what.add_argument("--baseline", nargs="+", default=list(DEFAULT_BASELINES), metavar="B", help=", ".join(BASELINES))
    what.add_argument("--weighting", default="importance", metavar="W", help=", ".join(WEIGHTINGS))
    what.add_argument("--cap", type=float, default=8.0, help="limit of truncated weights and their ESS (default 8)")
    what.add_argument("--floor", type=float, help="smallest weight, for clip and mask")
    what.add_argument(
        "--estimator",
        nargs="+",
        default=[],
        metavar="E",
        help="rank these catalogue entries alone; mine.py:function or module:function (a function of a Batch, see "
        "vcposim check) is ranked beside them, or without names among the whole catalogue",
    )
    what.add_argument("--no-corrections", action="store_true", help="do not rank the catalogue's estimators")
    how = p.add_argument_group("slices and intervals")
    how.add_argument(
        "--by",
        action="append",
        default=[],
        metavar="COLUMN",
        help="slice by step, lag, version, task or any column; repeatable",
    )
    how.add_argument(
        "--watch", type=float, metavar="SECONDS", help="read again whenever the files change, and print the summary"
    )
    how.add_argument("--bootstrap", type=int, default=2000, metavar="N", help="resamples of the groups (default 2000)")
    how.add_argument("--seed", type=int, default=0, help="seed of the bootstrap (default 0)")
    p.add_argument("--html", metavar="FILE", help="write it all to one interactive page; an earlier one is replaced")
    add_output_options(p, FIGURE)


def run(arguments: argparse.Namespace) -> None:
    """Read, replay, draw, print: output appears only when all of it could be made."""
    if arguments.layouts:
        table = _table("Layouts of rollouts", "name", "what it is", "replayable as it is", "source")
        for one in LAYOUTS.values():
            table.add_row(one.name, one.what, "no" if one.missing else "yes", f"{one.source} ({one.read_on})")
        Console().print(table)
        return None
    if arguments.sample and arguments.file:
        raise InputError("--sample: is a file of its own; leave it out to read yours")
    files = [str(SAMPLE)] if arguments.sample else arguments.file
    if not files:
        raise InputError("FILE: missing; name a file or folder of rollouts, - for a pipe, or --sample")
    logged = partial(_logged, files, sure=arguments.metrics, run_name=arguments.run_name, skip_bad=arguments.skip_bad)
    replayed = partial(_replayed(arguments), files)
    page = None
    if arguments.html is not None:
        if not arguments.html:
            raise InputError("--html: is empty; name a page, as in run.html")
        from vcposim.commands.replay_page import GENERATOR
        from vcposim.pages.parts import bundle

        page = page_path(arguments.html, GENERATOR)
        bundle()  # what makes it needs much memory, so before anything is read
    if arguments.watch is not None:
        return _watch(files, arguments.watch, arguments.metrics, logged, replayed, page)
    output = output_of(arguments, FIGURE)
    told = logged()
    if told is not None:
        if arguments.estimator:
            raise InputError(
                "--estimator: needs rollouts, and these files hold metrics; dump rollouts to rank estimators"
            )
        return _say_logged(told, _title(files), output, page)
    found = replayed()
    path = None
    if output.drawing:
        from vcposim.commands.figures import replay_figure  # here because matplotlib is slow to load

        path = output.save(replay_figure(found))
    if page is not None:
        _write_page(found, _title(files), page)
    if output.json:
        for text in json_text(found):
            sys.stdout.write(text)
        print()
        return None
    render(found, Console())
    if path is not None:
        print(f"figure: {path}")
    if page is not None:
        print(f"page: {page}")
    return None


def _logged(files: Sequence[str], *, sure: bool, run_name: str | None, skip_bad: bool) -> LoggedRun | None:
    """The run as its metrics tell it, where the files hold metrics and no rollouts."""
    logs = find_metrics(files, sure=sure)
    if not logs:
        if run_name is not None:
            raise InputError("--run: names a run of several in one export of metrics, and these files are rollouts")
        return None
    return read_metrics(files, run=run_name, skip_bad=skip_bad, files=logs)


def _say_logged(found: LoggedRun, title: str, output: Output, page: Path | None) -> None:
    from vcposim.commands.replay_metrics import metrics_page, render_metrics

    if page is not None:
        save_page(metrics_page(found, title), page)
    if output.json:
        print(json.dumps(metrics_json(found), allow_nan=False))
        return
    render_metrics(found, Console())
    if output.given:
        print("note: --figure draws rollouts; metrics are drawn on a page, with --html FILE")
    if page is not None:
        print(f"page: {page}")


def _title(files: Sequence[str]) -> str:
    title = ", ".join(Path(name).name or name for name in files[:3])
    return title + (" and more" if len(files) > 3 else "")


def _write_page(found: Replay, title: str, page: Path) -> None:
    from vcposim.commands.replay_page import replay_page

    save_page(replay_page(found, title), page)


def _watch(
    given: Sequence[str],
    seconds: float,
    sure: bool,
    logged_now: Callable[[], LoggedRun | None],
    replayed: Callable[[], Replay],
    page: Path | None,
) -> None:
    """The five lines again whenever the files have changed, until interrupted; `sure` that they hold metrics."""
    if not 0 < seconds < math.inf:
        raise InputError(f"--watch: {seconds} is not a number of seconds above 0")
    if "-" in given:
        raise InputError("--watch: a pipe cannot be read again; name files or a folder")
    before: Any = None
    waiting = ""
    while True:
        try:
            logs = find_metrics(given, sure=sure)
            files = logs or find_inputs(given)[0]
            now = [(f, Path(f).stat().st_size, Path(f).stat().st_mtime_ns) for f in files]
            if now != before:
                before = now
                _look(files, logged_now() if logs else None, replayed, _title(given), page)
                waiting = ""
        except (InputError, OSError) as error:  # a file that is half written, or was taken away while it was read
            if not any(Path(name).exists() or glob.has_magic(name) for name in given):
                raise
            if str(error) != waiting:
                print(time.strftime("%H:%M:%S"), f"waiting: {' '.join(str(error).split())}")
                waiting = str(error)
        sys.stdout.flush()
        time.sleep(seconds)


def _look(
    files: Sequence[str], logged: LoggedRun | None, replayed: Callable[[], Replay], title: str, page: Path | None
) -> None:
    """The five lines of what the files hold now."""
    if logged is not None:
        _tell(metrics_summary(logged), f"{len(logged.steps)} steps of metrics", {"step": logged.first_alarms})
        if page is not None:
            from vcposim.commands.replay_metrics import metrics_page

            save_page(metrics_page(logged, title), page)
    else:
        found = replayed()
        alarms = {name: first_alarms(slices) for name, slices in found.slices.items()}
        checks = [f"CHECK {one.check}: {one.evidence}" for one in found.findings]
        unread = [note for note in found.notes if "not finished yet" in note]
        _tell([*summary(found), *checks, *unread], f"{found.n} trajectories in {len(files)} files", alarms)
        if page is not None:
            _write_page(found, title, page)
    if page is not None:
        print(f"  page: {page}")


def _tell(lines: Sequence[str], what: str, alarms: Mapping[str, Mapping[str, Any]]) -> None:
    print(time.strftime("%H:%M:%S"), what)
    for line in lines:
        print(" ", line)
    for name, first in alarms.items():
        for gauge, value in first.items():
            print(f"  first alarm of {gauge}: {name} {value}")


def _replayed(arguments: argparse.Namespace) -> Callable[[Sequence[str]], Replay]:
    """What reads files and replays them as asked; all that was asked is checked here, before anything is read."""
    group = [name.strip() for name in (arguments.group or "").split(",") if name.strip()]
    if arguments.group is not None and not group:
        raise InputError(f"--group: {arguments.group!r} names no column; name what the responses of one prompt share")
    if arguments.floor is not None and arguments.weighting not in ("clip", "mask"):
        raise InputError("--floor: limits weights that are clipped or masked; add --weighting clip or mask, with --cap")
    if arguments.no_corrections and arguments.estimator:
        raise InputError("--no-corrections: leaves nothing to rank, and --estimator names what to rank; keep one")
    reading: dict[str, Any] = {
        "columns": parse_columns(arguments.column),
        "layout_name": arguments.layout,
        "group": group,
        "group_size": arguments.group_size,
        "merge_reward": arguments.merge_reward,
    }
    check_reading(**reading)
    read: Callable[..., Dump] = partial(
        read_dump,
        **reading,
        trajectory=arguments.trajectory,
        by=arguments.by,
        skip_bad=arguments.skip_bad,
        growing=arguments.watch is not None,
    )
    asked = ReplayOptions(
        baselines=arguments.baseline,
        weighting=arguments.weighting,
        cap=arguments.cap,
        floor=arguments.floor,
        resamples=arguments.bootstrap,
        seed=arguments.seed,
        min_group=arguments.min_group,
        by=arguments.by,
        corrections=not arguments.no_corrections,
        estimators=arguments.estimator,
    )
    return lambda files: replay(read(files, progress=Progress()), asked)


def render(found: Replay, console: Console) -> None:
    """The answer for a reader: five lines, then checks, gauges, slices, groups, baselines, corrections, a sentence."""
    cap = found.weighting.cap
    treatment = found.weighting.treatment + ("" if cap is None else f" (cap {cap:g})")
    groups = f" in {len(found.labels)} groups" if found.rows else ""
    console.print(f"{found.n} trajectories{groups}; weights: {treatment}, sequence level")
    console.print(f"||s||^2 from: {found.norm_source}", markup=False)
    for line in summary(found):
        console.print(line, markup=False, style="bold")
    for check in found.findings:
        console.print(f"CHECK {check.check}: {check.evidence}. Likely: {check.cause}.", style="red", markup=False)
    wide = console.width >= WIDE
    table = _table("Is this batch still about the target policy?", "diagnostic", "value", "limit", "needs n", "")
    if wide:
        table.add_column("meaning")
    for one in found.diagnostics.values():
        required = math.ceil(one.required) if math.isfinite(one.required) else one.required
        limit = f"{'<' if one.high_is_bad else '>'} {_number(one.threshold)}"
        cells: list[str | Text] = [_number(one.value), limit, _number(required), _state(one, found.n)]
        table.add_row(one.name, *cells, *([one.meaning] if wide else []))
    print_whole(console, table)
    for gauge in found.diagnostics.values():
        if gauge.alarming and not wide:
            console.print(f"ALARM {gauge.name}: {gauge.meaning}", markup=False)
    for name, slices in found.slices.items():
        print_whole(console, _slices(name, slices, found))
        alarms = first_alarms(slices)
        if alarms and len(slices) > 1:
            told = ", ".join(f"{gauge} at {name} {value}" for gauge, value in alarms.items())
            console.print(f"first alarms: {told}", markup=False)
    if found.rows:
        console.print(_groups(found))
        title = "Mean of (w (R - b) ||s||)^2 relative to group_mean"
        table = _table(title, "baseline", "in sample [95%]", "held out [95%]")
        for row in found.rows:
            table.add_row(row.baseline, _interval(row.second_moment_ratio), _interval(row.held_out_ratio))
        print_whole(console, table)
        console.print(
            "In sample, each baseline has seen the rewards it is subtracted from: opob minimizes that "
            "number by definition. Held out, both are computed without the sample: only that column can show harm. "
            f"Percentile bootstrap over groups, {found.resamples} resamples, seed {found.seed}.",
            style="dim",
            markup=False,
        )
    if found.ranking is not None:
        print_whole(console, _corrections(found.ranking))
        scope = "tokens of the first" if found.ranking.per_token else "the first"
        console.print(
            "risk = bias^2 + spread, relative to the size of the untruncated importance-weighted gradient: bias bounds "
            "what the correction gives up, spread is what its noise costs. Scores of tokens are taken as orthogonal, "
            f"scale is free. Over {scope} {found.ranking.groups} groups.",
            style="dim",
            markup=False,
        )
        for column, names in found.ranking.absent.items():
            console.print(f"with {column}: also {', '.join(names)}", style="dim", markup=False)
    for note in found.notes:
        console.print(f"note: {note}", markup=False)
    console.print(verdict(found), style="bold", markup=False)


SHOWN_CORRECTIONS = 12
SHOWN_SLICES = 16


def _corrections(ranking: CorrectionRanking) -> Table:
    more = f" (best {SHOWN_CORRECTIONS} of {len(ranking.rows)}; --json has all)"
    table = _table(
        f"Which correction?{more if len(ranking.rows) > SHOWN_CORRECTIONS else ''}",
        "estimator", "risk [95%]", "bias", "spread", "kept", "changed", "held out", "ESS", "cosine",
    )  # fmt: skip
    own = [row for row in ranking.rows[SHOWN_CORRECTIONS:] if row.name not in CATALOGUE]
    for row in [*ranking.rows[:SHOWN_CORRECTIONS], *own]:
        optional = [Text("—") if x is None else Text(f"{x:.3f}") for x in (row.changed, row.held_out_ratio)]
        numbers = [_fixed(x) for x in (row.bias, row.spread, row.kept)]
        table.add_row(row.name, _interval(row.risk), *numbers, *optional, _fixed(row.effective), _fixed(row.cosine))
    return table


SLICED = ("ess_fraction_sequence", "mean_weight", "kl_behavior_target", "khat")


def _slices(name: str, slices: list[Slice], found: Replay) -> Table:
    shown = list(slices)
    if len(slices) > SHOWN_SLICES:
        spread = {round(k * (len(slices) - 1) / (SHOWN_SLICES - 1)) for k in range(SHOWN_SLICES)}
        firsts = set(first_alarms(slices).values())
        shown = [one for k, one in enumerate(slices) if k in spread or one.value in firsts]
    more = (
        f" ({len(shown)} of {len(slices)}, first alarms among them; --json has all)" if len(shown) < len(slices) else ""
    )
    table = _table(f"By {name}{more}", name, "n", "reward", "ESS", "mean weight", "KL", "k-hat", "alarms")
    for one in shown:
        alarms = sum(gauge.alarming for gauge in one.diagnostics.values())
        cells = [_number(one.diagnostics[gauge].value) for gauge in SLICED]
        table.add_row(_short(str(one.value)), str(one.n), _fixed(one.mean_reward), *cells, str(alarms or "—"))
    cells = [_number(found.diagnostics[gauge].value) for gauge in SLICED]
    alarms = sum(gauge.alarming for gauge in found.diagnostics.values())
    table.add_row("all", str(found.n), "", *cells, str(alarms or "—"), style="dim")
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
