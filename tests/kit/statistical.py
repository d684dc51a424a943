"""The only place with tolerances.

Four questions:

*Are these two numbers the same up to rounding?* `assert_rounding_only`: the difference is counted in units of the
last place of the dtype, against a stated scale. Exact types must be equal.

*Are these two routes to one number the same, in double precision?* `near` and `assert_near`: the one allowance for what
long sums lose, `LOST`, the same for every test. It is for exact identities; a test that needs another number says why.

*Is this within its own standard error?* `assert_within_errors`, for a program that states its error.

*Is this the mean of what was drawn?* `assert_mean_equals`: states the rate at which it fails although nothing is wrong
(`false_fail`) and the discrepancy that it would detect (`detect`); a sample too small to detect that is a failure of
its own, `Underpowered`, never a pass. In the spirit of TFP's `statistical_testing`.

All are tested in `test_statistical.py`: they reject what they must reject.
"""

import math
from fractions import Fraction
from typing import Any

import numpy as np
from scipy import stats

FALSE_FAIL = 1e-9
"""rate at which a statistical test of this suite fails although nothing is wrong"""

MISS = 1e-3
"""rate at which a statistical test of this suite passes although the mean is off by `detect`"""


class Underpowered(AssertionError):
    """The sample is too small to detect the stated discrepancy: the test says nothing, so it fails."""


def half_width(draw: np.ndarray, false_fail: float, support: tuple[float, float] | None) -> np.ndarray:
    """Half width of a two-sided interval for the mean, all columns together at 1 - false_fail: (m, k) -> (k,).

    Without `support`, Student's interval: the rate is exact for normal draws and nominal otherwise, so give it averages
    or light tails. With `support`, the empirical Bernstein bound of Maurer & Pontil (2009, Theorem 4), which holds for
    any distribution on that interval.
    """
    m, k = draw.shape
    rate = false_fail / k
    if support is None:
        return stats.t.isf(rate / 2, m - 1) * draw.std(axis=0, ddof=1) / math.sqrt(m)
    low, high = support
    if draw.min() < low or draw.max() > high:
        raise AssertionError(f"draws in [{draw.min()}, {draw.max()}] leave the stated support [{low}, {high}]")
    log_term = math.log(4 / rate)
    return np.sqrt(2 * draw.var(axis=0, ddof=1) * log_term / m) + 7 * (high - low) * log_term / (3 * (m - 1))


def assert_mean_equals(
    draw: Any,
    expected: Any,
    *,
    detect: Any,
    false_fail: float = FALSE_FAIL,
    miss: float = MISS,
    support: tuple[float, float] | None = None,
) -> None:
    """E[draw] == expected, for draws (m,) or (m, k) that are independent along the first axis.

    `detect` (a number, or one a column) is the discrepancy that this test would notice with probability 1 - miss.

    Raises `Underpowered` if it would not, `AssertionError` if the means differ.
    """
    draw = np.asarray(draw, dtype=np.float64).reshape(len(draw), -1)
    m, k = draw.shape
    if m < 2:
        raise Underpowered(f"{m} draw has no standard error; draw more")
    expected, detect = (np.broadcast_to(np.asarray(x, dtype=np.float64).ravel(), (k,)) for x in (expected, detect))
    rounding = 64 * np.finfo(np.float64).eps * np.abs(expected)
    half = np.maximum(half_width(draw, false_fail, support), rounding)
    reach = half + stats.norm.isf(miss / k) * draw.std(axis=0, ddof=1) / math.sqrt(m)
    if not np.all(reach <= detect) and not np.any(np.isnan(draw)):
        need = math.ceil(m * float(np.max(reach / detect)) ** 2)
        raise Underpowered(
            f"{m} draws detect a discrepancy of {reach.max():.3g}, not {detect.min():.3g}; draw about {need}"
        )
    gap = np.abs(draw.mean(axis=0) - expected)
    if not np.all(gap <= half):
        worst = int(np.nanargmax(gap - half)) if np.any(np.isfinite(gap)) else 0
        raise AssertionError(
            f"mean {draw.mean(axis=0)[worst]:.6g} of {m} draws is not {expected[worst]:.6g}: off by {gap[worst]:.3g}, "
            f"allowed {half[worst]:.3g} (false-fail rate {false_fail:g}, would detect {detect[worst]:.3g})"
        )


