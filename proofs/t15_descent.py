"""T15 (claims C10, C11): what an estimate is worth once nobody is paid for making it smaller.

Statement. The objective is L-smooth with gradient G, and X any estimate, biased or not, with E|X|^2 > 0. With

    D = <G, E X>^2 / (|G|^2 E|X|^2)

    eta <G, E X> - (L/2) eta^2 E|X|^2 = D |G|^2 / (2 L) - (L/2) E|X|^2 (eta - eta*)^2,   eta* = <G, E X> / (L E|X|^2)
    E|kappa X - G|^2 = (1 - D) |G|^2 + E|X|^2 (kappa - kappa*)^2,                     kappa* = <G, E X> / E|X|^2

so D |G|^2 / (2 L) is the most that one step is sure to gain (T8.bound without its premise E X = G), and the smallest
mean squared error of a multiple of X is (1 - D) |G|^2. D does not change when X is multiplied by a number: an estimate
cannot earn it by damping. Mean squared error can be earned so: of kappa X it falls until kappa*.

The third statement is about the reward-stratified OPOB. With a_i = w_i^2 |s_i|^2 and m(r) = E[a | R = r],

    E[m(R) R] / E[m(R)] = E[a R] / E[a]

the tower rule: for one prompt the baseline that uses the levels' means is OPOB's in the population.

The fourth (`self_push`) and fifth (`only`) say what the n^2 baseline b* does without ratios: of all scalar baselines it
alone (if E|s|^2 > 0) leaves

    E[(R - b) |s|^2] = 0,    as E[(R - b) |s|^2] = (b* - b) E|s|^2

To first order a step along sum c_i s_i moves the log-probability of response i by c_i |s_i|^2 through itself, so that
the batch's own pushes sum to zero; below b* they are positive, above it negative, as for the mean where failures have
the longer scores.

Source. The quadratic bound: Bottou, Curtis & Nocedal 2018; OPOB: VCPO, arXiv 2602.17616.
"""

from __future__ import annotations

import random
from fractions import Fraction
from typing import Any

import numpy as np

from proofs.claims import Claim
from proofs.logic import INT, MATRIX, REAL, SEQUENCE, Formula, Theorem, arithmetic, generalize, variable
from proofs.setting import (
    Symbolic,
    baseline_value,
    coefficients,
    estimator,
    instance,
    problems,
    rational,
    rational_array,
    simplex,
)
from proofs.sums import both, exchange, implies, pointwise, prove, sequence, total
from proofs.symbolic import scalar
from vcposim.arrays import expectation
from vcposim.baselines import mean_given_reward
from vcposim.estimators import Estimator
from vcposim.moments import Moments, descent_efficiency, trace_covariance
from vcposim.weights import Weighting

# ---- layer 1 -----------------------------------------------------------------------------------------------------


def _estimates(seed: int) -> Any:
    """Random estimates X under a measure, beside a G that they need not estimate: (rng, P, X, G, D), D as shipped."""
    rng = random.Random(seed)
    for _ in range(60):
        outcomes, dimension = rng.randint(1, 5), rng.randint(1, 3)
        measure, x, g = simplex(rng, outcomes), rational_array(rng, outcomes, dimension), rational_array(rng, dimension)
        if (x * x).sum() and (g * g).sum():
            mean, spread = (measure[:, None] * x).sum(axis=0), trace_covariance(x, measure)
            yield rng, measure, x, g, Moments(g, mean, spread, spread).descent_efficiency


def gain_exact() -> str:
    """The best step's gain is the descent efficiency times ||g||^2 / 2L, for biased estimates too."""
    for rng, measure, x, g, d in _estimates(0):
        smooth, eta = Fraction(rng.randint(1, 9), 4), rational(rng)
        square = expectation((x * x).sum(axis=-1), measure)
        best = expectation((x * g).sum(axis=-1), measure) / (smooth * square)
        gained = expectation(eta * (x * g).sum(axis=-1) - smooth * eta**2 / 2 * (x * x).sum(axis=-1), measure)
        assert d * (g * g).sum() / (2 * smooth) - gained == smooth / 2 * square * (eta - best) ** 2
        assert 0 <= d <= 1
    return "60 random estimates, biased"


