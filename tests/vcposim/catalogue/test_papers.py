"""The index of papers: complete, read off the catalogue, and printed by one command."""

import re
from pathlib import Path

import pytest

from vcposim.catalogue import CATALOGUE, STEP_RULES
from vcposim.catalogue.papers import ELSEWHERE, LACKING, UNREAD, markdown, papers
from vcposim.catalogue.references import SOURCES
from vcposim.catalogue.trainers import SWITCHES
from vcposim.commands.main import main
from vcposim.comparison.leaderboard import found, read

ASKED = {
    "CPPO": ("cppo",),
    "DRPO": ("drpo",),
    "CTPO, and its length-adaptive release": ("ctpo", "ctpo_released", "ctpo_geometric"),
    "P3O, failing closed and as released": ("p3o", "p3o_released"),
    "P4O": ("p4o",),
    "Delta-L": ("delta_l",),
    "Kimi k1.5, DRO": ("kimi_k15", "kimi_k15_token"),
    "A*-PO": LACKING,
    "SAPO": ("sapo",),
    "LUSPO": ("luspo",),
    "GEPO": ("gepo",),
    "GEPO, group entropy": UNREAD,
    "KPO": ("kpo",),
    "AGRO": UNREAD,
    "MaxRL": ("maxrl",),
    "ReMax": LACKING,
    "BAPO": ("bapo",),
    "R2VPO": UNREAD,
    "VACO": UNREAD,
    "clip-cov": ("clip_cov",),
    "A-3PO": ("a3po", "a3po_uncorrected"),
    "per-decision IS": ("prefix_is",),
    "multiple importance sampling": LACKING,
    "max-k3": ("max_k3_mask",),
    "TRPL": UNREAD,
    "MC-GRPO": ("mc_grpo",),
    "AIS": UNREAD,
    "MinPRO": ("minpro",),
    "DISPO": ("dispo",),
    "mu-GRPO": UNREAD,
    "prime-rl's IPO": ("prime_rl_ipo",),
    "distributional IPO": LACKING,
    "staleness law": ("staleness",),
    "length signal": ("length_signal",),
    "P3O cap as a step rule": ("token_ess",),
}
"""a method that was asked for -> entries or step rules, or the table that says why there is none"""


@pytest.mark.parametrize("method", ASKED)
def test_what_was_asked_for_is_there_or_the_log_says_why_not(method: str):
    answer = ASKED[method]
    if isinstance(answer, tuple):
        assert all(name in CATALOGUE or name in STEP_RULES for name in answer)
        return
    assert any(key.startswith(method) for key in answer)
    log = (Path(__file__).parents[3] / "simulations" / "LOG.md").read_text()
    _, about = log.split("## 2026-11-28: estimators of 2025 and 2026 in the catalogue")
    known = {"multiple importance sampling": "balance-heuristic IS", "GEPO, group entropy": "GEPO"}
    assert known.get(method, method) in about.split("\n## ")[0]


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