def assert_estimate_equals(
    found: float,
    expected: float,
    *,
    sd: float,
    detect: float,
    false_fail: float = FALSE_FAIL,
    miss: float = MISS,
) -> None:
    """`found` is a normal estimate of `expected` whose standard deviation `sd` is known from theory: () against ().

    For what a program reports in one number, without the draws. Raises `Underpowered` if `detect` would not be noticed,
    `AssertionError` if they differ; with sd 0 they must be equal.
    """
    half = stats.norm.isf(false_fail / 2) * sd
    reach = half + stats.norm.isf(miss) * sd
    if reach > detect:
        raise Underpowered(f"an estimate with sd {sd:.3g} detects a discrepancy of {reach:.3g}, not {detect:.3g}")
    assert abs(found - expected) <= half, f"estimate {found:.6g} is not {expected:.6g}, allowed {half:.3g}"


def assert_within_errors(
    found: Any, expected: Any, error: Any, message: str = "", *, degrees: int, false_fail: float = FALSE_FAIL
) -> None:
    """Estimates with standard errors of their own are those of `expected`: same shapes.

    Student's interval of so many degrees of freedom, each number by itself: the rate is exact for normal estimates and
    nominal otherwise. An error of 0 allows rounding. What it detects is the caller's to check, by the size of `error`.
    """
    found, expected, error = (np.asarray(x, dtype=np.float64) for x in (found, expected, error))
    half = stats.t.isf(false_fail / 2, degrees) * error + LOST
    assert np.all(np.abs(found - expected) <= half), f"{message}: {found} is not {expected} +- {error}"


def assert_quantile_equals(
    found: float,
    expected: float,
    share: float,
    *,
    draws: int,
    density: float,
    detect: float,
    false_fail: float = FALSE_FAIL,
    miss: float = MISS,
) -> None:
    """`found` is the `share`-quantile of so many independent draws from a law that has it at `expected`.

    The sample quantile is asymptotically normal with standard deviation sqrt(share (1 - share) / draws) / `density`,
    that of the law at `expected`.

    Raises `Underpowered` if `detect` would not be noticed, `AssertionError` if the quantiles differ.
    """
    error = math.sqrt(share * (1 - share) / draws) / density
    assert_estimate_equals(found, expected, sd=error, detect=detect, false_fail=false_fail, miss=miss)


def as_numpy(x: Any) -> np.ndarray:
    """Any backend's array as NumPy's, dtype kept."""
    if hasattr(x, "detach"):
        x = x.detach().cpu().numpy()
    return np.asarray(x)


def assert_rounding_only(actual: Any, expected: Any, *, ulp: float = 64, scale: Any = None) -> None:
    """|actual - expected| <= ulp * eps * max(|expected|, scale), eps that of actual's dtype; exact types must be equal.

    `scale` is the magnitude of the terms whose sum may have cancelled (default: the expected value alone).
    Infinities must match, NaN never does.
    """
    a, e = as_numpy(actual), as_numpy(expected)
    assert a.shape == e.shape, f"shape {a.shape} is not {e.shape}"
    if a.dtype == object and all(isinstance(x, Fraction | int) for x in a.ravel()):
        assert all(x == y for x, y in zip(a.ravel(), e.ravel(), strict=True)), f"{a} is not exactly {e}"
        return
    eps = np.finfo(a.dtype).eps if a.dtype.kind == "f" else np.finfo(np.float64).eps
    a, e = a.astype(np.float64), e.astype(np.float64)
    magnitude = np.maximum(np.abs(e), 0.0 if scale is None else np.abs(np.asarray(as_numpy(scale), dtype=np.float64)))
    with np.errstate(invalid="ignore"):
        near = (a == e) | (np.isfinite(e) & (np.abs(a - e) <= ulp * eps * magnitude))
    assert np.all(near), (
        f"{a} is not {e}: off by {np.max(np.abs(a - e)):.3g}, more than {ulp} ulp of {magnitude.max():.3g}"
    )


