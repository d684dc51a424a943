"""Is asynchronous training faster end to end: throughput of a pipeline times steps saved or lost at its realized lag?

A discrete-event pipeline (workers pause for the weight sync and put the new weights into half-finished responses, as
the paper's runs do) is simulated for each tail of response lengths, admission rule and nominal lag k, at its fastest
split of the devices. It gives steps per second and the distribution of the realized lag. Learners then train under
*that* distribution. Speedup is time to target of synchronous training on the same devices (all generate, then all
train) over that of the asynchronous method. Synchronous training is there with the mean baseline, and with OPOB, which
it can have too. Learners share one step size, and each has its own best: chosen on even seeds, judged on odd ones.

Lengths and speeds are stated numbers, not measured on a cluster: what is found is the mechanism and its size here. The
tasks are learned in tens of updates where a language model takes hundreds, so a lag of 8 is a large part of a run.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from simulations.drawing import MUTED, Plot, of_intervals, panel, plot, series
from simulations.methods import METHODS, TARGET, run_of, trace
from simulations.protocol import Analysis, Comparison, Experiment, Figure, Question, Record, Rule, Setting, judge
from simulations.stats import Estimate, of_seeds
from vcposim.arrays import Array
from vcposim.learning.lags import Lag
from vcposim.pipeline.lengths import Lengths, log_normal
from vcposim.pipeline.plan import Cluster, Option, survey

MEAN_TOKENS, MAX_TOKENS = 1000, 8192
TAILS: dict[str, Callable[[], Lengths]] = {
    "even": lambda: log_normal(MEAN_TOKENS, 0.2 * MEAN_TOKENS, MAX_TOKENS),
    "heavy": lambda: log_normal(MEAN_TOKENS, 1.2 * MEAN_TOKENS, MAX_TOKENS),
}
REFERENCES = ("synchronous, mean", "synchronous, OPOB")
STALE = ("no correction", "sequence TIS", "OPOB only", "VCPO")
HOST = {"no correction": 0, "sequence TIS": 0, "OPOB only": 1, "VCPO": 1}
"""which of the references a stale method is at lag 0, update by update"""
EXPORTED = "exact_match_8"
"""the task whose steps_ratio `vcposim plan` can read"""
OURS, CONTROLS = "VCPO", ("sequence TIS", "OPOB only")
STEP_SIZES = (0.006, 0.012, 0.024)
COMMON = 0.012
"""the step size that all share, the paper's protocol"""
PRINTED = {
    "Countdown": (143.2 / 400, 89.6 / 400),
    "MATH-500": (134.4 / 400, 92.8 / 400),
    "AIME25": (420.2 / 300, 168.9 / 220),
}
"""GPU hours a step, synchronous and VCPO, in the table of the README of mit-han-lab/vcpo"""
UNREACHED = 10.0
"""stands for a ratio with a run that never arrives, and bounds all others"""
FASTER = 0.05
"""a speedup that matters"""
MATCH = 1.1
"""as many steps, up to this factor, still counts as a match"""

GridPoint = tuple[str, str, int, bool]
"""task, tail, nominal lag, and whether each method has its own step size"""


@dataclass(frozen=True)
class RealizedLag(Lag):
    """Each group draws its lag from measured shares: `share[j]` of the groups lag j. `k` is the largest."""

    share: tuple[float, ...] = (1.0,)

    def of_tokens(self, uniform: Array, length: int) -> Array:
        """See `Lag`."""
        lag = np.asarray(np.searchsorted(np.cumsum(self.share)[:-1], uniform, side="right"))
        return np.repeat(lag[..., None], length, axis=-1)


def settings(size: str) -> list[Setting]:
    """Tasks and admission rules x tails x nominal lags; all stale methods, step sizes and seeds are in each.

    The references do not depend on the pipeline: they are in the first setting of a task.
    """
    full = size == "full"
    places = [("exact_match_8", "pace")]
    if full:
        places += [("exact_match_8", "wait"), ("exact_match_8", "drop"), ("several_targets", "pace")]
    return [
        {
            "reference": (tail, admission, k) == ("even", "pace", 1),
            "task": task,
            "tail": tail,
            "admission": admission,
            "max_lag": k,
            "seeds": 20 if full else 10,
            "updates": 200 if full else 60,
            "steps": 30 if full else 10,
            "splits": [2, 3, 4, 5, 6] if full else [4, 5, 6],
        }
        for task, admission in places
        for tail in TAILS
        for k in ((1, 2, 4, 8, 16) if full else (1, 2, 8))
    ]


