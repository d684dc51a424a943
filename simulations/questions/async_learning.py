"""Which methods survive stale rollouts at one common step size, and does VCPO match synchronous training?

Every method of the paper's comparison learns the same warm-started tasks from the same random numbers, through a small
network whose rows interfere. Synchronous training is there with the mean baseline, with OPOB and with no baseline: a
method that beats stale rivals may owe it to its baseline, which synchronous training can have too. Values are exact.
`best_step_size` asks the same with each method at its own best step size.
"""

from typing import Any

from matplotlib.figure import Figure as Canvas

from simulations.drawing import canvas
from simulations.methods import (
    METHODS,
    REFERENCES,
    TARGET,
    better,
    chosen,
    lost,
    lost_of,
    matches,
    mean_interval,
    outcome,
    paired,
    run_of,
    trace,
)
from simulations.protocol import Analysis, Experiment, Figure, Record, Setting, Verdict
from vcposim.commands.figures import ACCENT, ALARM, INK, MUTED
from vcposim.learning.lags import Lag

STEP_SIZE = 0.024
OURS = ("VCPO", "VCPO as released", "VCPO with GRPO std", "ESS only", "OPOB only")
SIMPLE = ("no correction, no baseline", "sequence IS, no baseline", "leverage-damped mean")
"""controls without the paper's two ingredients"""
MARGIN = 0.02
"""the difference of final values that still counts as a match"""


def settings(size: str) -> list[Setting]:
    """Tasks and lag laws x blocks of seeds; all methods are in each."""
    full = size == "full"
    places = [("exact_match_8", "fixed")]
    if full:
        places += [("exact_match_8", "in_flight"), ("several_targets", "uniform"), ("modular_sum", "fixed")]
    blocks = [range(first, first + 8) for first in range(0, 16, 8)] if full else [range(0, 3), range(3, 5)]
    return [
        {"task": name, "law": law, "lag": 16, "seeds": list(block), "updates": 300 if full else 200}
        for name, law in places
        for block in blocks
    ]


def run(setting: Setting) -> list[Record]:
    """One record for each method and seed."""
    keys = [(name, seed) for name in METHODS for seed in setting["seeds"]]
    lag = Lag(setting["lag"], setting["law"])
    runs = [run_of(METHODS[name], lag, seed=seed, step_size=STEP_SIZE) for name, seed in keys]
    found = trace(setting["task"], runs, setting["updates"], truth_every=40)
    place = {key: setting[key] for key in ("task", "law", "lag")}
    return [
        {**place, "method": name, "seed": seed, **outcome(found, i), "cosine": float(found["true_cosine"][:, i].mean())}
        for i, (name, seed) in enumerate(keys)
    ]


def analyse(records: list[Record]) -> Analysis:
    """Verdicts on C13, C14, C15 and C19 at the common step size."""
    caption = (
        f"Exact success probability averaged over training, one step size ({STEP_SIZE:g}) for all methods, lag "
        f"{records[0]['lag']}: mean over seeds with 95% interval. Red: at least one run collapsed; how many is written "
        "beside. Lines: synchronous training with the mean baseline (gray) and with OPOB (blue)."
    )
    verdicts = [_rivals(records), _both(records), *_synchronous(records), _std(records)]
    return Analysis(verdicts, [Figure("value_of_every_method", draw, caption, alt=caption)])


def _rivals(records: list[Record]) -> Verdict:
    ours = lost(records, "VCPO")
    rivals = [name for name in METHODS if name not in REFERENCES and name not in OURS]
    as_well = [name for name in rivals if lost(records, name) <= ours]
    table = "; ".join(f"{name} {lost_of(records, name)}" for name in rivals)
    word = "holds" if not as_well and ours == 0 else "fails"
    return Verdict(
        "C13",
        f"at one common step size ({STEP_SIZE:g}, lag {records[0]['lag']}) the rivals collapse and VCPO does not",
        word,
        f"collapsed runs: VCPO {lost_of(records, 'VCPO')}; {table}. {len(as_well)} of {len(rivals)} rivals and simple "
        "controls lose no more runs than VCPO",
    )


