"""The index of papers: complete, read off the catalogue, and printed by one command."""

import re

import pytest

from vcposim.catalogue import CATALOGUE, STEP_RULES
from vcposim.catalogue.papers import ELSEWHERE, LACKING, SWITCHES, UNREAD, markdown, papers
from vcposim.catalogue.references import SOURCES
from vcposim.commands.main import main
from vcposim.comparison.leaderboard import found, read


def test_every_entry_and_rule_is_under_each_of_its_papers():
    by_key = {paper.key: paper for paper in papers()}
    for name, one in CATALOGUE.items():
        assert all(name in by_key[key].entries for key in one.references)
    for name, rule in STEP_RULES.items():
        assert all(name in by_key[key].rules for key in rule.references)
    assert sum(len(paper.entries) for paper in by_key.values()) == sum(len(e.references) for e in CATALOGUE.values())
    assert set(ELSEWHERE) <= set(by_key) <= set(SOURCES)


def test_the_command_prints_a_row_a_paper(capsys: pytest.CaptureFixture[str]):
    assert main(["cite", "--index"]) == 0
    out = capsys.readouterr().out
    assert out == markdown(found()) + "\n"
    rows = [line for line in out.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == len(papers())
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 5 for row in rows)
    (row,) = [row for row in rows if "2601.22582" in row]
    assert "breaks the law 'bounded'" in row
    assert "`--estimator mc_grpo`" in row
    assert all(name in out for name in (*UNREAD, *LACKING, *CATALOGUE))
    board = read()
    assert out.count(f"on the leaderboard of {board['date']}: ") == len(board["estimators"])
    learned = board["estimators"]["mc_grpo"]["records"]["moments"]["moments"]["strings, lag 16"]["bias"]
    assert f"bias {learned:.2g} |g|" in row.replace("\\|", "|")
    added = markdown({"vcpo": ["C13 | fails"]})
    assert "C13 \\| fails" in added
    assert added.count("\n") == markdown().count("\n")


def test_what_a_trainer_does_not_meet_is_not_switched_on():
    assert SWITCHES["verl"].on("vcpo") == "algorithm.adv_estimator=vcposim/vcpo/length"
    assert SWITCHES["verl"].on("gspo") == "algorithm.adv_estimator=vcposim/gspo"
    assert SWITCHES["TRL"].on("tba") is None
    assert SWITCHES["verl"].on("tba") is not None
    assert {name for name in CATALOGUE if SWITCHES["llm_bridge.train"].on(name) is None} == {"vcpo_truncation_aware"}


@pytest.mark.parametrize("words", [["cite"], ["cite", "vcpo", "--index"]])
def test_names_or_the_index_and_not_both(words: list[str], capsys: pytest.CaptureFixture[str]):
    assert main(words) == 2
    assert capsys.readouterr().err.startswith("vcposim: error: cite: give names of the catalogue")
