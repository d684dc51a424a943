"""Estimates cover the truth at their stated rate, words follow rules, and what is committed agrees with itself."""

import io
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from simulations import claims
from simulations.__main__ import main
from simulations.log import END, NUMBER, START, computed, numbers_without_a_source, rewritten
from simulations.protocol import discover, plain, settings_of
from simulations.report import claim_rows, claim_table, gathered
from simulations.stats import (
    DIFFERENCE,
    UNIT,
    Estimate,
    holm,
    improvement,
    of_replicates,
    of_seeds,
    rate,
    rate_difference,
    resampled,
)
from simulations.summaries import (
    Section,
    against_full,
    committed,
    dump,
    of_settings,
    once_each,
    read,
)
from simulations.verdicts import Comparison, Question, Rule, Verdict, judge, where
from tests.kit.statistical import near
from vcposim.errors import InputError

ROOT = Path(__file__).parents[2]
TRIALS = 400
MISSES = 36
"""of 400 intervals of 95%, 20 are expected to miss; more than 36 have a probability below 4e-4"""


# --- intervals --------------------------------------------------------------------------------------------------------


def test_runs_of_a_seed_do_not_count_as_independent() -> None:
    """12 seeds with 20 runs each; seeds differ by as much as runs do. Clustered intervals cover, naive ones do not."""
    missed = naive = 0
    for trial in range(TRIALS):
        rng = np.random.default_rng(trial)
        effect = rng.normal(size=12)
        runs = [(seed, effect[seed] + rng.normal()) for seed in range(12) for _ in range(20)]
        found, wrong = of_seeds(runs), of_seeds((i, v) for i, (_, v) in enumerate(runs))
        assert found is not None
        assert wrong is not None
        missed += not found.interval.low < 0 < found.interval.high
        naive += not wrong.interval.low < 0 < wrong.interval.high
    assert missed <= MISSES
    assert naive > TRIALS / 4


@pytest.mark.parametrize("scale", ["log", "bounded"])
def test_intervals_on_other_scales_cover(scale: str) -> None:
    missed = 0
    for trial in range(TRIALS):
        rng = np.random.default_rng([7, trial])
        if scale == "log":
            truth, found = 1.0, of_seeds(enumerate(np.exp(0.5 * rng.normal(size=10))), scale="log")
        else:
            truth, found = 0.5, of_seeds(enumerate(rng.beta(2, 2, size=20)), bounds=UNIT)
        assert found is not None
        missed += not found.interval.low < truth < found.interval.high
    assert missed <= MISSES


def test_a_bootstrap_over_seeds_covers() -> None:
    missed = 0
    for trial in range(TRIALS):
        x = np.random.default_rng([9, trial]).normal(size=10)
        found = of_replicates(float(x.mean()), x[resampled(10, 200)].mean(axis=1), 10)
        assert found is not None
        missed += not found.interval.low < 0 < found.interval.high
    assert missed <= MISSES


def test_improvement_is_that_of_the_runs_drawn() -> None:
    """The slow twin puts the runs of the drawn seeds together; seeds have one to three runs, some of them equal."""
    rng = np.random.default_rng(3)
    first, second = ([rng.integers(5, size=rng.integers(1, 4)) for _ in range(6)] for _ in range(2))
    drawn = resampled(6, 20)
    times = np.array([np.bincount(row, minlength=6) for row in drawn])
    for found, row in zip(improvement(first, second, times), drawn, strict=True):
        a, b = (np.concatenate([runs[i] for i in row]) for runs in (first, second))
        assert found == near(np.mean((a[:, None] > b) + 0.5 * (a[:, None] == b)))


def test_differences_of_rates_cover_also_where_nothing_is_lost() -> None:
    missed = 0
    for trial in range(TRIALS):
        rng = np.random.default_rng([8, trial])
        found = rate_difference((s, rng.random() < 0.3, rng.random() < 0.1) for s in range(48))
        assert found is not None
        missed += not found.interval.low < 0.2 < found.interval.high
    assert missed <= MISSES
    none = rate_difference((s, False, False) for s in range(48))
    assert none is not None
    assert none.interval.low < -0.02  # nothing lost in 48 pairs is no certainty
    assert none.interval.high > 0.02


