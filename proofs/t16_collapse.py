"""T16 (claims C10, C13): why stale updates without ratios run away or settle: the baseline against the success rate.

Setting. A sampler mu, the learner pi = w mu, scores with E_pi[s] = 0, no ratio in the update, q = E_mu[R] the sampler's
success rate. For every number b, and every coordinate of the score,

    E_mu[(R - b) s] = Cov_mu(R, s) + (b - q) Cov_mu(w, s)                                                     (stale)

Cov_mu(R, s) is what the *sampler* would learn: it knows nothing of where the learner has gone. What knows it is the
second term alone. Along a parameter that the learner has moved, w rises with s (exactly so in an exponential family, w
proportional to e^(t s), t > 0); then Cov_mu(w, s) >= 0, and

    b <= q:  E_mu[(R - b) s] <= Cov_mu(R, s)      held back, the more so the further the learner has gone     (along)
    b >= q:  E_mu[(R - b) s] >= Cov_mu(R, s)      driven on in the direction it went, whatever the rewards say

With the mean, b = q, nothing holds back. *Prompts that share the parameter* add up: a step that one prompt asked for
moves all of them, so the second terms of P prompts have one sign, that of the step, while their covariances need not.
`T16.overshoot` has two prompts with one parameter and one stale step: the learner has gone too far, the update with the
mean goes further, and the one with the n^2 baseline (below q there, as failures have the longer scores) turns back.

Frozen sampler. A softmax with a logit a token, s_iv = 1[i = v] - pi_v, has the mean update

    F_v = mu_v (R_v - b) - pi_v (q - b)

Two tokens that are sampled and paid alike (mu_u (R_u - b) = mu_v (R_v - b)) keep the difference F_u - F_v =
(b - q)(pi_u - pi_v): it shrinks for b < q, and for b > q the likelier one takes all (transition). For b < q learning
rests at pi* with mu_v (R_v - b) <= tau + (q - b) pi*_v for some tau, equal where pi*_v > 0, and

    <pi* - pi, F> >= (q - b) |pi* - pi|^2                                                                      (settles)

For dz = F dt, the left side is the rate at which KL(pi*||pi) falls, so learning goes there from everywhere.

Source. The transition at b = q and the point pi*: AsymRE, arXiv 2506.20520. The rest is this project's.

Proof. (stale) E[(R - b) s] = Cov(R, s) + (q - b) E[s], and E[s] = E[w] E[s] - E[w s] = -Cov(w, s). (along) twice
Cov(w, s) is the sum of mu_i mu_k (w_i - w_k)(s_i - s_k), none of which is negative. (settles) in sum over v of
(pi*_v - pi_v)(mu_v (R_v - b) - (q - b) pi_v), mu_v (R_v - b) is at most tau + (q - b) pi*_v, equal under pi*."""

from __future__ import annotations

import random
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np

from proofs.claims import Claim
from proofs.logic import INT, REAL, SEQUENCE, Formula, Theorem, arithmetic, generalize, specialize, variable, z3
from proofs.setting import (
    RationalProblem,
    Symbolic,
    baseline_value,
    coefficients,
    instance,
    mean_estimate,
    problems,
    rational,
    simplex,
)
from proofs.sums import both, delta, every, implies, nonnegative, pointwise, prove, sequence, total
from proofs.symbolic import matrix
from vcposim.batch import DenseScores
from vcposim.weights import Weighting

NONE = {"weighting": Weighting("none")}

# ---- layer 1 -----------------------------------------------------------------------------------------------------


def mean_update(p: RationalProblem, baseline: Any) -> np.ndarray[Any, Any]:
    """E_mu[c s] of the shipped estimator without ratios: (p,)."""
    batch = p.population()
    return mean_estimate(batch, coefficients(batch, baseline, **NONE))


def covariance(p: RationalProblem, x: np.ndarray[Any, Any], y: np.ndarray[Any, Any]) -> Any:
    """Cov_mu(x, y): (K,) -> number."""
    return (p.mu * x * y).sum() - (p.mu * x).sum() * (p.mu * y).sum()


def stale_exact() -> str:
    """The identity of the stale update, by enumeration of random problems with any baseline."""
    rng = random.Random(0)
    for p in problems(60, seed=5):
        b, q = rational(rng), (p.mu * p.reward).sum()
        for found, s in zip(mean_update(p, b), p.score.T, strict=True):
            assert found == covariance(p, p.reward, s) + (b - q) * covariance(p, p.ratio, s)
    return "60 random problems, any baseline"


