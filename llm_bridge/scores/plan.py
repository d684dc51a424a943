"""Which rule fits a module, found by running its code and never from its name.

A linear map, an embedding and torch's fused norms have nodes of their own (`layers`). Of any other module the plan
asks: which of its parameters are used in products, look-ups and fused norms, in whatever line of its code (`_Known`);
and may the rest be spread over positions, as if each had its own copy, so that outputs and gradients stay the module's,
and no gradient leaves its row? What is left is looped over (`inner`).
"""

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _get_current_dispatch_mode

from llm_bridge.scores.inner import (
    Whole,
    cloned,
    differentiable,
    first_tensor,
    is_opaque,
    leaf_parameters,
    local,
    rehearsal,
    sums_of,
    untraced,
    unwritten,
)
from llm_bridge.scores.layers import (
    ADDS,
    SAME,
    UNITS,
    Lookup,
    Matrix,
    Recorder,
    Twin,
    Unit,
    core_of,
    is_dense,
    is_plain,
    is_transformed,
    lookup,
    matrix,
    per_position,
    scaled,
)
from llm_bridge.scores.layout import WHOLE_LOOP
from vcposim.errors import InputError


def twins_of(
    modules: Mapping[str, nn.Module], tape: Recorder, whole: Set[str], subset: Set[nn.Parameter] | None
) -> list[tuple[nn.Module, Twin]]:
    """The replacements to make in a model's modules; `whole`: classes of them to loop over, parts and all.

    Raises InputError where one cannot be, and unknown modules are errors.
    """
    twins: dict[str, tuple[nn.Module, Twin]] = {}
    absent = whole - {type(module).__name__ for module in modules.values()}
    if absent:
        raise InputError(f"loop: no module of class {sorted(absent)[0]!r} in the model; give names of its classes")
    for name, module in modules.items():
        given = getattr(module, "parametrizations", None)
        made = isinstance(given, nn.Module) and any(p.requires_grad for p in given.parameters())
        if type(module).__name__ in whole or (made and tape.unknown == "loop"):
            twins[name] = (module, Whole(module, name, tape))
            continue
        if not any(p is not None and p.requires_grad for p in module._parameters.values()):
            continue
        fit = twin_of(module, name, tape)
        own = fit.own().values()
        if not own or (subset is not None and subset.isdisjoint(own)):
            continue
        twin = None
        while type(module).forward is nn.Module.forward and name:  # a list or dict of parameters: its owner's
            name = name.rpartition(".")[0]
            module = modules[name]
            twin = Whole(module, name, tape)
        if twin is not None and tape.unknown == "error":
            raise InputError(
                f"ScoreTape: no exact norm for the parameters of {name or 'the model itself'} "
                f"({type(module).__name__}); freeze them, or use unknown='loop'"
            )
        if name not in twins or twin is not None:
            twins[name] = (module, twin or fit)
    return list(twins.values())


def twin_of(module: Any, name: str, tape: Recorder) -> Twin:
    """The twin that fits `module` by the code it runs."""
    code, held = type(module).forward, module._parameters
    own = all(getattr(module, k, None) is held.get(k) for k in ("weight", "bias"))  # and not made from others on call
    if "forward" in module.__dict__ or not own or not all(p is None or is_plain(p) for p in held.values()):
        return Own(module, name, tape)
    if code is nn.Linear.forward and set(held) == {"weight", "bias"}:
        return Matrix(module, name, tape)
    conv1d = code.__qualname__ == "Conv1D.forward" and code.__module__ == "transformers.pytorch_utils"
    if conv1d and set(held) == {"weight", "bias"}:
        return Matrix(module, name, tape, transposed=True)
    if code is nn.Embedding.forward and set(held) == {"weight"} and is_dense(module):
        return Lookup(module, name, tape)
    if code in UNITS and set(held) <= {"weight", "bias"}:
        return Unit(module, name, tape)
    return Own(module, name, tape)


