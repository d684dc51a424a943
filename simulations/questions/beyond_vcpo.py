"""Does anything beat VCPO, rivals on their best baseline and synchronous training, judged where it was not chosen?

Candidates start from the n^2 baseline without ratios: a baseline that remembers, one shrunk to the mean, negatives that
count less, tempered ratios, capped influence, the ESS step. Half of the task draws and seeds choose, the other half is
looked at once:

    choose   strings of task draw 0, seeds 300 to 307: each method's step size in each place, and *one* candidate: the
             one whose smallest lead over the best rival, over places, is largest (value at own best step size)
    test     strings of task draw 1, seeds 308 to 315: that candidate, and everyone at the step sizes chosen

A place is (prompts that share the network, lag). Only methods that a constant added to all rewards leaves alone are
candidates or rivals. Values are success probabilities, exact, averaged over training.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from simulations.drawing import Plot, plot, ranking
from simulations.methods import (
    ESS,
    FULL_STEP,
    Method,
    at_edge,
    chosen,
    gain,
    outcome,
    over_the_grid,
    own_methods,
    trace,
    value_of,
)
from simulations.protocol import Analysis, Comparison, Experiment, Figure, Question, Record, Rule, Setting, judge
from simulations.questions.regime_map import METHODS as MAP
from vcposim.estimators import Estimator
from vcposim.learning.lags import Lag
from vcposim.learning.run_records import Run
from vcposim.learning.step_rules import Control
from vcposim.learning.tasks import many_prompts


@dataclass(frozen=True)
class Candidate:
    """An estimator, a step rule, and how long its baseline remembers."""

    estimator: str | Estimator
    control: Control = FULL_STEP
    memory: float = 0.0


VCPO = "VCPO"
RIVALS: dict[str, str] = {
    VCPO: "OPOB / TIS / ESS step",
    **{f"{r}, {b}": f"{b} / {r} / full step" for r in ("TIS", "PPO", "GSPO", "M2PO") for b in ("mean", "n2")},
    **{f"synchronous, {b}": f"{b} / synchronous / full step" for b in ("mean", "n2")},
}
"""name -> that of `regime_map`"""
CANDIDATES: dict[str, Candidate] = {
    "n2": Candidate("on_policy_optimal"),
    "n2, ESS step": Candidate("on_policy_optimal", ESS),
    "half n2": Candidate("half_optimal"),
    "n2, soft negatives": Candidate("n2_soft_negatives"),
    "n2, tempered": Candidate("n2_tempered"),
    "n2, capped influence": Candidate("n2_influence"),
    "n2, memory": Candidate("on_policy_optimal", memory=0.9),
    "mean, memory": Candidate("dr_grpo", memory=0.9),
    "OPOB, memory, ESS step": Candidate("vcpo", ESS, memory=0.9),
    "OPOB stratified, ESS step": Candidate("vcpo_stratified", ESS),
}
PLACES = tuple((prompts, lag) for prompts in (1, 4, 16) for lag in (16, 64))
STEP_SIZES = {
    prompts: tuple(least * 2**k for k in range(7)) for prompts, least in ((1, 0.02), (4, 0.005), (16, 0.0025))
}
"""prompts -> seven step sizes; the fewer prompts share the network, the larger the steps that are borne"""
HALVES = {"choose": (0, range(300, 308)), "test": (1, range(308, 316))}
"""half -> task draw and seeds"""
MARGIN = 0.02
"""the difference of values that matters"""
TIED = 1e-3
"""a difference of values that is none: with one prompt every large step reaches the ceiling"""


def settings(size: str) -> list[Setting]:
    """Places x halves x step sizes: a place is complete before the next begins."""
    full = size == "full"
    return [
        {"prompts": prompts, "lag": lag, "half": half, "draw": draw, "seeds": list(seeds if full else seeds[:2]),
         "step_size": step, "updates": 120 if full else 40}
        for prompts, lag in (PLACES if full else ((4, 16),))
        for half, (draw, seeds) in HALVES.items()
        for step in STEP_SIZES[prompts][slice(0, 7) if full else slice(2, 5)]
    ]  # fmt: skip


def runs_of(
    name: str, lag: int, seeds: Iterable[int], step_size: float, own: Mapping[str, Method] = MappingProxyType({})
) -> list[Run]:
    """The runs of a method, or of one of anyone's `own`."""
    if name in CANDIDATES:
        c = CANDIDATES[name]
        return [
            Run(c.estimator, seed=s, lag=Lag(lag), step_size=step_size, control=c.control, memory=c.memory)
            for s in seeds
        ]
    m = MAP[RIVALS[name]] if name in RIVALS else Method(own[name].estimator)
    return [
        Run(m.estimator, seed=s, lag=Lag(lag) if m.stale else Lag(), step_size=step_size, control=m.control)
        for s in seeds
    ]


def run(setting: Setting) -> list[Record]:
    """One record for each method and seed."""
    own = own_methods(setting)
    keys = [(name, seed) for name in (*RIVALS, *CANDIDATES, *own) for seed in setting["seeds"]]
    lag, seeds, step = setting["lag"], setting["seeds"], setting["step_size"]
    runs = [r for name in (*RIVALS, *CANDIDATES, *own) for r in runs_of(name, lag, seeds, step, own)]
    found = trace(many_prompts(setting["prompts"], seed=setting["draw"]), runs, setting["updates"])
    place = {key: setting[key] for key in ("prompts", "lag", "half", "step_size")}
    out = []
    for i, (name, seed) in enumerate(keys):
        o = outcome(found, i)
        numbers = {key: round(o[key], 4) for key in ("average", "ess")}
        out.append({**place, "method": name, "seed": seed, **numbers, "collapse": o["collapse"]})
    return out


