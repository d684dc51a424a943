"""The only place with tolerances.

Two questions, two helpers:

*Are these two numbers the same up to rounding?* `assert_rounding_only`: the difference is counted in units of the
last place of the dtype, against a stated scale. Exact types must be equal.

*Is this the mean of what was drawn?* `assert_mean_equals`: states the rate at which it fails although nothing is wrong
(`false_fail`) and the discrepancy that it would detect (`detect`); a sample too small to detect that is a failure of
its own, `Underpowered`, never a pass. In the spirit of TFP's `statistical_testing`.

Both are tested in `test_statistical.py`: they reject what they must reject.
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
