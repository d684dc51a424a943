"""The estimators of vcposim on torch: what is proved and simulated, put to work in transformer training.

    logprobs      log-probabilities of a Hugging Face model's own tokens
    scores        exact ||grad log pi(tau_i)||^2 of every trajectory in one backward pass (`ScoreTape`)
    ratios        masked token log-ratios -> the kernel's `Batch`
    loss          `surrogate`, the one line where autograd meets an estimator
    moments       group sums that add up over microbatches and ranks
    distributed   merging them; what a rank contributes, written down
    control       `EssStepScale`: the learning rate follows the effective sample size
    diagnostics   every gauge of a batch as a flat dict for a logger

Coefficients come from `vcposim.Estimator`, run on torch tensors: no formula is written a second time here.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if find_spec("torch") is None:
    raise ModuleNotFoundError("llm_bridge needs torch; install it with: pip install 'vcposim[torch]'", name="torch")

if TYPE_CHECKING:  # for type checkers and editors; at run time `__getattr__` reads the table below
    from llm_bridge.control import EssStepScale, StepRecord
    from llm_bridge.diagnostics import diagnose
    from llm_bridge.distributed import gather_batch, split_group_coefficient, sum_gradients, world_size
    from llm_bridge.groups import Groups
    from llm_bridge.logprobs import TokenBatch, token_log_prob
    from llm_bridge.loss import mean_coefficient, surrogate
    from llm_bridge.moments import GroupSums, group_sums
    from llm_bridge.ratios import log_ratio, present, token_log_ratio, trajectory_batch
    from llm_bridge.scores import ScoreTape

_PLACES = {
    "EssStepScale": "control",
    "GroupSums": "moments",
    "Groups": "groups",
    "ScoreTape": "scores",
    "StepRecord": "control",
    "TokenBatch": "logprobs",
    "diagnose": "diagnostics",
    "gather_batch": "distributed",
    "group_sums": "moments",
    "log_ratio": "ratios",
    "mean_coefficient": "loss",
    "present": "ratios",
    "split_group_coefficient": "distributed",
    "sum_gradients": "distributed",
    "surrogate": "loss",
    "token_log_prob": "logprobs",
    "token_log_ratio": "ratios",
    "trajectory_batch": "ratios",
    "world_size": "distributed",
}
"""public name -> the module that defines it"""

__all__ = [
    "EssStepScale",
    "GroupSums",
    "Groups",
    "ScoreTape",
    "StepRecord",
    "TokenBatch",
    "diagnose",
    "gather_batch",
    "group_sums",
    "log_ratio",
    "mean_coefficient",
    "present",
    "split_group_coefficient",
    "sum_gradients",
    "surrogate",
    "token_log_prob",
    "token_log_ratio",
    "trajectory_batch",
    "world_size",
]


def __getattr__(name: str) -> Any:
    """A public name, imported when it is first asked for (PEP 562): `--help` of a command needs no torch."""
    if name not in _PLACES:
        raise AttributeError(f"module 'llm_bridge' has no attribute {name!r}")
    globals()[name] = found = getattr(import_module(f"llm_bridge.{_PLACES[name]}"), name)
    return found
