"""Two gloo ranks train as one process does (float64): replicas and FSDP2, with norms and without."""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("accelerate")

from transformers.utils.logging import disable_progress_bar  # noqa: E402

from llm_bridge import train  # noqa: E402
from llm_bridge.training.sharding import weights  # noqa: E402
from tests.kit.ranks import together  # noqa: E402
from tests.kit.statistical import ADAPTED, near  # noqa: E402
from tests.llm_bridge.training import two_ranks  # noqa: E402
from tests.llm_bridge.training.toys import tiny, trainer  # noqa: E402
from vcposim.errors import InputError  # noqa: E402

SHARDED = ("--sharding", "fsdp2")


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    output = tmp_path_factory.mktemp("ranks") / "seen.pt"
    together(output.parent, two_ranks.main, str(output))
    return torch.load(output, weights_only=True)


def torchrun(*words: str) -> str:
    """What the training command says on standard error, in two processes that `torchrun` starts."""
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m",
         "llm_bridge.train", *words],
        cwd=Path(__file__).parents[3], capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stderr


def flat(named: dict[str, Any]) -> Any:
    return torch.cat([x.flatten() for x in named.values()])


def alone(name: str) -> dict[str, Any]:
    return two_ranks.outcome(trainer(**(two_ranks.SCENARIOS[name] | {"sharding": "none"})))


def check_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    start, end, there = (
        flat(x) for x in (weights(trainer(dtype="float64").model), found["weights"], expected["weights"])
    )
    way = float((there - start).norm())
    assert way > 1e-2  # there is something to agree on
    assert float((end - there).norm()) == near(0.0, allow=ADAPTED, scale=way)
    for mine, theirs in zip(found["records"], expected["records"], strict=True):
        assert mine == near(theirs, allow=ADAPTED, nan_ok=True)
    assert found["held_out"] == near(expected["held_out"])


@pytest.mark.parametrize("name", two_ranks.SCENARIOS)
def test_two_ranks_train_as_one_process(seen: dict[str, Any], name: str) -> None:
    expected = alone(name)
    for rank in seen["ranks"]:
        check_same(rank[name], expected)


def test_one_process_goes_on_from_the_state_of_two(seen: dict[str, Any]) -> None:
    name = "fsdp2/vcpo"
    resumed = trainer(**(two_ranks.SCENARIOS[name] | {"sharding": "none"}))
    resumed.load_state_dict(seen["state"])
    expected = alone(name)
    check_same(two_ranks.outcome(resumed), expected | {"records": expected["records"][1:]})


def test_the_command_line_on_two_ranks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One process and two write the same records; two that stop and go on write the bytes of two that do not.

    The replicas start as users start them, with torchrun; the others as `tests/kit/ranks.py` starts ranks.
    """
    folder = tmp_path / "model"
    disable_progress_bar()
    tiny().save_pretrained(folder)
    small = ["--model", folder, "--groups", 2, "--group-size", 3, "--max-new-tokens", 3, "--evaluate-problems", 4]
    setting = [*small, "--lag", 2, "--dtype", "float64", "--step-rule", "ess"]

    def run(start: Callable[..., str], name: str, updates: int, *more: Any) -> list[dict[str, Any]]:
        files = ["--output", tmp_path / name, "--dump", tmp_path / f"{name}.jsonl"]
        said = start(*map(str, [*setting, "--updates", updates, *files, *more]))
        assert said.count("everything is in") == 1  # one rank speaks
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return [{key: math.nan if x is None else x for key, x in json.loads(line).items()} for line in lines]

    def here(*words: str) -> str:
        assert train.main(words) == 0
        return capsys.readouterr().err

    def ranks(*words: str) -> str:
        return "".join(together(tmp_path, two_ranks.command, *words))

    alone, replicas, whole = run(here, "alone", 4), run(torchrun, "replicas", 4), run(ranks, "whole", 4, *SHARDED)
    for two in (replicas, whole):
        for mine, theirs in zip(two, alone, strict=True):
            assert mine == near(theirs, allow=ADAPTED, nan_ok=True)
    run(ranks, "broken", 2, *SHARDED)
    run(ranks, "broken", 4, "--resume")
    for file in ("whole.jsonl", "whole/metrics.jsonl"):
        assert (tmp_path / file.replace("whole", "broken")).read_bytes() == (tmp_path / file).read_bytes()


def test_sharding_alone_is_refused() -> None:
    with pytest.raises(InputError, match="sharding: 'fsdp2' needs several processes; start with torchrun"):
        trainer(sharding="fsdp2")
