"""Transformers at length: who learns from stale rollouts of dozens of tokens, in one thought or over several turns?

Trajectories of `transformer_collapse` have 5 to 24 tokens. Here a small character-level Llama writes chains of thought
of 64 tokens (the running sums of 64 digits, one slip spoils the answer) or works out a sum of up to 8 terms with a
calculator, one call a turn, in at most 64 tokens of its own. No prompt comes twice. It is warm-started on
demonstrations until it solves 40% of new problems.

Everybody shares the warm start, the problems and the random numbers, at three step sizes, and is judged at its own
best, chosen on seeds of the other parity. The value is the success rate on held-out problems, averaged over training.
GSPO's band is PPO's, 0.2: its own is for thousands of tokens. Runs of a setting go in lock-step
(`llm_bridge.training.lockstep`): they are `Trainer`'s own runs.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from simulations.drawing import MUTED, Plot, panel, plot, series
from simulations.methods import ESS, Method, at_edge, best_of, chosen, gain, told, value_of, value_ranking
from simulations.protocol import Analysis, Comparison, Experiment, Figure, Question, Record, Rule, Setting, judge
from simulations.questions.regime_map import RIVALS as SCALED
from simulations.questions.transformer_collapse import MARGIN, outcome


@dataclass(frozen=True)
class LongTask:
    """A task that stands for a kind: its name and options, the policy's own tokens in a trajectory at most, and the
    length of a whole trajectory at most, prompt and replies included."""

    task: str
    options: tuple[tuple[str, Any], ...]
    tokens: int
    step_sizes: tuple[float, ...]
    length: int = 144


KINDS = {
    "thought of 64": LongTask("running_sum", (("steps", 64), ("modulus", 5)), 65, (0.0001, 0.0003, 0.001)),
    "tool use": LongTask("calculator", (("terms", 8), ("digits", 1)), 64, (0.00003, 0.0001, 0.0003)),
}
"""the largest step size loses most runs at lag 16, in a trial of another seed; the smallest none"""
BASE_RATE = 0.4
RIVALS = {
    "TIS": Method("sequence_tis"),
    "MIS": Method("sequence_mis"),
    "GSPO": Method(SCALED["GSPO"]),
    "M2PO": Method("m2po"),
    "no correction": Method("dr_grpo"),
}
CANDIDATES = {
    "n2": Method("on_policy_optimal"),
    "n2, ESS step": Method("on_policy_optimal", ESS),
    "half n2": Method("half_optimal"),
    "n2, soft negatives": Method("n2_soft_negatives"),
    "n2, tempered": Method("n2_tempered"),
    "n2, capped influence": Method("n2_influence"),
    "OPOB stratified, ESS step": Method("vcpo_stratified", ESS),
}
SYNCHRONOUS = ("synchronous, mean", "synchronous, n2")
METHODS: dict[str, Method] = {
    "VCPO": Method("vcpo", ESS),
    **RIVALS,
    **CANDIDATES,
    SYNCHRONOUS[0]: Method("dr_grpo", stale=False),
    SYNCHRONOUS[1]: Method("on_policy_optimal", stale=False),
}
LEAD = "n2, ESS step"
"""the candidate that beat VCPO on short trajectories (simulations/LOG.md): named before these runs were made"""
LAGS = (64, 16, 4)
GAUGES = ("ess_fraction", "mean_weight", "step_scale", "gradient_norm")


def settings(size: str) -> list[Setting]:
    """Kinds x lags x step sizes x pairs of seeds, all methods each: a kind at one lag is complete before the next."""
    full = size == "full"
    long = {"updates": 96, "every": 16, "held_out": 128, "groups": 4, "group_size": 8}
    short = {"updates": 4, "every": 2, "held_out": 16, "groups": 2, "group_size": 4}
    return [
        {"task": kind, "lag": lag, "step_size": step, "seeds": [seed, seed + 1], **(long if full else short)}
        for lag in (LAGS if full else (2,))
        for kind in (KINDS if full else tuple(KINDS)[:1])
        for step in KINDS[kind].step_sizes[0 if full else 2 :]
        for seed in range(100, 108 if full else 102, 2)  # step sizes were chosen on seed 1
    ]


def run(setting: Setting) -> list[Record]:
    """One record for each method and seed."""
    return trained(setting, KINDS[setting["task"]], METHODS)


def trained(setting: Setting, kind: LongTask, methods: Mapping[str, Method]) -> list[Record]:
    """What each method's runs of a setting came to, one record for each seed."""
    from llm_bridge.training.lockstep import LockStep

    keys = [(name, seed) for name in methods for seed in setting["seeds"]]
    runs = LockStep([config(setting, kind, methods[name], seed) for name, seed in keys], lm=policy(kind))
    value, seen = [runs.evaluate(setting["held_out"])], []
    for record in runs.updates():
        seen.append(record)
        if runs.version % setting["every"] == 0:
            value.append(runs.evaluate(setting["held_out"]))
    gauges = {name: np.mean([r[name] for r in seen], axis=0) for name in GAUGES}
    place = {key: setting[key] for key in ("task", "lag", "step_size", "every", "updates")}
    return [
        {
            **place,
            "method": name,
            "seed": seed,
            **outcome([float(v[i]) for v in value], setting["every"]),
            **{gauge: _number(x[i]) for gauge, x in gauges.items()},
        }
        for i, (name, seed) in enumerate(keys)
    ]


