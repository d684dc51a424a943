"""One batch of trajectories, exact or drawn: the record that every estimator reads.

A batch is what the data say (rewards, log-ratios, lengths), how much each outcome counts (`measure`), and what can
be done with the scores s_i = grad log pi(tau_i). An estimator never needs the scores themselves, only two things
made of them: the sum of c_i s_i, and the squared norms ||c_i s_i||^2. So a batch carries `scores`, an object with
these two operations: dense arrays here, structured ones where a policy knows better (a bandit with a million arms),
norms alone where a framework dumped nothing more.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Protocol

from vcposim.arrays import Array, namespace, safe_divide
from vcposim.errors import InputError


class Scores(Protocol):
    """What an estimator may ask of the scores; `weight` is (..., n), or (..., n, t) at token level."""

    def combine(self, weight: Array) -> Array:
        """sum_i weight_i s_i, or sum_i sum_t weight_it s_it: -> (..., p)."""
        ...

    def sq_norm(self, weight: Array) -> Array:
        """||weight_i s_i||^2, or ||sum_t weight_it s_it||^2: -> (..., n)."""
        ...


@dataclass(frozen=True)
class DenseScores:
    """Scores given as an array: (..., n, p) per trajectory, or (..., n, t, p) per token."""

    score: Array
    per_token: bool = False

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """(..., n)"""
        return tuple(self.score.shape[: -2 if self.per_token else -1])

    def masked(self, token_mask: Array) -> "DenseScores":
        """The same without the scores of masked tokens, whatever they hold: (..., n, t)."""
        xp = namespace(self.score, token_mask)
        return DenseScores(xp.where(xp.expand_dims(token_mask > 0, axis=-1), self.score, 0), per_token=True)

    def _expand(self, weight: Array) -> Array:
        xp = namespace(self.score)
        if self.per_token and weight.ndim == self.score.ndim - 2:
            weight = xp.expand_dims(weight, axis=-1)
        if weight.ndim != self.score.ndim - 1:
            raise InputError(
                f"weight: {weight.ndim} axes for scores of {self.score.ndim}; "
                "token-level weights need per-token scores (..., n, t, p) and per_token=True"
            )
        return self.score * xp.expand_dims(weight, axis=-1)

    def combine(self, weight: Array) -> Array:
        """sum_i weight_i s_i: -> (..., p)."""
        xp, weighted = namespace(self.score), self._expand(weight)
        return xp.sum(xp.sum(weighted, axis=-2) if self.per_token else weighted, axis=-2)

    def sq_norm(self, weight: Array) -> Array:
        """||weight_i s_i||^2: -> (..., n)."""
        xp, weighted = namespace(self.score), self._expand(weight)
        total = xp.sum(weighted, axis=-2) if self.per_token else weighted
        return xp.sum(total * total, axis=-1)


@dataclass(frozen=True)
class ScoreNorms:
    """Only the squared norms ||s_i||^2 (..., n) are known, as in a dump of a framework's rollouts."""

    score_sq_norm: Array

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """(..., n)"""
        return tuple(self.score_sq_norm.shape)

    def combine(self, weight: Array) -> Array:
        """Refused: norms do not add up to a gradient."""
        raise InputError("scores: only norms are known, this needs the scores; pass DenseScores or leave it out")

    def sq_norm(self, weight: Array) -> Array:
        """w_i^2 ||s_i||^2: -> (..., n).

        Raises `InputError` for weights one a token.
        """
        if weight.ndim != self.score_sq_norm.ndim:
            raise InputError("scores: only trajectory norms are known; token-level weights need per-token scores")
        return weight * weight * self.score_sq_norm


