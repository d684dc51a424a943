"""What the index of papers says of claims and experiments is what their committed summaries say."""

from dataclasses import replace

import pytest

from simulations import claims
from simulations.__main__ import main
from simulations.papers import cited, found, plain_methods
from simulations.protocol import discover
from simulations.report import claim_rows
from simulations.summaries import committed
from simulations.verdicts import shown
from vcposim.catalogue import CATALOGUE


def test_the_index_holds_each_word_and_follows_it_when_it_changes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["papers"]) == 0
    printed = capsys.readouterr().out.replace("\\|", "|")
    sections = list(committed(discover()).values())
    rows = claim_rows(sections, claims.proof_results())
    said = found(rows, sections)
    assert all(line in printed for lines in said.values() for line in lines)
    for row in rows:
        claim = claims.BY_ID[row["claim"]]
        assert bool(cited(claim.source)) == ("arXiv" in claim.source)
        for key in cited(claim.source):
            assert f"{claim.id} ({claim.title}): {row['verdict']}, {row['number']}" in said[key]
    (one,) = [s for s in sections if s.id == "best_step_size"]
    (asked,) = [v for v in one.verdicts if v.key == "beats_rivals"]
    (rival,) = [c for c in asked.comparisons if c["name"] == "GSPO"]
    (line,) = [line for line in said["gspo"] if "best_step_size" in line]
    assert line.endswith(f": {rival['word']}, {shown(rival)}")
    others = [{**c, "word": "fails" if rival["word"] == "holds" else "holds"} for c in asked.comparisons]
    turned = replace(one, verdicts=[replace(asked, comparisons=others)])  # type: ignore[arg-type]
    assert line not in found([], [turned])["gspo"]


def test_who_has_another_step_rule_is_not_spoken_of_as_the_entry() -> None:
    methods = plain_methods("best_step_size")
    assert methods["sequence TIS"] == "sequence_tis"
    assert not {"ESS only", "VCPO", "synchronous, mean", "sequence IS"} & set(methods)
    assert set(methods.values()) <= set(CATALOGUE)
    assert plain_methods("beyond_vcpo")["half n2"] == "half_optimal"
