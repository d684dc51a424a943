"""How good are cheap stand-ins for the score norm, and what of the optimal baseline's gain do they cost?

OPOB weighs a response by w^2 ||grad log pi||^2. The exact norm costs a few percent of an update (`llm_bridge.scores`);
a framework that cannot have it takes something cheaper: the norm of the last block's score, the score with respect to
the logits, the number of tokens, random signs. Here a model samples groups of responses, is trained a few updates, and
then all norms of the same responses are taken: how do they correlate, and how large is the second moment of the
gradient's contributions when the baseline is computed with the stand-in but judged by the exact norm?

In sample the exact norm cannot lose, by definition. Held out, each response is left out of its own baseline, and what
is compared is what the baseline knows.
"""

from typing import Any

import numpy as np
from matplotlib.figure import Figure as Canvas

from simulations.drawing import canvas, color
from simulations.protocol import Analysis, Experiment, Figure, Record, Setting, Verdict
from vcposim.arrays import Array
from vcposim.baselines import baseline, weighted_mean_of_others
from vcposim.batch import Batch, ScoreNorms
from vcposim.catalogue import entry
from vcposim.contributions import Interval, bootstrap_ratios, second_moment
from vcposim.estimators import evidence
from vcposim.figures import INK, MUTED

EXACT = "exact norm"
PROXIES = ("last block", "logit proxy", "length", "sketch, 16 columns")
WAYS = ("in sample", "held out")
WEIGHTING = entry("vcpo").estimator.weighting
ENOUGH = 1.01
"""a second moment up to this times the exact norm's counts as no loss"""


def settings(size: str) -> list[Setting]:
    """Independent repeats; the small form takes the character model, the full one SmolLM2."""
    if size == "reduced":
        small = {"model": "char", "base_rate": 0.3, "groups": 6, "group_size": 8, "max_new_tokens": 8}
        return [{**small, "updates": 4, "step_size": 1e-3, "seed": 0}]
    real = {"model": "smollm2", "base_rate": None, "groups": 8, "group_size": 16, "max_new_tokens": 24}
    return [{**real, "updates": 4, "step_size": 2e-6, "seed": seed} for seed in range(4)]


def run(setting: Setting) -> list[Record]:
    """A record for each group: rewards, log-ratios, and every norm of its responses."""
    from llm_bridge.training import Trainer

    trainer = Trainer(setting)
    rollouts = trainer.sample(setting["groups"])
    for _ in trainer.updates():
        pass
    return [{"seed": setting["seed"], "model": setting["model"], **_measure(trainer, r)} for r in rollouts]


def _measure(trainer: Any, rollouts: Any) -> Record:
    return {}


# --- analysis ---------------------------------------------------------------------------------------------------------


def analyse(records: list[Record]) -> Analysis:
    """C17: can the norm be had for less than the few percent it costs?"""
    captions = (
        "Squared norms of the same responses: each stand-in, scaled to fit, against the exact norm; both logarithmic.",
        "Second moment of the gradient's contributions with the stand-in's baseline over that with the exact norm's, "
        "with 95% bootstrap interval over groups; gray: the plain mean, which uses no norm.",
    )
    drawn = (draw_norms, draw_losses)
    figures = [Figure(f.__name__[5:], f, text, text) for f, text in zip(drawn, captions, strict=True)]
    return Analysis([_verdict(records, name) for name in PROXIES], figures)


def moments(group: Record, name: str) -> Array:
    """Second moment of a group's contributions, in sample and held out, with OPOB from the norm called `name`.

    The baseline's weights take the stand-in, the second moment the exact norm; "mean" takes no norm: -> (2,).
    """
    exact = np.asarray(group[EXACT])
    norm = np.ones_like(exact) if name == "mean" else np.asarray(group[name], dtype=float)
    batch = Batch(reward=np.asarray(group["reward"]), log_ratio=np.asarray(group["log_ratio"]), scores=ScoreNorms(norm))
    weight = WEIGHTING(batch)
    e = evidence(batch, weight)
    share = e.reward * 0 + 1 if name == "mean" else e.weighted_sq_norm()
    inside = baseline("group_mean" if name == "mean" else "opob")(e)
    outside = weighted_mean_of_others(e.reward, share, e.measure, e.unit)
    return np.array([second_moment(weight.value, e.reward - b, exact) for b in (inside, outside)])


