"""Is score centering unbiased? Settled in exact arithmetic at one position, where two shipping projects disagree.

prime-rl's comment: E_q[score] = 0, so the estimator stays unbiased. Another tutorial: the covariance is still under q,
so nothing is established under p. All sums below run over every token, in fractions; equality is equality.
"""

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from vcposim.vocabulary import score_centering

P = np.array([Fraction(4, 10), Fraction(3, 10), Fraction(2, 10), Fraction(1, 10)])
Q = np.array([Fraction(1, 10), Fraction(2, 10), Fraction(3, 10), Fraction(4, 10)])
A = np.array([Fraction(3), Fraction(-1), Fraction(1, 2), Fraction(2)])
CONSTANT = np.full(4, Fraction(7, 3))
EYE = np.array([[Fraction(int(i == j)) for j in range(4)] for i in range(4)])
SCORE = EYE - P  # of the logits: row v is grad log p_v

WEIGHTS: dict[str, Callable[[Any], Any]] = {
    "none": lambda r: r * 0 + 1,
    "truncated": lambda r: np.minimum(r, Fraction(2)),
    "masked": lambda r: np.where((r >= Fraction(1, 2)) & (r <= 5), r, r * 0),
    "exact": lambda r: r,
}


def mean(advantage: np.ndarray, q: np.ndarray = Q, weight: Callable[[Any], Any] = WEIGHTS["none"], **kw: Any) -> Any:
    """E over y ~ q of sum_v c_v grad log p_v."""
    shape = (4, 4)
    c = score_centering(advantage, EYE, np.broadcast_to(P, shape), np.broadcast_to(q, shape), weight, **kw)
    return q @ (c @ SCORE)


def on_policy(advantage: np.ndarray) -> Any:
    return (P * advantage) @ SCORE


@pytest.mark.parametrize("name", WEIGHTS)
def test_its_mean_is_a_covariance_under_the_sampler(name: str) -> None:
    f = WEIGHTS[name](P / Q)
    weighted = f[:, None] * SCORE
    covariance = (Q * A) @ weighted - (Q @ A) * (Q @ weighted)
    assert np.all(mean(A, weight=WEIGHTS[name]) == covariance)


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_constant_in_the_advantage_is_gone_whatever_the_weight(name: str) -> None:
    assert np.all(mean(CONSTANT, weight=WEIGHTS[name]) == 0)
    assert np.all(mean(A + 5, weight=WEIGHTS[name]) == mean(A, weight=WEIGHTS[name]))


def test_it_is_unbiased_for_the_full_ratio_alone_where_nothing_is_centered() -> None:
    biased = {name: bool(np.any(mean(A, weight=f) != on_policy(A))) for name, f in WEIGHTS.items()}
    assert biased == {"none": True, "truncated": True, "masked": True, "exact": False}
    assert np.all(Q * (P / Q) @ SCORE == 0)  # the center of f = p/q


@pytest.mark.parametrize("name", WEIGHTS)
def test_on_policy_it_is_its_host(name: str) -> None:
    assert np.all(mean(A, q=P, weight=WEIGHTS[name]) == on_policy(A))


def test_a_head_removes_a_constant_only_if_the_tail_is_proportional() -> None:
    head = np.broadcast_to(np.array([True, True, False, False]), (4, 4))
    left = mean(CONSTANT, head=head)
    alpha = (1 - Q[:2].sum()) / (1 - P[:2].sum())
    tail = (Q - alpha * P)[2:]
    assert np.all(left == CONSTANT[0] * tail @ SCORE[2:])
    assert np.any(left != 0)
    proportional = np.array([Fraction(1, 10), Fraction(3, 10), Fraction(4, 10), Fraction(2, 10)])  # tail 2 : 1, as P's
    assert np.all(mean(CONSTANT, q=proportional, head=head) == 0)
    assert np.any(mean(A, q=proportional, head=head) != on_policy(A))
    assert np.all(mean(A, q=P, head=head) == on_policy(A))


def test_planted_mistakes_are_seen() -> None:
    """A center under p, or one that forgets the weight, breaks the identities above."""
    f = WEIGHTS["truncated"](P / Q)
    under_p = Q @ ((CONSTANT[:, None] * (EYE * f - P * f)) @ SCORE)
    unweighted = Q @ ((CONSTANT[:, None] * (EYE * f - Q)) @ SCORE)
    assert np.any(under_p != 0)
    assert np.any(unweighted != 0)
