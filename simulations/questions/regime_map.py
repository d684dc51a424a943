"""Which factor decides who wins: baseline, ratio or step rule, by number of prompts and lag?

One network learns P prompts at once, each with a string of its own (`many_prompts`): what one prompt's update does to
the others is what single-prompt tasks cannot show. A cell is a place (prompts, lag, length, base rate, reward law); in
each the factorial baseline x ratio x step rule runs beside the rivals, these on the mean and on the n^2 baseline, and
synchronous training. Rivals' thresholds are those of 8 tokens, not of 8,000: GSPO's band is PPO's, 0.2. Each method has
the whole grid of step sizes and is judged at its own best, chosen on other seeds, and by its mean over the grid.

Values are success probabilities, exact, averaged over training; rewards {low, low + 1} shift rewards and not values.
"""

import json
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast

import numpy as np

from simulations.drawing import Plot, of_intervals, panel, plot
from simulations.methods import (
    Method,
    at_edge,
    at_own_best,
    chosen,
    ess_told,
    gain,
    outcome,
    over_the_grid,
    own_methods,
    run_of,
    trace,
    value_of,
)
from simulations.protocol import Analysis, Comparison, Experiment, Figure, Question, Record, Rule, Setting, judge
from vcposim.catalogue import entry
from vcposim.estimators import Estimator
from vcposim.learning.lags import Lag
from vcposim.learning.step_rules import Control
from vcposim.learning.tasks import LearningTask, many_prompts
from vcposim.surrogates import Clip, Reject
from vcposim.weights import Weighting

if TYPE_CHECKING:
    from vcposim.commands.advise import MapCell, MeasuredMethod

CAP = 8.0
BASELINES = {
    "none": "zero",
    "mean": "group_mean",
    "n2": "on_policy_optimal",
    "OPOB": "opob",
    "OPOB loo": "opob_leave_one_out",
    "OPOB stratified": "opob_stratified",
}
RATIOS = ("no ratio", "TIS")
STEPS = {"full step": Control(), "ESS step": Control("ess")}
RIVALS = {
    "PPO": entry("ppo_clip").estimator,
    "GSPO": replace(entry("gspo").estimator, surrogate=Clip(0.2, 0.2, level="geometric")),
    "M2PO": entry("m2po").estimator,
}
EVERYTHING = Reject(float("inf"))
"""the factor 1: weights then serve the baseline alone"""


def factorial(baseline: str, ratio: str) -> Estimator:
    """OPOB keeps its w^2 n^2 where the update itself has no ratio."""
    surrogate = None if ratio == "TIS" else EVERYTHING
    return Estimator(Weighting("truncate", cap=CAP), BASELINES[baseline], surrogate=surrogate)


METHODS: dict[str, Method] = {
    f"{baseline} / {ratio} / {step}": Method(factorial(baseline, ratio), control)
    for baseline in BASELINES
    for ratio in RATIOS
    for step, control in STEPS.items()
}
METHODS |= {
    f"{baseline} / {name} / full step": Method(replace(estimator, baseline=BASELINES[baseline]))
    for name, estimator in RIVALS.items()
    for baseline in ("mean", "n2")
}
METHODS |= {
    f"{baseline} / synchronous / full step": Method(Estimator(Weighting("none"), BASELINES[baseline]), stale=False)
    for baseline in ("none", "mean", "n2")
}
VCPO = "OPOB / TIS / ESS step"

STEP_SIZES = (0.002, 0.005, 0.012, 0.03, 0.07, 0.17, 0.4)
"""seven, a factor of about 2.4 apart: what learns best at the first or the last is named beside the verdicts"""


class RegimeCell(NamedTuple):
    """Where the methods learn; as written, the core. `low` is the reward of a wrong string."""

    prompts: int = 16
    lag: int = 16
    length: int = 8
    base_rate: float = 0.17
    low: float = 0.0
    group_size: int = 8
    optimizer: str = "adam"


CORE = RegimeCell()
CELLS = (
    RegimeCell(),
    RegimeCell(lag=64),
    RegimeCell(prompts=4, lag=64),
    RegimeCell(prompts=1, lag=64),
    RegimeCell(low=-1.0),
    RegimeCell(base_rate=0.02),
    RegimeCell(low=1.0),
    RegimeCell(prompts=4),
    RegimeCell(prompts=1),
    RegimeCell(length=32),
    RegimeCell(base_rate=0.5),
    RegimeCell(prompts=64),
    RegimeCell(group_size=4),
    RegimeCell(optimizer="sgd"),
    RegimeCell(prompts=64, lag=64),
)
"""what each cell changes of the core"""


