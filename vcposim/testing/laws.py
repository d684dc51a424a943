"""The laws that estimators obey, or claim to: what each says, who says so, and how it is tried.

A law is tried on one small case at a time (`testing.strategies`); `testing.kit` looks for a case that breaks it.
Every law compares the estimator with itself on a changed batch, or with exact arithmetic, never with another
implementation of the same formula; so it judges estimators nobody has written yet.

Coefficients are compared up to the rounding of the largest number in play, `ROUNDING` (float64), `SINGLE` (float32) or
`BRAIN` (bfloat16).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np
from hypothesis import strategies as st

from vcposim.batch import Batch
from vcposim.errors import InputError
from vcposim.estimators import Estimator, real, told
from vcposim.testing.strategies import (
    NUMPY,
    Arms,
    Case,
    Library,
    Strings,
    as_float,
    bandits,
    cases,
    exact,
    extreme_log_ratio,
    language_cases,
    log,
    nearly_equal,
    strings,
)
from vcposim.weights import Weighting


def as_numpy(x: Any) -> np.ndarray:
    """An array of any library as NumPy's: (...)."""
    return np.asarray(x.detach().cpu().numpy() if hasattr(x, "detach") else x)


Coefficients = Callable[[Batch], Any]
Given = st.SearchStrategy[Any]

ROUNDING = 2.0**20 * float(np.finfo(np.float64).eps)
"""relative difference, against the largest number in play, that is put down to float64 rounding:
enough for one division by an epsilon of 1e-4, as in GRPO's std, and far below any error of a formula"""

SINGLE = 2.0**15 * float(np.finfo(np.float32).eps)
"""the same for float32"""


BRAIN = 4 * 2.0**-6
"""the same for log-probabilities that bfloat16 held: below 8 nats it is off by up to 2^-6, half a last place"""


EXPLOSION = 10
"""how many times n and the largest reward a coefficient may be on policy; advantages in sds are at most sqrt(n - 1)"""


class Broken(Exception):
    """What a law saw instead of what it demands."""


@dataclass(frozen=True)
class Subject:
    """The estimator on trial."""

    name: str
    """as one would write it in a call"""
    coefficients: Coefficients
    needs: frozenset[str] = frozenset()
    """what it reads of a batch besides rewards and ratios, as `Estimator.needs` says it"""
    host: Coefficients | None = None
    """what it equals where pi = mu"""
    dominates: tuple[Coefficients, ...] = ()
    library: Library = NUMPY
    """the array library it works on"""
    settings: str = ""
    """the rest of the call that judged it, as one would write it"""

    def of(self, case: Case) -> np.ndarray:
        """Its coefficients on a case: (..., n), or (..., n, t)."""
        return self(case.batch(self.library))

    def __call__(self, batch: Batch) -> np.ndarray:
        """Its coefficients in NumPy: (..., n), or (..., n, t); a wrong shape, and an exception, break every law."""
        c = as_numpy(self.raw(batch))
        return c * 1.0 if c.dtype == bool else c

    def raw(self, batch: Batch) -> Any:
        """Its coefficients in its own library.

        Raises `Broken` for an exception, or a wrong shape; an `InputError` passes.
        """
        try:
            c = self.coefficients(batch)
        except InputError:
            raise  # a wrong question, not a wrong answer
        except (Exception, SystemExit) as error:
            raise Broken(f"it raised {told(error)}") from error
        if not hasattr(c, "shape"):
            raise Broken(f"it returned a {type(c).__name__}, not an array like batch.reward")
        got, want = tuple(np.shape(as_numpy(c))), tuple(batch.reward.shape)
        if got[: len(want)] != want or len(got) > len(want) + 1:
            raise Broken(f"coefficients of shape {got} for rewards of shape {want}")
        if not real(c, batch):
            raise Broken(f"coefficients of dtype {c.dtype}, which are no real numbers of 32 bits or more")
        ratios = tuple(batch.given_ratio.shape)
        if len(got) == len(ratios) > len(want) and got != ratios:
            raise Broken(f"coefficients of shape {got} for token ratios of shape {ratios}")
        return c

    @property
    def per_prompt(self) -> bool:
        """Whether it spans the prompts of a batch."""
        return "grouped" in self.needs

    @property
    def per_token(self) -> bool:
        """Whether it reads ratios, or policies, token by token."""
        return bool(self.needs & {"tokens", "log_prob", "collision", "anchor_log_ratio", "reference_log_ratio"})

    def cases(self, groups: int = 1, **kw: Any) -> Given:
        """Batches it can read."""
        lead = (groups,) if self.per_prompt or groups > 1 else ()
        found = language_cases(lead=lead, **kw) if self.per_token else cases(lead=lead, **kw)
        return found.map(lambda case: replace(case, grouped=self.per_prompt))


