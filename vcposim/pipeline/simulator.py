"""Generation, training and weight sync as a pipeline: how fast is it, and how stale is what it trains on?

`workers` generators decode responses of random length, `slots` at a time; a trainer takes `groups` complete groups of
`group_size` responses a step (`train_s` seconds), then publishes its weights (`sync_s` seconds, in which it waits).
Every event is simulated, nothing is averaged: heavy-tailed lengths, stragglers and waiting are what one wants to see.

**Decoding.** A worker with b responses in hand takes time(b) seconds a token for each of them: constant (memory-bound,
the default: stragglers decode no faster alone), or linear between the measured speeds of one response and of a full
worker. `continuous` batching refills a slot at once, `static` refills a worker when its last response is done.

**Weights.** With `in_flight`, all workers pause for the sync and go on with their half-finished responses under the new
weights: a response has tokens of several versions. Without, a worker starts nothing more, finishes what it has
(drains), then loads the newest weights. (Recomputing key-value caches after an update is not modeled; add its time to
`sync_s`.)

**Admission** keeps the lag, the number of updates between the weights a response started with and the update it is used
in, near `max_lag` = k:

    wait    group j starts when update floor(j / groups) - k is done, and batches are trained in the order started: the
            lag cannot exceed k; everyone waits for the longest response
    pace    starts as in `wait`, but the first groups finished are trained first: the lag is k on average at most, and a
            straggler exceeds it
    drop    nothing waits; a finished group with a response that lags more than k is thrown away

Synchronous training is k = 0 with `wait`: all workers generate, then the trainer trains. Its step takes
E[max of all lengths] time(.) + train_s + sync_s if every response has a slot (`Lengths.longest`).

The length of the r-th response started is the same in every pipeline that uses the same generator: comparisons between
pipelines are paired, and adding workers does not move the draws.
"""

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from heapq import heapify, heappop, heappush, heapreplace

import numpy as np

from vcposim.arrays import Array
from vcposim.errors import InputError, unknown_name
from vcposim.pipeline.lengths import Lengths
from vcposim.results import Records, Result

ADMISSIONS = ("wait", "pace", "drop")
BATCHINGS = ("continuous", "static")
WAITING, DROPPED = -1, -2
"""in `Trace.update`, where there is no update"""
FINISHED, TRAINED, LOADED = range(3)
"""kinds of events, in the order in which those of one instant happen; what they allow begins after all of them"""
TRAINER = -1


@dataclass(frozen=True)
class Pipeline:
    """What is simulated; see the module. `tokens_per_s` is a full worker's, `single_tokens_per_s` that of one response
    decoded alone (None: time a token does not depend on how many others there are). While `capacity` finished groups
    wait, no group starts (None: no limit).

    Raises `InputError` for numbers that cannot be, and names of no admission or batching.
    """

    lengths: Lengths
    workers: int
    slots: int
    tokens_per_s: float
    groups: int
    group_size: int
    train_s: float
    sync_s: float
    max_lag: int = 0
    admission: str = "wait"
    in_flight: bool = False
    batching: str = "continuous"
    capacity: int | None = None
    single_tokens_per_s: float | None = None

    def __post_init__(self) -> None:
        for name, least in (("workers", 1), ("slots", 1), ("groups", 1), ("group_size", 1), ("max_lag", 0)):
            value = getattr(self, name)
            if not (value >= least and value == int(value)):
                raise InputError(f"{name}: {value} is not a whole number of {least} or more")
        for name in ("train_s", "sync_s"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"{name}: {getattr(self, name)} is not a finite non-negative number of seconds")
        if not 0 < self.tokens_per_s < math.inf:
            raise InputError(f"tokens_per_s: {self.tokens_per_s} is not a positive finite speed of one full worker")
        if self.admission not in ADMISSIONS:
            raise unknown_name("admission", self.admission, ADMISSIONS)
        if self.batching not in BATCHINGS:
            raise unknown_name("batching", self.batching, BATCHINGS)
        if self.capacity is not None and self.capacity < self.groups:
            raise InputError(f"capacity: {self.capacity} holds no batch of {self.groups} groups; use that or more")
        single, slot = self.single_tokens_per_s, self.tokens_per_s / self.slots
        if single is not None and not slot <= single < math.inf:
            raise InputError(
                f"single_tokens_per_s: {single} is below the {slot:g} that a response gets in a full worker; check both"
            )

    def seconds_per_token(self) -> list[float]:
        """time(b) for b = 0..slots responses in hand, seconds a token of each."""
        full = self.slots / self.tokens_per_s
        alone = full if self.single_tokens_per_s is None else 1 / self.single_tokens_per_s
        return [alone + (full - alone) * max(b - 1, 0) / max(self.slots - 1, 1) for b in range(self.slots + 1)]


