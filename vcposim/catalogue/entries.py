"""Every named estimator: formula, when it is unbiased, what it is at lag 0, and whom to cite.

This is the one place where a name becomes an estimator. Two shipped variants of one name are two entries with distinct
names. Rivals share the plain host `R - group mean`, without std or 1/L, so that differences come from the ratio alone;
put one on another host with `dataclasses.replace(entry(name).estimator, baseline="leave_one_out")`.

To add one, write its gradient coefficient and an `Entry`. Say a rival takes the factor min(w, 1), and half of it where
the advantage is negative. The ratio treatment alone would be a `Weighting`; as it looks at the advantage, it is a
`Surrogate`:

>>> from vcposim.arrays import namespace
>>> from vcposim.surrogates import ratio_at
>>> @dataclass(frozen=True)
... class HalfNegatives:
...     needs = ()  # no optional field of the batch
...     def __call__(self, batch, advantage):
...         w, scale = ratio_at(batch, "sequence")
...         truncated = namespace(w).minimum(w, scale.write(1))
...         return scale.value(truncated, batch.measure) * (1 - (advantage < 0) / 2)
>>> mine = Entry(
...     Estimator(Weighting("none"), "group_mean", surrogate=HalfNegatives()),
...     formula="min(w, 1) (R - mean), half of it for R < mean",
...     unbiased=NEVER,
...     references=("reinforce",),
...     note="lag 0: half of dr_grpo where R < mean",
... )
>>> import numpy as np
>>> from vcposim.batch import Batch
>>> batch = Batch(reward=np.array([1.0, 0.0, 1.0, 0.0]), log_ratio=np.log([0.5, 0.5, 1.0, 2.0]))
>>> mine.estimator.coefficients(batch)
array([ 0.25 , -0.125,  0.5  , -0.25 ])
>>> mine.shift_invariant, sorted(mine.estimator.needs)
(True, [])

In the table below under its name, the command line lists it, the experiments run it, and the tests check the lag-0
claim, the shift invariance and the references.
"""

from dataclasses import dataclass

from vcposim.baselines import KEEPS_THE_ZERO
from vcposim.catalogue.references import bibtex
from vcposim.errors import InputError, unknown_name
from vcposim.estimators import WHITENINGS, Estimator
from vcposim.gauges.tails import pareto_smooth
from vcposim.pooled import BalancedClip, CovariancePenalty, EssCap, LengthPower, SuccessRate
from vcposim.prefixes import KalmanClip, LargestK3, PrefixBudget, PrefixClip
from vcposim.second_moment import SecondMomentClip, SecondMomentMask, SecondMomentMaskAnySign
from vcposim.surrogates import (
    Clip,
    DecoupledClip,
    DivergenceDamping,
    DivergenceMask,
    GammaShape,
    GaussianTrust,
    GeometricMeanClip,
    NegativeSequenceMask,
    ProbabilityBand,
    Product,
    ProductOfTruncated,
    QuadraticPull,
    Reject,
    SigmoidGate,
    Surrogate,
    TaperNegatives,
)
from vcposim.weights import TREATMENTS, Weighting

ALWAYS = "always"
ON_POLICY = "only on policy (pi = mu)"
SHRUNK = "direction only: the mean is (1 - 1/n) times the gradient"
CONSISTENT = "as n grows"
NEVER = "never"
CENTERED = ON_POLICY + ", " + SHRUNK
"""what a rival that is `dr_grpo` at lag 0 can claim"""


@dataclass(frozen=True)
class Entry:
    """A named estimator with what is known about it."""

    estimator: Estimator
    formula: str
    """the coefficient on grad log pi(tau_i)"""
    unbiased: str
    """when its mean is the gradient"""
    references: tuple[str, ...]
    """keys of `vcposim.catalogue.references.REFERENCES`"""
    host: Estimator | None = None
    """the estimator without ratios that it equals where pi = mu; None where it has no ratios, or `note` says why"""
    note: str = ""
    """what sets it apart from its source, its host, or others of its name"""

    @property
    def shift_invariant(self) -> bool:
        """Whether adding a constant to all rewards changes nothing."""
        e = self.estimator
        if getattr(e.surrogate, "reads_rewards", False):
            return False
        return (isinstance(e.baseline, str) and e.baseline not in KEEPS_THE_ZERO) or e.normalizer in WHITENINGS


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
_HOST, _OPTIMAL = Estimator(_NONE, "group_mean"), Estimator(_NONE, "on_policy_optimal")
_PER_TOKEN = Estimator(_NONE, "group_mean", "length")


