"""A second set of small modules built to fool the tape, by somebody who did not write it.

Every shape is as confusable as it gets: rows, steps and width are all four (SQUARE), or steps are a multiple of rows
(LONG). Each module must be exact against a backward per trajectory, or be refused by name, and then the advice in the
refusal, followed to the letter, must give the exact answer.
"""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint

from llm_bridge.scores import ScoreTape, layers, score_sq_norms_loop, weighted_gradient_loop
from tests.kit.statistical import BRAIN, SUMMED, assert_near, near
from vcposim.errors import InputError

VOCABULARY, D = 7, 4
SQUARE, LONG = (4, 4), (3, 6)
Body = Callable[[], nn.Module]


class Net(nn.Module):
    """Embedding, a sum over the past, the hostile part, a head: log pi of each token (row, time)."""

    def __init__(self, body: nn.Module, head: nn.Module | None = None) -> None:
        super().__init__()
        self.embed, self.body, self.head = nn.Embedding(VOCABULARY, D), body, head or nn.Linear(D, VOCABULARY)

    def forward(self, token: Tensor) -> Tensor:
        logits = self.head(self.body(self.embed(token).cumsum(1).sin()))
        return F.pad(logits[:, :-1].log_softmax(-1).gather(2, token[:, 1:, None]).squeeze(2), (1, 0))


class Fn(nn.Module):
    """A module whose forward is a function of itself and its input; tensors given become parameters."""

    def __init__(self, function: Callable[..., Any], **part: Any) -> None:
        super().__init__()
        self.function = function
        for name, x in part.items():
            setattr(self, name, nn.Parameter(x) if isinstance(x, Tensor) and not isinstance(x, nn.Parameter) else x)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)


def _p(*shape: int) -> Tensor:
    return torch.randn(shape) * 0.5


def _lin(out: int = D, inner: int = D, bias: bool = True) -> nn.Linear:
    return nn.Linear(inner, out, bias=bias)


def _with(function: Callable[..., Tensor], **part: Any) -> Body:
    """A body whose parts are made anew for each model: callables are called, shapes become parameters."""
    return lambda: Fn(function, **{k: _p(*x) if isinstance(x, tuple) else x() for k, x in part.items()})


def _frozen(module: nn.Module, *names: str) -> nn.Module:
    for name, p in module.named_parameters():
        if name in names:
            p.requires_grad_(False)
    return module


# --- modules ----------------------------------------------------------------------------------------------------------


class Norm(nn.Module):
    """An RMS norm with every bad habit: a branch by mode, a counter, a gate, a clamp."""

    def __init__(self, by_mode: bool = False, clamp: bool = False) -> None:
        super().__init__()
        self.scale = nn.Parameter(1 + _p(D))
        self.register_buffer("calls", torch.zeros(()))
        self.by_mode, self.clamp, self.count = by_mode, clamp, 0

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        self.calls += 1
        self.count += 1
        scale = self.scale.clamp(0.6, 1.2) if self.clamp else self.scale
        if self.by_mode and not self.training:
            scale = scale.mean()
        y = scale * x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return y if gate is None else y * gate.sigmoid()


class Times(torch.Tensor):
    """A weight that its own class multiplies by two in every linear map."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_function__(func, types, args, kwargs)
        return out.as_subclass(Tensor) * 2 if func is F.linear else out


def _subclass_weight() -> nn.Module:
    layer = _lin()
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Times))
    return layer


class Coupled(torch.autograd.Function):
    """The identity, whose gradient is shared out over the batch."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad + 0.5 * grad.mean(0)


class Through(torch.autograd.Function):
    """A rounded scale with a straight-through gradient; the parameter's gradient is made by hand."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x * (8 * w).round() / 8

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return grad * w, (grad * x).sum((0, 1))


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.size = nn.Parameter(_p(D, 1))

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.size.exp()


class Quantised(nn.Module):
    """A frozen base in whole numbers with trainable scales, and LoRA beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("base", torch.randint(-8, 8, (D, D), dtype=torch.int8))
        self.step = nn.Parameter(0.1 + _p(D, 1).abs())
        self.a, self.b = _lin(2, bias=False), _lin(D, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.base.to(x.dtype) * self.step) + self.b(self.a(x))


class Mixture(nn.Module):
    """Experts that choose tokens over the whole batch, or tokens that choose one expert with a capacity."""

    def __init__(self, choose: str) -> None:
        super().__init__()
        self.choose, self.router = choose, _lin(3)
        self.expert = nn.ModuleList(_lin() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, D)
        out, gate = torch.zeros_like(flat), self.router(flat).softmax(-1)
        for e, expert in enumerate(self.expert):
            if self.choose == "expert":
                row = gate[:, e].topk(5).indices
            else:
                row = (gate.argmax(-1) == e).nonzero().squeeze(1)[:5]
            out = out.index_add(0, row, expert(flat[row]).tanh() * gate[row, e, None])
        return out.view_as(x) + x


