"""T13 (claim C19): what dividing by the group's standard deviation does to the expected update.

Statement. Rewards are 0 or 1; q = P_mu(R = 1) in (0, 1), g = E_mu[w R s] the gradient, E[w s] = 0. N independent
draws, m of them rewarded, std_m = sqrt(m (N - m)) / N. With the group mean subtracted and the group's std divided out
(GRPO),

    E[estimate] = g E[std_m] / (q (1 - q))

so a prompt keeps its direction and only the scale changes, on and off policy. More generally, if the advantage of
sample i is any function A_i of its reward and of the others' data, then E[A_i w_i s_i] = E[A_i(1) - A_i(0)] g: the
direction is kept by a leave-one-out OPOB, and not by an in-batch OPOB, whose value depends on *which* sample was
drawn (witness).

Source. GRPO, arXiv 2402.03300. The closed form is this project's; per-prompt scaling on policy is discussed in
2503.20783.

Proof. Given all but sample i, E[A_i w s] = A_i(1) E[w s 1(R = 1)] + A_i(0) E[w s 1(R = 0)] = (A_i(1) - A_i(0)) g. In
a group, mean_i c_i R_i = std_m and mean_i c_i (1 - R_i) = -std_m (`T13.group`), while E[w s | R = 1] = g / q and E[w
s | R = 0] = -g / (1 - q)."""

from __future__ import annotations

import math
import random
from fractions import Fraction
from typing import Any

import numpy as np

from proofs.claims import Claim
from proofs.logic import INT, REAL, SQRT, Theorem, specialize, variable
from proofs.setting import RationalProblem, Symbolic, coefficients, instance, mean_estimate, random_problem, rational
from proofs.sums import both, every, implies, pointwise, prove, sequence, total
from proofs.surd import Surd
from vcposim.arrays import expectation
from vcposim.batch import Batch, DenseScores
from vcposim.moments import batch_sums
from vcposim.weights import Weighting

STD = {"normalizer": "group_std"}

# ---- layer 1 -----------------------------------------------------------------------------------------------------


def mean_update(p: RationalProblem, draws: int, baseline: str) -> list[Surd]:
    """E[estimate] of the shipped estimator with group std, over all ordered batches: (p,)."""
    batch, mass = p.batches(draws)
    with_roots = Batch(
        reward=np.vectorize(Surd, otypes=[object])(batch.reward),
        ratio=batch.ratio,
        scores=DenseScores(batch.scored().score),
    )
    estimate = batch_sums(with_roots, coefficients(with_roots, baseline, **STD), mass).estimate
    return [x if isinstance(x, Surd) else Surd(x) for x in estimate]


def closed_form(q: Fraction, draws: int) -> Surd:
    """E[std_m] / (q (1 - q)), m binomial."""
    out = Surd()
    for m in range(draws + 1):
        chance = math.comb(draws, m) * q**m * (1 - q) ** (draws - m)
        out = out + Surd(m * (draws - m)).sqrt() * (chance / draws)
    return out / (q * (1 - q))


def scale_exact() -> str:
    """For rewards 0 and 1, division by the group's deviation scales the mean update by the closed form."""
    rng, checked = random.Random(0), 0
    for outcomes, draws in ((2, 2), (2, 3), (2, 4), (3, 2), (3, 3), (4, 3)):
        for p in (
            random_problem(rng, outcomes, 2, binary=True),
            random_problem(rng, outcomes, 2, binary=True).on_policy(),
        ):
            q = (p.mu * p.reward).sum()
            scale = closed_form(q, draws)
            assert mean_update(p, draws, "group_mean") == [scale * g for g in p.gradient]
            checked += 1
    return f"{checked} problems, on and off policy, all ordered batches, roots exact"


def leave_one_out_exact() -> str:
    """With baselines of the others the mean update keeps the gradient's direction."""
    rng, checked = random.Random(1), 0
    for outcomes, draws in ((3, 2), (3, 3), (4, 3)):
        for baseline in ("leave_one_out", "opob_leave_one_out"):
            p = random_problem(rng, outcomes, 2, binary=True)
            x, y = mean_update(p, draws, baseline)
            assert x * p.gradient[1] == y * p.gradient[0]
            assert float(x) * float(p.gradient[0]) > 0
            checked += 1
    return f"{checked} problems and baselines, all ordered batches, roots exact"


def in_batch_opob_exact() -> str:
    """A problem where OPOB of its own batch turns it against the gradient."""
    p = random_problem(random.Random(36), 4, 2, binary=True)
    x, y = mean_update(p, 3, "opob")
    g = p.gradient
    assert x * g[1] != y * g[0]
    dot = float(x) * float(g[0]) + float(y) * float(g[1])
    cosine = dot / (math.hypot(float(x), float(y)) * math.hypot(*map(float, g)))
    assert cosine < 0
    return f"four outcomes, N = 3: the mean update has cosine {cosine:.2f} with the gradient"


