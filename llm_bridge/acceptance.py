"""The acceptance task: problems that are solved now and then must be solved nearly always after a minute of training.

    python -m llm_bridge.acceptance --estimator vcpo --step-rule ess
    python -m llm_bridge.acceptance --estimator mine.py:soft

In the spirit of prime-rl's sanity example. A character model is warmed up on sums of two digits; of new problems, those
that it solves 20 to 80% of the time are kept, and it trains on these alone, on rollouts a few updates old. A sound
method then solves more than 95% of them. One whose sign is flipped solves none, one whose ratios are inverted stays far
below: so a mistake that no error message tells of is seen in a minute, on a CPU. It is a sanity check, not a
comparison.

Exit code 0 if it passes, 1 if not, 2 for bad input.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from llm_bridge.models.language_model import CharTokenizer, LanguageModel, char_llama
from llm_bridge.models.warmup import Recipe, warm_up
from llm_bridge.rollouts import sample
from llm_bridge.tasks import load_task
from llm_bridge.tasks.base import Task
from llm_bridge.training.config import TrainConfig
from llm_bridge.training.trainer import Repeated, Trainer
from vcposim.commands.logs import quiet_libraries
from vcposim.errors import InputError

PROGRAM = "python -m llm_bridge.acceptance"
NOW_AND_THEN = (0.2, 0.8)
"""how often a problem is solved before"""
NEARLY_ALWAYS = 0.95
"""how often, of all samples of all problems, they must be solved after"""
PROBLEMS, SAMPLES, TRIED = 8, 32, 64
"""problems to train on; samples that measure each; problems to choose from"""
BASE_RATE = 0.45
RECIPE = Recipe(every=25, lessons=1024, checks=256)
SETTING = TrainConfig(
    task="addition",
    task_options={"digits": 1},
    problems=PROBLEMS,
    max_new_tokens=3,
    lag=4,
    groups=PROBLEMS,
    group_size=16,
    optimizer="adam",
    lr=6e-4,
    updates=200,
    extend=False,
)
"""estimator and step rule are the caller's"""


@dataclass(frozen=True)
class Accepted:
    """What came of it: success rates on the problems trained on."""

    before: float
    after: float

    @property
    def passed(self) -> bool:
        """Whether the problems are solved nearly always."""
        return self.after > NEARLY_ALWAYS

    def __str__(self) -> str:
        word = "passes" if self.passed else "fails"
        rates = f"{self.after:.3f} of samples right after training, {self.before:.3f} before"
        return f"{word}: {rates} (to pass: above {NEARLY_ALWAYS})"


def start(task: Task) -> LanguageModel:
    """The character model, warmed up; a function of nothing."""
    tokenizer = CharTokenizer()
    lm = LanguageModel(char_llama(tokenizer, hidden=64, heads=2, length=16).eval(), tokenizer, "char")
    warm_up(lm, task, BASE_RATE, recipe=RECIPE)
    return lm


def solved(lm: LanguageModel, task: Task, problems: Sequence[int]) -> list[float]:
    """How often each problem is solved."""
    out = sample(lm, task, problems, group_size=SAMPLES, max_new_tokens=SETTING.max_new_tokens, seed=1)
    return [float(x) for x in out.reward.view(len(problems), SAMPLES).mean(1)]


def now_and_then(lm: LanguageModel, task: Task) -> list[int]:
    """The first problems that are solved 20 to 80% of the time, each text once."""
    low, high = NOW_AND_THEN
    found: dict[str, int] = {}
    for problem, rate in enumerate(solved(lm, task, range(TRIED))):
        if low <= rate <= high:
            found.setdefault(task.problem(problem).prompt, problem)
    return list(found.values())[:PROBLEMS]


def accept(config: TrainConfig, *, lm: LanguageModel | None = None, show: Callable[[str], None] = print) -> Accepted:
    """Train one method on the acceptance task; `lm`: a model of `start`, which is trained in place."""
    task = load_task(config.task, seed=config.seed, **config.task_options)
    lm = start(task) if lm is None else lm
    problems = now_and_then(lm, task)
    before = solved(lm, task, problems)
    trainer = Trainer(config, task=Repeated(task, problems), lm=lm)
    for record in trainer.updates():
        if trainer.version % 20 == 0:
            show(f"update {trainer.version}/{config.updates}  reward {record['reward']:.2f}")
    after = solved(lm, task, problems)
    return Accepted(sum(before) / len(before), sum(after) / len(after))


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--estimator", default="vcpo", help="a name of `vcposim catalogue`, or yours: file.py:function")
    parser.add_argument("--baseline", default="", help="instead of the estimator's own")
    parser.add_argument("--step-rule", default="none", help="what scales the step")
    given = parser.parse_args(argv)
    try:
        with quiet_libraries(PROGRAM):
            found = accept(replace(SETTING, **vars(given)))
    except InputError as error:
        sys.stderr.write(f"{PROGRAM}: error: {error}\n")
        return 2
    print(f"{given.estimator} {found}")
    return 0 if found.passed else 1


if __name__ == "__main__":
    sys.exit(main())
