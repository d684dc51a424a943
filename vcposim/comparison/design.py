"""What a comparison measures and how much of it: problems, regimes, step sizes, seeds.

A **size** is a grid. The smaller sizes are parts of the full one, cell by cell: a run depends on its estimator, regime,
step size and seed and on nobody beside it (`vcposim.learning.learner`), so one leaderboard serves every size, and
what is compared is paired by seed.

A **setting** is all that a measurement depends on beside the estimator; the hash of its JSON guards the leaderboard.

*Problems over lag* are small enough to list every batch of four draws: strings of one token out of four, which are the
arms of a bandit, and of two tokens out of two. Each was learned by sixteen exact gradient steps; the learner is the
last version, the sampler an older one.

*Regimes of learning* are `vcposim.learning.tasks.many_prompts`: one network learns P prompts at once, each with a
string of L tokens of its own, from samples that lag by k updates. Every regime but the core changes one thing of it.

*Transformers* are there if one asks for them (`with_transformers`): a character Llama of two layers, warmed up to
a known success rate, learns a task of `llm_bridge.tasks` from rollouts that lag by 16 updates.
"""

from dataclasses import asdict, dataclass, field, replace
from functools import cache
from hashlib import sha256
from json import dumps
from typing import Any, Literal, NamedTuple

import numpy as np

from vcposim.arrays import Array
from vcposim.errors import unknown_name
from vcposim.learning.tables import TwoLayer
from vcposim.learning.tasks import LearningTask, many_prompts, network
from vcposim.problems.policies import TabularSoftmax
from vcposim.problems.rollouts import Problem
from vcposim.problems.runs import policies_of_a_run, stale_problem
from vcposim.problems.staleness import PolicyHistory, fixed_lag
from vcposim.problems.token_chains import TokenChain, partial_credit

VERSION = 1
"""of what is measured: raise it with anything below that changes a number, and make the leaderboard anew"""
REFERENCE = "dr_grpo"
"""the group mean without ratios: what every estimator is compared with"""


@dataclass(frozen=True)
class LearningRegime:
    """Where learning happens: prompts, tokens of a string, lag in updates, and the reward of a wrong string.

    A right one has `low` + 1; values are success probabilities whatever the rewards.
    """

    prompts: int = 16
    length: int = 8
    lag: int = 16
    low: float = 0.0

    @property
    def name(self) -> str:
        """In words, what differs from zero rewards last."""
        rewards = f", rewards {self.low:g}/{self.low + 1:g}" if self.low else ""
        return f"{self.prompts} prompt{'s' * (self.prompts > 1)}, {self.length} tokens, lag {self.lag}{rewards}"


CORE = LearningRegime()
REGIMES = (
    replace(CORE, prompts=1),
    CORE,
    replace(CORE, low=-1.0),
    replace(CORE, lag=0),
    replace(CORE, lag=64),
    replace(CORE, length=16),
    replace(CORE, prompts=32),
)
"""the cheapest first: it is the one that tells whether a leaderboard was made by this source"""
BASE_RATE = 0.17
"""success probability before learning"""
UPDATES, GROUPS, GROUP_SIZE = 100, 4, 8
COMMON = 0.02
"""the step size at which everybody is compared; on the grid of every size"""

