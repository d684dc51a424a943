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
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

from simulations.drawing import canvas, color, marker
from simulations.protocol import Analysis, Experiment, Figure, Record, Setting, Verdict
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
        **{key: setting[key] for key in ("kind", "spread", "n")},
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
    """The step that each implementation takes (exponent 1/2, reference 1), beside the right one."""
    right = math.sqrt(KNOWN[name]) if name in KNOWN else 0.0
    steps = {"reference": reference_step(log_weight), "shipped": shipped_step(log_weight)}
    record: Record = {"kind": "arithmetic", "case": name, "right": right}
    record.update(dict(steps.items()))
    record.update({f"{key}_wrong": bool(abs(step - right) > 1e-3) for key, step in steps.items()})
    return record


def reference_step(log_weight: Array) -> float:
    """The step of VCPO's reference code by reading: float32, absolute epsilon 1e-8, Python's min(1.0, nan) = 1.0."""
    with np.errstate(all="ignore"):
        weight = np.exp(log_weight.astype(np.float32))
        rho = float(weight.sum() ** 2 / ((weight**2).sum() + np.float32(1e-8)) / weight.size)
    return min(1.0, rho) ** 0.5


def shipped_step(log_weight: Array) -> float:
    """Ours: what cannot be weighed moves nothing."""
    try:
        fraction = ess_fraction(log_weight.astype(np.float32))
    except InputError:
        fraction = np.asarray(np.nan)
    return float(step_scale(fraction, exponent=0.5))


def analyse(records: list[Record]) -> Analysis:
    """Verdicts on C3, C5 and C18."""
    plug_in = [r for r in records if r["kind"] in ("lognormal", "pareto", "missing_mode")]
    identities = next(r for r in records if r["kind"] == "identities")
    arithmetic = [r for r in records if r["kind"] == "arithmetic"]
    verdicts = [_identities(identities), *_plug_in(plug_in), _missing_mode(plug_in), *_arithmetic(arithmetic)]
    caption = (
        f"Median and 5–95% range of the ESS fraction read off a batch, against the truth. On the diagonal it can be "
        f"trusted (within {TOLERANCE:.0%}: shaded); above it, it reads too high."
    )
    return Analysis(verdicts, [Figure("plug_in_against_truth", draw, caption, alt=caption)])


def _identities(r: Record) -> Verdict:
    worst = max(r["chi2"], r["shift"], r["range"])
    return Verdict(
        "C3",
        "rho = 1/(1 + chi2), lies in [1/n, 1], and does not change with the scale of the weights",
        "holds" if worst < 1e-9 else "fails",
        f"worst relative violation {worst:.1e} over {r['problems']} random pairs, log-weights shifted by ±10^4",
    )


def _plug_in(records: list[Record]) -> list[Verdict]:
    normal = [r for r in records if r["kind"] == "lognormal"]
    good = [r for r in normal if abs(r["median"] / r["true"] - 1) <= TOLERANCE]
    limit = {n: max((r["spread"] for r in good if r["n"] == n), default=0.0) for n in sorted({r["n"] for r in normal})}
    bad = max(normal, key=lambda r: r["median"] / r["true"])
    heavy = [r for r in records if r["kind"] == "pareto" and r["true"] == 0]
    return [
        Verdict(
            "C5",
            "the ESS of a batch estimates the true one (log-normal weights)",
            "holds if",
            f"median {bad['median'] / bad['true']:.3g} times the truth at sd {bad['spread']:g}, n = {bad['n']}",
            "sd of log w at most " + ", ".join(f"{s:g} for n = {n}" for n, s in limit.items()),
        ),
        Verdict(
            "C5",
            "a batch with infinite-variance weights shows an ESS near its true fraction, 0 (Pareto, alpha <= 2)",
            "fails",
            f"median rho {min(r['median'] for r in heavy):.2f} to {max(r['median'] for r in heavy):.2f}; "
            f"k-hat alarms in {np.mean([r['khat_alarm'] for r in heavy]):.0%} of batches",
        ),
    ]


def _missing_mode(records: list[Record]) -> Verdict:
    missing = [r for r in records if r["kind"] == "missing_mode"]
    gone = [r for r in missing if r["spread"] > MEAN_ALARM]
    return Verdict(
        "C5",
        "ESS or k-hat notices a mode of the target that the behavior policy does not sample",
        "fails",
        f"median rho {np.median([r['median'] for r in missing]):.2f} where the truth is below "
        f"{max(r['true'] for r in missing):.2f}; alarms: k-hat {np.mean([r['khat_alarm'] for r in gone]):.0%}, "
        f"mean weight {np.mean([r['mean_alarm'] for r in gone]):.0%} (missing mass 0.9)",
    )


def _arithmetic(records: list[Record]) -> list[Verdict]:
    def wrong(key: str) -> list[str]:
        return [r["case"] for r in records if r[f"{key}_wrong"]]

    full = [r["case"] for r in records if r["reference"] > r["right"] + 1e-3]
    longer = ", ".join(full) or "never"
    return [
        Verdict(
            "C18",
            "the reference code's step survives overflow, underflow and NaN (by reading, float32)",
            "fails" if wrong("reference") else "holds",
            f"wrong in {len(wrong('reference'))} of {len(records)} cases; too long a step: {longer}",
        ),
        Verdict(
            "C18",
            "vcposim's step is right at |log w| of 10^4 and closes on what cannot be weighed",
            "fails" if wrong("shipped") else "holds",
            f"wrong in {len(wrong('shipped'))} of {len(records)} cases",
        ),
    ]


def draw(records: list[Record]) -> Canvas:
    """One panel a kind of weights: what the batch says against the truth."""
    titles = {"lognormal": "log-normal weights", "pareto": "Pareto weights", "missing_mode": "a missing mode"}
    with canvas(len(titles)) as (figure, panels):
        for ax, (kind, title) in zip(panels, titles.items(), strict=True):
            mine = [r for r in records if r["kind"] == kind]
            for number, n in enumerate(sorted({r["n"] for r in mine})):
                _draw_series(ax, sorted((r for r in mine if r["n"] == n), key=lambda r: r["true"]), number, n)
            truth = np.geomspace(1e-4, 1, 50)
            ax.fill_between(
                truth, truth * (1 - TOLERANCE), np.minimum(truth * (1 + TOLERANCE), 1), alpha=0.2, color="gray"
            )
            ax.set(
                title=title, xscale="log", yscale="log", xlabel="true ESS fraction", ylim=(1e-4, 1.3), xlim=(1e-4, 1.3)
            )
        panels[0].set_ylabel("ESS fraction of a batch")
        panels[0].legend(title="batch size n", loc="lower right")
    return figure


def _draw_series(ax: Axes, series: list[Record], number: int, n: int) -> None:
    # a truth of zero is drawn at the left edge of the axis
    x = np.maximum([r["true"] for r in series], 1e-4) * (1 + 0.04 * number)
    median = np.array([r["median"] for r in series])
    spread = np.abs(np.array([[r["low"] for r in series], [r["high"] for r in series]]) - median)
    ax.errorbar(x, median, spread, fmt=marker(number), color=color(number), markersize=4, linewidth=1, label=str(n))


EXPERIMENT = Experiment(
    "ess_reliability", "Can the ESS of a batch be trusted?", ("C3", "C5", "C18"), settings, run, analyse
)
