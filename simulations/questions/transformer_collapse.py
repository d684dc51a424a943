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
from typing import Any, TypedDict, Unpack

import numpy as np

from simulations.drawing import MUTED, Plot, panel, plot, series
from simulations.methods import (
    METHODS,
    SYNCHRONOUS,
    Method,
    at_own_best,
    chosen,
    gain,
    own_methods,
    told,
    value_ranking,
)
from simulations.protocol import OWN, Analysis, Comparison, Experiment, Figure, Question, Record, Rule, Setting, judge
from simulations.stats import of_seeds
from vcposim.control import matched_constant
from vcposim.learning.collapse import NOT_COLLAPSED, collapse_step

TASKS = {"math": ("addition", 5), "reasoning": ("shortest_path", 8), "tool use": ("calculator", 24)}
"""kind -> the task that stands for it, and the tokens of a trajectory"""
COMPARED: dict[str, Method] = {
    **{name: METHODS[name] for name in (*SYNCHRONOUS[:2], "no correction", "sequence TIS", "sequence MIS", "GSPO")},
    **{name: METHODS[name] for name in ("leverage-damped mean", "ESS only", "OPOB only", "VCPO")},
    "leave-one-out OPOB": Method("vcpo_leave_one_out"),
}
PARTS = ("sequence TIS", "ESS only", "OPOB only")
"""what VCPO is made of"""
TUNED = (*SYNCHRONOUS[:2], *PARTS, "VCPO")
"""methods that have both step sizes; the others have the common one"""
RIVALS = tuple(name for name in COMPARED if name not in (*SYNCHRONOUS, *PARTS[1:], "VCPO"))
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
    """One record a run: held-out success rates, and what its gauges read on average."""
    name = setting["method"]
    value, seen = learned(setting, "VCPO", **CONTROLS[name](setting)) if name in CONTROLS else learned(setting, name)
    gauges = {gauge: _mean(r[gauge] for r in seen) for gauge in GAUGES}
    about = {key: value for key, value in setting.items() if key != OWN}
    record = {**about, "task": TASKS[setting["kind"]][0], **outcome(value, setting["every"]), **gauges}
    # estimators of anyone's run where VCPO does, once a place
    others = [] if name != "VCPO" else [run({**about, "method": other})[0] for other in own_methods(setting)]
    return [record, *others]


class StepSettings(TypedDict, total=False):
    """The settings of a trainer's step rule."""

    step_rule: str
    step_value: float
    step_schedule: tuple[float, ...]


def learned(setting: Setting, name: str, **step: Unpack[StepSettings]) -> tuple[list[float], list[Record]]:
    """Held-out success rates, and the trainer's records, of a method by name; `step` replaces its step rule."""
    from llm_bridge.training import TrainConfig, Trainer

    method, (task, tokens) = COMPARED.get(name) or Method(name), TASKS[setting["kind"]]
    rule: StepSettings = {"step_rule": method.control.rule, **step}
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
            **rule,
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


def _constant(setting: Setting) -> StepSettings:
    return {"step_rule": "constant", "step_value": float(matched_constant(np.array(_multipliers(setting))))}


def _replay(setting: Setting) -> StepSettings:
    return {"step_rule": "replay", "step_schedule": tuple(_multipliers({**setting, "seed": setting["seed"] + 1}))}


CONTROLS: dict[str, Callable[[Setting], StepSettings]] = {
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
        "collapse": None if gone == NOT_COLLAPSED else gone * every,
        "hit": int((rate >= target).argmax()) * every if (rate >= target).any() else None,
    }


def _mean(values: Iterable[float | None]) -> float | None:
    known = [v for v in values if v is not None and np.isfinite(v)]
    return float(np.mean(known)) if known else None


# --- analysis ---------------------------------------------------------------------------------------------------------


def analyse(records: list[Record]) -> Analysis:
    """All claims, at the common step size and at each method's own best; C16 as the throughput it takes."""
    common, best = chosen(records, step_size=COMMON), own_best(records)
    lag = records[0]["lag"] if records else 0
    asked = [_rivals(common, lag), *_parts(common, best), *(_synchronous(best, name, lag) for name in SYNCHRONOUS[:2])]
    asked += [_sooner(best), _kinds(common), _brake(common)]
    caption = (
        f"Held-out success rate while learning, lag {lag}, step size {COMMON:g}: mean over seeds. "
        "Gray: synchronous training with the mean baseline (solid) and OPOB (dashed)."
    )
    ranks = (
        "Success rate averaged over training, all methods at the common step size (first) and those "
        "with two step sizes "
        "each at its own best: mean over tasks and seeds with 95% interval; how many runs collapsed stands beside."
    )
    figures = [
        Figure("learning_curves", curve_figure(records), caption, alt=caption),
        Figure("all_methods", rank_figure(records), ranks, alt=ranks),
    ]
    return Analysis(judge(asked), figures)


def own_best(records: list[Record]) -> list[Record]:
    """Each method at its own best step size for each kind of task."""
    kinds, methods = (list(dict.fromkeys(r[field] for r in records)) for field in ("kind", "method"))
    return [r for kind in kinds for method in methods for r in at_own_best(chosen(records, kind=kind), method)]


def _present(records: list[Record], names: Iterable[str]) -> list[str]:
    return [name for name in names if chosen(records, method=name)]


