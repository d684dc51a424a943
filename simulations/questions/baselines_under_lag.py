"""Which baseline lowers the variance under staleness, at what bias, on random and on trained policies?

Staleness is chi2(pi||mu), so that policies of both kinds are compared at the same ESS 1 / (1 + chi2). All values are
exact. The ablation (C10) takes OPOB's weight w^2 ||s||^2 apart: `on_policy_optimal` keeps ||s||^2 and drops w^2,
`leverage_damped_mean` keeps the damping (1 - h) and drops the centering, `opob_leave_one_out` keeps the centering
and drops the damping; adding a constant to all rewards shows what each owes to the zero of the reward.

Damping lowers the mean squared error of *any* noisy estimate, so the error cannot say what a baseline is worth.
The ablation is therefore judged by descent efficiency D (proofs, T15), which no shrinking changes, with the error
beside it; `population`, the oracle, shows how much there is to gain.
"""

from collections.abc import Mapping
from contextlib import suppress

import numpy as np

from simulations.drawing import Plot, of_intervals, panel, plot
from simulations.methods import own_methods
from simulations.problems import POLICIES, stale_bandit
from simulations.protocol import Analysis, Comparison, Experiment, Figure, Question, Record, Rule, Setting, judge
from simulations.stats import Estimate, of_seeds
from simulations.verdicts import EXACT
from vcposim.arrays import expectation
from vcposim.errors import InputError
from vcposim.estimators import Estimator, Resolved
from vcposim.laboratory import exact
from vcposim.moments import Moments
from vcposim.problems.bandits import BanditProblem
from vcposim.weights import Weighting

ARMS, GROUP_SIZE, CAP = 5, 8, 2.0
ROUNDING, NOTICEABLE, MATTERS = 1e-9, 0.01, 0.05
"""what double precision leaves of an identity; a relative bias, and a ratio of errors away from 1, that matter"""
BASELINES = (
    "zero",
    "group_mean",
    "leave_one_out",
    "on_policy_optimal",
    "opob",
    "opob_leave_one_out",
    "opob_released",
    "leverage_damped_mean",
    "population",
)
ABLATION = ("on_policy_optimal", "opob", "opob_leave_one_out", "leverage_damped_mean")
NUMBERS = ("mse", "descent_efficiency", "variance_of_mean", "relative_bias", "cosine")
SHIFT = 1.0
"""what the ablation adds to every reward"""


def settings(size: str) -> list[Setting]:
    """Policies x divergences x problems; the seed is the problem."""
    full = size == "full"
    divergences = (0.0, 0.1, 0.3, 1.0, 3.0, 10.0) if full else (0.0, 1.0, 10.0)
    return [
        {"policy": policy, "chi2": chi2, "seeds": 100 if full else 16} for policy in POLICIES for chi2 in divergences
    ]


def run(setting: Setting) -> list[Record]:
    """Exact moments of every baseline on every problem of a setting.

    Of estimators from elsewhere nothing is known, and all ARMS^GROUP_SIZE orders of each problem would be minutes. On
    the first one all orders are tried: who does not mind them is shown multisets of the others, and held to it.
    """
    own = {name: method.estimator for name, method in own_methods(setting).items()}
    first, _ = problem_of(setting, 0)
    any_order = {name: exact.exchangeable(first, estimator, GROUP_SIZE) for name, estimator in own.items()}
    return [record for seed in range(setting["seeds"]) for record in problem_records(setting, seed, own, any_order)]


def problem_of(setting: Setting, seed: int) -> tuple[BanditProblem, np.random.Generator]:
    """The problem of a seed, and the generator that drew it."""
    rng = np.random.default_rng([6, seed, POLICIES.index(setting["policy"])])
    return stale_bandit(rng, setting["policy"], ARMS, setting["chi2"]), rng


def problem_records(
    setting: Setting, seed: int, own: Mapping[str, str | Resolved], any_order: Mapping[str, bool]
) -> list[Record]:
    """One problem: moments by baseline, the gap identity of OPOB, and what breaks unbiasedness."""
    problem, rng = problem_of(setting, seed)
    key = {"policy": setting["policy"], "chi2": setting["chi2"], "seed": seed}
    estimators: dict[str, str | Resolved] = {name: Estimator(baseline=name) for name in BASELINES}
    estimators |= own
    records: list[Record] = []
    for shift in (0.0, SHIFT):
        moved = BanditProblem(**{**vars(problem), "reward": problem.reward + shift})
        for name, estimator in estimators.items():
            m = moments_of(moved, estimator, any_order.get(name, False))
            numbers = {k: float(getattr(m, k)) for k in NUMBERS}
            records.append({**key, "kind": "moments", "shift": shift, "baseline": name, **numbers})
    records.append({**key, "kind": "gap", **gap(problem, rng)})
    biased = {name: float(exact.moments(problem, e, GROUP_SIZE).relative_bias) for name, e in CONDITIONS.items()}
    return [*records, {**key, "kind": "bias", **biased}]


