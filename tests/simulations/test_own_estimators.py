"""`run --estimator`: anyone's estimator among an experiment's methods, by name, never in the way of its verdicts."""

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from simulations.__main__ import main
from simulations.methods import METHODS, SYNCHRONOUS, outcome, own_methods, run_of, standing, trace
from simulations.protocol import Analysis, Experiment, Record, Setting, discover, records_in_process
from simulations.questions import baselines_under_lag as experiment
from simulations.report import gathered, page
from simulations.summaries import load_section
from tests.kit.statistical import assert_near
from vcposim.arrays import Array
from vcposim.batch import Batch
from vcposim.errors import InputError
from vcposim.estimators import estimator_of
from vcposim.laboratory import exact
from vcposim.learning.lags import Lag

FILE = """
import torch

def centered(batch):
    return batch.reward - batch.reward.mean(-1, keepdims=True)

def weighted(batch):
    return torch.exp(torch.as_tensor(batch.log_ratio)).numpy() * centered(batch)

def in_torch(batch):
    return batch.reward - batch.reward.mean(dim=-1, keepdim=True)

def tokens(batch):
    r = batch.on_tokens(batch.log_ratio).clip(max=0.6931471805599453)
    return (2.718281828459045 ** r) * centered(batch)[..., None]
tokens.needs = ("tokens",)
"""
COMPARED = ("no correction", "token TIS", SYNCHRONOUS[0])


def settings(size: str) -> list[Setting]:
    return [{"step_size": 0.05, "seeds": [0, 1, 2]}, {"step_size": 0.1, "seeds": [0, 1, 2]}]


def run(setting: Setting) -> list[Record]:
    methods = {name: METHODS[name] for name in COMPARED} | own_methods(setting)
    keys = [(name, seed) for name in methods for seed in setting["seeds"]]
    runs = [run_of(methods[name], Lag(3), seed=seed, step_size=setting["step_size"]) for name, seed in keys]
    found = trace("exact_match_8", runs, 25)
    return [
        {"method": m, "seed": s, "step_size": setting["step_size"], **outcome(found, i)}
        for i, (m, s) in enumerate(keys)
    ]


