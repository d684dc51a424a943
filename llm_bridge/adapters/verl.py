"""Any estimator in verl: an advantage estimator, a policy loss, and a wrapper that passes the ratios.

    export VERL_USE_EXTERNAL_MODULES=llm_bridge.adapters.verl
    python -m verl.trainer.main_ppo algorithm.adv_estimator=vcposim/vcpo/length \\
        actor_rollout_ref.actor.policy_loss.loss_mode=vcposim ...

verl imports the module with itself, in every process. That registers `vcposim/NAME` for each entry of the catalogue
(`vcposim/NAME/NORM` where it needs score norms) and the loss `vcposim`; and `vcposim/mine.py:soft` for each estimator
of yours that the environment names, as in

    export VCPOSIM_ESTIMATORS="mine.py:soft package.module:function"

The advantage slot then carries the coefficient c_i, ratio included, and the loss is verl's own REINFORCE loss,
-c_i log pi, averaged as `loss_agg_mode` says.

A registered advantage estimator is shown rewards and masks, but no ratios. They are in the batch that
`verl.trainer.ppo.ray_trainer.compute_advantage` was called with, so that function is wrapped: while it runs, the batch
is at hand in `_BATCH`. pi is `old_log_probs` (the policy before the update, recomputed by the trainer), mu is
`rollout_log_probs` (what the sampler logged). Everything happens on the driver, on the whole batch.

verl runs no backward there and no callback around its optimizer. So there is no score tape (norms are a proxy, or
yours) and no ESS brake; a batch with a ratio that is not finite gets coefficients of zero.
"""

import os
import warnings
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import replace
from functools import partial, wraps
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llm_bridge.adapters.rows import require, row_coefficient, usable
from llm_bridge.ratios import token_log_ratio, trajectory_batch
from vcposim.baselines import Evidence
from vcposim.batch import Batch, ScoreNorms
from vcposim.catalogue import CATALOGUE
from vcposim.catalogue.loading import estimator_named
from vcposim.catalogue.trainers import SWITCHES, require_met
from vcposim.errors import InputError
from vcposim.estimators import Estimator, Resolved

try:
    from verl.trainer.ppo import core_algos, ray_trainer
except ModuleNotFoundError as error:
    if error.name != "verl":
        raise
    raise ModuleNotFoundError(
        "llm_bridge.adapters.verl needs verl; install it with: pip install 'vcposim[verl]'", name="verl"
    ) from None

TESTED = "0.9.1"
SEAMS = {
    core_algos: ("register_adv_est", "register_policy_loss", "compute_policy_loss_reinforce"),
    ray_trainer: ("compute_advantage",),
}
PREFIX, LOSS = "vcposim", "vcposim"
OWN = "VCPOSIM_ESTIMATORS"
"""of the environment of every process: names of estimators of yours, with spaces between"""
NORMS = ("length", "logit", "given")
"""||s_i||^2 by the number of tokens; by the score of the logits (`actor.calculate_sum_pi_squared=True`); or whatever
your trainer left in the batch as `score_sq_norm`, (n,)"""

_BATCH: ContextVar[Any] = ContextVar("batch of the running compute_advantage", default=None)


def names() -> dict[str, tuple[Resolved, str | None]]:
    """What can be written as `algorithm.adv_estimator` -> the estimator, and how its score norms are had.

    Raises `InputError` for what `OWN` names and is no estimator, or needs what no batch of verl holds.
    """
    own = {name: estimator_named(name, library="torch") for name in os.environ.get(OWN, "").split()}
    for name, estimator in own.items():
        require(estimator, "verl", name)
    served = {name: known.estimator for name, known in CATALOGUE.items() if not SWITCHES["verl"].lacks(known.estimator)}
    out: dict[str, tuple[Resolved, str | None]] = {}
    for name, estimator in (served | own).items():
        if "scores" in estimator.needs:
            out |= {f"{PREFIX}/{name}/{norm}": (estimator, norm) for norm in NORMS}
        else:
            out[f"{PREFIX}/{name}"] = (estimator, None)
    return out


def refused(name: str, **of_the_batch: Any) -> tuple[Tensor, Tensor]:
    """What answers to `vcposim/NAME` where that is no way to write an entry. Raises `InputError`: why, or how else."""
    require_met("verl", CATALOGUE[name].estimator, name)
    raise InputError(
        f"adv_estimator: {PREFIX}/{name} says nothing of score norms, which it needs; write {PREFIX}/{name}/length, "
        f"or one of {', '.join(NORMS[1:])}"
    )


def advantage(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Any = None,
    config: Any = None,
    *,
    estimator: Resolved,
    norm: str | None,
    **ignored: Any,
) -> tuple[Tensor, Tensor]:
    """c_i on each of the response's tokens, (n, t), twice: verl wants advantages and returns.

    `token_level_rewards`, `response_mask` (n, t); `index` (n,) is the id of each row's prompt. The rest is read from
    the batch of the running `compute_advantage`. Raises `InputError` if that lacks what the estimator needs.
    """
    batch = rows(token_level_rewards, response_mask, estimator, norm, config)
    if index is None:
        raise InputError("uid: rows carry no prompt ids; verl's trainers set non_tensor_batch['uid'], do so too")
    _, place, size = np.unique(np.asarray(index), return_inverse=True, return_counts=True)
    estimator.require(int(size.min()))
    answer = row_coefficient(estimator, batch, torch.as_tensor(place, device=response_mask.device))
    c = answer.coefficient if answer.coefficient.ndim == 2 else answer.coefficient[:, None]
    if not (answer.finite and usable(answer.batch)):
        warnings.warn("update without gradient: a ratio or coefficient is not finite", RuntimeWarning, stacklevel=2)
        c = torch.zeros_like(c)
    c = torch.where(response_mask > 0, c, 0.0).to(token_level_rewards.dtype)
    return c, c


