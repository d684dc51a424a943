"""What the writers write is what `vcposim replay` reads, without an option.

TRL and verl are not installed here: their trainers are stand-ins with the interface read at their sources.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_bridge.dumps import SCHEMA_VERSION, RolloutDump, RolloutFolder, record_trl, record_verl
from tests.kit.statistical import OPERATION, assert_near
from vcposim.errors import InputError
from vcposim.replay import Dump, rank, read_dump


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


def batch(seed: int, n: int = 8, t: int = 7, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Log-probabilities of four policies, garbage where the mask is 0, and a mask with holes."""
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.rand(n, t, generator=generator) < 0.7).long()
    names = ("log_prob", "behavior_log_prob", "anchor_log_prob", "reference_log_prob")
    tokens = {name: -torch.rand(n, t, generator=generator).to(dtype) for name in names}
    return {name: torch.where(mask > 0, x, 7.0) for name, x in tokens.items()} | {"mask": mask}


def assert_same(found: Dump, b: dict[str, torch.Tensor]) -> None:
    """Sums over the policy's own tokens, in float64; tokens as they were written."""
    own = b["mask"] > 0

    def total(name: str) -> torch.Tensor:
        return torch.where(own, b[name].float().double(), 0.0).sum(-1)

    assert_near(found.log_ratio, total("log_prob") - total("behavior_log_prob"))
    assert found.reference_log_ratio is not None
    assert_near(found.reference_log_ratio, total("log_prob") - total("reference_log_prob"))
    np.testing.assert_array_equal(found.length, own.sum(-1))
    for one in found.kept:
        np.testing.assert_array_equal(one.log_prob, b["log_prob"][one.row][own[one.row]].float())


