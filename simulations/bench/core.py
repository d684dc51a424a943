"""How fast are exact and Monte Carlo moments, against plain vectorised NumPy in the same run?

    python -m simulations.bench.core [--json | --markdown] [--rounds N]
    python -m simulations.bench.core --markdown > simulations/bench/core.md     # the page that is committed

Every row is a ratio: the reference and ours take turns for `rounds` rounds, the ratio of CPU times is taken in each
round, and the median is reported with the smallest and largest. References are what one would write first, with whole
arrays and no loop over samples; of two ways to invert a CDF the faster is used. One process, one thread.

    exact bandit    against: E[w R s] and E||w R s||^2 written out in NumPy for that one estimator, O(arms)
    exact chain     against: Monte Carlo (ours) drawn until the variance's standard error is 1%
    chain sampling  against: inverse-CDF sampling, and the same with log-ratios, norms, mean and second moment
    memory          peak resident set of a Monte Carlo run in a fresh process, for growing N
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")  # before NumPy starts its threads

import numpy as np  # noqa: E402

from vcposim.estimators import Estimator  # noqa: E402
from vcposim.laboratory import exact, monte_carlo  # noqa: E402
from vcposim.problems.chains import ChainProblem, chain_problem  # noqa: E402
from vcposim.problems.policies import drifted, random_tabular  # noqa: E402
from vcposim.problems.rollouts import bandit_problem  # noqa: E402
from vcposim.problems.token_chains import modular_sum  # noqa: E402

LENGTH, VOCABULARY = 16, 32
TRAJECTORIES = 2**17
DRIFT = 0.1


@dataclass(frozen=True)
class Timing:
    """Median CPU seconds of ours and the reference, and the ratio reference / ours over rounds."""

    what: str
    reference: str
    seconds: float
    reference_seconds: float
    ratio: float
    ratio_low: float
    ratio_high: float


def seconds(work: Callable[[], Any]) -> float:
    """CPU seconds of one call."""
    start = time.process_time()
    work()
    return time.process_time() - start


def paired(what: str, ours: Callable[[], Any], reference: str, theirs: Callable[[], Any], rounds: int) -> Timing:
    """Ours and theirs in turns, after one warm-up each."""
    ours(), theirs()
    times = [(seconds(ours), seconds(theirs)) for _ in range(rounds)]
    ratio = [b / a for a, b in times]
    mine, other = (median(column) for column in zip(*times, strict=True))
    return Timing(what, reference, mine, other, median(ratio), min(ratio), max(ratio))


# --- bandits ---------------------------------------------------------------------------------------------------------


def bandit_arrays(arms: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Target, behavior, reward of a random bandit: -> (arms,), (arms,), (arms,)."""
    rng = np.random.default_rng(0)
    logit = rng.normal(size=arms)
    target, behavior = np.exp(logit), np.exp(logit + 0.3 * rng.normal(size=arms))
    return target / target.sum(), behavior / behavior.sum(), rng.normal(size=arms)


def plain_bandit(target: np.ndarray, behavior: np.ndarray, reward: np.ndarray) -> tuple[np.ndarray, float]:
    """Mean (arms,) and variance of w R s in O(arms), written out for this one estimator: (arms,) -> moments."""
    c = target / behavior * reward
    mean = behavior * c - target * np.sum(behavior * c)
    square = np.sum(behavior * c * c * (1 - 2 * target + np.sum(target * target)))
    return mean, square - mean @ mean


def bench_bandit(rounds: int) -> list[Timing]:
    """Exact moments from 10^2 to 10^6 arms, the problem's validation and construction included."""
    rows = []
    for arms in (10**2, 10**3, 10**4, 10**5, 10**6):
        given = bandit_arrays(arms)

        def ours(given: Any = given) -> float:
            return float(exact.moments(bandit_problem(*given), Estimator(), 8).variance_per_sample)

        def theirs(given: Any = given) -> float:
            return plain_bandit(*given)[1]

        if abs(ours() / theirs() - 1) > 1e-9:
            raise AssertionError(f"exact bandit moments differ from the reference at {arms} arms")
        rows.append(paired(f"exact bandit, {arms} arms", ours, "written out for one estimator", theirs, rounds))
    return rows


# --- chains ----------------------------------------------------------------------------------------------------------


def chain() -> ChainProblem:
    """T = 16, V = 32, tabular over 32 states: 16,384 parameters."""
    task = modular_sum(LENGTH, VOCABULARY, 32)
    target = random_tabular(np.random.default_rng(0), task.shape)
    return chain_problem(task, target, [drifted(target, np.random.default_rng(1), DRIFT)])