def where(record: Record) -> str:
    """A place in words."""
    return f"{record['prompts']} prompt{'s' * (record['prompts'] > 1)}, lag {record['lag']}"


def step_sizes(records: list[Record]) -> dict[str, float]:
    """Each method's best step size among records of one place and half: the smallest that is tied with the best."""
    found = {}
    for m in dict.fromkeys(r["method"] for r in records):
        own = chosen(records, method=m)
        value = {e: np.mean([r["average"] for r in chosen(own, step_size=e)]) for e in {r["step_size"] for r in own}}
        found[m] = min(e for e, v in value.items() if v >= max(value.values()) - TIED)
    return found


def own_best(records: list[Record], best: dict[str, float]) -> list[Record]:
    """The records of each method at its step size."""
    return [r for r in records if r["step_size"] == best.get(r["method"])]


def pick(halves: dict[str, list[Record]]) -> str:
    """The candidate whose smallest lead over the best rival is largest, from the choosing half at own best."""

    def lead(name: str) -> float:
        leads = []
        for own in halves.values():
            value = {m: np.mean([r["average"] for r in chosen(own, method=m)]) for m in {r["method"] for r in own}}
            leads.append(value[name] - max(value[m] for m in RIVALS if m in value))
        return float(min(leads))

    known = [n for n in CANDIDATES if all(chosen(own, method=n) for own in halves.values())]
    return max(known, key=lead)


def analyse(records: list[Record]) -> Analysis:
    """C13, C14 and C15: VCPO and its rivals against the candidate that was chosen without these records."""
    places = list(dict.fromkeys(where(r) for r in records))
    of = {(p, h): [r for r in records if where(r) == p and r["half"] == h] for p in places for h in HALVES}
    best = {p: step_sizes(of[p, "choose"]) for p in places}
    winner = pick({p: own_best(of[p, "choose"], best[p]) for p in places})
    test = {p: own_best(of[p, "test"], best[p]) for p in places}
    grid = {p: over_the_grid(of[p, "test"]) for p in places}
    not_worse = Rule("value, first minus second", ">", 0.0, -MARGIN)
    better = Rule("value, first minus second, at own best and over the grid of step sizes", ">", 0.0, MARGIN)
    stale = [m for m in RIVALS if not m.startswith("synchronous") and m != VCPO]

    def against(first: str, others: Iterable[str], *kinds: str) -> list[Comparison]:
        among = {"own best": test, "grid": grid}
        return [
            Comparison(f"{p}: {o}, {k}", gain(among[k][p], first, o)) for k in kinds for p in places for o in others
        ]

    edges_note = at_edge(test, {p: of[p, "test"] for p in places})
    asked: list[tuple[str, str, str, Rule, list[Comparison], str]] = [
        ("vcpo_not_worse", "C13",
         f"VCPO learns not worse than {winner}, which was chosen on other tasks and seeds",
         not_worse, against(VCPO, [winner], "own best", "grid"), ""),
        ("beats_rivals", "C13",
         f"{winner} learns better than TIS, PPO, GSPO and M2PO, each on the mean and on n^2",
         better, against(winner, stale, "own best", "grid"), ""),
        ("simple_n2_not_worse", "C14",
         "VCPO's two parts learn not worse than the n^2 baseline alone",
         not_worse, against(VCPO, ["n2"], "own best"), ""),
        ("matches_synchronous", "C15",
         f"{winner} under lag learns not worse than synchronous training with the mean and with n^2",
         not_worse, against(winner, ["synchronous, mean", "synchronous, n2"], "own best"), edges_note),
    ]  # fmt: skip
    questions = [
        Question(key, claim, words, rule, found, "where", note=note, beside=True)
        for key, claim, words, rule, found, note in asked
    ]
    caption = (
        f"Everyone on the half that chose nothing: value at the step size chosen on the other half, 95% intervals over "
        f"seeds. Chosen there: {winner}."
    )
    return Analysis(judge(questions), [Figure("frontier", figure(test, winner), caption, alt=caption)])


def figure(test: dict[str, list[Record]], winner: str) -> Plot:
    """One panel a place: methods by value."""
    panels = []
    for p, own in test.items():
        rows = {m: value_of(own, m) for m in (*RIVALS, *CANDIDATES) if chosen(own, method=m)}
        lines = [e.value for m in ("synchronous, mean", "synchronous, n2") if (e := rows.get(m)) is not None]
        named = {f"{m} (chosen)" if m == winner else m: e for m, e in rows.items()}
        panels.append(ranking(f"{p} (lines: synchronous)", "value", named, accent=[VCPO], xlim=[0, 1], vlines=lines))
    return plot(*panels, width=5.0)


EXPERIMENT = Experiment(
    "beyond_vcpo",
    "Does anything beat VCPO, its rivals on their best baseline, and synchronous training?",
    ("C13", "C14", "C15"),
    settings,
    run,
    analyse,
    takes_estimators=True,
)
