"""Modules that report per-trajectory score gradients while autograd walks through them.

Inside a tape the `forward` of every module that holds trainable parameters is a `Twin`. A twin never computes the
output itself: it calls the module's own forward, so that log-probabilities are the model's, bit for bit. What it adds
is a node in the autograd graph that sees the output gradient and, when a pass is under way, hands it to the tape
instead of summing it over trajectories. Outside a pass (an auxiliary loss, a second backward, the check against plain
autograd) every node returns the ordinary gradient. In order of cost:

    Matrix   W x + b (`nn.Linear`, GPT-2's `Conv1D`) and F.linear anywhere inside a module: output gradient and input
    Lookup   an embedding, and F.embedding anywhere inside a module: output gradient and tokens
    Unit     torch's fused norms, scale * unit(x) + shift: output gradient times the unit, recomputed without a scale
    Own      any other module, run on parameters spread over positions: where a parameter acts elementwise, its
             gradient at a position is then its own gradient there. Holds for RMS norms in every form, gates, scales
             (`plan`)
    Local    whatever is left (experts, convolutions, mixers): a backward per trajectory through this module alone
             (`inner`)
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, NoReturn, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree

from llm_bridge.scores.chunks import Piece, Place
from llm_bridge.scores.layout import WHOLE_LOOP, Layout, Operands, flat, live_rows
from vcposim.errors import InputError

# Functions keep the parameter itself beside the saved tensor: under checkpointing the saved one is an alias. `uses`
# are the kinds of use of parameters that a node reports, `lead` the axes before the features: those of one pass are
# read off its graph (`score_pass.Uses`).


class Pass(Protocol):
    """What a layer reports to: one backward for score norms."""

    layout: Layout

    def covers(self, place: Place | None) -> bool:
        """Whether a node made at `place` is of the graph that is walked, and not of one that a hook walks meanwhile."""

    def operands(self, name: str, grad: Tensor, x: Tensor) -> Operands:
        """What `matrix` is to be told of a map's `grad` (..., out) and `x` (..., into)."""

    def matrix(self, name: str, weight: nn.Parameter, operands: Operands, transposed: bool) -> None:
        """One use of a weight matrix in a product, or of its transpose: the pair whose product is the gradient."""

    def vector(self, name: str, param: nn.Parameter, grad: Tensor, place: Place | None) -> None:
        """One use of a bias or a scale: `grad` (rows, *param) has its gradient a position."""

    def embedding(
        self,
        name: str,
        weight: nn.Parameter,
        token: Tensor,
        grad: Tensor,
        padding: int | None,
        place: Place | None,
    ) -> None:
        """One look-up: `grad` (..., width) belongs to row `token` of the weight, that of `padding` to none."""

    def told(self, kind: str, name: str, param: nn.Parameter, grad: Tensor) -> bool:
        """Whether the rows of an output gradient `grad` (...) are all trajectories'; else it goes to `later`."""

    def later(self, kind: str, param: nn.Parameter, piece: Piece) -> None:
        """One use, "matrix", "vector" or "embedding", by some of the rows."""

    def local(self, name: str, inner: Any, grad: Sequence[Tensor | None]) -> list[Tensor | None]:
        """One module run as a whole, given the gradients of its outputs; returns those of its inputs."""


class Recorder(Protocol):
    """The tape as its layers see it."""

    unknown: str
    inside: int
    """how many modules are being run as a whole: their parts stay ordinary"""
    batch: tuple[int, ...]
    """(row, time) of the model's input, () if unknown"""

    @property
    def running(self) -> Pass | None:
        """The backward for score norms under way; None in an ordinary one, where layers add gradients as usual."""

    def holds(self, param: object) -> bool:
        """Whether a parameter's score is on the tape."""

    def place(self) -> Place | None:
        """When the call under way is made; None while a backward runs it again."""

    def looped(self, name: str) -> None:
        """Notes that this module costs a loop over trajectories."""

    def advice(self, name: str) -> str:
        """What to do about a module of which trajectories cannot be told."""


