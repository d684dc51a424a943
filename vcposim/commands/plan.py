"""`vcposim plan`: which lag and generation/training split reach the target first."""

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypedDict

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from vcposim.commands.output import add_output_options, output_of
from vcposim.errors import InputError
from vcposim.pipeline.lengths import LONGEST, Lengths, empirical, log_normal, pareto
from vcposim.pipeline.plan import (
    Cluster,
    Efficiency,
    Judged,
    Option,
    fastest,
    from_intervals,
    from_runs,
    generator_counts,
    judge,
    survey,
)
from vcposim.pipeline.simulator import ADMISSIONS, BATCHINGS
from vcposim.replay.reading import read_dump

EXAMPLES = (
    "vcposim plan --devices 8 --groups 16 --group-size 8 --tokens-per-s 2500 --slots 32 --train-s 40 "
    "--train-devices 4 --sync-s 5 --length-mean 800 --length-sd 900 --no-figure",
)
FIGURE = "vcposim-plan.png"


def add_arguments(p: argparse.ArgumentParser) -> None:
    """What `vcposim plan` takes."""
    p.description = (
        "Simulates generation, training and weight sync from measured numbers, and joins the throughput "
        "with how many more steps learning needs at a lag, if you give that curve. Everything is relative to "
        "synchronous training on the same devices: all generate, then all train."
    )
    size = p.add_argument_group("the job (required)")
    size.add_argument("--devices", type=int, required=True, metavar="D", help="devices to split")
    size.add_argument("--groups", type=int, required=True, metavar="N", help="prompts per training step")
    size.add_argument("--group-size", type=int, required=True, metavar="N", help="responses per prompt")
    speed = p.add_argument_group("speeds (required)")
    speed.add_argument("--tokens-per-s", type=float, required=True, metavar="X", help="of one full generator")
    speed.add_argument("--slots", type=int, required=True, metavar="N", help="responses a full generator has in hand")
    speed.add_argument("--train-s", type=float, required=True, metavar="S", help="seconds of one training step")
    speed.add_argument("--train-devices", type=int, required=True, metavar="N", help="on that many devices")
    speed.add_argument("--sync-s", type=float, required=True, metavar="S", help="seconds of one weight sync")
    speed.add_argument(
        "--single-tokens-per-s", type=float, metavar="X", help="of one response decoded alone (default: no faster)"
    )
    length = p.add_argument_group("response lengths (required: --lengths, or --length-mean with a spread)")
    length.add_argument("--lengths", metavar="FILE", help="a dump of rollouts (as for replay), or one number a line")
    length.add_argument("--length-mean", type=float, metavar="X", help="mean, tokens")
    length.add_argument("--length-sd", type=float, metavar="X", help="log-normal with this sd, tokens")
    length.add_argument("--length-tail", type=float, metavar="X", help="Pareto with this tail index instead")
    length.add_argument("--max-tokens", type=int, default=LONGEST, metavar="N", help="responses are cut there")
    learning = p.add_argument_group("statistical efficiency (else: throughput only)")
    learning.add_argument(
        "--efficiency",
        nargs="+",
        metavar="LAG:RATIO[:LOW:HIGH]",
        help="steps to target at that lag over those of synchronous training, with a 95%% interval; lag 0 is 1",
    )
    learning.add_argument(
        "--efficiency-file",
        metavar="FILE",
        help="the same, measured: JSON lines with lag and steps_ratio (null: never reached), one line a run; "
        "results.jsonl of `python -m simulations run pipeline_speedup` is one: a small task, over synchronous training "
        "with the mean baseline",
    )
    learning.add_argument("--method", metavar="NAME", help="use only lines of that file with this method")
    learning.add_argument("--steps-to-target", type=float, metavar="N", help="of synchronous training: adds hours")
    how = p.add_argument_group("how")
    how.add_argument("--lags", type=int, nargs="+", default=[1, 2, 4, 8], metavar="K", help="(default 1 2 4 8)")
    how.add_argument("--generators", type=int, nargs="+", metavar="G", help="device counts to try (default a spread)")
    how.add_argument("--admission", default="wait", help=", ".join(ADMISSIONS) + " (default wait)")
    how.add_argument("--batching", default="continuous", help=", ".join(BATCHINGS) + " (default continuous)")
    how.add_argument("--in-flight", action="store_true", help="new weights go into half-finished responses")
    how.add_argument("--steps", type=int, default=20, metavar="N", help="measured steps of a simulation (default 20)")
    how.add_argument("--seeds", type=int, default=5, metavar="N", help="simulations of each choice (default 5)")
    how.add_argument("--seed", type=int, default=0, help="of the random numbers (default 0)")
    add_output_options(p, FIGURE)


