"""Records of worlds in which every question of an experiment has a known answer: true, false, or pure noise.

`world(experiment, mode, key)` gives the records; `key` is the question asked, for the few that contradict another.
Modes: "true", "opposite", "noise" (centered on the boundary, with a scatter that hides it) and "between": an effect in
favor of the claim that is smaller than the margin, which `BETWEEN` says the word of.
"""

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import numpy as np

from simulations.methods import METHODS
from simulations.protocol import Experiment, discover, plain
from simulations.questions import (
    ablation,
    baselines_under_lag,
    beyond_vcpo,
    in_batch_bias,
    long_trajectories,
    mechanism,
    pipeline_speedup,
    proxy_quality,
    regime_factors,
    regime_map,
    step_rules,
    transformer_collapse,
    variance_vs_lag,
)
from vcposim.learning.collapse import DETECTORS

Records = list[dict[str, Any]]
SEEDS = range(24)


def rng_of(mode: str, salt: int = 0) -> np.random.Generator:
    return np.random.default_rng([len(mode), salt])


# --- learning ---------------------------------------------------------------------------------------------------------

OURS, STD = "VCPO", "VCPO with GRPO std"


def learned(mode: str, name: str, rng: np.random.Generator, ours: str = OURS) -> dict[str, Any]:
    """Value and collapse of a run, in a world where `ours` is best, worst, one among equals, or hardly better."""
    synchronous = name.startswith("synchronous")
    if mode == "noise":
        value, lost = rng.random(), rng.random() < 0.5
    else:
        levels = {  # ours, ours with std, synchronous, others
            "true": (0.8, 0.9, 0.7, 0.3),
            "opposite": (0.3, 0.1, 0.8, 0.9),
            "between": (0.509, 0.518, 0.518, 0.5),
        }[mode]
        value = levels[0 if name == ours else 1 if name == STD else 2 if synchronous else 3] + 0.001 * rng.normal()
        lost = (mode == "true" and name not in (ours, STD) and not synchronous) or (mode == "opposite" and name == ours)
    row = {"final": value, "average": value, "collapse": 50 if lost else None, "hit": 5, "ess": 0.5, "scale": 1.0}
    return {**row, "curve": [], "cosine": 0.5}


def of_methods(names: Any, mode: str, place: dict[str, Any], ours: str = OURS) -> Records:
    rng = rng_of(mode, len(place))
    return [{**place, "method": n, "seed": s, **learned(mode, n, rng, ours)} for n in names for s in SEEDS]


def async_world(mode: str, key: str) -> Records:
    return of_methods(METHODS, mode, {"task": "exact_match_8", "law": "fixed", "lag": 16})


def best_world(mode: str, key: str) -> Records:
    return of_methods(METHODS, mode, {"step_size": 0.01})


def ablation_world(mode: str, key: str) -> Records:
    places = [(8, 0.0), (8, 1.0), (8, -1.0), (4, 0.0)]
    return [
        r
        for n, shift in places
        for r in of_methods(ablation.PARTS, mode, {"group_size": n, "shift": shift}, ablation.OPOB)
    ]


def beyond_world(mode: str, key: str) -> Records:
    levels = {  # VCPO, candidates, rivals, synchronous
        "true": (0.8, 0.5, 0.3, 0.4),
        "opposite": (0.3, 0.5, 0.8, 0.9),
        "between": (0.5, 0.509, 0.5, 0.518),
        "noise": (0.5,) * 4,
    }[mode]
    rng, records = rng_of(mode, 3), []
    for prompts in (1, 16):
        for half in beyond_vcpo.HALVES:
            for name in (*beyond_vcpo.RIVALS, *beyond_vcpo.CANDIDATES):
                kind = 0 if name == beyond_vcpo.VCPO else 1 if name in beyond_vcpo.CANDIDATES else 2
                level = levels[3 if name.startswith("synchronous") else kind]
                for step, off in ((0.01, 0.1), (0.02, 0.0), (0.04, 0.1)):
                    for seed in SEEDS:
                        value = rng.random() if mode == "noise" else level - off + 0.001 * rng.normal()
                        place = {"prompts": prompts, "lag": 16, "half": half, "step_size": step, "method": name}
                        records.append({**place, "seed": seed, "average": value, "ess": 0.5, "collapse": None})
    return records


