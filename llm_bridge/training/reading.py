"""What one forward pass of the learner says about a batch: log-probabilities, and what estimators ask for besides.

All arrays are aligned with the tokens (entry j speaks about token j) and at the temperature of the run: the policy that
learns is the policy that samples.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm_bridge.logprobs import log_prob_of, next_token_logits
from llm_bridge.rollouts import Rollouts
from llm_bridge.scores import logit_sq_norms

AT_ONCE = 1 << 24
"""logits in float32 at a time: a large vocabulary is never copied whole"""


@dataclass(frozen=True)
class Reading:
    """What the learner makes of n trajectories; no gradient."""

    log_prob: Tensor
    """(n, t) log pi of each token, nats"""
    entropy: Tensor
    """(n, t) of the distribution each token comes from, nats"""
    collision: Tensor
    """(n, t) sum_v pi(v)^2 of it"""
    logit_proxy: Tensor | None = None
    """(n,) sum_t 1 - 2 pi(y_t) + sum_v pi(v)^2, if asked for"""
    score_sq_norm: Tensor | None = None
    """(n,) ||s_i||^2 or what stands for it, if the estimator needs it"""

    @classmethod
    def of(cls, parts: Sequence["Reading"]) -> "Reading":
        """Parts one below the other."""
        columns: dict[str, Any] = {}
        for f in fields(cls):
            values = [getattr(part, f.name) for part in parts]
            columns[f.name] = None if values[0] is None else torch.cat(values)
        return cls(**columns)


def first_read(rollouts: Rollouts) -> int:
    """The column before any row's first own token. Nothing is asked of earlier ones, and logits are the largest array
    of an update: those of the prompts are never made."""
    own = (rollouts.mask > 0).any(0)
    return max(int(own.long().argmax()) - 1, 0) if bool(own.any()) else 0


def policy_logits(model: nn.Module, rollouts: Rollouts, temperature: float, first: int = 0) -> Tensor:
    """Logits of the tempered policy from column `first` on: (n, columns, V); j is the distribution of token j + 1."""
    logits = next_token_logits(model, rollouts, first)
    return logits if temperature == 1 else logits / temperature


def policy_log_prob(logits: Tensor, rollouts: Rollouts) -> Tensor:
    """log pi of each token, nats, from the logits of the last columns: (n, columns, V) -> (n, t); 0 before them."""
    first = rollouts.token.shape[1] - logits.shape[1]
    return F.pad(log_prob_of(logits, rollouts.token[:, first:]), (first, 0))


@torch.no_grad()
def read(
    logits: Tensor, log_prob: Tensor, rollouts: Rollouts, *, proxy: bool = False, score_sq_norm: Tensor | None = None
) -> Reading:
    """Everything that is read off the `logits` (n, columns, V) of the last columns, in at least float32.

    `log_prob` (n, t), `score_sq_norm` (n,); `proxy` also asks for the logit proxy.
    """
    rows = max(1, AT_ONCE // logits[0].numel())
    first = rollouts.token.shape[1] - logits.shape[1]
    spread = [_spread(part) for part in logits.detach().split(rows)]
    entropy, collision = (F.pad(torch.cat(x)[:, :-1], (first + 1, 0)) for x in zip(*spread, strict=True))
    norm = logit_sq_norms(logits, rollouts.token[:, first:], rollouts.mask[:, first:]) if proxy else None
    return Reading(log_prob.detach(), entropy, collision, norm, score_sq_norm)


def _spread(logits: Tensor) -> tuple[Tensor, Tensor]:
    log_p = F.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), -1)
    p = log_p.exp()
    return -(p * log_p).sum(-1), (p * p).sum(-1)