class Attention(nn.Module):
    """Attention over time with a learned relative bias, slopes and scale."""

    def __init__(self, bias: str) -> None:
        super().__init__()
        self.qkv, self.bias = _lin(3 * D), bias
        self.relative, self.slope, self.scale = nn.Embedding(16, 2), nn.Parameter(_p(2, 1, 1)), nn.Parameter(_p(1))
        for name in {"relative", "slope", "scale"} - {bias}:
            delattr(self, name)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, 2, 2)).permute(2, 0, 3, 1, 4)
        place = torch.arange(x.shape[1])
        gap = (place[:, None] - place).clamp(min=0)
        score = q @ k.mT
        if self.bias == "relative":
            score = score + self.relative(gap).permute(2, 0, 1)
        elif self.bias == "slope":
            score = score - self.slope * gap
        else:
            score = score * self.scale
        score = score.masked_fill(place[:, None] < place, -1e9)
        return (score.softmax(-1) @ v).transpose(1, 2).flatten(2) + x


def _cells(s: Any, x: Tensor) -> Tensor:
    state = None
    out = []
    for step in x.unbind(1):
        state = s.cell(step, state)
        out.append(state[0] if isinstance(state, tuple) else state)
    return torch.stack(out, 1)


def _swapped(s: Any, x: Tensor) -> Tensor:
    order = torch.tensor([1, 0, *range(2, len(x))])
    return s.a(x[order])[order]


def _sorted(s: Any, x: Tensor) -> Tensor:
    order = x.abs().sum((1, 2)).argsort()
    return s.a(x[order])[order.argsort()]


def _time_first(s: Any, x: Tensor) -> Tensor:
    return s.a(x.transpose(0, 1)).transpose(0, 1)


def _across(s: Any, x: Tensor) -> Tensor:
    q, k, v = s.qkv(x).transpose(0, 1).chunk(3, -1)
    return x + F.scaled_dot_product_attention(q, k, v).transpose(0, 1)


def _live(s: Any, x: Tensor) -> Tensor:
    flat = x.reshape(-1, D)
    row = (flat.sum(1) > 0).nonzero().squeeze(1)
    return flat.index_add(0, row, s.a(flat[row])).view_as(x)


def _in_place(s: Any, x: Tensor) -> Tensor:
    y = s.a(x) * 1.5
    y[:, 1:] += s.shift
    y.mul_(s.scale).masked_fill_(x < -0.9, 0.0)
    return y


def _twice_in_rows(s: Any, x: Tensor) -> Tensor:
    a, b = s.a(torch.cat([x.reshape(-1, D), x.cos().reshape(-1, D)])).chunk(2)
    return (a * b).view_as(x)


def _unused_forward(s: Any, x: Tensor) -> Tensor:
    s.a(x.cos())
    return s.a(x)


def _twice() -> nn.Module:
    """Two norms with one scale, one after the other: the input of the second holds the scale as well."""
    first, second = Norm(), Norm()
    second.scale = first.scale
    return nn.Sequential(first, _lin(), second)


def _weight_tied_to_transpose() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    first, second = _lin(), Conv1D(D, D)
    second.weight = first.weight
    return nn.Sequential(first, nn.Tanh(), second)


def _bias_is_scale() -> nn.Module:
    layer, norm = _lin(), nn.LayerNorm(D)
    norm.weight = layer.bias
    return nn.Sequential(layer, norm)


def _row_is_scale() -> nn.Module:
    gate = _lin(1)
    return Fn(lambda s, x: s.gate(x) * x * s.norm.weight, gate=gate, norm=Fn(lambda s, x: x, weight=gate.weight))


def _conv(kind: str) -> nn.Module:
    if kind == "2d":
        return Fn(lambda s, x: x + s.c(F.pad(x.unsqueeze(1), (1, 1, 2, 0))).squeeze(1), c=nn.Conv2d(1, 1, 3))
    if kind == "transposed":
        up = nn.ConvTranspose1d(D, D, 2)
        return Fn(lambda s, x: x + s.c(x.transpose(1, 2))[..., :-1].transpose(1, 2), c=up)
    if kind == "time first":
        conv = nn.Conv1d(D, D, 2, padding=1)
        return Fn(lambda s, x: x + s.c(x.permute(1, 2, 0))[..., :-1].permute(2, 0, 1), c=conv)
    return Fn(lambda s, x: x + s.c(F.pad(x, (0, 0, 1, 0)).transpose(1, 2)).transpose(1, 2), c=nn.Conv1d(D, D, 2))