class Twin:
    """Stands in for the forward of one module while a tape is open."""

    def __init__(self, module: Any, name: str, tape: Recorder) -> None:
        self.module, self.name, self.tape = module, name, tape
        self.original: Callable[..., Any] = module.forward
        parts = module.modules() if module._modules else ()
        self._lent = {id(p) for part in parts if part is not module for p in part._parameters.values()}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward wherever nothing is to be recorded, else `taped`.

        Raises `InputError` inside a transform of torch.func, and for nested tensors.
        """
        if self.tape.inside or not torch.is_grad_enabled() or not all(map(self.tape.holds, self.own().values())):
            return self.original(*args, **kwargs)
        if is_transformed():
            raise InputError(
                f"{self.name}: called inside a transform of torch.func (vmap, jvp, ...), which hides its gradients; "
                f"{self.tape.advice(self.name)}"
            )
        if args and isinstance(args[0], Tensor) and args[0].is_nested:
            raise InputError(
                f"{self.name}: sees a nested tensor, whose rows the tape does not follow; give it padded rows, or "
                f"{self.tape.advice(self.name)}"
            )
        return self.taped(*args, **kwargs)

    def running(self, place: Place | None) -> Pass | None:
        """The pass to which a node made at `place` is to report; None in an ordinary backward."""
        running = self.tape.running
        return running if running is not None and running.covers(place) else None

    def own(self) -> dict[str, nn.Parameter]:
        """Trainable parameters of the module itself, as they are now; a head's bias that its decoder holds is not."""
        held = self.module._parameters.items()
        return {k: p for k, p in held if p is not None and p.requires_grad and id(p) not in self._lent}

    def taped(self, *args: Any, **kwargs: Any) -> Any:
        """The forward that records: same outputs as the original, one method a kind of layer."""
        raise NotImplementedError

    def _refuse_copy(self, *_: object) -> NoReturn:
        raise InputError(
            f"{self.name}: copied or pickled while a ScoreTape is open, and the copy would compute with the original's "
            "parameters; copy before the `with` or after it"
        )

    __deepcopy__ = __reduce_ex__ = __copy__ = _refuse_copy  # type: ignore[assignment]


def refuse_second_order(twin: Twin) -> None:
    """Raise InputError in a backward that is itself to be differentiated: a node's own backward hides the weight."""
    if torch.is_grad_enabled():
        raise InputError(
            f"{twin.name}: its gradient is taken with create_graph=True inside the model, which the tape does not "
            f"differentiate; {WHOLE_LOOP}"
        )


def is_plain(p: Tensor) -> bool:
    """Whether functions of a parameter are torch's, not those of a class of its own (whose shards are whole again)."""
    return type(p) in (Tensor, nn.Parameter) or isinstance(p, DTensor)


def is_transformed() -> bool:
    """Whether code runs inside a transform of torch.func, where an autograd.Function of one's own may not."""
    return torch._C._are_functorch_transforms_active()  # type: ignore[attr-defined,no-any-return]


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype autocast would give a matrix product's operands, or None."""
    device = x.device.type
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def without_autocast(device: str) -> AbstractContextManager[Any]:
    """Inside, nothing is cast; entered at no cost where nothing is anyway."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else _NOTHING


_NOTHING = nullcontext()


# --- linear maps ------------------------------------------------------------------------------------------------------


class _Matrix(torch.autograd.Function):
    """y = x V^T + b (transposed: x V + b), computed by `call`; V is the weight, or the weight and a constant."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        value: Tensor,
        call: Callable[[Tensor], Tensor],
        twin: Twin,
        transposed: bool,
    ) -> Tensor:
        ctx.save_for_backward(x, value)
        ctx.weight, ctx.bias, ctx.twin, ctx.transposed, ctx.lead = weight, bias, twin, transposed, x.shape[:-1]
        bound = [("vector", bias)] if bias is not None and bias.requires_grad else []
        ctx.place, ctx.uses = twin.tape.place(), [("matrix", weight)] * weight.requires_grad + bound
        return call(x).data  # no view of what was inside, so that it may be changed in place like the model's own

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_order(ctx.twin)
        x, value = ctx.saved_tensors
        ask_x, ask_weight, ask_bias = ctx.needs_input_grad[:3]
        rest = (None,) * 4
        with without_autocast(grad.device.type):
            matrix = (value.t() if ctx.transposed else value).to(grad.dtype)
            running, name = ctx.twin.running(ctx.place), ctx.twin.name
            if running is None or not running.told("matrix", name, ctx.weight, grad):
                rows, into = flat(grad), flat(x)
                keep = live_rows(rows)
                live = (
                    Operands(rows, into, Layout(1, (1, len(rows)))) if keep is None else Operands.kept(rows, into, keep)
                )
                grad_x = live.spread(live.grad @ matrix).view(x.shape) if ask_x else None
                if running is not None:
                    if ask_weight:
                        piece = Piece(name, ctx.place, (grad, x.detach()), ctx.transposed)
                        running.later("matrix", ctx.weight, piece)
                    if ask_bias:
                        running.vector(name, ctx.bias, grad, ctx.place)
                    return grad_x, None, None, *rest
                pair = (live.x, live.grad) if ctx.transposed else (live.grad, live.x)
                grad_w = (pair[0].t() @ pair[1].to(pair[0].dtype)).to(ctx.weight.dtype) if ask_weight else None
                return grad_x, grad_w, rows.sum(0).to(ctx.bias.dtype) if ask_bias else None, *rest
            live = running.operands(name, grad, x.detach())
            grad_x = live.spread(live.grad @ matrix).view(x.shape) if ask_x else None
            if ask_weight:
                running.matrix(name, ctx.weight, live, ctx.transposed)
            if ask_bias:
                running.vector(name, ctx.bias, grad, ctx.place)
        return grad_x, None, None, *rest