class Own(Twin):
    """Any other module: its own code on parameters spread over positions, or else a loop over trajectories."""

    def taped(self, *args: Any, **kwargs: Any) -> Any:
        """The module's code on spread parameters, by a plan made once a form of call; else a loop.

        Raises InputError where a loop is not allowed.
        """
        own, x = self.own(), first_tensor(args, kwargs)
        # of one row, or step, all is true; and code that changes its ways does so beyond a power of two
        length = () if x is None else tuple((size - 1).bit_length() if size else -1 for size in x.shape)
        flags = tuple((type(y), y) for y in self.module.__dict__.values() if type(y) in _WAYS)
        code = getattr(self.original, "__code__", None)  # which may be changed, of a class or of this module
        leaves = () if len(args) == 1 and not kwargs else pytree.tree_leaves((args, kwargs))
        told = tuple((type(y), y) for y in leaves if type(y) in _WAYS)
        whole = x is None or x.is_contiguous()
        form = (code, flags, told, length, whole, len(args), tuple(k for k, y in kwargs.items() if y is not None))
        plans, key = _PLANS.setdefault(self.module, {}), (frozenset(own), form)
        if key not in plans:
            if len(plans) >= _FORMS:  # a number that is another at every call
                plans.clear()
            plans[key] = self._plan(own, x, args, kwargs)
        plan = plans[key]
        if plan is not None:
            assert x is not None  # else there is nothing to spread over, and no plan
            try:
                return self._spread(own, plan, x, args, kwargs)
            except (RuntimeError, ValueError, IndexError) as error:  # it was tried at a length that happened to fit
                counted = _get_current_dispatch_mode() is not None  # a selective checkpoint runs again: its own affair
                if isinstance(error, InputError) or counted or any(map(is_opaque, pytree.tree_leaves((args, kwargs)))):
                    raise
                try:
                    own_args, own_kwargs = cloned((args, kwargs))
                    with rehearsal(self.tape, self.module, x.device):
                        self.original(*own_args, **own_kwargs)
                except Exception:  # it fails by itself
                    raise error from None
                plans[key] = None
        if self.tape.unknown != "loop":
            raise InputError(
                f"ScoreTape: no exact norm for the parameters of {self.name or 'the model itself'} "
                f"({type(self.module).__name__}); freeze them, or use unknown='loop'"
            )
        return local(self, args, kwargs)

    def _spread(self, own: Mapping[str, nn.Parameter], plan: "Spreading", x: Tensor, args: Any, kwargs: Any) -> Any:
        """The module's output, with a graph in which its parameters are spread.

        Raises InputError where its code goes another way than when that was found to be right, and it is not there.
        """
        given = args if len(args) == 1 and not kwargs else pytree.tree_leaves((args, kwargs))
        ends = {y.grad_fn for y in given if isinstance(y, Tensor)}
        wide = {k: _Spread.apply(own[k], _positions(own[k], x), self) for k in plan.spread}
        known = nullcontext() if len(wide) == len(own) else _Known(own, self, self.tape)
        # bits that may not be the module's own are not given away, only their graph is
        trace = nullcontext() if plan.same_bits else untraced(self.module, x.device)
        with trace, shadowed(self.module, wide), known:  # what is not spread is used in products
            out = self.original(*args, **kwargs)
        way = _way(out, ends)
        if way not in plan.ways:
            if plan.ways and self._plan(own, x, args, kwargs) != plan:
                raise InputError(
                    f"{self.name or 'the model itself'} ({type(self.module).__name__}): its code goes another way than "
                    "in earlier calls like this one, by something that no argument or attribute tells, and what was "
                    f"found of those does not hold; {self.tape.advice(self.name + '.')}"
                )
            if len(plan.ways) < _FORMS:
                plan.ways.add(way)
        if plan.same_bits:
            return out
        inside, self.tape.inside = self.tape.inside, 1
        try:
            flat, spec = pytree.tree_flatten(self.original(*args, **kwargs))
        finally:
            self.tape.inside = inside
        graph = iter(differentiable(out))
        mine = [next(graph) if isinstance(y, Tensor) and y.requires_grad else None for y in flat]
        old = {*map(id, given)}
        pairs = zip(flat, mine, strict=True)
        return pytree.tree_unflatten(
            [y if z is None or id(y) in old else _Instead.apply(z, y.detach()) for y, z in pairs], spec
        )

    def _plan(self, own: Mapping[str, nn.Parameter], x: Tensor | None, args: Any, kwargs: Any) -> "Spreading | None":
        """Which parameters to spread so that all are seen, and output and gradients are the module's; or None.

        By what it was given, moved a little: zeros and numbers that are none would tell nothing. Where it does not take
        that (a probability above 1), or goes another way then, by what it was given.
        """
        leaves, spec = pytree.tree_flatten((args, kwargs))
        active = [y for y in leaves if isinstance(y, Tensor) and (y is x or y.requires_grad) and y.is_floating_point()]
        if not active:
            return self._planned(own, x, args, kwargs)
        moved = {id(y): _stirred(y, 2).requires_grad_(y.requires_grad) for y in active}
        near_args, near_kwargs = pytree.tree_unflatten([moved.get(id(y), y) for y in leaves], spec)
        with suppress(Exception):
            plan = self._planned(own, first_tensor(near_args, near_kwargs), near_args, near_kwargs)
            if plan is not None and self._plain_way(near_args, near_kwargs) == self._plain_way(args, kwargs):
                return plan
        telling = all(bool(y.detach().isfinite().all() & y.detach().any()) for y in active)
        return self._planned(own, x, args, kwargs) if telling else None

    def _plain_way(self, args: Any, kwargs: Any) -> Hashable:
        given = cloned((args, kwargs))
        device = next((y.device for y in pytree.tree_leaves(given) if isinstance(y, Tensor)), None)
        with rehearsal(self.tape, self.module, device):
            return _way(self.original(*given[0], **given[1]), set())

    def _planned(self, own: Mapping[str, nn.Parameter], x: Tensor | None, args: Any, kwargs: Any) -> "Spreading | None":
        device = None if x is None else x.device
        try:
            first = cloned((args, kwargs))
        except Exception:  # an argument of a class of its own that is not to be copied
            return None
        watch = _Known(own, None, self.tape)
        with rehearsal(self.tape, self.module, device):
            with watch:
                before, kept = pytree.tree_leaves(first), set(map(id, _left_behind(self.module)))
                versions = [y._version if isinstance(y, Tensor) else 0 for y in before]
                sums = sums_of(self.module)
                expected = self.original(*first[0], **first[1])
                after = pytree.tree_leaves(first)
                if sums_of(self.module) != sums:  # once is what the call itself will do, if twice is the same
                    second = cloned((args, kwargs))
                    with unwritten(self.name, self.module):
                        self.original(*second[0], **second[1])
            spread = sorted(own.keys() - watch.served)
            left: list[Tensor] = [own[k] for k in spread]
            if {own[k] for k in watch.served} & set(leaf_parameters(differentiable(expected))):
                return None  # used in a product, and in some other way
            if x is None or not all(_fits(p, x) for p in left):
                return None
            known = kept | set(map(id, pytree.tree_leaves(expected)))
            seen = not any(map(is_opaque, pytree.tree_leaves(expected)))
            seen = seen and all(id(y) in known for y in _left_behind(self.module))
            if not seen or len(before) != len(after) or any(a is not b for a, b in zip(before, after, strict=True)):
                return None  # what it gives cannot all be compared
        if not left:
            return Spreading(frozenset(), True)

        def run(value: Sequence[Tensor]) -> Any:
            given, named = cloned((args, kwargs)), dict(zip(spread, value, strict=True))
            with rehearsal(self.tape, self.module, device), shadowed(self.module, named):
                return self.original(*given[0], **given[1])

        same_bits = True
        finite = all(bool(p.detach().isfinite().all()) for p in left)  # of which a checkpoint keeps no count
        for seed in (0, 1) if finite else (1,):  # equal numbers hide what entries have to do with each other
            try:
                if seed:
                    left = [_stirred(own[k], seed).requires_grad_() for k in spread]
                    expected = run(left)
                wide = [p.detach().expand(_positions(p, x)).requires_grad_() for p in left]
                found = run(wide)
                same_bits = same_bits and _is_exact(found, wide) and _same(expected, found)
                with rehearsal(self.tape, self.module, device):
                    if not _same(expected, found, _NEAR) or not _stays_in_its_row(expected, found, left, wide, len(x)):
                        return None
            except torch.OutOfMemoryError:
                raise  # which says nothing of the module
            except Exception:  # whatever the module's code, or an operator's, says of a parameter of another shape
                return None
        in_place = any(isinstance(y, Tensor) and y._version != old for y, old in zip(after, versions, strict=True))
        return Spreading(frozenset(spread), same_bits) if same_bits or not in_place else None


