"""One formula on both sides: the kernel on torch is the kernel on NumPy, and a transformer that plays a bandit has the
laboratory's exact moments.

The bandit: a GPT-2 with a vocabulary of K arms and a completion of one token. Every batch of n draws is enumerated with
its exact probability, run through the bridge (ratios, norms from the tape, kernel coefficients, autograd), and what
arrives in `p.grad` is averaged. `vcposim.laboratory.exact` computes the same moments from the scores alone.
"""

import itertools
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from llm_bridge import ScoreTape, TokenBatch, mean_coefficient, surrogate, token_log_prob, trajectory_batch  # noqa: E402
from tests.kit.statistical import assert_near, near  # noqa: E402
from vcposim.batch import Batch, DenseScores, ScoreNorms, sample_measure  # noqa: E402
from vcposim.catalogue import CATALOGUE, entry  # noqa: E402
from vcposim.control import step_scale  # noqa: E402
from vcposim.diagnostics import ess_fraction, weight_sums  # noqa: E402
from vcposim.estimators import Estimator  # noqa: E402
from vcposim.laboratory import exact  # noqa: E402
from vcposim.problems.bandits import BanditProblem  # noqa: E402

GROUPS, SAMPLES, TOKENS, PARAMETERS = 4, 6, 5, 7
SPREADS = (1e-4, 0.3, 2.5)


# --- the kernel on torch and on NumPy ---------------------------------------------------------------------------------


def arrays(seed: int = 0, spread: float = 0.3) -> dict[str, np.ndarray]:
    """Every column a batch can have; ragged groups, ragged trajectories. `spread`: nats between the policies."""
    rng = np.random.default_rng(seed)
    shape = (GROUPS, SAMPLES, TOKENS)
    log_prob = -rng.exponential(1.0, shape)
    prob = np.exp(log_prob)
    # other policies' log-probs are negative too: a common part of log_prob times a factor around 1
    behavior, anchor = (log_prob * np.exp(width * rng.normal(size=shape)) for width in (spread, spread / 2))
    length = rng.integers(1, TOKENS + 1, shape[:2])
    present = np.ones(shape[:2])
    present[1, -1] = present[3, -2:] = 0.0
    return {
        "reward": rng.integers(0, 2, shape[:2]) + 0.1 * rng.normal(size=shape[:2]),
        "log_ratio": log_prob - behavior,
        "token_mask": (np.arange(TOKENS) < length[..., None]).astype(float),
        "log_prob": log_prob,
        "collision": prob**2 + (1 - prob) ** 2 * rng.uniform(size=shape),
        "anchor_log_ratio": log_prob - anchor,
        "reference_log_ratio": rng.normal(size=shape[:2]),
        "population_baseline": rng.uniform(size=(GROUPS, 1)),
        "score": rng.normal(size=(*shape, PARAMETERS)),
        "present": present,
    }


def batch_of(convert: Callable[[np.ndarray], Any], columns: dict[str, np.ndarray], *, norms: bool = False) -> Batch:
    """The same batch in any library: token scores, or trajectory log-ratios with norms alone."""
    column = {name: convert(x) for name, x in columns.items()}
    measure, unit = sample_measure(column.pop("present"))
    scores = DenseScores(column.pop("score"), per_token=True)
    if norms:
        one = column["reward"] * 0 + 1
        norm = scores.masked(column["token_mask"]).sq_norm(one)
        total, length = (column["log_ratio"] * column["token_mask"]).sum(-1), column["token_mask"].sum(-1)
        kept = {name: column[name] for name in ("reward", "reference_log_ratio", "population_baseline")}
        return Batch(
            **kept, log_ratio=total, length=length, scores=ScoreNorms(norm), measure=measure, unit=unit, grouped=True
        )
    return Batch(**column, scores=scores, measure=measure, unit=unit, grouped=True)


def takes_norms(estimator: Estimator) -> bool:
    """Whether trajectory log-ratios with norms are all it needs."""
    per_token = {"tokens", "log_prob", "collision", "anchor_log_ratio"}
    return not (estimator.needs & per_token) and estimator.baseline != "opob_truncated"


