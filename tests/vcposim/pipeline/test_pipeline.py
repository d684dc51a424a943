"""The pipeline against closed forms and against a naive simulation in time steps, and wrong pipelines against both."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.kit.statistical import assert_mean_equals, near
from vcposim.errors import InputError
from vcposim.pipeline import simulator as module
from vcposim.pipeline.lengths import Lengths, empirical, fixed, log_normal, pareto
from vcposim.pipeline.simulator import ADMISSIONS, BATCHINGS, DROPPED, WAITING, Pipeline, Trace, simulate

HEAVY = log_normal(6.0, 8.0, max_tokens=64)
LAWS = [fixed(7), HEAVY, log_normal(6.0, 0.0), pareto(5.0, 1.5, max_tokens=200), empirical([3, 1, 4, 1, 5, 9, 2, 6])]
SECONDS = st.integers(0, 6)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def small(**changes: Any) -> Pipeline:
    """Two workers of two slots, one second a token, two groups of two."""
    numbers: dict[str, Any] = {
        "lengths": HEAVY,
        "workers": 2,
        "slots": 2,
        "tokens_per_s": 2.0,
        "groups": 2,
        "group_size": 2,
        "train_s": 4.0,
        "sync_s": 1.0,
    }
    return Pipeline(**{**numbers, **changes})


# --- the law of lengths -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.name)
def test_draws_follow_the_stated_distribution(law: Lengths) -> None:
    draw = law.draw(rng(), 4000, 5)
    assert draw.dtype.kind == "i"
    assert draw.min() >= 1
    assert draw.max() <= law.max_tokens
    for m in (1, 2, 4, 7, 30):
        below = (draw <= m).mean(axis=1)
        assert_mean_equals(below, law.cdf(np.array(float(m))), detect=0.08, support=(0, 1))
    if law.independent and law.max_tokens <= 200:
        scale = (0, law.max_tokens / 200)
        assert_mean_equals(draw.max(axis=1) / 200, law.longest(5) / 200, detect=0.05, support=scale)


def test_the_longest_of_a_few_by_hand() -> None:
    two = empirical([1, 3])
    assert two.mean == 2
    assert two.longest(2) == near(1 / 4 + 3 * 3 / 4)
    assert fixed(9).longest(100) == 9
    assert round(log_normal(1000, 500).mean, 2) == 1000.5  # ceil adds a half
    assert log_normal(1000, 500, max_tokens=800).longest(10**6) == near(800)


def test_lengths_of_a_group_are_correlated_as_told() -> None:
    log_length = np.log(log_normal(1e5, 1e5, correlation=0.5).draw(rng(), 20000, 2))
    standard = (log_length - log_length.mean()) / log_length.std()
    assert_mean_equals(standard.prod(axis=1), 0.5, detect=0.08)
    by_group = empirical([1, 1, 1, 9], [0, 0, 0, 1]).draw(rng(), 9000, 3)
    assert np.all(np.ptp(by_group, axis=1) == 0)
    assert_mean_equals((by_group[:, 0] == 9).astype(float), 0.25, detect=0.06, support=(0, 1))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: fixed(0), ["length", "0"]),
        (lambda: log_normal(0.5, 1), ["mean", "0.5"]),
        (lambda: log_normal(math.nan, 1), ["mean", "nan"]),
        (lambda: log_normal(5, -1), ["sd", "-1"]),
        (lambda: log_normal(5, 1, correlation=1.5), ["correlation", "1.5"]),
        (lambda: log_normal(5, 1, max_tokens=0), ["max_tokens", "0"]),
        (lambda: pareto(5, 1.0), ["tail", "1.0"]),
        (lambda: empirical([]), ["none"]),
        (lambda: empirical([3, 0]), ["0"]),
        (lambda: empirical([3, math.nan]), ["nan"]),
        (lambda: empirical([3, 4], [0]), ["group", "1", "2"]),
        (lambda: fixed(3).longest(0), ["n", "0"]),
        (lambda: small(workers=0), ["workers", "0"]),
        (lambda: small(groups=1.5), ["groups", "1.5"]),
        (lambda: small(max_lag=-1), ["max_lag", "-1"]),
        (lambda: small(train_s=-1.0), ["train_s", "-1"]),
        (lambda: small(sync_s=math.inf), ["sync_s", "inf"]),
        (lambda: small(tokens_per_s=0.0), ["tokens_per_s", "0"]),
        (lambda: small(admission="paec"), ["paec", "did you mean 'pace'"]),
        (lambda: small(batching="statik"), ["statik", "did you mean 'static'"]),
        (lambda: small(capacity=1), ["capacity", "1", "2"]),
        (lambda: small(single_tokens_per_s=0.5), ["single_tokens_per_s", "0.5"]),
        (lambda: simulate(small(), 0, rng()), ["steps", "0"]),
        (lambda: simulate(small(), 3, rng()).outcome(3), ["warmup", "3"]),
    ],
)
def test_bad_numbers_get_one_line(make: Callable[[], Any], words: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        make()
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


# --- closed forms -----------------------------------------------------------------------------------------------------


def synchronous_with_equal_lengths() -> None:
    """Every step takes length + train + sync; nothing lags; slots wait while the trainer works."""
    trace = simulate(small(lengths=fixed(7)), 5, rng())
    assert trace.trained_s.tolist() == [11 + 12 * step for step in range(5)]
    assert set(trace.lag().tolist()) == {0}
    outcome = trace.outcome()
    assert (outcome.steps_per_s, outcome.samples_per_s) == near((1 / 12, 4 / 12))
    assert (outcome.generator_busy, outcome.trainer_busy) == near((7 / 12, 4 / 12))


def synchronous_with_random_lengths() -> None:
    """E[step] = E[max of 4 lengths] + train + sync, whoever is admitted how."""
    for admission in ("wait", "pace"):
        trace = simulate(small(admission=admission), 3000, rng(1))
        step = np.diff(trace.trained_s)
        expected = HEAVY.longest(4) + 5
        assert_mean_equals(step / 69, expected / 69, detect=0.06, support=(0, 1))


def saturated_trainer() -> None:
    """Generation is fast: a step a train + sync; each group starts k + 1 updates before it is done, and lags k."""
    for admission in ("wait", "pace"):
        for k in (1, 2, 5):
            p = small(lengths=fixed(1), workers=8, slots=4, max_lag=k, admission=admission, in_flight=True)
            trace = simulate(p, 20, rng())
            assert np.diff(trace.trained_s).tolist() == [5] * 19
            assert set(trace.lag(warmup=k).tolist()) == {k}
            # Little: groups in the system = rate of groups times their time in it, from sync to end of training
            done = trace.trained_s[trace.update[trace.update >= k + 1]]
            start = trace.start_s[::2][: len(trace.update)][trace.update >= k + 1]
            outcome = trace.outcome(k + 1)
            in_system = outcome.steps_per_s * 2 * np.mean(done - start + p.sync_s)
            assert in_system == near((k + 1) * p.groups)


def saturated_generation() -> None:
    """Training is fast and any lag allowed: slots never wait, so samples/s = slots / E[length], by renewal."""
    p = small(lengths=fixed(8), train_s=0.25, sync_s=0.0, max_lag=50, admission="pace", in_flight=True)
    outcome = simulate(p, 40, rng()).outcome(20)
    assert outcome.generator_busy == near(1)
    assert outcome.samples_per_s == near(4 / 8)
    # with a sync, nothing decodes during it: a step is 8 seconds of decoding and one of sync
    outcome = simulate(replace(p, sync_s=1.0), 40, rng()).outcome(20)
    assert outcome.samples_per_s == near(4 / 9)
    assert outcome.generator_busy == near(8 / 9)


def static_batches_take_their_longest() -> None:
    """A worker of 4 slots refilled when empty makes 4 responses in E[max of 4 lengths]."""
    p = small(workers=1, slots=4, tokens_per_s=4.0, batching="static", admission="drop", max_lag=9999, in_flight=True)
    p = replace(p, train_s=0.0, sync_s=0.0, groups=2)
    trace = simulate(p, 2000, rng(2))
    assert_mean_equals(np.diff(trace.start_s[::4]) / 64, HEAVY.longest(4) / 64, detect=0.07, support=(0, 1))


def conservation() -> None:
    """Responses started = trained + dropped + waiting + decoding, counted where they are."""
    for admission in ("wait", "pace", "drop"):
        for in_flight in (False, True):
            p = small(max_lag=1, admission=admission, in_flight=in_flight, train_s=9.0)
            engine = module._Engine(p, module._stream(p, rng()))
            engine.run(30)
            trace = engine.trace()
            decoding = sum(len(worker.active) for worker in engine.worker)
            assert decoding == np.isnan(trace.finish_s).sum()
            trained = 30 * p.groups * p.group_size
            assert trained == np.sum(trace.update >= 0) * p.group_size
            assert np.bincount(trace.update[trace.update >= 0]).tolist() == [p.groups] * 30
            dropped = int(np.sum(trace.update == DROPPED)) * p.group_size
            waiting = len(engine.ready) * p.group_size
            finished = len(trace.length) - decoding
            partly = np.isin(trace.group, [g for g, left in enumerate(engine.left) if left])
            in_part = int(np.sum(~np.isnan(trace.finish_s[partly])))
            assert finished == trained + dropped + waiting + in_part
            assert (dropped > 0) == (admission == "drop")
            outcome = trace.outcome(1)
            after = int(np.sum((trace.update == DROPPED) & (trace.leave_s > trace.trained_s[0]))) * 2
            assert outcome.dropped_share == near(after / (after + trained - 4))


def lags_stay_where_admission_puts_them() -> None:
    """`wait` and `drop` keep every lag at k or less; `pace` keeps the mean there, and its stragglers exceed it."""
    exceeded = 0
    for k in (0, 1, 3):
        for in_flight in (False, True):
            for seed in range(3):
                p = small(max_lag=k, in_flight=in_flight, lengths=pareto(5, 1.3, max_tokens=400))
                for admission in ("wait", "drop"):
                    lag = simulate(replace(p, admission=admission), 60, rng(seed)).lag()
                    assert lag.min() >= 0
                    assert lag.max() <= k
                outcome = simulate(replace(p, admission="pace"), 300, rng(seed)).outcome(10)
                assert outcome.mean_lag <= k + 0.1
                exceeded += outcome.share_above(k) > 0
    assert exceeded > 6


CLOSED_FORMS = [
    synchronous_with_equal_lengths,
    synchronous_with_random_lengths,
    saturated_trainer,
    saturated_generation,
    static_batches_take_their_longest,
    conservation,
    lags_stay_where_admission_puts_them,
]


@pytest.mark.parametrize("check", CLOSED_FORMS, ids=lambda check: check.__name__)
def test_closed_form(check: Callable[[], None]) -> None:
    check()


def test_a_response_alone_decodes_faster() -> None:
    """Lengths 2 and 6 in two slots at one token a second, two alone: done after 2, and after 4 / 2 more."""
    p = small(workers=1, groups=1, single_tokens_per_s=2.0, lengths=fixed(2))
    lengths = replace(p.lengths, draw=lambda rng, groups, size: np.tile([2, 6], (groups, 1)))
    trace = simulate(replace(p, lengths=lengths), 1, rng())
    assert p.seconds_per_token()[1:] == [0.5, 1.0]
    assert trace.finish_s[:2].tolist() == [2, 4]
    assert trace.slot_s.tolist() == [2 * 2 + 2]  # nothing else starts until the step is trained


def test_tokens_of_several_versions() -> None:
    """One slot, length 10, an update each 4 seconds by a second worker's short responses: versions by hand."""
    p = small(workers=2, slots=1, tokens_per_s=1.0, groups=1, group_size=1, train_s=2.0, sync_s=1.0, max_lag=8)
    lengths = replace(fixed(2), draw=lambda rng, groups, size: np.array([[10]] + [[1]] * (groups - 1)))
    trace = simulate(replace(p, lengths=lengths, admission="pace", in_flight=True), 6, rng())
    # the short one is done at 1, trained at 3, synced at 4; the next updates at 6 and 9, synced at 7 and 10
    assert trace.trained_s[:3].tolist() == [3, 6, 9]
    # decodes in [0, 3), [4, 6), [7, 9), [10, ...): tokens 3 of version 0, 2 of 1, 2 of 2, 2 of 3, 1 of 4
    assert trace.finish_s[0] == 14
    assert trace.mean_version[0] == near((2 * 1 + 2 * 2 + 2 * 3 + 1 * 4) / 10)
    assert trace.version[0] == 0


