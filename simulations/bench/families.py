"""Which causal language models the score tape is exact on: every family that the installed transformers build tiny.

    python -m simulations.bench.families                    all families; what is in the record is not run again
    python -m simulations.bench.families --family llama     one, into no record
    python -m simulations.bench.families --markdown         the table of the record

A row compares norms and gradient of the tape with one backward per trajectory through the untouched model, and the
log-probabilities inside the tape with those outside, bit for bit. `looped` is the part of the parameters that took
the slow way (a loop over trajectories through their module alone), and in which modules. `with a cache` is the same
for a call with `use_cache=True`, the default of many a plain call, which hands every layer an object that it fills.
"""

import argparse
import json
import re
import signal
import textwrap
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llm_bridge.logprobs import log_prob_of
from llm_bridge.scores import ScoreTape, score_sq_norms_loop, weighted_gradient_loop
from vcposim.errors import InputError

RECORD = Path(__file__).with_name("families.jsonl")
ROWS, STEPS, VOCABULARY = 3, 8, 40
LIMIT_S, MOST_PARAMETERS = 120, 3_000_000
TOLERANCE = 1e-3
"""of float32; the families compute parts in it, whatever they are given"""

HIDDEN, HEADS, LAYERS, INNER = 32, 4, 2, 48
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "vocab_size_per_layer_input": VOCABULARY, "hidden_size": HIDDEN, "n_embd": HIDDEN,
    "d_model": HIDDEN, "dim": HIDDEN, "emb_dim": HIDDEN, "embed_dim": HIDDEN, "embedding_size": HIDDEN,
    "word_embed_proj_dim": HIDDEN, "attention_hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "n_layer": LAYERS,
    "n_layers": LAYERS, "num_layers": LAYERS, "decoder_layers": LAYERS, "encoder_layers": 1, "num_blocks": LAYERS,
    "num_attention_heads": HEADS, "n_head": HEADS, "n_heads": HEADS, "num_heads": HEADS,
    "decoder_attention_heads": HEADS, "encoder_attention_heads": HEADS, "num_key_value_heads": 2, "kv_n_heads": 2,
    "head_dim": 8, "intermediate_size": INNER, "ffn_dim": INNER, "n_inner": INNER, "decoder_ffn_dim": INNER,
    "encoder_ffn_dim": INNER, "ffn_hidden_size": INNER, "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16, "num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4,
    "moe_num_experts": 4, "num_experts_per_tok": 2, "num_experts_per_token": 2, "moe_topk": 2, "moe_top_k": 2,
    "top_k": 2, "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1, "q_lora_rank": 16,
    "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "qk_head_dim": 16,
    "max_position_embeddings": 64, "n_positions": 64, "n_ctx": 64, "max_seq_len": 64, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "sliding_window": 4, "hidden_size_per_layer_input": 8, "mamba_d_state": 4,
    "state_size": 4, "ssm_state_size": 4, "mamba_d_conv": 3, "conv_kernel": 3, "mamba_n_heads": 8,
    "mamba_num_heads": 8, "mamba_d_head": 8, "mamba_head_dim": 8, "mamba_n_groups": 1, "n_groups": 1,
    "lru_width": HIDDEN, "expand": 2, "mamba_expand": 2, "time_step_rank": 4, "mamba_dt_rank": 4,
    "mamba_chunk_size": 8, "chunk_size": 8, "linear_num_value_heads": 4, "linear_num_key_heads": 2,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "laurel_rank": 4, "altup_num_inputs": 2,
    "num_kv_shared_layers": 0, "rotary_dim": 4, "index_head_dim": 8, "index_n_heads": 2, "index_topk": 4,
    "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "dropout": 0.0, "attention_dropout": 0.0,
    "hidden_dropout": 0.0, "activation_dropout": 0.0, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    "layerdrop": 0.0, "decoder_layerdrop": 0.0, "is_decoder": True, "use_cache": False, "adapter_dim": 8,
    "qk_rank": 8,
}  # fmt: skip
_SLIDING = {
    "num_key_value_heads": HEADS, "swa_num_attention_heads": HEADS, "swa_num_key_value_heads": HEADS,
    "swa_q_lora_rank": 16, "swa_kv_lora_rank": 16, "swa_head_dim": 16, "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 8,
    "swa_qk_rope_head_dim": 8, "shared_experts_intermediate_size": 16,
}  # fmt: skip
_INKLING = {
    "unpadded_vocab_size": VOCABULARY, "rel_extent": 8, "d_rel": 4, "swa_num_attention_heads": HEADS,
    "swa_num_key_value_heads": 2, "swa_head_dim": 8, "sliding_window_size": 4, "loop_layer_index_start": 1,
    "loop_layer_index_end": 2, "loop_gate_rank": 4, "n_layers_per_attn_res_block": 1, "conv_kernel_size": 3,
}  # fmt: skip
OWN: dict[str, dict[str, Any]] = {
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "longcat_flash": {"expert_ffn_hidden_size": 16, "zero_expert_num": 1},
    "reformer": {"attn_layers": ["local", "local"], "axial_pos_embds": False, "attention_head_size": 8},
    "dbrx": {"ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2},
             "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0}},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "blt": {"encoder_hash_byte_group_vocab": 50, "encoder_hash_byte_group_size": [3],
            "encoder_config": {"hidden_size_global": HIDDEN}, "decoder_config": {"hidden_size_global": HIDDEN}},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "dots3_note": _SLIDING,
    "dots3_note_text": _SLIDING,
    "ernie4_5_moe": {"moe_k": 2},
    "falcon_h1": {"mamba_d_ssm": 2 * HIDDEN},
    "inkling2_text": _INKLING,
    "inkling2_loop_text": _INKLING,
    "kimi_linear": {"linear_head_dim": 8, "linear_num_heads": HEADS, "linear_conv_kernel_dim": 3},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mpt": {"attn_config": {"attn_pdrop": 0}},
    "musicgen": {"num_codebooks": 1},
    "musicgen_melody": {"num_codebooks": 1},
    "prophetnet": {"num_hidden_layers": ..., "num_layers": ..., "num_encoder_layers": 1, "num_decoder_layers": LAYERS,
                   "num_encoder_attention_heads": HEADS, "num_decoder_attention_heads": HEADS},
    "roc_bert": {"shape_vocab_size": 8, "pronunciation_vocab_size": 8, "shape_embed_dim": 8,
                 "pronunciation_embed_dim": 8},
    "xlnet": {"max_position_embeddings": ..., "d_inner": INNER, "d_head": 8},
    "xlstm": {"qk_head_dim": ..., "v_head_dim": ..., "mode": "train"},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid", "hybrid"], "num_hidden_layers": 3,
              "layer_types": ..., "attention_head_dim": 16, "attention_hidden_size": 2 * HIDDEN},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"], "layer_types": ..., "adapter_rank": 4,
               "attention_hidden_size": ...},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}  # fmt: skip
