"""Which lag, and how many devices to generate with: throughput times statistical efficiency, with what is not known.

    time to target = (steps needed) / (steps per second)

Steps per second come from the pipeline, simulated with measured numbers. Steps needed grow with lag, by how much
nobody can compute: it is measured, as a curve of `steps_ratio`, steps at that lag over steps of the synchronous
reference. Without such a curve there is a throughput, and no time to target.

The reference is synchronous training on the same devices: all generate, then all train. Every time is relative to it.

Two things are uncertain: the simulation (few seeds, paired: all pipelines draw the same lengths) and the curve (few
runs). Both are redrawn together, the mean speed over n seeds with Student's spread of n - 1 degrees of freedom, which
few seeds need; `best` of an option is the share of draws in which it is the fastest of all.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from vcposim.arrays import Array
from vcposim.errors import InputError
from vcposim.pipeline.lengths import Lengths
from vcposim.pipeline.simulator import Outcome, Pipeline, simulate


@dataclass(frozen=True)
class Cluster:
    """Devices that either generate (one worker each) or train, and what was measured on them.

    `train_s` was measured with `train_devices` trainers and is taken to scale as 1 / trainers. The other numbers are
    those of `Pipeline`. Raises `InputError` for fewer than two devices or trainers than one.
    """

    lengths: Lengths
    devices: int
    slots: int
    tokens_per_s: float
    groups: int
    group_size: int
    train_s: float
    train_devices: int
    sync_s: float
    admission: str = "wait"
    in_flight: bool = False
    batching: str = "continuous"
    single_tokens_per_s: float | None = None

    def __post_init__(self) -> None:
        if self.devices < 2:
            raise InputError(f"devices: {self.devices} cannot be split; give 2 or more")
        if self.train_devices < 1:
            raise InputError(f"train_devices: {self.train_devices} is not positive; on how many was train_s measured?")
        self.synchronous()

    def split(self, generators: int, max_lag: int) -> Pipeline:
        """`generators` devices generate, the others train.

        Raises `InputError` unless both get one.
        """
        if not 1 <= generators < self.devices:
            raise InputError(f"generators: {generators} of {self.devices} devices; leave one to each side")
        return self._pipeline(generators, self.devices - generators, max_lag, self.admission)

    def synchronous(self) -> Pipeline:
        """All devices generate, then all train."""
        return self._pipeline(self.devices, self.devices, 0, "wait")

    def _pipeline(self, workers: int, trainers: int, max_lag: int, admission: str) -> Pipeline:
        return Pipeline(
            lengths=self.lengths,
            workers=workers,
            slots=self.slots,
            tokens_per_s=self.tokens_per_s,
            groups=self.groups,
            group_size=self.group_size,
            train_s=self.train_s * self.train_devices / trainers,
            sync_s=self.sync_s,
            max_lag=max_lag,
            admission=admission,
            in_flight=self.in_flight,
            batching=self.batching,
            single_tokens_per_s=self.single_tokens_per_s,
        )


@dataclass(frozen=True)
class Option:
    """One choice and how it ran, once for each seed. `generators` None: the synchronous reference."""

    max_lag: int
    generators: int | None
    outcomes: tuple[Outcome, ...]

    @property
    def steps_per_s(self) -> Array:
        """Of each simulation: (seed,)."""
        return np.array([outcome.steps_per_s for outcome in self.outcomes])

    def mean(self, name: str) -> float:
        """Mean over seeds of a field of `Outcome`."""
        return float(np.mean([getattr(outcome, name) for outcome in self.outcomes]))

    @property
    def lag(self) -> float:
        """Mean realized lag of tokens: what the curve is read at."""
        return self.mean("token_lag")


def generator_counts(devices: int, most: int = 7) -> list[int]:
    """At most that many ways to split, evenly spread over 1..devices - 1."""
    return sorted({round(x) for x in np.linspace(1, devices - 1, min(most, devices - 1))})


def survey(
    cluster: Cluster, lags: Sequence[int], generators: Sequence[int], *, steps: int, seeds: int, seed: int = 0
) -> Iterator[Option]:
    """The reference, then every lag with every split; `steps` measured updates after a warm-up, `seeds` times.

    Raises `InputError` without steps, with a single seed (which says nothing about its own error), and what
    `Cluster.split` refuses.
    """
    for name, value, least in (("steps", steps, 1), ("seeds", seeds, 2)):
        if value < least:
            raise InputError(f"{name}: {value} is too few; use {least} or more")
    choices = [(lag, count, cluster.split(count, lag)) for lag in lags for count in generators]
    yield Option(0, None, _runs(cluster.synchronous(), steps, seeds, seed))
    for lag, count, pipeline in choices:
        yield Option(lag, count, _runs(pipeline, steps, seeds, seed))


def _runs(pipeline: Pipeline, steps: int, seeds: int, seed: int) -> tuple[Outcome, ...]:
    warmup = 2 * (pipeline.max_lag + 1)
    streams = [np.random.default_rng([seed, number]) for number in range(seeds)]
    return tuple(simulate(pipeline, warmup + steps, rng).outcome(warmup) for rng in streams)


@dataclass(frozen=True)
class Efficiency:
    """Steps to target against lag, relative to the reference, and how sure it is.

    `log_ratio` (lag,); `draw(rng, n)` -> (n, lag) resamples it. Infinite: the target was never reached.
    """

    lag: Array
    log_ratio: Array
    draw: Callable[[np.random.Generator, int], Array]
    source: str
    certain: bool
    """no interval was given"""

    def at(self, lag: float, log_ratio: Array) -> Array:
        """Linear in the lag between its neighbors: `log_ratio` (..., lag) -> (...); NaN outside the curve."""
        if not self.lag[0] <= lag <= self.lag[-1]:
            return np.full(log_ratio.shape[:-1], math.nan)
        right = min(int(np.searchsorted(self.lag, lag, side="right")), self.lag.size - 1)
        left = max(right - 1, 0)
        share = (lag - self.lag[left]) / (self.lag[right] - self.lag[left]) if right > left else 0.0
        # each end only where it counts: 0 * inf is no number
        return np.asarray(
            log_ratio[..., left]
            if share == 0
            else log_ratio[..., right]
            if share == 1
            else (1 - share) * log_ratio[..., left] + share * log_ratio[..., right]
        )


def from_intervals(points: Iterable[tuple[float, float, float, float]], source: str) -> Efficiency:
    """From (lag, ratio, low, high): 95% intervals, normal in log ratio, independent. Lag 0 has ratio 1 unless given.

    Raises `InputError` for negative lags, lags given twice, or intervals that do not hold the ratio.
    """
    given = {}
    for lag, ratio, low, high in points:
        if not 0 <= lag < math.inf:
            raise InputError(f"{source}: lag {lag:g} is not a finite number of updates of 0 or more")
        if not (0 < low <= ratio <= high < math.inf):
            raise InputError(
                f"{source}: ratio {ratio:g} [{low:g}, {high:g}] at lag {lag:g}; use 0 < low <= ratio <= high"
            )
        if lag in given:
            raise InputError(f"{source}: lag {lag:g} is given twice; give one ratio each")
        given[lag] = (ratio, low, high)
    if not given:
        raise InputError(f"{source}: no lag in it; give at least one")
    given.setdefault(0.0, (1.0, 1.0, 1.0))
    lag_, (ratio_, low_, high_) = np.array(sorted(given)), np.log([given[k] for k in sorted(given)]).T
    sd = (high_ - low_) / (2 * 1.96)

    def draw(rng: np.random.Generator, n: int) -> Array:
        return ratio_ + sd * rng.standard_normal((n, lag_.size))

    return Efficiency(lag_, ratio_, draw, source, certain=bool(np.all(sd == 0)))


def from_runs(runs: Iterable[tuple[float, float | None]], source: str) -> Efficiency:
    """From (lag, steps_ratio) of repeated runs, None where the target was never reached: medians, bootstrapped.

    Lag 0 has ratio 1 unless given. Raises `InputError` for negative lags and ratios that are not positive.
    """
    found: dict[float, list[float]] = {}
    for lag, ratio in runs:
        if not 0 <= lag < math.inf or not (ratio is None or 0 < ratio < math.inf):
            raise InputError(f"{source}: steps_ratio {ratio} at lag {lag:g}; use lags of 0 or more and positive ratios")
        found.setdefault(lag, []).append(math.inf if ratio is None else math.log(ratio))
    if not found:
        raise InputError(f"{source}: no run in it; give lag and steps_ratio of at least one")
    found.setdefault(0.0, [0.0])
    lags = sorted(found)
    value = [np.array(found[lag]) for lag in lags]

    def draw(rng: np.random.Generator, n: int) -> Array:
        return np.stack([_median(x[rng.integers(x.size, size=(n, x.size))]) for x in value], axis=-1)

    certain = all(x.size == 1 for x in value)
    return Efficiency(np.array(lags), np.array([_median(x) for x in value]), draw, source, certain)


def _median(x: Array) -> Array:
    # the upper one of two: finite and never reached have no middle
    return np.sort(x, axis=-1)[..., x.shape[-1] // 2]


@dataclass(frozen=True)
class Judged:
    """An option beside the reference: how many times as long it takes, with a 95% interval."""

    option: Option
    speed: tuple[float, float, float]
    """steps/s over the reference's: low, value, high"""
    time: tuple[float, float, float] | None
    """time to target over the reference's; None without a curve, or where the realized lag is outside it"""
    best: float
    """share of draws in which it is fastest: to the target, or without a curve in steps/s"""


