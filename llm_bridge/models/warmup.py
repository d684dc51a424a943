"""Supervised warm-up: a policy that succeeds as often as one asks, before reinforcement learning starts.

It learns from the task's own demonstrations (its own tokens only: prompts and replies are masked), on problems that
reinforcement learning does not see, until the success rate of *sampled* answers on further unseen problems reaches
`base_rate`. Everything is a function of the arguments.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from llm_bridge.logprobs import TokenBatch, token_log_prob
from llm_bridge.models.language_model import LanguageModel
from llm_bridge.rollouts import sample
from llm_bridge.tasks.base import STRIDE, Task
from vcposim.errors import InputError

LESSONS = STRIDE // 2
"""first problem of those to learn from"""
CHECKS = LESSONS + STRIDE // 4
"""first problem of those that measure the success rate"""


ReportProgress = Callable[[int, float], None]
"""called with the step and the success rate at each measurement"""


@dataclass(frozen=True)
class Recipe:
    """How to teach: `batch` of the `lessons` a step; the success rate on `checks` problems is measured now and then."""

    steps: int = 6000
    every: int = 25
    lessons: int = 8192
    batch: int = 64
    lr: float = 3e-3
    checks: int = 512


STANDARD = Recipe()
HALVINGS = 5
"""of the last stretch of training, to meet the base rate"""


def warm_up(
    lm: LanguageModel,
    task: Task,
    base_rate: float,
    *,
    seed: int = 0,
    recipe: Recipe = STANDARD,
    report: ReportProgress = lambda step, rate: None,
) -> float:
    """Trains `lm` in place until its sampled success rate is `base_rate`; returns the rate measured.

    `report(step, rate)` is called at each measurement. Raises InputError if the recipe's steps are not enough.
    """
    if not 0 <= base_rate < 1:
        raise InputError(f"base_rate: {base_rate}; give a success rate of at least 0 and below 1")
    lesson = demonstrations(lm, task, recipe.lessons)
    longest = 2 + int(lesson.mask.sum(1).max())

    def measure() -> float:
        return success_rate(lm, task, recipe.checks, seed, longest)

    optimizer = torch.optim.AdamW(lm.model.parameters(), betas=(0.9, 0.95), weight_decay=0.01)
    optimizer.zero_grad()
    before, rate = weights(lm), 0.0
    for step, row in enumerate(batches(recipe.lessons, recipe.batch, seed)):
        if step % recipe.every == 0:
            rate = measure()
            report(step, rate)
            if rate >= base_rate:
                return settle(lm, before, base_rate, rate, measure)
            before = weights(lm)
        if step == recipe.steps:
            break
        learn(lm, optimizer, rows(lesson, row), recipe.lr * min(1.0, (step + 1) / 50))
    raise InputError(
        f"base_rate: {base_rate} not reached, {rate:.2f} after {recipe.steps} steps; ask for less or for an easier task"
    )


def settle(
    lm: LanguageModel, before: list[Tensor], base_rate: float, rate: float, measure: Callable[[], float]
) -> float:
    """Moves the weights back on the line to those `before`, to where the rate is closest; returns that rate.

    Some skills (copying what a calculator says) come within a few steps: a stopping rule alone would overshoot.
    """
    after, low, high = weights(lm), 0.0, 1.0
    tried = {1.0: rate}
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        place(lm, before, after, middle)
        tried[middle] = measure()
        low, high = (low, middle) if tried[middle] >= base_rate else (middle, high)
    best = min(tried, key=lambda share: abs(tried[share] - base_rate))
    place(lm, before, after, best)
    return tried[best]


def weights(lm: LanguageModel) -> list[Tensor]:
    """Copies of all parameters, in the model's order, detached."""
    return [p.detach().clone() for p in lm.model.parameters()]


def place(lm: LanguageModel, before: list[Tensor], after: list[Tensor], share: float) -> None:
    """Weights at `share` of the way."""
    with torch.no_grad():
        for p, a, b in zip(lm.model.parameters(), before, after, strict=True):
            p.copy_(b if share == 1.0 else a.lerp(b, share))


def learn(lm: LanguageModel, optimizer: torch.optim.Optimizer, lesson: TokenBatch, lr: float) -> None:
    """One step of maximum likelihood on the policy's own tokens."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    loss = -(token_log_prob(lm.model, lesson) * lesson.mask).sum() / lesson.mask.sum()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(lm.model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()  # the next to learn finds no gradient of ours


def success_rate(lm: LanguageModel, task: Task, checks: int, seed: int, max_new_tokens: int) -> float:
    """Share of sampled episodes that succeed, one for each of `checks` problems kept for this."""
    problems = range(CHECKS, CHECKS + checks)
    out = sample(lm, task, problems, group_size=1, max_new_tokens=max_new_tokens, seed=seed)
    return float(out.reward.mean())


def demonstrations(lm: LanguageModel, task: Task, lessons: int) -> TokenBatch:
    """Oracle episodes, (n, t)."""
    episodes = [episode(lm, task, LESSONS + i) for i in range(lessons)]
    width = max(len(ids) for ids, _ in episodes)
    token = torch.tensor([ids + [lm.pad_id] * (width - len(ids)) for ids, _ in episodes])
    mask = torch.tensor([own + [0.0] * (width - len(own)) for _, own in episodes])
    length = torch.tensor([len(ids) for ids, _ in episodes])
    return TokenBatch(token, mask, (torch.arange(width) < length[:, None]).long())


def rows(batch: TokenBatch, row: Tensor) -> TokenBatch:
    """Some rows of a batch, `row` (k,) indices, as wide as the longest of them."""
    assert batch.attention_mask is not None
    width = int(batch.attention_mask[row].sum(1).max())
    return TokenBatch(*(x[row, :width] for x in (batch.token, batch.mask, batch.attention_mask)))


def episode(lm: LanguageModel, task: Task, index: int) -> tuple[list[int], list[float]]:
    """Tokens of the oracle's episode, and which are the policy's own."""
    problem = task.problem(index)
    ids = lm.encode_prompt(problem.prompt)
    own, responses = [0.0] * len(ids), task.demonstration(problem)
    for turn, response in enumerate(responses, start=1):
        said = [*lm.encode(response), lm.eos_id]
        reply = lm.encode_reply(task.reply(problem, responses[:turn]) or "") if turn < len(responses) else []
        ids, own = ids + said + reply, own + [1.0] * len(said) + [0.0] * len(reply)
    return ids, own


def batches(total: int, size: int, seed: int) -> Iterator[Tensor]:
    """Row numbers of endless passes over `total` rows, each in an order of its own."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(total, generator=generator).split(size)
