"""Parameters spread over ranks (FSDP2), and whole again.

Sampling reads a whole copy of the weights on every rank, as an inference engine does: ranks may then generate different
numbers of tokens without waiting for each other, and score norms need whole parameters too. Gradients and optimizer
state, the larger part, are sharded.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from vcposim.errors import InputError


def sharded(model: nn.Module) -> nn.Module:
    """The model with each repeated block, and the rest, sharded over all ranks.

    Raises `InputError` outside `torchrun`.
    """
    if not torch.distributed.is_initialized():
        raise InputError("sharding: 'fsdp2' needs several processes; start with torchrun, or use 'none'")
    stacks = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m)]
    for block in max(stacks, key=len, default=()):
        fully_shard(block)
    fully_shard(model)
    return model


def whole(x: Tensor) -> Tensor:
    """The tensor as a whole, detached: (...) -> (*whole); a collective if it is sharded."""
    x = x.detach()
    return x.full_tensor() if isinstance(x, DTensor) else x


def like(x: Tensor, pattern: Tensor) -> Tensor:
    """A whole tensor on the pattern's device, sharded as the pattern is (scalars stay): (...), (*pattern) -> (...)."""
    if isinstance(pattern, DTensor) and x.dim():
        return distribute_tensor(x.to(pattern.device), pattern.device_mesh, pattern.placements)
    return x.to(pattern.device) if x.dim() else x.clone()


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the parameters by name, whole, each shared one once."""
    return {name: whole(p).clone() for name, p in model.named_parameters()}


@torch.no_grad()
def load_weights(model: nn.Module, given: Mapping[str, Tensor]) -> None:
    """Overwrite the parameters. Raises `InputError` if names or shapes are another model's."""
    own = dict(model.named_parameters())
    for name in sorted(own.keys() ^ given.keys()):
        raise InputError(f"model: parameter {name!r} is only in one of model and checkpoint; use the model of this run")
    for name, p in own.items():
        if p.shape != given[name].shape:
            raise InputError(
                f"model: {name!r} has shape {tuple(p.shape)}, {tuple(given[name].shape)} in the checkpoint; use the "
                "model of this run"
            )
        p.copy_(like(given[name], p))


@torch.no_grad()
def synchronize(model: nn.Module, trained: nn.Module) -> None:
    """Bring the whole copy up to date with the sharded parameters; a collective."""
    for p, shard in zip(model.parameters(), trained.parameters(), strict=True):
        p.copy_(whole(shard))


def moments(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The optimizer's state of each parameter, whole, in their order."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return [
        {name: whole(x).clone() for name, x in optimizer.state.get(p, {}).items() if isinstance(x, Tensor)}
        for p in parameters
    ]


def load_moments(optimizer: torch.optim.Optimizer, given: list[dict[str, Any]]) -> None:
    """Continue from `moments`."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for p, state in zip(parameters, given, strict=True):
        if state:
            optimizer.state[p] = {name: like(x, p) for name, x in state.items()}
