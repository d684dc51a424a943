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
    Local    whatever is left (experts, convolutions, mixers): a backward per trajectory through this module alone

Which of them fits is found by running the module's own code (`Own._plan`), never from its name.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, NoReturn, Protocol
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from llm_bridge.scores.layout import WHOLE_LOOP, Layout, Operands, live_rows
from vcposim.errors import InputError

# Functions keep the parameter itself beside the saved tensor: under checkpointing the saved one is an alias.


class Pass(Protocol):
    """What a layer reports to: one backward for score norms."""

    layout: Layout

    def matrix(self, name: str, weight: nn.Parameter, operands: Operands, transposed: bool) -> None:
        """One use of a weight matrix in a product, or of its transpose: the pair whose product is the gradient."""

    def vector(self, name: str, param: nn.Parameter, grad: Tensor) -> None:
        """One use of a bias or a scale: `grad` has its gradient a position, (rows, *param.shape)."""

    def embedding(self, name: str, weight: nn.Parameter, token: Tensor, grad: Tensor, padding: int | None) -> None:
        """One look-up: `grad` (..., width) belongs to row `token` of the weight, that of `padding` to none."""

    def local(self, name: str, inner: "Inner", grad: Sequence[Tensor | None]) -> list[Tensor | None]:
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

    def uses(self, kind: str, weight: nn.Parameter, token: Tensor | None = None) -> None:
        """Notes in the forward that a parameter is used, by what kind of map, and an embedding with which tokens."""

    def looped(self, name: str) -> None:
        """Notes that this module costs a loop over trajectories."""


class Twin:
    """Stands in for the forward of one module while a tape is open."""

    def __init__(self, module: Any, name: str, tape: Recorder) -> None:
        self.module, self.name, self.tape = module, name, tape
        self.original: Callable[..., Any] = module.forward
        self._lent = {id(p) for part in module.modules() if part is not module for p in part._parameters.values()}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward wherever nothing is to be recorded, else `taped`."""
        if self.tape.inside or not torch.is_grad_enabled() or not all(map(self.tape.holds, self.own().values())):
            return self.original(*args, **kwargs)
        return self.taped(*args, **kwargs)

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


def twin_of(module: Any, name: str, tape: Recorder) -> Twin:
    """The twin that fits `module` by the code it runs."""
    code, held = type(module).forward, module._parameters
    if "forward" in module.__dict__ or not all(p is None or is_plain(p) for p in held.values()):
        return Own(module, name, tape)
    if code is nn.Linear.forward and set(held) == {"weight", "bias"}:
        return Matrix(module, name, tape)
    conv1d = code.__qualname__ == "Conv1D.forward" and code.__module__ == "transformers.pytorch_utils"
    if conv1d and set(held) == {"weight", "bias"}:
        return Matrix(module, name, tape, transposed=True)
    if code is nn.Embedding.forward and set(held) == {"weight"} and _is_dense(module):
        return Lookup(module, name, tape)
    if code in _UNITS and set(held) <= {"weight", "bias"}:
        return Unit(module, name, tape)
    return Own(module, name, tape)


def is_plain(p: Tensor) -> bool:
    """Whether functions of a parameter are torch's, not those of a class of its own (whose shards are whole again)."""
    return type(p) in (Tensor, nn.Parameter) or isinstance(p, DTensor)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype autocast would give a matrix product's operands, or None."""
    device = x.device.type
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def autocast_state(device: torch.device) -> dict[str, Any]:
    """What torch.autocast(device.type, ...) is to be told for the state of now."""
    kind = device.type
    return {"dtype": torch.get_autocast_dtype(kind), "enabled": torch.is_autocast_enabled(kind)}


@contextmanager
def rehearsal(tape: Recorder, module: nn.Module, device: torch.device | None) -> Iterator[None]:
    """Run a module as if it had not been run: no node of its parts, no count, no draw, no trace in its state.

    With gradients on: inside a user's own autograd.Function they are off, and its products are not ours.
    """
    parts = [(part, dict(part.__dict__), dict(part._buffers)) for part in module.modules()]
    kept = [(b, b._version, b.clone()) for b in module.buffers()]
    inside, tape.inside = tape.inside, 1
    devices = [device] if device is not None and device.type == "cuda" else []
    try:
        with torch.enable_grad(), _uncounted(), torch.random.fork_rng(devices):
            yield
    finally:
        tape.inside = inside
        for part, attributes, buffers in parts:
            part.__dict__.clear()
            part.__dict__.update(attributes)
            part._buffers.clear()
            part._buffers.update(buffers)
        with torch.no_grad():
            for b, version, value in kept:
                if b._version != version:
                    b.copy_(value)


