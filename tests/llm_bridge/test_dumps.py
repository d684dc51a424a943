"""What `RolloutDump` writes is what `vcposim replay` reads, without an option."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from llm_bridge.dumps import SCHEMA_VERSION, RolloutDump
from tests.kit.statistical import OPERATION, assert_near
from vcposim.errors import InputError
from vcposim.replay import read_dump


def tensors(n: int = 6, t: int = 9) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    behavior = -torch.rand(n, t, generator=generator)
    mask = (torch.arange(t) < torch.randint(2, t, (n, 1), generator=generator)).long()
    garbage = torch.where(mask > 0, 0.0, torch.nan)
    moved = behavior + 0.1 * torch.randn(n, t, generator=generator)
    return {"log_prob": moved.clamp(max=0) + garbage, "behavior_log_prob": behavior + garbage, "mask": mask}


def test_a_dump_is_read_back(tmp_path: Path) -> None:
    batch = tensors()
    reward = torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0, 0.0])
    path = tmp_path / "run" / "rollouts.parquet"
    with RolloutDump(path) as dump:
        for step in (3, 4):
            version = torch.full((6,), step - 2)
            dump.add(step=step, group=[0, 0, 0, 1, 1, 1], reward=reward, version=version, learner_version=step, **batch)
    assert pq.read_schema(path).metadata[b"vcposim.rollouts"] == SCHEMA_VERSION.encode()
    found = read_dump(path)
    ratio = torch.where(batch["mask"] > 0, batch["log_prob"] - batch["behavior_log_prob"], 0.0).double().sum(-1)
    assert_near(found.log_ratio, [*ratio, *ratio], allow=OPERATION)
    np.testing.assert_array_equal(found.length, [*batch["mask"].sum(-1), *batch["mask"].sum(-1)])
    assert len(found.labels) == 4  # two prompts at two steps
    assert found.slices["lag"][1] == [2]
    assert any("score_sq_norm is null" in note for note in found.notes)


def test_norms_are_used_where_they_are_written(tmp_path: Path) -> None:
    with RolloutDump(tmp_path / "d.parquet") as dump:
        norm = torch.arange(1.0, 7.0)
        dump.add(step=0, group=list("aabbcc"), reward=1.0, score_sq_norm=norm, **tensors())
    found = read_dump(tmp_path / "d.parquet")
    assert found.norm_source == "score_sq_norm"
    np.testing.assert_array_equal(found.score_sq_norm, np.arange(1.0, 7.0))


def test_nothing_is_overwritten_and_shapes_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "d.parquet"
    with RolloutDump(path) as dump:
        batch = tensors()
        with pytest.raises(InputError, match="mask: shape"):
            dump.add(step=0, group=0, reward=1.0, **{**batch, "mask": batch["mask"][:, 1:]})
        with pytest.raises(InputError, match="reward: 2 values for 6"):
            dump.add(step=0, group=0, reward=[1.0, 2.0], **batch)
        dump.add(step=0, group=0, reward=1.0, **batch)
    with pytest.raises(InputError, match="is there already"):
        RolloutDump(path)
