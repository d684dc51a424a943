"""What does estimating the baseline from the batch itself cost, and what does the released code's weight change?

An in-batch baseline has seen the reward it is subtracted from. For the plain mean that shrinks the gradient by 1 - 1/N
and nothing else; for OPOB the leverage identity R_i - b = (1 - h_i)(R_i - b_{-i}) says it multiplies each
contribution of the unbiased leave-one-out estimate by 1 minus its share of the weight: a soft mask on dominating
samples. That mask is a bias in direction. Everything here is exact: all count vectors of the group, with their
probability.
"""

import numpy as np

from simulations.drawing import Plot, of_intervals, panel, plot
from simulations.problems import POLICIES, stale_bandit
from simulations.protocol import Analysis, Comparison, Experiment, Figure, Question, Record, Rule, Setting, judge
from simulations.stats import Estimate, of_seeds
from simulations.verdicts import EXACT
from vcposim.baselines import leverage, weighted_mean, weighted_mean_of_others
from vcposim.estimators import Estimator
from vcposim.laboratory import exact

BASELINES = ("group_mean", "leave_one_out", "opob", "opob_leave_one_out", "opob_released", "leverage_damped_mean")
ARMS = 4
SHOWN = {"policy": "trained", "chi2": 3.0}
ROUNDING = 1e-9
"""what double precision may leave of an identity"""
NOTICEABLE, MATTERS = 0.01, 0.05
"""a relative bias, and a ratio of errors away from 1, that matter"""


def settings(size: str) -> list[Setting]:
    """Policies x divergences x group sizes x problems."""
    full = size == "full"
    groups, seeds = ((2, 4, 8, 16, 32), 60) if full else ((2, 4, 8, 16), 12)
    divergences = (0.0, 0.3, 1.0, 3.0, 10.0) if full else (0.3, 3.0)
    return [
        {"policy": policy, "chi2": chi2, "group_size": n, "seeds": seeds}
        for policy in POLICIES
        for chi2 in divergences
        for n in groups
    ]


def run(setting: Setting) -> list[Record]:
    """Exact moments of each baseline on each problem; problems are the same for all group sizes."""
    return [record for seed in range(setting["seeds"]) for record in problem_records(setting, seed)]


def problem_records(setting: Setting, seed: int) -> list[Record]:
    """One problem: a record for each baseline, and the worst violation of the leverage identity on drawn groups."""
    rng = np.random.default_rng([8, seed, POLICIES.index(setting["policy"])])
    problem = stale_bandit(rng, setting["policy"], ARMS, setting["chi2"])
    key = {name: setting[name] for name in ("policy", "chi2", "group_size")} | {"seed": seed}
    records = []
    for name in BASELINES:
        m = exact.moments(problem, Estimator(baseline=name), setting["group_size"])
        numbers = {"relative_bias": m.relative_bias, "cosine": m.cosine, "mse": m.mse, "variance": m.variance_of_mean}
        shrinkage = float(m.mean @ m.gradient / (m.gradient @ m.gradient))
        records.append({**key, "baseline": name, "shrinkage": shrinkage, **{k: float(v) for k, v in numbers.items()}})
    return [*records, {**key, "baseline": "identity", "violation": identity_violation(rng, setting["group_size"])}]


def identity_violation(rng: np.random.Generator, n: int, draws: int = 200) -> float:
    """Largest |(R_i - b) - (1 - h_i)(R_i - b_{-i})| over random rewards and weights over 20 orders of magnitude."""
    reward, weight = rng.normal(size=(draws, n)), np.exp(rng.uniform(-23, 23, size=(draws, n)))
    measure, unit = np.full((draws, n), 1 / n), 1 / n
    inside = reward - weighted_mean(reward, weight, measure)
    outside = (1 - leverage(weight, measure, unit)) * (reward - weighted_mean_of_others(reward, weight, measure, unit))
    return float(np.max(np.abs(inside - outside)))


def analyse(records: list[Record]) -> Analysis:
    """Verdicts on C8 and C9 at the largest divergence, and how they depend on group size."""
    identity = [r for r in records if r["baseline"] == "identity"]
    moments = [r for r in records if r["baseline"] != "identity"]
    caption = (
        f"Trained policies at chi2 = {SHOWN['chi2']:g}: relative bias and relative mean squared error against group "
        "size (means over problems, 95% intervals). Leave-one-out removes the bias; it need not lower the error."
    )
    asked = [_identity(identity), _shrinkage(moments)]
    asked += [question(moments, policy) for policy in POLICIES for question in (_bias, _released)]
    return Analysis(judge(asked), [Figure("bias_and_error_against_group_size", figure(moments), caption, alt=caption)])