# ---- layer 2 -----------------------------------------------------------------------------------------------------


def group_symbolic() -> Theorem:
    """|- R_i in {0, 1}, variance v > 0, sqrt(v)^2 = v -> E[c R] = std and E[c (1 - R)] = -std, c as shipped, w = 1."""
    s = Symbolic()
    batch = s.batch()
    binary = every(lambda i: s.R[i] * s.R[i] == s.R[i], s.N)
    c = coefficients(batch, "group_mean", weighting=Weighting("none"), **STD)
    mean = total(lambda i: s.P[i] * s.R[i], s.N)
    v = expectation((batch.reward - mean) * (batch.reward - mean), batch.measure).term
    std = SQRT(v)
    square = pointwise(
        sequence(lambda i: s.P[i] * (s.R[i] * s.R[i])), sequence(lambda i: s.P[i] * s.R[i]), s.N, given=binary,
        by=lambda i: [specialize(binary, i)],
    )  # fmt: skip
    rewarded = total(lambda i: s.P[i] * c.at(i) * s.R[i], s.N)
    unrewarded = total(lambda i: s.P[i] * c.at(i) * (1 - s.R[i]), s.N)
    given = both(s.distribution, binary, std > 0, std * std == v)
    goal = implies(given, both(rewarded == std, unrewarded == -std))
    return prove(goal, square, over=s.everything)


def difference_symbolic() -> Theorem:
    """|- R in {0, 1}, E[w s_j] = 0 -> E[w A(R) s_j] = (A(1) - A(0)) E[w R s_j], for any A."""
    s, j, one, zero = Symbolic(), variable("j", INT), variable("one", REAL), variable("zero", REAL)
    batch = s.batch()
    binary = every(lambda i: s.R[i] * s.R[i] == s.R[i], s.N)
    advantage = batch.reward * one + (1 - batch.reward) * zero
    left = mean_estimate(batch, batch.ratio * advantage).at(j)
    right = (one - zero) * mean_estimate(batch, coefficients(batch, "zero")).at(j)
    goal = implies(both(s.sized, binary, s.balanced_at(j)), left == right)
    return prove(goal, over=[*s.everything, one, zero, j])


def binary_instance(rng: random.Random) -> dict[str, Any]:
    """Four outcomes; P(R = 1) = 1/5 or 1/2 makes the standard deviation rational (2/5 or 1/2)."""
    values = instance(rng, outcomes=4)
    P = rng.choice([[Fraction(1, 5), Fraction(1, 5), Fraction(2, 5), Fraction(1, 5)], [Fraction(1, 4)] * 4])
    R = (
        [Fraction(1), Fraction(0), Fraction(0), Fraction(0)]
        if P[0] == Fraction(1, 5)
        else [Fraction(k % 2) for k in range(4)]
    )
    return {**values, "P": P, "R": R}


def balanced_instance(rng: random.Random) -> dict[str, Any]:
    """Four outcomes with rewards 0 and 1 in turn."""
    values = instance(rng, outcomes=4)
    R = [Fraction(k % 2) for k in range(4)]
    return {**values, "R": R, "one": rational(rng), "zero": rational(rng)}


_STD = ("estimators.Estimator.coefficients", "estimators.group_std")

CLAIMS = [
    Claim(
        "T13.scale",
        "with group mean and std, E[estimate] = g E[sqrt(m (N - m))] / (N q (1 - q)), on and off policy",
        (*_STD, "baselines.weighted_mean", "moments.batch_sums"),
        ("C19",),
        "R in {0, 1}, 0 < q < 1, E[w s] = 0, independent draws",
        exact=scale_exact,
    ),
    Claim(
        "T13.group",
        "mean_i c_i R_i = std and mean_i c_i (1 - R_i) = -std",
        (*_STD, "baselines.weighted_mean"),
        ("C19",),
        "R in {0, 1}, w = 1, std > 0",
        symbolic=group_symbolic,
        instance=binary_instance,
    ),
    Claim(
        "T13.direction",
        "E[w A(R) s] = (A(1) - A(0)) E[w R s] for any advantage A of a binary reward",
        ("moments.batch_sums", "estimators.Estimator.coefficients"),
        ("C19",),
        "R in {0, 1}, E[w s] = 0",
        exact=leave_one_out_exact,
        symbolic=difference_symbolic,
        instance=balanced_instance,
        coq=("binary_advantage",),
    ),
    Claim(
        "T13.opob",
        "with std and in-batch OPOB the direction is not kept: the mean update can point away from the gradient",
        (*_STD, "baselines.weighted_mean", "moments.batch_sums"),
        ("C19",),
        exact=in_batch_opob_exact,
        kind="witness",
    ),
]
