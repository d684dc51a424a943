"""An estimator is a coefficient: weighting + baseline + normalizer -> c_i, the number that multiplies the score.

    gradient = sum_i measure_i c_i s_i          c_i = w_i (R_i - b) / normalizer

Where what multiplies the advantage depends on the advantage itself (clips, sign-dependent masks), a `Surrogate` takes
the place of w_i; the weighting then only serves the baseline. At token level everything has a time axis, and the sum
runs over tokens: c_it s_it, with b_t where the baseline is one a token.

Nothing else in the project knows what an estimator is. NumPy multiplies `c` with explicit scores, torch differentiates
`(c.detach() * log_prob).sum()`, proofs run this function on symbols.
"""

import sysconfig
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial, wraps
from pathlib import PurePath
from reprlib import repr as shortened
from typing import Any

from vcposim.arrays import (
    LINEAR,
    LOG,
    Array,
    expectation,
    indistinguishable,
    namespace,
    safe_divide,
    where,
)
from vcposim.baselines import Evidence, baseline, leverage
from vcposim.batch import Batch, over_tokens
from vcposim.errors import InputError, unknown_name
from vcposim.surrogates import Penalized, Surrogate
from vcposim.weights import Weight, Weighting, at_level

IMPORTANCE = Weighting("importance")


@dataclass(frozen=True)
class Estimator:
    """A policy-gradient estimator as data.

    `baseline` is a name of `vcposim.baselines.BASELINES` or a number; `normalizer` a name of `NORMALIZERS`, where
    `epsilon` is added to standard deviations.

    `surrogate` replaces the weight in front of the advantage. `reference_penalty` beta >= 0 (nats to units of reward)
    puts the KL penalty into the reward, R - beta log pi/reference, before anything else. `baseline_shift` (units of
    reward) is added to the baseline.

    Raises `InputError` for unknown names and numbers out of range.
    """

    weighting: Weighting = IMPORTANCE
    baseline: str | float = "zero"
    normalizer: str = "none"
    epsilon: float = 0.0
    surrogate: Surrogate | None = None
    reference_penalty: float = 0.0
    baseline_shift: float = 0.0

    def __post_init__(self) -> None:
        if self.normalizer not in NORMALIZERS:
            raise unknown_name("normalizer", self.normalizer, NORMALIZERS)
        if not 0 <= self.epsilon < float("inf"):
            raise InputError(f"epsilon: {self.epsilon} is not a finite non-negative number")
        if isinstance(self.baseline, str):
            baseline(self.baseline)
        elif not -float("inf") < self.baseline < float("inf"):
            raise InputError(f"baseline: {self.baseline} is not finite; pass a name or a number")
        per_token = isinstance(self.baseline, str) and baseline(self.baseline).per == "token"
        if per_token and NORMALIZERS[self.normalizer].per_response:
            raise InputError(f"normalizer: {self.normalizer!r} is for one advantage a response; use 'none'")
        if not 0 <= self.reference_penalty < float("inf"):
            raise InputError(f"reference_penalty: {self.reference_penalty} is not a finite non-negative number")
        if not -float("inf") < self.baseline_shift < float("inf"):
            raise InputError(f"baseline_shift: {self.baseline_shift} is not finite; it is in units of reward")

    def __init_subclass__(cls) -> None:
        """A subclass with coefficients of its own is held to what a function is."""
        super().__init_subclass__()
        own = cls.__dict__.get("coefficients")
        if own is not None:

            @wraps(own)
            def coefficients(self: Estimator, batch: Batch) -> Array:
                return answered(type(self).__name__, partial(own, self), batch)

            cls.coefficients = coefficients  # type: ignore[method-assign]

    def coefficients(self, batch: Batch) -> Array:
        """c_i = w_i (R_i - b) / normalizer: (..., n), or (..., n, t) if weight, surrogate or baseline is per token."""
        batch = self._penalized(batch)
        weight = self.weighting(batch)
        b = self._baseline(batch, weight)
        advantage = NORMALIZERS[self.normalizer](over_tokens(batch.reward, b) - b, batch, self.epsilon)
        factor = weight.value if self.surrogate is None else self.surrogate(batch, advantage)
        c = over_tokens(factor, advantage) * over_tokens(advantage, factor)
        if isinstance(self.surrogate, Penalized):
            penalty = self.surrogate.penalty(batch, advantage)
            c = over_tokens(c, penalty) + over_tokens(penalty, c)
        return batch.on_tokens(c)

    def baseline_value(self, batch: Batch, weight: Weight | None = None) -> Array:
        """b: (..., 1) one a group, (..., n) one a sample, (..., 1, t) one a token, (*batch, 1, 1) one a batch."""
        batch = self._penalized(batch)
        return self._baseline(batch, weight or self.weighting(batch))

    @property
    def needs(self) -> frozenset[str]:
        """What it cannot do without besides rewards and ratios: `tokens` (token ratios), optional fields of `Batch`."""
        found = set(self.surrogate.needs if self.surrogate else ())
        found |= NORMALIZERS[self.normalizer].needs
        if isinstance(self.baseline, str):
            found |= baseline(self.baseline).needs
        found |= {"tokens"} if self.weighting.level == "token" else set()
        found |= {"length"} if self.weighting.level == "geometric" else set()
        found |= {"reference_log_ratio"} if self.reference_penalty else set()
        return frozenset(found - {"length"} if "tokens" in found else found)

    def _penalized(self, batch: Batch) -> Batch:
        if not self.reference_penalty:
            return batch
        return replace(batch, reward=batch.reward - self.reference_penalty * batch.given("reference_log_ratio"))

    def _baseline(self, batch: Batch, weight: Weight) -> Array:
        if not isinstance(self.baseline, str):
            value = batch.reward[..., :1] * 0 + self.baseline
        else:
            value = baseline(self.baseline)(Evidence(batch, weight))
        return value + self.baseline_shift if self.baseline_shift else value

    def leverage(self, batch: Batch) -> Array:
        """h_i, sample i's share of the OPOB weight w_i^2 ||s_i||^2: (..., n) in [0, 1]."""
        e = Evidence(batch, self.weighting(batch))
        return leverage(e.weighted_sq_norm(), e.measure, e.unit)

    def require(self, group_size: int) -> None:
        """Refuse a group too small for the baseline, before any work: `InputError` names both."""
        require_group(group_size)
        if group_size < 2 and isinstance(self.baseline, str) and baseline(self.baseline).needs_two:
            raise InputError(f"group_size: 1 leaves nobody for baseline {self.baseline!r}; use 2 or more")