def moments_of(problem: BanditProblem, estimator: str | Resolved, any_order: bool) -> Moments:
    """Exact moments by multisets if the order of samples is thought not to matter, by all orders if it does here."""
    if any_order:
        with suppress(InputError):
            return exact.moments(problem, estimator, GROUP_SIZE, any_order=True)
    return exact.moments(problem, estimator, GROUP_SIZE)


CONDITIONS = {
    "full weights, independent baseline": Estimator(baseline="opob_leave_one_out"),
    "truncated weights, zero baseline": Estimator(Weighting("truncate", cap=CAP), "zero"),
    "truncated weights, leave-one-out": Estimator(Weighting("truncate", cap=CAP), "leave_one_out"),
    "full weights, in-batch mean": Estimator(baseline="group_mean"),
    "full weights, in-batch OPOB": Estimator(baseline="opob"),
    "no weights, leave-one-out": Estimator(Weighting("none"), "leave_one_out"),
}
"""what the words 'a baseline leaves the mean unchanged' need, and what happens without"""


def gap(problem: BanditProblem, rng: np.random.Generator) -> dict[str, float]:
    """C6: Var(b) - Var(b*) against (b - b*)^2 E[w^2 n^2], for a random b and for the mean reward under mu."""
    batch = problem.outcomes()
    w = Weighting("importance")(batch).value
    curvature = float(expectation(batch.scored().sq_norm(w), batch.measure)[0])
    best = float(exact.population_baseline(problem, Weighting("importance"))[0])
    plain = float(expectation(batch.reward, batch.measure)[0])

    def variance(b: float) -> float:
        return float(exact.moments(problem, Estimator(baseline=b), 1).variance_per_sample)

    b = float(rng.normal())
    expected = (b - best) ** 2 * curvature
    return {
        "violation": abs(variance(b) - variance(best) - expected) / max(variance(b), 1e-300),
        "saved": 1 - variance(best) / variance(plain) if variance(plain) else 0.0,
    }


def analyse(records: list[Record]) -> Analysis:
    """Verdicts on C2, C6, C7 and C10."""
    caption = (
        f"Descent efficiency and mean squared error of the group estimate (N = {GROUP_SIZE}, full weights) relative to "
        "the group mean's, against chi2: geometric means over problems with 95% intervals. Efficiency above 1 helps; "
        "an error below 1 may be mere shrinking."
    )
    asked = [_optimal(records), *_weights(records), _unchanged(records)]
    asked += [question for policy in POLICIES for question in _ablation(records, policy)]
    return Analysis(judge(asked), [Figure("efficiency_and_error", figure(records), caption, alt=caption)])


def _optimal(records: list[Record]) -> Question:
    gaps = [r for r in records if r["kind"] == "gap"]
    top = max((r["chi2"] for r in gaps), default=0.0)
    saved = {
        p: of_seeds((r["seed"], r["saved"]) for r in gaps if (r["policy"], r["chi2"]) == (p, top)) for p in POLICIES
    }
    return Question(
        "opob_optimal",
        "C6",
        "OPOB (population) minimizes the variance among constants: Var(b) - Var(b*) = (b - b*)^2 E[w^2 n^2]",
        Rule("largest relative violation", "<", 0.0, ROUNDING, EXACT),
        [Comparison(f"{len(gaps)} problems", Estimate(max(r["violation"] for r in gaps)) if gaps else None)],
        witness="exact",
        note="over the mean reward it saves "
        + ", ".join(f"{i} of the variance ({p})" for p, i in saved.items())
        + f" at chi2 = {top:g}",
    )


def _bias_of(records: list[Record], name: str) -> Estimate | None:
    """Mean relative bias at the largest divergence; exact where it is zero on every problem, up to rounding."""
    bias = [r for r in records if r["kind"] == "bias"]
    top = max((r["chi2"] for r in bias), default=0.0)
    worst = max((r[name] for r in bias), default=1.0)
    if worst < ROUNDING:
        return Estimate(worst, seeds=len(bias))
    return of_seeds(((r["policy"], r["seed"]), r[name]) for r in bias if r["chi2"] == top)


