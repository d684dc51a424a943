"""Every gate against autograd: the coefficient times the score is the gradient of the published objective.

The objectives below are written from their papers or released code, in torch, with the ratios inside the graph wherever
the source differentiates through them. Nothing is shared with the kernel. An objective is per trajectory, (g, n), and
the estimate is the mean over a prompt's responses.
"""

import inspect
import math
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest

from tests.kit.rivals import draw
from tests.kit.statistical import assert_near, near
from vcposim import second_moment, surrogates
from vcposim.batch import Batch
from vcposim.catalogue import CATALOGUE
from vcposim.errors import InputError
from vcposim.estimators import Estimator
from vcposim.second_moment import SecondMomentClip, SecondMomentMask, SecondMomentMaskAnySign, cap_of_mean
from vcposim.surrogates import (
    Clip,
    DivergenceMask,
    GammaShape,
    GaussianTrust,
    NegativeSequenceMask,
    Product,
    Reject,
    TaperNegatives,
)
from vcposim.weights import Weighting

torch = pytest.importorskip("torch")


def clipped(r, a, low, high):
    return torch.minimum(r * a, torch.clamp(r, 1 - low, 1 + high) * a)


def token_sum(d, x):
    return (d.mask * x).sum(-1)


def ppo(d, low=0.2, high=0.2):
    return token_sum(d, clipped(torch.exp(d.log_pi - d.log_mu), d.a, low, high))


def dual_clip(d):
    inner = clipped(torch.exp(d.log_pi - d.log_mu), d.a, 0.2, 0.2)
    return token_sum(d, torch.where(d.a < 0, torch.maximum(inner, 3.0 * d.a), inner))


def geometric(d):
    return torch.exp(token_sum(d, d.log_pi - d.log_mu) / d.length)


def gspo(d):
    return clipped(geometric(d), d.a[..., 0], 3e-4, 4e-4)


def gmpo(d):
    sign = torch.sign(d.a)
    x = d.log_pi - d.log_mu
    x = sign * torch.minimum(sign * x, sign * torch.clamp(x, -0.4, 0.4))
    return d.a[..., 0] * torch.exp(token_sum(d, x) / d.length)


def decoupled(d):
    return token_sum(d, torch.exp(d.log_anchor - d.log_mu) * clipped(torch.exp(d.log_pi - d.log_anchor), d.a, 0.2, 0.2))


def harmful_tokens(d):
    x = (d.log_pi - d.log_mu).detach()
    moved = ((d.a > 0) & (x > 0)) | ((d.a < 0) & (x < 0))
    return x, moved & (d.mask > 0)


def m2po(d, any_sign=False):
    """Algorithm 1, as a loop: drop the largest until the mean fits."""
    x, counted = harmful_tokens(d)
    if any_sign:
        counted = d.mask > 0
    square, kept = x**2, counted.clone()
    while kept.any() and square[kept].mean() > 0.04:
        if any_sign and kept.sum() == 1:
            break
        kept.view(-1)[torch.where(kept, square, -1).argmax()] = False
    mask = kept | ~counted
    return token_sum(d, mask * torch.exp(d.log_pi - d.log_mu) * d.a)


def m2po_clip(d):
    """The cap by bisection, then PPO's clip."""
    x, counted = harmful_tokens(d)
    square = x[counted] ** 2
    low, high = 0.0, 100.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if torch.clamp(square, max=middle).mean() < 0.04 else (low, middle)
    cap = math.sqrt(low)
    return ppo(d, 1 - math.exp(-cap), math.exp(cap) - 1)


def sequence(d):
    return token_sum(d, d.log_pi - d.log_mu)


def log_likelihood(d):
    return token_sum(d, d.log_pi)


def topr(d, ratio, a):
    weight = torch.clamp(ratio.detach(), 0, 1)
    return torch.where(a >= 0, a * log_likelihood(d), weight * a * log_likelihood(d))


def detached(weight):
    return lambda d: token_sum(d, weight(torch.exp(d.log_pi - d.log_mu)).detach() * d.a * d.log_pi)


