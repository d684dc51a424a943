"""What an entry of the catalogue needs, every trainer gives, or refuses by name and with a remedy: the whole catalogue.

TRL and verl are stood in for by the few functions that their adapters touch, so that this runs without them.
"""

import importlib
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("accelerate")
pytest.importorskip("transformers")

from torch import Tensor, nn  # noqa: E402

from llm_bridge import Groups, trajectory_batch  # noqa: E402
from llm_bridge.scores import score_sq_norms_loop  # noqa: E402
from llm_bridge.training.gradient import token_coefficients  # noqa: E402
from llm_bridge.training.lockstep import NOT_READ  # noqa: E402
from tests.golden.problem import load  # noqa: E402
from tests.kit.statistical import SINGLE, assert_near  # noqa: E402
from vcposim.batch import Batch, ScoreNorms  # noqa: E402
from vcposim.catalogue import CATALOGUE, entry  # noqa: E402
from vcposim.catalogue.trainers import MEANING, SWITCHES, require_met  # noqa: E402
from vcposim.errors import InputError  # noqa: E402
from vcposim.estimators import NEEDS, FunctionEstimator  # noqa: E402

REFUSED = {
    "llm_bridge.train": {"vcpo_truncation_aware"},
    "TRL": {"vcpo_truncation_aware", "decoupled_ppo", "dppo_binary_kl_anchor", "p4o", "tba"},
    "verl": {"vcpo_truncation_aware", "decoupled_ppo", "dppo_binary_kl_anchor", "p4o"},
}
"""the entries that a trainer does not serve: a new one that is not served shows here"""
PROBLEM = load()


def stand_in(monkeypatch: pytest.MonkeyPatch, adapter: str, modules: dict[str, ModuleType]) -> Any:
    """The adapter, freshly read, on frameworks that are not the real ones."""
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, f"llm_bridge.adapters.{adapter}", raising=False)
    made = importlib.import_module(f"llm_bridge.adapters.{adapter}")
    monkeypatch.setitem(sys.modules, made.__name__, made)  # undone with the rest: the next test reads the real one
    return made


def module(name: str, **members: Any) -> ModuleType:
    made = ModuleType(name)
    vars(made).update(members)
    return made


# --- TRL --------------------------------------------------------------------------------------------------------------


