"""A causal language model as a policy: the network, its tokenizer, and how prompts and replies become tokens.

A turn of the policy ends with `eos_id`. A character-level Llama is the small policy of experiments on a CPU.
"""

import inspect
import json
import string
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from vcposim.errors import InputError

CHARACTERS = "char_tokenizer.json"
ALPHABET = string.digits + string.ascii_lowercase + " +-*/=()<>,.:;?!&|#'"


class Tokenizer(Protocol):
    """Text to tokens and back."""

    @property
    def pad_id(self) -> int:
        """The id that fills rows up to one length; it may be `eos_id`, so masks and not ids say what is real."""

    @property
    def eos_id(self) -> int:
        """The id that ends a turn of the policy."""

    def encode(self, text: str) -> list[int]:
        """Token ids of a piece of text, without special tokens."""

    def decode(self, ids: list[int]) -> str:
        """The text of token ids, without special tokens."""

    def encode_prompt(self, text: str) -> list[int]:
        """A trajectory's first tokens."""

    def encode_reply(self, text: str) -> list[int]:
        """What follows the `eos_id` of a turn when the environment says `text`."""

    def save_pretrained(self, folder: Path) -> Any:
        """Writes into a folder what `from_pretrained` reads."""


@dataclass(frozen=True)
class CharTokenizer:
    """One token a character; 0 ends a turn and pads."""

    alphabet: str = ALPHABET
    pad_id: int = 0
    eos_id: int = 0

    def encode(self, text: str) -> list[int]:
        """InputError for a character that is not in the alphabet."""
        try:
            return [self.alphabet.index(character) + 1 for character in text]
        except ValueError:
            odd = next(c for c in text if c not in self.alphabet)
            raise InputError(
                f"text: {odd!r} in {text!r} is not in the character model's alphabet; use a task's style 'short'"
            ) from None

    def decode(self, ids: list[int]) -> str:
        """
        >>> tokenizer = CharTokenizer()
        >>> tokenizer.decode(tokenizer.encode("12+7="))
        '12+7='
        """
        return "".join(self.alphabet[i - 1] for i in ids if i)

    encode_prompt = encode_reply = encode

    def save_pretrained(self, folder: Path) -> None:
        """Writes the alphabet as JSON into `folder`."""
        (Path(folder) / CHARACTERS).write_text(json.dumps({"alphabet": self.alphabet}) + "\n")

    @classmethod
    def from_pretrained(cls, folder: Path) -> "CharTokenizer":
        """The tokenizer that `save_pretrained` wrote; OSError if there is none."""
        return cls(json.loads((Path(folder) / CHARACTERS).read_text())["alphabet"])

    def __len__(self) -> int:
        return len(self.alphabet) + 1


class HubTokenizer:
    """A Hugging Face tokenizer; with its chat template, if it has one, around prompts and replies.

    Raises `InputError` for a tokenizer without an end of text.
    """

    def __init__(self, inner: PreTrainedTokenizerBase) -> None:
        if inner.eos_token_id is None:
            raise InputError("tokenizer: it has no eos token, so no turn could end; set tokenizer.eos_token")
        self.inner = inner
        self.eos_id = int(inner.eos_token_id)
        self.pad_id = self.eos_id if inner.pad_token_id is None else int(inner.pad_token_id)

    def encode(self, text: str) -> list[int]:
        """Token ids of a piece of text, without special tokens."""
        return self.inner.encode(text, add_special_tokens=False)

    def decode(self, ids: list[int]) -> str:
        """The text of token ids, special tokens left out."""
        return str(self.inner.decode(ids, skip_special_tokens=True))

    def encode_prompt(self, text: str) -> list[int]:
        """A user's turn in the model's chat template; bare text, with its special tokens, where there is none."""
        if self.inner.chat_template is None:
            return self.inner.encode(text)
        return self.encode(self._chat({"role": "user", "content": text}))

    def encode_reply(self, text: str) -> list[int]:
        """The template's text between the end of an assistant's turn and its next one."""
        if self.inner.chat_template is None:
            return self.encode(text)
        talk = self._chat(
            {"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}, {"role": "user", "content": text}
        )
        return self.encode(talk.partition("!" + str(self.inner.eos_token))[2])

    def save_pretrained(self, folder: Path) -> None:
        """Writes the inner tokenizer's files into `folder`."""
        self.inner.save_pretrained(folder)

    def _chat(self, *messages: dict[str, str]) -> str:
        return str(self.inner.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False))


@dataclass
class LanguageModel:
    """A causal language model and how text becomes its tokens."""

    model: Any
    tokenizer: Tokenizer
    name: str

    @property
    def pad_id(self) -> int:
        """The tokenizer's."""
        return self.tokenizer.pad_id

    @property
    def eos_id(self) -> int:
        """The tokenizer's."""
        return self.tokenizer.eos_id

    @property
    def max_length(self) -> int:
        """Tokens of a trajectory at most."""
        return self.model.config.max_position_embeddings

    def encode(self, text: str) -> list[int]:
        """The tokenizer's."""
        return self.tokenizer.encode(text)

    def decode(self, ids: list[int]) -> str:
        """The tokenizer's."""
        return self.tokenizer.decode(ids)

    def encode_prompt(self, text: str) -> list[int]:
        """The tokenizer's."""
        return self.tokenizer.encode_prompt(text)

    def encode_reply(self, text: str) -> list[int]:
        """The tokenizer's."""
        return self.tokenizer.encode_reply(text)

    def save_pretrained(self, folder: Path) -> None:
        """Weights (safetensors), configuration and tokenizer: a folder that `load_model` reads."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def to(self, *where: Any) -> "LanguageModel":
        """On another device, or in another precision; in place, as torch's."""
        self.model.to(*where)
        return self

    def next_logits(self, token: Tensor, cache: Any = None) -> tuple[Tensor, Any]:
        """Logits after the `token` (n, t) that follow those in the cache, (n, V), and the cache with them."""
        cache = DynamicCache(config=self.model.config) if cache is None else cache
        named = {self._cache_argument: cache}
        output = self.model(input_ids=token.to(self.model.device), use_cache=True, logits_to_keep=1, **named)
        return output.logits[:, -1], cache

    @cached_property
    def _cache_argument(self) -> str:
        # transformers 5 renamed it
        return "cache" if "cache" in inspect.signature(self.model.forward).parameters else "past_key_values"

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Dropout off (a policy that draws from another distribution than it is trained on is two policies)."""
        training = self.model.training
        self.model.eval()
        try:
            yield
        finally:
            self.model.train(training)


def char_llama(
    tokenizer: CharTokenizer, *, hidden: int = 96, layers: int = 2, heads: int = 4, length: int = 128, seed: int = 0
) -> LlamaForCausalLM:
    """An untrained character-level Llama; its weights are a function of the arguments."""
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=8 * hidden // 3, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=length, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=tokenizer.eos_id, pad_token_id=tokenizer.pad_id,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    return model