@dataclass(frozen=True)
class Trace:
    """All that happened, until the last step was trained. NaN: not yet."""

    pipeline: Pipeline
    length: Array
    """(response,) tokens, of those started"""
    version: Array
    """(response,) of the weights it started with"""
    mean_version: Array
    """(response,) mean over its tokens"""
    start_s: Array
    """(response,)"""
    finish_s: Array
    """(response,)"""
    update: Array
    """(group,) index of the update that used it, or WAITING, or DROPPED"""
    leave_s: Array
    """(group,) when it was taken by the trainer or dropped"""
    trained_s: Array
    """(step,) when update number `step` was done"""
    slot_s: Array
    """(step,) seconds of decoding until then, summed over slots"""

    @property
    def group(self) -> Array:
        """Which group each belongs to: (response,)."""
        return np.arange(self.length.size) // self.pipeline.group_size

    def lag(self, warmup: int = 0) -> Array:
        """Lags of the responses trained in updates `warmup` and later, by the weights they started with: (trained,)."""
        used = self.update[self.group]
        return (used - self.version)[used >= warmup]

    def outcome(self, warmup: int = 1) -> "Outcome":
        """What happened after update number `warmup`: see `Outcome`.

        Raises `InputError` unless 1 <= warmup < number of steps.
        """
        if not 1 <= warmup < len(self.trained_s):
            raise InputError(f"warmup: {warmup} of {len(self.trained_s)} steps leaves none to measure; use fewer")
        p, begin, end = self.pipeline, self.trained_s[warmup - 1], self.trained_s[-1]
        seconds, steps = end - begin, len(self.trained_s) - warmup
        used = self.update[self.group]
        kept = used >= warmup
        token_lag = (used - self.mean_version)[kept]
        dropped = int(np.sum((self.update == DROPPED) & (self.leave_s > begin))) * p.group_size
        return Outcome(
            seconds=float(seconds),
            steps_per_s=steps / seconds,
            samples_per_s=steps * p.groups * p.group_size / seconds,
            generator_busy=float((self.slot_s[-1] - self.slot_s[warmup - 1]) / (seconds * p.workers * p.slots)),
            trainer_busy=steps * p.train_s / float(seconds),
            lag_share=np.bincount(self.lag(warmup)) / kept.sum(),
            token_lag=float(token_lag @ self.length[kept] / self.length[kept].sum()),
            dropped_share=dropped / (dropped + int(kept.sum())),
        )


@dataclass(frozen=True)
class Outcome(Result):
    """Throughput and staleness, once a pipeline runs."""

    seconds: float
    steps_per_s: float
    samples_per_s: float
    """trained, that is"""
    generator_busy: float
    """share of slot-seconds spent decoding"""
    trainer_busy: float
    """share of seconds spent training, weight sync not included"""
    lag_share: Array
    """P(lag = j) of trained responses, j = 0.."""
    token_lag: float
    """mean over tokens of the lag of the weights that sampled them; with `in_flight`, less than `mean_lag`"""
    dropped_share: float
    """of the responses that left the queue"""

    @property
    def mean_lag(self) -> float:
        """Mean lag of trained responses, updates."""
        return float(self.lag_share @ np.arange(self.lag_share.size))

    def share_above(self, lag: int) -> float:
        """Share of trained responses that lag more than that."""
        return float(self.lag_share[lag + 1 :].sum())

    def records(self) -> Records:
        """One row: every number but the law of the lag, of which the mean stands."""
        numbers = {f.name: float(getattr(self, f.name)) for f in fields(self) if f.name != "lag_share"}
        return Records([numbers | {"mean_lag": self.mean_lag}])


def simulate(pipeline: Pipeline, steps: int, rng: np.random.Generator) -> Trace:
    """The pipeline from a standing start until `steps` updates are trained.

    Raises `InputError` if `steps` is not positive.
    """
    if steps < 1:
        raise InputError(f"steps: {steps} is not positive; simulate at least one")
    engine = _Engine(pipeline, _stream(pipeline, rng))
    engine.run(steps)
    return engine.trace()


