"""Where autograd meets an estimator: one line, here and nowhere else.

An estimator is a coefficient c (`vcposim.estimators`); its gradient is sum_i c_i grad log pi(tau_i). Autograd
differentiates what has that gradient: sum_i c_i log pi(tau_i) with c held fixed. Held fixed matters: c contains the
ratio pi/mu, and differentiating *it* too gives another estimator (of a gradient that is twice as large on policy).
"""

import torch
from torch import Tensor

from vcposim.batch import Batch
from vcposim.errors import InputError


def surrogate(coefficient: Tensor, log_prob: Tensor, mask: Tensor) -> Tensor:
    """-sum_i c_i sum_t m_it log pi_it, to be minimized; its gradient is -sum_i c_i s_i: -> ().

    `coefficient` (n,) or (n, t) is a constant, whatever graph it carries; it includes the measure (`mean_coefficient`).
    `log_prob` and `mask` are (n, t); masked entries have no gradient.

    Raises `InputError` on shapes that disagree.
    """
    if mask.shape != log_prob.shape:
        raise InputError(f"mask: shape {tuple(mask.shape)} differs from log_prob's {tuple(log_prob.shape)}; align them")
    if coefficient.shape not in (log_prob.shape, log_prob.shape[:-1]):
        raise InputError(
            f"coefficient: shape {tuple(coefficient.shape)} is neither (n,) nor (n, t) of log_prob's "
            f"{tuple(log_prob.shape)}; bring grouped coefficients back to rows with Groups.flat"
        )
    fixed = coefficient.detach()
    fixed = fixed if fixed.shape == log_prob.shape else fixed[..., None]
    precise = log_prob.to(torch.promote_types(log_prob.dtype, torch.float32))
    return -(fixed * torch.where(mask > 0, precise, 0.0)).sum()


def vocabulary_term(coefficient: Tensor, log_prob: Tensor) -> Tensor:
    """sum_v c_itv log pi_itv, c held fixed: what stands in for log pi_it where c is on the whole vocabulary: -> (n, t).

    `surrogate(one, term, mask)` then has the gradient -sum_itv c_itv grad log pi(v), and `ScoreTape.score_sq_norms` of
    it are ||sum_tv c_itv grad log pi(v)||^2: both take the term as they take a log-probability. Coefficients come from
    `vcposim.vocabulary` and include the measure. `coefficient` and `log_prob`, the log-softmax of the logits, are
    (n, t, v); a token of coefficient 0 has no gradient, whatever its log-probability.

    Raises `InputError` on shapes that disagree.
    """
    if coefficient.shape != log_prob.shape:
        raise InputError(
            f"coefficient: shape {tuple(coefficient.shape)} is not that of log_prob, {tuple(log_prob.shape)}; give "
            "log-probabilities of the whole vocabulary (n, t, v), or of the head that coefficients are on"
        )
    fixed = coefficient.detach()
    precise = log_prob.to(torch.promote_types(log_prob.dtype, torch.float32))
    return (fixed * torch.where(fixed != 0, precise, 0.0)).sum(-1)


def mean_coefficient(coefficient: Tensor, batch: Batch) -> Tensor:
    """c_i measure_i / G: what multiplies s_i in the mean over groups of their mean contribution: same -> same.

    G counts the groups that have a trajectory at all. With groups of one size it is c_i / n.
    """
    measure = batch.given("measure")
    filled = (measure.sum(-1) > 0).sum().clamp(min=1)
    measure = measure if coefficient.ndim == batch.reward.ndim else measure[..., None]
    return coefficient * measure / filled