def _cloned(given: Any) -> Any:
    """Arguments without a history, of a call that may change them in place; what is one object stays one."""
    leaves, spec = pytree.tree_flatten(given)
    new = {id(x): _apart(x).clone() for x in leaves if isinstance(x, Tensor)}
    return pytree.tree_unflatten([new.get(id(x), x) for x in leaves], spec)


@contextmanager
def shadowed(module: nn.Module, value: Mapping[str, Tensor]) -> Iterator[None]:
    """Attributes of `module` that hide its parameters of the same names."""
    module.__dict__.update(value)
    try:
        yield
    finally:
        for name in value:
            del module.__dict__[name]


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
        ctx.weight, ctx.bias, ctx.twin, ctx.transposed = weight, bias, twin, transposed
        return call(x).data  # no view of what was inside, so that it may be changed in place like the model's own

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, value = ctx.saved_tensors
        ask_x, ask_weight, ask_bias = ctx.needs_input_grad[:3]
        rest = (None,) * 4
        with torch.autocast(grad.device.type, enabled=False):
            matrix = (value.t() if ctx.transposed else value).to(grad.dtype)
            running, name = ctx.twin.tape.running, ctx.twin.name
            if running is None:
                rows, flat = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
                keep = live_rows(rows)
                live = (
                    Operands(rows, flat, Layout(1, (1, len(rows)))) if keep is None else Operands.kept(rows, flat, keep)
                )
                grad_x = live.spread(live.grad @ matrix).view(x.shape) if ask_x else None
                pair = (live.x, live.grad) if ctx.transposed else (live.grad, live.x)
                grad_w = (pair[0].t() @ pair[1].to(pair[0].dtype)).to(ctx.weight.dtype) if ask_weight else None
                return grad_x, grad_w, rows.sum(0).to(ctx.bias.dtype) if ask_bias else None, *rest
            live = Operands.of(running.layout, name, grad, x.detach())
            grad_x = live.spread(live.grad @ matrix).view(x.shape) if ask_x else None
            if ask_weight:
                running.matrix(name, ctx.weight, live, ctx.transposed)
            if ask_bias:
                running.vector(name, ctx.bias, grad)
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
    """`call`(x), reported as a linear map by `value`, laid out as the weight is."""
    dtype = autocast_dtype(x)
    x = x if dtype is None else x.to(dtype)
    twin.tape.uses("matrix", weight)
    if bias is not None:
        twin.tape.uses("vector", bias)
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
        return call(token).data

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, token = ctx.saved_tensors
        running = ctx.twin.tape.running
        if running is not None:
            if ctx.shared:
                raise running.layout.mixed(ctx.twin.name, grad)
            running.embedding(ctx.twin.name, ctx.weight, token, grad, ctx.padding)
            return (None,) * 6
        padding = -1 if ctx.padding is None else ctx.padding
        dense = torch.ops.aten.embedding_dense_backward(grad, token, weight.shape[0], padding, False)
        return dense.to(weight.dtype), *[None] * 5


def _is_dense(module: Any) -> bool:
    return module.max_norm is None and not module.scale_grad_by_freq and not module.sparse


class Lookup(Twin):
    """`nn.Embedding`."""

    def taped(self, *args: Any, **kwargs: Any) -> Tensor:
        """As `nn.Embedding`."""
        token = args[0] if args else next(iter(kwargs.values()))
        return lookup(self, self.module.weight, token, self.module.padding_idx, self.original)


