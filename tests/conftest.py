"""One Hypothesis profile for all tests: reproducible (no random seed, no database), no deadline on a shared machine.

And the shapes that docstrings state are checked at every call (`tests/kit/shapes.py`).
"""

import gc
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings

from tests.kit import shapes
from tests.kit.browser import running

shapes.install()

settings.register_profile(
    "vcposim",
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=30,
    phases=(Phase.explicit, Phase.generate, Phase.shrink),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)
# a mutant is dead at the first example that fails: no time spent on the smallest one
settings.register_profile(
    "mutation", settings.get_profile("vcposim"), phases=(Phase.explicit, Phase.generate), max_examples=8
)
settings.load_profile("vcposim")


FIRST_CASES = {
    **dict.fromkeys(
        ("test_scores.py", "test_hostile.py", "test_hostile_second.py", "test_hostile_fourth.py", "test_chunks.py"), 2
    ),
    **{"test_families.py": 2, "test_estimators.py": 8, "test_any_estimator.py": 8, "test_mutants.py": 24},
    "test_tampering.py": 6,
}
"""files whose tests have very many cases -> how many of each are in the fast selection; a test on its own is one"""


LONG = ("test_testing.py", "test_release.py", "test_claims.py", "test_page.py", "test_site.py", "test_transformers.py")
"""files of about a minute"""


@pytest.hookimpl(tryfirst=True)  # before they are selected
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Cases beyond the first ones are slow: not each alone, but together. Files that take a minute come first.

    Several workers end together if what is left for the end is short.
    """
    items.sort(key=lambda item: item.path.name not in LONG)  # a stable sort
    seen: Counter[str] = Counter()
    for item in items:
        test = item.nodeid.partition("[")[0]
        seen[test] += 1
        if seen[test] > FIRST_CASES.get(item.path.name, len(items)):
            item.add_marker(pytest.mark.slow)


def pytest_configure(config: pytest.Config) -> None:
    """Files go to workers in their order: xdist would put those of few tests last, and these are the long ones."""
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collection_finish(session: pytest.Session) -> None:
    """What was collected lives until the end: the garbage collector need not look through it again and again.

    With millions of objects of torch, hypothesis and 6,000 tests alive, one full collection takes about a second, and
    benches that clear memory between measurements ask for a dozen.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """One headless browser a file of tests (`tests/kit/browser.py`)."""
    yield from running()