def vespo(positive, negative):
    def objective(d):
        w, a = torch.exp(sequence(d)).detach(), d.a[..., 0]
        phi = [w**k * torch.exp(rate * (1 - w)) for k, rate in (positive, negative)]
        return torch.where(a >= 0, phi[0], phi[1]) * a * log_likelihood(d)

    return objective


def dppo(kind, low, high):
    def objective(d):
        log_from = d.log_anchor if kind == "anchor" else d.log_mu
        p, q = torch.exp(d.log_pi), torch.exp(log_from)
        if kind == "tv":
            valid = torch.where(d.a > 0, p - q <= high, p - q >= -low)
        elif kind == "symmetric":
            valid = (p - q <= high) & (p - q >= -low)
        else:
            kl = q * (log_from - d.log_pi) + (1 - q) * torch.log((1 - q + 1e-8) / (1 - p + 1e-8))
            valid = torch.where(d.a > 0, (kl <= high) | (p <= q), (kl <= low) | (p >= q))
        ratio = torch.clamp(torch.exp(d.log_pi - d.log_mu), max=20.0).detach()
        return token_sum(d, d.a * ratio * d.log_pi * valid.detach())

    return objective


def gipo(d):
    r = torch.exp(d.log_pi - d.log_mu)
    return token_sum(d, torch.exp(-0.5 * torch.log(r) ** 2).detach() * r * d.a)


def negative_mask(d):
    drift = token_sum(d, d.log_mu - d.log_pi) / d.length
    return (~((d.a[..., 0] < 0) & (drift > 1e-4))).double().detach()


def rejected(ratio, low, high):
    return ((ratio >= low) & (ratio <= high)).double().detach()


def tba(d, beta=0.01):
    """Minus the VarGrad loss (log Z + log pi - log ref - R / beta)^2, log Z the detached mean, times beta / 2."""
    residual = token_sum(d, d.log_pi - d.log_reference) - d.reward / beta
    log_z = -residual.mean(-1, keepdim=True).detach()
    return -beta / 2 * (log_z + residual) ** 2


OBJECTIVES = {
    "ppo_clip": ppo,
    "clip_higher": lambda d: ppo(d, 0.2, 0.28),
    "dual_clip": dual_clip,
    "decoupled_ppo": decoupled,
    "gspo": gspo,
    "gmpo": gmpo,
    "m2po": m2po,
    "m2po_any_sign": lambda d: m2po(d, any_sign=True),
    "m2po_clip": m2po_clip,
    "cispo": detached(lambda r: torch.clamp(r, max=1.2)),
    "cispo_two_sided": detached(lambda r: torch.clamp(r, 0.8, 1.2)),
    "aipo": detached(lambda r: torch.clamp(r, max=4.0)),
    "token_tis": detached(lambda r: torch.clamp(r, max=2.0)),
    "token_mis": detached(lambda r: r * (r <= 2)),
    "icepop": detached(lambda r: r * (r >= 0.5) * (r <= 5)),
    "token_rejection": detached(lambda r: 1.0 * (r >= 0.5) * (r <= 2)),
    "sequence_tis": lambda d: torch.clamp(torch.exp(sequence(d)), max=8).detach() * d.a[..., 0] * log_likelihood(d),
    "sequence_tis_of_tokens": lambda d: (
        torch.where(d.mask > 0, torch.clamp(torch.exp(d.log_pi - d.log_mu), max=1), 1).prod(-1).detach()
        * d.a[..., 0]
        * log_likelihood(d)
    ),
    "sequence_mis": lambda d: torch.exp(sequence(d)) * rejected(torch.exp(sequence(d)), 0, 8) * d.a[..., 0],
    "sequence_is": lambda d: torch.exp(sequence(d)) * d.reward,
    "sequence_rejection": lambda d: rejected(torch.exp(sequence(d)), 1 / 8, 8) * d.a[..., 0] * log_likelihood(d),
    "geometric_mis": lambda d: rejected(geometric(d), 0.999, 1.001) * d.a[..., 0] * log_likelihood(d),
    "topr": lambda d: topr(d, torch.exp(sequence(d)), d.reward),
    "topr_centered": lambda d: topr(d, geometric(d), d.a[..., 0]),
    "negative_advantage_mask": lambda d: negative_mask(d) * d.a[..., 0] * log_likelihood(d),
    "ppo_negative_advantage_mask": lambda d: negative_mask(d) * ppo(d),
    "dppo_binary_tv": dppo("tv", 0.15, 0.15),
    "dppo_binary_kl": dppo("kl", 0.05, 0.05),
    "dppo_binary_kl_anchor": dppo("anchor", 0.05, 0.05),
    "dppo_symmetric_tv": dppo("symmetric", 0.2, 0.2),
    "gipo": gipo,
    "vespo": vespo((2, 3), (3, 2)),
    "vespo_docstring": vespo((2, 1.5), (4, 2.5)),
    "asymre": lambda d: (d.a[..., 0] + 0.1) * log_likelihood(d),
    "tba": tba,
}

