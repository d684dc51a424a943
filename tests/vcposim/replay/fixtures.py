"""One batch of rollouts, written the way each trainer writes it and in every container: the matrix of the tests.

A fixture is made after the file of the framework that `vcposim.replay.layouts` names as its source. What a framework
pads with is garbage here, so that a mask that is not honoured shows.
"""

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

Record = dict[str, Any]


@dataclass
class Rollout:
    """One response, as it was."""

    prompt: int
    reward: float
    sampler: list[float]
    learner: list[float]

    @property
    def log_ratio(self) -> float:
        return float(np.sum(self.learner) - np.sum(self.sampler))


def batch(seed: int = 0, prompts: int = 4, responses: int = 4, longest: int = 30) -> list[Rollout]:
    """Rollouts of prompt after prompt; log-probabilities as doubles, noise of 0.1 nats a token between the policies."""
    rng = np.random.default_rng(seed)
    out = []
    for i in range(prompts * responses):
        sampler = -rng.gamma(0.5, 0.8, rng.integers(3, longest)) - 1e-6
        learner = np.minimum(sampler + 0.1 * rng.standard_normal(sampler.size), -1e-9)
        out.append(Rollout(i // responses, float(rng.random() < 0.5), sampler.tolist(), learner.tolist()))
    return out


def padded(values: list[float], size: int, fill: float) -> list[float]:
    return values + [fill] * (size - len(values))


def mask_of(values: list[float], size: int) -> list[int]:
    return [1] * len(values) + [0] * (size - len(values))


@dataclass(frozen=True)
class Fixture:
    """A layout's rows for a batch; `options` are what a reader must add (arguments of `read_dump`)."""

    rows: Callable[[list[Rollout]], list[Record]]
    options: dict[str, Any] = field(default_factory=dict)
    stock: bool = False
    """a file that cannot be replayed: it must be refused with what to do"""


def _canonical(b: list[Rollout]) -> list[Record]:
    return [
        {"group": r.prompt, "reward": r.reward, "behavior_log_prob": r.sampler, "log_prob": r.learner, "step": 1}
        for r in b
    ]


def _verl(b: list[Rollout]) -> list[Record]:
    size = max(len(r.sampler) for r in b) + 3
    return [
        {
            "uid": f"u{r.prompt}",
            "token_level_scores": padded([0.0] * (len(r.sampler) - 1) + [r.reward], size, 0.0),
            "response_mask": mask_of(r.sampler, size),
            "rollout_log_probs": padded(r.sampler, size, 0.0),
            "old_log_probs": padded(r.learner, size, -7.5),
        }
        for r in b
    ]


def _openrlhf(b: list[Rollout]) -> list[Record]:
    size = max(len(r.sampler) for r in b) + 2
    return [
        {
            "index": r.prompt,
            "prompts": f"prompt {r.prompt}",
            "action_log_probs": padded(r.learner, size, 0.0),
            "rollout_log_probs": padded(r.sampler, size, 0.0),
            "action_mask": [bool(x) for x in mask_of(r.sampler, size)],
            "rewards": r.reward,
            "response_length": float(len(r.sampler)),
            "total_length": float(len(r.sampler) + 9),
        }
        for r in b
    ]


def _prime(b: list[Rollout]) -> list[Record]:
    return [
        {
            "schema_version": 1,
            "step": 3,
            "export_step": 3,
            "rank": 0,
            "env_name": "arith",
            "token_ids": [1] * (4 + len(r.sampler)),
            "loss_mask": [False] * 4 + [True] * len(r.sampler),
            "rewards": [r.reward] * (4 + len(r.sampler)),
            "inference_logprobs": [0.0] * 4 + r.sampler,
            "trainer_logprobs": [-3.25] * 4 + r.learner,
        }
        for r in b
    ]


def _areal_batch(b: list[Rollout]) -> list[Record]:
    return [
        {
            "task_id": r.prompt,
            "logprobs": [0.0] * 5 + r.sampler,
            "prox_logp": [-2.0] * 5 + r.learner,
            "loss_mask": [0] * 5 + [1] * len(r.sampler),
            "versions": [-1] * 5 + [4] * len(r.sampler),
            "rewards": r.reward,
        }
        for r in b
    ]


def _slime_train(b: list[Rollout]) -> list[Record]:
    return [
        {
            "data_parallel_rank": 0,
            "sample_index": i,
            "group_index": r.prompt,
            "response_lengths": len(r.sampler),
            "total_lengths": len(r.sampler) + 9,
            "rewards": r.reward - 0.5,
            "local_raw_reward": r.reward,
            "rollout_ids": i,
            "loss_masks": [1] * len(r.sampler),
            "rollout_log_probs": r.sampler,
            "log_probs": r.learner,
            "advantages": [0.1] * len(r.sampler),
        }
        for i, r in enumerate(b)
    ]


def _slime_rollout(b: list[Rollout]) -> list[Record]:
    return [
        {
            "group_index": r.prompt,
            "index": i,
            "prompt": "q",
            "response": "a",
            "response_length": len(r.sampler),
            "reward": r.reward,
            "loss_mask": None,
            "weight_versions": ["3"],
            "rollout_log_probs": r.sampler,
            "status": "completed",
        }
        for i, r in enumerate(b)
    ]


def _skyrl(b: list[Rollout]) -> list[Record]:
    size = max(len(r.sampler) for r in b) + 1
    return [
        {
            "uid": f"p{r.prompt}",
            "rewards": padded([0.0] * (len(r.sampler) - 1) + [r.reward], size, 0.0),
            "loss_mask": mask_of(r.sampler, size),
            "rollout_logprobs": padded(r.sampler, size, 0.0),
            "action_log_probs": padded(r.learner, size, -4.0),
        }
        for r in b
    ]


def _nemo(b: list[Rollout]) -> list[Record]:
    size = max(len(r.sampler) for r in b) + 12
    return [
        {
            "content": [f"question {r.prompt}"],
            "rewards": [r.reward],
            "input_lengths": [7 + len(r.sampler)],
            "token_loss_mask": [padded([0.0] * 7 + [1.0] * len(r.sampler), size, 0.0)],
            "sample_loss_mask": [1.0],
            "generation_logprobs": [padded([0.0] * 7 + r.sampler, size, 0.0)],
            "prev_logprobs": [padded([0.0] * 7 + r.learner, size, -9.0)],
            "idx": i,
        }
        for i, r in enumerate(b)
    ]


def _open_instruct(b: list[Rollout]) -> list[Record]:
    return [
        {
            "step": 1 + (r.prompt >= 2),
            "sample_idx": i,
            "prompt_idx": r.prompt % 2,
            "response_tokens": list(range(len(r.sampler))),
            "reward": r.reward,
            "advantage": 0.0,
            "finish_reason": "stop",
            "dataset": "arith",
            "logprobs": r.sampler,
        }
        for i, r in enumerate(b)
    ]


def _pipelinerl(b: list[Rollout]) -> list[Record]:
    return [
        {
            "text": "q a",
            "n_predicted": 1,
            "reward": r.reward,
            "logprobs": r.sampler,
            "ref_logprobs": [x - 0.1 for x in r.sampler],
            "group_id": str(r.prompt),
            "finished": True,
            "metadata": {"model_version": 3},
        }
        for r in b
    ]


def _openai(b: list[Rollout]) -> list[Record]:
    return [
        {
            "group": r.prompt,
            "reward": r.reward,
            "choices": [
                {
                    "index": 0,
                    "finish_reason": "stop",
                    "logprobs": {"content": [{"token": "a", "logprob": x, "top_logprobs": []} for x in r.sampler]},
                }
            ],
            "trainer_logprobs": r.learner,
        }
        for r in b
    ]


def _with(rows: Callable[[list[Rollout]], list[Record]], name: str) -> Callable[[list[Rollout]], list[Record]]:
    """The same rows after the change that the refusal asks for: with the learner's log-probabilities."""
    return lambda b: [{**row, name: r.learner} for row, r in zip(rows(b), b, strict=True)]


def _texts(**columns: Callable[[Rollout], Any]) -> Callable[[list[Rollout]], list[Record]]:
    return lambda b: [{name: make(r) for name, make in columns.items()} for r in b]


def _name(r: Rollout) -> str:
    return f"What is {r.prompt}?"


FIXTURES: dict[str, Fixture] = {
    "vcposim": Fixture(_canonical),
    "verl_rollout": Fixture(
        _texts(input=_name, output=lambda r: "7", gts=lambda r: "7", score=lambda r: r.reward, step=lambda r: 12),
        stock=True,
    ),
    "verl_v1": Fixture(
        lambda b: [
            {"input": _name(r), "output": "7", "score": r.reward, "step": 12, "uid": f"ab_{r.prompt}_{i}_0"}
            for i, r in enumerate(b)
        ],
        stock=True,
    ),
    "verl_dataproto": Fixture(_verl),
    "trl_completions": Fixture(
        _texts(
            step=lambda r: 5,
            prompt=_name,
            completion=lambda r: "7",
            accuracy_reward=lambda r: r.reward,
            advantage=lambda r: 0.0,
        ),
        stock=True,
    ),
    "trl_async": Fixture(
        lambda b: [
            {
                "prompt": [{"role": "user", "content": _name(r)}],
                "input_ids": [1] * (3 + len(r.sampler)),
                "completion_mask": [0, 0, 0] + [1] * len(r.sampler),
                "old_log_probs": [0.0] * 3 + r.sampler,
                "advantage": 0.0,
                "model_version": 2,
            }
            for r in b
        ],
        stock=True,
    ),
    "openrlhf": Fixture(_openrlhf),
    "prime_rl": Fixture(_prime, {"group_size": 4}),
    "prime_rl_traces": Fixture(
        lambda b: [
            {
                "id": str(i),
                "env": {"id": "arith"},
                "group": {"id": str(r.prompt)},
                "run": {"name": "x"},
                "traces": [{"nodes": [{"sampled": True, "logprobs": r.sampler}], "rewards": {}}],
            }
            for i, r in enumerate(b)
        ],
        stock=True,
    ),
    "areal_rollout": Fixture(
        _texts(
            task_id=lambda r: r.prompt,
            sample_idx=lambda r: 0,
            seqlen=lambda r: 5 + len(r.sampler),
            prompt_len=lambda r: 5,
            head_version=lambda r: 1,
            tail_version=lambda r: 2,
            reward=lambda r: r.reward,
            prompt=_name,
            completion=lambda r: "7",
        ),
        stock=True,
    ),
    "areal_batch": Fixture(_areal_batch),
    "slime_train": Fixture(_slime_train),
    "slime_rollout": Fixture(_slime_rollout, stock=True),
    "miles_train": Fixture(_slime_train, {"layout_name": "miles_train"}),
    "miles_rollout": Fixture(_slime_rollout, {"layout_name": "miles_rollout"}, stock=True),
    "skyrl_batch": Fixture(_skyrl),
    "skyrl_generator": Fixture(
        lambda b: [
            {
                "prompt_token_ids": [1, 2],
                "response_ids": [1] * len(r.sampler),
                "rewards": r.reward,
                "loss_masks": [1] * len(r.sampler),
                "stop_reasons": "stop",
                "rollout_logprobs": r.sampler,
            }
            for r in b
        ],
        stock=True,
    ),
    "nemo_rl": Fixture(_nemo, {"columns": {"group": "content"}}),
    "open_instruct": Fixture(_open_instruct, stock=True),
    "pipelinerl": Fixture(_pipelinerl, stock=True),
    "roll": Fixture(
        _texts(
            prompt=_name,
            responses=lambda r: "7",
            scores=lambda r: r.reward,
            sampling_params=lambda r: "{}",
            global_step=lambda r: 3,
        ),
        stock=True,
    ),
    "roll_board": Fixture(
        lambda b: [
            {
                "prompt": _name(r),
                "response": "7",
                "reward": r.reward,
                "step": 3,
                "logprobs": padded(r.learner, 40, 0.0),
                "log_probs2": padded(r.learner, 40, 0.0),
                "new_response_mask": mask_of(r.sampler, 40),
            }
            for r in b
        ],
        stock=True,
    ),
    "ms_swift": Fixture(
        _texts(
            step=lambda r: "7",
            prompt=_name,
            completion=lambda r: "7",
            Accuracy=lambda r: r.reward,
            advantages=lambda r: 0.0,
        ),
        stock=True,
    ),
    "tinker_cookbook": Fixture(
        lambda b: [
            {
                "schema_version": 1,
                "split": "train",
                "iteration": 4,
                "group_idx": r.prompt,
                "traj_idx": i % 4,
                "sampling_client_step": 3,
                "total_reward": r.reward,
                "final_reward": r.reward,
                "steps": [{"step_idx": 0, "ac_len": len(r.sampler), "reward": r.reward}],
            }
            for i, r in enumerate(b)
        ],
        stock=True,
    ),
    "openai_chat": Fixture(_openai),
    "log_ratio": Fixture(
        lambda b: [
            {"group": r.prompt, "reward": r.reward, "log_importance_ratio": r.log_ratio, "length": len(r.sampler)}
            for r in b
        ]
    ),
}
"""layout -> fixture"""


def _roll_board(b: list[Rollout]) -> list[Record]:
    rows = FIXTURES["roll_board"].rows(b)
    return [{**row, "infer_logprobs": padded(r.sampler, 40, -1.0)} for row, r in zip(rows, b, strict=True)]


def _verl_v1(b: list[Rollout]) -> list[Record]:
    rows = FIXTURES["verl_v1"].rows(b)
    return [{**row, "rollout_log_probs": r.sampler, "old_log_probs": r.learner} for row, r in zip(rows, b, strict=True)]


CHANGED: dict[str, Fixture] = {
    "roll_board": Fixture(_roll_board),
    "verl_v1": Fixture(_verl_v1),
    "open_instruct": Fixture(_with(_open_instruct, "trainer_logprobs")),
    "pipelinerl": Fixture(_with(_pipelinerl, "new_logprobs")),
    "slime_rollout": Fixture(_with(_slime_rollout, "log_probs")),
}
"""stock layouts after the change that their refusal names"""


# ------------------------------------------------------------------------------------------------------- containers


def _lines(rows: list[Record]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _table(rows: list[Record]) -> pa.Table:
    return pa.Table.from_pylist(rows)


def _zstd(data: bytes) -> bytes:
    return pa.compress(data, codec="zstd", asbytes=True)


def _file(name: str, content: Callable[[list[Record]], bytes]) -> Callable[[Path, list[Record]], Path]:
    def write(folder: Path, rows: list[Record]) -> Path:
        path = folder / name
        path.write_bytes(content(rows))
        return path

    return write


def _parquet(folder: Path, rows: list[Record]) -> Path:
    pq.write_table(_table(rows), folder / "r.parquet", row_group_size=5)
    return folder / "r.parquet"


def _arrow_stream(folder: Path, rows: list[Record]) -> Path:
    table = _table(rows)
    with pa.OSFile(str(folder / "r.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=7)
    return folder / "r.arrow"


def _arrow_file(folder: Path, rows: list[Record]) -> Path:
    table = _table(rows)
    with pa.OSFile(str(folder / "r.feather"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=7)
    return folder / "r.feather"


def _dataset(folder: Path, rows: list[Record]) -> Path:
    """As datasets.save_to_disk lays it out."""
    out = folder / "saved"
    out.mkdir()
    half = len(rows) // 2
    for k, part in enumerate((rows[:half], rows[half:])):
        table = pa.Table.from_pylist(part, schema=_table(rows).schema)
        name = out / f"data-{k:05d}-of-00002.arrow"
        with pa.OSFile(str(name), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    (out / "state.json").write_text('{"_data_files": []}')
    (out / "dataset_info.json").write_text("{}")
    return out


def _shards(folder: Path, rows: list[Record]) -> Path:
    out = folder / "run" / "shards"
    out.mkdir(parents=True)
    for k in range(0, len(rows), 3):
        (out / f"part_{k}.jsonl").write_bytes(_lines(rows[k : k + 3]))
    (out / "STABLE").touch()
    return out


def _columns(rows: list[Record]) -> bytes:
    return json.dumps({name: [row[name] for row in rows] for name in rows[0]}).encode()


def _batched_lines(rows: list[Record]) -> bytes:
    return "".join(json.dumps(rows[k : k + 4]) + "\n" for k in range(0, len(rows), 4)).encode()


CONTAINERS: dict[str, Callable[[Path, list[Record]], Path]] = {
    "jsonl": _file("r.jsonl", _lines),
    "jsonl without a last newline": _file("r.jsonl", lambda rows: _lines(rows).rstrip()),
    "jsonl, windows": _file("r.jsonl", lambda rows: b"\xef\xbb\xbf" + _lines(rows).replace(b"\n", b"\r\n")),
    "gz": _file("r.jsonl.gz", lambda rows: gzip.compress(_lines(rows))),
    "gz under another name": _file("r.dat", lambda rows: gzip.compress(_lines(rows))),
    "zst": _file("r.jsonl.zst", lambda rows: _zstd(_lines(rows))),
    "bz2": _file("r.jsonl.bz2", lambda rows: bz2.compress(_lines(rows))),
    "xz": _file("r.jsonl.xz", lambda rows: lzma.compress(_lines(rows))),
    "array": _file("r.json", lambda rows: json.dumps(rows).encode()),
    "array, pretty": _file("r.json", lambda rows: json.dumps(rows, indent=1).encode()),
    "objects, pretty": _file("r.json", lambda rows: "\n".join(json.dumps(r, indent=2) for r in rows).encode()),
    "an array a line": _file("r.jsonl", _batched_lines),
    "parquet": _parquet,
    "arrow stream": _arrow_stream,
    "arrow file": _arrow_file,
    "dataset folder": _dataset,
    "shards": _shards,
}
"""container -> how to write rows into a folder"""

COLUMNS = _file("r.json", _columns)
