"""Do ESS and gradient norms foretell collapse, better than simpler numbers, and within one configuration?

Many runs that differ in method, lag, step size and seed. Two definitions are in use, and they do not say the same:

    at a landmark  every tenth update, which of the runs still healthy will collapse within the horizon?
    any time       does a run that is lost show more danger, at its worst before the collapse, than runs never lost do
                   up to the same update? (Over a whole healthy run the worst would be higher for having had more time.)

*Pooled*, a detector profits from knowing the configuration, as
step size times lag does without looking at a run. *Within a configuration* (same method, lag, step size; only the
random numbers differ) it has to see the danger in the run itself. Alarms are set on the runs of even seeds and judged
on odd ones.
"""

import numpy as np

from simulations.drawing import ACCENT, INK, Plot, panel, plot, series
from simulations.methods import METHODS, own_methods, run_of, trace
from simulations.protocol import Analysis, Comparison, Experiment, Figure, Question, Record, Rule, Setting, judge
from simulations.stats import DIFFERENCE, UNIT, Estimate, of_replicates, of_seeds
from vcposim.arrays import Array
from vcposim.learning.collapse import (
    DETECTORS,
    NOT_COLLAPSED,
    Auroc,
    Cases,
    auroc,
    cases,
    collapse_step,
    danger,
    lead_time,
)
from vcposim.learning.lags import Lag

CHOSEN = (
    "no correction",
    "sequence IS",
    "sequence TIS",
    "token TIS",
    "IcePop",
    "CISPO",
    "OPOB only",
    "VCPO as released",
)
TASK = "exact_match_8"
EVERY = 10
"""updates between two landmarks"""
KHAT_EVERY = 2
"""updates between two fits of k-hat: five in a detector's window; a fit costs as much as six updates of a run"""
HORIZON = 30
"""updates ahead"""
MATTERS = 0.05
"""a difference of AUROC, or of the share of collapses announced, that matters"""
SEEDS = 64
TRIVIAL = ("step_size_times_lag", "low_reward")


def settings(size: str) -> list[Setting]:
    """Lags x blocks of seeds; methods and step sizes are in each."""
    full = size == "full"
    lags, blocks = (
        ((8, 16, 32), [range(first, first + 4) for first in range(0, SEEDS, 4)])
        if full
        else ((16,), [range(0, 2), range(2, 4)])
    )
    return [
        {
            "lag": lag,
            "seeds": list(block),
            "step_sizes": [0.012, 0.024, 0.036, 0.048] if full else [0.024, 0.048],
            "methods": list(CHOSEN if full else CHOSEN[:7]),
            "updates": 240 if full else 160,
        }
        for lag in lags
        for block in blocks
    ]


def run(setting: Setting) -> list[Record]:
    """One record a run: its collapse, and every detector at every landmark."""
    own = own_methods(setting)
    names, methods = (*setting["methods"], *own), METHODS | own
    keys = [(m, e, s) for m in names for e in setting["step_sizes"] for s in setting["seeds"]]
    runs = [run_of(methods[m], Lag(setting["lag"]), seed=s, step_size=e) for m, e, s in keys]
    found = trace(TASK, runs, setting["updates"], khat_every=KHAT_EVERY)
    found["khat"] = usable_khat(found["khat"])
    lost = collapse_step(found["value"])
    seen = {name: danger(name, found)[EVERY - 1 :: EVERY] for name in DETECTORS}
    return [
        {
            **{"lag": setting["lag"], "method": m, "step_size": e, "seed": s, "updates": setting["updates"]},
            "collapse": None if lost[i] == NOT_COLLAPSED else int(lost[i]),
            "detectors": {name: [round(float(x), 6) for x in score[:, i]] for name, score in seen.items()},
        }
        for i, (m, e, s) in enumerate(keys)
    ]


def usable_khat(khat: Array) -> Array:
    """k-hat as a score, same -> same: no tail is safest, no estimate or a tail beyond float range most dangerous."""
    return np.clip(np.nan_to_num(khat, nan=5.0, posinf=5.0, neginf=-5.0), -5.0, 5.0)