@dataclass(frozen=True)
class Wrong:
    """A wrong estimator, and with what `check_estimator` finds the law that it breaks."""

    coefficients: Coefficients
    needs: tuple[str, ...] = ()
    host: Estimator | None = None
    dominates: tuple[Estimator, ...] = ()
    convert: str | None = None
    without: tuple[str, ...] = ()
    """universal laws that it breaks too, or before"""


@dataclass(frozen=True)
class Law:
    """A property of estimators."""

    statement: str
    source: str
    given: Callable[[Subject], Given]
    """the cases to try it on"""
    check: Callable[[Subject, Any], None]
    """raises `Broken` on a case that breaks it"""
    wrong: Wrong
    """what dies by it: a law that rejects nothing is none"""
    universal: bool = False
    """whether every estimator must obey it, or only those that claim to"""
    fits: Callable[[Subject], bool] = lambda subject: True
    """whether it can be tried on this estimator at all"""
    otherwise: str = ""
    """where it does not fit: what is missing, and the remedy"""


def _same(got: np.ndarray, want: np.ndarray, size: float = 0.0, tolerance: float = ROUNDING) -> None:
    """Equality up to the rounding of numbers as large as the largest here, or `size`."""
    if got.shape != want.shape:
        raise Broken(f"shape {got.shape} instead of {want.shape}")
    largest = max(float(np.max(np.abs(want), initial=0.0)), size)
    with np.errstate(invalid="ignore"):
        near = np.abs(got - want) <= tolerance * largest
    if not np.all(near):
        raise Broken(f"expected {_short(want)}, got {_short(got)}")


def _short(x: np.ndarray) -> str:
    return np.array2string(np.asarray(x), precision=6, separator=", ", threshold=12).replace("\n", "")


def _size(subject: Subject, case: Case) -> float:
    """The largest coefficient that rewards of this size could have: what cancels to rounding."""
    w = as_float(case.ratio).reshape(*case.reward.shape, -1).prod(axis=-1).max()
    largest = 1.0 + float(np.abs(as_float(case.reward)).max())
    return max(float(w), 1.0) * largest + float(np.abs(subject.of(case)).max())


def _permutation(f: Subject, case: Case) -> None:
    order = [*range(1, case.size), 0]
    moved, c = f.of(case.take(order)), f.of(case)
    _same(moved, np.take(c, order, axis=case.reward.ndim - 1), _size(f, case))


def _groups(f: Subject, case: Case) -> None:
    together = f.of(case)
    for row, group in zip(together, case.groups(), strict=True):
        _same(row, f.of(group), _size(f, group))


def _padding(f: Subject, case: Case) -> None:
    keep = list(range(case.size - 1))
    mask = exact(np.ones(case.reward.shape, dtype=int))
    mask[..., -1] = Fraction(0)
    alone = case.take(keep)
    padded = f.of(replace(case, sample_mask=mask))
    _same(np.take(padded, keep, axis=case.reward.ndim - 1), f.of(alone), _size(f, case))


def _token_mask(f: Subject, case: Case) -> None:
    hidden: Any = 1 - case.token_mask  # type: ignore[operator]
    changed = replace(case, ratio=case.ratio * (1 + 976 * hidden), score=case.score + 31 * hidden[..., None])
    real = as_float(case.token_mask)  # type: ignore[arg-type]
    c, want = f.of(changed), f.of(case)
    real = real if c.ndim > case.reward.ndim else real.max(axis=-1)
    _same(c * real, want * real, _size(f, case))


