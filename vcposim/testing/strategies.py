"""Hypothesis strategies: the inputs that estimators meet, and the ones that break them.

Everything finite is generated as exact `Fraction`s on a small grid. They shrink to readable counterexamples, run
through the kernel without rounding, and become floats for any array library, so one case serves all of them. Extreme
log-ratios, which have no Fraction, are generated as floats.

A `Case` is a batch with the library still open; `Arms` are a problem small enough to enumerate, and so are
`Strings`, which are drawn token by token.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from functools import cache
from operator import itemgetter
from typing import Any

import numpy as np
from hypothesis import strategies as st

from vcposim.batch import Batch, DenseScores, sample_measure

Exact = np.ndarray
"""object array of Fractions"""


@dataclass(frozen=True)
class Library:
    """An array library, as a function from NumPy arrays to its own; `exact` if it takes Fractions as they are."""

    name: str
    convert: Callable[[np.ndarray], Any]
    exact: bool = False

    def __call__(self, x: Exact) -> Any:
        """Fractions as this library writes them: same -> same."""
        return self.convert(x if self.exact else x.astype(np.float64))

    def floats(self, x: Any) -> Any:
        """Float input (log-ratios), for libraries that have floats."""
        return self.convert(np.asarray(x, dtype=np.float64))


NUMPY = Library("numpy", np.array)
EXACT = Library("fraction", lambda x: x, exact=True)


def exact(values: Any) -> Exact:
    """Nested lists of numbers or of texts like "1/3", or an array, as an object array of Fractions: (...)."""
    source: Any = np.array(values, dtype=object)
    out = np.empty(source.shape, dtype=object)
    for index in np.ndindex(source.shape):
        out[index] = Fraction(source[index])
    return out


@cache
def grid(low: int, high: int, denominator: int) -> st.SearchStrategy[Fraction]:
    """Fractions k / denominator in [low, high]."""
    return st.integers(low * denominator, high * denominator).map(lambda k: Fraction(k, denominator))


@cache  # a strategy that is made anew at each draw is also examined anew, which takes longer than to draw from it
def arrays_of(elements: st.SearchStrategy[Any], shape: tuple[int, ...]) -> st.SearchStrategy[Exact]:
    """Object arrays of a shape."""
    size = math.prod(shape)
    return st.lists(elements, min_size=size, max_size=size).map(lambda xs: np.array(xs, dtype=object).reshape(shape))


@cache
def fractions(low: int, high: int, denominator: int, shape: tuple[int, ...]) -> st.SearchStrategy[Exact]:
    """Object arrays of k / denominator, k in [low, high], of a shape."""
    whole = arrays_of(st.integers(low, high), shape)
    return whole.map(lambda ks: exact(ks) / denominator)


@st.composite
def probability(draw: st.DrawFn, size: int) -> Exact:
    """Probability vectors from uniform to near-degenerate (2^-60), never zero."""
    sharpness = draw(st.sampled_from([0, 2, 8, 60]))
    mass = [Fraction(1, 2 ** draw(st.integers(0, sharpness))) for _ in range(size)]
    return exact([m / sum(mass) for m in mass])


@st.composite
def policy_pair(draw: st.DrawFn, size: int) -> tuple[Exact, Exact]:
    """(target, behavior): on-policy, near, or unrelated (ratios up to 2^60: heavy-tailed)."""
    target = draw(probability(size))
    kind = draw(st.sampled_from(["on_policy", "near", "unrelated"]))
    other = target if kind == "on_policy" else draw(probability(size))
    mix = {"on_policy": Fraction(0), "near": Fraction(1, 8), "unrelated": Fraction(1)}[kind]
    return target, (1 - mix) * target + mix * other


@cache
def reward(shape: tuple[int, ...]) -> st.SearchStrategy[Exact]:
    """Binary (verifiable), continuous, or constant rewards."""
    binary = arrays_of(st.sampled_from([Fraction(0), Fraction(1)]), shape)
    continuous = fractions(-50, 50, 10, shape)
    constant = grid(-5, 5, 10).map(lambda r: exact(np.full(shape, r)))
    return st.one_of(binary, continuous, constant)


@cache
def ratio(shape: tuple[int, ...], largest: int = 30) -> st.SearchStrategy[Exact]:
    """Positive ratios, on-policy to heavy-tailed."""
    one = st.just(Fraction(1))
    near = st.builds(Fraction, st.integers(5, 15), st.just(10))
    wide = st.builds(Fraction, st.integers(1, largest), st.integers(1, largest))
    mixed = st.one_of(near, wide)
    return st.sampled_from([one, near, wide, mixed, mixed]).flatmap(lambda e: arrays_of(e, shape))


@cache
def extreme_log_ratio(size: int) -> st.SearchStrategy[np.ndarray]:
    """Float log-ratios up to +-1e4, with -inf (a sample the target never makes) and ties among them."""
    ordinary = st.floats(-3, 3, allow_nan=False).map(lambda x: round(x, 3))
    extreme = st.sampled_from([0.0, 1e4, -1e4, 1e4 - 1, 709.0, 745.0, -745.0, 89.0, -104.0, 355.0, -math.inf])
    return st.lists(st.one_of(ordinary, extreme), min_size=size, max_size=size).map(np.array)


def lead_shape() -> st.SearchStrategy[tuple[int, ...]]:
    """The axes before the samples: a lone group, groups, replications of groups."""
    return st.sampled_from([(), (1,), (3,), (2, 2)])


@dataclass(frozen=True)
class Case:
    """A batch in exact numbers, with the library still open. Axes as in `vcposim.batch.Batch`."""

    reward: Exact
    ratio: Exact
    score: Exact
    length: Exact
    token_mask: Exact | None = None
    sample_mask: Exact | None = None
    population_baseline: Exact | None = None
    token_probability: Exact | None = None
    """pi of each token: gives `log_prob`, and `collision` over a vocabulary of two"""
    anchor_ratio: Exact | None = None
    """pi/anchor of each token"""
    log_ratio: np.ndarray | None = None
    """floats that stand in for log(ratio)"""
    grouped: bool = False

    @property
    def per_token(self) -> bool:
        """Whether ratios are given per token."""
        return self.ratio.ndim > self.reward.ndim

    @property
    def size(self) -> int:
        """Samples of a group."""
        return self.reward.shape[-1]

    def batch(self, library: Library = EXACT, **changes: Any) -> Batch:
        """This case as a `Batch` of that library: Fractions feed `ratio`, floats feed `log_ratio`."""
        given: dict[str, Any] = {"length": library(self.length)} if self.token_mask is None else {}
        if self.sample_mask is not None:
            measure, unit = sample_measure(self.sample_mask)
            given |= {"measure": library(measure), "unit": library(unit)}
        if library.exact:
            given["ratio"] = library(self.ratio)
        else:
            given["log_ratio"] = library.floats(log(self.ratio) if self.log_ratio is None else self.log_ratio)
            if self.token_probability is not None and self.anchor_ratio is not None:
                p, anchor = as_float(self.token_probability), log(self.anchor_ratio)
                given["log_prob"] = library.floats(np.log(p))
                given["collision"] = library.floats(p * p + (1 - p) * (1 - p))
                given["anchor_log_ratio"] = library.floats(anchor)
                given["reference_log_ratio"] = library.floats(anchor.sum(axis=-1))
        for name in ("token_mask", "population_baseline"):
            if getattr(self, name) is not None:
                given[name] = library(getattr(self, name))
        scores = DenseScores(library(self.score), per_token=self.score.ndim > self.reward.ndim + 1)
        fixed = {"reward": library(self.reward), "scores": scores, "grouped": self.grouped}
        return Batch(**{**fixed, **given, **changes})

    def groups(self) -> Iterator["Case"]:
        """Every group as a case of its own, in C order of the leading axes."""
        for index in np.ndindex(self.reward.shape[:-1]):
            yield self._map(itemgetter(index))

    def take(self, order: list[int]) -> "Case":
        """The samples in another order (or fewer of them)."""
        axis = self.reward.ndim - 1
        return replace(
            self._map(lambda x: np.take(x, order, axis=axis) if x.shape[axis] == self.size else x),
            population_baseline=self.population_baseline,
        )

    def _map(self, change: Callable[[np.ndarray], np.ndarray]) -> "Case":
        parts: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        changed: dict[str, Any] = {k: change(x) for k, x in parts.items() if isinstance(x, np.ndarray)}
        return replace(self, **changed)

    def text(self) -> str:
        """The case as the arguments that make it again with `case_of`."""
        parts = {f.name: getattr(self, f.name) for f in fields(self)}
        shown = {k: x for k, x in parts.items() if x is not None and x is not False and k != "population_baseline"}
        return ", ".join(f"{k}={written(x)}" for k, x in shown.items())


def case_of(**given: Any) -> Case:
    """A case from nested lists of numbers and texts like "1/3", as `Case.text` writes them."""
    parts: dict[str, Any] = {k: x if k == "grouped" else exact(x) for k, x in given.items() if k != "log_ratio"}
    if "log_ratio" in given:
        parts["log_ratio"] = np.array(given["log_ratio"], dtype=np.float64)
    return Case(**parts)


def written(x: Any) -> str:
    """An array as nested lists of integers and texts, as `exact` reads them."""
    if isinstance(x, np.ndarray):
        return "[" + ", ".join(written(y) for y in x) + "]"
    if isinstance(x, Fraction):
        return str(x.numerator) if x.denominator == 1 else f"'{x}'"
    return str(x) if isinstance(x, bool | int) or np.isfinite(x) else f"float('{x}')"


def log(x: Exact) -> np.ndarray:
    """log of Fractions as floats, -inf at zero: same -> same."""
    with np.errstate(divide="ignore"):
        return np.log(as_float(x))


def as_float(x: Exact) -> np.ndarray:
    """Fractions as float64: same -> same."""
    return x.astype(np.float64)


@cache
def first_ones(shape: tuple[int, ...], fewest: int, size: int) -> st.SearchStrategy[Exact]:
    """Masks of padding at the end: (*shape, size), at least `fewest` ones in a row of `size`."""
    count = arrays_of(st.integers(fewest, size), shape)
    return count.map(lambda n: exact((np.arange(size) < np.asarray(n)[..., None]).astype(int)))


@st.composite
def cases(
    draw: st.DrawFn,
    *,
    lead: tuple[int, ...] | None = None,
    smallest: int = 2,
    largest: int = 4,
    per_token: bool = False,
    ragged: bool = False,
) -> Case:
    """Batches of groups: trajectory or token ratios, ragged (padded) or full."""
    lead = draw(lead_shape()) if lead is None else lead
    shape = (*lead, draw(st.integers(smallest, largest)))
    parameter = (draw(st.integers(1, 3)),)
    steps = draw(st.integers(1, 3)) if per_token else 0
    time = (steps,) if per_token else ()
    token_mask = draw(first_ones(shape, 1, steps)) if per_token else None
    sample_mask = draw(first_ones(lead, smallest, shape[-1])) if ragged else None
    score = draw(fractions(-10, 10, 5, (*shape, *time, *parameter)))
    return Case(
        reward=draw(reward(shape)),
        ratio=draw(ratio((*shape, *time))),
        score=score if token_mask is None else score * token_mask[..., None],
        length=draw(fractions(1, 9, 1, shape)),
        token_mask=token_mask,
        sample_mask=sample_mask,
        population_baseline=draw(fractions(-8, 8, 4, (*lead, 1))),
    )


@st.composite
def language_cases(draw: st.DrawFn, *, lead: tuple[int, ...] = (), smallest: int = 2, largest: int = 4) -> Case:
    """Token batches with every optional field: target, behavior and anchor probabilities of each token."""
    shape = (*lead, draw(st.integers(smallest, largest)))
    steps = draw(st.integers(1, 2))
    mask = draw(first_ones(shape, 1, steps))
    # primes over primes: no ratio hits a limit that rounding would decide, except 1, where all policies agree
    ours, theirs = fractions(1, 100, 101, mask.shape), fractions(1, 102, 103, mask.shape)
    p, same = draw(ours), draw(st.booleans())
    behavior, anchor = (p if same else draw(theirs) for _ in range(2))
    return Case(
        reward=draw(reward(shape)),
        ratio=p / behavior,
        score=draw(fractions(-10, 10, 5, (*mask.shape, 1))) * mask[..., None],
        length=mask.sum(axis=-1),
        token_mask=mask,
        token_probability=p,
        anchor_ratio=p / anchor,
    )


@dataclass(frozen=True)
class Arms:
    """A softmax bandit: score of arm a is e_a - target."""

    target: Exact
    behavior: Exact
    reward: Exact

    @property
    def score(self) -> Exact:
        """s of each arm: (arms, arms)."""
        return exact(np.eye(len(self.target), dtype=int)) - self.target

    @property
    def ratio(self) -> Exact:
        """target / behavior: (arms,)"""
        return self.target / self.behavior

    @property
    def gradient(self) -> Exact:
        """E_pi[R s], exactly: (arms,)"""
        return (self.target * self.reward) @ self.score

    def population(self, library: Library = EXACT, **changes: Any) -> Batch:
        """One outcome an arm, under the behavior's probabilities, no sample of mass."""
        given = {"ratio": self.ratio} if library.exact else {"log_ratio": library.floats(log(self.ratio))}
        scores, measure = DenseScores(library(self.score)), library(self.behavior)
        fixed = {"reward": library(self.reward), "scores": scores, "measure": measure, "unit": 0}
        return Batch(**{**fixed, **given, **changes})

    def all_batches(self, n: int, library: Library = EXACT) -> tuple[Batch, Any]:
        """Every batch of n draws, as replications, and its probability: (K^n, n), (K^n,)."""
        arm = np.indices((len(self.target),) * n).reshape(n, -1).T
        ratio = self.ratio[arm]
        given = {"ratio": library(ratio)} if library.exact else {"log_ratio": library.floats(log(ratio))}
        scores, length = DenseScores(library(self.score[arm])), library(exact(np.ones(arm.shape, dtype=int)))
        batch = Batch(reward=library(self.reward[arm]), scores=scores, length=length, **given)
        return batch, library(np.prod(self.behavior[arm], axis=-1))

    def text(self) -> str:
        """The bandit as the arguments that make it again with `bandit_of`."""
        return ", ".join(f"{f.name}={written(getattr(self, f.name))}" for f in fields(self))


