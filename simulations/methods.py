"""The methods that learning experiments compare, and how one setting of them is run.

A method is an estimator of the catalogue, a step rule, and whether it learns from stale data at all. All rivals share
the plain host `R - group mean`, so that differences come from the ratio treatment alone.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from simulations.drawing import Plot, panel, plot, ranking, series
from simulations.protocol import OWN, Record, Setting, digest_of
from simulations.stats import (
    DIFFERENCE,
    UNIT,
    Estimate,
    improvement,
    interquartile_mean,
    of_replicates,
    of_seeds,
    rate_difference,
    resampled,
)
from vcposim.arrays import Array
from vcposim.catalogue import entry
from vcposim.catalogue.loading import estimator_named
from vcposim.errors import InputError
from vcposim.estimators import Estimator, Resolved
from vcposim.learning.collapse import NOT_COLLAPSED, collapse_step
from vcposim.learning.lags import Lag
from vcposim.learning.learner import Learner
from vcposim.learning.run_records import Run, UpdateRecord
from vcposim.learning.step_rules import Control
from vcposim.learning.tables import Family
from vcposim.learning.tasks import LearningTask, network, task

FULL_STEP = Control()
ESS = Control("ess")
"""the paper's brake for Adam: sqrt(ESS / n)"""
GROUPS, GROUP_SIZE = 4, 8


@dataclass(frozen=True)
class Method:
    """How to learn: estimator, step rule, and `stale=False` for the synchronous references."""

    estimator: str | Resolved
    control: Control = FULL_STEP
    stale: bool = True


def _with_mean(name: str) -> Estimator:
    return replace(entry(name).estimator, baseline="group_mean")


METHODS: dict[str, Method] = {
    "synchronous, mean": Method("dr_grpo", stale=False),
    "synchronous, OPOB": Method("on_policy_optimal", stale=False),
    "synchronous, no baseline": Method("reinforce", stale=False),
    "no correction": Method("dr_grpo"),
    "no correction, no baseline": Method("reinforce"),
    "no correction, RLOO": Method("rloo"),
    "no correction, GRPO std": Method("grpo"),
    "sequence IS": Method(_with_mean("sequence_is")),
    "sequence IS, no baseline": Method("sequence_is"),
    "sequence TIS": Method("sequence_tis"),
    "token TIS": Method("token_tis"),
    "token MIS": Method("token_mis"),
    "IcePop": Method("icepop"),
    "sequence MIS": Method("sequence_mis"),
    "geometric MIS": Method("geometric_mis"),
    "negative-advantage mask": Method("negative_advantage_mask"),
    "M2PO": Method("m2po"),
    "PPO clip": Method("ppo_clip"),
    "CISPO": Method("cispo"),
    "GSPO": Method("gspo"),
    "OTB": Method("otb"),
    "TBA": Method("tba"),
    "leverage-damped mean": Method("leverage_damped_mean"),
    "ESS only": Method("sequence_tis", ESS),
    "OPOB only": Method("vcpo"),
    "VCPO": Method("vcpo", ESS),
    "VCPO as released": Method("vcpo_released", ESS),
    "VCPO with GRPO std": Method("vcpo_group_std", ESS),
}
"""name -> method: the paper's comparison, its hosts, and the simple controls"""


def own_methods(setting: Setting) -> dict[str, Method]:
    """The estimators that a setting adds to an experiment's methods, under their own names, at the full step.

    Raises `InputError` if the file of one is not what it was when the run was planned.
    """
    out = {}
    for name, digest in setting.get(OWN, {}).items():
        if digest_of(name) != digest:
            raise InputError(f"{name}: its file has changed since this run began; put it back, or choose another --out")
        out[name] = Method(estimator_named(name))
    return out


SYNCHRONOUS = ("synchronous, mean", "synchronous, OPOB", "synchronous, no baseline")


def run_of(method: Method, lag: Lag, **options: Any) -> Run:
    """A run of a method; synchronous methods ignore the lag."""
    return Run(method.estimator, lag=lag if method.stale else Lag(), control=method.control, **options)