def run(setting: Setting) -> list[Record]:
    """One record of the pipeline, and one for each method, step size and seed under its lags."""
    reference, fastest = throughput(setting)
    place = {key: setting[key] for key in ("task", "tail", "admission", "max_lag")}
    share = lag_share(fastest)
    speed = fastest.steps_per_s / reference.steps_per_s
    pipeline = {
        "kind": "pipeline",
        **place,
        "generators": fastest.generators,
        "synchronous_steps_per_s": reference.mean("steps_per_s"),
        "synchronous_generator_busy": reference.mean("generator_busy"),
        "speed": float(np.exp(np.log(speed).mean())),
        "speeds": speed,
        "lag_share": share,
        "mean_lag": fastest.mean("mean_lag"),
        "token_lag": fastest.lag,
        "beyond": float(share[setting["max_lag"] + 1 :].sum()),
        "dropped": fastest.mean("dropped_share"),
        "generator_busy": fastest.mean("generator_busy"),
        "trainer_busy": fastest.mean("trainer_busy"),
    }
    return [pipeline, *learning(setting, place, RealizedLag(len(share) - 1, share=tuple(share.tolist())), pipeline)]


def throughput(setting: Setting) -> tuple[Option, Option]:
    """The synchronous reference, and the fastest split at this nominal lag."""
    cluster = Cluster(
        lengths=TAILS[setting["tail"]](),
        devices=8,
        slots=16,
        tokens_per_s=16 * 50.0,
        single_tokens_per_s=100.0,  # a straggler alone decodes twice as fast, which helps synchronous training
        groups=16,
        group_size=8,
        train_s=20.0,
        train_devices=4,
        sync_s=3.0,
        admission=setting["admission"],
        in_flight=True,
    )
    lags, splits = [setting["max_lag"]], setting["splits"]
    reference, *options = survey(cluster, lags, splits, steps=setting["steps"], seeds=3)
    return reference, max(options, key=lambda option: option.mean("steps_per_s"))


def lag_share(option: Option) -> Array:
    """P(lag = j) over all its seeds: (lags,)."""
    longest = max(outcome.lag_share.size for outcome in option.outcomes)
    padded = [np.pad(outcome.lag_share, (0, longest - outcome.lag_share.size)) for outcome in option.outcomes]
    return np.asarray(np.mean(padded, axis=0))


def learning(setting: Setting, place: Record, lag: Lag, pipeline: Record) -> list[Record]:
    """Updates to the target (None: never) of each method, step size and seed.

    At the common step size also `steps_ratio`, their ratio to those of synchronous training with the mean baseline, and
    the mean `lag` it was found at: what `vcposim plan --efficiency-file` reads.
    """
    seeds = range(setting["seeds"])
    names = (*REFERENCES, *STALE) if setting["reference"] else STALE
    keys = [(name, step, seed) for name in names for step in STEP_SIZES for seed in seeds]
    extra = [] if setting["reference"] else [(REFERENCES[0], COMMON, seed) for seed in seeds]
    runs = [run_of(METHODS[name], lag, seed=seed, step_size=step) for name, step, seed in keys + extra]
    value = trace(setting["task"], runs, setting["updates"])["value"]
    hits = {key: _first(value[:, i] >= TARGET) for i, key in enumerate(keys + extra)}
    records = []
    for i, (name, step, seed) in enumerate(keys):
        ran = {"method": name, "step_size": step, "seed": seed, "updates": setting["updates"]}
        hit = hits[name, step, seed]
        records.append({"kind": "learning", **place, **ran, "hit": hit, "final": float(value[-1, i])})
        if name in STALE and step == COMMON and setting["task"] == EXPORTED:
            records[-1] |= _ratio(pipeline["mean_lag"], hit, hits[REFERENCES[0], COMMON, seed])
    if setting["reference"] and setting["task"] == EXPORTED:
        for name, seed in ((name, seed) for name in STALE for seed in seeds):
            on_policy = hits[REFERENCES[HOST[name]], COMMON, seed]
            point = {"kind": "lag 0", "method": name, "seed": seed}
            records.append({**point, **_ratio(0.0, on_policy, hits[REFERENCES[0], COMMON, seed])})
    return records