def shrink_exact() -> str:
    """The best shrinkage's error is 1 minus the descent efficiency, times ||g||^2."""
    for rng, measure, x, g, d in _estimates(1):
        kappa, square = rational(rng), expectation((x * x).sum(axis=-1), measure)
        best = expectation((x * g).sum(axis=-1), measure) / square
        error = expectation(((kappa * x - g) ** 2).sum(axis=-1), measure)
        assert error == (1 - d) * (g * g).sum() + square * (kappa - best) ** 2
    return "60 random estimates, biased"


def damping_exact() -> str:
    """X = 10 G or 0, each half of the time: a fifth of it has less than a tenth of the error, and the same D."""
    g, measure = np.array([Fraction(1)], dtype=object), np.array([Fraction(1, 2)] * 2, dtype=object)
    found = []
    for kappa in (Fraction(1), Fraction(1, 5)):
        x = kappa * np.array([[Fraction(10)], [Fraction(0)]], dtype=object)
        spread = trace_covariance(x, measure)
        m = Moments(g, (measure[:, None] * x).sum(axis=0), spread, spread)
        found.append((m.mse, m.descent_efficiency))
    (error, d), (damped, same) = found
    assert damped < error / 10
    assert same == d
    return f"mean squared error {error} becomes {damped}, D stays {d}"


def tower_exact() -> str:
    """Replacing w^2 ||s||^2 by its mean given the reward keeps the optimal baseline."""
    for p in problems(40, seed=3, outcomes=(2, 6)):
        reward = np.array([Fraction(k % 3) for k in range(len(p.mu))], dtype=object)
        batch = type(p)(p.mu, p.pi, reward, p.score, p.length).population()
        a = p.ratio**2 * (p.score**2).sum(axis=-1)
        level = mean_given_reward(a[None], reward[None], p.mu[None])[0]
        assert (p.mu * level * reward).sum() == (p.mu * a * reward).sum()
        assert (p.mu * level).sum() == (p.mu * a).sum()
        if (p.mu * a).sum():
            assert baseline_value(batch, "opob") == (p.mu * level * reward).sum() / (p.mu * level).sum()
    return "40 random problems with three levels of reward"


def self_push_exact() -> str:
    """E_pi[(R - b) ||s||^2] = (b* - b) E_pi ||s||^2: only the optimal baseline has no push of its own."""
    rng = random.Random(4)
    for p in problems(40, seed=4, outcomes=(2, 6)):
        batch = p.population()
        square, c = (p.score**2).sum(axis=-1), Estimator(Weighting("none"), "on_policy_optimal").coefficients(batch)
        assert (p.mu * c * square).sum() == 0
        b, best = rational(rng), baseline_value(p.on_policy().population(), "on_policy_optimal")
        pushed = (p.pi * (p.reward - b) * square).sum()
        assert pushed == (best - b) * (p.pi * square).sum()
    return "40 random problems, on and off policy"


# ---- layer 2 -----------------------------------------------------------------------------------------------------


def _shipped(S: Formula, inner: Formula, Q: Formula) -> Formula:
    return descent_efficiency(scalar(inner), scalar(S), scalar(Q)).term


def gain_symbolic() -> Theorem:
    """|- S, Q, L > 0 -> D S / (2 L) - (eta I - (L/2) eta^2 Q) = (L/2) Q (eta - I / (L Q))^2, D as shipped."""
    S, inner, Q, L, eta = (variable(name, REAL) for name in ("S2", "I", "Q", "L", "eta"))
    best = inner / (L * Q)
    gap = _shipped(S, inner, Q) * S / (2 * L) - (eta * inner - L / 2 * eta * eta * Q)
    goal = implies(both(S > 0, Q > 0, L > 0), gap == L / 2 * Q * (eta - best) * (eta - best))
    return prove(goal, over=[S, inner, Q, L, eta])


