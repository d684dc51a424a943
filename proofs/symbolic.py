"""Arrays of unknown length: what the shipped functions are run on to learn what they compute.

A `SymbolicArray` has a shape, whose entries are numbers or `Length`s (an unknown n), and an element: a function from
indices to a term. Adding two of them adds elements; summing over an axis of length n writes down the finite sum. They
answer `__array_namespace__`, so `vcposim`'s functions take them for arrays of one more library and return, element by
element, the formula that the function *is*.

What a term is, is left to an `Algebra`: real arithmetic in z3 (`Real`, for `sums.py` to prove things about) or Coq text
(`coq_export.py`).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from types import SimpleNamespace
from typing import Any, Protocol

from proofs.logic import EXP, SQRT, SUM, Formula, z3

Term = Any
Index = Any


class Algebra(Protocol):
    """How terms are written."""

    def number(self, value: Any) -> Term:
        """A constant, a `Parameter` or a `Length` as a term."""

    def false(self) -> Term:
        """The truth value."""

    def first(self) -> Index:
        """The index 0."""

    def add(self, element: Callable[[Index], Term], length: Term) -> Term:
        """sum_{k < length} element(k)."""

    def add_before(self, element: Callable[[Index], Term], index: Index, length: Term) -> Term:
        """sum_{k < index} element(k), `index` itself one of `length`."""

    def mirrored(self, index: Index, length: Term) -> Index:
        """length - 1 - index."""

    def where(self, test: Term, yes: Term, no: Term) -> Term:
        """`yes` if the test holds, else `no`."""

    def minimum(self, x: Term, y: Term) -> Term:
        """min(x, y)."""

    def maximum(self, x: Term, y: Term) -> Term:
        """max(x, y)."""

    def power(self, x: Term, exponent: Any) -> Term:
        """x^exponent, for the exponents that the algebra knows."""

    def compare(self, name: str, x: Term, y: Any) -> Term:
        """x `name` y, where `name` is ==, <, <=, > or >=."""

    def logic(self, name: str, x: Term, y: Term) -> Term:
        """x `name` y for truth values."""

    def exp(self, x: Term) -> Term:
        """e^x."""

    def sqrt(self, x: Term) -> Term:
        """The square root, where the algebra has one."""


@dataclass(frozen=True)
class Length:
    """An unknown number of samples, coordinates, groups: `size` plus a known `offset`."""

    size: Any
    offset: int = 0

    def __add__(self, other: int) -> Length:
        return Length(self.size, self.offset + other)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Length) and self.offset == other.offset and str(self.size) == str(other.size)

    def __hash__(self) -> int:
        return hash((str(self.size), self.offset))

    @property
    def term(self) -> Any:
        """size + offset as a term."""
        return self.size + self.offset if self.offset else self.size


@dataclass(frozen=True)
class Parameter:
    """An unknown number handed to a configuration (a cap, a reference), which checks its range.

    It says yes to every range check; the theorem states the range as a hypothesis.
    """

    term: Any

    def _within(self, other: object) -> bool:
        return True

    __lt__ = __le__ = __gt__ = __ge__ = _within


class SymbolicArray:
    """shape (entries: int or Length), and at(*indices) -> term."""

    def __init__(self, algebra: Algebra, shape: tuple[Any, ...], at: Callable[..., Term]) -> None:
        self.algebra, self.shape, self.at = algebra, shape, at

    @property
    def dtype(self) -> str:
        """One for all: elements are terms."""
        return "symbol"

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def term(self) -> Term:
        """The only element of an array without axes, or with axes of length 1 only."""
        return self.at(*(self.algebra.first() for _ in self.shape))

    def __array_namespace__(self, *, api_version: str | None = None) -> Any:
        return namespace_of(self.algebra)

    def _lift(self, op: Callable[[Term, Term], Term], other: Any) -> SymbolicArray:
        if not isinstance(other, SymbolicArray):
            number = self.algebra.number(other)
            return SymbolicArray(self.algebra, self.shape, lambda *i: op(self.at(*i), number))
        shape = broadcast(self.shape, other.shape)
        return SymbolicArray(self.algebra, shape, lambda *i: op(_pick(self, i), _pick(other, i)))

    def __add__(self, o: Any) -> SymbolicArray:
        return self._lift(operator.add, o)

    def __sub__(self, o: Any) -> SymbolicArray:
        return self._lift(operator.sub, o)

    def __mul__(self, o: Any) -> SymbolicArray:
        return self._lift(operator.mul, o)

    def __truediv__(self, o: Any) -> SymbolicArray:
        return self._lift(operator.truediv, o)

    def __rsub__(self, o: Any) -> SymbolicArray:
        return self._lift(lambda x, y: y - x, o)

    def __rtruediv__(self, o: Any) -> SymbolicArray:
        return self._lift(lambda x, y: y / x, o)

    __radd__, __rmul__ = __add__, __mul__

    def __abs__(self) -> SymbolicArray:
        return self.map(lambda x: self.algebra.maximum(x, 0 - x))

    def __neg__(self) -> SymbolicArray:
        return 0 - self

    def __pow__(self, exponent: Any) -> SymbolicArray:
        return self.map(lambda x: self.algebra.power(x, exponent))

    def _compare(self, name: str, other: Any) -> SymbolicArray:
        if isinstance(other, float) and math.isinf(other):  # a symbolic number is finite
            return self.map(lambda x: self.algebra.false()) if name == "==" else _refuse(f"comparison {name} {other}")
        return self._lift(lambda x, y: self.algebra.compare(name, x, y), other)

    def __eq__(self, o: object) -> SymbolicArray:  # type: ignore[override]
        return self._compare("==", o)

    def __lt__(self, o: Any) -> SymbolicArray:
        return self._compare("<", o)

    def __le__(self, o: Any) -> SymbolicArray:
        return self._compare("<=", o)

    def __gt__(self, o: Any) -> SymbolicArray:
        return self._compare(">", o)

    def __ge__(self, o: Any) -> SymbolicArray:
        return self._compare(">=", o)

    def __and__(self, o: Any) -> SymbolicArray:
        return self._lift(lambda x, y: self.algebra.logic("and", x, y), o)

    __hash__ = None  # type: ignore[assignment]

    def __getitem__(self, key: tuple[Any, ...]) -> SymbolicArray:
        """[..., None], [..., :1] and [..., :-1], the only three that the kernel uses."""
        _, last = key
        if last is None:
            return _expand_dims(self, axis=-1)
        if last == slice(None, 1):
            return SymbolicArray(self.algebra, (*self.shape[:-1], 1), self.at)
        if last == slice(None, -1):
            return SymbolicArray(self.algebra, (*self.shape[:-1], self.shape[-1] + -1), self.at)
        return _refuse(f"index {key}")

    def map(self, op: Callable[[Term], Term]) -> SymbolicArray:
        """op of every element."""
        return SymbolicArray(self.algebra, self.shape, lambda *i: op(self.at(*i)))


def _refuse(what: str) -> Any:
    raise NotImplementedError(f"symbolic arrays have no {what}; add it, with its meaning, to proofs/symbolic.py")


def broadcast(a: tuple[Any, ...], b: tuple[Any, ...]) -> tuple[Any, ...]:
    """The common shape, by the usual rules: align at the right, 1 stretches."""
    n = max(len(a), len(b))
    pairs = zip((1,) * (n - len(a)) + a, (1,) * (n - len(b)) + b, strict=True)
    return tuple(_common(x, y) for x, y in pairs)


def _common(x: Any, y: Any) -> Any:
    if x == y or y == 1:
        return x
    return y if x == 1 else _refuse(f"broadcast of lengths {x} and {y}")


def _pick(x: SymbolicArray, index: tuple[Index, ...]) -> Term:
    own = index[len(index) - x.ndim :]
    return x.at(*(x.algebra.first() if n == 1 else i for n, i in zip(x.shape, own, strict=True)))


def _expand_dims(x: SymbolicArray, *, axis: int) -> SymbolicArray:
    at = axis % (x.ndim + 1)
    return SymbolicArray(x.algebra, (*x.shape[:at], 1, *x.shape[at:]), lambda *i: x.at(*i[:at], *i[at + 1 :]))


def _sum(x: SymbolicArray, *, axis: int | tuple[int, ...] | None = None, keepdims: bool = False) -> SymbolicArray:
    axes = tuple(range(x.ndim)) if axis is None else (axis,) if isinstance(axis, int) else axis
    for a in sorted((a % x.ndim for a in axes), reverse=True):
        x = _sum_over(x, a, keepdims)
    return x


def _sum_over(x: SymbolicArray, axis: int, keepdims: bool) -> SymbolicArray:
    n, algebra = x.shape[axis], x.algebra
    keep = (1,) if keepdims else ()

    def at(*i: Index) -> Term:
        before, after = i[:axis], i[axis + len(keep) :]
        element = lambda k: x.at(*before, k, *after)  # noqa: E731
        return element(algebra.first()) if n == 1 else algebra.add(element, n.term)

    return SymbolicArray(algebra, (*x.shape[:axis], *keep, *x.shape[axis + 1 :]), at)


def _cumulative_sum(x: SymbolicArray, *, axis: int, include_initial: bool) -> SymbolicArray:
    if axis != -1 or not include_initial:
        _refuse(f"cumulative_sum(axis={axis}, include_initial={include_initial})")
    n = x.shape[-1]
    at = lambda *i: x.algebra.add_before(lambda k: x.at(*i[:-1], k), i[-1], n.term)  # noqa: E731
    return SymbolicArray(x.algebra, (*x.shape[:-1], n + 1), at)


def _flip(x: SymbolicArray, *, axis: int) -> SymbolicArray:
    if axis != -1:
        _refuse(f"flip(axis={axis})")
    n = x.shape[-1]
    return SymbolicArray(x.algebra, x.shape, lambda *i: x.at(*i[:-1], x.algebra.mirrored(i[-1], n.term)))


def namespace_of(algebra: Algebra) -> Any:
    """The part of the array API that the kernel uses, for arrays over `algebra`."""

    def lift(value: Any) -> SymbolicArray:
        if isinstance(value, SymbolicArray):
            return value
        term = algebra.number(value)
        return SymbolicArray(algebra, (), lambda: term)

    def where(test: SymbolicArray, yes: Any, no: Any) -> SymbolicArray:
        t, y, n = lift(test), lift(yes), lift(no)
        shape = broadcast(broadcast(t.shape, y.shape), n.shape)
        return SymbolicArray(algebra, shape, lambda *i: algebra.where(_pick(t, i), _pick(y, i), _pick(n, i)))

    return SimpleNamespace(
        __name__=f"symbolic.{type(algebra).__name__}",
        sum=_sum,
        cumulative_sum=_cumulative_sum,
        flip=_flip,
        where=where,
        expand_dims=_expand_dims,
        minimum=lambda x, y: lift(x)._lift(algebra.minimum, y),
        maximum=lambda x, y: lift(x)._lift(algebra.maximum, y),
        ones_like=lambda x: x.map(lambda _: algebra.number(1)),
        zeros_like=lambda x: x.map(lambda _: algebra.number(0)),
        exp=lambda x: x.map(algebra.exp),
        sqrt=lambda x: x.map(algebra.sqrt),
        isdtype=lambda dtype, kind: False,  # exact: no kind of floats
    )


class Real:
    """Terms are z3 terms over the reals; a sum is the `sum` of `logic.py`."""

    def number(self, value: Any) -> Formula:
        """A real constant or expression; NaN is an unknown real, so that no theorem can depend on it."""
        if isinstance(value, Parameter):
            return value.term
        if isinstance(value, Length):
            return z3.ToReal(value.term)
        if z3.is_expr(value):
            return z3.ToReal(value) if value.sort() == z3.IntSort() else value
        if isinstance(value, float) and math.isnan(value):
            return z3.Real("undefined")  # any number: no theorem can depend on it
        exact = Fraction(str(value)) if isinstance(value, float) else Fraction(value)
        return z3.RealVal(f"{exact.numerator}/{exact.denominator}")

    def false(self) -> Formula:
        """z3's."""
        return z3.BoolVal(False)

    def first(self) -> Formula:
        """The integer 0."""
        return z3.IntVal(0)

    def add(self, element: Callable[[Index], Formula], length: Formula) -> Formula:
        """SUM of the sequence of elements: a function that `sums.py` has axioms for."""
        i = z3.FreshInt("i")
        return SUM(z3.Lambda([i], element(i)), length)

    def add_before(self, element: Callable[[Index], Formula], index: Formula, length: Formula) -> Formula:
        """SUM of the same sequence, cut at `index`."""
        return self.add(element, index)

    def mirrored(self, index: Formula, length: Formula) -> Formula:
        """length - 1 - index."""
        return length - 1 - index

    def where(self, test: Formula, yes: Formula, no: Formula) -> Formula:
        """z3's if."""
        return z3.If(test, yes, no)

    def minimum(self, x: Formula, y: Formula) -> Formula:
        """By cases."""
        return z3.If(x <= y, x, y)

    def maximum(self, x: Formula, y: Formula) -> Formula:
        """By cases."""
        return z3.If(x >= y, x, y)

    def power(self, x: Formula, exponent: Any) -> Formula:
        """Powers 1 and 2; others are refused."""
        if exponent not in (1, 2):
            _refuse(f"power {exponent}")
        return x if exponent == 1 else x * x

    def compare(self, name: str, x: Formula, y: Any) -> Formula:
        """z3's comparison by the operator's name."""
        return {"==": operator.eq, "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}[name](x, y)

    def logic(self, name: str, x: Formula, y: Formula) -> Formula:
        """A conjunction, the only connective that the shipped functions use."""
        return z3.And(x, y)

    def exp(self, x: Formula) -> Formula:
        """A function of which the solver knows nothing but what a proof states."""
        return EXP(x)

    def sqrt(self, x: Formula) -> Formula:
        """A function of which the solver knows nothing but what a proof states."""
        return SQRT(x)


REAL_ALGEBRA = Real()


def vector(name: Formula, n: Formula) -> SymbolicArray:
    """The array (n,) whose elements are those of the sequence `name`."""
    return SymbolicArray(REAL_ALGEBRA, (Length(n),), lambda i: name[i])


def matrix(name: Formula, n: Formula, d: Formula) -> SymbolicArray:
    """The array (n, d) whose elements are name(i)(j)."""
    return SymbolicArray(REAL_ALGEBRA, (Length(n), Length(d)), lambda i, j: name[i][j])


def scalar(term: Formula) -> SymbolicArray:
    """The array () holding `term`."""
    return SymbolicArray(REAL_ALGEBRA, (), lambda: term)