def losses(records: list[Record]) -> dict[tuple[str, str], Interval]:
    """Second moment with each stand-in over that with the exact norm, in sample and held out."""
    names = [*PROXIES, "mean"]
    exact = np.array([moments(r, EXACT) for r in records])
    pairs = [
        np.stack([np.array([moments(r, name)[k] for r in records]), exact[:, k]]) for name in names for k in range(2)
    ]
    keys = [(name, way) for name in names for way in WAYS]
    return dict(zip(keys, bootstrap_ratios(np.stack(pairs), 2000, seed=0), strict=True))


def correlation(records: list[Record], name: str) -> float:
    """Of the logs of a stand-in and of the exact norm, over all responses."""
    return float(np.corrcoef(_logs(records, name), _logs(records, EXACT))[0, 1])


def _logs(records: list[Record], name: str) -> Array:
    return np.log(np.concatenate([r[name] for r in records]).astype(float))


def _verdict(records: list[Record], name: str) -> Verdict:
    found = losses(records)
    inside, outside = (found[name, way] for way in WAYS)
    count = sum(len(r["reward"]) for r in records)
    word = "holds" if inside.high <= ENOUGH and outside.high <= ENOUGH else "fails"
    return Verdict(
        "C17",
        f"{records[0]['model']}: {name} can stand in for the exact score norm in OPOB without loss",
        word,
        f"second moment over the exact norm's: in sample {_shown(inside)}, held out {_shown(outside)} (plain mean: "
        f"{_shown(found['mean', WAYS[0]])}, {_shown(found['mean', WAYS[1]])}); correlation of logs "
        f"{correlation(records, name):.2f}; {count} responses in {len(records)} groups",
    )


def _shown(interval: Interval) -> str:
    return f"{interval.value:.3f} [{interval.low:.3f}, {interval.high:.3f}]"


# --- figures ----------------------------------------------------------------------------------------------------------


def draw_norms(records: list[Record]) -> Canvas:
    """A panel a stand-in."""
    with canvas(len(PROXIES), width=3.0, height=3.0) as (figure, panels):
        exact = _logs(records, EXACT)
        for number, (ax, name) in enumerate(zip(panels, PROXIES, strict=True)):
            stand_in = _logs(records, name)
            ax.plot(np.exp(exact), np.exp(stand_in + (exact - stand_in).mean()), ".", color=color(number), markersize=3)
            ends = np.exp([exact.min(), exact.max()])
            ax.plot(ends, ends, color=MUTED, linewidth=0.8)
            ax.set(title=f"{name}, r = {correlation(records, name):.2f}", xscale="log", yscale="log")
            ax.set_xlabel("exact squared norm")
        panels[0].set_ylabel("stand-in, scaled to fit")
    return figure


def draw_losses(records: list[Record]) -> Canvas:
    """Second moments relative to the exact norm's, in sample and held out."""
    found = losses(records)
    names = ["mean", *PROXIES]
    with canvas(2, width=4.0, height=2.4) as (figure, panels):
        for ax, way in zip(panels, WAYS, strict=True):
            for y, name in enumerate(names):
                interval = found[name, way]
                ink = MUTED if name == "mean" else INK
                ax.plot([interval.low, interval.high], [y, y], color=ink, linewidth=1.4)
                ax.plot(interval.value, y, "o", color=ink, markersize=4)
            ax.axvline(1, color=MUTED, linewidth=0.8, zorder=0)
            ax.set_yticks(range(len(names)), names, fontsize=8)
            ax.set(title=way, xlabel="second moment over the exact norm's")
    return figure


EXPERIMENT = Experiment(
    "proxy_quality",
    "How good are cheap stand-ins for the score norm, and what does OPOB lose with them?",
    ("C17",),
    settings,
    run,
    analyse,
    extra="llm",
)
