"""Transformers on stale rollouts: who collapses on math, reasoning and tool use, and does VCPO not?

A character-level Llama, warm-started on a task of each kind to a known success rate, learns through
`llm_bridge.training`, the trainer that `python -m llm_bridge.train` runs: a queue of rollouts that are `lag` updates
old, exact score norms, Adam. All methods share the warm start, the problems and the random numbers of the sampler, so
they are compared run by run. The value is the success rate on held-out problems, the same ones for every run, sampled
every few updates. As in `vcposim.learning.collapse`, a run is lost if from some evaluation to its end it stays
below half of its own best.

Methods are compared at one common step size. VCPO, its parts and the synchronous references are also compared each at
the better of two, chosen on the seeds of the other parity. Two controls take VCPO's multipliers and no information:
their mean as a constant, and the schedule of a run with another seed.
"""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from matplotlib.figure import Figure as Canvas

from simulations.drawing import canvas, color, legend_beside
from simulations.methods import (
    METHODS,
    REFERENCES,
    Method,
    at_own_best,
    better,
    chosen,
    lost,
    lost_of,
    matches,
    mean_interval,
    paired,
)
from simulations.protocol import Analysis, Experiment, Figure, Record, Setting, Verdict
from simulations.stats import Interval
from vcposim.commands.figures import ACCENT, ALARM, INK, MUTED
from vcposim.control import matched_constant
from vcposim.learning.collapse import NEVER, collapse_step

TASKS = {"math": ("addition", 5), "reasoning": ("shortest_path", 8), "tool use": ("calculator", 24)}
"""kind -> the task that stands for it, and the tokens of a trajectory"""
COMPARED: dict[str, Method] = {
    **{name: METHODS[name] for name in (*REFERENCES[:2], "no correction", "sequence TIS", "sequence MIS", "GSPO")},
    **{name: METHODS[name] for name in ("leverage-damped mean", "ESS only", "OPOB only", "VCPO")},
    "leave-one-out OPOB": Method("vcpo_leave_one_out"),
}
PARTS = ("sequence TIS", "ESS only", "OPOB only")
"""what VCPO is made of"""
TUNED = (*REFERENCES[:2], *PARTS, "VCPO")
"""methods that have both step sizes; the others have the common one"""
RIVALS = tuple(name for name in COMPARED if name not in (*REFERENCES, *PARTS[1:], "VCPO"))
STEP_SIZES = (0.0003, 0.0006)
COMMON = STEP_SIZES[-1]
LASTING = 2
"""evaluations that make up the final value, and that a collapse lasts at least"""
TARGET = 0.1
"""of time-to-target: this share of the way from the warm start to 1"""
GAUGES = ("ess_fraction_sequence", "khat", "mean_weight", "step_scale", "gradient_norm")
MARGIN = 0.05
"""a difference of success rates that still counts as a match"""


def settings(size: str) -> list[Setting]:
    """Kinds of task x step sizes x methods x seeds, one run each."""
    full = size == "full"
    length = {"updates": 80, "every": 10, "held_out": 256} if full else {"updates": 8, "every": 2, "held_out": 32}
    return [
        {"kind": kind, "method": method, "step_size": step, "lag": 16 if full else 4, "seed": seed, **length}
        for step in (STEP_SIZES[::-1] if full else (COMMON,))
        for kind in (TASKS if full else ["reasoning"])
        for method in _methods(full, step)
        for seed in range(3 if full else 2)
    ]


def _methods(full: bool, step: float) -> tuple[str, ...]:
    if not full:
        return "synchronous, mean", "sequence TIS", "VCPO"
    return (*COMPARED, *CONTROLS) if step == COMMON else TUNED


def run(setting: Setting) -> list[Record]:
    """One record: held-out success rates, and what the run's gauges read on average."""
    name = setting["method"]
    value, seen = learned(setting, "VCPO", **CONTROLS[name](setting)) if name in CONTROLS else learned(setting, name)
    gauges = {gauge: _mean(r[gauge] for r in seen) for gauge in GAUGES}
    return [{**setting, "task": TASKS[setting["kind"]][0], **outcome(value, setting["every"]), **gauges}]