class Policy(nn.Module):
    """Five words, no context beyond one token: enough for log-probabilities, norms and collisions."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(5, 4), nn.Linear(4, 5)

    def forward(self, input_ids: Tensor, **_: Any) -> Any:
        return SimpleNamespace(logits=self.head(torch.tanh(self.embed(input_ids))))


class StandInTrainer:
    """What `VcpoTrainer` touches of `GRPOTrainer` to weigh the rows of an update."""

    def __init__(self, model: nn.Module, num_generations: int) -> None:
        self.model, self.temperature, self._step = model, 1.0, 0
        self.is_deepspeed_enabled, self._metrics = False, {}
        self.accelerator = SimpleNamespace(unwrap_model=lambda m: m, autocast=nullcontext, process_index=0)
        self.args = SimpleNamespace(
            num_iterations=1, steps_per_generation=1, gradient_accumulation_steps=1, fp16=False, loss_type="dr_grpo",
            importance_sampling_level="token", off_policy_mask_threshold=None, top_entropy_quantile=1.0,
            multi_objective_aggregation="sum_then_normalize", use_vllm=False, num_generations=num_generations,
            scale_rewards="none", per_device_train_batch_size=4,
        )  # fmt: skip

    def add_callback(self, callback: Any) -> None:
        """Nothing calls it here."""

    def _get_per_token_logps_and_entropies(
        self, model: nn.Module, token: Tensor, attention: Tensor, keep: int, rows: int
    ) -> tuple[Tensor, None]:
        return log_prob_of(model, token)[0][:, -keep:], None

    def _untouched(self) -> None:
        raise AssertionError("not asked for here")

    _calculate_rewards = _compute_loss = _generate_and_score_completions = _untouched
    _load_optimizer_and_scheduler = _prepare_inputs = _save_checkpoint = _untouched


def log_prob_of(model: nn.Module, token: Tensor) -> tuple[Tensor, Tensor]:
    """log pi of every token but the first (n, t - 1), and their logits."""
    logits = model(token).logits[:, :-1]
    return logits.log_softmax(-1).gather(2, token[:, 1:, None])[..., 0], logits


@pytest.fixture
def trl(monkeypatch: pytest.MonkeyPatch) -> Any:
    return stand_in(monkeypatch, "trl", {"trl": module("trl", GRPOTrainer=StandInTrainer)})


def rows_of_trl() -> list[dict[str, Tensor]]:
    """Two prompts with four responses each, in two microbatches that tear a prompt's responses apart."""
    generator = torch.Generator().manual_seed(1)
    token = torch.randint(5, (8, 9), generator=generator)
    log_prob = log_prob_of(Policy(), token)[0][:, 2:].detach()
    length = torch.tensor([6, 2, 4, 3, 5, 6, 1, 3])
    inputs = {
        "prompt_ids": token[:, :3], "prompt_mask": torch.ones(8, 3).long(), "completion_ids": token[:, 3:],
        "completion_mask": (torch.arange(6) < length[:, None]).long(),
        "old_per_token_logps": log_prob + torch.randn(8, 6, generator=generator) / 4,
        "reward": torch.tensor([1.0, 0.0, 2.0, -1.0, 0.5, 0.0, 1.0, 3.0]), "advantages": torch.zeros(8),
        "prompt_index": torch.tensor([0, 1, 0, 1, 1, 0, 1, 0]), "version": torch.zeros(8),
    }  # fmt: skip
    return [{name: x[part] for name, x in inputs.items()} for part in (slice(0, 3), slice(3, 8))]


@pytest.mark.parametrize("name", sorted(set(CATALOGUE) - REFUSED["TRL"]))
def test_trl_gives_what_the_entry_needs(trl: Any, name: str) -> None:
    """Rows get the kernel's coefficient of the whole batch, whatever it is made of."""
    model, parts = Policy(), rows_of_trl()
    trainer = trl.VcpoTrainer(model, 4, vcpo=trl.VcpoConfig(name, ess_reference=None, diagnostics=False))
    trainer._metrics = {"train": {"vcpo/lag": []}}
    whole = {key: torch.cat([x[key] for x in parts]) for key in parts[0]}
    trainer._weigh(parts)
    assert not trainer.no_step_because
    log_prob, logits = log_prob_of(model, torch.cat([whole["prompt_ids"], whole["completion_ids"]], 1))
    log_prob, logits, mask = log_prob[:, 2:], logits[:, 2:].detach(), whole["completion_mask"]
    groups = Groups.of(whole["prompt_index"])
    record = trajectory_batch(
        whole["reward"], log_prob, whole["old_per_token_logps"], mask, groups=groups,
        score_sq_norm=score_sq_norms_loop(log_prob, mask, list(model.parameters())),
    )  # fmt: skip
    collision = groups.lift(logits.softmax(-1).square().sum(-1))
    record = replace(record, log_prob=groups.lift(log_prob.detach()), collision=collision)
    c = groups.flat(entry(name).estimator.coefficients(record))
    assert_near(torch.cat([x["advantages"] for x in parts]), c, allow=SINGLE, scale=0.1)
    assert all("old_per_token_logps" not in x for x in parts), "TRL's own ratio would come on top"


@pytest.mark.parametrize("name", sorted(REFUSED["TRL"]))
def test_trl_refuses_the_others_before_a_model_is_loaded(trl: Any, name: str) -> None:
    """The remedy is tested too: the line that is told is one that serves the entry."""
    with pytest.raises(InputError, match=f"estimator: {name} needs .*, which TRL does not give; ") as refusal:
        trl.VcpoConfig(name)
    elsewhere = {switch.on(name) for switch in SWITCHES.values()} - {None}
    said = str(refusal.value)
    assert any(line in said for line in elsewhere) if elsewhere else said.endswith("no trainer has that")
    assert "\n" not in said