@dataclass(frozen=True)
class FunctionEstimator:
    """Anyone's function of a `Batch` as an estimator: the protocol by which yours goes through every part.

    `function` returns one coefficient a sample (..., n) or one a token (..., n, t). Samples are the last axis of the
    rewards; whatever axes precede it are groups that do not see each other, so reduce over the last one only.

    `needs` says what it reads besides rewards, log-ratios of trajectories (..., n), lengths and scores; for `tokens`,
    log-ratios are those of tokens (..., n, t), otherwise their sums, whatever the batch holds. Other names are optional
    fields of `Batch`. `exchangeable` promises that
    the order of samples does not matter: then exact moments run over multisets of outcomes, far fewer than orders. Both
    may be written on the function itself, `mine.needs = ("tokens",)`, which is where `estimator_of` looks.

    It is a function: what it returns depends on the batch alone, and the batch stays as it was.

    Raises `InputError` for an unknown need, where a batch lacks a need, where the function raises, and where what it
    returns has another shape or holds no real numbers.
    """

    function: Callable[[Batch], Array]
    needs: frozenset[str] = frozenset()
    exchangeable: bool = False

    def __post_init__(self) -> None:
        for need in sorted(self.needs - NEEDS):
            raise unknown_name("needs", need, NEEDS)

    def coefficients(self, batch: Batch) -> Array:
        """What the function says of a batch that has all it needs: (..., n) or (..., n, t).

        Raises `InputError` for a need that is missing, or coefficients of another shape.
        """
        for need in sorted(self.needs):
            batch.require(need)
        if batch.per_token and not self.needs & PER_TOKEN:
            batch = of_trajectories(batch)
        return answered(self.name, self.function, batch)

    @property
    def name(self) -> str:
        """The function's own name."""
        return getattr(self.function, "__name__", type(self.function).__name__)

    def require(self, group_size: int) -> None:
        """Refuse a group without samples."""
        require_group(group_size)