def learned(setting: Setting, name: str, **step: Any) -> tuple[list[float], list[Record]]:
    """Held-out success rates, and the trainer's records, of a method by name; `step` replaces its step rule."""
    from llm_bridge.training import TrainConfig, Trainer

    method, (task, tokens) = COMPARED[name], TASKS[setting["kind"]]
    trainer = Trainer(
        TrainConfig(
            task=task,
            max_new_tokens=tokens,
            base_rate=0.3,
            estimator=method.estimator,
            lag=setting["lag"] if method.stale else 0,
            lr=setting["step_size"],
            optimizer="adam",
            updates=setting["updates"],
            extend=False,
            seed=setting["seed"],
            **{"step_rule": method.control.rule, **step},
        )
    )
    value, seen = [trainer.evaluate(setting["held_out"])["success_rate"]], []
    for record in trainer.updates():
        seen.append(record)
        if trainer.version % setting["every"] == 0:
            value.append(trainer.evaluate(setting["held_out"])["success_rate"])
    return value, seen


def _multipliers(setting: Setting) -> list[float]:
    return [record["step_scale"] for record in learned(setting, "VCPO")[1]]


def _constant(setting: Setting) -> dict[str, Any]:
    return {"step_rule": "constant", "step_value": float(matched_constant(np.array(_multipliers(setting))))}


def _replay(setting: Setting) -> dict[str, Any]:
    return {"step_rule": "replay", "step_schedule": _multipliers({**setting, "seed": setting["seed"] + 1})}


CONTROLS: dict[str, Callable[[Setting], dict[str, Any]]] = {
    "VCPO, matched constant": _constant,
    "VCPO, replayed schedule": _replay,
}
"""name -> the step rule that a run of VCPO leaves behind"""


def outcome(value: list[float], every: int) -> Record:
    """What a series of success rates, `every` updates apart, came to; `collapse` and `hit` are updates, or None."""
    rate = np.asarray(value)
    gone = int(collapse_step(rate[:, None], stay=LASTING)[0])
    target = rate[0] + TARGET * (1 - rate[0])
    return {
        "value": value,
        "final": float(rate[-LASTING:].mean()),
        "average": float(rate.mean()),
        "collapse": None if gone == NEVER else gone * every,
        "hit": int((rate >= target).argmax()) * every if (rate >= target).any() else None,
    }


def _mean(values: Iterable[float | None]) -> float | None:
    known = [v for v in values if v is not None and np.isfinite(v)]
    return float(np.mean(known)) if known else None


# --- analysis ---------------------------------------------------------------------------------------------------------


def analyse(records: list[Record]) -> Analysis:
    """All claims, at the common step size and at each method's own best; C16 as the throughput it takes."""
    common, best = chosen(records, step_size=COMMON), own_best(records)
    verdicts = [_rivals(common, f"at one step size ({COMMON:g})"), *_parts(common, best)]
    verdicts += [_synchronous(common, best, name) for name in _present(best, REFERENCES)]
    verdicts += [_speed(best), _kinds(common), *_brake(common)]
    caption = (
        f"Held-out success rate while learning, lag {records[0]['lag']}, step size {COMMON:g}: mean over seeds. "
        "Gray: synchronous training with the mean baseline (solid) and OPOB (dashed)."
    )
    ranks = (
        "Success rate averaged over training, all methods at the common step size (left) and those with two step sizes "
        "each at its own best (right): mean over tasks and seeds with 95% interval; red where runs collapsed, how many "
        "is written beside."
    )
    return Analysis(
        verdicts,
        [Figure("learning_curves", draw_curves, caption, alt=caption), Figure("all_methods", draw_ranks, ranks, ranks)],
    )


def own_best(records: list[Record]) -> list[Record]:
    """Each method at its own best step size for each kind of task."""
    kinds, methods = (list(dict.fromkeys(r[field] for r in records)) for field in ("kind", "method"))
    return [r for kind in kinds for method in methods for r in at_own_best(chosen(records, kind=kind), method)]


