"""`vcposim advise`: which estimator, baseline and step rule did best nearest to your regime, and how sure that is.

The evidence is `regimes.json`, the summary of `simulations/questions/regime_map.py`: places (prompts that share one
network, lag, length, base rate, rewards), and in each the value of every method by seed at its own best step size, and
by step size. Advice is read off the nearest place and says how far away that is; nothing is fitted or extrapolated.
What would change it is read off the other places.
"""

import argparse
import contextlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import TypedDict

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text
from scipy.stats import t

from vcposim.commands.completion import complete_with
from vcposim.commands.replay import SAMPLE
from vcposim.diagnostics import ess_fraction
from vcposim.errors import InputError
from vcposim.replay.reading import read_dump

EXAMPLES = ("vcposim advise --lag 16 --prompts 16",)
MATTERS = 0.02
"""a difference of success probabilities, averaged over training, that matters"""
FAR = 2.0
"""octaves of prompts, lag and length together beyond which a place says little about yours"""
REWARDS = ("zero-one", "shifted")
SHOWN = 8

CATALOGUE_NAMES = {
    "none / no ratio": "reinforce",
    "mean / no ratio": "dr_grpo",
    "n2 / no ratio": "on_policy_optimal",
    "mean / TIS": "sequence_tis",
    "OPOB / TIS": "vcpo",
    "OPOB loo / TIS": "vcpo_leave_one_out",
    "OPOB stratified / TIS": "vcpo_stratified",
    "mean / PPO": "ppo_clip",
    "mean / M2PO": "m2po",
}
"""baseline / ratio -> the catalogue's name where it has one"""
VCPO = "OPOB / TIS / ESS step"
PLAIN = {
    "none": "no baseline",
    "mean": "the group's mean as baseline",
    "n2": "the n^2 baseline (the mean reward weighed by squared score norms)",
    "OPOB": "OPOB (the mean reward weighed by squared ratios and score norms)",
    "OPOB loo": "OPOB without the response itself",
    "OPOB stratified": "OPOB with weights averaged over responses of equal reward",
    "no ratio": "no importance ratio",
    "TIS": "each response's ratio cut at 8",
    "PPO": "PPO's clip, 0.2",
    "GSPO": "GSPO's clip, its band widened to 0.2 for 8 tokens",
    "M2PO": "M2PO's mask, its threshold 0.04",
    "full step": "the full step",
    "ESS step": "the step times sqrt(ESS / n), measured in each batch",
    "synchronous": "synchronous training",
}
"""what the names in the table mean"""


class MeasuredMethod(TypedDict):
    """What a method came to in a place, one value a seed."""

    own_best: list[float]
    """success probability averaged over training, at its own best step size"""
    own_best_step: list[float]
    by_step: list[float]
    lost: list[int]
    ess: float


class MapCell(TypedDict):
    """A place where every method was measured, as `regimes.json` has it."""

    prompts: int
    lag: int
    length: int
    base_rate: float
    low: float
    """what a failure pays"""
    group_size: int
    optimizer: str
    step_sizes: list[float]
    seeds: int
    methods: dict[str, MeasuredMethod]


class RankedMethod(TypedDict):
    """A method of a place, beside the others."""

    method: str
    catalogue: str | None
    value: float
    half_width: float
    grid: float
    lost: float
    ess: float
    at_edge: bool
    shift_invariant: bool
    synchronous: bool


class Change(TypedDict):
    """A place where another method is better."""

    place: str
    better: str
    by: float
    low: float
    high: float


class Advice(TypedDict):
    """The answer, as `--json` prints it."""

    regime: dict[str, float | None]
    place: str
    seeds: int
    octaves: float
    choice: str
    any_reward: str
    step_size_unknown: str
    not_told_apart: list[str]
    over_vcpo: tuple[float, float, float]
    rows: list[RankedMethod]
    changes: list[Change]
    warnings: list[str]


