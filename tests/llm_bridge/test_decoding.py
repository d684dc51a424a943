"""Sampling on the device equals the sampler that it replaces, token for token."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llm_bridge.decoding import Decoder, FastSampler, decodes
from llm_bridge.logprobs import token_log_prob
from llm_bridge.models.language_model import CharTokenizer, LanguageModel
from llm_bridge.rollouts import Rollouts, Sampler
from llm_bridge.tasks import load_task
from tests.llm_bridge.training.toys import Letters, tiny

GROUPS, SIZE, TOKENS = 6, 4, 12
ROUNDING = 1e-5
"""of log-probabilities of a few nats, in float32"""


def drawn(kind: type[Sampler], lm: LanguageModel, seed: int = 0, **changes: object) -> Rollouts:
    settings = {"task": Letters(), "group_size": SIZE, "max_new_tokens": TOKENS, "seed": seed} | changes
    sampler = kind(**settings)  # type: ignore[arg-type]
    return sampler.finished(lm, sampler.advance(lm, sampler.start(lm, list(range(GROUPS))), version=3))


def grouped_heads() -> LanguageModel:
    """Fewer keys than queries, a tied head, and a head size that is not width / heads."""
    tokenizer = CharTokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=36, intermediate_size=40, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)
    return LanguageModel(model, tokenizer, "grouped")


def assert_same(fast: Rollouts, slow: Rollouts, tolerance: float) -> None:
    for name in ("token", "attention_mask", "mask", "version", "reward", "group", "finished"):
        assert torch.equal(getattr(fast, name), getattr(slow, name)), name
    assert fast.responses == slow.responses
    torch.testing.assert_close(fast.behavior_log_prob, slow.behavior_log_prob, atol=tolerance, rtol=0)


@pytest.mark.parametrize("make", [tiny, grouped_heads])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_the_slow_sampler(make: Callable[[], LanguageModel], temperature: float, dtype: torch.dtype) -> None:
    lm = make().to(dtype)
    for seed in range(3):
        slow, fast = (drawn(kind, lm, seed, temperature=temperature) for kind in (Sampler, FastSampler))
        assert 0 < slow.finished.float().mean() < 1, "rows that end and rows that do not"
        assert_same(fast, slow, ROUNDING)


def test_takes_the_fast_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equality alone could be the fallback's."""
    monkeypatch.setattr(Sampler, "advance", None)
    assert len(drawn(FastSampler, tiny())) == GROUPS * SIZE


def test_follows_weights_that_change_in_place() -> None:
    """One decoder for a whole training: the captured step must not remember weights of old."""
    lm = grouped_heads()
    decoders: dict[Any, Decoder] = {}
    before = drawn(FastSampler, lm, decoders=decoders)
    with torch.no_grad():
        for p in lm.model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    after = drawn(FastSampler, lm, decoders=decoders)
    assert len(decoders) == 1
    assert not torch.equal(after.token, before.token)
    assert_same(after, drawn(Sampler, lm), ROUNDING)


def test_a_second_generation_sees_nothing_of_the_first() -> None:
    """The cache is not cleared: slots of the last generation must be overwritten or hidden."""
    lm = tiny()
    decoders: dict[Any, Decoder] = {}
    for seed in (1, 2):
        fast = drawn(FastSampler, lm, seed, decoders=decoders)
    assert_same(fast, drawn(Sampler, lm, 2), ROUNDING)


def test_autocast_rounds_as_the_slow_sampler_does() -> None:
    """Sampler and learner are two computations of one policy: in bfloat16 they differ by rounding, a lag of its own.
    The decoder's may be no larger than the slow sampler's (half as much again, over some 300 tokens)."""
    lm = grouped_heads()
    gap = {}
    for kind in (Sampler, FastSampler):
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            out = drawn(kind, lm)
            learner = token_log_prob(lm.model, out)
        gap[kind] = float(((out.behavior_log_prob - learner) * out.mask).square().mean().sqrt())
    assert 0 < gap[FastSampler] < 1.5 * gap[Sampler]


def test_several_turns_and_pieces_fall_back() -> None:
    lm = tiny()
    task = load_task("calculator", style="short")
    slow, fast = (drawn(kind, lm, task=task) for kind in (Sampler, FastSampler))
    assert_same(fast, slow, 0)
    sampler = FastSampler(Letters(), SIZE, TOKENS, 0)
    state = sampler.start(lm, list(range(GROUPS)))
    while not all(row.done for row in state.rows):
        sampler.advance(lm, state, tokens=3, version=3)
    assert_same(sampler.finished(lm, state), drawn(Sampler, lm), ROUNDING)


def test_knows_what_it_does_not_decode() -> None:
    model = tiny().model
    assert decodes(model)
    for name, value in (("attention_bias", True), ("hidden_act", "gelu"), ("model_type", "qwen3"), ("mlp_bias", True)):
        was = getattr(model.config, name)
        setattr(model.config, name, value)
        assert not decodes(model), name
        setattr(model.config, name, was)


def test_one_buffer_for_one_shape() -> None:
    decoder = Decoder(tiny().model, torch.float32)
    assert decoder.loop(4, 64, 8, 1.0) is decoder.loop(4, 64, 8, 1.0)
    assert decoder.loop(4, 64, 8, 1.0) is not decoder.loop(4, 128, 8, 1.0)