@given(
    st.lists(st.floats(0, 1), min_size=2, max_size=20),
    st.sampled_from([UNIT, DIFFERENCE]),
)
def test_bounded_quantities_have_bounded_intervals(values: list[float], bounds: tuple[float, float]) -> None:
    found = of_seeds(enumerate(values), bounds=bounds)
    assert found is not None
    low, value, high = found.interval
    assert bounds[0] - 1e-9 <= low <= value + 1e-9
    assert value - 1e-9 <= high <= bounds[1] + 1e-9


def test_rates_are_never_certain() -> None:
    assert 0 < rate(0, 40).interval.low < rate(0, 40).interval.high < 0.2


def test_one_seed_gives_no_interval() -> None:
    assert of_seeds([(0, 1.0), (0, 2.0)]) is None
    assert rate_difference([(0, True, False)]) is None
    assert of_replicates(0.5, [0.4, 0.6], 1) is None


def test_the_seeds_needed_do_decide() -> None:
    """With as many seeds as it asks for, about four in five studies of that size decide."""
    first = of_seeds(enumerate(np.random.default_rng(3).normal(0.3, 1, size=20)))
    assert first is not None
    truth, error = Estimate(0.3, 1 / np.sqrt(20), 20), 0.0
    needed = truth.needed(error)
    assert needed is not None
    decided = 0
    for trial in range(TRIALS):
        found = of_seeds(enumerate(np.random.default_rng([4, trial]).normal(0.3, 1, size=needed)))
        assert found is not None
        decided += found.p(0.0) < 0.05
    assert 0.72 < decided / TRIALS < 0.88
    fewer, more = (Estimate(0.3, 1 / np.sqrt(n), n).power(0.0, 0.3) for n in (needed - 3, needed + 3))
    assert fewer < 0.8 < more  # Student's interval, which it is judged by, takes about two seeds more than a normal's


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_is_between_nothing_and_bonferroni(p: list[float]) -> None:
    adjusted = holm(p)
    assert all(a <= b <= min(1, len(p) * a) + 1e-12 for a, b in zip(p, adjusted, strict=True))
    order = np.argsort(p, kind="stable")
    assert list(np.array(adjusted)[order]) == sorted(adjusted)


# --- words ------------------------------------------------------------------------------------------------------------


def asked(*values: tuple[float, float], over: str = "all", side: str = ">", margin: float = 0.1) -> Verdict:
    comparisons = [Comparison(f"place {i}", Estimate(v, e, 50)) for i, (v, e) in enumerate(values)]
    return judge([Question("q", "C4", "s", Rule("gain", side, 0.0, margin), comparisons, over)])[0]


@pytest.mark.parametrize(
    ("values", "over", "word"),
    [
        ([(0.5, 0.05)], "all", "holds"),
        ([(0.5, 0.05), (0.4, 0.05)], "all", "holds"),
        ([(-0.5, 0.05)], "all", "fails"),
        ([(0.05, 0.01)], "all", "fails"),  # a gain, but one that does not matter
        ([(0.12, 0.05)], "all", "undecided"),
        ([(0.5, 0.05), (0.12, 0.05)], "all", "undecided"),
        ([(0.5, 0.05), (-0.5, 0.05)], "all", "fails"),
        ([(0.5, 0.05), (-0.5, 0.05)], "where", "holds if"),
        ([(0.5, 0.05), (0.12, 0.05)], "where", "undecided"),
        ([(0.12, 0.05), (-0.5, 0.05)], "where", "fails"),
        ([], "all", "not judged"),
    ],
)
def test_words_follow_the_rule(values: list[tuple[float, float]], over: str, word: str) -> None:
    assert asked(*values, over=over).verdict == word
    mirrored = asked(*((-v, e) for v, e in values), over=over, side="<", margin=-0.1)
    assert mirrored.verdict == word


def test_two_names_for_one_thing_are_not_the_number_shown() -> None:
    """At lag 0 a ratio is 1: surely no difference, and no news where others fail too."""
    same, worse, proved = (0.0, 0.0), (-0.3, 0.02), (-0.1, 0.0)
    assert asked(same, worse, over="where").decided_by == 1
    assert asked(worse, same, proved, over="where").decided_by == 2
    assert asked(same, over="where").decided_by == 0


def test_undecided_says_how_many_seeds_would_decide() -> None:
    found = asked((0.2, 0.08))
    assert found.verdict == "undecided"
    assert "seeds would decide (has 50)" in found.number
    assert found.comparisons[0]["needed"] > 50