def tilted(
    mu: np.ndarray[Any, Any], reward: np.ndarray[Any, Any], feature: np.ndarray[Any, Any], step: int
) -> RationalProblem:
    """A prompt of one parameter theta, pi proportional to mu 2^(theta feature), whose sampler is at 0, learner at step.

    `mu`, `reward` and `feature` are (K,) -> problem. Features are integers, so that everything is rational; the score
    is with respect to theta ln 2.
    """
    pi = mu * np.array([Fraction(2) ** int(step * f) for f in feature], dtype=object)
    pi = pi / pi.sum()
    return RationalProblem(mu, pi, reward, (feature - (pi * feature).sum())[:, None], feature * 0 + 1)


def along_exact() -> str:
    """Along one direction: the mean sees the gradient at the sampler, a lower baseline holds back, a higher drives."""
    rng = random.Random(1)
    for _ in range(60):
        n, step = rng.randint(2, 5), rng.randint(1, 3)
        feature = np.array([Fraction(rng.randint(-3, 3)) for _ in range(n)], dtype=object)
        reward = np.array([Fraction(rng.randint(0, 1)) for _ in range(n)], dtype=object)
        p, below = tilted(simplex(rng, n), reward, feature, step), Fraction(rng.randint(0, 9), 9)
        q = (p.mu * p.reward).sum()
        fresh = covariance(p, p.reward, p.score[:, 0])
        assert mean_update(p, q)[0] == fresh
        held, driven = mean_update(p, q - below)[0], mean_update(p, q + below)[0]
        assert held <= fresh <= driven
        if below and len(set(feature)) > 1:
            assert held < fresh < driven
    return "60 exponential families with one parameter"


OVERSHOT = (
    ((Fraction(2, 3), Fraction(1, 3)), (1, 0), (2, 0)),
    ((Fraction(1, 6), Fraction(5, 6)), (0, 1), (2, 0)),
)
"""two prompts: probabilities of the sampler, rewards, features"""


def overshoot_exact() -> str:
    """Two prompts after a step too far: the stale update with the mean goes on, with n^2 it turns back."""
    made = []
    for prompt in OVERSHOT:
        mu, reward, feature = (np.array([Fraction(x) for x in part], dtype=object) for part in prompt)
        made.append(tilted(mu, reward, feature, step=1))
    truth = sum(p.gradient[0] for p in made)
    before = sum(covariance(p, p.reward, p.score[:, 0]) for p in made)  # the gradient at the sampler
    mean, square = (
        sum(mean_update(p, baseline_value(p.population(), name))[0] for p in made)
        for name in ("group_mean", "on_policy_optimal")
    )
    assert before > 0 > truth  # the step was right when it was taken, and went too far
    assert mean == before  # the mean sees the sampler's gradient, and nothing else
    assert square < 0 < mean
    return f"gradient {truth}, stale update with the mean {mean}, with n^2 {square}"


def softmax(mu: np.ndarray[Any, Any], pi: np.ndarray[Any, Any], reward: np.ndarray[Any, Any]) -> RationalProblem:
    """One logit a token, s_iv = 1[i = v] - pi_v: (K,) -> problem."""
    one = np.array([[Fraction(int(i == v)) for v in range(len(mu))] for i in range(len(mu))], dtype=object)
    return RationalProblem(mu, pi, reward, one - pi[None], pi * 0 + 1)


def resting(push: np.ndarray[Any, Any], gap: Fraction) -> tuple[np.ndarray[Any, Any], Fraction]:
    """pi* = max(push - tau, 0) / gap with sum 1, and tau: its support are the largest pushes, `push` (K,)."""
    ordered = sorted(push, reverse=True)
    for k in range(1, len(push) + 1):
        tau = (sum(ordered[:k]) - gap) / k
        if ordered[k - 1] > tau and (k == len(push) or ordered[k] <= tau):
            return np.array([max(x - tau, Fraction(0)) for x in push], dtype=object) / gap, tau
    raise AssertionError("no resting point")


