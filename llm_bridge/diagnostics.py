"""One call, and a logger has every gauge of a batch: `vcposim.gauges.panel` on torch, as a flat dict of floats.

    for name, value in diagnose(batch).items():
        writer.add_scalar(name, value, step)

Each gauge NAME comes as `NAME`, with `NAME/threshold`, `NAME/required` (the number of trajectories it needs to mean
anything) and `NAME/alarming` (0 or 1). In a training loop a broken trajectory must be reported, not raised: rows
with a NaN or +inf log-ratio, or no finite score norm, are left out of the gauges and counted in `unusable`. On
several ranks, diagnose `gather_batch(...).batch`.
"""

import math
from dataclasses import fields, replace
from typing import Any

import numpy as np
from torch import Tensor

from vcposim.arrays import LOG
from vcposim.batch import Batch, DenseScores, ScoreNorms
from vcposim.diagnostics import Diagnostic
from vcposim.errors import InputError
from vcposim.gauges.panel import panel
from vcposim.weights import at_level


def diagnose(batch: Batch, *, cap: float = 8.0, prefix: str = "vcpo/") -> dict[str, float]:
    """Every diagnostic that `batch` permits, with thresholds: name -> float.

    What a batch permits: token ratios give token-level ESS, lengths the geometric one, score norms the
    gradient-weighted one and leverage. `trajectories` counts the rows that are not padding, `unusable` those of them
    that were left out.

    Raises `InputError` for a batch of exact ratios or a cap that is not positive.
    """
    if batch.log_ratio is None:
        raise InputError("batch: diagnostics need floats; pass log_ratio instead of ratio")
    here = to_numpy(batch)
    real = here.given("measure") > 0
    sequence = at_level(here, "sequence", LOG)
    broken = real & (np.isnan(sequence) | (sequence == math.inf) | ~np.isfinite(_norm(here)))
    out = {"trajectories": float(real.sum()), "unusable": float(broken.sum())}
    if np.any(real & ~broken):
        if broken.any():  # left out: of no measure, and numbers that do not spread
            row = broken if here.given_ratio.ndim == broken.ndim else broken[..., None]
            norms = None if here.scores is None else ScoreNorms(np.where(broken, 0.0, _norm(here)))
            here = replace(
                here,
                measure=np.where(broken, 0.0, here.given("measure")),
                log_ratio=np.where(row, 0.0, here.given_ratio),
                scores=norms,
            )
        for one in panel(here, cap).values():
            out |= flat(one)
    return {prefix + name: value for name, value in out.items()}


def flat(one: Diagnostic) -> dict[str, float]:
    """A diagnostic as four floats."""
    return {
        one.name: float(one.value),
        f"{one.name}/threshold": float(one.threshold),
        f"{one.name}/required": float(one.required),
        f"{one.name}/alarming": float(one.alarming),
    }


def to_numpy(batch: Batch) -> Batch:
    """The same batch in NumPy float64, off the device and off the graph."""
    column = {f.name: _numpy(getattr(batch, f.name)) for f in fields(batch) if f.name != "scores"}
    scores: Any = batch.scores
    if isinstance(scores, ScoreNorms):
        scores = ScoreNorms(_numpy(scores.score_sq_norm))
    elif isinstance(scores, DenseScores):
        scores = DenseScores(_numpy(scores.score), scores.per_token)
    return Batch(**column, scores=scores)


def _norm(batch: Batch) -> Any:
    one = np.ones(batch.reward.shape)
    return one if batch.scores is None else batch.scores.sq_norm(one)


def _numpy(x: Any) -> Any:
    return x.detach().cpu().double().numpy() if isinstance(x, Tensor) else x
