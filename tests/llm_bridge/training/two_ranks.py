"""What two ranks do, for `test_two_ranks.py`.

Every scenario trains for a few updates in float64; rank 0 saves parameters and records of both ranks, and the state
from which one process goes on.
"""

import sys
import warnings
from typing import Any

import torch
import torch.distributed as dist

from llm_bridge import train
from llm_bridge.training import Trainer
from llm_bridge.training.sharding import weights
from tests.llm_bridge.training.toys import trainer

UPDATES = 3
LOCAL = {"dtype": "float64", "groups": 4, "updates": UPDATES, "lag": 1, "step_rule": "ess"}
SCENARIOS: dict[str, dict[str, Any]] = {
    "replicas/vcpo": LOCAL | {"estimator": "vcpo"},
    "replicas/vcpo by group": LOCAL | {"estimator": "vcpo", "micro_batch": 4},
    "replicas/shrinkage": LOCAL | {"estimator": "shrinkage"},
    "replicas/uniform lag": LOCAL | {"estimator": "otb", "lag": 2, "lag_law": "uniform"},
    "fsdp2/dr_grpo": LOCAL | {"estimator": "dr_grpo", "sharding": "fsdp2"},
    "fsdp2/vcpo": LOCAL | {"estimator": "vcpo", "sharding": "fsdp2", "micro_batch": 4},
}


def outcome(made: Trainer) -> dict[str, Any]:
    """Records of the updates to come, parameters after them, and a measurement."""
    records = list(made.updates())
    return {"records": records, "weights": weights(made.trained), "held_out": made.evaluate(5)}


def main(output: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    seen = {name: outcome(trainer(**setting)) for name, setting in SCENARIOS.items()}
    started = trainer(**SCENARIOS["fsdp2/vcpo"])
    list(started.updates(1))
    state = started.state_dict()
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, seen)
    if dist.get_rank() == 0:
        torch.save({"ranks": every, "state": state}, output)
    dist.destroy_process_group()


def command(*words: str) -> None:
    """`python -m llm_bridge.train`, as a rank."""
    sys.exit(train.main(words))