def _lora(kind: str) -> nn.Module:
    base = _frozen(_lin(), "weight", "bias")
    if kind == "merged":
        return Fn(lambda s, x: F.linear(x, s.base.weight + s.b @ s.a), base=base, a=_p(2, D), b=_p(D, 2))
    if kind == "dora":

        def dora(s: Any, x: Tensor) -> Tensor:
            weight = s.base.weight + s.b @ s.a
            return F.linear(x, s.size[:, None] * weight / weight.norm(dim=1, keepdim=True))

        return Fn(dora, base=base, a=_p(2, D), b=_p(D, 2), size=1 + _p(D))
    if kind == "ia3":
        return Fn(lambda s, x: s.base(x) * s.size, base=base, size=1 + _p(1, D))
    if kind == "vera":

        def vera(s: Any, x: Tensor) -> Tensor:
            return s.base(x) + s.out * F.linear(s.inner * F.linear(x, s.a), s.b)

        return _frozen(Fn(vera, base=base, a=_p(2, D), b=_p(D, 2), inner=_p(2), out=_p(D)), "a", "b")
    if kind == "kron":
        return Fn(lambda s, x: s.base(x) + F.linear(x, torch.kron(s.a, s.b)), base=base, a=_p(2, 2), b=_p(2, 2))
    return Fn(lambda s, x: s.base(x) + F.linear(x, (s.a @ s.b) * (s.c @ s.d)), base=base,
              a=_p(D, 2), b=_p(2, D), c=_p(D, 2), d=_p(2, D))  # fmt: skip


def _places(use: Callable[[Tensor, Tensor], Tensor]) -> Body:
    """Positions looked up once for all rows, and then used in this way."""
    return _with(lambda s, x: use(x, s.e(torch.arange(x.shape[1]))), e=lambda: nn.Embedding(9, D))


def _norms(*scale: Callable[[Tensor], Tensor]) -> Body:
    """A scale that goes through a function."""
    return _with(lambda s, x: x * scale[0](s.scale), scale=(D,))


def _tables(use: Callable[[nn.Embedding, Tensor], Tensor], **options: Any) -> Body:
    """A table looked up by a number made of the input."""
    return _with(
        lambda s, x: x + use(s.e, (x.sum(-1) > 0).long() + (x[..., 0] > 0)), e=lambda: nn.Embedding(5, D, **options)
    )


