"""T12 (claims C3, C18): sums of parts can be merged in any order, also on a log scale.

Statement. Every moment is a function of four sums; the sums of a whole are the merged sums of its parts, `merge` is
associative and commutative. Weights too large for floats travel as (scale, total, square) with true sums total
e^scale and square e^(2 scale); merging two such parts gives the true sums of both, whatever their scales, so that the
effective sample size of a merged batch does not depend on how it was cut.

Proof. A finite sum can be cut anywhere (induction). With t = max(scale, scale'), e^t (total e^(scale - t)) = total
e^scale: of exp only exp(x - t) exp(t) = exp(x) is used, so layer 1 may replace it by powers of two and stay exact."""

from __future__ import annotations

import random
from fractions import Fraction
from functools import cache
from typing import Any

import numpy as np

from proofs.claims import Claim
from proofs.evaluate import power_of_two
from proofs.logic import (
    EXP,
    INT,
    MATRIX,
    REAL,
    SEQUENCE,
    SUM,
    TENSOR,
    Formula,
    Theorem,
    arithmetic,
    canonical,
    generalize,
    specialize,
    sum_next,
    variable,
    z3,
)
from proofs.setting import coefficients, problems, rational, rational_array
from proofs.sums import both, implies, induct, prove, sequence
from proofs.symbolic import REAL_ALGEBRA, Length, SymbolicArray, scalar
from vcposim.batch import Batch, DenseScores
from vcposim.diagnostics import WeightSums
from vcposim.moments import Sums, batch_sums

# ---- layer 1 -----------------------------------------------------------------------------------------------------


def parts_exact() -> str:
    """Sums of two parts merge, in either order, to the sums of the whole."""
    checked = 0
    for p in problems(10, outcomes=(2, 3)):
        batch, mass = p.batches(2)
        c = coefficients(batch, "opob")
        whole = batch_sums(batch, c, mass)
        for cut in range(1, len(mass)):
            parts = [_part(batch, c, mass, slice(None, cut)), _part(batch, c, mass, slice(cut, None))]
            merged, swapped = parts[0].merge(parts[1]), parts[1].merge(parts[0])
            assert all(np.all(x == y) and np.all(x == z) for x, y, z in zip(whole, merged, swapped, strict=True))
            checked += 1
    return f"{checked} cuts of enumerated batches"


def _part(batch: Batch, c: Any, mass: Any, rows: slice) -> Sums:
    part = Batch(
        reward=batch.reward[rows], ratio=batch.ratio[rows], scores=DenseScores(batch.scored().score[rows]),
    )  # fmt: skip
    return batch_sums(part, c[rows], mass[rows])


class Power(Fraction):
    """A rational logarithm to base 2: numpy's `exp` of it is exact."""

    def exp(self) -> Fraction:
        """2 to this power: exact for an integer."""
        return power_of_two(self)

    def __sub__(self, other: Any) -> Power:
        return Power(Fraction(self) - Fraction(other))


def log_scale_exact() -> str:
    """Merging sums at different scales is associative and commutative."""
    rng, checked = random.Random(1), 0
    for _ in range(100):
        parts = [_random_part(rng) for _ in range(3)]
        a, b, c = parts
        left, right, other = a.merge(b).merge(c), a.merge(b.merge(c)), c.merge(a).merge(b)
        sums = [_true_sums(part) for part in parts]
        expected = tuple(sum(values) for values in zip(*sums, strict=True))
        assert _true_sums(left) == _true_sums(right) == _true_sums(other) == expected
        assert left.ess_fraction().item() == right.ess_fraction().item() == other.ess_fraction().item()
        checked += 1
    return f"{checked} triples of parts, scales from 2^-30 to 2^30"