LOST = 2e-12
"""what long sums of doubles may lose, 9,000 units in the last place; the one allowance of exact identities"""

SUMMED = 1e-8
"""a gradient of a network in doubles, summed in another order (two ranks): what cancels in its layers is lost too"""

SEARCHED = 1e-7
"""where half of the digits go by construction: central differences, a fitted tail, E x^2 - (E x)^2 of equal numbers"""

ADAPTED = 1e-6
"""after updates of Adam in doubles, which divide by a root of squares: they magnify rounding where a gradient is 0"""

OPERATION = 1e-6
"""one formula in single precision"""

SINGLE = 1e-5
"""a forward pass in single precision"""

HALF = 0.02
"""a norm in float16, summed over the tensors of a network"""

BRAIN = 0.1
"""the same in bfloat16, whose 8 bits are off by 5% where one token dominates a trajectory"""

TRAINED = 2e-4
"""after a few updates in single precision"""


class near:
    """Compares as equal to what differs from `expected` by rounding: `assert value == near(expected)`.

    |value - expected| <= allow * max(|expected|, scale), where `allow` is `LOST` or one of the names above, and `scale`
    the magnitude of the terms that may have cancelled on the way (1 unless stated; 0 where a tiny number has to be
    right in its own digits). `expected` is a number, an array, or nested dicts of them; shapes must agree, infinities
    match, and NaN is like NaN with `nan_ok` alone.
    """

    def __init__(self, expected: Any, *, allow: float = LOST, scale: float = 1.0, nan_ok: bool = False):
        self.expected, self.allow, self.scale, self.nan_ok = expected, allow, scale, nan_ok

    def __eq__(self, actual: object) -> bool:
        return self._agree(actual, self.expected)

    __hash__ = None  # type: ignore[assignment]

    def _agree(self, actual: Any, expected: Any) -> bool:
        if isinstance(expected, dict):
            return (
                isinstance(actual, dict)
                and actual.keys() == expected.keys()
                and all(self._agree(actual[key], expected[key]) for key in expected)
            )
        if not _is_number_like(expected) or not _is_number_like(actual):
            return actual == expected
        a, e = (np.asarray(as_numpy(x), dtype=np.float64) for x in (actual, expected))
        return a.shape == e.shape and bool(
            np.all(_rounding(a, e, self.allow, self.scale) | (self.nan_ok & np.isnan(a) & np.isnan(e)))
        )

    def __repr__(self) -> str:
        return f"near({self.expected!r}, allow={self.allow:g}, scale={self.scale:g})"

    __array_ufunc__ = None  # array == near(...) is one question, not one an element
    __array_priority__ = 1e6


def assert_near(actual: Any, expected: Any, message: str = "", *, allow: float = LOST, scale: float = 1.0) -> None:
    """`actual == near(expected, scale=scale)` for arrays, broadcast; the message shows the worst difference."""
    a, e = np.broadcast_arrays(*(np.asarray(as_numpy(x), dtype=np.float64) for x in (actual, expected)))
    if not np.all(_rounding(a, e, allow, scale)):
        with np.errstate(invalid="ignore"):
            worst = np.max(np.abs(a - e))
        raise AssertionError(f"{message}: {a} is not {e}: off by {worst:.3g}, more than {allow:g} of it or {scale:g}")


def _rounding(a: np.ndarray, e: np.ndarray, allow: float, scale: float) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        return (a == e) | (np.isfinite(e) & (np.abs(a - e) <= allow * np.maximum(np.abs(e), scale)))


def _is_number_like(x: Any) -> bool:
    try:
        np.asarray(as_numpy(x), dtype=np.float64)
    except (TypeError, ValueError):
        return False
    return x is not None and not isinstance(x, str)