def _stream(pipeline: Pipeline, rng: np.random.Generator) -> Iterator[int]:
    """Lengths in the order of starts, group by group."""
    while True:
        yield from pipeline.lengths.draw(rng, 64, pipeline.group_size).reshape(-1).tolist()


@dataclass
class _Worker:
    """One generator. Its clock counts the tokens that each response in hand has been given since the beginning, so a
    response is done when the clock is at its own target, whatever the speeds on the way."""

    active: list[tuple[float, int, float]] = field(default_factory=list)
    """heap of (target, response, version_tokens at its start)"""
    clock: float = 0.0
    version_tokens: float = 0.0
    """integral of the version over the clock"""
    since: float = 0.0
    """when the clock was last set"""
    slot_s: float = 0.0
    version: int = 0
    loading: int = 0
    paused: bool = False
    draining: bool = False
    ticket: int = 0
    """of its only valid FINISHED event"""

    def advance(self, now: float, time: list[float]) -> None:
        """Decode until now."""
        if self.active and not self.paused:
            self._to(self.clock + (now - self.since) / time[len(self.active)], now)
        self.since = now

    def finish(self, now: float) -> Iterator[tuple[int, float]]:
        """Decode until now, when the next target is reached; (response, version_tokens since its start) of those."""
        self._to(self.active[0][0], now)
        self.since = now
        while self.active and self.active[0][0] <= self.clock:
            _, response, before = heappop(self.active)
            yield response, self.version_tokens - before

    def _to(self, clock: float, now: float) -> None:
        self.slot_s += len(self.active) * (now - self.since)
        self.version_tokens += self.version * (clock - self.clock)
        self.clock = clock


