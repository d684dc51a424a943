"""Which factor of a regime decides what n^2, ratios and the ESS step are worth?

A screen over ten factors, of which `regime_map` varies a few one at a time: all 16 pairs of prompts and lag, and with
each pair one level of every other factor, so that each level meets several of every other (`DESIGN`). In each cell four
differences, each method at its own best step size, chosen on seeds of the other parity:

    n^2 over the mean     without ratios
    ratio over none       truncated at 8, on the n^2 baseline
    ESS step over full    on the n^2 baseline without ratios
    VCPO over n^2         all three parts against n^2 alone

A level's effect is the mean of a difference over the cells that have it: main effects, others averaged out as far as
16 cells can. Lengths reach 512, with the spread of log-ratios growing as it does; graded rewards pay the share
of right tokens. Values are E[R], exact, less the lowest reward, averaged over training.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

from simulations.drawing import Plot, of_intervals, panel, plot, series
from simulations.methods import Method, at_edge, at_own_best, best_of, ess_told, outcome, own_methods, run_of, trace
from simulations.protocol import Analysis, Comparison, Experiment, Figure, Question, Record, Rule, Setting, judge
from simulations.questions.regime_map import METHODS as MAP
from simulations.questions.regime_map import SGD_STEP, STEP_SIZES
from simulations.stats import DIFFERENCE, Estimate, of_seeds
from vcposim.learning.lags import Lag
from vcposim.learning.tasks import LearningTask, linear, many_prompts, network


class FactorCell(NamedTuple):
    """A level of every factor; a clip norm of 0 is none; three targets share all but their last two tokens; a linear
    policy has one layer on random inputs, twice as many as rows, so that all rows share all parameters."""

    prompts: int
    lag: int
    length: int
    targets: int
    base_rate: float
    rewards: str
    group_size: int
    optimizer: str
    clip_norm: float
    family: str = "network"


FACTORS = FactorCell._fields
DESIGN = (
    FactorCell(1, 0, 32, 1, 0.02, "0/1", 4, "adam", 1.0),
    FactorCell(1, 4, 8, 3, 0.17, "-1/0", 8, "adam", 0.0, "linear"),
    FactorCell(1, 16, 128, 1, 0.5, "1/2", 16, "adam", 1.0),
    FactorCell(1, 64, 512, 1, 0.17, "graded", 8, "adam", 1.0),
    FactorCell(4, 0, 8, 3, 0.5, "-1/0", 16, "adam", 1.0),
    FactorCell(4, 4, 512, 1, 0.17, "1/2", 4, "sgd", 0.0),
    FactorCell(4, 16, 8, 1, 0.02, "graded", 8, "adam", 0.0, "linear"),
    FactorCell(4, 64, 128, 1, 0.5, "0/1", 8, "adam", 1.0),
    FactorCell(16, 0, 8, 1, 0.17, "graded", 4, "sgd", 0.0),
    FactorCell(16, 4, 8, 3, 0.5, "0/1", 8, "adam", 1.0),
    FactorCell(16, 16, 32, 1, 0.17, "-1/0", 8, "adam", 1.0),
    FactorCell(16, 64, 8, 3, 0.02, "1/2", 16, "adam", 1.0, "linear"),
    FactorCell(64, 0, 8, 1, 0.5, "1/2", 8, "sgd", 1.0),
    FactorCell(64, 4, 8, 1, 0.02, "graded", 16, "adam", 1.0, "linear"),
    FactorCell(64, 16, 8, 3, 0.17, "0/1", 4, "adam", 1.0),
    FactorCell(64, 64, 8, 1, 0.5, "-1/0", 8, "adam", 0.0),
)
LOWEST = {"0/1": 0.0, "-1/0": -1.0, "1/2": 1.0, "graded": 0.0}
METHODS: dict[str, Method] = {
    "mean": MAP["mean / no ratio / full step"],
    "n2": MAP["n2 / no ratio / full step"],
    "n2, TIS": MAP["n2 / TIS / full step"],
    "n2, ESS step": MAP["n2 / no ratio / ESS step"],
    "VCPO": MAP["OPOB / TIS / ESS step"],
}
CONTRASTS = {
    "n^2 over the mean": ("n2", "mean"),
    "ratio over none": ("n2, TIS", "n2"),
    "ESS step over full": ("n2, ESS step", "n2"),
    "VCPO over n^2": ("VCPO", "n2"),
}
MARGIN = 0.02
"""the difference of values that matters"""


def settings(size: str) -> list[Setting]:
    """Cells x blocks of seeds x step sizes, about 45 minutes of one core; reduced: two short cells."""
    full = size == "full"
    some = DESIGN if full else [c for c in DESIGN if c.length == 8 and c.prompts <= 4 and c.lag in (4, 16)]
    blocks = [list(range(first, first + 8)) for first in (400, 408)] if full else [[0, 1]]
    return [
        {**cell._asdict(), "step_size": step, "seeds": seeds, "updates": 120 if full else 30}
        for cell in some
        for seeds in blocks
        for step in (STEP_SIZES if full else (0.02, 0.08))
    ]


def place(setting: Setting) -> LearningTask:
    """The task of a cell: its success probability, or its mean graded reward, starts near the base rate."""
    graded, rate, length = setting["rewards"] == "graded", setting["base_rate"], setting["length"]
    chance = rate if graded else rate ** (1 / length)
    task = many_prompts(setting["prompts"], length, probability=chance, targets=setting["targets"], graded=graded)
    return replace(task, chain=replace(task.chain, reward=task.chain.reward + LOWEST[setting["rewards"]]))


def run(setting: Setting) -> list[Record]:
    """One record for each method and seed."""
    step = setting["step_size"] * (SGD_STEP if setting["optimizer"] == "sgd" else 1)
    methods = METHODS | own_methods(setting)
    keys = [(name, seed) for name in methods for seed in setting["seeds"]]
    options = {"step_size": step, "optimizer": setting["optimizer"], "clip_norm": setting["clip_norm"] or float("inf")}
    runs = [run_of(methods[name], Lag(setting["lag"]), seed=seed, **options) for name, seed in keys]
    size = setting["group_size"]
    problem = place(setting)
    family = linear(problem) if setting["family"] == "linear" else network(problem)
    found = trace(problem, runs, setting["updates"], family=family, groups=32 // size, group_size=size)
    found["value"] = found["value"] - LOWEST[setting["rewards"]]
    cell = {name: setting[name] for name in FACTORS}
    out = []
    for i, (name, seed) in enumerate(keys):
        o = outcome(found, i)
        numbers = {key: round(o[key], 4) for key in ("average", "ess")}
        place_of = {**cell, "method": name, "step_size": setting["step_size"], "seed": seed}
        out.append({**place_of, **numbers, "collapse": o["collapse"], "start": round(o["curve"][0], 4)})
    return out


Differences = list[tuple[FactorCell, dict[Any, float]]]
"""cell, and its difference by seed"""


def differences(records: list[Record], first: str, second: str) -> Differences:
    """First minus second in each cell, by seed, both at their own best step size."""
    found: Differences = []
    by_cell: dict[FactorCell, list[Record]] = {}
    for r in records:
        by_cell.setdefault(FactorCell(*(r[name] for name in FACTORS)), []).append(r)
    for cell, own in by_cell.items():
        a, b = ({r["seed"]: r["average"] for r in at_own_best(own, name)} for name in (first, second))
        found.append((cell, {s: a[s] - b[s] for s in a if s in b}))
    return found


def effects(found: Differences) -> dict[str, dict[Any, Estimate | None]]:
    """factor -> level -> the difference there, mean over its cells; the unit of its interval is the seed."""

    def at(keep: Callable[[FactorCell], bool]) -> Estimate | None:
        return of_seeds(
            ((s, x) for cell, by_seed in found if keep(cell) for s, x in by_seed.items()), bounds=DIFFERENCE
        )

    levels = {f: sorted({getattr(cell, f) for cell, _ in found}, key=str if f == "rewards" else None) for f in FACTORS}
    return {f: {x: at(lambda cell, f=f, x=x: getattr(cell, f) == x) for x in known} for f, known in levels.items()}  # type: ignore[misc]


def moved(by_level: dict[Any, Estimate | None]) -> float:
    """How far a factor moves a difference: its largest level mean minus its smallest."""
    values = [e.value for e in by_level.values() if e is not None]
    return max(values) - min(values) if values else 0.0


def analyse(records: list[Record]) -> Analysis:
    """C10, C13 and C14 by level of every factor."""
    found = {name: effects(differences(records, *pair)) for name, pair in CONTRASTS.items()}

    def levels(contrast: str) -> list[Comparison]:
        named = found[contrast].items()
        return [Comparison(f"{f.replace('_', ' ')} {x}", e) for f, by_level in named for x, e in by_level.items()]

    better = Rule("value, first minus second, mean over cells of a level", ">", 0.0, MARGIN)
    not_worse = Rule("value, VCPO minus n^2 alone, mean over cells of a level", ">", 0.0, -MARGIN)
    asked = (
        ("norms", "C10", "without ratios n^2 is better than the mean", better, "n^2 over the mean"),
        ("ratios", "C10", "on n^2, truncated ratios are better than none", better, "ratio over none"),
        ("brake", "C14", "on n^2, the ESS step is better than the full step", better, "ESS step over full"),
        ("vcpo", "C13", "VCPO is not worse than n^2 alone", not_worse, "VCPO over n^2"),
    )
    cells: dict[str, list[Record]] = {}  # the design has one for each pair of prompts and lag
    for r in records:
        cells.setdefault(f"{r['prompts']} prompts, lag {r['lag']}", []).append(r)
    best = {p: best_of(own) for p, own in cells.items()}
    notes = {"norms": at_edge(best, cells), "vcpo": ess_told(best, "n2")}
    questions = [
        Question(key, claim, words, rule, levels(name), "where", note=notes.get(key, ""), beside=True)
        for key, claim, words, rule, name in asked
    ]
    strongest = {name: max(FACTORS, key=lambda f: moved(by[f])) for name, by in found.items()}
    caption = (
        "How far each factor moves what a choice is worth: its largest minus its smallest level mean of the difference "
        "in value. The longest bar decides. "
        + "; ".join(f"{n}: {f.replace('_', ' ')}" for n, f in strongest.items())
        + "."
    )
    levels_caption = (
        "What each choice is worth at every level of every factor: difference of values, mean over the cells with that "
        "level, 95% intervals over seeds."
    )
    figures = [
        Figure("which_factor_decides", which_factor(found), caption, alt=caption),
        Figure("levels", by_level_figure(found), levels_caption, alt=levels_caption),
    ]
    return Analysis(judge(questions), figures)


def which_factor(found: dict[str, dict[str, dict[Any, Estimate | None]]]) -> Plot:
    """One panel: factors from the one that decides most, a bar for each choice; the line is what matters."""
    order = sorted(FACTORS, key=lambda f: -max(moved(by[f]) for by in found.values()))
    names, bars = (
        [f.replace("_", " ") for f in order],
        {name: [moved(by[f]) for f in order] for name, by in found.items()},
    )
    parts = [
        series(name, x, names, [0.0] * len(x), x, color=number, line=False)
        for number, (name, x) in enumerate(bars.items())
    ]
    limit = max(0.1, 1.1 * max(map(max, bars.values())))
    axes = panel("", "how far the factor moves it", "", parts, order=names, xlim=[0, limit], vlines=[MARGIN])
    return plot(axes, width=6.4, height=4.0)


def by_level_figure(found: dict[str, dict[str, dict[Any, Estimate | None]]]) -> Plot:
    """One panel a choice, one row a level, one scale for all."""
    ends = [
        abs(end) for by in found.values() for levels in by.values() for e in levels.values() if e for end in e.interval
    ]
    limit = 1.1 * max([MARGIN, *ends])
    panels = []
    for name, by in found.items():
        rows = {f"{f.replace('_', ' ')} {x}": e for f, levels in by.items() for x, e in levels.items() if e is not None}
        part = of_intervals(name, list(rows), list(rows.values()), 0, line=False)
        part |= {"x": part["y"], "y": part["x"]}
        panels.append(
            panel(name, "difference of values", "", [part], order=list(rows), xlim=[-limit, limit], vlines=[0.0])
        )
    return plot(*panels, width=4.6, height=5.2)


EXPERIMENT = Experiment(
    "regime_factors",
    "Which factor of a regime decides what n^2, ratios and the ESS step are worth?",
    ("C10", "C13", "C14"),
    settings,
    run,
    analyse,
    takes_estimators=True,
)
