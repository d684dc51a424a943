"""How good are cheap stand-ins for the score norm, and what of the optimal baseline's gain do they cost?

OPOB weighs a response by w^2 ||grad log pi||^2. The exact norm costs a few percent of an update (`llm_bridge.scores`);
a framework that cannot have it takes something cheaper: the norm of the last block's score, or of the norm layers', the
score with respect to the logits, the number of tokens, random signs. Here a model samples groups of responses, is
trained a few updates, and then all norms of the same responses are taken: how do they correlate, and how large is the
second moment of the gradient's contributions when the baseline is computed with the stand-in but judged by the exact
norm?

Cheap is counted too: the operations of matrix products of norms and gradient over those of the gradient alone, on the
same responses. Norms of some parameters only need a backward of their own before the gradient's; the exact norm shares
one with it. It leaves out rows without a gradient (prompts), which a plain update multiplies, and adds passes over
memory, which are no operations here: in time it is not cheaper, but a few percent dearer (`simulations.bench.scores`).

In sample the exact norm cannot lose, by definition. Held out, each response is left out of its own baseline, and what
is compared is what the baseline knows.
"""

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from simulations.drawing import Plot, panel, plot, ranking, series
from simulations.protocol import Analysis, Comparison, Experiment, Figure, Question, Record, Rule, Setting, judge
from simulations.stats import Estimate, of_seeds
from vcposim.arrays import Array
from vcposim.baselines import Evidence, baseline, weighted_mean_of_others
from vcposim.batch import Batch, ScoreNorms
from vcposim.catalogue import entry
from vcposim.replay.contributions import second_moment

EXACT = "exact norm"
OFFERED = "sketch, 16 columns"
"""what `llm_bridge.train --norm sketch` takes: C17 asks for one that is good enough, so the others stand beside it"""
PROXIES = ("last block", "logit proxy", "length", OFFERED, "norm layers")
WAYS = ("in sample", "held out")
WEIGHTING = entry("vcpo").estimator.weighting
ENOUGH = 1.01
"""a second moment up to this times the exact norm's counts as no loss"""


def settings(size: str) -> list[Setting]:
    """Independent repeats; the small form takes the character model, the full one SmolLM2."""
    if size == "reduced":
        small = {"model": "char", "style": "short", "groups": 8, "group_size": 8, "tokens": 5, "step_size": 3e-4}
        return [{**small, "lag": 4, "seed": seed} for seed in range(2)]
    real = {"model": "smollm2", "style": "instruct", "groups": 8, "group_size": 12, "tokens": 16, "step_size": 1e-5}
    return [{**real, "lag": 2, "seed": seed} for seed in range(2)]


def run(setting: Setting) -> list[Record]:
    """A record for each group: rewards, log-ratios, and every norm of its responses."""
    from llm_bridge.training import TrainConfig, Trainer
    from llm_bridge.training.queue import picked

    lag = setting["lag"]
    config = TrainConfig(
        task="addition",
        task_options={"style": setting["style"]},
        model=setting["model"],
        estimator="dr_grpo",
        optimizer="adam",
        lr=setting["step_size"],
        lag=lag,
        updates=lag + 1,
        extend=False,
        groups=setting["groups"],
        group_size=setting["group_size"],
        max_new_tokens=setting["tokens"],
        micro_batch=setting["group_size"],
        seed=setting["seed"],
    )
    trainer = Trainer(config)
    for _ in trainer.updates(lag):
        pass
    rollouts = trainer.queue.take(lag)  # sampled by version 0, and the learner is at version `lag`
    size = setting["group_size"]
    groups = [picked(rollouts, slice(i, i + size)) for i in range(0, len(rollouts), size)]
    return [{"model": setting["model"], "seed": setting["seed"], **_measured(trainer.model, group)} for group in groups]


