"""Every named estimator: formula, when it is unbiased, what it is at lag 0, and whom to cite.

This is the one place where a name becomes an estimator. Two shipped variants of one name are two entries with distinct
names. Rivals share the plain host `R - group mean`, without std or 1/L, so that differences come from the ratio alone;
put one on another host with `dataclasses.replace(entry(name).estimator, baseline="leave_one_out")`.

To add one, write its gradient coefficient and an `Entry`. Say a rival takes the factor min(w, 1), squared where the
advantage is negative. The ratio treatment alone would be a `Weighting`; as it looks at the advantage, it is a
`Surrogate`:

>>> from vcposim.arrays import namespace
>>> from vcposim.surrogates import ratio_at
>>> @dataclass(frozen=True)
... class HarshOnNegatives:
...     needs = ()  # no optional field of the batch
...     def __call__(self, batch, advantage):
...         w, scale = ratio_at(batch, "sequence")
...         xp = namespace(w)
...         truncated = scale.value(xp.minimum(w, scale.write(1)), batch.measure)
...         return xp.where(advantage < 0, truncated * truncated, truncated)
>>> mine = Entry(
...     estimator=Estimator(Weighting("none"), baseline="group_mean", surrogate=HarshOnNegatives()),
...     formula="min(w, 1) (R - mean), min(w, 1)^2 (R - mean) for R < mean",
...     unbiased=Unbiased.ON_POLICY_SHRUNK,
...     references=("reinforce",),
...     host=Estimator(Weighting("none"), baseline="group_mean"),
... )
>>> import numpy as np
>>> from vcposim.batch import Batch
>>> batch = Batch(reward=np.array([1.0, 0.0, 1.0, 0.0]), log_ratio=np.log([0.5, 0.5, 1.0, 2.0]))
>>> mine.estimator.coefficients(batch)
array([ 0.25 , -0.125,  0.5  , -0.5  ])
>>> mine.shift_invariant, sorted(mine.estimator.needs)
(True, [])

In the table below under its name, the command line lists it, the experiments run it, and every test of the catalogue is
a test of it: host at lag 0, bias by enumeration, shift invariance, needs, padding, overflow, libraries, references. (A
test pastes this very example there.)
"""

from dataclasses import dataclass
from enum import StrEnum

from vcposim.baselines import baseline
from vcposim.catalogue.references import bibtex
from vcposim.errors import InputError, unknown_name
from vcposim.estimators import NORMALIZERS, Estimator
from vcposim.gauges.tails import pareto_smooth
from vcposim.pooled import (
    BalancedClip,
    CovarianceClip,
    CovariancePenalty,
    EssCap,
    GroupExpectation,
    InfluenceCap,
    LengthPower,
    MedianDeviation,
    SuccessRate,
)
from vcposim.prefixes import KalmanClip, LargestK3, LeastPrefix, PrefixBudget, PrefixClip
from vcposim.second_moment import SecondMomentClip, SecondMomentMask, SecondMomentMaskAnySign
from vcposim.surrogates import (
    Clip,
    DecoupledClip,
    DivergenceDamping,
    DivergenceMask,
    GammaShape,
    GaussianTrust,
    GeometricMeanClip,
    LoglinearAnchor,
    NegativeSequenceMask,
    ProbabilityBand,
    Product,
    ProductOfTruncated,
    QuadraticPull,
    Reject,
    SigmoidGate,
    SignedTruncation,
    Surrogate,
    TaperNegatives,
    Tempered,
    TotalVariationFilter,
)
from vcposim.weights import TREATMENTS, Weighting


class Unbiased(StrEnum):
    """When the mean of an estimator is the gradient; `Entry.why` says why not more often."""

    ALWAYS = "always"
    ON_POLICY = "only on policy (pi = mu)"
    ON_POLICY_SHRUNK = "only on policy (pi = mu), direction only: the mean is (1 - 1/n) times the gradient"
    """what a rival that is `dr_grpo` at lag 0 can claim"""
    CONSISTENT = "as n grows"
    NEVER = "never"


FAMILIES = {
    "on_policy": "uses no ratio pi/mu in a weight",
    "weighted": "a weight, which is a function of the ratio alone, before the advantage",
    "surrogate": "a factor that looks at the advantage, or at other tokens, too",
    "token": "reads ratios of tokens",
    "sequence": "reads ratios of trajectories",
    "unbiased": "its mean is the gradient at any lag",
    "importance": "the ratio itself, as it is or divided by its mean",
    "truncate": "a ratio, or a response's pull, held at a bound",
    "clip": "a gate that closes where the step would carry a ratio further out (PPO and its descendants)",
    "mask": "tokens or responses dropped whole",
    "soft": "a smooth function of the ratio instead of a bound",
    "pull": "a penalty that draws the policy towards another one",
    "pooled": "a bound or weight that depends on all tokens or responses of the batch",
    "baseline": "subtracts something else than the group's mean, or nothing where the formula has a mean",
    "normalizer": "divides by a spread, a length, a success rate",
}
"""what `vcposim catalogue --family` can ask for; several narrow the list down"""