def _random_part(rng: random.Random) -> WeightSums:
    add, square = Fraction(rng.randint(1, 99), 7), Fraction(rng.randint(1, 99), 7)
    return WeightSums(
        *(np.array([x], dtype=object) for x in (Power(rng.randint(-30, 30)), Fraction(rng.randint(1, 9)), add, square))
    )


def _true_sums(part: WeightSums) -> tuple[Fraction, ...]:
    log_scale, count, add, square = (x.item() for x in part)
    scale = power_of_two(log_scale)
    return count, add * scale, square * scale * scale


# ---- layer 2 -----------------------------------------------------------------------------------------------------


def merge_symbolic() -> Theorem:
    """|- `Sums.merge` is associative and commutative, component by component (one stands for all: they are alike)."""
    x, y, w = (_numbered(k) for k in range(3))
    pairs = [*zip(x.merge(y), y.merge(x), strict=True), *zip(x.merge(y).merge(w), x.merge(y.merge(w)), strict=True)]
    goal = both(*(left.term == right.term for left, right in pairs))
    names = [v for part in (x, y, w) for v in (array.term for array in part)]
    return prove(implies(z3.BoolVal(True), goal), over=names)


def _numbered(k: int) -> Sums:
    return Sums(*(scalar(variable(f"{name}{k}", REAL)) for name in ("mass", "estimate", "square", "contribution")))


@cache
def cut() -> Theorem:
    """|- sum_{k < n + m} f = sum_{k < n} f + sum_{k < m} f(n + k)."""
    f, n = variable("f", SEQUENCE), variable("n", INT)
    rest = sequence(lambda k: f[n + k])
    return induct(
        lambda m: implies(n >= 0, SUM(f, n + m) == SUM(f, n) + SUM(rest, m)),
        over=[f, n],
        step=lambda m: [sum_next(f, n + m)],
    )


def _replications(
    C: Formula, M: Formula, S: Formula, mass: Formula, start: Any, count: Formula, N: Formula, d: Formula
) -> Sums:
    """The shipped sums of batches start .. start + count - 1, with coefficients C and measures M."""
    shape = (Length(count), Length(N))
    table = lambda name: SymbolicArray(REAL_ALGEBRA, shape, lambda k, i: name[start + k][i])  # noqa: E731
    score = SymbolicArray(REAL_ALGEBRA, (*shape, Length(d)), lambda k, i, j: S[start + k][i][j])
    c = table(C)
    batch = Batch(
        reward=c * 0, ratio=c * 0 + 1, scores=DenseScores(score), measure=table(M), unit=scalar(z3.RealVal(0))
    )
    return batch_sums(batch, c, SymbolicArray(REAL_ALGEBRA, shape[:1], lambda k: mass[start + k]))


def parts_symbolic() -> Theorem:
    """|- the sums of n + m batches are those of the first n merged with those of the last m, component by component."""
    N, d, n, m, j = (variable(name, INT) for name in ("N", "d", "n", "m", "j"))
    C, M, mass = variable("C", MATRIX), variable("M", MATRIX), variable("mass", SEQUENCE)
    S = variable("T", TENSOR)
    sums = lambda start, count: _replications(C, M, S, mass, start, count, N, d)  # noqa: E731
    at = lambda x: [a.at(j) if a.ndim else a.term for a in x]  # noqa: E731
    whole, merged = at(sums(0, n + m)), at(sums(0, n).merge(sums(n, m)))
    facts = [cut()(term.arg(0), n, m) for term in map(canonical, whole)]
    goal = implies(both(n >= 0, m >= 0), both(*(x == y for x, y in zip(whole, merged, strict=True))))
    return generalize(arithmetic(goal, *facts), N, d, n, m, j, C, M, mass, S)


class Part:
    """A part of a batch: scale, count, total, square, and its true sums."""

    def __init__(self, k: int) -> None:
        self.names = [variable(f"{name}{k}", REAL) for name in ("scale", "count", "total", "square")]
        self.sums = WeightSums(*map(scalar, self.names))