def _rivals(common: list[Record], lag: int) -> Question:
    return Question(
        "beats_rivals",
        "C13",
        f"transformers, lag {lag}, at one step size ({COMMON:g}): VCPO does better than every rival and simple control",
        Rule("success rate averaged over training, VCPO minus rival", ">", 0.0, MARGIN),
        [Comparison(name, gain(common, "VCPO", name)) for name in RIVALS],
        witness="transformer",
        note=told(common, ("VCPO", *RIVALS)),
    )


def _parts(common: list[Record], best: list[Record]) -> list[Question]:
    return [
        Question(
            f"both_parts_{key}",
            "C14",
            f"transformers: ESS scaling and OPOB together beat neither and either alone ({where})",
            Rule("success rate averaged over training, VCPO minus the other", ">", 0.0, MARGIN),
            [Comparison(f"VCPO minus {name}", gain(records, "VCPO", name)) for name in PARTS],
            witness="transformer",
            note=told(records, (*PARTS, "VCPO")),
        )
        for records, key, where in (
            (common, "common", f"step size {COMMON:g}"),
            (best, "own", "each at its own best step size"),
        )
    ]


def _synchronous(best: list[Record], name: str, lag: int) -> Question:
    fields = {"final": "final values", "average": "on the way there"}
    return Question(
        f"matches_{'mean' if name == SYNCHRONOUS[0] else 'opob'}",
        "C15",
        f"transformers: VCPO at lag {lag} matches {name} (each at its own best step size)",
        Rule("success rate, VCPO minus synchronous", ">", 0.0, -MARGIN),
        [Comparison(words, gain(best, "VCPO", name, field)) for field, words in fields.items()],
        "where",
        "transformer",
    )


def _sooner(best: list[Record]) -> Question:
    """Updates alone: what a pipeline gives on top is the business of `pipeline_speedup`."""
    hits = {
        name: {(r["kind"], r["seed"]): r["hit"] for r in chosen(best, method=name)} for name in ("VCPO", SYNCHRONOUS[0])
    }
    both = [key for key, hit in hits["VCPO"].items() if hit and hits[SYNCHRONOUS[0]].get(key)]
    ratio = of_seeds(((key[1], hits["VCPO"][key] / hits[SYNCHRONOUS[0]][key]) for key in both), scale="log")
    return Question(
        "as_few_updates",
        "C16",
        "transformers: asynchronous VCPO needs no more updates to its target than synchronous training with the mean",
        Rule("updates to target, VCPO over synchronous", "<", 1.0, 0.1),
        [Comparison("pairs of runs that both arrive", ratio)],
        witness="transformer",
        note=f"{len(both)} of {len(hits['VCPO'])} pairs of runs reach the target",
    )


def _kinds(common: list[Record]) -> Question:
    kinds = {kind: chosen(common, kind=kind) for kind in TASKS}
    return Question(
        "all_kinds",
        "C20",
        f"transformers, step size {COMMON:g}: VCPO does better than sequence TIS on math, reasoning and tool use alike",
        Rule("success rate averaged over training, VCPO minus sequence TIS", ">", 0.0, MARGIN),
        [Comparison(f"{kind} ({TASKS[kind][0]})", gain(some, "VCPO", "sequence TIS")) for kind, some in kinds.items()],
        "where",
        "transformer",
    )


def _brake(common: list[Record]) -> Question:
    """Does looking at the batch gain anything over its mean effect?"""
    return Question(
        "brake_beats_controls",
        "C11",
        f"transformers, step size {COMMON:g}: VCPO's brake does better than the same multipliers without a look at the "
        "batch",
        Rule("success rate averaged over training, VCPO minus control", ">", 0.0, MARGIN),
        [Comparison(name, gain(common, "VCPO", name)) for name in CONTROLS],
        witness="transformer",
        note=told(common, ("VCPO", *CONTROLS)),
    )


# --- figures ----------------------------------------------------------------------------------------------------------

CURVES = ("no correction", "sequence TIS", "ESS only", "OPOB only", "VCPO")


def curve_figure(records: list[Record]) -> Plot:
    """A panel a kind of task: success rate against updates."""
    records = chosen(records, step_size=COMMON)
    panels = []
    for kind in dict.fromkeys(r["kind"] for r in records):
        parts = []
        names: list[tuple[str, dict[str, Any]]] = [
            (name, {"color": MUTED, "dashed": i == 1}) for i, name in enumerate(SYNCHRONOUS[:2])
        ]
        names += [(name, {"color": number}) for number, name in enumerate(CURVES)]
        for name, style in names:
            runs = chosen(records, kind=kind, method=name)
            if runs:
                rate = np.mean([r["value"] for r in runs], axis=0)
                parts.append(series(name, np.arange(len(rate)) * runs[0]["every"], rate, **style))
        panels.append(panel(kind, "update", "held-out success rate", parts, ylim=[0, 1.02]))
    return plot(*panels, width=3.8, columns=3)


def rank_figure(records: list[Record]) -> Plot:
    """All methods from best to worst, at the common step size and at their own best."""
    tuned = [r for r in own_best(records) if r["method"] in TUNED]
    both = ((chosen(records, step_size=COMMON), f"step size {COMMON:g}"), (tuned, "own best step size of two"))
    names = (*COMPARED, *CONTROLS)
    panels = [value_ranking(title, some, _present(some, names), ("VCPO", *PARTS[1:])) for some, title in both]
    return plot(*panels, width=4.8, height=3.6)


EXPERIMENT = Experiment(
    "transformer_collapse",
    "Which methods survive stale rollouts with transformers, on math, reasoning and tool use?",
    ("C11", "C13", "C14", "C15", "C16", "C20"),
    settings,
    run,
    analyse,
    extra="llm",
    takes_estimators=True,
)
