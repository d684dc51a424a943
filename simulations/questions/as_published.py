"""VCPO as its authors run it: their hosts, cap, step rule and lags; many prompts, long responses.

Hosts, batches and numbers are those of the released scripts (github.com/mit-han-lab/vcpo, recipe/fully_async_policy/
shell/vcpo/, gsm8k/vcpo_k=12.sh and math/vcpo_k=64.sh, read on 2026-11-28; the first has groups of 8 and 8 prompts an
update): GRPO with group std, or REINFORCE without; no clip; sequence ratios truncated at 8; OPOB in place of the mean
(the paper's, and the release's, which counts w twice); the step times sqrt(ESS / n) of unclipped ratios; AdamW with
weight decay 0.1, gradients clipped at 1; samplers that take new weights while they write (`partial_rollout`); a lag of
at most 12, or of 128, the largest they report. Adam keeps 0.95 of its second moment, as large models do: the scripts
leave it at their framework's.

The ESS of a full step, `rho_ref`, is 1, as in the release (`base_ess_ratio`): it is what the synchronous runs have,
measured and recorded, for sampler and learner are one program here. Policies are small networks on strings of 32
tokens, 16 prompts at once, so values are exact; step sizes are therefore not theirs: each method has five and is judged
at its own best, chosen on seeds of the other parity, and over all of them.
"""

from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from simulations.drawing import Plot, plot
from simulations.methods import (
    ESS,
    FULL_STEP,
    Method,
    at_edge,
    best_of,
    chosen,
    ess_told,
    gain,
    lost_more,
    lost_of,
    outcome,
    over_the_grid,
    own_methods,
    run_of,
    told,
    trace,
    value_ranking,
)
from simulations.protocol import Analysis, Comparison, Experiment, Figure, Question, Record, Rule, Setting, judge
from vcposim.catalogue import entry
from vcposim.estimators import Estimator
from vcposim.learning.lags import Lag
from vcposim.learning.step_rules import Control
from vcposim.learning.tasks import many_prompts, network
from vcposim.surrogates import Clip
from vcposim.weights import Weighting

PROMPTS, LENGTH, BASE_RATE = 16, 32, 0.17
GROUPS, GROUP_SIZE = 8, 8
HOSTS = {"REINFORCE": None, "GRPO": "group_std"}
TIS = Weighting("truncate", cap=8.0)
LINEAR = Control("ess_linear")
PARTS: dict[str, tuple[Weighting, str, Control]] = {
    "no correction": (Weighting("none"), "group_mean", FULL_STEP),
    "TIS": (TIS, "group_mean", FULL_STEP),
    "ESS only": (TIS, "group_mean", ESS),
    "OPOB only": (TIS, "opob", FULL_STEP),
    "VCPO": (TIS, "opob", ESS),
    "VCPO as released": (TIS, "opob_released", ESS),
    "VCPO, linear": (TIS, "opob", LINEAR),
    "n2": (Weighting("none"), "on_policy_optimal", FULL_STEP),
    "n2, ESS step": (Weighting("none"), "on_policy_optimal", ESS),
}
"""what is put into each host: ratios, baseline, step rule"""
ON_POLICY = {"synchronous": "group_mean", "synchronous, n2": "on_policy_optimal"}
RIVALS = {
    "MIS": entry("sequence_mis").estimator,
    "GSPO": replace(entry("gspo").estimator, surrogate=Clip(0.2, 0.2, level="geometric")),
    "M2PO": entry("m2po").estimator,
    "PPO": entry("ppo_clip").estimator,
}
"""on each host's mean and normalizer; GSPO's band is PPO's, its own is for thousands of tokens"""


def hosted(host: str, estimator: Estimator) -> Estimator:
    """An estimator with a host's normalizer."""
    return replace(estimator, normalizer=HOSTS[host] or estimator.normalizer, epsilon=1e-4)


METHODS: dict[str, Method] = {
    f"{host}: {name}": Method(hosted(host, Estimator(ratio, baseline)), rule)
    for host in HOSTS
    for name, (ratio, baseline, rule) in PARTS.items()
}
METHODS |= {f"{host}: {name}": Method(hosted(host, e)) for host in HOSTS for name, e in RIVALS.items()}
METHODS |= {
    f"{host}: {name}": Method(hosted(host, Estimator(Weighting("none"), baseline)), stale=False)
    for host in HOSTS
    for name, baseline in ON_POLICY.items()
}
STEP_SIZES = (0.002, 0.005, 0.012, 0.03, 0.07)
LAGS = (12, 128)
MARGIN, RATE = 0.02, 0.05
"""differences of values, and of rates of collapse, that matter"""


