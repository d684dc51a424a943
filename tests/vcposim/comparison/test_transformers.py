"""Transformers in a comparison: the same records however they were computed, and no more said than seeds can bear."""

import json
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("accelerate")

from llm_bridge.comparison import alone, config, policy, together, trained
from tests.kit.statistical import assert_near
from tests.llm_bridge.training.test_lockstep import Turns, language_model
from tests.llm_bridge.training.toys import Letters
from vcposim.commands.main import main
from vcposim.comparison import leaderboard, transformers
from vcposim.comparison.design import REFERENCE, SIZES, TransformerSetting, with_transformers
from vcposim.comparison.measure import Measured, measured
from vcposim.comparison.page import page
from vcposim.comparison.result import MeasuredByName, comparison, report_json, trained_rows
from vcposim.comparison.run import Folder, sweep
from vcposim.errors import InputError

NEWCOMERS = Path(__file__).with_name("newcomers.py")
ESTIMATORS = (f"{NEWCOMERS}:soft", f"{NEWCOMERS}:torch_soft")
SMALL = TransformerSetting(
    "letters, lag 2", "letters", 8, (0.01, 0.02), (0, 1), updates=4, lag=2, every=2, held_out=16, groups=2, group_size=4
)
in_process = partial(ThreadPoolExecutor, 1)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def only(estimators: tuple[str, ...], path: Path) -> Folder:
    """Of a tiny comparison the transformers alone, so that it is quick; the group mean's are among them."""
    folder = Folder(path, estimators, with_transformers(SIZES["tiny"]))
    folder.__dict__["units"] = [unit for unit in folder.units if isinstance(unit.setting, TransformerSetting)]
    folder.start()
    return folder


# --- what is trained --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dr_grpo", "ppo_clip", "vcpo"])
def test_runs_in_lock_step_are_the_trainers(name: str) -> None:
    """In doubles, where not one token is drawn differently: so the way an estimator is trained is no part of it."""
    setting, lm = replace(SMALL, step_sizes=(0.01,)), language_model()
    runs = [replace(config(name, setting, 0.01, seed), dtype="float64") for seed in setting.seeds]
    for task in (Letters(), Turns()):
        rate, refused = together(runs, lm, setting, task)
        for i, run in enumerate(runs):
            its_rate, its_refused = alone(run, lm, setting, task)
            assert_near(rate[:, i], its_rate)
            assert refused[:, i].tolist() == its_refused.tolist()


def test_a_function_of_ones_own_learns_what_the_entry_of_its_formula_does(tmp_path: Path) -> None:
    file = tmp_path / "centered.py"
    file.write_text("def mine(batch):\n    return batch.reward - batch.reward.mean(-1, keepdims=True)\n")
    found, entry = (trained(x, SMALL, task=Letters(), lm=language_model()) for x in (f"{file}:mine", "dr_grpo"))
    assert found == entry
    wrong = trained("reinforce", SMALL, task=Letters(), lm=language_model())
    assert wrong["start"] == entry["start"]
    assert wrong["average"] != entry["average"]
    assert np.shape(entry["average"]) == np.shape(entry["lost"]) == (2, 2)


def test_what_lock_step_does_not_read_is_trained_one_by_one() -> None:
    found = trained("decoupled_ppo", replace(SMALL, updates=3), task=Letters(), lm=language_model())
    assert np.shape(found["average"]) == (2, 2)


def test_what_transformers_cannot_be_trained_with_is_not_judged() -> None:
    (setting,) = with_transformers(SIZES["tiny"]).transformers
    found = measured("vcpo_truncation_aware", setting)
    assert "not_judged" in found
    assert "vcpo_truncation_aware" not in found["not_judged"] or found["not_judged"].count("\n") == 0


def test_a_gradient_that_is_no_number_is_counted(tmp_path: Path) -> None:
    file = tmp_path / "broken.py"
    file.write_text("def mine(batch):\n    return batch.reward * float('nan')\n")
    found = trained(f"{file}:mine", SMALL, task=Letters(), lm=language_model())
    assert found["refused"] == [[4, 4], [4, 4]]


def test_no_run_changes_what_others_begin_from() -> None:
    (setting,) = with_transformers(SIZES["tiny"]).transformers
    before = trained("dr_grpo", replace(setting, updates=2, every=1, held_out=8, seeds=(0,)))["start"]
    trained("decoupled_ppo", replace(setting, updates=2, every=1, held_out=8, seeds=(0,)))
    assert trained("vcpo", replace(setting, updates=2, every=1, held_out=8, seeds=(0,)))["start"] == before
    policy.cache_clear()


# --- however it was computed ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """Two newcomers' transformers, and the group mean's, by one worker at once."""
    folder = only(ESTIMATORS, tmp_path_factory.mktemp("whole") / "run")
    assert {unit.estimator for unit in folder.units} == {*ESTIMATORS, REFERENCE}
    assert sweep(folder, in_process) == 0
    return folder


@pytest.mark.slow
def test_shards_and_a_record_that_was_cut_short_give_the_same_bytes(tmp_path: Path, whole: Folder) -> None:
    parts = only(ESTIMATORS, tmp_path / "parts")
    assert [sweep(parts, in_process, shard=(i, 3)) for i in (3, 1, 2)] == [2, 1, 0]
    assert contents(parts.path) == contents(whole.path)
    cut = parts.file(parts.units[0])
    cut.write_bytes(cut.read_bytes()[:-5])
    assert sweep(parts, in_process) == 0
    assert contents(parts.path) == contents(whole.path)