@dataclass
class Spreading:
    """Which of a module's parameters to spread over positions, the others being used in products."""

    spread: frozenset[str]
    same_bits: bool
    """whether all that is computed of parameters alone is of the same bits whatever their shape"""
    ways: set[Hashable] = field(default_factory=set, compare=False)
    """the graphs (`_way`) of calls for which that holds"""


def _way(out: Any, ends: Set[Any]) -> Hashable:
    """What the graph behind a module's output is made of, back to what it was given: nodes, axes, and what leads where.

    Of very long graphs the first nodes.
    """
    at: dict[Any, int] = dict.fromkeys(ends, -1) | {None: -2}
    due: list[Any] = [y.grad_fn for y in ([out] if isinstance(out, Tensor) else differentiable(out))]
    found: list[Hashable] = []
    while due and len(found) < _LONG:
        node = due.pop()
        if node in at:
            found.append(at[node])
            continue
        at[node] = len(found)
        found.append((node.name(), getattr(node, "_saved_dim", None)))
        due += [each for each, _ in node.next_functions]
    return tuple(found)


def _is_exact(out: Any, wide: Sequence[Tensor]) -> bool:
    """Whether operators that see parameters alone, `wide` (...) and what is made of these, compute each entry alike.

    A power or an exponential takes vectors of numbers in another way than what is left over at the end, so its last bit
    depends on the shape; an addition is rounded once wherever it stands.
    """
    of_params = {id(w) for w in wide}
    alone: dict[Any, bool] = {None: False}
    due: list[Any] = [y.grad_fn for y in differentiable(out)]
    exact = True
    while due:
        node = due[-1]
        if node in alone:
            due.pop()
            continue
        after = [each for each, _ in node.next_functions]
        waiting = [each for each in after if each not in alone]
        if waiting:
            due += waiting
            continue
        due.pop()
        made = [alone[each] for each in after if each is not None]
        alone[node] = id(node.variable) in of_params if hasattr(node, "variable") else bool(made) and all(made)
        exact = exact and (
            not any(made)
            or (
                node.name().rstrip("0123456789").removesuffix("Backward") in _ONCE
                and getattr(node, "_saved_alpha", 1) == 1
            )
        )
    return exact