EXACT: dict[str, Body] = {
    "W + 1 in a product": _with(lambda s, x: F.linear(x, s.w + 1), w=(D, D)),
    "W + W in a product": _with(lambda s, x: F.linear(x, s.w + s.w), w=(D, D)),
    "W scaled in a product": _with(lambda s, x: F.linear(x, s.w * 0.5, s.b), w=(D, D), b=(D,)),
    "transposed to itself": _with(lambda s, x: x @ s.w.transpose(1, 1), w=(D, D)),
    "turned twice": _with(lambda s, x: x @ s.w.t().t(), w=(D, D)),
    "a map and its transpose": _with(lambda s, x: F.linear(F.linear(x, s.w).tanh(), s.w.t()), w=(D, D)),
    "symmetric": _with(lambda s, x: x @ (s.w + s.w.t()), w=(D, D)),
    "a map of its own weight": _with(lambda s, x: F.linear(x, F.linear(s.w, s.v)), w=(D, D), v=(D, D)),
    "weight of a class of its own": _subclass_weight,
    "tied to Conv1D": _weight_tied_to_transpose,
    "bias is a scale": _bias_is_scale,
    "clamped scale": lambda: Norm(clamp=True),
    "gate first missing": lambda: Fn(lambda s, x: s.n(s.n(x), x.cos()), n=Norm()),
    "two ranks of input": lambda: Fn(lambda s, x: s.n(s.n(x).unsqueeze(2)).squeeze(2), n=Norm()),
    "max of a scale": _norms(lambda w: w.max()),
    "mean of a scale": _norms(lambda w: w.mean()),
    "scale over its norm": _norms(lambda w: w / w.norm()),
    "scale summed from the left": _norms(lambda w: w.cumsum(0)),
    "scale sorted": _norms(lambda w: w.sort().values),
    "scale turned round": _norms(lambda w: w.flip(0)),
    "scale by index": _norms(lambda w: w[torch.tensor([1, 0, 3, 2])]),
    "scale as a diagonal": _with(lambda s, x: x @ s.scale.diag(), scale=(D,)),
    "positions per head": _with(lambda s, x: (x.unflatten(2, (2, 2)) * s.h[:, None]).flatten(2), h=(2,)),
    "group norm": lambda: Fn(lambda s, x: s.n(x.transpose(1, 2)).transpose(1, 2), n=nn.GroupNorm(2, D)),
    "instance norm": lambda: Fn(
        lambda s, x: s.n(x.transpose(1, 2)).transpose(1, 2), n=nn.InstanceNorm1d(D, affine=True)
    ),
    "layer norm, no bias": lambda: nn.LayerNorm(D, bias=False),
    "layer norm, scale frozen": lambda: _frozen(nn.LayerNorm(D), "weight"),
    "batch norm at rest": lambda: Fn(
        lambda s, x: s.n.eval()(x.transpose(1, 2)).transpose(1, 2), n=nn.BatchNorm1d(D)
    ),
    "scale over time, no row": _with(lambda s, x: x * s.t[: x.shape[1]], t=(6, D)),
    "conv": lambda: _conv("1d"),
    "conv, two axes": lambda: _conv("2d"),
    "conv transposed": lambda: _conv("transposed"),
    "lstm cell": _with(_cells, cell=lambda: nn.LSTMCell(D, D)),
    "gru cell": _with(_cells, cell=lambda: nn.GRUCell(D, D)),
    "lstm": _with(lambda s, x: s.rnn(x)[0], rnn=lambda: nn.LSTM(D, D, batch_first=True)),
    "einsum by heads": _with(
        lambda s, x: torch.einsum("nthd,hde->nthe", x.unflatten(2, (2, 2)), s.w).flatten(2), w=(2, 2, 2)
    ),
    "bmm with a parameter": _with(lambda s, x: torch.bmm(x, s.w.expand(len(x), D, D)), w=(1, D, D)),
    "a matrix for each step": _with(
        lambda s, x: torch.bmm(x.transpose(0, 1), s.w[: x.shape[1]]).transpose(0, 1), w=(6, D, D)
    ),
    "addmm": _with(lambda s, x: torch.addmm(s.b, x.reshape(-1, D), s.w).view_as(x), w=(D, D), b=(D,)),
    "tensordot": _with(lambda s, x: torch.tensordot(x, s.w, ([2], [1])), w=(D, D)),
    "row wise outer": _with(lambda s, x: (x.unsqueeze(-1) * s.w).sum(2), w=(D, D)),
    "bag": lambda: Fn(
        lambda s, x: x + s.e((x > 0).long() + 1).unsqueeze(1) if x.dim() == 2 else x + torch.stack(
            [s.e((row > 0).long() + 1) for row in x.unbind(1)], 1), e=nn.EmbeddingBag(5, D, mode="sum")),
    "table with padding": _tables(lambda e, k: e(k), padding_idx=1),
    "table with a largest norm": _tables(lambda e, k: e(k), max_norm=0.5),
    "scatter": _with(
        lambda s, x: x + torch.zeros_like(x).scatter_add(2, (x > 0).long(), x * s.w), w=(D,)
    ),
    "straight through": _with(lambda s, x: Through.apply(x, s.w), w=(D,)),
    "in place": _with(_in_place, a=_lin, shift=(D,), scale=(D,)),
    "dropout": lambda: Fn(lambda s, x: s.d(s.a(s.d(x))), a=_lin(), d=nn.Dropout(0.3)),
    "dropout in a looped module": _with(lambda s, x: F.dropout(torch.einsum("ntd,de->nte", x, s.w), 0.3), w=(D, D)),
    "used twice, once for nothing": _with(_unused_forward, a=_lin),
    "checkpoint in a checkpoint": lambda: Fn(
        lambda s, x: checkpoint(
            lambda y: s.n(checkpoint(s.a, y, use_reentrant=False)) + y, x, use_reentrant=False
        ), a=_lin(), n=nn.RMSNorm(D)),
    "a scale in two places": lambda: _twice(),
    "gradient stopped": _with(lambda s, x: s.a(x.detach()) + x * (s.w - s.w.detach() + 1), a=_lin, w=(D,)),
    "waves": _with(lambda s, x: torch.fft.irfft(torch.fft.rfft(x, dim=2) * torch.view_as_complex(s.w), n=D, dim=2),
                   w=(3, 2)),
    "quantised with scales and LoRA": Quantised,
    "LoRA merged": lambda: _lora("merged"),
    "DoRA": lambda: _lora("dora"),
    "IA3": lambda: _lora("ia3"),
    "VeRA": lambda: _lora("vera"),
    "LoKr": lambda: _lora("kron"),
    "LoHa": lambda: _lora("hadamard"),
    "learned slopes": lambda: Attention("slope"),
    "learned temperature": lambda: Attention("scale"),
    "positions": _places(lambda x, place: x + place),
    "positions with a row of one": _places(lambda x, place: x + place[None]),
    "positions for all rows": _places(lambda x, place: x + place.unsqueeze(0).expand(len(x), -1, -1)),
    "positions repeated": _places(lambda x, place: x + place.repeat(len(x), 1, 1)),
    "a learned prompt": _with(
        lambda s, x: x + s.prompt.expand(len(x), -1, -1).cumsum(1).mean(1, keepdim=True), prompt=(3, D)
    ),
    "a row of its own": _with(lambda s, x: x * s.w[: len(x)], w=(4, 1, D)),
    "scales its input in place": _with(lambda s, x: x.mul_(s.w), w=(D,)),
    "a branch by mode": lambda: Norm(by_mode=True).eval(),
}  # fmt: skip
"""with unknown='loop' these must come out exactly"""

