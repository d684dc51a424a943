"""Exact score norms in a single backward pass, and the weighted gradient without a second.

An off-policy optimal baseline weighs trajectory i by w_i^2 ||s_i||^2, s_i = grad log pi(tau_i) the score. Training
code never sees ||s_i||: autograd sums over trajectories before anyone can look. The obvious remedy is a micro-batch
of one. But a linear layer's score is left_i^T right_i, made of arrays that the backward passes by anyway (its output
gradient and its input), and norms and weighted sums of such products can be had at the price of the sum alone:

    layout       which rows of an activation belong to which trajectory (padded, packed)
    norms        ||left_i^T right_i||^2: instantiated in cache, by Gram matrices, or sketched; embeddings; tied heads
    calibration  which of these is fastest for a shape on this device: measured
    layers       modules that report their operands instead of summing: Linear, Embedding, Conv1D, LayerNorm, RMSNorm
    routes       from coefficients to the gradient: general (deferred) or affine in one unknown (two running sums)
    tape         `ScoreTape`, which ties them together
    loop         the slow twin, a backward per trajectory
    approximate  proxies for the norm, and how wrong they are
"""

from llm_bridge.scores.approximate import last_block, logit_sq_norms, norm_error
from llm_bridge.scores.loop import score_sq_norms_loop, trajectory_sums, weighted_gradient_loop
from llm_bridge.scores.tape import ScoreTape, tape_for

__all__ = [
    "ScoreTape",
    "last_block",
    "logit_sq_norms",
    "norm_error",
    "score_sq_norms_loop",
    "tape_for",
    "trajectory_sums",
    "weighted_gradient_loop",
]
