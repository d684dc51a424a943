"""Does n^2 with soft negatives lead at 128 tokens too, with fresh seeds and larger step sizes?

`long_trajectories` found it ahead of everyone on thoughts of 64 tokens, synchronous training included, with its best
step size at the edge of the grid: a lead that the same runs had chosen. Here it is named beforehand and tested on what
had no part in that: thoughts twice as long, other seeds, one larger step size. Everything else is as there.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np

from simulations.methods import Method, at_edge, best_of, gain, over_the_grid, told
from simulations.protocol import Analysis, Comparison, Experiment, Question, Record, Rule, Setting, judge
from simulations.questions import long_trajectories
from simulations.questions.long_trajectories import LEAD, RIVALS, SYNCHRONOUS, LongTask, figures, trained
from simulations.questions.transformer_collapse import MARGIN

KIND = LongTask(
    "running_sum", (("steps", 128), ("modulus", 5)), tokens=129, step_sizes=(0.0001, 0.0003, 0.001, 0.003), length=272
)
SOFT = "n2, soft negatives"
METHODS: dict[str, Method] = {
    name: long_trajectories.METHODS[name] for name in ("VCPO", *RIVALS, "n2", LEAD, SOFT, *SYNCHRONOUS)
}


def settings(size: str) -> list[Setting]:
    """Step sizes x pairs of seeds, all methods each."""
    full = size == "full"
    long = {"updates": 96, "every": 16, "held_out": 128, "groups": 4, "group_size": 8}
    short = {"updates": 2, "every": 2, "held_out": 16, "groups": 2, "group_size": 4}
    return [
        {
            "task": "thought of 128",
            "lag": 4 if full else 1,
            "step_size": step,
            "seeds": [seed, seed + 1],
            **(long if full else short),
        }
        for step in KIND.step_sizes[0 if full else 3 :]
        for seed in range(200, 208 if full else 202, 2)
    ]


def run(setting: Setting) -> list[Record]:
    """One record for each method and seed."""
    return trained(setting, KIND, METHODS)


def analyse(records: list[Record]) -> Analysis:
    """C13 and C15: soft negatives against everyone, VCPO against its rivals."""
    place = ", ".join(f"{r['task']}, lag {r['lag']}" for r in records[:1])
    among = {place: records}
    best, grid = {place: best_of(records)}, over_the_grid(records)

    def against(first: str, others: Iterable[str], own: list[Record] = best[place]) -> list[Comparison]:
        return [Comparison(other, gain(own, first, other)) for other in others]

    better = Rule("success rate averaged over training, first minus second, own best steps", ">", 0.0, MARGIN)
    on_grid = Rule("success rate averaged over training and step sizes, first minus second", ">", 0.0, MARGIN)
    asked: list[tuple[str, str, str, Rule, list[Comparison], str, bool]] = [
        ("beats_rivals", "C13", "VCPO learns better than TIS, MIS, GSPO, M2PO and no correction",
         better, against("VCPO", RIVALS), told(best[place], METHODS), False),
        ("soft_beats_rivals", "C13", "n^2 with soft negatives learns better than VCPO and its rivals",
         better, against(SOFT, ("VCPO", *RIVALS)), at_edge(best, among), True),
        ("soft_beats_n2", "C13", "soft negatives are worth something: n^2 with them learns better than without",
         better, against(SOFT, ("n2", LEAD)), "", True),
        ("soft_beats_synchronous", "C15", "stale n^2 with soft negatives learns better than synchronous training",
         better, against(SOFT, SYNCHRONOUS), "", True),
        ("soft_over_steps", "C13", "over step sizes too, n^2 with soft negatives learns better than the others",
         on_grid, against(SOFT, [n for n in METHODS if n != SOFT], grid), told(records, METHODS), True),
    ]  # fmt: skip
    questions = [
        Question(key, claim, f"thoughts of 128 tokens: {words}", rule, found, "against", "transformer", note, beside)
        for key, claim, words, rule, found, note, beside in asked
    ]
    return Analysis(judge(questions), figures(best, among, "four"))


def world(mode: str, key: str) -> list[Record]:
    """Records in which soft negatives lead and VCPO follows, in which both are last, or in which nobody can tell."""
    levels = {  # soft negatives, VCPO, rivals, all others
        "true": (0.9, 0.7, 0.3, 0.5),
        "opposite": (0.1, 0.2, 0.8, 0.8),
        "between": (0.51, 0.5, 0.49, 0.5),
        "noise": (0.5,) * 4,
    }[mode]
    kinds = {SOFT: 0, "VCPO": 1} | dict.fromkeys(RIVALS, 2)
    rng, records = np.random.default_rng(0), []
    for method in METHODS:
        for step, off in ((0.001, 0.1), (0.002, 0.0)):
            for seed in range(24):
                value = rng.random() if mode == "noise" else levels[kinds.get(method, 3)] - off + 0.001 * rng.normal()
                row: dict[str, Any] = {"task": "thought of 128", "lag": 4, "method": method, "step_size": step}
                row |= dict.fromkeys(long_trajectories.GAUGES, 0.5) | {"seed": seed, "average": value, "every": 16}
                records.append({**row, "value": [value] * 3, "final": value, "collapse": None})
    return records


EXPERIMENT = Experiment(
    "longer_thoughts",
    "Does what led on stale thoughts of 64 tokens lead on thoughts of 128, with fresh seeds and a larger step size?",
    ("C13", "C15"),
    settings,
    run,
    analyse,
    extra="llm",
    no_estimators="trains its own methods in lock-step: transformer_collapse takes yours",
    world=world,
)
