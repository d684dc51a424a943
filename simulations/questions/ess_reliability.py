"""Can the ESS of a batch be trusted?

The plug-in ESS fraction rho = (sum w)^2 / (n sum w^2) estimates 1 / (1 + chi2(pi || mu)). Three ways it can mislead,
and the companions that may give it away (mean weight, which is 1 in expectation, and the Pareto k-hat):

- *heavy tails*: weights log-normal with sd sigma of log w (a random walk of token ratios), or Pareto with tail index
alpha. The
  sum of squares is dominated by weights a batch has not seen yet, so rho reads too high;
- *a missing mode*: the target moves mass to an outcome that the behavior policy hardly ever samples. Every weight seen
  is equal, rho reads 1;
- *arithmetic*: overflow, underflow and absolute epsilons, as in the reference code of VCPO.
"""

import math

import numpy as np

from simulations.drawing import Plot, panel, plot, series
from simulations.protocol import Analysis, Comparison, Experiment, Figure, Question, Record, Rule, Setting, judge
from simulations.stats import Estimate, rate
from simulations.verdicts import EXACT
from vcposim.arrays import Array
from vcposim.control import step_scale
from vcposim.diagnostics import chi2_of_weights, ess_fraction, ess_fraction_of_weights, log_mean_weight
from vcposim.errors import InputError
from vcposim.gauges.tails import khat

TOLERANCE = 0.25
"""the plug-in is called trustworthy where its median is within this fraction of the truth"""
MEAN_ALARM = 0.5
"""|mean weight - 1| above this is an alarm"""


def settings(size: str) -> list[Setting]:
    """Weights of known ESS by kind, spread and batch size; identities; arithmetic."""
    full = size == "full"
    draws = {"batches": 2000 if full else 300, "khat_batches": 200 if full else 40}
    sizes = (16, 64, 256, 1024, 4096) if full else (64, 1024)
    sigmas = (0.1, 0.25, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0) if full else (0.25, 1.0, 2.0, 3.0)
    alphas = (1.2, 1.5, 2.5, 3.0, 4.0) if full else (1.5, 3.0)
    swept: list[Setting] = [{"kind": "lognormal", "spread": s, "n": n} for s in sigmas for n in sizes]
    swept += [{"kind": "pareto", "spread": a, "n": n} for a in alphas for n in sizes]
    # the missing outcome is expected once in fifty batches
    swept += [{"kind": "missing_mode", "spread": m, "n": n} for m in (0.1, 0.5, 0.9) for n in sizes]
    swept = [{**setting, **draws, "seed": number} for number, setting in enumerate(swept)]
    swept.append({"kind": "identities", "problems": 2000 if full else 300, "seed": 1})
    return [*swept, {"kind": "arithmetic"}]


def run(setting: Setting) -> list[Record]:
    """Records of one setting; `kind` says which."""
    if setting["kind"] == "arithmetic":
        return [arithmetic_record(name, np.asarray(x)) for name, x in ARITHMETIC.items()]
    rng = np.random.default_rng([18, setting["seed"]])
    if setting["kind"] == "identities":
        return [identities_record(rng, setting["problems"])]
    return [plug_in_record(rng, setting)]


def log_weights(rng: np.random.Generator, kind: str, spread: float, shape: tuple[int, int]) -> Array:
    """Draws of log w with E[w] = 1: (m, n), nats."""
    if kind == "lognormal":
        return spread * rng.normal(size=shape) - spread**2 / 2
    if kind == "pareto":  # density ~ w^(-alpha - 1) above (alpha - 1) / alpha
        return math.log((spread - 1) / spread) + rng.exponential(size=shape) / spread
    missing = rng.random(shape) < 1 / (50 * shape[1])
    return np.where(missing, math.log(spread * 50 * shape[1]), math.log((1 - spread) / (1 - 1 / (50 * shape[1]))))


def true_fraction(kind: str, spread: float, n: int) -> float:
    """1 / E[w^2], exactly."""
    if kind == "lognormal":
        return math.exp(-(spread**2))
    if kind == "pareto":
        return 0.0 if spread <= 2 else (spread - 1) ** -2 * spread * (spread - 2)
    rare = 1 / (50 * n)
    return 1 / (spread**2 / rare + (1 - spread) ** 2 / (1 - rare))


def plug_in_record(rng: np.random.Generator, setting: Setting) -> Record:
    """What batches of n weights say, beside the truth."""
    kind, spread, n = setting["kind"], setting["spread"], setting["n"]
    log_weight = log_weights(rng, kind, spread, (setting["batches"], n))
    fraction = ess_fraction(log_weight)
    mean = np.exp(log_mean_weight(log_weight))
    tails = [khat(row) for row in log_weight[: setting["khat_batches"]]]
    low, median, high = np.quantile(fraction, [0.05, 0.5, 0.95])
    return {
        **{key: setting[key] for key in ("kind", "spread", "n", "batches", "khat_batches")},
        "true": true_fraction(kind, spread, n),
        "low": low,
        "median": median,
        "high": high,
        "mean_alarm": float(np.mean(np.abs(mean - 1) > MEAN_ALARM)),
        "khat_alarm": float(np.mean([tail.alarming for tail in tails])),
        "misled": float(np.mean(fraction > 2 * true_fraction(kind, spread, n))),
    }