def test_trl_refuses_groups_that_are_too_small(trl: Any) -> None:
    with pytest.raises(InputError, match="group_size: 1"):
        trl.VcpoTrainer(Policy(), 1, vcpo=trl.VcpoConfig("rloo"))


# --- verl -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def verl(monkeypatch: pytest.MonkeyPatch) -> Any:
    known: dict[str, Any] = {}
    losses: dict[str, Any] = {}

    def registering(into: dict[str, Any]) -> Any:
        return lambda name: lambda function: into.setdefault(name, function)

    def compute_advantage(data: Any, adv_estimator: str, config: Any = None) -> Tensor:
        of_batch = {name: data.batch[name] for name in ("token_level_rewards", "response_mask")}
        return known[adv_estimator](**of_batch, index=data.uid, config=config)[0]

    core = module(
        "core_algos", ADV_ESTIMATOR_REGISTRY=known, POLICY_LOSS_REGISTRY=losses, register_adv_est=registering(known),
        register_policy_loss=registering(losses), compute_policy_loss_reinforce=None,
    )  # fmt: skip
    ray = module("ray_trainer", compute_advantage=compute_advantage)
    ppo = module("verl.trainer.ppo", core_algos=core, ray_trainer=ray)
    adapter = stand_in(
        monkeypatch,
        "verl",
        {"verl": module("verl"), "verl.trainer": module("verl.trainer"), "verl.trainer.ppo": ppo},
    )
    return SimpleNamespace(ask=ray.compute_advantage, known=known, adapter=adapter)


def batch_of_verl(drop: str = "") -> Any:
    column = {
        "token_level_rewards": PROBLEM.token_reward, "response_mask": PROBLEM.mask,
        "old_log_probs": PROBLEM.anchor_log_prob, "rollout_log_probs": PROBLEM.behavior_log_prob,
        "ref_log_prob": PROBLEM.reference_log_prob, "sum_pi_squared": PROBLEM.anchor_collision,
    }  # fmt: skip
    tensors = {name: torch.tensor(x) for name, x in column.items() if name != drop}
    return SimpleNamespace(batch=tensors, uid=np.array([f"prompt-{i}" for i in PROBLEM.prompt], dtype=object))


@pytest.mark.parametrize("name", sorted(set(CATALOGUE) - REFUSED["verl"]))
def test_verl_gives_what_the_entry_needs(verl: Any, name: str) -> None:
    """Rows get the kernel's coefficient, by NumPy in doubles, under the name that the index of papers tells."""
    line = SWITCHES["verl"].on(name)
    assert line is not None
    c = verl.ask(batch_of_verl(), line.partition("=")[2])
    groups = [np.flatnonzero(PROBLEM.prompt == prompt) for prompt in np.unique(PROBLEM.prompt)]
    rows = np.stack(groups)  # prompts of one size
    mask = PROBLEM.mask[rows]
    own, other, reference = (
        x[rows] for x in (PROBLEM.anchor_log_prob, PROBLEM.behavior_log_prob, PROBLEM.reference_log_prob)
    )
    record = Batch(
        reward=PROBLEM.reward[rows], log_ratio=np.where(mask > 0, own - other, 0.0), token_mask=mask, grouped=True,
        scores=ScoreNorms(mask.sum(-1)), log_prob=own, collision=PROBLEM.anchor_collision[rows],
        reference_log_ratio=np.where(mask > 0, own - reference, 0.0).sum(-1),
    )  # fmt: skip
    expected = entry(name).estimator.coefficients(record)
    expected = (expected if expected.ndim == 3 else expected[..., None]) * mask
    assert_near(c.numpy()[rows], expected, allow=SINGLE, scale=0.1)