def check_same(estimator: Estimator, convert: Callable[[np.ndarray], Any] = torch.tensor, **how: bool) -> None:
    """Equal to rounding at every spread, and not all zero: some estimators mask everything far from the behavior."""
    sizes = []
    for spread in SPREADS:
        columns = arrays(spread=spread)
        expected = estimator.coefficients(batch_of(np.array, columns, **how))
        found = estimator.coefficients(batch_of(convert, columns, **how)).numpy()
        sizes.append(np.abs(expected).max())
        assert_near(found, expected, scale=sizes[-1])
    assert max(sizes) > 0.01


@pytest.mark.parametrize("name", sorted(CATALOGUE))
def test_coefficients_from_token_scores(name: str) -> None:
    check_same(CATALOGUE[name].estimator)


@pytest.mark.parametrize("name", sorted(name for name, one in CATALOGUE.items() if takes_norms(one.estimator)))
def test_coefficients_from_trajectory_norms(name: str) -> None:
    check_same(CATALOGUE[name].estimator, norms=True)


def test_norms_serve_most_of_the_catalogue() -> None:
    served = [name for name, one in CATALOGUE.items() if takes_norms(one.estimator)]
    assert len(served) >= len(CATALOGUE) // 3
    assert {"vcpo", "vcpo_leave_one_out", "vcpo_released", "grpo", "self_normalized"} <= set(served)


def test_parity_would_see_float32() -> None:
    with pytest.raises(AssertionError, match="off by"):
        check_same(entry("vcpo").estimator, lambda x: torch.tensor(x, dtype=torch.float32))


@pytest.mark.parametrize("spread", [0.1, 10.0, 3000.0])
def test_ess_and_step_scale(spread: float) -> None:
    x = spread * np.random.default_rng(2).normal(size=64)
    both = ess_fraction(torch.tensor(x)), ess_fraction(x)
    sums = weight_sums(torch.tensor(x)).ess_fraction(), weight_sums(x).ess_fraction()
    for found, expected in (both, sums, (step_scale(both[0]), step_scale(np.asarray(both[1])))):
        assert float(found) == near(float(expected), scale=0)


# --- a bandit played by a transformer ---------------------------------------------------------------------------------

ARMS, PROMPTS, DRAWS = 4, 2, 3
REWARD = np.array([[1.0, 0.0, 0.3, -0.5], [0.0, 2.0, 1.0, 0.2]])
PROMPT_PROBABILITY = np.array([0.4, 0.6])


@cache
def player(seed: int):
    """A GPT-2 whose first token is the prompt and whose second, of ARMS possible, is the arm; float64."""
    config = transformers.GPT2Config(
        vocab_size=ARMS, n_positions=2, n_embd=6, n_layer=1, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = transformers.GPT2LMHeadModel(config).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model


def plays(prompt: int, arms) -> TokenBatch:
    token = torch.tensor([[prompt, arm] for arm in arms])
    return TokenBatch(token, torch.tensor([[0.0, 1.0]]).double().repeat(len(arms), 1))


def gradient_vector(model):
    # attention's key bias and the second position have no effect; a parameter without gradient has score 0
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in model.parameters()])


@cache
def laboratory() -> BanditProblem:
    """The same bandit for the laboratory: full-vocabulary probabilities, and scores by one backward per arm."""
    probability, score = np.empty((2, PROMPTS, ARMS)), []
    for prompt in range(PROMPTS):
        batch = plays(prompt, range(ARMS))
        for row, seed in enumerate((0, 1)):
            probability[row, prompt] = token_log_prob(player(seed), batch)[:, 1].exp().detach().numpy()
        for arm in range(ARMS):
            player(0).zero_grad()
            token_log_prob(player(0), plays(prompt, [arm]))[0, 1].backward()
            score.append(gradient_vector(player(0)).numpy().copy())
    target, behavior = (p / p.sum(-1, keepdims=True) for p in probability)
    return BanditProblem(
        target=target, behavior=behavior[None], reward=REWARD, group_probability=PROMPT_PROBABILITY,
        version_probability=np.ones(1), score=np.array(score).reshape(PROMPTS, ARMS, -1),
    )  # fmt: skip


