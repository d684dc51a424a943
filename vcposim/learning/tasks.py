"""Tasks to learn: a token chain, the rows of the policy's table that it reads, and a start one can fall from.

Collapse needs something to lose and no way back. So these tasks start **warm**: the policy already favors an answer (as
after supervised fine-tuning on noisy demonstrations, whose noise is normal in the logits), succeeds now and then, and
is never told the answer: if learning pushes one token of it out of reach, no reward will ever bring it back.

`row` says which row of the policy's table a (position, state) reads. With one row per position the policy does not know
its own past (*open loop*: tokens must be coordinated, as in one shared network output); with one row per (position,
state) it does. Rows of different positions are different, so a trajectory passes each row at most once.

Exact numbers come from sums over positions and states, for many runs at once: tables are (run, row, token).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from vcposim.arrays import Array
from vcposim.errors import InputError, unknown_name
from vcposim.learning.tables import OneLayer, TwoLayer
from vcposim.problems.token_chains import TokenChain, any_match, exact_match, modular_sum, partial_credit


@dataclass(frozen=True)
class LearningTask:
    """`row` (T, S) in 0..rows-1, each position its own; `logit` (rows, V) to start from, with normal `noise` (nats).

    Raises `InputError` if two positions share a row, or shapes do not match.
    """

    chain: TokenChain
    row: Array
    logit: Array
    noise: float
    inputs: Array | None = None
    """what a network sees of each row: (rows, d); None for fixed random inputs"""

    def __post_init__(self) -> None:
        length, states, vocabulary = self.chain.shape
        if self.row.shape != (length, states) or self.logit.shape[1:] != (vocabulary,):
            raise InputError(f"row: shape {self.row.shape}, logit {self.logit.shape} for a chain {self.chain.shape}")
        if sum(len(np.unique(r)) for r in self.row) != len(np.unique(self.row)):
            raise InputError("row: two positions share a row; give each position rows of its own")
        if np.any(self.chain.done) or np.ptp(self.chain.group_probability) > 0:
            raise InputError(
                "chain: tasks have a fixed length and equally likely prompts; drop with_end or the weights"
            )

    @property
    def prompts(self) -> int:
        """How many start states there are."""
        return len(self.chain.start)

    def start(self, rng: np.random.Generator) -> Array:
        """Logits of a warm start: (rows, V), nats."""
        return self.logit + self.noise * rng.standard_normal(self.logit.shape)

    def value(self, prob: Array) -> Array:
        """E_pi[R] of each run, exact: (run, rows, V) -> (run,)."""
        return self._backward(prob)[0][:, self._reachable.start].mean(axis=-1)

    def flow(self, prob: Array) -> Array:
        """Probability times what follows, of each token: (run, rows, V) -> (run, rows, V).

        sum_{row, v} flow * s(row, v) is the exact policy gradient.
        """
        run, _, vocabulary = prob.shape
        after, mass = self._backward(prob), self._start_mass(run)
        out = np.zeros(prob.shape)
        for t, (row, to) in enumerate(self._reachable.steps):
            step = mass[:, :, None] * prob[:, row]
            index = np.arange(run)[:, None, None] * prob[0].size + row[:, None] * vocabulary + np.arange(vocabulary)
            weight = step * after[t + 1][:, to]
            out += np.bincount(index.reshape(-1), weight.reshape(-1), prob.size).reshape(prob.shape)
            mass = _onward(step, to, after[t + 1].shape[1])
        return out

    def second_moment(self, prob: Array, behavior: Array) -> Array:
        """E_mu[w^2] = 1 + chi2(pi||mu) of trajectories, exact: (run, rows, V) -> (run,); infinite on overflow."""
        with np.errstate(over="ignore"):
            square = prob * (prob / behavior)
        mass = self._start_mass(len(prob))
        with np.errstate(over="ignore", invalid="ignore"):
            for row, to in self._reachable.steps:
                mass = _onward(mass[:, :, None] * square[:, row], to, int(to.max()) + 1)
        return np.nan_to_num(mass.sum(axis=-1), nan=np.inf, posinf=np.inf)

    def _start_mass(self, run: int) -> Array:
        return np.broadcast_to(self._reachable.law, (run, len(self._reachable.law)))

    @cached_property
    def _reachable(self) -> "_Reachable":
        here = np.unique(self.chain.start)
        start, law, steps = np.searchsorted(here, self.chain.start), self.chain.start_law()[here], []
        for row, to in zip(self.row, self.chain.transition, strict=True):
            then = np.unique(to[here])
            steps.append((row[here], np.searchsorted(then, to[here])))
            here = then
        return _Reachable(start, law, steps, self.chain.reward[here])

    def _backward(self, prob: Array) -> list[Array]:
        """E[R | state] at each position: (run, states that can be there) each."""
        after = [np.broadcast_to(self._reachable.reward, (len(prob), len(self._reachable.reward)))]
        for row, to in self._reachable.steps[::-1]:
            after.append(np.einsum("rsv,rsv->rs", prob.take(row, axis=1), after[-1].take(to, axis=1)))
        return after[::-1]


class _Reachable(NamedTuple):
    """The chain without the states that cannot be there, which are most: states are numbered anew at each position."""

    start: Array
    """state of each prompt"""
    law: Array
    """probability of each first state"""
    steps: list[tuple[Array, Array]]
    """row (states,), and transition (states, V) to the next position's states"""
    reward: Array