def trace(
    problem: LearningTask | str, runs: Sequence[Run], updates: int, *, family: Family | None = None, **options: Any
) -> dict[str, Array]:
    """Every field of the records of `updates` updates, stacked: (update, run); fields seen only now and then are held.

    The policy is the small network unless a family is given.
    """
    problem = task(problem) if isinstance(problem, str) else problem
    options = {"groups": GROUPS, "group_size": GROUP_SIZE, **options}
    learner = Learner(problem, runs, family=family or network(problem), **options)
    kept: dict[str, list[Array]] = {f.name: [] for f in fields(UpdateRecord) if f.name != "step"}
    for record in learner.updates(updates):
        for name, held in kept.items():
            seen = getattr(record, name)
            held.append(seen if seen is not None else held[-1] if held else None)
    found = {name: np.stack(held) for name, held in kept.items() if held[0] is not None}
    found["step_size"] = np.array([run.step_size for run in runs])
    found["max_lag"] = np.array([float(run.lag.k) for run in runs])
    return found


LAST = 20
"""updates that make up the final value"""
TARGET = 0.8
"""the value that time-to-target asks for"""


def outcome(found: dict[str, Array], i: int) -> Record:
    """What run i came to: plain numbers for a record; `collapse` and `hit` are updates, None for never."""
    value = found["value"][:, i]
    lost = int(collapse_step(value[:, None])[0])
    return {
        "final": float(value[-LAST:].mean()),
        "average": float(value.mean()),
        "collapse": None if lost == NOT_COLLAPSED else lost,
        "hit": int((value >= TARGET).argmax()) if (value >= TARGET).any() else None,
        "ess": float(found["ess_fraction"][:, i].mean()),
        "scale": float(found["step_scale"][:, i].mean()),
        "curve": [round(float(v), 4) for v in value[::10]],
    }


def chosen(records: Iterable[Record], **where: Any) -> list[Record]:
    """The records with these values."""
    for k, v in where.items():  # a pass a name: the first leaves few
        records = [r for r in records if r[k] == v]
    return list(records)


def gain(records: list[Record], first: str, second: str, field: str = "average") -> Estimate | None:
    """Mean difference first - second over seeds, of runs that share everything but the method (same random numbers)."""
    a, b = ({key_of(r): r for r in chosen(records, method=name)} for name in (first, second))
    return of_seeds(((a[k]["seed"], a[k][field] - b[k][field]) for k in a if k in b), bounds=DIFFERENCE)


def lost_more(records: list[Record], first: str, second: str) -> Estimate | None:
    """How much more often runs of the first collapse than those of the second: difference of rates."""
    a, b = ({key_of(r): r for r in chosen(records, method=name)} for name in (first, second))
    return rate_difference(
        (a[k]["seed"], a[k]["collapse"] is not None, b[k]["collapse"] is not None) for k in a if k in b
    )


def value_of(records: list[Record], method: str, field: str = "average") -> Estimate | None:
    """Mean value of a method's runs over seeds, a probability."""
    return of_seeds(((r["seed"], r[field]) for r in chosen(records, method=method)), bounds=UNIT)


def told(records: list[Record], names: Iterable[str]) -> str:
    """Values of methods, and how many of their runs are lost, as words."""
    return "; ".join(
        f"{name} {value_of(records, name)} ({lost_of(records, name)} lost)"
        for name in names
        if chosen(records, method=name)
    )


def value_ranking(
    title: str, records: list[Record], names: Iterable[str], accent: Sequence[str], *, step_sizes: bool = False
) -> Plot:
    """A panel of methods by their value; beside each, how many runs collapsed and, if asked, its step size."""
    names = [name for name in names if chosen(records, method=name)]
    alarms = {name: f"{lost_of(records, name)} lost" for name in names if lost(records, name)}
    rows = {f"{n}  @ {step_sizes_of(records, n)}" if step_sizes else n: value_of(records, n) for n in names}
    label = dict(zip(names, rows, strict=True))
    references = [n for n in names if n.startswith("synchronous, ")][:2]
    lines = [e.value for n in references if (e := rows[label[n]]) is not None]
    of = " and ".join(n.removeprefix("synchronous, ") for n in references)
    return ranking(
        title,
        "value averaged over training" + (f" (lines: synchronous, {of})" if of else ""),
        rows,
        alarms={label[n]: words for n, words in alarms.items()},
        accent=[label[n] for n in accent if n in label],
        xlim=[0, 1],
        vlines=lines,
    )