def settings(size: str) -> list[Setting]:
    """Lags x blocks of seeds x step sizes, all methods each."""
    full = size == "full"
    blocks = [list(range(first, first + 4)) for first in range(500, 516, 4)] if full else [[0, 1]]
    place = {"prompts": PROMPTS, "length": LENGTH} if full else {"prompts": 4, "length": 8}
    return [
        {"lag": lag, **place, "step_size": step, "seeds": seeds, "updates": 240 if full else 30}
        for lag in (LAGS if full else (4,))
        for seeds in blocks
        for step in (STEP_SIZES if full else (0.005, 0.02))
    ]


def run(setting: Setting) -> list[Record]:
    """One record for each method and seed; `reference` is the ESS of the synchronous runs, a full step's."""
    methods = METHODS | own_methods(setting)
    keys = [(name, seed) for name in methods for seed in setting["seeds"]]
    options = {"step_size": setting["step_size"], "weight_decay": 0.1, "beta2": 0.95}
    runs = [run_of(methods[name], Lag(setting["lag"], "in_flight"), seed=seed, **options) for name, seed in keys]
    problem = many_prompts(setting["prompts"], setting["length"], probability=BASE_RATE ** (1 / setting["length"]))
    family = network(problem)
    found = trace(problem, runs, setting["updates"], family=family, groups=GROUPS, group_size=GROUP_SIZE)
    on_policy = [i for i, (name, _) in enumerate(keys) if ": synchronous" in name]
    reference = float(found["ess_fraction"][:, on_policy].mean())
    out = []
    for i, (name, seed) in enumerate(keys):
        o = outcome(found, i)
        numbers = {key: round(o[key], 4) for key in ("final", "average", "ess", "scale")}
        place = {key: setting[key] for key in ("lag", "prompts", "length", "step_size")}
        out.append({**place, "method": name, "seed": seed, **numbers, "collapse": o["collapse"], "hit": o["hit"],
                    "reference": round(reference, 6)})  # fmt: skip
    return out


