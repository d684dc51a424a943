"""TRL's `GRPOTrainer` with stale data, any estimator of the catalogue, and the ESS brake. Three lines switch it on:

    from llm_bridge.adapters.trl import VcpoConfig, VcpoTrainer    # beside: from trl import GRPOConfig
    vcpo = VcpoConfig(estimator="vcpo", lag=4)
    trainer = VcpoTrainer(..., vcpo=vcpo)                          # instead of: trainer = GRPOTrainer(...)

Nothing of TRL is copied. Four of its methods are wrapped, and a callback stands around the optimizer's step:

    _calculate_rewards               keep the raw rewards
    _generate_and_score_completions  stamp reward, prompt and version onto each row; swap fresh rows for stale ones
    _prepare_inputs                  all rows of the coming update are here, before the first of its microbatches:
                                     measure ratios and score norms, gather over microbatches and ranks, and put the
                                     kernel's coefficient where TRL keeps its advantage
    on_pre_optimizer_step            lr * ESS scale, or no gradient at all if there must be no step
    on_optimizer_step                lr as it was, before the scheduler moves on and anyone logs it

TRL's loss then is -c_i log pi of each token with TRL's own averaging (`loss_type`): the coefficient already holds the
estimator's ratio, and TRL's own is pi/pi = 1 once `old_per_token_logps` is taken away. So KL and entropy terms,
accumulation, mixed precision, logging and checkpoints stay TRL's. The price: score norms cost a forward and a backward
of their own before the ordinary step (groups span microbatches, so the coefficients of the first need the norms of the
last), ratios a forward.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from llm_bridge.adapters.lag import LagQueue
from llm_bridge.adapters.rows import estimator_of, require, row_coefficient, usable
from llm_bridge.control import EssStepScale
from llm_bridge.diagnostics import diagnose
from llm_bridge.distributed import gather_batch
from llm_bridge.logprobs import log_prob_of
from llm_bridge.ratios import log_ratio, present, trajectory_batch
from llm_bridge.scores import ScoreTape, logit_sq_norms, tape_for
from llm_bridge.scores.calibration import METHODS
from llm_bridge.scores.fused import require_kernel
from vcposim.errors import InputError, unknown_name
from vcposim.estimators import Resolved

try:
    from trl import GRPOTrainer
except ModuleNotFoundError as error:
    if error.name != "trl":
        raise
    raise ModuleNotFoundError(
        "llm_bridge.adapters.trl needs TRL; install it with: pip install 'vcposim[trl]'", name="trl"
    ) from None

TESTED = "1.16"
SEAMS = (
    "_calculate_rewards",
    "_compute_loss",
    "_generate_and_score_completions",
    "_get_per_token_logps_and_entropies",
    "_load_optimizer_and_scheduler",
    "_prepare_inputs",
    "_save_checkpoint",
)
"""methods of GRPOTrainer that this adapter wraps or calls"""
TAPED = ("exact", "sketch", "last_block")
NORMS = (*TAPED, "logit", "length")
"""how ||s_i||^2 is had: on the score tape exactly, by 16 random signings, of the last block alone; or a proxy"""
AVERAGES = ("grpo", "bnpo", "dr_grpo", "dapo")
"""loss types that have no ratio treatment besides PPO's clip, which does nothing at a ratio of 1"""
LOGGED = ("step_scale", "ess_fraction", "ess_reference")
"""what is logged of the brake's `StepRecord`; the rest is among the gauges"""
IMAGES = frozenset(
    {"pixel_values", "image_grid_thw", "num_images", "pixel_attention_mask", "spatial_shapes",
     "num_tiles", "image_sizes", "token_type_ids", "mm_token_type_ids", "image_position_ids"}
)  # fmt: skip
"""what TRL's forward takes along for models that see images"""


@dataclass(frozen=True)
class VcpoConfig:
    """What to switch on.

    `estimator`: a catalogue name, yours as `file.py:function`, an `Estimator`, or None to leave TRL's own loss alone
    (lag, brake and gauges still work). `norm`: one of `NORMS`, for estimators that need score norms. `method`: how the
    tape forms exact norms; "auto" is the fastest, by a measurement that may choose otherwise in the next run, and with
    it the last bits.
    `lag`: updates between generation and use. `ess_reference`: rho_ref of the brake (`EssStepScale`), None for no
    brake. `exponent`: of the brake, by default the optimizer family's. `diagnostics`: log every gauge of
    `llm_bridge.diagnose` as `vcpo/...`.

    Raises `InputError` for unknown names, settings out of range, and estimators that need what TRL does not give.
    """

    estimator: str | Resolved | None = "vcpo"
    norm: str = "exact"
    method: str = "block"
    lag: int = 0
    ess_reference: float | str | None = 1.0
    exponent: float | None = None
    diagnostics: bool = True

    def __post_init__(self) -> None:
        if self.norm not in NORMS:
            raise unknown_name("norm", self.norm, NORMS)
        if self.method not in ("auto", *METHODS):
            raise unknown_name("method", self.method, ("auto", *METHODS))
        require_kernel(self.method)
        LagQueue(self.lag)
        if self.ess_reference is not None:
            exponent = 1.0 if self.exponent is None else self.exponent
            EssStepScale(torch.optim.SGD([torch.zeros(1)]), reference=self.ess_reference, exponent=exponent)
        if self.estimator is not None:
            name = self.estimator if isinstance(self.estimator, str) else None
            require(estimator_of(self.estimator), "TRL", name)


