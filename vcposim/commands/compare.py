"""`vcposim compare`: your estimators measured like the catalogue's, and beside them."""

import argparse
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from vcposim.catalogue import CATALOGUE
from vcposim.commands.completion import complete_with
from vcposim.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console

    from vcposim.comparison.result import ComparedEstimator, ComparisonReport, MeasuredByName
    from vcposim.comparison.run import Folder

SIZES = ("tiny", "quick", "full")
EXAMPLES = ("vcposim compare vcpo mine.py:mine --size tiny --alone --workers 1",)
OUT = "vcposim-compare"
WORD_STYLE = {"holds": "green", "holds if": "yellow", "fails": "bold red", "undecided": "blue", "not judged": "dim"}
NEIGHBORS = 3
"""how many of the best are shown beside those asked for"""
MOST_NAMED = 12
"""of more than so many, the table and the page tell the words"""


def add_arguments(p: argparse.ArgumentParser) -> None:
    """What `vcposim compare` takes."""
    p.description = (
        "Measure estimators like every other: the laws they keep, exact bias and variance over lag, what they learn at "
        "a common and at their own best step size over regimes, and their cost. What you name is run; the rest of the "
        "catalogue comes from the leaderboard, same tasks, same seeds. Without names: the whole catalogue is run."
    )
    p.epilog = (
        "A function may say what it reads and which laws it claims, as in\n"
        "  mine.needs = ('tokens',)    mine.claims = ('unbiased',)\n"
        "DIR gets comparison.json, comparison.html and cost.js. A run that was interrupted or killed goes on when "
        "started again, to the same bytes. On a Slurm array from 1 to 8, with one DIR that all tasks see:\n"
        "  vcposim compare --size full --out DIR --shard $SLURM_ARRAY_TASK_ID/8\n"
        "and the same without --shard to merge (of DIRs apart: copy records/ into one).\n"
        "--transformers: addition and shortest_path of llm_bridge, rollouts 16 updates\n"
        "old, 4 seeds at one step size (quick) or 8 at two (full): a quarter of a\n"
        "minute, or one, of CPU for each estimator. The group mean learns them too, for\n"
        "the leaderboard has no transformers. Policies are warmed up once and kept in\n"
        "the cache folder. A calculator, over four times as long, is in\n"
        "  python -m simulations run transformer_collapse --estimator mine.py:mine"
    )
    says = "catalogue names, path/to/file.py:function, or module:function (a function of a vcposim.Batch)"
    complete_with(p.add_argument("estimators", nargs="*", metavar="ESTIMATOR", help=says), CATALOGUE)
    p.add_argument("--size", default="quick", choices=SIZES, help="how much is measured (default quick; full settles)")
    p.add_argument("--out", metavar="DIR", help=f"where records and results go (default {OUT}-SIZE)")
    p.add_argument("--workers", type=int, metavar="N", help="processes (default: one a core); the result is the same")
    says = "use the workers of a dask.distributed scheduler instead, started in this folder"
    p.add_argument("--scheduler", metavar="ADDRESS", help=says)
    p.add_argument("--shard", metavar="I/N", help="compute the I-th of N parts of the work alone (I from 1)")
    p.add_argument("--alone", action="store_true", help="compare those named with each other and the group mean only")
    says = "train small transformers too (extra 'llm'): success on held-out problems beside all else"
    p.add_argument("--transformers", action="store_true", help=says)
    p.add_argument("--json", action="store_true", help="print the comparison as one JSON object")
    p.add_argument("--html", action="store_true", help="print the page instead of the table")