def _gated(
    surrogate: Surrogate, formula: str, *references: str, note: str = "", host: Estimator | None = _HOST
) -> Entry:
    """An entry whose surrogate stands before R - mean."""
    unbiased = CENTERED if host is _HOST else NEVER
    return Entry(Estimator(_NONE, "group_mean", surrogate=surrogate), formula, unbiased, references, host, note)


CATALOGUE: dict[str, Entry] = {
    "reinforce": Entry(Estimator(_NONE), "R", ON_POLICY, ("reinforce",)),
    "grpo": Entry(
        Estimator(_NONE, "group_mean", "group_std", 1e-4),
        "(R - mean) / (std + 1e-4), population std",
        NEVER + " (std depends on the sample)",
        ("grpo",),
    ),
    "grpo_length": Entry(
        Estimator(_NONE, "group_mean", "group_std_length", 1e-4),
        "(R - mean) / (std + 1e-4) / L",
        NEVER + " (std depends on the sample, 1/L on the trajectory)",
        ("grpo",),
        note="GRPO with its mean over the tokens of a response",
    ),
    "dr_grpo": Entry(Estimator(_NONE, "group_mean"), "R - mean", ON_POLICY + ", " + SHRUNK, ("dr_grpo",)),
    "rloo": Entry(Estimator(_NONE, "leave_one_out"), "R - mean of the others", ON_POLICY, ("rloo",)),
    "opo": Entry(
        Estimator(_NONE, "length_weighted"), "R - sum L R / sum L", NEVER + " (in-batch; bias O(1/n))", ("opo",)
    ),
    "on_policy_optimal": Entry(
        Estimator(_NONE, "on_policy_optimal"),
        "R - sum ||s||^2 R / sum ||s||^2",
        NEVER + " (in-batch; bias O(1/n))",
        ("weaver_tao", "greensmith"),
    ),
    "reinforce_plus_plus": Entry(
        Estimator(_NONE, "zero", "whiten", 1e-8),
        "(R - batch mean) / (batch std + 1e-8)",
        NEVER + " (mean and std depend on the sample)",
        ("reinforce_plus_plus",),
    ),
    "reinforce_plus_plus_baseline": Entry(
        Estimator(_NONE, "group_mean", "whiten", 1e-8),
        "(R - mean) / (batch std of R - mean + 1e-8)",
        NEVER + " (mean and std depend on the sample)",
        ("reinforce_plus_plus",),
    ),
    "reinforce_plus_plus_token": Entry(
        Estimator(_NONE, "zero", "whiten_token", 1e-8),
        "(R - mean over tokens) / (std over tokens + 1e-8)",
        NEVER + " (long responses weigh more in the mean)",
        ("reinforce_plus_plus",),
        note="as verl whitens, over all tokens of the batch; up to the Bessel factor of its std",
    ),
    "reinforce_plus_plus_baseline_token": Entry(
        Estimator(_NONE, "group_mean", "whiten_token", 1e-8),
        "R - mean, then whitened over all tokens of the batch",
        NEVER + " (long responses weigh more in the mean)",
        ("reinforce_plus_plus",),
        note="as verl whitens, over all tokens of the batch; up to the Bessel factor of its std",
    ),
    "shrinkage": Entry(
        Estimator(_NONE, "shrinkage"),
        "R - (1 - lam) mean of the others - lam mean of the other prompts",
        ON_POLICY,
        ("shrinkage",),
        note="leave-one-out at both levels, lam from the other prompts; rloo for a batch of one prompt",
    ),
    "shrinkage_in_sample": Entry(
        Estimator(_NONE, "shrinkage_in_sample"),
        "R - (1 - lam) mean - lam batch mean, lam = error / (error + spread of means)",
        NEVER + " (in-batch; bias O(1/n))",
        ("shrinkage",),
        note="the same idea without leaving anything out",
    ),
    "asymre": Entry(
        Estimator(_NONE, "group_mean", baseline_shift=-0.1),
        "R - (mean - 0.1)",
        CENTERED,
        ("asymre",),
        note="lag 0: dr_grpo plus 0.1 s, of mean zero; -0.1 is in units of reward, for rewards in {0, 1}",
    ),
    "tba": Entry(
        Estimator(_NONE, "group_mean", reference_penalty=0.01),
        "R' - mean R', R' = R - beta log pi/reference, beta = 0.01",
        ON_POLICY + ", of the KL-regularized objective; " + SHRUNK,
        ("tba",),
        note="VarGrad trajectory balance: its squared loss has this gradient times 2 / beta; beta is ours, to be tuned",
    ),
    "on_policy_optimal_leave_one_out": Entry(
        Estimator(_NONE, "opob_leave_one_out"),
        "R - sum of the others' ||s||^2 R / sum of their ||s||^2",
        ON_POLICY,
        ("weaver_tao", "greensmith"),
    ),
    "otb_on_policy": Entry(
        Estimator(_NONE, "otb"),
        "R - B_t, B_t = sum_i W_it R / sum_i W_it, W_it = sum_{j<=t} (1 - 2 pi(y_j) + sum_v pi(v)^2)",
        NEVER + " (in-batch; bias O(1/n))",
        ("otb",),
        note="the tail of the longest response gets no gradient: alone, it is its own baseline",
    ),
    "otb_on_policy_zero_tail": Entry(
        Estimator(_NONE, "otb_zero_tail"),
        "otb_on_policy, and R where the longest response is alone",
        NEVER + " (in-batch; bias O(1/n))",
        ("otb",),
        note="verl's default handle_zero_tail=True: it zeroes the baseline of that tail, which so keeps all of R",
    ),
    "sequence_is": Entry(Estimator(_FULL), "w R", ALWAYS, ("reinforce",), host=Estimator(_NONE)),
    "sequence_is_leave_one_out": Entry(
        Estimator(_FULL, "leave_one_out"),
        "w (R - mean of the others)",
        ALWAYS,
        ("rloo",),
        host=Estimator(_NONE, "leave_one_out"),
    ),
    "sequence_is_opob_leave_one_out": Entry(
        Estimator(_FULL, "opob_leave_one_out"),
        "w (R - OPOB of the others)",
        ALWAYS,
        _VCPO,
        host=Estimator(_NONE, "opob_leave_one_out"),
    ),
    "sequence_tis": Entry(
        Estimator(_TIS, "group_mean"), "min(w, 8) (R - mean)", CENTERED, ("impala", "vcpo"), host=_HOST
    ),
    "token_tis": Entry(
        Estimator(_TOKEN_TIS, "group_mean"), "min(r_t, 2) (R - mean) per token", CENTERED, ("impala",), host=_HOST
    ),
    "sequence_mis": Entry(
        Estimator(Weighting("mask", cap=8.0), "group_mean"), "w 1[w <= 8] (R - mean)", CENTERED, ("vcpo",), host=_HOST
    ),
    "token_mis": Entry(
        Estimator(Weighting("mask", "token", cap=2.0), "group_mean"),
        "r_t 1[r_t <= 2] (R - mean) per token",
        CENTERED,
        ("vcpo",),
        host=_HOST,
    ),
    "icepop": Entry(
        Estimator(Weighting("mask", "token", cap=5.0, floor=0.5), "group_mean"),
        "r_t 1[0.5 <= r_t <= 5] (R - mean) per token",
        CENTERED,
        ("icepop",),
        host=_HOST,
        note="the paper's ratio is trainer over sampler at the same step, in front of PPO's clip",
    ),
    "self_normalized": Entry(
        Estimator(Weighting("self_normalize"), "group_mean"),
        "n w / sum w (R - mean)",
        CONSISTENT,
        ("kong", "owen"),
        host=_HOST,
    ),
    "pareto_smoothed": Entry(
        Estimator(Weighting("pareto_smooth", smooth=pareto_smooth), "group_mean"),
        "smoothed w (R - mean)",
        CONSISTENT,
        ("psis",),
        host=_HOST,
    ),
    "vcpo": Entry(
        Estimator(_TIS, "opob"), "min(w, 8) (R - sum a R / sum a), a = min(w, 8)^2 ||s||^2", NEVER, _VCPO, host=_OPTIMAL
    ),
    "vcpo_group_std": Entry(
        Estimator(_TIS, "opob", "group_std"),
        "vcpo / std, the scripts' norm_by_std",
        NEVER,
        _VCPO,
        host=Estimator(_NONE, "on_policy_optimal", "group_std"),
    ),
    "vcpo_leave_one_out": Entry(
        Estimator(_TIS, "opob_leave_one_out"),
        "min(w, 8) (R - OPOB of the others)",
        NEVER,
        _VCPO,
        host=Estimator(_NONE, "opob_leave_one_out"),
    ),
    "vcpo_stratified": Entry(
        Estimator(_TIS, "opob_stratified"),
        "min(w, 8) (R - sum a' R / sum a'), a' = batch mean of min(w, 8)^2 ||s||^2 given the reward",
        NEVER,
        _VCPO,
        host=Estimator(_NONE, "opob_stratified"),
        note="lag 0: weights still shared; for rewards of few values; one prompt's population baseline is OPOB's",
    ),
    "vcpo_truncation_aware": Entry(
        Estimator(_TIS, "opob_truncated"),
        "min(w, 8) (R - b), b minimising tr Cov under truncation",
        NEVER,
        _VCPO,
        host=Estimator(_NONE, "opob_truncated"),
        note="lag 0: on_policy_optimal but for the batch's own mean of s, which is 0 only in expectation",
    ),
    "vcpo_released": Entry(
        Estimator(_TIS, "opob_released"),
        "min(w, 8) (R - sum a R / sum a), a = min(w, 8)^2 w^2 ||s||^2",
        NEVER,
        ("vcpo",),
        host=_OPTIMAL,
    ),
    "vcpo_released_length": Entry(
        Estimator(_TIS, "opob_released", "length"),
        "vcpo_released / L, the scripts' seq-mean-token-mean loss",
        NEVER,
        ("vcpo",),
        host=Estimator(_NONE, "on_policy_optimal", "length"),
    ),
    "leverage_damped_mean": Entry(
        Estimator(_TIS, "leverage_damped_mean"),
        "min(w, 8) (1 - h) (R - mean)",
        NEVER,
        ("vcpo",),
        host=Estimator(_NONE, "leverage_damped_mean"),
        note="lag 0: still damped, by the on-policy leverage",
    ),
    "vcpo_released_median": Entry(
        Estimator(_TIS, "opob_released_median"),
        "min(w, 8) (R - lower median of R weighted by min(w, 8)^2 w^2 ||s||^2)",
        NEVER,
        ("vcpo",),
        Estimator(_NONE, "opob_released_median"),
        "an option of the reference code",
    ),
    "vcpo_released_winsorized": Entry(
        Estimator(_TIS, "opob_released_winsorized"),
        "vcpo_released with R held between its weighted 5% and 95% quantiles in the baseline",
        NEVER,
        ("vcpo",),
        Estimator(_NONE, "opob_released_winsorized"),
        "an option of the reference code",
    ),
    "vcpo_released_script": Entry(
        Estimator(_TIS, "opob_released", "group_std_length"),
        "vcpo_released / std / L, all of the scripts' settings",
        NEVER,
        ("vcpo",),
        Estimator(_NONE, "on_policy_optimal", "group_std_length"),
    ),
    "sequence_tis_of_tokens": _gated(
        ProductOfTruncated(1.0),
        "prod_t min(r_t, 1) (R - mean)",
        "impala",
        note="tokens truncated, then multiplied: the traces of V-trace; sequence_tis truncates the product",
    ),
    "aipo": Entry(
        Estimator(Weighting("truncate", "token", cap=4.0), "group_mean"),
        "min(r_t, 4) (R - mean) per token",
        CENTERED,
        ("aipo",),
        _HOST,
        "token_tis with another cap; published caps lie in [2, 10]",
    ),
    "sequence_rejection": _gated(
        Reject(8.0, 1 / 8),
        "1[1/8 <= w <= 8] (R - mean)",
        "mis",
        note="two-sided and without the ratio, as verl's rejection; sequence_mis is one-sided and keeps w",
    ),
    "token_rejection": _gated(
        Reject(2.0, 1 / 2, "token"),
        "1[1/2 <= r_t <= 2] (R - mean) per token",
        "mis",
        note="two-sided and without the ratio, as verl's rejection; token_mis is one-sided and keeps r_t",
    ),
    "geometric_mis": _gated(
        Reject(1.001, 0.999, "geometric"),
        "1[0.999 <= w^(1/L) <= 1.001] (R - mean)",
        "mis",
        note="rejection alone, verl's typical band; under lag it can reject every trajectory",
    ),
    "negative_advantage_mask": _gated(
        NegativeSequenceMask(),
        "(R - mean), 0 if R < mean and mean_t log(mu/pi) > 1e-4",
        "deepseek_v32",
        note="the mask by itself, no ratio",
    ),
    "ppo_negative_advantage_mask": _gated(
        Product((Clip(), NegativeSequenceMask())),
        "ppo_clip, 0 if R < mean and mean_t log(mu/pi) > 1e-4",
        "deepseek_v32",
        "ppo",
        note="the mask in front of PPO's clip, as in DeepSeek-V3.2",
    ),
    "m2po": _gated(
        SecondMomentMask(),
        "r_t 1[kept] (R - mean): largest harmful |log r_t| dropped until their mean (log r)^2 <= 0.04",
        "m2po",
        note="the paper's Algorithm 1",
    ),
    "m2po_any_sign": _gated(
        SecondMomentMaskAnySign(),
        "r_t 1[kept] (R - mean): largest |log r_t| dropped, harmful or not, until mean (log r)^2 <= 0.04",
        "m2po",
        "areal",
        note="as in AReaL, there between behavior and proximal policy",
    ),
    "m2po_clip": _gated(
        SecondMomentClip(),
        "ppo_clip at |log r| = c per batch, mean min(|log r|, c)^2 = 0.04 over harmful tokens",
        "m2po",
        note="as in the authors' code",
    ),
    "ppo_clip": _gated(
        Clip(), "r_t 1[not (A > 0, r_t > 1.2) and not (A < 0, r_t < 0.8)] A, A = R - mean, per token", "ppo"
    ),
    "clip_higher": _gated(Clip(0.2, 0.28), "ppo_clip with bounds 0.8 and 1.28", "dapo", "ppo"),
    "dual_clip": _gated(Clip(dual=3.0), "ppo_clip, and 0 if A < 0 and r_t > 3", "dual_clip", "ppo"),
    "decoupled_ppo": _gated(
        DecoupledClip(),
        "r_t 1[pi/anchor not clipped as in ppo_clip] (R - mean) per token",
        "decoupled_ppo",
        "areal",
        note="lag 0 means pi = mu = anchor",
    ),
    "gspo": _gated(
        Clip(3e-4, 4e-4, level="geometric"),
        "(1/L) w^(1/L) 1[not clipped at 1 - 3e-4, 1 + 4e-4] (R - mean)",
        "gspo",
        host=_PER_TOKEN,
        note="lag 0: dr_grpo / L; the 1/L is part of its gradient",
    ),
    "gmpo": _gated(
        GeometricMeanClip(),
        "(1/L) exp(mean_t clipped log r_t) 1[|log r_t| <= 0.4 where harmful] (R - mean) per token",
        "gmpo",
        host=_PER_TOKEN,
        note="lag 0: dr_grpo / L; the 1/L is part of its gradient",
    ),
    "cispo": Entry(
        Estimator(Weighting("truncate", "token", cap=1.2), "group_mean"),
        "min(r_t, 1.2) (R - mean) per token",
        CENTERED,
        ("cispo",),
        _HOST,
        "without a lower bound: token_tis with another cap",
    ),
    "cispo_two_sided": Entry(
        Estimator(Weighting("clip", "token", cap=1.2, floor=0.8), "group_mean"),
        "max(0.8, min(r_t, 1.2)) (R - mean) per token",
        CENTERED,
        ("cispo",),
        _HOST,
        "with PPO's bounds on both sides, as in verl",
    ),
    "topr": Entry(
        Estimator(_NONE, surrogate=TaperNegatives()),
        "R for R >= 0, min(w, 1) R for R < 0",
        ON_POLICY,
        ("topr",),
        Estimator(_NONE),
        "the paper's: split by the sign of the reward, so meant for rewards of both signs",
    ),
    "topr_centered": _gated(
        TaperNegatives(level="geometric"),
        "A for A >= 0, min(w^(1/L), 1) A for A < 0, A = R - mean",
        "topr",
        note="as in a development version of verl (read; not in 0.9.1): by the sign of the advantage, per-token ratio",
    ),
    "dppo_binary_tv": _gated(
        DivergenceMask("binary_tv", 0.15, 0.15),
        "min(r_t, 20) 1[not (A > 0, pi - mu > 0.15) and not (A <= 0, mu - pi > 0.15)] A, A = R - mean",
        "dppo",
    ),
    "dppo_binary_kl": _gated(
        DivergenceMask("binary_kl", 0.05, 0.05),
        "min(r_t, 20) 1[not (KL of {y, rest} from mu > 0.05, moved in the harmful direction)] (R - mean)",
        "dppo",
    ),
    "dppo_binary_kl_anchor": _gated(
        DivergenceMask("binary_kl_anchor", 0.05, 0.05),
        "dppo_binary_kl with the divergence from the anchor policy",
        "dppo",
        note="binary_kl_recompute of TRL's experimental DPPO (read): anchor = trainer at the start of the epoch",
    ),
    "dppo_symmetric_tv": _gated(
        DivergenceMask("symmetric_tv", 0.2, 0.2),
        "min(r_t, 20) 1[|pi - mu| <= 0.2] (R - mean)",
        "dppo",
        note="whatever the sign of A, as prime-rl had it for a time",
    ),
    "gipo": _gated(GaussianTrust(), "r_t exp(-(log r_t)^2 / 2) (R - mean) per token", "gipo", note="sigma = 1"),
    "vespo": _gated(
        GammaShape(),
        "w^2 exp(3 (1 - w)) A for A >= 0, w^3 exp(2 (1 - w)) A for A < 0, A = R - mean",
        "vespo",
        note="defaults of the released code",
    ),
    "vespo_docstring": _gated(
        GammaShape((2.0, 1.5), (4.0, 2.5)),
        "w^2 exp(1.5 (1 - w)) A for A >= 0, w^4 exp(2.5 (1 - w)) A for A < 0, A = R - mean",
        "vespo",
        note="defaults that the docstring of the released code states",
    ),
    "sapo": _gated(
        SigmoidGate(),
        "r_t sech^2(tau (r_t - 1) / 2) (R - mean), tau = 1 for R > mean, 1.05 for R < mean",
        "sapo",
        note="as TRL and verl ship it; no bound on r_t, but the gate falls as exp(-tau r_t)",
    ),
    "luspo": _gated(
        Clip(2e-3, 2.5e-3, level="geometric", times_length=True),
        "w^(1/L) 1[not clipped at 1 - 2e-3, 1 + 2.5e-3] (R - mean)",
        "luspo",
        note="gspo times L; TRL's `luspo` at its default importance_sampling_level='token' is another formula",
    ),
    "drpo": _gated(
        DivergenceDamping(),
        "r_t [A - |A| (pi - mu) / 12.5], A = R - mean",
        "drpo",
        note="released epsilon, at which the bracket stays within 8% of A: it never corrects",
    ),
    "prime_rl_ipo": _gated(
        ProbabilityBand(),
        "r_t 1[|pi - mu| <= 0.1] (R - mean) - 2e-3 log r_t",
        "prime_rl",
        note="code of July 2026; a later one caps r_t and drops the quadratic term; dppo_symmetric_tv is capped at 20",
    ),
    "kimi_k15": _gated(
        QuadraticPull(),
        "R - mean - 0.1 log w",
        "kimi_k15",
        note="the square of the response's log-ratio; no ratio before the advantage",
    ),
    "kimi_k15_token": _gated(
        QuadraticPull(level="token"),
        "R - mean - 0.1 log r_t",
        "kimi_k15",
        note="the sum of squares of tokens, as in ROLL's kimi15 and Tinker's dro: another penalty than kimi_k15's",
    ),
    "ctpo": _gated(
        PrefixClip(0.025, 0.05),
        "R_t 1[not (A > 0, log R_t > 0.05 sqrt t) and not (A < 0, log R_t < -0.025 sqrt t)] A, A = R - mean",
        "ctpo",
        note="R_t is the ratio of the prefix up to t; the paper's form",
    ),
    "ctpo_released": _gated(
        PrefixClip(0.025, 0.05, dual=0.05),
        "ctpo, and 0 if R < mean and log R_t > 0.05 sqrt t",
        "ctpo",
        note="the released length-adaptive loss: its dual clip closes at the upper bound; without its clamps",
    ),
    "prefix_is": Entry(
        Estimator(_NONE, surrogate=PrefixClip()),
        "R_t R per token, R_t the ratio of the prefix up to t",
        ON_POLICY,
        ("ctpo",),
        Estimator(_NONE),
        "off policy what follows t is not weighted: unbiased for one token, or if the prefix decides the advantage",
    ),
    "cppo": _gated(
        PrefixBudget(),
        "r_t 1[A (r_t - 1) <= 0 or w_t |pi - mu| <= min(0.15, 0.15 + 0.015 W - S)] A, A = R - mean",
        "cppo",
        note="W, S: sums of w_j and w_j |pi - mu| over the prefix, w falling from 1 to 0.8; the dense models' settings",
    ),
    "kpo": _gated(
        KalmanClip(),
        "exp(xhat_t) 1[not clipped at 1 - 3e-4, 1 + 4e-4] (R - mean), xhat the filtered log r_t",
        "kpo",
        note="released q = 1e-6: it passes at most 0.1% of one log-ratio, 0.5% of a constant one after 100 tokens",
    ),
    "max_k3_mask": _gated(
        LargestK3(0.1),
        "1[max_t (r_t - 1 - log r_t) <= 0.1] (R - mean)",
        "mis",
        note="verl's seq_max_k3, which has no default limit: 0.1 is ours; the mask by itself, no ratio",
    ),
    "delta_l": _gated(
        LengthPower(),
        "L^-1 / mean_j L_j^-1 (R - mean), the mean over all responses",
        "delta_l",
        host=None,
        note="alpha = 1; ours without the ratio; unbiased only if lengths say nothing about the gradient",
    ),
    "maxrl": _gated(
        SuccessRate(),
        "(R - mean) / (mean + 1e-6), 0 for a group without success",
        "maxrl",
        host=None,
        note="on policy, of successes: [1 - (1-p)^(n-1)] / p times the gradient; refuses negative rewards with 0",
    ),
    "p3o": _gated(
        EssCap(),
        "min(r_t, ESS) (R - mean) - (1 - ESS) (1 - 1/r_t), ESS of the pool's tokens",
        "p3o",
        note="ESS is 0 where a ratio is not finite",
    ),
    "p3o_released": _gated(
        EssCap(fails_open=True),
        "p3o, with ESS = 1 where a sum of ratios is not finite",
        "p3o",
        note="as released, it fails open: the loosest cap and no pull just when ratios overflow",
    ),
    "p4o": _gated(
        EssCap(anchored=True),
        "min(r_t, e) (R - mean) - (1 - e) (1 - q/pi), e the lesser ESS of pi/mu and pi/anchor, q a mixture of both",
        "p3o",
        note="lag 0 means pi = mu = anchor",
    ),
    "bapo": _gated(
        BalancedClip(),
        "r_t 1[not clipped at low, high; dual clip 3] (R - mean), low 0.6 to 0.8, then high 1.2 to 2, until pos >= neg",
        "bapo",
        note="configuration of the released code; its README states other bounds, and target as another ratio",
    ),
    "kl_cov": _gated(
        CovariancePenalty(),
        "r_t (R - mean) - 0.1 sign(log r_t) on the tokens of largest (A - mean A)(log pi - mean log pi), 0.02% of them",
        "kl_cov",
        note="at least one token of a pool; as verl ships it: the gradient of |log r|, not of a KL divergence",
    ),
    "otb": Entry(
        Estimator(_TOKEN_TIS, "otb"),
        "min(r_t, 2) (R - B_t), W_it = sum_{j<=t} min(r_j, 2)^2 (1 - 2 pi(y_j) + sum_v pi(v)^2)",
        NEVER,
        ("otb",),
        Estimator(_NONE, "otb"),
        "as in verl's code with handle_zero_tail=False",
    ),
    "otb_outside": Entry(
        Estimator(_TOKEN_TIS, "otb_outside"),
        "min(r_t, 2) (R - B_t), W_it = min(r_t, 2)^2 sum_{j<=t} (1 - 2 pi(y_j) + sum_v pi(v)^2)",
        NEVER,
        ("otb",),
        Estimator(_NONE, "otb"),
        "as verl's docstring writes it, the ratio outside the sum",
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