def _measured(model: Any, rollouts: Any) -> Record:
    """Every norm of the responses of a group."""
    from llm_bridge.logprobs import log_prob_of, next_token_logits
    from llm_bridge.ratios import log_ratio
    from llm_bridge.scores import ScoreTape, last_block, logit_sq_norms, norm_layers, trajectory_sums

    coefficient = rollouts.reward - rollouts.reward.mean()
    seen: dict[str, Any] = {}

    def forward() -> Any:
        seen["logits"] = next_token_logits(model, rollouts)
        seen["log_prob"] = log_prob_of(seen["logits"], rollouts.token)
        return seen["log_prob"]

    def gradient() -> None:
        (-coefficient * trajectory_sums(forward(), rollouts.mask)).sum().backward()

    def taped(**options: Any) -> Any:
        line = (rollouts.reward, rollouts.reward.new_ones(len(rollouts.reward)))
        with ScoreTape(model, verify="never", method="block", **options) as tape:  # counts must not hang on timings
            norm = tape.score_sq_norms(forward(), rollouts.mask, affine=line)
            tape.backward(coefficient)
        return norm

    def after(norm: Callable[[], Any]) -> Any:
        gradient()
        return norm()

    ways: dict[str, Callable[[], Any]] = {
        EXACT: taped,
        PROXIES[0]: lambda: taped(parameters=last_block(model)),
        PROXIES[1]: lambda: after(lambda: logit_sq_norms(seen["logits"], rollouts.token, rollouts.mask)),
        PROXIES[2]: lambda: after(lambda: rollouts.mask.sum(-1)),
        PROXIES[3]: lambda: taped(norm="sketch", columns=16),
        PROXIES[4]: lambda: taped(parameters=norm_layers(model)),
    }
    model.zero_grad(set_to_none=True)
    plain, _ = _operations(gradient)
    norms, cost = {}, {}
    for name, way in ways.items():
        model.zero_grad(set_to_none=True)
        operations, norms[name] = _operations(way)
        cost[name] = operations / plain
    model.zero_grad(set_to_none=True)
    ratio = log_ratio(seen["log_prob"], rollouts.behavior_log_prob, rollouts.mask)
    columns = {"reward": rollouts.reward, "log_ratio": ratio, **norms}
    return {name: column.detach().double().tolist() for name, column in columns.items()} | {"cost": cost}


def _operations(way: Callable[[], Any]) -> tuple[int, Any]:
    """Multiply-adds, twice, of the matrix products that something takes, and what it gives."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.flop_counter import flop_registry

    class Counter(TorchDispatchMode):
        total = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            formula = flop_registry.get(func._overloadpacket)
            if formula is not None:
                self.total += formula(*args, **(kwargs or {}), out_val=out)
            return out

    with Counter() as counter:
        found = way()
    return counter.total, found


# --- analysis ---------------------------------------------------------------------------------------------------------


def analyse(records: list[Record]) -> Analysis:
    """C17: can the norm be had for less than the few percent it costs?"""
    names = ("mean", EXACT, *PROXIES)
    records = [{**r, "moments": {name: moments(r, name) for name in names}} for r in records]  # once, for all questions
    norms = (
        "Squared norms of the same responses: each stand-in, scaled to fit, against the exact norm; both logarithmic."
    )
    loss = (
        "Second moment of the gradient's contributions with the stand-in's baseline over that with the exact norm's, "
        "with 95% interval over seeds; the plain mean uses no norm."
    )
    cost = (
        "What a stand-in costs, in operations of matrix products of an update that knows its coefficients, and what it "
        "loses held out; the median over groups, and the dashed line joins those that nothing else beats in both."
    )
    figures = [
        Figure("norms", norm_figure(records), norms, alt=norms),
        Figure("losses", loss_figure(records), loss, alt=loss),
        Figure("cost", cost_figure(records), cost, alt=cost),
    ]
    return Analysis(judge([_question(records, name) for name in PROXIES]), figures)


def moments(group: Record, name: str) -> Array:
    """Second moment of a group's contributions, in sample and held out, with OPOB from the norm called `name`.

    The baseline's weights take the stand-in, the second moment the exact norm; "mean" takes no norm: -> (2,).
    """
    exact = np.asarray(group[EXACT])
    norm = np.ones_like(exact) if name == "mean" else np.asarray(group[name], dtype=float)
    batch = Batch(reward=np.asarray(group["reward"]), log_ratio=np.asarray(group["log_ratio"]), scores=ScoreNorms(norm))
    weight = WEIGHTING(batch)
    e = Evidence(batch, weight)
    share = e.reward * 0 + 1 if name == "mean" else e.weighted_sq_norm()
    inside = baseline("group_mean" if name == "mean" else "opob")(e)
    outside = weighted_mean_of_others(e.reward, share, e.measure, e.unit)
    return np.array([second_moment(weight.value, e.reward - b, exact) for b in (inside, outside)])


def loss_of(records: list[Record], name: str, way: str) -> Estimate | None:
    """Second moment with a stand-in over that with the exact norm: groups of a seed summed, seeds independent."""
    k = WAYS.index(way)
    ratios = []
    for seed in dict.fromkeys(r["seed"] for r in records):
        mine = [r for r in records if r["seed"] == seed]
        with_it, exact = (
            sum(float((r["moments"][n] if "moments" in r else moments(r, n))[k]) for r in mine) for n in (name, EXACT)
        )
        if exact > 0:
            ratios.append((seed, with_it / exact))
    return of_seeds(ratios, scale="log")


def correlation(records: list[Record], name: str) -> float:
    """Of the logs of a stand-in and of the exact norm, over all responses."""
    return float(np.corrcoef(_logs(records, name), _logs(records, EXACT))[0, 1])


def _logs(records: list[Record], name: str) -> Array:
    return np.log(np.concatenate([r[name] for r in records]).astype(float))


def _question(records: list[Record], name: str) -> Question:
    count = sum(len(r["reward"]) for r in records)
    model = records[0]["model"] if records else "no model"
    plain = ", ".join(f"{loss_of(records, 'mean', way)} {way}" for way in WAYS)
    return Question(
        f"{re.sub('[^a-z]+', '_', name)}_stands_in",
        "C17",
        f"{model}: {name} can stand in for the exact score norm in OPOB without loss",
        Rule("second moment over the exact norm's", "<", 1.0, ENOUGH - 1),
        [Comparison(way, loss_of(records, name, way)) for way in WAYS],
        witness="transformer",
        beside=name != OFFERED,
        note=f"plain mean: {plain}; {count} responses in {len(records)} groups"
        + (_price(records, name) if count else "")
        + (f"; correlation of logs {correlation(records, name):.2f}" if count > 1 else ""),
    )


def _price(records: list[Record], name: str) -> str:
    own, exact = (f"{cost_of(records, n):.2f}" for n in (name, EXACT))
    return f"; costs {own} updates, the exact norm {exact}; not beaten held out: {', '.join(pareto(records, WAYS[1]))}"


# --- figures ----------------------------------------------------------------------------------------------------------


def norm_figure(records: list[Record]) -> Plot:
    """A panel a stand-in."""
    exact = _logs(records, EXACT)
    panels = []
    for number, name in enumerate(PROXIES):
        stand_in = _logs(records, name)
        fitted = np.exp(stand_in + (exact - stand_in).mean())
        points = series(name, np.exp(exact), fitted, color=number, line=False)
        title = f"{name}, r = {correlation(records, name):.2f}"
        axes = panel(title, "exact squared norm", "stand-in, scaled to fit", [points], xscale="log", yscale="log")
        panels.append({**axes, "diagonal": 0.0})
    return plot(*panels, width=3.6, height=3.0)


def cost_of(records: list[Record], name: str) -> float:
    """Operations of norms and gradient over the gradient's alone, median over groups; "mean" takes no norm."""
    return 1.0 if name == "mean" else float(np.median([r["cost"][name] for r in records]))


