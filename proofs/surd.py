"""Rational numbers and their square roots, exactly: what a group's standard deviation needs.

A `Surd` is sum_r q_r sqrt(r), q_r rational and r square-free. NumPy calls its `sqrt` method when the shipped code
takes a square root of an object array, so group normalization can be enumerated without rounding.

>>> (Surd(1) / 2).sqrt() * 2 == Surd(2).sqrt()
True
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any


def _extract(n: int) -> tuple[int, int]:
    """n = square^2 * rest, rest square-free."""
    square, rest, p = 1, n, 2
    while p * p <= rest:
        while rest % (p * p) == 0:
            square, rest = square * p, rest // (p * p)
        p += 1
    return square, rest


class Surd:
    """sum_r q_r sqrt(r); division by a single term only, which is all that a standard deviation is."""

    def __init__(self, value: Any = 0) -> None:
        self.terms: dict[int, Fraction] = dict(value) if isinstance(value, dict) else {1: Fraction(value)}
        self.terms = {r: q for r, q in self.terms.items() if q}

    def _plus(self, other: Any, sign: int) -> Surd:
        terms = dict(self.terms)
        for r, q in _surd(other).terms.items():
            terms[r] = terms.get(r, Fraction(0)) + sign * q
        return Surd(terms)

    def __add__(self, other: Any) -> Surd:
        return self._plus(other, 1)

    def __sub__(self, other: Any) -> Surd:
        return self._plus(other, -1)

    def __rsub__(self, other: Any) -> Surd:
        return _surd(other)._plus(self, -1)

    def __mul__(self, other: Any) -> Surd:
        terms: dict[int, Fraction] = {}
        for r, q in self.terms.items():
            for s, p in _surd(other).terms.items():
                square, rest = _extract(r * s)
                terms[rest] = terms.get(rest, Fraction(0)) + q * p * square
        return Surd(terms)

    __radd__, __rmul__ = __add__, __mul__

    def __truediv__(self, other: Any) -> Surd:
        ((r, q),) = _surd(other).terms.items()
        return self * Surd({r: 1 / (q * r)})

    def __rtruediv__(self, other: Any) -> Surd:
        return _surd(other) / self

    def __eq__(self, other: object) -> bool:
        return self.terms == _surd(other).terms

    def __hash__(self) -> int:
        return hash(frozenset(self.terms.items()))

    def __float__(self) -> float:
        return float(sum(float(q) * math.sqrt(r) for r, q in self.terms.items()))

    def __abs__(self) -> Surd:
        return self if float(self) >= 0 else 0 - self

    def sqrt(self) -> Surd:
        """The root of a rational.

        Raises `ValueError` where that is no Surd.
        """
        if not self.terms:
            return Surd()
        ((one, q),) = self.terms.items()
        if one != 1:
            raise ValueError(f"the root of {self} is not a Surd")
        square, rest = _extract(q.numerator * q.denominator)
        return Surd({rest: Fraction(square, q.denominator)})

    def __repr__(self) -> str:
        return " + ".join(f"{q} sqrt({r})" for r, q in self.terms.items()) or "0"


def _surd(x: Any) -> Surd:
    return x if isinstance(x, Surd) else Surd(x)