def identities_record(rng: np.random.Generator, problems: int) -> Record:
    """C3 on random pairs of distributions: the worst violation of each identity."""
    worst = {"chi2": 0.0, "shift": 0.0, "range": 0.0}
    for _ in range(problems):
        k = int(rng.integers(2, 50))
        target, behavior = rng.dirichlet(np.full(k, rng.uniform(0.05, 2)), size=2) * (1 - 1e-6) + 1e-6 / k
        weight = target / behavior
        rho = ess_fraction_of_weights(weight, behavior)
        worst["chi2"] = max(worst["chi2"], abs(rho * (1 + chi2_of_weights(weight, behavior)) - 1))
        log_weight = rng.normal(size=k) * rng.choice([0.1, 1, 100, 5000])
        shift = rng.choice([-1e4, 1e4])
        plain, moved = ess_fraction(log_weight), ess_fraction(log_weight + shift)
        worst["shift"] = max(worst["shift"], abs(moved / plain - 1))
        worst["range"] = max(worst["range"], 1 / k - plain, plain - 1)
    return {"kind": "identities", "problems": problems, **worst}


ARITHMETIC: dict[str, list[float]] = {
    "log-ratios of +200": [200.0, 199.0, 198.0, 0.0],
    "log-ratios of -200": [-200.0, -200.0, -200.0, -200.0],
    "equal weights of 1e-6": [math.log(1e-6)] * 256,
    "log-ratios of +10000": [10_000.0, 9_999.0],
    "one NaN": [0.0, math.nan, 0.0],
    "no sample has weight": [-math.inf, -math.inf],
}
"""log-weights whose ESS is known by hand"""
KNOWN = {
    "log-ratios of +200": (1 + math.exp(-1) + math.exp(-2)) ** 2 / (1 + math.exp(-2) + math.exp(-4)) / 4,
    "log-ratios of -200": 1.0,
    "equal weights of 1e-6": 1.0,
    "log-ratios of +10000": (1 + math.exp(-1)) ** 2 / (1 + math.exp(-2)) / 2,
}
"""the ESS fractions, where there is one; elsewhere the only safe step is none"""


def arithmetic_record(name: str, log_weight: Array) -> Record:
    """The step each implementation takes (exponent 1/2, reference 1) of `log_weight` (n,), beside the right one."""
    right = math.sqrt(KNOWN[name]) if name in KNOWN else 0.0
    steps = {"reference": reference_step(log_weight), "shipped": shipped_step(log_weight)}
    record: Record = {"kind": "arithmetic", "case": name, "right": right}
    record.update(dict(steps.items()))
    record.update({f"{key}_wrong": bool(abs(step - right) > 1e-3) for key, step in steps.items()})
    return record


def reference_step(log_weight: Array) -> float:
    """The step of VCPO's reference code by reading, of `log_weight` (n,).

    float32, absolute epsilon 1e-8, Python's min(1.0, nan) = 1.0.
    """
    with np.errstate(all="ignore"):
        weight = np.exp(log_weight.astype(np.float32))
        rho = float(weight.sum() ** 2 / ((weight**2).sum() + np.float32(1e-8)) / weight.size)
    return min(1.0, rho) ** 0.5


def shipped_step(log_weight: Array) -> float:
    """Our step of `log_weight` (n,): what cannot be weighed moves nothing."""
    try:
        fraction = ess_fraction(log_weight.astype(np.float32))
    except InputError:
        fraction = np.asarray(np.nan)
    return float(step_scale(fraction, exponent=0.5))


def analyse(records: list[Record]) -> Analysis:
    """Verdicts on C3, C5 and C18."""
    plug_in = [r for r in records if r["kind"] in TITLES]
    identities = [r for r in records if r["kind"] == "identities"]
    arithmetic = [r for r in records if r["kind"] == "arithmetic"]
    asked = [_identities(identities), _log_normal(plug_in), _pareto(plug_in), _missing_mode(plug_in)]
    asked += [_arithmetic(arithmetic, key, words) for key, words in IMPLEMENTATIONS.items()]
    caption = (
        f"Median and 5–95% range of the ESS fraction read off a batch, against the truth. On the line it is right "
        f"(within {TOLERANCE:.0%}: shaded); above it, it reads too high. A true value of zero stands at 1e-4."
    )
    return Analysis(judge(asked), [Figure("plug_in_against_truth", figure(plug_in), caption, alt=caption)])


def _identities(records: list[Record]) -> Question:
    worst = max((max(r["chi2"], r["shift"], r["range"]) for r in records), default=None)
    return Question(
        "ess_identities",
        "C3",
        "rho = 1/(1 + chi2), lies in [1/n, 1], and does not change with the scale of the weights",
        Rule("largest relative violation over random pairs, log-weights shifted by ±10^4", "<", 0.0, 1e-9, EXACT),
        [Comparison(f"{sum(r['problems'] for r in records)} pairs", None if worst is None else Estimate(worst))],
        witness="exact",
    )