EITHER: dict[str, Body] = {
    "two rows swapped": _with(_swapped, a=_lin),
    "two rows swapped, norm": _with(_swapped, a=Norm),
    "batch sorted": _with(_sorted, a=_lin),
    "time first": _with(_time_first, a=_lin),
    "time first, norm": _with(_time_first, a=lambda: nn.LayerNorm(D)),
    "time first, own norm": _with(_time_first, a=Norm),
    "time first, recurrent": _with(
        lambda s, x: s.rnn(x.transpose(0, 1))[0].transpose(0, 1), rnn=lambda: nn.GRU(D, D)
    ),
    "time first, conv": lambda: _conv("time first"),
    "minus the batch's mean": _with(lambda s, x: s.a(x - x.mean(0)), a=_lin),
    "attention over rows": _with(_across, qkv=lambda: _lin(3 * D)),
    "rows in pairs": _with(lambda s, x: s.a(x.reshape(1, -1, D)).view_as(x), a=_lin),
    "rows as features": _with(
        lambda s, x: (x.permute(1, 2, 0) @ s.w[: len(x), : len(x)]).permute(2, 0, 1), w=(4, 4)
    ),
    "one row only": _with(lambda s, x: torch.cat([s.a(x[:1]), x[1:]]), a=_lin),
    "twice in rows": _with(_twice_in_rows, a=_lin),
    "weight norm": lambda: parametrizations.weight_norm(_lin()),
    "weight norm of old": lambda: nn.utils.weight_norm(_lin()),
    "weight norm of old, no bias": lambda: nn.utils.weight_norm(_lin(bias=False)),
    "spectral norm": lambda: parametrizations.spectral_norm(_lin()),
    "pruned": lambda: prune.random_unstructured(_lin(), "weight", 0.3),
    "scaled by parametrization": lambda: (
        lambda layer: (parametrize.register_parametrization(layer, "weight", Scaled()), layer)[1]
    )(_lin()),
    "row of a gate is a scale": _row_is_scale,
    "recurrent, only biases": lambda: Fn(
        lambda s, x: s.rnn(x)[0], rnn=_frozen(nn.GRU(D, D, batch_first=True), "weight_ih_l0", "weight_hh_l0")
    ),
    "gradient coupled": _with(lambda s, x: Coupled.apply(s.a(x)), a=_lin),
    "gradient coupled in a loop": _with(lambda s, x: Coupled.apply(x @ s.w.softmax(0)), w=(D, D)),
    "table by frequency": _tables(lambda e, k: e(k), scale_grad_by_freq=True),
    "batch norm": lambda: Fn(lambda s, x: s.n(x.transpose(1, 2)).transpose(1, 2), n=nn.BatchNorm1d(D)),
    "experts choose": lambda: Mixture("expert"),
    "chunks of rows": _with(lambda s, x: torch.cat([s.a(part) for part in x.split(2)]), a=_lin),
    "a scale for all rows, summed": _with(lambda s, x: x + s.a(s.w.expand(1, 2, D)).sum(1), a=_lin, w=(D,)),
    "table, rows by index_select": _tables(lambda e, k: e.weight.index_select(0, k.flatten()).view(*k.shape, D)),
    "table, one hot": _tables(lambda e, k: F.one_hot(k, 5).to(e.weight.dtype) @ e.weight),
    "table, gathered": _tables(
        lambda e, k: e.weight.expand(*k.shape, 5, D).gather(2, k[..., None, None].expand(*k.shape, 1, D)).squeeze(2)
    ),
    "relative positions": lambda: Attention("relative"),
    "tokens to one expert, with capacity": lambda: Mixture("token"),
    "rows that are live": _with(_live, a=_lin),
    "positions in a product": _places(lambda x, place: x + (x @ place.t()).softmax(-1) @ place),
    "positions with dropout": _places(lambda x, place: x + F.dropout(place, 0.4)),
    "loops, and scales its input in place": _with(lambda s, x: x.mul_(1.5) @ s.w.softmax(0), w=(D, D)),
}  # fmt: skip
"""these may be refused by name"""