def factors_world(mode: str, key: str) -> Records:
    levels = {  # mean, n2, with ratios, with the brake, VCPO
        "true": (0.3, 0.5, 0.6, 0.6, 0.7),
        "opposite": (0.7, 0.5, 0.4, 0.4, 0.3),
        "between": (0.5, 0.509, 0.518, 0.518, 0.5),
        "noise": (0.5,) * 5,
    }[mode]
    rng, records = rng_of(mode, 4), []
    for cell in regime_factors.DESIGN:
        for name, level in zip(regime_factors.METHODS, levels, strict=True):
            for step, off in ((0.01, 0.1), (0.02, 0.0)):
                for seed in range(12):
                    value = rng.random() if mode == "noise" else level - off + 0.001 * rng.normal()
                    row = {"method": name, "step_size": step, "seed": seed, "average": value, "ess": 0.5}
                    records.append({**cell._asdict(), **row, "collapse": None, "start": 0.1})
    return records


def step_world(mode: str, key: str) -> Records:
    rng, records = rng_of(mode), []
    for drift in step_rules.DRIFTS:
        for optimizer, claimed in (("sgd", 1.0), ("adam", 0.5)):
            for period in (2, 100):
                for p in step_rules.EXPONENTS:
                    level = {
                        "true": 1.0 if p == claimed else 2.0,
                        "opposite": 2.0 if p == claimed else 1.0,
                        "between": 1.01 if p == claimed else 1.0,
                        "noise": 1.0,
                    }[mode]
                    losses = level * np.exp((1.0 if mode == "noise" else 1e-4) * rng.normal(size=24))
                    place = {"kind": "quadratic", "optimizer": optimizer, "drift": drift, "period": period}
                    records.append({**place, "exponent": p, "losses": losses, "loss": float(losses.mean()), "eta": 0.1})
    for optimizer, guide in (("adam", "ESS^0.5"), ("sgd", "ESS^1")):
        names = (*step_rules.RULES, *step_rules.CONTROLS)
        place = {"kind": "learning", "optimizer": optimizer, "step_size": 0.1}
        rows = of_methods(names, mode, place, guide)
        if mode == "between":  # the margin here is half of the others'
            rows = [{**r, "average": 0.5 + 0.5 * (r["average"] - 0.5)} for r in rows]
        records += rows
    return records


def collapse_world(mode: str, key: str) -> Records:
    rng, records = rng_of(mode), []
    ours = ("low_ess", "gradient_norm")
    for seed in SEEDS:
        for method in "abcd":
            lost = 95 if rng.random() < 0.5 else None
            truth = [float(lost is not None) + 0.01 * rng.random() for _ in range(16)]
            detectors = {}
            for name in DETECTORS:
                seeing = (name in ours) == (mode == "true")
                blind = [-x for x in truth] if mode == "opposite" else list(0.01 * rng.random(16))
                detectors[name] = list(rng.random(16)) if mode == "noise" else truth if seeing else blind
            place = {"lag": 16, "method": method, "step_size": 0.1, "seed": seed, "updates": 160}
            records.append({**place, "collapse": lost, "detectors": detectors})
    return records


def regime_world(mode: str, key: str) -> Records:
    """One cell; VCPO stands between n^2 and the mean, but where its lead over n^2 is asked for."""
    rng, records = rng_of(mode, 5), []
    lead = key == "vcpo_beats_rivals_with_n2"
    levels = {  # VCPO, the same with stratified OPOB, n^2, the same with a brake, synchronous n^2, others
        "true": (0.95 if lead else 0.5, 0.7, 0.8, 0.8, 0.8, 0.3),
        "opposite": (0.1 if lead else 0.9, 0.7, 0.3, 0.3, 0.9, 0.8),
        "between": (0.515, 0.525, 0.505, 0.525, 0.515, 0.5),
    }
    kinds = {regime_map.VCPO: 0, "OPOB stratified / TIS / ESS step": 1, "n2 / no ratio / ESS step": 3}
    kinds |= {"n2 / synchronous / full step": 4}
    for method in regime_map.METHODS:
        kind = kinds.get(method, 2 if method.startswith("n2 ") else 5)
        for step in (0.02, 0.04):
            for seed in SEEDS:
                value = rng.random() if mode == "noise" else levels[mode][kind] + 0.001 * rng.normal()
                row = {"method": method, "step_size": step, "seed": seed, "average": value, "final": value}
                records.append(
                    {**regime_map.CORE._asdict(), **row, "ess": 0.5, "scale": 1.0, "start": 0.1, "collapse": None}
                )
    return records