_STRINGS = partial_credit((1, 1), 2)
_ARMS = TokenChain(
    transition=np.broadcast_to(1 + np.arange(4), (1, 5, 4)),  # state 0 is before the choice, 1 + v after choice v
    reward=np.array([0.0, 1.0, 0.0, 0.5, 0.0]),
    done=np.zeros(5, dtype=bool),
    start=np.zeros(1, dtype=np.int64),
    group_probability=np.ones(1),
)
ENVIRONMENTS: dict[str, tuple[TokenChain, TabularSoftmax, float]] = {
    "arms": (_ARMS, TabularSoftmax(np.broadcast_to([-1.0, 1.0, 0.0, 0.0], _ARMS.shape).copy()), 0.6),
    "strings": (_STRINGS, TabularSoftmax(np.broadcast_to([0.0, -1.0], _STRINGS.shape).copy()), 1.0),
}
"""name -> environment, the policy that begins, and its step size"""
STEPS, PROBLEM_GROUP_SIZE = 16, 4
LAGS = (0, 1, 4, 16)
TRANSFORMER_TASKS = {"addition": 5, "shortest_path": 8}
"""task -> the policy's own tokens in a trajectory, at most; the calculator's three turns take 4.4 times addition's
processor, by which the full form would be four minutes an estimator instead of one"""
TRANSFORMER_LAG = 16
TRANSFORMER_COMMON = 0.0006
"""the step size of Adam at which everybody's transformers are trained"""


@dataclass(frozen=True)
class LearningSetting:
    """Learning in one regime, at each step size with each seed."""

    part: Literal["learning"] = field(default="learning", init=False)
    name: str
    regime: LearningRegime
    step_sizes: tuple[float, ...]
    seeds: tuple[int, ...]
    updates: int = UPDATES
    groups: int = GROUPS
    group_size: int = GROUP_SIZE
    base_rate: float = BASE_RATE


@dataclass(frozen=True)
class MomentsSetting:
    """Exact moments of the mean of a group on each problem: its title -> environment and lag."""

    part: Literal["moments"] = field(default="moments", init=False)
    name: str = field(default="moments", init=False)
    problems: dict[str, tuple[str, int]]
    steps: int = STEPS
    group_size: int = PROBLEM_GROUP_SIZE


@dataclass(frozen=True)
class LawsSetting:
    """The laws of the kit, each tried on so many examples."""

    part: Literal["laws"] = field(default="laws", init=False)
    name: str = "laws"
    examples: int = 5


@dataclass(frozen=True)
class TransformerSetting:
    """A small transformer learns a task, at each step size with each seed.

    `tokens` are the policy's own in a trajectory, at most; success is measured on `held_out` problems before the first
    and after each `every`-th update; the network has `layers` of width `hidden` and reads `length` characters.
    """

    part: Literal["transformers"] = field(default="transformers", init=False)
    name: str
    task: str
    tokens: int
    step_sizes: tuple[float, ...]
    seeds: tuple[int, ...]
    updates: int
    lag: int = TRANSFORMER_LAG
    every: int = 8
    held_out: int = 128
    groups: int = 8
    group_size: int = 8
    base_rate: float = 0.3
    hidden: int = 32
    layers: int = 2
    heads: int = 2
    length: int = 128


MeasureSetting = LearningSetting | MomentsSetting | LawsSetting | TransformerSetting


@dataclass(frozen=True)
class Size:
    """How much is measured. `step_sizes` hold `COMMON`; `seeds` is even, as each half chooses for the other.

    `transformers` are trained too: none but by `with_transformers`.
    """

    name: str
    lags: tuple[int, ...]
    regimes: tuple[LearningRegime, ...]
    step_sizes: tuple[float, ...]
    seeds: int
    transformers: tuple[TransformerSetting, ...] = ()

    def settings(self) -> list[MeasureSetting]:
        """One for laws, one for exact moments, one for each regime and transformer: the costliest first."""
        learning = [
            LearningSetting(regime.name, regime, self.step_sizes, tuple(range(self.seeds))) for regime in self.regimes
        ]
        moments = MomentsSetting({f"{name}, lag {lag}": (name, lag) for name in ENVIRONMENTS for lag in self.lags})
        return [*self.transformers[::-1], *learning[::-1], LawsSetting(), moments]

    def learning(self) -> list[LearningSetting]:
        """Those of the settings in which something learns, the cheapest first."""
        return [s for s in self.settings() if isinstance(s, LearningSetting)][::-1]

    def digest(self) -> str:
        """SHA-256 of all that decides its numbers."""
        settings = [asdict(setting) for setting in self.settings()]
        return digest({"version": VERSION, "common": COMMON, "reference": REFERENCE, "settings": settings})


