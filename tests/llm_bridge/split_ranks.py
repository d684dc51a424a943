"""What two ranks do that share trajectories and split parameters, for `test_split_ranks.py`.

The ranks hold halves of an MLP (columns, then rows), of its bias, and of four experts; embedding, router, norm and
head are whole on both.
"""

from functools import partialmethod
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from llm_bridge import ScoreTape
from llm_bridge.scores.score_pass import ScorePass
from vcposim.errors import InputError

VOCABULARY, D, INNER, EXPERTS, N, T = 7, 4, 6, 4, 4, 5
WEIGHT = torch.linspace(-1, 1.3, N).double()


class Copied(torch.autograd.Function):
    """The identity, whose gradient is summed over ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.contiguous().clone()
        dist.all_reduce(grad)
        return grad


class Summed(torch.autograd.Function):
    """The sum over ranks, whose gradient is the identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous().clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class Net(nn.Module):
    """Whole (`ranks` 1), or this rank's part of it."""

    def __init__(self, rank: int = 0, ranks: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.norm, self.head = nn.Embedding(VOCABULARY, D), nn.LayerNorm(D), nn.Linear(D, VOCABULARY)
        self.router = nn.Linear(D, EXPERTS)
        up, down, bias = torch.randn(INNER, D), torch.randn(D, INNER), torch.randn(INNER)
        experts = torch.randn(EXPERTS, D, D)
        inner = slice(rank * INNER // ranks, (rank + 1) * INNER // ranks)
        self.mine = range(rank * EXPERTS // ranks, (rank + 1) * EXPERTS // ranks)
        self.up, self.down = nn.Linear(D, INNER // ranks), nn.Linear(INNER // ranks, D, bias=False)
        self.up.weight, self.down.weight = nn.Parameter(up[inner]), nn.Parameter(down[:, inner])
        self.up.bias = nn.Parameter(bias[inner])
        self.expert = nn.ModuleList(nn.Linear(D, D, bias=False) for _ in self.mine)
        for e, layer in zip(self.mine, self.expert, strict=True):
            layer.weight = nn.Parameter(experts[e])  # type: ignore[union-attr]
        self.copied, self.summed = (Copied.apply, Summed.apply) if ranks > 1 else (lambda x: x, lambda x: x)

    def split(self) -> list[nn.Parameter]:
        return [*self.up.parameters(), *self.down.parameters(), *self.expert.parameters()]

    def forward(self, token: Tensor) -> Tensor:
        x = self.embed(token).cumsum(1)
        x = x + self.summed(self.down(self.up(self.copied(self.norm(x))).tanh()))
        gate = self.copied(self.router(x).softmax(-1))
        inner = self.copied(x)
        x = x + self.summed(
            torch.stack([gate[..., e, None] * f(inner) for e, f in zip(self.mine, self.expert, strict=True)]).sum(0)
        )
        logits = self.head(x)[:, :-1].log_softmax(-1)
        return F.pad(logits.gather(2, token[:, 1:, None]).squeeze(2), (1, 0))


def batch() -> tuple[Tensor, Tensor]:
    token = torch.randint(VOCABULARY, (N, T), generator=torch.Generator().manual_seed(2))
    token = torch.stack([row[torch.arange(T) % (1 + i)] for i, row in enumerate(token)])
    return token, (torch.arange(T) >= 1).double().expand(N, T)


def update(model: Net, affine: bool = False, **options: Any) -> dict[str, Tensor]:
    """Norms, and the gradient of each parameter by name."""
    token, mask = batch()
    v = 1 + WEIGHT.square()
    with ScoreTape(model, **options) as tape:
        norm = tape.score_sq_norms(model(token), mask, affine=(WEIGHT + 0.3 * v, v) if affine else None)
        tape.backward(WEIGHT)
    return {"norm": norm} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def ddp_inside_out(rank: int) -> str:
    """The tape has the module, the call goes through its wrapper."""
    model = Net().double()
    wrapped = DistributedDataParallel(model)
    try:
        with ScoreTape(model):
            wrapped(batch()[0])
    except InputError as error:
        return str(error)
    return "no error"


def wrong_on_one(rank: int, ranks: int) -> str:
    """What a rank says when rank 1 takes a bias's gradient for larger than it is."""
    real = ScorePass.vector
    wrong = partialmethod(lambda self, name, p, grad, at: real(self, name, p, 1.01 * grad, at))
    model = Net(rank, ranks).double()
    try:
        with mock.patch.object(ScorePass, "vector", wrong if rank else real):
            update(model, split=model.split())
    except InputError as error:
        return str(error)
    return "no error"


def main(output: str) -> None:
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    seen: dict[str, Any] = {"ddp": ddp_inside_out(rank)}
    for name, options in {
        "general": {"verify": "always"},
        "affine": {"affine": True, "verify": "always"},
        "loop": {"method": "loop"},
    }.items():
        model = Net(rank, ranks).double()
        seen[name] = update(model, split=model.split(), **options)
    seen["wrong"] = wrong_on_one(rank, ranks)
    seen["forgotten"] = update(Net(rank, ranks).double())
    torch.save(seen, f"{output}.{rank}")
    dist.destroy_process_group()
