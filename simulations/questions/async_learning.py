"""Which methods survive stale rollouts at one common step size, and does VCPO match synchronous training?

Every method of the paper's comparison learns the same warm-started tasks from the same random numbers, through a small
network whose rows interfere. Synchronous training is there with the mean baseline, with OPOB and with no baseline: a
method that beats stale rivals may owe it to its baseline, which synchronous training can have too. Values are exact.
`best_step_size` asks the same with each method at its own best step size.
"""

from simulations.drawing import Plot, plot
from simulations.methods import (
    AGGREGATES,
    METHODS,
    SYNCHRONOUS,
    TARGET,
    aggregates,
    chosen,
    gain,
    lost_more,
    lost_of,
    outcome,
    own_methods,
    run_of,
    told,
    trace,
    value_ranking,
)
from simulations.protocol import Analysis, Comparison, Experiment, Figure, Question, Record, Rule, Setting, judge
from simulations.stats import of_seeds
from vcposim.learning.lags import Lag

STEP_SIZE = 0.024
OURS = ("VCPO", "VCPO as released", "VCPO with GRPO std", "ESS only", "OPOB only")
MARGIN = 0.02
"""the difference of success probabilities that matters"""
RATE = 0.05
"""the difference of rates of collapse that matters"""


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
    methods = METHODS | own_methods(setting)
    keys = [(name, seed) for name in methods for seed in setting["seeds"]]
    lag = Lag(setting["lag"], setting["law"])
    runs = [run_of(methods[name], lag, seed=seed, step_size=STEP_SIZE) for name, seed in keys]
    found = trace(setting["task"], runs, setting["updates"], truth_every=40)
    place = {key: setting[key] for key in ("task", "law", "lag")}
    return [
        {**place, "method": name, "seed": seed, **outcome(found, i), "cosine": float(found["true_cosine"][:, i].mean())}
        for i, (name, seed) in enumerate(keys)
    ]


def analyse(records: list[Record]) -> Analysis:
    """Verdicts on C13, C14, C15 and C19 at the common step size."""
    lag = records[0]["lag"] if records else 0
    caption = (
        f"Exact success probability averaged over training, one step size ({STEP_SIZE:g}) for all methods, lag {lag}: "
        "mean over seeds with 95% interval; at least one run collapsed where the count stands beside."
    )
    asked = [_rivals(records, lag), _both(records), *(_synchronous(records, n, lag) for n in SYNCHRONOUS[:2])]
    few = ("VCPO", "sequence TIS", "ESS only", "OPOB only", *SYNCHRONOUS[:2], "no correction, no baseline")
    profiles = AGGREGATES.format(ours="VCPO")
    figures = [
        Figure("value_of_every_method", figure(records), caption, caption),
        Figure("profiles", aggregates(records, "VCPO", few, _names(records)), profiles, profiles),
    ]
    return Analysis(judge([*asked, _std(records)]), figures)


def _names(records: list[Record]) -> list[str]:
    return list(dict.fromkeys(r["method"] for r in records))


def _rivals(records: list[Record], lag: int) -> Question:
    rivals = [name for name in _names(records) if name not in SYNCHRONOUS and name not in OURS]
    counts = "; ".join(f"{name} {lost_of(records, name)}" for name in ("VCPO", *rivals))
    return Question(
        "rivals_collapse",
        "C13",
        f"at one common step size ({STEP_SIZE:g}, lag {lag}) "
        "every rival and simple control collapses more often than VCPO",
        Rule("rate of collapse, rival minus VCPO", ">", 0.0, RATE, "Agresti and Min's for pairs, over seeds"),
        [Comparison(name, lost_more(records, name, "VCPO")) for name in rivals],
        note=f"collapsed runs: {counts}",
    )


def _both(records: list[Record]) -> Question:
    parts = ("sequence TIS", "ESS only", "OPOB only")
    alone = "; ".join(f"{name} {gain(records, name, 'sequence TIS')}" for name in parts[1:])
    return Question(
        "both_parts",
        "C14",
        "ESS scaling and OPOB together do better than neither, and than either alone (common step size)",
        Rule("value averaged over training, VCPO minus the other", ">", 0.0, MARGIN),
        [Comparison(f"VCPO minus {name}", gain(records, "VCPO", name)) for name in parts],
        note=f"values: {told(records, (*parts, 'VCPO'))}; minus sequence TIS: {alone}",
    )


def _synchronous(records: list[Record], name: str, lag: int) -> Question:
    fields = {"final": "final values", "average": "on the way there"}
    return Question(
        f"matches_{'mean' if name == SYNCHRONOUS[0] else 'opob'}",
        "C15",
        f"VCPO at lag {lag} matches {name}",
        Rule("success probability, VCPO minus synchronous", ">", 0.0, -MARGIN),
        [Comparison(words, gain(records, "VCPO", name, field)) for field, words in fields.items()],
        "where",
        note=f"updates to {TARGET:g}: {_hits(records, 'VCPO')} against {_hits(records, name)}; collapsed "
        f"{lost_of(records, 'VCPO')} against {lost_of(records, name)}",
    )


def _hits(records: list[Record], method: str) -> str:
    mine = chosen(records, method=method)
    found = [(r["seed"], float(r["hit"])) for r in mine if r["hit"] is not None]
    return f"{of_seeds(found, scale='log')} (reached by {len(found)} of {len(mine)})" if found else "never"


def _std(records: list[Record]) -> Question:
    both = ("VCPO with GRPO std", "VCPO")
    return Question(
        "group_std",
        "C19",
        "dividing by the group's std improves VCPO in learning (common step size)",
        Rule("value averaged over training, with minus without", ">", 0.0, MARGIN),
        [Comparison("with minus without", gain(records, *both))],
        note=f"values: {told(records, both)}",
    )


def figure(records: list[Record]) -> Plot:
    """One panel a task and lag law: methods from best to worst."""
    places = list(dict.fromkeys((r["task"], r["law"]) for r in records))
    panels = [
        value_ranking(f"{name}, {law} lag", chosen(records, task=name, law=law), _names(records), OURS)
        for name, law in places
    ]
    return plot(*panels, width=5.4, height=4.6)


EXPERIMENT = Experiment(
    "async_learning",
    "Which methods survive stale rollouts at one step size, and does VCPO match synchronous training?",
    ("C13", "C14", "C15", "C19"),
    settings,
    run,
    analyse,
    takes_estimators=True,
)