WEIGHTED: dict[str, tuple[str, ...]] = {
    "importance": ("importance",),
    "self_normalize": ("importance", "pooled"),
    "truncate": ("truncate",),
    "clip": ("truncate",),
    "mask": ("mask",),
    "pareto_smooth": ("truncate", "pooled"),
}
"""treatment of the ratio -> families; `none` has none, surrogates say theirs"""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A named estimator with what is known about it."""

    estimator: Estimator
    formula: str
    """the coefficient on grad log pi(tau_i)"""
    unbiased: Unbiased
    """when its mean is the gradient"""
    references: tuple[str, ...]
    """keys of `vcposim.catalogue.references.SOURCES`"""
    host: Estimator | None = None
    """the estimator without ratios that it equals where pi = mu; None where it has no ratios, or `note` says why"""
    why: str = ""
    """why it is not unbiased more often, or of which objective's gradient"""
    breaks: tuple[str, ...] = ()
    """universal laws of `vcposim.testing` that the formula of its source breaks; `note` says how"""
    note: str = ""
    """what sets it apart from its source, its host, or others of its name"""

    @property
    def validity(self) -> str:
        """When it is unbiased, and why not more often, in words."""
        return f"{self.unbiased.value} ({self.why})" if self.why else self.unbiased.value

    @property
    def families(self) -> tuple[str, ...]:
        """The names of `FAMILIES` it belongs to, read off its parts: what a part does, the part itself says."""
        e = self.estimator
        kind = (
            "surrogate" if e.surrogate is not None else "on_policy" if e.weighting.treatment == "none" else "weighted"
        )
        found = [kind, "token" if "tokens" in e.needs else "sequence"]
        found += WEIGHTED.get(e.weighting.treatment, ())
        found += getattr(e.surrogate, "families", ())
        found += ["baseline"] if e.baseline not in ("zero", "group_mean") or e.baseline_shift else []
        found += ["normalizer"] if e.normalizer != "none" else []
        found += ["pull"] if e.reference_penalty else []
        found += ["unbiased"] if self.unbiased is Unbiased.ALWAYS else []
        return tuple(dict.fromkeys(found))

    @property
    def shift_invariant(self) -> bool:
        """Whether adding a constant to all rewards changes nothing."""
        e = self.estimator
        if getattr(e.surrogate, "reads_rewards", False):
            return False
        moves = isinstance(e.baseline, str) and baseline(e.baseline).equivariant
        return moves or NORMALIZERS[e.normalizer].centers


def weighting(
    treatment: str, *, level: str = "sequence", cap: float | None = None, floor: float | None = None
) -> Weighting:
    """The weighting of a name, kernel treatments and Pareto smoothing alike.

    Raises `InputError` for unknown names and missing limits.
    """
    if treatment == "pareto_smooth":
        if level == "token":
            raise InputError("level: pareto_smooth works on trajectories; use --level sequence or geometric")
        return Weighting(treatment, level, smooth=pareto_smooth)
    if treatment not in TREATMENTS:
        raise unknown_name("weighting", treatment, WEIGHTINGS)
    return Weighting(treatment, level, cap=cap, floor=floor)


WEIGHTINGS = (*TREATMENTS, "pareto_smooth")
"""every treatment that `weighting` knows"""

_NONE, _FULL = Weighting("none"), Weighting("importance")
_TIS, _TOKEN_TIS = Weighting("truncate", cap=8.0), Weighting("truncate", "token", cap=2.0)
_VCPO = ("vcpo", "opob_contextual_bandit", "opob_pgpe")
_HOST, _OPTIMAL = Estimator(_NONE, baseline="group_mean"), Estimator(_NONE, baseline="on_policy_optimal")
_PER_TOKEN = Estimator(_NONE, baseline="group_mean", normalizer="length")


def _gated(
    *, surrogate: Surrogate, formula: str, references: tuple[str, ...], note: str = "", host: Estimator | None = _HOST
) -> Entry:
    """An entry whose surrogate stands before R - mean."""
    return Entry(
        estimator=Estimator(_NONE, baseline="group_mean", surrogate=surrogate),
        formula=formula,
        unbiased=Unbiased.ON_POLICY_SHRUNK if host is _HOST else Unbiased.NEVER,
        references=references,
        host=host,
        note=note,
    )


