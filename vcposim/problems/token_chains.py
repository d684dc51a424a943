"""Token chains: small autoregressive problems with a verifiable terminal reward.

A trajectory is a string of T tokens. All that matters of its past is the state of a finite automaton that reads it, so
policy and reward are tables over (position, state): "has it matched the target so far", "the sum modulo m". The reward
is a function of the final state, as a verifier's is of the answer. Sums over all V^T strings become sums over
positions and states:

    forward    F_t(s)  = sum over strings that lead to s at t of prod q        q_t(s, v): any product measure
    backward   B_t(s)  = sum over continuations of prod q * h(final state)
    flow       F_t(s) q_t(s, v) B_{t+1}(s')                                    mass that passes through a token

With q = pi and h = reward, backward is the value and the flow's `policy.combine` is the policy gradient.

States that are `done` have read an end-of-sequence token: nothing is emitted any more, what is left of the T positions
is padding. Prompts are start states: the groups of the rest of the project.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from vcposim.arrays import Array
from vcposim.errors import InputError
from vcposim.problems.environments import divergence_terms, require_finite, require_probability
from vcposim.problems.policies import Policy


@dataclass(frozen=True)
class TokenChain:
    """An automaton with a reward: `transition` (T, S, V) next states, `reward` (S,) of the final state, `done` (S,).

    `start` (G,) is the start state of each prompt, which comes up with `group_probability` (G,).

    Raises `InputError` if shapes do not match, states are out of range, or a done state is ever left.
    """

    transition: Array
    reward: Array
    done: Array
    start: Array
    group_probability: Array

    def __post_init__(self) -> None:
        _, states, _ = self.transition.shape
        if self.reward.shape != (states,) or self.done.shape != (states,):
            raise InputError(f"reward: shape {self.reward.shape} for {states} states; give one for each")
        for name in ("transition", "start"):
            values = getattr(self, name)
            if values.min() < 0 or values.max() >= states:
                raise InputError(f"{name}: a state is outside 0..{states - 1}; states are numbered from 0")
        if np.any(self.transition[:, self.done] != np.flatnonzero(self.done)[:, None]):
            raise InputError("transition: a done state is left; every token must lead back to it")
        require_finite("reward", self.reward)
        require_probability("group_probability", self.group_probability)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(T, S, V): the shape of a policy's table."""
        return self.transition.shape

    def padded(self, prob: Array) -> Array:
        """Probabilities with padding (token 0, surely) in done states: (..., T, S, V) -> (..., T, S, V)."""
        out = np.array(prob)
        out[..., self.done, :] = np.eye(self.shape[2])[0]
        return out

    def emitted(self, table: Array) -> Array:
        """A table with zeros in done states, where nothing is emitted: (..., T, S, V) -> (..., T, S, V)."""
        return np.where(self.done[:, None], 0.0, table) if np.any(self.done) else table

    def start_law(self, group: int | None = None) -> Array:
        """F_0: the start state of a group, or of a random one: (S,)."""
        rho = self.group_probability if group is None else np.eye(len(self.start))[group]
        return np.bincount(self.start, rho, minlength=self.shape[1])

    def forward(self, q: Array, start: Array) -> Array:
        """F_0..F_T: (T, S, V), (S,) -> (T + 1, S)."""
        mass = [start]
        for step, to in zip(q, self.transition, strict=True):
            mass.append(np.bincount(to.reshape(-1), (mass[-1][:, None] * step).reshape(-1), minlength=len(start)))
        return np.stack(mass)

    def backward(self, q: Array, final: Array) -> Array:
        """B_0..B_T with B_T = final: (T, S, V), (S,) -> (T + 1, S)."""
        value = [final]
        for step, to in zip(q[::-1], self.transition[::-1], strict=True):
            value.append(np.sum(step * value[-1][to], axis=-1))
        return np.stack(value[::-1])

    def flow(self, q: Array, start: Array, final: Array) -> Array:
        """Mass through each token, sum over strings of prod q * final: (T, S, V), zero in done states."""
        before, after = self.forward(q, start)[:-1], self.backward(q, final)[1:]
        ahead = np.stack([value[to] for value, to in zip(after, self.transition, strict=True)])
        return self.emitted(before[:, :, None] * q * ahead)

    def value(self, policy: Policy) -> float:
        """E_pi[R]."""
        return float(self.start_law() @ self.backward(self.padded(np.exp(policy.log_prob)), self.reward)[0])

    def gradient(self, policy: Policy) -> Array:
        """grad E_pi[R]: (p,)."""
        return policy.combine(self.flow(self.padded(np.exp(policy.log_prob)), self.start_law(), self.reward))

    def divergence(self, target: Policy, behavior: Policy, kind: str = "chi2") -> float:
        """chi2(pi||mu) = E_mu[w^2] - 1, or KL(mu||pi) for `kl` in nats, of trajectories, averaged over prompts.

        Both are sums of what each token adds; chi2 counts a token under the measure mu w^2 of what came before it.
        """
        pi, mu = (self.padded(np.exp(policy.log_prob)) for policy in (target, behavior))
        added = np.sum(divergence_terms(pi, mu, kind), axis=-1)
        past = mu if kind == "kl" else np.divide(pi**2, mu, out=np.zeros_like(mu), where=mu > 0)
        return float(np.sum(self.forward(past, self.start_law())[:-1] * added))


