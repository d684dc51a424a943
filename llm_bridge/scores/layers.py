"""Layers that report per-trajectory score gradients while autograd walks through them.

`ScoreTape` replaces the `forward` of every leaf module it knows by a twin from this file. The twin computes the same
output; in the backward it returns the input's gradient to autograd and hands the weight's operands to the tape's
`Pass` instead of summing them over trajectories. When no pass is under way (an auxiliary loss, a second backward
after the norms) it returns the ordinary weight gradient, so nothing else in a training script has to know.

Known by what they do, not by their names: `nn.Linear`, `nn.Embedding`, GPT-2's `Conv1D`, `nn.LayerNorm`, and any
`*RMSNorm` that a probe on random input shows to be w * x / rms(x) or (1 + w) * x / rms(x).
"""

import copy
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm_bridge.scores.layout import Layout, Operands

# Functions keep the parameter itself beside the saved tensor: under checkpointing the saved one is an alias.
Forward = Callable[..., Tensor]


class Pass(Protocol):
    """What a layer reports to: one backward for score norms."""

    layout: Layout

    def matrix(self, name: str, weight: nn.Parameter, operands: Operands, transposed: bool) -> None: ...

    def vector(self, name: str, param: nn.Parameter, grad: Tensor) -> None: ...

    def embedding(self, name: str, weight: nn.Parameter, token: Tensor, grad: Tensor, padding: int | None) -> None: ...


class Recorder(Protocol):
    """The tape as its layers see it."""

    @property
    def running(self) -> Pass | None: ...

    def embeds(self, weight: nn.Parameter, token: Tensor) -> None: ...


def twin_forward(module: Any, name: str, tape: Recorder) -> Forward | None:
    """The reporting replacement of `module.forward`, or None if its parameters cannot be told per trajectory."""
    kind = type(module).forward
    if "forward" in module.__dict__ or not {n for n, _ in module.named_parameters(recurse=False)} <= {"weight", "bias"}:
        return None
    if kind is nn.Linear.forward:
        return _matrix_twin(module, name, tape, transposed=False)
    if any(c.__name__ == "Conv1D" for c in type(module).__mro__) and hasattr(module, "nf"):
        return _matrix_twin(module, name, tape, transposed=True)
    if kind is nn.Embedding.forward:
        return _embedding_twin(module, name, tape)
    if kind is nn.LayerNorm.forward:
        return _layer_norm_twin(module, name, tape)
    if type(module).__name__.endswith("RMSNorm"):
        return _rms_norm_twin(module, name, tape)
    return None


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype autocast would give a matrix product's operands, or None."""
    device = x.device.type
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


# --- linear maps ------------------------------------------------------------------------------------------------------


class _Matrix(torch.autograd.Function):
    """y = x W^T + b (transposed: x W + b)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        tape: Recorder,
        name: str,
        transposed: bool,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.weight, ctx.bias, ctx.tape, ctx.name, ctx.transposed = weight, bias, tape, name, transposed
        return F.linear(x, weight.t() if transposed else weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        ask_x, ask_weight, ask_bias = ctx.needs_input_grad[:3]
        with torch.autocast(grad.device.type, enabled=False):
            matrix = (weight.t() if ctx.transposed else weight).to(grad.dtype)
            running = ctx.tape.running
            if running is None:
                grad_x = grad @ matrix if ask_x else None
                return grad_x, *_matrix_grads(ctx, x, grad, ask_weight, ask_bias), None, None, None
            live = Operands.of(running.layout, ctx.name, grad, x.detach())
            grad_x = live.spread(live.grad @ matrix).view(x.shape) if ask_x else None
            if ask_weight:
                running.matrix(ctx.name, ctx.weight, live, ctx.transposed)
            if ask_bias:
                running.vector(ctx.name, ctx.bias, grad)
        return grad_x, None, None, None, None, None


def _matrix_grads(
    ctx: Any, x: Tensor, grad: Tensor, ask_weight: bool, ask_bias: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The ordinary gradients of weight and bias, in their own dtypes."""
    left, right = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
    pair = (right, left) if ctx.transposed else (left, right)
    weight = (pair[0].t() @ pair[1]).to(ctx.weight.dtype) if ask_weight else None
    return weight, left.sum(0).to(ctx.bias.dtype) if ask_bias else None


