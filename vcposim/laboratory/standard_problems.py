"""Exact bias and variance of any function of a batch, on problems small enough to list every batch of n draws.

`laboratory.exact` measures any estimator on any problem. Here are the problems that report cards are written on, and a
function is shown all their batches at once, in arrays of its own library.

The `STANDARD` problems are strings of two tokens out of two: four trajectories of one prompt, each token "b" worth half
a reward. The learner prefers "b"; what changes is how much of that preference the sampler already had.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np

from vcposim.batch import Batch, DenseScores
from vcposim.laboratory import enumeration
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
    ((batch, mass),) = enumeration.batches(
        problem, problem.outcomes(), 0, group_size, per_token=per_token, grouped=grouped
    )
    scores, shown = batch.scored(), {k: x for k, x in vars(batch).items() if isinstance(x, np.ndarray)}
    assert isinstance(scores, DenseScores)
    dense = replace(scores, score=convert(scores.score))
    c = coefficients(replace(batch, **{k: convert(x) for k, x in shown.items()}, scores=dense))
    as_numpy = np.asarray(c.detach().cpu().numpy() if hasattr(c, "detach") else c)
    mass = mass[:, None] if grouped else mass  # one prompt a batch: (m, 1), as the sums are
    return moments(batch_sums(batch, as_numpy, mass), problem.gradient, drawn=False)