def run(arguments: argparse.Namespace) -> None:
    """Simulate, judge, draw, print: output appears only when all of it could be made."""
    a, output = arguments, output_of(arguments, FIGURE)
    efficiency = _efficiency(arguments)
    cluster = _cluster(arguments)
    options = _survey(cluster, a.lags, a.generators, steps=a.steps, seeds=a.seeds, seed=a.seed)
    found = _found(cluster, efficiency, judge(options, efficiency, seed=a.seed), a.seeds, a.steps_to_target)
    path = None
    if output.drawing:
        from vcposim.commands.figures import plan_figure

        path = output.save(plan_figure(found))
    if output.json:
        print(json.dumps(found, allow_nan=False))
        return
    console = Console()
    reference, timed = found["reference"], found["efficiency"] is not None
    console.print(f"lengths: {found['lengths']['law']} (as cut: mean {found['lengths']['mean']:.4g})", markup=False)
    hours = "" if found["reference_hours"] is None else f", {found['reference_hours']:.3g} h to target"
    console.print(
        f"synchronous, all {reference['generators']} devices: {reference['steps_per_s']:.4g} steps/s, "
        f"{reference['samples_per_s']:.4g} samples/s, generators decoding {reference['generator_busy']:.0%}{hours}"
    )
    title = "relative time to target" if timed else "relative steps/s"
    console.print(f"Best split at each lag ({found['admission']}): {title}, 95% intervals", style="bold")
    console.print(_table(found, timed))
    for note in found["notes"]:
        console.print(f"note: {note}", markup=False)
    console.print(_verdict(found, timed), style="bold", markup=False)
    if path is not None:
        print(f"figure: {path}")


# --- input ------------------------------------------------------------------------------------------------------------


def _cluster(a: argparse.Namespace) -> Cluster:
    return Cluster(
        lengths=_lengths(a),
        devices=a.devices,
        slots=a.slots,
        tokens_per_s=a.tokens_per_s,
        groups=a.groups,
        group_size=a.group_size,
        train_s=a.train_s,
        train_devices=a.train_devices,
        sync_s=a.sync_s,
        admission=a.admission,
        in_flight=a.in_flight,
        batching=a.batching,
        single_tokens_per_s=a.single_tokens_per_s,
    )


def _lengths(a: argparse.Namespace) -> Lengths:
    if a.lengths is not None:
        if a.length_mean is not None or a.length_sd is not None or a.length_tail is not None:
            raise InputError("--lengths: given together with --length-mean, -sd or -tail; measured lengths need no law")
        try:  # one number a line
            numbers = [float(line) for line in Path(a.lengths).read_bytes().decode("ascii").split()]
        except (OSError, ValueError):
            numbers = []  # a dump, or nothing, which its reader says
        if numbers:
            return empirical(numbers, max_tokens=a.max_tokens)
        dump = read_dump(a.lengths)
        return empirical(dump.length.tolist(), dump.group.tolist(), max_tokens=a.max_tokens)
    if a.length_mean is None or (a.length_sd is None) == (a.length_tail is None):
        raise InputError("--lengths: missing; give a file, or --length-mean with one of --length-sd and --length-tail")
    if a.length_tail is not None:
        return pareto(a.length_mean, a.length_tail, a.max_tokens)
    return log_normal(a.length_mean, a.length_sd, a.max_tokens)


def _efficiency(a: argparse.Namespace) -> Efficiency | None:
    if a.steps_to_target is not None and not 0 < a.steps_to_target < math.inf:
        raise InputError(f"--steps-to-target: {a.steps_to_target} is not a positive number of steps")
    if a.method is not None and a.efficiency_file is None:
        raise InputError(f"--method: {a.method!r} chooses lines of a file; give --efficiency-file as well")
    if a.efficiency is not None and a.efficiency_file is not None:
        raise InputError("--efficiency: given together with --efficiency-file; keep one")
    if a.efficiency is not None:
        points = []
        for text in a.efficiency:
            try:
                numbers = [float(part) for part in text.split(":")]
            except ValueError:
                numbers = []
            if len(numbers) not in (2, 4):
                raise InputError(f"--efficiency: {text!r} is not LAG:RATIO or LAG:RATIO:LOW:HIGH, as in 4:1.2:1.1:1.35")
            lag, ratio, low, high = numbers if len(numbers) == 4 else (*numbers, numbers[1], numbers[1])
            points.append((lag, ratio, low, high))
        return from_intervals(points, "--efficiency")
    return None if a.efficiency_file is None else _from_file(a.efficiency_file, a.method)


