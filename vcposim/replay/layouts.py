"""How trainers write their rollouts: one entry a layout, each read at the framework's own source.

A layout is recognized by columns that stand together in no other one, or named with `--layout`. Its `columns` say which
of the file's names hold our fields (the first that is there counts), and are printed whenever they are used. A layout
without log-probabilities of both policies cannot be replayed as it is; `missing` says why, `change` what to add.

To add one, write an entry; the tests then expect a fixture for it in `tests/vcposim/replay/fixtures.py`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from vcposim.errors import unknown_name


@dataclass(frozen=True)
class Layout:
    """One way to write rollouts."""

    name: str
    what: str
    """framework and file, for people"""
    source: str
    """file of the framework's repository that writes it"""
    read_on: str
    """when that file was read: commit or date"""
    sight: frozenset[str]
    """column names that, together, are seen nowhere else; empty: only by name"""
    columns: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """field -> names of the file, best first; a name may be a path: a.b, a.0.b, a.*.b"""
    reward_rule: str = "one"
    """what a list under `reward` means: `sum` of token rewards, or the `same` number at every token"""
    missing: str = ""
    """what a stock file lacks"""
    change: str = ""
    """what makes the trainer write it"""


_SEEN = "2026-11-28"

_VERL_CHANGE = (
    "set actor_rollout_ref.rollout.calculate_log_probs=True, and in RayPPOTrainer.fit after old_log_probs: f = open("
    'f"rollouts_{self.global_steps}.jsonl", "w"); [f.write(json.dumps({"uid": u} | {k: batch.batch[k][i].tolist() '
    'for k in ("token_level_scores", "response_mask", "rollout_log_probs", "old_log_probs")}) + "\\n") '
    'for i, u in enumerate(batch.non_tensor_batch["uid"])]'
)
_TRL_CHANGE = (
    "with use_vllm, in a subclass of GRPOTrainer: out = super()._generate_and_score_completions(inputs); "
    'then for log, key in (("log_prob", "old_per_token_logps"), ("behavior_log_prob", "sampling_per_token_logps"), '
    '("mask", "completion_mask")): self._logs["extra"][log].extend(out[key].tolist()); return out'
)
_OWN = "write both log-probabilities a token beside it, as behavior_log_prob (sampler) and log_prob (learner)"

_SLIME_TRAIN = Layout(
    "slime_train",
    "slime's training dump (--save-debug-train-data)",
    "THUDM/slime: slime/observability/train_data_utils.py",
    "d92cb5d",
    frozenset({"rollout_log_probs", "log_probs", "loss_masks", "response_lengths"}),
    {
        "group": ("group_index", "group_indices"),
        "reward": ("raw_reward", "rewards"),
        "log_prob": ("log_probs",),
        "behavior_log_prob": ("rollout_log_probs",),
        "mask": ("loss_masks",),
        "trajectory": ("rollout_ids",),
    },
)
_SLIME_ROLLOUT = Layout(
    "slime_rollout",
    "slime's rollout dump (--save-debug-rollout-data)",
    "THUDM/slime: slime/utils/types.py (Sample), slime/observability/rollout_data_utils.py",
    "0d234f3",
    frozenset({"group_index", "response_length", "rollout_log_probs", "weight_versions"}),
    {
        "group": ("group_index",),
        "reward": ("reward",),
        "log_prob": ("log_probs",),
        "behavior_log_prob": ("rollout_log_probs",),
        "mask": ("loss_mask",),
        "version": ("weight_versions",),
    },
    missing="the sampler's log-probabilities alone, none of the learner",
    change="start it with --save-debug-train-data PATH: that dump holds both (rollout_log_probs and log_probs)",
)

LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        Layout(
            "vcposim",
            "this project's own dump",
            "llm_bridge/training/dumps.py",
            _SEEN,
            frozenset({"log_prob", "behavior_log_prob"}),
        ),
        Layout(
            "verl_rollout",
            "verl's rollout dump (trainer.rollout_data_dir)",
            "volcengine/verl: verl/trainer/ppo/ray_trainer.py, _dump_generations",
            _SEEN,
            frozenset({"input", "output", "score", "step"}),
            {"group": ("uid", "input"), "reward": ("score",)},
            missing="texts and scores, no log-probabilities",
            change=_VERL_CHANGE,
        ),
        Layout(
            "verl_dataproto",
            "rows of verl's DataProto",
            "volcengine/verl: verl/trainer/ppo/ray_trainer.py, RayPPOTrainer.fit",
            _SEEN,
            frozenset({"old_log_probs", "rollout_log_probs"}),
            {
                "group": ("uid",),
                "reward": ("token_level_scores", "score", "reward", "token_level_rewards"),
                "log_prob": ("old_log_probs",),
                "behavior_log_prob": ("rollout_log_probs",),
                "mask": ("response_mask",),
            },
            reward_rule="sum",
        ),
        Layout(
            "trl_completions",
            "TRL's completions table (log_completions)",
            "huggingface/trl: trl/trainer/grpo_trainer.py, GRPOTrainer.log",
            _SEEN,
            frozenset({"step", "prompt", "completion", "advantage"}),
            {"group": ("prompt",)},
            missing="texts, rewards and advantages, no log-probabilities",
            change=_TRL_CHANGE,
        ),
        Layout(
            "trl_async",
            "samples of TRL's AsyncGRPO",
            "huggingface/trl: trl/experimental/async_grpo/async_rollout_worker.py, RolloutSample",
            "00c802b",
            frozenset({"input_ids", "completion_mask", "old_log_probs", "advantage", "model_version"}),
            {
                "behavior_log_prob": ("old_log_probs",),
                "log_prob": ("log_probs", "trainer_logprobs"),
                "mask": ("completion_mask",),
                "reward": ("reward",),
                "version": ("model_version",),
            },
            missing="the sampler's log-probabilities (old_log_probs) and advantages, none of the learner, no rewards",
            change='in AsyncGRPOTrainer._compute_loss, beside the loss: add "log_prob": log_probs[i].tolist(), and '
            "keep reward and group_id in RolloutSample",
        ),
        Layout(
            "openrlhf",
            "OpenRLHF's Experience",
            "OpenRLHF/OpenRLHF: openrlhf/trainer/ppo_utils/experience.py",
            "12bb036",
            frozenset({"action_log_probs", "rollout_log_probs"}),
            {
                "group": ("index", "prompts"),
                "reward": ("rewards", "scores"),
                "log_prob": ("action_log_probs",),
                "behavior_log_prob": ("rollout_log_probs",),
                "mask": ("action_mask",),
            },
        ),
        Layout(
            "prime_rl",
            "prime-rl's token export (enable_token_export)",
            "PrimeIntellect-ai/prime-rl: src/prime_rl/trainer/rl/token_export.py",
            "004274e",
            frozenset({"inference_logprobs", "trainer_logprobs", "loss_mask"}),
            {
                "group": ("group_id", "group", "example_id", "problem_id", "prompt_id"),
                "reward": ("rewards", "reward"),
                "log_prob": ("trainer_logprobs",),
                "behavior_log_prob": ("inference_logprobs",),
                "mask": ("loss_mask",),
            },
            reward_rule="same",
        ),
        Layout(
            "areal_rollout",
            "AReaL's trajectory dump (dump_to_file)",
            "inclusionAI/AReaL: areal/infra/workflow_executor.py, _dump_trajectory",
            "0f6fba3",
            frozenset({"task_id", "seqlen", "prompt_len", "head_version", "tail_version"}),
            {"group": ("task_id",), "reward": ("reward",), "version": ("head_version",)},
            missing="texts, rewards and versions, no log-probabilities",
            change="after actor.compute_logp, write the batch: [json.dumps({k: batch[k][i].tolist() for k in "
            '("logprobs", "prox_logp", "loss_mask", "rewards", "versions")}) for i in range(len(batch["rewards"]))]',
        ),
        Layout(
            "areal_batch",
            "rows of AReaL's training batch",
            "inclusionAI/AReaL: areal/infra/workflow_executor.py and the PPO actor's compute_logp",
            "0f6fba3",
            frozenset({"logprobs", "prox_logp", "loss_mask"}),
            {
                "group": ("task_id", "group_id", "qid"),
                "reward": ("rewards", "reward"),
                "log_prob": ("prox_logp",),
                "behavior_log_prob": ("logprobs",),
                "mask": ("loss_mask",),
                "version": ("versions",),
            },
        ),
        _SLIME_TRAIN,
        _SLIME_ROLLOUT,
        replace(
            _SLIME_TRAIN,
            name="miles_train",
            what="miles' training dump (slime's format)",
            source="radixark/miles: by its fork of slime",
            sight=frozenset(),
        ),
        replace(
            _SLIME_ROLLOUT,
            name="miles_rollout",
            what="miles' rollout dump (slime's format)",
            source="radixark/miles: by its fork of slime",
            sight=frozenset(),
        ),
        Layout(
            "skyrl_batch",
            "rows of SkyRL's TrainingInputBatch",
            "NovaSky-AI/SkyRL: skyrl_train/training_batch.py",
            _SEEN,
            frozenset({"rollout_logprobs", "action_log_probs", "loss_mask"}),
            {
                "group": ("uid", "uids", "trajectory_ids"),
                "reward": ("rewards",),
                "log_prob": ("action_log_probs",),
                "behavior_log_prob": ("rollout_logprobs",),
                "mask": ("loss_mask",),
            },
            reward_rule="sum",
        ),
        Layout(
            "skyrl_generator",
            "SkyRL's GeneratorOutput",
            "NovaSky-AI/SkyRL: skyrl_train/generators/base.py",
            _SEEN,
            frozenset({"response_ids", "loss_masks", "rollout_logprobs", "rewards"}),
            {
                "group": ("uids", "trajectory_ids"),
                "reward": ("rewards",),
                "log_prob": ("action_log_probs",),
                "behavior_log_prob": ("rollout_logprobs",),
                "mask": ("loss_masks",),
            },
            reward_rule="sum",
            missing="the sampler's log-probabilities alone, none of the learner",
            change="dump the TrainingInputBatch after fwd_logprobs_values_reward instead: rollout_logprobs, "
            "action_log_probs, loss_mask, rewards and uids, as JSON lines (its own .pkl is a pickle)",
        ),
        Layout(
            "nemo_rl",
            "NeMo-RL's training data (train_data_step*.jsonl)",
            "NVIDIA-NeMo/RL: nemo_rl/algorithms/grpo.py, log_batched_dict_as_jsonl",
            _SEEN,
            frozenset({"generation_logprobs", "prev_logprobs"}),
            {
                "reward": ("rewards",),
                "log_prob": ("prev_logprobs",),
                "behavior_log_prob": ("generation_logprobs",),
                "mask": ("token_loss_mask",),
                "sample_mask": ("sample_loss_mask",),
            },
        ),
        Layout(
            "open_instruct",
            "open-instruct's rollout shards (save_traces)",
            "allenai/open-instruct: open_instruct/rl_utils.py, RolloutRecord",
            _SEEN,
            frozenset({"sample_idx", "prompt_idx", "logprobs"}),
            {
                "group": ("prompt_idx",),
                "reward": ("reward",),
                "behavior_log_prob": ("logprobs",),
                "log_prob": ("trainer_logprobs",),
                "step": ("step",),
            },
            missing="the sampler's log-probabilities (logprobs) alone, none of the learner",
            change="in grpo_fast's training step, where the local log-probabilities are computed, keep them: add "
            "trainer_logprobs: list[float] to RolloutRecord and fill it with local_logprobs[i].tolist()",
        ),
        Layout(
            "pipelinerl",
            "PipelineRL's TrainingText stream",
            "ServiceNow/PipelineRL: pipelinerl/rollouts.py, TrainingText",
            "0cdb95b",
            frozenset({"n_predicted", "logprobs", "ref_logprobs", "group_id"}),
            {
                "group": ("group_id",),
                "reward": ("reward",),
                "behavior_log_prob": ("logprobs",),
                "log_prob": ("new_logprobs", "trainer_logprobs"),
                "version": ("metadata.model_version",),
            },
            missing="the sampler's log-probabilities (logprobs) and those of the reference policy of the KL penalty "
            "(ref_logprobs, which are not the learner's), none of the learner",
            change="in pipelinerl/finetune/rl/__init__.py, rl_step, after new_logprobs: write "
            'json.dumps({"group_id": g, "reward": r, "logprobs": old[i].tolist(), "new_logprobs": new[i].tolist()})',
        ),
        Layout(
            "roll",
            "ROLL's rollout dump (rollout_dump_dir)",
            "alibaba/ROLL: roll/pipeline/rlvr/utils.py, dump_rollout_to_specific_path",
            _SEEN,
            frozenset({"responses", "scores", "global_step"}),
            {"group": ("prompt", "id"), "reward": ("scores",), "step": ("global_step",)},
            missing="texts and scores, no log-probabilities",
            change='in dump_rollout_to_specific_path: for k in ("old_log_probs", "infer_logprobs", "response_mask"): '
            "write_data[k] = data.batch[k].tolist(); and name these three in the columns that are written",
        ),
        Layout(
            "ms_swift",
            "ms-swift's completions.jsonl (log_completions)",
            "modelscope/ms-swift: swift/trainers/rlhf_trainer/grpo_trainer.py",
            _SEEN,
            frozenset({"prompt", "completion", "step", "advantages"}),
            {"group": ("prompt",)},
            missing="texts, rewards and advantages, no log-probabilities",
            change='in log: for key in ("old_per_token_logps", "rollout_per_token_logps", "completion_mask"): '
            "table[key] = gather_object(self._logs[key]), filled in _generate_and_score_completions",
        ),
        Layout(
            "tinker_cookbook",
            "tinker-cookbook's rollout summaries",
            "thinking-machines-lab/tinker-cookbook: tinker_cookbook/rl/rollout_logging.py",
            "08ee6ea",
            frozenset({"group_idx", "traj_idx", "total_reward", "sampling_client_step"}),
            {"group": ("group_idx",), "reward": ("total_reward",), "version": ("sampling_client_step",)},
            missing="rewards and lengths, no log-probabilities",
            change='in serialize_rollout_summaries, to each step: "ac_logprobs": transition.ac.maybe_logprobs; and in '
            "the training loop write the logprobs that forward_backward returns, as log_prob",
        ),
        Layout(
            "openai_chat",
            "answers of an OpenAI-style server",
            "openai/openai-openapi: CreateChatCompletionResponse, logprobs",
            _SEEN,
            frozenset({"choices"}),
            {
                "behavior_log_prob": (
                    "choices.0.logprobs.content.*.logprob",
                    "choices.0.logprobs.token_logprobs",
                ),
                "log_prob": ("trainer_logprobs", "learner_logprobs", "new_logprobs"),
            },
            missing="the server's log-probabilities alone, none of the learner",
            change=_OWN,
        ),
        Layout(
            "log_ratio",
            "log-ratios without the log-probabilities they came from",
            "PrimeIntellect-ai/prime-rl: src/prime_rl/trainer/rl/token_export.py (the column's name)",
            "004274e",
            frozenset({"log_importance_ratio"}),
            {"log_ratio": ("log_importance_ratio",)},
        ),
    )
}
"""name -> layout"""


