"""Arrays of any library, and the expectation that every formula is made of.

The kernel's functions take arrays and ask the arrays themselves for a namespace (the Python array API, through
`array-api-compat`). So the same lines run on NumPy float64, on torch tensors on any device, on object arrays of
`fractions.Fraction`, and on the symbolic arrays of `proofs/`.

An expectation is a sum under a **measure**: the probability attached to each outcome when outcomes are enumerated,
1/n for each of n draws, 0 for padding. Exact values and Monte Carlo values are therefore one code path.

Axis order everywhere: `(*replication, group, sample, time, parameter)`; a formula about samples reduces the last axis.
"""

import math
from typing import Annotated, Any, Protocol

from array_api_compat import array_namespace

from vcposim.errors import InputError

Array = Annotated[Any, "array"]
"""An array of any array-API library; docstrings state shapes, as `(..., n), (..., n) -> (...)`; tests check them."""


def namespace(*arrays: Array) -> Any:
    """The array-API namespace that all `arrays` share; numbers among them are ignored.

    Raises `InputError` if there is no array at all.
    """
    found = {type(x): x for x in arrays if hasattr(x, "shape")}
    if not found:
        raise InputError(f"expected an array, got {type(arrays[0]).__name__}; convert it first, as in numpy.asarray(x)")
    (kind, *others) = found
    libraries = {one.__module__.partition(".")[0] for one in found}
    if libraries != {"numpy"} and (others or libraries != {"torch"}):  # the proofs' symbols have one for each algebra
        return array_namespace(*found.values())
    if kind not in _NAMESPACES:  # asked for thousands of times a second
        # NumPy's own is one; array-api-compat's copy of it imports all that NumPy has, which takes a tenth of a second
        own = libraries == {"numpy"}
        _NAMESPACES[kind] = found[kind].__array_namespace__() if own else array_namespace(*found.values())
    return _NAMESPACES[kind]


_NAMESPACES: dict[type, Any] = {}
"""type of array -> namespace, as found so far"""


def expectation(x: Array, measure: Array, *, keepdims: bool = False) -> Array:
    """E[x] = sum_i measure_i x_i over the last axis: (..., n), (..., n) -> (...) or (..., 1)."""
    return namespace(x, measure).sum(x * measure, axis=-1, keepdims=keepdims)


def where(condition: Array, x: Array, y: Array) -> Array:
    """x where the condition holds, else y; for plain numbers (reduced sums of rationals) too: same -> same."""
    if not any(hasattr(value, "shape") for value in (condition, x, y)):
        return x if condition else y
    return namespace(condition, x, y).where(condition, x, y)


def safe_divide(numerator: Array, denominator: Array, default: Array) -> Array:
    """numerator / denominator, and `default` where the denominator is zero (no infinity by accident): same -> same."""
    empty = denominator == 0
    return where(empty, default, numerator / where(empty, denominator * 0 + 1, denominator))


def indistinguishable(difference: Array, size: Array) -> Array:
    """Whether a difference is rounding noise beside numbers of that size, 10 bits of slack: same -> same.

    As an addition tells; never true of a nonzero difference in exact arithmetic.
    """
    big = size * 1024
    return big + difference == big


def sum_of_others(x: Array) -> Array:
    """sum_{j != i} x_j for every i: (..., n) -> (..., n).

    A sum before i plus a sum after i, never total minus x_i: where one sample dominates, that difference has no
    correct digit left.

    >>> import numpy as np
    >>> sum_of_others(np.array([1e20, 1.0, 2.0]))
    array([3.e+00, 1.e+20, 1.e+20])
    """
    xp = namespace(x)

    def before(y: Array) -> Array:
        return xp.cumulative_sum(y, axis=-1, include_initial=True)[..., :-1]

    return before(x) + xp.flip(before(xp.flip(x, axis=-1)), axis=-1)


def log_expectation(log_x: Array, measure: Array, *, keepdims: bool = False) -> Array:
    """log E[exp(log_x)], safe; -inf without weight: (..., n), (..., n) -> (...) or (..., 1)."""
    xp, kept = namespace(log_x, measure), supported(log_x, measure)
    top = _largest(kept)
    total = expectation(xp.exp(kept - top), measure, keepdims=True)
    empty = total == 0
    out = xp.where(empty, -math.inf, xp.log(xp.where(empty, 1.0, total)) + top)
    return out if keepdims else xp.squeeze(out, axis=-1)


def supported(log_x: Array, measure: Array) -> Array:
    """`log_x` where the measure is positive, -inf elsewhere (padding has no weight, whatever it holds): same -> same.

    A measure that is a number counts all alike, and nothing is padding.
    """
    if not hasattr(measure, "shape"):
        return log_x
    return namespace(log_x, measure).where(measure > 0, log_x, -math.inf)


