"""The sampler at an accelerator's speed: a static key-value cache, no word to the host before the end, CUDA graphs.

`StaticSampler` draws what `Sampler` draws: the same problems and random numbers, so the same tokens but for the
rounding of the logits. One column is one call of `_Decoder.step`, whose shapes and addresses never change; on a CUDA
device it is captured once and replayed. That is worth having because a small model's decoding step is hundreds of small
kernels: the host launches them more slowly than the device runs them.

It serves single-turn tasks on dense Llama models without biases (SmolLM2, Llama, the character models); everything
else, and sampling in pieces, goes to `Sampler` unchanged. The captured graph has not run on a device yet.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from llm_bridge.models.language_model import LanguageModel
from llm_bridge.rollouts import Row, Sampler, State, columns, draw

LOOK = 8
"""columns between two looks at whether everybody is done; each look waits for the device"""


@dataclass(frozen=True)
class StaticSampler(Sampler):
    """`Sampler` with a decoder of static shapes; `graphs=False` runs the same steps one kernel at a time."""

    graphs: bool = True
    _decoders: dict[Any, "_Decoder"] = field(default_factory=dict, repr=False, compare=False)

    @torch.no_grad()
    def advance(self, lm: LanguageModel, state: State, tokens: int | None = None, version: int = 0) -> State:
        """As `Sampler.advance`; whole single-turn trajectories are drawn on the device in one go."""
        fresh = all(not row.own and not row.done for row in state.rows)
        if tokens is not None or self.task.max_turns > 1 or not fresh or not served(lm.model):
            return super().advance(lm, state, tokens, version)
        decoder = self._decoder(lm, state.rows)
        uniform = np.stack([self._uniform(row) for row in state.rows])
        own, token, log_prob = (x.cpu().numpy() for x in decoder.draw(lm, state.rows, uniform))
        for i, row in enumerate(state.rows):
            for j in np.flatnonzero(own[i]):
                row.add(int(token[i, j]), float(log_prob[i, j]), version)
            self._turn(lm, row, self.task.problem(row.problem))
        state.column = max(len(row.ids) for row in state.rows)
        return state

    def _decoder(self, lm: LanguageModel, rows: list[Row]) -> "_Decoder":
        # widths are rounded up, so that a few decoders (and graphs) serve all batches
        width = max(len(row.ids) for row in rows) + self.max_new_tokens
        width = min(-(-width // 32) * 32, lm.max_length)
        device = lm.model.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else lm.model.dtype
        key = (id(lm.model), len(rows), width, dtype)
        if key not in self._decoders:
            graphs = self.graphs and device == "cuda"
            self._decoders[key] = _Decoder(lm, len(rows), width, self.max_new_tokens, self.temperature, dtype, graphs)
        return self._decoders[key]


def served(model: Any) -> bool:
    """Whether `_Decoder` knows this network: a dense Llama with silu, no biases, unscaled rotary positions."""
    config = model.config
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    return (
        type(model).__name__ == "LlamaForCausalLM"
        and not any(name.endswith(".bias") for name, _ in model.named_parameters())
        and config.hidden_act == "silu"
        and rope.get("rope_type", "default") == "default"
    )


class _Decoder:
    """One batch shape: n rows of at most `width` tokens. Buffers are written in place; `draw` may be called again."""

    def __init__(
        self, lm: LanguageModel, n: int, width: int, new: int, temperature: float, dtype: torch.dtype, graphs: bool
    ) -> None:
        self.lm, self.dtype, self.temperature, self.graphs = lm, dtype, temperature, graphs
        model, config = lm.model, lm.model.config
        device = model.device
        self.heads, self.kv = config.num_attention_heads, config.num_key_value_heads
        self.size = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        self.eps, self.new, self.width = config.rms_norm_eps, new, width
        self.layers = list(model.model.layers)
        self.weights = [[torch.empty_like(x, dtype=dtype) for x in sources] for sources in self._sources()]
        self.cache = torch.zeros(len(self.layers), 2, n, self.kv, width, self.size, dtype=dtype, device=device)
        angle = torch.arange(width, device=device)[:, None] * model.model.rotary_emb.inv_freq.to(device)
        angle = torch.cat([angle, angle], -1)
        self.cos, self.sin = angle.cos(), angle.sin()
        self.token = torch.zeros(n, width, dtype=torch.long, device=device)
        self.log_prob = torch.zeros(n, width, device=device)
        self.own = torch.zeros(n, width, dtype=torch.bool, device=device)
        self.uniform = torch.zeros(n, max(new, 1), device=device)
        self.prompt = torch.zeros(n, dtype=torch.long, device=device)
        self.done = torch.zeros(n, dtype=torch.bool, device=device)
        self.position = torch.zeros(1, dtype=torch.long, device=device)
        self.column = torch.arange(width, device=device)
        self.graph: Any = None

    def draw(self, lm: LanguageModel, rows: list[Row], uniform: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        """(n, width) each: whether a token is the policy's own, the tokens, their log-probabilities in float32."""
        device = self.token.device
        with torch.autocast(device.type, enabled=False):
            for own, sources in zip(self.weights, self._sources(), strict=True):
                torch._foreach_copy_(own, sources)
            length = [len(row.ids) for row in rows]
            self.token.copy_(columns(rows, 0, self.width, lm.pad_id))
            self.prompt.copy_(torch.tensor(length))
            self.uniform.copy_(torch.tensor(uniform, dtype=torch.float32))
            for buffer in (self.log_prob, self.own, self.done):
                buffer.zero_()
            first, last = min(length), min(max(length) + self.new, self.width)
            logits = self._logits(self.token[:, :first], torch.arange(first, device=device))
            self.position.fill_(first - 1)
            self._write(logits)
            for j in range(first, last - 1):
                if (j - first) % LOOK == 0 and bool(self.done.all()):
                    break
                self._step_or_replay()
        return self.own, self.token, self.log_prob

    def step(self) -> None:
        """Reads column `position`, draws the next one, moves on."""
        self._write(self._logits(self.token.index_select(1, self.position), self.position))

    def _step_or_replay(self) -> None:
        if not self.graphs:
            self.step()
            return
        if self.graph is None:
            self._capture()
        self.graph.replay()

    def _capture(self) -> None:
        # a capture runs nothing, and its warm-up runs for real: what it wrote is taken back
        state = (self.token, self.log_prob, self.own, self.done, self.position)
        kept = [x.clone() for x in state]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self.step()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        for x, before in zip(state, kept, strict=True):
            x.copy_(before)
        with torch.cuda.graph(self.graph):
            self.step()
        for x, before in zip(state, kept, strict=True):
            x.copy_(before)

    def _sources(self) -> list[list[Tensor]]:
        """The matrices, query-key-value and gate-up joined; norms and the embedding are read where they lie."""
        out = []
        for layer in self.layers:
            a, m = layer.self_attn, layer.mlp
            qkv = torch.cat([a.q_proj.weight, a.k_proj.weight, a.v_proj.weight])
            up = torch.cat([m.gate_proj.weight, m.up_proj.weight])
            out.append([qkv, a.o_proj.weight, up, m.down_proj.weight])
        return [*out, [self.lm.model.lm_head.weight]]

    def _logits(self, token: Tensor, position: Tensor) -> Tensor:
        """Logits (n, V) after tokens (n, t) at these positions (t,), which enter the cache.

        As the model computes under autocast: the residual stream in the weights' own precision, products in `dtype`.
        """
        n, t = token.shape
        x = F.embedding(token, self.lm.model.model.embed_tokens.weight)
        cos, sin = self.cos.index_select(0, position)[:, None], self.sin.index_select(0, position)[:, None]
        mask = self.column <= position[:, None]
        sizes = [self.heads * self.size, self.kv * self.size, self.kv * self.size]
        for layer, (qkv, o, up, down), (key, value) in zip(self.layers, self.weights[:-1], self.cache, strict=True):
            q, k, v = F.linear(self._norm(x, layer.input_layernorm), qkv).split(sizes, -1)
            q = self._rotated(q.view(n, t, self.heads, self.size), cos, sin)
            key.index_copy_(2, position, self._rotated(k.view(n, t, self.kv, self.size), cos, sin))
            value.index_copy_(2, position, v.view(n, t, self.kv, self.size).transpose(1, 2))
            y = F.scaled_dot_product_attention(q, key, value, attn_mask=mask, enable_gqa=self.heads != self.kv)
            x = x + F.linear(y.transpose(1, 2).reshape(n, t, -1), o)
            gate, rest = F.linear(self._norm(x, layer.post_attention_layernorm), up).chunk(2, -1)
            x = x + F.linear(F.silu(gate) * rest, down)
        return F.linear(self._norm(x[:, -1], self.lm.model.model.norm), self.weights[-1][0])

    def _norm(self, x: Tensor, layer: Any) -> Tensor:
        wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (layer.weight * (wide * scale).to(x.dtype)).to(self.dtype)

    def _rotated(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        half = self.size // 2
        turned = torch.cat([-x[..., half:], x[..., :half]], -1)
        return (x * cos + turned * sin).to(self.dtype).transpose(1, 2)

    def _write(self, logits: Tensor) -> None:
        """Draws the column after `position` where a row has none, keeps what is known, and moves on."""
        self.position += 1
        ordinal = (self.position - self.prompt).clamp(0, self.uniform.shape[1] - 1)
        drawn, value = draw(logits, self.uniform.gather(1, ordinal[:, None])[:, 0], self.temperature)
        own = (self.position >= self.prompt) & ~self.done
        known = self.token.index_select(1, self.position)[:, 0]
        self.token.index_copy_(1, self.position, torch.where(own, drawn, known)[:, None])
        self.log_prob.index_copy_(1, self.position, torch.where(own, value.float(), 0.0)[:, None])
        self.own.index_copy_(1, self.position, own[:, None])
        spent = (ordinal + 1 >= self.new) | (self.position + 1 >= self.lm.max_length)
        self.done |= own & ((drawn == self.lm.eos_id) | spent)