LAG = {"geometric_mis": 0.002}
"""spread of logits at which both sides of a gate occur; 1 otherwise"""

SEEDS = (0, 1, 2)


def published_gradient(objective, sample, grouped):
    """d/d theta of the mean objective, by autograd, prompt by prompt unless the pool is the batch: (g, p)."""
    names = ("feature", "mask", "reward", "behavior", "anchor", "reference")
    tensor = {name: torch.tensor(getattr(sample, name)) for name in names}
    theta = torch.tensor(sample.theta, requires_grad=True)
    log_pi = torch.log_softmax(tensor["feature"] @ theta, -1)
    log_pi = torch.gather(log_pi, -1, torch.tensor(sample.token)[..., None])[..., 0]
    reward, mask = tensor["reward"], tensor["mask"]
    fields = {
        "log_pi": log_pi,
        "log_mu": tensor["behavior"],
        "log_anchor": tensor["anchor"],
        "log_reference": tensor["reference"],
        "reward": reward,
        "mask": mask,
        "length": mask.sum(-1),
        "a": (reward - reward.mean(-1, keepdim=True))[..., None].expand(mask.shape),
    }
    pools = [slice(None)] if grouped else [slice(g, g + 1) for g in range(len(reward))]
    value = torch.cat([objective(SimpleNamespace(**{k: v[pool] for k, v in fields.items()})) for pool in pools])
    rows = [torch.autograd.grad(row.mean(), theta, retain_graph=True)[0] for row in value]
    return torch.stack(rows).numpy()


def estimate(estimator, batch):
    """sum_i measure_i c_i s_i by the kernel: (g, p)."""
    c = estimator.coefficients(batch)
    measure = batch.measure if c.ndim == batch.reward.ndim else batch.measure[..., None]
    return batch.scored().combine(c * measure)


def difference(estimator, objective, seed, lag=1.0, grouped=False):
    sample = draw(seed, lag)
    return np.abs(
        estimate(estimator, sample.batch(grouped=grouped)) - published_gradient(objective, sample, grouped)
    ).max()


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_coefficient_times_score_is_the_gradient_of_the_published_objective(name, grouped):
    for seed in SEEDS:
        assert difference(CATALOGUE[name].estimator, OBJECTIVES[name], seed, LAG.get(name, 1.0), grouped) < 1e-10


def test_every_surrogate_of_the_catalogue_has_a_published_objective_here():
    assert {name for name, e in CATALOGUE.items() if e.estimator.surrogate is not None} <= set(OBJECTIVES)


WITH_A_GATE = sorted(
    name
    for name in OBJECTIVES
    if name.startswith(("ppo", "clip_", "dual", "decoupled", "gspo", "gmpo", "m2po", "dppo", "negative", "icepop"))
    or name.endswith(("rejection", "_mis"))
)


@pytest.mark.parametrize("name", WITH_A_GATE)
def test_the_batches_of_this_file_lie_on_both_sides_of_every_gate(name):
    open_gate = closed_gate = 0
    for seed in SEEDS:
        sample = draw(seed, LAG.get(name, 1.0))
        c = CATALOGUE[name].estimator.coefficients(sample.batch(grouped=False))
        c = (c if c.ndim == 3 else c[..., None] * np.ones(sample.mask.shape))[sample.mask > 0]
        open_gate, closed_gate = open_gate + (c != 0).sum(), closed_gate + (c == 0).sum()
    assert open_gate >= 5
    assert closed_gate >= 5


