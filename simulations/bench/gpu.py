"""The score tape on an accelerator, one command: time and memory over a plain update, and are its numbers right?

    python -m simulations.bench.gpu --out gpu.json --budget-s 460    what fits into the time, most important first
    python -m simulations.bench.gpu --out gpu.json                   again: goes on where a stopped run ended
    python -m simulations.bench.gpu --plan                           what it would take; measures nothing
    python -m simulations.bench.gpu --markdown gpu.json              the tables of a result
    python -m simulations.bench.gpu --tiny --out gpu.json            a dry run, on a processor too

Models are Llamas with random weights, in bfloat16. The unit of work is a cell; a finished cell is one line of the file
beside the result (`gpu.jsonl`), so a run may be killed at any time.

time    a case and a method of `simulations.bench.scores`. Each update lies between two plain ones; the ratio is its
        wall time, device idle before and after, over the mean of theirs. The control is a plain update in the method's
        place: its distance from 1 is what the measurement itself contributes. Peak memory is that of one more update
        of each. Where the host needs as long to launch a plain update as the device to do it (host share near 1), wall
        time tells of the host; the device's own time, the sum over what it ran, is told beside it.
right   a case and a precision. Reference: a backward per trajectory in float32, from the same (rounded) weights. In
        float32 exact norms and every gradient must agree to 1e-3. In bfloat16 nothing can agree better than bfloat16
        itself: errors may be three times those of a loop in bfloat16 and of an ordinary backward in bfloat16 with
        known coefficients, which are printed beside them. Sketched norms are estimates and not judged; the gradient of
        a method is compared with the reference's at the method's own baseline.
"""

import argparse
import gc
import hashlib
import json
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import transformers
from torch import Tensor

import llm_bridge.scores
from llm_bridge.logprobs import token_log_prob
from llm_bridge.scores import trajectory_sums
from simulations.bench import scores
from simulations.bench.score_records import JsonRow, half_spread, machine
from simulations.bench.scores import ModelSetting, Workload, make_case, opob_baseline, plain
from vcposim.errors import InputError

CONTROL = "plain (control)"
METHODS: dict[str, Callable[[Workload], Tensor | None]] = {CONTROL: plain, **scores.METHODS}
FIRST = (CONTROL, "affine", "general", "sketch")
SECOND = ("loop, two buffers", "ghost, two backwards", "vmap")
JUDGED = ("affine", "general", "sketch", "ghost, two backwards")

# 135M:8:128 is too small for such a device and there to show it; the others are micro-batches of language-model RL.
CASES = ("135M:8:512", "0.5B:8:512", "1.5B:8:512", "135M:16:1024", "135M:8:128", "1.5B:16:1024")
TINY = ("tiny:4:16", "tiny:6:8")
RIGHT = {"135M": "135M:4:256", "0.5B": "0.5B:4:256", "1.5B": "1.5B:4:256"}
"""where float32 copies of model and sums have to fit beside the case's"""
PRECISIONS = ("float32", "bfloat16")

PASSES = {"loop, two buffers": 1.5, "vmap": 2.0, "ghost, two backwards": 1.8}
"""time over a plain update's, a guess for the plan only; 1.3 for the others"""
RATE = 3e14
"""operations per second of a plain update, a guess for the plan only; once a plain update was timed, its rate counts"""
WARM_UP, LEAST_ROUNDS = 2, 3
TOLERANCE, TIMES_ROUNDING = 1e-3, 3.0


@dataclass(frozen=True)
class Measurement:
    """One unit of work: `what` is a method to time, or "right" and a precision."""

    kind: str
    case: str
    what: str

    @property
    def key(self) -> tuple[str, str, str]:
        """What finds it in the record."""
        return self.kind, self.case, self.what


