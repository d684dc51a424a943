"""Which factor decides who wins: baseline, ratio or step rule, by number of prompts and lag?

One network learns P prompts at once, each with a string of its own (`many_prompts`): what one prompt's update does to
the others is what single-prompt tasks cannot show. A cell is a place (prompts, lag, length, base rate, reward law); in
each the factorial baseline x ratio x step rule runs beside the rivals, these on the mean and on the n^2 baseline, and
synchronous training. Rivals' thresholds are those of 8 tokens, not of 8,000: GSPO's band is PPO's, 0.2. Each method has
the whole grid of step sizes and is judged at its own best, chosen on other seeds, and by its mean over the grid.

Values are success probabilities, exact, averaged over training; rewards {low, low + 1} shift rewards and not values.
"""

from dataclasses import replace
from typing import Any

from simulations.methods import Method, outcome, run_of, trace
from simulations.protocol import Analysis, Experiment, Record, Setting
from vcposim.catalogue import entry
from vcposim.estimators import Estimator
from vcposim.learning.lags import Lag
from vcposim.learning.step_rules import Control
from vcposim.learning.tasks import Task, many_prompts
from vcposim.surrogates import Clip, Reject
from vcposim.weights import Weighting

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

STEP_SIZES = (0.005, 0.01, 0.02, 0.04, 0.08, 0.16)
CORE = {"prompts": 16, "lag": 16, "length": 8, "base_rate": 0.17, "low": 0.0, "group_size": 8, "optimizer": "adam"}
CELLS: tuple[dict[str, Any], ...] = (
    {},
    {"lag": 64},
    {"prompts": 4, "lag": 64},
    {"prompts": 1, "lag": 64},
    {"low": -1.0},
    {"base_rate": 0.02},
    {"low": 1.0},
    {"prompts": 4},
    {"prompts": 1},
    {"length": 32},
    {"base_rate": 0.5},
    {"prompts": 64},
    {"group_size": 4},
    {"optimizer": "sgd"},
    {"prompts": 64, "lag": 64},
)
"""what each cell changes of the core"""


def settings(size: str) -> list[Setting]:
    """Cells x blocks of seeds x step sizes; a cell is complete before the next begins."""
    full = size == "full"
    cells = CELLS if full else ({"prompts": 4}, {"prompts": 4, "low": -1.0})
    blocks = [list(range(first, first + 8)) for first in (100, 108)] if full else [[0, 1], [2, 3]]
    sizes = STEP_SIZES if full else (0.02, 0.08)
    return [
        {**CORE, **cell, "step_size": step, "seeds": seeds, "updates": 160 if full else 60}
        for cell in cells
        for seeds in blocks
        for step in sizes
    ]


def place(setting: Setting) -> Task:
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
    keys = [(name, seed) for name in METHODS for seed in setting["seeds"]]
    options = {"step_size": step, "optimizer": setting["optimizer"]}
    runs = [run_of(METHODS[name], Lag(setting["lag"]), seed=seed, **options) for name, seed in keys]
    found = trace(place(setting), runs, setting["updates"], groups=groups, group_size=setting["group_size"])
    found["value"] = found["value"] - setting["low"]
    cell = {key: setting[key] for key in CORE}
    out = []
    for i, (name, seed) in enumerate(keys):
        o = outcome(found, i)
        numbers = {key: round(o[key], 4) for key in ("final", "average", "ess", "scale")}
        out.append({**cell, "method": name, "step_size": setting["step_size"], "seed": seed, **numbers,
                    "collapse": o["collapse"], "start": round(o["curve"][0], 4)})  # fmt: skip
    return out


def analyse(records: list[Record]) -> Analysis:
    """No verdict yet."""
    return Analysis([])


EXPERIMENT = Experiment(
    "regime_map",
    "Which factor decides who wins: baseline, ratio or step rule, by number of prompts and lag?",
    ("C10", "C13", "C14", "C15"),
    settings,
    run,
    analyse,
)