EXPERIMENT = Experiment(
    "small", "Who learns?", ("C13",), settings, run, lambda records: Analysis([]), takes_estimators=True
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pytest.importorskip("torch")
    (tmp_path / "newcomer.py").write_text(FILE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "newcomer", raising=False)
    return tmp_path


def test_an_estimator_learns_as_the_method_that_it_is(folder: Path) -> None:
    """NumPy, torch and per token, against the catalogue's own methods: the same runs under other names."""
    names = ["newcomer.py:centered", "newcomer.py:in_torch", "newcomer.py:tokens", "dr_grpo"]
    plain, records = (
        records_in_process(EXPERIMENT, "full"),
        records_in_process(EXPERIMENT.with_estimators(names), "full"),
    )
    of = {name: [{**r, "method": "", "setting_id": ""} for r in records if r["method"] == name] for name in names}
    theirs = {name: [{**r, "method": "", "setting_id": ""} for r in plain if r["method"] == name] for name in COMPARED}
    for name in (names[0], names[1], names[3]):
        assert of[name] == theirs["no correction"]
    assert_near([r["average"] for r in of[names[2]]], [r["average"] for r in theirs["token TIS"]])
    assert of[names[0]] != theirs["token TIS"]
    own = [r for r in records if r["method"] in names]
    assert [r for r in records if r not in own] == plain
    headings, *rows = standing(records, names)
    assert headings[3:] == [f"{name} minus it" for name in names]
    assert {row[0] for row in rows} == {*COMPARED, *names}
    assert next(row for row in rows if row[0] == names[0])[3:5] == ["", "0"]  # itself, and its torch twin


def test_a_file_that_changes_under_a_run_is_seen(folder: Path) -> None:
    experiment = EXPERIMENT.with_estimators(["newcomer.py:centered"])
    setting = experiment.settings("full")[0]
    (folder / "newcomer.py").write_text(FILE + "# better\n")
    with pytest.raises(InputError, match=r"newcomer\.py:centered: its file has changed since this run began"):
        experiment.run(setting)
    assert EXPERIMENT.with_estimators(["newcomer.py:centered"]).settings("full")[0] != setting


@pytest.mark.slow
def test_a_run_with_estimators_is_kept_apart(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    known = {"small": EXPERIMENT}
    # in this process, and without the library that draws: both take seconds to load
    monkeypatch.setattr("simulations.__main__.local_executor", lambda workers: ThreadPoolExecutor(1))
    monkeypatch.setattr("simulations.report.bundle", lambda: "")
    command = ["run", "small", "--size", "full", "--workers", "1", "--estimator", "newcomer.py:centered"]
    assert main(command, known) == 0
    out = capsys.readouterr().out
    assert "newcomer.py:centered minus it" in " ".join(out.replace("│", " ").replace("┃", " ").split())
    path = folder / "results" / "small-full-with-newcomer.py-centered"
    provenance = json.loads((path / "provenance.json").read_text())
    assert provenance["reproduce"].endswith("run small --size full --estimator newcomer.py:centered")
    assert not (path / "summary.json").exists()
    section = load_section(path, known)
    assert section.estimators == ("newcomer.py:centered",)
    assert not section.settles
    assert main(["keep", str(path)], known) == 2
    assert "ran with newcomer.py:centered" in capsys.readouterr().err
    text, problems = page(gathered([section], {}), {})
    assert not problems
    assert "newcomer.py:centered minus it" in text
    assert "it settles no claim" in text
    (folder / "newcomer.py").write_text(FILE + "# better\n")
    assert main(command, known) == 2
    assert "holds a complete run of other settings" in capsys.readouterr().err


def test_every_experiment_takes_estimators_or_says_why_not() -> None:
    known = discover().values()
    assert all(e.takes_estimators != bool(e.no_estimators) for e in known)
    with pytest.raises(InputError, match="no_estimators: it takes some"):
        replace(EXPERIMENT, no_estimators="has none")


def test_exact_moments_of_anyone_stand_among_those_of_baselines(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An estimator that is a baseline under another name has its numbers, of groups of three."""
    monkeypatch.setattr(experiment, "GROUP_SIZE", 3)
    own = replace(experiment.EXPERIMENT.with_estimators(["newcomer.py:weighted"]), run=experiment.EXPERIMENT.run)
    (setting,) = [s for s in own.settings("reduced") if s["policy"] == "random" and s["chi2"] == 1.0]
    records = own.run({**setting, "seeds": 2})
    found = {(r["baseline"], r["shift"], r["seed"]): r for r in records if r["kind"] == "moments"}
    for shift, seed in ((0.0, 0), (1.0, 1)):
        mine, theirs = (found[name, shift, seed] for name in ("newcomer.py:weighted", "group_mean"))
        assert_near([mine[k] for k in experiment.NUMBERS], [theirs[k] for k in experiment.NUMBERS])
    headings, *rows = standing(records, ["newcomer.py:weighted"])
    assert headings[-1] == "newcomer.py:weighted over it"
    assert next(row for row in rows if row[0] == "group_mean")[-1].split()[0] == "1"


def test_who_minds_the_order_on_a_later_problem_alone_is_shown_all_orders(monkeypatch: pytest.MonkeyPatch) -> None:
    """A promise that the first problem bears out and another breaks costs time, and changes no number."""
    monkeypatch.setattr(experiment, "GROUP_SIZE", 3)
    setting = {"policy": "random", "chi2": 1.0, "seeds": 2}
    (known, _), (other, _) = (experiment.problem_of(setting, seed) for seed in (1, 0))
    large = float(known.reward.max())
    assert other.reward.max() > large  # else this asks nothing

    def late(batch: Batch) -> Array:
        return batch.reward - (batch.reward[..., :1] > large)

    assert exact.exchangeable(known, late, 3)
    found = [experiment.moments_of(other, estimator_of(late), any_order) for any_order in (True, False)]
    assert found[0].mse == found[1].mse


@pytest.mark.parametrize("name", ["ablation", "regime_factors", "beyond_vcpo"])
def test_own_methods_are_beside_the_others_and_change_none(
    folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = discover()[name]
    few = {"updates": 20, "seeds": [0]}
    plain, own = (e.settings("reduced")[0] | few for e in (experiment, experiment.with_estimators(["dr_grpo"])))
    before, after = experiment.run(plain), experiment.run(own)
    mine = [r for r in after if r["method"] == "dr_grpo"]
    assert [r for r in after if r["method"] != "dr_grpo"] == before
    assert len(mine) == 1
    for theirs in before:
        if theirs["method"] == "mean" and name == "regime_factors":
            assert {**mine[0], "method": ""} == {**theirs, "method": ""}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("small --estimator newcomer.py:centred", "newcomer.py: unknown name 'centred'; did you mean 'centered'"),
        ("small --estimator rloo rloo", "--estimator: 'rloo' is given twice"),
        ("quick --estimator rloo", "--estimator: 'quick' runs every experiment as it is"),
        (
            "variance_vs_lag --estimator rloo",
            "vcposim compare has the exact variance of yours over lag; those that take yours: ablation, as_published",
        ),
        ("ess_reliability --estimator rloo", "reads the weights of a batch, before any estimator does; those that"),
    ],
)
def test_mistakes_get_one_line(folder: Path, capsys: pytest.CaptureFixture[str], words: str, says: str) -> None:
    assert main(["run", *words.split()], {**discover(), "small": EXPERIMENT}) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
