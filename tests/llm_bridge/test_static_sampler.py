"""The static sampler draws the tokens that `Sampler` draws, and hands over what it does not serve."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from llm_bridge.models.language_model import CharTokenizer, LanguageModel, char_llama  # noqa: E402
from llm_bridge.rollouts import Rollouts, Sampler  # noqa: E402
from llm_bridge.static_sampler import StaticSampler, served  # noqa: E402
from llm_bridge.tasks import load_task  # noqa: E402
from tests.kit.statistical import OPERATION, assert_near  # noqa: E402
from tests.llm_bridge.training.toys import Letters, tiny  # noqa: E402


def drawn(kind: type[Sampler], lm: LanguageModel, task: object, new: int, problems: list[int]) -> Rollouts:
    sampler = kind(task, 4, new, 0, 0.9)  # type: ignore[arg-type]
    return sampler.finished(lm, sampler.advance(lm, sampler.start(lm, problems), version=3))


@pytest.mark.parametrize("new", [0, 1, 5, 12])
@pytest.mark.parametrize("task", [Letters(), load_task("addition")], ids=["two prompt lengths", "addition"])
def test_it_draws_what_the_sampler_draws(task: object, new: int):
    lm = tiny()
    lm.model.double()
    slow, fast = (drawn(kind, lm, task, new, [0, 1, 2, 5]) for kind in (Sampler, StaticSampler))
    for name in ("token", "attention_mask", "mask", "version", "reward", "group", "finished"):
        assert torch.equal(getattr(slow, name), getattr(fast, name)), name
    assert slow.responses == fast.responses
    assert_near(fast.behavior_log_prob, slow.behavior_log_prob, allow=OPERATION)


def test_a_decoder_used_again_sees_new_weights_and_nothing_of_the_past():
    lm, sampler = tiny(), StaticSampler(Letters(), 4, 6, 0)
    once = sampler.advance(lm, sampler.start(lm, [0, 1]))
    with torch.no_grad():
        for p in lm.model.parameters():
            p.mul_(-0.7)
    again = sampler.finished(lm, sampler.advance(lm, sampler.start(lm, [0, 1])))
    assert len(sampler._decoders) == 1
    assert torch.equal(again.token, drawn_default(lm).token)
    assert not torch.equal(again.token, sampler.finished(lm, once).token)


def drawn_default(lm: LanguageModel) -> Rollouts:
    sampler = Sampler(Letters(), 4, 6, 0)
    return sampler.finished(lm, sampler.advance(lm, sampler.start(lm, [0, 1])))


def test_it_serves_grouped_heads_and_refuses_what_it_does_not_know():
    tokenizer = CharTokenizer()
    model = char_llama(tokenizer, hidden=32, heads=4, length=48)
    model.config.hidden_act = "gelu"
    assert not served(model)
    model.config.hidden_act = "silu"
    assert served(model)
    biased = type(model)(type(model.config)(**{**model.config.to_dict(), "attention_bias": True}))
    assert not served(biased)
    grouped = type(model)(type(model.config)(**{**model.config.to_dict(), "num_key_value_heads": 2})).double().eval()
    lm = LanguageModel(grouped, tokenizer, "char")
    slow, fast = (drawn(kind, lm, Letters(), 5, [0, 1]) for kind in (Sampler, StaticSampler))
    assert torch.equal(slow.token, fast.token)


def test_sampling_in_pieces_is_the_samplers():
    lm = tiny()
    states = []
    for kind in (Sampler, StaticSampler):
        sampler = kind(Letters(), 4, 6, 0)
        state = sampler.start(lm, [0, 1])
        for version in range(3):
            sampler.advance(lm, state, 3, version)
        states.append(sampler.finished(lm, sampler.advance(lm, state, None, 3)))
    assert torch.equal(states[0].token, states[1].token)
    assert torch.equal(states[0].version, states[1].version)