def _finite(f: Subject, case: Case) -> None:
    c = f.of(case)
    if not np.all(np.isfinite(c)):
        raise Broken(f"got {_short(c)}")


def _deterministic(f: Subject, case: Case) -> None:
    batch = case.batch(f.library)
    before = {name: np.array(as_numpy(getattr(batch, name))) for name in ("reward", "log_ratio", "measure")}
    first, second = f(batch), f(batch)
    if not np.array_equal(first, second, equal_nan=True):
        raise Broken(f"first {_short(first)}, then {_short(second)}")
    for name, value in before.items():
        if not np.array_equal(value, as_numpy(getattr(batch, name))):
            raise Broken(f"it wrote into batch.{name}")


def _float32(f: Subject, case: Case) -> None:
    _same(f(case.batch(_single(f.library))), f.of(case), _size(f, case), SINGLE)


def _bfloat16(f: Subject, case: Case) -> None:
    # what a bfloat16 model leaves: two rounded log-probabilities, widened, then subtracted; `Batch` refuses less
    plain = case.batch(NUMPY)
    behavior = np.full(plain.given_ratio.shape, np.float32(-3.3))
    target = (behavior + plain.given_ratio).astype(np.float32)
    seen = f.library.convert(bfloat16(target) - bfloat16(behavior))
    rounded = case.batch(_single(f.library, bfloat16), log_ratio=seen)
    _same(f(rounded), f.of(case), _size(f, case), BRAIN)


def _single(library: Library, rounded: Callable[[np.ndarray], np.ndarray] = np.asarray) -> Library:
    return Library("float32", lambda x: library.convert(rounded(np.asarray(x, dtype=np.float32))))


def bfloat16(x: np.ndarray) -> np.ndarray:
    """float32 numbers rounded to the nearest bfloat16 (ties to even), kept as float32: same -> same."""
    bits = np.ascontiguousarray(x).view(np.uint32).astype(np.uint64)
    kept = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return np.where(np.isfinite(x), kept.astype(np.uint32).view(np.float32).reshape(x.shape), x)


def _one_token(f: Subject, case: Case) -> None:
    one = replace(case, length=case.length * 0 + 1)
    tokens = replace(one, ratio=one.ratio[..., None], score=one.score[..., None, :])
    c = f.of(tokens)
    _same(c[..., 0] if c.ndim > case.reward.ndim else c, f.of(one), _size(f, case))


def _levels(f: Subject, case: Case) -> None:
    real: Any = case.token_mask
    if f.per_token:
        # every trajectory one token, whose ratio is their product: nothing else a sequence weight reads

        def product(x: Any) -> Any:
            return None if x is None else np.where(real > 0, x, exact(1)).prod(axis=-1, keepdims=True)

        merged = replace(
            case,
            ratio=product(case.ratio),
            token_probability=product(case.token_probability),
            anchor_ratio=product(case.anchor_ratio),
            score=case.score.sum(axis=-2, keepdims=True),
            token_mask=real[..., :1] * 0 + 1,
            length=case.length * 0 + 1,
        )
        c, want = f.of(case), f.of(merged)
        want = want if want.ndim > case.reward.ndim else want[..., None]
        _same(over_tokens(c, case), want * as_float(real), _size(f, merged))
        return
    whole = replace(
        case,
        ratio=(case.ratio * real + 1 - real).prod(axis=-1),
        score=case.score.sum(axis=-2),
        length=real.sum(axis=-1),
        token_mask=None,
    )
    _same(f.of(case), f.of(whole), _size(f, whole))


def _nan(f: Subject, case: Case) -> None:
    x = log(case.ratio)

    def first_with(value: float) -> float:
        changed = x.copy()
        changed[(0,) * x.ndim] = value
        c = f.of(replace(case, log_ratio=changed))
        return float(c[(0,) * c.ndim])

    try:
        made_up = first_with(float("nan"))
    except (Broken, InputError):
        return  # it says so aloud
    if made_up == 0 or not np.isfinite(made_up):
        return
    known = {value: first_with(value) for value in (-3.0, -0.5, 0.0, 0.5, 3.0)}
    if any(c != made_up for c in known.values()):
        like = ", ".join(f"{value:g} gives {c:.6g}" for value, c in known.items())
        raise Broken(f"with NaN for the first log-ratio its coefficient is {made_up:.6g}; {like}")