def mechanism_world(mode: str, key: str) -> Records:
    """Over the catalogue the share of negatives foretells the value; over interventions as the mode says."""
    rng, records = rng_of(mode, 4), []
    for kind, names in (("catalogue", mechanism.CATALOGUED), ("intervention", mechanism.INTERVENTIONS)):
        for number, name in enumerate(names):
            for seed in SEEDS if mode != "noise" else range(5):
                share = number / len(names)
                sign = 1 if mode == "opposite" and kind == "intervention" else -1
                value = 0.5 + 0.4 * sign * share + 0.01 * rng.normal()
                if mode == "noise":
                    value = 0.5 - 0.2 * share + 0.3 * rng.normal()
                row = {**{p: float(rng.random()) for p in mechanism.PREDICTORS}, "negative share": share}
                for step in mechanism.LARGE:
                    place = {"method": name, "kind": kind, "step_size": step, "seed": seed}
                    records.append({**place, **row, "average": value, "collapse": None})
    return records


# --- exact ------------------------------------------------------------------------------------------------------------


def in_batch_world(mode: str, key: str) -> Records:
    rng, records = rng_of(mode), []
    for policy in ("random", "trained"):
        for n in (2, 8):
            for seed in SEEDS:
                place = {"policy": policy, "chi2": 3.0, "group_size": n, "seed": seed}
                for name in in_batch_bias.BASELINES:
                    bias = {"true": 1e-3, "opposite": 0.5, "between": 5e-3, "noise": 0.01 + 0.1 * rng.normal()}[mode]
                    worse = {"true": 0.5, "opposite": 3.0, "between": 1.03, "noise": float(np.exp(rng.normal()))}[mode]
                    mse = (worse if name == "opob_released" else 1.0) * float(np.exp(1e-3 * rng.normal()))
                    shrinkage = 1 - 1 / n + (0.5 if mode == "opposite" else 0.0)
                    row = {"relative_bias": bias + 1e-5 * rng.normal(), "mse": mse, "shrinkage": shrinkage}
                    records.append({**place, "baseline": name, **row})
                violation = 1.0 if mode == "opposite" else 1e-14
                records.append({**place, "baseline": "identity", "violation": violation})
    return records


def baselines_world(mode: str, key: str) -> Records:
    rng, records = rng_of(mode), []
    for policy in ("random", "trained"):
        for chi2 in (1.0, 10.0):
            for seed in SEEDS:
                place = {"policy": policy, "chi2": chi2, "seed": seed}
                for shift in (0.0, baselines_under_lag.SHIFT):
                    for name in baselines_under_lag.BASELINES:
                        level = {"true": 2.0, "opposite": 0.5, "between": 1.03, "noise": 1.05}[mode]
                        ratio = level if name in baselines_under_lag.ABLATION else 1.0
                        ratio *= float(np.exp((1.0 if mode == "noise" else 1e-3) * rng.normal()))
                        numbers = {"descent_efficiency": ratio, "mse": 1 / ratio}
                        records.append({**place, "kind": "moments", "shift": shift, "baseline": name, **numbers})
                gap = 1.0 if mode == "opposite" else 1e-14
                records.append({**place, "kind": "gap", "violation": gap, "saved": 0.1 + 0.01 * rng.normal()})
                large = (mode == "opposite") != (key == "others_biased")  # what C2 says of cut weights, C7 denies
                bias = {"noise": 0.01 + 0.05 * rng.normal(), "between": 0.005}.get(mode, 0.5 if large else 1e-3)
                rows = {c: bias + 1e-5 * rng.normal() for c in baselines_under_lag.CONDITIONS}
                records.append({**place, "kind": "bias", **rows})
    return records


