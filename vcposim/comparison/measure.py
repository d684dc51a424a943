"""One measurement of one estimator: the laws it keeps, its exact moments over lag, what it learns in one regime.

`measured(name, setting)` is a pure function of the estimator and the setting, so it can be computed anywhere, in any
order, and again. What cannot be measured is a record too: `not_judged` says why in one line.
"""

import math
import time
from dataclasses import replace
from typing import NotRequired, TypedDict, final

import numpy as np

from vcposim.catalogue.loading import InLibrary, estimator_named
from vcposim.comparison import transformers
from vcposim.comparison.design import (
    REFERENCE,
    REGIMES,
    LawsSetting,
    LearningSetting,
    MeasureSetting,
    MomentsSetting,
    TransformerSetting,
    place,
    problem,
)
from vcposim.errors import InputError
from vcposim.estimators import Estimator, FunctionEstimator, Resolved
from vcposim.laboratory import exact
from vcposim.laboratory.standard_problems import exact_moments
from vcposim.learning.collapse import NOT_COLLAPSED, collapse_step
from vcposim.learning.lags import Lag
from vcposim.learning.learner import Learner
from vcposim.learning.run_records import Run
from vcposim.moments import Moments
from vcposim.problems.rollouts import Problem

MOMENTS = ("bias", "variance", "mse", "cosine", "efficiency")
"""of the mean over a group: |bias| / |g|, variance and MSE over |g|^2, cosine, and descent efficiency D"""


@final
class NotJudged(TypedDict):
    """Why something could not be measured."""

    not_judged: str


@final
class MeasuredLaws(TypedDict):
    """Law -> what became of it, and what was seen where it is broken."""

    laws: dict[str, str]
    saw: NotRequired[dict[str, str]]


@final
class MeasuredMoments(TypedDict):
    """Problem -> `MOMENTS` there, or why there are none."""

    moments: dict[str, dict[str, float] | str]


@final
class MeasuredLearning(TypedDict):
    """By step size and seed: success probability averaged over training, and 1 for a run that was lost."""

    average: list[list[float]]
    lost: list[list[int]]


@final
class MeasuredTraining(TypedDict):
    """As `MeasuredLearning`, of success rates on held-out problems; `refused` counts updates without a finite gradient,
    and `start` is the SHA-256 of the weights that all began from: only runs from the same ones are paired."""

    average: list[list[float]]
    lost: list[list[int]]
    refused: list[list[int]]
    start: str


Measured = MeasuredLaws | MeasuredMoments | MeasuredLearning | MeasuredTraining | NotJudged
"""what is kept of one measurement, as JSON"""


def measured(name: str, setting: MeasureSetting) -> Measured:
    """What a setting says of an estimator: plain numbers, or `not_judged` with the reason.

    Raises `InputError` where transformers are asked for and the extra `llm` is not installed.
    """
    trained = transformers.part().trained if isinstance(setting, TransformerSetting) else None
    try:
        with np.errstate(all="ignore"):
            match setting:
                case TransformerSetting():
                    assert trained is not None
                    return trained(name, setting)
                case LearningSetting():
                    return learning(name, setting)
                case MomentsSetting():
                    return moments(name, setting)
            return laws(name, setting)
    except Exception as error:  # whatever a stranger's function raises is about that function alone
        return {"not_judged": reason(error)}


def reason(error: BaseException) -> str:
    """An exception as one line; our own input errors already name everything."""
    text = " ".join(str(error).split())
    return text if isinstance(error, InputError) else f"it raises {type(error).__name__}: {text}"


def laws(name: str, setting: LawsSetting) -> MeasuredLaws:
    """Each law of the kit: `holds`, `broken`, `not claimed`, `not claimed: broken`, or `does not apply`; and why."""
    import vcposim.testing.report_card as cards  # Hypothesis is slow to import, and the rest does without

    convert = "numpy"
    if ":" in name:
        estimator = estimator_named(name)
        if isinstance(estimator, FunctionEstimator):
            inside = estimator.function
            convert = inside.library if isinstance(inside, InLibrary) else "numpy"
    found = cards.findings(cards.trials(name, examples=setting.examples, convert=convert))
    words, saw = {}, {}
    for one in found:
        words[one.law] = "broken" if one.status == cards.VIOLATED else one.status
        if one.violation is not None:
            words[one.law] = "broken" if one.status == cards.VIOLATED else f"{one.status}: broken"
            saw[one.law] = " ".join(str(one.violation.saw).split())
        elif not one.tried:
            words[one.law] = "does not apply"
    return {"laws": words, "saw": saw}