def scores(records: list[Record]) -> tuple[Array, Array, dict[str, Array]]:
    """Collapse (run,), configuration (run,), and detectors (landmark, run)."""
    collapse = np.array([NOT_COLLAPSED if r["collapse"] is None else r["collapse"] for r in records])
    names = [f"{r['method']} {r['lag']} {r['step_size']}" for r in records]
    configuration = np.unique(names, return_inverse=True)[1]
    return collapse, configuration, {n: np.array([r["detectors"][n] for r in records]).T for n in DETECTORS}


KINDS = {
    "pooled": "at a landmark, configurations pooled",
    "within": "at a landmark, within a configuration",
    "any_pooled": "any time, configurations pooled",
    "any_within": "any time, within a configuration",
}


def aurocs(records: list[Record]) -> dict[str, dict[str, Auroc | None]]:
    """AUROC of each detector by both definitions, pooled and within configurations; the bootstrap resamples seeds."""
    collapse, configuration, seen = scores(records)
    landmarks = np.arange(EVERY - 1, records[0]["updates"] - 1, EVERY)
    case: Cases = cases(collapse, [int(x) for x in landmarks], HORIZON)
    at = case.landmark // EVERY
    within = configuration[case.run] * len(landmarks) + at
    unit = np.unique([r["seed"] for r in records], return_inverse=True)[1]
    # lost runs at their last landmark before the collapse, against the never lost at the same one
    last = np.searchsorted(landmarks, collapse) - 1
    healthy = np.flatnonzero(collapse == NOT_COLLAPSED)
    ends = [(np.flatnonzero((collapse != NOT_COLLAPSED) & (last == t)), t) for t in range(len(landmarks))]
    parts = [(np.concatenate([lost, healthy]), len(lost), t) for lost, t in ends if len(lost)]
    whole = Cases(
        np.concatenate([run for run, _, _ in parts] or [healthy[:0]]),
        np.concatenate([np.arange(len(run)) < lost for run, lost, _ in parts] or [healthy[:0] > 0]),
        np.concatenate([np.full(len(run), t) for run, _, t in parts] or [healthy[:0]]),
    )
    whole_within = configuration[whole.run] * len(landmarks) + whole.landmark

    def of(score: Array) -> dict[str, Auroc | None]:
        worst = np.maximum.accumulate(score[: len(landmarks)])[whole.landmark, whole.run]
        return {
            "pooled": auroc(score[at, case.run], case, at, unit=unit),
            "within": auroc(score[at, case.run], case, within, unit=unit),
            "any_pooled": auroc(worst, whole, whole.landmark, unit=unit) if parts else None,
            "any_within": auroc(worst, whole, whole_within, unit=unit) if parts else None,
        }

    return {name: of(score) for name, score in seen.items()}


