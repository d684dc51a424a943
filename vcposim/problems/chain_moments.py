"""Exact moments of token chains by dynamic programming over (position, state).

A contribution x = c sum_t a_t s_t has a coefficient c that depends on the final state and on a product over tokens
(1, or the importance ratio), and token factors a_t (truncated token ratios, say). Its moments are sums over strings of

    (product measure q) * (final value h) * (vector, or its square)

For E x, q = mu * ratio^k and h = R - b. For E||x||^2, q = mu * ratio^(2k) and h = (R - b)^2. Scores of a tabular policy
at different positions are orthogonal, so ||sum_t a_t s_t||^2 is a sum over tokens and the flow of the chain is enough.
A linear policy adds <s_t, s_t'> for t' < t; a forward recursion carries sum_{t' < t} a_t' s_t' for each state.

Covered: weights that are products over tokens (none and importance, at sequence level; at geometric level for a fixed
length), every per-sample treatment at token level; a constant baseline. A truncated *sequence* ratio is no product and
has no such form.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from vcposim.arrays import Array, safe_divide
from vcposim.batch import Batch
from vcposim.estimators import Estimator
from vcposim.problems.policies import LinearSoftmax
from vcposim.weights import Weighting

if TYPE_CHECKING:
    from vcposim.problems.chains import ChainProblem


@dataclass(frozen=True)
class Factors:
    """A weighting on a chain: ratio^power of the trajectory, times `token` (M, T, S, V) on the score of each token."""

    power: float
    token: Array


def factors(problem: "ChainProblem", weighting: Weighting) -> Factors | None:
    """The weighting as factors, or None if it is no product over tokens."""
    if weighting.smooth is not None:
        return None
    one = np.ones(problem.mu.shape)
    if weighting.level == "token":
        return Factors(0.0, treated(weighting, problem.log_ratio))
    if weighting.treatment == "none":
        return Factors(0.0, one)
    if weighting.treatment == "importance" and weighting.level == "sequence":
        return Factors(1.0, one)
    if weighting.treatment == "importance" and not np.any(problem.chain.done):
        return Factors(1 / problem.chain.shape[0], one)
    return None


def treated(weighting: Weighting, log_ratio: Array) -> Array:
    """The weighting of each entry of a table, one at a time: same -> same."""
    flat = log_ratio.reshape(-1)
    entries = Batch(reward=flat * 0, log_ratio=flat)
    return replace(weighting, level="sequence")(entries).value.reshape(log_ratio.shape)


def contribution_moments(problem: "ChainProblem", estimator: Estimator, baseline: Array) -> tuple[Array, Array] | None:
    """E x and E||x||^2 of one contribution, for each prompt and its baseline (G,): -> (G, p), (G,).

    Of estimators that see one sample at a time (`laboratory.exact.sees_one_sample`). None where the weighting is no
    product over tokens, or 1/L is not a constant.
    """
    factor, fixed_length = factors(problem, estimator.weighting), not np.any(problem.chain.done)
    if factor is None or not (estimator.normalizer == "none" or (estimator.normalizer == "length" and fixed_length)):
        return None
    scale = 1 / problem.chain.shape[0] if estimator.normalizer == "length" else 1.0
    advantage = scale * (problem.chain.reward - baseline[:, None])
    mean, square = [], []
    for g in range(len(problem.group_probability)):
        paths = zip(problem.path_probability, _measures(problem, factor.power), factor.token, strict=True)
        start = problem.chain.start_law(g)
        flow = [share * problem.chain.flow(q, start, advantage[g]) * token for share, q, token in paths]
        mean.append(problem.target.combine(np.sum(flow, axis=0)))
        square.append(_square(problem, factor, g, advantage[g] ** 2))
    return np.stack(mean), np.array(square)


def population_baseline(problem: "ChainProblem", weighting: Weighting) -> Array | None:
    """E[w^2 n^2 R] / E[w^2 n^2] of each prompt, the mean reward where nothing has weight: (G,).

    None where the weighting is no product over tokens.
    """
    factor = factors(problem, weighting)
    if factor is None:
        return None
    groups = range(len(problem.group_probability))
    reward, one = problem.chain.reward, np.ones(problem.chain.shape[1])
    top, total = (np.array([_square(problem, factor, g, h) for g in groups]) for h in (reward, one))
    return safe_divide(top, total, np.array([ratio_moment(problem, 0, g, reward) for g in groups]))


def ratio_moment(problem: "ChainProblem", power: float, group: int, final: Array) -> float:
    """E_mu[w^power h(final state)] of a prompt: `final` (S,)."""
    start = problem.chain.start_law(group)
    parts = [start @ problem.chain.backward(q, final)[0] for q in _measures(problem, power)]
    return float(problem.path_probability @ np.array(parts))


def diagnostics(problem: "ChainProblem") -> dict[str, float]:
    """`ess_fraction`, `chi2` = E[(w - 1)^2] and `kl` = E[-log w] in nats, of trajectories under the behavior."""
    one, rho = np.ones(problem.chain.shape[1]), problem.group_probability
    mean, square = (float(rho @ [ratio_moment(problem, k, g, one) for g in range(len(rho))]) for k in (1, 2))
    start = problem.chain.start_law()
    with np.errstate(invalid="ignore"):
        steps = np.where(problem.mu > 0, -problem.mu * problem.log_ratio, 0.0)
    visits = [problem.chain.forward(mu, start)[:-1] for mu in problem.mu]
    kl = [np.sum(visit * np.sum(step, axis=-1)) for visit, step in zip(visits, steps, strict=True)]
    return {
        "ess_fraction": mean * mean / square,
        "chi2": square - 2 * mean + 1,
        "kl": float(problem.path_probability @ np.array(kl)),
    }


def _measures(problem: "ChainProblem", power: float) -> Array:
    # mu ratio^power of each path: (M, T, S, V)
    return problem.mu if power == 0 else problem.mu * np.exp(power * problem.log_ratio)


def _square(problem: "ChainProblem", factor: Factors, group: int, final: Array) -> float:
    """sum over strings of q h ||sum_t a_t s_t||^2, averaged over paths."""
    start, norm = problem.chain.start_law(group), problem.target.score_sq_norm()
    total = 0.0
    for probability, q, token in zip(
        problem.path_probability, _measures(problem, 2 * factor.power), factor.token, strict=True
    ):
        part = np.sum(problem.chain.flow(q, start, final) * token**2 * norm)
        if isinstance(problem.target, LinearSoftmax):
            part += 2 * _cross(problem, problem.target, q, token, start, final)
        total += probability * part
    return float(total)


def _cross(problem: "ChainProblem", policy: LinearSoftmax, q: Array, token: Array, start: Array, final: Array) -> float:
    """sum over strings of q h sum_{t < t'} a_t a_t' <s_t, s_t'>."""
    chain = problem.chain
    score = chain.emitted(np.moveaxis(policy.score_table, -1, 0) * token)  # (d, T, S, V)
    mass, after = chain.forward(q, start), chain.backward(q, final)
    carried = np.zeros((score.shape[0], chain.shape[1]))  # E[prefix measure * sum of scores so far; state]
    total = 0.0
    for t, to in enumerate(chain.transition):
        step = score[:, t]
        total += float(np.sum(q[t] * after[t + 1][to] * np.einsum("ds,dsv->sv", carried, step)))
        moved = q[t] * (carried[:, :, None] + mass[t][:, None] * step)
        carried = np.stack([np.bincount(to.reshape(-1), row.reshape(-1), minlength=chain.shape[1]) for row in moved])
    return total