def test_an_outcome_by_hand() -> None:
    """Two groups of two a step, three steps; the first is the warm-up; one group was dropped after it, one before."""
    nan = math.nan
    trace = Trace(
        pipeline=small(),
        length=np.array([9, 9, 9, 9, 1, 3, 2, 2, 5, 5, 1, 1, 4, 4, 7, 7]),
        version=np.array([0, 0, 0, 0, 0, 1, 1, 1, 0, 0, 2, 1, 2, 2, 0, 0]),
        mean_version=np.array([0, 0, 0, 0, 0, 1, 1, 1, 0, 0, 2, 1, 2, 1.5, nan, nan]),
        start_s=np.zeros(16),
        finish_s=np.zeros(16),
        update=np.array([0, 0, 1, 1, DROPPED, 2, 2, DROPPED]),
        leave_s=np.array([1, 1, 11, 11, 12, 21, 21, 9]),
        trained_s=np.array([10.0, 20.0, 30.0]),
        slot_s=np.array([0.0, 30.0, 60.0]),
    )
    outcome = trace.outcome(1)
    assert (outcome.seconds, outcome.steps_per_s, outcome.samples_per_s) == near((20, 0.1, 0.4))
    assert (outcome.generator_busy, outcome.trainer_busy) == near((60 / 80, 8 / 20))
    assert outcome.lag_share == near([6 / 8, 2 / 8])
    assert outcome.mean_lag == near(2 / 8)
    assert (outcome.share_above(0), outcome.share_above(1)) == near((2 / 8, 0))
    assert outcome.token_lag == near((1 * 1 + 1 * 1 + 4 * 0.5) / (1 + 3 + 2 + 2 + 1 + 1 + 4 + 4))
    assert outcome.dropped_share == near(2 / (2 + 8))


