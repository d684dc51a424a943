"""The score tape on the adapters of peft: exact, with a loop through the adapter's own layer where no rule is known."""

from typing import Any

import pytest
import torch
from torch import nn

from llm_bridge.logprobs import log_prob_of, token_log_prob
from llm_bridge.scores import ScoreTape, score_sq_norms_loop, weighted_gradient_loop
from tests.kit.statistical import OPERATION, SINGLE, SUMMED, assert_near
from tests.llm_bridge.models import padded_batch, tiny_model

peft = pytest.importorskip("peft")

LINEAR = ["q_proj", "v_proj", "down_proj"]
CONFIGS: dict[str, Any] = {
    "lora": lambda: peft.LoraConfig(r=3, target_modules=LINEAR, init_lora_weights=False),
    "lora, head saved": lambda: peft.LoraConfig(
        r=3, target_modules=LINEAR, modules_to_save=["lm_head"], init_lora_weights=False
    ),
    "lora on embeddings": lambda: peft.LoraConfig(
        r=3, target_modules=["embed_tokens", "q_proj"], init_lora_weights=False
    ),
    "dora": lambda: peft.LoraConfig(r=3, target_modules=LINEAR, use_dora=True, init_lora_weights=False),
    "ia3": lambda: peft.IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], init_ia3_weights=False
    ),
    "vera": lambda: peft.VeraConfig(r=3, target_modules=["q_proj"], init_weights=False),
    "oft": lambda: peft.OFTConfig(oft_block_size=4, target_modules=["q_proj"], init_weights=False),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_adapters_are_exact(kind: str) -> None:
    torch.manual_seed(0)
    model = peft.get_peft_model(tiny_model("llama", tied=False), CONFIGS[kind]()).double()
    batch, c = padded_batch(), torch.linspace(-1, 1, 5).double()
    params = [p for p in model.parameters() if p.requires_grad]
    log_prob = token_log_prob(model, batch)
    norm = score_sq_norms_loop(log_prob, batch.mask, params)
    gradient = weighted_gradient_loop(log_prob, batch.mask, c, params)
    scale = max(float(g.abs().max()) for g in gradient)
    with ScoreTape(model, verify="always", unknown="loop") as tape:
        again = token_log_prob(model, batch)
        assert torch.equal(again, log_prob)
        ours = tape.score_sq_norms(again, batch.mask)
        tape.backward(c)
    assert_near(ours, norm, allow=SINGLE, scale=0)
    for p, right in zip(params, gradient, strict=True):
        assert_near(p.grad, right, allow=OPERATION, scale=scale)


def test_prompt_tuning() -> None:
    """One prompt embedded once and repeated over the batch."""
    torch.manual_seed(0)
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model, batch = peft.get_peft_model(tiny_model("llama", tied=False), config).double(), padded_batch()

    def forward() -> torch.Tensor:
        logits = model(input_ids=batch.token, attention_mask=batch.attention_mask).logits[:, 3:]
        return log_prob_of(logits, batch.token)

    norm = score_sq_norms_loop(forward(), batch.mask, model.parameters())
    with ScoreTape(model, verify="always") as tape:
        assert_near(tape.score_sq_norms(forward(), batch.mask, keep=False), norm, allow=SUMMED, scale=0)


class Quantised(nn.Module):
    """A stand-in for a quantised frozen linear layer: weights in eight bits, a float copy made on the way."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.scale = base.weight.abs().max() / 127
        self.weight = nn.Parameter((base.weight.detach() / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.weight.to(x.dtype) * self.scale.detach()).t()


def test_a_quantised_frozen_base() -> None:
    torch.manual_seed(0)
    model = peft.get_peft_model(tiny_model("llama", tied=False), CONFIGS["lora"]()).double()
    for layer in model.base_model.model.model.layers:
        layer.self_attn.q_proj.base_layer = Quantised(layer.self_attn.q_proj.base_layer)
    batch = padded_batch()
    log_prob = token_log_prob(model, batch)
    norm = score_sq_norms_loop(log_prob, batch.mask, model.parameters())
    with ScoreTape(model, verify="always") as tape:
        ours = tape.score_sq_norms(token_log_prob(model, batch), batch.mask, keep=False)
    assert_near(ours, norm, allow=SINGLE, scale=0)