def _matrix_twin(module: Any, name: str, tape: Recorder, transposed: bool) -> Forward:
    original = module.forward

    def forward(x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return original(x)
        dtype = autocast_dtype(x)
        x = x if dtype is None else x.to(dtype)
        return _Matrix.apply(x, module.weight, module.bias, tape, name, transposed)

    return forward


# --- embeddings -------------------------------------------------------------------------------------------------------


class _Embedding(torch.autograd.Function):
    """y_t = W[token_t]; the row of `padding` gets no gradient."""

    @staticmethod
    def forward(
        ctx: Any, weight: nn.Parameter, token: Tensor, padding: int | None, tape: Recorder, name: str
    ) -> Tensor:
        ctx.save_for_backward(weight, token)
        ctx.weight, ctx.padding, ctx.tape, ctx.name = weight, padding, tape, name
        return F.embedding(token, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, token = ctx.saved_tensors
        if ctx.tape.running is not None:
            ctx.tape.running.embedding(ctx.name, ctx.weight, token, grad, ctx.padding)
            return None, None, None, None, None
        padding = -1 if ctx.padding is None else ctx.padding
        dense = torch.ops.aten.embedding_dense_backward(grad, token, weight.shape[0], padding, False)
        return dense, None, None, None, None


def _embedding_twin(module: Any, name: str, tape: Recorder) -> Forward | None:
    if module.max_norm is not None or module.scale_grad_by_freq or module.sparse:
        return None
    original = module.forward

    def forward(token: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return original(token)
        tape.embeds(module.weight, token)
        return _Embedding.apply(module.weight, token, module.padding_idx, tape, name)

    return forward


# --- normalizations ---------------------------------------------------------------------------------------------------


class _LayerNorm(torch.autograd.Function):
    """y = w (x - mean) / sd + b over the last axis, by the library's own kernels."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: nn.Parameter, bias: nn.Parameter | None, eps: float, tape: Recorder, name: str
    ) -> Tensor:
        y, mean, inverse = torch.native_layer_norm(x, x.shape[-1:], weight, bias, eps)
        ctx.save_for_backward(x, weight, mean, inverse)
        ctx.weight, ctx.bias, ctx.tape, ctx.name = weight, bias, tape, name
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, inverse = ctx.saved_tensors
        ask_x, ask_weight, ask_bias = ctx.needs_input_grad[:3]
        sums = ctx.tape.running is None
        grad_x, grad_weight, grad_bias = torch.ops.aten.native_layer_norm_backward(
            grad, x, x.shape[-1:], mean, inverse, weight, ctx.bias, [ask_x, ask_weight and sums, ask_bias and sums]
        )
        if not sums and ask_weight:
            ctx.tape.running.vector(ctx.name, ctx.weight, grad * ((x - mean) * inverse))
        if not sums and ask_bias:
            ctx.tape.running.vector(ctx.name, ctx.bias, grad)
        return grad_x, grad_weight, grad_bias, None, None, None


def _layer_norm_twin(module: Any, name: str, tape: Recorder) -> Forward | None:
    if len(tuple(module.normalized_shape)) != 1 or module.weight is None:
        return None
    original = module.forward

    def forward(x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return original(x)
        x = x if autocast_dtype(x) is None else x.float()  # autocast normalizes in float32
        return _LayerNorm.apply(x, module.weight, module.bias, module.eps, tape, name)

    return forward


class _RMSNorm(torch.autograd.Function):
    """y = (offset + w) h with h = x / sqrt(mean(x^2) + eps) computed in `inner`; cast back before or after w."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: nn.Parameter,
        offset: int,
        eps: float,
        inner: torch.dtype,
        tape: Recorder,
        name: str,
    ) -> Tensor:
        wide = x.to(inner)
        inverse = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, inverse)
        ctx.weight, ctx.offset, ctx.tape, ctx.name = weight, offset, tape, name
        if offset:
            return (wide * inverse * (offset + weight.to(inner))).to(x.dtype)
        return weight * (wide * inverse).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        ask_x, ask_weight = ctx.needs_input_grad[:2]
        inner = inverse.dtype
        unit = x.to(inner) * inverse
        grad = grad.to(inner)
        score = grad * unit
        grad_x = None
        if ask_x:
            scale = weight.to(inner) + ctx.offset
            # score @ scale is the mean's numerator: sum_d grad_d w_d h_d, without a third elementwise pass
            mean = (score @ scale / x.shape[-1]).unsqueeze(-1)
            grad_x = torch.addcmul(grad * scale, unit, mean, value=-1).mul_(inverse).to(x.dtype)
        if ask_weight and ctx.tape.running is not None:
            ctx.tape.running.vector(ctx.name, ctx.weight, score)
        elif ask_weight:
            return grad_x, score.flatten(0, -2).sum(0).to(weight.dtype), *[None] * 5
        return grad_x, None, *[None] * 5


def _rms_norm_twin(module: Any, name: str, tape: Recorder) -> Forward | None:
    form = rms_form(module)
    if form is None:
        return None
    original, (offset, inner, eps) = module.forward, form

    def forward(x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return original(x)
        wide = torch.promote_types(x.dtype, torch.float32) if inner is None else inner
        return _RMSNorm.apply(x, module.weight, offset, eps, wide, tape, name)

    return forward


RmsForm = tuple[int, torch.dtype | None, float]
_FORMS: dict[tuple[object, ...], RmsForm | None] = {}


def rms_form(module: nn.Module) -> RmsForm | None:
    """(offset, inner dtype or None for the input's, eps) for which the twin equals `module` on random input, else None.

    Most RMS norms compute in float32 whatever they are given, which for float64 models is a difference the probe
    sees.
    """
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 1 or getattr(module, "bias", None) is not None:
        return None
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    eps = torch.finfo(weight.dtype).eps if eps is None else float(eps)
    key = (type(module).forward, weight.dtype, weight.device, eps)
    if key not in _FORMS:
        _FORMS[key] = _probe(module, weight, eps)
    return _FORMS[key]


@torch.no_grad()
def _probe(module: nn.Module, weight: Tensor, eps: float) -> RmsForm | None:
    generator = torch.Generator().manual_seed(0)
    x, weight = (
        torch.randn(*shape, weight.shape[0], generator=generator, dtype=torch.float64).to(weight.device, weight.dtype)
        for shape in ((2, 3), ())
    )
    stand_in = copy.copy(module)  # with a weight of its own: the module's may be sharded, or all ones
    stand_in._parameters = {"weight": nn.Parameter(weight)}
    expected = type(module).forward(stand_in, x)
    for offset in (0, 1):
        for inner in (None, torch.float32):
            wide = torch.promote_types(x.dtype, torch.float32) if inner is None else inner
            ours = _RMSNorm.apply(x, weight, offset, eps, wide, None, "")
            if torch.allclose(ours, expected, rtol=8 * torch.finfo(x.dtype).eps, atol=1e-12):
                return offset, inner, eps
    return None