# --- what is right ----------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def tokens(n: int, steps: int) -> Tensor:
    """Rows that repeat themselves more or less, so that their norms differ."""
    token = torch.randint(VOCABULARY, (n, steps), generator=torch.Generator().manual_seed(n))
    return torch.stack([row[torch.arange(steps) % (1 + i % steps)] for i, row in enumerate(token)])


def given(body: Body, shape: tuple[int, int]) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    model = Net(body()).double()
    return (
        model,
        tokens(*shape),
        (torch.arange(shape[1]) >= 1).double().expand(shape),
        torch.linspace(-1, 1.3, shape[0]).double(),
    )


Answer = tuple[Tensor, Tensor, list[Tensor], list[Tensor]]


def truth(model: nn.Module, token: Tensor, mask: Tensor, c: Tensor) -> Answer:
    """Log-probabilities, norms, gradient and buffers of a model that no tape has seen."""
    params = [p for p in model.parameters() if p.requires_grad]
    torch.manual_seed(1)
    out = model(token)
    norm, gradient = score_sq_norms_loop(out, mask, params), weighted_gradient_loop(out, mask, c, params)
    return out.detach(), norm, gradient, [b.clone() for b in model.buffers()]


def taped(model: nn.Module, token: Tensor, mask: Tensor, c: Tensor, affine: bool, **options: Any) -> Answer:
    v = 1 + c.square()
    line = (c + 0.3 * v, v) if affine else None
    with ScoreTape(model, **options) as tape:
        torch.manual_seed(1)
        out = model(token)
        norm = tape.score_sq_norms(out, mask, affine=line)
        tape.backward(c)
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters() if p.requires_grad]
    return out.detach(), norm, grads, list(model.buffers())


def same(ours: Answer, twin: Answer) -> str:
    """What differs, or nothing."""
    if not torch.equal(ours[0], twin[0]):
        return "another forward"
    if near(twin[1], allow=SUMMED, scale=float(twin[1].abs().max())) != ours[1]:
        return f"norms {ours[1].tolist()}, not {twin[1].tolist()}"
    scale = max(float(g.abs().max()) for g in twin[2] if g.numel())
    if not all(near(b, allow=SUMMED, scale=scale) == a for a, b in zip(ours[2], twin[2], strict=True) if b.numel()):
        return "gradient"
    return "" if all(torch.equal(a, b) for a, b in zip(ours[3], twin[3], strict=True)) else "buffers"


def followed(refusal: str) -> dict[str, Any]:
    """The options that a refusal, one line, asks for."""
    assert "\n" not in refusal
    named = re.search(r"loop=\[(.*?)\]", refusal)
    if named:
        return {"unknown": "loop", "loop": re.findall(r"'(\w+)'", named[1])}
    if "unknown='loop'" in refusal:
        return {"unknown": "loop"}
    assert "method='loop'" in refusal, refusal
    return {"method": "loop"}


def obedient(answer: Callable[..., Answer], **options: Any) -> tuple[Answer, list[str]]:
    """The answer after as many refusals as there are, each followed; and what they said."""
    told: list[str] = []
    for _ in range(5):
        try:
            return answer(**options), told
        except InputError as error:
            told.append(str(error))
            options = followed(told[-1])
    raise AssertionError(f"no advice of these works: {told}")


def right_or_refused(case_of: Callable[[], tuple[nn.Module, Tensor, Tensor, Tensor]], **options: Any) -> list[str]:
    """What refusals said until they were obeyed, with general and with affine coefficients; the answers are right."""
    twin, said = truth(*case_of()), list[str]()
    for affine in (False, True):
        found, told = obedient(lambda affine=affine, **more: taped(*case_of(), affine, **more), **options)
        assert not same(found, twin), told
        said += told
    return said


@pytest.mark.parametrize("shape", [SQUARE, LONG], ids=["square", "long"])
@pytest.mark.parametrize("case", [*EXACT, *EITHER])
def test_exact_or_refused_with_advice_that_works(case: str, shape: tuple[int, int]) -> None:
    told = right_or_refused(lambda: given((EXACT | EITHER)[case], shape), unknown="loop")
    assert case in EITHER or not told, told


# --- not a module alone -----------------------------------------------------------------------------------------------


def _clipped(s: Any, x: Tensor) -> Tensor:
    y = s.a(x) * 1.0
    y.register_hook(lambda g: g / g.norm().clamp(min=1e-3))
    return y


def test_a_backward_that_is_not_linear_is_refused() -> None:
    """No per-trajectory gradients add up to its gradient, so no method has an answer."""
    for options in ({}, {"unknown": "loop"}, {"method": "loop"}):
        with pytest.raises(InputError, match=r"by autograd"):
            taped(*given(_with(_clipped, a=_lin), SQUARE), False, **options)


