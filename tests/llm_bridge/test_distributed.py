"""Two gloo ranks do what one process does, to 1e-8; and group sums merge like the kernel's batch.

`two_ranks.py` runs once, makes one update per scenario on both ranks, and is compared here with the same update in this
process, where no distributed code runs. Its two mutants must fail the same comparison.
"""

import math
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from llm_bridge import moments  # noqa: E402
from llm_bridge.distributed import gather_batch, nothing_like, split_group_coefficient  # noqa: E402
from llm_bridge.groups import Groups  # noqa: E402
from llm_bridge.loss import mean_coefficient  # noqa: E402
from llm_bridge.moments import LOG_A, group_sums, part_sums, split_coefficient, split_measure  # noqa: E402
from tests.kit.ranks import together  # noqa: E402
from tests.kit.statistical import SINGLE, SUMMED, assert_near, near  # noqa: E402
from tests.llm_bridge import two_ranks  # noqa: E402
from vcposim.batch import Batch, ScoreNorms, sample_measure  # noqa: E402
from vcposim.errors import InputError  # noqa: E402
from vcposim.estimators import Estimator  # noqa: E402
from vcposim.surrogates import Clip  # noqa: E402
from vcposim.weights import Weighting  # noqa: E402

# --- two processes ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank saw, by scenario."""
    output = tmp_path_factory.mktemp("ranks") / "seen.pt"
    together(output.parent, two_ranks.main, str(output))
    return torch.load(output, weights_only=True)


def check_same(rank: dict[str, Any], name: str) -> None:
    """Gradient, step scale, parameters after the step and the number of trajectories are those of one process."""
    expected = two_ranks.single(name)
    for key in ("gradient", "parameters"):
        error = float((rank[key] - expected[key]).norm() / expected[key].norm())
        assert error < SUMMED, f"{key}: off by {error:.3g}"
    assert rank["scale"] == near(expected["scale"])
    assert rank["count"] == expected["count"] == 8.0
    assert 0 < rank["scale"] < 0.99  # the brake does brake here
    assert float(expected["gradient"].norm()) > 1e-3


TAPED = [f"{wrap}{how}" for wrap in ("bare", "fsdp2", "fsdp2_checkpointed") for how in ("", ", affine")]
SCENARIOS = [
    *(f"{wrap}/{how}/{name}" for wrap in ("ddp", "fsdp2") for how in two_ranks.SPLITS for name in two_ranks.ESTIMATORS),
    *(f"{wrap}/gathered/{name}" for wrap in ("ddp", "fsdp2") for name in two_ranks.GATHERED),
    *(f"tape/{wrap}/{how}/vcpo" for wrap in TAPED for how in two_ranks.SPLITS),
    *(
        f"tape/{wrap}/{how}/vcpo"
        for wrap in ("fsdp2 in chunks", "fsdp2 in chunks, affine", "fsdp2_checkpointed in chunks, affine")
        for how in ("torn", "ragged")
    ),
    *(f"tape/fsdp2/torn/{name}" for name in two_ranks.ESTIMATORS),
]


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.slow
def test_two_ranks_make_the_update_of_one_process(ranks: list[dict[str, Any]], scenario: str) -> None:
    for rank in ranks:
        check_same(rank[scenario], scenario.rsplit("/", 1)[1])
    assert ranks[0][scenario]["scale"] == ranks[1][scenario]["scale"]  # to the bit, or the replicas drift apart


@pytest.mark.parametrize("mutant", ["average for sum", "own rows only"])
@pytest.mark.slow
def test_wrong_reductions_are_caught(ranks: list[dict[str, Any]], mutant: str) -> None:
    with pytest.raises(AssertionError, match="gradient: off by 0"):
        check_same(ranks[0][f"mutant/{mutant}"], "vcpo")


@pytest.mark.slow
def test_ranks_with_the_same_trajectories_count_them_once(ranks: list[dict[str, Any]]) -> None:
    expected = two_ranks.single("vcpo_leave_one_out")
    for rank in ranks:
        found, twice = rank["replicas/data-parallel group"], rank["replicas/world"]
        assert_near(found["coefficient"], expected["coefficient"])
        assert found["scale"] == near(expected["scale"])
        assert found["count"] == 8.0
        # over the world each has a twin: the ESS fraction does not tell, count and coefficients do
        assert twice["scale"] == near(expected["scale"])
        assert twice["count"] == 16.0
        assert float((2 * twice["coefficient"] - expected["coefficient"]).abs().max()) > 1e-2