def ess_world(mode: str, key: str) -> Records:
    records: Records = []
    for kind, spread, true in (("lognormal", 0.5, 0.8), ("lognormal", 2.0, 0.02), ("pareto", 1.5, 0.0)):
        level = {"true": 1.0, "opposite": 10.0, "between": 1.1, "noise": 1.25}[mode] * true
        if true == 0:
            level = {"true": 0.01, "opposite": 0.9, "between": 0.05, "noise": 0.1}[mode]
        wide = 30.0 if mode == "noise" else 1.01
        plug = {"median": level, "low": level / wide, "high": level * wide, "batches": 40, "khat_batches": 40}
        alarms = {"mean_alarm": 0.0, "khat_alarm": 0.5, "misled": 0.5}
        records.append({"kind": kind, "spread": spread, "n": 64, "true": true, **plug, **alarms})
    seen = {"true": 0.99, "opposite": 0.01, "between": 0.5, "noise": 0.5}[mode]
    gone = {**records[-1], "kind": "missing_mode", "spread": 0.9, "true": 0.01, "khat_alarm": seen}
    bad = 1.0 if mode == "opposite" else 0.0
    cases = {"kind": "arithmetic", "case": "c", "right": 0.0, "reference": bad, "shipped": bad}
    wrong = {"reference_wrong": bool(bad), "shipped_wrong": bool(bad)}
    identities = {"kind": "identities", "problems": 9, "chi2": bad, "shift": 0.0, "range": 0.0}
    return [*records, gone, identities, {**cases, **wrong}]


def variance_world(mode: str, key: str) -> Records:
    rng, records = rng_of(mode), []
    for step in (0.1, 0.2, 0.4):
        for length in (4, 8, 16):
            for seed in SEEDS if mode != "noise" else range(5):
                for lag in (0, 1, 4, 16):
                    size = (lag + 1) * step * length * float(np.exp(0.01 * rng.normal()))
                    grown = {"true": size, "between": size, "opposite": -size, "noise": float(rng.normal())}[mode]
                    ess = 1.0 if lag == 0 else 0.8 if lag == 1 else 0.3
                    off = {"true": 0.0, "between": 0.15, "opposite": 1.5, "noise": 0.28 * rng.normal()}[mode]
                    variance = np.exp(off + 0.01 * rng.normal()) / ess if lag else 1.0
                    row = {"step": step, "length": length, "seed": seed, "lag": lag, "variance": float(variance)}
                    records.append({**row, "ess_fraction": ess, **dict.fromkeys(variance_vs_lag.GROWS, grown)})
    for r in records:
        r["log_ratio_sd"] = r["log_ratio_sd"] if mode != "opposite" else r["log_ratio_sd"] + 1e3  # drawn on a log axis
    return records


# --- pipelines and transformers ---------------------------------------------------------------------------------------


def pipeline_world(mode: str, key: str) -> Records:
    rng, records = rng_of(mode), []
    speed = {"true": 3.0, "opposite": 1.0, "between": 1.02, "noise": 1.05}[mode]
    for k in (1, 8):
        place = {"task": "exact_match_8", "tail": "even", "admission": "pace", "max_lag": k}
        lag = k if mode in ("true", "noise") else 3 * k
        more = {"mean_lag": lag, "lag_share": [0.5, 0.5], "beyond": 0.0, "dropped": 0.0}
        records.append({"kind": "pipeline", **place, "speed": speed, **more})
        names = (*pipeline_speedup.REFERENCES, *pipeline_speedup.STALE) if k == 1 else pipeline_speedup.STALE
        for name in names:
            for step in pipeline_speedup.STEP_SIZES:
                for seed in range(40):
                    hit = {"true": 100, "opposite": 10, "between": 1000}.get(mode, 0)
                    if name == pipeline_speedup.OURS:
                        hit = {"true": 50, "opposite": 80, "between": 1000}.get(mode, 0)
                    hit = round(30 * np.exp(0.8 * rng.normal())) + 1 if mode == "noise" else hit + seed % 3
                    ran = {"method": name, "step_size": step, "seed": seed, "updates": 200, "hit": hit, "final": 0.9}
                    records.append({"kind": "learning", **place, **ran})
    return records