class _Engine:
    def __init__(self, pipeline: Pipeline, length: Iterator[int]) -> None:
        self.p, self.next_length, self.time = pipeline, length, pipeline.seconds_per_token()
        self.worker = [_Worker() for _ in range(pipeline.workers)]
        self.free = set(range(pipeline.workers))
        """workers that may start a response"""
        self.changed: set[int] = set()
        """workers whose next FINISHED is to be scheduled"""
        self.events: list[tuple[float, int, int, int]] = []
        self.now, self.version, self.trainer_busy = 0.0, 0, False
        self.ready: deque[int] = deque()
        """complete groups not yet taken, in the order they finished"""
        self.finished_of_batch: dict[int, int] = {}
        self.length: list[int] = []
        self.start: list[tuple[int, float]] = []
        self.finish: dict[int, tuple[float, float]] = {}
        self.left: list[int] = []
        """(group,) responses not finished"""
        self.update: list[int] = []
        self.leave: list[float] = []
        self.step: list[tuple[float, float]] = []

    def run(self, steps: int) -> None:
        """All events of an instant, then what they allow to begin, until enough is trained."""
        self._begin()
        while self.version < steps:
            self.now = self.events[0][0]
            while self.events and self.events[0][0] == self.now and self.version < steps:
                _, kind, who, ticket = heappop(self.events)
                if kind == FINISHED:
                    self._finished(who, ticket)
                elif kind == TRAINED:
                    self._trained()
                else:
                    self._loaded(who)
            self._begin()

    # --- what ends ----------------------------------------------------------------------------------------------------

    def _finished(self, who: int, ticket: int) -> None:
        worker = self.worker[who]
        if ticket != worker.ticket:
            return  # speeds have changed since it was scheduled
        for response, version_tokens in worker.finish(self.now):
            self.finish[response] = (self.now, version_tokens / self.length[response])
            group = response // self.p.group_size
            self.left[group] -= 1
            if self.left[group]:
                continue
            if self._stale(group):
                self._leave(group, DROPPED)
            else:
                self.ready.append(group)
                batch = group // self.p.groups
                self.finished_of_batch[batch] = self.finished_of_batch.get(batch, 0) + 1
        self.changed.add(who)
        if not worker.draining:
            self._free(who)
        elif not worker.active:
            self._load(who)

    def _trained(self) -> None:
        self.version += 1
        for who, worker in enumerate(self.worker):
            worker.advance(self.now, self.time)
            if self.p.in_flight or not (worker.paused or worker.active):
                self._load(who)
            else:
                worker.draining = True
                self.free.discard(who)
        self.step.append((self.now, sum(worker.slot_s for worker in self.worker)))
        for group in [group for group in self.ready if self._stale(group)]:
            self.ready.remove(group)
            self._leave(group, DROPPED)
        heappush(self.events, (self.now + self.p.sync_s, LOADED, TRAINER, 0))

    def _load(self, who: int) -> None:
        worker = self.worker[who]
        worker.paused, worker.draining, worker.loading = True, False, self.version
        worker.ticket += 1
        self.free.discard(who)
        heappush(self.events, (self.now + self.p.sync_s, LOADED, who, 0))

    def _loaded(self, who: int) -> None:
        if who == TRAINER:
            self.trainer_busy = False
            return
        worker = self.worker[who]
        worker.paused, worker.version, worker.since = False, worker.loading, self.now
        self.changed.add(who)
        if worker.draining:  # newer weights came out while it was loading
            self._load(who)
        else:
            self._free(who)

    # --- what begins --------------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        if not self.trainer_busy:
            # who waits trains on the next prompts in order, the others on whatever is finished
            waits = self.p.admission == "wait"
            finished = self.finished_of_batch.get(self.version, 0) if waits else len(self.ready)
            if finished >= self.p.groups:
                self._take()
        self._fill()
        for who in self.changed:
            self._schedule(who)
        self.changed.clear()

    def _take(self) -> None:
        if self.p.admission == "wait":
            first = self.version * self.p.groups
            taken = list(range(first, first + self.p.groups))
            self.ready = deque(group for group in self.ready if group >= first + self.p.groups)
        else:
            taken = [self.ready.popleft() for _ in range(self.p.groups)]
        for group in taken:
            self._leave(group, self.version)
        self.trainer_busy = True
        heappush(self.events, (self.now + self.p.train_s, TRAINED, TRAINER, 0))

    def _fill(self) -> None:
        """Start what may start, each response on the worker with the fewest in hand."""
        if not self.free or not self._may_start():
            return
        load = [(len(self.worker[who].active), who) for who in self.free]
        heapify(load)
        while load and self._may_start():
            count, who = load[0]
            self._start(who)
            if count + 1 < self.p.slots:
                heapreplace(load, (count + 1, who))
            else:
                heappop(load)
                self.free.discard(who)
        if self.p.batching == "static":
            self.free -= {who for who in self.free if self.worker[who].active}

    def _may_start(self) -> bool:
        response = len(self.length)
        if response % self.p.group_size:
            return True  # of a group that has started
        if self.p.capacity is not None and len(self.ready) >= self.p.capacity:
            return False
        group = response // self.p.group_size
        return self.p.admission == "drop" or group < (self.version + self.p.max_lag + 1) * self.p.groups

    def _start(self, who: int) -> None:
        worker, response = self.worker[who], len(self.length)
        worker.advance(self.now, self.time)
        length = next(self.next_length)
        heappush(worker.active, (worker.clock + length, response, worker.version_tokens))
        self.length.append(length)
        self.start.append((worker.version, self.now))
        if response % self.p.group_size == 0:
            self.left.append(self.p.group_size)
            self.update.append(WAITING)
            self.leave.append(math.nan)
        self.changed.add(who)

    def _schedule(self, who: int) -> None:
        worker = self.worker[who]
        worker.ticket += 1
        if worker.active and not worker.paused:
            worker.advance(self.now, self.time)
            wait = (worker.active[0][0] - worker.clock) * self.time[len(worker.active)]
            heappush(self.events, (self.now + wait, FINISHED, who, worker.ticket))

    # --- bookkeeping --------------------------------------------------------------------------------------------------

    def _free(self, who: int) -> None:
        in_hand = len(self.worker[who].active)
        if in_hand < self.p.slots and not (in_hand and self.p.batching == "static"):
            self.free.add(who)

    def _stale(self, group: int) -> bool:
        # its first response is its oldest: workers never go back to older weights
        return self.p.admission == "drop" and self.version - self.start[group * self.p.group_size][0] > self.p.max_lag

    def _leave(self, group: int, update: int) -> None:
        self.update[group], self.leave[group] = update, self.now

    def trace(self) -> Trace:
        """What happened so far."""
        finish = np.full((len(self.length), 2), math.nan)
        finish[list(self.finish)] = list(self.finish.values())
        version, start_s = zip(*self.start, strict=True)
        trained_s, slot_s = zip(*self.step, strict=True)
        return Trace(
            pipeline=self.p,
            length=np.array(self.length),
            version=np.array(version),
            mean_version=finish[:, 1],
            start_s=np.array(start_s),
            finish_s=finish[:, 0],
            update=np.array(self.update),
            leave_s=np.array(self.leave),
            trained_s=np.array(trained_s),
            slot_s=np.array(slot_s),
        )