ONE_THEN_MANY = ["W + 1 in a product", "mean of a scale", "clamped scale", "scale turned round", "conv", "LoRA merged"]
PACKED = ["in place", "positions", "clamped scale", "conv", "gru cell", "LoRA merged", "a map and its transpose", "IA3"]
AUTOCAST = [
    "layer norm, no bias",
    "clamped scale",
    "in place",
    "LoRA merged",
    "conv",
    "W + 1 in a product",
    "positions",
]


@pytest.mark.parametrize("case", ONE_THEN_MANY)
def test_one_trajectory_and_then_many(case: str) -> None:
    """What a module may do with one row says nothing of several."""
    model, token, mask, c = given(EXACT[case], SQUARE)
    taped(model, token[:1], mask[:1], c[:1], False, unknown="loop")
    model.zero_grad()
    twin = truth(*given(EXACT[case], SQUARE))
    assert same(taped(model, token, mask, c, True, unknown="loop", verify="never"), twin) in ("", "buffers")


def test_a_module_that_changes_its_ways_with_the_mode() -> None:
    model, *rest = given(lambda: Norm(by_mode=True), SQUARE)
    taped(model, *rest, False)
    model.zero_grad()
    model.eval()
    found = taped(model, *rest, False, unknown="loop", verify="never")
    fresh, *_ = given(lambda: Norm(by_mode=True), SQUARE)
    assert same(found, truth(fresh.eval(), *rest)) in ("", "buffers")


@pytest.mark.parametrize("case", PACKED)
def test_packed(case: str) -> None:
    """Two rows of steps, three trajectories in them; the sum over the past is cut nowhere, so only rows tell."""
    model, _, _, c = given(EXACT[case], SQUARE)
    token = tokens(1, 9)
    mask = torch.ones(1, 9).double()
    mask[:, [0, 3, 7]] = 0
    segment = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2]])
    model = Apart(model, segment)
    params = [p for p in model.parameters() if p.requires_grad]
    out = model(token)
    norm = score_sq_norms_loop(out, mask, params, segment=segment)
    twin = weighted_gradient_loop(out, mask, c[:3], params, segment=segment)
    refused = []
    options: dict[str, Any] = {"unknown": "loop"}
    for _ in range(4):
        model.zero_grad()
        try:
            with ScoreTape(model, **options) as tape:
                again = model(token)
                found = tape.score_sq_norms(again, mask, segment=segment)
                tape.backward(c[:3])
            break
        except InputError as error:
            refused.append(str(error))
            options = followed(refused[-1])
    assert not same((again, found, [p.grad for p in params], []), (out, norm, twin, [])), refused


class Apart(nn.Module):
    """A packed row through a model whose sum over the past stops where a trajectory does."""

    def __init__(self, net: nn.Module, segment: Tensor) -> None:
        super().__init__()
        self.net, self.segment = net, segment

    def forward(self, token: Tensor) -> Tensor:
        x = self.net.embed(token)
        start = F.pad(self.segment[0, 1:] != self.segment[0, :-1], (1, 0), value=True).nonzero().flatten().tolist()
        parts = [x[:, a:b].cumsum(1) for a, b in zip(start, [*start[1:], x.shape[1]], strict=True)]
        logits = self.net.head(self.net.body(torch.cat(parts, 1).sin()))
        return F.pad(logits[:, :-1].log_softmax(-1).gather(2, token[:, 1:, None]).squeeze(2), (1, 0))


@pytest.mark.parametrize("joined", [lambda m, a, b: m(a) + 0.5 * m(b), lambda m, a, b: torch.cat([m(a[:2]), m(a[2:])])])
def test_two_forwards_in_one_step(joined: Callable[[nn.Module, Tensor, Tensor], Tensor]) -> None:
    """The sum of two passes over the model is exact, and so are two halves of a batch."""
    model, token, mask, c = given(_lin, SQUARE)
    other, params = tokens(5, 4)[:4], list(model.parameters())
    out = joined(model, token, other)
    twin = (out, score_sq_norms_loop(out, mask, params), weighted_gradient_loop(out, mask, c, params), [])
    with ScoreTape(model) as tape:
        again = joined(model, token, other)
        norm = tape.score_sq_norms(again, mask)
        tape.backward(c)
    assert not same((again, norm, [p.grad for p in params], []), twin)


def test_some_parameters_of_another() -> None:
    """functional_call with a head of its own: the norms are of what is left of the model."""
    model, token, mask, _ = given(_lin, SQUARE)
    head = {"head.weight": model.head.weight.detach().clone().requires_grad_()}
    own = [p for name, p in model.named_parameters() if not name.startswith("head")]

    def call() -> Tensor:
        return torch.func.functional_call(model, head, (token,))

    out = call()
    expected = score_sq_norms_loop(out, mask, own)
    with ScoreTape(model) as tape:
        try:
            norm = tape.score_sq_norms(call(), mask, keep=False)
        except InputError as error:
            assert "head" in str(error)  # noqa: PT017
        else:
            assert_near(norm, expected)