@dataclass(frozen=True)
class Batch:
    """Outcomes of one or many groups; all arrays from one library.

    Exactly one of `log_ratio` (nats; what users feed) and `ratio` (exact arithmetic) is given, untouched:
    pi(tau)/mu(tau) per trajectory (..., n), or per token (..., n, t).

    `measure` is the probability of each outcome (default 1/n), `unit` the mass of one draw: 1/n in a batch of n
    draws, 0 for the whole population. Leaving one out takes away one unit, so with `unit=0` it takes away nothing
    and the leave-one-out baselines become their population values.

    Raises `InputError` on shapes that do not match, and on floats of less than 32 bits: in bfloat16 equal rewards have
    a spread, and an advantage divided by it is noise.
    """

    reward: Array
    """(..., n), any unit"""
    log_ratio: Array | None = None
    """(..., n) or (..., n, t), nats"""
    ratio: Array | None = None
    """(..., n) or (..., n, t)"""
    scores: Scores | None = None
    length: Array | None = None
    """(..., n), tokens"""
    token_mask: Array | None = None
    """(..., n, t), 1 for a token of the policy, 0 for padding or the environment's"""
    measure: Array = None
    """(..., n)"""
    unit: Array = None
    """(..., 1) or a number"""
    population_baseline: Array | None = None
    """(..., 1), the oracle value of the OPOB, where the problem knows it"""
    log_prob: Array | None = None
    """(..., n, t), log pi of each token, nats: for gates on probabilities instead of ratios"""
    collision: Array | None = None
    """(..., n, t), sum_v pi(v)^2 over the vocabulary at each token, in (0, 1]"""
    anchor_log_ratio: Array | None = None
    """(..., n, t), log pi/anchor of each token, nats (decoupled PPO's proximal policy)"""
    reference_log_ratio: Array | None = None
    """(..., n), log pi/reference of each trajectory, nats (the policy of the KL penalty)"""
    grouped: bool = False
    """whether the axis before the samples holds the prompts of one batch (else every group stands alone)"""

    def __post_init__(self) -> None:
        if (self.log_ratio is None) == (self.ratio is None):
            raise InputError("log_ratio: give exactly one of log_ratio (floats) and ratio (exact arithmetic)")
        if len(self.reward.shape) == 0 or 0 in tuple(self.reward.shape):
            raise InputError(
                f"reward: shape {tuple(self.reward.shape)}; pass at least one reward, samples on the last axis"
            )
        if self.measure is None:
            measure = (self.reward * 0 + 1) / self.reward.shape[-1]
            object.__setattr__(self, "measure", measure)
            object.__setattr__(self, "unit", measure[..., :1] if self.unit is None else self.unit)
        elif self.unit is None:
            raise InputError("unit: give the mass of one draw along with measure (1/n for draws, 0 for a population)")
        for name in ("reward", "ratio" if self.log_ratio is None else "log_ratio"):
            require_precision(name, getattr(self, name))
        want, shape = tuple(self.reward.shape), tuple(self.given_ratio.shape)
        for name in ("length", "measure", "reference_log_ratio"):
            array = getattr(self, name)
            if array is not None and tuple(array.shape) != want:
                raise InputError(f"{name}: shape {tuple(array.shape)} does not match reward's {want}")
        if shape[: len(want)] != want or len(shape) > len(want) + 1:
            name = "log_ratio" if self.ratio is None else "ratio"
            raise InputError(f"{name}: shape {shape} is neither {want} nor {want} + (t,)")
        scored = getattr(self.scores, "sample_shape", want)
        if scored != want:
            raise InputError(f"scores: shape {scored} of the samples does not match reward's {want}")
        if self.token_mask is not None and tuple(self.token_mask.shape) != shape:
            raise InputError(f"token_mask: shape {tuple(self.token_mask.shape)} does not match token ratios' {shape}")
        for name in ("log_prob", "collision", "anchor_log_ratio"):
            array = getattr(self, name)
            if array is not None and not (self.per_token and tuple(array.shape) == shape):
                raise InputError(f"{name}: shape {tuple(array.shape)} is not that of token ratios {want} + (t,)")
        if self.grouped and len(want) < 2:
            raise InputError(f"grouped: rewards of shape {want} have no axis of prompts; pass them as (..., group, n)")

    @property
    def given_ratio(self) -> Array:
        """`ratio` or `log_ratio`, whichever was given."""
        return self.log_ratio if self.ratio is None else self.ratio

    @property
    def per_token(self) -> bool:
        """Whether ratios are given per token."""
        return len(self.given_ratio.shape) > len(self.reward.shape)

    def token_length(self) -> Array:
        """Tokens of the policy in each trajectory: `length` if given, else counted: (..., n).

        Raises `InputError` where neither lengths nor token ratios are given.
        """
        if self.length is not None:
            return self.length
        if self.token_mask is not None:
            return namespace(self.token_mask).sum(self.token_mask, axis=-1)
        if self.per_token:
            return self.reward * 0 + self.given_ratio.shape[-1]
        raise InputError("length: this needs the number of tokens of each trajectory; pass length")

    def given(self, name: str) -> Array:
        """An optional field: (..., n) or (..., n, t) or (..., 1), as `Batch` says.

        Raises `InputError` if it is not there.
        """
        value = getattr(self, name)
        if value is None or value is False:
            raise InputError(f"{name}: {_MISSING[name]}")
        return value

    def require(self, need: str) -> None:
        """Refuse a batch that lacks what an estimator `needs`: `InputError` says what to pass."""
        if need == "tokens" and not self.per_token:
            raise InputError("tokens: this needs log-ratios of shape (..., n, t); this batch has one per trajectory")
        if need == "length":
            self.token_length()
        elif need == "scores":
            self.scored()
        elif need != "tokens":
            self.given(need)

    def on_tokens(self, x: Array) -> Array:
        """x with zeros on padding, whatever is stored there; trajectory-level arrays as they are: same -> same."""
        if self.token_mask is None or x.ndim == self.reward.ndim:
            return x
        return namespace(x, self.token_mask).where(self.token_mask > 0, x, 0)

    def once(self, what: Hashable, compute: Callable[[], Any]) -> Any:
        """What `compute` makes of this batch and nothing else; one that many estimators look at remembers it."""
        return compute()

    def scored(self) -> Scores:
        """The scores.

        Raises `InputError` if there are none.
        """
        if self.scores is None:
            raise InputError("scores: this needs score norms; pass DenseScores(score) or ScoreNorms(score_sq_norm)")
        if self.token_mask is not None and isinstance(self.scores, DenseScores) and self.scores.per_token:
            return self.scores.masked(self.token_mask)
        return self.scores


