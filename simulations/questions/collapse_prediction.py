"""Do ESS and gradient norms foretell collapse, better than simpler numbers, and within one configuration?

Many runs that differ in method, lag, step size and seed. At landmark updates every detector is asked which of the
runs still healthy will collapse within the horizon. *Pooled*, a detector profits from knowing the configuration, as
step size times lag does without looking at a run. *Within a configuration* (same method, lag, step size; only the
random numbers differ) it has to see the danger in the run itself. Alarms are set on the runs of even seeds and judged
on odd ones.
"""

from typing import Any

import numpy as np
from matplotlib.figure import Figure as Canvas

from simulations.drawing import canvas
from simulations.methods import METHODS, run_of, trace
from simulations.protocol import Analysis, Experiment, Figure, Record, Setting, Verdict
from vcposim.arrays import Array
from vcposim.commands.figures import ACCENT, INK, MUTED
from vcposim.learning.collapse import (
    DETECTORS,
    NEVER,
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
TRIVIAL = ("step_size_times_lag", "low_reward")


def settings(size: str) -> list[Setting]:
    """Lags x blocks of seeds; methods and step sizes are in each."""
    full = size == "full"
    lags, blocks = (
        ((8, 16, 32), [range(first, first + 4) for first in (0, 4)]) if full else ((16,), [range(0, 2), range(2, 4)])
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
    keys = [(m, e, s) for m in setting["methods"] for e in setting["step_sizes"] for s in setting["seeds"]]
    runs = [run_of(METHODS[m], Lag(setting["lag"]), seed=s, step_size=e) for m, e, s in keys]
    found = trace(TASK, runs, setting["updates"], khat_every=KHAT_EVERY)
    found["khat"] = usable_khat(found["khat"])
    lost = collapse_step(found["value"])
    seen = {name: danger(name, found)[EVERY - 1 :: EVERY] for name in DETECTORS}
    return [
        {
            **{"lag": setting["lag"], "method": m, "step_size": e, "seed": s, "updates": setting["updates"]},
            "collapse": None if lost[i] == NEVER else int(lost[i]),
            "detectors": {name: [round(float(x), 6) for x in score[:, i]] for name, score in seen.items()},
        }
        for i, (m, e, s) in enumerate(keys)
    ]


def usable_khat(khat: Array) -> Array:
    """k-hat as a score: no tail at all is safest, no estimate or a tail beyond float range most dangerous."""
    return np.clip(np.nan_to_num(khat, nan=5.0, posinf=5.0, neginf=-5.0), -5.0, 5.0)


def scores(records: list[Record]) -> tuple[Array, Array, dict[str, Array]]:
    """Collapse (run,), configuration (run,), and detectors (landmark, run)."""
    collapse = np.array([NEVER if r["collapse"] is None else r["collapse"] for r in records])
    names = [f"{r['method']} {r['lag']} {r['step_size']}" for r in records]
    configuration = np.unique(names, return_inverse=True)[1]
    return collapse, configuration, {n: np.array([r["detectors"][n] for r in records]).T for n in DETECTORS}


def judged(records: list[Record]) -> dict[str, dict[str, Any]]:
    """AUROC pooled and within configurations, and alarms, of each detector."""
    collapse, configuration, seen = scores(records)
    landmarks = np.arange(EVERY - 1, records[0]["updates"] - 1, EVERY)
    case: Cases = cases(collapse, [int(x) for x in landmarks], HORIZON)
    at = case.landmark // EVERY
    within = configuration[case.run] * len(landmarks) + at
    calibrate = np.array([r["seed"] % 2 == 0 for r in records])
    coarse = np.where(collapse == NEVER, NEVER, collapse // EVERY)
    return {
        name: {
            "pooled": auroc(score[at, case.run], case, at),
            "within": auroc(score[at, case.run], case, within),
            "lead": lead_time(score, coarse, calibrate),
        }
        for name, score in seen.items()
    }


def analyse(records: list[Record]) -> Analysis:
    """C12: ESS and gradient norms against the rest, pooled and within; and what an alarm is worth."""
    found = judged(records)
    lost = sum(r["collapse"] is not None for r in records)
    size = f"{len(records)} runs, {lost} collapsed"
    caption = (
        f"How well each number, seen now, tells which runs collapse within {HORIZON} updates: AUROC with 95% interval "
        f"(0.5 is guessing), over all configurations (filled) and within one (open). {size}. Gray: what knows "
        "nothing but the configuration, or the reward alone."
    )
    verdicts = [_claim(found, name, size) for name in ("low_ess", "gradient_norm")]
    verdicts += [_against_others(found, size), _lead(found, size)]
    return Analysis(verdicts, [Figure("auroc_of_detectors", draw, caption, alt=caption)])


def _claim(found: dict[str, dict[str, Any]], name: str, size: str) -> Verdict:
    pooled, within = found[name]["pooled"], found[name]["within"]
    best = max(DETECTORS, key=lambda n: _value(found[n]["within"]))
    words = {"low_ess": "ESS", "gradient_norm": "the gradient norm"}
    predicts = [a is not None and a.low > 0.5 for a in (pooled, within)]
    word = "holds" if all(predicts) else "holds if" if any(predicts) else "fails"
    others = "; ".join(f"{n} {found[n]['pooled']} / {found[n]['within']}" for n in DETECTORS if n != name)
    return Verdict(
        "C12",
        f"{words[name]} foretells collapse better than guessing",
        word,
        f"AUROC pooled {pooled} / within a configuration {within}; best within: {best}. Others: {others} ({size})",
        ("configurations are pooled" if predicts[0] else "the configuration is fixed") if word == "holds if" else "",
    )


def _against_others(found: dict[str, dict[str, Any]], size: str) -> Verdict:
    ess = found["low_ess"]["pooled"]
    others = {n: found[n]["pooled"] for n in DETECTORS if n != "low_ess"}
    if ess is None:
        return Verdict("C12", "ESS foretells collapse best", "fails", f"not judged: no pairs ({size})")
    above = {n: a for n, a in others.items() if a is not None and a.value > ess.value}
    surely = [n for n, a in above.items() if a.low > ess.high]
    word = "fails" if surely else "holds if" if above else "holds"
    return Verdict(
        "C12",
        "no other number foretells collapse better than ESS (pooled)",
        word,
        f"ESS {ess}; higher: {', '.join(f'{n} {a}' for n, a in above.items()) or 'none'}; surely higher: "
        f"{', '.join(surely) or 'none'}; step size times lag alone {others['step_size_times_lag']} ({size})",
        "the intervals overlap: these runs do not decide it" if word == "holds if" else "",
    )


def _value(a: Auroc | None) -> float:
    return -1.0 if a is None else a.value


def _lead(found: dict[str, dict[str, Any]], size: str) -> Verdict:
    told = {name: found[name]["lead"] for name in DETECTORS if found[name]["lead"] is not None}
    if not told:
        return Verdict("C12", "alarms come in time to act", "fails", f"not judged: a half without collapses ({size})")
    words = "; ".join(
        f"{name} {lead.detected:.0%} of collapses"
        + (f", {EVERY * float(np.median(lead.lead)):.0f} updates ahead (median)" if lead.lead.size else "")
        + f", {lead.false_alarm:.0%} false alarms"
        for name, lead in told.items()
    )
    ess = told.get("low_ess")
    trivial = max((told[n].detected for n in TRIVIAL if n in told), default=0.0)
    word = "holds" if ess is not None and ess.detected > max(trivial, 0.5) else "fails"
    return Verdict(
        "C12",
        "an ESS alarm set to one false alarm in ten on other runs catches most collapses, and more than trivial alarms",
        word,
        f"{words} ({size})",
    )


def draw(records: list[Record]) -> Canvas:
    """Detectors by their pooled AUROC; the one within a configuration beside it."""
    found = judged(records)
    ordered = sorted(DETECTORS, key=lambda n: _value(found[n]["within"]))
    with canvas(1, width=6.4, height=4.4) as (figure, (ax,)):
        for y, name in enumerate(ordered):
            color = MUTED if name in TRIVIAL else ACCENT if name in ("low_ess", "gradient_norm") else INK
            for kind, offset, face in (("pooled", 0.15, color), ("within", -0.15, "white")):
                a = found[name][kind]
                if a is not None:
                    ax.plot([a.low, a.high], [y + offset] * 2, color=color, linewidth=1.2)
                    ax.plot(a.value, y + offset, "o", color=color, markerfacecolor=face, markersize=5)
        ax.axvline(0.5, color=MUTED, linewidth=0.8, zorder=0)
        ax.set_yticks(range(len(ordered)), [name.replace("_", " ") for name in ordered])
        ax.plot([], [], "o", color=INK, label="all configurations pooled")
        ax.plot([], [], "o", color=INK, markerfacecolor="white", label="within a configuration")
        ax.set(xlim=(0, 1.02), xlabel=f"AUROC: collapse within {HORIZON} updates")
        figure.legend(loc="outside lower center", ncols=2)
    return figure


EXPERIMENT = Experiment(
    "collapse_prediction",
    "What foretells collapse: ESS and gradient norms, or simpler numbers?",
    ("C12",),
    settings,
    run,
    analyse,
)
