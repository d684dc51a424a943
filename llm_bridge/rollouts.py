"""Episodes of a language model on a task, with the probability that each token was really drawn with.

All trajectories advance together, one column of the token matrix at a time. Row i has tokens that are already known
(prompt, the environment's replies) and draws the next one where it has run out. So prompts and replies of any length
need no padding inside a row, and one key-value cache serves all of them.

Random numbers are a function of (seed, problem, sample, ordinal of the policy's own token) alone: who else is in the
batch does not matter, beyond the rounding of the logits.

Lag within a trajectory: `Sampler.advance` runs some columns with one set of weights, and may be called again with
newer ones. Each call reads the whole past with the weights it is given, so a token stamped with version v was drawn
from exactly pi_v(. | past), which is its `behavior_log_prob`. (Engines that keep the cache of older weights draw from
a mixture of versions that no one can evaluate again.) It also means that the state is tokens and numbers only.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llm_bridge.models.language_model import LanguageModel
from llm_bridge.tasks.base import Task, TaskProblem
from vcposim.errors import InputError


@dataclass(frozen=True)
class Rollouts:
    """n trajectories of at most t tokens, padded on the right.

    token           (n, t)   prompt, responses, replies
    attention_mask  (n, t)   1 = a real token
    mask            (n, t)   1 = the policy's own token
    behavior_log_prob (n, t) float32, nats, at the temperature of sampling; 0 off `mask`
    version         (n, t)   version of the weights that drew the token; -1 off `mask`
    reward          (n,)     0 or 1
    group           (n,)     index of the problem: samples of one problem share it
    finished        (n,)     whether the episode ended by itself, rather than by running out of tokens
    """

    token: Tensor
    attention_mask: Tensor
    mask: Tensor
    behavior_log_prob: Tensor
    version: Tensor
    reward: Tensor
    group: Tensor
    finished: Tensor
    responses: list[list[str]]
    prompts: list[str]

    def __len__(self) -> int:
        return len(self.reward)

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors and lists, for a checkpoint; `Rollouts(**state)` is the way back."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


@dataclass
class OpenTrajectory:
    """One trajectory under way. `log_prob` and `version` speak about its own tokens, in order; `own` says where."""

    problem: int
    sample: int
    ids: list[int]
    own: list[int]
    log_prob: list[float]
    version: list[int]
    turn: int
    responses: list[str]
    done: bool
    finished: bool

    def add(self, token: int, log_prob: float, version: int) -> None:
        """Appends one token of the policy's own, its log-probability (nats) and the version that drew it."""
        self.own.append(len(self.ids))
        self.ids.append(token)
        self.log_prob.append(log_prob)
        self.version.append(version)