class SharedBatch(Batch):
    """A batch for many estimators: what they all compute of it is computed once, and held as long as it is.

    A changed copy (`dataclasses.replace`) knows nothing yet. Nobody may write into what is remembered.
    """

    def once(self, what: Hashable, compute: Callable[[], Any]) -> Any:
        """What `compute` returned when this was first asked for."""
        known: dict[Hashable, Any] = self.__dict__.setdefault("known", {})
        if what not in known:
            known[what] = compute()
        return known[what]


_MISSING = {
    "log_prob": "this needs log pi of every token; pass log_prob of shape (..., n, t)",
    "collision": "this needs sum_v pi(v)^2 at every token; pass collision of shape (..., n, t)",
    "anchor_log_ratio": "this needs the anchor policy; pass log pi/anchor per token, shape (..., n, t)",
    "reference_log_ratio": "this needs the reference policy; pass log pi/reference per trajectory, shape (..., n)",
    "population_baseline": "'population' is an oracle; it needs a problem with exact moments",
    "grouped": "this averages over the prompts of a batch; pass rewards as (..., group, n) and grouped=True",
}


def require_precision(name: str, x: Array) -> None:
    """Refuse floats `x` (...) of less than 32 bits with an `InputError`; exact numbers pass."""
    xp = namespace(x)
    if xp.isdtype(x.dtype, "real floating") and xp.finfo(x.dtype).bits < 32:
        raise InputError(f"{name}: {x.dtype} has too few digits for a mean or a spread; widen it to float32 first")


def over_tokens(x: Array, like: Array) -> Array:
    """x with a time axis of one if only `like` has a time axis: x (...) -> (...) or (..., 1)."""
    return namespace(x).expand_dims(x, axis=-1) if x.ndim < like.ndim else x


def sample_measure(sample_mask: Array) -> tuple[Array, Array]:
    """Measure and unit of ragged groups: 1/n_g on the n_g real samples, 0 on padding: (..., n) -> (..., n), (..., 1).

    >>> import numpy as np
    >>> sample_measure(np.array([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]]))[1]
    array([[0.5       ],
           [0.33333333]])
    """
    count = namespace(sample_mask).sum(sample_mask, axis=-1, keepdims=True)
    unit = safe_divide(1, count, 0)
    return sample_mask * unit, unit