def test_many_comparisons_need_more() -> None:
    """p = 0.02 decides alone, and not among ten."""
    alone, among = (Estimate(0.1 + 2.4 * 0.05, 0.05, 50) for _ in range(2))
    q = Question("q", "C4", "s", Rule("gain", ">", 0.0, 0.1), [Comparison("a", alone)])
    others = replace(q, key="r", comparisons=[Comparison(str(i), Estimate(0.1, 0.05, 50)) for i in range(9)])
    assert judge([q])[0].verdict == "holds"
    assert judge([replace(q, comparisons=[Comparison("a", among)]), others])[0].verdict == "undecided"


def test_two_questions_of_one_key_are_refused() -> None:
    q = Question("q", "C4", "s", Rule("gain", ">", 0.0), [])
    with pytest.raises(InputError, match="share a key"):
        judge([q, q])


@given(st.dictionaries(st.tuples(*[st.sampled_from("ab")] * 3), st.sampled_from(("holds", "fails", "undecided"))))
def test_a_condition_covers_its_places_and_no_other(words: dict[tuple[str, str, str], str]) -> None:
    places = {tuple(f"{factor} {value}" for factor, value in zip("xyz", at, strict=True)): w for at, w in words.items()}
    judged = [{"name": f"{at[0]}: {at[1]}, {at[2]}", "word": w} for at, w in places.items()]
    said = [set(c.split(" and ")) for c in where(judged, "holds").split(" or ") if c]
    assert {at for at in places if any(c <= set(at) for c in said)} == {at for at, w in places.items() if w == "holds"}


def test_a_condition_is_as_short_as_it_can_be() -> None:
    judged = [
        {
            "name": f"rewards in {{0, {r}}}, {tail} tail, k = {k}",
            "word": "holds" if tail == "heavy" and k > 1 else "fails",
        }
        for r in (1, 2)
        for tail in ("heavy", "even")
        for k in (1, 2, 4)
    ]
    assert where(judged, "holds") == "heavy tail and k = 2 or heavy tail and k = 4"
    assert where(judged, "fails") == "even tail or k = 1"
    assert where([*judged, {"name": "rewards in {0, 3}, heavy tail, k = 1", "word": "undecided"}], "fails").startswith(
        "even tail or rewards in {0, 1} and k = 1"
    )


# --- sizes ------------------------------------------------------------------------------------------------------------


def section(size: str, *words: str) -> Section:
    verdicts = [Verdict("C4", "s", w, "1", "x" if w == "holds if" else "", key=str(i)) for i, w in enumerate(words)]
    return Section("toy", "q", ("C4",), size, {}, 1, 1, verdicts)


def test_a_reduced_run_agrees_or_is_undecided() -> None:
    words = ("holds", "fails", "holds if", "undecided", "not judged")
    full = section("full", "holds", "holds", "fails", "holds", "holds")
    assert [v.verdict for v in against_full(section("reduced", *words), full).verdicts] == [
        "holds",
        "undecided",
        "undecided",
        "undecided",
        "not judged",
    ]
    alone = against_full(section("reduced", *words), None).verdicts
    assert {v.verdict for v in alone} == {"undecided", "not judged"}
    (one,) = gathered([section("reduced", "fails"), section("full", "holds")], {}).sections
    assert one.size == "full"
    assert one.beside is not None
    assert [v.verdict for v in one.beside.verdicts] == ["undecided"]


def test_a_summary_comes_back_as_it_went(tmp_path: Path) -> None:
    full = section("full", "holds", "holds if")
    (tmp_path / "toy.json").write_bytes(dump(full))
    assert committed(["toy", "other"], tmp_path) == {"toy": full}
    assert once_each([full, section("reduced", "holds")])[0].verdicts == full.verdicts
    (tmp_path / "toy.json").write_text("{}")
    with pytest.raises(InputError, match="not a summary"):
        read(tmp_path / "toy.json")


# --- what is committed ------------------------------------------------------------------------------------------------

KNOWN = discover()
SUMMARIES = committed(KNOWN)


