"""How do ratios and the variance of the gradient grow with lag, step size and length?

A tabular policy over T tokens learns by sampled REINFORCE to match a target string, one point a token; the behavior
policy is the one k updates back. Log-ratio spread, k-hat and the share of the heaviest 1% come from draws; ESS and the
variance of the sequence-IS gradient are exact (dynamic programming over the chain). If the variance went as 1/ESS, then
variance x ESS fraction would not depend on the lag: it does as far as w^2 is correlated with ||s||^2 R^2.
"""

import math
from dataclasses import replace

import numpy as np
from scipy.stats import somersd

from simulations.drawing import Plot, of_intervals, panel, plot, series
from simulations.protocol import Analysis, Comparison, Experiment, Figure, Question, Record, Rule, Setting, judge
from simulations.stats import DIFFERENCE, of_seeds
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
    """Share of the heaviest `fraction` of samples in the total weight: `weight` (n,)."""
    count = max(1, round(fraction * weight.size))
    return float(np.sort(weight)[-count:].sum() / weight.sum())


def analyse(records: list[Record]) -> Analysis:
    """Verdicts on C1 and C4."""
    caption = (
        "Exact variance of the sequence-IS gradient over its on-policy value, against 1/ESS fraction: a point for each "
        "learner, lag and step size. On the line, variance goes as 1/ESS (shaded: within 25%)."
    )
    spread = "Spread of the log-ratios of trajectories against lag: means over learners with 95% intervals."
    figures = [
        Figure("spread_against_lag", spread_figure(records), spread, alt=spread),
        Figure("variance_against_ess", variance_figure(records), caption, alt=caption),
    ]
    return Analysis(judge([*(_grows(records, name) for name in GROWS), _inverse_ess(records)]), figures)


def _grows(records: list[Record], name: str) -> Question:
    """Somers' D of a measure with each swept variable, within fixed values of the others."""
    stale = [r for r in records if r["lag"] and r[name] is not None]
    return Question(
        f"{name}_grows",
        "C1",
        f"{NAMES[name]} grows with lag, step size and length",
        Rule("Somers' D with the swept variable, the others fixed", ">", 0.0, 0.1),
        [Comparison(swept, of_seeds(_concordance(stale, name, swept), bounds=DIFFERENCE)) for swept in SWEPT],
        "where",
    )


def _concordance(records: list[Record], name: str, swept: str) -> list[tuple[int, float]]:
    """(seed, D), one for each cell in which everything but the swept variable is fixed."""
    others = [key for key in (*SWEPT, "seed") if key != swept]
    cells: dict[tuple[float, ...], list[Record]] = {}
    for r in records:
        cells.setdefault(tuple(r[key] for key in others), []).append(r)
    return [
        (cell[0]["seed"], float(somersd([r[swept] for r in cell], [r[name] for r in cell]).statistic))
        for cell in cells.values()
        if len({r[swept] for r in cell}) > 1
    ]


def _inverse_ess(records: list[Record]) -> Question:
    stale = _inflation(records)
    above = [r for r in stale if r["ess_fraction"] > 0.5]
    below = [r for r in stale if r["ess_fraction"] <= 0.5]
    within = float(np.mean([abs(math.log(r["product"])) < math.log(1.25) for r in stale])) if stale else 0.0
    return Question(
        "inverse_ess",
        "C4",
        "the variance of the gradient goes as 1/ESS, within 25%",
        Rule("|log| of variance x ESS over its on-policy value, nats", "<", 0.0, math.log(1.25)),
        [
            Comparison(name, of_seeds((r["seed"], abs(math.log(r["product"]))) for r in some))
            for name, some in (("ESS fraction above 0.5", above), ("ESS fraction below 0.5", below))
        ],
        "where",
        "exact",
        f"within 25% in {within:.0%} of {len(stale)} cases",
    )


def _inflation(records: list[Record]) -> list[Record]:
    """Stale records with variance over its on-policy value, and that times the ESS fraction."""
    fresh = {(r["step"], r["length"], r["seed"]): r["variance"] for r in records if r["lag"] == 0}
    out = []
    for r in records:
        key = r["step"], r["length"], r["seed"]
        if r["lag"] and fresh.get(key) and r["variance"] > 0:
            inflation = r["variance"] / fresh[key]
            out.append({**r, "inflation": inflation, "product": inflation * r["ess_fraction"]})
    return out


def spread_figure(records: list[Record]) -> Plot:
    """Spread of log w against lag, one panel a length, one series a step size."""
    panels = []
    lags = sorted({r["lag"] for r in records if r["lag"]})
    for length in sorted({r["length"] for r in records}):
        parts = []
        for number, step in enumerate(sorted({r["step"] for r in records})):
            mine = [r for r in records if (r["length"], r["step"]) == (length, step)]
            rows = {
                k: of_seeds(((r["seed"], r["log_ratio_sd"]) for r in mine if r["lag"] == k), scale="log") for k in lags
            }
            known = {k: e for k, e in rows.items() if e is not None}
            parts.append(of_intervals(f"step {step:g}", list(known), list(known.values()), number))
        axes = panel(f"{length} tokens", "lag (updates)", "sd of log w (nats)", parts, xscale="log", yscale="log")
        panels.append({**axes, "ticks": lags})
    return plot(*panels, width=3.4, columns=3)


def variance_figure(records: list[Record]) -> Plot:
    """Variance inflation against 1/ESS."""
    stale = _inflation(records)
    parts = []
    for number, length in enumerate(sorted({r["length"] for r in stale})):
        mine = [r for r in stale if r["length"] == length]
        x, y = [1 / r["ess_fraction"] for r in mine], [r["inflation"] for r in mine]
        parts.append(series(f"{length} tokens", x, y, color=number, line=False))
    axes = panel("", "1 / ESS fraction", "variance / on-policy variance", parts, xscale="log", yscale="log")
    return plot({**axes, "diagonal": 0.25}, width=5.5, height=4.0)


EXPERIMENT = Experiment(
    "variance_vs_lag",
    "How do ratios and the variance of the gradient grow with lag, step size and length?",
    ("C1", "C4"),
    settings,
    run,
    analyse,
    no_estimators="measures ratios and the plain importance-weighted gradient, by sums that know it alone: vcposim "
    "compare has the exact variance of yours over lag",
)