@pytest.mark.parametrize("name", sorted(REFUSED["verl"]))
def test_verl_answers_for_the_others_with_a_refusal(verl: Any, name: str) -> None:
    with pytest.raises(InputError, match=f"estimator: {name} needs .*, which verl does not give; "):
        verl.ask(batch_of_verl(), f"vcposim/{name}")


def test_verl_says_how_an_entry_that_needs_norms_is_written(verl: Any) -> None:
    with pytest.raises(InputError, match="write vcposim/vcpo/length, or one of logit, given"):
        verl.ask(batch_of_verl(), "vcposim/vcpo")


@pytest.mark.parametrize(
    ("own", "needs", "said"),
    [
        ("batch.reward", "anchor_log_ratio", "needs anchor_log_ratio"),
        ("batch.reward", "population_baseline", "no trainer has that"),
        ("batch.reward * batch.scores.combine(batch.reward)[..., :1]", "scores", "norms"),
    ],
)
def test_one_of_yours_that_needs_more_is_refused_where_it_is_named(
    verl: Any, trl: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: str, needs: str, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("needy.py").write_text(f"def mine(batch):\n    return {own}\nmine.needs = {needs!r}\n")
    monkeypatch.setenv("VCPOSIM_ESTIMATORS", "needy.py:mine")
    for asked in (verl.adapter.names, lambda: trl.VcpoConfig("needy.py:mine")):
        with pytest.raises(InputError, match=said):
            asked()


# --- the table --------------------------------------------------------------------------------------------------------


def test_the_trainer_that_comes_along_refuses_what_the_table_says() -> None:
    refused = set()
    for name, one in CATALOGUE.items():
        try:
            token_coefficients(one.estimator, 4)
        except InputError:
            refused.add(name)
    assert refused == REFUSED["llm_bridge.train"]


@pytest.mark.parametrize("trainer", SWITCHES)
def test_the_table_is_what_the_doors_say(trainer: str) -> None:
    assert {name for name in CATALOGUE if SWITCHES[trainer].on(name) is None} == REFUSED[trainer]


def test_a_need_that_is_new_is_refused_everywhere_until_someone_gives_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vcposim.estimators.NEEDS", NEEDS | {"weather"})
    newcomer = FunctionEstimator(lambda batch: batch.reward, frozenset({"weather"}))
    for trainer in SWITCHES:
        with pytest.raises(InputError, match=f"needs weather, which {trainer} does not give"):
            require_met(trainer, newcomer)


def test_lock_step_reads_what_it_does_not_refuse() -> None:
    """Its record has token ratios, lengths, norms and log pi."""
    generator = torch.Generator().manual_seed(0)
    log_ratio = torch.randn(3, 2, 4, 5, generator=generator) / 4
    ones = torch.ones(3, 2, 4)
    record = Batch(
        reward=torch.randn(3, 2, 4, generator=generator), log_ratio=log_ratio, length=5 * ones,
        token_mask=torch.ones_like(log_ratio), scores=ScoreNorms(ones), log_prob=log_ratio - 1, grouped=True,
    )  # fmt: skip
    for name in set(CATALOGUE) - REFUSED["llm_bridge.train"]:
        if not entry(name).estimator.needs & NOT_READ:
            assert torch.isfinite(entry(name).estimator.coefficients(record)).all(), name


def test_every_need_that_a_trainer_may_lack_has_its_meaning() -> None:
    lacking = set().union(*(NEEDS - switch.gives for switch in SWITCHES.values()))
    assert lacking <= set(MEANING)


@pytest.mark.parametrize("framework", ["TRL", "VERL"])
def test_the_how_to_names_what_is_refused(framework: str) -> None:
    import llm_bridge

    text = (Path(llm_bridge.__file__).parent / "adapters" / f"HOWTO_{framework}.md").read_text()
    (line,) = [line for line in text.splitlines() if "an anchor (" in line]
    trainer = {"TRL": "TRL", "VERL": "verl"}[framework]
    assert all(f"`{name}`" in line for name in REFUSED[trainer])