def lookup(twin: Twin, weight: Any, token: Tensor, padding: int | None, call: Callable[[Tensor], Tensor]) -> Tensor:
    """`call`(token), reported as an embedding."""

    def each(token: Tensor) -> Tensor:
        twin.tape.uses("embedding", weight, token)
        return _Lookup.apply(weight, token, padding, call, twin, False)  # type: ignore[no-any-return]

    row, time = twin.tape.batch or (0, 0)
    if row > 1 and time > 1 and token.shape in ((time,), (1, time)):
        plain = _Lookup.apply(weight, token, padding, call, twin, True)
        return Shared.of(plain, lambda: each(token.expand(row, time)), (row, time))
    return each(token)


_ADDS = {torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__}
_TIMES = {torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__}
_SAME = {Tensor.float, Tensor.to, Tensor.type, Tensor.type_as, Tensor.double}
_UNSQUEEZES = {torch.unsqueeze, Tensor.unsqueeze, Tensor.__getitem__}
_SPREADS = {Tensor.expand, Tensor.expand_as, Tensor.repeat, torch.broadcast_to, Tensor.broadcast_to}


class Shared(Tensor):
    """One look-up for all rows of a batch, such as positions: (time, d) or (1, time, d), as the module gave it.

    Its gradient arrives summed over the batch and would tell no trajectory apart. So where it meets the rows of the
    batch, in a sum, a product of elements or `expand`, the same look-up made row by row takes its place, of equal
    bits. Whatever else is done with it is done to itself, and a pass refuses the gradient.
    """

    plain: Tensor
    wide: Callable[[], Tensor]
    lead: tuple[int, int]

    @staticmethod
    def of(plain: Tensor, wide: Callable[[], Tensor], lead: tuple[int, int]) -> "Shared":
        """From the look-up itself, a function that makes it for all rows, and (row, time)."""
        shared: Shared = plain.as_subclass(Shared)  # type: ignore[assignment]
        shared.plain, shared.wide, shared.lead = plain, cache(wide), lead
        return shared

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = (args, kwargs or {})
        tensors = [x for x in pytree.tree_leaves(given) if isinstance(x, Tensor)]
        shared = [x for x in tensors if isinstance(x, Shared)]
        rows = [x for x in tensors if not isinstance(x, Shared)]
        lead = shared[0].lead

        def call(*, wide: bool) -> Any:
            def of(x: Any) -> Any:
                return (x.wide() if wide else x.plain) if isinstance(x, Shared) else x

            args, kwargs = pytree.tree_map(of, given)
            return func(*args, **kwargs)

        if func in _ADDS | _TIMES and rows and all(x.dim() >= 3 and tuple(x.shape[:2]) == lead for x in rows):
            return call(wide=True)
        out = call(wide=False)
        if func in _SPREADS and tuple(out.shape[:-1]) == lead:
            return shared[0].wide()
        along = func in _UNSQUEEZES and out.shape[:-2] == (1,) and _only_none(args[1:])
        if along or (not rows and func in (_ADDS | _SAME | _TIMES) and out.shape == shared[0].plain.shape):
            inner = shared[0].wide if along else lambda: call(wide=True)
            return cls.of(out, inner, lead)
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