def _chain(transition: Array, reward: Array, start: Sequence[int] = (0,)) -> TokenChain:
    states = transition.shape[1]
    return TokenChain(
        transition=transition.astype(np.int64),
        reward=np.asarray(reward, dtype=float),
        done=np.zeros(states, dtype=bool),
        start=np.asarray(start, dtype=np.int64),
        group_probability=np.full(len(start), 1 / len(start)),
    )


def exact_match(target: Sequence[int], vocabulary: int, length: int | None = None) -> TokenChain:
    """Reward 1 for the string `target` and nothing else. States: matching, complete, failed."""
    return any_match([target], vocabulary, length)


def any_match(targets: Sequence[Sequence[int]], vocabulary: int, length: int | None = None) -> TokenChain:
    """Reward 1 for any of several strings. States: the prefixes of the targets (a trie), and failure.

    Targets may be shorter than `length` (default: the longest) only with `with_end`, which lets a string stop.
    """
    _require_tokens(targets, vocabulary)
    length = max(map(len, targets)) if length is None else length
    prefixes = sorted({tuple(target[:n]) for target in targets for n in range(len(target) + 1)}, key=len)
    number = {prefix: i for i, prefix in enumerate(prefixes)}
    failed = len(prefixes)
    to = np.full((failed + 1, vocabulary), failed)
    for prefix in prefixes[1:]:
        to[number[prefix[:-1]], prefix[-1]] = number[prefix]
    reward = np.zeros(failed + 1)
    reward[[number[tuple(target)] for target in targets]] = 1
    return _chain(np.broadcast_to(to, (length, *to.shape)), reward)


def partial_credit(target: Sequence[int], vocabulary: int) -> TokenChain:
    """Reward: the share of positions that match `target`. States: how many have matched so far."""
    _require_tokens([target], vocabulary)
    length = len(target)
    count = np.arange(length + 1)[:, None]
    hit = np.asarray(target)[:, None, None] == np.arange(vocabulary)
    to = np.minimum(count + hit, length)
    return _chain(to, np.arange(length + 1) / length)


def modular_sum(
    length: int, vocabulary: int, modulus: int, residue: int = 0, prompts: Sequence[int] = (0,)
) -> TokenChain:
    """Reward 1 if prompt + tokens = residue modulo `modulus`. States: the sum so far; `prompts` are start values.

    Raises `InputError` for a length, vocabulary or modulus below 1.
    """
    for name, value in (("length", length), ("vocabulary", vocabulary), ("modulus", modulus)):
        if value < 1:
            raise InputError(f"{name}: {value} is less than 1; give a positive number")
    to = (np.arange(modulus)[:, None] + np.arange(vocabulary)) % modulus
    reward = np.arange(modulus) == residue % modulus
    return _chain(np.broadcast_to(to, (length, *to.shape)), reward, [p % modulus for p in prompts])


def with_end(chain: TokenChain, unfinished: float = 0.0) -> TokenChain:
    """The same task with one more token, end-of-sequence (the last of the vocabulary).

    A string that ends is judged by the state it ends in; one that never does gets reward `unfinished`. States double:
    s, and "done in s".
    """
    length, states, vocabulary = chain.shape
    to = np.empty((length, 2 * states, vocabulary + 1), dtype=np.int64)
    to[:, :states, :vocabulary] = chain.transition
    to[:, :states, vocabulary] = states + np.arange(states)
    to[:, states:] = states + np.arange(states)[:, None]
    return replace(
        chain,
        transition=to,
        reward=np.concatenate([np.full(states, unfinished), chain.reward]),
        done=np.repeat([False, True], states),
    )


def _require_tokens(targets: Sequence[Sequence[int]], vocabulary: int) -> None:
    if not targets or not all(len(target) for target in targets):
        raise InputError("target: empty; give at least one token")
    for target in targets:
        for token in target:
            if not 0 <= token < vocabulary:
                raise InputError(f"target: token {token} is outside 0..{vocabulary - 1}; raise vocabulary or change it")
