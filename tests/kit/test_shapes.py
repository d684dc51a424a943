"""The check of docstrings' shapes rejects what it must, takes every kind of array, and leaves no formula out."""

import ast
import doctest
import re
import types
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.kit.shapes import WrongShape, checked, is_array, shape_of, signature_of, stated
from vcposim import baselines
from vcposim.arrays import Array, expectation
from vcposim.batch import Batch
from vcposim.estimators import Estimator

ROOT = Path(__file__).parents[2]


def mean(x: Array, measure: Array) -> Array:
    """E[x]: (..., n), (..., n) -> (...)."""
    return (x * measure).sum(axis=-1)


def one_for_all(reward: Array, weight: Array, unit: Array) -> Array:
    """Of each sample: (..., n), unit (..., 1) -> (..., n)."""
    return reward * weight + unit


def either(x: Array, like: Array) -> Array:
    """x with an axis more where `like` has it: x (n,), like (n,) or (n, t) -> (n,) or (n, 1)."""
    return x[:, None] if like.ndim > 1 else x


def elementwise(x: Array, y: Array) -> Array:
    """x + y: same -> same."""
    return x + y


def parts(x: Array) -> tuple[Array, Array]:
    """Largest and its twin: (..., n) -> (..., 1), (..., n)."""
    return x.max(axis=-1, keepdims=True), x


def of_batch(batch: Batch) -> Array:
    """A coefficient: (..., n), or (..., n, t) at token level."""
    return batch.given_ratio


def beside(weight: Array) -> float:
    """The share of the heaviest of `weight` (n,)."""
    return float(weight.max() / weight.sum())


def with_docstring(function: Callable[..., Any], doc: str) -> Any:
    twin = types.FunctionType(function.__code__, function.__globals__, function.__name__)
    twin.__annotations__, twin.__doc__ = function.__annotations__, doc
    return checked(twin)


A, B, G = np.ones((3, 4)), np.ones((3, 4)), np.ones((3, 1))

RIGHT: list[tuple[Callable[..., Any], tuple[Any, ...]]] = [
    (mean, (A, B)),
    (mean, (A, np.ones(4))),
    (mean, (np.ones((2, 1, 4)), B)),
    (mean, (A, 0.5)),
    (mean, (np.array([Fraction(1, 2)] * 4), np.array([Fraction(1, 4)] * 4))),
    (one_for_all, (A, B, G)),
    (one_for_all, (A, B, 0.25)),
    (either, (np.ones(3), np.ones(3))),
    (either, (np.ones(3), np.ones((3, 5)))),
    (elementwise, (A, G)),
    (parts, (A,)),
    (of_batch, (Batch(reward=A, log_ratio=B),)),
    (of_batch, (Batch(reward=A, log_ratio=np.ones((3, 4, 5))),)),
    (beside, (np.ones(4),)),
]


