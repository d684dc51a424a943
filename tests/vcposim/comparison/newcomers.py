"""Three estimators as newcomers write them: one coefficient a sample, one a token, and one in torch."""

import numpy as np
import torch

from vcposim.batch import Batch


def soft(batch: Batch) -> np.ndarray:
    """w / (1 + w) (R - mean)."""
    w = np.exp(np.clip(batch.log_ratio, -300, 300))
    mean = (batch.measure * batch.reward).sum(axis=-1, keepdims=True)
    return w / (1 + w) * (batch.reward - mean)


def gated(batch: Batch) -> np.ndarray:
    """A token counts while its ratio moved less than the advantage wants: one coefficient a token."""
    advantage = batch.reward - (batch.measure * batch.reward).sum(axis=-1, keepdims=True)
    r = np.exp(np.clip(batch.log_ratio, -300, 300))
    open_ = np.where(advantage[..., None] > 0, r < 1.3, r > 0.7)
    return batch.on_tokens(np.where(open_, r, 0 * r) * advantage[..., None])


gated.needs = ("tokens",)  # type: ignore[attr-defined]


def torch_soft(batch: Batch) -> torch.Tensor:
    """tanh(w) (R - mean of the others), in torch."""
    w = torch.exp(torch.clamp(torch.as_tensor(batch.log_ratio), -300, 300))
    others = 1 - batch.measure
    total = (batch.measure * batch.reward).sum(-1, keepdim=True)
    return torch.tanh(w) * (batch.reward - (total - batch.measure * batch.reward) / others)


def oracle(batch: Batch) -> np.ndarray:
    """Reads what only a problem with exact moments can give: it cannot be learned with."""
    return batch.reward - batch.given("population_baseline")


oracle.needs = ("population_baseline",)  # type: ignore[attr-defined]