@pytest.mark.slow
def test_rows_of_different_number_and_length_are_gathered(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["rows"]["rows"].tolist() == [[1.0, 1.0, 1.0], [2.0, 2.0, 0.0], [2.0, 2.0, 0.0], [2.0, 2.0, 0.0]]


@pytest.mark.slow
def test_a_nan_on_one_rank_stops_both(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["nan"]["scale"] == 0.0
        assert "NaN" in rank["nan"]["reason"]
        assert rank["nan"]["parameters"].tolist() == [1.0, 1.0, 1.0]


@pytest.mark.slow
def test_a_foreign_process_group_is_refused(ranks: list[dict[str, Any]]) -> None:
    for index, rank in enumerate(ranks):
        assert rank["not a member"]["error"] == (
            f"process_group: rank {index} is not in it; pass its own data-parallel group"
        )


@pytest.mark.slow
def test_what_cannot_be_taped_on_shards_is_refused(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert "is sharded; parameters=, unknown='loop' and method='loop'" in rank["taped in part"]["error"]
        assert "only fully_shard on the whole model" in rank["sharded in part"]["error"]
        assert "own.weight is split by (Shard(dim=0),) over ranks; only fully" in rank["tensor parallel"]["error"]
        assert "other.weight: used outside its module's forward" in rank["borrowed weight"]["error"]


@pytest.mark.parametrize("key", ["checked", "checked, affine"])
def test_shards_are_compared_and_all_ranks_stop(ranks: list[dict[str, Any]], key: str) -> None:
    """Wrong on one rank: norms are known there, so the other hears of it; the gradient is everybody's."""
    first, second = (rank[key] for rank in ranks)
    assert "another rank refused this pass" in first["norms"]
    assert "squared score norm of trajectory" in second["norms"]
    for seen in (first, second):
        assert "its gradient along a random direction" in seen["gradient"]
        assert "take no step" in seen["gradient"]


@pytest.mark.parametrize("kind", two_ranks.KINDS)
@pytest.mark.parametrize("way", two_ranks.WAYS)
def test_ranks_may_call_their_modules_in_ways_of_their_own(ranks: list[dict[str, Any]], way: str, kind: str) -> None:
    """Once or in pieces, in other orders, or not: to give a gradient is a collective, and its order must be one."""
    for rank in ranks:
        seen = rank[f"ways/{way}/{kind}"]
        assert seen["gradient"] < SUMMED
        assert seen["none"] == 0


@pytest.mark.parametrize("what", ["mask", "line", "coefficient", "off the line"])
def test_a_rank_that_cannot_go_on_stops_all(ranks: list[dict[str, Any]], what: str) -> None:
    assert ranks[0]["stopped"][what] == "ScoreTape: another rank refused this pass, and says why; take no step"
    assert "another rank" not in ranks[1]["stopped"][what]
    assert ranks[1]["stopped"][what] != "no error"


# --- sums of groups, without any process ------------------------------------------------------------------------------

G, N = 4, 30


def rows(spread: float = 1.0, seed: int = 0):
    """Flat rows of G torn groups, absent ones among them; group 3 has constant rewards, group 2 one row."""
    generator = torch.Generator().manual_seed(seed)
    group = torch.randint(0, G - 1, (N,), generator=generator)
    group[group == 2] = 3
    group[7] = 2
    reward = torch.randn(N, generator=generator, dtype=torch.float64)
    reward[group == 3] = 0.1
    here = (torch.rand(N, generator=generator) > 0.15).double()
    here[7] = 1.0
    log_ratio = spread * torch.randn(N, generator=generator, dtype=torch.float64)
    norm = torch.rand(N, generator=generator, dtype=torch.float64) + 0.1
    length = torch.randint(1, 9, (N,), generator=generator).double()
    return group, here, {"reward": reward, "log_ratio": log_ratio, "norm": norm, "length": length}


def batch_of(here, columns, part=slice(None)) -> Batch:
    measure, unit = sample_measure(here[part])
    column = {name: x[part] for name, x in columns.items()}
    scores = ScoreNorms(column.pop("norm"))
    return Batch(**column, scores=scores, measure=measure, unit=unit)


def whole(estimator: Estimator, group, here, columns):
    """The kernel on the (G, N) layout."""
    groups = Groups.of(group)
    column = {name: groups.lift(x) for name, x in columns.items()}
    measure, unit = sample_measure(groups.lift(here))
    scores = ScoreNorms(column.pop("norm"))
    batch = Batch(**column, scores=scores, measure=measure, unit=unit, grouped=True)
    return groups.flat(mean_coefficient(estimator.coefficients(batch), batch))


def in_parts(estimator: Estimator, group, here, columns, cuts=(11, 11, 24)):
    """The same from parts (one of them empty), each seeing only its rows and the merged sums."""
    parts = [slice(a, b) for a, b in zip((0, *cuts), (*cuts, N), strict=True)]
    batches = [batch_of(here, columns, part) for part in parts if part.start != part.stop]
    kept = [part for part in parts if part.start != part.stop]
    sums = [part_sums(estimator, b, group[part], G) for b, part in zip(batches, kept, strict=True)]
    nothing = nothing_like(sums[0])
    out = []
    for k, (batch, part) in enumerate(zip(batches, kept, strict=True)):
        rest = nothing
        for other in sums[:k] + sums[k + 1 :]:
            rest = rest.merge(other)
        total = rest.merge(sums[k])
        c = split_coefficient(estimator, batch, group[part], total, rest)
        out.append(c * split_measure(batch, group[part], total))
    return torch.cat(out)


ESTIMATORS = [
    *(Estimator(Weighting("truncate", cap=8.0), name) for name in (*LOG_A, "zero", 0.3)),
    *(Estimator(Weighting("truncate", cap=8.0), "opob", how) for how in moments.LOCAL_NORMALIZER),
    Estimator(Weighting("truncate", cap=8.0), "opob_leave_one_out", "group_std", 0.1),
    Estimator(Weighting("truncate", "geometric", cap=1.2), "opob"),
    Estimator(Weighting("mask", cap=1e9, floor=1e-9), "opob", baseline_shift=-0.1),
    Estimator(Weighting("none"), "group_mean", "group_std", 1e-4),
]


@pytest.mark.parametrize("spread", [0.5, 100.0])
@pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda e: f"{e.weighting.treatment}-{e.baseline}-{e.normalizer}")
def test_parts_of_groups_give_the_kernels_coefficients(estimator: Estimator, spread: float) -> None:
    found, expected = (f(estimator, *rows(spread)) for f in (in_parts, whole))
    size = float(expected.abs().max())
    assert size > 0
    assert_near(found, expected, scale=size)
    single = split_group_coefficient(estimator, batch_of(*rows(spread)[1:]), rows(spread)[0], G)
    assert_near(single, expected, scale=size)


@pytest.mark.parametrize("name", ["opob", "opob_leave_one_out"])
def test_parts_agree_at_thousands_of_nats(name: str) -> None:
    """Truncated from above, free to vanish below: whole groups thousands of nats apart."""
    group, here, columns = rows(1.0)
    columns["log_ratio"] = columns["log_ratio"] - 3000.0 * group
    estimator = Estimator(Weighting("truncate", cap=8.0), name)
    sums = part_sums(estimator, batch_of(here, columns), group, G)
    groups = Groups.of(group)
    kernel = Estimator(Weighting("truncate", cap=8.0), "opob").baseline_value(
        Batch(
            reward=groups.lift(columns["reward"]),
            log_ratio=groups.lift(columns["log_ratio"]),
            scores=ScoreNorms(groups.lift(columns["norm"])),
            measure=sample_measure(groups.lift(here))[0],
            unit=sample_measure(groups.lift(here))[1],
        )
    )[:, 0]
    assert_near(sums.weighted_mean(), kernel)
    assert bool((sums.weight > 0).all())  # no group lost its weights to underflow


def test_merge_is_associative_commutative_and_has_a_neutral_element() -> None:
    group, here, columns = rows(50.0)
    a, b, c = (
        group_sums(columns["reward"][p], columns["log_ratio"][p], group[p], G, here[p])
        for p in (slice(0, 9), slice(9, 10), slice(10, N))
    )
    left, right, swapped = a.merge(b).merge(c), a.merge(b.merge(c)), c.merge(a).merge(b)
    for x, y, z in zip(left, right, swapped, strict=True):
        assert_near(x, y)
        assert_near(x, z)
    empty = group_sums(columns["reward"][:0], columns["log_ratio"][:0], group[:0], G)
    for neutral in (empty, nothing_like(a)):
        for merged in (a.merge(neutral), neutral.merge(a)):
            assert all(torch.equal(x, y) for x, y in zip(merged, a, strict=True))


def test_equal_rewards_have_no_spread_however_they_are_split() -> None:
    reward = torch.full((37,), 123.4, dtype=torch.float64)
    group, log_a = torch.zeros(37, dtype=torch.long), torch.zeros(37, dtype=torch.float64)
    total = nothing_like(group_sums(reward[:1], log_a[:1], group[:1], 1))
    for start, stop in ((0, 3), (3, 10), (10, 37)):
        total = total.merge(group_sums(reward[start:stop], log_a[start:stop], group[start:stop], 1))
    assert total.reward_std().tolist() == [0.0]
    naive = (reward.square().mean() - reward.mean() ** 2).abs().sqrt()
    assert float(naive) > 1e-7  # E[R^2] - E[R]^2 would have made an advantage of rounding


def test_leave_one_out_keeps_its_digits_beside_a_dominating_sample() -> None:
    log_a = torch.tensor([0.0, 60.0, 1.0, -0.5], dtype=torch.float64)
    reward, group = torch.tensor([1.0, 5.0, 2.0, 4.0], dtype=torch.float64), torch.zeros(4, dtype=torch.long)
    nothing = nothing_like(group_sums(reward, log_a, group, 1))
    found = moments.weighted_mean_of_others(reward, log_a, group, nothing)
    others = [0, 2, 3]
    expected = (log_a[others].exp() * reward[others]).sum() / log_a[others].exp().sum()
    assert float(found[1]) == near(float(expected))
    total = group_sums(reward, log_a, group, 1)
    own = torch.exp(log_a - total.log_scale)
    by_subtraction = (total.weighted_reward - own * reward) / (total.weight - own)
    assert float(by_subtraction[1]) != near(float(expected), allow=SINGLE)  # NaN is wrong too


def test_others_without_weight_leave_their_plain_mean_and_absent_rows_none() -> None:
    no_weight = -math.inf
    log_a = torch.tensor([0.0, no_weight, no_weight, no_weight, 1.0], dtype=torch.float64)
    reward = torch.tensor([1.0, 2.0, 4.0, 900.0, 7.0], dtype=torch.float64)
    group, here = torch.tensor([0, 0, 0, 0, 1]), torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0])
    nothing = nothing_like(group_sums(reward, log_a, group, 2))
    found = moments.weighted_mean_of_others(reward, log_a, group, nothing, here)
    assert found[[0, 1, 2, 4]].tolist() == [3.0, 1.0, 1.0, 7.0]  # the mean of 2 and 4; the only weight; nobody else
    split = nothing.merge(group_sums(reward[2:4], log_a[2:4], group[2:4], 2, here[2:4]))
    first = moments.weighted_mean_of_others(reward[:2], log_a[:2], group[:2], split, here[:2])
    assert first.tolist() == [3.0, 1.0]


