"""Exact bias and variance of any function of a batch, on problems small enough to list every batch of n draws.

`laboratory.exact` knows our estimators and takes short cuts. Here nothing is assumed of the function: each of the K^n
ordered batches is shown to it as drawn, with measure 1/n, and counts with its probability.

The `STANDARD` problems are strings of two tokens out of two: four trajectories of one prompt, each token "b" worth half
a reward. The learner prefers "b"; what changes is how much of that preference the sampler already had.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np

from vcposim.batch import Batch, DenseScores
from vcposim.moments import Moments, batch_sums, moments
from vcposim.problems.chains import ChainProblem, chain_problem
from vcposim.problems.policies import TabularSoftmax
from vcposim.problems.token_chains import partial_credit

GROUP_SIZE = 4
STANDARD: dict[str, float] = {"on policy": 2.0, "a little stale": 1.4, "stale": 0.0, "very stale": -1.6}
"""name -> the sampler's log-odds for "b"; the learner's are 2"""

UNKNOWN = frozenset({"anchor_log_ratio", "reference_log_ratio"})
"""policies that these problems have none of"""


@cache
def standard_problem(name: str) -> ChainProblem:
    """The problem of a name of `STANDARD`."""
    chain = partial_credit((1, 1), 2)

    def policy(log_odds: float) -> TabularSoftmax:
        return TabularSoftmax(np.broadcast_to([0.0, log_odds], chain.shape).copy())

    return chain_problem(chain, policy(STANDARD["on policy"]), [policy(STANDARD[name])])


def exact_moments(
    coefficients: Callable[[Batch], Any],
    problem: ChainProblem,
    group_size: int = GROUP_SIZE,
    *,
    per_token: bool = False,
    grouped: bool = False,
    convert: Callable[[np.ndarray], Any] = np.array,
) -> Moments:
    """Moments of the mean contribution of a group, over all K^n ordered batches of one prompt.

    `per_token` gives ratios by token and what is known of them (`log_prob`, `collision`), else one a trajectory;
    `grouped` an axis of one prompt; `convert` makes the arrays that the function works on.
    """
    batch, mass = all_batches(problem, group_size, per_token=per_token, grouped=grouped)
    scores, shown = batch.scored(), {k: x for k, x in vars(batch).items() if isinstance(x, np.ndarray)}
    assert isinstance(scores, DenseScores)
    dense = replace(scores, score=convert(scores.score))
    c = coefficients(replace(batch, **{k: convert(x) for k, x in shown.items()}, scores=dense))
    as_numpy = np.asarray(c.detach().cpu().numpy() if hasattr(c, "detach") else c)
    return moments(batch_sums(batch, as_numpy, mass), problem.gradient, drawn=False)


def all_batches(
    problem: ChainProblem, group_size: int, *, per_token: bool = False, grouped: bool = False
) -> tuple[Batch, np.ndarray]:
    """Every batch of n draws of the one prompt, as replications (K^n, n), and its probability (K^n,)."""
    known = problem.outcomes()
    outcome = np.indices((known.reward.shape[-1],) * group_size).reshape(group_size, -1).T
    outcome = outcome[:, None] if grouped else outcome
    score = problem.restricted(0, np.arange(known.reward.shape[-1])).score  # type: ignore[attr-defined]
    fields: dict[str, Any] = {"reward": known.reward[0][outcome]}
    if per_token:
        names = ("log_ratio", "token_mask", "log_prob", "collision")
        fields |= {name: np.asarray(getattr(known, name)[0][outcome], dtype=float) for name in names}
        fields["scores"] = DenseScores(score[outcome], per_token=True)
    else:
        fields |= {"log_ratio": known.on_tokens(known.log_ratio)[0].sum(axis=-1)[outcome]}
        fields |= {"length": known.token_length()[0][outcome], "scores": DenseScores(score.sum(axis=1)[outcome])}
    mass = known.measure[0][outcome].prod(axis=-1)
    return Batch(grouped=grouped, **fields), mass
