"""Does a sound method solve what its start solves sometimes? A trainer's acceptance test, under lag.

A fixed set of problems, each solved 20 to 80% of the time by the warm-started policy: nothing in it is out of reach,
and nothing is given. They take turns, and a sound method must end above 95% success *on these problems*, which asks
nothing of generalization (after prime-rl's sanity example). What fails on policy is a broken trainer; what passes on
policy and fails under lag is a method that staleness breaks.

The policy and the chains of thought are those of `long_trajectories`, shorter: the running sums of 24 digits. Everybody
has three step sizes and is judged at its own best, chosen on seeds of the other parity.
"""

from functools import cache
from typing import Any

import numpy as np

from simulations.drawing import MUTED, Plot, panel, plot, series
from simulations.methods import Method, at_edge, best_of, chosen, value_of
from simulations.protocol import Analysis, Comparison, Experiment, Figure, Question, Record, Rule, Setting, judge
from simulations.questions.long_trajectories import BASE_RATE, LEAD, SYNCHRONOUS
from simulations.questions.long_trajectories import METHODS as AT_LENGTH
from vcposim.errors import InputError

TASK, STEPS, MODULUS = "running_sum", 24, 5
METHODS: dict[str, Method] = {
    name: AT_LENGTH[name] for name in ("VCPO", "TIS", "GSPO", "M2PO", "no correction", "n2", LEAD, *SYNCHRONOUS)
}
STEP_SIZES = (0.0002, 0.0004, 0.0008)
PROBLEMS = 64
"""of the set: with 4 a turn, each comes once in 16 updates"""
RANGE = (0.2, 0.8)
"""how often the start solves each of them"""
TRIED = 16
"""responses that say so"""
ACCEPTED = 0.95


def settings(size: str) -> list[Setting]:
    """Lags x step sizes x pairs of seeds, all methods each."""
    full = size == "full"
    updates = {"updates": 320, "every": 32, "problems": PROBLEMS} if full else {"updates": 4, "every": 2, "problems": 4}
    return [
        {"lag": lag, "step_size": step, "seeds": [seed, seed + 1], **updates}
        for lag in ((16, 64) if full else (2,))
        for step in (STEP_SIZES if full else STEP_SIZES[1:2])
        for seed in range(300, 308 if full else 302, 2)
    ]


def run(setting: Setting) -> list[Record]:
    """One record for each method and seed: accuracy on the set while learning, 4 responses to each problem."""
    from llm_bridge.training.lockstep import LockStep

    keys = [(name, seed) for name in METHODS for seed in setting["seeds"]]
    number = setting["problems"]
    runs = LockStep([config(METHODS[name], seed, setting) for name, seed in keys], lm=policy(), task=problems(number))
    last = setting["updates"] * config(METHODS["VCPO"], 0, setting).groups
    asked = range(last, last + number)  # each problem once, under numbers that no update trains on
    curve, reward = [runs.success(asked, 4).mean(axis=1)], []
    for record in runs.updates():
        reward.append(record["reward"])
        if runs.version % setting["every"] == 0:
            curve.append(runs.success(asked, 4).mean(axis=1))
    return [
        {
            **{key: setting[key] for key in ("lag", "step_size", "every", "updates", "problems")},
            "method": name,
            "seed": seed,
            "accuracy": round(float(curve[-1][i]), 4),
            "average": round(float(np.mean([c[i] for c in curve])), 4),
            "value": [round(float(c[i]), 4) for c in curve],
            "reward": round(float(np.mean(reward, axis=0)[i]), 4),
        }
        for i, (name, seed) in enumerate(keys)
    ]


def config(method: Method, seed: int, setting: Setting) -> Any:
    """The trainer's configuration of a run."""
    from llm_bridge.training import TrainConfig

    return TrainConfig(
        task=TASK,
        task_options={"steps": STEPS, "modulus": MODULUS},
        max_new_tokens=STEPS + 1,
        estimator=method.estimator,
        step_rule=method.control.rule,
        lag=setting["lag"] if method.stale else 0,
        lr=setting["step_size"],
        groups=4,
        group_size=8,
        optimizer="adam",
        updates=setting["updates"],
        extend=False,
        seed=seed,
    )


@cache
def policy() -> Any:
    """The warm start, kept in the cache folder."""
    from llm_bridge.models import load_model
    from llm_bridge.models.warmup import Recipe
    from llm_bridge.tasks import load_task

    task = load_task(TASK, steps=STEPS, modulus=MODULUS)
    recipe = Recipe(every=100, lessons=4096, batch=32, checks=256)
    return load_model("char", task=task, base_rate=BASE_RATE, recipe=recipe, hidden=32, layers=2, heads=2, length=56)


