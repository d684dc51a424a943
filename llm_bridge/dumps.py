"""Writes rollouts in the form that `vcposim replay` reads without being told anything: Parquet, with a version.

A loop of your own, a whole file a step, so that a crash costs one step and `vcposim replay run --watch 30` follows it:

    rollouts = RolloutFolder("run/rollouts")
    for step, batch in enumerate(loop):
        ...
        rollouts.add(step=step, group=batch.prompt_id, reward=batch.reward, log_prob=log_prob, mask=batch.mask,
                     behavior_log_prob=batch.log_prob, version=batch.version, learner_version=step)

TRL (a trainer, or its class), before `trainer.train()`:

    record_trl(trainer, "run/rollouts")

verl, in a module that `VERL_USE_EXTERNAL_MODULES` names, so that every process has it:

    from verl.trainer.ppo.ray_trainer import RayPPOTrainer
    record_verl(RayPPOTrainer, "run/rollouts")

Columns, one row a trajectory; tokens of the policy alone, nothing is padded:

    group                string, what the responses of one prompt share
    reward               double
    log_prob             list of float, the learner's log pi of each token, nats
    behavior_log_prob    list of float, the sampler's log mu of each token, as the sampler returned it
    step                 int64, of training
    version              int64 or null, of the weights that sampled (the first token's)
    learner_version      int64 or null, of the weights that learn
    score_sq_norm        double or null, ||grad log pi(tau)||^2
    anchor_log_prob      list of float or null, the proximal policy's
    reference_log_prob   list of float or null, that of the KL penalty's reference

The file's metadata holds `vcposim.rollouts` = SCHEMA_VERSION; version 1 had no columns of other policies.

The seams of TRL 1.16 and verl 0.9.1 were read at their sources (huggingface/trl@f2cd5771, trl/trainer/grpo_trainer.py;
verl-project/verl@1dda039b, verl/trainer/ppo/ray_trainer.py). The tests run TRL's trainer where it is installed, and
stand-ins of both interfaces everywhere; verl itself was never run.
"""

import inspect
import os
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from vcposim.errors import InputError

SCHEMA_VERSION = "2"
SCHEMA = pa.schema(
    {
        "group": pa.string(),
        "reward": pa.float64(),
        "log_prob": pa.list_(pa.float32()),
        "behavior_log_prob": pa.list_(pa.float32()),
        "step": pa.int64(),
        "version": pa.int64(),
        "learner_version": pa.int64(),
        "score_sq_norm": pa.float64(),
        "anchor_log_prob": pa.list_(pa.float32()),
        "reference_log_prob": pa.list_(pa.float32()),
    },
    metadata={"vcposim.rollouts": SCHEMA_VERSION},
)