def _bounded(f: Subject, case: Case) -> None:
    anchor = None if case.anchor_ratio is None else case.anchor_ratio * 0 + 1
    c = f.of(replace(case, ratio=case.ratio * 0 + 1, anchor_ratio=anchor))
    most = EXPLOSION * case.size * max(1.0, float(np.abs(as_float(case.reward)).max()))
    if not np.all(np.abs(c) <= most):
        raise Broken(f"got {_short(c)} on policy, beyond {most:.4g}")


def _no_leak(f: Subject, case: Case) -> None:
    still = case.batch(f.library)
    log_prob = f.library.floats(np.full(still.given_ratio.shape, -1.0)).requires_grad_()
    batch = replace(still, log_ratio=still.given_ratio + log_prob + 1)
    c = f.raw(batch)
    level = c if c.ndim == log_prob.ndim else c[..., None] if c.ndim < log_prob.ndim else c[..., 0]
    batch.on_tokens(level * log_prob).sum().backward()
    _same(as_numpy(log_prob.grad), as_numpy(batch.on_tokens(level + 0 * log_prob)), _size(f, case))


def _shift(f: Subject, case: Case) -> None:
    moved = replace(case, reward=case.reward + 3)
    _same(f.of(moved), f.of(case), _size(f, moved))


def _reward_scale(f: Subject, case: Case) -> None:
    scaled = replace(case, reward=case.reward * 4)
    _same(f.of(scaled), 4 * f.of(case), _size(f, scaled))


def _weight_scale(f: Subject, case: Case) -> None:
    scaled = replace(case, ratio=case.ratio * 4)
    _same(f.of(scaled), 4 * f.of(case), _size(f, scaled))


def _lag_zero(f: Subject, case: Case) -> None:
    assert f.host is not None
    anchor = None if case.anchor_ratio is None else case.anchor_ratio * 0 + 1
    fresh = replace(case, ratio=case.ratio * 0 + 1, anchor_ratio=anchor)
    c, want = f.of(fresh), replace(f, coefficients=f.host).of(fresh)
    if case.token_mask is not None:
        c, want = (over_tokens(x, case) for x in (c, want))
    _same(c, want, _size(f, fresh))


def over_tokens(c: np.ndarray, case: Case) -> np.ndarray:
    """Coefficients (..., n) or (..., n, t) as what multiplies each real token's score: (..., n, t)."""
    mask = as_float(case.token_mask)  # type: ignore[arg-type]
    return (c if c.ndim > case.reward.ndim else c[..., None]) * mask


def _unbiased(f: Subject, problem: Arms | Strings) -> None:
    largest = 1.0 + float(np.abs(as_float(problem.reward)).max())
    for n in (2,) if isinstance(problem, Strings) or len(problem.target) > 2 else (2, 3):
        if isinstance(problem, Strings):
            batch, probability = problem.all_batches(n, f.library, per_token=f.per_token, grouped=f.per_prompt)
        else:
            batch, probability = problem.all_batches(n, f.library)
        score = as_numpy(batch.scored().score)  # type: ignore[attr-defined]
        c, chance = f(batch), np.asarray(as_numpy(probability), dtype=float)
        mass = as_numpy(batch.measure) * chance.reshape(-1, *[1] * (batch.reward.ndim - 1))
        c, mass = (x.reshape(*x.shape, *[1] * (score.ndim - x.ndim)) for x in (c, mass))
        term = (c * mass * score).reshape(-1, score.shape[-1])
        size = float(np.abs(term).sum()) + largest * float(np.abs(mass * score).sum())
        _same(term.sum(axis=0), as_float(problem.gradient), size)


def _variance(f: Coefficients, bandit: Arms, library: Library) -> float:
    batch = bandit.population(library, length=library(exact(np.ones(len(bandit.target), dtype=int))))
    x = as_numpy(f(batch))[:, None] * as_float(bandit.score)
    m = as_float(bandit.behavior)[:, None]
    mean = (m * x).sum(axis=0)
    return float((m * (x - mean) ** 2).sum())