def shrink_symbolic() -> Theorem:
    """|- sum P = 1 -> E|kappa X - G|^2 = (1 - D) |G|^2 + E|X|^2 (kappa - kappa*)^2, D as shipped, for all N and d."""
    N, d = variable("N", INT), variable("d", INT)
    P, X, G, kappa = variable("P", SEQUENCE), variable("S", MATRIX), variable("g", SEQUENCE), variable("eta", REAL)
    inner_of = lambda i: total(lambda j: X[i][j] * G[j], d)  # noqa: E731
    square_of = lambda i: total(lambda j: X[i][j] * X[i][j], d)  # noqa: E731
    error_of = lambda i: total(lambda j: (kappa * X[i][j] - G[j]) * (kappa * X[i][j] - G[j]), d)  # noqa: E731
    S = total(lambda j: G[j] * G[j], d)
    inner, Q = total(lambda i: P[i] * inner_of(i), N), total(lambda i: P[i] * square_of(i), N)
    error = total(lambda i: P[i] * error_of(i), N)
    distribution = both(N >= 0, d >= 0, total(lambda i: P[i], N) == 1)
    expanded = prove(
        implies(distribution, error == kappa * kappa * Q - 2 * kappa * inner + S), over=[N, d, P, X, G, kappa]
    )
    best = inner / Q
    s, i, q, k = (variable(name, REAL) for name in ("S2", "I", "Q", "kappa"))
    bottom = prove(
        implies(
            both(s > 0, q > 0),
            k * k * q - 2 * k * i + s == (1 - _shipped(s, i, q)) * s + q * (k - i / q) * (k - i / q),
        ),
        over=[s, i, q, k],
    )
    goal = implies(
        both(distribution, S > 0, Q > 0),
        error == (1 - _shipped(S, inner, Q)) * S + Q * (kappa - best) * (kappa - best),
    )
    facts = [expanded(N, d, P, X, G, kappa), bottom(S, inner, Q, kappa)]
    return generalize(arithmetic(goal, *facts), N, d, P, X, G, kappa)


def inner_symbolic() -> Theorem:
    """|- <G, E X> = E<G, X>: what D multiplies is the same, whichever sum comes first."""
    N, d = variable("N", INT), variable("d", INT)
    P, X, G = variable("P", SEQUENCE), variable("S", MATRIX), variable("g", SEQUENCE)
    cross = sequence(lambda i: sequence(lambda j: P[i] * X[i][j] * G[j]))
    left = total(lambda j: G[j] * total(lambda i: P[i] * X[i][j], N), d)
    right = total(lambda i: P[i] * total(lambda j: X[i][j] * G[j], d), N)
    return prove(implies(both(N >= 0, d >= 0), left == right), exchange()(cross, d, N), over=[N, d, P, X, G])


def self_push_symbolic() -> Theorem:
    """|- sum P = 1, E|s|^2 > 0 -> E[c |s|^2] = 0, c the shipped n^2 estimator without ratios."""
    s, m = Symbolic(), variable("m", REAL)
    chosen = Estimator(Weighting("none"), "on_policy_optimal")
    square = lambda i: total(lambda j: s.S[i][j] * s.S[i][j], s.d)  # noqa: E731
    size, weighted = total(lambda i: s.P[i] * square(i), s.N), total(lambda i: s.P[i] * square(i) * s.R[i], s.N)
    b = chosen.baseline_value(s.batch()).term
    bottom = prove(implies(both(s.sized, size > 0), b * size == weighted))
    pushed = lambda v: total(lambda i: s.P[i] * (s.R[i] - v) * square(i), s.N)  # noqa: E731
    split = prove(implies(s.sized, pushed(m) == weighted - m * size), over=[*s.everything, m])
    coefficient = chosen.coefficients(s.batch())
    own = total(lambda i: s.P[i] * coefficient.at(i) * square(i), s.N)
    same = pointwise(
        sequence(lambda i: s.P[i] * coefficient.at(i) * square(i)),
        sequence(lambda i: s.P[i] * (s.R[i] - b) * square(i)),
        s.N,
        given=s.sized,
    )
    goal = implies(both(s.distribution, size > 0), own == 0)
    return generalize(arithmetic(goal, bottom, split(*s.everything, b), same), *s.everything)


