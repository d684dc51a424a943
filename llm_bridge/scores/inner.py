"""A loop for one module: its own code on one trajectory after the other, while the rest of the model stays fast.

A module without any rule (experts, convolutions, mixers) is called as it is, on a graph of its own (`Inner`). When its
outputs' gradients arrive, a backward per trajectory goes through that graph, or through a second run on the
trajectory's rows alone where that gives the same output: n runs of 1 / n of the rows instead of n backwards of all.
Such a run, like every other that a plain call of the model would not make, leaves no trace (`rehearsal`).
"""

import copy
import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import is_dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, TypedDict
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.weak import WeakTensorKeyDictionary

from llm_bridge.scores.layers import Recorder, Twin, refuse_second_order
from llm_bridge.scores.layout import WHOLE_LOOP, Layout
from vcposim.errors import InputError


class Autocast(TypedDict):
    """What torch.autocast(device.type, ...) is told."""

    dtype: torch.dtype
    enabled: bool


def autocast_state(device: torch.device) -> Autocast:
    """What torch.autocast(device.type, ...) is to be told for the state of now."""
    kind = device.type
    return {"dtype": torch.get_autocast_dtype(kind), "enabled": torch.is_autocast_enabled(kind)}


def uncounted() -> Any:
    """Tensors saved in here are kept as they are, and a checkpoint around does not count them."""
    return torch.autograd.graph.saved_tensors_hooks(_without_history, lambda x: x)


def _without_history(x: Tensor) -> Tensor:
    """What a node saves, which may be its own output: with its history the two would hold each other for good."""
    return x if x.grad_fn is None else x.detach().requires_grad_(x.requires_grad)


@contextmanager
def rehearsal(tape: Recorder, module: nn.Module, device: torch.device | None) -> Iterator[None]:
    """Run a module as if it had not been run: no node of its parts, no count, no draw, no trace in its state.

    With gradients on: inside a user's own autograd.Function they are off, and its products are not ours. Outside modes
    that count operators, as selective checkpoints do.
    """
    inside, tape.inside = tape.inside, 1
    try:
        with torch.enable_grad(), uncounted(), _disable_current_modes(), untraced(module, device):
            yield
    finally:
        tape.inside = inside


@contextmanager
def untraced(module: nn.Module, device: torch.device | None) -> Iterator[None]:
    """Leave a module's attributes, its buffers and random streams, torch's, Python's and NumPy's, as they are.

    Of attributes whatever containers, namespaces and dataclasses hold; the insides of other objects are not known.
    """
    kept = [(b, b._version, b.clone()) for b in module.buffers()]
    undo = as_before([part.__dict__ for part in module.modules()], {id(b) for b, *_ in kept})
    devices = [device] if device is not None and device.type == "cuda" else []
    streams = random.getstate(), np.random.get_state()  # noqa: NPY002 - what a model's code may draw from
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(streams[0])
        np.random.set_state(streams[1])  # noqa: NPY002
        for back in undo:
            back()
        with torch.no_grad():
            for b, version, value in kept:
                if b._version != version:
                    b.copy_(value)
                else:  # batch norm writes past the count
                    b.data.copy_(value)


@contextmanager
def unwritten(name: str, module: nn.Module) -> Iterator[None]:
    """Raises InputError if a module's parameters change in here, where it runs once more than a plain call would."""
    before = sums_of(module)
    yield
    if sums_of(module) != before:
        raise InputError(
            f"{name or 'the model itself'}: its forward writes to its own parameters, and did so once more in a "
            f"run that a plain call does not make; begin again, and do that outside the model, or {WHOLE_LOOP}"
        )


def sums_of(module: nn.Module) -> list[str]:
    """Of every trainable parameter the sum and the norm; as text, in which what is not a number equals itself."""
    held = [p.detach() for p in module.parameters() if p.requires_grad and type(p) is nn.Parameter and p.numel()]
    held = [torch.view_as_real(p) if p.is_complex() else p for p in held if p.device.type != "meta"]
    return [f"{float(p.sum(dtype=torch.float64))} {float(torch.linalg.vector_norm(p))}" for p in held]