_UNITS: dict[Any, Any] = {
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
        ctx.weight, ctx.bias, ctx.rule, ctx.twin = weight, bias, rule, twin
        return call(x).data  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, value = ctx.saved_tensors
        norm, shape, eps = ctx.rule
        eps = torch.finfo(x.dtype).eps if eps is None else eps
        wide = torch.promote_types(torch.promote_types(x.dtype, grad.dtype), torch.float32)
        with torch.autocast(grad.device.type, enabled=False):
            grad = grad.to(wide)
            unit, grad_x = norm(x.to(wide), grad, None if value is None else value.to(wide), list(shape), eps)
            found: list[Tensor | None] = []
            for param, needed in ((ctx.weight, ctx.needs_input_grad[1]), (ctx.bias, ctx.needs_input_grad[2])):
                each = (unit.mul_(grad) if param is ctx.weight else grad) if needed else None
                found.append(_per_position(each, param, ctx.twin))
        return grad_x.to(x.dtype), *found, None, None, None, None


def _per_position(each: Tensor | None, param: Tensor, twin: Twin) -> Tensor | None:
    """Hand a parameter's gradients at every position (..., its shape) to the pass; without one, their sum."""
    if each is None:
        return None
    running = twin.tape.running
    if running is None:
        return each.sum_to_size(param.shape).to(param.dtype)
    core = _core(param)
    running.vector(twin.name, param, each.reshape(*each.shape[: each.dim() - len(core)], param.numel()))  # type: ignore[arg-type]
    return None


def _core(param: Tensor) -> tuple[int, ...]:
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
        rule = (_UNITS[type(self.module).forward], self.module.normalized_shape, self.module.eps)
        return scaled(self, x, weight, bias, weight, self.original, rule)


def scaled(twin: Twin, x: Tensor, weight: Any, bias: Any, value: Any, call: Any, rule: Any) -> Tensor:
    """`call`(x), reported as a scale and a shift of a unit."""
    for param in (weight, bias):
        if param is not None and param.requires_grad:
            twin.tape.uses("vector", param)
    value = None if value is None else value.detach()
    return _Scaled.apply(x, weight, bias, value, call, rule, twin)  # type: ignore[no-any-return]


# --- any other module -------------------------------------------------------------------------------------------------


class _Spread(torch.autograd.Function):
    """A parameter repeated for every position, in whose backward the positions' gradients are taken."""

    @staticmethod
    def forward(ctx: Any, param: nn.Parameter, shape: tuple[int, ...], twin: Twin) -> Tensor:
        ctx.param, ctx.twin = param, twin
        return param.expand(shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _per_position(grad, ctx.param, ctx.twin), None, None


class _Known(TorchFunctionMode):
    """Finds uses of a module's parameters in matrix products, look-ups and fused norms; with a `twin`, reports them.

    Casts, transposes and added constants of a parameter count as the parameter. Without a twin, a use that would be
    reported leaves no trace in the graph: a parameter that is still there is used in some other way as well.
    """

    def __init__(self, own: Mapping[str, nn.Parameter], twin: Twin | None) -> None:
        super().__init__()
        self.twin, self.served = twin, set[str]()
        self._name = {id(p): k for k, p in own.items()}
        self._cast: dict[int, tuple[Any, Any]] = {id(p): (p, p) for p in own.values() if is_plain(p)}
        self._turned: dict[int, tuple[Any, Any]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        handler = _HANDLERS.get(func)
        if handler is not None and torch.is_grad_enabled():
            found = handler(self, func, args, kwargs)
            if found is not None:
                params, report = found
                self.served |= {self._name[id(p)] for p in params if id(p) in self._name}
                if self.twin is not None:
                    return report()
                unseen = {id(p) for p in params} | self._cast.keys() | self._turned.keys()
                args, kwargs = pytree.tree_map(
                    lambda x: x.detach() if isinstance(x, Tensor) and id(x) in unseen else x, (args, kwargs)
                )
        out = func(*args, **kwargs)
        known = self._cast.get(id(args[0])) if args else None
        if known is None or not isinstance(out, Tensor):
            return out
        if func in _SAME or func in _ADDS:
            alone = not any(isinstance(x, Tensor) for x in (*args[1:], *kwargs.values()))
            if out.dtype.is_floating_point and (func in _SAME or alone):
                self._cast[id(out)] = (known[0], out)
        elif func in _TURNS and args[0].dim() == 2 and {k % 2 for k in args[1:]} in (set(), {0, 1}) and not kwargs:
            self._turned[id(out)] = (known[0], out)
        return out

    def _plain(self, bias: Any) -> bool:
        """Whether a bias is this module's own, as it is, or nobody's."""
        return bias is None or (id(bias) in self._name and is_plain(bias)) or not bias.requires_grad

    def linear(self, func: Any, args: Any, kwargs: Any) -> Any:
        x, weight, bias = _arguments(("input", "weight", "bias"), args, kwargs)
        turned = id(weight) in self._turned
        if not (turned or id(weight) in self._cast) or weight.dim() != 2 or not self._plain(bias):
            return None
        param, value = (self._turned if turned else self._cast)[id(weight)]
        stored = value.t() if turned else value

        def call(x: Tensor) -> Tensor:
            return F.linear(x, value.detach(), bias)

        return (param, bias), lambda: matrix(self.twin, x, param, bias, stored, call, turned)  # type: ignore[arg-type]

    def matmul(self, func: Any, args: Any, kwargs: Any) -> Any:
        if len(args) != 2 or not isinstance(args[1], Tensor) or args[1].dim() != 2 or args[0].dim() < 2:
            return None
        x, weight = args
        turned = id(weight) in self._turned
        if not turned and id(weight) not in self._cast:
            return None
        param, value = (self._turned if turned else self._cast)[id(weight)]
        stored = value.t() if turned else value

        def call(x: Tensor) -> Tensor:
            return torch.matmul(x, value.detach())

        return (param,), lambda: matrix(self.twin, x, param, None, stored, call, not turned)  # type: ignore[arg-type]

    def embedding(self, func: Any, args: Any, kwargs: Any) -> Any:
        names = ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
        token, weight, padding, most, _, frequency, sparse = _arguments(names, args, kwargs)
        if id(weight) not in self._name or not is_plain(weight) or most or frequency or sparse:
            return None

        def call(token: Tensor) -> Tensor:
            return F.embedding(token, weight)

        return (weight,), lambda: lookup(self.twin, weight, token, padding, call)  # type: ignore[arg-type]

    def rows(self, func: Any, args: Any, kwargs: Any) -> Any:
        weight, index = args
        if id(weight) not in self._name or not is_plain(weight) or weight.dim() != 2:
            return None
        if not isinstance(index, slice) and not (isinstance(index, Tensor) and index.dtype == torch.long):
            return None
        token = torch.arange(len(weight), device=weight.device)[index]

        def call(token: Tensor) -> Tensor:
            return F.embedding(token, weight)

        return (weight,), lambda: lookup(self.twin, weight, token, None, call)  # type: ignore[arg-type]

    def norm(self, func: Any, args: Any, kwargs: Any) -> Any:
        layer = func is F.layer_norm
        names = (
            ("input", "normalized_shape", "weight", "bias", "eps")
            if layer
            else ("input", "normalized_shape", "weight", "eps")
        )
        found = _arguments(names, args, kwargs)
        x, shape, weight, eps = found[0], found[1], found[2], found[-1]
        bias = found[3] if layer else None
        if id(weight) not in self._cast or not self._plain(bias):
            return None
        param, value = self._cast[id(weight)]
        rest = (None if bias is None else bias.detach(),) if layer else ()
        eps = 1e-5 if eps is None and layer else eps

        def call(x: Tensor) -> Tensor:
            return func(x, shape, value.detach(), *rest, eps)  # type: ignore[no-any-return]

        rule = (_UNITS[func], shape, eps)
        return (param, bias), lambda: scaled(self.twin, x, param, bias, value, call, rule)  # type: ignore[arg-type]


def _arguments(names: Sequence[str], args: Any, kwargs: Any) -> list[Any]:
    given = dict(zip(names, args, strict=False)) | kwargs
    return [given.get(name) for name in names]


_HANDLERS: dict[Any, Any] = {
    F.linear: _Known.linear,
    F.embedding: _Known.embedding,
    F.layer_norm: _Known.norm,
    F.rms_norm: _Known.norm,
    torch.matmul: _Known.matmul,
    Tensor.matmul: _Known.matmul,
    Tensor.__matmul__: _Known.matmul,
    Tensor.__getitem__: _Known.rows,
}
_TURNS = {torch.t, Tensor.t, Tensor.T.__get__, Tensor.mT.__get__, torch.transpose, Tensor.transpose}  # type: ignore[attr-defined]
_PLANS: WeakKeyDictionary[nn.Module, dict[Any, frozenset[str] | None]] = WeakKeyDictionary()


class Own(Twin):
    """Any other module: its own code on parameters spread over positions, or else a loop over trajectories."""

    def taped(self, *args: Any, **kwargs: Any) -> Any:
        """The module's code on spread parameters, by a plan made once a form of call; else a loop."""
        own, x = self.own(), _first(args, kwargs)
        shape = () if x is None else (x.dim(), x.shape[:1].numel() > 1)
        form = (self.module.training, *shape, len(args), tuple(k for k, y in kwargs.items() if y is not None))
        plans, key = _PLANS.setdefault(self.module, {}), (frozenset(own), form)
        if key not in plans:
            plans[key] = self._plan(own, x, args, kwargs)
        spread = plans[key]
        if spread is None:
            return self._local(args, kwargs)
        return self._spread(own, spread, args, kwargs)

    def _plan(self, own: Mapping[str, nn.Parameter], x: Tensor | None, args: Any, kwargs: Any) -> frozenset[str] | None:
        """Which parameters to spread so that all are seen, and output and gradients are the module's; or None."""
        device = None if x is None else x.device
        watch = _Known(own, None)
        with rehearsal(self.tape, self.module, device):
            given, options = _cloned((args, kwargs))
            with watch:
                expected = self.original(*given, **options)
            spread = sorted(own.keys() - watch.served)
            left = [own[k] for k in spread]
            if {own[k] for k in watch.served} & set(leaf_parameters(differentiable(expected))):
                return None  # used in a product, and in some other way
            if x is None or not all(_fits(p, x) for p in left):
                return None
        try:
            with rehearsal(self.tape, self.module, device):
                wide = [p.detach().expand(_positions(p, x)).requires_grad_() for p in left]
                given, options = _cloned((args, kwargs))
                with shadowed(self.module, dict(zip(spread, wide, strict=True))):
                    found = self.original(*given, **options)
                right = _same(expected, found) and _stays_in_its_row(expected, found, left, wide, len(x))
        except Exception:  # whatever the module's code, or an operator's, says of a parameter of another shape
            return None
        return frozenset(spread) if right else None

    def _spread(self, own: Mapping[str, nn.Parameter], spread: frozenset[str], args: Any, kwargs: Any) -> Any:
        x = _first(args, kwargs)
        assert x is not None
        for k in spread:
            self.tape.uses("vector", own[k])
        wide = {k: _Spread.apply(own[k], _positions(own[k], x), self) for k in spread}
        with shadowed(self.module, wide):
            if len(spread) == len(own):
                return self.original(*args, **kwargs)
            with _Known(own, self):
                return self.original(*args, **kwargs)

    def _local(self, args: Any, kwargs: Any) -> Any:
        if self.tape.unknown != "loop":
            raise InputError(
                f"ScoreTape: no exact norm for the parameters of {self.name or 'the model itself'} "
                f"({type(self.module).__name__}); freeze them, or use unknown='loop'"
            )
        return local(self, args, kwargs)


class Whole(Twin):
    """A module that is run as a whole, parts and all: a loop over trajectories through it alone."""

    def own(self) -> dict[str, nn.Parameter]:
        """None: its parameters belong to its parts, so whatever the parts hold it is run taped."""
        return {}

    def taped(self, *args: Any, **kwargs: Any) -> Any:
        """A loop over trajectories through the module."""
        return local(self, args, kwargs)


def _uncounted() -> Any:
    """Tensors saved in here are kept as they are, and a checkpoint around does not count them."""
    return torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)


def differentiable(out: Any) -> list[Tensor]:
    """The tensors that carry a gradient, of any nest of containers."""
    return [y for y in pytree.tree_leaves(out) if isinstance(y, Tensor) and y.requires_grad]


def _stays_in_its_row(expected: Any, found: Any, param: Sequence[Tensor], wide: Sequence[Tensor], rows: int) -> bool:
    """Whether gradients of parameters spread over positions are the module's own, each found where it belongs.

    expected, found: the module's output, plain and with `wide` for `param`. For a random cotangent the sum over
    positions must be the parameter's gradient, which then goes no other way; for one on the first row alone, no other
    row may have any.
    """
    plain, spread = differentiable(expected), differentiable(found)
    if not param or not plain:
        return True
    cotangent = [torch.randn_like(y) for y in plain]
    first = [c.clone() for c in cotangent]
    for y, c in zip(plain, first, strict=True):
        size = y.shape[0] // rows if y.dim() and y.shape[0] % rows == 0 else 0
        c[size:] = 0

    def grads(out: Sequence[Tensor], of: Sequence[Tensor], seed: Sequence[Tensor]) -> Sequence[Tensor | None]:
        return torch.autograd.grad(out, of, seed, retain_graph=True, allow_unused=True)

    if len(spread) != len(plain) or any(g is not None for g in grads(spread, param, cotangent)):
        return False
    if any(g is not None and bool((g[1:] != 0).any()) for g in grads(spread, wide, first)):
        return False
    for p, whole, each in zip(param, grads(plain, param, cotangent), grads(spread, wide, cotangent), strict=True):
        a, b = (torch.zeros_like(p) if g is None else g.double().sum_to_size(p.shape) for g in (whole, each))
        if not float((a - b).norm()) <= torch.finfo(p.dtype).eps ** 0.5 * float(a.norm() + b.norm()):
            return False
    return True


def _first(args: Any, kwargs: Any) -> Tensor | None:
    return next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)


def _fits(param: Tensor, x: Tensor) -> bool:
    """Whether a parameter can be spread over the positions of x, which looks like (row, time, ..., anything)."""
    core = _core(param)
    return x.dim() >= max(param.dim(), len(core) + (1 if len(core) == 1 else 2))


def _positions(param: Tensor, x: Tensor) -> tuple[int, ...]:
    core = _core(param)
    return (*x.shape[: x.dim() - len(core)], *core)


def _same(a: Any, b: Any) -> bool:
    left, right = (pytree.tree_leaves(y) for y in (a, b))
    return len(left) == len(right) and all(
        not isinstance(p, Tensor)
        or (isinstance(q, Tensor) and p.dtype == q.dtype and p.shape == q.shape and torch.equal(p, q))
        for p, q in zip(left, right, strict=True)
    )


# --- a loop for one module --------------------------------------------------------------------------------------------


class Differs(Exception):
    """A module does not act on trajectories one by one as it does on all of them."""


class Inner:
    """One call of a module with a graph of its own: leaves in, outputs out."""

    def __init__(self, twin: Twin, args: Any, kwargs: Any) -> None:
        self.twin = twin
        leaves, self._spec = pytree.tree_flatten((args, kwargs))
        self._first = [
            next(k for k, y in enumerate(leaves) if y is x) for x in leaves
        ]  # a module may ask `key is value`
        self._leaf = [_apart(x) for x in leaves]
        self.place = [
            k for k, x in enumerate(self._leaf) if isinstance(x, Tensor) and x.requires_grad and self._first[k] == k
        ]
        self.given = [leaves[k] for k in self.place]
        self.input = [self._leaf[k] for k in self.place]
        x = _first(args, kwargs)
        self._device = torch.device("cpu") if x is None else x.device
        self._cast = autocast_state(self._device)
        try:
            flat, self.spec = pytree.tree_flatten(self._call(self._leaf))
        except RuntimeError as error:
            if "leaf Variable" not in str(error):
                raise
            raise InputError(f"{twin.name}: changes its input in place, which no loop allows; {WHOLE_LOOP}") from error
        self.flat = flat
        self.out = differentiable(flat)
        self.param = [p for p in leaf_parameters(self.out) if twin.tape.holds(p)]

    def _call(self, leaf: Sequence[Any]) -> Any:
        args, kwargs = pytree.tree_unflatten([leaf[k] for k in self._first], self._spec)
        tape = self.twin.tape
        tape.inside += 1
        try:  # kept as they are: a checkpoint around would run again for every trajectory
            with torch.enable_grad(), _uncounted(), torch.autocast(self._device.type, **self._cast):
                return self.twin.original(*args, **kwargs)
        finally:
            tape.inside -= 1

    def grads(self, grad: Sequence[Tensor | None], wanted: Sequence[Tensor]) -> list[Tensor | None]:
        """Gradients of `wanted` for these of the outputs; the graph survives."""
        pair = [(y, g) for y, g in zip(self.out, grad, strict=True) if g is not None]
        if not pair or not wanted:
            return [None] * len(wanted)
        out, seed = zip(*pair, strict=True)
        return self._grad(out, wanted, seed)

    def _grad(self, out: Any, wanted: Any, seed: Any) -> list[Tensor | None]:
        self.twin.tape.inside += 1  # the pass takes no note of what comes to a parameter in here
        try:  # the graph stays: a part of it may have been made before the call, for all trajectories
            return list(torch.autograd.grad(out, wanted, seed, retain_graph=True, allow_unused=True))
        finally:
            self.twin.tape.inside -= 1

    def each(
        self, layout: Layout, grad: Sequence[Tensor | None], take: Callable[[int, list[Tensor | None]], None]
    ) -> list[Tensor | None]:
        """`take`(i, gradients of the parameters) for every trajectory; returns the inputs' gradients.

        Through the module on trajectory i's rows alone, where that gives its output; `Differs` else.
        """
        parts: list[list[Tensor | None]] = []
        for i in range(layout.n):
            leaf = [layout.part(x, i) if isinstance(x, Tensor) else x for x in self._leaf]
            leaf = [_apart(x) if k in self.place else x for k, x in enumerate(leaf)]
            try:
                with rehearsal(self.twin.tape, self.twin.module, self._device):
                    out = differentiable(self._call(leaf))
            except Exception as error:  # whatever the module's code says of fewer rows
                raise Differs from error
            if len(out) != len(self.out):
                raise Differs
            pair = []
            for y, whole, g in zip(out, self.out, grad, strict=True):
                if g is None:
                    continue
                expected = layout.part(whole, i)
                eps = 64 * torch.finfo(y.dtype).eps
                if y.shape != expected.shape or not torch.allclose(
                    y, expected, rtol=eps, atol=eps * float(y.abs().max())
                ):
                    raise Differs
                pair.append((y, layout.part(g, i)))
            ys, gs = zip(*pair, strict=True)
            wanted = [leaf[k] for k in self.place]
            found = self._grad(ys, [*self.param, *wanted], gs)
            take(i, found[: len(self.param)])
            parts.append(found[len(self.param) :])
        whole_grad: list[Tensor | None] = []
        for k, x in enumerate(self.input):
            piece = [part[k] for part in parts]
            if x.shape[0] % layout.n or any(p is not None and len(p) * layout.n != len(x) for p in piece):
                whole_grad.append(sum((p for p in piece if p is not None), start=torch.zeros_like(x)))
            else:
                rows = len(x) // layout.n
                whole_grad.append(torch.cat([x.new_zeros(rows, *x.shape[1:]) if p is None else p for p in piece]))
        return whole_grad


class _Local(torch.autograd.Function):
    """The outputs of an `Inner` call."""

    @staticmethod
    def forward(ctx: Any, inner: Inner, *given: Tensor) -> tuple[Tensor, ...]:
        ctx.inner = inner
        ctx.set_materialize_grads(False)  # an output that nobody uses has no rows to tell apart
        return tuple(y.detach() for y in inner.out)

    @staticmethod
    def backward(ctx: Any, *grad: Tensor | None) -> tuple[Tensor | None, ...]:
        inner: Inner = ctx.inner
        running = inner.twin.tape.running
        if running is None:
            return None, *inner.grads(grad, [*inner.input, *inner.param])
        given = running.local(inner.twin.name, inner, grad) if inner.param else inner.grads(grad, inner.input)
        return None, *given, *[None] * len(inner.param)


def local(twin: Twin, args: Any, kwargs: Any) -> Any:
    """The module's own output, reported by a loop over trajectories."""
    inner = Inner(twin, args, kwargs)
    for p in inner.param:
        twin.tape.uses("local", p)
    if inner.param:
        twin.tape.looped(twin.name)
    found = iter(_Local.apply(inner, *inner.given, *inner.param))
    graph = [next(found) if isinstance(y, Tensor) and y.requires_grad else y for y in inner.flat]
    return pytree.tree_unflatten(graph, inner.spec)


def _apart(x: Any) -> Any:
    return x.detach().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x


def leaf_parameters(out: Sequence[Tensor]) -> list[nn.Parameter]:
    """Leaves of a graph, each once, in a fixed order."""
    return list(dict.fromkeys(n.variable for n in graph_nodes(out) if hasattr(n, "variable")))


def graph_nodes(out: Sequence[Tensor], until: Sequence[Tensor] = ()) -> list[Any]:
    """Every node of the graph behind `out`, and not behind `until`."""
    stack = [y.grad_fn for y in out if y.grad_fn is not None]
    seen = dict.fromkeys([*stack, *(y.grad_fn for y in until)])
    while stack:
        for node, _ in stack.pop().next_functions:
            if node is not None and node not in seen:
                seen[node] = None
                stack.append(node)
    return list(seen)
