"""The TRL adapter, against TRL's own trainer and against slow twins, on a tiny Llama. Needs TRL (`vcposim[trl]`).

python -m pytest tests/llm_bridge/test_adapter_trl.py
"""

import copy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("trl", reason="TRL is not installed in this environment; pip install 'vcposim[trl]'")

from torch import Tensor  # noqa: E402
from trl import GRPOTrainer  # noqa: E402

from llm_bridge import Groups, trajectory_batch  # noqa: E402
from llm_bridge.adapters import trl as adapter  # noqa: E402
from llm_bridge.adapters.lag import LagQueue  # noqa: E402
from llm_bridge.adapters.trl import VcpoConfig, VcpoTrainer  # noqa: E402
from llm_bridge.scores import logit_sq_norms, score_sq_norms_loop  # noqa: E402
from tests.kit.statistical import OPERATION, SINGLE, TRAINED, assert_mean_equals, assert_near, near  # noqa: E402
from tests.llm_bridge import tiny_trl  # noqa: E402
from vcposim.catalogue import CATALOGUE, entry  # noqa: E402
from vcposim.catalogue.trainers import SWITCHES  # noqa: E402
from vcposim.errors import InputError  # noqa: E402

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]
QUIET = {"diagnostics": False}
STALE = VcpoConfig(lag=2, diagnostics=False)


class Watched(VcpoTrainer):
    """Remembers the parameters at every version, and what every update was made of."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.snapshot: dict[int, list[Tensor]] = {}
        self.seen: list[list[dict[str, Any]]] = []
        self.lr_used: list[float] = []
        self.gradient: list[list[Tensor] | None] = []

    def _weigh(self, parts: list[dict[str, Any]]) -> None:
        self.snapshot.setdefault(self.updates, values(self.model))
        before = [dict(x) for x in parts]
        super()._weigh(parts)
        for x, y in zip(before, parts, strict=True):
            x["coefficient"] = y["advantages"]
        self.seen.append(before)

    def before_step(self) -> None:
        super().before_step()
        self.lr_used.append(self.optimizer.param_groups[0]["lr"])
        grads = [p.grad for p in self.model.parameters()]
        self.gradient.append(None if grads[0] is None else [g.clone() for g in grads])


def values(model: Any) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def run(folder: Path, vcpo: VcpoConfig | None = None, cls: Any = Watched, **more: Any) -> Any:
    trainer = cls(**tiny_trl.parts(folder, **more), **({} if vcpo is None else {"vcpo": vcpo}))
    trainer.train()
    return trainer


def logged(trainer: Any, name: str) -> list[Any]:
    return [x[name] for x in trainer.state.log_history if name in x]


def whole(parts: list[dict[str, Any]], name: str) -> Tensor:
    return torch.cat([x[name] for x in parts])


# --- lag 0 is TRL -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["dr_grpo", None])
@pytest.mark.parametrize(
    "more", [{}, {"gradient_accumulation_steps": 1, "per_device_train_batch_size": 8}, {"loss_type": "dapo"}]
)
def test_lag_0_with_the_plain_estimator_is_the_stock_run(tmp_path: Path, estimator: str | None, more: Any) -> None:
    """Rewards, losses and every parameter, to the bit; brake and gauges are on, and find nothing to do."""
    stock = run(tmp_path / "a", cls=GRPOTrainer, **more)
    ours = run(tmp_path / "b", VcpoConfig(estimator), **more)
    for name in ("reward", "loss", "grad_norm", "learning_rate"):
        assert logged(stock, name) == logged(ours, name), name
    assert len(set(logged(stock, "reward"))) > 3, "a run in which nothing happens shows nothing"
    for p, q in zip(values(stock.model), values(ours.model), strict=True):
        assert torch.equal(p, q)
    assert set(logged(ours, "vcpo/step_scale")) == {1.0}


def test_a_group_of_three_is_the_stock_run_to_rounding(tmp_path: Path) -> None:
    more = {"num_generations": 3, "per_device_train_batch_size": 3, "max_steps": 2}
    stock = run(tmp_path / "a", cls=GRPOTrainer, **more)
    ours = run(tmp_path / "b", VcpoConfig("dr_grpo"), **more)
    assert logged(stock, "reward") == logged(ours, "reward")
    for name in ("loss", "grad_norm"):
        assert logged(ours, name) == near(logged(stock, name), allow=TRAINED, scale=0.01), name


def test_another_estimator_is_another_run(tmp_path: Path) -> None:
    """The comparison above can fail."""
    stock = run(tmp_path / "a", cls=GRPOTrainer)
    ours = run(tmp_path / "b", VcpoConfig("on_policy_optimal"))
    assert any(not torch.equal(p, q) for p, q in zip(values(stock.model), values(ours.model), strict=True))


# --- lag --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lag", [1, 3])
def test_data_are_exactly_lag_updates_old(tmp_path: Path, lag: int) -> None:
    """By stamp, and in fact: the sampling policy's log-probabilities are those of the parameters of that version."""
    trainer = run(tmp_path, replace(STALE, lag=lag), max_steps=10)
    updates = trainer.seen[lag:]
    age = [version - int(whole(parts, "version")[0]) for version, parts in enumerate(updates)]
    assert age == [min(version, lag) for version in range(10 - lag)]
    assert logged(trainer, "vcpo/lag") == age
    twin = copy.deepcopy(trainer.model)
    for parts in updates:
        inputs = parts[0]
        assert len(set(inputs["version"].tolist())) == 1
        for p, old in zip(twin.parameters(), trainer.snapshot[int(inputs["version"][0])], strict=True):
            p.data = old
        then, now = (scored(model, inputs, 1.0)[0] for model in (twin, trainer.model))
        mask = inputs["completion_mask"]
        assert_near(then * mask, inputs["old_per_token_logps"] * mask, allow=SINGLE)
        assert float(((now - inputs["old_per_token_logps"]) * mask).abs().max()) > 1e-3