def settles_exact() -> str:
    """With a baseline below the sampler's success rate a softmax comes to rest, and where."""
    rng, lost = random.Random(2), 0
    for _ in range(80):
        n = rng.randint(2, 6)
        reward = np.array([Fraction(rng.randint(0, 1)) for _ in range(n)], dtype=object)
        p = softmax(simplex(rng, n), simplex(rng, n), reward)
        gap = Fraction(rng.randint(1, 9), 9)
        b = (p.mu * p.reward).sum() - gap
        point, _ = resting(p.mu * (p.reward - b), gap)
        push = mean_update(p, b)
        far = ((point - p.pi) ** 2).sum()
        assert ((point - p.pi) * push).sum() >= gap * far
        still = mean_update(replace(p, pi=point, score=softmax(p.mu, point, reward).score), b)
        assert len(set(still[point > 0])) == 1
        assert all(x <= max(still) for x in still[point == 0])
        lost += int((point == 0).any())
    assert lost > 10
    return f"80 softmaxes, {lost} of whose resting points leave a token out"


def transition_exact() -> str:
    """The sign of b - q alone decides whether two tokens alike are driven apart or drawn together."""
    rng = random.Random(3)
    for _ in range(40):
        n = rng.randint(3, 6)
        mu, reward = simplex(rng, n), np.array([Fraction(rng.randint(0, 1)) for _ in range(n)], dtype=object)
        mu[1], reward[1] = mu[0], reward[0]
        mu = mu / mu.sum()
        p, b = softmax(mu, simplex(rng, n), reward), rational(rng)
        push, q = mean_update(p, b), (mu * reward).sum()
        assert push[0] - push[1] == (b - q) * (p.pi[0] - p.pi[1])
    return "40 softmaxes with two tokens alike"


# ---- layer 2 -----------------------------------------------------------------------------------------------------


def _covariance(s: Symbolic, x: Any, y: Any) -> Formula:
    mean = lambda f: total(lambda i: s.P[i] * f(i), s.N)  # noqa: E731
    return mean(lambda i: x(i) * y(i)) - mean(x) * mean(y)


def stale_symbolic() -> Theorem:
    """|- sum P = 1, E[w] = 1, E[w s_j] = 0 -> E[c s_j] = Cov(R, s_j) + (b - q) Cov(w, s_j), c as shipped, no ratio."""
    s, b, j = Symbolic(), variable("b", REAL), variable("j", INT)
    batch = s.batch()
    found = mean_estimate(batch, coefficients(batch, b, **NONE)).at(j)
    q = total(lambda i: s.P[i] * s.R[i], s.N)
    score = lambda i: s.S[i][j]  # noqa: E731
    right = _covariance(s, lambda i: s.R[i], score) + (b - q) * _covariance(s, lambda i: s.W[i], score)
    given = both(s.distribution, total(lambda i: s.P[i] * s.W[i], s.N) == 1, s.balanced_at(j))
    return prove(implies(given, found == right), over=[*s.everything, b, j])


def along_symbolic() -> Theorem:
    """|- sum P = 1, P >= 0, E[w] = 1, E[w s_j] = 0, (w_i - w_k)(s_ij - s_kj) >= 0 for all i, k ->
    (b <= q -> E[c s_j] <= Cov(R, s_j)) and (b >= q -> E[c s_j] >= Cov(R, s_j)), c as shipped, no ratio."""
    s, b, j = Symbolic(), variable("b", REAL), variable("j", INT)
    batch = s.batch()
    found = mean_estimate(batch, coefficients(batch, b, **NONE)).at(j)
    q, one = total(lambda i: s.P[i] * s.R[i], s.N), total(lambda i: s.P[i] * s.W[i], s.N)
    rising = every(lambda i: every(lambda k: (s.W[i] - s.W[k]) * (s.S[i][j] - s.S[k][j]) >= 0, s.N), s.N)
    positive = every(lambda i: s.P[i] >= 0, s.N)
    given = both(s.distribution, positive, one == 1, s.balanced_at(j), rising)
    i, k = variable("i", INT), variable("k", INT)
    pair = lambda i, k: s.P[i] * s.P[k] * ((s.W[i] - s.W[k]) * (s.S[i][j] - s.S[k][j]))  # noqa: E731

    def of_pair(i: Formula, k: Formula) -> list[Theorem]:
        row = specialize(rising, i)
        inner = row.statement.arg(1)  # 0 <= i < N -> for all k
        return [row, specialize(inner.arg(1), k), specialize(positive, i), specialize(positive, k)]

    row = nonnegative(
        sequence(lambda k: pair(i, k)), s.N, given=both(given, i >= 0, i < s.N), by=lambda k: of_pair(i, k)
    )
    rows = generalize(row, i)
    twice = total(lambda i: total(lambda k: pair(i, k), s.N), s.N)
    grown = nonnegative(sequence(lambda i: total(lambda k: pair(i, k), s.N)), s.N, given=given, by=lambda i: [rows(i)])
    del k
    score = lambda i: s.S[i][j]  # noqa: E731
    rise = _covariance(s, lambda i: s.W[i], score)
    identity = prove(implies(s.distribution, twice == 2 * rise))
    fresh = _covariance(s, lambda i: s.R[i], score)
    goal = implies(given, both(implies(b <= q, found <= fresh), implies(b >= q, found >= fresh)))
    stale = stale_symbolic()(s.N, s.d, s.P, s.W, s.R, s.L, s.S, s.unit, b, j)
    return generalize(arithmetic(goal, grown, identity, stale), *s.everything, b, j)