def layout(name: str) -> Layout:
    """The layout of that name; `InputError` with the nearest one otherwise."""
    if name not in LAYOUTS:
        raise unknown_name("--layout", name, LAYOUTS)
    return LAYOUTS[name]


def recognized(names: Iterable[str]) -> Layout | None:
    """The layout whose sight is in these names; of several, one that has both log-probabilities, then the longest.

    >>> recognized(["uid", "old_log_probs", "rollout_log_probs", "response_mask"]).name
    'verl_dataproto'
    >>> recognized(["group", "reward"]) is None
    True
    """
    have = set(names)
    fits = [one for one in LAYOUTS.values() if one.sight and one.sight <= have]
    return max(fits, key=lambda one: (one.name == "vcposim", not one.missing, len(one.sight)), default=None)


def look_up(record: Mapping[str, Any], path: str) -> Any:
    """The value at a name or path of a record; `KeyError` if it is not there.

    >>> look_up({"a": [{"b": 1}, {"b": 2}]}, "a.*.b"), look_up({"a.b": 3}, "a.b")
    ([1, 2], 3)
    """
    if path in record:
        return record[path]
    value: Any = record
    parts = path.split(".")
    for k, part in enumerate(parts):
        if part == "*":
            if not isinstance(value, list):
                raise KeyError(path)
            rest = ".".join(parts[k + 1 :])
            return [look_up(element, rest) for element in value] if rest else value
        if isinstance(value, list) and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
        elif isinstance(value, Mapping) and part in value:
            value = value[part]
        else:
            raise KeyError(path)
    return value
