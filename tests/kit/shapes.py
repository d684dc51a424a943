"""Docstrings state shapes as NumPy's generalized ufuncs write theirs, and here they are held to it.

    E[x] over the last axis: (..., n), (..., n) -> (...).

Before the arrow stands one shape for each array argument, in order; one alone speaks for all of them; a name before a
shape, as in `unit (..., 1)`, says whose it is. `same` is any shapes that broadcast together. Without an arrow,
`: (..., n)` is the shape of what is returned; several in that sentence are alternatives, as are `(n,) or (n, t)`. A
word after the arrow is a result that is no array. Where no arrow says what is given, an argument that stands right
before a shape, as in "the heaviest of `weight` (n,)", has it.

In a shape, `...` and `*row` are any axes, which broadcast between arguments and come out whole; a name is one size for
the whole call; a number is itself. A `Batch` among the arguments fixes `...`, n and (with token ratios) t. What has no
shape, a number or None, is not looked at.

This is the lighter one of two ways, annotations of jaxtyping being the other: a shape is written once, the same
functions take NumPy arrays, torch tensors, rationals and symbols, and users import nothing for it. `install` wraps what
is imported from then on: `tests/conftest.py` calls it, so that every test of the suite is a test of the docstrings too.
"""

import functools
import importlib.abc
import importlib.machinery
import inspect
import re
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

_SIZE = r"(?:\.\.\.|\*?[A-Za-z]\w*(?: [+-] \d+)?|\d+)"
_SHAPE = rf"\((?:\.\.\.|{_SIZE},|{_SIZE}(?:, {_SIZE})+)?\)"
_EITHER = rf"{_SHAPE}(?:,? or {_SHAPE})*"
_GIVEN = rf"(?:same|(?:`?\w+`? )?{_EITHER}(?:,? (?:and )?(?:`?\w+`? )?{_EITHER})*)"
_ARROW = re.compile(rf"(?:({_GIVEN}) )?-> (same|{_EITHER}(?:, {_EITHER})*|[a-z]+)")
_RESULT = re.compile(rf":\s({_SHAPE}(?:{_SHAPE}|[^.:])*)")
_BESIDE = re.compile(rf"\b(\w+)`? ({_EITHER})")
_NAMED = re.compile(rf"(?:`?(\w+)`? )?({_EITHER})")

Shape = tuple[str, ...]


@dataclass(frozen=True)
class Signature:
    """What a docstring says: alternatives for each array argument, by name, and for each result."""

    given: dict[str, list[Shape] | None]
    """None: anything that broadcasts with the others"""
    result: list[list[Shape]] | None
    """None: what the arguments broadcast to; empty: it does not say"""


class WrongShape(AssertionError):
    """A function was called with, or returned, another shape than its docstring states."""


def shapes(text: str) -> list[Shape]:
    """All shapes in a text."""
    return [
        tuple(size.strip() for size in found.strip("()").split(",") if size.strip())
        for found in re.findall(_SHAPE, text)
    ]


def is_array(annotation: str) -> bool:
    """Whether a parameter annotated so is one array."""
    return bool(
        re.search(r"\b(Array|array|Tensor|ndarray)\b", annotation)
        and not re.search(r"Callable|Mapping|Sequence|list|dict|tuple", annotation)
    )


def signature_of(function: Callable[..., Any]) -> Signature | None:
    """What a docstring says of shapes; None if nothing. `WrongShape` if it does not fit the arguments."""
    parameters = inspect.signature(function).parameters.items()
    arrays = [name for name, parameter in parameters if is_array(str(parameter.annotation))]
    return stated(function.__doc__ or "", arrays, function.__qualname__)