def moments(name: str, setting: MomentsSetting) -> MeasuredMoments | NotJudged:
    """`MOMENTS` on each problem, or why there are none there."""
    estimator = estimator_named(name)
    out: dict[str, dict[str, float] | str] = {}
    for title, (environment, lag) in setting.problems.items():
        try:
            out[title] = numbers(moments_on(problem(environment, lag), estimator, setting.group_size))
        except Exception as error:
            out[title] = reason(error)
    why = [x for x in out.values() if isinstance(x, str)]
    if len(why) == len(out):
        return {"not_judged": why[0]}
    return {"moments": out}


def moments_on(place: Problem, estimator: Resolved, group_size: int) -> Moments:
    """Exact moments of any estimator on a problem of one prompt.

    One that spans prompts is shown each group as a batch of one prompt; smoothed weights, which have no form by counts,
    every batch as drawn.
    """
    if "grouped" in estimator.needs:
        tokens = "tokens" in estimator.needs
        return exact_moments(estimator.coefficients, place, group_size, per_token=tokens, grouped=True)  # type: ignore[arg-type]
    if isinstance(estimator, Estimator) and estimator.weighting.smooth is not None:
        estimator = FunctionEstimator(estimator.coefficients, estimator.needs)
    return exact.moments(place, estimator, group_size)


def numbers(found: Moments) -> dict[str, float]:
    """`MOMENTS` of moments; an `InputError` for one that is not finite."""
    size = float(np.sum(found.gradient**2))
    values = {
        "bias": float(found.relative_bias),
        "variance": float(found.variance_of_mean) / size,
        "mse": float(found.mse) / size,
        "cosine": float(found.cosine),
        "efficiency": float(found.descent_efficiency),
    }
    for key, value in values.items():
        if not math.isfinite(value):
            raise InputError(f"{key}: {value} is no number; coefficients are not finite on some batch")
    return {key: float(f"{value:.9g}") for key, value in values.items()}


def learning(name: str, setting: LearningSetting) -> MeasuredLearning:
    """The success probability averaged over training, (step size, seed), and which runs were lost (see `collapse`).

    Raises `InputError` where the learner leaves the range of floats.
    """
    estimator, regime = estimator_named(name), setting.regime
    steps, seeds = setting.step_sizes, setting.seeds
    task, family = place(regime.prompts, regime.length, regime.low, setting.base_rate)
    runs = [Run(estimator, seed=seed, lag=Lag(regime.lag), step_size=step) for step in steps for seed in seeds]
    learner = Learner(task, runs, groups=setting.groups, group_size=setting.group_size, family=family)
    value = np.stack([record.value for record in learner.updates(setting.updates)]) - regime.low
    lost = collapse_step(value) != NOT_COLLAPSED
    if not np.all(np.isfinite(value)):
        raise InputError("value: not finite; the learner left the range of floats")
    shape = (len(steps), len(seeds))
    # four digits: a thousandth of the difference that matters, and the same on every machine but for rare ties
    return {
        "average": [[round(float(v), 4) for v in row] for row in value.mean(axis=0).reshape(shape)],
        "lost": lost.reshape(shape).astype(int).tolist(),
    }


def cost(name: str, *, updates: int = 10, repeats: int = 3) -> float | None:
    """CPU time of an update of the small learner over that with the group mean, in this process; None if it fails.

    The smallest of some interleaved repeats: other programs only ever add time. A time is no property of the estimator
    alone, so it is no part of what is compared.
    """
    regime = replace(REGIMES[0], prompts=4)
    task, family = place(regime.prompts, regime.length, regime.low, 0.5)

    def seconds(which: str) -> float:
        runs = [Run(estimator_named(which), seed=seed, lag=Lag(4), step_size=0.01) for seed in range(8)]
        learner = Learner(task, runs, family=family)
        learner.update()  # whatever is made once
        start = time.process_time()
        for _ in learner.updates(updates):
            pass
        return time.process_time() - start

    try:
        with np.errstate(all="ignore"):
            pairs = [(seconds(name), seconds(REFERENCE)) for _ in range(repeats)]
    except Exception:
        return None
    mine, reference = (min(times) for times in zip(*pairs, strict=True))
    return mine / reference
