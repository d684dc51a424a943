"""Every batch that a group can be, as drawn: the sum that defines a moment, with nothing assumed of the estimator.

A group of n draws of K outcomes is one of K^n ordered batches, each with measure 1/n and the product of its outcomes'
probabilities. An estimator whose coefficients do not depend on the order of samples needs one order of each multiset:
binom(n+K-1, n) batches, with multinomial probability.
"""

from collections.abc import Iterator
from math import comb

import numpy as np
from scipy.special import gammaln, xlogy

from vcposim.arrays import Array
from vcposim.batch import Batch, DenseScores
from vcposim.problems.rollouts import Problem

CHUNK = 2**20
"""numbers in the largest array of one chunk of batches; bounds memory"""

TOKEN_FIELDS = ("log_ratio", "token_mask", "log_prob", "collision")


def batches(
    problem: Problem,
    population: Batch,
    group: int,
    group_size: int,
    *,
    per_token: bool = False,
    grouped: bool = False,
    ordered: bool = True,
) -> Iterator[tuple[Batch, Array]]:
    """Batches (m, n) of draws of one context with their probability (m,), in chunks; of the `population` (G, K).

    Ratios are per token if `per_token` and the problem has tokens, else per trajectory; `grouped` adds an axis of one
    prompt before the samples; `ordered=False` gives each multiset once.
    """
    support = np.flatnonzero(population.measure[group])
    probability = population.measure[group, support]
    per_token = per_token and population.per_token
    time = population.given_ratio.shape[-1] if per_token else 1
    scores = problem.restricted(group, support)
    # the scores of single outcomes, whatever structure holds them: combine them with weight one on one of them
    one = np.eye(support.size * time).reshape(-1, support.size, time)
    score = scores.combine(one if per_token else one[..., 0])
    score = score.reshape(support.size, time, -1) if per_token else score
    known: dict[str, Array] = {"reward": population.reward, "length": population.token_length()}
    if per_token:
        fields = {name: getattr(population, name) for name in TOKEN_FIELDS}
        known |= {name: x for name, x in fields.items() if x is not None}
    else:
        ratio = population.on_tokens(population.given_ratio)
        known["log_ratio"] = np.sum(ratio, axis=-1) if population.per_token else ratio
    known = {name: np.asarray(x[group, support], dtype=float) for name, x in known.items()}
    oracle = population.population_baseline
    rows = max(1, CHUNK // (group_size * score[0].size))
    for outcome, mass in _outcomes(support.size, group_size, probability, rows, ordered):
        at = outcome[:, None] if grouped else outcome
        batch = Batch(
            **{name: x[at] for name, x in known.items()},
            scores=DenseScores(score[at], per_token=per_token),
            population_baseline=None if oracle is None else np.broadcast_to(oracle[group], (*at.shape[:-1], 1)),
            grouped=grouped,
        )
        yield batch, mass


def number_of_batches(outcomes: int, group_size: int, ordered: bool = True) -> int:
    """How many batches `batches` gives of one context."""
    return outcomes**group_size if ordered else comb(group_size + outcomes - 1, group_size)


def _outcomes(
    outcomes: int, group_size: int, probability: Array, rows: int, ordered: bool
) -> Iterator[tuple[Array, Array]]:
    """Outcome of each sample (m, n) and the probability of such a batch (m,), at most `rows` at a time."""
    if ordered:
        count = outcomes**group_size
        for start in range(0, count, rows):
            index = np.arange(start, min(start + rows, count))
            outcome = np.stack(np.unravel_index(index, (outcomes,) * group_size), axis=-1)
            yield outcome, probability[outcome].prod(axis=-1)
        return
    for counts in count_vectors(group_size, outcomes, rows):
        # sample i shows the first outcome whose cumulated count exceeds i
        behind = np.cumsum(counts, axis=-1)[:, None] <= np.arange(group_size)[:, None]
        yield behind.sum(axis=-1), multinomial(counts, probability)


def count_vectors(total: int, parts: int, chunk: int) -> Iterator[Array]:
    """All compositions of `total` into `parts` counts, in lexicographic order, in chunks (<= chunk, parts)."""
    # tails[q][n] = number of compositions of n into q + 1 parts
    tails = [np.array([comb(n + q, q) for n in range(total + 1)], dtype=np.int64) for q in range(parts)]
    count = int(tails[-1][total])
    for start in range(0, count, chunk):
        rank = np.arange(start, min(start + chunk, count), dtype=np.int64)
        left = np.full(rank.shape, total)
        out = np.empty((rank.size, parts), dtype=np.int64)
        for part in range(parts - 1):
            tail = tails[parts - 1 - part]
            # after c in this part, tail[left] - tail[left - c] compositions are behind us
            after = np.searchsorted(tail, tail[left] - rank, side="left")
            out[:, part] = left - after
            rank, left = rank - (tail[left] - tail[after]), after
        out[:, -1] = left
        yield out


def multinomial(counts: Array, prob: Array) -> Array:
    """N! prod_k p_k^n_k / n_k!: (m, K), (K,) -> (m,)."""
    size = np.sum(counts, axis=-1)
    return np.exp(gammaln(size + 1) + np.sum(xlogy(counts, prob) - gammaln(counts + 1), axis=-1))
