"""The static sampler draws the tokens that `Sampler` draws, and hands over what it does not serve."""

from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

from llm_bridge.logprobs import token_log_prob  # noqa: E402
from llm_bridge.models.language_model import CharTokenizer, LanguageModel  # noqa: E402
from llm_bridge.rollouts import Rollouts, Sampler  # noqa: E402
from llm_bridge.static_sampler import Decoder, StaticSampler, served  # noqa: E402
from llm_bridge.tasks import load_task  # noqa: E402
from tests.kit.statistical import OPERATION, SINGLE, assert_near  # noqa: E402
from tests.llm_bridge.training.toys import Letters, tiny  # noqa: E402

GROUPS, SIZE, TOKENS = 6, 4, 12


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


def assert_same(fast: Rollouts, slow: Rollouts, allow: float = SINGLE) -> None:
    for name in ("token", "attention_mask", "mask", "version", "reward", "group", "finished"):
        assert torch.equal(getattr(fast, name), getattr(slow, name)), name
    assert fast.responses == slow.responses
    assert_near(fast.behavior_log_prob, slow.behavior_log_prob, allow=allow)


@pytest.mark.parametrize("make", [tiny, grouped_heads])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_the_slow_sampler(make: Callable[[], LanguageModel], temperature: float, dtype: Any) -> None:
    lm = make().to(dtype)
    for seed in range(3):
        slow, fast = (drawn(kind, lm, seed, temperature=temperature) for kind in (Sampler, StaticSampler))
        assert 0 < slow.finished.float().mean() < 1, "rows that end and rows that do not"
        assert_same(fast, slow, SINGLE if dtype == torch.float32 else OPERATION)


@pytest.mark.parametrize("new", [0, 1, 5])
def test_any_number_of_tokens(new: int) -> None:
    lm = tiny().to(torch.float64)
    for task in (Letters(), load_task("addition")):
        slow, fast = (drawn(kind, lm, task=task, max_new_tokens=new) for kind in (Sampler, StaticSampler))
        assert_same(fast, slow, OPERATION)


def test_takes_the_fast_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equality alone could be the fallback's."""
    monkeypatch.setattr(Sampler, "advance", None)
    assert len(drawn(StaticSampler, tiny())) == GROUPS * SIZE


def test_follows_weights_that_change_in_place() -> None:
    """One decoder for a whole training: the captured step must not remember weights of old."""
    lm = grouped_heads()
    decoders: dict[Any, Decoder] = {}
    before = drawn(StaticSampler, lm, decoders=decoders)
    with torch.no_grad():
        for p in lm.model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    after = drawn(StaticSampler, lm, decoders=decoders)
    assert len(decoders) == 1
    assert not torch.equal(after.token, before.token)
    assert_same(after, drawn(Sampler, lm))


def test_a_second_generation_sees_nothing_of_the_first() -> None:
    """The cache is not cleared: slots of the last generation must be overwritten or hidden."""
    lm = tiny()
    decoders: dict[Any, Decoder] = {}
    for seed in (1, 2):
        fast = drawn(StaticSampler, lm, seed, decoders=decoders)
    assert_same(fast, drawn(Sampler, lm, 2))


def test_autocast_rounds_as_the_slow_sampler_does() -> None:
    """Sampler and learner are two computations of one policy: in bfloat16 they differ by rounding, a lag of its own.
    The decoder's may be no larger than the slow sampler's (half as much again, over some 300 tokens)."""
    lm = grouped_heads()
    gap = {}
    for kind in (Sampler, StaticSampler):
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            out = drawn(kind, lm)
            learner = token_log_prob(lm.model, out)
        gap[kind] = float(((out.behavior_log_prob - learner) * out.mask).square().mean().sqrt())
    assert 0 < gap[StaticSampler] < 1.5 * gap[Sampler]


def test_several_turns_and_pieces_fall_back() -> None:
    lm = tiny()
    task = load_task("calculator", style="short")
    slow, fast = (drawn(kind, lm, task=task) for kind in (Sampler, StaticSampler))
    assert_same(fast, slow)
    sampler = StaticSampler(Letters(), SIZE, TOKENS, 0)
    state = sampler.start(lm, list(range(GROUPS)))
    while not all(row.done for row in state.rows):
        sampler.advance(lm, state, tokens=3, version=3)
    assert_same(sampler.finished(lm, state), drawn(Sampler, lm))


def test_knows_what_it_does_not_decode() -> None:
    model = tiny().model
    assert served(model)
    plain = model.config.to_dict()
    assert not served(type(model)(type(model.config)(**plain | {"attention_bias": True})))
    assert not served(type(model)(type(model.config)(**plain | {"mlp_bias": True})))
    model.config.hidden_act = "gelu"
    assert not served(model)


def test_one_buffer_for_one_shape() -> None:
    decoder = Decoder(tiny().model, torch.float32)
    assert decoder.loop(4, 64, 8, 1.0) is decoder.loop(4, 64, 8, 1.0)
    assert decoder.loop(4, 64, 8, 1.0) is not decoder.loop(4, 128, 8, 1.0)