def settings(size: str) -> list[Setting]:
    """Cells x blocks of seeds x step sizes; a cell is complete before the next begins."""
    full = size == "full"
    cells = CELLS if full else (RegimeCell(prompts=4), RegimeCell(prompts=4, low=-1.0))
    blocks = [list(range(first, first + 8)) for first in (100, 108)] if full else [[0, 1], [2, 3]]
    sizes = STEP_SIZES if full else (0.02, 0.08)
    return [
        {**cell._asdict(), "step_size": step, "seeds": seeds, "updates": 160 if full else 60}
        for cell in cells
        for seeds in blocks
        for step in sizes
    ]


def place(setting: Setting) -> LearningTask:
    """The task of a cell."""
    length = setting["length"]
    task = many_prompts(setting["prompts"], length, probability=setting["base_rate"] ** (1 / length))
    return replace(task, chain=replace(task.chain, reward=task.chain.reward + setting["low"]))


SGD_STEP = 30.0
"""how much larger SGD's steps are than Adam's on the same grid: gradients' norms here are a few hundredths"""


def run(setting: Setting) -> list[Record]:
    """One record for each method and seed."""
    groups = 32 // setting["group_size"]
    step = setting["step_size"] * (SGD_STEP if setting["optimizer"] == "sgd" else 1)
    methods = METHODS | own_methods(setting)
    keys = [(name, seed) for name in methods for seed in setting["seeds"]]
    options = {"step_size": step, "optimizer": setting["optimizer"]}
    runs = [run_of(methods[name], Lag(setting["lag"]), seed=seed, **options) for name, seed in keys]
    found = trace(place(setting), runs, setting["updates"], groups=groups, group_size=setting["group_size"])
    found["value"] = found["value"] - setting["low"]
    cell = {key: setting[key] for key in RegimeCell._fields}
    out = []
    for i, (name, seed) in enumerate(keys):
        o = outcome(found, i)
        numbers = {key: round(o[key], 4) for key in ("final", "average", "ess", "scale")}
        out.append({**cell, "method": name, "step_size": setting["step_size"], "seed": seed, **numbers,
                    "collapse": o["collapse"], "start": round(o["curve"][0], 4)})  # fmt: skip
    return out


MARGIN = 0.02
"""the difference of values that matters"""


def cells_of(records: Iterable[Record]) -> dict[str, list[Record]]:
    """The records of each cell, by what it changes of the core."""
    found: dict[str, list[Record]] = {}
    for r in records:
        found.setdefault(name_of(RegimeCell(*(r[key] for key in RegimeCell._fields))), []).append(r)
    return found


def name_of(cell: RegimeCell) -> str:
    """A cell in words: prompts and lag, and what else differs from the core."""
    others = [
        f"{key.replace('_', ' ')} {getattr(cell, key):g}"
        for key in ("length", "base_rate", "group_size")
        if getattr(cell, key) != getattr(CORE, key)
    ]
    others += [f"rewards {cell.low:g}/{cell.low + 1:g}"] if cell.low else []
    others += [cell.optimizer] if cell.optimizer != CORE.optimizer else []
    return ", ".join([f"{cell.prompts} prompt{'s' * (cell.prompts > 1)}, lag {cell.lag}", *others])


def best_in(records: list[Record]) -> list[Record]:
    """Each method of one cell at its own best step size, chosen on the seeds of the other parity."""
    return [r for method in dict.fromkeys(r["method"] for r in records) for r in at_own_best(records, method)]