def _value(records: list[Record], name: str) -> Interval:
    return mean_interval(r["average"] for r in chosen(records, method=name))


def _told(records: list[Record], name: str) -> str:
    return f"{name} {_value(records, name)} ({lost_of(records, name)} lost)"


def _present(records: list[Record], names: Iterable[str]) -> list[str]:
    return [name for name in names if chosen(records, method=name)]


def _rivals(records: list[Record], where: str) -> Verdict:
    names = _present(records, RIVALS)
    ours = lost(records, "VCPO")
    gains = {name: paired(records, "VCPO", name, "average") for name in names}
    as_well = [name for name in names if lost(records, name) <= ours and gains[name].low <= 0]
    word = "holds" if not as_well and ours == 0 else "fails"
    return Verdict(
        "C13",
        f"transformers, lag {records[0]['lag']}, {where}: the rivals collapse or learn less, and VCPO does not",
        word,
        f"success rate averaged over training: {_told(records, 'VCPO')}; "
        + "; ".join(_told(records, name) for name in names)
        + f". {len(as_well)} of {len(names)} rivals and controls lose no more runs and are not surely behind",
    )


def _parts(common: list[Record], best: list[Record]) -> list[Verdict]:
    out = []
    for records, where in ((common, f"step size {COMMON:g}"), (best, "each at its own best step size")):
        gains = {name: paired(records, "VCPO", name, "average") for name in _present(records, PARTS)}
        word, condition = better(gains.values(), MARGIN)
        out.append(
            Verdict(
                "C14",
                f"transformers: ESS scaling and OPOB together beat neither and either alone ({where})",
                word,
                "VCPO minus " + ", minus ".join(f"{name} {gain}" for name, gain in gains.items()),
                condition,
            )
        )
    return out


def _synchronous(common: list[Record], best: list[Record], name: str) -> Verdict:
    final, average = (paired(best, "VCPO", name, field) for field in ("final", "average"))
    word, condition = matches(final, average, MARGIN)
    return Verdict(
        "C15",
        f"transformers: VCPO at lag {best[0]['lag']} matches {name} (each at its own best step size)",
        word,
        f"difference of final success rates {final}, averaged over training {average}; at the common step size "
        f"{paired(common, 'VCPO', name, 'final')} and {paired(common, 'VCPO', name, 'average')}",
        condition,
    )


def _speed(best: list[Record]) -> Verdict:
    """Asynchronous updates must come this much faster to break even."""
    hits = {name: {(r["kind"], r["seed"]): r["hit"] for r in chosen(best, method=name)} for name in COMPARED}
    both = [key for key, hit in hits["VCPO"].items() if hit and hits["synchronous, mean"].get(key)]
    logs = [np.log(hits["VCPO"][key] / hits["synchronous, mean"][key]) for key in both]
    ratio = Interval(*np.exp(mean_interval(logs))) if logs else None
    arrived = f"{len(both)} of {len(hits['VCPO'])} pairs of runs reach the target"
    statement = "transformers: asynchronous VCPO reaches its target sooner than synchronous training with the mean"
    if ratio is None:
        return Verdict("C16", statement, "fails", arrived)
    need = f"its updates come at least {ratio.value:.3g} times as fast (see pipeline_speedup for what pipelines give)"
    number = f"updates to target, VCPO over synchronous, geometric mean: {ratio}; {arrived}"
    return Verdict("C16", statement, "holds if", number, need)


def _kinds(common: list[Record]) -> Verdict:
    kinds = list(dict.fromkeys(r["kind"] for r in common))
    parts, gains = [], []
    for kind in kinds:
        records = chosen(common, kind=kind)
        gains.append(paired(records, "VCPO", "sequence TIS", "average"))
        parts.append(f"{kind} ({records[0]['task']}): {gains[-1]}, {_told(records, 'sequence TIS')}")
    word, condition = better(gains, MARGIN)
    return Verdict(
        "C20",
        f"transformers, step size {COMMON:g}: VCPO does better than sequence TIS on math, reasoning and tool use alike",
        word,
        "VCPO minus sequence TIS, averaged over training: " + "; ".join(parts),
        condition,
    )


