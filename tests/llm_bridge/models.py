"""Tiny Hugging Face models with random weights, and batches in which trajectories differ visibly in score norm."""

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from llm_bridge.logprobs import TokenBatch
from llm_bridge.scores.fused import kernel

VOCABULARY = 37
KINDS = ("llama", "qwen2", "gpt2")
NEEDS_COMPILER = pytest.mark.skipif(kernel(torch.float64) is None, reason="no C compiler here")


def tiny_model(kind: str, *, tied: bool, dtype: torch.dtype = torch.float64, seed: int = 0) -> PreTrainedModel:
    """A two-layer model of one of `KINDS`; weights spread so that no parameter's gradient is negligible."""
    shared = {"vocab_size": VOCABULARY, "tie_word_embeddings": tied, "pad_token_id": 0, "use_cache": False}
    llama = {
        "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 40, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    torch.manual_seed(seed)
    model: PreTrainedModel
    if kind == "llama":
        model = LlamaForCausalLM(LlamaConfig(**shared, **llama))
    elif kind == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**shared, **llama))
    else:
        dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        size = {"n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2}
        model = GPT2LMHeadModel(GPT2Config(**shared, **size, **dropout))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.to(dtype).train()


def double_rms_norm(module: nn.Module, x: Tensor) -> Tensor:
    """The RMS norm in its input's precision (Hugging Face's casts to float32): for comparisons to 1e-10."""
    return module.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + module.variance_epsilon))


def padded_batch(n: int = 5, t: int = 12, seed: int = 0, *, side: str = "right") -> TokenBatch:
    """Trajectories of unequal length; the first quarter is prompt, and some repeat few tokens."""
    generator = torch.Generator().manual_seed(seed)
    token = torch.randint(
        VOCABULARY, (n, t), generator=generator
    )  # 0 is the padding token, and may occur as a real one
    length = torch.randint(t // 2, t + 1, (n,), generator=generator)
    time = torch.arange(t).repeat(n, 1)
    for i in range(n):
        token[i] = token[i, torch.arange(t) % (2 + 2 * i)]
    real = time < length[:, None] if side == "right" else time >= t - length[:, None]
    own = real & ((time >= t // 4) if side == "right" else (time >= t - length[:, None] + t // 4))
    token[0, t // 2] = 0
    return TokenBatch(torch.where(real, token, 0), own.double(), real.long())


def packed_batch(length: tuple[int, ...] = (7, 3, 9, 5), rows: int = 2, seed: int = 0) -> TokenBatch:
    """Trajectories of given lengths dealt over rows one after the other, with padding at the row ends."""
    generator = torch.Generator().manual_seed(seed)
    per_row = -(-len(length) // rows)
    width = max(sum(length[r * per_row : (r + 1) * per_row]) for r in range(rows)) + 2
    token = torch.randint(VOCABULARY, (rows, width), generator=generator)
    segment = torch.full((rows, width), -1)
    for i, size in enumerate(length):
        row, start = i // per_row, int((segment[i // per_row] >= 0).sum())
        segment[row, start : start + size] = i
    return TokenBatch(token, (segment >= 0).double(), segment=segment)


def unpacked(batch: TokenBatch) -> TokenBatch:
    """The padded batch of the same trajectories as a packed one."""
    assert batch.segment is not None
    runs = [batch.token[batch.segment == i] for i in range(int(batch.segment.max()) + 1)]
    token = torch.nn.utils.rnn.pad_sequence(runs, batch_first=True)
    real = torch.nn.utils.rnn.pad_sequence([torch.ones_like(r) for r in runs], batch_first=True)
    return TokenBatch(token, real.double(), real)