class Matrix(Twin):
    """`nn.Linear`, or `Conv1D` with its transposed weight."""

    def __init__(self, module: Any, name: str, tape: Recorder, transposed: bool = False) -> None:
        super().__init__(module, name, tape)
        self.transposed = transposed

    def taped(self, *args: Any, **kwargs: Any) -> Tensor:
        """As `nn.Linear` and transformers' `Conv1D`."""
        x = args[0] if args else next(iter(kwargs.values()))
        weight = self.module.weight
        return matrix(self, x, weight, self.module.bias, weight, self.original, self.transposed)


def matrix(twin: Twin, x: Tensor, weight: Any, bias: Any, value: Tensor, call: Any, transposed: bool = False) -> Tensor:
    """`call`(x), reported as a linear map by `value`, laid out as the weight is: x (..., into) -> (..., out)."""
    dtype = autocast_dtype(x)
    x = x if dtype is None else x.to(dtype)
    return _Matrix.apply(x, weight, bias, value.detach(), call, twin, transposed)  # type: ignore[no-any-return]


# --- embeddings -------------------------------------------------------------------------------------------------------


class _Lookup(torch.autograd.Function):
    """y_t = W[token_t], computed by `call`; the row of `padding` gets no gradient. `shared`: one for all rows."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: nn.Parameter,
        token: Tensor,
        padding: int | None,
        call: Callable[[Tensor], Tensor],
        twin: Twin,
        shared: bool,
    ) -> Tensor:
        ctx.save_for_backward(weight, token)
        ctx.weight, ctx.padding, ctx.twin, ctx.shared = weight, padding, twin, shared
        ctx.uses = [] if shared or not weight.requires_grad else [("embedding", weight)]
        ctx.place, ctx.token, ctx.lead = twin.tape.place(), token, token.shape
        return call(token).data

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_order(ctx.twin)
        weight, token = ctx.saved_tensors
        running = ctx.twin.running(ctx.place)
        if running is not None:
            if token.dim() == 0:
                grad, token = grad.unsqueeze(0), token.unsqueeze(0)
            if ctx.shared:
                piece = Piece(ctx.twin.name, ctx.place, (grad, token), ctx.padding, may_be_all=False)
                running.later("embedding", ctx.weight, piece)
                return (None,) * 6
            running.embedding(ctx.twin.name, ctx.weight, token, grad, ctx.padding, ctx.place)
            return (None,) * 6
        padding = -1 if ctx.padding is None else ctx.padding
        dense = torch.ops.aten.embedding_dense_backward(grad, token, weight.shape[0], padding, False)
        return dense.to(weight.dtype), *[None] * 5


def is_dense(module: Any) -> bool:
    """Whether an embedding is a look-up and nothing else."""
    return module.max_norm is None and not module.scale_grad_by_freq and not module.sparse


class Lookup(Twin):
    """`nn.Embedding`."""

    def taped(self, *args: Any, **kwargs: Any) -> Tensor:
        """As `nn.Embedding`."""
        token = args[0] if args else next(iter(kwargs.values()))
        return lookup(self, self.module.weight, token, self.module.padding_idx, self.original)


def lookup(twin: Twin, weight: Any, token: Tensor, padding: int | None, call: Callable[[Tensor], Tensor]) -> Tensor:
    """`call`(token), reported as an embedding: token (...) -> (..., width)."""
    padding = padding + len(weight) if padding is not None and padding < 0 else padding  # as torch counts

    def each(token: Tensor) -> Tensor:
        return _Lookup.apply(weight, token, padding, call, twin, False)  # type: ignore[no-any-return]

    row, time = twin.tape.batch or (0, 0)
    once = token.dim() <= 1 or (token.dim() == 2 and len(token) == 1)
    if row > 1 and once and token.numel() % (row * time):  # else the tokens of all rows, one after the other
        plain = _Lookup.apply(weight, token, padding, call, twin, True)
        if token.dim() == 0:
            return plain  # type: ignore[no-any-return]
        return Shared.of(plain, lambda rows: each(token.expand(rows, -1)), token.numel())
    return each(token)


ADDS = {torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__}
_TIMES = {torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__}
SAME = {Tensor.float, Tensor.to, Tensor.type, Tensor.type_as, Tensor.double}
_UNSQUEEZES = {torch.unsqueeze, Tensor.unsqueeze, Tensor.__getitem__}
_SPREADS = {Tensor.expand, Tensor.expand_as, Tensor.repeat, torch.broadcast_to, Tensor.broadcast_to}


class Shared(Tensor):
    """One look-up for all rows of a batch, such as positions or a prompt: (k, d) or (1, k, d), as the module gave it.

    Its gradient arrives summed over the batch and would tell no trajectory apart. So where it meets the rows of the
    batch, or of a chunk, in a sum, a product of elements or `expand`, the same look-up made row by row takes its place,
    of equal bits. Whatever else is done with it is done to itself, and a pass refuses the gradient.
    """

    plain: Tensor
    wide: Callable[[int], Tensor]
    time: int

    @staticmethod
    def of(plain: Tensor, wide: Callable[[int], Tensor], time: int) -> "Shared":
        """From the look-up itself, `plain` (..., time, width), what makes it for so many rows, and its length."""
        shared: Shared = plain.as_subclass(Shared)  # type: ignore[assignment]
        shared.plain, shared.wide, shared.time = plain, cache(wide), time
        return shared

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = (args, kwargs or {})
        tensors = [x for x in pytree.tree_leaves(given) if isinstance(x, Tensor)]
        shared = [x for x in tensors if isinstance(x, Shared)]
        rows = [x for x in tensors if not isinstance(x, Shared)]
        time = shared[0].time

        def call(many: int = 0) -> Any:
            def of(x: Any) -> Any:
                return (x.wide(many) if many else x.plain) if isinstance(x, Shared) else x

            args, kwargs = pytree.tree_map(of, given)
            return func(*args, **kwargs)

        leads = {tuple(x.shape[:2]) if x.dim() >= 3 else (0,) for x in rows}
        many, *along_time = leads.pop() if len(leads) == 1 else (0,)
        if func in ADDS | _TIMES and many > 1 and along_time == [time]:  # one row's gradient is its own anyway
            return call(many)
        out = call()
        if func in _SPREADS and out.dim() == 3 and out.shape[0] > 1 and out.shape[1] == time:
            return shared[0].wide(len(out))
        along = func in _UNSQUEEZES and out.shape[:-2] == (1,) and _only_none(args[1:])
        if along or (not rows and func in (ADDS | SAME | _TIMES) and out.shape == shared[0].plain.shape):
            return cls.of(out, shared[0].wide if along else call, time)
        return out


def _only_none(index: Sequence[Any]) -> bool:
    """Whether an index, or the place of an unsqueeze, puts a new axis first and does nothing else."""
    found = index[0] if len(index) == 1 else None
    every = found if isinstance(found, tuple) else (found,)
    return every[0] in (None, 0) and all(x is Ellipsis or x == slice(None) for x in every[1:])


# --- normalizations ---------------------------------------------------------------------------------------------------


def _layer_norm(
    x: Tensor, grad: Tensor, weight: Tensor | None, shape: Sequence[int], eps: float | None
) -> tuple[Tensor, Tensor]:
    """(unit, input's gradient) of weight * unit(x) + bias, unit(x) = (x - mean) / sd."""
    assert eps is not None
    unit, mean, inverse = torch.native_layer_norm(x, shape, None, None, eps)
    back = torch.ops.aten.native_layer_norm_backward
    return unit, back(grad, x, shape, mean, inverse, weight, None, [True, False, False])[0]


def _rms_norm(
    x: Tensor, grad: Tensor, weight: Tensor | None, shape: Sequence[int], eps: float | None
) -> tuple[Tensor, Tensor]:
    """(unit, input's gradient) of weight * unit(x), unit(x) = x / rms(x)."""
    assert eps is not None
    last = tuple(range(-len(shape), 0))
    inverse = torch.rsqrt(x.square().mean(last, keepdim=True) + eps)
    unit = x * inverse
    grad = grad if weight is None else grad * weight
    return unit, inverse * (grad - unit * (grad * unit).mean(last, keepdim=True))


UNITS: dict[Any, Any] = {
    nn.LayerNorm.forward: _layer_norm,
    nn.RMSNorm.forward: _rms_norm,
    F.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
}


class _Scaled(torch.autograd.Function):
    """y = value * unit(x) + bias, computed by `call`; value is the weight, or the weight and a constant."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Any, bias: Any, value: Tensor | None, call: Any, rule: Any, twin: Twin
    ) -> Tensor:
        ctx.save_for_backward(x, value)
        ctx.weight, ctx.bias, ctx.rule, ctx.twin, ctx.lead = weight, bias, rule, twin, x.shape[:-1]
        ctx.place = twin.tape.place()
        ctx.uses = [("vector", p) for p in (weight, bias) if p is not None and p.requires_grad]
        return call(x).data  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_order(ctx.twin)
        x, value = ctx.saved_tensors
        norm, shape, eps = ctx.rule
        eps = torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps if eps is None else eps  # as torch computes
        wide = torch.promote_types(torch.promote_types(x.dtype, grad.dtype), torch.float32)
        with without_autocast(grad.device.type):
            grad = grad.to(wide)
            unit, grad_x = norm(x.to(wide), grad, None if value is None else value.to(wide), list(shape), eps)
            found: list[Tensor | None] = []
            for k, param in ((1, ctx.weight), (2, ctx.bias)):  # which may be one
                each = (unit.mul_(grad) if k == 1 else grad) if ctx.needs_input_grad[k] else None
                found.append(per_position(each, param, ctx.twin, ctx.place))
        return grad_x.to(x.dtype), *found, None, None, None, None


def per_position(each: Tensor | None, param: Tensor, twin: Twin, place: Place | None) -> Tensor | None:
    """Hand the gradients at every position, `each` (...) with the last axes of `param`, to the pass, or their sum."""
    if each is None:
        return None
    running = twin.running(place)
    if running is None:
        return each.sum_to_size(param.shape).to(param.dtype)
    core = core_of(param)
    each = each.reshape(*each.shape[: each.dim() - len(core)], param.numel())
    running.vector(twin.name, param, each, place)  # type: ignore[arg-type]
    return None


def core_of(param: Tensor) -> tuple[int, ...]:
    """A parameter's shape without leading ones, at least one axis."""
    core = tuple(param.shape)
    while len(core) > 1 and core[0] == 1:
        core = core[1:]
    return core or (1,)


class Unit(Twin):
    """torch's fused norms: they take no spread scale, but their unit is cheap to have again."""

    def taped(self, *args: Any, **kwargs: Any) -> Tensor:
        """As layer norm and RMS norm."""
        x = args[0] if args else next(iter(kwargs.values()))
        weight, bias = self.module._parameters.get("weight"), self.module._parameters.get("bias")
        rule = (UNITS[type(self.module).forward], self.module.normalized_shape, self.module.eps)
        return scaled(self, x, weight, bias, weight, self.original, rule)


def scaled(twin: Twin, x: Tensor, weight: Any, bias: Any, value: Any, call: Any, rule: Any) -> Tensor:
    """`call`(x), reported as a scale and a shift of a unit: x (...) -> (...)."""
    value = None if value is None else value.detach()
    return _Scaled.apply(x, weight, bias, value, call, rule, twin)  # type: ignore[no-any-return]