@cache
def problems(number: int) -> Any:
    """The first `number` problems that the start solves now and then, to train on in turn.

    Raises `InputError` if there are not so many among the first 1,024.
    """
    from llm_bridge.tasks import load_task
    from llm_bridge.training.lockstep import LockStep
    from llm_bridge.training.trainer import Repeated

    task = load_task(TASK, steps=STEPS, modulus=MODULUS)
    start = LockStep([config(METHODS["VCPO"], 0, {"lag": 0, "step_size": 0.0, "updates": 1})], lm=policy(), task=task)
    kept: list[int] = []
    for first in range(0, 1024, 64):
        rate = start.success(range(first, first + 64), TRIED)[0]
        kept += [first + i for i, x in enumerate(rate) if RANGE[0] <= x <= RANGE[1]]
        if len(kept) >= number:
            return Repeated(task, tuple(kept[:number]))
    raise InputError(f"problems: {len(kept)} of {number} are solved {RANGE[0]:.0%} to {RANGE[1]:.0%} of the time")


def analyse(records: list[Record]) -> Analysis:
    """C13, C14 and C15: who passes, on policy and under lag."""
    lags = list(dict.fromkeys(r["lag"] for r in records))
    places = {f"lag {k}": chosen(records, lag=k) for k in lags}
    best = {p: best_of(own) for p, own in places.items()}
    passes = Rule("accuracy on the problems trained on, at the end, own best step", ">", ACCEPTED, 0.0)

    def of(*names: str) -> list[Comparison]:
        return [Comparison(f"{n}, {p}", value_of(own, n, "accuracy")) for n in names for p, own in best.items()]

    rivals = ("TIS", "GSPO", "M2PO")
    asked = [
        ("sound_on_policy", "C15", "synchronous training, with the mean and with n^2, passes", of(*SYNCHRONOUS)),
        ("vcpo_passes", "C13", "VCPO passes under lag", of("VCPO")),
        ("rivals_pass", "C13", "TIS, GSPO and M2PO pass under lag", of(*rivals)),
        ("uncorrected_passes", "C13", "no correction passes under lag", of("no correction")),
        ("n2_passes", "C14", "n^2 without ratios, with and without the ESS step, passes under lag", of("n2", LEAD)),
    ]
    edges = at_edge(best, places)
    questions = [
        Question(key, claim, f"acceptance: {words} (above 95% on problems the start solves 20 to 80% of the time)",
                 passes, found, "where", "transformer", edges if key == "sound_on_policy" else "", True)
        for key, claim, words, found in asked
    ]  # fmt: skip
    caption = (
        "Accuracy on the problems trained on, which the start solves 20 to 80% of the time; everyone at its own best "
        "step size, mean over seeds. Line: 95%. Gray: synchronous training with the mean (solid), n^2 (dashed)."
    )
    return Analysis(judge(questions), [Figure("acceptance", figure(best), caption, alt=caption)])


def figure(best: dict[str, list[Record]]) -> Plot:
    """Accuracy against updates, a panel a lag."""
    panels = []
    for p, own in best.items():
        styles: list[tuple[str, dict[str, Any]]] = [
            (name, {"color": number, "dashed": number > 5})
            for number, name in enumerate(n for n in METHODS if n not in SYNCHRONOUS)
        ]
        styles += [(name, {"color": MUTED, "dashed": i == 1}) for i, name in enumerate(SYNCHRONOUS)]
        drawn = []
        for name, style in styles:
            if runs := chosen(own, method=name):
                rate = np.mean([r["value"] for r in runs], axis=0)
                drawn.append(series(name, np.arange(len(rate)) * runs[0]["every"], rate, **style))
        panels.append(
            panel(p, "update", "accuracy on the problems trained on", drawn, ylim=[0, 1.02], hlines=[ACCEPTED])
        )
    return plot(*panels, width=4.6, columns=2)


def world(mode: str, key: str) -> list[Record]:
    """Records in which everybody passes, nobody does, or nobody can tell."""
    rng, records = np.random.default_rng(0), []
    middle = {"true": 0.99, "opposite": 0.7, "noise": ACCEPTED, "between": ACCEPTED}[mode]
    for lag in (16, 64):
        for name in METHODS:
            for step, off in ((0.001, 0.0), (0.002, 0.1)):
                for seed in range(24):
                    x = middle - off + (0.04 if mode == "noise" else 0.002) * rng.uniform(-1, 1)
                    row = {"lag": lag, "method": name, "step_size": step, "seed": seed, "every": 32, "updates": 64}
                    records.append({**row, "accuracy": x, "average": x, "value": [0.5, x, x], "problems": PROBLEMS})
    return records


EXPERIMENT = Experiment(
    "acceptance",
    "Does a sound method solve, under lag too, the problems that its start solves sometimes?",
    ("C13", "C14", "C15"),
    settings,
    run,
    analyse,
    extra="llm",
    no_estimators="trains its own methods in lock-step: transformer_collapse takes yours",
    world=world,
)
