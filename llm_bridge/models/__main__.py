"""`python -m llm_bridge.models`: download SmolLM2, warm up a character model, print the table of base rates.

    python -m llm_bridge.models smollm2            download, verify and convert SmolLM2-135M-Instruct, once
    python -m llm_bridge.models char --task gcd    warm up a character model, and keep it
    python -m llm_bridge.models table              base rates and the CPU seconds they take

Converted and warmed-up models lie in the platform's cache folder, or in `--cache`.
"""

import argparse
import sys

from llm_bridge.models import load_model, smollm2
from llm_bridge.models.char import RATES, TABLE, base_rates
from llm_bridge.models.warmup import ReportProgress
from llm_bridge.tasks import TASKS, load_task
from vcposim.errors import InputError


def main(argv: list[str] | None = None) -> int:
    """The exit status; 2 after one line on stderr for a wrong input."""
    parser = argparse.ArgumentParser(prog="python -m llm_bridge.models", description=__doc__.partition("\n")[0])
    parser.add_argument("--cache", help="folder of models (default: the platform's cache folder)")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("smollm2", help="download, verify and convert SmolLM2-135M-Instruct, once")
    table = commands.add_parser("table", help="base rates and the CPU seconds that they take")
    table.add_argument("--task", nargs="+", default=TABLE, help="one of each kind")
    table.add_argument("--base-rate", nargs="+", type=float, default=RATES, help="%(default)s")
    char = commands.add_parser("char", help="warm up a character model on a task, and keep it")
    char.add_argument("--task", default="addition", help=f"one of {', '.join(TASKS)}")
    char.add_argument("--base-rate", type=float, default=0.3, help="success rate of sampled answers (%(default)s)")
    char.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args(argv)
    try:
        print(_run(chosen))
    except InputError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    return 0


def _run(chosen: argparse.Namespace) -> str:
    if chosen.command == "smollm2":
        return f"SmolLM2-135M-Instruct: {smollm2.install(chosen.cache)}"
    if chosen.command == "table":
        return base_rates(chosen.task, chosen.base_rate)
    report: ReportProgress = lambda step, rate: print(f"step {step}: success rate {rate:.2f}", file=sys.stderr)  # noqa: E731
    task = load_task(chosen.task)
    lm = load_model("char", task=task, seed=chosen.seed, base_rate=chosen.base_rate, cache=chosen.cache, report=report)
    return f"{task.name}: character model of {lm.model.num_parameters()} parameters is in the cache"


if __name__ == "__main__":
    sys.exit(main())