class Reversed(torch.autograd.Function):
    """A layer that is run again in its backward, where its gradients go straight to the parameters."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: nn.Module) -> Tensor:
        ctx.layer, ctx.x = layer, x.detach()
        return layer(x).detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        with torch.enable_grad():
            x = ctx.x.requires_grad_()
            torch.autograd.backward(ctx.layer(x), grad)
        return x.grad, None


@pytest.mark.parametrize("options", [{}, {"unknown": "loop", "loop": ["Fn"]}, {"method": "loop"}])
def test_gradients_behind_autograds_back_are_refused(options: dict[str, Any]) -> None:
    model, *rest = given(_with(lambda s, x: Reversed.apply(x, s.a), a=_lin), SQUARE)
    with pytest.raises(InputError, match=r"body\.a\.weight: (an operator of the model adds to p\.grad|used outside)"):
        taped(model, *rest, False, **options)
    assert all(p.grad is None for p in model.parameters())


def test_sparse_gradients_are_refused_by_name() -> None:
    with pytest.raises(InputError, match=r"body\.e has sparse gradients.*sparse=False"):
        taped(*given(_tables(lambda e, k: e(k), sparse=True), SQUARE), False, method="loop")


def test_complex_parameters_are_refused_by_name() -> None:
    body = _with(lambda s, x: x + torch.fft.irfft(torch.fft.rfft(x, dim=2) * s.w, n=D, dim=2), w=(3,))
    model, token, mask, c = given(body, SQUARE)
    model.body.w = nn.Parameter(torch.complex(_p(3).double(), _p(3).double()))
    with pytest.raises(InputError, match=r"body\.w.*complex"):
        taped(model, token, mask, c, False, unknown="loop")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", AUTOCAST)
def test_autocast_is_the_models_own(case: str, dtype: torch.dtype) -> None:
    """Same bits forward; norms as a backward per trajectory through the same forward has them, to its precision."""
    model, token, mask, c = given(EXACT[case], LONG)
    model, c = model.float(), c.float()
    params = list(model.parameters())
    with torch.autocast("cpu", dtype):
        out = model(token)
        expected = score_sq_norms_loop(out, mask, params)
        with ScoreTape(model, unknown="loop", verify="always") as tape:
            again = model(token)
            assert torch.equal(again, out)
            norm = tape.score_sq_norms(again, mask)
            tape.backward(c)
    assert_near(norm.float(), expected.float(), allow=BRAIN)


def test_a_scale_in_two_places_takes_no_loop() -> None:
    model, token, mask, c = given(_twice, SQUARE)
    with ScoreTape(model, unknown="error") as tape:
        tape.score_sq_norms(model(token), mask)
        tape.backward(c)
    assert not tape.loops


# --- the check --------------------------------------------------------------------------------------------------------


def test_a_wrong_rule_of_a_node_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain gradients through the taped graph would be wrong in the same way: the model alone tells."""
    real = layers.matrix
    monkeypatch.setattr(layers, "matrix", lambda twin, x, w, b, value, *rest: real(twin, x, w, b, 1.01 * value, *rest))
    with pytest.raises(InputError, match=r"by autograd"):
        taped(*given(_lin, SQUARE), False)


@pytest.mark.parametrize("seed", range(4))
def test_two_rows_among_others_are_seen_whichever_is_looked_at(seed: int) -> None:
    with pytest.raises(InputError, match=r"by autograd"):
        taped(*given(EITHER["two rows swapped"], SQUARE), False, seed=seed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("affine", [False, True])
def test_trajectories_that_cancel_are_no_alarm(affine: bool, dtype: torch.dtype) -> None:
    """The same trajectory n times with coefficients that add up to nothing: the gradient is all rounding."""
    model, token, mask, _ = given(lambda: nn.Sequential(_lin(), nn.LayerNorm(D), _lin()), LONG)
    same_row, c = token[1:2].expand(6, -1), torch.tensor([0.3, -0.7, 1.1, -0.2, 0.9, -1.4])
    model, mask = model.to(dtype), mask[:1].expand(6, -1).to(dtype)
    for seed in range(5):
        model.zero_grad()
        taped(model, same_row, mask, c, affine, verify="always", seed=seed)


def test_dropout_and_the_model_alone_differ_without_alarm() -> None:
    for p in (0.02, 0.5):
        model, *rest = given(lambda p=p: nn.Sequential(_lin(), nn.Dropout(p), _lin()), LONG)  # type: ignore[misc]
        assert not same(taped(model, *rest, False, verify="always"), truth(model, *rest))