def cells(cases: tuple[str, ...]) -> list[Measurement]:
    """All cells, the most important first; those of one case in a row share its model."""
    head, tail = cases[:3], cases[3:]
    sizes = {case.split(":")[0]: case for case in reversed(cases)}
    checked = [RIGHT.get(size, sizes[size]) for size in scores.SHAPES if size in sizes]
    order = [Measurement("time", case, method) for case in head for method in FIRST]
    order += [Measurement("right", case, kind) for case in checked for kind in PRECISIONS]
    order += [Measurement("time", case, method) for case in tail for method in FIRST]
    return order + [Measurement("time", case, method) for case in cases for method in SECOND]


# --- what a cell takes ------------------------------------------------------------------------------------------------


def parameters(case: str) -> tuple[int, int]:
    """(matrix parameters that every token meets, all parameters) of a case's model; a tied head is met, not owned."""
    vocabulary, width, layers, heads, kv, inner, tied = scores.SHAPES[case.split(":")[0]]
    layer = 2 * width * width + 2 * width * (width // heads) * kv + 3 * width * inner
    met = layers * layer + vocabulary * width
    return met, met + (0 if tied else vocabulary * width) + (2 * layers + 1) * width


def flops(case: str) -> float:
    """Operations of a plain update: 6 per token and parameter met, and the attention's 12 n T^2 width layers / 2."""
    n, t = map(int, case.split(":")[1:])
    _, width, layers, *_ = scores.SHAPES[case.split(":")[0]]
    return 6.0 * n * t * parameters(case)[0] + 6.0 * n * t * t * width * layers


def memory(case: str, method: str) -> float:
    """Bytes, roughly: weights, gradients or sums, logits (five arrays of float32 size), activations."""
    n, t = map(int, case.split(":")[1:])
    vocabulary, width, layers, _, _, inner, _ = scores.SHAPES[case.split(":")[0]]
    each = parameters(case)[1]
    gradients = {"affine": 8, "loop, two buffers": 6, "vmap": 2 * n + 2}.get(method, 2)
    logits, activation = 5 * 4 * n * t * vocabulary, n * t * layers * (40 * width + 10 * inner)
    batch = (logits + activation) / (n if method.startswith("loop") else 1)
    return each * (2 + gradients) + batch * (1.3 if method in ("general", "sketch") else 1)


def seconds_of(cell: Measurement, rounds: int, rate: float) -> float:
    """Time a cell is expected to take, model and warm-up included."""
    update = flops(cell.case) / rate
    build = 1 + parameters(cell.case)[1] / 1e9
    if cell.kind == "right":  # float32 runs at a tenth of the rate: the reference and, in float32, the methods
        slow = 10 * 1.5 + (10 if cell.what == "float32" else 1) * 1.5 * len(JUDGED)
        return 2 * build + slow * update
    own = PASSES.get(cell.what, 1.3)
    return build + (rounds + WARM_UP + 1) * (own + 1) * update


def plan(order: list[Measurement], rounds: int, rate: float) -> str:
    """What the cells would take, one line each, at an assumed rate."""
    lines = [f"at {rate / 1e12:g} TFLOP/s of a plain update (an assumption), {rounds} pairs a cell:"]
    total = 0.0
    for cell in order:
        took = seconds_of(cell, rounds, rate)
        total += took
        need = memory(cell.case, cell.what) if cell.kind == "time" else 2 * memory(cell.case, "affine")
        lines.append(
            f"{cell.kind:5s} {cell.case:13s} {cell.what:21s} {flops(cell.case) / 1e12:8.3g} TFLOP an update, "
            f"{need / 2**30:6.1f} GiB, {took:6.1f} s"
        )
    return "\n".join([*lines, f"{len(order)} cells, {total / 60:.1f} minutes"])


# --- measuring --------------------------------------------------------------------------------------------------------


def timed(case: Workload, method: Callable[[Workload], Tensor | None], rounds: int, limit: float) -> JsonRow:
    """Paired ratios to plain, seconds of plain, the host's share of a plain update, peak bytes of one update each.

    Stops early after `limit` seconds, but not before LEAST_ROUNDS pairs.
    """
    for _ in range(WARM_UP):
        scores.seconds(method, case)
        scores.seconds(plain, case)
    ratios: list[float] = []
    floor, start = [scores.seconds(plain, case)], time.perf_counter()
    while len(ratios) < rounds and (len(ratios) < LEAST_ROUNDS or time.perf_counter() - start < limit):
        own = scores.seconds(method, case)
        floor.append(scores.seconds(plain, case))
        ratios.append(2 * own / (floor[-2] + floor[-1]))
    return {
        "median": statistics.median(ratios),
        "half_iqr": half_spread(ratios),
        "count": len(ratios),
        "ratios": ratios,
        "plain_s": statistics.median(floor),
        "plain_host_share": host_share(case),
        "device_s": device_seconds(case, method),
        "plain_device_s": device_seconds(case, plain),
        "peak": peak(case, method),
        "peak_plain": peak(case, plain),
        "weights": sum(p.numel() * p.element_size() for p in case.model.parameters()),
    }


def host_share(case: Workload) -> float | None:
    """Time until a plain update's last launch over the time until the device is idle; None on a processor."""
    device = case.weight.device
    if device.type == "cpu":
        return None
    case.model.zero_grad(set_to_none=True)
    torch.accelerator.synchronize(device)
    start = time.perf_counter()
    plain(case)
    launched = time.perf_counter() - start
    torch.accelerator.synchronize(device)
    return launched / (time.perf_counter() - start)


def device_seconds(case: Workload, method: Callable[[Workload], Tensor | None]) -> float | str | None:
    """What the kernels and copies of one update took, idle time between them left out; one stream, so they add up.

    None on a processor; the reason where the profiler does not work.
    """
    if case.weight.device.type != "cuda":
        return None
    case.model.zero_grad(set_to_none=True)
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            method(case)
            torch.accelerator.synchronize(case.weight.device)
        ran = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
        return 1e-6 * sum(event.time_range.elapsed_us() for event in ran) or "the profiler saw no kernel"
    except Exception as error:  # an extra: the cell's ratios stand without it
        return _reason(error)


def peak(case: Workload, method: Callable[[Workload], Tensor | None]) -> int | None:
    """Most bytes allocated during one update, weights included; None where the device does not count."""
    if case.weight.device.type != "cuda":
        return None
    case.model.zero_grad(set_to_none=True)
    torch.cuda.reset_peak_memory_stats(case.weight.device)
    method(case)
    return torch.cuda.max_memory_allocated(case.weight.device)


def right(name: str, precision: str, setting: ModelSetting) -> JsonRow:
    """Errors of norms and gradient of each judged method against a float32 loop, and the verdicts."""
    case = make_case(name, replace(setting, dtype=precision), ragged=True)
    reference = make_case(name, replace(setting, dtype="float32"), ragged=True)
    with torch.no_grad():
        for p, q in zip(reference.model.parameters(), case.model.parameters(), strict=True):
            p.copy_(q)
    norm, rewarded, score = scores.loop_sums(reference)
    del reference

    def errors(own: Tensor) -> JsonRow:
        b = float(opob_baseline(own, case))
        off = size = 0.0
        for p, first, second in zip(case.model.parameters(), rewarded, score, strict=True):
            expected = b * second - first
            got = torch.zeros_like(expected) if p.grad is None else p.grad.float()
            off += float((got - expected).square().sum())
            size += float(expected.square().sum())
        return {"norm": float((own / norm - 1).abs().max()), "gradient": (off / size) ** 0.5}

    case.model.zero_grad(set_to_none=True)
    total = trajectory_sums(token_log_prob(case.model, case.batch), case.batch.mask)
    (-scores.opob(norm, case) * total).sum().backward()
    floor = {"one backward, coefficients known": {"norm": None, "gradient": errors(norm)["gradient"]}}
    result: JsonRow = {}
    for label in ("loop, two buffers", *JUDGED):
        case.model.zero_grad(set_to_none=True)
        try:
            own = METHODS[label](case)
            assert own is not None
            result[label] = errors(own)
        except torch.OutOfMemoryError as error:
            result[label] = {"reason": _reason(error)}
        except Exception as error:  # a judged method that breaks is not right
            if "CUDA error" in str(error):
                raise
            result[label] = {"reason": _reason(error), "right": False}
    loop = result.pop("loop, two buffers")
    floor["loop in the same precision"] = loop
    for label, row in result.items():
        if "reason" not in row:
            row["right"] = _verdict(row, [x for x in floor.values() if "reason" not in x], label, precision)
    spread = float(norm.max() / norm.min())
    return {"errors": result, "rounding": floor, "norms_vary_by": spread}


def _verdict(row: JsonRow, floor: list[JsonRow], label: str, precision: str) -> bool:
    judged = ("gradient",) if label.startswith("sketch") else ("norm", "gradient")
    for key in judged:
        known = [x[key] for x in floor if x[key] is not None]
        allowed = TOLERANCE if precision == "float32" else max(TOLERANCE, TIMES_ROUNDING * max(known, default=0.0))
        if not row[key] <= allowed:  # also a nan
            return False
    return True


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:160]