class _Instead(torch.autograd.Function):
    """The module's own output, `own` (...), with the graph behind `graph` (...)."""

    @staticmethod
    def forward(ctx: Any, graph: Tensor, own: Tensor) -> Tensor:
        return own.data

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, None


def _left_behind(module: nn.Module) -> list[Tensor]:
    """What a module holds in attributes that carries a gradient and is no leaf."""
    return [y for y in differentiable([vars(part) for part in module.modules()]) if y.grad_fn is not None]


def _stirred(p: Tensor, seed: int) -> Tensor:
    """Numbers near those of a parameter, none of them 0 or infinite, no two equal: (...) -> (...)."""
    noise = torch.rand(p.shape, generator=torch.Generator("cpu").manual_seed(seed), device="cpu") - 0.5
    near = p.detach().nan_to_num(0.0, 1.0, -1.0)
    return near + noise.to(p) * (0.2 * near.abs() + 0.02)


@contextmanager
def shadowed(module: nn.Module, value: Mapping[str, Tensor]) -> Iterator[None]:
    """Attributes of `module` that hide its parameters of the same names."""
    module.__dict__.update(value)
    try:
        yield
    finally:
        for name in value:
            del module.__dict__[name]


def _same(a: Any, b: Any, steps: float = 0) -> bool:
    """Whether two outputs are equal, up to so many of their type's steps."""

    def alike(p: Any, q: Any) -> bool:
        if not isinstance(p, Tensor):
            return True
        if not isinstance(q, Tensor) or p.dtype != q.dtype or p.shape != q.shape:
            return False
        if not steps or not p.dtype.is_floating_point:
            return torch.equal(p, q)
        far = steps * torch.finfo(p.dtype).eps
        return torch.allclose(p, q, rtol=far, atol=far * float(p.detach().abs().max()) if p.numel() else 0.0)

    left, right = (pytree.tree_leaves(y) for y in (a, b))
    return len(left) == len(right) and all(map(alike, left, right))