def detections(records: list[Record], name: str) -> dict[int, float]:
    """Share of collapses that an alarm announces, for each odd seed; its threshold is set on the even ones."""
    collapse, _, seen = scores(records)
    coarse = np.where(collapse == NOT_COLLAPSED, NOT_COLLAPSED, collapse // EVERY)
    seed = np.array([r["seed"] for r in records])
    found = {}
    for s in sorted({int(s) for s in seed if s % 2}):
        some = (seed % 2 == 0) | (seed == s)
        lead = lead_time(seen[name][:, some], coarse[some], seed[some] % 2 == 0)
        if lead is not None:
            found[s] = lead.detected
    return found


def analyse(records: list[Record]) -> Analysis:
    """C12: ESS and gradient norms against the rest, pooled and within; and what an alarm is worth."""
    found = aurocs(records)
    seeds = len({r["seed"] for r in records})
    lost = sum(r["collapse"] is not None for r in records)
    caption = (
        f"How well each number tells which runs collapse, by the two definitions in use: seen now, within {HORIZON} "
        f"updates, and at its worst at any time before. AUROC with 95% interval (seeds resampled; 0.5 is guessing), "
        f"over all configurations and within one. {len(records)} runs of {seeds} seeds, {lost} collapsed. Step size "
        f"times lag knows nothing but the configuration, low reward the reward alone."
    )
    asked = [_predicts(found, name, seeds) for name in ("low_ess", "gradient_norm")]
    asked += [_best(found, seeds), _alarm(records)]
    return Analysis(judge(asked), [Figure("auroc_of_detectors", figure(found, seeds), caption, alt=caption)])


def _estimate(a: Auroc | None, seeds: int) -> Estimate | None:
    if a is None:
        return None
    known = a.replicate[np.isfinite(a.replicate)]
    return of_replicates(a.value, known, seeds, bounds=UNIT)


def _predicts(found: dict[str, dict[str, Auroc | None]], name: str, seeds: int) -> Question:
    words = {"low_ess": "ESS", "gradient_norm": "the gradient norm"}
    return Question(
        f"{name}_predicts",
        "C12",
        f"{words[name]} foretells collapse better than guessing",
        Rule("AUROC", ">", 0.5, MATTERS, "bootstrap over seeds, logit scale"),
        [Comparison(words, _estimate(found[name][kind], seeds)) for kind, words in KINDS.items()],
        "where",
    )


def _best(found: dict[str, dict[str, Auroc | None]], seeds: int) -> Question:
    comparisons = []
    for kind in ("pooled", "any_pooled"):
        ess = found["low_ess"][kind]
        for name in DETECTORS:
            other = found[name][kind]
            if name != "low_ess":
                difference = None
                if ess is not None and other is not None:
                    gap = ess.replicate - other.replicate
                    difference = of_replicates(ess.value - other.value, gap[np.isfinite(gap)], seeds, bounds=DIFFERENCE)
                words = f"ESS minus {name.replace('_', ' ')}, {KINDS[kind].partition(',')[0]}"
                comparisons.append(Comparison(words, difference))
    return Question(
        "ess_best",
        "C12",
        "no other number foretells collapse better than ESS (configurations pooled)",
        Rule("AUROC, ESS minus the other", ">", 0.0, -MATTERS, "bootstrap over seeds, paired, logit scale"),
        comparisons,
    )


def _alarm(records: list[Record]) -> Question:
    shares = {name: detections(records, name) for name in DETECTORS}
    ess = shares["low_ess"]
    gains = [
        Comparison(
            f"minus that of {n.replace('_', ' ')}",
            of_seeds(((s, ess[s] - shares[n][s]) for s in ess), bounds=DIFFERENCE),
        )
        for n in TRIVIAL
    ]
    return Question(
        "ess_alarm",
        "C12",
        "an ESS alarm set to one false alarm in ten on other runs catches more collapses than trivial alarms",
        Rule("share of collapses announced by ESS, minus the trivial alarm's", ">", 0.0, MATTERS),
        gains,
        note="announced: " + "; ".join(f"{n} {of_seeds(s.items(), bounds=UNIT)}" for n, s in shares.items() if s),
    )


def figure(found: dict[str, dict[str, Auroc | None]], seeds: int) -> Plot:
    """Detectors by their AUROC within a configuration, the pooled one beside it; one panel a definition."""

    def value(name: str) -> float:
        a = found[name]["within"]
        return -1.0 if a is None else a.value

    ordered = sorted(DETECTORS, key=value, reverse=True)
    names, panels = [n.replace("_", " ") for n in ordered], []
    for title, prefix in ((f"at a landmark: within {HORIZON} updates", ""), ("any time before", "any_")):
        parts = []
        for kind, label, number in (("pooled", "pooled", INK), ("within", "within a configuration", ACCENT)):
            made = {n: _estimate(found[n][prefix + kind], seeds) for n in ordered}
            rows = {n.replace("_", " "): e.interval for n, e in made.items() if e is not None}
            x, low, high = ([getattr(v, end) for v in rows.values()] for end in ("value", "low", "high"))
            parts.append(series(label, x, list(rows), low, high, color=number, line=False, hollow=kind == "within"))
        panels.append(panel(title, "AUROC", "", parts, order=names, xlim=[0, 1], vlines=[0.5]))
    return plot(*panels, width=5.4, height=4.4)


EXPERIMENT = Experiment(
    "collapse_prediction",
    "What foretells collapse: ESS and gradient norms, or simpler numbers?",
    ("C12",),
    settings,
    run,
    analyse,
    takes_estimators=True,
)
