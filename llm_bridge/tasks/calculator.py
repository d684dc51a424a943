"""A calculator that may be handed anything: rational arithmetic on what Python's parser makes of a text, no eval.

Exact (`Fraction`), with limits on the length of the text and on the size of numbers: a policy will try 9**9**9.
"""

import ast
import operator
import re
from collections.abc import Callable
from fractions import Fraction

LONGEST = 100
"""characters"""
LARGEST = 10**30
"""of numerators and denominators"""

OPERATORS: dict[type[ast.AST], Callable[..., Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}


class CalculatorError(ValueError):
    """What the calculator says about an input that it cannot evaluate; short, as the policy reads it."""


def calculate(text: str) -> Fraction:
    """The exact value of an expression of whole numbers, + - * / and parentheses.

    >>> print(calculate("12*7 - 4"), calculate("(1+2)/-4"))
    80 -3/4
    >>> calculate("9**9**9")
    Traceback (most recent call last):
    ...
    llm_bridge.tasks.calculator.CalculatorError: syntax

    Raises CalculatorError: `too long`, `syntax`, `zero` (division by it), `too large`.
    """
    try:
        return _value(_parse(text))
    except ZeroDivisionError:
        raise CalculatorError("zero") from None


def numbers_in(text: str) -> list[int]:
    """The numbers written in an expression, sorted."""
    constants = (node.value for node in ast.walk(_parse(text)) if isinstance(node, ast.Constant))
    return sorted(value for value in constants if isinstance(value, int))


def operations_in(text: str) -> int:
    """How many binary operations an expression has."""
    return sum(isinstance(node, ast.BinOp) for node in ast.walk(_parse(text)))


def _parse(text: str) -> ast.expr:
    if len(text) > LONGEST:
        raise CalculatorError("too long")
    if not re.fullmatch(r"[0-9+\-*/() ]*", text):
        raise CalculatorError("syntax")
    try:
        return ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, MemoryError, RecursionError):
        raise CalculatorError("syntax") from None


def _value(node: ast.expr) -> Fraction:
    match node:
        case ast.Constant(value=int() as value):
            return _bounded(Fraction(value))
        case ast.UnaryOp(op=op, operand=operand) if type(op) in OPERATORS:
            return OPERATORS[type(op)](_value(operand))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            return _bounded(OPERATORS[type(op)](_value(left), _value(right)))
    raise CalculatorError("syntax")


def _bounded(value: Fraction) -> Fraction:
    if max(abs(value.numerator), value.denominator) > LARGEST:
        raise CalculatorError("too large")
    return value