def _stays_in_its_row(expected: Any, found: Any, param: Sequence[Tensor], wide: Sequence[Tensor], rows: int) -> bool:
    """Whether gradients of parameters spread over positions are the module's own, each found where it belongs.

    expected, found: the module's output, plain and with `wide` for `param`. For a random cotangent the sum over
    positions must be the parameter's gradient, which then goes no other way; for one on the first row alone, or on the
    last, no other row may have any.
    """
    plain, spread = differentiable(expected), differentiable(found)
    if not param:
        return True
    if not plain or any(y.dim() == 0 for y in plain):  # nothing to see, or a number for all rows
        return False
    cotangent = [torch.randn_like(y) for y in plain]

    def only(row: int) -> list[Tensor]:
        part = [torch.zeros_like(c) for c in cotangent]
        for c, zero in zip(cotangent, part, strict=True):
            size = c.shape[0] // rows if c.shape[0] % rows == 0 else 0
            zero[row * size : (row + 1) * size] = c[row * size : (row + 1) * size]
        return part

    def grads(out: Sequence[Tensor], of: Sequence[Tensor], seed: Sequence[Tensor]) -> Sequence[Tensor | None]:
        return torch.autograd.grad(out, of, seed, retain_graph=True, allow_unused=True)

    if len(spread) != len(plain) or any(g is not None for g in grads(spread, param, cotangent)):
        return False
    for row in {0, rows - 1}:
        others = torch.arange(rows, device=plain[0].device) != row
        if any(g is not None and bool((g[others] != 0).any()) for g in grads(spread, wide, only(row))):
            return False
    for p, whole, each in zip(param, grads(plain, param, cotangent), grads(spread, wide, cotangent), strict=True):
        a, b = (torch.zeros_like(p) if g is None else g.double().sum_to_size(p.shape) for g in (whole, each))
        eps = max(torch.finfo(p.dtype).eps, torch.finfo(torch.float32).eps)  # in which many a norm computes
        if not float((a - b).norm()) <= eps**0.5 * float(a.norm() + b.norm()):
            return False
    return True


def _fits(param: Tensor, x: Tensor) -> bool:
    """Whether a parameter can be spread over the positions of x, which looks like (row, time, ..., anything)."""
    core = core_of(param)
    return x.dim() >= max(param.dim(), len(core) + (1 if len(core) == 1 else 2))


def _positions(param: Tensor, x: Tensor) -> tuple[int, ...]:
    core = core_of(param)
    return (*x.shape[: x.dim() - len(core)], *core)