@pytest.mark.parametrize(
    ("name", "mutant"),
    [
        ("ppo_clip", Weighting("importance", "token")),
        ("ppo_clip", Weighting("mask", "token", cap=1.2, floor=0.8)),
        ("ppo_clip", Clip(0.2, 0.28)),
        ("clip_higher", Clip(0.28, 0.2)),
        ("dual_clip", Clip()),
        ("gspo", Clip(3e-4, 4e-4, level="sequence")),
        ("gspo", Weighting("importance", "geometric")),
        ("gmpo", Clip(1 - math.exp(-0.4), math.exp(0.4) - 1, level="geometric")),
        ("decoupled_ppo", Clip()),
        ("m2po", SecondMomentMaskAnySign()),
        ("m2po", SecondMomentClip()),
        ("m2po", SecondMomentMask(0.05)),
        ("m2po_any_sign", SecondMomentMask()),
        ("m2po_clip", SecondMomentMask()),
        ("cispo", Weighting("mask", "token", cap=1.2)),
        ("cispo", Weighting("clip", "token", cap=1.2, floor=0.8)),
        ("topr_centered", TaperNegatives()),
        ("negative_advantage_mask", Reject(math.inf, math.exp(-1e-4), "geometric")),
        ("ppo_negative_advantage_mask", NegativeSequenceMask()),
        ("dppo_binary_tv", DivergenceMask("symmetric_tv")),
        ("dppo_binary_kl", DivergenceMask("binary_tv")),
        ("dppo_binary_kl_anchor", DivergenceMask("binary_kl", 0.05, 0.05)),
        ("gipo", GaussianTrust(0.9)),
        ("vespo", GammaShape((3.0, 2.0), (2.0, 3.0))),
        ("sequence_tis_of_tokens", Weighting("truncate", cap=1.0)),
    ],
)
def test_that_check_rejects_a_wrong_gate(name, mutant):
    surrogate = None if isinstance(mutant, Weighting) else mutant
    weighting = mutant if surrogate is None else Weighting("none")
    wrong = Estimator(weighting, "group_mean", surrogate=surrogate)
    assert max(difference(wrong, OBJECTIVES[name], seed) for seed in SEEDS) > 1e-3


def test_the_length_in_gspo_is_part_of_its_gradient():
    """verl writes GSPO per token, s_it = sg(s_i) pi_t / sg(pi_t), averaged over the response: the same coefficient."""

    def per_token(d):
        s = geometric(d).detach()[..., None] * torch.exp(d.log_pi - d.log_pi.detach())
        return token_sum(d, clipped(s, d.a, 3e-4, 4e-4)) / d.length

    assert difference(CATALOGUE["gspo"].estimator, per_token, seed=3) < 1e-10


def test_dropping_by_second_moment_on_a_case_done_by_hand():
    # squares 0.01, 0.04, 0.25 for A > 0: mean 0.1; without the largest 0.025 <= 0.04. The fourth is not harmful.
    batch = Batch(reward=np.array([1.0]), log_ratio=np.array([[0.1, 0.2, 0.5, -3.0]]))
    success, failure = np.array([1.0]), np.array([-1.0])
    assert_near(SecondMomentMask()(batch, success), np.exp([[0.1, 0.2, -np.inf, -3.0]]), scale=0)
    # any sign: 9 goes, then 0.25
    assert_near(SecondMomentMaskAnySign()(batch, success), np.exp([[0.1, 0.2, -np.inf, -np.inf]]), scale=0)
    # A < 0 makes only the fourth harmful, and alone it exceeds the budget
    assert_near(SecondMomentMask()(batch, failure), np.exp([[0.1, 0.2, 0.5, -np.inf]]), scale=0)


def test_masking_any_sign_never_drops_the_closest_token():
    batch = Batch(reward=np.array([1.0]), log_ratio=np.array([[2.0, -1.0]]))
    assert_near(SecondMomentMaskAnySign()(batch, np.array([1.0])), [[0.0, np.exp(-1.0)]], scale=0)