class Softmax:
    """N tokens with a logit each, N unknown: a frozen sampler P, the learner W P, and the shipped mean update F."""

    def __init__(self) -> None:
        self.s, self.b = Symbolic(), variable("b", REAL)
        s = self.s
        self.pi = lambda v: s.P[v] * s.W[v]
        score = sequence(lambda i: sequence(lambda v: z3.If(i == v, z3.RealVal(1), z3.RealVal(0)) - self.pi(v)))
        batch = s.batch(scores=DenseScores(matrix(score, s.N, s.N)))
        self.update = mean_estimate(batch, coefficients(batch, self.b, **NONE)).at
        self.gap = total(lambda i: s.P[i] * s.R[i], s.N) - self.b
        self.push = lambda v: s.P[v] * (s.R[v] - self.b)
        self.sized = both(s.N >= 0, total(lambda i: s.P[i], s.N) == 1)

    def field(self, v: Formula) -> Theorem:
        """|- sum P = 1, 0 <= v < N -> F_v = P_v (R_v - b) - pi_v (q - b)."""
        s = self.s
        facts = [delta()(sequence(f), v, s.N) for f in (lambda i: s.P[i] * s.R[i], lambda i: s.P[i])]
        given = both(self.sized, v >= 0, v < s.N)
        return prove(implies(given, self.update(v) == self.push(v) - self.pi(v) * self.gap), *facts)


def transition_symbolic() -> Theorem:
    """|- sum P = 1, P_u (R_u - b) = P_v (R_v - b) -> F_u - F_v = (b - q)(pi_u - pi_v), F as shipped."""
    m, u, v = Softmax(), variable("u", INT), variable("v", INT)
    given = both(m.sized, u >= 0, u < m.s.N, v >= 0, v < m.s.N, m.push(u) == m.push(v))
    goal = implies(given, m.update(u) - m.update(v) == -m.gap * (m.pi(u) - m.pi(v)))
    s = m.s
    return generalize(arithmetic(goal, m.field(u), m.field(v)), s.N, s.P, s.W, s.R, m.b, u, v)


def settles_symbolic() -> Theorem:
    """|- sum P = sum pi = sum pi* = 1, pi >= 0, and for all v P_v (R_v - b) <= tau + (q - b) pi*_v, equal or pi*_v = 0
    -> sum (pi*_v - pi_v) F_v >= (q - b) sum (pi*_v - pi_v)^2, F as shipped."""
    m, rest, tau = Softmax(), variable("Z", SEQUENCE), variable("tau", REAL)
    s, N = m.s, m.s.N
    slack = lambda v: tau + m.gap * rest[v] - m.push(v)  # noqa: E731
    below = every(lambda v: both(slack(v) >= 0, rest[v] * slack(v) == 0), N)
    positive = every(lambda v: m.pi(v) >= 0, N)
    one = lambda f: total(f, N) == 1  # noqa: E731
    given = both(m.sized, one(m.pi), one(lambda v: rest[v]), below, positive)
    toward = lambda v: rest[v] - m.pi(v)  # noqa: E731
    simple = lambda v: m.push(v) - m.pi(v) * m.gap  # noqa: E731
    v = variable("v", INT)
    field = generalize(m.field(v), v)
    shipped = pointwise(
        sequence(lambda v: toward(v) * m.update(v)), sequence(lambda v: toward(v) * simple(v)), N,
        given=given, by=lambda v: [field(v)], expand=False,
    )  # fmt: skip
    more = lambda v: toward(v) * simple(v) - m.gap * (toward(v) * toward(v)) - tau * toward(v)  # noqa: E731
    at_least = nonnegative(sequence(more), N, given=given, by=lambda v: [specialize(below, v), specialize(positive, v)])
    found, far = total(lambda v: toward(v) * m.update(v), N), total(lambda v: toward(v) * toward(v), N)
    plain, spare = total(lambda v: toward(v) * simple(v), N), total(more, N)
    apart = prove(implies(both(N >= 0, one(m.pi), one(lambda v: rest[v])), spare == plain - m.gap * far))
    goal = implies(given, found >= m.gap * far)
    return generalize(arithmetic(goal, shipped, at_least, apart), N, s.P, s.W, s.R, m.b, rest, tau)