def _both(records: list[Record]) -> Verdict:
    parts = ("sequence TIS", "ESS only", "OPOB only", "VCPO")
    gains = {name: paired(records, "VCPO", name, "average") for name in parts[:3]}
    alone = {name: paired(records, name, "sequence TIS", "average") for name in parts[1:3]}
    word, condition = better(gains.values())
    values = "; ".join(
        f"{name} {mean_interval(r['average'] for r in chosen(records, method=name))} ({lost_of(records, name)} lost)"
        for name in parts
    )
    return Verdict(
        "C14",
        "ESS scaling and OPOB together do better than neither, and than either alone (common step size)",
        word,
        f"value averaged over training: {values}; VCPO minus "
        + ", minus ".join(f"{name} {gain}" for name, gain in gains.items())
        + "; minus sequence TIS: "
        + ", ".join(f"{name} {gain}" for name, gain in alone.items()),
        condition,
    )


def _synchronous(records: list[Record]) -> list[Verdict]:
    out = []
    for name in REFERENCES[:2]:
        final, average = paired(records, "VCPO", name, "final"), paired(records, "VCPO", name, "average")
        word, condition = matches(final, average, MARGIN)
        out.append(
            Verdict(
                "C15",
                f"VCPO at lag {records[0]['lag']} matches {name}",
                word,
                f"difference of final values {final}, of values averaged over training {average}; updates to "
                f"{TARGET:g}: {_hits(records, 'VCPO')} against {_hits(records, name)}; collapsed "
                f"{lost_of(records, 'VCPO')} against {lost_of(records, name)}",
                condition,
            )
        )
    return out


def _hits(records: list[Record], method: str) -> str:
    hits = [r["hit"] for r in chosen(records, method=method)]
    found = [h for h in hits if h is not None]
    return f"{mean_interval(found)} (reached by {len(found)} of {len(hits)})" if found else "never"


def _std(records: list[Record]) -> Verdict:
    gain = paired(records, "VCPO with GRPO std", "VCPO", "average")
    word, condition = better([gain])
    return Verdict(
        "C19",
        "dividing by the group's std improves VCPO in learning (common step size)",
        word,
        f"difference of values averaged over training {gain}; collapsed "
        f"{lost_of(records, 'VCPO with GRPO std')} against {lost_of(records, 'VCPO')}",
        condition,
    )


def draw(records: list[Record]) -> Canvas:
    """One panel a task and lag law: methods from best to worst."""
    places = list(dict.fromkeys((r["task"], r["law"]) for r in records))
    with canvas(len(places), width=5.4, height=5.6) as (figure, panels):
        for ax, (name, law) in zip(panels, places, strict=True):
            _panel(ax, chosen(records, task=name, law=law))
            ax.set_title(f"{name}, {law} lag")
    return figure


def _panel(ax: Any, records: list[Record]) -> None:
    values = {name: mean_interval(r["average"] for r in chosen(records, method=name)) for name in METHODS}
    ordered = sorted(values, key=lambda name: values[name].value)
    for y, name in enumerate(ordered):
        interval, gone = values[name], lost(records, name)
        color = ALARM if gone else ACCENT if name in OURS else INK
        ax.plot([max(interval.low, 0), min(interval.high, 1)], [y, y], color=color, linewidth=1.4)
        ax.plot(interval.value, y, "o", color=color, markersize=4)
        if gone:
            ax.text(1.04, y, f"{lost_of(records, name)} collapsed", va="center", fontsize=7, color=ALARM)
    for name, color in zip(REFERENCES[:2], (MUTED, ACCENT), strict=True):
        ax.axvline(values[name].value, color=color, linewidth=0.8, zorder=0)
    ax.set_yticks(range(len(ordered)), ordered, fontsize=7)
    for label, name in zip(ax.get_yticklabels(), ordered, strict=True):
        label.set_fontweight("bold" if name in OURS else "normal")
        label.set_fontstyle("italic" if name in REFERENCES else "normal")
    ax.set(xlim=(-0.02, 1.38), xlabel="value averaged over training")
    ax.set_xticks([0, 0.25, 0.5, 0.75, 1])


EXPERIMENT = Experiment(
    "async_learning",
    "Which methods survive stale rollouts at one step size, and does VCPO match synchronous training?",
    ("C13", "C14", "C15", "C19"),
    settings,
    run,
    analyse,
)