def test_gathering_on_one_process_is_the_kernel() -> None:
    group, here, columns = rows()
    estimator = Estimator(Weighting("self_normalize"), "opob_leave_one_out")
    every = gather_batch(batch_of(here, columns), group)
    found = every.local(mean_coefficient(estimator.coefficients(every.batch), every.batch))
    assert torch.equal(found, whole(estimator, group, here, columns))


def test_refusals_name_what_group_sums_cannot_express() -> None:
    group, here, columns = rows()
    batch = batch_of(here, columns)
    sums = part_sums(Estimator(baseline="opob"), batch, group, G)
    truncate = Weighting("truncate", "token", cap=2.0)
    token = Batch(reward=columns["reward"], log_ratio=torch.zeros(N, 3).double(), scores=batch.scores)

    def of(estimator: Estimator, given: Batch = batch):
        return lambda: split_group_coefficient(estimator, given, group, G)

    calls = {
        "baseline: 'opob_truncated'": of(Estimator(baseline="opob_truncated")),
        "normalizer: 'whiten'": of(Estimator(normalizer="whiten")),
        "surrogate: Clip": of(Estimator(surrogate=Clip(level="sequence"))),
        r"reference_penalty: 0\.1": of(Estimator(reference_penalty=0.1)),
        "weighting: 'self_normalize'": of(Estimator(Weighting("self_normalize"), "opob")),
        "level: token weights": of(Estimator(truncate, "opob"), token),
        "rest: baseline 'leave_one_out'": lambda: split_coefficient(
            Estimator(baseline="leave_one_out"), batch, group, sums
        ),
        r"group: 0\.\.3 is not within 0\.\.2": lambda: part_sums(Estimator(), batch, group, 3),
        "batch: rewards of shape": lambda: gather_batch(gather_batch(batch, group).batch, group),
    }
    for message, call in calls.items():
        with pytest.raises(InputError, match=message) as error:
            call()
        assert "\n" not in str(error.value)