def _onward(step: Array, to: Array, states: int) -> Array:
    """Mass moved along a transition: (run, states before, V) -> (run, states)."""
    run = len(step)
    index = np.arange(run)[:, None, None] * states + to
    return np.bincount(index.reshape(-1), step.reshape(-1), run * states).reshape(run, states)


def warm(vocabulary: int, favored: Sequence[Sequence[int]], probability: float) -> Array:
    """Logits that give the favored tokens of each row `probability` together, equally: (rows, V).

    Raises `InputError` for a probability out of (0, 1).
    """
    if not 0 < probability < 1:
        raise InputError(f"probability: {probability} is not in (0, 1); it is the mass of the favored tokens")
    out = np.zeros((len(favored), vocabulary))
    for row, tokens in zip(out, favored, strict=True):
        count = len(set(tokens))
        row[list(set(tokens))] = np.log(probability * (vocabulary - count) / (count * (1 - probability)))
    return out


def open_loop(chain: TokenChain) -> Array:
    """One row per position: (T, S)."""
    return np.repeat(np.arange(chain.shape[0])[:, None], chain.shape[1], axis=1)


def closed_loop(chain: TokenChain) -> Array:
    """One row per (position, state): (T, S)."""
    return np.arange(chain.shape[0] * chain.shape[1]).reshape(chain.shape[:2])


def _matching(length: int, vocabulary: int, targets: int, probability: float) -> LearningTask:
    answer = [[(t + 3 * k) % vocabulary for t in range(length)] for k in range(targets)]
    chain = any_match(answer, vocabulary) if targets > 1 else exact_match(answer[0], vocabulary)
    favored = [[string[t] for string in answer] for t in range(length)]
    return LearningTask(chain, open_loop(chain), warm(vocabulary, favored, probability), 0.3)


def _partial(length: int = 8, vocabulary: int = 8, probability: float = 0.2) -> LearningTask:
    answer = [t % vocabulary for t in range(length)]
    chain = partial_credit(answer, vocabulary)
    return LearningTask(chain, open_loop(chain), warm(vocabulary, [[token] for token in answer], probability), 0.3)


def _modular(length: int = 4, vocabulary: int = 8, modulus: int = 8) -> LearningTask:
    chain = modular_sum(length, vocabulary, modulus)
    return LearningTask(chain, open_loop(chain), np.zeros((length, vocabulary)), 0.3)


def _contextual(contexts: int = 8, arms: int = 16, probability: float = 0.1) -> LearningTask:
    transition = np.full((1, contexts + 2, arms), contexts)
    for g in range(contexts):
        transition[0, g, g % arms] = contexts + 1
    transition[0, contexts + 1] = contexts + 1
    reward = np.zeros(contexts + 2)
    reward[-1] = 1
    chain = TokenChain(
        transition, reward, np.zeros(contexts + 2, bool), np.arange(contexts), np.full(contexts, 1 / contexts)
    )
    favored = [[min(g, contexts - 1) % arms] for g in range(contexts + 2)]
    return LearningTask(chain, closed_loop(chain), warm(arms, favored, probability), 0.3)


