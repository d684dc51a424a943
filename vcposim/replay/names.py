"""What the numbers of a replay are called: this project's fields, and the names that frameworks give them.

Fields, by this project's names (`columns` maps a file's own):

    group                what the responses of one prompt share: any JSON value, in any order
    reward               a number; without groups or rewards the gauges of the weights are all that can be read
    log_prob             log pi(tau), the learner's: a number in nats, or a list of one number a token
    behavior_log_prob    log mu(tau), the sampler's: likewise
    log_ratio            instead of these two: log pi(tau) - log mu(tau), nats, likewise
    length               tokens of the response; counted where there are lists
    mask                 for lists: 1 for the policy's tokens, 0 for padding or the environment's; null means all
    sample_mask          0 for a trajectory that the trainer left out
    trajectory           what the rows of one trajectory share, where it was written in several
    step, version, learner_version, lag    of the run; for slices
    score_sq_norm        ||grad log pi(tau)||^2
    logit_proxy          stand-in for it, sum_t 1 - 2 pi(y_t) + sum_v pi(v)^2

Beside the tokens, for the estimators that need them:

    anchor_log_prob      log of the anchor's (proximal) probability, a list as log_prob's
    reference_log_prob   log of the reference's (of the KL penalty), a number or a list as log_prob is
    collision            sum_v pi(v)^2 at each token, a list
"""

import re
import shlex
from collections.abc import Iterable

from vcposim.errors import InputError, unknown_name

NEEDED = ("group", "reward", "log_prob", "behavior_log_prob")
OPTIONAL = ("length", "mask", "score_sq_norm", "logit_proxy")
OF_THE_RUN = ("step", "version", "learner_version", "lag")
BESIDE = ("anchor_log_prob", "reference_log_prob", "collision")
FIELDS = (*NEEDED, "log_ratio", *OPTIONAL, *BESIDE, "sample_mask", "trajectory", *OF_THE_RUN)
ABSENT = "none"
"""what `columns` maps a field to that is not to be used although the file has it"""

OTHER_NAMES: dict[str, tuple[str, ...]] = {
    "group": ("group_id", "prompt_id", "group_index", "prompt_index", "prompt_idx", "question_id", "uid", "prompt"),
    "reward": ("score", "rewards", "scores", "rm_score", "reward_score", "raw_reward", "return", "acc", "correct"),
    "log_prob": (
        "trainer_logprobs",
        "trainer_log_probs",
        "target_log_prob",
        "learner_log_prob",
        "learner_logprobs",
        "new_logprobs",
        "new_log_probs",
        "action_log_probs",
        "prev_logprobs",
        "current_logprobs",
        "policy_logprobs",
        "prox_logp",
    ),
    "behavior_log_prob": (
        "rollout_log_probs",
        "rollout_logprobs",
        "rollout_per_token_logps",
        "inference_logprobs",
        "infer_logprobs",
        "sampling_logprobs",
        "sampling_log_probs",
        "sampling_per_token_logps",
        "sampler_logprobs",
        "generation_logprobs",
        "vllm_logprobs",
        "completion_logprobs",
        "behavior_log_probs",
        "behavior_logprobs",
        "behaviour_log_prob",
    ),
    "log_ratio": ("log_importance_ratio", "log_ratios", "log_importance_weight"),
    "length": (
        "response_length",
        "response_len",
        "num_tokens",
        "n_tokens",
        "completion_length",
        "token_count",
        "completion_len",
        "completion_tokens",
        "output_length",
        "output_len",
        "output_tokens",
        "response_tokens",
        "generated_tokens",
        "num_output_tokens",
        "num_completion_tokens",
        "num_response_tokens",
        "num_generated_tokens",
    ),
    "mask": (
        "response_mask",
        "loss_mask",
        "loss_masks",
        "token_mask",
        "token_loss_mask",
        "completion_mask",
        "action_mask",
        "assistant_mask",
        "assistant_masks",
        "env_mask",
        "tool_mask",
    ),
    "sample_mask": ("sample_loss_mask", "remove_sample"),
    "trajectory": (
        "rollout_id",
        "rollout_ids",
        "trajectory_id",
        "trajectory_ids",
        "traj_id",
        "traj_uid",
        "traj_idx",
        "trajectory_idx",
        "rollout_idx",
        "episode_id",
        "session_id",
        "conversation_id",
    ),
    "step": ("global_step", "global_steps", "training_step", "train_step", "iteration", "epoch"),
    "version": (
        "policy_version",
        "model_version",
        "weight_version",
        "weight_versions",
        "head_version",
        "versions",
        "min_global_steps",
        "param_version",
        "param_version_start",
        "weight_version_start",
        "start_version",
    ),
    "learner_version": ("trainer_version", "current_version"),
    "lag": ("staleness", "off_policyness", "policy_lag"),
    "score_sq_norm": ("grad_sq_norm", "score_norm_sq", "squared_grad_norm"),
    "logit_proxy": (),
    "anchor_log_prob": (
        "anchor_log_probs",
        "anchor_logprobs",
        "proximal_log_prob",
        "proximal_log_probs",
        "proximal_logprobs",
        "prox_logp",
        "prox_logprobs",
        "prox_log_probs",
    ),
    "reference_log_prob": (
        "ref_log_prob",
        "ref_log_probs",
        "ref_logprobs",
        "ref_logp",
        "ref_per_token_logps",
        "reference_log_probs",
        "reference_logprobs",
        "reference_logps",
    ),
    "collision": ("sum_pi_squared",),
}
"""what frameworks call each field: to suggest, and for a mask and the fields of the run, to use and say so"""

