"""The verl adapter through verl's own functions, on CPU. Needs verl, in an environment of its own (`vcposim[verl]`).

python -m pytest tests/llm_bridge/test_adapter_verl.py
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("verl", reason="verl is not installed in this environment; pip install 'vcposim[verl]'")

from tensordict import TensorDict  # noqa: E402
from torch import Tensor  # noqa: E402
from verl import DataProto  # noqa: E402
from verl.trainer.config import AlgoConfig  # noqa: E402
from verl.trainer.ppo import core_algos  # noqa: E402
from verl.workers.config import ActorConfig  # noqa: E402
from verl.workers.config.actor import PolicyLossConfig  # noqa: E402

from llm_bridge.adapters import verl as adapter  # noqa: E402
from tests.golden.problem import GROUP, load  # noqa: E402
from tests.kit.statistical import OPERATION, SINGLE, assert_near  # noqa: E402
from vcposim.batch import Batch, ScoreNorms  # noqa: E402
from vcposim.catalogue import CATALOGUE, entry  # noqa: E402
from vcposim.errors import InputError  # noqa: E402

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]
PROBLEM = load()


def batch_of_verl(drop: tuple[str, ...] = (), **more: Any) -> DataProto:
    """The golden problem as verl's trainers hold it: old = the policy before the update, rollout = the sampler's."""
    column = {
        "token_level_rewards": PROBLEM.token_reward,
        "response_mask": PROBLEM.mask,
        "old_log_probs": PROBLEM.anchor_log_prob,
        "rollout_log_probs": PROBLEM.behavior_log_prob,
        "ref_log_prob": PROBLEM.reference_log_prob,
        "sum_pi_squared": PROBLEM.anchor_collision,
        "score_sq_norm": np.linspace(1, 3, len(PROBLEM.reward)),
    } | more
    tensors = {name: torch.tensor(x) for name, x in column.items() if name not in drop}
    uid = np.array([f"prompt-{i}" for i in PROBLEM.prompt], dtype=object)
    return DataProto(TensorDict(tensors, batch_size=len(PROBLEM.reward)), {"uid": uid})


def asked(name: str, data: DataProto | None = None, config: Any = None) -> Tensor:
    """What verl's v1 trainer gets for `algorithm.adv_estimator=name`: (n, t)."""
    from verl.trainer.ppo.v1.utils import compute_advantage_for_multi_trajectories  # loaded after the adapter

    data = batch_of_verl() if data is None else data
    keys = [f"{i}_0_0" for i in range(len(data))]
    out = compute_advantage_for_multi_trajectories(data, keys, name, config=config or AlgoConfig())
    return out.batch["advantages"]


def kernel(name: str, norm: np.ndarray | None) -> np.ndarray:
    """The same by NumPy, prompt by prompt, each group a batch of its own: (n, t)."""
    out = np.zeros_like(PROBLEM.mask)
    for prompt in np.unique(PROBLEM.prompt):
        i = PROBLEM.prompt == prompt
        mask = PROBLEM.mask[i]
        log_ratio, log_reference = (
            np.where(mask > 0, PROBLEM.anchor_log_prob[i] - x[i], 0.0)
            for x in (PROBLEM.behavior_log_prob, PROBLEM.reference_log_prob)
        )
        record = Batch(
            reward=PROBLEM.reward[i],
            log_ratio=log_ratio,
            token_mask=mask,
            scores=None if norm is None else ScoreNorms(norm[i]),
            log_prob=PROBLEM.anchor_log_prob[i],
            collision=PROBLEM.anchor_collision[i],
            reference_log_ratio=log_reference.sum(-1),
        )
        c = entry(name).estimator.coefficients(record)
        out[i] = (c if c.ndim == 2 else c[:, None]) * mask
    return out


NORM = {
    "length": PROBLEM.length,
    "logit": ((1 - 2 * np.exp(PROBLEM.anchor_log_prob) + PROBLEM.anchor_collision) * PROBLEM.mask).sum(1),
    "given": np.linspace(1, 3, len(PROBLEM.reward)),
}