def _from_file(name: str, method: str | None) -> Efficiency:
    try:
        lines = Path(name).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not text"
        raise InputError(f"{name}: cannot be read ({reason}); pass JSON lines with lag and steps_ratio") from None
    runs, methods = [], set()
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict):
            raise InputError(f"{name}: line {number} is not a JSON object: {line[:40]!r}; write one object a line")
        if "steps_ratio" not in record:
            continue  # an experiment's file has other records too
        methods.add(record.get("method"))
        if method in (None, record.get("method")):
            runs.append((_number(name, number, record, "lag"), _number(name, number, record, "steps_ratio", none=True)))
    if not methods:
        raise InputError(f"{name}: no line has steps_ratio; write one JSON object a run with lag and steps_ratio")
    known = ", ".join(sorted(str(m) for m in methods))
    if method is None and len(methods) > 1:
        raise InputError(f"{name}: lines of {len(methods)} methods; choose one with --method: {known}")
    if not runs:
        raise InputError(f"--method: no line of {name} has {method!r}; it has: {known}")
    return from_runs([(lag or 0.0, ratio) for lag, ratio in runs], f"{name}{f' ({method})' if method else ''}")


def _number(name: str, number: int, record: dict[str, Any], field: str, *, none: bool = False) -> float | None:
    value = record.get(field)
    if (value is None and none) or (isinstance(value, int | float) and not isinstance(value, bool)):
        return value
    raise InputError(f"{name}: line {number}: {field}: {value!r} is not a number; write one")


def _survey(
    cluster: Cluster, lags: list[int], generators: list[int] | None, *, steps: int, seeds: int, seed: int
) -> list[Option]:
    for flag, values in (("--lags", lags), ("--generators", generators or [])):
        twice = {value for value in values if values.count(value) > 1}
        if twice:
            raise InputError(f"{flag}: {min(twice)} is given twice; name each once")
    generators = generators or generator_counts(cluster.devices)
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("simulating", total=1 + len(lags) * len(generators))
        options = []
        for option in survey(cluster, lags, generators, steps=steps, seeds=seeds, seed=seed):
            options.append(option)
            bar.advance(task)
    return options


# --- output -----------------------------------------------------------------------------------------------------------


class Triple(TypedDict):
    """An estimate between the ends of its interval; None for a time that never comes."""

    low: float | None
    value: float | None
    high: float | None


class PlannedSplit(TypedDict):
    """A lag and a split of the devices, with what they come to; speeds and times relative to synchronous training."""

    max_lag: int
    generators: int
    trainers: int
    synchronous: bool
    steps_per_s: float
    samples_per_s: float
    generator_busy: float
    trainer_busy: float
    mean_lag: float
    token_lag: float
    largest_lag: int
    share_above_max_lag: float
    dropped_share: float
    speed: Triple
    time: Triple | None
    best: float
    """share of the draws in which nothing else is faster"""


class LengthLaw(TypedDict):
    """Of responses, as they are cut."""

    law: str
    mean: float


class PlanAnswer(TypedDict):
    """The answer, as `--json` prints it."""

    lengths: LengthLaw
    admission: str
    in_flight: bool
    seeds: int
    efficiency: str | None
    """where the curve comes from; None without"""
    reference: PlannedSplit
    reference_hours: float | None
    options: list[PlannedSplit]
    best: PlannedSplit
    notes: list[str]


def _found(
    cluster: Cluster, efficiency: Efficiency | None, judged: list[Judged], seeds: int, steps_to_target: float | None
) -> PlanAnswer:
    rows = [_row(cluster, one) for one in judged]
    best = rows[judged.index(fastest(judged))]
    hours = None
    if steps_to_target is not None:
        hours = steps_to_target / judged[0].option.mean("steps_per_s") / 3600
    return {
        "lengths": {"law": cluster.lengths.name, "mean": cluster.lengths.mean},
        "admission": cluster.admission,
        "in_flight": cluster.in_flight,
        "seeds": seeds,
        "efficiency": None if efficiency is None else efficiency.source,
        "reference": rows[0],
        "reference_hours": hours,
        "options": rows[1:],
        "best": best,
        "notes": _notes(cluster, efficiency, judged),
    }


def _row(cluster: Cluster, one: Judged) -> PlannedSplit:
    option = one.option
    trainers = cluster.devices if option.generators is None else cluster.devices - option.generators
    shares = [outcome.share_above(option.max_lag) for outcome in option.outcomes]
    return {
        "max_lag": option.max_lag,
        "generators": cluster.devices if option.generators is None else option.generators,
        "trainers": trainers,
        "synchronous": option.generators is None,
        "steps_per_s": option.mean("steps_per_s"),
        "samples_per_s": option.mean("samples_per_s"),
        "generator_busy": option.mean("generator_busy"),
        "trainer_busy": option.mean("trainer_busy"),
        "mean_lag": option.mean("mean_lag"),
        "token_lag": option.lag,
        "largest_lag": max(outcome.lag_share.size - 1 for outcome in option.outcomes),
        "share_above_max_lag": sum(shares) / len(shares),
        "dropped_share": option.mean("dropped_share"),
        "speed": _triple(one.speed),
        "time": None if one.time is None else _triple(one.time),
        "best": one.best,
    }


