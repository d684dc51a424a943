"""How do ratios and the variance of the gradient grow with lag, step size and length?

A tabular policy over T tokens learns by sampled REINFORCE to match a target string, one point a token; the behavior
policy is the one k updates back. Log-ratio spread, k-hat and the share of the heaviest 1% come from draws; ESS and the
variance of the sequence-IS gradient are exact (dynamic programming over the chain). If the variance went as 1/ESS, then
variance x ESS fraction would not depend on the lag: it does as far as w^2 is correlated with ||s||^2 R^2.
"""

from dataclasses import replace

import numpy as np
from matplotlib.figure import Figure as Canvas
from scipy.stats import somersd

from simulations.drawing import canvas, color, draw_intervals, marker
from simulations.protocol import Analysis, Experiment, Figure, Record, Setting, Verdict
from simulations.stats import Interval, median_interval
from vcposim.arrays import Array
from vcposim.estimators import Estimator
from vcposim.gauges.tails import tail_index
from vcposim.laboratory import exact
from vcposim.problems.chains import chain_problem
from vcposim.problems.policies import TabularSoftmax, moved, random_tabular
from vcposim.problems.token_chains import TokenChain, partial_credit
from vcposim.weights import Weighting

VOCABULARY, GROUP_SIZE = 8, 8
SWEPT = ("lag", "step", "length")
GROWS = ("log_ratio_sd", "khat", "top_share", "chi2")
NAMES = {"log_ratio_sd": "sd of log w", "khat": "k-hat", "top_share": "share of the top 1%", "chi2": "chi2"}


def settings(size: str) -> list[Setting]:
    """Step sizes x lengths x learners; each setting covers all lags."""
    full = size == "full"
    lags = (0, 1, 2, 4, 8, 16, 32, 64) if full else (0, 1, 4, 16)
    return [
        {"step": step, "length": length, "seed": seed, "lags": list(lags), "draws": 8192 if full else 2048}
        for step in ((0.05, 0.1, 0.2, 0.4) if full else (0.1, 0.4))
        for length in ((4, 8, 16) if full else (4, 16))
        for seed in range(12 if full else 5)
    ]


def run(setting: Setting) -> list[Record]:
    """One learner: its last policy against its earlier ones."""
    rng = np.random.default_rng([1, setting["seed"], setting["length"]])
    chain = partial_credit([int(x) for x in rng.integers(VOCABULARY, size=(setting["length"],))], VOCABULARY)
    chain = replace(chain, reward=chain.reward * setting["length"])  # a point a token, whatever the length
    history = learn(rng, chain, setting["step"], max(setting["lags"]))
    return [lag_record(rng, chain, history, lag, setting) for lag in setting["lags"]]


def learn(rng: np.random.Generator, chain: TokenChain, step: float, updates: int) -> list[TabularSoftmax]:
    """Policies of an on-policy REINFORCE run with the group mean, first to last."""
    history = [random_tabular(rng, chain.shape, 0.1)]
    for _ in range(updates):
        problem = chain_problem(chain, history[-1], [history[-1]])
        batch = problem.sample(rng, 1, GROUP_SIZE)
        coefficient = Estimator(Weighting("none"), "group_mean").coefficients(batch) / GROUP_SIZE
        history.append(moved(history[-1], batch.scored().combine(coefficient)[0], step))
    return history


def lag_record(
    rng: np.random.Generator, chain: TokenChain, history: list[TabularSoftmax], lag: int, setting: Setting
) -> Record:
    """The last policy as target, the one `lag` updates back as behavior."""
    problem = chain_problem(chain, history[-1], [history[-1 - lag]])
    batch = problem.sample(rng, setting["draws"], 1)
    log_weight = np.sum(batch.given_ratio, axis=-1).reshape(-1)
    moments = exact.moments(problem, Estimator(), 1)
    shape = tail_index(log_weight)
    return {
        **{key: setting[key] for key in ("step", "length", "seed")},
        "lag": lag,
        "log_ratio_sd": float(np.std(log_weight)),
        "khat": shape if np.isfinite(shape) else None,
        "top_share": top_share(np.exp(log_weight)),
        "variance": float(moments.variance_per_sample),
        "relative_bias": float(moments.relative_bias),
        **{key: float(value) for key, value in exact.diagnostics(problem).items()},
    }


def top_share(weight: Array, fraction: float = 0.01) -> float:
    """Share of the heaviest `fraction` of samples in the total weight."""
    count = max(1, round(fraction * weight.size))
    return float(np.sort(weight)[-count:].sum() / weight.sum())


def analyse(records: list[Record]) -> Analysis:
    """Verdicts on C1 and C4."""
    caption = (
        "Exact variance of the sequence-IS gradient over its on-policy value, against 1/ESS fraction: a point for each "
        "learner, lag and step size. On the line, variance goes as 1/ESS."
    )
    figures = [
        Figure("spread_against_lag", draw_spread, "Spread of the log-ratios of trajectories against lag: medians."),
        Figure("variance_against_ess", draw_variance, caption, alt=caption),
    ]
    return Analysis([*(_grows(records, name) for name in GROWS), _inverse_ess(records)], figures)


