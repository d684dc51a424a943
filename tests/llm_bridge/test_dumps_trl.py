"""`record_trl` on TRL's own trainer: what it writes while a tiny Llama learns is what `vcposim replay` reads.

Needs TRL (`vcposim[trl]`); vLLM stays away, a `rollout_func` samples and hands over the sampler's log-probabilities. A
run of verl needs more than one CPU: `record_verl` is tested on a stand-in of its interface alone (`test_dumps.py`).
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("trl", reason="TRL is not installed in this environment; pip install 'vcposim[trl]'")

from torch import Tensor  # noqa: E402
from trl import GRPOTrainer  # noqa: E402

from llm_bridge.dumps import record_trl  # noqa: E402
from tests.kit.statistical import SINGLE, assert_near  # noqa: E402
from tests.llm_bridge import tiny_trl  # noqa: E402
from vcposim.commands.main import main  # noqa: E402
from vcposim.errors import InputError  # noqa: E402
from vcposim.replay import read_dump  # noqa: E402

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]


def scored(model: Any, prompt: list[int], completion: list[int]) -> Tensor:
    """log pi of each token of a completion."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1)[torch.arange(len(completion)), torch.tensor(completion)]


class Stale:
    """Samples from the weights it was made with, and remembers what it said and what the learner says of it."""

    def __init__(self) -> None:
        self.model, self.seen = tiny_trl.model(), []

    def __call__(self, prompts: list[str], trainer: Any) -> dict[str, Any]:
        ids = trainer.processing_class(text=prompts)["input_ids"]
        completions, logprobs = [], []
        for prompt in ids:
            out = self.model.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt)).long(),
                do_sample=True,
                top_k=0,
                max_new_tokens=8,
            )
            completions.append(out[0, len(prompt) :].tolist())
            logprobs.append(scored(self.model, prompt, completions[-1]).tolist())
            learner = scored(trainer.model, prompt, completions[-1])
            self.seen.append(
                (trainer.state.global_step, float(learner.double().sum()) - sum(logprobs[-1]), completions[-1])
            )
        return {"prompt_ids": ids, "completion_ids": completions, "logprobs": logprobs}


@pytest.mark.parametrize("of_class", [False, True])
@pytest.mark.parametrize("updates_a_generation", [1, 2])
def test_what_trl_generates_is_what_replay_reads(
    updates_a_generation: int, of_class: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sampler = Stale()
    kind = type("Mine", (GRPOTrainer,), {})
    options = tiny_trl.parts(tmp_path / "out", max_steps=4, num_iterations=updates_a_generation)
    if of_class:
        record_trl(kind, tmp_path / "run")
    trainer = kind(**options, rollout_func=sampler)
    if not of_class:
        record_trl(trainer, tmp_path / "run")
    trainer.train()
    found = read_dump(tmp_path / "run")
    steps, ratios, completions = zip(*sampler.seen, strict=True)
    assert sorted(set(steps)) == list(range(0, 4, updates_a_generation))
    assert found.group.size == 8 * len(set(steps))
    assert_near(found.log_ratio, ratios, allow=SINGLE, scale=10.0)
    np.testing.assert_array_equal(found.length, [len(x) for x in completions])
    texts = tiny_trl.tokenizer().batch_decode(list(completions), skip_special_tokens=True)
    assert_near(found.reward, tiny_trl.even_digits(texts), allow=SINGLE)
    assert np.bincount(found.group).tolist() == [4] * (2 * len(set(steps)))
    assert found.slices["step"][1] == sorted(set(steps))
    first = found.slices["step"][0] == 0
    assert np.abs(found.log_ratio[first]).max() < 1e-4 < np.abs(found.log_ratio[~first]).min()
    capsys.readouterr()  # what TRL logged
    assert main(["replay", str(tmp_path / "run"), "--no-figure", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["n"] == found.group.size


def test_trl_that_samples_by_itself_keeps_no_log_probabilities_and_is_refused(tmp_path: Path) -> None:
    trainer = GRPOTrainer(**tiny_trl.parts(tmp_path / "out", max_steps=1))
    record_trl(trainer, tmp_path / "run")
    with pytest.raises(InputError, match="set use_vllm=True"):
        trainer.train()