def profile(title: str, records: list[Record], names: Iterable[str]) -> Plot:
    """Performance profiles (Agarwal et al. 2021, arXiv 2108.13264): share of a method's runs above each value."""
    at = np.linspace(0, 1, 41)
    parts = []
    for number, name in enumerate(n for n in names if chosen(records, method=n)):
        values = np.array([r["average"] for r in chosen(records, method=name)])
        label = f"{name} (IQM {interquartile_mean(values):.3f})"
        parts.append(
            series(label, at.tolist(), [float(np.mean(values > x)) for x in at], color=number, dashed=number > 3)
        )
    return panel(title, "value averaged over training", "share of runs above it", parts)


def improvements(title: str, records: list[Record], ours: str, names: Iterable[str]) -> Plot:
    """Probability that a run of ours is above one of each other method at the same place, seeds resampled (same paper).

    A mean over places, as of tasks there: runs of different places are not compared.
    """
    values: dict[str, dict[Any, dict[Any, list[float]]]] = {}
    for r in records:
        seeds = values.setdefault(r["method"], {}).setdefault(place_of(r), {})
        seeds.setdefault(r["seed"], []).append(r["average"])
    rows = {}
    for name in names:
        both = [(mine, values[name][p]) for p, mine in values.get(ours, {}).items() if p in values.get(name, {})]
        known = sorted(set.intersection(*({*a} & {*b} for a, b in both))) if both else []
        if name == ours or not known:
            continue
        drawn = [np.bincount(row, minlength=len(known)) for row in resampled(len(known))]
        times = np.array([np.ones(len(known)), *drawn])  # how often each seed counts: all once, then the resamples
        won = [improvement([a[s] for s in known], [b[s] for s in known], times) for a, b in both]
        found = np.mean(won, axis=0)
        rows[name] = of_replicates(float(found[0]), found[1:], len(known), bounds=UNIT)
    return ranking(title, f"probability that a run of {ours} is better", rows, xlim=[0, 1], vlines=[0.5])


AGGREGATES = (
    "Performance profiles: share of runs whose value is above each threshold, with the interquartile mean; and the "
    "probability that a run of {ours} is above one of each other method (95% interval, seeds resampled)."
)


def aggregates(records: list[Record], ours: str, few: Iterable[str], names: Iterable[str]) -> Plot:
    """As rliable has them: profiles of a few methods, and the probability that ours is better than each."""
    panels = (
        profile("performance profiles", records, few),
        improvements("probability of improvement", records, ours, names),
    )
    return plot(*panels, width=4.8, height=4.4)


def standing(records: list[Record], own: Sequence[str]) -> list[list[str]]:
    """Every method from best to worst: rows of words, the first of them the headings.

    Of learning: name, value averaged over training, lost runs, each method at its own best step size where there are
    several; of exact moments: name, relative bias, descent efficiency (which no scale changes). Then for each of `own`
    its value minus this one's, or its efficiency over this one's (95% intervals, seeds paired and resampled). Empty
    for records of neither.
    """
    if records and "average" in records[0]:
        best = best_of(records) if "step_size" in records[0] else records
        values = {name: value_of(best, name) for name in dict.fromkeys(r["method"] for r in best)}
        rows = {name: [str(values[name]), lost_of(best, name)] for name in values}
        headings = ["method", "value averaged over training", "lost", *(f"{name} minus it" for name in own)]
        field, log, of = "average", False, {name: chosen(best, method=name) for name in values}
    elif any("descent_efficiency" in r for r in records):
        known = [r for r in records if "descent_efficiency" in r]
        of = {name: chosen(known, baseline=name) for name in dict.fromkeys(r["baseline"] for r in known)}
        values = {n: of_seeds(((r["seed"], r["descent_efficiency"]) for r in rs), scale="log") for n, rs in of.items()}
        biases = {n: of_seeds((r["seed"], r["relative_bias"]) for r in rs) for n, rs in of.items()}
        rows = {name: [str(biases[name]), str(values[name])] for name in of}
        headings = ["estimator", "relative bias", "descent efficiency", *(f"{name} over it" for name in own)]
        field, log = "descent_efficiency", True
    else:
        return []

    def beside(mine: str, name: str) -> str:
        if mine == name:
            return ""
        a, b = ({tuple(r.get(k) for k in CELL): r for r in of[one]} for one in (mine, name))
        pairs = [(a[k]["seed"], a[k][field], b[k][field]) for k in a if k in b]
        if log:
            return str(of_seeds(((s, x / y) for s, x, y in pairs if y > 0), scale="log"))
        return str(of_seeds(((s, x - y) for s, x, y in pairs), bounds=DIFFERENCE))

    ordered = sorted(rows, key=lambda name: -(values[name].value if values[name] else 0.0))  # type: ignore[union-attr]
    return [headings, *([name, *rows[name], *(beside(mine, name) for mine in own)] for name in ordered)]