def probabilities_instance(rng: random.Random) -> dict[str, Any]:
    """`instance` with a single coordinate along which the learner went, so that w rises with s."""
    feature = np.array([Fraction(x) for x in rng.sample(range(-3, 4), 3)], dtype=object)
    reward = np.array([Fraction(rng.randint(0, 1)) for _ in range(3)], dtype=object)
    p = tilted(simplex(rng, 3), reward, feature, rng.randint(1, 3))
    own = {"P": list(p.mu), "W": list(p.ratio), "R": list(p.reward), "L": list(p.length)}
    return {**instance(rng), **own, "d": 1, "S": [list(row) for row in p.score], "j": 0, "b": rational(rng)}


def softmax_instance(rng: random.Random) -> dict[str, Any]:
    """Four tokens of which the first two are sampled and paid alike, and the point where their softmax rests."""
    mu, reward = simplex(rng, 4), np.array([Fraction(k) for k in (1, 1, 0, rng.randint(0, 1))], dtype=object)
    mu[1] = mu[0]
    mu, gap = mu / mu.sum(), Fraction(rng.randint(1, 9), 9)
    pi, b = simplex(rng, 4), (mu * reward).sum() - gap
    point, tau = resting(mu * (reward - b), gap)
    own = {"P": list(mu), "W": list(pi / mu), "R": list(reward), "b": b, "Z": list(point), "tau": tau, "u": 0, "v": 1}
    return {**instance(rng), **own, "N": 4}


_UPDATE = ("estimators.Estimator.coefficients", "weights.no_correction", "moments.batch_sums")

CLAIMS = [
    Claim(
        "T16.stale",
        "without ratios E_mu[(R - b) s] = Cov_mu(R, s) + (b - q) Cov_mu(w, s): only b - q sees how far pi has gone",
        _UPDATE,
        ("C10", "C13"),
        "E[w] = 1, E[w s] = 0; q = E_mu[R]; b a number",
        stale_exact,
        stale_symbolic,
        instance,
    ),
    Claim(
        "T16.along",
        "along what the learner moved, stale data hold it back for b <= q and drive it on for b >= q",
        _UPDATE,
        ("C10", "C13"),
        "w rises with s, as in an exponential family along its parameter; E[w] = 1, E[w s] = 0",
        along_exact,
        along_symbolic,
        probabilities_instance,
    ),
    Claim(
        "T16.overshoot",
        "two prompts, one parameter, one stale step too far: the mean goes on, the n^2 baseline turns back",
        (*_UPDATE, "baselines.weighted_mean"),
        ("C10", "C13"),
        exact=overshoot_exact,
        kind="witness",
    ),
    Claim(
        "T16.transition",
        "frozen sampler, softmax: two tokens sampled and paid alike part by (b - q)(pi_u - pi_v), together for b < q",
        _UPDATE,
        ("C10", "C13"),
        "a logit a token; mu_u (R_u - b) = mu_v (R_v - b)",
        transition_exact,
        transition_symbolic,
        softmax_instance,
    ),
    Claim(
        "T16.settles",
        "frozen sampler, softmax, b < q: <pi* - pi, F> >= (q - b) |pi* - pi|^2, the rate at which KL(pi*||pi) falls",
        _UPDATE,
        ("C10", "C13"),
        "a logit a token; pi* = max(mu (R - b) - tau, 0) / (q - b)",
        settles_exact,
        settles_symbolic,
        softmax_instance,
    ),
]