def _no_more_than(f: Subject, bandit: Arms, rivals: dict[str, Coefficients]) -> None:
    mine = _variance(f.raw, bandit, f.library)
    w, norm = as_float(bandit.ratio), (as_float(bandit.score) ** 2).sum(axis=-1)
    noise = ROUNDING * float((as_float(bandit.behavior) * w * w * norm).sum() * (1 + np.abs(bandit.reward).max()) ** 2)
    for name, rival in rivals.items():
        other = _variance(rival, bandit, f.library)
        if not mine <= other + noise:
            raise Broken(f"variance {mine:.6g}, but {other:.6g} with {name}")


def _least_variance(f: Subject, bandit: Arms) -> None:
    baselines: tuple[str | float, ...] = (0, 0.5, -1, "group_mean", "on_policy_optimal")
    _no_more_than(f, bandit, {f"baseline {b}": Estimator(baseline=b).coefficients for b in baselines})


def _dominance(f: Subject, bandit: Arms) -> None:
    _no_more_than(f, bandit, {f"number {k + 1} of `dominates`": rival for k, rival in enumerate(f.dominates)})


def _one_group(f: Subject) -> Given:
    return f.cases()


def _extreme(f: Subject) -> Given:
    def with_extremes(case: Case) -> Given:
        return extreme_log_ratio(case.ratio.size).map(lambda x: replace(case, log_ratio=x.reshape(case.ratio.shape)))

    return f.cases().flatmap(with_extremes)


def _small_bandits(f: Subject) -> Given:
    return bandits(largest=3)


def _small_problems(f: Subject) -> Given:
    return _small_bandits(f) if _reads_bandits(f) else strings()


def _near_ties(f: Subject) -> Given:
    return f.cases(smallest=3).flatmap(nearly_equal)


def _reads_bandits(f: Subject) -> bool:
    return not f.per_token and not f.per_prompt


# --- a wrong estimator for each law -----------------------------------------------------------------------------------


def _weight(batch: Any) -> Any:
    return np.exp(np.minimum(batch.log_ratio, 300))


def _mean(x: Any) -> Any:
    return x.mean(axis=-1, keepdims=True)


def _leave_one_out_that_includes_itself(batch: Any) -> Any:
    return _weight(batch) * (batch.reward - _mean(batch.reward))


def _no_baseline(batch: Any) -> Any:
    return _weight(batch) * batch.reward


def _clipped_advantage(batch: Any) -> Any:
    return np.clip(batch.reward - _mean(batch.reward), -1, 1)


def _advantage_normalized_after_weighting(batch: Any) -> Any:
    c = _weight(batch) * (batch.reward - _mean(batch.reward))
    return c / (np.abs(c).sum(axis=-1, keepdims=True) + 1e-300)


def _not_the_host_at_lag_zero(batch: Any) -> Any:
    return _weight(batch) * batch.reward + 0.01


def _token_for_sequence_level(batch: Any) -> Any:
    ratio = np.exp(np.minimum(batch.log_ratio, 300))
    weight = ratio.mean(axis=-1) if ratio.ndim > batch.reward.ndim else ratio**2
    return weight * batch.reward


def _padded_tokens_count(batch: Any) -> Any:
    """The sum runs over padding too, so token ratios are not their trajectory's."""
    log_w = batch.log_ratio if batch.log_ratio.ndim == batch.reward.ndim else batch.log_ratio.sum(axis=-1)
    return np.exp(np.minimum(log_w, 300)) * batch.reward


def _weight_not_detached(batch: Any) -> Any:
    weight = batch.log_ratio.clamp(max=40).exp()
    return weight * (batch.reward - batch.reward.mean(-1, keepdim=True))


def _mean_baseline_called_optimal(batch: Any) -> Any:
    return _weight(batch) * (batch.reward - (batch.measure * batch.reward).sum(-1, keepdims=True))


def _first_sample_as_baseline(batch: Any) -> Any:
    return _weight(batch) * (batch.reward - batch.reward[..., :1])


def _mean_of_all_prompts(batch: Any) -> Any:
    return _weight(batch) * (batch.reward - batch.reward.mean())