def rows(reward: Tensor, mask: Tensor, estimator: Resolved, norm: str | None, config: Any) -> Batch:
    """The kernel's record of verl's batch, flat rows: `reward` and `mask` (n, t).

    Raises `InputError` in bypass mode, and for what `field` does not find.
    """
    correction = None if config is None else config.get("rollout_correction")
    if correction is not None and correction.get("bypass_mode"):
        raise InputError(
            "bypass_mode: it sets old_log_probs to rollout_log_probs, so every ratio is 1; set it to False"
        )
    pi = field("old_log_probs", "verl's trainers recompute it before advantages")
    mu = field("rollout_log_probs", "set actor_rollout_ref.rollout.calculate_log_probs=True")
    more: dict[str, Any] = {}
    if "reference_log_ratio" in estimator.needs:
        reference = field("ref_log_prob", "the estimator needs a reference policy; set algorithm.use_kl_in_reward")
        more["reference_log_ratio"] = token_log_ratio(pi, reference, mask).sum(-1)
    if "collision" in estimator.needs or norm == "logit":
        more["collision"] = field("sum_pi_squared", "set actor_rollout_ref.actor.calculate_sum_pi_squared=True")
    batch = replace(trajectory_batch(reward.sum(-1), pi, mu, mask, **more), log_prob=pi.detach().float())
    return batch if norm is None else replace(batch, scores=ScoreNorms(sq_norm(batch, norm)))


def sq_norm(batch: Batch, norm: str) -> Tensor:
    """||s_i||^2, or what stands for it: (n,)."""
    if norm == "given":
        return field("score_sq_norm", "put the squared score norms (n,) there, or use /length or /logit").float()
    if norm == "length":
        return batch.token_length()
    weight = Estimator().weighting(batch)
    return batch.on_tokens(Evidence(batch, weight).token_sq_norm()).sum(-1)


def field(name: str, remedy: str) -> Tensor:
    """A tensor of the batch that `compute_advantage` is at. Raises `InputError` with the remedy if it is not there."""
    batch = _BATCH.get()
    if batch is None:
        raise InputError(
            f"{name}: no batch at hand; this estimator works inside verl's compute_advantage, "
            "loaded by VERL_USE_EXTERNAL_MODULES=llm_bridge.adapters.verl"
        )
    if name not in batch.keys():  # noqa: SIM118  a TensorDict is no mapping
        raise InputError(f"{name}: not in verl's batch; {remedy}")
    return batch[name]


def passing_ratios(compute_advantage: Callable[..., Any]) -> Callable[..., Any]:
    """`compute_advantage` as it was, with its batch at hand for `advantage` while it runs."""

    @wraps(compute_advantage)
    def wrapped(data: Any, *args: Any, **kwargs: Any) -> Any:
        token = _BATCH.set(data.batch)
        try:
            return compute_advantage(data, *args, **kwargs)
        finally:
            _BATCH.reset(token)

    return wrapped


def policy_loss(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "seq-mean-token-sum",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """-c_i log pi, averaged by verl; no clip, no ratio: the coefficient has them. All (n, t); -> loss (), metrics.

    Raises `InputError` if verl would correct for the sampler once more.
    """
    if rollout_is_weights is not None:
        raise InputError("rollout_correction: the estimator's coefficient holds the ratio already; set rollout_is=null")
    return core_algos.compute_policy_loss_reinforce(
        rollout_log_prob=old_log_prob,
        log_prob=log_prob,
        advantages=advantages.detach(),
        response_mask=response_mask,
        loss_agg_mode=loss_agg_mode,
        config=config,
    )


def register() -> None:
    """Register names and loss with verl, and wrap `compute_advantage`; once, however often it is called.

    Raises `InputError` for a verl without these functions.
    """
    for module, functions in SEAMS.items():
        for name in functions:
            if not hasattr(module, name):
                raise InputError(
                    f"verl: version {version('verl')} has no {module.__name__}.{name}; this adapter is tested with "
                    f"{TESTED}, install it with: pip install 'verl=={TESTED}'"
                )
    if LOSS in core_algos.POLICY_LOSS_REGISTRY:
        return
    known = names()
    for name, (estimator, norm) in known.items():
        core_algos.register_adv_est(name)(partial(advantage, estimator=estimator, norm=norm))
    for name in CATALOGUE:
        if f"{PREFIX}/{name}" not in known:
            core_algos.register_adv_est(f"{PREFIX}/{name}")(partial(refused, name))
    core_algos.register_policy_loss(LOSS)(policy_loss)
    ray_trainer.compute_advantage = passing_ratios(ray_trainer.compute_advantage)


register()