def answered(name: str, function: Callable[[Batch], Array], batch: Batch) -> Array:
    """What a stranger's function says of a batch: (..., n) or (..., n, t).

    Raises `InputError`, which calls it `name`, where it raises and for what is no array of real coefficients.
    """
    want = tuple(batch.reward.shape)
    try:
        c = function(batch)
    except InputError:
        raise
    except (Exception, SystemExit) as error:  # sys.exit() in it would end whatever called it, without a word
        raise InputError(f"estimator: {name} raises {told(error)}, on rewards of shape {want}") from error
    if not hasattr(c, "shape"):
        if hasattr(c, "close"):
            c.close()  # a coroutine that nobody awaits would have the last word
        raise InputError(
            f"estimator: {name} returned a {type(c).__name__}; return an array like batch.reward, one "
            "coefficient a sample, or one a token if it needs tokens"
        )
    if hasattr(c, "filled"):
        raise InputError(
            f"estimator: {name} returned a masked array; say what stands where it is masked, as in c.filled(0)"
        )
    got = tuple(c.shape)
    if got != want and not (got[:-1] == want and batch.per_token):
        raise InputError(
            f"estimator: {name} returned coefficients of shape {got} for rewards {want}; return one a sample, "
            "or one a token if it needs tokens"
        )
    if not real(c, batch):
        raise InputError(
            f"estimator: {name} returned coefficients of dtype {c.dtype}; return real numbers, of 32 bits or more"
        )
    return c


def real(c: Array, batch: Batch) -> bool:
    """Whether c is of real numbers, 32 bits or more: same -> bool. Objects (fractions, say) only where rewards are."""
    kind = str(c.dtype)
    numbers = ("float", "int", "bool", *(["object"] if "object" in str(batch.reward.dtype) else []))
    return "float16" not in kind and any(x in kind for x in numbers)


LIBRARIES = (*(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")), str(PurePath(__file__).parent))
"""where a stranger's code is not"""


def told(error: BaseException) -> str:
    """What a stranger's function or file raised as one line, and where it did: in a file of theirs if any."""
    frames = traceback.extract_tb(error.__traceback__)[1:]  # the first is ours, which called it
    at = [f for f in frames if not f.filename.startswith(("<frozen", *LIBRARIES))][-1:]
    syntax = isinstance(error, SyntaxError)  # it names the place itself
    where = f" (line {at[0].lineno} of {PurePath(at[0].filename).name})" if at and not syntax else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())}{where}"


NEEDS = frozenset(
    {"tokens", "length", "scores", "log_prob", "collision", "anchor_log_ratio", "reference_log_ratio", "grouped"}
    | {"population_baseline"}
)
"""all that `Estimator.needs` may hold"""

PER_TOKEN = frozenset({"tokens", "log_prob", "collision", "anchor_log_ratio"})
"""those that come with a ratio for each token"""

Resolved = Estimator | FunctionEstimator
"""has `coefficients`, `needs` and `require`"""

AnyEstimator = Resolved | Callable[[Batch], Array]
"""what may be measured: see `estimator_of`"""


def estimator_of(given: AnyEstimator) -> Resolved:
    """An estimator from an estimator or from a function of a `Batch`, whose `needs` and `exchangeable` are looked up.

    A class is asked for an instance, without arguments.

    Raises `InputError` for anything else; names are resolved by `vcposim.catalogue`.
    """
    if isinstance(given, Estimator | FunctionEstimator):
        return given
    if isinstance(given, type):
        try:
            made = given()
        except (Exception, SystemExit) as error:
            raise InputError(
                f"estimator: {given.__name__}() raises {told(error)}; pass an instance of it, or name "
                f"one, as in mine = {given.__name__}(...)"
            ) from error
        return estimator_of(made)
    if not callable(given):
        if callable(getattr(given, "coefficients", None)):
            raise InputError(
                f"estimator: {type(given).__name__} has coefficients and is no vcposim.Estimator; derive it from that, "
                "or pass its method, as in mine.coefficients"
            )
        what = type(given).__name__ if type(given).__repr__ is object.__repr__ else shortened(given)
        raise InputError(
            f"estimator: {what} is no Estimator and no function of a Batch; give it __call__(self, batch), or another"
        )
    return FunctionEstimator(given, names_on(given, "needs"), bool(getattr(given, "exchangeable", False)))


def names_on(function: Any, what: str) -> frozenset[str]:
    """The names that a function says of itself in an attribute, as one string or several; none without it.

    Raises `InputError` for anything else.
    """
    said = getattr(function, what, ())
    names = [said] if isinstance(said, str) else said
    if not isinstance(names, Iterable) or not all(isinstance(x, str) for x in names):
        raise InputError(f"{what}: {said!r} is no name and no tuple of names; write it as {what} = ('one', 'two')")
    return frozenset(names)


def of_trajectories(batch: Batch) -> Batch:
    """A batch of tokens with one ratio a trajectory, the product of its tokens', and nothing else per token."""
    scale = LOG if batch.ratio is None else LINEAR
    ratio = at_level(batch, "sequence", scale)
    return replace(
        batch,
        **{"log_ratio" if batch.ratio is None else "ratio": ratio},
        scores=None if batch.scores is None else batch.scored(),
        length=batch.token_length(),
        token_mask=None,
        log_prob=None,
        collision=None,
        anchor_log_ratio=None,
    )


