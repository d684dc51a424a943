"""Runs in lock-step are the trainer's own runs, whoever is beside them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("accelerate")

from llm_bridge.models.language_model import CharTokenizer, LanguageModel, char_llama  # noqa: E402
from llm_bridge.tasks.base import Task, TaskProblem  # noqa: E402
from llm_bridge.training import TrainConfig, Trainer  # noqa: E402
from llm_bridge.training.lockstep import LockStep  # noqa: E402
from llm_bridge.training.trainer import HELD_OUT  # noqa: E402
from tests.kit.statistical import ADAPTED, near  # noqa: E402
from tests.llm_bridge.training.toys import Letters  # noqa: E402
from vcposim.errors import InputError  # noqa: E402

METHODS: dict[str, dict[str, Any]] = {
    "VCPO": {"estimator": "vcpo", "step_rule": "ess", "lag": 2},
    "TIS": {"estimator": "sequence_tis", "lag": 1},
    "M2PO": {"estimator": "m2po", "lag": 2, "clip_norm": 0.1},
    "PPO, n2": {"estimator": "ppo_clip", "baseline": "on_policy_optimal", "lag": 2},
    "n2": {"estimator": "on_policy_optimal"},
    "GSPO": {"estimator": "gspo", "lag": 2, "seed": 0},
}
GAUGES = {
    "reward": "reward", "lag": "lag", "ess_fraction": "ess_fraction_sequence", "gradient_norm": "gradient_norm",
    "step_scale": "step_scale", "mean_weight": "mean_weight",
}  # fmt: skip


@dataclass(frozen=True)
class Turns(Letters):
    """As many letters in three turns, each answered with a prompt of another length."""

    max_turns: int = 3

    def reply(self, problem: TaskProblem, responses: Sequence[str]) -> str | None:
        return None if len(responses) == 3 else "ok=" if responses[-1] else "more="

    def reward(self, problem: TaskProblem, responses: Sequence[str]) -> float:
        return float(sum(map(len, responses)) % 2)


def language_model(seed: int = 0) -> LanguageModel:
    """Untrained, but for turns that end soon; in doubles throughout, where transformers' norm computes in single."""
    tokenizer = CharTokenizer()
    model = char_llama(tokenizer, hidden=16, layers=2, heads=2, length=40, seed=seed).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
        model.lm_head.weight[tokenizer.eos_id] *= 4
    for layer in model.model.layers:
        layer.input_layernorm, layer.post_attention_layernorm = norm(), norm()
    model.model.norm = norm()
    return LanguageModel(model, tokenizer, "char")


def norm() -> Any:
    return torch.nn.RMSNorm(16, eps=1e-6, dtype=torch.float64)


def config(**changes: Any) -> TrainConfig:
    small = {"updates": 4, "groups": 2, "group_size": 4, "max_new_tokens": 8, "lr": 1e-2, "optimizer": "adam"}
    return TrainConfig(**{**small, "dtype": "float64", **changes})


def weights(model: Any) -> Any:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("task", [Letters(), Turns()], ids=["one turn", "several turns"])
def test_a_run_is_the_trainers(task: Task) -> None:
    """To the rounding of sums in float64: weights, gauges and held-out success of every method, lag and seed."""
    configs = [config(**{"seed": seed, **m}) for seed, m in enumerate(METHODS.values())]
    together = LockStep(configs, lm=language_model(), task=task, chunk=2)
    records, success = list(together.updates()), together.evaluate(16)
    for i, c in enumerate(configs):
        alone = Trainer(c, task=task, lm=language_model())
        for record, expected in zip(records, alone.updates(), strict=True):
            for mine, its in GAUGES.items():
                assert record[mine][i] == near(expected[its], allow=ADAPTED), (mine, c.estimator)
        assert together.theta[i].numpy() == near(weights(alone.model).numpy(), allow=ADAPTED)
        assert success[i] == alone.evaluate(16)["success_rate"]
        assert any(r["gradient_norm"][i] > 0 for r in records)


def test_success_is_by_run_and_problem() -> None:
    """One response to each is what `evaluate` has the mean of; several, the mean reward of a group of the trainer's."""
    configs = [config(seed=1), config(seed=2)]
    runs = LockStep(configs, lm=language_model(), task=Letters(), chunk=1)
    one = runs.success(range(HELD_OUT, HELD_OUT + 6))
    assert one.shape == (2, 6)
    assert runs.evaluate(6) == near(one.mean(axis=1))
    several = runs.success([0, 1], 4)  # the two groups of the first update
    reward = next(runs.updates(1))["reward"]
    assert several.mean(axis=1) == near(reward)
    assert len({float(x) for x in several.flat}) > 1


def test_who_is_beside_a_run_changes_nothing() -> None:
    configs = [config(**{"seed": seed, **m}) for seed, m in enumerate(METHODS.values())]
    among, alone = (LockStep(some, lm=language_model(), task=Turns()) for some in (configs, configs[2:3]))
    for _ in zip(among.updates(), alone.updates(), strict=True):
        assert among.theta[2].numpy() == near(alone.theta[0].numpy(), allow=ADAPTED)


def test_a_batch_that_is_no_number_moves_no_run_but_its_own() -> None:
    runs, still = (LockStep([config(lag=1), config(lag=1)], lm=language_model(), task=Letters()) for _ in range(2))
    for made in (runs, still):
        next(made.updates(1))
    broken = runs.waiting[0][1]
    broken.behavior_log_prob[:] = torch.where(broken.mask, torch.nan, 0.0)
    runs.waiting[1][1] = still.waiting[1][1]  # the two share what version 0 drew
    before = runs.theta.clone()
    record = next(runs.updates(1))
    next(still.updates(1))
    assert record["step_scale"].tolist() == [0.0, 1.0]
    assert torch.equal(runs.theta[0], before[0])
    assert runs.theta[1].numpy() == near(still.theta[1].numpy(), allow=ADAPTED)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ([{"groups": 4}, {}], "groups: 2 beside 4; runs in lock-step share it"),
        ([{"optimizer": "sgd"}], "optimizer: 'sgd'; in lock-step it is 'adam', or use Trainer"),
        ([{"lag_law": "uniform"}], "lag_law: 'uniform'; in lock-step it is 'fixed'"),
        ([{"step_rule": "snr"}], "step_rule: 'snr' looks at what lock-step does not keep"),
        ([{"estimator": "otb"}], "estimator: asks for collision"),
        ([], "configs: none given"),
    ],
)
def test_what_cannot_be_is_refused_by_name(changes: list[dict[str, Any]], said: str) -> None:
    with pytest.raises(InputError, match=said):
        LockStep([config(**c) for c in changes], lm=language_model(), task=Letters())