def add_arguments(p: argparse.ArgumentParser) -> None:
    """What `vcposim advise` takes."""
    p.description = (
        "Which estimator, baseline and step rule did best where it was measured nearest to your regime, how sure that "
        "is, and what would change it. Small networks on string tasks: evidence about mechanisms, not about your model."
    )
    p.add_argument("file", nargs="?", metavar="FILE", help="a dump of rollouts (as for replay) to read numbers from")
    p.add_argument("--prompts", type=int, metavar="P", help="prompts that the policy learns at once")
    p.add_argument("--lag", type=float, metavar="K", help="updates between the sampler's weights and the learner's")
    p.add_argument("--length", type=float, metavar="T", help="mean tokens of a response")
    p.add_argument("--ess", type=float, metavar="X", help="ESS fraction of the sequence weights, in (0, 1]")
    rewards = p.add_argument(
        "--rewards",
        metavar="LAW",
        default="zero-one",
        help="zero-one where failures pay exactly 0, shifted for any other reward (default zero-one)",
    )
    complete_with(rewards, REWARDS)
    p.add_argument("--sample", action="store_true", help="read the rollouts that come along, as replay does")
    p.add_argument("--json", action="store_true", help="one JSON object")


@dataclass(frozen=True)
class AskedRegime:
    """What is known of yours; None for what is not."""

    prompts: float | None = None
    lag: float | None = None
    length: float | None = None
    ess: float | None = None
    shifted: bool = False

    def octaves(self, cell: MapCell) -> float:
        """How far a measured place is: doublings of prompts, of lag + 1 and of length between the two."""
        pairs = [(self.prompts, cell["prompts"]), (self.length, cell["length"])]
        pairs += [(None if self.lag is None else self.lag + 1, cell["lag"] + 1)]
        return sum(abs(math.log2(mine / theirs)) for mine, theirs in pairs if mine is not None)


def evidence() -> list[MapCell]:
    """The measured places."""
    return json.loads(files("vcposim.commands").joinpath("regimes.json").read_text())


def run(arguments: argparse.Namespace) -> None:
    """Read, choose, print."""
    found = advise(regime_of(arguments), evidence())
    if arguments.json:
        print(json.dumps(found, allow_nan=False))
    else:
        render(found, Console())


def regime_of(a: argparse.Namespace) -> AskedRegime:
    """The regime of the options, and of the dump for what they do not say.

    Raises `InputError` for numbers out of range, or if nothing is known.
    """
    if a.rewards not in REWARDS:
        raise InputError(f"--rewards: {a.rewards!r} is neither {' nor '.join(REWARDS)}")
    limits = {"prompts": 1, "lag": 0, "length": 1}
    for name, least in limits.items():
        value = getattr(a, name)
        if value is not None and not least <= value < math.inf:
            raise InputError(f"--{name}: {value:g} is out of range; give a number of at least {least}")
    if a.ess is not None and not 0 < a.ess <= 1:
        raise InputError(f"--ess: {a.ess:g} is not in (0, 1]; it is ESS over the number of trajectories")
    known = {name: getattr(a, name) for name in ("prompts", "lag", "length", "ess")}
    shifted = a.rewards == "shifted"
    if a.file is not None and a.sample:
        raise InputError(f"FILE: {a.file} and --sample; give one of them")
    if a.file is not None or a.sample:
        dump = read_dump(a.file or SAMPLE)
        own = {"prompts": len(set(dump.group.tolist())), "length": float(np.mean(dump.length))}
        own["ess"] = float(ess_fraction(dump.log_ratio))
        if "lag" in dump.slices:
            code, lags = dump.slices["lag"]
            with contextlib.suppress(TypeError, ValueError):  # a lag in words is none that can be compared
                own["lag"] = float(np.mean(np.asarray(lags, dtype=float)[code]))
        known = {name: own.get(name) if value is None else value for name, value in known.items()}
        shifted = shifted or (dump.has_reward and float(np.nanmin(dump.reward)) != 0)
    if all(value is None for value in known.values()):
        raise InputError("nothing is known of your regime; give --prompts, --lag, --length, --ess, a dump or --sample")
    return AskedRegime(**known, shifted=shifted)


