"""Which part of OPOB earns what in learning: n^2, w^2, centering, damping, and what a shift of the rewards does.

All methods have the same sequence weights min(w, 8), lag and step size, and differ in the baseline alone; the
synchronous ones say which part is about staleness at all. A shift adds a constant to every reward: it changes no
answer, and nothing for a baseline that is a weighted mean, but it decides whether "no baseline" is a good one.
"""

from dataclasses import dataclass, replace

from simulations.drawing import Plot, plot
from simulations.methods import (
    AGGREGATES,
    Method,
    aggregates,
    chosen,
    gain,
    lost_of,
    outcome,
    own_methods,
    run_of,
    told,
    trace,
    value_ranking,
)
from simulations.protocol import Analysis, Comparison, Experiment, Figure, Question, Record, Rule, Setting, judge
from vcposim.arrays import Array
from vcposim.baselines import weighted_mean
from vcposim.batch import Batch
from vcposim.estimators import Estimator
from vcposim.learning.lags import Lag
from vcposim.learning.tasks import task
from vcposim.weights import Weight, Weighting

TIS, NONE = Weighting("truncate", cap=8.0), Weighting("none")


@dataclass(frozen=True)
class WeightSquared(Estimator):
    """OPOB without the norms: b = sum w^2 R / sum w^2, w truncated as in the estimate."""

    def _baseline(self, batch: Batch, weight: Weight) -> Array:
        return weighted_mean(batch.reward, weight.relative * weight.relative, batch.measure)


PARTS: dict[str, Method] = {
    "synchronous, mean": Method(Estimator(NONE, "group_mean"), stale=False),
    "synchronous, n^2": Method(Estimator(NONE, "on_policy_optimal"), stale=False),
    "zero": Method(Estimator(TIS, "zero")),
    "mean": Method(Estimator(TIS, "group_mean")),
    "leave-one-out mean": Method(Estimator(TIS, "leave_one_out")),
    "w^2": Method(WeightSquared(TIS, "group_mean")),
    "n^2": Method(Estimator(TIS, "on_policy_optimal")),
    "w^2 n^2 (OPOB)": Method(Estimator(TIS, "opob")),
    "w^4 n^2 (released)": Method(Estimator(TIS, "opob_released")),
    "leave-one-out OPOB": Method(Estimator(TIS, "opob_leave_one_out")),
    "damped mean": Method(Estimator(TIS, "leverage_damped_mean")),
}
OPOB = "w^2 n^2 (OPOB)"
STEP_SIZE, LAG = 0.024, 16
MARGIN = 0.02
"""the difference of success probabilities that matters"""


def settings(size: str) -> list[Setting]:
    """Reward shifts and group sizes x blocks of seeds; a batch always has 32 trajectories."""
    full = size == "full"
    blocks = [range(first, first + 8) for first in range(0, 48, 8)] if full else [range(5)]
    places = [(0.0, 8), (1.0, 8), *([(-1.0, 8), (0.0, 4), (0.0, 32)] if full else [])]
    return [
        {"shift": shift, "group_size": n, "seeds": list(block), "updates": 200 if full else 140}
        for shift, n in places
        for block in blocks
    ]


def run(setting: Setting) -> list[Record]:
    """One record for each part and seed; values are those of the unshifted task."""
    plain = task("exact_match_8")
    shifted = replace(plain, chain=replace(plain.chain, reward=plain.chain.reward + setting["shift"]))
    methods = PARTS | own_methods(setting)
    keys = [(name, seed) for name in methods for seed in setting["seeds"]]
    runs = [run_of(methods[name], Lag(LAG), seed=seed, step_size=STEP_SIZE) for name, seed in keys]
    n = setting["group_size"]
    found = trace(shifted, runs, setting["updates"], groups=32 // n, group_size=n)
    found["value"] = found["value"] - setting["shift"]
    return [
        {"method": name, "seed": seed, "shift": setting["shift"], "group_size": n, **outcome(found, i)}
        for i, (name, seed) in enumerate(keys)
    ]


def analyse(records: list[Record]) -> Analysis:
    """C10 in learning."""
    caption = (
        f"Success probability averaged over training (lag {LAG}, step size {STEP_SIZE:g}) with the baseline alone "
        "changed, for each group size and shift of the rewards: mean over seeds with 95% interval; how many runs "
        "collapsed stands beside."
    )
    groups_of_8 = chosen(records, group_size=8)
    asked = [_gain(records), _parts(groups_of_8), _needed(groups_of_8)]
    few = (OPOB, "mean", "n^2", "w^2", "zero", "synchronous, mean", "synchronous, n^2")
    profiles = f"{AGGREGATES.format(ours='OPOB')} Groups of 8."
    plain = chosen(groups_of_8, shift=0.0)
    figures = [
        Figure("value_by_baseline", figure(records), caption, alt=caption),
        Figure("profiles", aggregates(plain, OPOB, few, PARTS), profiles, alt=profiles),
    ]
    return Analysis(judge(asked), figures)


def _gain(records: list[Record]) -> Question:
    here = {n: chosen(records, group_size=n, shift=0.0) for n in sorted({r["group_size"] for r in records})}
    synchronous = "; ".join(
        f"{gain(some, 'synchronous, n^2', 'synchronous, mean')} (groups of {n})" for n, some in here.items()
    )
    return Question(
        "opob_beats_mean",
        "C10",
        "in learning under lag, OPOB does better than the group mean with the same weights",
        Rule("value averaged over training, OPOB minus mean", ">", 0.0, MARGIN),
        [Comparison(f"groups of {n}", gain(some, OPOB, "mean")) for n, some in here.items()],
        "where",
        note=f"synchronous, n^2 minus mean: {synchronous}. Values in groups of 8: {told(here.get(8, []), PARTS)}",
    )


def _parts(records: list[Record]) -> Question:
    here = chosen(records, shift=0.0)
    parts = ("n^2", "w^2", "damped mean", "leave-one-out OPOB", "leave-one-out mean")
    return Question(
        "opob_more_than_parts",
        "C10",
        "OPOB in learning is more than any of its parts (n^2 alone, w^2 alone, damping alone, centering alone)",
        Rule("value averaged over training, OPOB minus part", ">", 0.0, MARGIN),
        [Comparison(f"OPOB minus {name}", gain(here, OPOB, name)) for name in parts],
    )


def _needed(records: list[Record]) -> Question:
    shifts = sorted({r["shift"] for r in records})
    lost = "; ".join(f"zero loses {lost_of(chosen(records, shift=s), 'zero')} with {s:+g}" for s in shifts)
    return Question(
        "baseline_needed",
        "C10",
        "a baseline is needed: OPOB does better than none",
        Rule("value averaged over training, OPOB minus none", ">", 0.0, MARGIN),
        [Comparison(f"rewards in {{{s:g}, {s + 1:g}}}", gain(chosen(records, shift=s), OPOB, "zero")) for s in shifts],
        "where",
        note=lost,
    )


def figure(records: list[Record]) -> Plot:
    """One panel a group size and shift."""
    places = sorted({(r["group_size"], r["shift"]) for r in records})
    panels = [
        value_ranking(
            f"groups of {n}, rewards {shift:+g}" if shift else f"groups of {n}",
            chosen(records, shift=shift, group_size=n),
            PARTS,
            [OPOB],
        )
        for n, shift in places
    ]
    return plot(*panels, width=4.6, height=2.6)


EXPERIMENT = Experiment(
    "ablation", "Which part of OPOB earns what in learning?", ("C10",), settings, run, analyse, takes_estimators=True
)