@dataclass
class SamplerState:
    """Trajectories between two calls of `Sampler.advance`; `column` is the next one to fill."""

    rows: list[OpenTrajectory]
    column: int

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and lists."""
        return {"column": self.column, "rows": [dict(vars(row)) for row in self.rows]}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> "SamplerState":
        """The inverse of `state_dict`."""
        return cls([OpenTrajectory(**row) for row in state["rows"]], state["column"])


@dataclass(frozen=True)
class Sampler:
    """How trajectories are drawn: `group_size` for each problem, at most `max_new_tokens` of the policy's own in each.

    A trajectory that runs out of tokens is scored on what it has written.

    Raises `InputError` for a temperature or a number that is not positive.
    """

    task: Task
    group_size: int
    max_new_tokens: int
    seed: int
    temperature: float = 1.0

    def __post_init__(self) -> None:
        for name, least in (("group_size", 1), ("max_new_tokens", 0), ("seed", 0)):
            if getattr(self, name) < least:
                raise InputError(f"{name}: {getattr(self, name)}; give a whole number of at least {least}")
        if not self.temperature > 0:
            raise InputError(f"temperature: {self.temperature}; give a positive number (sampling, not argmax)")

    def start(self, lm: LanguageModel, problems: Sequence[int | TaskProblem]) -> SamplerState:
        """`group_size` rows for each problem (or index of one), in order, with nothing drawn yet.

        Raises InputError if there is no problem, or a prompt does not fit the model.
        """
        if not problems:
            raise InputError("problems: none given; a batch needs at least one prompt")
        rows = []
        for problem in (self.task.problem(p) if isinstance(p, int) else p for p in problems):
            prompt = lm.encode_prompt(problem.prompt)
            if not 0 < len(prompt) <= lm.max_length:
                raise InputError(
                    f"prompt: {len(prompt)} tokens of problem {problem.index} of {self.task.name!r} do not fit the "
                    f"model's 1 to {lm.max_length}"
                )
            for sample in range(self.group_size):
                done = self.max_new_tokens == 0
                rows.append(
                    OpenTrajectory(problem.index, sample, list(prompt), [], [], [], len(prompt), [], done, False)
                )
        return SamplerState(rows, min(len(row.ids) for row in rows))

    @torch.no_grad()
    def advance(
        self, lm: LanguageModel, state: SamplerState, tokens: int | None = None, version: int = 0
    ) -> SamplerState:
        """Fills the next `tokens` columns (all that are needed, if None) with this model's tokens; changes `state`."""
        problems = {row.problem: self.task.problem(row.problem) for row in state.rows}
        uniform = [self._uniform(row) for row in state.rows]
        last = np.inf if tokens is None else state.column + tokens
        cache = None
        with lm.evaluating():
            while state.column < last and not all(row.done for row in state.rows):
                known = 0 if cache is None else state.column - 1
                logits, cache = lm.next_logits(columns(state.rows, known, state.column, lm.pad_id), cache)
                choice = torch.tensor([next_of(row, u) for row, u in zip(state.rows, uniform, strict=True)])
                token, log_prob = draw(logits, choice, self.temperature)
                for row, drawn, value in zip(state.rows, token.tolist(), log_prob.tolist(), strict=True):
                    if len(row.ids) == state.column and not row.done:
                        row.add(drawn, value, version)
                        self._turn(lm, row, problems[row.problem])
                state.column += 1
        return state

    def finished(self, lm: LanguageModel, state: SamplerState) -> Rollouts:
        """The trajectories as tensors, with their rewards; those that are still under way are scored as they stand."""
        problems = [self.task.problem(row.problem) for row in state.rows]
        width = max(len(row.ids) for row in state.rows)
        at = [(i, j) for i, row in enumerate(state.rows) for j in row.own]
        index = torch.tensor(at, dtype=torch.long).reshape(-1, 2).T.unbind()

        def own(values: list[float], empty: float, dtype: torch.dtype) -> Tensor:
            out = torch.full((len(state.rows), width), empty, dtype=dtype)
            out[index] = torch.tensor(values, dtype=dtype)
            return out

        length = torch.tensor([len(row.ids) for row in state.rows])
        return Rollouts(
            token=columns(state.rows, 0, width, lm.pad_id),
            attention_mask=(torch.arange(width) < length[:, None]).long(),
            mask=own([1 for _ in at], 0, torch.long),
            behavior_log_prob=own([x for row in state.rows for x in row.log_prob], 0.0, torch.float32),
            version=own([x for row in state.rows for x in row.version], -1, torch.long),
            reward=torch.tensor(
                [self.task.reward(p, row.responses) for p, row in zip(problems, state.rows, strict=True)]
            ),
            group=torch.tensor([row.problem for row in state.rows]),
            finished=torch.tensor([row.finished for row in state.rows]),
            responses=[list(row.responses) for row in state.rows],
            prompts=[p.prompt for p in problems],
        )

    def _uniform(self, row: OpenTrajectory) -> np.ndarray:
        """The numbers in [0, 1) that choose a trajectory's own tokens, by their ordinal."""
        philox = np.random.Philox(key=[self.seed, row.problem], counter=[0, 0, row.sample, 0])
        return np.random.Generator(philox).random(max(self.max_new_tokens, 1))

    def _turn(self, lm: LanguageModel, row: OpenTrajectory, problem: TaskProblem) -> None:
        """After a token: is the turn over, what does the environment say, is there room to go on?"""
        ended = row.ids[-1] == lm.eos_id
        spent = len(row.own) == self.max_new_tokens or len(row.ids) == lm.max_length
        if not (ended or spent):
            return
        row.responses.append(lm.decode(row.ids[row.turn : -1 if ended else None]))
        reply = self.task.reply(problem, row.responses) if ended else None
        row.finished = ended and reply is None
        answer = [] if reply is None else lm.encode_reply(reply)
        row.done = spent or reply is None or len(row.ids) + len(answer) >= lm.max_length
        if not row.done:
            row.ids += answer
            row.turn = len(row.ids)


def sample(
    lm: LanguageModel,
    task: Task,
    problems: Sequence[int | TaskProblem],
    *,
    group_size: int,
    max_new_tokens: int,
    seed: int,
    version: int = 0,
    temperature: float = 1.0,
) -> Rollouts:
    """`group_size` finished trajectories for each problem, all from the model as it is: (n, t) with n = problems x
    group_size.

    Raises InputError as `Sampler` and `Sampler.start` do.
    """
    sampler = Sampler(task, group_size, max_new_tokens, seed, temperature)
    return sampler.finished(lm, sampler.advance(lm, sampler.start(lm, problems), version=version))


def draw(logits: Tensor, uniform: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Tokens by inverse CDF, and their log-probabilities in float32: logits (n, V), uniform (n,) -> (n,), (n,).

    >>> token, log_prob = draw(torch.tensor([[0.0, 0.0], [0.0, -1e9]]), torch.tensor([0.7, 0.7]))
    >>> token.tolist(), log_prob.exp().tolist()
    ([1, 0], [0.5, 1.0])
    """
    log_prob = torch.log_softmax(logits.float() / temperature, dim=-1)
    cumulative = log_prob.double().exp().cumsum(-1)
    target = uniform.to(cumulative)[:, None] * cumulative[:, -1:]
    token = torch.searchsorted(cumulative, target, right=True).clamp(max=logits.shape[-1] - 1)
    return token[:, 0], log_prob.gather(1, token)[:, 0]


def next_of(row: OpenTrajectory, uniform: np.ndarray) -> float:
    """The number of `uniform` (t,) that chooses a trajectory's next own token; any, if there is none."""
    return float(uniform[min(len(row.own), len(uniform) - 1)])


def columns(rows: Sequence[OpenTrajectory], start: int, stop: int, pad: int) -> Tensor:
    """Columns start <= j < stop of the token matrix, padded on the right: (n, columns)."""
    cut = [row.ids[start:stop] for row in rows]
    return torch.tensor([ids + [pad] * (stop - start - len(ids)) for ids in cut], dtype=torch.long)
