"""Lag is a plan: every slot is sampled once, at the version that the law says."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("torch")
pytest.importorskip("accelerate")

from llm_bridge.training.schedule import Schedule, Slot
from tests.kit.statistical import assert_mean_equals
from vcposim.learning.lags import LAG_LAWS, Lag

UPDATES = 12


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(LAG_LAWS), st.integers(0, 6), st.integers(1, 4), st.integers(0, 2**31))
def test_every_slot_is_sampled_once_at_a_lag_of_the_law(law: str, k: int, groups: int, seed: int) -> None:
    schedule = Schedule(Lag(k, law), groups, seed, last=UPDATES)
    begun = {slot: version for version in range(UPDATES) for slot in schedule.due(version)}
    assert sum(len(schedule.due(version)) for version in range(UPDATES)) == len(begun)
    assert set(begun) == {Slot(u, g) for u in range(UPDATES) for g in range(groups)}
    for (update, group), version in begun.items():
        lag = update - version
        assert lag == schedule.lags(update)[group]
        assert 0 <= lag <= min(k, update)
        assert law == "uniform" or lag == min(k, update)


def test_a_longer_plan_begins_as_the_shorter_one() -> None:
    law = Lag(3, "uniform")
    longer, shorter = Schedule(law, 2, seed=1), Schedule(law, 2, seed=1, last=5)
    for version in range(5):
        assert [slot for slot in longer.due(version) if slot.update < 5] == shorter.due(version)


def test_problems_do_not_depend_on_the_lag() -> None:
    slots = [Slot(3, 1), Slot(0, 0)]
    assert [Schedule(Lag(k), 2, seed=0).problem(s) for k in (0, 5) for s in slots] == [7, 0, 7, 0]


def test_uniform_lags_are_uniform() -> None:
    """A law that never draws the largest lag is off by 0.2."""
    schedule = Schedule(Lag(4, "uniform"), groups=8, seed=0)
    drawn = np.concatenate([schedule.lags(update) for update in range(4, 504)])
    assert_mean_equals(drawn.reshape(-1, 1) == np.arange(5), 0.2, detect=0.1, support=(0, 1))