"""what a family wants besides; `...`: nothing, so that its default holds"""
READY: dict[str, Callable[[Any], object]] = {"xmod": lambda model: model.set_default_language("en_XX")}
"""what is to be done to a model before its first call"""


def families() -> list[str]:
    """Names of all causal language models of the installed transformers."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def build(family: str) -> nn.Module:
    """A tiny model of the family, random weights, float32; whatever it raises tells why there is none."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    names = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]
    make = getattr(transformers, names if isinstance(names, str) else names[0])
    kind = CONFIG_MAPPING[family]
    wanted = getattr(make, "config_class", None) or kind
    if wanted is not kind and not issubclass(kind, wanted):
        kind = wanted  # of a family of several models the one for text
    own = OWN.get(family, {})
    lists = _lists(kind, own)
    alternatives: list[tuple[list[str], dict[str, Any]]] = [
        ([], {}),
        ([], {"num_key_value_heads": HEADS}),
        (lists, {}),
        (["head_dim"], {}),
        (["head_dim", "chunk_size", *lists], {}),
        (["num_key_value_heads", "head_dim", "sliding_window", "v_head_dim", *lists], {}),
    ]
    for attempt, (without, besides) in enumerate(alternatives):
        try:
            config = tiny(kind, own, without, besides)
            with torch.device("meta"):
                size = sum(p.numel() for p in make(config).parameters())
            if size > MOST_PARAMETERS:
                raise ValueError(f"{size / 1e6:.0f}M parameters at the smallest sizes tried")
            torch.manual_seed(0)
            model: nn.Module = make(config)
            READY.get(family, lambda model: None)(model)
            with torch.no_grad():
                log_probs(model, tokens())
            break
        except Exception:
            if attempt == len(alternatives) - 1:
                raise
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model.float().train()


def _lists(kind: Any, own: dict[str, Any]) -> list[str]:
    default = _default(kind, own)
    return [k for k in ("layer_types", "layers_block_type", "mlp_layer_types") if getattr(default, k, None)]


def _default(kind: Any, own: dict[str, Any]) -> Any:
    """The configuration with nothing given or, where that is none, with what the family wants besides."""
    try:
        return kind()
    except Exception:
        return kind(**{k: v for k, v in own.items() if v is not ...})


