"""The tolerances themselves can fail: a shifted mean, a small sample, a wrong digit are all rejected."""

import ast
import math
import re
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from tests.kit.statistical import (
    SINGLE,
    Underpowered,
    assert_estimate_equals,
    assert_mean_equals,
    assert_near,
    assert_quantile_equals,
    assert_rounding_only,
    assert_within_errors,
    near,
)


def normal(m: int, seed: int = 0, shift: float = 0.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(loc=shift, size=m)


def test_accepts_the_mean_and_rejects_a_shift_of_what_it_claims_to_detect():
    assert_mean_equals(normal(10_000), 0.0, detect=0.1)
    with pytest.raises(AssertionError, match="is not 0: off by"):
        assert_mean_equals(normal(10_000, shift=0.1), 0.0, detect=0.1)


def test_rejects_one_shifted_column_of_many():
    draw = np.random.default_rng(1).normal(size=(10_000, 5))
    assert_mean_equals(draw, np.zeros(5), detect=0.12)
    draw[:, 3] -= 0.12
    with pytest.raises(AssertionError, match="off by"):
        assert_mean_equals(draw, np.zeros(5), detect=0.12)


@pytest.mark.parametrize("support", [None, (-10.0, 10.0)])
def test_a_small_sample_is_its_own_failure(support: tuple[float, float] | None):
    with pytest.raises(Underpowered, match="draw about"):
        assert_mean_equals(normal(50), 0.0, detect=0.1, support=support)
    with pytest.raises(Underpowered, match="no standard error"):
        assert_mean_equals([0.0], 0.0, detect=0.1)


def test_the_number_of_draws_it_asks_for_is_enough():
    with pytest.raises(Underpowered) as caught:
        assert_mean_equals(normal(100), 0.0, detect=0.1)
    need = int(str(caught.value).split()[-1])
    assert_mean_equals(normal(int(1.2 * need), seed=3), 0.0, detect=0.1)


def test_bounded_support_is_checked_and_rejects_a_shift():
    draw = np.random.default_rng(2).uniform(size=20_000)
    assert_mean_equals(draw, 0.5, detect=0.03, support=(0.0, 1.0))
    with pytest.raises(AssertionError, match="off by"):
        assert_mean_equals(draw, 0.53, detect=0.03, support=(0.0, 1.0))
    with pytest.raises(AssertionError, match="leave the stated support"):
        assert_mean_equals(draw, 0.5, detect=0.03, support=(0.0, 0.5))


def test_nan_and_constant_draws():
    with pytest.raises(AssertionError):
        assert_mean_equals([0.0, np.nan] * 100, 0.0, detect=1.0)
    assert_mean_equals(np.full(10, 0.3), 0.3, detect=1e-9)
    with pytest.raises(AssertionError):
        assert_mean_equals(np.full(10, 0.3), 0.3000001, detect=1e-9)


def test_the_false_fail_rate_is_the_stated_one():
    fails = 0
    for seed in range(1000):
        try:
            assert_mean_equals(normal(30, seed=seed), 0.0, detect=10.0, false_fail=0.05)
        except Underpowered:
            raise
        except AssertionError:
            fails += 1
    low, high = stats.binom.ppf([1e-6, 1 - 1e-6], 1000, 0.05)
    assert low <= fails <= high


@pytest.mark.parametrize("wrong", [1.0 + 1e-6, -1.0, np.nan, np.inf, 1.0 + 100 * np.finfo(float).eps])
def test_rounding_helper_rejects(wrong: float):
    assert_rounding_only(np.array([1.0 + 2e-16]), np.array([1.0]))
    with pytest.raises(AssertionError):
        assert_rounding_only(np.array([wrong]), np.array([1.0]))


def test_rounding_helper_knows_shapes_dtypes_and_exact_types():
    with pytest.raises(AssertionError, match="shape"):
        assert_rounding_only(np.ones(2), np.ones((2, 1)))
    assert_rounding_only(np.array([1 + 1e-6], dtype=np.float32), np.array([1.0]))
    assert_rounding_only(np.array([np.inf, -np.inf]), np.array([np.inf, -np.inf]))
    third = np.array([Fraction(1, 3)], dtype=object)
    assert_rounding_only(third, third)
    with pytest.raises(AssertionError, match="exactly"):
        assert_rounding_only(third, np.array([1 / 3]))
    with pytest.raises(AssertionError):
        assert_rounding_only(np.array([1e-17]), np.array([0.0]))
    assert_rounding_only(np.array([1e-17]), np.array([0.0]), scale=1.0)


# --- rounding, and estimates known by their standard deviation --------------------------------------------------------


@pytest.mark.parametrize(
    ("actual", "expected"),
    [
        (1.0 + 1e-12, 1.0),
        (1e6 * (1 + 1e-12), 1e6),
        (1e-12, 0.0),  # of terms of order one
        (np.array([1.0, math.inf]), [1.0, math.inf]),
        ({"a": [1.0, 2.0], "b": None, "c": "x"}, {"a": [1.0, 2.0 + 1e-13], "b": None, "c": "x"}),
    ],
)
def test_near_allows_rounding(actual, expected):
    assert actual == near(expected)


@pytest.mark.parametrize(
    ("actual", "expected"),
    [
        (1.0 + 1e-11, 1.0),
        (1e-11, 0.0),
        (math.nan, math.nan),
        (math.inf, -math.inf),
        (math.inf, 1.0),
        (np.array([1.0, 2.0]), [1.0]),
        (np.array([1.0, 2.0]), np.array([1.0, 2.0 + 1e-11])),
        ({"a": 1.0}, {"a": 1.0, "b": 1.0}),
        ({"a": 1.0}, {"a": 1.0 + 1e-11}),
        ("x", "y"),
        (None, 0.0),
        ([1.0, None], [1.0, 2.0]),
    ],
)
def test_near_allows_nothing_else(actual, expected):
    assert not actual == near(expected)  # noqa: SIM201


def test_near_in_its_own_digits_and_with_nan():
    assert not near(1.001e-12, scale=0) == 1e-12  # noqa: SIM201
    assert np.array([math.nan, 1.0]) == near([math.nan, 1.0], nan_ok=True)
    assert near(1, allow=SINGLE) == 1 + 5e-6


def test_assert_near_broadcasts_and_says_how_far_off():
    assert_near(np.ones((2, 3)), 1)
    with pytest.raises(AssertionError, match=r"here: .* off by 1e-06, more than 2e-12"):
        assert_near([1.0, 1.0 + 1e-6], 1.0, "here")
    with pytest.raises(AssertionError):
        assert_near([1e-12], [1.001e-12], scale=0)
    with pytest.raises(AssertionError):
        assert_near([math.nan], [math.nan])


def test_an_estimate_is_held_to_its_standard_deviation():
    assert_estimate_equals(1.05, 1.0, sd=0.01, detect=0.1)
    with pytest.raises(AssertionError, match=r"estimate 1\.07 is not 1, allowed 0\.06"):
        assert_estimate_equals(1.07, 1.0, sd=0.01, detect=0.1)
    with pytest.raises(Underpowered, match=r"detects a discrepancy of 0\.09"):
        assert_estimate_equals(1.0, 1.0, sd=0.01, detect=0.05)
    with pytest.raises(AssertionError):
        assert_estimate_equals(1.0 + 1e-9, 1.0, sd=0.0, detect=0.1)


def test_quantiles_of_draws_pass_and_of_other_laws_do_not():
    draw = np.random.default_rng(0).normal(size=20_000)
    density = math.exp(-(1.959964**2) / 2) / math.sqrt(2 * math.pi)
    given = {"draws": 20_000, "density": density, "detect": 0.25}
    assert_quantile_equals(float(np.quantile(draw, 0.975)), 1.959964, 0.975, **given)
    with pytest.raises(AssertionError):
        assert_quantile_equals(float(np.quantile(1.25 * draw, 0.975)), 1.959964, 0.975, **given)


def test_estimates_beyond_their_own_errors_fail():
    assert_within_errors([1.0, 2.0], [1.1, 2.0], [0.1, 0.0], degrees=31)
    with pytest.raises(AssertionError, match=r"mean: .* is not"):
        assert_within_errors([1.0, 2.0], [2.0, 2.0], [0.1, 0.0], "mean", degrees=31)
    with pytest.raises(AssertionError):
        assert_within_errors(1.0, 1.0 + 1e-9, 0.0, degrees=31)
    with pytest.raises(AssertionError):
        assert_within_errors(float("nan"), 1.0, 0.1, degrees=31)


ROOT = Path(__file__).parents[1]
TESTS = {path.relative_to(ROOT).as_posix(): path.read_text() for path in sorted(ROOT.rglob("*.py"))}
STATISTICAL = "kit/statistical.py"
STILL_PLAIN = {
    "vcposim/replay/test_kinds.py": 1,
    "vcposim/replay/test_replay.py": 2,
}
"""files with tolerances of their own on plain differences -> how many; this may only fall"""


def test_no_other_file_has_a_tolerance():
    """`approx`, `allclose` and the like stand in statistical.py alone, and are not needed there."""
    words = re.compile(
        r"\b(approx\(|assert_allclose|allclose\(|isclose\(|assert_close|assert_almost_equal|rtol=|atol=)"
    )
    found = [
        f"{name}:{number}: {line.strip()}"
        for name, text in TESTS.items()
        if name != "kit/test_statistical.py"
        for number, line in enumerate(text.splitlines(), start=1)
        if words.search(line)
    ]
    assert not found, "\n".join(["use near, assert_near or an assertion with an error rate (tests/kit):", *found])


def plain_tolerances(text: str) -> list[str]:
    """Comparisons like `abs(x - y) < 1e-9`, `(x - y).abs().max() <= eps` or `norm(x - y) < size`."""

    def difference(node: ast.expr) -> bool:
        for call in ast.walk(node):
            if isinstance(call, ast.Call):
                name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
                inside = [*call.args, *([call.func.value] if isinstance(call.func, ast.Attribute) else [])]
                minus = (isinstance(x, ast.BinOp) and isinstance(x.op, ast.Sub) for y in inside for x in ast.walk(y))
                if name in ("abs", "absolute", "fabs", "norm") and any(minus):
                    return True
        return False

    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Compare):
            terms = [node.left, *node.comparators]
            for left, order, right in zip(terms, node.ops, terms[1:], strict=False):
                small = left if isinstance(order, ast.Lt | ast.LtE) else right
                if isinstance(order, ast.Lt | ast.LtE | ast.Gt | ast.GtE) and difference(small):
                    found.append(f"{node.lineno}: {ast.unparse(node)}")
    return found