def as_before(held: Sequence[Any], seen: set[int]) -> list[Callable[[], object]]:
    """What puts back everything that these objects hold, by containers of containers: tensors and streams too.

    `seen`: by id, what is left alone; all that is found is added.
    """
    undo: list[Callable[[], object]] = []
    due = [*held]

    def refill(x: Any, old: Any) -> None:
        x.clear()
        (x.extend if isinstance(x, list | deque) else x.update)(old)

    def rewrite(x: Tensor, old: Tensor, version: int) -> None:
        if x._version != version:
            x.data.copy_(old)

    while due:
        x = due.pop()
        if id(x) in seen:
            continue
        seen.add(id(x))
        if isinstance(x, dict | list | set | deque):
            undo.append(partial(refill, x, copy.copy(x)))
            due += x.values() if isinstance(x, dict) else x
        elif isinstance(x, tuple):
            due += x
        elif isinstance(x, SimpleNamespace) or (is_dataclass(x) and not isinstance(x, type) and hasattr(x, "__dict__")):
            due.append(x.__dict__)
        elif type(x) is Tensor and not x.is_inference():
            undo.append(partial(rewrite, x, x.detach().clone(), x._version))
        elif isinstance(x, torch.Generator):
            undo.append(partial(x.set_state, x.get_state()))
        elif isinstance(x, random.Random):
            undo.append(partial(x.setstate, x.getstate()))
        elif isinstance(x, np.random.Generator):
            undo.append(partial(setattr, x.bit_generator, "state", x.bit_generator.state))
        elif isinstance(x, np.random.RandomState):
            undo.append(partial(x.set_state, x.get_state()))
    return undo


class Whole(Twin):
    """A module that is run as a whole, parts and all: a loop over trajectories through it alone."""

    def own(self) -> dict[str, nn.Parameter]:
        """None: its parameters belong to its parts, so whatever the parts hold it is run taped."""
        return {}

    def taped(self, *args: Any, **kwargs: Any) -> Any:
        """A loop over trajectories through the module."""
        return local(self, args, kwargs)


class Differs(Exception):
    """A module does not act on trajectories one by one as it does on all of them."""


class Inner:
    """One call of a module with a graph of its own: leaves in, outputs out.

    Raises `InputError` for a module that changes its input in place, or reads what an earlier call left behind.
    """

    def __init__(self, twin: Twin, args: Any, kwargs: Any) -> None:
        self.twin = twin
        leaves, self._spec = pytree.tree_flatten((args, kwargs))
        self._first = [
            next(k for k, y in enumerate(leaves) if y is x) for x in leaves
        ]  # a module may ask `key is value`
        self._leaf = [apart(x) for x in leaves]
        _LEAVES.update((x, twin.name) for x in self._leaf if isinstance(x, Tensor))
        self._again = not any(map(is_opaque, leaves))
        self._held = [*map(id, twin.module.parameters())]  # functional_call lends others, and takes them back
        self.place = [
            k for k, x in enumerate(self._leaf) if isinstance(x, Tensor) and x.requires_grad and self._first[k] == k
        ]
        self.given = [leaves[k] for k in self.place]
        self.input = [self._leaf[k] for k in self.place]
        x = first_tensor(args, kwargs)
        self.fed = any(isinstance(x, Tensor) for x in leaves)
        """whether it was given anything that may have rows"""
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
        own = {id(x) for x in self._leaf}
        back = [n for n in graph_nodes(self.out) if not hasattr(n, "variable") or id(n.variable) not in own]
        if any(isinstance(getattr(n, "twin", None), Twin) or cut_by(n) is not None for n in back):
            raise InputError(
                f"{twin.name}: reads what an earlier call left behind (a cache), to which a loop over this module "
                f"brings no gradient; {WHOLE_LOOP}"
            )
        leaves = leaf_parameters(self.out)
        self.param = [p for p in leaves if twin.tape.holds(p)]
        self.others = [p for p in leaves if id(p) not in own and not twin.tape.holds(p)]
        self.rows = next((len(y) for y in self.out if y.dim()), 0)
        self.when = twin.tape.place()
        """None while a backward runs the forward again"""

    def _call(self, leaf: Sequence[Any]) -> Any:
        args, kwargs = pytree.tree_unflatten([leaf[k] for k in self._first], self._spec)
        tape = self.twin.tape
        tape.inside += 1
        try:  # kept as they are: a checkpoint around would run again for every trajectory
            with torch.enable_grad(), uncounted(), torch.autocast(self._device.type, **self._cast):
                out = self.twin.original(*args, **kwargs)
        finally:
            tape.inside -= 1
        after, spec = pytree.tree_flatten((args, kwargs))
        if spec != self._spec or any(a is not leaf[k] for a, k in zip(after, self._first, strict=True)):
            raise InputError(
                f"{self.twin.name}: fills a list or dict that it was given, which a loop over it would not; "
                f"{tape.advice(self.twin.name)}"
            )
        return out

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

        Raises `Differs` where it does not act on trajectories one by one as on all of them.
        """
        parts: list[list[Tensor | None]] = []
        if not self._again or self._held != [*map(id, self.twin.module.parameters())]:
            raise Differs
        for i in range(layout.n):
            leaf = [layout.part(x, i) if isinstance(x, Tensor) else x for x in self._leaf]
            leaf = [apart(x) if k in self.place else x for k, x in enumerate(leaf)]
            module = self.twin.module
            with nullcontext() if module in _STEADY else unwritten(self.twin.name, module):
                try:
                    with rehearsal(self.twin.tape, module, self._device):
                        out = differentiable(self._call(leaf))
                except Exception as error:  # whatever the module's code says of fewer rows
                    raise Differs from error
            _STEADY.add(module)
            if len(out) != len(self.out):
                raise Differs
            pair = []
            for y, whole, g in zip(out, self.out, grad, strict=True):
                if g is None:
                    continue
                expected = layout.part(whole, i)
                eps = 64 * torch.finfo(y.dtype).eps
                size = float(y.abs().max()) if y.numel() else 0.0
                if y.shape != expected.shape or not torch.allclose(y, expected, rtol=eps, atol=eps * size):
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
        ctx.inner, ctx.twin, ctx.place = inner, inner.twin, inner.when
        ctx.uses, ctx.others = [("local", p) for p in inner.param], inner.others
        ctx.set_materialize_grads(False)  # an output that nobody uses has no rows to tell apart
        return tuple(y.detach() for y in inner.out)

    @staticmethod
    def backward(ctx: Any, *grad: Tensor | None) -> tuple[Tensor | None, ...]:
        inner: Inner = ctx.inner
        refuse_second_order(inner.twin)
        running = inner.twin.running(inner.when)
        if running is None:
            return None, *inner.grads(grad, [*inner.input, *inner.param])
        given = running.local(inner.twin.name, inner, grad) if inner.param else inner.grads(grad, inner.input)
        return None, *given, *[None] * len(inner.param)


def local(twin: Twin, args: Any, kwargs: Any) -> Any:
    """The module's own output, reported by a loop over trajectories."""
    inner = Inner(twin, args, kwargs)
    if inner.param:
        twin.tape.looped(twin.name)
    found = iter(_Local.apply(inner, *inner.given, *inner.param))
    graph = [next(found) if isinstance(y, Tensor) and y.requires_grad else y for y in inner.flat]
    return pytree.tree_unflatten(graph, inner.spec)


