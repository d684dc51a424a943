"""Why do runs on stale data live or die: which one quantity of an update foretells it, over methods and held-out ones?

Sixteen prompts share a network (`many_prompts`), lag 16. Every estimator is watched at a small step size, where all
policies go nearly the same way, and judged by what becomes of its runs at large ones. Watched per update, means:

    negative share       sum of |c_i| over c_i < 0, over the sum of |c_i|
    self push            sum c_i ||s_i||^2 / sum |c_i| ||s_i||^2: how each response's update moves its own
                         log-probability, in sum over the batch; 0 is what the n^2 baseline does without ratios (T15)
    baseline below mean  mean reward minus the b of c proportional to R - b
    cosine               of the estimate and the exact gradient
    norm variation       standard deviation over mean of the gradient's norm
    ESS, entropy change  of the batch's weights; of the policy over the watched updates, nats

**Interventions** move one thing on a host without ratio: the mean baseline shifted by a constant, and the negative
coefficients of the mean baseline multiplied by a number, which changes no other coefficient. They are held out: the
predictor is chosen on the methods of the catalogue and judged on them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.stats import rankdata

from simulations.drawing import Plot, panel, plot, series
from simulations.methods import Method, chosen, outcome, run_of, trace
from simulations.protocol import Analysis, Comparison, Experiment, Figure, Question, Record, Rule, Setting, judge
from simulations.questions.regime_map import METHODS as MAP
from simulations.stats import Estimate, of_replicates, resampled
from vcposim.arrays import Array
from vcposim.batch import Batch
from vcposim.catalogue import entry
from vcposim.estimators import Estimator
from vcposim.learning.lags import Lag
from vcposim.learning.tasks import many_prompts
from vcposim.weights import Weighting

NONE = Weighting("none")
PROMPTS, LAG, WATCHED = 16, 16, 40
"""updates that are watched: the lag is full after 16"""
SMALL, LARGE = 0.01, (0.04, 0.08)
"""step size at which estimators are watched, and those at which they are judged"""


@dataclass(frozen=True)
class ScaledNegatives(Estimator):
    """The host's coefficients, those below 0 multiplied by `share`."""

    share: float = 1.0

    def coefficients(self, batch: Batch) -> Array:
        """c_i for c_i >= 0, share c_i for c_i < 0: (..., n)."""
        c = super().coefficients(batch)
        return np.where(c < 0, self.share * c, c)


INTERVENTIONS: dict[str, Method] = {
    **{f"mean {d:+g}": Method(Estimator(NONE, "group_mean", baseline_shift=d)) for d in (-0.3, -0.1, 0.1)},
    **{f"negatives x {s:g}": Method(ScaledNegatives(NONE, "group_mean", share=s)) for s in (0.0, 0.25, 0.5, 0.75, 1.5)},
}
"""one thing changed on R - mean without ratio"""
CATALOGUED = {name: method for name, method in MAP.items() if method.stale and name.endswith("full step")}
CATALOGUED |= {name: Method(name) for name in ("token_tis", "sequence_mis", "cispo", "topr_centered", "rloo", "grpo")}
METHODS = {**CATALOGUED, **INTERVENTIONS}
PREDICTORS = ("negative share", "self push", "baseline below mean", "cosine", "norm variation", "ESS", "entropy change")


@dataclass(frozen=True)
class Watch:
    """A function of a batch that writes down what an estimator's coefficients look like, and returns them."""

    inner: Estimator
    seen: list[dict[str, Array]] = field(default_factory=list, compare=False, repr=False)

    @property
    def needs(self) -> frozenset[str]:
        """The inner estimator's, and scores to weigh pushes with."""
        return self.inner.needs

    def __call__(self, batch: Batch) -> Array:
        """Those of the inner estimator: (run, group, n) or (run, group, n, t)."""
        c = self.inner.coefficients(batch)
        whole = c.mean(axis=-1) if c.ndim == 4 else c  # of tokens: their mean
        square = batch.scored().sq_norm(batch.reward * 0 + 1)
        size = np.abs(whole)
        total = np.maximum(size.sum(axis=(1, 2)), 1e-300)
        self.seen.append(
            {
                "negative share": np.maximum(-whole, 0).sum(axis=(1, 2)) / total,
                "self push": (whole * square).sum(axis=(1, 2)) / np.maximum((size * square).sum(axis=(1, 2)), 1e-300),
                "baseline below mean": batch.reward.mean(axis=(1, 2)) - _effective(whole, batch.reward),
            }
        )
        return c


def _effective(c: Array, reward: Array) -> Array:
    """The b of c proportional to R - b for rewards in {0, 1}: -c of failures over the spread of c, batch means."""
    low, high = (np.where(reward == r, c, 0).sum(axis=(1, 2)) for r in (0, 1))
    count = [np.maximum((reward == r).sum(axis=(1, 2)), 1) for r in (0, 1)]
    low, high = low / count[0], high / count[1]
    return -low / np.where(high - low > 1e-12, high - low, np.inf)


def settings(size: str) -> list[Setting]:
    """Blocks of seeds; all methods and step sizes are in each."""
    full = size == "full"
    blocks = [list(range(first, first + 4)) for first in range(200, 216, 4)] if full else [[0, 1, 2]]
    return [{"seeds": seeds, "updates": 120 if full else 44} for seeds in blocks]