# --- record, budget, result -------------------------------------------------------------------------------------------


def code_hash() -> str:
    """SHA-256 of the tape's and this benchmark's sources, twelve digits: a run resumed must not mix two versions."""
    files = [*Path(llm_bridge.scores.__file__).parent.glob("*.py"), Path(scores.__file__), Path(__file__)]
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(files))).hexdigest()[:12]


class RecordFile:
    """Finished cells, a line each, in a file that survives a kill; the first line says of which machine and code.

    Raises `InputError` for a file of another setting.
    """

    def __init__(self, path: Path, head: JsonRow) -> None:
        self.path, self.head = path, head
        self.rows: list[JsonRow] = []
        if path.exists():
            lines = path.read_text().split("\n")
            whole = [json.loads(line) for line in lines[:-1]]  # what follows the last newline was cut off by a kill
            same = ("machine", "torch", "transformers", "device", "dtype", "prompt", "code")
            if whole and any(whole[0].get(key) != head[key] for key in same):
                told = {key: (whole[0].get(key), head[key]) for key in same if whole[0].get(key) != head[key]}
                raise InputError(f"--out: {path} holds results of another setting, {told}; give another file")
            self.rows = whole[1:]
            path.write_text("".join(json.dumps(row) + "\n" for row in whole))
        if not path.exists() or not path.read_text():
            self._append(head)

    def done(self, cell: Measurement) -> bool:
        """Whether the cell is recorded."""
        return any((row["kind"], row["case"], row["what"]) == cell.key for row in self.rows)

    def add(self, cell: Measurement, row: JsonRow) -> None:
        """Record a finished cell."""
        self.rows.append({**asdict(cell), **row})
        self._append(self.rows[-1])

    def _append(self, row: JsonRow) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def rate(self, case: str) -> float | None:
        """Operations per second of a plain update, from this case if it was timed, else the slowest of the others."""
        own = [(row["case"], flops(row["case"]) / row["plain_s"]) for row in self.rows if "plain_s" in row]
        return next((rate for name, rate in own if name == case), min((rate for _, rate in own), default=None))