class VcpoTrainer(GRPOTrainer):
    """`GRPOTrainer` with one more argument, `vcpo`.

    Raises `InputError` at construction for settings of TRL under which lag or coefficient would not be what they say,
    for groups too small for the estimator, and for DeepSpeed.
    """

    args: Any
    _buffered_inputs: Any
    model: Any
    optimizer: Any

    def __init__(self, *args: Any, vcpo: VcpoConfig | None = None, **kwargs: Any) -> None:
        require_seams(GRPOTrainer)
        super().__init__(*args, **kwargs)
        self.vcpo = vcpo or VcpoConfig()
        self.estimator = None if self.vcpo.estimator is None else estimator_of(self.vcpo.estimator)
        self.needs = frozenset[str]() if self.estimator is None else self.estimator.needs
        norm_by_logits = "scores" in self.needs and self.vcpo.norm != "length"
        self.sees_logits = norm_by_logits or "collision" in self.needs
        require_settings(self)
        self.queue, self.updates = LagQueue(self.vcpo.lag), 0
        self.no_step_because = ""
        self._brake: EssStepScale | None = None
        self.add_callback(AroundTheStep(self))

    # --- generation ---------------------------------------------------------------------------------------------------

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        self._reward = super()._calculate_rewards(*args, **kwargs)
        return self._reward

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        if not self.model.training:
            return output
        if self.sees_logits and "pixel_values" in output:
            raise InputError("norm: images are not passed on where logits are taken; use norm='length'")
        n, device = len(inputs), output["advantages"].device
        first = self.accelerator.process_index * n
        row = torch.arange(first, first + n, device=device)
        reward = (self._reward * self.reward_weights.to(self._reward.device)).nansum(dim=1)  # of all ranks
        reward = reward.masked_fill(torch.isnan(self._reward).all(dim=1), torch.nan)  # no function had one
        output |= {
            "reward": reward[first : first + n].to(device),
            "prompt_index": row // self.args.num_generations,  # unique over ranks
            "version": torch.full_like(row, self.updates),
        }
        if self.vcpo.lag and "old_per_token_logps" not in output:
            output["old_per_token_logps"] = self._log_prob(output)
        output, old_enough = self.queue.exchange(output)
        self.no_step_because = "" if old_enough else f"nothing is {self.vcpo.lag} generations old yet"
        return output

    # --- before the microbatches of an update -------------------------------------------------------------------------

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        first = self._step % self.args.steps_per_generation == 0
        inputs = super()._prepare_inputs(generation_batch)
        if self.model.training and first:
            self._weigh(self._buffered_inputs)
        return inputs

    def _weigh(self, parts: list[dict[str, Any]]) -> None:
        """Give each row of the coming update its coefficient, show the brake its ratios, and log the gauges."""
        if self.no_step_because:
            return
        rows = [self._measure(x) for x in parts]
        row = {name: torch.cat([x[name] for x in rows]) for name in rows[0]}
        reward, group, stamp = (torch.cat([x[name] for x in parts]) for name in ("reward", "prompt_index", "version"))
        pi, mu, mask = row.pop("log_prob"), row.pop("behavior_log_prob"), row.pop("mask")
        mask = mask * torch.isfinite(reward)[:, None]  # what no reward function scored teaches nothing
        fields: dict[str, Any] = row
        batch = trajectory_batch(reward, pi, mu, mask, **fields)
        if self.estimator is None:
            whole = gather_batch(batch, group).batch
        else:
            answer = row_coefficient(self.estimator, replace(batch, log_prob=pi), group)
            whole = answer.batch
            if not answer.finite:
                self._refuse_step("a coefficient is not finite; check rewards and log-probabilities")
            # TRL's advantage becomes c_i and its ratio pi/pi: the loss is -c_i log pi.
            for inputs, c in zip(parts, answer.coefficient.split([len(x["advantages"]) for x in parts]), strict=True):
                inputs["advantages"] = c.to(inputs["advantages"].dtype)
                inputs.pop("old_per_token_logps", None)
        self._log({"vcpo/lag": float(self.updates - stamp.double().mean())})
        if self.vcpo.diagnostics:
            self._log(diagnose(whole))
        if not usable(whole):
            self._refuse_step("a ratio is NaN or infinite; check the log-probabilities of model and sampler")
        elif self.brake is not None and not self.no_step_because:
            self.brake.observe(log_ratio(pi, mu, mask), present(mask))

    def _measure(self, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """Log-probabilities of the current and the sampling policy, mask, and what else the estimator needs."""
        mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)
        behavior = inputs.get("sampling_per_token_logps", inputs.get("old_per_token_logps"))
        if self.sees_logits:
            token, attention, keep = completed(inputs)
            with self._tape() as tape:
                logits = self._logits(token, attention)
                log_prob = log_prob_of(logits, token)[:, -keep:]
                out = {"log_prob": log_prob.detach()}
                if tape is not None:
                    out["score_sq_norm"] = tape.score_sq_norms(log_prob, mask, keep=False)  # p.grad is left alone
            if "scores" in self.needs and tape is None:
                out["score_sq_norm"] = logit_sq_norms(logits, token, F.pad(mask, (token.shape[1] - keep, 0)))
            if "collision" in self.needs:
                out["collision"] = F.softmax(logits[:, -keep - 1 : -1].detach().float(), -1).square().sum(-1)
        elif behavior is not None or "log_prob" in self.needs:
            out = {"log_prob": self._log_prob(inputs)}
        else:
            out = {"log_prob": torch.zeros_like(mask, dtype=torch.float32)}  # on policy: whatever it is, the ratio is 1
        if "scores" in self.needs and self.vcpo.norm == "length":
            out["score_sq_norm"] = mask.sum(1).float()
        return out | {"mask": mask, "behavior_log_prob": out["log_prob"] if behavior is None else behavior}

    @torch.no_grad()
    def _log_prob(self, inputs: dict[str, Any]) -> Tensor:
        """log pi of each completion token, by the forward that `_measure` uses, so that rounding cancels: (n, t)."""
        token, attention, keep = completed(inputs)
        rows = self.args.per_device_train_batch_size
        if self.sees_logits:
            parts = zip(token.split(rows), attention.split(rows), strict=True)
            return torch.cat([log_prob_of(self._logits(y, real), y)[:, -keep:] for y, real in parts])
        extra = {name: inputs[name] for name in IMAGES & inputs.keys()}
        return self._get_per_token_logps_and_entropies(self.model, token, attention, keep, rows, **extra)[0]

    @contextmanager
    def _tape(self) -> Iterator[ScoreTape | None]:
        norm = self.vcpo.norm if "scores" in self.needs else "none"
        model = self.accelerator.unwrap_model(self.model)
        made = tape_for(model, norm, method=self.vcpo.method, seed=self._step)
        if made is None:
            with torch.no_grad():
                yield None
            return
        with made as tape:
            yield tape

    def _logits(self, token: Tensor, attention: Tensor) -> Tensor:
        """Of the policy that TRL trains, at its temperature: (n, time, vocabulary)."""
        model = self.accelerator.unwrap_model(self.model)
        position = torch.arange(token.shape[1], device=token.device).repeat(len(token), 1)  # TRL's: from the padding on
        with self.accelerator.autocast():
            output = model(input_ids=token, attention_mask=attention, position_ids=position, use_cache=False)
        return output.logits / self.temperature

    # --- around the optimizer's step ----------------------------------------------------------------------------------

    @property
    def brake(self) -> EssStepScale | None:
        """Around the optimizer, which TRL makes late; None if it is switched off."""
        if self._brake is None and self.vcpo.ess_reference is not None:
            self._brake = EssStepScale(self.optimizer, reference=self.vcpo.ess_reference, exponent=self.vcpo.exponent)
        return self._brake

    def before_step(self) -> None:
        """Scale every lr; where there must be no step, leave the optimizer nothing to step with."""
        if self.no_step_because:
            self.optimizer.zero_grad(set_to_none=True)
            self._log({"vcpo/step_scale": 0.0})
        elif self.brake is None:
            self._log({"vcpo/step_scale": 1.0})
        else:
            record = self.brake.apply()
            self._log({f"vcpo/{name}": getattr(record, name) for name in LOGGED})
            self.no_step_because = record.reason

    def _refuse_step(self, reason: str) -> None:
        self.no_step_because = reason
        warnings.warn(f"update {self.updates + 1} skipped: {reason}", RuntimeWarning, stacklevel=2)

    def after_step(self) -> None:
        """Put every lr back, and count the update if there was one."""
        if self.brake is not None:
            self.brake.restore()
        self.updates += not self.no_step_because

    def _log(self, value: dict[str, float]) -> None:
        for name, x in value.items():
            self._metrics["train"][name].append(x)

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        brake = None if self.brake is None else self.brake.state_dict()
        state = {"lag": self.vcpo.lag, "updates": self.updates, "waiting": list(self.queue.waiting), "brake": brake}
        torch.save(state, folder / self._file)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        path = Path(checkpoint) / self._file
        if not path.is_file():
            raise InputError(
                f"checkpoint: no {self._file} in {checkpoint}; was it saved with VcpoTrainer on as many ranks?"
            )
        state = torch.load(path, weights_only=True, map_location=self.accelerator.device)
        if state["lag"] != self.vcpo.lag:
            raise InputError(f"lag: {self.vcpo.lag} here, {state['lag']} in the checkpoint; use the same")
        self.updates = state["updates"]
        self.queue.waiting.extend(state["waiting"])
        if self.brake is not None and state["brake"] is not None:
            self.brake.load_state_dict(state["brake"])

    @property
    def _file(self) -> str:
        return f"vcpo_{self.accelerator.process_index}.pt"


