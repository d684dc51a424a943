"""Every planted error dies by the law named for it, and the true function lives by the same law."""

import pytest

from tests.kit.mutants import MUTANTS, Mutant
from tests.kit.properties import LAWS


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: f"{m.name}--{m.killer}")
def test_mutant_dies(mutant: Mutant):
    law = LAWS[mutant.killer]
    with pytest.raises(AssertionError):
        law.run(mutant.version, examples=100, shrink=False)


def test_every_law_kills():
    """A law that no mutant dies by is not known to be able to fail."""
    idle = LAWS.keys() - {m.killer for m in MUTANTS}
    assert not idle, f"plant a mutant in tests/kit/mutants.py for: {', '.join(sorted(idle))}"


def test_names_are_unique():
    assert len({m.name for m in MUTANTS}) == len(MUTANTS) >= 15