def true_sums(part: WeightSums) -> list[Formula]:
    """count, total e^scale, square e^(2 scale)."""
    e = EXP(part.log_scale.term)
    return [part.count.term, part.total.term * e, part.square.term * e * e]


def exponential() -> Formula:
    """All that is used of exp: exp(x - y) exp(y) = exp(x)."""
    x, y = z3.FreshConst(REAL, "x"), z3.FreshConst(REAL, "y")
    return z3.ForAll([x, y], EXP(x - y) * EXP(y) == EXP(x))


def log_scale_symbolic() -> Theorem:
    """|- the true sums of `WeightSums.merge` are the sums of the parts' true sums, if exp(x - y) exp(y) = exp(x)."""
    a, b = Part(1), Part(2)
    merged = a.sums.merge(b.sums)
    top, law = merged.log_scale.term, exponential()
    facts = [specialize(law, part.sums.log_scale.term, top) for part in (a, b)]
    added = [x + y for x, y in zip(true_sums(a.sums), true_sums(b.sums), strict=True)]
    goal = implies(law, both(*(x == y for x, y in zip(true_sums(merged), added, strict=True))))
    return generalize(arithmetic(goal, *facts), *a.names, *b.names)


def ess_symbolic() -> Theorem:
    """|- `WeightSums.ess_fraction` is (true total)^2 / (count * true square): it does not depend on the scale."""
    part = Part(1)
    count, add, square = true_sums(part.sums)
    e = EXP(part.sums.log_scale.term)
    goal = implies(
        both(e > 0, part.sums.square.term * count != 0),
        part.sums.ess_fraction().term * (count * square) == add * add,
    )
    return prove(goal, over=part.names)


def part_instance(rng: random.Random) -> dict[str, Any]:
    """Random sums of three parts, each at a scale of its own."""
    values: dict[str, Any] = {}
    for k in range(3):
        values |= {
            f"{name}{k}": rational(rng) ** 2 + 1
            for name in ("count", "total", "square", "mass", "estimate", "contribution")
        }
        values[f"scale{k}"] = Fraction(rng.randint(-9, 9))
    return values


def replications_instance(rng: random.Random) -> dict[str, Any]:
    """Random coefficients of n + m batches of N samples with d coordinates."""
    n, m, N, d = 2, 3, 2, 2
    table = lambda *shape: rational_array(rng, *shape).tolist()  # noqa: E731
    return {
        "n": n, "m": m, "N": N, "d": d, "j": rng.randrange(d),
        "C": table(n + m, N), "M": table(n + m, N), "mass": table(n + m), "T": table(n + m, N, d),
    }  # fmt: skip


CLAIMS = [
    Claim(
        "T12.merge",
        "merge of Sums is associative and commutative",
        ("moments.Sums.merge",),
        ("C18",),
        exact=parts_exact,
        symbolic=merge_symbolic,
        instance=part_instance,
    ),
    Claim(
        "T12.parts",
        "the sums of n + m batches are the merged sums of n and of m of them",
        ("moments.batch_sums", "moments.Sums.merge"),
        ("C18",),
        "none: any coefficients, measures, scores, masses",
        parts_exact,
        parts_symbolic,
        replications_instance,
    ),
    Claim(
        "T12.log_scale",
        "merging parts on a log scale adds their true sums, total e^scale and square e^(2 scale)",
        ("diagnostics.WeightSums.merge",),
        ("C3", "C18"),
        "exp(x - y) exp(y) = exp(x); finite scales",
        log_scale_exact,
        log_scale_symbolic,
        part_instance,
    ),
    Claim(
        "T12.ess",
        "the ESS of a merged batch does not depend on the scale its sums travel at",
        ("diagnostics.WeightSums.ess_fraction",),
        ("C3", "C18"),
        "exp > 0; some sample has weight",
        log_scale_exact,
        ess_symbolic,
        part_instance,
    ),
]
