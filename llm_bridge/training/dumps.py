"""Rollouts as a file that `vcposim replay` reads: one JSON object a trajectory, one line each."""

import json
from collections.abc import Iterator
from typing import Any

import torch

from llm_bridge.ratios import present
from llm_bridge.rollouts import Rollouts
from llm_bridge.training.gradient import BatchGradient


def dump_records(
    learner_version: int, rollouts: Rollouts, made: BatchGradient, *, exact_norms: bool
) -> list[dict[str, Any]]:
    """What this rank learned from at one update, in the fields of `vcposim.replay.names`.

    `group` is the number of the problem; `version` and `last_version` are those of a trajectory's first and last own
    token; log-probabilities are lists over its own tokens, nats. `score_sq_norm` is there if the estimator asked for
    norms and they are no proxy (`exact_norms`), `logit_proxy` if it was read. Trajectories without tokens, or with a
    log-probability that is no number, have no place in such a file and are left out.
    """
    reading, own = made.reading, rollouts.mask > 0
    finite = torch.isfinite(torch.where(own, reading.log_prob - rollouts.behavior_log_prob, 0.0)).all(-1)
    norm = reading.score_sq_norm if exact_norms else None
    out = []
    for i in torch.nonzero(present(rollouts.mask) & finite)[:, 0].tolist():
        version = rollouts.version[i][own[i]].tolist()
        record = {
            "group": int(rollouts.group[i]),
            "prompt": rollouts.prompts[i],
            "response": rollouts.responses[i],
            "version": version[0],
            "last_version": version[-1],
            "learner_version": learner_version,
            "reward": float(rollouts.reward[i]),
            "length": len(version),
            "behavior_log_prob": rollouts.behavior_log_prob[i][own[i]].tolist(),
            "log_prob": reading.log_prob[i][own[i]].tolist(),
        }
        record |= {} if norm is None else {"score_sq_norm": float(norm[i])}
        out.append(record | ({} if reading.logit_proxy is None else {"logit_proxy": float(reading.logit_proxy[i])}))
    return out


def lines(records: list[dict[str, Any]]) -> Iterator[str]:
    """JSON, a line each."""
    return (json.dumps(record) + "\n" for record in records)
