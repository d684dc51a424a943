"""Two ranks that split parameters and share trajectories: local squares add up to the norms of one process."""

from typing import Any

import pytest
import torch

from llm_bridge import ScoreTape
from tests.kit.ranks import together
from tests.kit.statistical import assert_near
from tests.llm_bridge import split_ranks
from vcposim.errors import InputError


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank saw."""
    output = tmp_path_factory.mktemp("split") / "seen"
    together(output.parent, split_ranks.main, str(output))
    return [torch.load(f"{output}.{rank}", weights_only=True) for rank in range(2)]


@pytest.mark.slow
def test_parts_of_parameters_add_up(ranks: list[dict[str, Any]]) -> None:
    """Norms on both ranks and every part of the gradient are those of the whole model; forgetting `split` is seen."""
    whole = split_ranks.update(split_ranks.Net().double())
    for how in ("general", "affine", "loop"):
        for rank, seen in enumerate(ranks):
            found = seen[how]
            assert_near(found["norm"], whole["norm"])
            half = split_ranks.INNER // 2
            mine = slice(rank * half, (rank + 1) * half)
            for name, part in {
                "up.weight": whole["up.weight"][mine], "up.bias": whole["up.bias"][mine],
                "down.weight": whole["down.weight"][:, mine], "expert.0.weight": whole[f"expert.{2 * rank}.weight"],
                "expert.1.weight": whole[f"expert.{2 * rank + 1}.weight"],
                **{k: whole[k] for k in ("embed.weight", "norm.weight", "norm.bias", "router.weight", "head.weight")},
            }.items():  # fmt: skip
                assert_near(found[name], part, scale=float(whole[name].abs().max()) if name in whole else None)
    assert float((ranks[0]["forgotten"]["norm"] / whole["norm"] - 1).abs().max()) > 0.01


@pytest.mark.slow
def test_a_call_through_the_wrapper_is_refused(ranks: list[dict[str, Any]]) -> None:
    for seen in ranks:
        assert "called through DistributedDataParallel" in seen["ddp"]


@pytest.mark.slow
def test_ranks_stop_together(ranks: list[dict[str, Any]]) -> None:
    assert "another rank refused this pass" in ranks[0]["wrong"]
    assert "squared score norm" in ranks[1]["wrong"]


def test_split_without_ranks_is_refused() -> None:
    model = split_ranks.Net().double()
    with pytest.raises(InputError, match="split: no process group"):
        ScoreTape(model, split=model.split())