class AroundTheStep(TrainerCallback):
    """Brings the trainer's `before_step` and `after_step` to either side of the optimizer's step."""

    def __init__(self, trainer: VcpoTrainer) -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Gradients are summed, unscaled and clipped."""
        self.trainer.before_step()

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        """The optimizer has stepped, the scheduler has not."""
        self.trainer.after_step()


def completed(inputs: dict[str, Any]) -> tuple[Tensor, Tensor, int]:
    """Prompt and completion in one row, which of it is real, and its length: -> (n, time), (n, time), (1,)."""
    token = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    return token, attention, inputs["completion_ids"].shape[1]


def require_seams(trainer: type) -> None:
    """Refuse a TRL whose trainer lacks a method that is wrapped here."""
    missing = [name for name in SEAMS if not hasattr(trainer, name)]
    if missing:
        raise InputError(
            f"trl: version {version('trl')} has no GRPOTrainer.{missing[0]}; this adapter is tested with {TESTED}, "
            f"install it with: pip install 'trl=={TESTED}.*'"
        )


def require_settings(trainer: VcpoTrainer) -> None:
    """Refuse settings under which an update would not be one generation, or the loss not -c_i log pi."""
    args: Any = trainer.args
    name, estimator = trainer.vcpo.estimator, trainer.estimator
    refused = {
        "num_iterations": (args.num_iterations != 1, "an update must use each batch once; set num_iterations=1"),
        "steps_per_generation": (
            args.steps_per_generation != args.gradient_accumulation_steps,
            "an update must use one whole generation; set it to gradient_accumulation_steps",
        ),
        "deepspeed": (
            trainer.is_deepspeed_enabled,
            "its engine steps inside backward, where no callback can scale or stop the step; use DDP",
        ),
        "fp16": (args.fp16, "its loss scaler steps without a say; use bf16"),
    }
    if name is not None:
        refused |= {
            "loss_type": (args.loss_type not in AVERAGES, f"estimator {name!r} holds the ratio; use one of {AVERAGES}"),
            "importance_sampling_level": (
                args.importance_sampling_level != "token",
                f"estimator {name!r} holds the ratio; leave it at 'token'",
            ),
            "off_policy_mask_threshold": (
                args.off_policy_mask_threshold is not None,
                f"estimator {name!r} would be masked once more; use the catalogue's 'negative_advantage_mask'",
            ),
            "top_entropy_quantile": (args.top_entropy_quantile < 1, "the score would lose tokens; leave it at 1"),
            "multi_objective_aggregation": (
                args.multi_objective_aggregation != "sum_then_normalize",
                f"estimator {name!r} takes one reward; use 'sum_then_normalize'",
            ),
            "vllm_importance_sampling_correction": (
                args.use_vllm and args.vllm_importance_sampling_correction,
                f"estimator {name!r} corrects for the sampler already; set it to False",
            ),
        }
    for setting, (bad, remedy) in refused.items():
        if bad:
            raise InputError(f"{setting}: {getattr(args, setting)!r}; {remedy}")
    if estimator is not None:
        estimator.require(args.num_generations)
        if args.scale_rewards != "none":
            warnings.warn(
                f"scale_rewards={args.scale_rewards!r} is ignored: estimator {name!r} says how rewards are scaled",
                RuntimeWarning,
                stacklevel=3,
            )