@pytest.mark.slow
def test_the_command_goes_on_where_it_was_killed(tmp_path: Path, whole: Folder) -> None:
    out = tmp_path / "run"
    command = [sys.executable, "-m", "vcposim", "compare", ESTIMATORS[1], "--transformers", "--size", "tiny"]
    command += ["--workers", "1", "--out", str(out)]
    job = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    for _ in range(6000):
        if list(out.glob("records/*/addition*.json")) or job.poll() is not None:
            break
        time.sleep(0.02)
    job.send_signal(signal.SIGKILL)
    job.communicate()
    assert not (out / "comparison.json").exists()
    assert list(out.glob("records/*/addition*.json"))
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    *table, last = done.stdout.splitlines()
    assert max(map(len, table)) <= 80
    assert last.startswith("page: ")
    assert sum("addition" in line for line in table) >= 2  # its, and the group mean's
    records = {whole.file(unit).relative_to(whole.path).as_posix() for unit in whole.units[1:]}
    mine, want = contents(out), contents(whole.path)
    assert {name: mine[name] for name in records} == {name: want[name] for name in records}
    found = json.loads((out / "comparison.json").read_text())
    rows = {row["name"]: row for row in found["estimators"]}
    assert all("addition, lag 16" in rows[name]["transformers"] for name in (ESTIMATORS[1], REFERENCE))
    assert {"torch", "transformers"} <= set(found["packages"])
    assert '<section id="transformers">' in (out / "comparison.html").read_text()


# --- what is said of it -----------------------------------------------------------------------------------------------


def with_runs(
    values: dict[str, list[float]], tmp_path: Path, **changes: str
) -> tuple[Folder, MeasuredByName, MeasuredByName]:
    """vcpo and gspo as the leaderboard has them, asked for, with transformers' success rates by seed."""
    size = with_transformers(SIZES["quick"])
    standing: dict[str, dict[str, Measured]] = leaderboard.standing(size)
    for name, by_seed in values.items():
        for setting in size.transformers:
            standing[name][setting.name] = {
                "average": [by_seed],
                "lost": [[0] * len(by_seed)],
                "refused": [[0] * len(by_seed)],
                "start": changes.get(name, "0"),
            }
    named = {name: standing[name] for name in values if name != REFERENCE}
    return Folder(tmp_path, tuple(named), size), named, standing


def test_words_are_those_that_paired_seeds_bear(tmp_path: Path) -> None:
    values = {REFERENCE: [0.3, 0.5, 0.4, 0.6], "vcpo": [0.5, 0.7, 0.6, 0.8], "gspo": [0.2, 0.7, 0.35, 0.65]}
    folder, named, standing = with_runs(values, tmp_path)
    found = comparison(folder, named, standing, leaderboard.read())
    plain = comparison(replace(folder, size=SIZES["quick"]), named, standing, leaderboard.read())
    assert found["comparisons_corrected_together"] == plain["comparisons_corrected_together"] + 4
    assert "trained" not in plain["claims"]
    assert found["claims"]["trained"].endswith("both at step size 0.0006")
    rows = {row["name"]: row for row in found["estimators"]}
    assert rows["vcpo"]["words"]["trained"] == "holds"  # 0.2 above at every seed, whatever seeds differ by
    assert rows["gspo"]["words"]["trained"] == "undecided"
    assert rows["m2po"]["words"]["trained"] == "not judged"
    lines = {(one.estimator, one.task): one for one in trained_rows(found["estimators"])}
    assert {name for name, _ in lines} == set(values)
    one = lines["vcpo", "addition, lag 16"]
    assert_near([one.value, one.low, one.high, *one.difference], [0.65, 0.5, 0.8, 0.2, 0.2, 0.2])
    html = page(found)
    assert html.count("shortest_path, lag 16</td>") == 3
    assert 'href="#transformers"' in html
    assert 'id="transformers"' not in page(plain)
    assert json.loads(report_json(found))["estimators"][0]["name"]


def test_runs_from_different_weights_are_not_compared(tmp_path: Path) -> None:
    values = {REFERENCE: [0.3, 0.5, 0.4, 0.6], "vcpo": [0.5, 0.7, 0.6, 0.8]}
    folder, named, standing = with_runs(values, tmp_path, vcpo="1")
    with pytest.raises(InputError, match="begin from different weights"):
        comparison(folder, named, standing, leaderboard.read())


def test_a_comparison_without_transformers_is_another(tmp_path: Path) -> None:
    Folder(tmp_path / "run", ("vcpo",), SIZES["tiny"]).start()
    with pytest.raises(InputError, match="other settings"):
        Folder(tmp_path / "run", ("vcpo",), with_transformers(SIZES["tiny"])).start()


# --- without the extra ------------------------------------------------------------------------------------------------

ABSENT = """
import importlib.util as util, sys
real = util.find_spec
util.find_spec = lambda name, *more: None if name == "torch" else real(name, *more)
from vcposim.commands.main import main
sys.exit(main(["compare", "vcpo", "--transformers", "--size", "tiny"]))
"""


def test_without_the_extra_one_line_says_what_to_install(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", ABSENT], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == (
        "vcposim: error: --transformers: 'torch' is not installed; python -m pip install 'vcposim[llm]'\n"
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("library", ["reasoning_gym", "transformers"])
def test_a_part_of_the_extra_that_is_missing_is_named(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [x for x in sys.modules if x.split(".")[0] == "llm_bridge"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(InputError, match=f"^--transformers: '{library}.*' is not installed; python -m pip install"):
        transformers.part()


def test_help_says_what_it_adds(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["compare", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "--transformers adds tasks of llm_bridge" in said
