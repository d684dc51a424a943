"""Coefficients on the whole vocabulary: estimators that also weigh tokens which were not sampled.

    gradient of a position = sum_v c_v grad log pi(v)

Everything else in this project puts a coefficient on the sampled token alone; then c_v is zero elsewhere, and nobody
pays for a vocabulary. What is here needs the probabilities of every token, or of a head of them, under both policies;
`llm_bridge.loss.vocabulary_term` takes its coefficients to autograd and to the score tape.
"""

from collections.abc import Callable

from vcposim.arrays import Array, namespace


def score_centering(
    advantage: Array,
    chosen: Array,
    target: Array,
    behavior: Array,
    weight: Callable[[Array], Array] = lambda ratio: ratio * 0 + 1,
    head: Array | None = None,
) -> Array:
    """c_v = A [1[v = y] f_y - q_v f_v], the score minus its mean under the sampler (arXiv 2609.20807): (..., v).

    `chosen` is 1 at the sampled token y and 0 elsewhere, `target` p and `behavior` q are probabilities, all (..., v);
    `advantage` is (...); f is the `weight` of a ratio p/q: 1 as in prime-rl, or a truncation or mask of it.

    With the `head` of a top-k dump (..., v) as booleans, the rest is taken to be proportional to p, alpha p_v with
    alpha = rho f(1/rho) and rho the ratio of what q and p leave to it, as miles ships it:

        c_v = A [1[v = y] f_y - (q_v f_v - alpha p_v) 1[v in head]]

    What it is unbiased for is settled exactly in the tests. Full: its mean is Cov_q(A, f s), s the score at the prefix.
    So a constant in A is gone whatever f is, but the mean is the on-policy gradient E_p[A s] only for f = p/q, where
    the center is zero and nothing was centered, or for q = p. The center multiplies A_y itself: it is no control
    variate, and "E_q[score] = 0, so it stays unbiased" (a comment of prime-rl's) does not follow. With a head, a
    constant in A is gone only where the tail really is proportional to p.
    """
    xp = namespace(target, behavior)
    weighted = weight(target / behavior)
    center = behavior * weighted
    if head is not None:
        rho = _tail(behavior, head) / _tail(target, head)
        center = xp.where(head, center - rho * weight(1 / rho) * target, center * 0)
    return xp.expand_dims(advantage, axis=-1) * (chosen * weighted - center)


def kl_pull(target: Array, behavior: Array) -> Array:
    """c_v = -p_v log(p_v/q_v): minus the gradient of KL(p || q), exact and not from a sample: (..., v), same -> same.

    The sampled forms (k1, k2, k3) estimate this or something else; it needs no ratio and has no variance. A token that
    p never takes has no pull.
    """
    xp = namespace(target, behavior)
    here = target > 0
    return -target * xp.where(here, xp.log(xp.where(here, target, 1.0) / behavior), 0.0)


def distributional_ipo(
    advantage: Array, chosen: Array, target: Array, behavior: Array, limit: float, pull: float = 1e-3
) -> Array:
    """c_v = A r 1[v = y] 1[TV(p, q) <= limit] - 2 pull q_v log(p_v/q_v): prime-rl's distributional IPO: (..., v).

    Gradient of 1[TV <= limit] r A - pull sum_v q_v (log p_v/q_v)^2, TV = sum_v |p_v - q_v| / 2 over the whole
    vocabulary, where the sampled forms see one token of it. By its code, which keeps a head and one tail; without it.
    """
    xp = namespace(target, behavior)
    ratio = target / behavior
    variation = xp.sum(abs(target - behavior), axis=-1, keepdims=True) / 2
    kept = xp.where(variation <= limit, chosen * ratio, chosen * 0)
    return xp.expand_dims(advantage, axis=-1) * kept - 2 * pull * behavior * xp.log(ratio)


FLOOR = 1e-6
"""the least probability of a tail, as released: a head that holds everything leaves rounding"""


def _tail(probability: Array, head: Array) -> Array:
    xp = namespace(probability)
    left = 1 - xp.sum(xp.where(head, probability, probability * 0), axis=-1, keepdims=True)
    return xp.where(left > FLOOR, left, left * 0 + FLOOR)
