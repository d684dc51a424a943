"""What goes into a learner and what comes out: the `Run`s asked for, an `UpdateRecord` of each update of them all."""

from dataclasses import dataclass

import numpy as np

from vcposim.arrays import Array, expectation, safe_divide
from vcposim.baselines import Monomial, baseline
from vcposim.batch import Batch
from vcposim.catalogue.loading import on_numpy
from vcposim.errors import InputError, unknown_name
from vcposim.estimators import AnyEstimator, Estimator, Resolved
from vcposim.learning.lags import Lag
from vcposim.learning.optimizers import OPTIMIZERS
from vcposim.learning.step_rules import Control

ON_POLICY, FULL_STEP = Lag(), Control()


def remembered_weight(estimator: Resolved) -> Monomial | None:
    """The weight by which rewards are remembered; None for a baseline that is not one weighted mean a group.

    A weight that holds the untouched ratio is left out: beyond the range of floats it is known only within a group.
    """
    if not isinstance(estimator, Estimator) or not isinstance(estimator.baseline, str) or estimator.reference_penalty:
        return None
    found = baseline(estimator.baseline)
    return found.weight if found.per == "group" and found.weight and not found.weight.ratio else None


def require_memory(memory: float, estimator: Resolved) -> None:
    """Raises `InputError` for a memory out of range, or of a baseline that is no weighted mean a group."""
    if not 0 <= memory < 1:
        raise InputError(f"memory: {memory} is not in [0, 1); 0.9 remembers about ten visits of a prompt")
    if memory and remembered_weight(estimator) is None:
        raise InputError(
            f"memory: {memory} with an estimator whose baseline is no weighted mean of a group's rewards; use "
            "group_mean, length_weighted, on_policy_optimal or opob"
        )


def remembered_baseline(
    estimator: Estimator, batch: Batch, sums: Array, prompt: Array, memory: Array
) -> tuple[Array, Array]:
    """The baseline of each group from all its prompt's responses, the past ones faded: sum a R / sum a.

    `sums` are those of a R and of a over each prompt's past responses, `prompt` is each group's, `memory` what is kept
    of a prompt's sums when it comes again: batch (..., g, n), sums (..., prompts, 2), prompt (g,), memory (...,) ->
    baseline (..., g, 1), and the sums with these responses. Groups of one prompt in one batch share theirs.
    """
    weight = remembered_weight(estimator)
    assert weight is not None  # `require_memory` has seen to it
    measure = batch.given("measure")
    here = np.where(measure > 0, 1.0, 0.0) + 0 * batch.reward
    # not the kernel's weights, which leave a factor a group open: groups of several updates are added here
    a = batch.scored().sq_norm(estimator.weighting(batch).value if weight.weight else here) if weight.score else here
    a = (a * batch.token_length() if weight.length else a) * here
    visited = np.zeros(sums.shape[-2])
    visited[prompt] = 1
    kept = sums * np.where(visited, memory[..., None], 1.0)[..., None]
    own = np.stack([(a * batch.reward).sum(-1), a.sum(-1)], axis=-1)
    np.add.at(np.moveaxis(kept, -2, 0), prompt, np.moveaxis(own, -2, 0))  # several groups may have one prompt
    total, mean = kept[..., prompt, :], expectation(batch.reward, measure)
    return safe_divide(total[..., 0], total[..., 1], mean)[..., None], kept


@dataclass(frozen=True)
class Run:
    """One run: what distinguishes it from the others of a learner.

    `estimator` is a name of the catalogue, an `Estimator` or a function of a `Batch`; `clip_norm` (inf for none) the
    limit of the gradient's global norm. `memory` in [0, 1): what is left of a prompt's sums when it is visited again,
    the baseline being a weighted mean over its past responses too (1 / (1 - memory) visits of them); 0 for none.
    `beta2` in [0, 1): what Adam keeps of its second moment.

    Raises `InputError` for unknown names and numbers out of range, and for a memory of what is no such baseline.
    """

    estimator: str | AnyEstimator
    seed: int = 0
    lag: Lag = ON_POLICY
    step_size: float = 0.05
    optimizer: str = "adam"
    control: Control = FULL_STEP
    clip_norm: float = 1.0
    weight_decay: float = 0.0
    memory: float = 0.0
    beta2: float = 0.999

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            raise unknown_name("optimizer", self.optimizer, OPTIMIZERS)
        for name in ("step_size", "weight_decay"):
            value = getattr(self, name)
            if not 0 <= value < float("inf"):
                raise InputError(f"{name}: {value} is not a finite non-negative number")
        if not 0 <= self.beta2 < 1:
            raise InputError(f"beta2: {self.beta2} is not in [0, 1); 0.999 is Adam's own, 0.95 that of large models")
        if not self.clip_norm > 0:
            raise InputError(f"clip_norm: {self.clip_norm} is not positive; use inf for no clipping")
        if self.seed < 0:
            raise InputError(f"seed: {self.seed} is negative; use 0 or more")
        require_memory(self.memory, self.resolved())

    def resolved(self) -> Resolved:
        """The estimator itself."""
        return on_numpy(self.estimator, several=True)


@dataclass(frozen=True)
class UpdateRecord:
    """What one update of all runs looked like; arrays are (run,), in the order the runs were given."""

    step: int
    value: Array
    """E_pi[R] of the policy before the update, exact"""
    reward: Array
    """mean reward of the batch, sampled by stale versions"""
    ess_fraction: Array
    """of the untruncated sequence weights of the whole batch"""
    truncated_ess_fraction: Array
    """of min(w, 8)"""
    mean_weight: Array
    max_share: Array
    kl: Array
    """KL(mu||pi) of trajectories estimated from the batch (k3), nats"""
    chi2: Array
    """mean (w - 1)^2 of the batch"""
    entropy: Array
    """of the policy at the visited rows, nats per token"""
    gradient_norm: Array
    """before clipping"""
    step_scale: Array
    """multiplier of the step rule"""
    lag: Array
    """mean over the batch, in updates"""
    khat: Array | None = None
    """Pareto tail index of the batch's weights, on the steps asked for"""
    true_ess_fraction: Array | None = None
    """1 / E_mu[w^2], exact, on the steps asked for"""
    true_cosine: Array | None = None
    """of the estimated and the exact gradient, on the steps asked for"""
