"""The statement of a theorem, evaluated on rational numbers.

A proof shows that a statement follows; it does not show that the statement says what was meant, or that its hypotheses
can be met. Evaluating it on numbers shows both. Sequences are junk outside their bounds: no statement may depend on it.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable
from fractions import Fraction
from functools import reduce
from typing import Any

from proofs.logic import Formula, Theorem, children, z3

JUNK = Fraction(991, 7)
RANGE = range(-2, 7)
"""the integers a "for all" is tried on: it must hold the indices of the instances"""


def power_of_two(x: Fraction) -> Fraction:
    """An exact stand-in for exp, which satisfies exp(x + y) = exp(x) exp(y), on integers.

    Raises `ValueError` for anything else.
    """
    if x.denominator != 1:
        raise ValueError(f"exp is evaluated on integers only, not {x}")
    return Fraction(2) ** int(x)


def exact_sqrt(x: Fraction) -> Fraction:
    """The square root of the square of a rational.

    Raises `ValueError` for anything else.
    """
    root = Fraction(math.isqrt(x.numerator), math.isqrt(x.denominator))
    if root * root != x:
        raise ValueError(f"{x} is not the square of a rational")
    return root


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "sum": lambda f, n: sum((f(i) for i in range(n)), Fraction(0)),
    "exp": power_of_two,
    "sqrt": exact_sqrt,
}


def evaluate(theorem: Theorem, values: dict[str, Any]) -> tuple[bool, bool]:
    """(whether the hypotheses hold, whether the conclusion does) of `for all x: hypotheses -> conclusion`."""
    statement = theorem.statement
    env = tuple(_function(values[statement.var_name(i).split("!")[0]]) for i in range(statement.num_vars()))
    read, body, hypotheses = _Reader(), statement.body(), True
    while z3.is_implies(body):
        hypotheses = hypotheses and bool(read(body.arg(0))(env))
        body = body.arg(1)
    return hypotheses, (not hypotheses) or bool(read(body)(env))


def _function(x: Any) -> Any:
    """Lists become sequences, lists of lists sequences of sequences, junk outside."""
    if not isinstance(x, list):
        return x
    inside, junk = [_function(e) for e in x], _junk(x[0] if x else None)
    return lambda i: inside[i] if 0 <= i < len(inside) else junk


def _junk(like: Any) -> Any:
    if not isinstance(like, list):
        return JUNK
    deeper = _junk(like[0] if like else None)
    return lambda i: deeper


Meaning = Callable[[tuple[Any, ...]], Any]
"""what a term means, given the values of its bound variables, innermost last"""


class _Reader:
    """Turns terms into Python functions, once each; a function remembers the values it gave."""

    def __init__(self) -> None:
        self.known: dict[int, tuple[Formula, Meaning, frozenset[int]]] = {}

    def __call__(self, t: Formula) -> Meaning:
        return self._entry(t)[1]

    def _entry(self, t: Formula) -> tuple[Formula, Meaning, frozenset[int]]:
        if t.get_id() not in self.known:
            self.known[t.get_id()] = (t, *self._remembering(t))
        return self.known[t.get_id()]

    def _remembering(self, t: Formula) -> tuple[Meaning, frozenset[int]]:
        meaning, free = self._meaning(t)
        if z3.is_var(t) or not children(t):
            return meaning, free
        places, memory = sorted(free), {}

        def remembered(env: tuple[Any, ...]) -> Any:
            key = tuple(env[-1 - k] for k in places)
            if key not in memory:
                memory[key] = meaning(env)
            return memory[key]

        return remembered, free

    def _meaning(self, t: Formula) -> tuple[Meaning, frozenset[int]]:
        if z3.is_var(t):
            place = z3.get_var_index(t)
            return lambda env: env[-1 - place], frozenset({place})
        if z3.is_quantifier(t):
            return self._binder(t)
        parts = [self(c) for c in children(t)]
        free = frozenset().union(*(self._entry(c)[2] for c in children(t)))
        return self._operation(t, parts), free

    def _binder(self, t: Formula) -> tuple[Meaning, frozenset[int]]:
        body, inner = self._entry(t.body())[1:]
        free = frozenset(k - t.num_vars() for k in inner if k >= t.num_vars())
        if t.is_lambda():
            return lambda env: lambda i: body((*env, i)), free
        indices = list(itertools.product(RANGE, repeat=t.num_vars()))
        return lambda env: all(body((*env, *i)) for i in indices), free

    def _operation(self, t: Formula, parts: list[Meaning]) -> Meaning:
        if z3.is_rational_value(t):
            number: Any = Fraction(t.as_string())
            return lambda env: number
        if z3.is_int_value(t):
            integer = t.as_long()
            return lambda env: integer
        kind = t.decl().kind()
        if kind in _LAZY:
            return lambda env: _LAZY[kind](env, *parts)
        if kind == z3.Z3_OP_UNINTERPRETED and not parts:
            return lambda env: JUNK  # a value that the statement must not depend on
        apply = FUNCTIONS[t.decl().name()] if kind == z3.Z3_OP_UNINTERPRETED else _EAGER[kind]
        return lambda env: apply(*(part(env) for part in parts))


def _divide(a: Any, b: Any) -> Fraction:
    return Fraction(a) / b if b else Fraction(0)  # z3 leaves x / 0 open; a proved statement may not depend on it


_LAZY: dict[int, Callable[..., Any]] = {}
_EAGER: dict[int, Callable[..., Any]] = {}
if z3 is not None:
    _LAZY = {
        z3.Z3_OP_IMPLIES: lambda env, a, b: not a(env) or b(env),
        z3.Z3_OP_ITE: lambda env, test, yes, no: (yes if test(env) else no)(env),
        z3.Z3_OP_AND: lambda env, *parts: all(part(env) for part in parts),
        z3.Z3_OP_OR: lambda env, *parts: any(part(env) for part in parts),
    }
    _EAGER = {
        z3.Z3_OP_SELECT: lambda f, i: f(i),
        z3.Z3_OP_ADD: lambda *a: sum(a),
        z3.Z3_OP_MUL: lambda *a: reduce(operator.mul, a),
        z3.Z3_OP_SUB: lambda *a: reduce(operator.sub, a),
        z3.Z3_OP_UMINUS: operator.neg,
        z3.Z3_OP_DIV: _divide,
        z3.Z3_OP_LE: operator.le,
        z3.Z3_OP_LT: operator.lt,
        z3.Z3_OP_GE: operator.ge,
        z3.Z3_OP_GT: operator.gt,
        z3.Z3_OP_EQ: operator.eq,
        z3.Z3_OP_DISTINCT: operator.ne,
        z3.Z3_OP_NOT: operator.not_,
        z3.Z3_OP_TO_REAL: Fraction,
        z3.Z3_OP_TRUE: lambda: True,
        z3.Z3_OP_FALSE: lambda: False,
    }