def analyse(records: list[Record]) -> Analysis:
    """Verdicts beside C10, C13, C14 and C15 (none is what the paper claims), each over the cells."""
    cells = cells_of(records)
    best = {cell: best_in(own) for cell, own in cells.items()}
    grid = {cell: over_the_grid(own) for cell, own in cells.items()}
    plain = "n2 / no ratio / full step"
    better, not_worse = (
        Rule(f"value, first minus second {how}", ">", 0.0, m) for how, m in (("", MARGIN), ("", -MARGIN))
    )

    def compared(first: str, second: str, among: dict[str, list[Record]], where: str = "") -> list[Comparison]:
        return [Comparison(f"{cell}{where}", gain(own, first, second)) for cell, own in among.items()]

    rivals = [(f"mean / {r} / full step", f"n2 / {r} / full step") for r in ("no ratio", "TIS", *RIVALS)]
    asked: list[tuple[str, str, str, Rule, list[Comparison]]] = [
        ("baseline_before_ratio", "C10",
         "to replace the mean by n^2, without ratios, does more than to keep the mean and truncate ratios",
         better, compared(plain, "mean / TIS / full step", best)),
        ("rivals_gain_from_n2", "C13",
         "no ratio, TIS, PPO, GSPO and M2PO learn better with the n^2 baseline than with the mean, own best step",
         better, [c for mean, n2 in rivals for c in compared(n2, mean, best, f": {mean.split(' / ')[1]}")]),
        ("vcpo_beats_rivals_with_n2", "C13",
         "VCPO beats every rival that has the n^2 baseline too, own best step",
         better, [c for _, n2 in rivals for c in compared(VCPO, n2, best, f": {n2.split(' / ')[1]}")]),
        ("n2_alone_own_best", "C14",
         "the n^2 baseline with no ratio and no brake is not worse than VCPO, own best step",
         not_worse, compared(plain, VCPO, best)),
        ("n2_with_brake_grid", "C14",
         "the n^2 baseline with no ratio and the ESS step is better than VCPO, mean over the grid of step sizes",
         better, compared("n2 / no ratio / ESS step", VCPO, grid)),
        ("stratified", "C10",
         "inside VCPO, reward-stratified OPOB is better than OPOB, mean over the grid of step sizes",
         better, compared("OPOB stratified / TIS / ESS step", VCPO, grid)),
        ("matches_synchronous", "C15",
         "the stale n^2 baseline with no ratio is not worse than synchronous training with n^2, own best step",
         not_worse, compared(plain, "n2 / synchronous / full step", best)),
    ]  # fmt: skip
    notes = {
        "baseline_before_ratio": at_edge(best, cells),
        "rivals_gain_from_n2": ess_told(best, "mean / TIS / full step"),
        "n2_alone_own_best": ess_told(best, plain),
    }
    questions = [Question(*one, over="where", note=notes.get(one[0], ""), beside=True) for one in asked]
    caption = (
        "Value averaged over training, each method at its own best step size: one row a baseline, one color a ratio "
        "and step rule, with 95% intervals over seeds. What moves from row to row is the baseline's doing."
    )
    return Analysis(judge(questions), [Figure("baseline_decides", figure(best), caption, alt=caption)])


def figure(best: dict[str, list[Record]]) -> Plot:
    """One panel a cell; rows are baselines."""
    groups = {
        "no ratio": "no ratio / full step",
        "no ratio, ESS step": "no ratio / ESS step",
        "TIS": "TIS / full step",
        "TIS, ESS step": "TIS / ESS step",
        "PPO clip": "PPO / full step",
        "synchronous": "synchronous / full step",
    }
    panels = []
    for cell, own in best.items():
        parts = []
        for number, (name, rest) in enumerate(groups.items()):
            rows = {b: e for b in BASELINES if (e := value_of(own, f"{b} / {rest}")) is not None}
            found = of_intervals(name, list(rows), list(rows.values()), number, line=False)
            parts.append({**found, "x": found["y"], "y": found["x"]})
        panels.append(panel(cell, "value averaged over training", "", parts, order=list(BASELINES), xlim=[0, 1]))
    return plot(*panels, width=5.0, height=3.2)


def summary(records: list[Record]) -> "list[MapCell]":
    """What `vcposim advise` reads: for each cell and method, values by seed at own best, by step size, and losses."""
    out = []
    for own in cells_of(records).values():
        sizes, seeds = (sorted({r[key] for r in own}) for key in ("step_size", "seed"))
        methods: dict[str, MeasuredMethod] = {}
        for method in dict.fromkeys(r["method"] for r in own):
            mine = chosen(own, method=method)
            best = {r["seed"]: r for r in at_own_best(own, method)}
            by_step = {e: chosen(mine, step_size=e) for e in sizes}
            methods[method] = {
                "own_best": [round(best[s]["average"], 3) for s in seeds],
                "own_best_step": sorted({r["step_size"] for r in best.values()}),
                "ess": round(float(np.mean([r["ess"] for r in best.values()])), 2),
                "by_step": [round(float(np.mean([r["average"] for r in by_step[e]])), 3) for e in sizes],
                "lost": [sum(r["collapse"] is not None for r in by_step[e]) for e in sizes],
            }
        cell = RegimeCell(*(own[0][key] for key in RegimeCell._fields))
        measured = {"step_sizes": sizes, "seeds": len(seeds), "methods": methods}
        out.append(cast("MapCell", cell._asdict() | measured))
    return out


EXPERIMENT = Experiment(
    "regime_map",
    "Which factor decides who wins: baseline, ratio or step rule, by number of prompts and lag?",
    ("C10", "C13", "C14", "C15"),
    settings,
    run,
    analyse,
    takes_estimators=True,
)

if __name__ == "__main__":  # python -m simulations.questions.regime_map RECORDS... > vcposim/commands/regimes.json
    lines = [line for name in sys.argv[1:] for line in Path(name).read_text().splitlines()]
    found = [record for line in lines if "method" in (record := json.loads(line))]
    print("[\n" + ",\n".join(json.dumps(cell) for cell in summary(found)) + "\n]")