def config(setting: Setting, kind: LongTask, method: Method, seed: int) -> Any:
    """The trainer's configuration of a run."""
    from llm_bridge.training import TrainConfig

    return TrainConfig(
        task=kind.task,
        task_options=dict(kind.options),
        max_new_tokens=kind.tokens,
        estimator=method.estimator,
        step_rule=method.control.rule,
        lag=setting["lag"] if method.stale else 0,
        lr=setting["step_size"],
        groups=setting["groups"],
        group_size=setting["group_size"],
        optimizer="adam",
        updates=setting["updates"],
        extend=False,
        seed=seed,
    )


@cache
def policy(kind: LongTask) -> Any:
    """The warm start of a kind, kept in the cache folder: about 15 CPU seconds for a thought, 60 for tool use.

    It has 28,320 parameters.
    """
    from llm_bridge.models import load_model
    from llm_bridge.models.warmup import Recipe
    from llm_bridge.tasks import load_task

    task = load_task(kind.task, **dict(kind.options))
    recipe = Recipe(every=100, lessons=4096, batch=32, checks=256)
    return load_model(
        "char", task=task, base_rate=BASE_RATE, recipe=recipe, hidden=32, layers=2, heads=2, length=kind.length
    )


def _number(x: float) -> float | None:
    return round(float(x), 6) if np.isfinite(x) else None


# --- analysis ---------------------------------------------------------------------------------------------------------


def where(record: Record) -> str:
    """A place in words."""
    return f"{record['task']}, lag {record['lag']}"


def analyse(records: list[Record]) -> Analysis:
    """C13, C14 and C15 at length: VCPO against its rivals, against n^2, and against synchronous training."""
    places = list(dict.fromkeys(where(r) for r in records))
    among = {p: [r for r in records if where(r) == p] for p in places}
    best = {p: best_of(own) for p, own in among.items()}

    def against(first: str, others: Iterable[str]) -> list[Comparison]:
        return [Comparison(f"{p}: {other}", gain(best[p], first, other)) for p in places for other in others]

    better = Rule("success rate averaged over training, first minus second, own best steps", ">", 0.0, MARGIN)
    as_good = Rule(better.statistic, ">", 0.0, -MARGIN)
    notes = {
        "beats_rivals": "; ".join(f"{p}: {told(best[p], ('VCPO', *RIVALS, *SYNCHRONOUS))}" for p in places),
        "lead_beats_vcpo": "; ".join(f"{p}: {told(best[p], CANDIDATES)}" for p in places),
        "vcpo_not_worse": at_edge(best, among),
    }
    asked: list[tuple[str, str, str, Rule, list[Comparison], bool]] = [
        ("beats_rivals", "C13", "VCPO learns better than TIS, MIS, GSPO, M2PO and no correction",
         better, against("VCPO", RIVALS), False),
        ("lead_beats_vcpo", "C13", "n^2 without ratios, with the ESS step, learns better than VCPO",
         better, against(LEAD, ["VCPO"]), True),
        ("vcpo_not_worse", "C13", "VCPO learns not worse than any candidate of ours",
         as_good, against("VCPO", CANDIDATES), True),
        ("simple_n2_not_worse", "C14", "VCPO's two parts learn not worse than the n^2 baseline alone",
         as_good, against("VCPO", ["n2"]), True),
        ("matches_synchronous", "C15", "VCPO under lag matches synchronous training with the mean",
         as_good, against("VCPO", SYNCHRONOUS[:1]), False),
        ("matches_best_synchronous", "C15", "VCPO under lag matches synchronous training with the n^2 baseline",
         as_good, against("VCPO", SYNCHRONOUS[1:]), False),
    ]  # fmt: skip
    questions = [
        Question(
            key,
            claim,
            f"transformers at length: {words}",
            rule,
            found,
            "where",
            "transformer",
            notes.get(key, ""),
            beside,
        )
        for key, claim, words, rule, found, beside in asked
    ]
    return Analysis(judge(questions), figures(best, among, "three"))