def _token_mask_forgotten(batch: Any) -> Any:
    return np.exp(np.minimum(batch.log_ratio.sum(axis=-1), 300)) * batch.reward


def _plain_exp(batch: Any) -> Any:
    return np.exp(batch.log_ratio) * (batch.reward - _mean(batch.reward))


def _nan_means_on_policy(batch: Any) -> Any:
    return np.exp(np.minimum(np.nan_to_num(batch.log_ratio, nan=0.0), 300)) * batch.reward


def _std_of_the_others(batch: Any) -> Any:
    """Leave-one-out mean over leave-one-out std in float32, guarded by std > 0 (NeMo-RL#4161)."""
    x = batch.reward.astype(np.float32)
    others = x.shape[-1] - 1
    total, squares = x.sum(-1, keepdims=True), (x * x).sum(-1, keepdims=True)
    center = (total - x) / max(others, 1)
    std = np.sqrt(np.maximum((squares - x * x) / max(others, 1) - center * center, 0))
    return np.where(std > 0, (x - center) / np.where(std > 0, std, 1), 0.0).astype(float)


def _float64_constants(batch: Any) -> Any:
    return batch.reward + batch.reward.dtype.itemsize / 8


def _sharpened(batch: Any) -> Any:
    """A temperature on the wrong side: w^64 for w^(1/64)."""
    return np.exp(np.minimum(64 * batch.log_ratio, 80)) * batch.reward


def _writes_into_the_batch(batch: Any) -> Any:
    batch.reward[...] = batch.reward - _mean(batch.reward)
    return _weight(batch) * batch.reward


