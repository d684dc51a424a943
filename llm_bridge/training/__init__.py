"""Training a language model on stale rollouts with any estimator of the catalogue.

config      `TrainConfig`: what decides the numbers of a run
schedule    which version samples what: fixed, uniform or in-flight lag as a plan
queue       trajectories between sampler and learner, stamped with versions
reading     what one forward pass says about a batch
gradient    rollouts -> the kernel's coefficients -> p.grad, on one or many ranks
steps       clip, step rule, optimizer; fails closed
records     what an update looked like, as a flat record
sharding    FSDP2, and whole tensors again
trainer     `Trainer`, which ties them together
"""

from typing import TYPE_CHECKING, Any

from llm_bridge.training.config import TrainConfig

if TYPE_CHECKING:
    from llm_bridge.training.trainer import Trainer

__all__ = ["TrainConfig", "Trainer"]


def __getattr__(name: str) -> Any:
    """`Trainer`, imported when it is first asked for (PEP 562): a configuration needs no torch."""
    if name != "Trainer":
        raise AttributeError(f"module 'llm_bridge.training' has no attribute {name!r}")
    from llm_bridge.training.trainer import Trainer

    return Trainer
