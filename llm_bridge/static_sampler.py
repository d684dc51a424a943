"""Sampling without leaving the device: a static key-value cache, one token a step, as a CUDA graph where there is CUDA.

A small model samples slowly because the host launches a thousand small kernels a token and waits for each token. Here
one step (draw, write down, run the network on the token) is captured once and replayed; tokens, log-probabilities and
the key-value cache stay on the device, and the host looks every `LOOK` tokens whether all rows have ended.

    sampler = StaticSampler(task, group_size=8, max_new_tokens=48, seed=0)      # a `Sampler`, and equal to it

The captured graph has not run on a device yet.

A row's slots in the cache are its positions: prompts are padded on the right, and the policy's tokens overwrite the
padding, so no row needs a position of its own besides the next one. Random numbers and the drawing itself are
`rollouts`': the same tokens as `Sampler`, and the same log-probabilities to rounding. Episodes of several turns, or
models other than a plain Llama, fall back on `Sampler`.

Weights are copied into the precision of sampling once a call, into tensors that the graph knows: they may change in
place between calls (an optimizer's step does that).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from llm_bridge.models.language_model import LanguageModel
from llm_bridge.rollouts import OpenTrajectory, Sampler, SamplerState, draw

LOOK = 8
"""tokens between two looks at who has ended"""
SLOTS = 64
"""the cache's length is a multiple of it: few lengths, few graphs"""


def served(model: Any) -> bool:
    """Whether `Decoder` knows this network: a dense Llama with silu, no biases, unscaled rotary positions."""
    config = model.config
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    return (
        type(model).__name__ == "LlamaForCausalLM"
        and not any(name.endswith(".bias") for name, _ in model.named_parameters())
        and config.hidden_act == "silu"
        and rope.get("rope_type", "default") == "default"
    )


