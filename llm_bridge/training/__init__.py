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

from llm_bridge.training.config import TrainConfig
from llm_bridge.training.trainer import Trainer

__all__ = ["TrainConfig", "Trainer"]