def _weights(records: list[Record]) -> list[Question]:
    """C2: one question for the full weights, one for those that cut them."""
    first = next(iter(CONDITIONS))
    cut = ("truncated weights, zero baseline", "no weights, leave-one-out")
    return [
        Question(
            "full_weights_unbiased",
            "C2",
            "full sequence weights leave the gradient unbiased",
            Rule("relative bias", "<", 0.0, NOTICEABLE),
            [Comparison("full weights", _bias_of(records, first))],
            witness="exact",
        ),
        Question(
            "others_biased",
            "C2",
            f"weights truncated at {CAP:g}, and no weights, bias the gradient",
            Rule("relative bias", ">", 0.0, NOTICEABLE),
            [Comparison(name, _bias_of(records, name)) for name in cut],
            witness="exact",
        ),
    ]


def _unchanged(records: list[Record]) -> Question:
    return Question(
        "baseline_unbiased",
        "C7",
        "a baseline leaves the mean of the gradient unchanged",
        Rule("relative bias", "<", 0.0, NOTICEABLE),
        [Comparison(name, _bias_of(records, name)) for name in CONDITIONS],
        "where",
        "exact",
    )


def _ablation(records: list[Record], policy: str) -> list[Question]:
    """C10, one question a part: judged by descent efficiency, the error beside it."""
    parts, moved, errors = (
        {name: _ratios(records, policy, name, shift, field) for name in (*ABLATION, "population")}
        for shift, field in ((0.0, "descent_efficiency"), (SHIFT, "descent_efficiency"), (0.0, "mse"))
    )
    top = max(parts["opob"], default=0.0)
    note = (
        f"descent efficiency over the group mean's at chi2 = {top:g}: "
        + "; ".join(f"{name} {found.get(top)}" for name, found in parts.items())
        + f"; rewards shifted by {SHIFT:g}: "
        + "; ".join(f"{name} {found.get(top)}" for name, found in moved.items())
        + "; mean squared error: "
        + "; ".join(f"{name} {found.get(top)}" for name, found in errors.items())
    )
    said = {
        "opob": ("in_batch_opob_helps", "in-batch OPOB"),
        "opob_leave_one_out": ("centering_helps", "where OPOB centers the reward (leave-one-out OPOB)"),
        "leverage_damped_mean": ("damping_helps", "damping by 1 - h alone"),
    }
    return [
        Question(
            f"{key}_{policy}",
            "C10",
            f"{words} makes the group mean's update more efficient ({policy} policies)",
            Rule("descent efficiency over the group mean's", ">", 1.0, MATTERS),
            [Comparison(f"chi2 = {top:g}", parts[name].get(top))],
            witness="exact",
            note=note if name == "opob" else "",
        )
        for name, (key, words) in said.items()
    ]


def _ratios(
    records: list[Record], policy: str, name: str, shift: float, field: str = "descent_efficiency"
) -> dict[float, Estimate | None]:
    mine = [r for r in records if r["kind"] == "moments" and r["policy"] == policy and r["shift"] == shift]
    found = {(r["baseline"], r["chi2"], r["seed"]): r[field] for r in mine}
    seeds, divergences = sorted({r["seed"] for r in mine}), sorted({r["chi2"] for r in mine})
    return {
        chi2: of_seeds(
            ((s, found[name, chi2, s] / found["group_mean", chi2, s]) for s in seeds if found["group_mean", chi2, s]),
            scale="log",
        )
        for chi2 in divergences
    }


def figure(records: list[Record]) -> Plot:
    """A row of panels each for efficiency and error, a column a kind of policy: relative to the group mean's."""
    shown = [name for name in BASELINES if name not in ("zero", "group_mean")]
    panels = []
    ylabels = {"descent_efficiency": "D / D of group_mean", "mse": "MSE / MSE of group_mean"}
    for field, policy in [(field, policy) for field in ylabels for policy in POLICIES]:
        parts = []
        for number, name in enumerate(shown):
            ratios = {chi2: i for chi2, i in _ratios(records, policy, name, 0.0, field).items() if i is not None}
            x = [1 + chi2 for chi2 in ratios]
            parts.append(of_intervals(name, x, list(ratios.values()), number, dashed=number > 3))
        panels.append(
            panel(
                f"{policy} policies",
                "1 + chi2 = 1 / ESS fraction",
                ylabels[field],
                parts,
                xscale="log",
                yscale="log",
                ticks=[1, 2, 4, 11],
                hlines=[1.0],
            )
        )
    return plot(*panels, width=4.6)


EXPERIMENT = Experiment(
    "baselines_under_lag",
    "Which baseline lowers the error under staleness, on random and on trained policies?",
    ("C2", "C6", "C7", "C10"),
    settings,
    run,
    analyse,
    takes_estimators=True,
)