def run(arguments: argparse.Namespace) -> int:
    """Measure, compare, write, print; returns the exit code, 130 when interrupted."""
    if arguments.json and arguments.html:
        raise InputError("--html: not with --json; both are in the folder anyway")
    workers = len(os.sched_getaffinity(0)) if arguments.workers is None else arguments.workers
    if workers < 1:
        raise InputError(f"--workers: {workers} is less than 1; use 1 or more")
    shard = 1, 1
    if arguments.shard is not None:
        said = re.fullmatch(r"(\d+)/(\d+)", arguments.shard)
        if not said or not 1 <= int(said[1]) <= int(said[2]):
            raise InputError(
                f"--shard: {arguments.shard!r} is no part of the work; write I/N with 1 <= I <= N, as in 2/4"
            )
        shard = int(said[1]), int(said[2])
    from vcposim.catalogue.loading import estimator_named
    from vcposim.comparison import leaderboard, transformers
    from vcposim.comparison.design import REFERENCE, size_named, with_transformers
    from vcposim.comparison.run import Folder, sweep
    from vcposim.comparison.workers import cluster_executor, local_executor
    from vcposim.testing.kit import trials

    size = size_named(arguments.size)
    part = transformers.part() if arguments.transformers else None  # before estimators: theirs may be torch's
    size = with_transformers(size) if part else size
    named = tuple(dict.fromkeys(arguments.estimators or CATALOGUE))
    for name in named:
        estimator_named(name)  # what is no estimator is one line, before any work
        trials(name)  # and so is a law that it cannot claim
    if arguments.alone and REFERENCE not in named:
        named = (*named, REFERENCE)
    standing = {} if arguments.alone or not arguments.estimators else leaderboard.standing(size)
    out = f"{OUT}-{size.name}{'-transformers' * bool(part)}"
    folder = Folder(Path(arguments.out or out), named, size, witness=bool(standing))
    folder.start()
    try:
        with _progress() as progress:
            if part and folder.missing():
                progress(0, len(folder.units), "warm-up of the transformers, once")
                part.prepare(size.transformers)
            pool = partial(local_executor, workers)
            if arguments.scheduler:
                pool = partial(cluster_executor, arguments.scheduler)
            owed = sweep(folder, pool, shard=shard, progress=progress)
    except KeyboardInterrupt:
        done = len(folder.units) - len(folder.missing())
        sys.stderr.write(
            f"vcposim: interrupted; {done} of {len(folder.units)} measurements are kept in {folder.path}, the same "
            "command goes on from there\n"
        )
        return 130
    if owed:
        print(f"shard {shard[0]} of {shard[1]} is done; {owed} of {len(folder.units)} measurements are others' to make")
        return 0
    return _finished(folder, standing, "json" if arguments.json else "html" if arguments.html else "table")


def _finished(folder: "Folder", standing: "MeasuredByName", printed: str) -> int:
    """Compare, write it all, and print it as `json`, as `html` or as a table."""
    from vcposim.comparison import leaderboard
    from vcposim.comparison.design import REFERENCE, canonical
    from vcposim.comparison.measure import cost
    from vcposim.comparison.page import page
    from vcposim.comparison.result import comparison, report_json
    from vcposim.comparison.workers import write_atomically

    records = folder.records()
    if standing:
        witness = folder.witness_unit()
        leaderboard.require_same_source(
            records[REFERENCE][witness.setting.name], standing[REFERENCE][witness.setting.name]
        )
        trained = {setting.name: records[REFERENCE][setting.name] for setting in folder.size.transformers}
        standing = {**standing, REFERENCE: {**standing[REFERENCE], **trained}}
    named = {name: records[name] for name in folder.estimators}
    result = comparison(folder, named, standing, leaderboard.read() if standing else None)
    text = report_json(result)
    write_atomically(folder.path / "comparison.json", text.encode())
    html = page(result)
    write_atomically(folder.path / "comparison.html", html.encode())
    with _progress() as step:
        costs = {}
        for number, name in enumerate(folder.estimators):
            step(number, len(folder.estimators), f"cost of {name}")
            found = cost(name)
            costs[name] = None if found is None else round(found, 2)
    write_atomically(folder.path / "cost.js", f"vcposimCost = {canonical(costs)};\n".encode())
    if printed == "table":
        _print(result, costs, folder.path)
    else:
        sys.stdout.write(text if printed == "json" else html)
    return 0


