"""Moments by simulation, where no exact form is feasible.

All estimators see the same batches, so differences between them are paired. Memory does not grow with the number of
samples, and results depend on (problem, estimators, group_size, samples, seed) alone: see `vcposim.laboratory.leaves`.

    estimates = moments(problem, {"opob": Estimator(baseline="opob")}, group_size=8, samples=100_000, seed=0)
    estimates["opob"].moments.relative_bias, estimates["opob"].standard_error["relative_bias"]

Exactness beats throughput: at an ESS fraction of 0.03 an error of 1% takes 1e10 draws. Ask `laboratory.exact` first.
"""

import os
import signal
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import get_context
from typing import Any

import numpy as np

from vcposim.arrays import Array, expectation, safe_divide, where
from vcposim.batch import Batch
from vcposim.catalogue.loading import on_numpy
from vcposim.errors import InputError
from vcposim.estimators import PER_TOKEN, AnyEstimator, Estimator, Resolved
from vcposim.laboratory.exact import oracle, reads_counts
from vcposim.laboratory.leaves import Leaf, generator, jackknife, tasks
from vcposim.laboratory.strangers import Asked
from vcposim.moments import SCALARS, Moments, Sums, batch_sums, descent_efficiency, norm, sq_norm
from vcposim.moments import moments as moments_of_sums
from vcposim.problems.bandits import by_token
from vcposim.problems.rollouts import Problem, require_problem
from vcposim.problems.scores import SummableScores
from vcposim.results import Records, Result

STATISTICS = ("mean", *SCALARS)
LEAF_RESULT_NUMBERS = 2**21
"""numbers that the sums of one task may hold on their way from a worker (16 MB)"""


@dataclass(frozen=True)
class DrawnMoments(Moments):
    """Moments estimated from `draws` groups, without the bias of plugging a noisy mean into a square.

    ||mean||^2 and ||bias||^2 exceed their true values by variance_of_mean / draws on average; in p dimensions that can
    be most of what one sees. It is taken off here, so an unbiased estimator has a relative bias around 0.
    """

    draws: Array
    """()"""

    @property
    def bias_sq_norm(self) -> Array:
        """||E mean - gradient||^2, unbiased: (); may be negative."""
        return sq_norm(self.bias) - self.variance_of_mean / self.draws

    @property
    def mean_sq_norm(self) -> Array:
        """||E mean||^2, unbiased: (); may be negative."""
        return sq_norm(self.mean) - self.variance_of_mean / self.draws

    @property
    def relative_bias(self) -> Array:
        """sqrt(max(0, ||bias||^2)) / ||gradient||: (); infinite where only the gradient is zero."""
        size = np.sqrt(np.maximum(self.bias_sq_norm, 0.0))
        return safe_divide(size, norm(self.gradient), where(size > 0, float("inf"), size))

    @property
    def mse(self) -> Array:
        """E||g - gradient||^2, unbiased: ()."""
        return self.variance_of_mean + self.bias_sq_norm

    @property
    def snr(self) -> Array:
        """max(0, ||mean||^2) / variance_of_mean: (); infinite for a noiseless estimate."""
        signal = np.maximum(self.mean_sq_norm, 0.0)
        return safe_divide(signal, self.variance_of_mean, where(signal > 0, float("inf"), signal))

    @property
    def descent_efficiency(self) -> Array:
        """D with E||x||^2 unbiased: (); <gradient, mean>^2 stays, which exceeds its own by O(1 / draws)."""
        dot = np.sum(self.mean * self.gradient)
        return descent_efficiency(dot, sq_norm(self.gradient), self.variance_of_mean + self.mean_sq_norm)

    @property
    def raw_cosine(self) -> Array:
        """<mean, gradient> / (||mean|| ||gradient||), ||mean||^2 unbiased: (); may pass 1, NaN if that is not > 0."""
        size = np.sqrt(where(self.mean_sq_norm > 0, self.mean_sq_norm, float("nan")))
        return safe_divide(np.sum(self.mean * self.gradient), size * norm(self.gradient), float("nan"))

    @property
    def cosine(self) -> Array:
        """cos(E mean, gradient): (); NaN if the draws do not tell E mean from zero."""
        return np.clip(self.raw_cosine, -1.0, 1.0)