def only_symbolic() -> Theorem:
    """|- sum P = 1, E|s|^2 > 0 -> E[c |s|^2] = (b* - b) E|s|^2, c the shipped estimator with baseline b, no ratios."""
    s, b = Symbolic(), variable("b", REAL)
    square = lambda i: total(lambda j: s.S[i][j] * s.S[i][j], s.d)  # noqa: E731
    size, weighted = total(lambda i: s.P[i] * square(i), s.N), total(lambda i: s.P[i] * square(i) * s.R[i], s.N)
    best = estimator("on_policy_optimal", weighting=Weighting("none")).baseline_value(s.batch()).term
    bottom = prove(implies(both(s.sized, size > 0), best * size == weighted))
    coefficient = coefficients(s.batch(), b, weighting=Weighting("none"))
    own = total(lambda i: s.P[i] * coefficient.at(i) * square(i), s.N)
    split = prove(implies(s.sized, own == weighted - b * size), over=[*s.everything, b])
    goal = implies(both(s.distribution, size > 0), own == (best - b) * size)
    return generalize(arithmetic(goal, bottom, split(*s.everything, b)), *s.everything, b)


def _positive(rng: random.Random) -> Fraction:
    return Fraction(rng.randint(1, 20), rng.randint(1, 20))


def scalar_instance(rng: random.Random) -> dict[str, Any]:
    """Random numbers for E||x||^2 and the like."""
    values = {name: _positive(rng) for name in ("S2", "Q", "L")}
    return {**values, "I": rational(rng), "eta": rational(rng)}


def estimate_instance(rng: random.Random) -> dict[str, Any]:
    """A random estimate on three atoms, and a gradient of two coordinates."""
    return {
        "N": 3,
        "d": 2,
        "P": list(simplex(rng, 3)),
        "S": [list(row) for row in rational_array(rng, 3, 2)],
        "g": list(rational_array(rng, 2)),
        "eta": rational(rng),
    }


CLAIMS = [
    Claim(
        "T15.gain",
        "the best step of any estimate is sure to gain D |G|^2 / (2 L), another (L/2) E|X|^2 (eta - eta*)^2 less",
        ("moments.descent_efficiency",),
        ("C10", "C11"),
        "|G|^2, E|X|^2, L > 0; the quadratic bound; X may be biased",
        gain_exact,
        gain_symbolic,
        scalar_instance,
        ("descent_gap",),
    ),
    Claim(
        "T15.shrink",
        "E|kappa X - G|^2 = (1 - D) |G|^2 + E|X|^2 (kappa - kappa*)^2: at best (1 - D) |G|^2 for a multiple of X",
        ("moments.descent_efficiency",),
        ("C10",),
        "|G|^2, E|X|^2 > 0; X may be biased",
        shrink_exact,
        shrink_symbolic,
        estimate_instance,
        ("shrink_gap",),
    ),
    Claim(
        "T15.inner",
        "<G, E X> = E<G, X>: D is the same whichever sum comes first",
        ("moments.descent_efficiency",),
        ("C10",),
        "none",
        gain_exact,
        inner_symbolic,
        estimate_instance,
    ),
    Claim(
        "T15.damping",
        "mean squared error can be lowered by shrinking an estimate alone; D cannot",
        ("moments.descent_efficiency", "moments.trace_covariance"),
        ("C10",),
        exact=damping_exact,
        kind="witness",
    ),
    Claim(
        "T15.self_push",
        "the n^2 baseline without ratios leaves E[(R - b) |s|^2] = 0: the batch's own pushes cancel in sum",
        ("estimators.Estimator.coefficients", "baselines.weighted_mean"),
        ("C10",),
        "E|s|^2 > 0",
        self_push_exact,
        self_push_symbolic,
        instance,
    ),
    Claim(
        "T15.only",
        "without ratios E[(R - b) |s|^2] = (b* - b) E|s|^2, b* the n^2 baseline: no other number leaves 0",
        ("estimators.Estimator.coefficients", "baselines.weighted_mean"),
        ("C10",),
        "E|s|^2 > 0",
        self_push_exact,
        only_symbolic,
        instance,
    ),
    Claim(
        "T15.tower",
        "reward-stratified weights E[a|R] have OPOB's population baseline: E[E[a|R] R] / E[E[a|R]] = E[a R] / E[a]",
        ("baselines.mean_given_reward", "baselines.weighted_mean"),
        ("C6", "C10"),
        "one prompt",
        tower_exact,
    ),
]
