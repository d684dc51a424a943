"""Train a language model on stale rollouts, with any estimator and step rule of the catalogue, or your own.

    python -m llm_bridge.train --task addition --estimator vcpo --step-rule ess_sqrt --lag 16
    python -m llm_bridge.train --task addition --estimator mine.py:soft --lag 16
    torchrun --nproc_per_node 4 -m llm_bridge.train --model smollm2 --dtype bf16 --sharding fsdp2 ...

The same command runs on a CPU, one accelerator, or several. Settings come from flags, or from --config FILE (TOML or
JSON, the flags' names with underscores); flags override the file. Bad input is one line on standard error and exit code
2; Ctrl-C saves a checkpoint after the update under way and exits with 130.
"""

import argparse
import difflib
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

from vcposim.commands.logs import quiet_libraries
from vcposim.errors import InputError

PROGRAM = "python -m llm_bridge.train"
SECTIONS = {
    "task and model": ("task", "task_options", "model", "base_rate", "model_seed"),
    "estimator and step": (
        "estimator", "baseline", "memory", "norm", "norm_method", "step_rule", "ess_reference", "step_value",
        "step_schedule",
    ),
    "lag": ("lag", "lag_law"),
    "batch": ("updates", "extend", "problems", "groups", "group_size", "max_new_tokens", "temperature", "seed"),
    "optimizer": ("optimizer", "lr", "weight_decay", "clip_norm"),
    "machine": ("dtype", "micro_batch", "sharding"),
    "along the way": ("checkpoint_every", "keep", "evaluate_every", "evaluate_problems"),
}  # fmt: skip
"""the fields of `TrainConfig`, as --help groups them"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, with the nearest flag for a misspelled one."""
        unknown = message.removeprefix("unrecognized arguments: ").split()[0] if "unrecognized" in message else ""
        near = difflib.get_close_matches(unknown, self._option_string_actions, n=3) if unknown else []
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        sys.stderr.write(f"{PROGRAM}: error: {message}{hint} (see --help)\n")
        raise SystemExit(2)


def parser() -> argparse.ArgumentParser:
    """The command line: a flag for every field of `TrainConfig`, none of them with a default of its own."""
    from llm_bridge.training.config import TrainConfig, about

    top = _Parser(
        prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    run = top.add_argument_group("run")
    run.add_argument("--config", metavar="FILE", help="settings in TOML or JSON; flags override them")
    run.add_argument("--output", metavar="DIR", help="folder of the run (default: runs/ and a name of its settings)")
    run.add_argument("--resume", action="store_true", help="go on with the run in --output")
    run.add_argument("--report-to", action="append", default=[], metavar="NAME", help="a logger, such as tensorboard")
    run.add_argument("--dump", metavar="FILE", help="write every trajectory to this JSONL, for `vcposim replay`")
    defaults = {f.name: f for f in fields(TrainConfig)}
    for title, names in SECTIONS.items():
        group = top.add_argument_group(title)
        for name in names:
            _add(group, name, about(name), defaults[name].default)
    return top


def _add(group: Any, name: str, text: str, default: Any) -> None:
    flag, quiet = "--" + name.replace("_", "-"), argparse.SUPPRESS
    text = text.replace("%", "%%")
    if name == "task_options":
        group.add_argument("--task-option", action="append", dest=name, metavar="NAME=VALUE", default=quiet,
                           help=f"{text}; repeatable, values in JSON or words")  # fmt: skip
    elif name == "step_schedule":
        group.add_argument(flag, metavar="FILE|X,X,...", default=quiet,
                           help=f"{text}: numbers, or the metrics.jsonl of a run to replay")  # fmt: skip
    elif isinstance(default, bool):
        group.add_argument(
            flag, action=argparse.BooleanOptionalAction, default=quiet, help=f"{text} (default {default})"
        )
    else:
        shown = "" if default is None else f" (default {default})"
        group.add_argument(flag, metavar=name.split("_")[-1].upper(), default=quiet, help=text + shown)


def settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """What file and flags say, typed; flags win. Raises `InputError` for what cannot be read."""
    from llm_bridge.training.config import read_config, typed

    given = read_config(arguments.config) if arguments.config else {}
    flags = {
        name: x for names in SECTIONS.values() for name in names if (x := getattr(arguments, name, None)) is not None
    }
    if "task_options" in flags:
        flags["task_options"] = given.get("task_options", {}) | dict(_option(text) for text in flags["task_options"])
    if "step_schedule" in flags:
        flags["step_schedule"] = schedule_of(flags["step_schedule"])
    return given | {name: typed(name, value) for name, value in flags.items()}


def schedule_of(text: str) -> list[float]:
    """Multipliers: numbers with commas between, or the step scales of a run's metrics.

    Raises `InputError` for what is neither.

    >>> schedule_of("1,0.5")
    [1.0, 0.5]
    """
    path = Path(text)
    try:
        if path.exists():
            return [float(json.loads(line)["step_scale"]) for line in path.read_text().splitlines()]
        return [float(x) for x in text.split(",")]
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(
            f"--step-schedule: {text!r} is neither numbers like 1,0.5 nor the metrics.jsonl of a run"
        ) from None


def _option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise InputError(f"--task-option: {text!r} is not NAME=VALUE, as in digits=2")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def run(arguments: argparse.Namespace) -> int:
    """Start or resume, and train; returns the exit code."""
    given = settings(arguments)  # before torch is loaded: what cannot be read is said at once

    from rich.console import Console
    from transformers.utils.logging import disable_progress_bar

    from llm_bridge.training import Trainer, folder
    from llm_bridge.training.session import Session, accelerator_for

    disable_progress_bar()  # one bar is enough
    place = Path(arguments.output or default_folder(given))
    accelerator = accelerator_for(place, arguments.report_to)
    ready = folder.check_resume if arguments.resume else folder.check_new
    config = ready(place, given)
    console = Console(stderr=True)

    def report(step: int, rate: float) -> None:
        console.print(f"warm-up (once, then from the cache): step {step}, success rate {rate:.2f}", highlight=False)

    trainer = Trainer(config, accelerator=accelerator, report=report)
    if not arguments.resume:
        folder.claim(place, config)
    dump = Path(arguments.dump) if arguments.dump else None
    session = Session(trainer, place, console, dump)
    if arguments.resume:
        session.resume()
    return session.run()


def default_folder(given: dict[str, Any]) -> str:
    """A folder named by what most often differs between runs.

    >>> default_folder({"lag": 16, "seed": 1})
    'runs/addition-vcpo-none-lag16-seed1'
    """
    from llm_bridge.training.config import TrainConfig

    known = {f.name: f.default for f in fields(TrainConfig)} | given
    task, estimator = (re.sub(r"[^\w.-]+", "-", str(known[name])) for name in ("task", "estimator"))
    estimator += f"-{known['baseline']}" if known["baseline"] else ""
    return f"runs/{task}-{estimator}-{known['step_rule']}-lag{known['lag']}-seed{known['seed']}"


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 2 for bad input, 130 when interrupted before training."""
    arguments = parser().parse_args(argv)
    try:
        with quiet_libraries(PROGRAM):
            return run(arguments)
    except InputError as error:
        sys.stderr.write(f"{PROGRAM}: error: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write(f"{PROGRAM}: interrupted; the last checkpoint is kept\n")
        return 130


if __name__ == "__main__":
    sys.exit(main())