def bandit_of(**given: Any) -> Arms:
    """A bandit from lists of numbers and texts like "1/3"."""
    return Arms(**{k: exact(x) for k, x in given.items()})


@dataclass(frozen=True)
class Strings:
    """Strings of up to two tokens out of two, drawn by tabular softmax policies: what token ratios are judged on.

    Rows of the policies: the first token, the second after "0", the second after "1". Where `stops`, "1" is the last
    token, and responses differ in length.
    """

    target: Exact
    """(3, 2)"""
    behavior: Exact
    reward: Exact
    """one a string: (4,), or (3,) where `stops`; in the order 00, 01, 10, 11 or 00, 01, 1"""
    stops: bool

    @property
    def _tokens(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(strings, 2) each: the row that drew a token, the token, whether it is one."""
        row, token = [[0, 1], [0, 1], [0, 2], [0, 2]], [[0, 0], [0, 1], [1, 0], [1, 1]]
        keep = [0, 1, 2] if self.stops else [0, 1, 2, 3]
        real = np.ones((len(keep), 2), dtype=int)
        real[2:, 1] = int(not self.stops)
        return np.array(row)[keep], np.array(token)[keep], real

    def _of_tokens(self, policy: Exact) -> Exact:
        row, token, real = self._tokens
        return np.where(real > 0, policy[row, token], exact(1))

    @property
    def score(self) -> Exact:
        """s of each token, zero on padding: (strings, 2, 6)."""
        row, token, real = self._tokens
        out = exact(np.zeros((*row.shape, 3, 2), dtype=int))
        for index in np.ndindex(row.shape):
            if real[index]:
                out[(*index, row[index])] = exact(np.eye(2, dtype=int))[token[index]] - self.target[row[index]]
        return out.reshape(*row.shape, 6)

    @property
    def gradient(self) -> Exact:
        """E_pi[R s], exactly: (6,)"""
        return (self._of_tokens(self.target).prod(axis=-1) * self.reward) @ self.score.sum(axis=-2)

    def all_batches(
        self, n: int, library: Library, *, per_token: bool = True, grouped: bool = False
    ) -> tuple[Batch, Exact]:
        """Every batch of n draws, as replications, and its probability: (K^n, n) or (K^n, 1, n), (K^n,)."""
        drawn = np.indices((len(self.reward),) * n).reshape(n, -1).T
        mass = self._of_tokens(self.behavior).prod(axis=-1)[drawn].prod(axis=-1)
        at = drawn[:, None] if grouped else drawn
        p, q, real = as_float(self._of_tokens(self.target)), as_float(self._of_tokens(self.behavior)), self._tokens[2]
        log_ratio, row = np.log(p / q), self._tokens[0]
        if not per_token:
            scores = DenseScores(library(self.score.sum(axis=-2)[at]))
            given = {"log_ratio": log_ratio.sum(axis=-1), "length": real.sum(axis=-1)}
        else:
            scores = DenseScores(library(self.score[at]), per_token=True)
            given = {"log_ratio": log_ratio, "log_prob": np.log(p), "anchor_log_ratio": log_ratio, "token_mask": real}
            given |= {"collision": (as_float(self.target)[row] ** 2).sum(axis=-1)}
            given |= {"reference_log_ratio": log_ratio.sum(axis=-1)}
        arrays = {name: library.floats(x[at]) for name, x in given.items()}
        return Batch(reward=library(self.reward[at]), scores=scores, grouped=grouped, **arrays), mass

    def text(self) -> str:
        """The strings as the arguments that make them again with `strings_of`."""
        return ", ".join(f"{f.name}={written(getattr(self, f.name))}" for f in fields(self))


def strings_of(**given: Any) -> Strings:
    """Strings from lists of numbers and texts like "1/3"."""
    parts: dict[str, Any] = {k: x if k == "stops" else exact(x) for k, x in given.items()}
    return Strings(**parts)


@st.composite
def strings(draw: st.DrawFn) -> Strings:
    """Strings with every kind of policy pair and reward, on grids coarse enough to read."""
    ours = fractions(1, 4, 5, (3,))
    first, other, stops = draw(ours), draw(ours), draw(st.booleans())
    behavior = first if draw(st.booleans()) else other
    target, behavior = (np.stack([x, 1 - x], axis=-1) for x in (first, behavior))
    return Strings(target, behavior, draw(reward((3 if stops else 4,))), stops)


@st.composite
def nearly_equal(draw: st.DrawFn, case: Case) -> Case:
    """The case with rewards that differ by thousandths, but for one sample; non-negative."""
    base, shape = draw(grid(0, 1, 10)), case.reward.shape
    near = base + draw(fractions(0, 2, 10_000, shape))
    near[..., 0] += draw(st.sampled_from([Fraction(0), Fraction(1)]))
    return replace(case, reward=near)


@st.composite
def bandits(draw: st.DrawFn, smallest: int = 2, largest: int = 4) -> Arms:
    """Bandits with every kind of policy pair and reward."""
    arms = draw(st.integers(smallest, largest))
    target, behavior = draw(policy_pair(arms))
    return Arms(target, behavior, draw(reward((arms,))))