def pareto(records: list[Record], way: str) -> dict[str, tuple[float, float]]:
    """(cost, loss) of those that no other beats in both, by rising cost."""
    found = {}
    for name in ("mean", EXACT, *PROXIES):
        loss = loss_of(records, name, way)
        if loss is not None:
            found[name] = (cost_of(records, name), loss.value)
    best: dict[str, tuple[float, float]] = {}
    for name, point in sorted(found.items(), key=lambda item: item[1]):
        if all(point[1] < other for _, other in best.values()):
            best[name] = point
    return best


def cost_figure(records: list[Record]) -> Plot:
    """Cost against loss, held out."""
    way = WAYS[1]
    points = []
    for number, name in enumerate(("mean", EXACT, *PROXIES)):
        loss = loss_of(records, name, way)
        if loss is not None:
            points.append(series(name, [cost_of(records, name)], [loss.value], color=number, line=False))
    front = list(pareto(records, way).values())
    points.append(series("not beaten", [cost for cost, _ in front], [loss for _, loss in front], dashed=True))
    axes = panel(way, "operations over the gradient's", "second moment over the exact norm's", points)
    return plot(axes, width=4.4, height=3.0)


def loss_figure(records: list[Record]) -> Plot:
    """Second moments relative to the exact norm's, in sample and held out."""
    panels = []
    for way in WAYS:
        rows = {name: loss_of(records, name, way) for name in ("mean", *PROXIES)}
        panels.append(ranking(way, "second moment over the exact norm's", rows, vlines=[1.0]))
    return plot(*panels, width=4.4, height=2.4)


EXPERIMENT = Experiment(
    "proxy_quality",
    "How good are cheap stand-ins for the score norm, and what does OPOB lose with them?",
    ("C17",),
    settings,
    run,
    analyse,
    extra="llm",
    no_estimators="compares stand-ins for score norms, not estimators",
)
