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
class ColumnLayout:
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
    """what makes the trainer write it: read at the source, not run"""
    group_suffixes: int = 0
    """parts after `_` at the end of a group's name that tell its responses apart"""


_SEEN = "2026-11-28"

_VERL_CHANGE = (
    "record_verl of llm_bridge.dumps does it in two lines; by hand: set "
    "actor_rollout_ref.rollout.calculate_log_probs=True, and in ray_trainer.py, _log_rollout_data, before the "
    'dump: reward_extra_infos_to_dump["uid"] = batch.non_tensor_batch["uid"].tolist(); '
    'for k in ("rollout_log_probs", "old_log_probs"): reward_extra_infos_to_dump[k] = [r[m.bool()].tolist() for r, m '
    'in zip(batch.batch[k].cpu(), batch.batch["response_mask"].cpu())]'
)
_VERL_V1_CHANGE = (
    "set actor_rollout_ref.rollout.calculate_log_probs=True, and in v1/trainer_base.py, _log_rollout_data, add "
    '"rollout_log_probs", "old_log_probs", "response_mask" to the fields, and after reward_extra_infos_dict: '
    'for k in ("rollout_log_probs", "old_log_probs"): reward_extra_infos_dict[k] = '
    '[data[k][i][data["response_mask"][i].bool()].tolist() for i in sorted_indices]'
)
_TRL_CHANGE = (
    "record_trl of llm_bridge.dumps does it in one line; by hand: with use_vllm and "
    "vllm_importance_sampling_correction, in _generate_and_score_completions after "
    'output["sampling_per_token_logps"]: m = completion_mask if tool_mask is None else completion_mask * tool_mask; '
    'for k in ("sampling_per_token_logps", "old_per_token_logps"): '
    'self._logs["extra"][k].extend(gather_object([r[i.bool()].tolist() for r, i in zip(output[k], m)]))'
)
_OWN = "write both log-probabilities a token beside it, as behavior_log_prob (sampler) and log_prob (learner)"

_SLIME_TRAIN = ColumnLayout(
    "slime_train",
    "slime's training dump (--save-debug-train-data)",
    "THUDM/slime: slime/observability/train_data_utils.py",
    "624b824a",
    frozenset({"rollout_log_probs", "log_probs", "loss_masks", "response_lengths"}),
    {
        "group": ("group_index", "group_indices"),
        "reward": ("local_raw_reward", "raw_reward"),
        "log_prob": ("log_probs",),
        "behavior_log_prob": ("rollout_log_probs",),
        "mask": ("loss_masks",),
        "trajectory": ("rollout_ids",),
    },
)
_SLIME_ROLLOUT = ColumnLayout(
    "slime_rollout",
    "slime's rollout dump (--save-debug-rollout-data)",
    "THUDM/slime: slime/utils/types.py (Sample), slime/observability/rollout_data_utils.py",
    "624b824a",
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
    change="start it with --dump-details DIR: DIR/train_data holds both, and vcposim replay DIR joins the two",
)