def _ratio(lag: float, hit: int | None, against: int | None) -> Record:
    if against is None:
        return {}  # nothing to compare with
    return {"lag": lag, "steps_ratio": None if hit is None else hit / against}


def _first(reached: Array) -> int | None:
    # the value before update u is that of u updates made; one that starts at the target needs 1, so ratios exist
    return max(int(reached.argmax()), 1) if reached.any() else None


# --- analysis ---------------------------------------------------------------------------------------------------------


def analyse(records: list[Record]) -> Analysis:
    """Verdicts on C15 and C16."""
    pipelines = [r for r in records if r["kind"] == "pipeline"]
    learned = [r for r in records if r["kind"] == "learning"]
    asked = [
        *(_faster(pipelines, learned, reference) for reference in REFERENCES),
        *(_against(pipelines, learned, control) for control in CONTROLS),
        _matches(pipelines, learned),
        _nominal(pipelines),
    ]
    caption = (
        "Time to target of synchronous training over that of each asynchronous method, each at its own best step size, "
        "against the nominal lag: geometric mean over seeds, 95% interval; above 1, asynchronous is faster. Throughput "
        "alone is the speedup if stale steps were as good; dashed, what VCPO's authors print for a step of three tasks."
    )
    lags = "Share of trained responses at each realized lag; the gray line is the nominal lag k."
    return Analysis(
        judge(asked),
        [
            Figure("speedup_against_lag", speedup_figure(records), caption, alt=caption),
            Figure("realized_lag", lag_figure(records), lags, alt=lags),
        ],
    )


def speedups(pipeline: Record, learned: list[Record], method: str, reference: str, *, own: bool) -> dict[int, float]:
    """Time to target of the reference over the method's, by seed; 0 where the method never arrives.

    Where the reference never arrives its time is the length of the run: too short, so the speedup is not overstated.
    """
    keys = ("task", "tail", "admission", "max_lag")
    # the references belong to all pipelines of their task
    mine = [r for r in learned if all(r[k] == pipeline[k] for k in keys[: 1 if r["method"] in REFERENCES else None])]
    first, second = (_hits(mine, name, own=own) for name in (method, reference))
    longest = mine[0]["updates"] if mine else 0
    return {
        seed: 0.0 if hit is None else pipeline["speed"] * (second[seed] or longest) / hit
        for seed, hit in first.items()
        if seed in second
    }


def _hits(mine: list[Record], method: str, *, own: bool) -> dict[int, Any]:
    rows = [r for r in mine if r["method"] == method]
    if not own:
        return {r["seed"]: r["hit"] for r in rows if r["step_size"] == COMMON}
    if not any(r["seed"] % 2 == 0 for r in rows):
        return {}
    best = min(STEP_SIZES, key=lambda step: _score(r for r in rows if r["step_size"] == step and r["seed"] % 2 == 0))
    return {r["seed"]: r["hit"] for r in rows if r["step_size"] == best and r["seed"] % 2}


def _score(rows: Iterable[Record]) -> float:
    # mean updates, where never counts as twice the run: a step size must not win by the runs it ruins
    return float(np.mean([2 * r["updates"] if r["hit"] is None else r["hit"] for r in rows]))


def _paths(pipelines: list[Record]) -> list[Record]:
    # the admission of the paper's framework, where it was run
    return [p for p in pipelines if p["admission"] == "pace"] or pipelines


def _place(p: Record, own: bool) -> str:
    return f"{p['task']}, {p['tail']} tail, k = {p['max_lag']}, {'own best' if own else 'common'} step size"


def _clipped(ratio: float) -> float:
    # a ratio with a run that never arrives stands at UNREACHED times, either way
    return min(max(ratio, 1 / UNREACHED), UNREACHED)


