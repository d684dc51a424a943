"""A comparison is the same however it was computed, and says no more than seeds can bear."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binom, ttest_1samp

from simulations.methods import at_own_best
from tests.kit.statistical import assert_near
from vcposim.commands.main import main
from vcposim.comparison import leaderboard
from vcposim.comparison.design import REFERENCE, SIZES, LawsSetting
from vcposim.comparison.measure import measured
from vcposim.comparison.page import page
from vcposim.comparison.result import comparison, report_json
from vcposim.comparison.run import Folder, fingerprint, sweep
from vcposim.comparison.statistics import LEVEL, difference, holm, own_best, profile, ranking, verdict
from vcposim.errors import InputError

TINY = SIZES["tiny"]
ORACLE = f"{Path(__file__).with_name('newcomers.py')}:oracle"
ESTIMATORS = ("vcpo", "dr_grpo", ORACLE)
in_process = partial(ThreadPoolExecutor, 1)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """Everything by one worker at once."""
    folder = Folder(tmp_path_factory.mktemp("whole") / "run", ESTIMATORS, TINY)
    folder.start()
    assert sweep(folder, in_process) == 0
    return folder


# --- however it was computed ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_four_shards_give_the_same_bytes(tmp_path: Path, whole: Folder) -> None:
    folder = Folder(tmp_path / "run", ESTIMATORS, TINY)
    owed = []
    for shard in (3, 1, 4, 2):
        folder.start()
        owed.append(sweep(folder, in_process, shard=(shard, 4)))
    assert owed[0] > owed[1] > owed[2] > owed[3] == 0
    assert contents(folder.path) == contents(whole.path)
    found = [comparison(f, f.records(), {}, None) for f in (folder, whole)]
    assert report_json(found[0]) == report_json(found[1])
    assert page(found[0]) == page(found[1])


@pytest.mark.parametrize("other", [ESTIMATORS, ("rloo",)])
def test_shards_start_at_once_in_a_new_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: tuple[str, ...]
) -> None:
    """One was killed while it began, another is overtaken by a third while it looks whether the folder is free."""
    overtaken, first = Folder(tmp_path, ESTIMATORS, TINY), Folder(tmp_path, other, TINY)
    (tmp_path / "provenance.json.elsewhere.7.tmp").write_text('{"sche')
    look = Path.iterdir

    def looks_late(path: Path) -> Iterator[Path]:
        monkeypatch.undo()
        first.start()
        first.keep(first.units[0], {"not_judged": "for a test"})
        return look(path)

    monkeypatch.setattr(Path, "iterdir", looks_late)
    if other == ESTIMATORS:
        overtaken.start()
        assert overtaken.record(overtaken.units[0]) == {"not_judged": "for a test"}
    else:
        with pytest.raises(InputError, match="holds a comparison of other estimators"):
            overtaken.start()


def test_a_damaged_record_is_made_again(tmp_path: Path, whole: Folder) -> None:
    folder = Folder(tmp_path / "run", ESTIMATORS, TINY)
    for name, data in contents(whole.path).items():
        (folder.path / name).parent.mkdir(parents=True, exist_ok=True)
        (folder.path / name).write_bytes(data)
    cut, altered = (folder.file(unit) for unit in folder.units[:2])
    cut.write_bytes(cut.read_bytes()[:-10])
    altered.write_bytes(altered.read_bytes().replace(b"0.9", b"0.8"))
    assert len(folder.missing()) == 2
    assert sweep(folder, in_process) == 0
    assert contents(folder.path) == contents(whole.path)


@pytest.mark.slow
def test_killed_interrupted_and_resumed_is_the_same(tmp_path: Path, whole: Folder) -> None:
    out = tmp_path / "run"
    command = [sys.executable, "-m", "vcposim", "compare", *ESTIMATORS, "--alone", "--size", "tiny"]
    command += ["--workers", "1", "--out", str(out)]

    def begun(records: int) -> subprocess.Popen[str]:
        job = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(3000):
            if len(list(out.glob("records/*/*.json"))) >= records or job.poll() is not None:
                break
            time.sleep(0.02)
        return job

    killed = begun(1)
    killed.kill()
    killed.communicate()
    assert not (out / "comparison.json").exists()
    interrupted = begun(4)
    os.kill(interrupted.pid, signal.SIGINT)
    said = interrupted.communicate()[1]
    assert interrupted.returncode == 130
    assert said.count("\n") == 1
    assert "are kept in" in said
    done = begun(100)
    table = done.communicate()[0]
    assert done.returncode == 0
    assert max(map(len, table.splitlines()[:9])) <= 80
    found, want = contents(out), contents(whole.path)
    assert {name: found[name] for name in want} == want
    again = comparison(whole, whole.records(), {}, None)
    assert found["comparison.json"].decode() == report_json(again)
    assert found["comparison.html"].decode() == page(again)


@pytest.mark.parametrize("name", ["vcpo", "gspo"])
def test_a_smaller_size_is_a_part_of_a_larger(name: str) -> None:
    small = replace(TINY.learning()[0], updates=12)
    large = replace(next(s for s in SIZES["full"].learning() if s.name == small.name), updates=12)
    assert leaderboard._within(small, large)
    assert leaderboard._part(measured(name, large), small, large) == measured(name, small)


# --- what is asked wrongly --------------------------------------------------------------------------------------------


def test_what_cannot_be_measured_says_why(whole: Folder) -> None:
    row = next(r for r in comparison(whole, whole.records(), {}, None)["estimators"] if r["name"] == ORACLE)
    assert row["words"]["own"] == row["words"]["common"] == "not judged"
    assert "oracle" in row["not_judged"][TINY.regimes[0].name]
    assert row["words"]["unbiased"] == "holds if"  # a constant baseline, without ratios: on policy
    assert "summary" in row
    assert not row["summary"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["vcpo", "--shard", "5/4"], "--shard: '5/4' is no part of the work"),
        (["vcpo", "--alone", "--scheduler", "nowhere"], "--scheduler: "),
        (["vcpo", "--workers", "0"], "--workers: 0 is less than 1"),
        (["vcpoo"], "did you mean 'vcpo'"),
        (["nowhere.py:mine"], "there is no file nowhere.py"),
        (["vcpo", "--json", "--html"], "not with --json"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str],
    says: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["compare", *arguments]) == 2
    said = capsys.readouterr().err
    assert says in said
    assert said.count("\n") == 1


def test_another_comparison_in_the_folder_is_refused(whole: Folder) -> None:
    for other, says in (
        (Folder(whole.path, ("vcpo",), TINY), "other estimators"),
        (Folder(whole.path, ESTIMATORS, SIZES["quick"]), "another size"),
        (Folder(whole.path.parent, ESTIMATORS, TINY), "holds no comparison"),
    ):
        with pytest.raises(InputError, match=says):
            other.start()


def test_a_changed_function_is_another_estimator(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("mine = lambda batch: batch.reward\n")
    before = fingerprint(f"{file}:mine")
    file.write_text("mine = lambda batch: 2 * batch.reward\n")
    assert fingerprint(f"{file}:mine") != before
    assert fingerprint("vcpo") != fingerprint("vcpo_leave_one_out")


# --- the leaderboard --------------------------------------------------------------------------------------------------


def test_the_leaderboard_is_of_these_settings_and_this_source() -> None:
    board = leaderboard.read()
    standing = leaderboard.standing(TINY)
    assert len(standing) > 50
    assert board["settings_sha256"] == SIZES[board["size"]].digest()
    unit = Folder(Path("nowhere"), (), TINY, witness=True).witness_unit()
    anew = measured(REFERENCE, unit.setting)
    leaderboard.require_same_source(anew, standing[REFERENCE][unit.setting.name])
    wrong = {"average": (np.array(anew["average"]) - 0.05).tolist()}
    for broken in (wrong, {"not_judged": "it fails"}):
        with pytest.raises(InputError, match="not paired"):
            leaderboard.require_same_source(broken, standing[REFERENCE][unit.setting.name])


def test_a_leaderboard_of_other_settings_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vcposim.comparison.design.VERSION", 0)
    leaderboard.read.cache_clear()
    with pytest.raises(InputError, match="other settings"):
        leaderboard.read()
    leaderboard.read.cache_clear()


@pytest.mark.slow
def test_new_entries_join_the_leaderboard_and_the_others_stay(
    tmp_path: Path, whole: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = leaderboard.write("2026-01-01", [whole.path], tmp_path / "board.json")
    monkeypatch.setattr(leaderboard, "read", lambda: json.loads(path.read_text()))
    before = path.read_text().splitlines()
    assert before[0:2] == ["{", ' "date": "2026-01-01",']
    more = Folder(tmp_path / "more", ("gspo", REFERENCE), TINY)
    more.start()
    with pytest.raises(InputError, match="units are missing"):
        leaderboard.extend("2026-02-02", [more.path], path)
    assert sweep(more, in_process) == 0
    assert path.read_text().splitlines() == before
    leaderboard.extend("2026-02-02", [more.path], path)
    board = leaderboard.read()
    assert list(board["estimators"]) == ["vcpo", REFERENCE, "gspo"]  # a stranger's row is nobody's to keep
    assert board["date"] == board["estimators"]["gspo"]["made"]["date"] == "2026-02-02"
    assert "made" not in board["estimators"]["vcpo"]
    assert next(line for line in before if line.startswith('  "vcpo"')) in path.read_text().splitlines()
    assert leaderboard.standing(TINY)["gspo"] == leaderboard.short(more.records()["gspo"])

    alone = Folder(tmp_path / "alone", ("gspo",), TINY)
    alone.start()
    for unit in alone.units:
        record = more.record(unit)
        assert record is not None
        alone.keep(unit, record)
    with pytest.raises(InputError, match="dr_grpo is missing, by which runs are known to be paired"):
        leaderboard.extend("2026-02-02", [alone.path], path)
    (unit,) = [u for u in more.units if u.estimator == REFERENCE and u.setting.part == "learning"]
    record = more.record(unit)
    assert record is not None
    more.keep(unit, {**record, "average": (np.array(record["average"]) - 0.05).tolist()})  # type: ignore[typeddict-item]
    with pytest.raises(InputError, match="not paired"):
        leaderboard.extend("2026-02-02", [more.path], path)


# --- what seeds can bear ----------------------------------------------------------------------------------------------


def test_own_best_is_chosen_on_the_other_half() -> None:
    rng = np.random.default_rng(1)
    for _ in range(20):
        average = rng.random((4, 6))
        records = [
            {"method": "m", "step_size": e, "seed": s, "average": float(average[e, s])}
            for e in range(4)
            for s in range(6)
        ]
        want = {r["seed"]: r["average"] for r in at_own_best(records, "m")}
        assert own_best(average)[0].tolist() == [want[s] for s in range(6)]


def test_a_difference_is_students() -> None:
    rng = np.random.default_rng(2)
    a, b = rng.random((2, 9))
    found, want = difference(a, b, 0.1), ttest_1samp(a - b, 0.1)
    interval = want.confidence_interval()
    assert_near(list(found), [np.mean(a - b), interval.low, interval.high, want.pvalue])
    assert difference(a, a, 0.1).p is None  # nothing left to chance
    assert difference(a[:1], b[:1], 0.1).p == 1.0  # one seed decides nothing


def test_sure_words_are_wrong_together_as_often_as_said() -> None:
    """At the boundary every sure word is wrong; a page of 6 has one with probability at most `LEVEL`.

    False-fail rate 1e-9. Without Holm's correction the rate is 1 - 0.95^6 = 0.26, which must be found out.
    """
    rng, pages, rivals, seeds = np.random.default_rng(3), 600, 6, 8
    d = rng.standard_normal((pages, rivals, seeds)) + 0.02
    p = [[difference(x, np.zeros(seeds), 0.02).p or 1.0 for x in one] for one in d]
    most = int(binom.isf(1e-9, pages, LEVEL))
    assert sum(min(holm(row)) < LEVEL for row in p) <= most
    assert sum(min(row) < LEVEL for row in p) > most


def test_ranks_follow_scores_and_their_intervals_the_seeds() -> None:
    rng = np.random.default_rng(4)
    noise = 0.01 * rng.standard_normal((1, 3, 10))
    values = np.array([0.5, 0.7, 0.7, 0.3])[:, None, None] + noise  # the same luck for all: ranks are certain
    found = ranking(values)
    assert [r.value for r in found.rank] == [3, 1, 1, 4]
    assert all(r.low == r.value == r.high for r in found.rank)
    alone = ranking(np.array([0.5, 0.5])[:, None, None] + 0.05 * rng.standard_normal((2, 3, 10)))
    assert all(r.low == 1 and r.high == 2 for r in alone.rank)  # luck of one's own: they are not
    assert profile(values[0]) == sorted(profile(values[0]), reverse=True)
    assert profile(np.full((2, 2), 0.5))[:21] == [1.0] * 20 + [0.0]


@pytest.mark.parametrize(
    ("words", "over", "says"),
    [
        (["holds", "holds"], "all", "holds"),
        (["holds", "not judged"], "all", "undecided"),
        (["holds", "fails"], "all", "fails"),
        (["holds", "fails", "undecided"], "where", "holds if"),
        (["fails", "undecided"], "where", "fails"),
        (["holds", "undecided"], "where", "undecided"),
        (["not judged"], "where", "not judged"),
        ([], "all", "not judged"),
    ],
)
def test_a_word_for_many(words: list[str], over: str, says: str) -> None:
    assert verdict(words, over=over) == says


@pytest.mark.slow
def test_a_function_says_what_it_claims(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "claiming.py"
    file.write_text("def plain(batch):\n    return batch.reward\n\n\nplain.claims = ('unbiased', 'reward_scale')\n")
    found = measured(f"{file}:plain", LawsSetting())
    assert found["laws"]["unbiased"] == "broken"  # it has no ratios
    assert found["laws"]["reward_scale"] == "holds"
    assert found["laws"]["shift"] == "not claimed: broken"
    assert main(["check", f"{file}:plain", "--examples", "5", "--json"]) == 1  # the same claims, by the other command
    assert {"unbiased"} == {
        one["law"] for one in json.loads(capsys.readouterr().out)["laws"] if one["status"] == "violated"
    }
    for claims, says in (("'unbiasedd'", "claims: unknown name 'unbiasedd'"), ("7", "claims: 7 is no name")):
        file.write_text(f"def plain(batch):\n    return batch.reward\n\n\nplain.claims = {claims}\n")
        for command in ("check", "compare"):
            assert main([command, f"{file}:plain"]) == 2  # before any work
            assert says in capsys.readouterr().err