def run(
    order: list[Measurement], record: RecordFile, setting: ModelSetting, rounds: int, budget: float
) -> Iterator[tuple[Measurement, JsonRow]]:
    """Measure the cells that are not recorded yet and fit into the budget; those that do not are passed over."""
    start, held = time.perf_counter(), _Held(setting)
    for cell in order:
        if record.done(cell):
            continue
        left = budget - (time.perf_counter() - start)
        if seconds_of(cell, LEAST_ROUNDS, record.rate(cell.case) or RATE) > left:
            continue
        began = time.perf_counter()
        try:
            if cell.kind == "right":
                held.drop()
                row = right(cell.case, cell.what, setting)
            else:
                limit = min(left / 2, 8.0)
                row = timed(held.case(cell.case), METHODS[cell.what], rounds, limit)
        except Exception as error:  # whatever stops a method is its result; the next cell goes on
            if "CUDA error" in str(error):  # the context is lost: whatever follows would fail too
                raise
            row = {"reason": _reason(error)}
        _free()
        row["took_s"] = time.perf_counter() - began
        record.add(cell, row)
        yield cell, row


class _Held:
    """The model of the case under way."""

    def __init__(self, setting: ModelSetting) -> None:
        self.setting = setting
        self._case: Workload | None = None

    def case(self, name: str) -> Workload:
        if self._case is None or self._case.name != name:
            self.drop()
            self._case = make_case(name, self.setting)
        return self._case

    def drop(self) -> None:
        self._case = None
        _free()


