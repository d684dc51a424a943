"""T17 (claims C2, C7): score centering removes a constant from the advantage, and does not make stale tokens unbiased.

Statement. At one prefix, tokens v have probabilities p_v under the target and q_v under the sampler, scores s_v with
sum_v p_v s_v = 0, and the estimate of a sampled y ~ q, with any weight f_v of the ratio p_v/q_v, is

    A_y f_y s_y - A_y sum_v q_v f_v s_v

    E_q = Cov_q(A, f s)         A = const  =>  E_q = 0         f = p/q  =>  the center is 0 and E_q = E_p[A s]

So a shift of the rewards changes nothing whatever f is, and for f = 1 the mean is the on-policy gradient only where
q = p. The center is multiplied by A_y itself, so it is no control variate: "E_q[score] = 0, so it stays unbiased" does
not follow, and fails (witness).

Source. Score centering: arXiv 2609.20807, as prime-rl, miles and vime ship it. That they disagree: by reading.

Proof. E_q[A_y sum_v q_v f_v s_v] = E_q[A] E_q[f s].
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np

from proofs.claims import Claim
from proofs.setting import rational, rational_array, simplex
from vcposim.arrays import Array
from vcposim.vocabulary import score_centering


def _positions(count: int, seed: int) -> Iterator[tuple[random.Random, Array, Array, Array, Array, Array]]:
    """Random positions: (rng, p, q, scores with sum p s = 0, advantages, weights f as a table over tokens)."""
    rng = random.Random(seed)
    for _ in range(count):
        tokens, dimension = rng.randint(1, 6), rng.randint(1, 3)
        p, q = simplex(rng, tokens), simplex(rng, tokens)
        s = rational_array(rng, tokens, dimension)
        s = s - (p[:, None] * s).sum(axis=0)
        f = np.array([Fraction(rng.randint(0, 8), 4) for _ in range(tokens)], dtype=object)
        yield rng, p, q, s, rational_array(rng, tokens), f


def centered_mean(a: Array, p: Array, q: Array, s: Array, f: Array, **head: Any) -> Array:
    """E over y ~ q of sum_v c_v s_v, c as shipped: (d,)."""
    square = np.broadcast_to(p, (len(p), len(p))), np.broadcast_to(q, (len(p), len(p)))
    one = np.array([[Fraction(int(v == y)) for v in range(len(p))] for y in range(len(p))], dtype=object)
    c = score_centering(a, one, *square, lambda ratio: np.broadcast_to(f, ratio.shape), **head)
    return (q[:, None] * (c[:, :, None] * s).sum(axis=1)).sum(axis=0)


def covariance_exact() -> str:
    """The mean is Cov_q(A, f s)."""
    for _, p, q, s, a, f in _positions(80, seed=0):
        weighted = f[:, None] * s
        covariance = ((q * a)[:, None] * weighted).sum(axis=0) - (q * a).sum() * (q[:, None] * weighted).sum(axis=0)
        assert (centered_mean(a, p, q, s, f) == covariance).all()
    return "80 random positions of 1 to 6 tokens, any weights"


def constant_exact() -> str:
    """A constant in the advantage changes nothing, whatever the weight."""
    for rng, p, q, s, a, f in _positions(60, seed=1):
        assert (centered_mean(a + rational(rng), p, q, s, f) == centered_mean(a, p, q, s, f)).all()
    return "60 random positions, any weights"


def exact_ratio_exact() -> str:
    """f = p/q: nothing is centered, and the mean is the on-policy one."""
    for _, p, q, s, a, _f in _positions(60, seed=2):
        assert (q[:, None] * (p / q)[:, None] * s).sum() == 0
        assert (centered_mean(a, p, q, s, p / q) == ((p * a)[:, None] * s).sum(axis=0)).all()
    return "60 random positions"


def biased_exact() -> str:
    """Two tokens, f = 1: centered, and half of what it should be."""
    p, q = (np.array([Fraction(x, 4) for x in pair], dtype=object) for pair in ((2, 2), (1, 3)))
    s = np.array([[Fraction(1, 2)], [Fraction(-1, 2)]], dtype=object)
    a = np.array([Fraction(1), Fraction(0)], dtype=object)
    found, wanted = centered_mean(a, p, q, s, np.array([Fraction(1)] * 2, dtype=object)), ((p * a)[:, None] * s).sum()
    assert found[0] == Fraction(3, 16)
    assert wanted == Fraction(1, 4)
    return "p = (1/2, 1/2), q = (1/4, 3/4), A = (1, 0), f = 1: the mean is 3/16, the on-policy one 1/4"


_SHIPPED = ("vocabulary.score_centering",)
CLAIMS = [
    Claim(
        "T17.covariance",
        "the mean of a score-centered estimate at a prefix is Cov_q(A, f s)",
        _SHIPPED,
        ("C2",),
        "y ~ q, any weight f of the ratio; the whole vocabulary",
        covariance_exact,
    ),
    Claim(
        "T17.constant",
        "a constant added to A changes the mean of a score-centered estimate by nothing",
        _SHIPPED,
        ("C7",),
        "y ~ q, any weight f of the ratio; the whole vocabulary",
        constant_exact,
    ),
    Claim(
        "T17.exact_ratio",
        "with f = p/q the center is 0, and the mean is E_p[A s]",
        _SHIPPED,
        ("C2",),
        "sum p s = 0, q > 0 wherever p is",
        exact_ratio_exact,
    ),
    Claim(
        "T17.biased",
        "with f = 1 the mean of a score-centered estimate need not be E_p[A s]",
        _SHIPPED,
        ("C2",),
        exact=biased_exact,
        kind="witness",
    ),
]