class RolloutDump:
    """An open dump; each `add` is one row group, so that what was added survives until the next one.

    Raises `InputError` where the file is there already, and on tensors of different shapes.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if self.path.exists():
            raise InputError(f"{self.path}: is there already; name another file, rollouts are never overwritten")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._writer = pq.ParquetWriter(self.path, SCHEMA, write_page_checksum=True)

    def add(
        self,
        *,
        step: int,
        group: Any,
        reward: Any,
        log_prob: torch.Tensor,
        behavior_log_prob: torch.Tensor,
        mask: torch.Tensor,
        version: Any = None,
        learner_version: Any = None,
        score_sq_norm: Any = None,
        anchor_log_prob: torch.Tensor | None = None,
        reference_log_prob: torch.Tensor | None = None,
    ) -> None:
        """One batch: of each trajectory (n,) `group`, `reward`, `version` and `score_sq_norm`, or one number for all.

        Of each token `log_prob` (n, t) and its like; `mask` (n, t) is 1 for the policy's own.

        Raises `InputError` for arrays whose shapes do not fit.
        """
        shape = tuple(log_prob.shape)
        tokens = {
            "log_prob": log_prob,
            "behavior_log_prob": behavior_log_prob,
            "anchor_log_prob": anchor_log_prob,
            "reference_log_prob": reference_log_prob,
        }
        given = {name: tensor for name, tensor in tokens.items() if tensor is not None}
        for name, tensor in {**given, "mask": mask}.items():
            if tuple(tensor.shape) != shape:
                raise InputError(f"{name}: shape {tuple(tensor.shape)} is not that of log_prob, {shape}")
        n = shape[0]
        own = mask.bool().cpu()
        lists: dict[str, list[Any]] = {name: [None] * n for name in tokens}
        for name, tensor in given.items():
            lists[name] = [row[keep].tolist() for row, keep in zip(tensor.detach().float().cpu(), own, strict=True)]
        columns = {
            "group": [str(x) for x in _column("group", group, n)],
            "reward": [float(x) for x in _column("reward", reward, n)],
            **lists,
            "step": [step] * n,
            "version": _column("version", version, n),
            "learner_version": _column("learner_version", learner_version, n),
            "score_sq_norm": _column("score_sq_norm", score_sq_norm, n),
        }
        self._writer.write_table(pa.table(columns, schema=SCHEMA))

    def close(self) -> None:
        """Write the footer: a Parquet file cannot be read before."""
        self._writer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class RolloutFolder:
    """A dump of one file a batch, `step_12.parquet`, each whole before it appears; on several ranks, `_rank3` behind.

    A folder that has such files already is continued: none of them is replaced.
    """

    def __init__(self, folder: str | Path, rank: int | None = None):
        self.folder, self.rank = Path(folder), rank

    def add(self, *, step: int, **columns: Any) -> Path:
        """One batch, as `RolloutDump.add` takes it; where it went."""
        self.folder.mkdir(parents=True, exist_ok=True)
        end = "" if self.rank is None else f"_rank{self.rank}"
        path, part = self.folder / f"step_{step}{end}.parquet", 1
        while path.exists():
            part += 1
            path = self.folder / f"step_{step}_part{part}{end}.parquet"
        hidden = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            with RolloutDump(hidden) as dump:
                dump.add(step=step, **columns)
            os.replace(hidden, path)
        finally:
            hidden.unlink(missing_ok=True)
        return path


def record_trl(trainer: Any, folder: str | Path) -> None:
    """Dump what TRL's `GRPOTrainer` (one, or the class) generates for training, a file a generation and rank.

    log_prob are `old_per_token_logps`, the learner's when the batch came in: within the updates that share a generation
    it moves on; where TRL keeps none (a generation an update, without vLLM), its own method is asked for them, one
    forward pass more. behavior_log_prob are `sampling_per_token_logps`, which TRL has with vLLM or of a `rollout_func`;
    without them there is nothing to compare with, and the first batch is refused. Tokens of which vLLM could not say a
    log-probability (NaN) are left out: TRL does not correct them either.

    Raises `InputError` for a trainer without the methods that are wrapped.
    """
    made: dict[int, RolloutFolder] = {}

    def keep_rewards(self: Any, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._vcposim_reward = call(*args, **kwargs)
        return self._vcposim_reward

    def write(self: Any, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        output = call(*args, **kwargs)
        if not self.model.training:
            return output
        sampler = output.get("sampling_per_token_logps")
        if sampler is None:
            raise InputError(
                "record_trl: TRL's batch has no sampling_per_token_logps; set use_vllm=True and "
                "vllm_importance_sampling_correction=True, or return logprobs from a rollout_func, so that it keeps "
                "the sampler's log-probabilities"
            )
        learner = output.get("old_per_token_logps")
        if learner is None and "pixel_values" in output:
            raise InputError(
                "record_trl: TRL keeps no old_per_token_logps of this batch with images; set use_vllm=True and "
                "vllm_importance_sampling_correction=True, so that it does"
            )
        if learner is None:
            ids, attended = (
                torch.cat([output[f"prompt_{what}"], output[f"completion_{what}"]], dim=1) for what in ("ids", "mask")
            )
            last = output["completion_ids"].shape[1]
            with torch.no_grad():
                learner = self._get_per_token_logps_and_entropies(
                    self.model, ids, attended, last, batch_size=self.args.train_batch_size
                )[0]
        n = output["completion_mask"].shape[0]
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        row = torch.arange(rank * n, (rank + 1) * n)
        weights = self.reward_weights.to(self._vcposim_reward.device)
        reward = (self._vcposim_reward * weights).nansum(dim=1)[row]  # of all ranks, as TRL gathers them
        scored = ~torch.isnan(self._vcposim_reward).all(dim=1)[row].cpu()
        own = output["completion_mask"] * output.get("tool_mask", 1)
        mask = own * scored[:, None].to(own) * ~torch.isnan(sampler)
        step = int(self.state.global_step)
        tokens = {
            "log_prob": learner,
            "behavior_log_prob": sampler,
            "reference_log_prob": output.get("ref_per_token_logps"),
        }
        keep = scored.nonzero()[:, 0]
        made.setdefault(rank, RolloutFolder(folder, rank if world > 1 else None)).add(
            step=step,
            group=[f"{step}-{i}" for i in (row // self.num_generations)[keep].tolist()],
            reward=reward.cpu()[keep],
            mask=mask.cpu()[keep],
            learner_version=step,
            **{name: None if x is None else x.detach().cpu()[keep] for name, x in tokens.items()},
        )
        return output

    _wrap(trainer, "_calculate_rewards", keep_rewards)
    _wrap(trainer, "_generate_and_score_completions", write)


def record_verl(trainer: Any, folder: str | Path) -> None:
    """Dump every batch that verl's `RayPPOTrainer` (one, or the class) updates its actor with, a file a step.

    log_prob are `old_log_probs`, which the trainer computes before its update, behavior_log_prob the sampler's
    `rollout_log_probs`; a `ref_log_prob` is kept if there is one. Everything is on the driver.

    Raises `InputError` for a trainer without the method that is wrapped, and on a batch without the sampler's.
    """
    rollouts = RolloutFolder(folder)

    def write(self: Any, call: Callable[..., Any], batch: Any, *args: Any, **kwargs: Any) -> Any:
        tensor, other = batch.batch, batch.non_tensor_batch
        if "rollout_log_probs" not in tensor:
            raise InputError(
                "record_verl: verl's batch has no rollout_log_probs; set "
                "actor_rollout_ref.rollout.calculate_log_probs=True, so that it keeps the sampler's log-probabilities"
            )
        step = int(self.global_steps)
        version = other.get("min_global_steps")
        rollouts.add(
            step=step,
            group=[f"{step}-{uid}" for uid in other["uid"].tolist()],
            reward=tensor["token_level_scores"].sum(-1),
            mask=tensor["response_mask"],
            log_prob=tensor["old_log_probs"],
            behavior_log_prob=tensor["rollout_log_probs"],
            reference_log_prob=tensor.get("ref_log_prob", None),
            version=None if version is None else [int(x) for x in version],
            learner_version=None if version is None else step,
        )
        return call(batch, *args, **kwargs)

    _wrap(trainer, "_update_actor", write)


def _wrap(owner: Any, name: str, around: Callable[..., Any]) -> None:
    """Replace a method of an object or a class: `around(self, method, *args)` decides when to call it."""
    method = getattr(owner, name, None)
    kind = owner.__name__ if inspect.isclass(owner) else type(owner).__name__
    if method is None:
        raise InputError(f"trainer: {kind} has no {name}; this was written for TRL 1.16 and verl 0.9.1")
    if inspect.isclass(owner):

        @wraps(method)
        def of_class(self: Any, *args: Any, **kwargs: Any) -> Any:
            return around(self, method.__get__(self), *args, **kwargs)

        setattr(owner, name, of_class)
    else:
        setattr(owner, name, wraps(method)(lambda *args, **kwargs: around(owner, method, *args, **kwargs)))


def _column(name: str, values: Any, n: int) -> list[Any]:
    """One value a row; a single number (or None) stands for all."""
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu().tolist()
    if values is None or isinstance(values, int | float | str):
        return [values] * n
    values = list(values)
    if len(values) != n:
        raise InputError(f"{name}: {len(values)} values for {n} trajectories")
    return values