def test_while_the_queue_fills_there_is_no_update(tmp_path: Path) -> None:
    trainer = run(tmp_path, replace(STALE, lag=3), max_steps=3)
    assert trainer.updates == 0
    assert trainer.gradient == [None] * 3
    assert logged(trainer, "vcpo/step_scale") == [0.0] * 3
    assert not trainer.optimizer.state_dict()["state"]
    for p, q in zip(values(tiny_trl.model()), values(trainer.model), strict=True):
        assert torch.equal(p, q)


def test_a_batch_is_served_once() -> None:
    queue = LagQueue(3)
    served = [item for item, ready in map(queue.exchange, range(20)) if ready]
    assert served == list(range(17))
    for bad in (-1, 1.5, True, "2"):
        with pytest.raises(InputError, match="lag"):
            LagQueue(bad)  # type: ignore[arg-type]


# --- coefficients and gradient ----------------------------------------------------------------------------------------


def scored(model: Any, inputs: dict[str, Any], temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """log pi of the completions (n, t), the logits, and the tokens: plain Hugging Face calls, no adapter, no TRL."""
    token = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    real = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    logits = type(model).forward(model, input_ids=token, attention_mask=real).logits / temperature
    log_prob = logits[:, :-1].log_softmax(-1).gather(2, token[:, 1:, None]).squeeze(2)
    return log_prob[:, -inputs["completion_ids"].shape[1] :], logits, token


def slow_norm(kind: str, model: Any, inputs: dict[str, Any], log_prob: Tensor, logits: Tensor, token: Tensor) -> Tensor:
    mask = inputs["completion_mask"]
    if kind == "length":
        return mask.sum(1).float()
    if kind == "logit":
        return logit_sq_norms(logits, token, torch.nn.functional.pad(mask, (token.shape[1] - mask.shape[1], 0)))
    parameters = model.model.layers[-1].parameters() if kind == "last_block" else model.parameters()
    return score_sq_norms_loop(log_prob, mask, list(parameters))


@pytest.mark.parametrize(
    ("estimator", "norm", "temperature"),
    [
        ("vcpo", "exact", 0.7),
        ("vcpo_leave_one_out", "last_block", 1.0),
        ("vcpo_group_std", "logit", 0.7),
        ("leverage_damped_mean", "length", 1.0),
        ("token_tis", "exact", 1.0),
        ("otb", "exact", 0.7),
        ("self_normalized", "exact", 1.0),
    ],
)
def test_rows_get_the_kernels_coefficient_and_p_grad_its_gradient(
    tmp_path: Path, estimator: str, norm: str, temperature: float
) -> None:
    """Groups are torn over two microbatches; log-probabilities and norms by a slow twin, the gradient by autograd."""
    trainer = run(tmp_path, VcpoConfig(estimator, norm, lag=2, **QUIET), temperature=temperature, max_grad_norm=0.0)
    torn = 0
    for version, parts in enumerate(trainer.seen[2:]):
        model = copy.deepcopy(trainer.model)
        for p, old in zip(model.parameters(), trainer.snapshot[version], strict=True):
            p.data = old
        torn += len(set(parts[0]["prompt_index"].tolist())) > 1
        twins = [scored(model, x, temperature) for x in parts]
        log_prob, mask = torch.cat([x[0] for x in twins]), whole(parts, "completion_mask")
        norms = torch.cat([slow_norm(norm, model, x, *twin) for x, twin in zip(parts, twins, strict=True)])
        groups = Groups.of(whole(parts, "prompt_index"))
        record = trajectory_batch(
            whole(parts, "reward"), log_prob, whole(parts, "old_per_token_logps"), mask,
            groups=groups, score_sq_norm=norms,
        )  # fmt: skip
        logits = torch.cat([x[1] for x in twins])[:, -mask.shape[1] - 1 : -1].detach()
        collision = groups.lift((logits.softmax(-1) ** 2).sum(-1))
        record = replace(record, log_prob=groups.lift(log_prob.detach()), collision=collision)
        c = groups.flat(entry(estimator).estimator.coefficients(record))
        assert_near(whole(parts, "coefficient"), c, allow=TRAINED, scale=0.1)
        objective = (c if c.ndim == 2 else c[:, None]) * torch.where(mask > 0, log_prob, 0.0)
        expected = torch.autograd.grad(-objective.sum() / (8 * trainer.max_completion_length), list(model.parameters()))
        assert max(float(g.abs().max()) for g in expected) > 1e-4
        for got, want in zip(trainer.gradient[version + 2], expected, strict=True):
            assert_near(got, want, allow=5 * TRAINED, scale=1e-3)
    assert torn, "no group was torn over microbatches"


def test_the_sketch_is_near_the_exact_norm(tmp_path: Path) -> None:
    trainer = run(tmp_path, STALE, max_steps=3)
    inputs = trainer.seen[-1][0]
    exact = trainer._measure(inputs)["score_sq_norm"]
    trainer.vcpo = replace(STALE, norm="sketch")
    sketch = torch.stack([trainer._measure(dict(inputs))["score_sq_norm"] for trainer._step in range(256)])
    assert_mean_equals((sketch / exact).numpy(), 1.0, detect=1.0)


def test_every_entry_is_served_or_refused_by_name(tmp_path: Path) -> None:
    """At construction, with TRL itself; coefficients of every entry: `test_adapter_needs`."""
    given = tiny_trl.parts(tmp_path)
    for name in CATALOGUE:
        if SWITCHES["TRL"].on(name) is None:
            with pytest.raises(InputError, match=f"estimator: {name} needs .*, which TRL does not give; "):
                VcpoConfig(name)
        else:
            VcpoTrainer(**given, vcpo=VcpoConfig(name))


# --- the brake --------------------------------------------------------------------------------------------------------


def test_the_lr_is_scaled_for_one_step_and_restored(tmp_path: Path) -> None:
    trainer = run(tmp_path, replace(STALE, ess_reference=1.0), lr_scheduler_type="linear")
    scale, lr = logged(trainer, "vcpo/step_scale"), logged(trainer, "learning_rate")
    assert lr == [0.02 * (8 - step) / 8 for step in range(8)], "what the scheduler made is logged, unscaled"
    assert trainer.lr_used[2:] == [a * b for a, b in zip(lr[2:], scale[2:], strict=True)]
    assert [s < 1 for s in scale[2:]] == [False] + [True] * 5, "on policy a full step, then smaller ones"
    fraction = logged(trainer, "vcpo/ess_fraction")
    assert scale[2:] == near([f**0.5 for f in fraction])


def test_without_a_brake_the_lr_is_left_alone(tmp_path: Path) -> None:
    trainer = run(tmp_path, replace(STALE, ess_reference=None))
    assert trainer.lr_used == [0.02] * 8
    assert not logged(trainer, "vcpo/ess_fraction")


@pytest.mark.parametrize("estimator", ["vcpo", "dr_grpo", None])
@pytest.mark.parametrize("reference", [1.0, None])
def test_a_nan_ratio_makes_no_step(tmp_path: Path, estimator: str | None, reference: float | None) -> None:
    """Neither parameters nor moments move, with the brake and without; the next step is an ordinary one."""

    class Broken(Watched):
        def _measure(self, inputs: dict[str, Any]) -> dict[str, Tensor]:
            out = super()._measure(inputs)
            if self.state.global_step == 3:
                out["log_prob"] = out["log_prob"].clone()
                out["log_prob"][1, 0] = torch.nan
            return out

    vcpo = replace(STALE, estimator=estimator, lag=1, ess_reference=reference)
    trainer = run(tmp_path, vcpo, cls=Broken, max_steps=6)
    taken = [g is not None for g in trainer.gradient]
    assert taken == [False, True, True, False, True, True]
    assert trainer.updates == 4
    assert {int(state["step"]) for state in trainer.optimizer.state_dict()["state"].values()} == {4}
    assert [scale > 0 for scale in logged(trainer, "vcpo/step_scale")] == taken
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
    assert trainer.optimizer.param_groups[0]["lr"] == 0.02


def test_an_unscored_completion_is_left_out(tmp_path: Path) -> None:
    """A reward of None is no reward of 0: the row has no coefficient and is in no mean."""

    def picky(completions: list[str], **_: Any) -> list[float | None]:
        return [None if i == 2 else 1.0 + i for i, _ in enumerate(completions)]

    trainer = Watched(**(tiny_trl.parts(tmp_path, max_steps=1) | {"reward_funcs": picky}), vcpo=VcpoConfig("dr_grpo"))
    trainer.train()
    (parts,) = trainer.seen
    reward, c = whole(parts, "reward"), whole(parts, "coefficient")
    got = {None if torch.isnan(r) else float(r): float(x) for r, x in zip(reward, c, strict=True)}
    mean = (1 + 2 + 4) / 3
    expected = {1: 1 - mean, 2: 2 - mean, None: 0, 4: 4 - mean, 5: -1.5, 6: -0.5, 7: 0.5, 8: 1.5}
    assert got == near(expected, allow=OPERATION), "TRL's rewards are in single precision"


# --- several turns ----------------------------------------------------------------------------------------------------


def test_tokens_of_the_environment_count_nowhere(tmp_path: Path) -> None:
    """`env_mask` of a rollout function; its log-probabilities are those of the sampling policy, NaN on tool output."""
    generator = torch.Generator().manual_seed(0)

    def rollout(prompts: list[str], trainer: Any) -> dict[str, Any]:
        completion = [torch.randint(2, 12, (6,), generator=generator).tolist() for _ in prompts]
        mask = [[1, 1, 0, 0, 1, 1] for _ in prompts]
        sampled = [[-2.0, -2.5, float("nan"), 7.0, -2.2, -2.4] for _ in prompts]
        ids = trainer.processing_class(text=prompts)["input_ids"]
        return {"prompt_ids": ids, "completion_ids": completion, "logprobs": sampled, "env_mask": mask}

    trainer = Watched(**tiny_trl.parts(tmp_path, max_steps=2), rollout_func=rollout, vcpo=VcpoConfig("vcpo"))
    trainer.train()
    for step, parts in enumerate(trainer.seen):
        model = copy.deepcopy(trainer.model)
        for p, old in zip(model.parameters(), trainer.snapshot[step], strict=True):
            p.data = old
        own = Tensor([1, 1, 0, 0, 1, 1]).expand(8, 6)
        log_prob = torch.cat([scored(model, x, 1.0)[0] for x in parts])
        groups = Groups.of(whole(parts, "prompt_index"))
        record = trajectory_batch(
            whole(parts, "reward"), log_prob, whole(parts, "sampling_per_token_logps"), own,
            groups=groups, score_sq_norm=score_sq_norms_loop(log_prob, own, list(model.parameters())),
        )  # fmt: skip
        c = groups.flat(entry("vcpo").estimator.coefficients(record))
        assert_near(whole(parts, "coefficient"), c, allow=TRAINED, scale=0.1)
    assert all(0 < x < 1 for x in logged(trainer, "vcpo/ess_fraction"))


# --- checkpoints, evaluation, ranks, refusals -------------------------------------------------------------------------


def test_a_resumed_run_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    vcpo = replace(STALE, ess_reference="running")
    straight = run(tmp_path / "a", vcpo, save_strategy="steps", save_steps=5)
    resumed = Watched(**tiny_trl.parts(tmp_path / "b"), vcpo=vcpo)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-5"))
    for name in ("reward", "vcpo/lag", "vcpo/step_scale", "vcpo/ess_reference"):
        assert logged(resumed, name)[-3:] == logged(straight, name)[-3:], name
    for p, q in zip(values(straight.model), values(resumed.model), strict=True):
        assert torch.equal(p, q)


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    run(tmp_path / "a", STALE, save_strategy="steps", save_steps=4)
    folder = tmp_path / "a" / "checkpoint-4"
    with pytest.raises(InputError, match="lag: 1 here, 2 in the checkpoint"):
        VcpoTrainer(**tiny_trl.parts(tmp_path / "b"), vcpo=replace(STALE, lag=1)).train(str(folder))
    (folder / "vcpo_0.pt").unlink()
    with pytest.raises(InputError, match=r"vcpo_0\.pt"):
        VcpoTrainer(**tiny_trl.parts(tmp_path / "b"), vcpo=STALE).train(str(folder))


def test_evaluation_is_on_fresh_data(tmp_path: Path) -> None:
    options = tiny_trl.parts(tmp_path, eval_strategy="steps", eval_steps=4, per_device_eval_batch_size=4)
    trainer = Watched(**options, eval_dataset=tiny_trl.dataset(4), vcpo=STALE)
    trainer.train()
    assert len(logged(trainer, "eval_reward")) == 2
    assert len(trainer.queue.waiting) == 2


def test_two_ranks_do_what_one_would(tmp_path: Path) -> None:
    """Prompts torn over ranks and microbatches: every row has the coefficient of the whole batch, ranks agree."""
    output = tmp_path / "seen.pt"
    command = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "tests.llm_bridge.tiny_trl", str(output)]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = torch.load(output, weights_only=True)
    for a, b in zip(*(rank["parameters"] for rank in ranks), strict=True):
        assert torch.equal(a, b)
    assert ranks[0]["step_scale"] == ranks[1]["step_scale"]
    torn = 0
    for one, two in zip(*(rank["updates"] for rank in ranks), strict=True):
        row = {name: torch.cat([one[name], two[name]]) for name in one}
        assert_near(row["reward"], row["own_reward"], allow=OPERATION)
        assert len(set(zip(row["group"].tolist(), row["prompt"].tolist(), strict=True))) == 3, "a prompt is a group"
        torn += bool(set(one["group"].tolist()) & set(two["group"].tolist()))
        groups = Groups.of(row["group"])
        record = trajectory_batch(
            row["reward"], row["log_ratio"], row["log_ratio"] * 0, row["mask"], groups=groups,
            score_sq_norm=row["score_sq_norm"],
        )  # fmt: skip
        c = groups.flat(entry("vcpo").estimator.coefficients(record))
        assert_near(row["coefficient"], c, allow=SINGLE, scale=0.01)
        assert float(c.abs().max()) > 1e-3
    assert torn, "no prompt was torn over ranks"