_STEADY: WeakSet[nn.Module] = WeakSet()
"""modules that were looped over, and did not write to their parameters"""
_LEAVES: Any = WeakTensorKeyDictionary()
"""inputs of modules that are looped over, where their own graphs begin, and the modules' names"""


def any_cut() -> bool:
    """Whether any graph alive was cut: a quick answer for the models that no loop ever touched."""
    return bool(_LEAVES)


def cut_by(node: Any) -> str | None:
    """The name of the module whose loop cut a graph off at this node; None where it was not cut."""
    return _LEAVES.get(node.variable) if hasattr(node, "variable") else None


def is_opaque(x: Any) -> bool:
    """Whether an argument may be changed by a call without anybody's notice, as a cache is."""
    plain = (Tensor, str, int, float, complex, torch.dtype, torch.device, slice, type(None), type(Ellipsis))
    return not isinstance(x, plain) and not callable(x)


class _Copies(TorchFunctionMode):
    """Inside, `copy.deepcopy` of an object copies the tensors it holds without their history."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not Tensor.__deepcopy__:
            return func(*args, **(kwargs or {}))
        x, memo = args
        if id(x) not in memo:
            memo[id(x)] = x if isinstance(x, nn.Parameter) else apart(x).clone()
        return memo[id(x)]


def cloned(given: Any) -> Any:
    """Arguments without a history, of a call that may change them in place; what is one object stays one."""
    leaves, spec = pytree.tree_flatten(given)
    new: dict[int, Any] = {id(x): apart(x).clone() for x in leaves if isinstance(x, Tensor)}
    for x in leaves:
        if is_opaque(x) and id(x) not in new:
            with _Copies():
                new[id(x)] = copy.deepcopy(x)
    return pytree.tree_unflatten([new.get(id(x), x) for x in leaves], spec)


def apart(x: Any) -> Any:
    """A tensor without its history, which carries a gradient if it did; anything else as it is."""
    return x.detach().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x


def first_tensor(args: Any, kwargs: Any) -> Tensor | None:
    """What a module is taken to act on, its first tensor, which is (row, time, ...) or flat: -> (...)."""
    return next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)


def differentiable(out: Any) -> list[Tensor]:
    """The tensors that carry a gradient, of any nest of containers."""
    return [y for y in pytree.tree_leaves(out) if isinstance(y, Tensor) and y.requires_grad]


def leaf_parameters(out: Sequence[Tensor]) -> list[nn.Parameter]:
    """Leaves of a graph, each once, in a fixed order; an output may be one itself."""
    leaves: list[Any] = [y for y in out if y.is_leaf and y.requires_grad]
    return list(dict.fromkeys([*leaves, *(n.variable for n in graph_nodes(out) if hasattr(n, "variable"))]))


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
