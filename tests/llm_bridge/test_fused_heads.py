"""Heads fused with the loss: logits come chunk by chunk inside an operator of their own, and are never kept.

Stand-ins in plain torch with the interfaces of the fused operators people train with: one that gives a log-probability
a token and makes its gradients by hand in the backward, and one that gives the loss alone, its gradients made in the
forward.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llm_bridge.scores import ScoreTape
from tests.llm_bridge.test_hostile_second import LONG, SQUARE, VOCABULARY, D, _lin, obedient, same, taped, tokens, truth
from vcposim.errors import InputError

CHUNK = 5
"""rows at a time: no divisor of anything"""


class FusedLogProb(torch.autograd.Function):
    """log softmax(h W^T)[token], (N, d) (V, d) (N,) -> (N,), a chunk of rows at a time, forward and backward."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, token: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight, token)
        parts = zip(hidden.split(CHUNK), token.split(CHUNK), strict=True)
        return torch.cat([(h @ weight.t()).log_softmax(-1).gather(1, k[:, None]).squeeze(1) for h, k in parts])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        hidden, weight, token = ctx.saved_tensors
        into, total = [], torch.zeros_like(weight)
        for h, k, g in zip(hidden.split(CHUNK), token.split(CHUNK), grad.split(CHUNK), strict=True):
            each = (F.one_hot(k, len(weight)) - (h @ weight.t()).softmax(-1)) * g[:, None]
            into.append(each @ weight)
            total += each.t() @ h
        return torch.cat(into), total, None


class FusedLoss(torch.autograd.Function):
    """The mean of the same as a loss, its gradients made in the forward and scaled in the backward."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, token: Tensor) -> Tensor:
        with torch.enable_grad():
            h, w = (x.detach().requires_grad_() for x in (hidden, weight))
            loss = -FusedLogProb.apply(h, w, token).mean()
            ctx.save_for_backward(*torch.autograd.grad(loss, (h, w)))
        return loss.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        into, total = ctx.saved_tensors
        return grad * into, grad * total, None


def fused(hidden: Tensor, weight: Tensor, token: Tensor, function: Any = FusedLogProb) -> Tensor:
    """(n, t, d) and (n, t) -> (n, t), or the loss."""
    found = function.apply(hidden[:, :-1].flatten(0, 1), weight, token[:, 1:].flatten())
    return F.pad(found.view(len(token), -1), (1, 0)) if found.dim() else found


class Head(nn.Module):
    """A head that gives log-probabilities, or the loss, and holds its weight."""

    def __init__(self, function: Any = FusedLogProb) -> None:
        super().__init__()
        self.weight, self.function = nn.Parameter(torch.randn(VOCABULARY, D) * 0.5), function

    def forward(self, hidden: Tensor, token: Tensor) -> Tensor:
        return fused(hidden, self.weight, token, self.function)


class Net(nn.Module):
    """An embedding, a layer, and a way from hidden states to log-probabilities."""

    def __init__(self, end: Callable[["Net", Tensor, Tensor], Tensor], tied: bool = False, **part: nn.Module) -> None:
        super().__init__()
        self.embed, self.body, self.end = nn.Embedding(VOCABULARY, D), _lin(), end
        for name, module in part.items():
            setattr(self, name, module)
        if tied:
            self.head.weight = self.embed.weight  # type: ignore[union-attr, assignment]

    def forward(self, token: Tensor) -> Tensor:
        return self.end(self, self.body(self.embed(token).cumsum(1).sin()).tanh(), token)


def _own(s: Any, x: Tensor, token: Tensor) -> Tensor:
    return s.head(x, token)


def _borrowed(s: Any, x: Tensor, token: Tensor) -> Tensor:
    return fused(x, s.head.weight, token)


def _chunked(s: Any, x: Tensor, token: Tensor) -> Tensor:
    """The head's own module, a few steps at a time, none of whose logits are kept."""

    def part(h: Tensor, k: Tensor) -> Tensor:
        return s.head(h).log_softmax(-1).gather(2, k.unsqueeze(2)).squeeze(2)

    pairs = zip(x[:, :-1].split(2, 1), token[:, 1:].split(2, 1), strict=True)
    return F.pad(torch.cat([checkpoint(part, h, k, use_reentrant=False) for h, k in pairs], 1), (1, 0))


MAKE: dict[str, Callable[[], nn.Module]] = {
    "its own": lambda: Net(_own, head=Head()),
    "its own, tied": lambda: Net(_own, tied=True, head=Head()),
    "borrowed": lambda: Net(_borrowed, head=_lin(VOCABULARY, bias=False)),
    "borrowed, tied": lambda: Net(_borrowed, tied=True, head=_lin(VOCABULARY, bias=False)),
    "chunked": lambda: Net(_chunked, head=_lin(VOCABULARY, bias=False)),
    "chunked, tied": lambda: Net(_chunked, tied=True, head=_lin(VOCABULARY, bias=False)),
}


def given(case: str, shape: tuple[int, int]) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    mask = (torch.arange(shape[1]) >= 1).double().expand(shape)
    return MAKE[case]().double(), tokens(*shape), mask, torch.linspace(-1, 1.3, shape[0]).double()


@pytest.mark.parametrize("affine", [False, True], ids=["general", "affine"])
@pytest.mark.parametrize("shape", [SQUARE, LONG], ids=["square", "long"])
@pytest.mark.parametrize("case", MAKE)
def test_exact_or_refused_with_advice_that_works(case: str, shape: tuple[int, int], affine: bool) -> None:
    """A weight that the module holds costs a loop through that module alone; a borrowed one is refused by name."""
    found, told = obedient(lambda **options: taped(*given(case, shape), affine, **options), unknown="error")
    assert not same(found, truth(*given(case, shape)))
    if case.startswith("its own"):
        assert [("head" in line, "unknown='loop'" in line) for line in told] == [(True, True)]
    elif case == "borrowed":
        assert [("head.weight: used outside" in line, "method='loop'" in line) for line in told] == [(True, True)]
    elif case.startswith("chunked"):
        assert not told


def test_only_the_fused_module_is_looped_over() -> None:
    model, token, mask, _ = given("its own", LONG)
    with ScoreTape(model, unknown="loop") as tape:
        tape.score_sq_norms(model(token), mask, keep=False)
        assert list(tape.loops) == ["head"]


def test_a_loss_alone_is_refused_by_name() -> None:
    """It is one number, and says nothing of any trajectory."""
    model = Net(_own, head=Head(FusedLoss)).double()
    with ScoreTape(model, unknown="loop") as tape, pytest.raises(InputError, match=r"log_prob: shape \(\); give"):
        tape.score_sq_norms(model(tokens(*LONG)), torch.ones(LONG))