def tiny(kind: Any, own: dict[str, Any], without: Sequence[str], besides: dict[str, Any]) -> Any:
    """A configuration with every size it knows made small, those of its parts as well; `own` goes last."""
    default = _default(kind, own)
    known = {name for name in dir(default) if not name.startswith("_")} | set(vars(default))
    given = {k: v for k, v in SIZES.items() if k in known}
    given |= {k: v for k, v in besides.items() if k in given}
    for k in _lists(kind, own):
        every = list(dict.fromkeys(getattr(default, k)))
        given[k] = (every * LAYERS)[: max(LAYERS, len(every))]
        given |= {n: len(given[k]) for n in ("num_hidden_layers", "n_layer") if n in given}
    given = {k: v for k, v in given.items() if k not in without}
    for name, part in vars(default).items():
        if hasattr(part, "to_dict") and not isinstance(own.get(name), dict):
            given[name] = tiny(type(part), {}, without, besides)
        elif hasattr(part, "to_dict"):
            given[name] = tiny(type(part), own[name], without, besides)
    given |= {k: v for k, v in own.items() if not hasattr(given.get(k), "to_dict")}
    return kind(**{k: v for k, v in given.items() if v is not ...})


def tokens() -> Tensor:
    """Rows that differ in length of repetition, hence in norm: (row, time)."""
    token = torch.randint(3, VOCABULARY, (ROWS, STEPS), generator=torch.Generator().manual_seed(1))
    return torch.stack([row[torch.arange(STEPS) % (2 + 2 * i)] for i, row in enumerate(token)])


def log_probs(model: nn.Module, token: Tensor, **how: Any) -> Tensor:
    """The plain call, no positions, no mask of padding: (row, time) -> (row, time)."""
    logits = model(input_ids=token, **how).logits
    return log_prob_of(logits, token)


def judge(model: nn.Module, loop: Sequence[str] = (), **how: Any) -> dict[str, Any]:
    """Errors of norms and gradient over both routes, whether the forward is the same, and what was looped over.

    Raises `ValueError` for log-probabilities that are not finite.
    """
    token = tokens()
    mask = (torch.arange(STEPS) >= 2).float().expand(ROWS, STEPS)
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    params = [p for _, p in named]
    u, v = torch.tensor([0.0, 0.8, 0.0]), torch.tensor([1.0, 0.8, 1.3])
    c = u - 0.3 * v
    torch.manual_seed(0)
    log_prob = log_probs(model, token, **how)
    if not torch.isfinite(log_prob).all():
        raise ValueError("log-probabilities that are not finite")
    norm = score_sq_norms_loop(log_prob, mask, params)
    twin = weighted_gradient_loop(log_prob, mask, c, params)
    scale = torch.stack([g.square().sum() for g in twin]).sum().sqrt()
    row: dict[str, Any] = {"norms": 0.0, "gradient": 0.0, "forward": True}
    for affine in (None, (u, v)):
        model.zero_grad()
        with ScoreTape(model, unknown="loop", loop=loop, verify="always") as tape:
            torch.manual_seed(0)
            again = log_probs(model, token, **how)
            ours = tape.score_sq_norms(again, mask, affine=affine)
            tape.backward(c)
            loops = list(tape.loops)
        row["forward"] &= torch.equal(again, log_prob)
        row["norms"] = max(row["norms"], float(((ours - norm) / norm).abs().max()))
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
        off = max(float((a - b).norm() / (b.norm() + 1e-3 * scale)) for a, b in zip(grads, twin, strict=True))
        row["gradient"] = max(row["gradient"], off)
    modules = dict(model.named_modules())
    within = {p for name in loops for p in modules[name].parameters() if p.requires_grad}
    row["looped"] = sum(p.numel() for p in within) / sum(p.numel() for p in params)
    row["modules"] = sorted({type(modules[name]).__name__ for name in loops})
    return row


def _followed(model: nn.Module, **how: Any) -> list[str]:
    """The classes to loop over as a whole, as the tape's own advice names them, one refusal after the other."""
    loop: list[str] = []
    for _ in range(6):
        try:
            with ScoreTape(model, unknown="loop", loop=loop, verify="always") as tape:
                log_prob = log_probs(model, tokens(), **how)
                tape.score_sq_norms(log_prob, torch.ones_like(log_prob))
                tape.backward(log_prob.new_ones(ROWS))
            break
        except InputError as error:
            named = re.search(r"loop=\[(.*)\]", str(error))
            if named is None:
                raise
            loop = re.findall(r"'(\w+)'", named[1])
    return loop


def cached(model: nn.Module) -> str:
    """What becomes of a call with a cache: "exact", "WRONG", "refused", or "none" if the plain model has none."""
    model.zero_grad()
    try:
        log_probs(model, tokens(), use_cache=True).sum().backward()
    except Exception:  # of a hundred libraries' models, any
        return "none"
    finally:
        model.zero_grad()
    try:
        return "exact" if right(judge(model, _followed(model, use_cache=True), use_cache=True)) else "WRONG"
    except InputError:
        return "refused"


class _TooLong(Exception):
    pass


def _ring(*_: object) -> None:
    raise _TooLong