@pytest.mark.parametrize("seed", range(20))
def test_the_cap_solves_its_equation(seed):
    rng = np.random.default_rng(seed)
    x, counted = rng.exponential(size=(4, 9)), rng.random((4, 9)) < 0.7
    counted[0] = False
    cap = cap_of_mean(x, counted, 0.3)
    for row, (limit,), chosen in zip(x, cap, counted, strict=True):
        if not chosen.any():
            assert limit == -math.inf  # nothing counts, nothing is compared with it
        elif row[chosen].mean() <= 0.3:
            assert limit >= row[chosen].max()
        else:
            assert np.minimum(row[chosen], limit).mean() == near(0.3)


def test_a_pool_is_a_group_or_the_whole_batch():
    # the first prompt is within budget by itself, the second far out; in one pool the same token of prompt 1 stays
    x = np.array([[[0.1, 0.2]], [[0.1, 0.9]]])
    advantage = np.array([[1.0], [1.0]])
    alone = SecondMomentMask(0.021)(Batch(reward=advantage, log_ratio=x), advantage)
    together = SecondMomentMask(0.021)(Batch(reward=advantage, log_ratio=x, grouped=True), advantage)
    assert_near(alone != 0, [[[True, False]], [[True, False]]], scale=0)
    assert_near(together != 0, [[[True, True]], [[True, False]]], scale=0)


EXACT = (
    Clip(),
    Clip(dual=3.0),
    Clip(level="sequence"),
    TaperNegatives(),
    Reject(2.0, 0.5),
    Reject(2.0, 0.5, "token"),
    Product((Clip(), Reject(2.0))),
)


@pytest.mark.parametrize("surrogate", EXACT, ids=repr)
def test_comparisons_run_on_exact_rationals(surrogate):
    rng = np.random.default_rng(0)
    ratio = np.array([[Fraction(int(k), 7) for k in row] for row in rng.integers(1, 40, size=(5, 3))])
    reward = np.array([Fraction(int(k)) for k in rng.integers(-3, 4, size=5)])
    exact = Estimator(Weighting("none"), "group_mean", surrogate=surrogate).coefficients(
        Batch(reward=reward, ratio=ratio)
    )
    floats = Estimator(Weighting("none"), "group_mean", surrogate=surrogate).coefficients(
        Batch(reward=reward.astype(float), log_ratio=np.log(ratio.astype(float)))
    )
    assert all(isinstance(x, Fraction | int) for x in exact.reshape(-1))
    assert_near(exact.astype(float), floats)


def test_the_kernel_imports_no_array_library_here():
    for module in (surrogates, second_moment):
        source = inspect.getsource(module)
        assert not any(f"import {library}" in source for library in ("numpy", "torch", "scipy"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Clip(level="tokens"), "level: unknown name 'tokens'; did you mean 'token'"),
        (lambda: Clip(low=-0.1), "low: -0.1 is not"),
        (lambda: Clip(high=float("nan")), "high: nan is not"),
        (lambda: Clip(dual=0.5), "dual: 0.5 is not above 1"),
        (lambda: SecondMomentMask(-1), "budget: -1 is not"),
        (lambda: GaussianTrust(0.0), "sigma: 0.0 is not"),
        (lambda: GammaShape((0.0, 1.0)), "positive: .* is not a pair"),
        (lambda: DivergenceMask("tv"), "divergence: unknown name 'tv'"),
        (lambda: TaperNegatives(level="tree"), "level: unknown name 'tree'"),
        (lambda: Reject(-1.0), "cap: -1.0 is not"),
    ],
)
def test_a_wrong_setting_is_refused_in_one_line(make, message):
    with pytest.raises(InputError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_formulas_with_logarithms_ask_for_floats():
    batch = Batch(reward=np.array([Fraction(1)]), ratio=np.array([[Fraction(1, 2)]]))
    with pytest.raises(InputError, match="ratio: GaussianTrust needs logarithms; pass log_ratio"):
        GaussianTrust()(batch, batch.reward)