CATALOGUE: dict[str, Entry] = {
    "reinforce": Entry(
        estimator=Estimator(weighting=_NONE), formula="R", unbiased=Unbiased.ON_POLICY, references=("reinforce",)
    ),
    "grpo": Entry(
        estimator=Estimator(weighting=_NONE, baseline="group_mean", normalizer="group_std", epsilon=1e-4),
        formula="(R - mean) / (std + 1e-4), population std",
        unbiased=Unbiased.NEVER,
        why="std depends on the sample",
        references=("grpo",),
    ),
    "grpo_length": Entry(
        estimator=Estimator(weighting=_NONE, baseline="group_mean", normalizer="group_std_length", epsilon=1e-4),
        formula="(R - mean) / (std + 1e-4) / L",
        unbiased=Unbiased.NEVER,
        why="std depends on the sample, 1/L on the trajectory",
        references=("grpo",),
        note="GRPO with its mean over the tokens of a response",
    ),
    "dr_grpo": Entry(
        estimator=Estimator(weighting=_NONE, baseline="group_mean"),
        formula="R - mean",
        unbiased=Unbiased.ON_POLICY_SHRUNK,
        references=("dr_grpo",),
    ),
    "rloo": Entry(
        estimator=Estimator(weighting=_NONE, baseline="leave_one_out"),
        formula="R - mean of the others",
        unbiased=Unbiased.ON_POLICY,
        references=("rloo",),
    ),
    "opo": Entry(
        estimator=Estimator(weighting=_NONE, baseline="length_weighted"),
        formula="R - sum L R / sum L",
        unbiased=Unbiased.NEVER,
        why="in-batch; bias O(1/n)",
        references=("opo",),
    ),
    "on_policy_optimal": Entry(
        estimator=Estimator(weighting=_NONE, baseline="on_policy_optimal"),
        formula="R - sum ||s||^2 R / sum ||s||^2",
        unbiased=Unbiased.NEVER,
        why="in-batch; bias O(1/n)",
        references=("weaver_tao", "greensmith"),
    ),
    "reinforce_plus_plus": Entry(
        estimator=Estimator(weighting=_NONE, baseline="zero", normalizer="whiten", epsilon=1e-8),
        formula="(R - batch mean) / (batch std + 1e-8)",
        unbiased=Unbiased.NEVER,
        why="mean and std depend on the sample",
        references=("reinforce_plus_plus",),
    ),
    "reinforce_plus_plus_baseline": Entry(
        estimator=Estimator(weighting=_NONE, baseline="group_mean", normalizer="whiten", epsilon=1e-8),
        formula="(R - mean) / (batch std of R - mean + 1e-8)",
        unbiased=Unbiased.NEVER,
        why="mean and std depend on the sample",
        references=("reinforce_plus_plus",),
    ),
    "reinforce_plus_plus_token": Entry(
        estimator=Estimator(weighting=_NONE, baseline="zero", normalizer="whiten_token", epsilon=1e-8),
        formula="(R - mean over tokens) / (std over tokens + 1e-8)",
        unbiased=Unbiased.NEVER,
        why="long responses weigh more in the mean",
        references=("reinforce_plus_plus",),
        note="as verl whitens, over all tokens of the batch; up to the Bessel factor of its std",
    ),
    "reinforce_plus_plus_baseline_token": Entry(
        estimator=Estimator(weighting=_NONE, baseline="group_mean", normalizer="whiten_token", epsilon=1e-8),
        formula="R - mean, then whitened over all tokens of the batch",
        unbiased=Unbiased.NEVER,
        why="long responses weigh more in the mean",
        references=("reinforce_plus_plus",),
        note="as verl whitens, over all tokens of the batch; up to the Bessel factor of its std",
    ),
    "shrinkage": Entry(
        estimator=Estimator(weighting=_NONE, baseline="shrinkage"),
        formula="R - (1 - lam) mean of the others - lam mean of the other prompts",
        unbiased=Unbiased.ON_POLICY,
        references=("shrinkage",),
        note="leave-one-out at both levels, lam from the other prompts; rloo for a batch of one prompt",
    ),
    "shrinkage_in_sample": Entry(
        estimator=Estimator(weighting=_NONE, baseline="shrinkage_in_sample"),
        formula="R - (1 - lam) mean - lam batch mean, lam = error / (error + spread of means)",
        unbiased=Unbiased.NEVER,
        why="in-batch; bias O(1/n)",
        references=("shrinkage",),
        note="the same idea without leaving anything out",
    ),
    "asymre": Entry(
        estimator=Estimator(weighting=_NONE, baseline="group_mean", baseline_shift=-0.1),
        formula="R - (mean - 0.1)",
        unbiased=Unbiased.ON_POLICY_SHRUNK,
        references=("asymre",),
        note="lag 0: dr_grpo plus 0.1 s, of mean zero; -0.1 is in units of reward, for rewards in {0, 1}",
    ),
    "tba": Entry(
        estimator=Estimator(weighting=_NONE, baseline="group_mean", reference_penalty=0.01),
        formula="R' - mean R', R' = R - beta log pi/reference, beta = 0.01",
        unbiased=Unbiased.ON_POLICY_SHRUNK,
        why="of the KL-regularized objective",
        references=("tba",),
        note="VarGrad trajectory balance: its squared loss has this gradient times 2 / beta; beta is ours, to be tuned",
    ),
    "on_policy_optimal_leave_one_out": Entry(
        estimator=Estimator(weighting=_NONE, baseline="opob_leave_one_out"),
        formula="R - sum of the others' ||s||^2 R / sum of their ||s||^2",
        unbiased=Unbiased.ON_POLICY,
        references=("weaver_tao", "greensmith"),
    ),
    "otb_on_policy": Entry(
        estimator=Estimator(weighting=_NONE, baseline="otb"),
        formula="R - B_t, B_t = sum_i W_it R / sum_i W_it, W_it = sum_{j<=t} (1 - 2 pi(y_j) + sum_v pi(v)^2)",
        unbiased=Unbiased.NEVER,
        why="in-batch; bias O(1/n)",
        references=("otb",),
        note="the tail of the longest response gets no gradient: alone, it is its own baseline; verl's "
        "handle_zero_tail=False, but that a group of one keeps R there",
    ),
    "otb_on_policy_zero_tail": Entry(
        estimator=Estimator(weighting=_NONE, baseline="otb_zero_tail"),
        formula="otb_on_policy, and R where the longest response is alone",
        unbiased=Unbiased.NEVER,
        why="in-batch; bias O(1/n)",
        references=("otb",),
        note="verl's handle_zero_tail=True, its default (False in earlier versions): it zeroes the baseline of that "
        "tail, which so keeps all of R",
    ),
    "sequence_is": Entry(
        estimator=Estimator(weighting=_FULL),
        formula="w R",
        unbiased=Unbiased.ALWAYS,
        references=("reinforce",),
        host=Estimator(weighting=_NONE),
    ),
    "sequence_is_leave_one_out": Entry(
        estimator=Estimator(weighting=_FULL, baseline="leave_one_out"),
        formula="w (R - mean of the others)",
        unbiased=Unbiased.ALWAYS,
        references=("rloo",),
        host=Estimator(weighting=_NONE, baseline="leave_one_out"),
    ),
    "sequence_is_opob_leave_one_out": Entry(
        estimator=Estimator(weighting=_FULL, baseline="opob_leave_one_out"),
        formula="w (R - OPOB of the others)",
        unbiased=Unbiased.ALWAYS,
        references=_VCPO,
        host=Estimator(weighting=_NONE, baseline="opob_leave_one_out"),
    ),
    "sequence_tis": Entry(
        estimator=Estimator(weighting=_TIS, baseline="group_mean"),
        formula="min(w, 8) (R - mean)",
        unbiased=Unbiased.ON_POLICY_SHRUNK,
        references=("impala", "vcpo"),
        host=_HOST,
    ),
    "token_tis": Entry(
        estimator=Estimator(weighting=_TOKEN_TIS, baseline="group_mean"),
        formula="min(r_t, 2) (R - mean) per token",
        unbiased=Unbiased.ON_POLICY_SHRUNK,
        references=("impala",),
        host=_HOST,
    ),
    "sequence_mis": Entry(
        estimator=Estimator(weighting=Weighting("mask", cap=8.0), baseline="group_mean"),
        formula="w 1[w <= 8] (R - mean)",
        unbiased=Unbiased.ON_POLICY_SHRUNK,
        references=("vcpo",),
        host=_HOST,
    ),
    "token_mis": Entry(
        estimator=Estimator(weighting=Weighting("mask", "token", cap=2.0), baseline="group_mean"),
        formula="r_t 1[r_t <= 2] (R - mean) per token",
        unbiased=Unbiased.ON_POLICY_SHRUNK,
        references=("vcpo",),
        host=_HOST,
    ),
    "icepop": Entry(
        estimator=Estimator(weighting=Weighting("mask", "token", cap=5.0, floor=0.5), baseline="group_mean"),
        formula="r_t 1[0.5 <= r_t <= 5] (R - mean) per token",
        unbiased=Unbiased.ON_POLICY_SHRUNK,
        references=("icepop",),
        host=_HOST,
        note="the paper's ratio is trainer over sampler at the same step, in front of PPO's clip",
    ),
    "self_normalized": Entry(
        estimator=Estimator(weighting=Weighting("self_normalize"), baseline="group_mean"),
        formula="n w / sum w (R - mean)",
        unbiased=Unbiased.CONSISTENT,
        references=("kong", "owen"),
        host=_HOST,
    ),
    "pareto_smoothed": Entry(
        estimator=Estimator(weighting=Weighting("pareto_smooth", smooth=pareto_smooth), baseline="group_mean"),
        formula="smoothed w (R - mean)",
        unbiased=Unbiased.CONSISTENT,
        references=("psis",),
        host=_HOST,
    ),
    "vcpo": Entry(
        estimator=Estimator(weighting=_TIS, baseline="opob"),
        formula="min(w, 8) (R - sum a R / sum a), a = min(w, 8)^2 ||s||^2",
        unbiased=Unbiased.NEVER,
        references=_VCPO,
        host=_OPTIMAL,
    ),
    "vcpo_group_std": Entry(
        estimator=Estimator(weighting=_TIS, baseline="opob", normalizer="group_std"),
        formula="vcpo / std, the scripts' norm_by_std",
        unbiased=Unbiased.NEVER,
        references=_VCPO,
        host=Estimator(weighting=_NONE, baseline="on_policy_optimal", normalizer="group_std"),
    ),
    "vcpo_leave_one_out": Entry(
        estimator=Estimator(weighting=_TIS, baseline="opob_leave_one_out"),
        formula="min(w, 8) (R - OPOB of the others)",
        unbiased=Unbiased.NEVER,
        references=_VCPO,
        host=Estimator(weighting=_NONE, baseline="opob_leave_one_out"),
    ),
    "vcpo_stratified": Entry(
        estimator=Estimator(weighting=_TIS, baseline="opob_stratified"),
        formula="min(w, 8) (R - sum a' R / sum a'), a' = batch mean of min(w, 8)^2 ||s||^2 given the reward",
        unbiased=Unbiased.NEVER,
        references=_VCPO,
        host=Estimator(weighting=_NONE, baseline="opob_stratified"),
        note="lag 0: weights still shared; for rewards of few values; one prompt's population baseline is OPOB's",
    ),
    "vcpo_truncation_aware": Entry(
        estimator=Estimator(weighting=_TIS, baseline="opob_truncated"),
        formula="min(w, 8) (R - b), b minimising tr Cov under truncation",
        unbiased=Unbiased.NEVER,
        references=_VCPO,
        host=Estimator(weighting=_NONE, baseline="opob_truncated"),
        note="lag 0: on_policy_optimal but for the batch's own mean of s, which is 0 only in expectation",
    ),
    "vcpo_released": Entry(
        estimator=Estimator(weighting=_TIS, baseline="opob_released"),
        formula="min(w, 8) (R - sum a R / sum a), a = min(w, 8)^2 w^2 ||s||^2",
        unbiased=Unbiased.NEVER,
        references=("vcpo",),
        host=_OPTIMAL,
    ),
    "vcpo_released_length": Entry(
        estimator=Estimator(weighting=_TIS, baseline="opob_released", normalizer="length"),
        formula="vcpo_released / L, the scripts' seq-mean-token-mean loss",
        unbiased=Unbiased.NEVER,
        references=("vcpo",),
        host=Estimator(weighting=_NONE, baseline="on_policy_optimal", normalizer="length"),
    ),
    "leverage_damped_mean": Entry(
        estimator=Estimator(weighting=_TIS, baseline="leverage_damped_mean"),
        formula="min(w, 8) (1 - h) (R - mean)",
        unbiased=Unbiased.NEVER,
        references=("vcpo",),
        host=Estimator(weighting=_NONE, baseline="leverage_damped_mean"),
        note="lag 0: still damped, by the on-policy leverage",
    ),
    "vcpo_released_median": Entry(
        estimator=Estimator(weighting=_TIS, baseline="opob_released_median"),
        formula="min(w, 8) (R - lower median of R weighted by min(w, 8)^2 w^2 ||s||^2)",
        unbiased=Unbiased.NEVER,
        references=("vcpo",),
        host=Estimator(weighting=_NONE, baseline="opob_released_median"),
        note="an option of the reference code",
    ),
    "vcpo_released_winsorized": Entry(
        estimator=Estimator(weighting=_TIS, baseline="opob_released_winsorized"),
        formula="vcpo_released with R held between its weighted 5% and 95% quantiles in the baseline",
        unbiased=Unbiased.NEVER,
        references=("vcpo",),
        host=Estimator(weighting=_NONE, baseline="opob_released_winsorized"),
        note="an option of the reference code",
    ),
    "vcpo_released_script": Entry(
        estimator=Estimator(weighting=_TIS, baseline="opob_released", normalizer="group_std_length"),
        formula="vcpo_released / std / L, all of the scripts' settings",
        unbiased=Unbiased.NEVER,
        references=("vcpo",),
        host=Estimator(weighting=_NONE, baseline="on_policy_optimal", normalizer="group_std_length"),
    ),
    "sequence_tis_of_tokens": _gated(
        surrogate=ProductOfTruncated(1.0),
        formula="prod_t min(r_t, 1) (R - mean)",
        references=("impala",),
        note="tokens truncated, then multiplied: the traces of V-trace; sequence_tis truncates the product",
    ),
    "aipo": Entry(
        estimator=Estimator(weighting=Weighting("truncate", "token", cap=4.0), baseline="group_mean"),
        formula="min(r_t, 4) (R - mean) per token",
        unbiased=Unbiased.ON_POLICY_SHRUNK,
        references=("aipo",),
        host=_HOST,
        note="token_tis with another cap; published caps lie in [2, 10]",
    ),
    "sequence_rejection": _gated(
        surrogate=Reject(8.0, 1 / 8),
        formula="1[1/8 <= w <= 8] (R - mean)",
        references=("mis",),
        note="two-sided and without the ratio, as verl's rejection; sequence_mis is one-sided and keeps w",
    ),
    "token_rejection": _gated(
        surrogate=Reject(2.0, 1 / 2, "token"),
        formula="1[1/2 <= r_t <= 2] (R - mean) per token",
        references=("mis",),
        note="two-sided and without the ratio, as verl's rejection; token_mis is one-sided and keeps r_t",
    ),
    "geometric_mis": _gated(
        surrogate=Reject(1.001, 0.999, "geometric"),
        formula="1[0.999 <= w^(1/L) <= 1.001] (R - mean)",
        references=("mis",),
        note="rejection alone, verl's typical band; under lag it can reject every trajectory",
    ),
    "negative_advantage_mask": _gated(
        surrogate=NegativeSequenceMask(),
        formula="(R - mean), 0 if R < mean and mean_t log(mu/pi) > 1e-4",
        references=("deepseek_v32",),
        note="the mask by itself, no ratio",
    ),
    "ppo_negative_advantage_mask": _gated(
        surrogate=Product((Clip(), NegativeSequenceMask())),
        formula="ppo_clip, 0 if R < mean and mean_t log(mu/pi) > 1e-4",
        references=("deepseek_v32", "ppo"),
        note="the mask in front of PPO's clip, as in DeepSeek-V3.2",
    ),
    "m2po": _gated(
        surrogate=SecondMomentMask(),
        formula="r_t 1[kept] (R - mean): largest harmful |log r_t| dropped until their mean (log r)^2 <= 0.04",
        references=("m2po",),
        note="the paper's Algorithm 1",
    ),
    "m2po_any_sign": _gated(
        surrogate=SecondMomentMaskAnySign(),
        formula="r_t 1[kept] (R - mean): largest |log r_t| dropped, harmful or not, until mean (log r)^2 <= 0.04",
        references=("m2po", "areal"),
        note="as in AReaL, there between behavior and proximal policy",
    ),
    "m2po_clip": _gated(
        surrogate=SecondMomentClip(),
        formula="ppo_clip at |log r| = c per batch, mean min(|log r|, c)^2 = 0.04 over harmful tokens",
        references=("m2po",),
        note="as in the authors' code",
    ),
    "ppo_clip": _gated(
        surrogate=Clip(),
        formula="r_t 1[not (A > 0, r_t > 1.2) and not (A < 0, r_t < 0.8)] A, A = R - mean, per token",
        references=("ppo",),
    ),
    "clip_higher": _gated(
        surrogate=Clip(0.2, 0.28), formula="ppo_clip with bounds 0.8 and 1.28", references=("dapo", "ppo")
    ),
    "dual_clip": _gated(
        surrogate=Clip(dual=3.0), formula="ppo_clip, and 0 if A < 0 and r_t > 3", references=("dual_clip", "ppo")
    ),
    "decoupled_ppo": _gated(
        surrogate=DecoupledClip(),
        formula="r_t 1[pi/anchor not clipped as in ppo_clip] (R - mean) per token",
        references=("decoupled_ppo", "areal"),
        note="lag 0 means pi = mu = anchor",
    ),
    "a3po": _gated(
        surrogate=LoglinearAnchor(4.0),
        formula="r_t 1[r_t^(1/d) not clipped as in ppo_clip] (R - mean) per token, d = 4 updates of lag",
        references=("a3po", "areal"),
        note="decoupled_ppo with the anchor read off the lag: log anchor = log mu + (1 - 1/d) log r; d = 4 is ours",
    ),
    "a3po_uncorrected": _gated(
        surrogate=LoglinearAnchor(4.0, corrected=False),
        formula="r_t^(1/d) 1[r_t^(1/d) not clipped as in ppo_clip] (R - mean) per token, d = 4 updates of lag",
        references=("a3po", "areal"),
        note="as AReaL computes it where rejection sampling is not configured: anchor/mu is left out",
    ),
    "gspo": _gated(
        surrogate=Clip(3e-4, 4e-4, level="geometric"),
        formula="(1/L) w^(1/L) 1[not clipped at 1 - 3e-4, 1 + 4e-4] (R - mean)",
        references=("gspo",),
        host=_PER_TOKEN,
        note="lag 0: dr_grpo / L; the 1/L is part of its gradient",
    ),
    "gmpo": _gated(
        surrogate=GeometricMeanClip(),
        formula="(1/L) exp(mean_t clipped log r_t) 1[|log r_t| <= 0.4 where harmful] (R - mean) per token",
        references=("gmpo",),
        host=_PER_TOKEN,
        note="lag 0: dr_grpo / L; the 1/L is part of its gradient",
    ),
    "cispo": Entry(
        estimator=Estimator(weighting=Weighting("truncate", "token", cap=1.2), baseline="group_mean"),
        formula="min(r_t, 1.2) (R - mean) per token",
        unbiased=Unbiased.ON_POLICY_SHRUNK,
        references=("cispo",),
        host=_HOST,
        note="without a lower bound: token_tis with another cap",
    ),
    "cispo_two_sided": Entry(
        estimator=Estimator(weighting=Weighting("clip", "token", cap=1.2, floor=0.8), baseline="group_mean"),
        formula="max(0.8, min(r_t, 1.2)) (R - mean) per token",
        unbiased=Unbiased.ON_POLICY_SHRUNK,
        references=("cispo",),
        host=_HOST,
        note="with PPO's bounds on both sides, as in verl",
    ),
    "topr": Entry(
        estimator=Estimator(weighting=_NONE, surrogate=TaperNegatives()),
        formula="R for R >= 0, min(w, 1) R for R < 0",
        unbiased=Unbiased.ON_POLICY,
        references=("topr",),
        host=Estimator(weighting=_NONE),
        note="the paper's: split by the sign of the reward, so meant for rewards of both signs",
    ),
    "topr_centered": _gated(
        surrogate=TaperNegatives(level="geometric"),
        formula="A for A >= 0, min(w^(1/L), 1) A for A < 0, A = R - mean",
        references=("topr",),
        note="as in a development version of verl (read; not in 0.9.1): by the sign of the advantage, per-token ratio",
    ),
    "dppo_binary_tv": _gated(
        surrogate=DivergenceMask("binary_tv", 0.15, 0.15),
        formula="min(r_t, 20) 1[not (A > 0, pi - mu > 0.15) and not (A <= 0, mu - pi > 0.15)] A, A = R - mean",
        references=("dppo",),
    ),
    "dppo_binary_kl": _gated(
        surrogate=DivergenceMask("binary_kl", 0.05, 0.05),
        formula="min(r_t, 20) 1[not (KL of {y, rest} from mu > 0.05, moved in the harmful direction)] (R - mean)",
        references=("dppo",),
    ),
    "dppo_binary_kl_anchor": _gated(
        surrogate=DivergenceMask("binary_kl_anchor", 0.05, 0.05),
        formula="dppo_binary_kl with the divergence from the anchor policy",
        references=("dppo",),
        note="binary_kl_recompute of TRL's experimental DPPO (read): anchor = trainer at the start of the epoch",
    ),
    "dppo_symmetric_tv": _gated(
        surrogate=DivergenceMask("symmetric_tv", 0.2, 0.2),
        formula="min(r_t, 20) 1[|pi - mu| <= 0.2] (R - mean)",
        references=("dppo",),
        note="whatever the sign of A, as prime-rl had it for a time",
    ),
    "open_instruct_tv": _gated(
        surrogate=TotalVariationFilter(0.2),
        formula="min(r_t, 2) 1[not (mean_t |r_t - 1| > 0.2, A log r_t > 0)] A, A = R - mean",
        references=("vaco",),
        note="open-instruct's filter, not VACO itself, which realigns advantages with a critic; the limit 0.2 is ours",
    ),
    "gipo": _gated(
        surrogate=GaussianTrust(),
        formula="r_t exp(-(log r_t)^2 / 2) (R - mean) per token",
        references=("gipo",),
        note="sigma = 1",
    ),
    "vespo": _gated(
        surrogate=GammaShape(),
        formula="w^2 exp(3 (1 - w)) A for A >= 0, w^3 exp(2 (1 - w)) A for A < 0, A = R - mean",
        references=("vespo",),
        note="defaults of the released code",
    ),
    "vespo_docstring": _gated(
        surrogate=GammaShape((2.0, 1.5), (4.0, 2.5)),
        formula="w^2 exp(1.5 (1 - w)) A for A >= 0, w^4 exp(2.5 (1 - w)) A for A < 0, A = R - mean",
        references=("vespo",),
        note="defaults that the docstring of the released code states",
    ),
    "sapo": _gated(
        surrogate=SigmoidGate(),
        formula="r_t sech^2(tau (r_t - 1) / 2) (R - mean), tau = 1 for R > mean, 1.05 for R < mean",
        references=("sapo",),
        note="as TRL and verl ship it; no bound on r_t, but the gate falls as exp(-tau r_t)",
    ),
    "luspo": _gated(
        surrogate=Clip(2e-3, 2.5e-3, level="geometric", times_length=True),
        formula="w^(1/L) 1[not clipped at 1 - 2e-3, 1 + 2.5e-3] (R - mean)",
        references=("luspo",),
        note="gspo times L; TRL's `luspo` at its default importance_sampling_level='token' is another formula",
    ),
    "drpo": _gated(
        surrogate=DivergenceDamping(),
        formula="r_t [A - |A| (pi - mu) / 12.5], A = R - mean",
        references=("drpo",),
        note="released epsilon, at which the bracket stays within 8% of A: it never corrects",
    ),
    "prime_rl_ipo": _gated(
        surrogate=ProbabilityBand(),
        formula="r_t 1[|pi - mu| <= 0.1] (R - mean) - 2e-3 log r_t",
        references=("prime_rl",),
        note="code of July 2026; a later one caps r_t and drops the quadratic term; dppo_symmetric_tv is capped at 20",
    ),
    "kimi_k15": _gated(
        surrogate=QuadraticPull(),
        formula="R - mean - 0.1 log w",
        references=("kimi_k15",),
        note="the square of the response's log-ratio; no ratio before the advantage",
    ),
    "kimi_k15_token": _gated(
        surrogate=QuadraticPull(level="token"),
        formula="R - mean - 0.1 log r_t",
        references=("kimi_k15",),
        note="the sum of squares of tokens, as in ROLL's kimi15 and Tinker's dro: another penalty than kimi_k15's",
    ),
    "ctpo": _gated(
        surrogate=PrefixClip(0.025, 0.05),
        formula="R_t 1[not (A > 0, log R_t > 0.05 sqrt t) and not (A < 0, log R_t < -0.025 sqrt t)] A, A = R - mean",
        references=("ctpo",),
        note="R_t is the ratio of the prefix up to t; the paper's form",
    ),
    "ctpo_released": _gated(
        surrogate=PrefixClip(0.025, 0.05, dual=0.05),
        formula="ctpo, and 0 if R < mean and log R_t > 0.05 sqrt t",
        references=("ctpo",),
        note="the release's `cum-token-cumprod-la`, la for length-adaptive: its dual clip closes at the upper bound; "
        "without its clamps",
    ),
    "ctpo_geometric": _gated(
        surrogate=PrefixClip(0.025, 0.05, dual=0.05, power=-0.5, mean=True),
        formula="ctpo_released on R_t^(1/t), its bounds falling as 1 / sqrt t",
        references=("ctpo",),
        note="the release's `cum-token-geomean-la` at the power that its comment recommends; its script has 0.5",
    ),
    "prefix_is": Entry(
        estimator=Estimator(weighting=_NONE, surrogate=PrefixClip()),
        formula="R_t R per token, R_t the ratio of the prefix up to t",
        unbiased=Unbiased.ON_POLICY,
        references=("ctpo",),
        host=Estimator(weighting=_NONE),
        note="off policy what follows t is not weighted: unbiased for one token, or if the prefix decides the reward",
    ),
    "cppo": _gated(
        surrogate=PrefixBudget(),
        formula="r_t 1[A (r_t - 1) <= 0 or w_t |pi - mu| <= min(0.15, 0.15 + 0.015 W - S)] A, A = R - mean",
        references=("cppo",),
        note="W, S: sums of w_j and w_j |pi - mu| over the prefix, w falling from 1 to 0.8; the dense models' settings",
    ),
    "kpo": _gated(
        surrogate=KalmanClip(),
        formula="exp(xhat_t) 1[not clipped at 1 - 3e-4, 1 + 4e-4] (R - mean), xhat the filtered log r_t",
        references=("kpo",),
        note="released q = 1e-6: it passes at most 0.1% of one log-ratio, 0.5% of a constant one after 100 tokens",
    ),
    "max_k3_mask": _gated(
        surrogate=LargestK3(0.1),
        formula="1[max_t (r_t - 1 - log r_t) <= 0.1] (R - mean)",
        references=("mis",),
        note="verl's seq_max_k3, which has no default limit: 0.1 is ours; the mask by itself, no ratio",
    ),
    "minpro": _gated(
        surrogate=LeastPrefix(),
        formula="min(m_t r_t, 1.2) (R - mean), m_t = min(r_1, ..., r_(t-1)), 1 for the first token",
        references=("minpro",),
        note="as two readers write the paper's objective; the cap is ours, and no floor, which would undo the damping",
    ),
    "dispo": _gated(
        surrogate=SignedTruncation(),
        formula="r_t held in [0.8, 11] for R > mean, in [0, 101] for R < mean, times R - mean",
        references=("dispo",),
        note="as four readers write the paper's objective; the bounds are those that one of them gives",
    ),
    "gepo": _gated(
        surrogate=GroupExpectation(),
        formula="(1/L) p/E 1[p/E not clipped at 0.8, 1.2] (R - mean), E = sum q^2 / sum q over the group; "
        "p, q = pi(tau)^(1/L), mu(tau)^(1/L)",
        references=("gepo",),
        host=Estimator(_NONE, baseline="group_mean", surrogate=GroupExpectation(ratio=False)),
        note="geometric means as released, the paper has whole probabilities; lag 0: responses weigh as their own p",
    ),
    "delta_l": _gated(
        surrogate=LengthPower(),
        formula="L^-1 / mean_j L_j^-1 (R - mean), the mean over all responses",
        references=("delta_l",),
        host=None,
        note="alpha = 1; ours without the ratio; unbiased only if lengths say nothing about the gradient",
    ),
    "maxrl": _gated(
        surrogate=SuccessRate(),
        formula="(R - mean) / (mean + 1e-6), 0 for a group without success",
        references=("maxrl",),
        host=None,
        note="on policy, of successes: [1 - (1-p)^(n-1)] / p times the gradient; refuses negative rewards with 0",
    ),
    "p3o": _gated(
        surrogate=EssCap(),
        formula="min(r_t, ESS) (R - mean) - (1 - ESS) (1 - 1/r_t), ESS of the pool's tokens",
        references=("p3o",),
        note="ESS is 0 where a ratio is not finite",
    ),
    "p3o_released": _gated(
        surrogate=EssCap(fails_open=True),
        formula="p3o, with ESS = 1 where a sum of ratios is not finite",
        references=("p3o",),
        note="as released, it fails open: the loosest cap and no pull just when ratios overflow",
    ),
    "p4o": _gated(
        surrogate=EssCap(anchored=True),
        formula="min(r_t, e) (R - mean) - (1 - e) (1 - q/pi), e the lesser ESS of pi/mu and pi/anchor, q their mixture",
        references=("p3o",),
        note="lag 0 means pi = mu = anchor",
    ),
    "bapo": _gated(
        surrogate=BalancedClip(),
        formula="r_t 1[not clipped at low, high; dual clip 3] (R - mean): low to 0.8, then high to 2, until pos >= neg",
        references=("bapo",),
        note="configuration of the released code; its README states other bounds, and target as another ratio",
    ),
    "clip_cov": _gated(
        surrogate=CovarianceClip(),
        formula="ppo_clip (1 - k/|S|) on S, the tokens with 1 < (A - mean A) (log pi - mean log pi) < 5; "
        "k = max(1, 0.02% of all tokens), at most |S|",
        references=("kl_cov", "ppo"),
        host=Estimator(_NONE, baseline="group_mean", surrogate=CovarianceClip(ratio=False)),
        note="the mean over verl's draw of k tokens of S to drop; lag 0: it drops them on policy too",
    ),
    "mc_grpo": Entry(
        estimator=Estimator(_NONE, baseline="group_median", surrogate=MedianDeviation()),
        formula="(R - median) / (median |R - median| + 1e-3), lower medians",
        unbiased=Unbiased.NEVER,
        why="median and spread depend on the sample",
        breaks=("bounded",),
        references=("mc_grpo",),
        note="where over half of a group agree MAD is 0 and the others get 1,000: its bias reads hundreds of |g|, a "
        "matter of scale, as published; the release leaves the median's sample out of the mean",
    ),
    "kl_cov": _gated(
        surrogate=CovariancePenalty(),
        formula="r_t (R - mean) - 0.1 sign(log r_t) on the 0.02% of tokens of largest covariance of A and log pi",
        references=("kl_cov",),
        note="at least one token of a pool; as verl ships it: the gradient of |log r|, not of a KL divergence",
    ),
    "half_optimal": Entry(
        estimator=Estimator(weighting=_NONE, baseline="half_optimal"),
        formula="R - (mean + n2) / 2, n2 = sum ||s||^2 R / sum ||s||^2",
        unbiased=Unbiased.NEVER,
        why="in-batch; bias O(1/n)",
        references=("weaver_tao", "greensmith"),
        note="ours: on_policy_optimal shrunk halfway to the mean",
    ),
    "n2_soft_negatives": Entry(
        estimator=Estimator(_NONE, "on_policy_optimal", surrogate=TaperNegatives(0.5, 0.5)),
        formula="A for A >= 0, A / 2 for A < 0, A = R - sum ||s||^2 R / sum ||s||^2",
        unbiased=Unbiased.NEVER,
        why="negatives count half",
        references=("weaver_tao", "greensmith"),
        note="ours: what foretold lost runs best was how much negatives push (simulations/LOG.md)",
    ),
    "n2_tempered": Entry(
        estimator=Estimator(_NONE, "on_policy_optimal", surrogate=Tempered()),
        formula="min(w, 8)^(1/2) (R - sum ||s||^2 R / sum ||s||^2)",
        unbiased=Unbiased.NEVER,
        why="in-batch baseline, and half of the ratio",
        references=("weaver_tao", "greensmith"),
        host=_OPTIMAL,
        note="ours: between no ratio and sequence_tis, on the n2 baseline",
    ),
    "n2_influence": Entry(
        estimator=Estimator(_NONE, "on_policy_optimal", surrogate=InfluenceCap()),
        formula="min(1, 4 mean of the others' |A| ||s|| / (|A| ||s||)) A, A = R - sum ||s||^2 R / sum ||s||^2",
        unbiased=Unbiased.NEVER,
        why="in-batch baseline, and a lone success is held back",
        references=("weaver_tao", "greensmith"),
        note="ours: no response moves the policy more than four times what the others of its group do",
    ),
    "otb": Entry(
        estimator=Estimator(weighting=_TOKEN_TIS, baseline="otb"),
        formula="min(r_t, 2) (R - B_t), W_it = sum_{j<=t} min(r_j, 2)^2 (1 - 2 pi(y_j) + sum_v pi(v)^2)",
        unbiased=Unbiased.NEVER,
        references=("otb",),
        host=Estimator(weighting=_NONE, baseline="otb"),
        note="as in verl's code with handle_zero_tail=False",
    ),
    "otb_outside": Entry(
        estimator=Estimator(weighting=_TOKEN_TIS, baseline="otb_outside"),
        formula="min(r_t, 2) (R - B_t), W_it = min(r_t, 2)^2 sum_{j<=t} (1 - 2 pi(y_j) + sum_v pi(v)^2)",
        unbiased=Unbiased.NEVER,
        references=("otb",),
        host=Estimator(weighting=_NONE, baseline="otb"),
        note="as verl's docstring writes it, the ratio outside the sum",
    ),
}
"""name -> entry"""


def entry(name: str) -> Entry:
    """The entry of that name; `InputError` with the nearest name otherwise."""
    if name not in CATALOGUE:
        raise unknown_name("estimator", name, CATALOGUE)
    return CATALOGUE[name]


def cite(*names: str) -> str:
    """BibTeX of everything the named estimators stand on, each source once."""
    keys = dict.fromkeys(key for name in names for key in entry(name).references)
    return bibtex(list(keys))