LAWS: dict[str, Law] = {
    "unbiased": Law(
        "E[(1/n) sum c s] over every batch of n draws is the exact gradient",
        source="claims C2 and C7",
        given=_small_problems,
        check=_unbiased,
        wrong=Wrong(_leave_one_out_that_includes_itself),
    ),
    "shift": Law(
        "c(R + d) = c(R): only differences of rewards matter",
        source="baselines (Williams 1992)",
        given=_one_group,
        check=_shift,
        wrong=Wrong(_no_baseline),
    ),
    "reward_scale": Law(
        "c(k R) = k c(R)",
        source="linearity in the reward",
        given=_one_group,
        check=_reward_scale,
        wrong=Wrong(_clipped_advantage),
    ),
    "weight_scale": Law(
        "c(k w) = k c(w): baseline and normalizer do not see the scale of the weights",
        source="claim C3",
        given=_one_group,
        check=_weight_scale,
        wrong=Wrong(_advantage_normalized_after_weighting),
    ),
    "lag_zero": Law(
        "where pi = mu it is its on-policy host",
        source="an off-policy correction corrects nothing on policy",
        given=_one_group,
        check=_lag_zero,
        fits=lambda f: f.host is not None,
        otherwise="it needs the on-policy estimator to compare with; name one as host",
        wrong=Wrong(_not_the_host_at_lag_zero, host=Estimator(Weighting("none"))),
    ),
    "one_token": Law(
        "trajectories of one token have one level: token ratios and trajectory ratios agree",
        source="w = prod_t r_t",
        given=_one_group,
        check=_one_token,
        fits=lambda f: not f.per_token,
        otherwise="it compares token with trajectory ratios, and this reads token ratios alone; claim levels instead",
        wrong=Wrong(_token_for_sequence_level),
    ),
    "levels": Law(
        "token ratios give what their product gives: one coefficient a trajectory",
        source="w = prod_t r_t; masked tokens are none of them",
        given=lambda f: f.cases() if f.per_token else f.cases(per_token=True),
        check=_levels,
        wrong=Wrong(_padded_tokens_count, without=("padding",)),
    ),
    "no_leak": Law(
        "the gradient of sum c log pi is c: it flows through log pi only, not through the weights",
        source="a coefficient is a constant of the loss (llm_bridge.loss detaches it, your own loss may not)",
        given=_one_group,
        check=_no_leak,
        fits=lambda f: hasattr(f.library.floats(0.0), "requires_grad"),
        otherwise="it follows gradients, and these arrays have none; judge it on torch's (convert='torch')",
        wrong=Wrong(_weight_not_detached, convert="torch", without=("padding",)),
    ),
    "least_variance": Law(
        "no constant baseline has less variance per sample, in the population",
        source="claim C6 (arXiv 2602.17616)",
        given=_small_bandits,
        check=_least_variance,
        fits=_reads_bandits,
        otherwise="it is tried on bandits, where trajectories have one ratio and prompts stand alone; drop the claim",
        wrong=Wrong(_mean_baseline_called_optimal),
    ),
    "dominance": Law(
        "its variance per sample, in the population, is no larger than that of what it dominates",
        source="claim C6",
        given=_small_bandits,
        check=_dominance,
        fits=lambda f: bool(f.dominates) and _reads_bandits(f),
        otherwise="it needs rivals to compare with (dominates), on bandits: trajectories of one ratio, one prompt",
        wrong=Wrong(_mean_baseline_called_optimal, dominates=(Estimator(baseline="opob"),)),
    ),
    "permutation": Law(
        "permuting the samples permutes the coefficients",
        source="draws are exchangeable",
        universal=True,
        given=_one_group,
        check=_permutation,
        wrong=Wrong(_first_sample_as_baseline),
    ),
    "groups": Law(
        "a group's coefficients are those it has alone",
        source="prompts are independent (GRPO, arXiv 2402.03300)",
        universal=True,
        given=lambda f: f.cases(groups=2, largest=2),
        check=_groups,
        fits=lambda f: not f.per_prompt,
        otherwise="it spans prompts, as its need of `grouped` says; drop the claim",
        wrong=Wrong(_mean_of_all_prompts),
    ),
    "padding": Law(
        "a sample of measure 0 changes nothing, whatever it holds",
        source="the measure of padding (vcposim.arrays)",
        universal=True,
        given=lambda f: f.cases(smallest=3),
        check=_padding,
        wrong=Wrong(_leave_one_out_that_includes_itself),
    ),
    "token_mask": Law(
        "masked tokens change nothing, whatever they hold",
        source="token_mask (vcposim.batch)",
        universal=True,
        given=_one_group,
        check=_token_mask,
        fits=lambda f: f.per_token,
        otherwise="it hides tokens, and this reads one ratio a trajectory; if it reads tokens, pass needs=['tokens']",
        wrong=Wrong(_token_mask_forgotten, needs=("tokens",)),
    ),
    "finite": Law(
        "log-ratios of +-10^4 and -inf give finite coefficients",
        source="claim C18",
        universal=True,
        given=_extreme,
        check=_finite,
        wrong=Wrong(_plain_exp, without=("padding",)),
    ),
    "nan": Law(
        "a log-ratio that is NaN gives NaN, 0 or an error, unless no log-ratio matters: nothing is made up for it",
        source="a brake fails closed; frameworks that read NaN as a ratio of 1 train on what they do not know",
        universal=True,
        given=_one_group,
        check=_nan,
        wrong=Wrong(_nan_means_on_policy),
    ),
    "bounded": Law(
        f"on policy, rewards that differ by 1e-4 give no coefficient above {EXPLOSION} n max(1, |R|)",
        source="a spread left of nearly equal rewards is noise; the population std bounds it by sqrt(n - 1)",
        universal=True,
        given=_near_ties,
        check=_bounded,
        wrong=Wrong(_std_of_the_others, without=("permutation", "groups", "padding")),
    ),
    "float32": Law(
        "float32 gives the same up to its rounding",
        source="claim C18",
        universal=True,
        given=_one_group,
        check=_float32,
        wrong=Wrong(_float64_constants, without=("padding",)),
    ),
    "bfloat16": Law(
        "log-probabilities and rewards that were rounded to bfloat16 change it by at most 6% of the largest number",
        source="claim C18: log-probabilities of a bfloat16 model",
        universal=True,
        given=_one_group,
        check=_bfloat16,
        wrong=Wrong(_sharpened),
    ),
    "deterministic": Law(
        "two calls agree, and leave the batch alone",
        source="an estimator is a function",
        universal=True,
        given=_one_group,
        check=_deterministic,
        wrong=Wrong(_writes_into_the_batch, without=("padding",)),
    ),
}
"""name -> law; the claims first, as they are tried first"""
