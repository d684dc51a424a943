"""The table of families: every one that the installed transformers build tiny is exact, as the record says."""

import os
from pathlib import Path

import pytest
import torch
import transformers

import llm_bridge
from simulations.bench import families
from tests.kit.statistical import near

ROWS = {row["family"]: row for row in families.load()}
QUICK = ["gpt2", "falcon", "gemma2", "nemotron", "whisper", "bert", "qwen3_moe", "gpt_oss", "mamba", "lfm2", "jetmoe"]


def _again(family: str) -> None:
    torch.set_num_threads(1)
    row = families.run(family)
    assert families.right(row), row
    assert row["modules"] == ROWS[family]["modules"]
    assert row["looped"] == near(ROWS[family]["looped"])


@pytest.mark.parametrize("family", QUICK)
def test_a_family_of_each_kind(family: str) -> None:
    _again(family)


OTHERS = sorted(family for family in set(ROWS) - set(QUICK) if "norms" in ROWS[family])
if "EVERY_FAMILY" not in os.environ:
    OTHERS = OTHERS[:: len(OTHERS) // 36]


@pytest.mark.slow
@pytest.mark.parametrize("family", OTHERS)
def test_other_families(family: str) -> None:
    """About one in five of them; with EVERY_FAMILY=1 in the environment all, a minute of processor time."""
    _again(family)


def test_the_record_is_of_every_family_and_none_is_wrong() -> None:
    assert set(ROWS) <= set(families.families()) or transformers.__version__ != "5.24.0"
    assert all(families.right(row) for row in ROWS.values() if "norms" in row)


def test_the_published_tables_are_those_of_the_record() -> None:
    rows = families.load()
    assert families.RECORD.with_suffix(".md").read_text() == families.markdown(rows) + "\n"
    assert families.summary(rows) in (Path(llm_bridge.__file__).parent / "README.md").read_text()