def stated(docstring: str, arrays: list[str], function: str) -> Signature | None:
    """`signature_of`, of a function's docstring and the names of its array parameters."""
    text = " ".join(re.sub(r"\n\s*(>>>|Raises)[\s\S]*", "", docstring).split())
    arrow = _ARROW.search(text)
    given: dict[str, list[Shape] | None] = {
        name: shapes(either) for name, either in _BESIDE.findall(text) if name in arrays
    }
    if arrow is None:
        result = _RESULT.search(text)
        if result is None:
            return Signature(given, [[]]) if given else None
        return Signature(given, [shapes(result[1])])
    if arrow[1] == "same":
        given = dict.fromkeys(arrays)
    elif arrow[1]:
        before = [(name, shapes(either)) for name, either in _NAMED.findall(arrow[1])]
        given = {name: either for name, either in before if name in arrays}
        unnamed = [either for name, either in before if name not in arrays]
        rest = [name for name in arrays if name not in given]
        if len(unnamed) == 1:
            unnamed = unnamed * len(rest)
        if unnamed and len(unnamed) != len(rest):
            raise WrongShape(f"{function}: {len(unnamed)} shapes for the arguments {rest}")
        given |= dict(zip(rest, unnamed, strict=False))
    if arrow[2] == "same":
        return Signature(given, None)
    if arrow[2].isalpha():
        return Signature(given, [[]])
    return Signature(given, [shapes(one) for one in re.findall(_EITHER, arrow[2])])


