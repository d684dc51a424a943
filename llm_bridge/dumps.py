"""Writes rollouts in the form that `vcposim replay` reads without being told anything: Parquet, with a version.

    with RolloutDump("rollouts.parquet") as dump:
        for step, batch in enumerate(loop):
            ...
            dump.add(step=step, group=batch.prompt_id, reward=batch.reward, log_prob=log_prob,
                     behavior_log_prob=batch.log_prob, mask=batch.mask, version=batch.version, learner_version=step)

Columns, one row a trajectory; tokens of the policy alone, nothing is padded:

    group               string, what the responses of one prompt share
    reward              double
    log_prob            list of float, the learner's log pi of each token, nats
    behavior_log_prob   list of float, the sampler's log mu of each token, as the sampler returned it
    step                int64, of training
    version             int64 or null, of the weights that sampled (the first token's)
    learner_version     int64 or null, of the weights that learn
    score_sq_norm       double or null, ||grad log pi(tau)||^2

The file's metadata holds `vcposim.rollouts` = SCHEMA_VERSION. In a trainer of TRL the place is an override of
`_generate_and_score_completions` (`sampling_per_token_logps`, `old_per_token_logps`, `completion_mask`), in verl a
`_log_rollout_data` (`rollout_log_probs`, `old_log_probs`, `response_mask`, `uid`): the tensors there have these shapes.
Both places were read in their sources and not run here.
"""

from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from vcposim.errors import InputError

SCHEMA_VERSION = "1"
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
    ) -> None:
        """One batch: `group`, `reward`, `version`, `score_sq_norm` (n,), or one number for all; tokens (n, t), `mask` 1
        for the policy's own."""
        shape = tuple(log_prob.shape)
        for name, tensor in (("behavior_log_prob", behavior_log_prob), ("mask", mask)):
            if tuple(tensor.shape) != shape:
                raise InputError(f"{name}: shape {tuple(tensor.shape)} is not that of log_prob, {shape}")
        n = shape[0]
        own = mask.bool().cpu()
        lists = {
            name: [row[keep].tolist() for row, keep in zip(tensor.detach().float().cpu(), own, strict=True)]
            for name, tensor in (("log_prob", log_prob), ("behavior_log_prob", behavior_log_prob))
        }
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
