"""Each method at its own best step size: what is left of the differences that a common step size shows?

A method that survives a step size at which others collapse may simply take smaller steps. Here every method has the
whole grid, and takes the step size at which it does best on average: chosen on half of the seeds, judged on the others,
and the other way round, so that no run helps to choose its own.
"""

from typing import Any

from matplotlib.figure import Figure as Canvas

from simulations.drawing import canvas
from simulations.methods import (
    METHODS,
    REFERENCES,
    best_of,
    better,
    chosen,
    lost,
    lost_of,
    matches,
    mean_interval,
    outcome,
    paired,
    run_of,
    step_sizes_of,
    trace,
)
from simulations.protocol import Analysis, Experiment, Figure, Record, Setting, Verdict
from vcposim.commands.figures import ACCENT, ALARM, INK, MUTED
from vcposim.learning.lags import Lag

OURS = ("VCPO", "VCPO as released", "VCPO with GRPO std", "ESS only", "OPOB only")
FEW = (
    *REFERENCES,
    "no correction",
    "no correction, no baseline",
    "sequence IS",
    "sequence TIS",
    "token TIS",
    "M2PO",
    "GSPO",
    "leverage-damped mean",
    "ESS only",
    "OPOB only",
    "VCPO",
)
"""the methods of the reduced form; the full one has all"""
MARGIN = 0.02


def settings(size: str) -> list[Setting]:
    """Step sizes x blocks of seeds; methods are in each."""
    full = size == "full"
    grid = (0.006, 0.012, 0.024, 0.048, 0.096) if full else (0.006, 0.024, 0.096)
    blocks = [range(first, first + 8) for first in range(0, 48, 8)] if full else [range(5)]
    return [
        {
            "step_size": e,
            "lag": 16,
            "seeds": list(block),
            "methods": list(METHODS if full else FEW),
            "updates": 200 if full else 120,
        }
        for e in grid
        for block in blocks
    ]


def run(setting: Setting) -> list[Record]:
    """One record for each method and seed."""
    keys = [(name, seed) for name in setting["methods"] for seed in setting["seeds"]]
    runs = [run_of(METHODS[m], Lag(setting["lag"]), seed=s, step_size=setting["step_size"]) for m, s in keys]
    found = trace("exact_match_8", runs, setting["updates"])
    return [
        {"method": m, "seed": s, "step_size": setting["step_size"], **outcome(found, i)}
        for i, (m, s) in enumerate(keys)
    ]


def analyse(records: list[Record]) -> Analysis:
    """C13, C14, C15 and C19 again, without the handicap of a common step size."""
    best = best_of(records)
    caption = (
        "Exact success probability averaged over training, each method at its own best step size (written beside): "
        "mean over seeds with 95% interval; red where a run collapsed even there. Bold: VCPO and its parts; italic: "
        "synchronous training, whose mean baseline (gray) and OPOB (blue) are also lines."
    )
    verdicts = [_rivals(best), _both(best), *(_synchronous(best, name) for name in REFERENCES[:2])]
    if chosen(best, method="VCPO with GRPO std"):  # the full form has it
        verdicts.append(_std(best))
    return Analysis(verdicts, [Figure("value_at_own_best_step_size", draw, caption, alt=caption)])


def _rivals(best: list[Record]) -> Verdict:
    rivals = [r for r in dict.fromkeys(r["method"] for r in best) if r not in REFERENCES and r not in OURS]
    gains = {name: paired(best, "VCPO", name, "average") for name in rivals}
    ahead = [name for name, gain in gains.items() if gain.high < 0]
    behind = [name for name, gain in gains.items() if gain.low > 0]
    return Verdict(
        "C13",
        "with each method at its own best step size, VCPO does better than every rival and simple control",
        "holds" if len(behind) == len(rivals) else "fails",
        f"VCPO minus rival, value averaged over training: better than {len(behind)} of {len(rivals)}, surely worse "
        f"than {len(ahead)} ({', '.join(ahead) or 'none'}); "
        + "; ".join(
            f"{name} {gain} (value {mean_interval(r['average'] for r in chosen(best, method=name))} at "
            f"{step_sizes_of(best, name)}, {lost_of(best, name)} lost)"
            for name, gain in gains.items()
        ),
    )