SIZES = {
    size.name: size
    for size in (
        Size("tiny", (0, 16), REGIMES[:1], (COMMON, 0.04), 4),
        Size("quick", LAGS, REGIMES[:4], (0.01, COMMON, 0.04), 4),
        Size("full", LAGS, REGIMES, (0.005, 0.01, COMMON, 0.04, 0.08), 10),
    )
}
"""each a part of the next; the first shows what a comparison looks like and settles nothing"""


class TransformerForm(NamedTuple):
    """How much is trained at a size: the first `tasks` of `TRANSFORMER_TASKS`; a base rate of 0: no warm-up."""

    tasks: int
    seeds: int
    step_sizes: tuple[float, ...]
    updates: int
    base_rate: float = 0.3


TRANSFORMER_FORMS = {
    "tiny": TransformerForm(1, 2, (TRANSFORMER_COMMON,), 16, base_rate=0.0),
    "quick": TransformerForm(2, 4, (TRANSFORMER_COMMON,), 64),
    "full": TransformerForm(2, 8, (TRANSFORMER_COMMON / 2, TRANSFORMER_COMMON), 96),
}


def size_named(name: str) -> Size:
    """The size of that name; `InputError` with the known ones otherwise."""
    if name not in SIZES:
        raise unknown_name("--size", name, SIZES)
    return SIZES[name]


def with_transformers(size: Size) -> Size:
    """The size with transformers trained as well."""
    form = TRANSFORMER_FORMS[size.name]
    trained = [
        TransformerSetting(
            name=f"{task}, lag {TRANSFORMER_LAG}",
            task=task,
            tokens=TRANSFORMER_TASKS[task],
            step_sizes=form.step_sizes,
            seeds=tuple(range(form.seeds)),
            updates=form.updates,
            base_rate=form.base_rate,
        )
        for task in list(TRANSFORMER_TASKS)[: form.tasks]
    ]
    return replace(size, transformers=tuple(trained))


def digest(value: Any) -> str:
    """SHA-256 of a JSON value, or of text."""
    text = value if isinstance(value, str) else canonical(value)
    return sha256(text.encode()).hexdigest()


def canonical(value: Any) -> str:
    """One line of JSON, keys in the order given, floats by `repr`: the same value always gives the same bytes."""
    return dumps(value, allow_nan=False, ensure_ascii=False)


@cache
def problem(name: str, lag: int) -> Problem:
    """The problem of an environment at a lag: target the last version, sampler the version `lag` updates ago."""
    environment, start, step_size = ENVIRONMENTS[name]
    policies = policies_of_a_run(environment, start, steps=STEPS, step_size=step_size)
    return stale_problem(environment, PolicyHistory.of_run(policies), fixed_lag(lag))


@cache
def place(prompts: int, length: int, low: float, base_rate: float) -> tuple[LearningTask, "Fitted"]:
    """Task and network of a regime; networks fitted to a start are kept for the next estimator."""
    task = many_prompts(prompts, length, probability=base_rate ** (1 / length))
    task = replace(task, chain=replace(task.chain, reward=task.chain.reward + low))
    plain = network(task)
    return task, Fitted(plain.x, plain.hidden, plain.vocabulary, fit=plain.fit)


class Fitted(TwoLayer):
    """The network, fitted to each start once: hundreds of supervised steps that do not depend on the estimator."""

    def parameters(self, logit: Array) -> Array:
        """As `TwoLayer.parameters`, remembered: (rows, V) -> (p,)."""
        known: dict[bytes, Array] = self.__dict__.setdefault("_known", {})
        key = logit.tobytes()
        if key not in known:
            known[key] = super().parameters(logit)
        return known[key]