def run(setting: Setting) -> list[Record]:
    """One record for each method and seed: predictors at the small step, and what became of the run at large ones."""
    out, problem, seeds = [], many_prompts(PROMPTS), setting["seeds"]
    for name, method in METHODS.items():
        inner = entry(method.estimator).estimator if isinstance(method.estimator, str) else method.estimator
        assert isinstance(inner, Estimator)  # its methods are its own
        watch = Watch(inner)
        watched: Any = Method(watch, method.control)  # type: ignore[arg-type]
        keys = [(step, seed) for step in (SMALL, *LARGE) for seed in seeds]
        runs = [run_of(watched, Lag(LAG), seed=seed, step_size=step) for step, seed in keys]
        found = trace(problem, runs, setting["updates"], truth_every=4)
        for i, seed in enumerate(seeds):  # the first runs are those at the small step
            norms, entropy = found["gradient_norm"][:WATCHED, i], found["entropy"][:, i]
            means = {k: float(np.mean([w[k][i] for w in watch.seen[:WATCHED]])) for k in watch.seen[0]}
            means["cosine"] = float(found["true_cosine"][:WATCHED, i].mean())
            means["norm variation"] = float(norms.std() / norms.mean())
            means["ESS"] = float(found["ess_fraction"][:WATCHED, i].mean())
            means["entropy change"] = float(entropy[WATCHED] - entropy[0])
            kind = "intervention" if name in INTERVENTIONS else "catalogue"
            for step in LARGE:
                o = outcome(found, keys.index((step, seed)))
                record = {"method": name, "kind": kind, "step_size": step, "seed": seed, **means}
                out.append({**record, "average": o["average"], "collapse": o["collapse"]})
    return out


def analyse(records: list[Record]) -> Analysis:
    """Beside C10: one quantity foretells value over methods, and over held-out interventions."""
    largest = chosen(records, step_size=LARGE[-1])
    seeds = sorted({r["seed"] for r in largest})
    told = {(kind, name): strength(largest, seeds, kind, name) for kind in KINDS for name in PREDICTORS}
    best = max(PREDICTORS, key=lambda name: abs(correlation(largest, seeds, "catalogue", name)))
    sign = np.sign(correlation(largest, seeds, "catalogue", best))
    question = Question(
        "one_quantity",
        "C10",
        f"{'low' if sign < 0 else 'high'} {best}, watched at a small step, foretells the value of runs at step size "
        f"{LARGE[-1]:g}, also over interventions that took no part in its choice",
        Rule("Spearman's correlation with value, in that direction", ">", 0.5, 0.0, "seeds resampled"),
        [Comparison("held out", strength(largest, seeds, "intervention", best, sign))],
        beside=True,
        note="correlations with value (catalogue; held out): "
        + "; ".join(f"{name} {told['catalogue', name]}; {told['intervention', name]}" for name in PREDICTORS),
    )
    caption = (
        f"Each point a method, mean over seeds: a quantity of its updates at step size {SMALL:g} against the value of "
        f"its runs at {LARGE[-1]:g}. Hollow: interventions that move one thing."
    )
    return Analysis(judge([question]), [Figure("what_foretells_value", figure(largest), caption, alt=caption)])


KINDS = ("catalogue", "intervention")


def strength(records: list[Record], seeds: list[Any], kind: str, field: str, sign: float = 1.0) -> Estimate | None:
    """Rank correlation of a predictor with value over methods, with the scatter of resampled seeds."""

    x, y = (measured(records, seeds, kind, name) for name in (field, "average"))
    again = resampled(len(seeds))
    value = sign * rank_correlation(x.mean(axis=1), y.mean(axis=1))
    others = sign * rank_correlation(x[:, again].mean(axis=-1), y[:, again].mean(axis=-1))
    return of_replicates(float(value), others, len(seeds), bounds=(-1.0, 1.0))


def measured(records: list[Record], seeds: Sequence[Any], kind: str, field: str) -> Array:
    """A field of the runs of a kind: (method, seed)."""
    rows = {(r["method"], r["seed"]): r[field] for r in records if r["kind"] == kind}
    return np.array([[rows[name, seed] for seed in seeds] for name in dict.fromkeys(name for name, _ in rows)])


def rank_correlation(x: Array, y: Array) -> Array:
    """Spearman's rank correlation over methods, (method, ...) -> (...); 0 where a predictor is the same for all."""
    a, b = (rankdata(v, axis=0) - (len(v) + 1) / 2 for v in (x, y))
    scale = np.sqrt((a * a).sum(axis=0) * (b * b).sum(axis=0))
    return np.asarray((a * b).sum(axis=0) / np.where(scale > 0, scale, np.inf))


def correlation(records: list[Record], seeds: Sequence[Any], kind: str, field: str) -> float:
    """Rank correlation of a predictor with value over methods, each the mean over seeds."""
    x, y = (measured(records, seeds, kind, name).mean(axis=1) for name in (field, "average"))
    return float(rank_correlation(x, y))


def figure(records: list[Record]) -> Plot:
    """Three quantities against value: the two that foretell it best, and the self push."""
    seeds, panels = sorted({r["seed"] for r in records}), []
    for name in ("baseline below mean", "negative share", "self push"):
        parts = []
        for number, kind in enumerate(("catalogue", "intervention")):
            x, y = (measured(records, seeds, kind, column).mean(axis=1) for column in (name, "average"))
            order = np.argsort(x)
            parts.append(
                series(kind, [x[i] for i in order], [y[i] for i in order], color=number, line=False, hollow=number == 1)
            )
        panels.append(
            panel(name, f"{name}, first {WATCHED} updates", "value averaged over training", parts, ylim=[0, 1])
        )
    return plot(*panels, width=3.8, columns=3)


EXPERIMENT = Experiment(
    "mechanism",
    "Which one quantity of an update foretells whether runs on stale data live?",
    ("C10",),
    settings,
    run,
    analyse,
    no_estimators="predicts from what its own estimators do inside an update",
)