def _brake(common: list[Record]) -> list[Verdict]:
    """Does looking at the batch gain anything over its mean effect?"""
    gains = {name: paired(common, "VCPO", name, "average") for name in _present(common, CONTROLS)}
    if not gains:
        return []
    word, condition = better(gains.values(), MARGIN)
    return [
        Verdict(
            "C11",
            f"transformers, step size {COMMON:g}: VCPO's brake does better than the same multipliers without a look "
            "at the batch",
            word,
            f"success rate averaged over training: {_told(common, 'VCPO')}; "
            + "; ".join(f"{_told(common, name)}, VCPO minus this {gain}" for name, gain in gains.items()),
            condition,
        )
    ]


# --- figures ----------------------------------------------------------------------------------------------------------

CURVES = ("no correction", "sequence TIS", "ESS only", "OPOB only", "VCPO")


def draw_curves(records: list[Record]) -> Canvas:
    """A panel a kind of task: success rate against updates."""
    records = chosen(records, step_size=COMMON)
    kinds = list(dict.fromkeys(r["kind"] for r in records))
    with canvas(len(kinds), width=3.8) as (figure, panels):
        for ax, kind in zip(panels, kinds, strict=True):
            for name, style in zip(REFERENCES[:2], ("-", "--"), strict=True):
                _curve(ax, chosen(records, kind=kind, method=name), name, color=MUTED, linestyle=style)
            for number, name in enumerate(CURVES):
                _curve(ax, chosen(records, kind=kind, method=name), name, color=color(number), linewidth=1.4)
            ax.set(title=kind, xlabel="update", ylim=(0, 1.02))
        panels[0].set_ylabel("held-out success rate")
        legend_beside(figure, panels[0])
    return figure


def _curve(ax: Any, runs: list[Record], name: str, **style: Any) -> None:
    if runs:
        rate = np.mean([r["value"] for r in runs], axis=0)
        ax.plot(np.arange(len(rate)) * runs[0]["every"], rate, label=name, **style)


def draw_ranks(records: list[Record]) -> Canvas:
    """All methods from best to worst, at the common step size and at their own best."""
    with canvas(2, width=4.6, height=3.8) as (figure, panels):
        tuned = [r for r in own_best(records) if r["method"] in TUNED]
        both = ((chosen(records, step_size=COMMON), f"step size {COMMON:g}"), (tuned, "own best step size of two"))
        for ax, (some, title) in zip(panels, both, strict=True):
            _ranks(ax, some)
            ax.set_title(title)
    return figure


def _ranks(ax: Any, records: list[Record]) -> None:
    values = {name: _value(records, name) for name in _present(records, (*COMPARED, *CONTROLS))}
    ordered = sorted(values, key=lambda name: values[name].value)
    for y, name in enumerate(ordered):
        interval, gone = values[name], lost(records, name)
        ink = ALARM if gone else ACCENT if name in ("VCPO", *PARTS[1:]) else INK
        ax.plot([max(interval.low, 0), min(interval.high, 1)], [y, y], color=ink, linewidth=1.4)
        ax.plot(interval.value, y, "o", color=ink, markersize=4)
        if gone:
            ax.text(1.04, y, f"{lost_of(records, name)} lost", va="center", fontsize=7, color=ALARM)
    ax.set_yticks(range(len(ordered)), ordered, fontsize=7)
    ax.set(xlim=(-0.02, 1.3), xlabel="success rate averaged over training")


EXPERIMENT = Experiment(
    "transformer_collapse",
    "Which methods survive stale rollouts with transformers, on math, reasoning and tool use?",
    ("C11", "C13", "C14", "C15", "C16", "C20"),
    settings,
    run,
    analyse,
    extra="llm",
)