@pytest.mark.parametrize(("function", "arguments"), RIGHT)
def test_what_is_as_stated_passes(function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    assert signature_of(function) is not None
    checked(function)(*arguments)


def test_torch_passes_through_the_same_docstring() -> None:
    torch = pytest.importorskip("torch")
    assert checked(mean)(torch.ones(3, 4), torch.ones(4)).shape == (3,)
    with pytest.raises(WrongShape, match="measure has shape"):
        checked(mean)(torch.ones(3, 4), torch.ones(1))


@pytest.mark.parametrize(
    ("function", "doc", "arguments", "message"),
    [
        (mean, "E[x]: (..., n), (..., n) -> (..., 1).", (A, B), "returns shape"),
        (mean, "E[x]: (..., n), (..., n) -> (..., n).", (A, B), "returns shape"),
        (mean, "E[x]: (..., n), (..., m) -> (...).", (A, B), None),  # true, if weaker
        (mean, "E[x]: (..., n), (..., n, t) -> (...).", (np.ones(4), np.ones(4)), "measure has shape"),
        (mean, "E[x]: (n,), (n,) -> ().", (A, B), "x has shape"),
        (mean, "E[x]: same -> same.", (A, B), "returns shape"),
        (one_for_all, "Of each: (..., n) -> (..., n).", (A, B, G), "unit has shape"),
        (one_for_all, "Of each: (..., n), unit (..., 2) -> (..., n).", (A, B, G), "unit has shape"),
        (either, "x: x (n,), like (n,) -> (n,).", (np.ones(3), np.ones((3, 5))), "like has shape"),
        (parts, "Both: (..., n) -> (..., 1), (..., 1).", (A,), "returns shape"),
        (parts, "Both: (..., n) -> (..., 1).", (A,), None),  # a tuple has no shape: the coverage test asks for both
        (beside, "The heaviest of `weight` (n, t).", (np.ones(4),), "weight has shape"),
        (of_batch, "c: (..., n).", (Batch(reward=A, log_ratio=np.ones((3, 4, 5))),), "returns shape"),
        (of_batch, "c: (..., 1), or (..., n, t) at token level.", (Batch(reward=A, log_ratio=B),), "returns shape"),
    ],
)
def test_a_wrong_docstring_dies(
    function: Callable[..., Any], doc: str, arguments: tuple[Any, ...], message: str | None
) -> None:
    twin = with_docstring(function, doc)
    if message is None:
        twin(*arguments)
    else:
        with pytest.raises(WrongShape, match=message):
            twin(*arguments)


def test_a_docstring_that_speaks_of_other_arguments_dies() -> None:
    with pytest.raises(WrongShape, match="2 shapes for the arguments"):
        with_docstring(one_for_all, "Of each: (..., n), (..., n) -> (..., n).")


def test_the_suite_runs_on_checked_functions() -> None:
    with pytest.raises(WrongShape, match=r"vcposim.arrays.expectation: measure has shape \(2, 1\)"):
        expectation(np.ones((1, 4)), np.ones((2, 1)))
    assert hasattr(baselines.weighted_mean, "__wrapped__")
    assert hasattr(Estimator.coefficients, "__wrapped__")


def test_doctests_of_checked_functions_are_still_found() -> None:
    from vcposim import arrays

    assert any(test.name.endswith("sum_of_others") and test.examples for test in doctest.DocTestFinder().find(arrays))


PACKAGES = ("vcposim", "llm_bridge", "simulations", "proofs")
WITHOUT_SHAPES = {
    "vcposim/batch.py: Batch.given_ratio": "its own shape, which `Batch` checks after reading it",
    "vcposim/batch.py: ScoreNorms.combine": "always refuses",
    "llm_bridge/adapters/verl.py: field": "a tensor of another library, by name",
    "llm_bridge/adapters/verl.py: refused": "always refuses",
    "llm_bridge/scores/layers.py: autocast_dtype": "asks for a type",
    "llm_bridge/scores/layers.py: is_plain": "asks for a class",
    "llm_bridge/scores/layers.py: core_of": "says a shape",
    "llm_bridge/scores/layers.py: Matrix.taped": "the layer's own forward",
    "llm_bridge/scores/layers.py: Lookup.taped": "the same",
    "llm_bridge/scores/layers.py: Unit.taped": "the same",
}
"""function -> why its docstring states no shapes"""


def functions(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef]]:
    """The public functions, methods and properties that a file defines, and what makes an object callable."""
    for holder in [tree, *(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name[0] != "_")]:
        for node in holder.body:
            if isinstance(node, ast.FunctionDef) and (node.name[0] != "_" or node.name == "__call__"):
                yield f"{holder.name}.{node.name}" if isinstance(holder, ast.ClassDef) else node.name, node


def silent(sources: dict[str, str]) -> list[str]:
    """Functions that take or return arrays and state no shape; "See `Class`" is what that class's method states."""
    found: dict[str, tuple[str, bool]] = {}
    for name, text in sources.items():
        for function, node in functions(ast.parse(text)):
            given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            arrays = [one.arg for one in given if one.annotation and is_array(ast.unparse(one.annotation))]
            returned = "" if node.returns is None else ast.unparse(node.returns)
            of_arrays = re.search(r"\b(Array|Tensor|ndarray)\b", returned) and not re.search(
                "SearchStrategy|Callable|Iterator|list|dict|Sequence", returned
            )
            if arrays or of_arrays:
                doc = ast.get_docstring(node) or ""
                found[f"{name}: {function}"] = (doc, stated(doc, arrays, function) is not None)
    spoken = {name.split(": ")[1] for name, (_, said) in found.items() if said}

    def elsewhere(name: str, doc: str) -> bool:
        twin = re.match(r"See `(?:[\w.]+\.)?(\w+)`", doc)
        return twin is not None and f"{twin[1]}.{name.rpartition('.')[2]}" in spoken

    return [name for name, (doc, said) in found.items() if not said and not elsewhere(name, doc)]


def test_every_public_function_of_arrays_states_their_shapes() -> None:
    paths = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    found = silent({path.relative_to(ROOT).as_posix(): path.read_text() for path in paths})
    assert [name for name in found if name not in WITHOUT_SHAPES] == []
    assert [name for name in WITHOUT_SHAPES if name not in found] == []


PLANTED = '''
class Family(Protocol):
    def logit(self, theta: Array) -> Array:
        """(run, p) -> (run, rows, V)."""
    def more(self, theta: Array) -> Array:
        """More."""

class Linear:
    def logit(self, theta: Array) -> Array:
        """See `Family`."""
    def more(self, theta: Array) -> Array:
        """See `Family`."""
    def least(self, x: Tensor) -> float:
        """The least of `x` (n,)."""

def largest(x: np.ndarray, size: int) -> float:
    """The largest."""

def drawn(size: int) -> Array:
    """Numbers."""
'''


def test_a_silent_function_is_found() -> None:
    found = ["Family.more", "Linear.more", "drawn", "largest"]
    assert sorted(silent({"a.py": PLANTED})) == [f"a.py: {name}" for name in found]


def test_only_arrays_have_a_shape() -> None:
    assert [shape_of(x) for x in (1.0, None, Fraction(1, 2), np.float64(1))] == [None, None, None, ()]