def figures(best: dict[str, list[Record]], among: dict[str, list[Record]], count: str) -> list[Figure]:
    """Who is ahead, at which step size, and how it came to that: `best` and `among` are the records of each place,
    each method at its own best, and at all step sizes, of which there are `count`."""
    ranks = (
        f"Success rate averaged over training, everyone at its own best of {count} step sizes: mean over seeds with "
        "95% interval; how many runs collapsed stands beside. Lines: synchronous training."
    )
    curves = (
        "Held-out success rate while learning, everyone at its own best step size: mean over seeds. Gray: synchronous "
        "training with the mean (solid) and n^2 (dashed)."
    )
    sizes = (
        "Success rate averaged over training at each step size: mean over seeds. A best at the first or last step size "
        "is a bound from below. Gray: synchronous training with n^2."
    )
    return [
        Figure("all_methods", rank_figure(best), ranks, alt=ranks),
        Figure("step_sizes", step_figure(among), sizes, alt=sizes),
        Figure("learning_curves", curve_figure(best), curves, alt=curves),
    ]


def rank_figure(best: dict[str, list[Record]]) -> Plot:
    """All methods from best to worst, a panel a place; with their mean ESS fraction."""
    panels = []
    for p, own in best.items():
        ess = [r["ess_fraction"] for r in own if r["method"] == "no correction" and r["ess_fraction"] is not None]
        seen = f" (ESS {np.mean(ess):.2f} without correction)" if ess else ""
        panels.append(value_ranking(p + seen, own, METHODS, ("VCPO",)))
    return plot(*panels, width=4.8, height=3.8, columns=2)


CURVES = ("VCPO", LEAD, "n2, soft negatives", "TIS", "GSPO", "no correction")


def step_figure(among: dict[str, list[Record]]) -> Plot:
    """Value against step size, a panel a place."""
    panels = []
    for p, own in among.items():
        parts, sizes = [], sorted({r["step_size"] for r in own})
        for number, name in enumerate((*CURVES[:4], SYNCHRONOUS[1])):
            values = [value_of(chosen(own, step_size=x), name) for x in sizes]
            rate = [math.nan if v is None else v.value for v in values]
            style: dict[str, Any] = {"color": MUTED, "dashed": True} if name in SYNCHRONOUS else {"color": number}
            parts.append(series(name, sizes, rate, **style))
        panels.append(
            panel(p, "step size", "success rate over training", parts, ylim=[0, 1.02], xscale="log", ticks=sizes)
        )
    return plot(*panels, width=3.8, columns=3)


def curve_figure(best: dict[str, list[Record]]) -> Plot:
    """Success rate against updates, a panel a place."""
    panels = []
    for p, own in best.items():
        styles: list[tuple[str, dict[str, Any]]] = [
            (name, {"color": MUTED, "dashed": i == 1}) for i, name in enumerate(SYNCHRONOUS)
        ]
        styles += [(name, {"color": number}) for number, name in enumerate(CURVES)]
        parts = []
        for name, style in styles:
            runs = chosen(own, method=name)
            if runs:
                rate = np.mean([r["value"] for r in runs], axis=0)
                parts.append(series(name, np.arange(len(rate)) * runs[0]["every"], rate, **style))
        panels.append(panel(p, "update", "held-out success rate", parts, ylim=[0, 1.02]))
    return plot(*panels, width=3.8, columns=3)


EXPERIMENT = Experiment(
    "long_trajectories",
    "Which methods learn from stale rollouts of dozens of tokens, in one chain of thought or over several turns?",
    ("C13", "C14", "C15"),
    settings,
    run,
    analyse,
    extra="llm",
    no_estimators="trains its own methods in lock-step: transformer_collapse takes yours",
)