def test_capacity_bounds_what_waits() -> None:
    p = small(admission="drop", max_lag=100, train_s=400.0, lengths=fixed(3), in_flight=True)
    free, held = simulate(p, 4, rng()), simulate(replace(p, capacity=4), 4, rng())
    waiting = [np.sum((t.update == WAITING) & (np.arange(len(t.update)) < len(t.start_s) // 2)) for t in (free, held)]
    assert waiting[0] > 100
    assert waiting[1] <= 4 + p.workers * p.slots // p.group_size


def test_the_same_seed_gives_the_same_trace_and_lengths_do_not_depend_on_the_pipeline() -> None:
    a, b = (simulate(small(max_lag=2), 20, rng(5)) for _ in range(2))
    assert np.array_equal(a.start_s, b.start_s)
    assert np.array_equal(a.finish_s, b.finish_s, equal_nan=True)
    c = simulate(small(max_lag=2, workers=5, admission="drop", train_s=1.0), 20, rng(5))
    n = min(len(a.length), len(c.length))
    assert np.array_equal(a.length[:n], c.length[:n])
    assert not np.array_equal(a.length, simulate(small(max_lag=2), 20, rng(6)).length)


# --- a slow twin: one tick at a time ----------------------------------------------------------------------------------


@dataclass
class Slow:
    """The same rules on a grid of seconds, by looking at everything each second. One second a token."""

    p: Pipeline
    rng: np.random.Generator
    now: int = 0
    version: int = 0
    trainer: str = "idle"
    trainer_left: int = 0
    response: list[dict[str, Any]] = field(default_factory=list)
    queue: list[int] = field(default_factory=list)
    update: dict[int, int] = field(default_factory=dict)
    trained: list[int] = field(default_factory=list)
    drawn: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        n = self.p.workers
        self.holds, self.loading, self.wanted = [0] * n, [0] * n, [False] * n
        self.load_left: list[Any] = [None] * n

    def run(self, steps: int) -> None:
        while True:
            self.responses_end()
            if self.trainer == "training" and self.trainer_left == 0:
                self.step_ends()
                if self.version == steps:
                    return
            self.loads_end()
            self.take()
            while self.start():
                pass
            self.tick()

    def of(self, worker: int) -> list[dict[str, Any]]:
        return [r for r in self.response if r["worker"] == worker and r["end"] is None]

    def responses_end(self) -> None:
        for worker in range(self.p.workers):
            for r in self.of(worker):
                if len(r["by"]) == r["length"]:
                    r["end"] = self.now
                    mine = [q for q in self.response if q["group"] == r["group"]]
                    if len(mine) == self.p.group_size and all(q["end"] is not None for q in mine):
                        self.queue.append(r["group"])
        self.drop()
        for worker in range(self.p.workers):
            if self.wanted[worker] and not self.of(worker) and self.load_left[worker] is None:
                self.load(worker)

    def drop(self) -> None:
        if self.p.admission == "drop":
            for g in list(self.queue):
                oldest = min(r["version"] for r in self.response if r["group"] == g)
                if self.version - oldest > self.p.max_lag:
                    self.queue.remove(g)
                    self.update[g] = DROPPED

    def load(self, worker: int) -> None:
        self.load_left[worker], self.loading[worker], self.wanted[worker] = int(self.p.sync_s), self.version, False

    def step_ends(self) -> None:
        self.version += 1
        self.trained.append(self.now)
        self.trainer, self.trainer_left = "publishing", int(self.p.sync_s)
        self.drop()
        for worker in range(self.p.workers):
            if self.load_left[worker] is None and (self.p.in_flight or not self.of(worker)):
                self.load(worker)
            else:
                self.wanted[worker] = True

    def loads_end(self) -> None:
        if self.trainer == "publishing" and self.trainer_left == 0:
            self.trainer = "idle"
        for worker in range(self.p.workers):
            while self.load_left[worker] == 0:
                self.holds[worker], self.load_left[worker] = self.loading[worker], None
                if self.wanted[worker]:
                    self.load(worker)

    def take(self) -> None:
        batch = range(self.version * self.p.groups, (self.version + 1) * self.p.groups)
        chosen = [g for g in self.queue if g in batch] if self.p.admission == "wait" else self.queue[: self.p.groups]
        if self.trainer == "idle" and len(chosen) == self.p.groups:
            for g in chosen:
                self.queue.remove(g)
                self.update[g] = self.version
            self.trainer, self.trainer_left = "training", int(self.p.train_s)

    def start(self) -> bool:
        group, member = divmod(len(self.response), self.p.group_size)
        if member == 0:
            if self.p.capacity is not None and len(self.queue) >= self.p.capacity:
                return False
            if self.p.admission != "drop" and group // self.p.groups > self.version + self.p.max_lag:
                return False
        able = [w for w in range(self.p.workers) if self.load_left[w] is None and not self.wanted[w]]
        if self.p.batching == "static":
            able = [w for w in able if all(r["start"] == self.now for r in self.of(w))]
        able = [w for w in able if len(self.of(w)) < self.p.slots]
        if not able:
            return False
        worker = min(able, key=lambda w: (len(self.of(w)), w))
        if not self.drawn:
            self.drawn = self.p.lengths.draw(self.rng, 64, self.p.group_size).ravel().tolist()
        record = {"group": group, "worker": worker, "length": self.drawn.pop(0), "by": [], "end": None}
        self.response.append({**record, "version": self.holds[worker], "start": self.now})
        return True

    def tick(self) -> None:
        self.now += 1
        self.trainer_left -= 1
        for worker in range(self.p.workers):
            if self.load_left[worker] is not None:
                self.load_left[worker] -= 1
            else:
                for r in self.of(worker):
                    r["by"].append(self.holds[worker])


def assert_twins(p: Pipeline, steps: int, seed: int) -> None:
    fast: Trace = simulate(p, steps, rng(seed))
    slow = Slow(p, rng(seed))
    slow.run(steps)
    assert fast.trained_s.tolist() == slow.trained
    columns = {"length": "length", "version": "version", "start_s": "start"}
    for name, key in columns.items():
        assert getattr(fast, name).tolist() == [r[key] for r in slow.response], name
    ended = [r for r in slow.response if r["end"] is not None]
    whole = ~np.isnan(fast.finish_s)
    assert fast.finish_s[whole].tolist() == [r["end"] for r in ended]
    assert fast.mean_version[whole] == near([np.mean(r["by"]) for r in ended])
    assert fast.update.tolist() == [slow.update.get(g, WAITING) for g in range(len(fast.update))]
    decoded = sum(len(r["by"]) for r in slow.response)
    assert fast.slot_s[-1] == near(decoded)


@st.composite
def pipelines(draw: st.DrawFn) -> Pipeline:
    slots, groups = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    return Pipeline(
        lengths=empirical(draw(st.lists(st.integers(1, 12), min_size=1, max_size=6))),
        workers=draw(st.integers(1, 3)),
        slots=slots,
        tokens_per_s=float(slots),
        groups=groups,
        group_size=draw(st.integers(1, 3)),
        train_s=float(draw(st.integers(1, 9))),
        sync_s=float(draw(st.integers(0, 4))),
        max_lag=draw(st.integers(0, 3)),
        admission=draw(st.sampled_from(ADMISSIONS)),
        in_flight=draw(st.booleans()),
        batching=draw(st.sampled_from(BATCHINGS)),
        capacity=draw(st.none() | st.integers(groups, groups + 3)),
    )


@given(pipelines(), st.integers(0, 99))
def test_the_slow_twin_sees_the_same(p: Pipeline, seed: int) -> None:
    assert_twins(p, 6, seed)


# --- wrong pipelines --------------------------------------------------------------------------------------------------

Engine = module._Engine


def _early_gate(self: Any) -> bool:
    self.version += 1
    allowed = MAY_START(self)
    self.version -= 1
    return allowed


def _without_sync(method: Any, of: Callable[[int], bool]) -> Any:
    def patched(self: Any, *arguments: Any) -> None:
        before = list(self.events)
        method(self, *arguments)
        late = [e for e in self.events if e not in before and e[1] == module.LOADED and of(e[2])]
        for event in late:
            self.events.remove(event)
            self.events.append((self.now, *event[1:]))
        module.heapify(self.events)

    return patched


def _free_of_charge(self: Any, group: int, update: int) -> None:
    if update != DROPPED:
        LEAVE(self, group, update)


def _first_come(self: Any) -> None:
    # `wait` admits by the same gate, but takes the first that are finished
    if not self.trainer_busy and len(self.ready) >= self.p.groups:
        rule = self.p
        self.p = replace(rule, admission="pace")
        self._take()
        self.p = rule
    self._fill()
    for who in self.changed:
        self._schedule(who)
    self.changed.clear()


def _newest(self: Any, who: int) -> None:
    START(self, who)
    self.start[-1] = (self.version + 1, self.now)


def _never_stale(self: Any, group: int) -> bool:
    return self.p.admission == "drop" and self.version - self.start[group * self.p.group_size][0] > self.p.max_lag + 1


MAY_START, LEAVE, START = Engine._may_start, Engine._leave, Engine._start
MUTANTS: dict[str, tuple[str, Any]] = {
    "gate one update early": ("_may_start", _early_gate),
    "dropped not counted": ("_leave", _free_of_charge),
    "sync does not hold up the trainer": ("_trained", _without_sync(Engine._trained, lambda who: who < 0)),
    "sync does not hold up the workers": ("_load", _without_sync(Engine._load, lambda who: who >= 0)),
    "wait takes whoever comes first": ("_begin", _first_come),
    "lag off by one": ("_start", _newest),
    "stale one update late": ("_stale", _never_stale),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_wrong_pipelines_are_found_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Engine, *MUTANTS[name])
    with pytest.raises(AssertionError):
        _all_closed_forms()
    with pytest.raises(AssertionError):
        _many_twins()


def _all_closed_forms() -> None:
    for check in CLOSED_FORMS:
        check()


def _many_twins() -> None:
    for seed in range(40):
        in_flight = bool(rng(seed).integers(2))
        assert_twins(small(admission=ADMISSIONS[seed % 3], max_lag=seed % 4, in_flight=in_flight, train_s=3.0), 8, seed)
