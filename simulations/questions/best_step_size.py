"""Each method at its own best step size: what is left of the differences that a common step size shows?

A method that survives a step size at which others collapse may simply take smaller steps. Here every method has the
whole grid, and takes the step size at which it does best on average: chosen on half of the seeds, judged on the others,
and the other way round, so that no run helps to choose its own.
"""

from simulations.drawing import Plot, plot
from simulations.methods import (
    AGGREGATES,
    METHODS,
    SYNCHRONOUS,
    aggregates,
    best_of,
    gain,
    outcome,
    own_methods,
    run_of,
    step_sizes_of,
    told,
    trace,
    value_ranking,
)
from simulations.protocol import Analysis, Comparison, Experiment, Figure, Question, Record, Rule, Setting, judge
from vcposim.learning.lags import Lag

OURS = ("VCPO", "VCPO as released", "VCPO with GRPO std", "ESS only", "OPOB only")
FEW = (
    *SYNCHRONOUS,
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
"""the difference of success probabilities that matters"""


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
    own = own_methods(setting)
    keys = [(name, seed) for name in (*setting["methods"], *own) for seed in setting["seeds"]]
    methods = METHODS | own
    runs = [run_of(methods[m], Lag(setting["lag"]), seed=s, step_size=setting["step_size"]) for m, s in keys]
    found = trace("exact_match_8", runs, setting["updates"])
    return [
        {"method": m, "seed": s, "step_size": setting["step_size"], **outcome(found, i)}
        for i, (m, s) in enumerate(keys)
    ]


def analyse(records: list[Record]) -> Analysis:
    """C13, C14, C15 and C19 again, without the handicap of a common step size."""
    best = best_of(records)
    caption = (
        "Exact success probability averaged over training, each method at its own best step size (written beside its "
        "name): mean over seeds with 95% interval; how many runs collapsed even there stands beside."
    )
    profiles = AGGREGATES.format(ours="VCPO")
    few = ("VCPO", "sequence TIS", "ESS only", "OPOB only", *SYNCHRONOUS[:2], "no correction, no baseline")
    names = list(dict.fromkeys(r["method"] for r in best))
    asked = [_rivals(best), _both(best), *(_synchronous(best, name) for name in SYNCHRONOUS[:2]), _std(best)]
    figures = [
        Figure("value_at_own_best_step_size", figure(best), caption, alt=caption),
        Figure("profiles", aggregates(best, "VCPO", few, names), profiles, alt=profiles),
    ]
    return Analysis(judge(asked), figures)


def _rivals(best: list[Record]) -> Question:
    rivals = [r for r in dict.fromkeys(r["method"] for r in best) if r not in SYNCHRONOUS and r not in OURS]
    return Question(
        "beats_rivals",
        "C13",
        "with each method at its own best step size, VCPO does better than every rival and simple control",
        Rule("value averaged over training, VCPO minus rival", ">", 0.0, MARGIN),
        [Comparison(name, gain(best, "VCPO", name)) for name in rivals],
        note=f"values: {told(best, ('VCPO', *rivals))}",
    )


def _both(best: list[Record]) -> Question:
    parts = ("sequence TIS", "ESS only", "OPOB only")
    alone = "; ".join(f"{name} {gain(best, name, 'sequence TIS')}" for name in parts[1:])
    return Question(
        "both_parts",
        "C14",
        "ESS scaling and OPOB together do better than neither, and than either alone (each at its own best step size)",
        Rule("value averaged over training, VCPO minus the other", ">", 0.0, MARGIN),
        [Comparison(f"VCPO minus {name}", gain(best, "VCPO", name)) for name in parts],
        note=f"values: {told(best, (*parts, 'VCPO', *SYNCHRONOUS))}; minus sequence TIS: {alone}",
    )


def _std(best: list[Record]) -> Question:
    both = ("VCPO with GRPO std", "VCPO")
    return Question(
        "group_std",
        "C19",
        "dividing by the group's std improves VCPO in learning (each at its own best step size)",
        Rule("value averaged over training, with minus without", ">", 0.0, MARGIN),
        [Comparison("with minus without", gain(best, *both))],
        note=f"values: {told(best, both)}",
    )


def _synchronous(best: list[Record], name: str) -> Question:
    fields = {"final": "final values", "average": "on the way there"}
    return Question(
        f"matches_{'mean' if name == SYNCHRONOUS[0] else 'opob'}",
        "C15",
        f"VCPO under lag matches {name}, each at its own best step size",
        Rule("success probability, VCPO minus synchronous", ">", 0.0, -MARGIN),
        [Comparison(words, gain(best, "VCPO", name, field)) for field, words in fields.items()],
        "where",
        note=f"step sizes {step_sizes_of(best, 'VCPO')} and {step_sizes_of(best, name)}",
    )


def figure(best: list[Record]) -> Plot:
    """Methods from best to worst."""
    names = list(dict.fromkeys(r["method"] for r in best))
    return plot(value_ranking("", best, names, OURS, step_sizes=True), width=7.0, height=1.4 + 0.17 * len(names))


EXPERIMENT = Experiment(
    "best_step_size",
    "What is left of the differences when each method has its own best step size?",
    ("C13", "C14", "C15", "C19"),
    settings,
    run,
    analyse,
    takes_estimators=True,
)
