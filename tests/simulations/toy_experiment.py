"""A tiny experiment with a command line of its own, for the tests of the runner.

`run` is a pure function of its setting; what it waits for is not part of the result. The environment variable
TOY_GATE names a file: settings from number 3 on wait until it exists, so that a test can stop a run in the middle.
TOY_FAIL holds the number of a setting that raises, TOY_DIE of one whose worker dies, TOY_NAN of one that records a NaN.
"""

import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from simulations.protocol import Analysis, Experiment, Figure, Record, Setting, Verdict


def settings(size: str) -> list[Setting]:
    return [{"number": n, "seed": 10 + n} for n in range(8 if size == "reduced" else 16)]


def run(setting: Setting) -> list[Record]:
    gate = os.environ.get("TOY_GATE")
    while setting["number"] >= 3 and gate and not Path(gate).exists():
        time.sleep(0.01)
    if os.environ.get("TOY_FAIL") == str(setting["number"]):
        raise RuntimeError("deliberate\nsecond line")
    if os.environ.get("TOY_DIE") == str(setting["number"]):
        os._exit(9)
    draw = np.random.default_rng(setting["seed"]).standard_normal(3)
    value = float("nan") if os.environ.get("TOY_NAN") == str(setting["number"]) else draw.mean()
    return [{"number": setting["number"], "mean": value, "draw": draw, "text": "é <b>"}, {"last": True}]


def other_settings(size: str) -> list[Setting]:
    return [setting | {"seed": 99 + setting["number"]} for setting in settings(size)]


def draw_means(records: list[Record]) -> object:
    from matplotlib.figure import Figure as MplFigure

    figure = MplFigure(figsize=(6, 3))
    axes = figure.subplots()
    axes.plot([r["mean"] for r in records if "mean" in r], "o-")
    axes.set_xlabel("setting")
    axes.set_ylabel("mean of three draws")
    return figure


def analyse(records: list[Record]) -> Analysis:
    means = [r["mean"] for r in records if "mean" in r]
    verdicts = [
        Verdict(
            "C12", "the mean of three draws is <script>alert(1)</script> zero", "fails", f"{means[0]:.3f} & <b>more"
        ),
        Verdict(
            "C4", "variance of the mean is 1/3 of the variance", "holds if", f"{np.var(means):.3f}", "draws are iid"
        ),
        Verdict("C4", "the mean has a sign", "holds", "8 of 8"),
    ]
    figure = Figure("means", draw_means, 'Means "by" <setting>', 'A line of means & "quotes"')
    return Analysis(verdicts, [figure])


EXPERIMENT = Experiment("toy", "Is the mean of three <i>draws</i> zero?", ("C4", "C12"), settings, run, analyse)
EXPERIMENTS = {
    "toy": EXPERIMENT,
    "toy_two": replace(EXPERIMENT, id="toy_two", settings=other_settings),
}


def command() -> int:
    """The command line on these experiments, for a process of its own."""
    from simulations.__main__ import main  # which workers do not need

    return main(experiments=EXPERIMENTS)