def _median(r: Record, over: float) -> Estimate:
    """The median of the batches over a number; its standard error is a normal sample's, on the log scale."""
    spread = math.log(r["high"] / r["low"]) / 3.29 if r["high"] > r["low"] else 0.0
    return Estimate(r["median"] / over, 1.2533 * spread / math.sqrt(r["batches"]), r["batches"], "log")


def _log_normal(records: list[Record]) -> Question:
    normal = [r for r in records if r["kind"] == "lognormal"]
    good = [r for r in normal if r["median"] / r["true"] <= 1 + TOLERANCE]
    limit = {n: max((r["spread"] for r in good if r["n"] == n), default=0.0) for n in sorted({r["n"] for r in normal})}
    return Question(
        "plug_in_lognormal",
        "C5",
        "the ESS of a batch does not read too high (log-normal weights)",
        Rule("median ESS fraction of a batch over the true one", "<", 1.0, TOLERANCE, "of a median over batches"),
        [Comparison(f"sd {r['spread']:g}, n = {r['n']}", _median(r, r["true"])) for r in normal],
        "where",
        note="largest sd of log w at which it can be trusted: "
        + ", ".join(f"{s:g} for n = {n}" for n, s in limit.items()),
    )


def _pareto(records: list[Record]) -> Question:
    heavy = [r for r in records if r["kind"] == "pareto" and r["true"] == 0]
    alarms = ", ".join(f"{r['khat_alarm']:.0%} (alpha {r['spread']:g}, n = {r['n']})" for r in heavy)
    return Question(
        "plug_in_pareto",
        "C5",
        "a batch with infinite-variance weights shows an ESS near its true fraction, 0 (Pareto, alpha <= 2)",
        Rule("median ESS fraction of a batch", "<", 0.0, 0.1, "of a median over batches"),
        [Comparison(f"alpha {r['spread']:g}, n = {r['n']}", _median(r, 1.0)) for r in heavy],
        note=f"k-hat alarms in {alarms} of batches",
    )


def _missing_mode(records: list[Record]) -> Question:
    gone = [r for r in records if r["kind"] == "missing_mode" and r["spread"] > MEAN_ALARM]
    medians = ", ".join(f"{r['median']:.2f}" for r in gone)
    return Question(
        "missing_mode",
        "C5",
        "k-hat notices a mode of the target that the behavior policy does not sample",
        Rule("share of batches with an alarm", ">", 0.5, 0.0, "Agresti and Coull's, over batches"),
        [
            Comparison(
                f"missing mass {r['spread']:g}, n = {r['n']}",
                rate(r["khat_alarm"] * r["khat_batches"], r["khat_batches"]),
            )
            for r in gone
        ],
        note=f"median ESS fraction {medians}; alarms of the mean weight "
        + ", ".join(f"{r['mean_alarm']:.0%}" for r in gone),
    )


IMPLEMENTATIONS = {
    "reference": "the reference code's step survives overflow, underflow and NaN (by reading, float32)",
    "shipped": "vcposim's step is right at |log w| of 10^4 and closes on what cannot be weighed",
}


def _arithmetic(records: list[Record], key: str, statement: str) -> Question:
    wrong = [r["case"] for r in records if r[f"{key}_wrong"]]
    longer = [r["case"] for r in records if r[key] > r["right"] + 1e-3]
    return Question(
        f"arithmetic_{key}",
        "C18",
        statement,
        Rule("share of cases with a wrong step", "<", 0.0, 0.01, EXACT),
        [Comparison(f"{len(records)} cases", Estimate(len(wrong) / len(records)) if records else None)],
        witness="exact",
        note=f"wrong: {', '.join(wrong) or 'never'}; too long a step: {', '.join(longer) or 'never'}",
    )


TITLES = {"lognormal": "log-normal weights", "pareto": "Pareto weights", "missing_mode": "a missing mode"}


def figure(records: list[Record]) -> Plot:
    """One panel a kind of weights: what the batch says against the truth."""
    panels = []
    for kind, title in TITLES.items():
        mine = [r for r in records if r["kind"] == kind]
        parts = []
        for number, n in enumerate(sorted({r["n"] for r in mine})):
            some = sorted((r for r in mine if r["n"] == n), key=lambda r: r["true"])
            x = [max(r["true"], 1e-4) for r in some]
            y, low, high = ([max(r[k], 1e-4) for r in some] for k in ("median", "low", "high"))
            parts.append(series(f"n = {n}", x, y, low, high, color=number, line=False))
        panels.append(
            panel(
                title,
                "true ESS fraction",
                "ESS fraction of a batch",
                parts,
                xscale="log",
                yscale="log",
                xlim=[5e-5, 1.3],
                ylim=[5e-5, 1.3],
                diagonal=TOLERANCE,
            )
        )
    return plot(*panels, width=3.6, columns=3)


EXPERIMENT = Experiment(
    "ess_reliability",
    "Can the ESS of a batch be trusted?",
    ("C3", "C5", "C18"),
    settings,
    run,
    analyse,
    no_estimators="reads the weights of a batch, before any estimator does",
)