def broadcast(first: Shape | tuple[Any, ...], second: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """The common shape, or None; sizes may be symbols."""
    long, short = (first, second) if len(first) >= len(second) else (second, first)
    out = list(long)
    for k, size in enumerate(short, start=len(long) - len(short)):
        if out[k] == 1:
            out[k] = size
        elif size != 1 and out[k] != size:
            return None
    return tuple(out)


def bind(stated: Shape, shape: tuple[Any, ...], known: dict[str, Any], result: bool = False) -> dict[str, Any] | None:
    """What the names stand for if an array of this shape is as stated; None if it is not."""
    known = dict(known)
    free = [k for k, size in enumerate(stated) if size == "..." or size.startswith("*")]
    if (len(shape) < len(stated) - 1) if free else (len(shape) != len(stated)):
        return None
    if free:
        (k,) = free
        after = len(stated) - k - 1
        # the axes before a group are fewer than those before a sample
        lead, name = shape[k : len(shape) - after], "before group" if "group" in stated else stated[k]
        if result and name in known:
            if tuple(known[name]) != tuple(lead):
                return None
        else:
            common = broadcast(known.get(name, ()), lead)
            if common is None:
                return None
            known[name] = common
        shape, stated = (*shape[:k], *shape[len(shape) - after :]), (*stated[:k], *stated[k + 1 :])
    for size, name in zip(shape, stated, strict=True):
        if name.isdigit():
            if size != int(name):
                return None
        elif name.isidentifier():
            if name in known and known[name] != size:
                return None
            known[name] = size
    return known


def shape_of(value: Any) -> tuple[Any, ...] | None:
    """The shape of an array, None of anything else."""
    shape = getattr(value, "shape", None)
    return tuple(shape) if isinstance(shape, tuple | list) else None


def _of_batch(value: Any) -> Iterator[tuple[Shape, tuple[Any, ...]]]:
    batch = getattr(value, "batch", value)
    if type(batch).__name__ == "Batch" and type(batch).__module__ == "vcposim.batch":
        # fields alone: its properties are checked too, and would come back here
        reward, ratio = (
            tuple(x.shape) for x in (batch.reward, batch.log_ratio if batch.ratio is None else batch.ratio)
        )
        yield ("...", "n"), reward
        if batch.grouped:
            yield ("...", "group", "n"), reward
        if len(ratio) > len(reward):
            yield ("...", "n", "t"), ratio


def check(signature: Signature, given: dict[str, Any], returned: Any) -> str | None:
    """What is wrong with the shapes of a call, None if nothing."""
    known: dict[str, Any] = {}
    for value in given.values():
        for stated, shape in _of_batch(value):
            known = bind(stated, shape, known) or known
    common: tuple[Any, ...] = ()
    for name, either in signature.given.items():
        found = shape_of(given.get(name))
        if found is None:
            continue
        if either is None:
            both = broadcast(common, found)
            if both is None:
                return f"{name} of shape {found} does not broadcast with {common}"
            common = both
            continue
        bound = next((b for one in either if (b := bind(one, found, known)) is not None), None)
        if bound is None:
            return f"{name} has shape {found}, stated is {either} where {known}"
        known = bound
    if signature.result is None:
        shape = shape_of(returned) or ()
        return None if shape == common else f"returns shape {shape}, stated is that of the arguments, {common}"
    if returned is None:
        return None
    several = len(signature.result) > 1
    if several and not (isinstance(returned, tuple) and len(returned) == len(signature.result)):
        return f"returns {type(returned).__name__}, stated are {len(signature.result)} arrays"
    for value, either in zip(returned if several else (returned,), signature.result, strict=True):
        found = shape_of(value)
        if found is None:
            continue
        if either and not any(bind(one, found, known, result=True) is not None for one in either):
            return f"returns shape {found}, stated is {either} where {known}"
    return None


def _sizes(value: Any) -> Any:
    """What `check` looks at in a value, to be compared and hashed quickly: it is asked at every call."""
    kind = type(value)
    if kind is float or kind is int or kind is str or value is None:
        return None
    shape = getattr(value, "shape", None)
    if shape is not None:
        return tuple(shape) if isinstance(shape, tuple | list) else None
    if kind is tuple:
        return tuple(map(_sizes, value))
    return tuple(shape for _, shape in _of_batch(value))


def checked(function: Any) -> Any:
    """The function, its shapes compared with its docstring at every new combination of shapes."""
    if not isinstance(function, types.FunctionType) or hasattr(function, "__wrapped__"):
        return function
    signature = signature_of(function)
    if signature is None or inspect.isgeneratorfunction(function):
        return function
    parameters, seen = list(inspect.signature(function).parameters), set()

    def compare(args: tuple[Any, ...], kwargs: dict[str, Any], returned: Any) -> None:
        key = (len(args), *kwargs, *map(_sizes, args), *map(_sizes, kwargs.values()), _sizes(returned))
        if key in seen:
            return
        if wrong := check(signature, dict(zip(parameters, args, strict=False)) | kwargs, returned):
            raise WrongShape(f"{function.__module__}.{function.__qualname__}: {wrong}")
        seen.add(key)

    def call(*args: Any, **kwargs: Any) -> Any:
        returned = function(*args, **kwargs)
        compare(args, kwargs, returned)
        return returned

    # with the module's own globals, or doctest would take it for an import and not look at it
    twin = types.FunctionType(call.__code__, function.__globals__, function.__name__, None, call.__closure__)
    return functools.update_wrapper(twin, function)


def check_module(module: types.ModuleType) -> None:
    """Puts `checked` functions and methods in the place of the module's own."""
    for name, value in list(vars(module).items()):
        if getattr(value, "__module__", None) != module.__name__:
            continue
        if isinstance(value, types.FunctionType):
            setattr(module, name, checked(value))
        elif isinstance(value, type) and not getattr(value, "_is_protocol", False):
            for member, method in list(vars(value).items()):
                if isinstance(method, types.FunctionType) and checked(method) is not method:
                    setattr(value, member, checked(method))
                elif isinstance(method, property) and method.fget and checked(method.fget) is not method.fget:
                    setattr(value, member, property(checked(method.fget), method.fset, method.fdel, method.__doc__))


class _Loader(importlib.abc.Loader):
    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def create_module(self, spec: Any) -> Any:
        return self.inner.create_module(spec)

    def exec_module(self, module: types.ModuleType) -> None:
        self.inner.exec_module(module)
        check_module(module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


ROOMS = (
    *("vcposim.laboratory", "vcposim.problems", "vcposim.gauges", "vcposim.learning"),
    *("vcposim.pipeline", "vcposim.testing", "vcposim.comparison", "vcposim.replay"),
    *("llm_bridge", "simulations", "proofs"),
)
"""packages and modules whose docstrings are checked, beside the formulas on top of vcposim"""


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        formula = re.fullmatch(r"vcposim\.\w+", name)
        if not formula and not any(name == room or name.startswith(f"{room}.") for room in ROOMS):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        package = spec is not None and spec.submodule_search_locations is not None
        source = spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader)
        if spec is not None and source and not (formula and package):
            spec.loader = _Loader(spec.loader)
        return spec


def install() -> None:
    """Check the modules of `ROOMS` and the formulas that are imported from now on."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