class Decoder:
    """A Llama that decodes token by token in `dtype`, with its residual stream in the precision of the embeddings.

    That is what autocast makes of the same model: products of matrices in `dtype`, sums and norms in the weights' own.
    """

    def __init__(self, model: Any, dtype: torch.dtype) -> None:
        c, self.model, self.dtype = model.config, model, dtype
        self.device = model.lm_head.weight.device
        self.heads, self.kv = c.num_attention_heads, c.num_key_value_heads
        self.head_dim = getattr(c, "head_dim", None) or c.hidden_size // self.heads
        self.eps = c.rms_norm_eps
        self.inv_freq = model.model.rotary_emb.inv_freq.to(self.device)
        self._targets: list[Tensor] = []
        self._sources: list[Tensor] = []
        self.blocks = [self._block(layer) for layer in model.model.layers]
        self.head = self._copies(model.lm_head.weight)
        self.embedding, self.norm = model.model.embed_tokens.weight, model.model.norm.weight
        self.loops: dict[tuple[int, int, int, float], Loop] = {}
        self.refresh()

    def _copies(self, *weights: Tensor) -> Tensor:
        """One tensor for weights that act on the same input, and a note to fill it on `refresh`."""
        rows = [w.shape[0] for w in weights]
        target = torch.empty(sum(rows), weights[0].shape[1], dtype=self.dtype, device=self.device)
        self._targets += target.split(rows)
        self._sources += [w.detach() for w in weights]
        return target

    def _block(self, layer: Any) -> tuple[Tensor, ...]:
        a, m = layer.self_attn, layer.mlp
        return (
            layer.input_layernorm.weight,
            self._copies(a.q_proj.weight, a.k_proj.weight, a.v_proj.weight),
            self._copies(a.o_proj.weight),
            layer.post_attention_layernorm.weight,
            self._copies(m.gate_proj.weight, m.up_proj.weight),
            self._copies(m.down_proj.weight),
        )

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over the weights as they are now, in place."""
        torch._foreach_copy_(self._targets, self._sources)

    def run(self, token: Tensor, position: Tensor, attend: Callable[[int, Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        """Hidden states of tokens at positions: (n, t), (n, t) -> (n, t, d); `attend(layer, q, k, v)` does the rest."""
        n, t = token.shape
        x = F.embedding(token, self.embedding)
        angle = position[..., None].float() * self.inv_freq.float()
        angle = torch.cat([angle, angle], -1)[:, :, None]
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        turned = self.heads + self.kv
        for i, (norm_in, qkv, out, norm_mid, gate_up, down) in enumerate(self.blocks):
            y = F.linear(self._rms(x, norm_in), qkv).view(n, t, turned + self.kv, self.head_dim)
            qk, v = y[:, :, :turned], y[:, :, turned:]
            a, b = qk.chunk(2, -1)
            qk = (qk * cos + torch.cat([-b, a], -1) * sin).to(self.dtype)
            x = x + F.linear(attend(i, qk[:, :, : self.heads], qk[:, :, self.heads :], v).reshape(n, t, -1), out)
            gate, up = F.linear(self._rms(x, norm_mid), gate_up).chunk(2, -1)
            x = x + F.linear(F.silu(gate) * up, down)
        return x

    def logits(self, x: Tensor) -> Tensor:
        """Logits of hidden states: (..., d) -> (..., V)."""
        return F.linear(self._rms(x, self.norm), self.head)

    def _rms(self, x: Tensor, weight: Tensor) -> Tensor:
        if x.dtype == torch.float32:  # one kernel instead of six
            return F.rms_norm(x, weight.shape, weight, self.eps).to(self.dtype)
        # transformers' norm computes in float32 whatever it is given
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return (weight * wide.to(x.dtype)).to(self.dtype)

    def loop(self, rows: int, slots: int, tokens: int, temperature: float) -> "Loop":
        """Buffers and the captured step for that many rows, slots and tokens; made once."""
        key = (rows, slots, tokens, temperature)
        if key not in self.loops:
            self.loops[key] = Loop(self, *key)
        return self.loops[key]


class Loop:
    """The buffers of a generation and its step. `token` and `log_prob` (n, tokens) are the result."""

    def __init__(self, decoder: Decoder, rows: int, slots: int, tokens: int, temperature: float) -> None:
        self.decoder, self.temperature = decoder, temperature
        d, dev = decoder, decoder.device

        def zeros(*shape: int, dtype: torch.dtype = d.dtype) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=dev)

        layers = len(d.blocks)
        self.key = [zeros(rows, d.kv, slots, d.head_dim) for _ in range(layers)]
        self.value = [zeros(rows, d.kv, slots, d.head_dim) for _ in range(layers)]
        self.slot = torch.arange(slots, device=dev)
        self.row = torch.arange(rows, device=dev)
        self.position = zeros(rows, dtype=torch.long)
        self.ordinal = zeros(1, dtype=torch.long)
        self.eos = zeros(1, dtype=torch.long)
        self.done = zeros(rows, dtype=torch.bool)
        self.uniform = zeros(rows, tokens, dtype=torch.float64)
        self.token = zeros(rows, tokens, dtype=torch.long)
        self.log_prob = zeros(rows, tokens, dtype=torch.float32)
        self.logits = zeros(rows, d.head.shape[0])
        self.graph: torch.cuda.CUDAGraph | None = None

    @torch.no_grad()
    def generate(self, prompts: list[list[int]], which: list[int], uniform: Tensor, eos: int) -> tuple[Tensor, Tensor]:
        """Tokens and log-probabilities, (n, tokens) each, on the host; what follows a row's `eos` means nothing.

        prompts: different ones; which (n): each row's; uniform (n, tokens) in [0, 1).
        """
        with torch.autocast(self.decoder.device.type, enabled=False):
            self._prefill(prompts, which)
            self.uniform.copy_(uniform)
            self.eos.fill_(eos)
            self.done.zero_()
            self.ordinal.zero_()
            step = self._captured()
            for j in range(self.token.shape[1]):
                step()
                if j % LOOK == LOOK - 1 and bool(self.done.all()):
                    break
            return self.token.cpu(), self.log_prob.cpu()

    def _prefill(self, prompts: list[list[int]], which: list[int]) -> None:
        d, dev = self.decoder, self.decoder.device
        width = max(map(len, prompts))
        token = torch.tensor([p + [0] * (width - len(p)) for p in prompts], device=dev)
        last = torch.tensor([len(p) - 1 for p in prompts], device=dev)
        row = torch.tensor(which, device=dev)

        def attend(i: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            self.key[i][:, :, :width] = k[row]
            self.value[i][:, :, :width] = v[row]
            each = d.heads // d.kv
            k, v = k.repeat_interleave(each, 1), v.repeat_interleave(each, 1)
            return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

        x = d.run(token, torch.arange(width, device=dev).expand_as(token), attend)
        first = d.logits(x[torch.arange(len(prompts), device=dev), last])
        self.logits.copy_(first[row])
        self.position.copy_(last[row] + 1)

    def _step(self) -> None:
        d = self.decoder
        u = self.uniform.index_select(1, self.ordinal)[:, 0]
        token, log_prob = draw(self.logits, u, self.temperature)
        self.token.index_copy_(1, self.ordinal, token[:, None])
        self.log_prob.index_copy_(1, self.ordinal, log_prob[:, None])
        self.done |= token == self.eos
        hidden = (self.slot > self.position[:, None])[:, None, None]
        scale = d.head_dim**-0.5

        def attend(i: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.key[i][self.row, :, self.position] = k[:, 0]
            self.value[i][self.row, :, self.position] = v[:, 0]
            q = q.reshape(len(q), d.kv, d.heads // d.kv, d.head_dim)
            score = (q @ self.key[i].transpose(-1, -2)) * scale
            wide = torch.promote_types(score.dtype, torch.float32)
            share = torch.softmax(score.masked_fill(hidden, -torch.inf), -1, dtype=wide).to(d.dtype)
            return share @ self.value[i]

        x = d.run(token[:, None], self.position[:, None], attend)
        self.logits.copy_(d.logits(x[:, 0]))
        self.position.add_(1).clamp_(max=len(self.slot) - 1)
        self.ordinal.add_(1).clamp_(max=self.token.shape[1] - 1)

    def _captured(self) -> Callable[[], None]:
        """The step, or its graph. Capturing changes the buffers, so they are put back."""
        if self.decoder.device.type != "cuda":
            return self._step
        if self.graph is None:
            kept = [x.clone() for x in (self.logits, self.position, self.ordinal, self.done)]
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                self._step()
                self._step()
            torch.cuda.current_stream().wait_stream(aside)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                self._step()
            for x, was in zip((self.logits, self.position, self.ordinal, self.done), kept, strict=True):
                x.copy_(was)
        return self.graph.replay


@dataclass(frozen=True)
class StaticSampler(Sampler):
    """A `Sampler` that keeps a whole generation on the device, where it can: one turn, a plain Llama, one version."""

    decoders: dict[Any, Decoder] = field(default_factory=dict, compare=False, repr=False)

    @torch.no_grad()
    def advance(
        self, lm: LanguageModel, state: SamplerState, tokens: int | None = None, version: int = 0
    ) -> SamplerState:
        """As `Sampler.advance`, from the same random numbers; where it can, a whole generation in one captured loop."""
        rows = [row for row in state.rows if not row.done]
        fresh = not any(row.own for row in state.rows) and rows and len(rows) == len(state.rows)
        longest = max(len(row.ids) for row in state.rows)
        fits = longest + self.max_new_tokens <= lm.max_length
        if tokens is not None or not fresh or not fits or self.task.max_turns > 1 or not served(lm.model):
            return super().advance(lm, state, tokens, version)
        decoder = self._decoder(lm)
        slots = -(-(longest + self.max_new_tokens) // SLOTS) * SLOTS
        loop = decoder.loop(len(rows), slots, self.max_new_tokens, self.temperature)
        known: dict[tuple[int, ...], int] = {}
        which = [known.setdefault(tuple(row.ids), len(known)) for row in rows]
        uniform = torch.from_numpy(np.stack([self._uniform(row) for row in rows]))
        token, log_prob = loop.generate([list(p) for p in known], which, uniform, lm.eos_id)
        for row, drawn, value in zip(rows, token.tolist(), log_prob.tolist(), strict=True):
            self._fill(lm, row, drawn, value, version)
        state.column = max(len(row.ids) for row in rows)
        return state

    def _fill(
        self, lm: LanguageModel, row: OpenTrajectory, token: list[int], log_prob: list[float], version: int
    ) -> None:
        ended = lm.eos_id in token
        count = token.index(lm.eos_id) + 1 if ended else len(token)
        row.own = list(range(len(row.ids), len(row.ids) + count))
        row.ids = row.ids + token[:count]
        row.log_prob, row.version = log_prob[:count], [version] * count
        row.responses.append(lm.decode(row.ids[row.turn : -1 if ended else None]))
        row.done, row.finished = True, ended

    def _decoder(self, lm: LanguageModel) -> Decoder:
        weight = lm.model.lm_head.weight
        kind = weight.device.type
        mixed = torch.is_autocast_enabled(kind) and weight.dtype == torch.float32
        dtype = torch.get_autocast_dtype(kind) if mixed else weight.dtype
        key = (id(lm.model), weight.data_ptr(), dtype)
        if key not in self.decoders:
            self.decoders.clear()
            self.decoders[key] = Decoder(lm.model, dtype)
        else:
            self.decoders[key].refresh()
        return self.decoders[key]