def judge(
    options: Sequence[Option], efficiency: Efficiency | None, *, draws: int = 2000, seed: int = 0
) -> list[Judged]:
    """Every option against the first, which is the reference.

    Raises `InputError` if no option's realized lag is on the curve.
    """
    rng = np.random.default_rng([seed, 1])
    rate = np.stack([option.steps_per_s for option in options])  # (option, seed)
    log_speed = np.log(rate / rate[0])
    # means that could be as well, Student-t around these, correlated as the seeds are: (option, draw)
    n, mean_speed = rate.shape[1], log_speed.mean(axis=1, keepdims=True)
    spread = np.sqrt((n - 1) / rng.chisquare(n - 1, size=draws)) / math.sqrt(n * (n - 1))
    drawn_speed = mean_speed + ((log_speed - mean_speed) @ rng.standard_normal((n, draws))) * spread
    # log steps_ratio of each option (option,) and resampled (option, draw); the reference's is 0 by definition
    log_ratio, drawn_ratio = np.zeros(len(options)), np.zeros((len(options), draws))
    if efficiency is not None:
        curves = efficiency.draw(rng, draws)
        for i, option in enumerate(options[1:], start=1):
            log_ratio[i], drawn_ratio[i] = (efficiency.at(option.lag, x) for x in (efficiency.log_ratio, curves))
    time, drawn_time = log_ratio - log_speed.mean(axis=1), drawn_ratio - drawn_speed
    if np.all(np.isnan(time[1:])):
        lag = ", ".join(f"{option.lag:.2g}" for option in options[1:4])
        raise InputError(f"efficiency: realized lags ({lag}, ...) are all outside the curve; measure it at larger lags")
    first = np.nanargmin(drawn_time, axis=0)
    return [
        Judged(
            option,
            _interval(log_speed[i].mean(), drawn_speed[i]),
            None if efficiency is None or np.isnan(time[i]) else _interval(time[i], drawn_time[i]),
            float(np.mean(first == i)),
        )
        for i, option in enumerate(options)
    ]


def _interval(value: float, drawn: Array) -> tuple[float, float, float]:
    # logs in, numbers out; by rank, because infinity has no middle
    low, high = np.sort(drawn)[[int(0.025 * drawn.size), int(0.975 * drawn.size)]]
    with np.errstate(over="ignore"):
        return float(np.exp(low)), float(np.exp(value)), float(np.exp(high))


def fastest(judged: Sequence[Judged]) -> Judged:
    """The option with the shortest time to target; without a curve, the most steps/s. The reference counts too."""
    if any(one.time for one in judged[1:]):
        return min((one for one in judged if one.time), key=lambda one: one.time[1] if one.time else math.inf)
    return max(judged, key=lambda one: one.speed[1])