def analyse(records: list[Record]) -> Analysis:
    """C10, C11, C13, C14, C15 and C19 where VCPO's authors would look for them."""
    lags = list(dict.fromkeys(r["lag"] for r in records))
    places = {f"lag {k}": chosen(records, lag=k) for k in lags}
    best = {p: best_of(own) for p, own in places.items()}
    grid = {p: over_the_grid(own) for p, own in places.items()}
    sizes = sorted({r["step_size"] for r in records})
    common = {p: chosen(own, step_size=sizes[len(sizes) // 2]) for p, own in places.items()}

    def against(first: str, others: Iterable[str], among: dict[str, list[Record]] = best) -> list[Comparison]:
        return [
            Comparison(f"{host}: {other}, {p}", gain(own, f"{host}: {first}", f"{host}: {other}"))
            for p, own in among.items()
            for host in HOSTS
            for other in others
        ]

    rivals = ("no correction", "TIS", *RIVALS)
    better = Rule("value averaged over training, first minus second, own best steps", ">", 0.0, MARGIN)
    as_good = Rule(better.statistic, ">", 0.0, -MARGIN)
    over = Rule("value averaged over training, first minus second, mean over step sizes", ">", 0.0, MARGIN)
    collapses = Rule("rate of collapse, rival minus VCPO", ">", 0.0, RATE, "Agresti and Min's for pairs, over seeds")
    more_lost = [
        Comparison(f"{host}: {other}, {p}", lost_more(own, f"{host}: {other}", f"{host}: VCPO"))
        for p, own in common.items()
        for host in HOSTS
        for other in rivals
    ]
    std = [Comparison(p, gain(own, "GRPO: VCPO", "REINFORCE: VCPO")) for p, own in best.items()]
    asked: list[tuple[str, str, str, Rule, list[Comparison]]] = [
        ("rivals_collapse", "C13", "at one step size every rival collapses more often than VCPO", collapses, more_lost),
        ("beats_rivals", "C13", "VCPO learns better than every rival, own best step", better,
         against("VCPO", rivals)),
        ("both_parts", "C14", "VCPO learns better than TIS, ESS alone and OPOB alone, own best step", better,
         against("VCPO", ("TIS", "ESS only", "OPOB only"))),
        ("both_parts_grid", "C14", "VCPO learns better than TIS, ESS alone and OPOB alone, over step sizes", over,
         against("VCPO", ("TIS", "ESS only", "OPOB only"), grid)),
        ("simple_n2_not_worse", "C14", "VCPO's two parts learn not worse than n^2 without ratios", as_good,
         against("VCPO", ("n2",))),
        ("opob_over_n2", "C10", "ratios and their w^2 in the baseline pay: VCPO is better than n^2 with the ESS step",
         better, against("VCPO", ("n2, ESS step",))),
        ("sqrt_over_linear", "C11", "with Adam sqrt(ESS) is a better step rule than ESS, over step sizes", over,
         against("VCPO", ("VCPO, linear",), grid)),
        ("matches_synchronous", "C15", "VCPO learns not worse than synchronous training with the mean", as_good,
         against("VCPO", ("synchronous",))),
        ("matches_best_synchronous", "C15", "VCPO learns not worse than synchronous training with n^2", as_good,
         against("VCPO", ("synchronous, n2",))),
        ("group_std", "C19", "GRPO's division by the group's std improves VCPO", better, std),
    ]  # fmt: skip
    reference = {p: float(np.mean([r["reference"] for r in own])) for p, own in best.items()}
    shown = [f"{host}: {name}" for host in HOSTS for name in ("VCPO", "TIS", "n2", "synchronous", "synchronous, n2")]
    lost = "; ".join(f"{n} {lost_of([r for own in common.values() for r in own], n)}" for n in METHODS)
    notes = {
        "rivals_collapse": f"lost at {sizes[len(sizes) // 2]:g}: {lost}" if sizes else "",
        "beats_rivals": "; ".join(f"{p}: {told(own, shown)}" for p, own in best.items()),
        "simple_n2_not_worse": at_edge(best, places),
        "both_parts": "; ".join(f"rho_ref, measured, {p}: {x:.4f}" for p, x in reference.items()),
        "matches_synchronous": ess_told(best, "GRPO: VCPO") if best else "",
    }
    questions = [
        Question(key, claim, f"as published: {words}", rule, found, "where", note=notes.get(key, ""), beside=True)
        for key, claim, words, rule, found in asked
    ]
    caption = (
        "VCPO as its authors run it, its parts, its rivals and n^2, in both hosts: value averaged over training, "
        "everyone at its own best step size, mean over seeds with 95% interval; how many runs collapsed stands beside."
    )
    return Analysis(judge(questions), [Figure("all_methods", figure(best), caption, alt=caption)])


def figure(best: dict[str, list[Record]]) -> Plot:
    """Methods from best to worst, a panel a lag and host."""
    panels = []
    for p, own in best.items():
        for host in HOSTS:
            names = [n for n in METHODS if n.startswith(host)]
            panels.append(value_ranking(f"{host}, {p}", own, names, (f"{host}: VCPO",)))
    return plot(*panels, width=5.2, height=4.0)


def world(mode: str, key: str) -> list[Record]:
    """Records in which VCPO is best and best of all with the std, worst, hardly better, or one among equals."""
    levels = {  # VCPO in GRPO, in REINFORCE, n2, synchronous, others
        "true": (0.8, 0.7, 0.6, 0.6, 0.4),
        "opposite": (0.2, 0.3, 0.7, 0.7, 0.7),
        "between": (0.509, 0.5, 0.509, 0.509, 0.491),
        "noise": (0.5,) * 5,
    }[mode]
    rng, records = np.random.default_rng(1), []
    for lag in LAGS:
        for method in METHODS:
            host, name = method.split(": ")
            kind = 2 if name == "n2" else 3 if "synchronous" in name else 4
            kind = ("GRPO", "REINFORCE").index(host) if name == "VCPO" else kind
            for step, off in ((0.01, 0.1), (0.02, 0.0)):
                for seed in range(24):
                    value = rng.random() if mode == "noise" else levels[kind] - off + 0.001 * rng.normal()
                    lost = rng.random() < 0.5 if mode == "noise" else (kind < 2) == (mode == "opposite")
                    row = {"lag": lag, "method": method, "step_size": step, "seed": seed, "average": value, "ess": 0.5}
                    records.append({**row, "final": value, "scale": 1.0, "hit": None, "reference": 1.0,
                                    "collapse": 50 if lost else None})  # fmt: skip
    return records


EXPERIMENT = Experiment(
    "as_published",
    "Does VCPO do what its authors say where they say it: their hosts, cap, step rule, lags, many prompts?",
    ("C10", "C11", "C13", "C14", "C15", "C19"),
    settings,
    run,
    analyse,
    takes_estimators=True,
    world=world,
)
