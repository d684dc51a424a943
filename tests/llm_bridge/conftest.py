"""Of tests of the tape and of families of models, which are many, the fast selection takes the first cases of each."""

from collections import Counter
from pathlib import Path

import pytest

MANY = ("test_scores.py", "test_hostile.py", "test_hostile_second.py", "test_families.py")
FIRST = 2
"""cases of a parametrized test that are fast; a test on its own is one"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    seen: Counter[str] = Counter()
    for item in items:
        if item.path.parent == Path(__file__).parent and item.path.name in MANY:
            test = item.nodeid.partition("[")[0]
            seen[test] += 1
            if seen[test] > FIRST:
                item.add_marker(pytest.mark.slow)