def advise(regime: AskedRegime, cells: Sequence[MapCell]) -> Advice:
    """The answer as plain data: the place, the methods there from best to worst, the choice, and its limits."""
    law = [cell for cell in cells if (cell["low"] != 0) == regime.shifted]
    place = min(law or cells, key=regime.octaves)
    rows = ranked(place)
    # a method without a baseline hangs on failures paying exactly 0: never the choice unless that is so
    usable = [r for r in rows if not r["synchronous"] and (r["shift_invariant"] or not regime.shifted)]
    choice, steady = chosen(place, usable), max(usable, key=lambda r: r["grid"])
    sturdy = chosen(place, [r for r in usable if r["shift_invariant"]])
    tied = [r["method"] for r in usable if r is not choice and abs_low(place, choice["method"], r["method"]) <= 0]
    changes: list[Change] = []
    for cell in cells:
        best = ranked(cell)
        there = next((r for r in best if r["method"] == sturdy["method"]), None)
        first = next(r for r in best if not r["synchronous"] and r["shift_invariant"])
        if there is not None and first["value"] - there["value"] > MATTERS:
            low, value, high = difference(cell, first["method"], there["method"])
            changes.append({"place": words(cell), "better": first["method"], "by": value, "low": low, "high": high})
    ess = [r["ess"] for r in rows if not r["synchronous"]]
    warnings = []
    if not law:
        warnings.append("no place with such rewards was measured")
    if regime.octaves(place) > FAR:
        warnings.append(f"your regime is {regime.octaves(place):.1f} doublings away from the nearest place measured")
    if regime.ess is not None and regime.ess < min(ess):
        warnings.append(
            f"your ESS {regime.ess:g} is below all that occurred at best steps there ({min(ess):g} at least)"
        )
    return {
        "regime": vars(regime),
        "place": words(place),
        "seeds": place["seeds"],
        "octaves": regime.octaves(place),
        "choice": choice["method"],
        "any_reward": sturdy["method"],
        "step_size_unknown": steady["method"],
        "not_told_apart": tied,
        "over_vcpo": difference(place, choice["method"], VCPO),
        "rows": rows,
        "changes": changes,
        "warnings": warnings,
    }


def chosen(cell: MapCell, rows: list[RankedMethod]) -> RankedMethod:
    """Of the methods surely no more than `MATTERS` below the best, the one that is best over the grid of step sizes."""
    close = [r for r in rows if difference(cell, rows[0]["method"], r["method"])[2] <= MATTERS]
    return max(close or rows[:1], key=lambda r: r["grid"])


def abs_low(cell: MapCell, first: str, second: str) -> float:
    """The lower end of the size of a difference: 0 or less where the interval covers 0."""
    low, _, high = difference(cell, first, second)
    return max(low, -high)


def ranked(cell: MapCell) -> list[RankedMethod]:
    """The methods of a place, best at own best step first."""
    rows: list[RankedMethod] = []
    for method, m in cell["methods"].items():
        values, edges = m["own_best"], (cell["step_sizes"][0], cell["step_sizes"][-1])
        baseline, ratio, _ = method.split(" / ")
        rows.append(
            {
                "method": method,
                "catalogue": CATALOGUE_NAMES.get(f"{baseline} / {ratio}"),
                "value": float(np.mean(values)),
                "half_width": interval(values),
                "grid": float(np.mean(m["by_step"])),
                "lost": sum(m["lost"]) / (len(m["lost"]) * len(values)),
                "ess": m["ess"],
                "at_edge": len(cell["step_sizes"]) > 1 and any(step in edges for step in m["own_best_step"]),
                "shift_invariant": baseline != "none",
                "synchronous": ratio == "synchronous",
            }
        )
    return sorted(rows, key=lambda r: -r["value"])


def interval(values: Sequence[float]) -> float:
    """Half the width of Student's 95% interval of a mean over seeds; infinite of one."""
    x = np.asarray(values)
    return float(t.ppf(0.975, x.size - 1) * x.std(ddof=1) / math.sqrt(x.size)) if x.size > 1 else math.inf


