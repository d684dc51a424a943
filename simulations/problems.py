"""Bandits for experiments: policies that were never trained, and policies that really were.

The two disagree about baselines: a random policy spreads its probability, a trained one has nearly decided, its scores
are small where it is right and large where it is wrong. Conclusions drawn on the first need not hold on the second.
"""

import numpy as np

from vcposim.arrays import Array
from vcposim.problems.bandits import BanditProblem
from vcposim.problems.environments import BanditEnvironment
from vcposim.problems.policies import TabularSoftmax, drifted_to, moved, random_tabular
from vcposim.problems.rollouts import bandit_problem_of

POLICIES = ("random", "trained")


def stale_bandit(rng: np.random.Generator, policy: str, arms: int, chi2: float) -> BanditProblem:
    """A bandit whose behavior policy is chi2(pi||mu) = `chi2` away from the target, 0 for on policy.

    `random`: normal logits, normal rewards, behavior drifted in a random direction. `trained`: one or two of the arms
    pay 1, the target learned by sampled policy gradient until it succeeds four times in five, the behavior lies
    behind it on the line from its start.
    """
    if policy == "random":
        environment = BanditEnvironment(rng.normal(size=(1, arms)), np.ones(1))
        target = random_tabular(rng, (1, arms))
        behind = rng.normal(size=arms)
    else:
        environment, start, target = trained(rng, arms)
        behind = start.parameter - target.parameter
    behavior = target if chi2 == 0 else stale(environment, target, behind, chi2)
    return bandit_problem_of(environment, target, [behavior])


def stale(environment: BanditEnvironment, target: TabularSoftmax, direction: Array, chi2: float) -> TabularSoftmax:
    """The policy at that divergence behind the target, along `direction` (K,)."""
    unit = direction / np.linalg.norm(direction)
    return drifted_to(target, unit, lambda behavior: environment.divergence(target, behavior), chi2)


def trained(
    rng: np.random.Generator, arms: int, *, success: float = 0.8, step: float = 0.5, group_size: int = 8
) -> tuple[BanditEnvironment, TabularSoftmax, TabularSoftmax]:
    """(environment, start, end) of an on-policy REINFORCE run with the group mean, until it succeeds often enough."""
    paying = rng.permutation(arms) < rng.integers(1, 3)
    environment = BanditEnvironment(paying[None].astype(float), np.ones(1))
    start = policy = random_tabular(rng, (1, arms))
    while environment.value(start) > success / 2:
        start = policy = random_tabular(rng, (1, arms))
    while environment.value(policy) < success:
        policy = moved(policy, reinforce(rng, environment, policy, group_size), step)
    return environment, start, policy


def reinforce(
    rng: np.random.Generator, environment: BanditEnvironment, policy: TabularSoftmax, group_size: int
) -> Array:
    """One on-policy estimate with the group mean: sum_k (n_k / N) (R_k - mean) s_k: (K,)."""
    share = rng.multinomial(group_size, np.exp(policy.log_prob[0])) / group_size
    reward = environment.reward[0]
    return policy.combine((share * (reward - share @ reward))[None])