TAKEN = ("mask", "sample_mask", "trajectory", *OF_THE_RUN)
"""fields that would change the answer in silence: taken by their other names where there is exactly one, and noted"""

LOG_PROBS = frozenset(
    n for name in ("log_prob", "behavior_log_prob", "log_ratio") for n in (name, *OTHER_NAMES[name])
) | {"logprobs", "log_probs", "old_log_probs"}
"""names of log-probabilities, whoever's"""

SPLITS = ("split", "is_eval", "is_validation", "is_val", "mode", "phase")
"""columns that may tell training from evaluation"""

AMBIGUOUS: dict[str, str] = {
    "logprobs": "the sampler's in OpenAI-style servers, vLLM, PipelineRL and open-instruct, the learner's elsewhere",
    "log_probs": "the learner's in slime, the sampler's elsewhere",
    "old_log_probs": "recomputed by the learner in verl and ROLL, the sampler's in TRL's AsyncGRPO",
    "old_logprobs": "the sampler's in TapeAgents, recomputed by the learner elsewhere",
    "old_log_prob": "the learner's before its update in verl, the sampler's elsewhere",
    "old_per_token_logps": "the learner's before its update in TRL and ms-swift",
    "ref_logprobs": "those of the KL penalty's reference, neither policy's",
    "rewards": "raw in OpenRLHF and NeMo-RL, minus the group's mean in slime and miles",
    "index": "a group in exports, the row's position in OpenRLHF and the sample's number in slime",
    "uid": "names the prompt in verl, a single response elsewhere: as a group, every value must come up several times",
}
"""names that mean different things in different frameworks; said, never guessed"""

REMOVED = ("remove_sample",)
"""names of a sample mask that are true for what the trainer left out"""

TRAJECTORY = " trajectory"
"""slice that says which rows are one trajectory; no column has such a name"""

NAMED_GROUP = " group"
"""slice by the column that seems to name the group, where rows are counted instead"""

SESSIONS = ("session_id", "conversation_id")
"""names of a trajectory that may as well name its prompt"""

LAST_VERSIONS = (
    "last_version",
    "tail_version",
    "max_global_steps",
    "param_version_end",
    "weight_version_end",
    "end_version",
)
"""names of the version that wrote a trajectory's end, beside a `version` that began it"""

OF_LAGS = re.compile(r"stale|off_?policy|(^|_)lag(_|$)")
OF_VERSIONS = re.compile(
    r"(policy|model|weights?|params?|actor|learner|trainer|rollout|gen|generation|sampler|behaviou?r|inference|engine"
    r"|checkpoint|ckpt)_?(versions?|steps?|iter(ation)?)(_|$)|" + OF_LAGS.pattern
)
"""columns that may tell versions or lags under a name nobody knows"""

OF_TRAJECTORIES = re.compile(
    r"^(episode|traj(ectory)?|rollout|session|conversation|dialog(ue)?)(_?(id|uid|uuid|idx|index|key|name|number))?$"
    r"|^(id|uid)_of_(episode|trajectory|rollout)$"
)
"""columns that may say which rows are one trajectory under a name nobody knows"""

TURNS = ("turn", "turn_id", "turn_idx", "turn_index", "turn_number", "segment", "segment_idx", "step_idx")
"""columns that count the parts of one trajectory"""

IDS = ("response_ids", "completion_ids", "output_ids", "response_tokens", "completion_tokens", "output_tokens")
"""names of lists of a response's own tokens, which are as many as its log-probabilities; `_token_ids` as `_ids`"""

PARTS = ("steps", "turns", "segments", "transitions", "trajectory", "messages")
"""names of lists whose entries are the parts of one trajectory, rewards of their own or not"""

LIKE: dict[str, tuple[str, ...]] = {
    "group": ("prompt", "question", "problem", "group", "uid", "task_id", "example_id", "content", "messages"),
    "reward": ("reward", "score", "correct", "accuracy"),
}
"""parts of names that a field may have under a name of its own: said where nothing better is there"""

LISTS = ("log_prob", "behavior_log_prob", "log_ratio", "mask", "group", *BESIDE)
"""fields in which a list of one is a list"""

TASKS = ("task", "env_name", "data_source", "dataset", "dataset_name", "domain", "environment")
"""what frameworks call the task of a prompt"""


def plain(name: str) -> str:
    """A name without case, separators and plural: what `rolloutLogProb` and `rollout_log_probs` share.

    >>> plain("rolloutLogProb") == plain("rollout_log_probs")
    True
    """
    return "".join(letter for letter in name.lower() if letter.isalnum()).removesuffix("s")


def option(field: str, column: str) -> str:
    """What maps a field, as a shell takes it: it would read a path's `*` and a name's spaces itself.

    >>> option("reward", "score"), option("log_prob", "steps.*.log_prob")
    ('--column reward=score', "--column 'log_prob=steps.*.log_prob'")
    """
    return f"--column {shlex.quote(f'{field}={column}')}"


def parse_columns(pairs: Iterable[str]) -> dict[str, str]:
    """`["reward=score"]` -> `{"reward": "score"}`.

    Raises `InputError` for anything but FIELD=NAME with a known field, each once.

    >>> parse_columns(["reward=score", "group=uid"])
    {'reward': 'score', 'group': 'uid'}
    """
    out: dict[str, str] = {}
    for pair in pairs:
        name, equals, column = pair.partition("=")
        if not (equals and name and column):
            raise InputError(f"--column: {pair!r} is not FIELD=NAME; write it as in --column reward=score")
        if name not in FIELDS:
            raise unknown_name("--column", name, FIELDS)
        if name in out:
            raise InputError(f"--column: {name!r} is mapped twice ({out[name]!r}, {column!r}); keep one")
        out[name] = column
    return out