@dataclass(frozen=True)
class EstimatedMoments(Result):
    """Moments with their standard errors, by name as in `STATISTICS`: (p,) for `mean`, () for the rest.

    That of `relative_bias` is conservative near zero, where a square root has no normal error.
    """

    moments: DrawnMoments
    standard_error: dict[str, Array]

    def records(self) -> Records:
        """One row: the numbers of `SCALARS`, each with its standard error."""
        (row,) = self.moments.records()
        return Records([row | {f"{name}_standard_error": float(self.standard_error[name]) for name in SCALARS}])


def moments(
    problem: Problem,
    estimators: Mapping[str, str | AnyEstimator],
    *,
    group_size: int,
    samples: int,
    seed: int,
    workers: int = 1,
    chunk: int | None = None,
    progress: Callable[[float], object] | None = None,
) -> dict[str, EstimatedMoments]:
    """Moments of each estimator, name or function of a `Batch`, from `samples` trajectories, in whole groups.

    `workers` > 1 starts that many processes (so a script that calls this needs `if __name__ == "__main__"`); `chunk` is
    how many trajectories a process is handed at a time; neither changes a bit of the result. `progress` is called with
    the fraction done. Ctrl-C stops all workers.

    Raises `InputError` for numbers out of range, or what an estimator cannot be computed from.
    """
    require_problem(problem)
    asked = {name: on_numpy(given) for name, given in estimators.items()}
    if any(estimator.needs & PER_TOKEN for estimator in asked.values()):
        problem = by_token(problem)
    run = _Run(problem, asked, group_size, seed)
    groups = _require(asked, group_size, samples, seed, workers, chunk)
    per_task = -(-(chunk or 2**18) // group_size)
    leaves_per_task = max(1, LEAF_RESULT_NUMBERS // (problem.gradient.shape[0] * max(1, len(estimators))))
    work = tasks(groups, problem.numbers_per_group(group_size), per_task, leaves_per_task)
    blocks: dict[int, dict[str, Sums]] = {}
    done = 0
    for leaf, found in _computed(run, work, workers):
        before = blocks.get(leaf.block)
        blocks[leaf.block] = found if before is None else {name: before[name].merge(x) for name, x in found.items()}
        done += leaf.groups
        if progress is not None:
            progress(done / groups)
    return {name: _estimate([block[name] for block in blocks.values()], problem.gradient) for name in estimators}


class _Run:
    """What a worker needs to compute the sums of a leaf."""

    def __init__(self, problem: Problem, estimators: dict[str, Resolved], group_size: int, seed: int) -> None:
        self.problem, self.estimators, self.group_size, self.seed = problem, estimators, group_size, seed
        ours = {name: isinstance(e, Estimator) and reads_counts(e) for name, e in estimators.items()}
        self.asked = {name: e if ours[name] else Asked(e) for name, e in estimators.items()}
        self.oracle = {
            name: oracle(problem, estimator)
            for name, estimator in estimators.items()
            if "population_baseline" in estimator.needs
        }

    def __call__(self, leaf: Leaf) -> dict[str, Sums]:
        draw = self.problem.draw(generator(self.seed, leaf), leaf.groups, self.group_size)
        batches: dict[bool, Batch] = {}
        sums = {}
        for name, estimator in self.estimators.items():
            per_token = bool(estimator.needs & PER_TOKEN)
            if per_token not in batches:
                batches[per_token] = self.problem.batch(draw, per_token=per_token)
            batch = batches[per_token]
            if name in self.oracle:
                batch = replace(batch, population_baseline=self.oracle[name][draw.group])
            sums[name] = drawn_sums(batch, self.asked[name].coefficients(batch))
        return sums


def drawn_sums(batch: Batch, coefficient: Array) -> Sums:
    """`moments.batch_sums` of drawn groups, without R gradients where scores can: (R, N) or (R, N, t) -> sums."""
    scores = batch.scored()
    if not isinstance(scores, SummableScores):
        return batch_sums(batch, coefficient)
    weighted = coefficient / batch.reward.shape[-1]
    return Sums(
        mass=np.float64(batch.reward.shape[0]),
        estimate=scores.combine_total(weighted),
        estimate_sq_norm=np.sum(scores.combined_sq_norm(weighted)),
        contribution_sq_norm=np.sum(expectation(scores.sq_norm(coefficient), batch.measure)),
    )


def _require(
    estimators: Mapping[str, Resolved],
    group_size: int,
    samples: int,
    seed: int,
    workers: int,
    chunk: int | None,
) -> int:
    """The number of groups, if everything is in range."""
    for estimator in estimators.values():
        estimator.require(group_size)
    if not estimators:
        raise InputError("estimators: none given; pass at least one, as in {'opob': Estimator(baseline='opob')}")
    for name, value, least in (("samples", samples, 1), ("workers", workers, 1), ("chunk", chunk or 1, 1)):
        if value < least:
            raise InputError(f"{name}: {value} is less than {least}; give a positive number")
    if not 0 <= seed < 2**64:
        raise InputError(f"seed: {seed} is not in [0, 2^64); give another")
    groups = -(-samples // group_size)
    if groups < 2:
        raise InputError(
            f"samples: {samples} make one group of {group_size}, which has no variance; use {2 * group_size} or more"
        )
    return groups


def _estimate(blocks: list[Sums], gradient: Array) -> EstimatedMoments:
    fields = [np.stack(field) for field in zip(*blocks, strict=True)]

    def without(block: int | list[int]) -> DrawnMoments:
        rest = Sums(*(np.sum(np.delete(field, block, axis=0), axis=0) for field in fields))
        return DrawnMoments(**vars(moments_of_sums(rest, gradient, drawn=True)), draws=rest.mass)

    whole, mass = without([]), fields[0]
    if len(blocks) < 2:
        return EstimatedMoments(whole, {name: getattr(whole, name) * float("nan") for name in STATISTICS})
    parts = [without(j) for j in range(len(blocks))]

    def error(name: str) -> Array:
        return jackknife(getattr(whole, name), np.stack([getattr(part, name) for part in parts]), mass)

    with np.errstate(invalid="ignore"):  # two groups: one left out leaves no variance, so no error either
        found = {name: error(name) for name in STATISTICS} | {"cosine": error("raw_cosine")}
        found["relative_bias"] = root_error(whole.bias_sq_norm, error("bias_sq_norm")) / norm(gradient)
    return EstimatedMoments(whole, found)


def root_error(square: Array, error: Array) -> Array:
    """A standard error of sqrt(max(0, square)) from that of the square, honest down to zero: same -> same.

    If the truth is b0, then b - b0 = (b^2 - b0^2) / (b + b0); b0 is taken at its smallest within three standard errors
    of the square. Far from zero that is the delta method, error / (2 b); at zero it is sqrt(error).
    """
    smallest = np.sqrt(np.maximum(square - 3 * error, 0.0))
    root = np.sqrt(np.maximum(square, error))
    return safe_divide(error, root + smallest, error * 0)


def _computed(run: _Run, work: Iterator[list[Leaf]], workers: int) -> Iterator[tuple[Leaf, dict[str, Sums]]]:
    """The sums of all leaves, in order."""
    if workers == 1:
        for task in work:
            for leaf in task:
                yield leaf, run(leaf)
        return
    with _one_thread_each(), ProcessPoolExecutor(workers, get_context("spawn"), _start, (run,)) as pool:
        pending: deque[Future[Any]] = deque()
        try:
            for task in work:
                pending.append(pool.submit(_compute, task))
                if len(pending) >= 2 * workers:
                    yield from pending.popleft().result()
            while pending:
                yield from pending.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


@contextmanager
def _one_thread_each() -> Iterator[None]:
    # processes share the cores already; children read this when they start
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


_worker_run: _Run | None = None


def _start(run: _Run) -> None:
    global _worker_run
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    _worker_run = run


def _compute(task: list[Leaf]) -> list[tuple[Leaf, dict[str, Sums]]]:
    assert _worker_run is not None
    return [(leaf, _worker_run(leaf)) for leaf in task]