def run(family: str) -> dict[str, Any]:
    """One row: an answer, or in which of the steps there was none and why."""
    row: dict[str, Any] = {"family": family}
    signal.signal(signal.SIGALRM, _ring)
    signal.alarm(LIMIT_S)
    step = "built"
    try:
        model = build(family)
        step = "plain"
        with torch.no_grad():
            log_probs(model, tokens())
        loss = log_probs(model, tokens()).sum()
        loss.backward()
        model.zero_grad()
        step = "taped"
        row |= judge(model, _followed(model))
        row["cached"] = cached(model)
    except InputError as error:
        row["refused"] = str(error)
    except _TooLong:
        row["stopped"] = f"{step}: longer than {LIMIT_S} s"
    except Exception as error:  # of a hundred libraries' models, any
        row["stopped"] = f"{step}: {type(error).__name__}: {textwrap.shorten(str(error), 200)}"
    finally:
        signal.alarm(0)
    return row


def load(path: Path = RECORD) -> list[dict[str, Any]]:
    """The rows of a record, in the order of names."""
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return sorted({row["family"]: row for row in rows}.values(), key=lambda row: row["family"])


def right(row: dict[str, Any]) -> bool:
    """Whether a row has an answer, and it is exact."""
    exact = "norms" in row and row["forward"] and max(row["norms"], row["gradient"]) <= TOLERANCE
    return exact and row.get("cached") != "WRONG"


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table: exact families, those refused, and those that could not be built."""
    taped = [row for row in rows if "norms" in row]
    line = ["| family | norms | gradient | forward | route | looped | with a cache |", "|---|---|---|---|---|---|---|"]
    for row in taped:
        route = "no loop" if not row["modules"] else "loop in " + ", ".join(row["modules"])
        line.append(
            f"| {row['family']} | {_told(row['norms'])} | {_told(row['gradient'])} | "
            f"{'same bits' if row['forward'] else 'DIFFERS'} | {route} | {100 * row['looped']:.0f}% | "
            f"{row['cached']} |"
        )
    exact = sum(map(right, taped))
    whole = sum(1 for row in taped if right(row) and not row["modules"])
    head = (
        f"{exact} of {len(rows)} families exact (to {TOLERANCE:g}, float32), {whole} of them without any loop; "
        f"{sum('refused' in row for row in rows)} refused by name; "
        f"{sum('stopped' in row for row in rows)} that this script cannot build or run tiny."
    )
    tail = [f"- {row['family']}: refused: {row['refused']}" for row in rows if "refused" in row]
    tail += [f"- {row['family']}: {row['stopped']}" for row in rows if "stopped" in row]
    return "\n".join([head, "", *line, "", *tail])


def summary(rows: list[dict[str, Any]]) -> str:
    """The table in short, for a README: which families in one pass, which with a loop and where, which not."""
    exact = [row for row in rows if right(row)]
    plain = [row["family"] for row in exact if not row["modules"]]
    looped = [f"{row['family']} ({100 * row['looped']:.0f}%)" for row in exact if row["modules"]]
    refused = [row["family"] for row in rows if "refused" in row]
    wrong = [row["family"] for row in rows if "norms" in row and not right(row)]
    other = [row["family"] for row in rows if "stopped" in row]
    kept = [row["cached"] for row in rows if "cached" in row]
    parts = [
        f"- exact in one pass, no loop ({len(plain)}): {', '.join(plain)}",
        f"- exact, a loop through the modules without a rule, with their share of the parameters at these sizes "
        f"({len(looped)}): {', '.join(looped)}",
        f"- refused by name ({len(refused)}): {', '.join(refused)}",
        f"- with `use_cache=True` in the call: exact {kept.count('exact')}, refused {kept.count('refused')}, wrong "
        f"{kept.count('WRONG')}; {kept.count('none')} plain models cannot be trained so",
        f"- wrong ({len(wrong)}){': ' if wrong else ''}{', '.join(wrong)}",
        f"- not built or not run tiny, so not known ({len(other)}): {', '.join(other)}",
    ]
    return "\n".join(textwrap.fill(p, 126, subsequent_indent="  ", break_on_hyphens=False) for p in parts)


def _told(error: float) -> str:
    return f"exact ({error:.0e})" if error <= TOLERANCE else f"WRONG ({error:.0e})"


def main() -> None:
    """Parse the command line; run what the record lacks, or print its table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--family", action="append", help="only these, printed and not recorded")
    parser.add_argument("--markdown", action="store_true", help="print the table of the record")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if args.markdown:
        print(markdown(load()))
        return
    done = {row["family"] for row in load()}
    for family in args.family or [name for name in families() if name not in done]:
        row = run(family)
        print(json.dumps(row), flush=True)
        if not args.family:
            with RECORD.open("a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
