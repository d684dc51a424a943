"""Updates a second of a small transformer: one `Trainer` after another, and as many runs in lock-step.

    python -m simulations.bench.lockstep [--runs 16] [--steps 64] [--updates 5] [--profile]

The same configurations in the same process, one thread, one after the other: CPU time, so that a busy machine does not
count. `--profile` prints where the time of each goes.
"""

import argparse
import cProfile
import pstats
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

from llm_bridge.models.language_model import CharTokenizer, LanguageModel, char_llama
from llm_bridge.training import TrainConfig, Trainer
from llm_bridge.training.lockstep import LockStep

METHODS = (("vcpo", "ess"), ("sequence_tis", "none"), ("on_policy_optimal", "none"), ("m2po", "none"))


def language_model(length: int) -> LanguageModel:
    """Untrained: its responses are as long as they may be."""
    model = char_llama(CharTokenizer(), hidden=32, layers=2, heads=2, length=length).eval()
    return LanguageModel(model, CharTokenizer(), "char")


def configurations(runs: int, steps: int, updates: int) -> list[TrainConfig]:
    """Methods in turn, each with the next seed when all have had their turn."""
    shared: dict[str, Any] = {
        "task": "running_sum", "task_options": {"steps": steps}, "max_new_tokens": steps + 1, "lag": 4, "groups": 8,
        "group_size": 8, "optimizer": "adam", "updates": updates, "extend": False,
    }  # fmt: skip
    return [
        TrainConfig(estimator=estimator, step_rule=rule, seed=i // len(METHODS), **shared)
        for i in range(runs)
        for estimator, rule in [METHODS[i % len(METHODS)]]
    ]


def seconds(work: Callable[[], Iterable[Any]], profiled: bool) -> float:
    """CPU seconds of one pass over what `work` yields."""
    profile = cProfile.Profile()
    started = time.process_time()
    if profiled:
        profile.enable()
    for _ in work():
        pass
    taken = time.process_time() - started
    if profiled:
        profile.disable()
        pstats.Stats(profile).sort_stats("cumulative").print_stats(25)
    return taken


def main() -> None:
    """Prints updates (of one run) a CPU second before and after."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("runs", 16), ("steps", 64), ("updates", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--profile", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    configs = configurations(given.runs, given.steps, given.updates)
    total = given.updates * len(METHODS)

    def alone() -> Iterable[Any]:
        for config in configs[: len(METHODS)]:
            yield from Trainer(config, lm=language_model(2 * given.steps + 2)).updates()

    def together() -> Iterable[Any]:
        yield from LockStep(configs, lm=language_model(2 * given.steps + 2)).updates()

    for work in (alone, together):
        next(iter(work()))  # what is imported and prepared once
    one = total / seconds(alone, given.profile)
    many = given.updates * len(configs) / seconds(together, given.profile)
    size = f"running_sum, {given.steps} tokens, 8 x 8 trajectories, {given.updates} updates, lag 4, 28k parameters"
    print(f"{size}, updates a CPU second:")
    print(f"one Trainer after another {one:.2f}, {given.runs} in lock-step {many:.2f} ({many / one:.1f} times)")


if __name__ == "__main__":
    main()