@pytest.mark.parametrize("norm", NORM)
@pytest.mark.parametrize("name", ["vcpo", "vcpo_leave_one_out", "vcpo_group_std", "leverage_damped_mean"])
def test_coefficients_with_score_norms(name: str, norm: str) -> None:
    assert_near(asked(f"vcposim/{name}/{norm}").numpy(), kernel(name, NORM[norm]), allow=SINGLE, scale=0.01)


@pytest.mark.parametrize("name", ["sequence_tis", "token_tis", "self_normalized", "gspo", "otb", "tba", "rloo"])
def test_coefficients_without(name: str) -> None:
    assert_near(asked(f"vcposim/{name}").numpy(), kernel(name, None), allow=SINGLE, scale=0.01)


def test_every_entry_has_a_name_that_serves_or_refuses() -> None:
    known = {name.split("/")[1] for name in core_algos.ADV_ESTIMATOR_REGISTRY if name.startswith("vcposim/")}
    assert known == set(CATALOGUE)
    with pytest.raises(InputError, match=r"estimator: p4o needs anchor_log_ratio .*, which verl does not give"):
        asked("vcposim/p4o")


def test_an_estimator_of_yours_is_registered_where_the_environment_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("newcomer.py").write_text(
        "def tis(batch):\n"
        "    return batch.log_ratio.exp().clamp(max=8.0) * (batch.reward - batch.reward.mean(-1, keepdim=True))\n"
        "def anchored(batch):\n    return batch.reward[..., None] * batch.anchor_log_ratio\n"
        "anchored.needs = 'anchor_log_ratio'\n"
    )
    monkeypatch.setenv("VCPOSIM_ESTIMATORS", "newcomer.py:tis sequence_tis")
    found = adapter.names()
    data = batch_of_verl()
    answers = []
    for name in ("vcposim/newcomer.py:tis", "vcposim/sequence_tis"):
        estimator, norm = found[name]
        token = adapter._BATCH.set(data.batch)
        mask, index = data.batch["response_mask"], data.non_tensor_batch["uid"]
        args = (data.batch["token_level_rewards"], mask, index)
        answers.append(adapter.advantage(*args, estimator=estimator, norm=norm)[0].numpy())
        adapter._BATCH.reset(token)
    assert_near(*answers, allow=SINGLE, scale=0.01)
    monkeypatch.setenv("VCPOSIM_ESTIMATORS", "newcomer.py:anchored")
    with pytest.raises(InputError, match=r"newcomer\.py:anchored needs anchor_log_ratio .*, which verl does not give"):
        adapter.names()


def test_the_plain_estimator_is_verls_own() -> None:
    """`dr_grpo` is GRPO without std, whose advantages verl computes with its own function."""
    ours = asked("vcposim/dr_grpo")
    theirs, _ = core_algos.compute_grpo_outcome_advantage(
        torch.tensor(PROBLEM.token_reward), torch.tensor(PROBLEM.mask), PROBLEM.prompt, norm_adv_by_std_in_grpo=False
    )
    assert_near(ours, theirs, allow=OPERATION, scale=0.1)


def test_other_estimators_of_verl_are_untouched() -> None:
    theirs = asked("rloo")
    direct, _ = core_algos.get_adv_estimator_fn("rloo")(
        token_level_rewards=torch.tensor(PROBLEM.token_reward), response_mask=torch.tensor(PROBLEM.mask),
        index=PROBLEM.prompt, config=AlgoConfig(),
    )  # fmt: skip
    assert torch.equal(theirs, direct)