def _identity(records: list[Record]) -> Question:
    worst = max((r["violation"] for r in records), default=None)
    return Question(
        "leverage_identity",
        "C8",
        "in-batch OPOB is leave-one-out OPOB times the soft mask 1 - h",
        Rule("largest violation over random groups", "<", 0.0, ROUNDING, EXACT),
        [Comparison(f"{200 * len(records)} random groups", None if worst is None else Estimate(worst))],
        witness="exact",
    )


def _shrinkage(records: list[Record]) -> Question:
    off = [abs(r["shrinkage"] - (1 - 1 / r["group_size"])) for r in records if r["baseline"] == "group_mean"]
    return Question(
        "mean_shrinks",
        "C8",
        "the in-batch group mean shrinks the gradient by exactly 1 - 1/N, off policy too, and does not turn it",
        Rule("largest difference of the shrinkage from 1 - 1/N", "<", 0.0, ROUNDING, EXACT),
        [Comparison(f"{len(off)} problems", Estimate(max(off)) if off else None)],
        witness="exact",
        beside=True,
    )


def _bias(records: list[Record], policy: str) -> Question:
    mine = _at_top(records, policy, "opob")
    sizes = sorted({r["group_size"] for r in mine})
    ratio = of_seeds(_log_pairs(records, policy, "opob", "opob_leave_one_out", 8), scale="log")
    return Question(
        f"opob_unbiased_{policy}",
        "C8",
        f"in-batch OPOB is unbiased ({policy} policies, largest divergence)",
        Rule("relative bias of the gradient", "<", 0.0, NOTICEABLE),
        [
            Comparison(f"N = {n}", of_seeds((r["seed"], r["relative_bias"]) for r in mine if r["group_size"] == n))
            for n in sizes
        ],
        "where",
        "exact",
        f"its error over leave-one-out's at N = 8: {ratio}",
    )


def _released(records: list[Record], policy: str) -> Question:
    sizes = sorted({r["group_size"] for r in records})
    against_mean = of_seeds(_log_pairs(records, policy, "opob_released", "group_mean", 8), scale="log")
    return Question(
        f"released_as_good_{policy}",
        "C9",
        f"the released code's weight (w counted twice) does as well as the formula ({policy} policies)",
        Rule("error with the released weight over the formula's", "<", 1.0, MATTERS),
        [
            Comparison(f"N = {n}", of_seeds(_log_pairs(records, policy, "opob_released", "opob", n), scale="log"))
            for n in sizes
        ],
        "where",
        "exact",
        f"its error over the plain mean's at N = 8: {against_mean}",
    )


def _at_top(records: list[Record], policy: str, baseline: str) -> list[Record]:
    top = max((r["chi2"] for r in records), default=0.0)
    return [r for r in records if (r["policy"], r["baseline"], r["chi2"]) == (policy, baseline, top)]


def _log_pairs(records: list[Record], policy: str, a: str, b: str, n: int) -> list[tuple[int, float]]:
    first, second = (
        {r["seed"]: r["mse"] for r in _at_top(records, policy, name) if r["group_size"] == n} for name in (a, b)
    )
    return [(seed, first[seed] / second[seed]) for seed in first if second.get(seed)]


def figure(records: list[Record]) -> Plot:
    """Relative bias, and error relative to the group mean's, against group size."""
    shown = [r for r in records if all(r[k] == v for k, v in SHOWN.items())]
    sizes = sorted({r["group_size"] for r in shown})
    found = {(r["baseline"], r["group_size"], r["seed"]): r for r in shown}
    seeds = sorted({r["seed"] for r in shown})

    def row(name: str, n: int, field: str) -> Estimate:
        over = {s: found["group_mean", n, s]["mse"] if field == "mse" else 1.0 for s in seeds}
        scale = "log" if field == "mse" else "real"
        found_there = of_seeds(((s, found[name, n, s][field] / over[s]) for s in seeds), scale=scale)
        assert found_there is not None, "every size has several problems"
        return found_there

    panels = [
        panel(
            title,
            "group size N",
            label,
            [
                of_intervals(name, sizes, [row(name, n, field) for n in sizes], number, dashed=number > 3)
                for number, name in enumerate(BASELINES)
            ],
            xscale="log",
            ticks=sizes,
            hlines=lines,
        )
        for title, label, field, lines in (
            ("bias", "relative bias", "relative_bias", []),
            ("error", "MSE / MSE of group_mean", "mse", [1.0]),
        )
    ]
    return plot(*panels)


EXPERIMENT = Experiment(
    "in_batch_bias",
    "What does an in-batch baseline cost, and the released weight?",
    ("C8", "C9"),
    settings,
    run,
    analyse,
    no_estimators="takes groups of up to 32, of which a function would have to be shown every batch: "
    "baselines_under_lag asks the same of groups of 8",
)