def _print(result: "ComparisonReport", costs: dict[str, float | None], path: Path) -> None:
    """A table of at most 80 columns, then one line for each word and for whatever was not judged."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from vcposim.comparison.result import MODES, because, by_rank, counted, staled, unjudged

    console = Console()
    rows = by_rank(result["estimators"])
    shown = [r for i, r in enumerate(rows) if r["named"] or i < NEIGHBORS or r["name"] == result["reference"]]
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("rank")
    table.add_column("estimator", overflow="fold", min_width=12)
    for heading in ("own best", f"at {result['common_step_size']:g}", "laws", "bias", "D", "cost"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in shown:
        laws, own, common = counted(row["laws"]), row["summary"].get("own"), row["summary"].get("common")
        rank = f"{own['rank'][0]} [{own['rank'][1]}, {own['rank'][2]}]" if own else "-"
        price = costs.get(row["name"])
        cells: list[str | Text] = [
            rank,
            Text(row["name"], style="bold" if row["named"] and standing_beside(result) else ""),
            *("-" if x is None else f"{x['score'][0]:.3f}" for x in (own, common)),
            Text(f"{laws['kept']}/{laws['tried']}" + ("!" * bool(laws["broken"])), style="red" * bool(laws["broken"])),
            *(_short(staled(row, key)) for key in ("bias", "efficiency")),
            "-" if price is None else f"{price:.1f}x",
        ]
        table.add_row(*cells)
    console.print(table)
    ranked = sum(bool(row["summary"]) for row in rows)
    board = result["leaderboard"]
    origin = f", the others from the leaderboard of {board['date']}" if board else ""
    console.print(
        f"{ranked} estimators ranked by the interquartile mean of their success probability over "
        f"{len(result['regimes'])} regimes{origin}; ranks with 95% intervals over seeds. bias and D: exact, on strings "
        f"at lag 16. laws: kept of tried, ! one that it must keep is broken. cost: CPU time of an update over "
        f"{result['reference']}'s.",
        style="dim",
        highlight=False,
    )
    _print_transformers(console, rows, result)
    if result["size"] != "full":
        console.print(f"Size {result['size']}: few seeds; what they do not decide reads undecided.", style="dim")
    named = [r for r in rows if r["named"]]
    for row in named if len(named) <= MOST_NAMED else []:  # a word for each claim, and what it rests on
        words = Table.grid(padding=(0, 1, 0, 0))
        for claim, statement in result["claims"].items():
            word = row["words"][claim]
            if claim not in MODES or row["name"] != result["reference"]:
                words.add_row("", Text(word, style=WORD_STYLE[word]), Text(f"{statement}{because(row, claim)}"))
        console.print(Text(row["name"], style="bold"))
        console.print(words)
    for row in rows:
        if row["named"]:
            for why, parts in unjudged(row).items():
                console.print(f"{row['name']}: not judged, {parts}: {why}", markup=False, highlight=False)
    console.print(f"page: {path / 'comparison.html'}", markup=False, highlight=False, soft_wrap=True)


def _print_transformers(console: "Console", rows: "Sequence[ComparedEstimator]", result: "ComparisonReport") -> None:
    """A line for each estimator and task, where transformers were asked for."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    from vcposim.comparison.design import TRANSFORMER_LAG, TransformerSetting
    from vcposim.comparison.result import brief, trained_rows

    found = trained_rows(rows)
    if not found:
        return
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("transformers", overflow="fold", min_width=12)
    table.add_column("task", no_wrap=True)
    for heading in ("success", "lost", "difference [95%]"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("", min_width=len("not judged"), no_wrap=True)
    last = ""
    for one in found:
        apart = "" if one.difference is None else "{:+.3f} [{:+.3f}, {:+.3f}]".format(*one.difference)
        judged = ("-", "-") if one.value is None else (f"{one.value:.3f}", f"{one.lost}/{one.runs}")
        word = Text(one.word, style=WORD_STYLE.get(one.word, ""))
        table.add_row(Text(one.estimator if one.estimator != last else ""), brief(one.task), *judged, apart, word)
        last = one.estimator
    console.print(table)
    for one in found:
        if one.refused:
            text = f"{one.estimator}: {one.refused} updates on {brief(one.task)} had no finite gradient; none was made"
            console.print(text, markup=False, highlight=False)
    seeds = next(len(s.seeds) for s in result["settings"] if isinstance(s, TransformerSetting))
    console.print(
        f"transformers: success on held-out problems averaged over training, lag {TRANSFORMER_LAG}, {seeds} seeds; "
        f"the difference is from {result['reference']}, paired by seed.",
        style="dim",
        highlight=False,
    )


def standing_beside(result: "ComparisonReport") -> bool:
    """Whether there are others than those asked for."""
    return any(not row["named"] for row in result["estimators"])


def _short(value: float | None) -> str:
    return "-" if value is None else f"{0 if abs(value) < 1e-9 else value:.2g}"


LOGGED_EVERY = 30.0
"""seconds between lines of progress where nobody watches a terminal, but perhaps a log"""


@contextmanager
def _progress() -> Iterator[Callable[[int, int, str], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console, last = Console(stderr=True), time.monotonic()
    columns = (BarColumn(20), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)

        def step(done: int, total: int, name: str) -> None:
            nonlocal last
            bar.update(task, completed=done, total=total, description=name)
            if not console.is_terminal and time.monotonic() > last + LOGGED_EVERY:
                last = time.monotonic()
                sys.stderr.write(f"vcposim: {done} of {total} measurements; {name}\n")

        yield step