def through_the_bridge(name: str, prompt: int, arms, *, by_tape: bool, loss_of=surrogate):
    """The gradient estimate of one batch as it arrives in p.grad, and the mean of ||c_i s_i||^2."""
    model, batch = player(0), plays(prompt, arms)
    model.zero_grad()
    with torch.no_grad():
        behavior = token_log_prob(player(1), batch)
    reward = torch.tensor(REWARD[prompt][list(arms)])

    def coefficient(log_prob, sq_norm):
        record = trajectory_batch(reward, log_prob, behavior, batch.mask, score_sq_norm=sq_norm, level="sequence")
        c = entry(name).estimator.coefficients(record)
        return mean_coefficient(c, record), float((c.square() * sq_norm).mean())

    with ScoreTape(model) as tape:
        log_prob = token_log_prob(model, batch)
        sq_norm = tape.score_sq_norms(log_prob, batch.mask, keep=by_tape)
        c, contribution = coefficient(log_prob, sq_norm)
        if by_tape:
            tape.backward(c)
    if not by_tape:
        log_prob = token_log_prob(model, batch)
        loss_of(c, log_prob, batch.mask).backward()
    return -gradient_vector(model).numpy(), contribution


def enumerated(name: str, **how: Any) -> tuple[np.ndarray, float, float]:
    """Mean, variance of the mean and variance per sample over all batches of DRAWS, each with its probability."""
    behavior = laboratory().behavior[0]
    mean, square, contribution = 0.0, 0.0, 0.0
    for prompt, arms in itertools.product(range(PROMPTS), itertools.product(range(ARMS), repeat=DRAWS)):
        mass = PROMPT_PROBABILITY[prompt] * behavior[prompt][list(arms)].prod()
        g, c = through_the_bridge(name, prompt, arms, **how)
        mean, square, contribution = mean + mass * g, square + mass * (g @ g), contribution + mass * c
    return np.asarray(mean), square - mean @ mean, contribution - mean @ mean  # type: ignore[operator]


def check_moments(name: str, **how: Any) -> None:
    mean, variance_of_mean, variance_per_sample = enumerated(name, **how)
    expected = exact.moments(laboratory(), entry(name).estimator, DRAWS)
    size = float(np.linalg.norm(expected.gradient))
    assert_near(mean, expected.mean, scale=size)
    assert variance_of_mean == near(float(expected.variance_of_mean))
    assert variance_per_sample == near(float(expected.variance_per_sample))


@pytest.mark.parametrize("by_tape", [True, False], ids=["tape", "surrogate"])
@pytest.mark.parametrize("name", ["sequence_is_opob_leave_one_out", "vcpo", "vcpo_group_std"])
@pytest.mark.slow
def test_a_transformer_bandit_has_the_laboratorys_exact_moments(name: str, by_tape: bool) -> None:
    check_moments(name, by_tape=by_tape)


def test_the_comparison_would_see_a_gradient_through_the_weights() -> None:
    def without_fixing(coefficient, log_prob, mask):
        ratio = torch.exp((log_prob - log_prob.detach()) * mask).prod(-1)  # 1, with the gradient of the ratio
        return surrogate(coefficient, log_prob, mask) - (coefficient * ratio).sum()

    with pytest.raises(AssertionError, match="off by"):
        check_moments("sequence_is", by_tape=False, loss_of=without_fixing)


def test_the_laboratorys_gradient_is_the_models() -> None:
    """grad E_pi[R] by autograd through the probabilities themselves, without any score or estimator."""
    model = player(0)
    model.zero_grad()
    value = 0.0
    for prompt in range(PROMPTS):
        prob = token_log_prob(model, plays(prompt, range(ARMS)))[:, 1].exp()
        value = value + PROMPT_PROBABILITY[prompt] * (prob * torch.tensor(REWARD[prompt])).sum()
    value.backward()
    expected = gradient_vector(model).numpy()
    assert_near(laboratory().gradient, expected, scale=float(np.linalg.norm(expected)))
    unbiased = exact.moments(laboratory(), entry("sequence_is_opob_leave_one_out").estimator, DRAWS)
    assert_near(unbiased.mean, expected, scale=float(np.linalg.norm(expected)))
