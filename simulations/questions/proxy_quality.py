"""How good are cheap stand-ins for the score norm, and what of the optimal baseline's gain do they cost?

OPOB weighs a response by w^2 ||grad log pi||^2. The exact norm costs a few percent of an update (`llm_bridge.scores`);
a framework that cannot have it takes something cheaper: the norm of the last block's score, the score with respect to
the logits, the number of tokens, random signs. Here a model samples groups of responses, is trained a few updates, and
then all norms of the same responses are taken: how do they correlate, and how large is the second moment of the
gradient's contributions when the baseline is computed with the stand-in but judged by the exact norm?

In sample the exact norm cannot lose, by definition. Held out, each response is left out of its own baseline, and what
is compared is what the baseline knows.
"""

import re
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
PROXIES = ("last block", "logit proxy", "length", "sketch, 16 columns")
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
    from llm_bridge.scores import ScoreTape, last_block, logit_sq_norms

    tapes: dict[str, dict[str, Any]] = {
        EXACT: {},
        PROXIES[0]: {"parameters": last_block(model)},
        PROXIES[3]: {"norm": "sketch", "columns": 16},
    }
    norms: dict[str, Any] = {}
    for name, options in tapes.items():
        with ScoreTape(model, **options) as tape:
            logits = next_token_logits(model, rollouts)
            log_prob = log_prob_of(logits, rollouts.token)
            norms[name] = tape.score_sq_norms(log_prob, rollouts.mask, keep=False)
    norms[PROXIES[1]] = logit_sq_norms(logits, rollouts.token, rollouts.mask)
    norms[PROXIES[2]] = rollouts.mask.sum(-1)
    ratio = log_ratio(log_prob, rollouts.behavior_log_prob, rollouts.mask)
    columns = {"reward": rollouts.reward, "log_ratio": ratio, **norms}
    return {name: column.detach().double().tolist() for name, column in columns.items()}


# --- analysis ---------------------------------------------------------------------------------------------------------


def analyse(records: list[Record]) -> Analysis:
    """C17: can the norm be had for less than the few percent it costs?"""
    norms = (
        "Squared norms of the same responses: each stand-in, scaled to fit, against the exact norm; both logarithmic."
    )
    loss = (
        "Second moment of the gradient's contributions with the stand-in's baseline over that with the exact norm's, "
        "with 95% interval over seeds; the plain mean uses no norm."
    )
    figures = [
        Figure("norms", norm_figure(records), norms, alt=norms),
        Figure("losses", loss_figure(records), loss, alt=loss),
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
        with_it, exact = (sum(float(moments(r, n)[k]) for r in mine) for n in (name, EXACT))
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
        note=f"plain mean: {plain}; {count} responses in {len(records)} groups"
        + (f"; correlation of logs {correlation(records, name):.2f}" if count > 1 else ""),
    )


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
)
