"""Is the square root right for Adam and the linear rule for SGD, and is it the adaptation that helps?

**Quadratic model.** Loss x^2 / 2 with gradient noise of variance 1 / rho, rho = ESS / n switching between 1 and a low
value with a period: what staleness does to the noise, and nothing else. For each exponent p the step eta rho^p is tuned
(eta on a grid), so p = 0 is the best constant step. Adam divides by a running root mean square of the gradient: one
would expect that, where rho moves slower than its memory 1 / (1 - beta_2), it has already divided by 1 / sqrt(rho), so
that half of the exponent is left to do. A minimum that stays where it is rewards standing still: what a noisy phase
loses, a quiet one makes good. So there is a second model whose minimum does a random walk and cannot wait. `LOG.md`
says what came out.

**Learning.** The same rules on a task with real weights, against two controls that know nothing of the batch: the
*matched constant*, the mean multiplier of the ESS run itself, and the *replayed schedule*, that of another seed's run.
"""

import numpy as np

from simulations.drawing import Plot, of_intervals, panel, plot
from simulations.methods import (
    ESS,
    Method,
    best_of,
    chosen,
    gain,
    outcome,
    run_of,
    told,
    trace,
)
from simulations.protocol import Analysis, Comparison, Experiment, Figure, Question, Record, Rule, Setting, judge
from simulations.stats import Estimate, of_seeds
from vcposim.arrays import Array
from vcposim.control import matched_constant, step_scale
from vcposim.learning.lags import Lag
from vcposim.learning.step_rules import Control

EXPONENTS = (0.0, 0.25, 0.5, 0.75, 1.0)
LOW = 0.05
"""the low ESS fraction of the quadratic model"""
DRIFTS = (0.0, 0.02)
"""how far the minimum moves in an update, standard deviation, in units of the noise at ESS 1"""
BETA_2 = 0.99
LOSS, MARGIN = 0.02, 0.01
"""a ratio of losses above 1, and a difference of success probabilities, that matter"""
RULES: dict[str, Control] = {
    "full step": Control(),
    "ESS^0.25": Control("ess", exponent=0.25),
    "ESS^0.5": ESS,
    "ESS^1": Control("ess", exponent=1.0),
    "1/lag": Control("lag"),
    "SNR": Control("snr"),
    "skip spikes": Control("skip_spike", value=3.0),
    "gradient alignment": Control("gradient_alignment", value=0.5),
}
CONTROLS = ("matched constant", "replayed schedule")
ESTIMATOR = "vcpo"
LAG = 16


def settings(size: str) -> list[Setting]:
    """Optimizers x periods of the model; optimizers x step sizes of learning."""
    full = size == "full"
    periods, updates = ((2, 10, 100, 1000, 4000), 16000) if full else ((2, 100, 2000), 4000)
    model = [
        {"kind": "quadratic", "optimizer": o, "drift": d, "period": p, "updates": updates, "repeats": 24}
        for d in DRIFTS
        for o in ("sgd", "adam")
        for p in periods
    ]
    grid = {"adam": (0.012, 0.024, 0.048, 0.096), "sgd": (0.1, 0.3, 1.0, 3.0)} if full else {"adam": (0.024, 0.096)}
    seeds = list(range(24 if full else 5))
    learn = [
        {"kind": "learning", "optimizer": o, "step_size": e, "seeds": seeds, "updates": 200 if full else 120}
        for o, sizes in grid.items()
        for e in sizes
    ]
    return [*model, *learn]


def run(setting: Setting) -> list[Record]:
    """Losses of each exponent in the model, or one record for each rule and seed."""
    return quadratic(setting) if setting["kind"] == "quadratic" else learning(setting)


