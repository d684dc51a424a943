"""Exact score norms in a single backward pass, and the weighted gradient without a second.

An off-policy optimal baseline weighs trajectory i by w_i^2 ||s_i||^2, s_i = grad log pi(tau_i) the score. Training
code never sees ||s_i||: autograd sums over trajectories before anyone can look. The obvious remedy is a micro-batch
of one. It can be had at the price of the sum alone, for three reasons.

**What one backward knows.** Give row t of a layer's activations the owner i(t), its trajectory. Trajectories do not
interact, so the output gradient g_t at a row of i is that of log pi(tau_i) alone, whatever else was summed into the
objective. The score with respect to a parameter is then a sum over that trajectory's rows of something local:

    weight of a linear map      sum_t g_t x_t^T                        = left_i^T right_i
    embedding                   sum_t e(token_t) g_t^T                 rows of one token add up first
    scale, shift, any parameter sum_t of the parameter's own gradient at t, as if each position had its own copy:
      that acts elementwise     spread it over positions, and autograd gives these
    anything else               a backward through that module alone, with g set to zero outside trajectory i

**Which squares.** Norms add over parameters. For a product, ||left_i^T right_i||^2 is the square of a block formed
in cache, or a sum over pairs <left_t, left_s> <right_t, right_s> (Gram matrices), or the mean of random projections
(a sketch). A parameter used several times has the sum of its uses as gradient, and the norm of a sum has cross
terms: products join to one product of the rows side by side; an embedding that is also the head has the cross term
sum_st left_s[token_t] <right_s, g_t>, in which no vocabulary-wide array appears.

**Which sums each route needs.** The update is -sum_i c_i s_i, and c depends on the norms. *General*, any c: keep the
operands of each product and form left^T diag(c) right when c is known, or keep the products where trajectories are so
long that these take a few times the memory of an operand at most. *Affine*, c = u + a v with one unknown a: two
sums suffice, taken as the blocks go by, at two values of a where most coefficients vanish.

**On several ranks.** Where each rank holds its own trajectories, norms are its own affair, and gradients add up
(`sum_gradients`, or FSDP2's shards). Where ranks share trajectories and split parameters (tensor parallelism; experts
by rank, the tokens the same on all), the output gradient of a part is complete on its rank once the operators between
have summed what they sum, so a part's score is local and norms add over parts: ||s_i||^2 = sum over ranks of the parts'
squares, plus the squares of what all ranks hold whole, once (`split`). Where tokens travel to the rank of their expert,
rows of other ranks' trajectories arrive, nobody knows whose, and the tape refuses.

What cannot be known from shapes is the owner of a row. The tape takes row i for trajectory i, and therefore
compares its first pass over a model, every 101st after it, and each that does what none before did, with plain
autograd (`check`).

In the order in which a reader meets them:

    layout       which rows of an activation belong to which trajectory (padded, packed)
    chunks       calls on some of the rows, put together to calls on all
    norms        the squares: instantiated in cache, by Gram matrices, or sketched; embeddings; tied heads
    sketch       signs and buckets of columns, for norms that are random estimates
    fused        the same squares, and the sums, in one pass over a product: a C kernel, where there is a compiler
    calibration  which of these is fastest for a shape on this device: measured
    routes       from coefficients to the gradient: none, a second backward, general (deferred), affine (two sums)
    layers       the nodes that see output gradients: the forward stays the model's own, bit for bit
    inner        a loop over trajectories through one module alone
    plan         which of these fits a module, found by running its code
    score_pass   one backward: from what layers report to squares, parameter by parameter
    moves        what indices do with rows in a graph
    check        one trajectory, and the gradient along one direction, against plain autograd
    shards       FSDP2: whole parameters and their shards, checks that all ranks make together
    refusals     what is refused before anything is computed
    tape         `ScoreTape`, which ties them together and chooses the route; `tape_for` chooses one for a trainer
    loop         the slow twin, a backward per trajectory
    approximate  proxies for the norm, and how wrong they are
"""

from llm_bridge.scores.approximate import last_block, logit_sq_norms, norm_error, norm_layers
from llm_bridge.scores.loop import score_sq_norms_loop, trajectory_sums, weighted_gradient_loop
from llm_bridge.scores.tape import ScoreTape, tape_for

__all__ = [
    "ScoreTape",
    "last_block",
    "logit_sq_norms",
    "norm_error",
    "norm_layers",
    "score_sq_norms_loop",
    "tape_for",
    "trajectory_sums",
    "weighted_gradient_loop",
]