def require_group(group_size: int) -> None:
    """Refuse a group without samples."""
    if group_size < 1:
        raise InputError(f"group_size: {group_size} is not positive; use 1 or more")


def group_std(reward: Array, measure: Array) -> Array:
    """The group's population standard deviation sqrt(E[(R - E R)^2]): (..., n) -> (..., 1).

    Exactly 0 where all rewards are equal: rounding of their mean must not become an advantage of 1.
    """
    mean = expectation(reward, measure, keepdims=True)
    deviation = reward - mean
    std = namespace(reward).sqrt(expectation(deviation * deviation, measure, keepdims=True))
    return where(indistinguishable(std, abs(mean)), std * 0, std)


def whiten(x: Array, mass: Array, epsilon: float) -> Array:
    """(x - mean) / (std + epsilon) over all prompts and samples; mass sums to 1: (..., group, n), same -> same.

    0 where all are equal. REINFORCE++ (arXiv 2501.03262); the mean and the population std of the batch.
    """
    xp = namespace(x, mass)
    mean = xp.sum(x * mass, axis=(-2, -1), keepdims=True)
    deviation = x - mean
    std = xp.sqrt(xp.sum(deviation * deviation * mass, axis=(-2, -1), keepdims=True))
    flat = indistinguishable(std, xp.max(xp.where(mass > 0, abs(x), 0.0), axis=(-2, -1), keepdims=True))
    return where(flat, deviation * 0, deviation / where(flat, std * 0 + 1, std + epsilon))


def divided(advantage: Array, batch: Batch, *divisor: Array) -> Array:
    """A_i / d_i, or / (d_i d'_i): 0 where a divisor is: same -> same."""
    factor = batch.reward * 0 + 1
    for d in divisor:
        factor = safe_divide(factor, d, 0)
    return advantage * over_tokens(factor, advantage)


def whitened(advantage: Array, batch: Batch, epsilon: float, *, per_token: bool) -> Array:
    """`whiten` of advantages over all prompts, which count alike (per token, a response L times): same -> same."""
    batch.given("grouped")
    mass = batch.measure * batch.token_length() if per_token else batch.measure
    total = namespace(mass).sum(mass, axis=(-2, -1), keepdims=True)
    return whiten(advantage, safe_divide(mass, total, mass * 0), epsilon)


@dataclass(frozen=True)
class Normalizer:
    """What advantages are divided by: (A, batch, epsilon) -> A, and what is known of it."""

    function: Callable[[Array, Batch, float], Array]
    needs: frozenset[str] = frozenset()
    """what it needs of a batch, as `Estimator.needs` says it"""
    per_sample: bool = False
    """whether it looks at the sample alone"""
    centers: bool = False
    """whether it takes the mean out of the advantages, whatever the baseline"""
    per_response: bool = False
    """whether it takes one advantage a response, not one a token"""

    def __call__(self, advantage: Array, batch: Batch, epsilon: float) -> Array:
        """The advantages, normalized: (..., n) or (..., n, t), same -> same."""
        return self.function(advantage, batch, epsilon)


def _std(batch: Batch, epsilon: float) -> Array:
    return group_std(batch.reward, batch.measure) + epsilon


NORMALIZERS: dict[str, Normalizer] = {
    "none": Normalizer(lambda a, batch, epsilon: a, per_sample=True),
    # GRPO: the group's population standard deviation
    "group_std": Normalizer(lambda a, batch, epsilon: divided(a, batch, _std(batch, epsilon))),
    # 1/L, a mean over the tokens of a response
    "length": Normalizer(
        lambda a, batch, epsilon: divided(a, batch, batch.token_length()),
        needs=frozenset({"length"}),
        per_sample=True,
    ),
    "group_std_length": Normalizer(
        lambda a, batch, epsilon: divided(a, batch, _std(batch, epsilon), batch.token_length()),
        needs=frozenset({"length"}),
    ),
    # REINFORCE++: the whole batch's mean and standard deviation, per response or per token
    "whiten": Normalizer(
        lambda a, batch, epsilon: whitened(a, batch, epsilon, per_token=False),
        needs=frozenset({"grouped"}),
        centers=True,
        per_response=True,
    ),
    "whiten_token": Normalizer(
        lambda a, batch, epsilon: whitened(a, batch, epsilon, per_token=True),
        needs=frozenset({"grouped", "length"}),
        centers=True,
        per_response=True,
    ),
}
"""name -> normalizer; add one here and it is everywhere"""