PLACE = ("task", "law", "lag", "shift", "optimizer")
CELL = (
    *PLACE,
    *("seed", "group_size", "prompts", "length", "targets", "rewards", "base_rate", "clip_norm", "half"),
    *("kind", "policy", "chi2"),
)
"""all that a run shares with its pair, in any experiment"""


def place_of(record: Record) -> str:
    """Where a run stands among those of its method."""
    return str([record.get(k) for k in PLACE])


def key_of(record: Record) -> str:
    """What a run shares with its pair under another method."""
    return str([record.get(k) for k in (*PLACE, "seed")])


def lost(records: list[Record], method: str) -> int:
    """How many runs of a method collapsed."""
    return sum(r["collapse"] is not None for r in chosen(records, method=method))


def lost_of(records: list[Record], method: str) -> str:
    """The same, of how many."""
    return f"{lost(records, method)} of {len(chosen(records, method=method))}"


def at_own_best(records: list[Record], method: str, field: str = "average") -> list[Record]:
    """Records of a method at its best step size, each seed's chosen on the seeds of the other parity.

    So no run takes part in choosing the step size it is judged at.
    """
    mine = chosen(records, method=method)
    sizes = sorted({r["step_size"] for r in mine})
    if len(sizes) == 1:
        return mine
    out = []
    for parity in (0, 1):
        others = [r for r in mine if r["seed"] % 2 != parity]
        best = max(sizes, key=lambda e: np.mean([r[field] for r in others if r["step_size"] == e]))
        out += [r for r in mine if r["seed"] % 2 == parity and r["step_size"] == best]
    return out


def at_edge(best: Mapping[str, list[Record]], among: Mapping[str, list[Record]]) -> str:
    """Which methods have their best step size at the first or last of their place's grid: bounds from below, as words.

    `best`: the records of each place, each method at its own best; `among`: those at all step sizes.
    """
    sizes = {p: {r["step_size"] for r in own} for p, own in among.items()}
    found = [
        f"{method} at {p}"
        for p, own in best.items()
        for method in dict.fromkeys(r["method"] for r in own)
        if {r["step_size"] for r in chosen(own, method=method)} & {min(sizes[p]), max(sizes[p])}
    ]
    return f"best step sizes at the grid's edge, so bounds from below: {'; '.join(found) or 'none'}"


def over_the_grid(records: list[Record]) -> list[Record]:
    """One record for each method and seed of one place: the mean over step sizes; it neither collapsed nor did not."""
    found: dict[tuple[str, int], list[Record]] = {}
    for r in records:
        found.setdefault((r["method"], r["seed"]), []).append(r)
    mean = [{**group[0], "average": float(np.mean([r["average"] for r in group]))} for group in found.values()]
    return [{k: v for k, v in r.items() if k != "collapse"} for r in mean]


PAPERS_ESS = (0.1, 0.3)
"""ESS / n that VCPO's authors see under large lag"""


def ess_told(best: Mapping[str, list[Record]], method: str) -> str:
    """The mean ESS of a method in each place at its own best step size, as words; and where it is the paper's."""
    ess = {p: float(np.mean([r["ess"] for r in chosen(own, method=method)])) for p, own in best.items()}
    within = [p for p, x in ess.items() if PAPERS_ESS[0] <= x <= PAPERS_ESS[1]]
    each = "; ".join(f"{p} {x:.2f}" for p, x in ess.items())
    return f"ESS / n of {method}: {each}; within the paper's 0.1 to 0.3: {'; '.join(within) or 'nowhere'}"


def best_of(records: list[Record]) -> list[Record]:
    """The records of all methods, each at its own best step size."""
    return [r for method in dict.fromkeys(r["method"] for r in records) for r in at_own_best(records, method)]


def step_sizes_of(records: list[Record], method: str) -> str:
    """The step sizes chosen, as words."""
    return " or ".join(f"{e:g}" for e in sorted({r["step_size"] for r in chosen(records, method=method)}))