def _triple(interval: tuple[float, float, float]) -> Triple:
    # a target that is never reached takes no finite time: null in JSON
    low, value, high = (x if math.isfinite(x) else None for x in interval)
    return {"low": low, "value": value, "high": high}


def _notes(cluster: Cluster, efficiency: Efficiency | None, judged: list[Judged]) -> list[str]:
    notes = []
    if efficiency is None:
        notes.append(
            "no statistical efficiency given: this is throughput only, not time to target. Stale steps learn less; "
            "measure steps to target at two lags and pass --efficiency."
        )
    elif efficiency.certain:
        notes.append("the efficiency curve came without intervals: only the simulation's uncertainty is shown.")
    outside = sum(one.time is None for one in judged[1:]) if efficiency is not None else 0
    if efficiency is not None and outside:
        notes.append(
            f"{outside} of {len(judged) - 1} choices run at a lag beyond the curve's last, "
            f"{efficiency.lag[-1]:.3g}: no time to target for them, nothing is extrapolated."
        )
    if cluster.single_tokens_per_s is None:
        notes.append("a response decoded alone is taken to be no faster than in a full generator (memory-bound).")
    notes.append(f"training is taken to scale as 1 / trainers from the {cluster.train_devices} measured.")
    return notes


def _table(found: PlanAnswer, timed: bool) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    columns: list[tuple[str, Callable[[PlannedSplit], str]]] = [
        ("lag", lambda row: str(row["max_lag"])),
        ("gen +\ntrain", lambda row: f"{row['generators']}+{row['trainers']}"),
        ("speed", lambda row: f"{row['speed']['value']:.2f}" if timed else _text(row["speed"])),
        ("time", lambda row: _text(row["time"])),
        ("fastest", lambda row: f"{_share_of_lag(found, row['max_lag']):.0%}"),
        ("realized\nlag", lambda row: f"{row['token_lag']:.2g}"),
        ("beyond\nlag", lambda row: f"{row['share_above_max_lag']:.0%}"),
        ("dropped", lambda row: f"{row['dropped_share']:.0%}"),
        ("busy\ngen / train", lambda row: f"{row['generator_busy']:.0%} / {row['trainer_busy']:.0%}"),
    ]
    shown = {"time": timed, "beyond\nlag": found["admission"] == "pace", "dropped": found["admission"] == "drop"}
    columns = [(name, cell) for name, cell in columns if shown.get(name, True)]
    for name, _ in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for lag in sorted({row["max_lag"] for row in found["options"]}):
        row = best_split(found["options"], lag, timed)
        table.add_row(*(Text(cell(row)) for _, cell in columns))  # rich would eat [never, never]
    return table


def _share_of_lag(found: PlanAnswer, lag: int) -> float:
    return sum(row["best"] for row in found["options"] if row["max_lag"] == lag)


def best_split(rows: list[PlannedSplit], lag: int, timed: bool) -> PlannedSplit:
    """The row of that lag with the least time to target, or the most steps/s."""
    mine = [row for row in rows if row["max_lag"] == lag]
    known = [(value, row) for row in mine if (value := _value(row["time"])) is not None] if timed else []
    if known:
        return min(known, key=lambda pair: pair[0])[1]
    return max(mine, key=lambda row: _value(row["speed"]) or 0.0)


def _value(estimate: Triple | None) -> float | None:
    return None if estimate is None else estimate["value"]


def _text(interval: Triple | None, unit: float = 1.0, digits: str = ".2f") -> str:
    if interval is None:
        return "—"
    said = (
        "never" if x is None else f"{x * unit:{digits}}" for x in (interval["value"], interval["low"], interval["high"])
    )
    return "{} [{}, {}]".format(*said)


def _verdict(found: PlanAnswer, timed: bool) -> str:
    best = found["best"]
    kept = _share_of_lag(found, best["max_lag"])
    if best["synchronous"]:
        return f"Stay synchronous: no lag and split tried is faster (fastest in {best['best']:.0%} of draws)."
    where = f"lag {best['max_lag']} with {best['generators']} generating and {best['trainers']} training"
    if not timed:
        return f"Most steps/s: {where}, {_text(best['speed'])} times synchronous (throughput only, not time to target)."
    hours = ""
    if found["reference_hours"] is not None and best["time"] is not None:
        hours = f", {_text(best['time'], found['reference_hours'], '.3g')} h"
    return (
        f"Shortest time to target: {where}: {_text(best['time'])} of synchronous{hours}; "
        f"this lag is fastest in {kept:.0%} of draws, this split in {best['best']:.0%}."
    )