def _speed(p: Record, learned: list[Record], method: str, reference: str, own: bool) -> Estimate | None:
    found = speedups(p, learned, method, reference, own=own)
    return of_seeds(((seed, _clipped(s)) for seed, s in found.items()), scale="log")


def _faster(pipelines: list[Record], learned: list[Record], reference: str) -> Question:
    paths = _paths(pipelines)
    cells = {
        (p["task"], p["tail"], p["max_lag"], own): _speed(p, learned, OURS, reference, own)
        for p in paths
        for own in (False, True)
    }
    note = _extremes(cells, paths)
    if reference == REFERENCES[0]:
        note += f"; synchronous OPOB alone {_baseline_alone(paths, learned)}"
    return Question(
        f"faster_than_{'mean' if reference == REFERENCES[0] else 'opob'}",
        "C16",
        f"VCPO is faster end to end than {reference} training",
        Rule("time to target, synchronous over VCPO's", ">", 1.0, FASTER),
        [
            Comparison(_place(p, own), cells[p["task"], p["tail"], p["max_lag"], own])
            for p in paths
            for own in (False, True)
        ],
        "where",
        note=note,
    )


def _baseline_alone(pipelines: list[Record], learned: list[Record]) -> Estimate | None:
    """What OPOB does for synchronous training: the part of the speedup that asynchrony has nothing to do with."""
    gains = [
        (seed, _clipped(gain / p["speed"]))
        for p in {p["task"]: p for p in pipelines}.values()
        for seed, gain in speedups(p, learned, REFERENCES[1], REFERENCES[0], own=True).items()
    ]
    return of_seeds(gains, scale="log")


def _extremes(cells: dict[GridPoint, Estimate | None], pipelines: list[Record]) -> str:
    texts = []
    for tail in _tails(pipelines):
        mine = [p for p in pipelines if p["tail"] == tail and cells[p["task"], tail, p["max_lag"], True]]
        if not mine:
            continue

        def value(p: Record, tail: str = tail) -> float:
            e = cells[p["task"], tail, p["max_lag"], True]
            return e.value if e else 0.0

        best = max(mine, key=value)
        key = best["task"], tail, best["max_lag"]
        texts.append(
            f"{tail} tail: {cells[*key, True]} times as fast at its best k = {best['max_lag']} "
            f"({cells[*key, False]} at the common step size), throughput alone {best['speed']:.3g}"
        )
    return "; ".join(texts)


def _against(pipelines: list[Record], learned: list[Record], control: str) -> Question:
    """The same pipeline with a rival: whatever asynchrony gives, both have."""
    comparisons = []
    for p in _paths(pipelines):
        for own in (False, True):
            mine, rival = (speedups(p, learned, m, REFERENCES[0], own=own) for m in (OURS, control))
            # never arriving is slowest; if neither arrives there is nothing to choose between them
            gain = [
                (s, 1.0 if mine[s] == rival[s] else _clipped(mine[s] / rival[s]) if rival[s] else UNREACHED)
                for s in mine
                if s in rival
            ]
            comparisons.append(Comparison(_place(p, own), of_seeds(gain, scale="log")))
    return Question(
        f"faster_than_{control.replace(' ', '_').lower()}",
        "C16",
        f"in the same pipeline, VCPO is faster than {control}",
        Rule(f"time to target, {control}'s over VCPO's", ">", 1.0, FASTER),
        comparisons,
        "where",
        beside=True,
    )


def _matches(pipelines: list[Record], learned: list[Record]) -> Question:
    comparisons = []
    for p in _paths(pipelines):
        found = speedups(p, learned, OURS, REFERENCES[1], own=True)
        loss = [(seed, _clipped(p["speed"] / s) if s else UNREACHED) for seed, s in found.items()]
        comparisons.append(Comparison(_place(p, True), of_seeds(loss, scale="log")))
    return Question(
        "steps_match",
        "C15",
        "VCPO needs no more steps than synchronous training with OPOB, at the realized lag",
        Rule("steps to target, VCPO's over synchronous OPOB's", "<", 1.0, MATCH - 1),
        comparisons,
        "where",
    )