def _grows(records: list[Record], name: str) -> Verdict:
    """Somers' D of a measure with each swept variable, within fixed values of the others."""
    stale = [r for r in records if r["lag"] and r[name] is not None]
    found = {swept: _concordance(stale, name, swept) for swept in SWEPT}
    with_which = [swept for swept, interval in found.items() if interval.low > 0]
    growing = len(with_which) == len(SWEPT)
    return Verdict(
        "C1",
        f"{NAMES[name]} grows with lag, step size and length",
        "holds" if growing else "holds if" if "lag" in with_which else "fails",
        "Somers' D " + ", ".join(f"{interval} with {swept}" for swept, interval in found.items()),
        "" if growing else f"{', '.join(with_which)} only" if "lag" in with_which else "",
    )


def _concordance(records: list[Record], name: str, swept: str) -> Interval:
    # one D for each learner, or each seed, with everything but the swept variable held fixed
    others = [key for key in (*SWEPT, "seed") if key != swept]
    cells: dict[tuple[float, ...], list[Record]] = {}
    for r in records:
        cells.setdefault(tuple(r[key] for key in others), []).append(r)
    found = [somersd([r[swept] for r in cell], [r[name] for r in cell]).statistic for cell in cells.values()]
    return median_interval(found)


def _inverse_ess(records: list[Record]) -> Verdict:
    onpolicy = {(r["step"], r["length"], r["seed"]): r["variance"] for r in records if r["lag"] == 0}
    stale = [r for r in records if r["lag"]]
    ratio = [r["variance"] * r["ess_fraction"] / onpolicy[r["step"], r["length"], r["seed"]] for r in stale]
    low, high = np.quantile(ratio, [0.05, 0.95])
    near = [1 / 1.25 < x < 1.25 for x in ratio]
    within = float(np.mean(near))
    mild = float(np.mean([x for x, r in zip(near, stale, strict=True) if r["ess_fraction"] > 0.5]))
    return Verdict(
        "C4",
        "the variance of the gradient goes as 1/ESS",
        "holds if" if within < 0.95 else "holds",
        f"variance x ESS over its on-policy value: {min(ratio):.2g} to {max(ratio):.2g} (5–95%: {low:.2g} to "
        f"{high:.2g}); within 25% of 1 in {within:.0%} of cases, and in {mild:.0%} where the ESS fraction is above 0.5",
        "" if within >= 0.95 else "w^2 uncorrelated with ||s||^2 R^2",
    )


def draw_spread(records: list[Record]) -> Canvas:
    """Spread of log w against lag, one panel a length, one series a step size."""
    lengths = sorted({r["length"] for r in records})
    with canvas(len(lengths)) as (figure, panels):
        for ax, length in zip(panels, lengths, strict=True):
            for number, step in enumerate(sorted({r["step"] for r in records})):
                mine = [r for r in records if (r["length"], r["step"]) == (length, step) and r["lag"]]
                lags = sorted({r["lag"] for r in mine})
                spread = [median_interval(r["log_ratio_sd"] for r in mine if r["lag"] == lag) for lag in lags]
                draw_intervals(ax, lags, spread, number, f"step {step:g}")
            ax.set(xscale="log", yscale="log", xlabel="lag (updates)", title=f"{length} tokens")
        panels[0].set_ylabel("sd of log w (nats)")
        panels[0].legend()
    return figure


def draw_variance(records: list[Record]) -> Canvas:
    """Variance inflation against 1/ESS."""
    onpolicy = {(r["step"], r["length"], r["seed"]): r["variance"] for r in records if r["lag"] == 0}
    with canvas(1, width=5) as (figure, (ax,)):
        for number, length in enumerate(sorted({r["length"] for r in records})):
            mine = [r for r in records if r["length"] == length and r["lag"]]
            x = [1 / r["ess_fraction"] for r in mine]
            y = [r["variance"] / onpolicy[r["step"], r["length"], r["seed"]] for r in mine]
            ax.plot(x, y, marker(number), color=color(number), markersize=4, alpha=0.7, label=f"{length} tokens")
        ends = np.array(ax.get_xlim())
        line = np.geomspace(1, max(ends[1], 2), 10)
        ax.plot(line, line, color="gray", linewidth=0.8, label="1/ESS")
        ax.set(xscale="log", yscale="log", xlabel="1 / ESS fraction", ylabel="variance / on-policy variance")
        ax.legend()
    return figure


EXPERIMENT = Experiment(
    "variance_vs_lag",
    "How do ratios and the variance of the gradient grow with lag, step size and length?",
    ("C1", "C4"),
    settings,
    run,
    analyse,
)