def proxy_world(mode: str, key: str) -> Records:
    rng, records = rng_of(mode, 1), []
    for seed in range(3 if mode == "noise" else 12):
        for _ in range(2 if mode == "noise" else 6):
            exact = np.exp(rng.normal(size=16))
            reward, ratio = (rng.random(16) < 0.4).astype(float), 0.3 * rng.normal(size=16)
            group = {"model": "toy", "seed": seed, "reward": reward, "log_ratio": ratio, proxy_quality.EXACT: exact}
            group["cost"] = dict.fromkeys((proxy_quality.EXACT, *proxy_quality.PROXIES), 1.05)
            spread = {"true": 0.0, "between": 0.0, "opposite": 2.0, "noise": 0.3}[mode]
            stand_in = np.exp(2 * rng.normal(size=16)) if mode == "opposite" else exact
            norms = {name: stand_in * np.exp(spread * rng.normal(size=16)) for name in proxy_quality.PROXIES}
            records.append({**group, **norms})
    return records


def transformer_world(mode: str, key: str) -> Records:
    rng, records = rng_of(mode), []
    at = np.linspace(0, 1, 9)
    for s in transformer_collapse.settings("full"):
        if s["seed"]:
            continue
        for seed in range(12):
            synchronous = s["method"].startswith("synchronous")
            fast = s["method"] == OURS or (synchronous and mode != "opposite")
            if mode == "opposite":
                fast = s["method"] != OURS
            value = 0.3 + (0.65 if fast else 0.15) * at ** (0.5 if fast else 1.0)
            if mode == "between":
                value = 0.3 + 0.4 * at + (0.02 if s["method"] == OURS else 0.03 if synchronous else 0.0)
            value = value + 0.002 * rng.normal(size=9)
            if mode == "noise":
                value = np.array([0.3, *rng.random(8)])
            kept = transformer_collapse.outcome([float(v) for v in value], s["every"])
            gauges = dict.fromkeys(transformer_collapse.GAUGES, 0.5)
            records.append({**s, "seed": seed, "task": transformer_collapse.TASKS[s["kind"]][0], **kept, **gauges})
    return records


def long_world(mode: str, key: str) -> Records:
    """VCPO before all others, but where the lead candidate's lead over it is asked for."""
    lead = key == "lead_beats_vcpo"
    levels = {  # VCPO, the lead candidate, other candidates, rivals, synchronous
        "true": (0.7, 0.9 if lead else 0.6, 0.6, 0.3, 0.6),
        "opposite": (0.2, 0.1 if lead else 0.8, 0.8, 0.8, 0.8),
        "between": (0.5, 0.52, 0.52, 0.48, 0.52),
        "noise": (0.5,) * 5,
    }[mode]
    rng, records = rng_of(mode, 6), []
    kinds = {OURS: 0, long_trajectories.LEAD: 1} | dict.fromkeys(long_trajectories.RIVALS, 3)
    for place in ({"task": "thought of 64", "lag": 64}, {"task": "tool use", "lag": 4}):
        for method in long_trajectories.METHODS:
            kind = 4 if method.startswith("synchronous") else kinds.get(method, 2)
            for step, off in ((0.001, 0.1), (0.002, 0.0)):
                for seed in SEEDS:
                    value = rng.random() if mode == "noise" else levels[kind] - off + 0.001 * rng.normal()
                    row = {**place, "method": method, "step_size": step, "seed": seed, "average": value, "every": 16}
                    gauges = dict.fromkeys(long_trajectories.GAUGES, 0.5)
                    records.append({**row, **gauges, "value": [value] * 3, "final": value, "collapse": None})
    return records


