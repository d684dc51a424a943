"""What TRL needs to run in seconds without a hub: a character tokenizer, a random Llama, a task, and its settings.

Run as a script by `torchrun` it is the two ranks of `test_adapter_trl.py`.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig

CHARACTERS = ["<pad>", "<eos>", *"0123456789+= "]


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a character."""
    vocabulary = {c: i for i, c in enumerate(CHARACTERS)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token=" "))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")


def model(seed: int = 0) -> LlamaForCausalLM:
    """Two layers of random weights, the same for the same seed."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(CHARACTERS), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=1, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def dataset(size: int = 24) -> Dataset:
    """Sums of one-digit numbers; prompts of two lengths, so that there is padding."""
    return Dataset.from_dict(
        {"prompt": [f"{i % 10}+{i // 10}=" if i % 3 else f"1{i % 10}+{i // 10}=" for i in range(size)]}
    )


def even_digits(completions: list[str], **_: Any) -> list[float]:
    """The reward: the share of even digits."""
    return [sum(c in "02468" for c in text) / 8 for text in completions]


def settings(folder: Path | str, **more: Any) -> GRPOConfig:
    """Eight updates of two prompts with four responses each, in two microbatches."""
    chosen: dict[str, Any] = {
        "output_dir": str(folder), "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2,
        "num_generations": 4, "max_completion_length": 8, "max_steps": 8, "learning_rate": 0.02, "beta": 0.0,
        "loss_type": "dr_grpo", "scale_rewards": "none", "use_cpu": True, "bf16": False, "report_to": "none",
        "logging_steps": 1, "save_strategy": "no", "seed": 3, "disable_tqdm": True, "lr_scheduler_type": "constant",
        "gradient_checkpointing": False,
    }  # fmt: skip
    return GRPOConfig(**(chosen | more))


def parts(folder: Path | str, **more: Any) -> dict[str, Any]:
    """The arguments of a trainer."""
    return {
        "model": model(),
        "args": settings(folder, **more),
        "reward_funcs": even_digits,
        "train_dataset": dataset(),
        "processing_class": tokenizer(),
    }


def main(output: str) -> None:
    """Four updates on each rank; rank 0 saves what the ranks saw."""
    import tempfile

    import torch.distributed as dist

    from llm_bridge import log_ratio
    from llm_bridge.adapters.trl import VcpoConfig, VcpoTrainer

    updates: list[dict[str, torch.Tensor]] = []

    class Watched(VcpoTrainer):
        def _weigh(self, parts: list[dict[str, Any]]) -> None:
            seen = [self._measure(x) for x in parts]
            super()._weigh(parts)
            if self.no_step_because:
                return
            row = {name: torch.cat([x[name] for x in seen]) for name in seen[0]}
            ratio = log_ratio(row["log_prob"], row["behavior_log_prob"], row["mask"])[:, None]
            text = [tokenizer().batch_decode(x["completion_ids"], skip_special_tokens=True) for x in parts]
            own = torch.tensor([r for texts in text for r in even_digits(texts)])
            prompt = torch.tensor([hash(tuple(y[y > 0].tolist())) for x in parts for y in x["prompt_ids"]])
            of_parts = {"reward": "reward", "group": "prompt_index", "coefficient": "advantages"}
            updates.append(
                {"log_ratio": ratio, "mask": torch.ones_like(ratio), "score_sq_norm": row["score_sq_norm"]}
                | {"own_reward": own, "prompt": prompt}
                | {name: torch.cat([x[key] for x in parts]) for name, key in of_parts.items()}
            )

    with tempfile.TemporaryDirectory() as folder:
        given = parts(folder, per_device_train_batch_size=3, max_steps=5, ddp_find_unused_parameters=False)
        trainer = Watched(**given, vcpo=VcpoConfig(lag=1, diagnostics=False))
        trainer.train()
    log = [x["vcpo/step_scale"] for x in trainer.state.log_history if "vcpo/step_scale" in x]
    mine = {"updates": updates, "parameters": [p.detach() for p in trainer.model.parameters()], "step_scale": log}
    ranks: list[Any] = [None, None]
    dist.all_gather_object(ranks, mine)
    if dist.get_rank() == 0:
        torch.save(ranks, output)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