@pytest.mark.parametrize(
    ("vcpo", "more", "words"),
    [
        ({"estimator": "vcop"}, {}, "did you mean 'vcpo'"),
        ({"norm": "exakt"}, {}, "did you mean 'exact'"),
        ({"lag": -1}, {}, "lag: -1"),
        ({"estimator": "tba"}, {}, "reference_log_ratio"),
        ({}, {"num_iterations": 2}, "num_iterations: 2"),
        ({}, {"steps_per_generation": 4}, "steps_per_generation: 4"),
        ({}, {"loss_type": "cispo"}, "loss_type: 'cispo'"),
        ({}, {"importance_sampling_level": "sequence"}, "importance_sampling_level"),
        ({}, {"off_policy_mask_threshold": 0.1}, "off_policy_mask_threshold"),
        ({}, {"top_entropy_quantile": 0.5}, "top_entropy_quantile"),
        ({"exponent": -1.0}, {}, "exponent"),
        ({"ess_reference": 2.0}, {}, "reference"),
    ],
)
def test_refusals_are_one_line(tmp_path: Path, vcpo: dict[str, Any], more: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words) as refusal:
        VcpoTrainer(**tiny_trl.parts(tmp_path, **more), vcpo=VcpoConfig(**vcpo))
    assert "\n" not in str(refusal.value)


def test_another_trl_is_refused_by_its_version() -> None:
    with pytest.raises(InputError, match=r"trl: version 1\.\d+\.\d+ has no GRPOTrainer\._calculate_rewards"):
        adapter.require_seams(object)


def test_settings_that_are_overruled_are_said() -> None:
    with pytest.warns(RuntimeWarning, match="scale_rewards='group' is ignored"):
        VcpoTrainer(**tiny_trl.parts("unused", scale_rewards="group"), vcpo=VcpoConfig())