WORLDS: dict[str, Callable[[str, str], Records]] = {
    "ablation": ablation_world,
    "async_learning": async_world,
    "baselines_under_lag": baselines_world,
    "best_step_size": best_world,
    "beyond_vcpo": beyond_world,
    "collapse_prediction": collapse_world,
    "ess_reliability": ess_world,
    "in_batch_bias": in_batch_world,
    "long_trajectories": long_world,
    "mechanism": mechanism_world,
    "pipeline_speedup": pipeline_world,
    "proxy_quality": proxy_world,
    "regime_factors": factors_world,
    "regime_map": regime_world,
    "step_rules": step_world,
    "transformer_collapse": transformer_world,
    "variance_vs_lag": variance_world,
}


def worlds_of(experiments: Mapping[str, Experiment]) -> dict[str, Callable[[str, str], Records]]:
    """The worlds of every experiment that has any: here, or in its own file."""
    own = {name: experiment.world for name, experiment in experiments.items() if experiment.world}
    return {**WORLDS, **own}


OF_THEIR_OWN = {"others_biased", "vcpo_beats_rivals_with_n2", "lead_beats_vcpo"}
"""questions that are true only where another of their experiment is false: each has worlds of its own"""
BETWEEN = {
    "ablation": {"opob_beats_mean": "fails", "opob_more_than_parts": "fails", "baseline_needed": "fails"},
    "as_published": dict.fromkeys(
        ("beats_rivals", "both_parts", "both_parts_grid", "opob_over_n2", "sqrt_over_linear", "group_std"), "fails"
    )
    | dict.fromkeys(("simple_n2_not_worse", "matches_synchronous", "matches_best_synchronous"), "holds"),
    "async_learning": dict.fromkeys(("both_parts", "group_std"), "fails")
    | dict.fromkeys(("matches_mean", "matches_opob"), "holds"),
    "best_step_size": dict.fromkeys(("beats_rivals", "both_parts", "group_std"), "fails")
    | dict.fromkeys(("matches_mean", "matches_opob"), "holds"),
    "beyond_vcpo": dict.fromkeys(("vcpo_not_worse", "simple_n2_not_worse", "matches_synchronous"), "holds")
    | {"beats_rivals": "fails"},
    "baselines_under_lag": {
        "centering_helps_random": "fails",
        "in_batch_opob_helps_trained": "fails",
        "baseline_unbiased": "holds",
        "others_biased": "fails",
    },
    "ess_reliability": {"plug_in_lognormal": "holds", "plug_in_pareto": "holds"},
    "in_batch_bias": {"opob_unbiased_random": "holds", "released_as_good_trained": "holds"},
    "long_trajectories": dict.fromkeys(("beats_rivals", "lead_beats_vcpo"), "fails")
    | dict.fromkeys(
        ("vcpo_not_worse", "simple_n2_not_worse", "matches_synchronous", "matches_best_synchronous"), "holds"
    ),
    "longer_thoughts": dict.fromkeys(
        ("beats_rivals", "soft_beats_rivals", "soft_beats_n2", "soft_beats_synchronous", "soft_over_steps"), "fails"
    ),
    "pipeline_speedup": {"faster_than_mean": "fails", "faster_than_opob": "fails"},
    "regime_map": dict.fromkeys(("n2_alone_own_best", "matches_synchronous"), "holds")
    | dict.fromkeys(
        (
            "baseline_before_ratio",
            "rivals_gain_from_n2",
            "vcpo_beats_rivals_with_n2",
            "n2_with_brake_grid",
            "stratified",
        ),
        "fails",
    ),
    "regime_factors": dict.fromkeys(("norms", "ratios", "brake"), "fails") | {"vcpo": "holds"},
    "step_rules": {"model_adam_still": "holds", "learning_adam": "fails", "learning_sgd": "fails"},
    "transformer_collapse": dict.fromkeys(("beats_rivals", "both_parts_common", "all_kinds"), "fails")
    | dict.fromkeys(("matches_mean", "matches_opob"), "holds"),
    "variance_vs_lag": {"inverse_ess": "holds"},
}
"""experiment -> question -> what an effect smaller than the margin makes of it"""


@cache
def world(name: str, mode: str, key: str = "") -> Records:
    """The records as an analysis receives them, in plain JSON."""
    records: Records = plain(worlds_of(discover())[name](mode, key), name)
    return records