class PlainChain:
    """Inverse-CDF sampling and single-sample moments as one would write them with NumPy."""

    def __init__(self, problem: ChainProblem) -> None:
        self.to = problem.chain.transition
        self.reward = problem.chain.reward
        self.cumulative = np.cumsum(problem.mu[0], axis=-1)
        self.cumulative[..., -1] = 1
        length, states, vocabulary = self.to.shape
        # one sorted table for each position: row s lies in [s, s + 1]
        self.stacked = (self.cumulative + np.arange(states)[:, None]).reshape(length, -1)
        self.log_ratio = problem.target.log_prob - np.log(problem.mu[0])
        self.norm = problem.target.score_sq_norm()
        self.prob = np.exp(problem.target.log_prob)
        self.size = states * vocabulary

    def compare(self, rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Sampling by comparing u with every entry of its row, states, tokens and final: -> (t, n), (t, n), (n,)."""
        return self._sample(n, lambda t, s: np.sum(rng.random(n)[:, None] > self.cumulative[t][s], axis=1))

    def search(self, rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Sampling by binary search in the stacked rows: -> (t, n), (t, n), (n,)."""
        width = self.to.shape[2]
        return self._sample(n, lambda t, s: np.searchsorted(self.stacked[t], s + rng.random(n)) - width * s)

    def _sample(
        self, n: int, invert: Callable[[int, np.ndarray], np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        state, states, tokens = np.zeros(n, dtype=np.int64), [], []
        for t in range(self.to.shape[0]):
            token = np.minimum(invert(t, state), self.to.shape[2] - 1)
            states.append(state)
            tokens.append(token)
            state = self.to[t][state, token]
        return np.stack(states), np.stack(tokens), state

    def moments(self, draw: tuple[np.ndarray, np.ndarray, np.ndarray]) -> tuple[np.ndarray, float]:
        """Mean (T, S, V) and variance of w R s: -> moments."""
        state, token, final = draw
        t = np.arange(len(state))[:, None]
        c = np.exp(np.sum(self.log_ratio[t, state, token], axis=0)) * self.reward[final]
        square = np.mean(c * c * np.sum(self.norm[t, state, token], axis=0))
        edge = (t * self.size + state * self.to.shape[2] + token).reshape(-1)
        count = np.bincount(edge, np.broadcast_to(c, state.shape).reshape(-1), minlength=self.prob.size)
        count = count.reshape(self.prob.shape) / c.size
        mean = count - self.prob * np.sum(count, axis=-1, keepdims=True)
        return mean, float(square - np.sum(mean * mean))


def bench_chain(rounds: int) -> list[Timing]:
    """Exact moments of the chain, sampling alone, sampling with single-sample moments."""
    problem = chain()
    plain, seed = PlainChain(problem), iter(range(10**9))
    faster = min(
        (plain.compare, plain.search), key=lambda way: median(seconds(lambda: way(_rng(0), 2**14)) for _ in range(5))
    )
    name = "NumPy inverse CDF by " + ("comparison" if faster == plain.compare else "binary search")

    def draw() -> None:
        # in pieces of a Monte Carlo leaf, as `monte_carlo.moments` draws
        piece = 2**14
        for _ in range(TRAJECTORIES // piece):
            problem.draw(_rng(next(seed)), piece, 1)

    def moments() -> monte_carlo.EstimatedMoments:
        found = monte_carlo.moments(
            problem, {"zero": Estimator()}, group_size=1, samples=8 * TRAJECTORIES, seed=next(seed)
        )
        return found["zero"]

    def plainly(work: Callable[[Any], Any], times: int) -> None:
        piece = 2**14
        for _ in range(times * TRAJECTORIES // piece):
            work(faster(_rng(next(seed)), piece))

    _check(problem, plain, moments())
    return [
        _exact_row(problem, rounds),
        paired(
            f"chain T={LENGTH} V={VOCABULARY}: {TRAJECTORIES} trajectories drawn",
            draw,
            name,
            lambda: plainly(lambda d: d, 1),
            rounds,
        ),
        paired(
            f"chain T={LENGTH} V={VOCABULARY}: {8 * TRAJECTORIES} drawn, moments of single samples and standard errors",
            moments,
            name + ", moments without standard errors",
            lambda: plainly(plain.moments, 8),
            max(1, rounds // 2),
        ),
    ]


def _exact_row(problem: ChainProblem, rounds: int) -> Timing:
    """Exact moments against Monte Carlo at 1% standard error of the variance, its time scaled to that many draws."""
    samples = 2**17
    estimators = {"zero": Estimator()}
    seed = iter(range(10**9))

    def draw() -> monte_carlo.EstimatedMoments:
        return monte_carlo.moments(problem, estimators, group_size=1, samples=samples, seed=next(seed))["zero"]

    found = draw()
    error = float(found.standard_error["variance_per_sample"] / found.moments.variance_per_sample)
    needed = samples * (error / 0.01) ** 2
    row = paired(
        f"exact moments of the chain T={LENGTH} V={VOCABULARY}",
        lambda: exact.moments(problem, Estimator(), 8),
        f"our Monte Carlo to 1% of the variance ({needed:.2g} trajectories, scaled from {samples})",
        draw,
        rounds,
    )
    k = needed / samples
    return Timing(
        row.what,
        row.reference,
        row.seconds,
        row.reference_seconds * k,
        row.ratio * k,
        row.ratio_low * k,
        row.ratio_high * k,
    )


def _check(problem: ChainProblem, plain: PlainChain, ours: monte_carlo.EstimatedMoments) -> None:
    """Refuse to time what does not agree: both within 6 standard errors of the exact variance."""
    truth = float(exact.moments(problem, Estimator(), 1).variance_per_sample)
    error = float(ours.standard_error["variance_per_sample"])
    theirs = plain.moments(plain.search(_rng(0), TRAJECTORIES))[1]
    if abs(ours.moments.variance_per_sample - truth) > 6 * error or abs(theirs - truth) > 6 * 8**0.5 * error:
        raise AssertionError(f"variance {truth}: ours {ours.moments.variance_per_sample}, reference {theirs}")


def _rng(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=seed))


# --- memory ----------------------------------------------------------------------------------------------------------

MEMORY_SCRIPT = """
import re, sys
from pathlib import Path
from simulations.bench.core import chain
from vcposim.laboratory import monte_carlo
from vcposim.estimators import Estimator
samples = int(sys.argv[1])
estimators = {"zero": Estimator(), "opob": Estimator(baseline="opob")}
if samples:
    monte_carlo.moments(chain(), estimators, group_size=8, samples=samples, seed=0)
print(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""
# not ru_maxrss: Linux keeps that of the parent over exec


def bench_memory() -> dict[str, float]:
    """Peak resident set in MB, by the number of trajectories; "0" is what the imports alone take. Linux only."""
    if not Path("/proc/self/status").exists():
        return {}
    peak = {}
    for samples in (0, 10**4, 10**5, 10**6):
        done = subprocess.run(
            [sys.executable, "-c", MEMORY_SCRIPT, str(samples)], check=True, capture_output=True, text=True
        )
        peak[str(samples)] = int(done.stdout) / 1024
    return peak


def page(rows: list[Timing], memory: dict[str, float], rounds: int) -> str:
    """The table as Markdown, with the machine and the versions that it is of."""
    import datetime

    from simulations.bench.score_records import processor

    return "\n".join(
        [
            "# Exact and Monte Carlo moments: speed and memory\n",
            f"`python -m simulations.bench.core --markdown`, {datetime.date.today()}, {processor()}, "
            f"NumPy {np.__version__}. CPU milliseconds; `times as fast` is the reference's time over ours, taken in "
            f"each of {rounds} rounds in which they take turns: the median, with the smallest and largest.\n",
            "| what | reference | ours, ms | reference, ms | times as fast |",
            "|---|---|---|---|---|",
            *(
                f"| {row.what} | {row.reference} | {1e3 * row.seconds:.4g} | {1e3 * row.reference_seconds:.4g} | "
                f"{row.ratio:.3g} ({row.ratio_low:.3g} to {row.ratio_high:.3g}) |"
                for row in rows
            ),
            "\nPeak memory of Monte Carlo on the chain, two estimators in groups of 8, by trajectories: "
            + ", ".join(f"{n}: {mb:.0f} MB" for n, mb in memory.items())
            + ".",
        ]
    )


def main() -> None:
    """Run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--json", action="store_true", help="one JSON object")
    how.add_argument("--markdown", action="store_true", help="a page")
    parser.add_argument("--rounds", type=int, default=7, help="paired rounds per row (default 7)")
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error(f"--rounds: {arguments.rounds} is less than 1; use 1 or more")
    rows = [*bench_bandit(arguments.rounds), *bench_chain(arguments.rounds)]
    memory = bench_memory()
    if arguments.json:
        print(json.dumps({"rows": [asdict(row) for row in rows], "peak_memory_mb": memory}))
        return
    if arguments.markdown:
        print(page(rows, memory, arguments.rounds))
        return
    for row in rows:
        print(f"{row.what}\n    {1e3 * row.seconds:.4g} ms; {row.reference}: {1e3 * row.reference_seconds:.4g} ms")
        print(f"    reference / ours: {row.ratio:.3g} ({row.ratio_low:.3g} to {row.ratio_high:.3g})")
    print("peak memory of Monte Carlo on the chain, two estimators in groups of 8 (MB, by trajectories):")
    print("    " + ", ".join(f"{n}: {mb:.0f}" for n, mb in memory.items()))


if __name__ == "__main__":
    main()