def peak(log_x: Array, measure: Array) -> Array:
    """Largest supported log value of each group, 0 if all are -inf: (..., n) -> (..., 1)."""
    return _largest(supported(log_x, measure))


def _largest(log_x: Array) -> Array:
    xp = namespace(log_x)
    top = xp.max(log_x, axis=-1, keepdims=True)
    return xp.where(top == -math.inf, 0.0, top)


def saturating_exp(log_x: Array) -> Array:
    """exp(log_x), saturating below the square root of the dtype's largest float: same -> same.

    So squares stay finite. Exact below that (log x <= 347 in float64, 43 in float32); a NaN stays a NaN.
    """
    xp = namespace(log_x)
    return xp.exp(xp.minimum(log_x, 0.49 * math.log(float(xp.finfo(log_x.dtype).max))))


def require_weights(name: str, log_weight: Array) -> None:
    """Refuse `log_weight` (...) that are none, at the entry points that users call (not inside formulas).

    Raises `InputError` on an empty array, on NaN, or on +inf (the behavior policy gave probability zero to something
    that was sampled). -inf is a weight of zero and is fine.
    """
    xp = namespace(log_weight)
    if 0 in log_weight.shape:
        raise InputError(f"{name}: empty (shape {tuple(log_weight.shape)}); pass at least one log-weight")
    if bool(xp.any(xp.isnan(log_weight))):
        raise InputError(f"{name}: contains NaN; remove or recompute the log-probabilities it came from")
    if bool(xp.any(log_weight == math.inf)):
        raise InputError(f"{name}: contains +inf (behavior probability zero); recompute behavior_log_prob")


class Scale(Protocol):
    """A way to write positive numbers: as they are (`LINEAR`) or as logarithms (`LOG`).

    Treatments of weights are written once, on a scale: truncation is a minimum on either, a product of token ratios is
    a product on one and a sum on the other. `LINEAR` serves exact rationals and proofs, `LOG` serves floats.
    """

    zero: Any

    def write(self, value: float) -> Any:
        """A plain number on this scale."""
        ...

    def over(self, x: Array, y: Array) -> Array:
        """x / y; zero where y is: same -> same."""
        ...

    def mean(self, x: Array, measure: Array) -> Array:
        """E[x]: (..., n), (..., n) -> (..., 1)."""
        ...

    def product(self, x: Array, mask: Array | None) -> Array:
        """The product over unmasked tokens: (..., n, t) -> (..., n)."""
        ...

    def root(self, x: Array, degree: Array) -> Array:
        """x^(1/degree), 1 for degree 0: same -> same."""
        ...

    def value(self, x: Array, measure: Array) -> Array:
        """The numbers themselves, saturating; on `LOG`, zero on measure zero: same -> same."""
        ...

    def relative(self, x: Array, measure: Array) -> Array:
        """The numbers up to one factor a group, free of overflow: (..., n) -> (..., n)."""
        ...


class _Linear:
    zero: Any = 0

    def write(self, value: float) -> Any:
        return value

    def over(self, x: Array, y: Array) -> Array:
        return safe_divide(x, y, 0)

    def mean(self, x: Array, measure: Array) -> Array:
        return expectation(x, measure, keepdims=True)

    def product(self, x: Array, mask: Array | None) -> Array:
        xp = namespace(x)
        return xp.prod(x if mask is None else xp.where(mask > 0, x, 1), axis=-1)

    def root(self, x: Array, degree: Array) -> Array:
        return x ** safe_divide(1, degree, degree * 0)

    def value(self, x: Array, measure: Array) -> Array:
        return x

    def relative(self, x: Array, measure: Array) -> Array:
        return x


class _Log:
    zero: Any = -math.inf

    def write(self, value: float) -> Any:
        return math.log(value) if value > 0 else -math.inf

    def over(self, x: Array, y: Array) -> Array:
        xp = namespace(x, y)
        return x - xp.where(y == -math.inf, 0.0, y)

    def mean(self, x: Array, measure: Array) -> Array:
        return log_expectation(x, measure, keepdims=True)

    def product(self, x: Array, mask: Array | None) -> Array:
        xp = namespace(x)
        return xp.sum(x if mask is None else xp.where(mask > 0, x, 0.0), axis=-1)

    def root(self, x: Array, degree: Array) -> Array:
        return safe_divide(x, degree, degree * 0)

    def value(self, x: Array, measure: Array) -> Array:
        return saturating_exp(supported(x, measure))

    def relative(self, x: Array, measure: Array) -> Array:
        kept = supported(x, measure)
        return namespace(x).exp(kept - _largest(kept))


LINEAR: Scale = _Linear()
LOG: Scale = _Log()