LAYOUTS: dict[str, ColumnLayout] = {
    layout.name: layout
    for layout in (
        ColumnLayout(
            "vcposim",
            "this project's own dump",
            "llm_bridge/training/dumps.py",
            _SEEN,
            frozenset({"log_prob", "behavior_log_prob"}),
        ),
        ColumnLayout(
            "verl_rollout",
            "verl's rollout dump (trainer.rollout_data_dir)",
            "verl-project/verl: verl/trainer/ppo/ray_trainer.py, _write_generations",
            "1dda039b",
            frozenset({"input", "output", "score", "step"}),
            {
                "group": ("uid", "input"),
                "reward": ("score",),
                "log_prob": ("old_log_probs",),
                "behavior_log_prob": ("rollout_log_probs",),
            },
            missing="texts and scores, no log-probabilities",
            change=_VERL_CHANGE,
        ),
        ColumnLayout(
            "verl_v1",
            "the rollout dump of verl's v1 trainer",
            "verl-project/verl: verl/trainer/ppo/v1/trainer_base.py, _write_generations",
            "1dda039b",
            frozenset({"input", "output", "score", "step", "uid"}),
            {
                "group": ("uid",),
                "reward": ("score",),
                "log_prob": ("old_log_probs",),
                "behavior_log_prob": ("rollout_log_probs",),
                "version": ("min_global_steps",),
            },
            missing="texts and scores, no log-probabilities",
            change=_VERL_V1_CHANGE,
            group_suffixes=2,
        ),
        ColumnLayout(
            "verl_dataproto",
            "rows of verl's DataProto",
            "verl-project/verl: verl/trainer/ppo/ray_trainer.py, RayPPOTrainer.fit",
            "1dda039b",
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
        ColumnLayout(
            "trl_completions",
            "TRL's completions table (log_completions)",
            "huggingface/trl: trl/trainer/grpo_trainer.py, GRPOTrainer.log",
            "f2cd5771",
            frozenset({"step", "prompt", "completion", "advantage"}),
            {
                "group": ("prompt",),
                "log_prob": ("old_per_token_logps",),
                "behavior_log_prob": ("sampling_per_token_logps",),
            },
            missing="texts, rewards and advantages, no log-probabilities",
            change=_TRL_CHANGE,
        ),
        ColumnLayout(
            "trl_async",
            "samples of TRL's AsyncGRPO",
            "huggingface/trl: trl/experimental/async_grpo/async_rollout_worker.py, RolloutSample",
            "f2cd5771",
            frozenset({"input_ids", "completion_mask", "old_log_probs", "advantage", "model_version"}),
            {
                "group": ("group_id",),
                "behavior_log_prob": ("old_log_probs",),
                "log_prob": ("log_probs", "trainer_logprobs"),
                "mask": ("completion_mask",),
                "reward": ("metrics.reward", "reward"),
                "version": ("model_version",),
            },
            missing="the sampler's log-probabilities (old_log_probs) and advantages, none of the learner, no rewards",
            change="in compute_loss, after log_ratio, write the row as JSON: completion_mask[0].tolist(), "
            "old_log_probs[0].tolist() and log_probs[0].tolist() under these names; groups and rewards are gone there, "
            "so the gauges of the weights are what can be read",
        ),
        ColumnLayout(
            "openrlhf",
            "OpenRLHF's Experience",
            "OpenRLHF/OpenRLHF: openrlhf/trainer/ppo_utils/experience.py",
            "3c3be623",
            frozenset({"action_log_probs", "rollout_log_probs"}),
            {
                "group": ("group", "prompts", "index"),
                "reward": ("rewards", "scores"),
                "log_prob": ("action_log_probs",),
                "behavior_log_prob": ("rollout_log_probs",),
                "mask": ("action_mask",),
            },
        ),
        ColumnLayout(
            "prime_rl",
            "prime-rl's token export (enable_token_export)",
            "PrimeIntellect-ai/prime-rl: src/prime_rl/trainer/rl/token_export.py",
            "559b4477",
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
        ColumnLayout(
            "prime_rl_traces",
            "prime-rl's episode traces (rollouts/step_N/.../traces.jsonl)",
            "PrimeIntellect-ai/prime-rl: src/prime_rl/monitors/file.py",
            "559b4477",
            frozenset({"traces", "env", "run"}),
            {"group": ("group.id",)},
            missing="the sampler's log-probabilities alone (in traces.*.nodes), none of the learner",
            change="set trainer.enable_token_export = true: its token_exports/step_N/rank_K.jsonl hold both, without "
            "rewards and groups, which never reach that trainer; the gauges of the weights can be read from them",
        ),
        ColumnLayout(
            "areal_rollout",
            "AReaL's trajectory dump (dump_to_file)",
            "inclusionAI/AReaL: areal/infra/workflow_executor.py, _dump_trajectory",
            "4aef98d8",
            frozenset({"task_id", "seqlen", "prompt_len", "head_version", "tail_version"}),
            {"group": ("task_id",), "reward": ("reward",), "version": ("head_version",)},
            missing="texts, rewards and versions, no log-probabilities",
            change="in areal/trainer/rl_trainer.py, where prox_logps are zipped with the batch: "
            'm = traj["loss_mask"][:, 1:].bool(); lp, blp = logp[:, :-1], traj["logprobs"][:, 1:]; then write a line '
            'dict(group=id(traj), reward=float(traj["rewards"][i]), log_prob=lp[i][m[i]].tolist(), '
            'behavior_log_prob=blp[i][m[i]].tolist(), versions=traj["versions"][i, 1:][m[i]].tolist()) for each i',
        ),
        ColumnLayout(
            "areal_batch",
            "rows of AReaL's training batch",
            "inclusionAI/AReaL: areal/infra/workflow_executor.py and the PPO actor's compute_logp",
            "4aef98d8",
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
            source="radixark/miles: miles/utils/train_dump_utils.py",
            read_on="31f1ca96",
            sight=frozenset(),
        ),
        replace(
            _SLIME_ROLLOUT,
            name="miles_rollout",
            what="miles' rollout dump (slime's format)",
            source="radixark/miles: miles/ray/rollout/debug_data.py",
            read_on="31f1ca96",
            sight=frozenset(),
        ),
        ColumnLayout(
            "skyrl_batch",
            "rows of SkyRL's TrainingInputBatch",
            "NovaSky-AI/SkyRL: skyrl/backends/skyrl_train/training_batch.py",
            "a9564572",
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
        ColumnLayout(
            "skyrl_generator",
            "SkyRL's GeneratorOutput",
            "NovaSky-AI/SkyRL: skyrl/train/generators/base.py",
            "a9564572",
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
            change="in skyrl/train/trainer.py, before rewards are popped from training_input: "
            'keep = ("rewards", "loss_mask", "rollout_logprobs", "action_log_probs"); torch.save({"step": '
            'self.global_step, "uids": list(training_input.metadata["uids"]), **{k: training_input[k] for k in keep}}, '
            'f"skyrl_step_{self.global_step}.pt") (its own .pkl is a pickle, and is never loaded)',
        ),
        ColumnLayout(
            "nemo_rl",
            "NeMo-RL's training data (train_data_step*.jsonl)",
            "NVIDIA-NeMo/RL: nemo_rl/algorithms/grpo.py, log_batched_dict_as_jsonl",
            "7ea279ab",
            frozenset({"generation_logprobs", "prev_logprobs"}),
            {
                "reward": ("rewards",),
                "log_prob": ("prev_logprobs",),
                "behavior_log_prob": ("generation_logprobs",),
                "mask": ("token_loss_mask",),
                "sample_mask": ("sample_loss_mask",),
            },
        ),
        ColumnLayout(
            "open_instruct",
            "open-instruct's rollout shards (save_traces)",
            "allenai/open-instruct: open_instruct/rl_utils.py, RolloutRecord",
            "e6c3044a",
            frozenset({"sample_idx", "prompt_idx", "logprobs"}),
            {
                "group": ("prompt_idx",),
                "reward": ("reward",),
                "behavior_log_prob": ("logprobs",),
                "log_prob": ("trainer_logprobs",),
                "step": ("step",),
            },
            missing="the sampler's log-probabilities (logprobs) alone, none of the learner",
            change="the learner computes its own on packed rows: in grpo_fast.py, after new_logprobs_BT, write lines "
            "dict(logprobs=data_BT.vllm_logprobs[i][0, 1:].tolist(), trainer_logprobs=local_logprobs_BT[0].tolist(), "
            "response_mask=data_BT.response_masks[i][0, 1:].long().tolist()); groups and rewards are gone there, so "
            "the gauges of the weights are what can be read",
        ),
        ColumnLayout(
            "pipelinerl",
            "PipelineRL's TrainingText stream",
            "ServiceNow/PipelineRL: pipelinerl/rollouts.py, TrainingText",
            "58d39345",
            frozenset({"n_predicted", "logprobs", "ref_logprobs", "group_id"}),
            {
                "group": ("group_id",),
                "reward": ("reward",),
                "behavior_log_prob": ("logprobs",),
                "log_prob": ("new_logprobs", "trainer_logprobs"),
                "version": ("metadata.model_version",),
                "trajectory": ("metadata.rollout_index",),
            },
            missing="the sampler's log-probabilities (logprobs) and those of the reference policy of the KL penalty "
            "(ref_logprobs, which are not the learner's), none of the learner",
            change="in pipelinerl/finetune/rl/__init__.py, after new_logprobs, write lines "
            "dict(behavior_log_prob=old_logprobs[0].tolist(), log_prob=new_logprobs[0].tolist(), "
            "mask=(batch.labels[0, 1:] != -100).long().tolist()); groups and rewards are gone there, so the gauges of "
            "the weights are what can be read",
        ),
        ColumnLayout(
            "roll",
            "ROLL's rollout dump (rollout_dump_dir)",
            "alibaba/ROLL: roll/pipeline/rlvr/utils.py, dump_rollout_to_specific_path",
            "8eb27cc2",
            frozenset({"responses", "scores", "global_step"}),
            {"group": ("prompt", "id"), "reward": ("scores",), "step": ("global_step",)},
            missing="texts and scores, no log-probabilities",
            change='set save_logging_board_dir, and in save_metrics before res_dict["prompt"]: '
            'res_dict["infer_logprobs"] = remove_leading_zeros(batch.batch["infer_logprobs"], '
            'batch.batch["response_mask"][:, 1:]); its data_*.jsonl then hold both',
        ),
        ColumnLayout(
            "roll_board",
            "ROLL's logging board (save_logging_board_dir)",
            "alibaba/ROLL: roll/pipeline/rlvr/rlvr_pipeline.py, save_metrics",
            "8eb27cc2",
            frozenset({"logprobs", "log_probs2", "new_response_mask"}),
            {
                "group": ("prompt",),
                "reward": ("reward",),
                "log_prob": ("logprobs",),
                "behavior_log_prob": ("infer_logprobs",),
                "mask": ("new_response_mask",),
                "step": ("step",),
            },
            missing="the learner's log-probabilities (logprobs, which are the sampler's elsewhere) alone",
            change='in save_metrics before res_dict["prompt"]: res_dict["infer_logprobs"] = remove_leading_zeros('
            'batch.batch["infer_logprobs"], batch.batch["response_mask"][:, 1:])',
        ),
        ColumnLayout(
            "ms_swift",
            "ms-swift's completions.jsonl (log_completions)",
            "modelscope/ms-swift: swift/rlhf_trainers/grpo_trainer.py",
            "3602360a",
            frozenset({"prompt", "completion", "advantages"}),
            {
                "group": ("prompt",),
                "log_prob": ("old_per_token_logps",),
                "behavior_log_prob": ("rollout_per_token_logps",),
            },
            missing="texts, rewards and advantages, no log-probabilities",
            change='after grpo_batch.old_per_token_logps is set: for k in ("rollout_per_token_logps", '
            '"old_per_token_logps"): self._logs.setdefault(k, deque(maxlen=self.args.generation_batch_size)).extend('
            "gather_object([r[i.bool()].tolist() for r, i in zip(getattr(grpo_batch, k), grpo_batch.completion_mask)"
            "]))",
        ),
        ColumnLayout(
            "tinker_cookbook",
            "tinker-cookbook's rollout summaries",
            "thinking-machines-lab/tinker-cookbook: tinker_cookbook/rl/rollout_logging.py",
            "9dfcc3a2",
            frozenset({"group_idx", "traj_idx", "total_reward", "sampling_client_step"}),
            {
                "group": ("group_idx",),
                "step": ("iteration",),
                "reward": ("total_reward",),
                "version": ("sampling_client_step",),
            },
            missing="rewards and lengths, no log-probabilities",
            change="in train.py, where compute_kl_sample_train(data_D, training_logprobs_D) is called, write lines "
            'dict(mask=d.loss_fn_inputs["mask"].to_torch().tolist(), '
            'behavior_log_prob=d.loss_fn_inputs["logprobs"].to_torch().tolist(), log_prob=t.tolist()) for d, t in '
            "zip(data_D, training_logprobs_D)",
        ),
        ColumnLayout(
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
        ColumnLayout(
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


def layout(name: str) -> ColumnLayout:
    """The layout of that name; `InputError` with the nearest one otherwise."""
    if name not in LAYOUTS:
        raise unknown_name("--layout", name, LAYOUTS)
    return LAYOUTS[name]


def recognized(names: Iterable[str]) -> ColumnLayout | None:
    """The layout whose sight is in these names; of several, one that has both log-probabilities, then the longest.

    >>> recognized(["uid", "old_log_probs", "rollout_log_probs", "response_mask"]).name
    'verl_dataproto'
    >>> recognized(["group", "reward"]) is None
    True
    """
    have = set(names)
    fits = [one for one in LAYOUTS.values() if one.sight and one.sight <= have]

    def both(one: ColumnLayout) -> bool:
        fields = [one.columns.get(name, ()) for name in ("log_prob", "behavior_log_prob")]
        return all(any(n.split(".")[0] in have for n in options) for options in fields)

    return max(fits, key=lambda one: (one.name == "vcposim", both(one), len(one.sight)), default=None)


def look_up(record: Mapping[str, Any], path: str) -> Any:
    """The value at a name or path of a record; `KeyError` if it is not there.

    >>> look_up({"a": [{"b": 1}, {"b": 2}]}, "a.*.b"), look_up({"a.b": 3}, "a.b")
    ([1, 2], 3)
    >>> look_up({"turns": [{"log_prob": [-1, -2]}, {"log_prob": [-3]}]}, "turns.*.log_prob")
    [-1, -2, -3]
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
            found = [look_up(element, rest) for element in value] if rest else value
            lists = bool(found) and all(isinstance(x, list) for x in found)
            return [x for part in found for x in part] if lists else found  # turns follow each other
        if isinstance(value, list) and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
        elif isinstance(value, Mapping) and part in value:
            value = value[part]
        else:
            raise KeyError(path)
    return value