def _nominal(pipelines: list[Record]) -> Question:
    text = "; ".join(
        f"{p['admission']}, {p['tail']} tail, k = {p['max_lag']}: mean {p['mean_lag']:.3g}, {p['beyond']:.0%} beyond k"
        + (f", {p['dropped']:.0%} dropped" if p["dropped"] else "")
        for p in _one_task(pipelines)
        if p["max_lag"] in (1, 2, max(q["max_lag"] for q in pipelines))
    )
    return Question(
        "nominal_lag",
        "C16",
        "the nominal lag k is the lag that is trained on",
        Rule(
            "distance of the realized mean lag from k, over k",
            "<",
            0.0,
            0.1,
            "none: a mean over all responses of three simulated pipelines",
        ),
        [
            Comparison(
                f"{p['task']}, {p['admission']}, {p['tail']} tail, k = {p['max_lag']}",
                Estimate(abs(p["mean_lag"] / p["max_lag"] - 1)),
            )
            for p in pipelines
        ],
        "where",
        beside=True,
        note=text,
    )


def _tails(pipelines: list[Record]) -> list[str]:
    return [tail for tail in TAILS if any(p["tail"] == tail for p in pipelines)]


def _one_task(pipelines: list[Record]) -> list[Record]:
    return [p for p in pipelines if p["task"] == pipelines[0]["task"]]


# --- figures ----------------------------------------------------------------------------------------------------------


def speedup_figure(records: list[Record]) -> Plot:
    """Speedup against nominal lag: a panel each for tail and reference, on equal axes."""
    pipelines = _one_task(_paths([r for r in records if r["kind"] == "pipeline"]))
    learned = [r for r in records if r["kind"] == "learning"]
    printed = [before / after for before, after in PRINTED.values()]
    panels, highest = [], max([1.0, *printed])
    for tail in _tails(pipelines):
        mine = [p for p in pipelines if p["tail"] == tail]
        lags = [p["max_lag"] for p in mine]
        for reference in REFERENCES:
            parts = [series("throughput alone", lags, [p["speed"] for p in mine], color=MUTED)]
            parts += [
                series(f"printed by VCPO, {name}", [lags[0], lags[-1]], [value] * 2, color=MUTED, dashed=True)
                for name, value in zip(PRINTED, printed, strict=True)
                if value in (min(printed), max(printed))
            ]
            for number, method in enumerate(STALE):
                rows = {p["max_lag"]: _speed(p, learned, method, reference, True) for p in mine}
                known = {k: e for k, e in rows.items() if e is not None}
                highest = max([highest, *(e.interval.high for e in known.values())])
                parts.append(of_intervals(method, list(known), list(known.values()), number))
            axes = panel(f"{tail} tail, over {reference}", "nominal lag k", "speedup to target", parts, xscale="log")
            panels.append({**axes, "ticks": lags, "hlines": [1.0]})
    return plot(*({**axes, "ylim": [0, min(highest, UNREACHED) * 1.05]} for axes in panels), width=4.4, height=3.0)


def lag_figure(records: list[Record]) -> Plot:
    """Distribution of the realized lag, a panel for each nominal lag."""
    pipelines = _one_task(_paths([r for r in records if r["kind"] == "pipeline"]))
    panels = []
    for k in sorted({p["max_lag"] for p in pipelines}):
        some = [p for p in pipelines if p["max_lag"] == k]
        parts = [
            series(f"{p['tail']} tail", range(len(p["lag_share"])), p["lag_share"], color=number)
            for number, p in enumerate(some)
        ]
        axes = panel(f"nominal k = {k}", "realized lag (updates)", "share of responses", parts, ylim=[0, 1])
        panels.append({**axes, "vlines": [k]})
    return plot(*panels, width=2.9, height=2.4, columns=3)


EXPERIMENT = Experiment(
    "pipeline_speedup",
    "Is asynchronous training faster end to end, at the lag a pipeline really has?",
    ("C15", "C16"),
    settings,
    run,
    analyse,
    no_estimators="models throughput and lag, and trains two methods at the lags found",
)