def _both(best: list[Record]) -> Verdict:
    gains = {name: paired(best, "VCPO", name, "average") for name in ("sequence TIS", "ESS only", "OPOB only")}
    alone = {name: paired(best, name, "sequence TIS", "average") for name in ("ESS only", "OPOB only")}
    word, condition = better(gains.values())
    return Verdict(
        "C14",
        "ESS scaling and OPOB together do better than neither, and than either alone (each at its own best step size)",
        word,
        "VCPO minus "
        + ", minus ".join(f"{name} {gain}" for name, gain in gains.items())
        + "; minus sequence TIS: "
        + ", ".join(f"{name} {gain}" for name, gain in alone.items())
        + f". Values: {_values(best, ('sequence TIS', 'ESS only', 'OPOB only', 'VCPO', *REFERENCES))}",
        condition,
    )


def _values(best: list[Record], names: tuple[str, ...]) -> str:
    return "; ".join(
        f"{name} {mean_interval(r['average'] for r in chosen(best, method=name))} (at {step_sizes_of(best, name)}, "
        f"{lost_of(best, name)} lost)"
        for name in names
    )


def _std(best: list[Record]) -> Verdict:
    gain = paired(best, "VCPO with GRPO std", "VCPO", "average")
    word, condition = better([gain])
    return Verdict(
        "C19",
        "dividing by the group's std improves VCPO in learning (each at its own best step size)",
        word,
        f"difference of values averaged over training {gain}. Values: {_values(best, ('VCPO', 'VCPO with GRPO std'))}",
        condition,
    )


def _synchronous(best: list[Record], name: str) -> Verdict:
    average = paired(best, "VCPO", name, "average")
    final = paired(best, "VCPO", name, "final")
    word, condition = matches(final, average, MARGIN)
    return Verdict(
        "C15",
        f"VCPO under lag matches {name}, each at its own best step size",
        word,
        f"difference of values averaged over training {average}, of final values {final}; step sizes "
        f"{step_sizes_of(best, 'VCPO')} and {step_sizes_of(best, name)}",
        condition,
    )


def draw(records: list[Record]) -> Canvas:
    """Methods from best to worst."""
    best = best_of(records)
    names = list(dict.fromkeys(r["method"] for r in best))
    values = {name: mean_interval(r["average"] for r in chosen(best, method=name)) for name in names}
    ordered = sorted(names, key=lambda name: values[name].value)
    with canvas(1, width=6.8, height=1.4 + 0.17 * len(names)) as (figure, (ax,)):
        for y, name in enumerate(ordered):
            _row(ax, y, name, best, values[name])
        for name, line in zip(REFERENCES[:2], (MUTED, ACCENT), strict=True):
            ax.axvline(values[name].value, color=line, linewidth=0.8, zorder=0, label=name)
        ax.text(1.06, len(ordered), "step size, collapsed", fontsize=7, color=MUTED)
        ax.set_yticks(range(len(ordered)), ordered, fontsize=7)
        for label, name in zip(ax.get_yticklabels(), ordered, strict=True):
            label.set_fontweight("bold" if name in OURS else "normal")
            label.set_fontstyle("italic" if name in REFERENCES else "normal")
        ax.set(xlim=(-0.02, 1.55), xlabel="value averaged over training, each method at its own best step size")
        ax.set_xticks([0, 0.25, 0.5, 0.75, 1])
        ax.legend(loc="center left", fontsize=7)
    return figure


def _row(ax: Any, y: int, name: str, best: list[Record], interval: Any) -> None:
    color = ALARM if lost(best, name) else ACCENT if name in OURS else INK
    ax.plot([max(interval.low, 0), min(interval.high, 1)], [y, y], color=color, linewidth=1.4)
    ax.plot(interval.value, y, "o", color=color, markersize=4)
    beside = step_sizes_of(best, name) + (f", {lost_of(best, name)}" if lost(best, name) else "")
    ax.text(1.06, y, beside, va="center", fontsize=7, color=color)


EXPERIMENT = Experiment(
    "best_step_size",
    "What is left of the differences when each method has its own best step size?",
    ("C13", "C14", "C15", "C19"),
    settings,
    run,
    analyse,
)