def quadratic(setting: Setting) -> list[Record]:
    """Mean loss of the second half, for each exponent and step size, over repeats with the same noise."""
    rng = np.random.default_rng(11)
    eta = np.geomspace(2e-4, 0.5, 19)[:, None]
    x = np.ones((len(EXPONENTS), eta.size, setting["repeats"]))  # from the minimum, wherever it is
    first, second, loss = np.zeros_like(x), np.zeros_like(x), np.zeros_like(x)
    high, low = (
        np.array([float(step_scale(np.array(rho), exponent=p)) for p in EXPONENTS])[:, None, None] for rho in (1.0, LOW)
    )
    for t in range(1, setting["updates"] + 1):
        rho = 1.0 if (t - 1) // max(setting["period"] // 2, 1) % 2 == 0 else LOW
        gradient = x + rng.standard_normal(setting["repeats"]) / np.sqrt(rho)
        direction = gradient
        if setting["optimizer"] == "adam":
            first += 0.1 * (gradient - first)
            second += (1 - BETA_2) * (gradient * gradient - second)
            direction = first / (1 - 0.9**t) / np.sqrt(second / (1 - BETA_2**t))
        scale = high if rho == 1.0 else low
        x = x - eta * scale * direction + setting["drift"] * rng.standard_normal(setting["repeats"])
        loss += x * x / 2 * (t > setting["updates"] // 2)
    loss /= setting["updates"] // 2
    mean = loss.mean(axis=-1)
    place = {key: setting[key] for key in ("kind", "optimizer", "drift", "period")}
    return [
        {
            **place,
            "exponent": p,
            "loss": float(mean[i].min()),
            "losses": loss[i, mean[i].argmin()],
            "eta": float(eta[mean[i].argmin(), 0]),
        }
        for i, p in enumerate(EXPONENTS)
    ]


def learning(setting: Setting) -> list[Record]:
    """All rules, then the controls made from the multipliers of the ESS run of this optimizer's exponent."""
    options = {"optimizer": setting["optimizer"], "step_size": setting["step_size"]}
    seeds, lag, updates = setting["seeds"], Lag(LAG), setting["updates"]

    def go(controls: dict[str, list[Control]]) -> tuple[list[tuple[str, int]], dict[str, Array]]:
        keys = [(name, s) for name in controls for s in seeds]
        runs = [
            run_of(Method(ESTIMATOR, control), lag, seed=s, **options)
            for name in controls
            for s, control in zip(seeds, controls[name], strict=True)
        ]
        return keys, trace("exact_match_8", runs, updates)

    keys, found = go({name: [control] * len(seeds) for name, control in RULES.items()})
    guide = "ESS^0.5" if setting["optimizer"] == "adam" else "ESS^1"
    scale = np.stack([found["step_scale"][:, keys.index((guide, s))] for s in seeds])
    more = {
        "matched constant": [Control("constant", value=float(matched_constant(s))) for s in scale],
        "replayed schedule": [Control("replay", schedule=tuple(s.tolist())) for s in np.roll(scale, 1, axis=0)],
    }
    more_keys, more_found = go(more)
    place = {"kind": "learning", **options}
    return [
        {**place, "method": name, "seed": seed, **outcome(f, i)}
        for which, f in ((keys, found), (more_keys, more_found))
        for i, (name, seed) in enumerate(which)
    ]


def analyse(records: list[Record]) -> Analysis:
    """C11 in the model and in learning."""
    caption = (
        "Quadratic model: tuned loss with step eta ESS^p over that of the best constant step (p = 0), against the "
        f"period in updates with which ESS switches between 1 and {LOW:g}. Below 1 the rule helps. Adam's memory is "
        f"{1 / (1 - BETA_2):.0f} updates. In the lower panels the minimum does a random walk, {DRIFTS[1]:g} a step."
    )
    asked = [
        _model(chosen(records, kind="quadratic", drift=drift), optimizer, exponent, drift)
        for drift in DRIFTS
        for optimizer, exponent in (("sgd", 1.0), ("adam", 0.5))
    ]
    asked += [_learning(chosen(records, kind="learning", optimizer=o), o) for o in ("adam", "sgd")]
    return Analysis(judge(asked), [Figure("exponent_against_period", figure(records), caption, alt=caption)])


def _relative(model: list[Record], optimizer: str, period: int, first: float, second: float) -> Estimate | None:
    """Tuned loss with one exponent over that with another, repeats paired by their noise."""
    found = {r["exponent"]: r["losses"] for r in chosen(model, optimizer=optimizer, period=period)}
    if not found.get(first) or not found.get(second):
        return None
    return of_seeds(((i, a / b) for i, (a, b) in enumerate(zip(found[first], found[second], strict=True))), scale="log")


def _periods(model: list[Record], optimizer: str) -> list[int]:
    return sorted({r["period"] for r in chosen(model, optimizer=optimizer)})


def _model(model: list[Record], optimizer: str, claimed: float, drift: float) -> Question:
    comparisons, words = [], []
    for period in _periods(model, optimizer):
        loss = {r["exponent"]: r["loss"] for r in chosen(model, optimizer=optimizer, period=period)}
        best = min(loss, key=lambda p: loss[p])
        comparisons.append(
            Comparison(f"period {period}", _relative(model, optimizer, period, claimed, best)),
        )
        ratios = ", ".join(f"{loss[p] / loss[0.0]:.2f} at p = {p:g}" for p in EXPONENTS[1:])
        words.append(f"period {period}: best p {best:g}, loss over the best constant's {ratios}")
    return Question(
        f"model_{optimizer}_{'moving' if drift else 'still'}",
        "C11",
        f"in the quadratic model, ESS^{claimed:g} is the best power for {optimizer}, the minimum "
        + (f"moving by {drift:g} an update" if drift else "standing still"),
        Rule("tuned loss with this power over that with the best", "<", 1.0, LOSS, "Student's, over noise sequences"),
        comparisons,
        "where",
        note="; ".join(words),
    )


def _learning(records: list[Record], optimizer: str) -> Question:
    best = best_of(records)
    guide = "ESS^0.5" if optimizer == "adam" else "ESS^1"
    return Question(
        f"learning_{optimizer}",
        "C11",
        f"in learning with {optimizer}, {guide} does better than a full step, a matched constant and a replayed "
        "schedule, each at its own best step size",
        Rule(f"value averaged over training, {guide} minus the other", ">", 0.0, MARGIN),
        [Comparison(name, gain(best, guide, name)) for name in ("full step", *CONTROLS)],
        note=f"values: {told(best, (*RULES, *CONTROLS))}",
    )


def figure(records: list[Record]) -> Plot:
    """One panel an optimizer and drift."""
    panels = []
    for drift in DRIFTS:
        model = chosen(records, kind="quadratic", drift=drift)
        for optimizer in ("sgd", "adam"):
            parts = []
            for number, p in enumerate(EXPONENTS[1:]):
                rows = {period: _relative(model, optimizer, period, p, 0.0) for period in _periods(model, optimizer)}
                known = {period: e for period, e in rows.items() if e is not None}
                parts.append(of_intervals(f"p = {p:g}", list(known), list(known.values()), number))
            title = f"{optimizer}, minimum {'moves' if drift else 'stays'}"
            axes = panel(title, "period of ESS, updates", "tuned loss / best constant's", parts, xscale="log")
            panels.append({**axes, "yscale": "log", "hlines": [1.0]})
    return plot(*panels, width=4.0, height=2.8)


EXPERIMENT = Experiment(
    "step_rules",
    "Is ESS^(1/2) right for Adam and ESS for SGD, and does adaptation beat a constant?",
    ("C11",),
    settings,
    run,
    analyse,
    no_estimators="compares step rules of one estimator",
)