def rounding_by_hand(text: str) -> list[str]:
    """Comparisons with a number that only rounding can be below, like `bias < 1e-10`."""
    return [
        f"{node.lineno}: {ast.unparse(node)}"
        for held in ast.walk(ast.parse(text))
        if isinstance(held, ast.Assert)
        for node in ast.walk(held)
        if isinstance(node, ast.Compare)
        for order, right in zip(node.ops, node.comparators, strict=True)
        if isinstance(order, ast.Lt | ast.LtE) and isinstance(right, ast.Constant) and isinstance(right.value, float)
        if 0 < right.value < 1e-8
    ]


def test_no_other_file_says_what_rounding_is():
    found = {name: hand for name, text in TESTS.items() if name != STATISTICAL and (hand := rounding_by_hand(text))}
    assert not found, "use near(0)"
    assert len(rounding_by_hand("assert bias < 1e-10\nassert (x.max() <= 1e-13) == y\nassert 0 <= v < 1e-15")) == 3
    assert not rounding_by_hand("assert x < 1e-3\nassert x > 1e-12\nwhile x < 1e-12:\n    pass")


def test_no_other_file_compares_a_difference_with_a_tolerance():
    found = {name: plain for name, text in TESTS.items() if name != STATISTICAL and (plain := plain_tolerances(text))}
    beyond = [name for name, lines in found.items() if len(lines) > STILL_PLAIN.get(name, 0)]
    more = [f"{name}:{line}" for name in beyond for line in found[name]]
    assert not more, "\n".join(["use near, assert_near or an assertion with an error rate (tests/kit):", *more])
    planted = "assert abs(x - y) < 1e-9\nassert 0.1 > norm(a.b - 2)\nassert (x - 1).abs().max() <= eps * 2"
    assert len(plain_tolerances(planted)) == 3
    assert not plain_tolerances("assert abs(x - y) > 0.1\nassert abs(x) < abs(y)\nassert x == near(y)")
