"""Which part of OPOB earns what in learning: n^2, w^2, centering, damping, and what a shift of the rewards does.

All methods have the same sequence weights min(w, 8), lag and step size, and differ in the baseline alone; the
synchronous ones say which part is about staleness at all. A shift adds a constant to every reward: it changes no
answer, and nothing for a baseline that is a weighted mean, but it decides whether "no baseline" is a good one.
"""

from dataclasses import dataclass, replace

from matplotlib.figure import Figure as Canvas

from simulations.drawing import canvas
from simulations.methods import (
    Method,
    better,
    chosen,
    lost,
    lost_of,
    mean_interval,
    outcome,
    paired,
    run_of,
    trace,
)
from simulations.protocol import Analysis, Experiment, Figure, Record, Setting, Verdict
from simulations.stats import Interval
from vcposim.arrays import Array
from vcposim.baselines import weighted_mean
from vcposim.batch import Batch
from vcposim.commands.figures import ACCENT, ALARM
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
    keys = [(name, seed) for name in PARTS for seed in setting["seeds"]]
    runs = [run_of(PARTS[name], Lag(LAG), seed=seed, step_size=STEP_SIZE) for name, seed in keys]
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
        "changed, for each shift of the rewards: mean over seeds with 95% interval; red where a run collapsed."
    )
    groups_of_8 = chosen(records, group_size=8)
    sizes = sorted({r["group_size"] for r in records})
    verdicts = [*(_gain(chosen(records, group_size=n), n) for n in sizes), _parts(groups_of_8), _shift(groups_of_8)]
    return Analysis(verdicts, [Figure("value_by_baseline", draw, caption, alt=caption)])


def _table(records: list[Record], names: tuple[str, ...]) -> str:
    return "; ".join(
        f"{n} {mean_interval(r['average'] for r in chosen(records, method=n))} ({lost_of(records, n)} lost)"
        for n in names
    )


def _gain(records: list[Record], n: int) -> Verdict:
    here = chosen(records, shift=0.0)
    word, condition = better([paired(here, OPOB, "mean", "average")])
    return Verdict(
        "C10",
        f"in learning under lag, OPOB does better than the group mean with the same weights (groups of {n})",
        word,
        f"OPOB minus mean {paired(here, OPOB, 'mean', 'average')}; synchronous n^2 minus mean "
        f"{paired(here, 'synchronous, n^2', 'synchronous, mean', 'average')}. Values: {_table(here, tuple(PARTS))}",
        condition,
    )


def _parts(records: list[Record]) -> Verdict:
    here = chosen(records, shift=0.0)
    parts = ("n^2", "w^2", "damped mean", "leave-one-out OPOB", "leave-one-out mean")
    gains = {name: paired(here, OPOB, name, "average") for name in parts}
    word, condition = better(gains.values())
    return Verdict(
        "C10",
        "OPOB in learning is more than any of its parts (n^2 alone, w^2 alone, damping alone, centering alone)",
        word,
        f"OPOB minus part: {'; '.join(f'{n} {g}' for n, g in gains.items())}",
        condition,
    )


def _shift(records: list[Record]) -> Verdict:
    gain = paired(chosen(records, shift=0.0), "zero", OPOB, "average")
    others = [shift for shift in sorted({r["shift"] for r in records}) if shift]
    moved = "; ".join(
        f"{paired(here, 'zero', OPOB, 'average')} with {shift:+g} added to every reward "
        f"(zero loses {lost_of(here, 'zero')})"
        for shift in others
        for here in [chosen(records, shift=shift)]
    )
    word, condition = better([negated(gain)])
    return Verdict(
        "C10",
        "a baseline is needed: OPOB does better than none at rewards in {0, 1}",
        word,
        f"zero minus OPOB {gain} at rewards in {{0, 1}}; {moved}",
        condition,
    )


def negated(i: Interval) -> Interval:
    """The interval of minus the value."""
    return Interval(-i.high, -i.value, -i.low)


def draw(records: list[Record]) -> Canvas:
    """One panel a group size and shift."""
    places = sorted({(r["group_size"], r["shift"]) for r in records})
    with canvas(len(places), width=4.6, height=3.2) as (figure, panels):
        for ax, (n, shift) in zip(panels, places, strict=True):
            here = chosen(records, shift=shift, group_size=n)
            for y, name in enumerate(reversed(PARTS)):
                interval = mean_interval(r["average"] for r in chosen(here, method=name))
                color = ALARM if lost(here, name) else ACCENT
                ax.plot([max(interval.low, 0), min(interval.high, 1)], [y, y], color=color, linewidth=1.4)
                ax.plot(interval.value, y, "o", color=color, markersize=4)
                if lost(here, name):
                    ax.text(1.03, y, lost_of(here, name), va="center", fontsize=7, color=color)
            ax.set_yticks(range(len(PARTS)), list(reversed(PARTS)), fontsize=7)
            ax.set(
                xlim=(-0.02, 1.25),
                title=f"groups of {n}, rewards {shift:+g}" if shift else f"groups of {n}",
                xlabel="value averaged over training",
            )
    return figure


EXPERIMENT = Experiment("ablation", "Which part of OPOB earns what in learning?", ("C10",), settings, run, analyse)
