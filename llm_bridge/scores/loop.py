"""The slow twin: one ordinary backward per trajectory. Nothing clever, so that it can be believed.

Everything the tape computes is tested against these two functions, and `ScoreTape(model, unknown="loop")` runs them
on models that hold a module the tape does not know.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from llm_bridge.scores.layout import Layout
from llm_bridge.scores.norms import square_sum


class Objective(NamedTuple):
    """What norms and gradients are of: the arrays of `trajectory_sums`."""

    log_prob: Tensor
    mask: Tensor
    token_weight: Tensor | None = None
    segment: Tensor | None = None

    def tokens(self) -> Tensor:
        """mask_t weight_t log_prob_t: (row, time)."""
        return weighted(self.log_prob, self.mask, self.token_weight)

    def narrow(self, n: int) -> bool:
        """Whether there is one trajectory of `n`, or one step."""
        return n == 1 or self.log_prob.shape[1] == 1

    def trajectories(self) -> Tensor:
        """Its sum over each trajectory: (n,)."""
        return trajectory_sums(*self)


def trajectory_sums(
    log_prob: Tensor, mask: Tensor, token_weight: Tensor | None = None, segment: Tensor | None = None
) -> Tensor:
    """log pi(tau_i) = sum_t mask_t weight_t log_prob_t for every trajectory i: (n,)."""
    layout = Layout.of(log_prob, segment)
    return layout.per_trajectory(weighted(log_prob, mask, token_weight).reshape(-1, 1)).squeeze(1)


def weighted(log_prob: Tensor, mask: Tensor, token_weight: Tensor | None) -> Tensor:
    """mask_t weight_t log_prob_t: (row, time) -> (row, time). A masked token is 0 even if its log_prob is infinite."""
    weight = mask.to(log_prob.dtype)
    if token_weight is not None:
        weight = weight * token_weight.detach().to(log_prob.dtype)
    return torch.where(weight != 0, log_prob * weight, 0)


def score_sq_norms_loop(
    log_prob: Tensor,
    mask: Tensor,
    parameters: Iterable[Tensor],
    *,
    token_weight: Tensor | None = None,
    segment: Tensor | None = None,
) -> Tensor:
    """||grad log pi(tau_i)||^2, a backward for each i: (n,). The graph of `log_prob` survives."""
    params = [p for p in parameters if p.requires_grad]
    total = trajectory_sums(log_prob, mask, token_weight, segment)
    norm = []
    for value in total:
        grads = torch.autograd.grad(value, params, retain_graph=True, allow_unused=True)
        norm.append(sum((square_sum(g) for g in grads if g is not None), start=total.new_zeros(())))
    return torch.stack(norm)


def weighted_gradient_loop(
    log_prob: Tensor,
    mask: Tensor,
    coefficient: Tensor,
    parameters: Sequence[Tensor],
    *,
    token_weight: Tensor | None = None,
    segment: Tensor | None = None,
) -> list[Tensor]:
    """-sum_i c_i grad log pi(tau_i), one array per parameter, summed a trajectory at a time.

    `log_prob` (row, time), `mask` (row, time), `coefficient` (n,).
    """
    total = trajectory_sums(log_prob, mask, token_weight, segment)
    gradient = [torch.zeros_like(p) for p in parameters]
    for value, c in zip(total, coefficient.tolist(), strict=True):
        grads = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
        for out, grad in zip(gradient, grads, strict=True):
            if grad is not None:
                out.add_(grad, alpha=-c)
    return gradient