def _free() -> None:
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


def result(record: RecordFile, order: list[Measurement]) -> JsonRow:
    """Everything, in one dictionary."""
    wanted = {cell.key for cell in order}
    rows = [row for row in record.rows if (row["kind"], row["case"], row["what"]) in wanted]
    return {**record.head, "cells": rows, "not_run": [list(cell.key) for cell in order if not record.done(cell)]}


def wrong(data: JsonRow) -> list[str]:
    """Judged methods whose norms or gradient are off or that broke, as "case precision method".

    What did not fit into memory was not judged and is told in the table.
    """
    return [
        f"{row['case']} {row['what']} {method}"
        for row in data["cells"]
        for method, error in row.get("errors", {}).items()
        if error.get("right") is False
    ]


# --- tables -----------------------------------------------------------------------------------------------------------


def markdown(data: JsonRow) -> str:
    """Tables of time, memory and errors."""
    timing = [row for row in data["cells"] if row["kind"] == "time"]
    cases = list(dict.fromkeys(row["case"] for row in timing))
    methods = [m for m in (*FIRST, *SECOND) if any(row["what"] == m for row in timing)]
    at = {(row["case"], row["what"]): row for row in timing}
    place = f"{data['machine']}, {data['dtype']}, torch {data['torch']}, transformers {data['transformers']}"
    parts = [f"{place}, prompt {data['prompt']:g}; {data['date']}"]
    if timing:
        head = ["plain, ms", "plain, TFLOP/s", "plain, host share"]
        known = [row for row in timing if "plain_s" in row]
        floor = {case: next((row for row in known if row["case"] == case), None) for case in cases}
        lines = [
            [head[0], *(f"{1e3 * row['plain_s']:.1f}" if row else "" for row in floor.values())],
            [head[1], *(f"{flops(c) / row['plain_s'] / 1e12:.3g}" if row else "" for c, row in floor.items())],
            [head[2], *(_share(row) for row in floor.values())],
        ]
        lines += [[m, *(_ratio(at.get((case, m))) for case in cases)] for m in methods]
        parts.append(_table("Time over plain: median ± half the interquartile range (pairs)", cases, lines))
        if any(isinstance(row.get("device_s"), float) for row in timing):
            lines = [[m, *(_device(at.get((case, m))) for case in cases)] for m in methods]
            parts.append(_table("The device's own time over plain's, one update each", cases, lines))
        if any(row.get("peak") for row in timing):
            lines = [["plain, GiB", *(f"{row['peak_plain'] / 2**30:.2f}" if row else "" for row in floor.values())]]
            lines += [[m, *(_peak(at.get((case, m))) for case in cases)] for m in methods if m != CONTROL]
            parts.append(_table("Peak memory over plain; the excess in gradients of the model", cases, lines))
    for row in data["cells"]:
        if row["kind"] == "right":
            parts.append(_errors(row))
    return "\n\n".join(parts)


