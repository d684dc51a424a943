"""What does estimating the baseline from the batch itself cost, and what does the released code's weight change?

An in-batch baseline has seen the reward it is subtracted from. For the plain mean that shrinks the gradient by 1 - 1/N
and nothing else; for OPOB the leverage identity R_i - b = (1 - h_i)(R_i - b_{-i}) says it multiplies each
contribution of the unbiased leave-one-out estimate by 1 minus its share of the weight: a soft mask on dominating
samples. That mask is a bias in direction. Everything here is exact: all count vectors of the group, with their
probability.
"""

import numpy as np
from matplotlib.figure import Figure as Canvas

from simulations.drawing import canvas, draw_intervals, legend_beside
from simulations.problems import POLICIES, stale_bandit
from simulations.protocol import Analysis, Experiment, Figure, Record, Setting, Verdict
from simulations.stats import Interval, median_interval, share
from vcposim.baselines import leverage, weighted_mean, weighted_mean_of_others
from vcposim.estimators import Estimator
from vcposim.laboratory import exact

BASELINES = ("group_mean", "leave_one_out", "opob", "opob_leave_one_out", "opob_released", "leverage_damped_mean")
ARMS = 4
SHOWN = {"policy": "trained", "chi2": 3.0}


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
        "size (medians over problems, 95% intervals). Leave-one-out removes the bias; it need not lower the error."
    )
    verdicts = [_identity(identity), _shrinkage(moments), *_bias(moments), *_released(moments)]
    return Analysis(verdicts, [Figure("bias_and_error_against_group_size", draw, caption, alt=caption)])


def _identity(records: list[Record]) -> Verdict:
    worst = max(r["violation"] for r in records)
    return Verdict(
        "C8",
        "in-batch OPOB is leave-one-out OPOB times the soft mask 1 - h",
        "holds" if worst < 1e-9 else "fails",
        f"largest difference {worst:.1e} over {200 * len(records)} random groups",
    )


def _shrinkage(records: list[Record]) -> Verdict:
    off = max(abs(r["shrinkage"] - (1 - 1 / r["group_size"])) for r in records if r["baseline"] == "group_mean")
    return Verdict(
        "C8",
        "the in-batch group mean shrinks the gradient by exactly 1 - 1/N, off policy too, and does not turn it",
        "holds" if off < 1e-9 else "fails",
        f"largest difference {off:.1e}",
    )


def _bias(records: list[Record]) -> list[Verdict]:
    out = []
    for policy in POLICIES:
        bias = _over(records, policy, "relative_bias", "opob")
        ratio = _ratio(records, policy, "opob", "opob_leave_one_out")
        first, last = min(bias), max(bias)
        out.append(
            Verdict(
                "C8",
                f"in-batch OPOB is unbiased ({policy} policies)",
                "fails",
                f"relative bias {bias[first]} at N = {first}, {bias[last]} at N = {last}; "
                f"its error over leave-one-out's: {ratio[8]} at N = 8",
            )
        )
    return out


def _released(records: list[Record]) -> list[Verdict]:
    out = []
    for policy in POLICIES:
        ratio = _ratio(records, policy, "opob_released", "opob")[8]
        worse = [a > b for a, b in _pairs(records, policy, "opob_released", "group_mean", 8)]
        out.append(
            Verdict(
                "C9",
                f"the released code's weight (w counted twice) does as well as the formula ({policy} policies)",
                "fails" if ratio.low > 1 else "holds if",
                f"error over the formula's {ratio}; worse than the plain mean on {share(worse)} problems (N = 8)",
                "" if ratio.low > 1 else "the interval covers 1 at this divergence",
            )
        )
    return out


def _largest(records: list[Record]) -> float:
    return max(r["chi2"] for r in records)


def _pairs(records: list[Record], policy: str, a: str, b: str, n: int) -> list[tuple[float, float]]:
    def mse(name: str) -> dict[int, float]:
        chosen = [r for r in records if (r["policy"], r["baseline"], r["group_size"]) == (policy, name, n)]
        return {r["seed"]: r["mse"] for r in chosen if r["chi2"] == _largest(records)}

    first, second = mse(a), mse(b)
    return [(first[seed], second[seed]) for seed in first]


def _ratio(records: list[Record], policy: str, a: str, b: str) -> dict[int, Interval]:
    sizes = sorted({r["group_size"] for r in records})
    return {n: median_interval(x / y for x, y in _pairs(records, policy, a, b, n)) for n in sizes}


def _over(records: list[Record], policy: str, field: str, name: str) -> dict[int, Interval]:
    mine = [r for r in records if (r["policy"], r["baseline"], r["chi2"]) == (policy, name, _largest(records))]
    sizes = sorted({r["group_size"] for r in mine})
    return {n: median_interval(r[field] for r in mine if r["group_size"] == n) for n in sizes}


def draw(records: list[Record]) -> Canvas:
    """Relative bias, and error relative to the group mean's, against group size."""
    shown = [r for r in records if r["baseline"] != "identity" and all(r[k] == v for k, v in SHOWN.items())]
    sizes = sorted({r["group_size"] for r in shown})
    found = {(r["baseline"], r["group_size"], r["seed"]): r for r in shown}
    seeds = sorted({r["seed"] for r in shown})
    with canvas(2) as (figure, (bias, error)):
        for number, name in enumerate(BASELINES):
            for ax, field in ((bias, "relative_bias"), (error, "mse")):
                intervals = [
                    median_interval(
                        found[name, n, seed][field] / (found["group_mean", n, seed]["mse"] if field == "mse" else 1)
                        for seed in seeds
                    )
                    for n in sizes
                ]
                draw_intervals(ax, sizes, intervals, number, name)
        bias.set(xscale="log", xlabel="group size N", ylabel="relative bias", title="bias")
        error.set(xscale="log", xlabel="group size N", ylabel="MSE / MSE of group_mean", title="error")
        error.axhline(1, color="gray", linewidth=0.8)
        for ax in (bias, error):
            ax.set_xticks(sizes, [str(n) for n in sizes])
            ax.minorticks_off()
        legend_beside(figure, bias)
    return figure


EXPERIMENT = Experiment(
    "in_batch_bias",
    "What does an in-batch baseline cost, and the released weight?",
    ("C8", "C9"),
    settings,
    run,
    analyse,
)