class _Spread(torch.autograd.Function):
    """A parameter repeated for every position, in whose backward the positions' gradients are taken."""

    @staticmethod
    def forward(ctx: Any, param: nn.Parameter, shape: tuple[int, ...], twin: Twin) -> Tensor:
        ctx.param, ctx.twin, ctx.place, ctx.uses = param, twin, twin.tape.place(), [("vector", param)]
        ctx.lead = shape[: len(shape) - len(core_of(param))]
        return param.expand(shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return per_position(grad, ctx.param, ctx.twin, ctx.place), None, None


class _Made:
    """Values made of parameters, as long as anybody holds them."""

    def __init__(self, params: Iterable[Any] = ()) -> None:
        self._of: dict[int, tuple[Any, ReferenceType[Any], int | None]] = {id(p): (p, ref(p), None) for p in params}

    def add(self, param: Any, value: Any) -> None:
        """Remember that `value` is made of `param`, as long as nobody writes to it."""
        if value is not param:
            key = id(value)
            self._of[key] = param, ref(value, lambda _: self._of.pop(key, None)), value._version

    def __contains__(self, x: Any) -> bool:
        return id(x) in self._of and self._of[id(x)][1]() is x

    def param(self, x: Any) -> Any:
        """The parameter that `x` is made of; None if it is of none, or was written to since."""
        if x not in self:
            return None
        param, _, version = self._of[id(x)]
        return param if version is None or x._version == version else None


class _Known(TorchFunctionMode):
    """Finds uses of a module's parameters in matrix products, look-ups and fused norms; with a `twin`, reports them.

    Casts, transposes and added constants of a parameter count as the parameter. Without a twin, a use that would be
    reported leaves no trace in the graph: a parameter that is still there is used in some other way as well.
    """

    def __init__(self, own: Mapping[str, nn.Parameter], twin: Twin | None, tape: Recorder) -> None:
        super().__init__()
        self.twin, self.served, self._tape = twin, set[str](), tape
        self._name = {id(p): k for k, p in own.items()}
        self._cast, self._turned = _Made(p for p in own.values() if is_plain(p)), _Made()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        handler = _HANDLERS.get(func)
        if handler is not None and self._listens():
            found = handler(self, func, args, kwargs)
            if found is not None:
                params, report = found
                used = [self._name[id(p)] for p in params if id(p) in self._name]
                self.served |= set(used)
                twin = self._reporter(used)
                if twin is not None:
                    return report(twin)
                unseen = {id(p) for p in params}

                def without(x: Any) -> Any:
                    made = isinstance(x, Tensor) and (id(x) in unseen or x in self._cast or x in self._turned)
                    return x.detach() if made else x

                args, kwargs = pytree.tree_map(without, (args, kwargs))
        known = self._cast.param(args[0]) if args else None
        out = func(*args, **kwargs)
        if known is None or not isinstance(out, Tensor):
            return out
        if func in SAME or func in ADDS:
            alone = not any(isinstance(x, Tensor) for x in (*args[1:], *kwargs.values()))
            if out.dtype.is_floating_point and out.requires_grad and (func in SAME or alone):
                self._cast.add(known, out)
        elif func in _TURNS and args[0].dim() == 2 and {k % 2 for k in args[1:]} in (set(), {0, 1}) and not kwargs:
            self._turned.add(known, out)
        return out

    def _listens(self) -> bool:
        return torch.is_grad_enabled() and not is_transformed()

    def _reporter(self, used: Sequence[str]) -> Twin | None:
        """The twin that reports a use of these parameters."""
        return self.twin

    def _plain(self, bias: Any) -> bool:
        """Whether a bias is this module's own, as it is, or nobody's."""
        return bias is None or (id(bias) in self._name and is_plain(bias)) or not bias.requires_grad

    def linear(self, func: Any, args: Any, kwargs: Any) -> Any:
        x, weight, bias = _arguments(("input", "weight", "bias"), args, kwargs)
        turned = weight in self._turned
        param = (self._turned if turned else self._cast).param(weight)
        if param is None or weight.dim() != 2 or not self._plain(bias):
            return None
        stored = weight.t() if turned else weight

        def call(x: Tensor) -> Tensor:
            return F.linear(x, weight, bias)  # torch's choice of a product depends on whether it requires a gradient

        return (param, bias), lambda twin: matrix(twin, x, param, bias, stored, call, turned)  # type: ignore[arg-type]

    def matmul(self, func: Any, args: Any, kwargs: Any) -> Any:
        if len(args) != 2 or not isinstance(args[1], Tensor) or args[1].dim() != 2 or args[0].dim() < 2:
            return None
        x, weight = args
        turned = weight in self._turned
        param = (self._turned if turned else self._cast).param(weight)
        if param is None:
            return None
        stored = weight.t() if turned else weight

        def call(x: Tensor) -> Tensor:
            return torch.matmul(x, weight)

        return (param,), lambda twin: matrix(twin, x, param, None, stored, call, not turned)  # type: ignore[arg-type]

    def embedding(self, func: Any, args: Any, kwargs: Any) -> Any:
        names = ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
        token, weight, padding, most, _, frequency, sparse = _arguments(names, args, kwargs)
        if id(weight) not in self._name or not is_plain(weight) or most or frequency or sparse:
            return None

        def call(token: Tensor) -> Tensor:
            return F.embedding(token, weight)

        return (weight,), lambda twin: lookup(twin, weight, token, padding, call)  # type: ignore[arg-type]

    def rows(self, func: Any, args: Any, kwargs: Any) -> Any:
        weight, index = args
        if id(weight) not in self._name or not is_plain(weight) or weight.dim() != 2:
            return None
        if not isinstance(index, slice) and not (isinstance(index, Tensor) and index.dtype == torch.long):
            return None
        token = torch.arange(len(weight), device=weight.device)[index]
        if token.dim() < 2 and token.shape != self._tape.batch[1:]:
            return None  # a part of a matrix, and no positions

        def call(token: Tensor) -> Tensor:
            return F.embedding(token, weight)

        return (weight,), lambda twin: lookup(twin, weight, token, None, call)  # type: ignore[arg-type]

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
        param = self._cast.param(weight)
        if param is None or not self._plain(bias):
            return None
        rest = (None if bias is None else bias.detach(),) if layer else ()
        eps = 1e-5 if eps is None and layer else eps

        def call(x: Tensor) -> Tensor:
            return func(x, shape, weight.detach(), *rest, eps)  # type: ignore[no-any-return]

        rule = (UNITS[func], shape, eps)
        return (param, bias), lambda twin: scaled(twin, x, param, bias, weight, call, rule)  # type: ignore[arg-type]


class Borrowed(_Known):
    """Finds uses of parameters by code outside the modules that hold them: a head by the embedding's weight, in the
    model's own forward or in the loss.

    Costs a call of Python an operation. So a model's first tape listens, and later ones only if there was any use.
    """

    def __init__(self, model: nn.Module, named: Iterable[tuple[str, nn.Parameter]], tape: Recorder) -> None:
        super().__init__(dict(named), None, tape)
        self._model = model

    @classmethod
    def needed(cls, model: nn.Module, named: Iterable[tuple[str, nn.Parameter]]) -> bool:
        """Whether it is unknown, or known, that the model borrows any of these."""
        lent_by_none = _NOT_BORROWED.get(model, ())
        return any(name not in lent_by_none for name, _ in named)

    def learned(self) -> None:
        """Forwards have been seen: listen no more for these if there was nothing to hear, now or before."""
        lent = _BORROWED.setdefault(self._model, set())
        lent |= self.served
        if not self.served:
            _NOT_BORROWED.setdefault(self._model, set()).update(set(self._name.values()) - lent)

    def _listens(self) -> bool:
        return not self._tape.inside and super()._listens()

    def _reporter(self, used: Sequence[str]) -> Twin | None:
        owner = used[0].rpartition(".")[0]
        if in_checkpoint():
            raise InputError(
                f"{used[0]}: used outside its module's forward and inside a checkpoint, which runs again where nobody "
                f"listens; call {owner or 'the module'} there, leave that code out of checkpoints, or {WHOLE_LOOP}"
            )
        return Twin(self._model.get_submodule(owner), owner, self._tape)


def in_checkpoint() -> bool:
    """Whether the code that runs will be run again by a backward, as part of a checkpoint that is not reentrant."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return hooks is not None and hooks[0].__module__ == "torch.utils.checkpoint"


_NOT_BORROWED: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()
"""of models the names of parameters that nobody used outside their modules"""
_BORROWED: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()
"""and of those that somebody did at some time"""


def listen_again(model: nn.Module, name: str) -> bool:
    """A parameter of this name was borrowed after all: whether no pass was known to do so, and the next will listen."""
    known = _NOT_BORROWED.get(model, set())
    unheard = name in known
    known.discard(name)
    return unheard


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


_WAYS = {bool, int, float, str}
"""types of attributes and arguments by which code chooses its way"""
_FORMS, _LONG = 64, 256
"""plans that are kept of a module, and ways of each; nodes of a graph that are looked at"""
_ONCE = {
    *("Add", "Sub", "Rsub", "Mul", "Div", "Neg", "Abs", "Sign", "Relu", "Clamp", "ClampMin", "ClampMax", "Maximum"),
    *("Minimum", "Where", "ToCopy", "Clone", "Alias", "View", "UnsafeView", "ReshapeAlias", "Expand", "Unsqueeze"),
    *("Squeeze", "Transpose", "Permute", "T", "Select", "Slice", "Split", "SplitWithSizes", "Unbind", "Cat", "Stack"),
    *("AccumulateGrad",),
}
"""operators that round once, or not at all"""
_NEAR = 64
"""steps that outputs may be apart which are not given away"""
_PLANS: WeakKeyDictionary[nn.Module, dict[Any, Spreading | None]] = WeakKeyDictionary()