def _table(title: str, columns: list[str], lines: list[list[str]]) -> str:
    head = [f"{title}", "", f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    return "\n".join(head + [f"| {' | '.join(line)} |" for line in lines])


def _share(row: JsonRow | None) -> str:
    return "" if row is None or row["plain_host_share"] is None else f"{row['plain_host_share']:.2f}"


def _ratio(row: JsonRow | None) -> str:
    if row is None:
        return ""
    if "reason" in row:
        return row["reason"].split(":")[0]
    return f"{row['median']:.3f} ± {row['half_iqr']:.3f} ({row['count']})"


def _device(row: JsonRow | None) -> str:
    if row is None:
        return ""
    pair = row.get("device_s"), row.get("plain_device_s")
    return f"{pair[0] / pair[1]:.3f}" if all(isinstance(x, float) for x in pair) else "not told"  # type: ignore[operator]


def _peak(row: JsonRow | None) -> str:
    if row is None:
        return ""
    if "reason" in row:
        return row["reason"].split(":")[0]
    excess = (row["peak"] - row["peak_plain"]) / row["weights"]
    return f"{row['peak'] / row['peak_plain']:.2f} x, {excess:+.2f} gradients"


def _errors(row: JsonRow) -> str:
    title = f"{row['case']} in {row['what']}, relative errors against a float32 loop"
    if "reason" in row:
        return f"{title}: {row['reason']}"
    lines = []
    for label, error in [*row["rounding"].items(), *row["errors"].items()]:
        if "reason" in error:
            lines.append([label, error["reason"].split(":")[0], "", ""])
            continue
        told = ["" if error[key] is None else f"{error[key]:.1e}" for key in ("norm", "gradient")]
        verdict = {True: "right", False: "WRONG", None: ""}[error.get("right")]
        lines.append([label, *told, verdict])
    return _table(f"{title} (norms vary by {row['norms_vary_by']:.1f})", ["norms, worst", "gradient", ""], lines)


def _progress(cell: Measurement, row: JsonRow) -> str:
    head = f"{cell.kind:5s} {cell.case:13s} {cell.what:21s} {row['took_s']:5.1f} s  "
    if "reason" in row:
        return head + row["reason"]
    if cell.kind == "time":
        return head + f"{_ratio(row)}, plain {1e3 * row['plain_s']:.1f} ms"
    each = (f"{m} {'ok' if e.get('right') else e.get('reason', 'WRONG')}" for m, e in row["errors"].items())
    return head + ", ".join(each)


def main(argv: list[str] | None = None) -> int:
    """Parse the command line, measure, write, print; 1 if a judged method is wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", metavar="FILE", default="gpu.json", help="the result; finished cells go beside it")
    parser.add_argument("--budget-s", type=float, default=460.0, help="start no cell that would end later")
    parser.add_argument("--plan", action="store_true", help="what it would take, and measure nothing")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, a dry run")
    parser.add_argument("--case", action="append", help="SIZE:N:T, may be repeated")
    parser.add_argument("--rounds", type=int, default=15, help="pairs per cell at most")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=PRECISIONS, help="of the timed models")
    parser.add_argument("--prompt", type=float, default=0.25, help="part of each trajectory that is prompt")
    parser.add_argument("--markdown", metavar="FILE", help="print the tables of a result, and measure nothing")
    options = parser.parse_args(argv)
    if options.markdown:
        print(markdown(json.loads(Path(options.markdown).read_text())))
        return 0
    order = cells(tuple(options.case or (TINY if options.tiny else CASES)))
    if options.plan:
        print(plan(order, options.rounds, RATE))
        return 0
    if options.device == "cpu" and not options.tiny:
        raise InputError("--device: cpu, and no accelerator was found; use --tiny for a dry run, or name a device")
    warnings.simplefilter("ignore")
    setting = ModelSetting(options.device, options.dtype, options.prompt)
    head = {
        **machine(torch.device(options.device)),
        "transformers": transformers.__version__,
        "code": code_hash(),
        **asdict(setting),
    }
    out = Path(options.out)
    record = RecordFile(out.with_suffix(".jsonl"), head)
    for cell, row in run(order, record, setting, options.rounds, options.budget_s):
        print(_progress(cell, row), flush=True)
        _write(out, result(record, order))
    data = result(record, order)
    _write(out, data)
    print(markdown(data))
    if data["not_run"]:
        print(f"{len(data['not_run'])} cells did not fit into {options.budget_s:g} s; run again to go on")
    if bad := wrong(data):
        print("WRONG: " + "; ".join(bad))
    return 1 if bad else 0


def _write(path: Path, data: JsonRow) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(data, indent=1) + "\n")
    part.replace(path)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except InputError as error:
        sys.exit(f"error: {error}")