@pytest.mark.parametrize("name", SUMMARIES)
def test_committed_summaries_are_full_runs_of_these_settings(name: str) -> None:
    summary = SUMMARIES[name]
    assert summary.size == "full"
    assert of_settings(summary, KNOWN[name], settings_of(KNOWN[name], "full"))
    keys = [v.key for v in summary.verdicts]
    assert len(set(keys)) == len(keys)
    assert summary.figures
    for v in summary.verdicts:  # the word follows from the committed comparisons by the rule beside them
        words = [c["word"] for c in v.comparisons]
        if v.verdict == "holds":
            assert set(words) == {"holds"}
        if v.verdict in ("fails", "holds if"):
            assert "fails" in words


def test_summaries_are_small() -> None:
    assert sum(p.stat().st_size for p in claims.RESULTS.glob("*.json")) < 1_000_000


def test_claims_are_twenty_rows_of_the_form_promised(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["claims", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["claim"] for row in rows] == [f"C{n}" for n in range(1, 21)]
    fields = ["claim", "statement", "verdict", "number", "interval", "witnesses", "decided_by"]
    assert all(list(row) == fields for row in rows)
    assert all({w["kind"] for w in row["witnesses"]} == {"proof", "exact", "simulated", "transformer"} for row in rows)


@pytest.mark.parametrize("width", [80, 100, 140])
def test_a_terminal_cuts_nothing_of_the_claims(width: int) -> None:
    """Every cell comes back whole from what is printed, names of experiments and questions unbroken."""
    rows = claim_rows(list(SUMMARIES.values()), claims.proof_results())
    told = io.StringIO()
    Console(file=told, width=width).print(claim_table(rows, width))
    lines = told.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    assert "…" not in told.getvalue()
    for row in rows:
        for part in (row["decided_by"] or "").split("/"):
            assert any(re.search(rf"(?<![\w.]){re.escape(part)}(?![\w.])", line) for line in lines), part
    words = {word for line in lines for word in line.replace("│", " ").replace("┃", " ").split()}
    for row in rows:
        assert set(claims.BY_ID[row["claim"]].title.split()) <= words
        assert set(row["number"].split()) <= words
    assert {"Claim", "Verdict", "What", "is", "claimed", "Number", "that", "decides"} <= words


def test_claims_follow_their_witnesses() -> None:
    """No word is written by hand: turn every verdict and every proof round, and every decided claim turns."""
    turned = {"holds": "fails", "fails": "holds", "holds if": "undecided"}
    sections = list(SUMMARIES.values())
    proofs = claims.proof_results()
    before = {row["claim"]: row["verdict"] for row in claim_rows(sections, proofs)}
    other = [
        replace(s, verdicts=[replace(v, verdict=turned.get(v.verdict, v.verdict), condition="") for v in s.verdicts])
        for s in sections
    ]
    failed = {name: {**row, "verdict": "FAILED"} for name, row in proofs.items()}
    after = {row["claim"]: row["verdict"] for row in claim_rows(other, failed)}
    assert all(after[c] != word for c, word in before.items() if word in ("holds", "fails"))
    beside = [replace(s, verdicts=[replace(v, beside=True) for v in s.verdicts]) for s in sections]
    assert [r["verdict"] for r in claim_rows(beside, proofs)] == [r["verdict"] for r in claim_rows([], proofs)]
    nothing = {row["verdict"] for row in claim_rows([], {})}
    assert nothing == {"not judged"}


@pytest.mark.parametrize(
    ("words", "combined"),
    [
        ([("proof", "holds"), ("simulated", "holds")], "holds"),
        ([("proof", "holds"), ("simulated", "undecided")], "holds"),
        ([("simulated", "holds"), ("transformer", "undecided")], "undecided"),
        ([("simulated", "fails"), ("transformer", "undecided")], "fails"),
        ([("proof", "holds"), ("simulated", "fails")], "holds if"),
        ([("simulated", "holds if")], "holds if"),
        ([("transformer", "not judged"), ("simulated", "undecided")], "undecided"),
        ([("transformer", "not judged")], "not judged"),
    ],
)
def test_witnesses_are_combined(words: list[tuple[str, str]], combined: str) -> None:
    assert claims.combined([claims.Witness(kind, "s", word, "t") for kind, word in words]) == combined


def test_theorems_named_by_claims_speak_of_them_and_are_committed() -> None:
    from proofs.claims import all_claims

    known = {claim.name: claim for claim in all_claims()}
    kept = claims.proof_results()
    for claim in claims.CLAIMS:
        for name in claim.proofs:
            assert claim.id in known[name].rows, name
            assert kept[name]["statement"] == known[name].statement, "python -m simulations keep FILE, of proofs --json"


def test_the_page_of_claims_is_in_step() -> None:
    text = (ROOT / "simulations" / "CLAIMS.md").read_text()
    assert text == claims.markdown(), "run: python -m simulations claims --markdown > simulations/CLAIMS.md"


# --- the log ----------------------------------------------------------------------------------------------------------

LOG = (ROOT / "simulations" / "LOG.md").read_text()


def test_a_number_that_its_source_does_not_hold_is_found() -> None:
    held = Verdict("C4", "s", "holds", "0.1234", comparisons=[{"name": "a", "value": -0.5678, "word": "holds"}])
    sections = [replace(section("full"), verdicts=[held]), replace(section("full", "holds"), id="other")]
    text = "`toy`: gain 0.12, loss 0.568 and -0.57; wrong is 0.58. Version 3.11, 0.5; 1.2e-13, 5.7e-1, 5.68e-01."
    assert numbers_without_a_source(text, sections) == ["0.58", "3.11"]
    assert numbers_without_a_source("`other` has 0.12.\n\n`toy` has 0.12.", sections) == ["0.12"]
    assert numbers_without_a_source("Nobody said 0.12.", sections) == ["0.12"]
    file = "simulations/results/async_learning.json"
    kept = committed(["async_learning"])["async_learning"].verdicts[0].comparisons[0]["low"]
    assert numbers_without_a_source(f"`{file}`: {kept:.4f}, and 123.4567", []) == ["123.4567"]
    assert numbers_without_a_source("`/etc/hosts` and `../x.md`: 0.12", []) == ["0.12"]


def test_the_numbers_of_the_log_are_held_by_their_sources() -> None:
    assert numbers_without_a_source(LOG, SUMMARIES.values()) == []


def test_a_digit_changed_in_the_log_is_found() -> None:
    """How sharp the check is: of all numbers it reads, their last digit moved by five, it finds three in four.

    The others become by chance another number of the same source.
    """
    places = found = 0
    for paragraph in LOG.partition(END)[2].split("\n\n"):
        for m in NUMBER.finditer(paragraph):
            digit = str((int(m.group()[-1]) + 5) % 10)
            spoiled = paragraph[: m.end() - 1] + digit + paragraph[m.end() :]
            places += 1
            found += numbers_without_a_source(spoiled, SUMMARIES.values()) != []
    assert places > 100
    assert found >= 0.75 * places


def test_the_computed_part_of_the_log_is_current() -> None:
    sections = list(SUMMARIES.values())
    part = computed(claim_rows(sections, claims.proof_results()), sections)
    assert rewritten(LOG, part) == LOG, "run: python -m simulations log"
    assert all(f"### {claim.id} {claim.title}" in part for claim in claims.CLAIMS)
    with pytest.raises(InputError, match="needs one line"):
        rewritten("no marks", part)
    assert rewritten(f"a {START} old {END} b", "new") == f"a {START}\n\nnew\n\n{END} b"


def test_links_of_the_log_lead_somewhere() -> None:
    for target in set(re.findall(r"\]\(([^)#]+)", LOG)):
        assert (ROOT / "simulations" / target).exists(), target
    anchors = {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in re.findall(r"^#+ (.*)$", LOG, re.M)}
    assert set(re.findall(r"\]\(#([^)]+)", LOG)) <= anchors


# --- real runs --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ablation", "best_step_size", "collapse_prediction", "ess_reliability"])
def test_a_real_reduced_run_never_contradicts_the_full_one(name: str) -> None:
    """Its own words may; what it is allowed to say is what the committed full run says, or that it does not decide."""
    experiment, full = KNOWN[name], SUMMARIES[name]
    records = [r for setting in settings_of(experiment, "reduced") for r in plain(experiment.run(setting), name)]
    own = experiment.analyse(records).verdicts
    reduced = Section(name, experiment.question, experiment.claims, "reduced", {}, 1, len(records), own)
    words = {v.key: v.verdict for v in full.verdicts}
    (shown,) = gathered([reduced], {name: full}).sections
    assert shown.size == "full"
    assert shown.beside is not None
    assert {v.key for v in own} == set(words)
    for v in shown.beside.verdicts:
        assert v.verdict in (words[v.key], "undecided", "not judged")
    alone = gathered([reduced], {}).sections[0]
    assert {v.verdict for v in alone.verdicts} <= {"undecided", "not judged"}