def many_prompts(
    prompts: int,
    length: int = 8,
    vocabulary: int = 8,
    probability: float = 0.8,
    noise: float = 0.3,
    seed: int = 0,
    *,
    targets: int = 1,
    graded: bool = False,
) -> LearningTask:
    """Each of `prompts` prompts has one right string of its own, drawn once by `seed`; reward 1 for it.

    A row is a (position, prompt): a prompt is known, its own past is not. A network sees the prompt and the position,
    each one-hot, so that prompts share all parameters behind their own input: what one prompt teaches moves the others.

    With several `targets` a prompt has so many right strings, which share all but their last two tokens: these have to
    be chosen together, by a policy that does not know its past. `graded` pays the share of right tokens instead.

    Raises `InputError` for no prompts or targets, or for graded rewards of several targets.
    """
    if prompts < 1:
        raise InputError(f"prompts: {prompts} is not positive; use 1 or more")
    if not 1 <= targets <= 5 or (graded and targets > 1):
        raise InputError(f"targets: {targets}; use 1 to 5, and 1 if rewards are graded")
    answer = np.random.default_rng([seed, prompts]).integers(vocabulary, size=(targets, prompts, length))
    answer[1:, :, :-2] = answer[:1, :, :-2]
    wrong = answer.T[..., None] != np.arange(vocabulary)  # (length, prompt, target, V)
    # a state is (what has happened, prompt): how many tokens were right, or which targets are out of reach as bits
    happened = np.arange(length + 1 if graded else 2**targets)
    bits = (wrong * 2 ** np.arange(targets)[:, None]).sum(axis=2)
    then = happened[:, None, None] | bits[:, None] if not graded else None
    if then is None:
        then = np.minimum(happened[:, None, None] + ~wrong[:, None, :, 0], length)
    g, count = np.arange(prompts), len(happened) * prompts
    to = (then * prompts + g[:, None]).reshape(length, count, vocabulary)
    reward = np.repeat(happened / length if graded else happened < happened[-1], prompts).astype(float)
    chain = TokenChain(to, reward, np.zeros(count, bool), g, np.full(prompts, 1 / prompts))
    row = np.arange(length)[:, None] * prompts + np.arange(count) % prompts
    inputs = np.concatenate([np.tile(np.eye(prompts), (length, 1)), np.repeat(np.eye(length), prompts, axis=0)], axis=1)
    favored = answer.T.reshape(-1, targets).tolist()
    return LearningTask(chain, row, warm(vocabulary, favored, probability), noise, inputs)


TASKS: dict[str, Callable[[], LearningTask]] = {
    "exact_match_8": lambda: _matching(8, 8, 1, 0.65),
    "exact_match_16": lambda: _matching(16, 16, 1, 0.8),
    "several_targets": lambda: _matching(8, 8, 2, 0.9),
    "partial_credit": _partial,
    "modular_sum": _modular,
    "contextual_bandit": _contextual,
    "prompts_4": lambda: many_prompts(4),
    "prompts_16": lambda: many_prompts(16),
    "prompts_64": lambda: many_prompts(64),
}
"""name -> task; `exact_match_T` has T tokens out of T and one right answer"""


def task(name: str) -> LearningTask:
    """The task of that name; `InputError` with the nearest name otherwise."""
    if name not in TASKS:
        raise unknown_name("task", name, TASKS)
    return TASKS[name]()


SUPERVISED = 300
"""steps of the supervised start of a network whose rows outnumber its hidden units"""


def network(problem: LearningTask, inputs: int = 5, hidden: int | None = None) -> TwoLayer:
    """A small network for a task: each row of the table is an input, all rows share both layers.

    Without inputs of the task's own, a row has `inputs` fixed random numbers. With fewer inputs than rows, what is
    learned for one position spills over to the others: updates interfere, which is what makes a policy lose what it
    knew. `hidden` is 16, and 32 for a task with inputs of its own, whose start is then fitted to both layers.
    """
    rows, vocabulary = problem.logit.shape
    if problem.inputs is not None:
        return TwoLayer(problem.inputs, hidden or 32, vocabulary, fit=SUPERVISED)
    x = np.random.default_rng(0).standard_normal((rows, inputs))
    return TwoLayer(x, hidden or 16, vocabulary)


def linear(problem: LearningTask) -> OneLayer:
    """A linear policy for a task, on random inputs, twice as many as rows: it can say anything, and all rows overlap.

    Its logits start where the task says, exactly, and what is learned for one row moves every other a little.
    """
    rows, vocabulary = problem.logit.shape
    x = np.random.default_rng(0).standard_normal((rows, 2 * rows))
    return OneLayer(x / np.sqrt(2 * rows), vocabulary)
