"""Parameters that FSDP2 holds in shards: which whole one stands in for which, and sums over ranks.

`fully_shard` gathers a unit's parameters for its forward and again for its backward. What the layers of a tape see are
the whole ones; what the optimizer holds, and what gradients go to, are the shards. To give a gradient is a collective:
all ranks give the same parameters in one order (`Giver`), whatever their own layers did and when. A check must be made
and failed by all ranks together, for a rank that stops alone leaves the others waiting.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Partial
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
        return groups_of(next(iter(self.stored.values()), None))

    def giver(self) -> "Giver":
        """Where gradients go, in the order of the model's parameters."""
        whole = {shard: p for p, shard in self.stored.items()}
        order = [whole.get(p, p) for p in self.model.parameters()]  # of units that are gathered now, the whole ones
        return Giver({p: self.stored[p] for p in order if p in self.stored})


def groups_of(shard: Tensor | None) -> list[dist.ProcessGroup]:
    """The process groups over which a shard (...) is spread, one a dimension of its mesh; none of what is no shard."""
    if not isinstance(shard, DTensor):
        return []
    return [shard.device_mesh.get_group(d) for d in range(shard.device_mesh.ndim)]


def add_grad(param: nn.Parameter, grad: Tensor) -> None:
    """p.grad += `grad` (...), in the parameter's dtype and shape; takes the array itself where there was none.

    A sharded parameter (DTensor, FSDP2) gets its shard of the sum of all ranks' grads: a collective.
    """
    grad = grad.view(param.shape)
    if isinstance(param, DTensor):
        mesh = param.device_mesh
        partial = DTensor.from_local(grad, mesh, [Partial()] * mesh.ndim, run_check=False)
        grad = partial.redistribute(mesh, param.placements)
    grad = grad.to(param.dtype)
    if param.grad is None:
        param.grad = grad
    else:
        param.grad.add_(grad)


class Giver:
    """Adds gradients of parameters to those of the optimizer's; of shards in one order on all ranks, each once.

    `stored`: of whole parameters their shards, in that order; empty without FSDP2, where a gradient is given at once.
    """

    def __init__(self, stored: Mapping[nn.Parameter, nn.Parameter] | None = None) -> None:
        self.stored = stored or {}
        self._place = {p: k for k, p in enumerate(self.stored)}
        self._waiting: dict[nn.Parameter, Tensor] = {}
        self._due: list[nn.Parameter] = []

    def begin(self, params: Iterable[nn.Parameter]) -> None:
        """Say for which whole parameters this rank has gradients; what no rank has, gets none. A collective."""
        if self.stored:
            mine = {*params}
            where = next(iter(self.stored.values()))
            has = torch.tensor([float(p in mine) for p in self.stored], device=where.device)
            has = summed(has, groups_of(where))
            self._due = [p for p, many in zip(self.stored, has.tolist(), strict=True) if many]

    def place(self, param: nn.Parameter) -> int:
        """Where a whole parameter stands in the order."""
        return self._place[param]

    def give(self, param: nn.Parameter, grad: Tensor) -> None:
        """Add `grad` (...) to p.grad, or to what waits for its turn."""
        if param not in self.stored:
            return add_grad(param, grad)
        grad = grad.view(param.shape)
        self._waiting[param] = self._waiting[param] + grad if param in self._waiting else grad

    def settle(self, before: nn.Parameter | None = None) -> None:
        """Give what waits, in order, of the parameters `before` this one; by default of all. A collective each."""
        while self._due and (before is None or self._place[self._due[0]] < self._place[before]):
            param = self._due.pop(0)
            shard = self.stored[param]
            grad = self._waiting.pop(param, None)
            add_grad(shard, torch.zeros(shard.shape, dtype=shard.dtype, device=shard.device) if grad is None else grad)


def whole(grad: Tensor | None) -> Tensor | None:
    """A gradient put together from all ranks' shards, a collective; no shard as it is: (...) -> (*whole)."""
    return grad.full_tensor() if isinstance(grad, DTensor) else grad


def summed(x: Tensor, groups: Sequence[dist.ProcessGroup | None]) -> Tensor:
    """x summed over the ranks of each group in turn, in place: same -> same."""
    for group in groups:
        dist.all_reduce(x, group=group)
    return x


def on_any(flag: bool, groups: Sequence[dist.ProcessGroup | None], device: torch.device) -> bool:
    """Whether `flag` is true on any rank: a collective, where there are groups."""
    return float(summed(torch.tensor(float(flag), device=device), groups)) > 0 if groups else flag


def together(check: Callable[[], None], groups: Sequence[dist.ProcessGroup | None], device: torch.device) -> None:
    """Run a check on all ranks; where it fails on any, all raise InputError."""
    failed: Exception | None = None
    try:
        check()
    except Exception as error:
        failed = error
    elsewhere = on_any(failed is not None, groups, device)
    if failed is not None:
        raise failed
    if elsewhere:
        raise InputError("ScoreTape: another rank refused this pass, and says why; take no step")
