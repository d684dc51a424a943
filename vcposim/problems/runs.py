"""Policies that were really trained, and problems made of them.

Random policies are not like trained ones: after training, reward, ratio and score norm are correlated, and baselines
change their ranking. `policies_of_a_run` runs a small on-policy learner, with the exact gradient or with sampled ones,
and keeps every version; `stale_problem` makes of such a history what an asynchronous learner sees at its end.
"""

from collections.abc import Callable

import numpy as np

from vcposim.errors import InputError
from vcposim.estimators import Estimator
from vcposim.moments import batch_sums
from vcposim.problems.bandits import BanditProblem
from vcposim.problems.chains import ChainProblem, chain_problem
from vcposim.problems.environments import BanditEnvironment
from vcposim.problems.policies import Policy, moved
from vcposim.problems.rollouts import bandit_problem_of
from vcposim.problems.staleness import LagLaw, PolicyHistory, in_flight, whole_trajectory
from vcposim.problems.token_chains import TokenChain
from vcposim.weights import Weighting

Environment = BanditEnvironment | TokenChain
ON_POLICY = Estimator(Weighting("none"), "leave_one_out")


def policies_of_a_run(
    environment: Environment,
    start: Policy,
    *,
    steps: int,
    step_size: float,
    rng: np.random.Generator | None = None,
    groups: int = 8,
    group_size: int = 8,
) -> list[Policy]:
    """theta_{k+1} = theta_k + step_size * gradient: the policies of versions 0..steps.

    The gradient is exact, or with `rng` the leave-one-out REINFORCE estimate of `groups` fresh on-policy groups.

    Raises `InputError` if `steps` is negative or `step_size` not finite.
    """
    if steps < 0 or not np.isfinite(step_size):
        raise InputError(f"steps: {steps} with step_size {step_size}; give 0 or more steps of a finite size")
    policies = [start]
    for _ in range(steps):
        now = policies[-1]
        direction = environment.gradient(now)
        if rng is not None:
            problem = problem_of(environment, now, [now])
            batch = problem.sample(rng, groups, group_size)
            direction = batch_sums(batch, ON_POLICY.coefficients(batch)).estimate / groups
        policies.append(moved(now, direction, step_size))
    return policies


def problem_of(environment: Environment, target: Policy, behaviors: list[Policy]) -> BanditProblem | ChainProblem:
    """The problem of an environment, a target policy and the policies that sample, each as often."""
    if isinstance(environment, BanditEnvironment):
        return bandit_problem_of(environment, target, behaviors)
    return chain_problem(environment, target, behaviors)


def stale_problem(
    environment: Environment,
    history: PolicyHistory,
    law: LagLaw,
    *,
    tokens_per_update: int | None = None,
    mismatch: Callable[[Policy], Policy] | None = None,
    recorded_by_sampler: bool = True,
) -> BanditProblem | ChainProblem:
    """What the learner at the newest version of a history sees when its samples lag by `law`.

    `tokens_per_update` lets a chain's sampler take new weights in the middle of a trajectory (`staleness.in_flight`).
    `mismatch` turns each version into what the sampler computes from it, as in
    `lambda policy: rounded(policy, "bfloat16")`; with `recorded_by_sampler=False` the learner divides by its own
    probabilities of that version instead of the sampler's.

    Raises `InputError` for `tokens_per_update` on a bandit.
    """
    versions = tuple(mismatch(policy) for policy in history.policies) if mismatch else history.policies
    sampler = PolicyHistory(versions, history.version, history.capacity)
    believed = sampler if recorded_by_sampler else history
    if isinstance(environment, BanditEnvironment):
        if tokens_per_update is not None:
            raise InputError("tokens_per_update: a bandit has one token; leave it out, or use a token chain")
        lags = np.flatnonzero(law.probability).tolist()
        behaviors, recorded = ([h.at(lag) for lag in lags] for h in (sampler, believed))
        return bandit_problem_of(environment, history.newest, behaviors, law.probability[lags], recorded)
    length = environment.shape[0]
    paths = whole_trajectory(law, length) if tokens_per_update is None else in_flight(law, length, tokens_per_update)
    tables, recorded_tables = sampler.tables(paths), believed.tables(paths)
    return chain_problem(environment, history.newest, tables, paths.probability.tolist(), recorded_tables)
