"""Problems whose answer is known: what the policy gradient *is*, so that an estimate of it can be judged.

A **bandit** has one row of choices for each context (a prompt, in language-model terms); the reward depends on context
and choice. Its value is a sum over its table, its gradient one `policy.combine`.

Contexts are the *groups* of the rest of the project: every response of a group is an answer to the same context.
Token chains, where a trajectory is a sequence of choices, are in `vcposim.problems.chains`.
"""

from dataclasses import dataclass

import numpy as np

from vcposim.arrays import Array
from vcposim.errors import InputError
from vcposim.problems.policies import Policy


@dataclass(frozen=True)
class BanditEnvironment:
    """A contextual bandit: `reward` (G, K) of choice k in context g, which comes up with `group_probability` (G,).

    One context is the plain K-armed bandit. Raises `InputError` if shapes do not match or values are not finite.
    """

    reward: Array
    group_probability: Array

    def __post_init__(self) -> None:
        for name in ("reward", "group_probability"):
            object.__setattr__(self, name, np.asarray(getattr(self, name), dtype=float))
        if self.reward.ndim != 2 or self.group_probability.shape != self.reward.shape[:1]:
            raise InputError(
                f"reward: shape {self.reward.shape} with group_probability {self.group_probability.shape}; "
                "expected (G, K) and (G,)"
            )
        require_finite("reward", self.reward)
        require_probability("group_probability", self.group_probability)

    def value(self, policy: Policy) -> float:
        """E_pi[R] = sum_g rho_g sum_k pi(k|g) R_gk."""
        return float(np.sum(self._visits(policy) * self.reward))

    def gradient(self, policy: Policy) -> Array:
        """grad E_pi[R] = sum_g rho_g sum_k pi(k|g) R_gk s_gk: (p,)."""
        return policy.combine(self._visits(policy) * self.reward)

    def divergence(self, target: Policy, behavior: Policy, kind: str = "chi2") -> float:
        """chi2(pi||mu) = E_mu[(pi/mu - 1)^2], or KL(mu||pi) = E_mu[log mu/pi] for `kl`, averaged over contexts."""
        terms = divergence_terms(np.exp(target.log_prob), np.exp(behavior.log_prob), kind)
        return float(self.group_probability @ np.sum(terms, axis=-1))

    def _visits(self, policy: Policy) -> Array:
        return self.group_probability[:, None] * np.exp(policy.log_prob)


def divergence_terms(pi: Array, mu: Array, kind: str) -> Array:
    """What to sum over choices: mu (w - 1)^2 for `chi2`, mu (w - 1 - log w) >= 0 for `kl` (KL(mu||pi)); w = pi/mu.

    Tables of one shape, same -> same. Zero where neither plays. No cancellation for small divergences, no overflow of
    ratios for large ones.

    Raises `InputError` for a kind that is neither.
    """
    if kind not in ("chi2", "kl"):
        raise InputError(f"divergence: {kind!r} is neither 'chi2' nor 'kl'")
    with np.errstate(divide="ignore", invalid="ignore"):
        log_ratio = np.where(mu > 0, np.log(pi) - np.log(mu), 0.0)
    if kind == "chi2":
        return (pi - mu) * np.expm1(np.minimum(log_ratio, 700.0))
    near = np.expm1(np.minimum(log_ratio, 1.0)) - log_ratio
    with np.errstate(invalid="ignore"):
        return np.where(mu > 0, np.where(log_ratio < 1, mu * near, (pi - mu) - mu * log_ratio), 0.0)


def require_finite(name: str, values: Array) -> None:
    """Refuse NaN and infinities, in `values` (...): `InputError` names the first entry."""
    if not np.all(np.isfinite(values)):
        where = tuple(int(i) for i in np.argwhere(~np.isfinite(values))[0])
        raise InputError(f"{place(name, where)}: {values[where]} is not a finite number; replace or remove it")


def require_probability(name: str, prob: Array, tolerance: float = 1e-9) -> None:
    """Refuse a `prob` (*row, K) that is no such table: non-finite, negative, or a row that does not sum to 1."""
    require_finite(name, prob)
    if np.any(prob < 0):
        where = tuple(int(i) for i in np.argwhere(prob < 0)[0])
        raise InputError(f"{place(name, where)}: {prob[where]} is negative; probabilities are in [0, 1]")
    total = np.sum(prob, axis=-1)
    if np.any(np.abs(total - 1) > tolerance):
        row = tuple(int(i) for i in np.argwhere(np.abs(total - 1) > tolerance)[0])
        raise InputError(f"{place(name, row)}: sums to {float(total[row])!r}, not 1; divide by the sum to normalize it")


def place(name: str, index: tuple[int, ...]) -> str:
    """`behavior[3]`: how a message points at an entry."""
    return name + "".join(f"[{i}]" for i in index)