@settings(max_examples=20)
@given(seed=st.integers(0, 10**6), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
def test_random_batches_come_back_with_every_policy(
    seed: int, dtype: torch.dtype, tmp_path_factory: pytest.TempPathFactory
) -> None:
    b, folder = batch(seed, dtype=dtype), tmp_path_factory.mktemp("d") / "run"
    path = RolloutFolder(folder).add(step=3, group=list("aabbccdd"), reward=torch.arange(8.0) % 2, **b)
    assert path == folder / "step_3.parquet"
    found = read_dump(folder)
    assert_same(found, b)
    assert all(
        np.array_equal(one.beside["anchor_log_prob"], b["anchor_log_prob"][one.row][b["mask"][one.row] > 0].float())
        for one in found.kept
    )


def test_a_folder_has_a_file_a_step_none_is_replaced_and_none_is_half(tmp_path: Path) -> None:
    rollouts = RolloutFolder(tmp_path / "run", rank=1)
    for step in (1, 2, 2):
        rollouts.add(step=step, group=list("aabbccdd"), reward=1.0, **batch(step))
    names = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert names == ["step_1_rank1.parquet", "step_2_part2_rank1.parquet", "step_2_rank1.parquet"]
    with pytest.raises(InputError, match="mask: shape"):
        rollouts.add(step=3, group="a", reward=1.0, **{**batch(0), "mask": torch.ones(8, 3)})
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == names
    assert read_dump(tmp_path / "run").group.size == 24


class Grpo:
    """TRL's GRPOTrainer as far as a recorder can see it, on one rank of two."""

    def __init__(self, b: dict[str, torch.Tensor], rewards: torch.Tensor, rank: int = 0, world: int = 1):
        self.b, self.rewards, self.num_generations = b, rewards, 4
        self.accelerator = SimpleNamespace(process_index=rank, num_processes=world)
        self.model, self.state = SimpleNamespace(training=True), SimpleNamespace(global_step=5)
        self.reward_weights = torch.tensor([1.0, 0.5])

    def _calculate_rewards(self, inputs: Any) -> torch.Tensor:
        return self.rewards  # gathered over ranks, a column a function

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        self._calculate_rewards(inputs)
        b = self.b
        return {
            "completion_mask": torch.ones_like(b["mask"]),
            "tool_mask": b["mask"],
            "old_per_token_logps": b["log_prob"],
            "sampling_per_token_logps": b["behavior_log_prob"],
            "ref_per_token_logps": b["reference_log_prob"],
            "advantages": torch.zeros(len(b["mask"])),
        }


@pytest.mark.parametrize("of_class", [False, True])
def test_trl_is_recorded_in_one_line(of_class: bool, tmp_path: Path) -> None:
    b = batch(1)
    rewards = torch.stack([torch.arange(8.0) % 2, torch.arange(8.0)], dim=1)
    kind: Any = type("Mine", (Grpo,), {})
    trainer = kind(b, rewards)
    record_trl(kind if of_class else trainer, tmp_path / "run")
    output = trainer._generate_and_score_completions([])
    assert output["old_per_token_logps"] is b["log_prob"]  # the trainer sees what it always saw
    trainer.model.training = False
    trainer._generate_and_score_completions([])  # an evaluation is not dumped
    found = read_dump(tmp_path / "run")
    assert_same(found, b)
    np.testing.assert_array_equal(found.reward, rewards @ torch.tensor([1.0, 0.5]))
    assert found.labels == ["5-0", "5-1"]
    np.testing.assert_array_equal(found.group, [0, 0, 0, 0, 1, 1, 1, 1])
    ranking = rank(found, resamples=100)
    assert ranking is not None
    assert "tba" in {row.name for row in ranking.rows}


def test_ranks_of_trl_write_their_own_rows_and_what_has_no_reward_is_left_out(tmp_path: Path) -> None:
    rewards = torch.stack([torch.arange(16.0), torch.zeros(16)], dim=1)
    rewards[9] = torch.nan
    for rank_ in (0, 1):
        trainer = Grpo(batch(rank_), rewards, rank_, 2)
        record_trl(trainer, tmp_path / "run")
        trainer._generate_and_score_completions([])
    found = read_dump(tmp_path / "run")
    np.testing.assert_array_equal(found.reward, [i for i in range(16) if i != 9])
    assert found.labels == [f"5-{i}" for i in range(4)]


def test_tokens_that_vllm_gives_no_log_probability_are_left_out(tmp_path: Path) -> None:
    b = batch(3)
    unknown = torch.zeros_like(b["mask"], dtype=torch.bool)
    unknown[2, :2] = True
    trainer = Grpo(
        {**b, "behavior_log_prob": b["behavior_log_prob"].masked_fill(unknown, torch.nan)}, torch.zeros(8, 2)
    )
    record_trl(trainer, tmp_path / "run")
    trainer._generate_and_score_completions([])
    assert_same(read_dump(tmp_path / "run"), {**b, "mask": b["mask"] * ~unknown})


def test_trl_without_vllm_and_other_trainers_are_refused(tmp_path: Path) -> None:
    class OnPolicy(Grpo):
        def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
            output = super()._generate_and_score_completions(inputs)
            del output["sampling_per_token_logps"]
            return output

    trainer = OnPolicy(batch(0), torch.zeros(8, 2))
    record_trl(trainer, tmp_path / "run")
    with pytest.raises(InputError, match="set use_vllm=True"):
        trainer._generate_and_score_completions([])

    class Pictures(Grpo):
        def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
            output = super()._generate_and_score_completions(inputs) | {"pixel_values": torch.zeros(8)}
            del output["old_per_token_logps"]
            return output

    trainer = Pictures(batch(0), torch.zeros(8, 2))
    record_trl(trainer, tmp_path / "run")
    with pytest.raises(InputError, match="no old_per_token_logps of this batch with images"):
        trainer._generate_and_score_completions([])
    with pytest.raises(InputError, match="SimpleNamespace has no _calculate_rewards"):
        record_trl(SimpleNamespace(), tmp_path / "run")


class Ppo:
    """verl's RayPPOTrainer as far as a recorder can see it."""

    def __init__(self) -> None:
        self.global_steps, self.updated = 12, 0

    def _update_actor(self, batch: Any) -> str:
        self.updated += 1
        return "metrics"


@pytest.mark.parametrize("of_class", [False, True])
def test_verl_is_recorded_in_one_line(of_class: bool, tmp_path: Path) -> None:
    b = batch(2)
    kind: Any = type("Mine", (Ppo,), {})
    trainer = kind()
    record_verl(kind if of_class else trainer, tmp_path / "run")
    scores = torch.zeros(8, 7)
    scores[:, 2] = torch.arange(8.0)
    tensors = {"response_mask": b["mask"], "old_log_probs": b["log_prob"], "rollout_log_probs": b["behavior_log_prob"]}
    proto = SimpleNamespace(
        batch=tensors | {"token_level_scores": scores, "ref_log_prob": b["reference_log_prob"]},
        non_tensor_batch={"uid": np.array(list("aabbccdd"), dtype=object), "min_global_steps": np.full(8, 9)},
    )
    assert trainer._update_actor(proto) == "metrics"
    assert trainer.updated == 1
    found = read_dump(tmp_path / "run")
    assert_same(found, b)
    np.testing.assert_array_equal(found.reward, np.arange(8.0))
    assert len(found.labels) == 4
    assert found.slices["lag"][1] == [3]
    del proto.batch["rollout_log_probs"]
    with pytest.raises(InputError, match=r"calculate_log_probs=True"):
        trainer._update_actor(proto)
