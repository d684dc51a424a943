"""Rollouts: log-probabilities are those of what was drawn, by the version that drew it, whoever else is there."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from llm_bridge.logprobs import log_prob_of, next_token_logits, token_log_prob
from llm_bridge.models.language_model import CharTokenizer, LanguageModel, char_llama
from llm_bridge.rollouts import Rollouts, Sampler, SamplerState, draw, sample
from llm_bridge.tasks import load_task
from llm_bridge.tasks.base import TaskProblem
from tests.kit.statistical import assert_mean_equals, assert_rounding_only
from vcposim.errors import InputError

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Talk:
    """Prompts of unequal lengths; the environment answers each of the first turns; pays for a first turn with an a."""

    name: str = "talk"
    kind: str = "tool"
    options: dict[str, Any] = field(default_factory=dict)
    max_turns: int = 3

    def problem(self, index: int) -> TaskProblem:
        return TaskProblem(index, "ab" * (1 + index % 3) + "b" * (index % 2), None)

    def reply(self, problem: TaskProblem, responses: Sequence[str]) -> str | None:
        return None if len(responses) == self.max_turns else "bb" * len(responses)

    def reward(self, problem: TaskProblem, responses: Sequence[str]) -> float:
        return float(bool(responses) and "a" in responses[0])

    def demonstration(self, problem: TaskProblem) -> list[str]:
        return ["a", "b", "a"]


TASK = Talk()


def policy(seed: int = 0, length: int = 64) -> LanguageModel:
    """A random model of three tokens (end, a, b) whose distribution visibly depends on the past."""
    tokenizer = CharTokenizer("ab")
    model = char_llama(tokenizer, hidden=16, layers=2, heads=2, length=length, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return LanguageModel(model, tokenizer, "tiny")


def rollouts(lm: LanguageModel, problems: Sequence[int] = (0, 1, 2, 3), **change: Any) -> Rollouts:
    return sample(lm, TASK, problems, **{"group_size": 4, "max_new_tokens": 12, "seed": 5, **change})


def assert_same(one: Rollouts, other: Rollouts) -> None:
    """Equal up to the rounding of logits."""
    for name, x in one.state_dict().items():
        y = getattr(other, name)
        if name == "behavior_log_prob":
            assert_rounding_only(x, y, scale=10.0)
        else:
            assert torch.equal(x, y) if isinstance(x, Tensor) else x == y, name


def part(x: Rollouts, rows: slice) -> Rollouts:
    """Some rows, as wide as they need."""
    width = int(x.attention_mask[rows].sum(1).max())
    cut = {name: v[rows, :width] if isinstance(v, Tensor) and v.ndim == 2 else v[rows] for name, v in vars(x).items()}
    return Rollouts(**cut)


def test_behavior_log_prob_is_what_training_computes():
    lm = policy()
    out = rollouts(lm)
    assert out.mask.sum() > 60
    assert_rounding_only(out.behavior_log_prob, token_log_prob(lm.model, out) * out.mask, scale=10.0)


def test_temperature_is_that_of_the_behavior():
    lm = policy()
    out = rollouts(lm, temperature=0.5)
    expected = log_prob_of(next_token_logits(lm.model, out) / 0.5, out.token) * out.mask
    assert_rounding_only(out.behavior_log_prob, expected, scale=10.0)


def test_the_text_of_a_row_is_prompt_turns_and_replies():
    lm = policy()
    out = rollouts(lm)
    seen = set()
    for i in range(len(out)):
        turns = out.responses[i]
        ids, own = lm.encode(out.prompts[i]), [0] * len(out.prompts[i])
        for k, said in enumerate(turns):
            ended = k < len(turns) - 1 or bool(out.finished[i])
            said_ids = lm.encode(said) + [lm.eos_id] * ended
            reply = lm.encode("bb" * (k + 1)) if k < len(turns) - 1 else []
            ids, own = ids + said_ids + reply, own + [1] * len(said_ids) + [0] * len(reply)
        real = int(out.attention_mask[i].sum())
        mask = out.mask[i, :real].tolist()
        # a trajectory whose last token ended a turn that was to go on has no reply any more, but has the end
        assert (out.token[i, :real].tolist(), mask) in ((ids, own), ([*ids, lm.eos_id], [*own, 1]))
        assert out.finished[i] == (len(turns) == 3 and out.token[i, real - 1] == lm.eos_id)
        assert out.mask[i].sum() <= 12
        seen.add((len(turns), bool(out.finished[i])))
    assert {(3, True)} < seen  # some ended by themselves, some ran out of tokens


def test_off_the_mask_is_nothing():
    out = rollouts(policy(), version=7)
    assert (out.behavior_log_prob[out.mask == 0] == 0).all()
    assert (out.version == torch.where(out.mask == 1, 7, -1)).all()
    assert (out.attention_mask.sum(1) == out.attention_mask.cumsum(1).argmax(1) + 1).all()  # padded on the right
    assert out.group.tolist() == [p for p in (0, 1, 2, 3) for _ in range(4)]
    assert out.reward.tolist() == [float("a" in r[0]) for r in out.responses]


def test_who_else_is_in_the_batch_does_not_matter():
    lm = policy()
    whole = rollouts(lm)
    assert_same(part(whole, slice(4, 8)), rollouts(lm, [1]))
    assert_same(part(rollouts(lm, [3, 1]), slice(4, 8)), rollouts(lm, [1]))
    assert_same(part(rollouts(lm, [2], group_size=6), slice(0, 4)), rollouts(lm, [2]))
    assert not torch.equal(rollouts(lm, [1], seed=6).token, rollouts(lm, [1]).token)


def test_a_smaller_budget_is_a_beginning():
    lm = policy()
    long, short = rollouts(lm), rollouts(lm, max_new_tokens=4)
    for i in range(len(short)):
        own = short.token[i][short.mask[i] == 1].tolist()
        assert own == long.token[i][long.mask[i] == 1].tolist()[: len(own)]


@pytest.mark.parametrize("stride", [1, 3])
def test_in_pieces_and_through_a_checkpoint_it_is_the_same(stride: int):
    lm, sampler = policy(), Sampler(TASK, 4, 12, seed=5)
    state = sampler.start(lm, range(4))
    while not all(row.done for row in state.rows):
        state = SamplerState.from_state_dict(json.loads(json.dumps(state.state_dict())))
        sampler.advance(lm, state, stride)
    assert_same(sampler.finished(lm, state), rollouts(lm))


def test_each_token_has_the_probability_of_the_version_that_drew_it():
    old, new, sampler = policy(0), policy(1), Sampler(TASK, 8, 12, seed=5)
    state = sampler.start(old, range(4))
    sampler.advance(old, state, 4, version=3)
    sampler.advance(new, state, version=4)
    out = sampler.finished(new, state)
    mixed = ((out.version == 3).any(1) & (out.version == 4).any(1)).sum()
    assert mixed > 10
    for lm, version in ((old, 3), (new, 4)):
        at = out.version == version
        assert_rounding_only(out.behavior_log_prob[at], token_log_prob(lm.model, out)[at], scale=10.0)


def test_tokens_are_drawn_from_the_model():
    lm = policy()
    prompt = torch.tensor([lm.encode(TASK.problem(0).prompt)])
    expected = lm.model(prompt).logits[0, -1].softmax(-1).detach()
    out = sample(lm, TASK, [0], group_size=8000, max_new_tokens=1, seed=1)
    drawn = out.token[:, prompt.shape[1]]
    hits = torch.nn.functional.one_hot(drawn, 3).double()
    assert_mean_equals(hits.numpy(), expected.double().numpy(), detect=0.07, support=(0.0, 1.0))


def test_draw_inverts_the_cumulative_distribution():
    p = torch.tensor([[0.0, 0.25, 0.0, 0.75]]).repeat(6, 1)
    token, log_prob = draw(p.log(), torch.tensor([0.0, 0.1, 0.2499, 0.2501, 0.9, 1 - 2**-53], dtype=torch.float64))
    assert token.tolist() == [1, 1, 1, 3, 3, 3]
    assert_rounding_only(log_prob, p[0, token].log())


def test_nothing_global_is_touched():
    lm = policy()
    lm.model.train()
    before = torch.random.get_rng_state()
    rollouts(lm)
    assert torch.equal(before, torch.random.get_rng_state())
    assert lm.model.training
    assert all(p.grad is None and not p.is_inference() for p in lm.model.parameters())


def test_zero_completions_are_rows_without_tokens_of_the_policy():
    out = rollouts(policy(), max_new_tokens=0)
    assert out.mask.sum() == 0
    assert out.reward.sum() == 0
    assert not out.finished.any()
    assert out.responses == [[]] * 16
    assert out.token.shape == out.behavior_log_prob.shape == (16, 6)


def test_a_full_context_ends_the_episode():
    lm = policy(length=9)
    out = rollouts(lm)
    assert out.token.shape[1] <= 9
    assert not out.finished.all()
    assert_rounding_only(out.behavior_log_prob, token_log_prob(lm.model, out) * out.mask, scale=10.0)


def test_a_task_of_one_turn_and_a_tool_task_run_with_an_untrained_model():
    tokenizer = CharTokenizer()
    lm = LanguageModel(char_llama(tokenizer, hidden=16, layers=1, heads=2), tokenizer, "char")
    for name in ("addition", "calculator", "knights_knaves"):
        out = sample(lm, load_task(name), range(3), group_size=2, max_new_tokens=40, seed=0)
        assert out.reward.tolist() == [0.0] * 6


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"problems": []}, "problems: none given"),
        ({"group_size": 0}, "group_size: 0; give a whole number of at least 1"),
        ({"max_new_tokens": -1}, "max_new_tokens: -1"),
        ({"seed": -1}, "seed: -1"),
        ({"temperature": 0.0}, "temperature: 0.0; give a positive number"),
    ],
)
def test_errors_say_what_to_do(change: dict, says: str):
    with pytest.raises(InputError) as error:
        rollouts(policy(), **change)
    assert says in str(error.value)


def test_a_prompt_that_does_not_fit_is_named():
    with pytest.raises(InputError, match="4 tokens of problem 4 of 'talk' do not fit the model's 1 to 3"):
        rollouts(policy(length=3), [0, 4])
    with pytest.raises(InputError, match="'Ж' in 'Ж' is not in the character model's alphabet"):
        policy().encode("Ж")


def test_rollouts_survive_a_checkpoint():
    out = rollouts(policy())
    assert_same(Rollouts(**out.state_dict()), out)
    assert len(replace(out)) == 16