def difference(cell: MapCell, first: str, second: str) -> tuple[float, float, float]:
    """First minus second at own best, paired by seed: (low, value, high)."""
    a, b = (np.asarray(cell["methods"][name]["own_best"]) for name in (first, second))
    mean, half = float(np.mean(a - b)), interval(a - b)
    return mean - half, mean, mean + half


def words(cell: MapCell) -> str:
    """A place in words."""
    rewards = "" if cell["low"] == 0 else f", rewards {cell['low']:g} and {cell['low'] + 1:g}"
    where = f"{cell['prompts']} prompts, lag {cell['lag']}, {cell['length']} tokens, base rate {cell['base_rate']:g}"
    alone = f", step size {cell['step_sizes'][0]:g} alone" if len(cell["step_sizes"]) == 1 else ""
    return where + rewards + alone


def plainly(method: str) -> str:
    """A method in plain words."""
    return ", ".join(PLAIN[part] for part in method.split(" / "))


KNOWN = {"prompts": "{:g} prompts", "lag": "lag {:g}", "length": "{:.3g} tokens a response", "ess": "ESS {:.2g} of n"}


def yours(regime: Mapping[str, float | None]) -> str:
    """What is known of the reader's regime, and what is not."""
    known = [words.format(regime[name]) for name, words in KNOWN.items() if regime[name] is not None]
    known.append("rewards other than 0 and 1" if regime["shifted"] else "failures pay 0")
    unknown = [name for name in KNOWN if regime[name] is None]
    return ", ".join(known) + (f"; not known, so not compared: {', '.join(unknown)}" if unknown else "")


def render(found: Advice, console: Console) -> None:
    """The answer for a reader: what to take first, then the evidence, then what it does not say."""

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    rows = {r["method"]: r for r in found["rows"]}
    name = lambda m: f" (vcposim catalogue {c})" if (c := rows[m]["catalogue"]) else ""  # noqa: E731
    say(f"Yours: {yours(found['regime'])}.")
    say(f"Take: {plainly(found['choice'])}{name(found['choice'])}.")
    if found["any_reward"] != found["choice"]:
        say(f"If failures may ever pay anything but 0: {plainly(found['any_reward'])}{name(found['any_reward'])}.")
    if found["step_size_unknown"] not in (found["choice"], found["any_reward"]):
        say(f"If the step size cannot be tuned: {plainly(found['step_size_unknown'])}.")
    low, value, high = found["over_vcpo"]
    say(f"How sure: over VCPO ({VCPO}) {value:+.3f} [{low:.3f}, {high:.3f}], paired by seed, one comparison of many.")
    say("")
    whole = all(found["regime"][name] is not None for name in ("prompts", "lag", "length"))
    near = "the very place" if whole else "as near as can be told"
    where = f"{found['octaves']:.1f} doublings away from yours" if found["octaves"] else near
    say(f"Evidence: {found['place']}, {found['seeds']} seeds, {where}.")
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in ("baseline / ratio / step", "own best step", "over the grid", "lost"):
        table.add_column(heading, no_wrap=True)
    for r in found["rows"][:SHOWN] + [r for r in found["rows"][SHOWN:] if r["method"] == VCPO]:
        value_text = f"{r['value']:.3f} ±{r['half_width']:.3f}{' (edge)' if r['at_edge'] else ''}"
        row = (r["method"], value_text, f"{r['grid']:.3f}", f"{r['lost']:.0%}")
        table.add_row(*(Text(cell) for cell in row))
    console.print(table)
    say("Success probability averaged over training, ± 95% over seeds; lost: of runs over the whole grid of steps.")
    if found["not_told_apart"]:
        say(f"As good, as far as one can tell: {'; '.join(found['not_told_apart'])}.")
    say("")
    for warning in found["warnings"]:
        say(f"Beware: {warning}.")
    for c in found["changes"]:
        say(
            f"What would change it: at {c['place']}, {c['better']} is better than {found['any_reward']} by "
            f"{c['by']:.3f} [{c['low']:.3f}, {c['high']:.3f}]."
        )
    if not found["changes"]:
        say(f"In no place measured does another do better than {found['any_reward']} by more than {MATTERS:g}.")
    say("Small networks on string tasks: evidence about mechanisms, not about your model.")
