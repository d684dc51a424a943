"""The check of docstrings' shapes rejects what it must, takes every kind of array, and leaves no formula out."""

import doctest
import importlib
import inspect
import types
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.kit.shapes import WrongShape, array_parameters, checked, shape_of, signature_of
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


FORMULAS = sorted(
    f"vcposim.{path.stem}" for path in (ROOT / "vcposim").glob("*.py") if path.stem not in ("__init__", "__main__")
)
TORCH = ["llm_bridge.loss", "llm_bridge.control", "llm_bridge.ratios", "llm_bridge.moments"]
IN_ROOMS = [
    *("vcposim.laboratory.exact", "vcposim.laboratory.monte_carlo", "vcposim.comparison.statistics"),
    *("vcposim.pipeline.lengths", "vcposim.pipeline.plan", "vcposim.pipeline.simulator"),
    *("vcposim.testing.laws", "vcposim.testing.strategies"),
]
WITHOUT_SHAPES = {
    "vcposim.arrays.namespace": "any arrays, and no array comes out",
    "vcposim.arrays.require_weights": "any shape, and nothing comes out",
    "vcposim.batch.require_precision": "any shape, and nothing comes out",
    "vcposim.testing.strategies.Arms.all_batches": "K^n batches, which is no name of a size",
    "vcposim.testing.strategies.Strings.all_batches": "the same",
    "vcposim.batch.Batch.given": "the field's own shape, which `Batch` checks",
    "vcposim.batch.Batch.given_ratio": "its own shape, which `Batch` checks after reading it",
    "vcposim.batch.ScoreNorms.combine": "always refuses",
    "vcposim.surrogates.ratio_at": "the shape of `at_level`, and a scale",
    "vcposim.control.ess_rule": "makes a rule, and no array comes out",
}
"""function -> why its docstring states no shapes"""


def functions(module: str) -> Iterator[Callable[..., Any]]:
    """The public functions, methods and properties that a module defines."""
    loaded = importlib.import_module(module)
    for name, value in vars(loaded).items():
        if name.startswith("_") or getattr(value, "__module__", None) != module:
            continue
        members = [value] if inspect.isfunction(value) else vars(value).values() if inspect.isclass(value) else []
        for member in members:
            function = member.fget if isinstance(member, property) else member
            if inspect.isfunction(function) and (not function.__name__.startswith("_") or "call" in function.__name__):
                yield function


@pytest.mark.parametrize("module", [*FORMULAS, *IN_ROOMS, *TORCH])
def test_every_formula_states_its_shapes(module: str) -> None:
    if module.startswith("llm_bridge"):
        pytest.importorskip("torch")
    silent = []
    for function in functions(module):
        returned = str(inspect.signature(function).return_annotation)
        if "SearchStrategy" in returned:
            continue  # of arrays
        if (array_parameters(function) or "array" in returned or "Tensor" in returned) and not signature_of(function):
            silent.append(f"{module}.{function.__qualname__}")
    assert [name for name in silent if name not in WITHOUT_SHAPES] == []


def test_only_arrays_have_a_shape() -> None:
    assert [shape_of(x) for x in (1.0, None, Fraction(1, 2), np.float64(1))] == [None, None, None, ()]
