"""Parameters that FSDP2 holds in shards: which whole one stands in for which, and sums over ranks.

`fully_shard` gathers a unit's parameters for its forward and again for its backward. What the layers of a tape see are
the whole ones; what the optimizer holds, and what gradients go to, are the shards. A check must be made and failed by
all ranks together, for a rank that stops alone leaves the others waiting.
"""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from vcposim.errors import InputError


class Shards:
    """`stored`: of every whole parameter seen in a forward the shard it stands in for. Empty without FSDP2."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.stored = model, dict[nn.Parameter, nn.Parameter]()

    def watch(self) -> list[RemovableHandle]:
        """Hooks that note whole parameters whenever a unit has gathered its own.

        Also those of modules that are never called: their weights may be borrowed by others, which must not pass.
        """
        hooks = []
        for unit in self.model.modules():
            if isinstance(unit, FSDPModule):
                held = [
                    (module, key, p)
                    for module in unit.modules()
                    for key, p in module.named_parameters(recurse=False)
                    if isinstance(p, DTensor)
                ]
                hooks.append(unit.register_forward_pre_hook(self._noting(held)))
        return hooks

    def _noting(self, held: Sequence[tuple[nn.Module, str, nn.Parameter]]) -> Callable[[nn.Module, object], None]:
        def note(unit: nn.Module, inputs: object) -> None:
            for module, key, shard in held:
                whole = getattr(module, key)
                if not isinstance(whole, DTensor):
                    self.stored[whole] = shard

        return note

    def seen(self, named: Sequence[tuple[str, nn.Parameter]]) -> list[tuple[str, nn.Parameter]]:
        """These parameters as layers see them: whole, without those that no forward gathered."""
        if not self.stored:
            return list(named)
        whole = {shard: p for p, shard in self.stored.items()}
        return [(name, whole.get(p, p)) for name, p in named if p in whole or p in self.stored]

    def groups(self) -> list[dist.ProcessGroup]:
        """The process groups over which shards are spread, one a dimension of the mesh."""
        shard = next(iter(self.stored.values()), None)
        return (
            []
            if not isinstance(shard, DTensor)
            else [shard.device_mesh.get_group(d) for d in range(shard.device_mesh.ndim)]
        )


def whole(grad: Tensor | None) -> Tensor | None:
    """A gradient put together from all ranks' shards, a collective; no shard as it is: (...) -> (*whole)."""
    return grad.full_tensor() if isinstance(grad, DTensor) else grad


def summed(x: Tensor, groups: Sequence[dist.ProcessGroup | None]) -> Tensor:
    """x summed over the ranks of each group in turn, in place: same -> same."""
    for group in groups:
        dist.all_reduce(x, group=group)
    return x


def together(check: Callable[[], None], groups: Sequence[dist.ProcessGroup | None], device: torch.device) -> None:
    """Run a check on all ranks; where it fails on any, all raise InputError."""
    failed: InputError | None = None
    try:
        check()
    except InputError as error:
        failed = error
    count = float(summed(torch.tensor(float(failed is not None), device=device), groups)) if groups else 0.0
    if failed is not None:
        raise failed
    if count:
        raise InputError(
            "ScoreTape: another rank found scores that differ from autograd's, and says which; take no step"
        )