@pytest.mark.parametrize("mode", ["seq-mean-token-sum", "token-mean", "seq-mean-token-mean"])
def test_the_loss_has_the_coefficient_as_its_gradient(mode: str) -> None:
    """-d loss / d log pi is c over what `loss_agg_mode` divides by, wherever pi has got to since."""
    actor = ActorConfig(
        strategy="fsdp", rollout_n=GROUP, ppo_micro_batch_size_per_gpu=GROUP,
        policy_loss=PolicyLossConfig(loss_mode="vcposim"),
    )  # fmt: skip
    c = torch.tensor(kernel("vcpo", NORM["length"]))
    log_prob = torch.tensor(PROBLEM.log_prob, requires_grad=True)
    mask = torch.tensor(PROBLEM.mask)
    loss, metrics = core_algos.get_policy_loss_fn(actor.policy_loss.loss_mode)(
        old_log_prob=torch.tensor(PROBLEM.anchor_log_prob), log_prob=log_prob, advantages=c, response_mask=mask,
        loss_agg_mode=mode, config=actor, rollout_is_weights=None,
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(loss, log_prob)
    divisor = {
        "seq-mean-token-sum": len(c),
        "token-mean": mask.sum(),
        "seq-mean-token-mean": len(c) * mask.sum(1)[:, None],
    }
    assert_near(-gradient, c / divisor[mode], allow=OPERATION, scale=1e-3)
    assert set(metrics) == {"actor/ppo_kl"}


def test_a_nan_ratio_gives_no_gradient() -> None:
    broken = PROBLEM.behavior_log_prob.copy()
    broken[0, 0] = np.nan
    with pytest.warns(RuntimeWarning, match="not finite"):
        assert not asked("vcposim/sequence_tis", batch_of_verl(rollout_log_probs=broken)).any()
    padding = PROBLEM.behavior_log_prob.copy()
    padding[PROBLEM.mask == 0] = np.nan
    assert asked("vcposim/sequence_tis", batch_of_verl(rollout_log_probs=padding)).any()


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("vcposim/vcpo/length", {"drop": ("rollout_log_probs",)}, "calculate_log_probs=True"),
        ("vcposim/vcpo/logit", {"drop": ("sum_pi_squared",)}, "calculate_sum_pi_squared=True"),
        ("vcposim/vcpo/given", {"drop": ("score_sq_norm",)}, "score_sq_norm"),
        ("vcposim/tba", {"drop": ("ref_log_prob",)}, "ref_log_prob"),
    ],
)
def test_what_the_batch_lacks_is_named_with_the_remedy(name: str, data: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        asked(name, batch_of_verl(**data))


def test_other_refusals() -> None:
    with pytest.raises(InputError, match="bypass_mode"):
        asked("vcposim/sequence_tis", config={"rollout_correction": {"bypass_mode": True}})
    lonely = batch_of_verl()
    lonely.non_tensor_batch["uid"] = np.arange(len(lonely)).astype(str).astype(object)
    with pytest.raises(InputError, match="group_size: 1"):
        asked("vcposim/rloo", lonely)
    with pytest.raises(InputError, match="no batch at hand"):
        core_algos.get_adv_estimator_fn("vcposim/rloo")(torch.ones(2, 3), torch.ones(2, 3), np.arange(2), AlgoConfig())
    with pytest.raises(InputError, match="rollout_is=null"):
        adapter.policy_loss(*[torch.ones(2, 3)] * 4, rollout_is_weights=torch.ones(2, 3))


PROBE = """
from tests.kit.statistical import SINGLE, assert_near  # noqa: E402
import verl
from verl.trainer.ppo import core_algos
from verl.trainer.ppo.v1.utils import compute_advantage
core_algos.get_adv_estimator_fn("vcposim/vcpo/length")
core_algos.get_policy_loss_fn("vcposim")
print(hasattr(compute_advantage, "__wrapped__"))
"""


@pytest.mark.parametrize(("module", "there"), [("llm_bridge.adapters.verl", True), ("", False)])
def test_verl_loads_it_as_an_external_module(module: str, there: bool) -> None:
    environment = {**os.environ, "VERL_USE_EXTERNAL_MODULES": module}
    done = subprocess.run(
        [sys.executable, "-c", PROBE], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert (done.stdout.strip().endswith("True"), done.returncode == 0) == (there, there), done.stderr[-2000:]
