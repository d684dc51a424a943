"""The runner keeps its promises: nothing lost, nothing overwritten, the same bytes however a run came about."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import simulations.__main__
from simulations import conclusion, protocol
from simulations.__main__ import main
from simulations.protocol import (
    Analysis,
    Experiment,
    Figure,
    Verdict,
    canonical,
    discover,
    encode,
    plain,
    records_in_process,
    settings_of,
    source_files,
    source_hash,
)
from simulations.runner import RunFolder, execute, interrupts_held, local_executor, locked
from tests.simulations import toy_experiment as toy
from vcposim.errors import InputError

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PATIENCE = 60.0  # seconds; a bound on waiting for another process, not on anything measured


# --- helpers ------------------------------------------------------------------------------------------------------


def start(*arguments: object, **environment: str) -> subprocess.Popen[str]:
    """The toy command line in a process group of its own, as a terminal would start it."""
    path = os.pathsep.join([str(ROOT), str(HERE)])
    code = "import sys; from tests.simulations import toy_experiment; sys.exit(toy_experiment.command())"
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": path} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def record_files(folder: Path) -> list[Path]:
    return sorted((folder / "records").glob("*.jsonl"))


def snapshot(folder: Path) -> dict[str, bytes]:
    """Everything a run is about: bytes of the raw records and of the merged file, and that there is nothing else."""
    kept = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert kept.pop("provenance.json")
    return kept


def stop_in_the_middle(folder: Path, gate: Path, stop: Callable[[subprocess.Popen[str]], None]) -> tuple[int, str]:
    """Start a run of 8 settings that can finish 3, stop it there; its exit code and standard error."""
    process = start("run", "toy", "--workers", 2, "--out", folder, TOY_GATE=str(gate))
    try:
        wait_until(lambda: len(record_files(folder)) == 3)
        stop(process)
        _, err = process.communicate(timeout=PATIENCE)
        wait_until(lambda: not living(process.pid))
    finally:
        if living(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, err


def living(group: int) -> list[str]:
    """Processes of a group that are not zombies."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, pgrp = stat.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(pgrp) == group and state != "Z":
            found.append(stat.parent.name)
    return found


Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    """The command line in this process: exit code, standard output, standard error."""

    def call(*arguments: object, experiments: dict[str, Experiment] | None = None) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(a) for a in arguments], toy.EXPERIMENTS if experiments is None else experiments)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run with one worker; tests must not write to it."""
    folder = tmp_path_factory.mktemp("toy") / "run"
    assert main(["run", "toy", "--workers", "1", "--out", str(folder)], toy.EXPERIMENTS) == 0
    return folder


@pytest.fixture
def complete(finished_run: Path, tmp_path: Path) -> Path:
    """A copy of the complete run."""
    return Path(shutil.copytree(finished_run, tmp_path / "complete"))


@pytest.fixture
def partial(complete: Path, tmp_path: Path) -> Path:
    """A run of which settings 0 to 3 are done."""
    folder = Path(shutil.copytree(complete, tmp_path / "partial"))
    (folder / "results.jsonl").unlink()
    for number in range(4, 8):
        (folder / "records" / f"{number}.jsonl").unlink()
    return folder


def refused(result: tuple[int, str, str], *words: str) -> None:
    """Exit code 2 and one line on standard error that says what it has to."""
    code, out, err = result
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    for word in words:
        assert word in err


# --- the same bytes, however the run came about -------------------------------------------------------------------

needs_processes = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks processes up in /proc")


@needs_processes
def test_a_killed_run_resumes_to_the_same_bytes(tmp_path: Path, finished_run: Path, cli: Cli) -> None:
    folder, gate = tmp_path / "run", tmp_path / "gate"
    code, _ = stop_in_the_middle(folder, gate, lambda process: process.kill())
    assert code == -signal.SIGKILL
    assert not (folder / "results.jsonl").exists()
    kept = {path: path.stat().st_mtime_ns for path in record_files(folder)}
    provenance = (folder / "provenance.json").read_bytes()
    assert len(kept) == 3

    code, _, err = cli("run", "toy", "--workers", 2, "--out", folder)
    assert code == 0
    assert "resuming toy" in err
    assert "3 of 8 settings are kept" in err
    assert {path: path.stat().st_mtime_ns for path in kept} == kept  # raw records are never written twice
    assert (folder / "provenance.json").read_bytes() == provenance
    assert snapshot(folder) == snapshot(finished_run)


@needs_processes
def test_ctrl_c_ends_with_one_line_and_resumes(tmp_path: Path, finished_run: Path, cli: Cli) -> None:
    folder, gate = tmp_path / "run", tmp_path / "gate"
    code, err = stop_in_the_middle(folder, gate, lambda process: os.killpg(process.pid, signal.SIGINT))
    assert code == 130
    assert err == f"interrupted: 3 of 8 settings are kept in {folder}; the same command resumes\n"
    assert cli("run", "toy", "--out", folder)[0] == 0
    assert snapshot(folder) == snapshot(finished_run)


@needs_processes
@pytest.mark.parametrize("delay", [0.0, 0.03, 0.06, 0.1])
def test_ctrl_c_while_workers_start_is_one_line(delay: float, tmp_path: Path) -> None:
    process = start("run", "toy", "--workers", 2, "--out", tmp_path / "run", TOY_GATE=str(tmp_path / "gate"))
    wait_until(lambda: len(living(process.pid)) > 3)  # the command, two workers, and what cleans up after them
    time.sleep(delay)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert err.startswith("interrupted: 0 of 8 settings are kept")
    assert err.count("\n") == 1


def test_ctrl_c_waits_until_every_worker_is_started() -> None:
    done = threading.Event()
    threading.Thread(target=done.wait, daemon=True).start()  # a thread of a library, which may catch the signal
    reached = []

    def interrupted() -> None:
        with interrupts_held():
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.05)
            reached.append("the end of the block")

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    done.set()
    assert reached


def test_two_workers_give_the_bytes_of_one(tmp_path: Path, finished_run: Path, cli: Cli) -> None:
    assert cli("run", "toy", "--workers", 2, "--out", tmp_path / "two")[0] == 0
    assert snapshot(tmp_path / "two") == snapshot(finished_run)


def test_a_cluster_gives_the_bytes_of_one_worker(tmp_path: Path, finished_run: Path, cli: Cli) -> None:
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=False, dashboard_address=None
    ) as cluster:
        assert cli("run", "toy", "--scheduler", cluster.scheduler_address, "--out", tmp_path / "run")[0] == 0
    assert snapshot(tmp_path / "run") == snapshot(finished_run)


def test_results_are_the_records_in_setting_order(finished_run: Path) -> None:
    lines = [json.loads(line) for line in (finished_run / "results.jsonl").read_text().splitlines()]
    expected = []
    for number, setting in enumerate(toy.settings("reduced")):
        mean = np.random.default_rng(setting["seed"]).standard_normal(3).mean()
        expected.append((f"toy/{number}", mean))
    assert [(line["setting_id"], line["mean"]) for line in lines[::2]] == expected
    assert lines == records_in_process(toy.EXPERIMENT, "reduced")
    assert lines == RunFolder.plan(finished_run, toy.EXPERIMENT, "reduced").records()


def test_provenance_says_what_computed_the_records(finished_run: Path) -> None:
    provenance = json.loads((finished_run / "provenance.json").read_text())
    assert provenance["settings"] == toy.settings("reduced")
    assert provenance["packages"]["numpy"] == np.__version__
    assert provenance["source_files"] == ["tests", "tests.simulations", "tests.simulations.toy_experiment"]
    assert provenance["reproduce"] == "python -m simulations run toy --size reduced"
    assert provenance["command"][:5] == ["python", "-m", "simulations", "run", "toy"]


def test_workers_compute_with_one_thread_and_leave_the_environment_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "7")
    before = dict(os.environ)
    with local_executor(1) as executor:
        assert executor.submit(os.getenv, "OMP_NUM_THREADS").result() == "1"
        assert executor.submit(os.getenv, "OPENBLAS_NUM_THREADS").result() == "1"
    assert dict(os.environ) == before


# --- nothing is overwritten ---------------------------------------------------------------------------------------


def test_a_complete_run_is_not_overwritten(complete: Path, cli: Cli) -> None:
    before = snapshot(complete)
    for again in ([], ["--resume"]):
        code, out, err = cli("run", "toy", "--out", complete, *again)
        assert code == 0
        assert "complete" in err
        assert "C12" in out
    assert re.search(
        r"complete, \d+ s ago; a page of it: python -m simulations report", cli("run", "toy", "--out", complete)[2]
    )
    assert snapshot(complete) == before


def test_other_settings_do_not_resume(partial: Path, cli: Cli) -> None:
    before = snapshot(partial)
    other = {"toy": replace(toy.EXPERIMENT, settings=toy.other_settings)}
    refused(cli("run", "toy", "--out", partial, experiments=other), "incomplete run of other settings", "--out")
    refused(cli("run", "toy", "--size", "full", "--out", partial), "another size")
    refused(cli("run", "toy_two", "--out", partial), "another experiment")
    assert snapshot(partial) == before


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package of experiments on disk: `alpha` imports `helper` inside a function, and nobody imports `bystander`."""
    folder = tmp_path / "lab_of_test"
    folder.mkdir()
    body = (HERE / "toy_experiment.py").read_text().replace('Experiment("toy"', 'Experiment("alpha"')
    body += "\n\ndef late() -> None:\n    from . import helper\n    helper\n"
    (folder / "__init__.py").write_text("")
    (folder / "alpha.py").write_text(body)
    (folder / "helper.py").write_text("VALUE = 1\n")
    (folder / "bystander.py").write_text("VALUE = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield folder
    for name in [name for name in sys.modules if name.partition(".")[0] == "lab_of_test"]:
        del sys.modules[name]


def test_another_source_does_not_resume(package: Path, tmp_path: Path, cli: Cli) -> None:
    experiments = discover("lab_of_test")
    experiment = experiments["alpha"]
    assert list(source_files(experiment)) == ["lab_of_test", "lab_of_test.alpha", "lab_of_test.helper"]
    folder = RunFolder.plan(tmp_path / "run", experiment, "reduced")
    folder.start([])
    folder.keep(0, execute(experiment.run, folder.settings[0], "alpha/0"))
    before = source_hash(experiment)
    (package / "bystander.py").write_text("VALUE = 2\n")
    assert source_hash(experiment) == before
    assert folder.state() == "partial"
    (package / "helper.py").write_text("VALUE = 2\n")
    refused(cli("run", "alpha", "--out", folder.path, experiments=experiments), "another version of the source")


def test_a_second_run_keeps_out_of_a_folder_in_use(partial: Path, cli: Cli) -> None:
    pytest.importorskip("fcntl")
    with locked(partial):
        refused(cli("run", "toy", "--out", partial), "another run is writing")
    assert cli("run", "toy", "--out", partial)[0] == 0


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    refused(cli("run", "toy", "--out", tmp_path), "not empty")
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_run_killed_before_its_provenance_starts_afresh(tmp_path: Path, finished_run: Path, cli: Cli) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "provenance.json.tmp").write_text('{"exper')
    assert cli("run", "toy", "--out", folder)[0] == 0
    assert snapshot(folder) == snapshot(finished_run)


def test_a_run_killed_before_the_merge_is_merged(complete: Path, finished_run: Path, cli: Cli) -> None:
    (complete / "results.jsonl").unlink()
    assert cli("run", "toy", "--out", complete)[0] == 0
    assert snapshot(complete) == snapshot(finished_run)


# --- damage, failure, bad input -----------------------------------------------------------------------------------


def flipped(data: bytes) -> bytes:
    """One digit of the first record altered; the file stays valid JSON lines."""
    place = data.index(b'"mean": ') + 12
    return data[:place] + (b"1" if data[place : place + 1] != b"1" else b"2") + data[place + 1 :]


DAMAGE: dict[str, Callable[[Path], bytes]] = {
    "empty": lambda path: b"",
    "cut at a line": lambda path: path.read_bytes().rpartition(b'{"end"')[0],
    "cut within a line": lambda path: path.read_bytes()[:-10],
    "last newline lost": lambda path: path.read_bytes()[:-1],
    "digit altered": lambda path: flipped(path.read_bytes()),
    "of another setting": lambda path: path.with_name("1.jsonl").read_bytes(),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_record_file_is_set_aside_and_recomputed(
    kind: str, partial: Path, finished_run: Path, cli: Cli
) -> None:
    path = partial / "records" / "2.jsonl"
    damaged = DAMAGE[kind](path)
    path.write_bytes(damaged)
    code, _, err = cli("run", "toy", "--workers", 1, "--out", partial)
    assert code == 0
    assert err.splitlines()[0].startswith("note: the record file of toy/2 was cut short or altered")
    assert "3 of 8 settings are kept" in err.splitlines()[1]
    assert (partial / "damaged" / "2-0.jsonl").read_bytes() == damaged
    shutil.rmtree(partial / "damaged")
    assert snapshot(partial) == snapshot(finished_run)


def test_a_report_refuses_damaged_records(complete: Path, cli: Cli) -> None:
    path = complete / "records" / "2.jsonl"
    path.write_bytes(flipped(path.read_bytes()))
    refused(cli("report", complete), "2.jsonl", "delete", "results.jsonl")
    (complete / "results.jsonl").unlink()  # the remedy it gives
    assert cli("run", "toy", "--out", complete)[0] == 0
    assert cli("report", complete)[0] == 0


def test_a_failing_setting_is_named_and_the_others_are_kept(
    tmp_path: Path, finished_run: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    monkeypatch.setenv("TOY_FAIL", "5")
    code, _, err = cli("run", "toy", "--out", folder)
    assert code == 1
    first, summary = err.splitlines()
    trace = folder / "errors" / "5.txt"
    assert first == f"failed: toy/5: RuntimeError: deliberate second line (traceback in {trace})"
    assert summary.startswith("error: 1 of 8 settings failed, the others are kept")
    assert "Traceback" in trace.read_text()
    assert [p.stem for p in record_files(folder)] == ["0", "1", "2", "3", "4", "6", "7"]
    assert not (folder / "results.jsonl").exists()
    monkeypatch.delenv("TOY_FAIL")
    assert cli("run", "toy", "--out", folder)[0] == 0
    assert not trace.exists()
    assert snapshot(folder) == snapshot(finished_run)


def test_a_worker_that_dies_is_one_line(tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOY_DIE", "4")
    code, _, err = cli("run", "toy", "--workers", 1, "--out", tmp_path / "run")
    assert code == 1
    assert err.count("\n") == 1
    assert "a worker died" in err
    assert "the same command resumes" in err
    monkeypatch.delenv("TOY_DIE")
    assert cli("run", "toy", "--out", tmp_path / "run")[0] == 0


def test_a_nan_names_setting_and_field(tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOY_NAN", "2")
    code, _, err = cli("run", "toy", "--out", tmp_path / "run")
    assert code == 1
    assert err.startswith("failed: toy/2 record 0.mean: nan is not a JSON number")
    assert not (tmp_path / "run" / "records" / "2.jsonl").exists()


BAD_COMMANDS: dict[str, tuple[list[str], list[str]]] = {
    "no command": ([], ["COMMAND"]),
    "unknown command": (["rum"], ["'rum'"]),
    "unknown experiment": (["run", "toy_too", "--out", "{new}"], ["'toy_too'", "did you mean 'toy_two' or 'toy'?"]),
    "no worker": (["run", "toy", "--workers", "0", "--out", "{new}"], ["--workers", "'0'", "at least 1"]),
    "negative workers": (["run", "toy", "--workers", "-2", "--out", "{new}"], ["--workers"]),
    "half a worker": (["run", "toy", "--workers", "1.5", "--out", "{new}"], ["--workers", "'1.5'", "integer"]),
    "unknown size": (["run", "toy", "--size", "big", "--out", "{new}"], ["--size", "'big'", "reduced"]),
    "quick in full": (["run", "quick", "--size", "full", "--out", "{new}"], ["--size", "'full'"]),
    "out below a file": (["run", "toy", "--out", "{file}/run"], ["--out: cannot write", "choose another"]),
    "out is a file": (["run", "toy", "--out", "{file}"], ["--out", "choose another"]),
    "several below a file": (["run", "toy", "toy_two", "--out", "{file}"], ["--out: cannot write"]),
    "no records": (["report", "{new}"], ["{new}", "no run", "run quick"]),
    "no records, JSON": (["report", "{new}", "--json"], ["{new}", "no run"]),
    "page exists": (["report", "{complete}", "--out", "{file}"], ["{file} exists", "--force"]),
    "page nowhere": (["report", "{complete}", "--out", "{new}/page.html"], ["{new}", "not a folder"]),
    "incomplete": (["report", "{partial}"], ["only incomplete runs"]),
    "unknown option": (["run", "toy", "--fast"], ["--fast"]),
}


@pytest.mark.parametrize("kind", BAD_COMMANDS)
def test_bad_input_is_one_line(kind: str, tmp_path: Path, complete: Path, partial: Path, cli: Cli) -> None:
    (tmp_path / "file").write_text("mine")
    places = {name: str(tmp_path / name) for name in ("new", "file", "complete", "partial")}
    command, words = BAD_COMMANDS[kind]
    refused(cli(*(part.format(**places) for part in command)), *(word.format(**places) for word in words))
    assert (tmp_path / "file").read_text() == "mine"
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"experiment": "toy", "size": "reduced", "settings": 3}'])
def test_an_unreadable_provenance_is_one_line(text: str, complete: Path, cli: Cli) -> None:
    (complete / "provenance.json").write_text(text)
    refused(cli("run", "toy", "--out", complete, "--resume"), str(complete))
    refused(cli("report", complete), "provenance.json")


def test_a_run_of_an_unknown_experiment_is_one_line(complete: Path, cli: Cli) -> None:
    only = {"toys": replace(toy.EXPERIMENT, id="toys")}
    refused(cli("report", complete, experiments=only), "'toy'", "did you mean 'toys'?")


def test_a_missing_cluster_library_is_one_line(tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    refused(cli("run", "toy", "--scheduler", "tcp://127.0.0.1:1", "--out", tmp_path / "run"), "pip install distributed")


# --- plain JSON ---------------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@given(st.dictionaries(st.text().filter(lambda key: key != "setting_id"), JSON))
def test_a_record_comes_back_as_it_went(record: dict[str, object]) -> None:
    body = encode([record], "toy/0")
    assert body.count(b"\n") == 1
    assert json.loads(body) == {"setting_id": "toy/0"} | record
    assert repr(json.loads(body)) == repr({"setting_id": "toy/0"} | record)  # -0.0, True and 1 stay what they are


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -np.inf, np.float32("nan"), np.array([1.0, np.nan])])
def test_what_is_not_a_number_is_refused_at_any_depth(bad: object) -> None:
    with pytest.raises(InputError, match=r"toy/3 record 1\.moment\.value\[1\].*(nan|inf) is not a JSON number"):
        encode([{}, {"moment": {"value": [0, bad]}}], "toy/3")


@pytest.mark.parametrize("bad", [None, [], {}, [3], [{"setting_id": "mine"}], [{1: 2}], [{"f": object()}], [{"f": 1j}]])
def test_what_is_not_a_list_of_records_is_refused(bad: list[dict[str, object]]) -> None:
    with pytest.raises(InputError, match="toy/3"):
        encode(bad, "toy/3")


def test_arrays_become_lists() -> None:
    value = {"a": np.arange(2), "b": np.float64(0.1), "c": np.bool_(True), "d": (np.int64(3), np.str_("e"))}
    assert canonical(plain(value, "toy/0")) == '{"a": [0, 1], "b": 0.1, "c": true, "d": [3, "e"]}'


@pytest.mark.parametrize(
    ("listed", "words"),
    [
        ([], "empty"),
        ([{"seed": 1}, {"seed": 2}, {"seed": 1}], "toy/2: equals toy/0"),
        ([3], "dict"),
        ([{"cap": float("inf")}], "toy/0.cap: inf"),
        (None, r"settings\('full'\) raised"),
    ],
)
def test_settings_are_checked(listed: list[dict[str, object]], words: str) -> None:
    with pytest.raises(InputError, match=words):
        settings_of(replace(toy.EXPERIMENT, settings=lambda size: listed), "full")


@pytest.mark.parametrize(
    "fields",
    [
        ("4", "s", "holds", "1", ""),
        ("C4", "s", "true", "1", ""),
        ("C4", "s", "holds", "", ""),
        ("C4", "s", "holds if", "1", ""),
    ],
)
def test_a_verdict_is_checked(fields: tuple[str, str, str, str, str]) -> None:
    with pytest.raises(InputError, match=r"Verdict\."):
        Verdict(*fields)


def test_experiments_are_found_by_their_files(package: Path) -> None:
    assert list(discover("lab_of_test")) == ["alpha"]
    (package / "beta.py").write_text("from lab_of_test.alpha import EXPERIMENT\n")
    with pytest.raises(InputError, match=r"beta\.py: its id is 'alpha'"):
        discover("lab_of_test")
    (package / "beta.py").write_text("import no_such_module\n")
    sys.modules.pop("lab_of_test.beta", None)
    with pytest.raises(InputError, match=r"beta\.py: cannot be imported \(ModuleNotFoundError"):
        discover("lab_of_test")


# --- the report ---------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """What a browser would see: elements, and text with the entities resolved."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of `run quick` on the toys; tests must not write to it."""
    folder = tmp_path_factory.mktemp("quick") / "all"
    assert main(["run", "quick", "--out", str(folder)], toy.EXPERIMENTS) == 0
    return folder


def test_quick_runs_everything_and_reports(quick: Path, finished_run: Path, tmp_path: Path, cli: Cli) -> None:
    assert snapshot(quick / "toy-reduced") == snapshot(finished_run)
    assert (quick / "toy_two-reduced" / "results.jsonl").exists()
    copy = shutil.copytree(quick, tmp_path / "copy")
    code, _, err = cli("run", "quick", "--out", copy)
    assert code == 0
    assert re.search(r"complete, \d+ s ago; report at .*report\.html", err)
    page = (copy / "report.html").read_bytes()
    (copy / "report.html").unlink()  # killed between the last record and the report
    assert cli("run", "quick", "--out", copy)[0] == 0
    assert (copy / "report.html").read_bytes() == page
    (copy / "toy_two-reduced" / "results.jsonl").unlink()  # killed earlier, and a report of what there was
    (copy / "report.html").write_bytes(page.replace(b"toy_two", b"toy_ten"))
    code, out, _ = cli("run", "quick", "--out", copy)
    assert code == 0
    assert (copy / "report.html").read_bytes() == page
    for word in ("C12", "undecided", "<script>alert(1)</script>", "only a full run", "toy_two (reduced)"):
        assert word in out


def test_quick_asked_again_says_the_same_and_judges_nothing(
    quick: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = shutil.copytree(quick, tmp_path / "copy")  # nothing in it says where it was made
    page, (_, said, _) = (copy / "report.html").read_bytes(), cli("run", "quick", "--out", copy, "--resume")
    assert (copy / "report.html").read_bytes() == page
    monkeypatch.setattr("simulations.__main__.load_section", None)
    monkeypatch.setattr("simulations.__main__.page", None)
    code, again, _ = cli("run", "quick", "--out", copy)
    assert (code, again) == (0, said)
    assert (copy / "report.html").read_bytes() == page


def edited(path: Path) -> None:
    """One letter of a file is another."""
    text = path.read_text()
    path.write_text(text.replace("mean of three", "mean of seven", 1) if "mean of three" in text else text + "\n")
    assert path.read_text() != text


@pytest.mark.parametrize("change", ["the report", "no report", "what was told", "a run", "the source", "a package"])
def test_quick_concludes_again_from_what_has_changed(
    change: str, quick: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = shutil.copytree(quick, tmp_path / "copy")
    page, told = ((copy / name).read_bytes() for name in ("report.html", conclusion.FILE))
    if change == "the report":
        edited(copy / "report.html")
    elif change == "no report":
        (copy / "report.html").unlink()
    elif change == "what was told":
        edited(copy / conclusion.FILE)
    elif change == "a run":
        edited(copy / "toy-reduced" / "results.jsonl")
    elif change == "the source":
        code = tmp_path / "code"
        for package in conclusion.OURS:
            shutil.copytree(conclusion.ROOT / package, code / package, ignore=shutil.ignore_patterns("__pycache__"))
        monkeypatch.setattr(conclusion, "ROOT", code)
        assert conclusion.kept(conclusion.sources(), plan_of(copy), copy / "report.html") is not None
        edited(code / "simulations" / "drawing.py")
    else:
        monkeypatch.setattr("importlib.metadata.distributions", lambda: [])
    judged = []
    load = simulations.__main__.load_section
    monkeypatch.setattr("simulations.__main__.load_section", lambda *a: judged.append(a) or load(*a))
    assert cli("run", "quick", "--out", copy)[0] == 0
    assert len(judged) == len(toy.EXPERIMENTS)
    assert (copy / "report.html").read_bytes() == page
    assert change not in ("the report", "no report", "what was told") or (copy / conclusion.FILE).read_bytes() == told


def plan_of(root: Path) -> list[RunFolder]:
    """The run folders of `run quick` on the toys in `root`."""
    return simulations.__main__.plan(["quick"], toy.EXPERIMENTS, size="reduced", estimators=(), out=root)[1]


def test_quick_leaves_out_what_is_not_installed_and_says_so(
    tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(protocol.EXTRAS, "llm", ("json", "no_such_module"))
    known = toy.EXPERIMENTS | {"toy_two": replace(toy.EXPERIMENTS["toy_two"], extra="llm")}
    refused(cli("run", "toy_two", "--out", tmp_path / "x", experiments=known), "toy_two", "no_such_module", ".[llm]")
    code, _, err = cli("run", "quick", "--workers", 1, "--out", tmp_path / "quick", experiments=known)
    assert code == 0
    assert "toy_two is left out" in err
    assert {p.name for p in (tmp_path / "quick").iterdir()} == {"toy-reduced", "report.html", "conclusion.json"}
    monkeypatch.setitem(protocol.EXTRAS, "llm", ("json",))
    cli("run", "quick", "--workers", 1, "--out", tmp_path / "both", experiments=known)
    assert (tmp_path / "both" / "toy_two-reduced").is_dir()


def test_an_unknown_extra_is_refused() -> None:
    with pytest.raises(InputError, match="did you mean 'llm'"):
        replace(toy.EXPERIMENT, extra="lm")


def test_quick_does_not_replace_a_page_of_somebody_else(tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "report.html").write_text("mine")
    refused(cli("run", "quick", "--out", tmp_path), "report.html is not a report of this program")
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_the_page_needs_nothing_but_itself(quick: Path) -> None:
    text = (quick / "report.html").read_text()
    page = Page(text)
    links = [str(a[key]) for _, a in page.elements for key in ("src", "href", "srcset", "action") if key in a]
    targets = {f"#{a['id']}" for _, a in page.elements if "id" in a}
    assert links
    assert all(link in targets or link.startswith("data:") for link in links)
    style = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    assert len(text.encode()) < 5e6
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))


def test_the_page_escapes_what_experiments_say(quick: Path) -> None:
    text = (quick / "report.html").read_text()
    page = Page(text)
    for said in (
        "<script>alert(1)</script>",
        "Is the mean of three <i>draws</i> zero?",
        'Means "by" <setting>',
        "& <b>more",
    ):
        assert said in page.text
    assert {tag for tag, _ in page.elements}.isdisjoint({"i", "setting"})
    assert "alert(1)" not in "".join(re.findall(r"<script[^>]*>.*?</script>", text, flags=re.DOTALL))
    assert {image["alt"] for image in page.all("img")} == {'A line of means & "quotes"'}


def test_the_page_is_accessible(quick: Path) -> None:
    page = Page((quick / "report.html").read_text())
    assert page.all("html")[0]["lang"] == "en"
    assert "width=device-width" in str(page.all("meta")[1]["content"])
    assert all(image["alt"] for image in page.all("img"))


def test_equal_records_give_an_equal_page(quick: Path, tmp_path: Path) -> None:
    process = start("report", quick, "--out", tmp_path / "again.html", PYTHONHASHSEED="7")
    assert process.communicate(timeout=PATIENCE)
    assert (tmp_path / "again.html").read_bytes() == (quick / "report.html").read_bytes()


def test_a_report_rewrites_its_own_page_and_no_other(complete: Path, cli: Cli) -> None:
    page = complete / "report.html"
    assert cli("report", complete)[0] == 0
    text = page.read_text()
    assert cli("report", complete)[0] == 0
    assert page.read_text() == text
    page.write_text("mine")
    refused(cli("report", complete), "report.html exists", "--force")
    assert page.read_text() == "mine"
    assert cli("report", complete, "--force")[0] == 0
    assert page.read_text() == text


def test_an_experiment_in_both_sizes_appears_once_and_the_full_run_speaks(
    complete: Path, tmp_path: Path, cli: Cli
) -> None:
    both = tmp_path / "both"
    shutil.copytree(complete, both / "toy-reduced")
    assert cli("run", "toy", "--size", "full", "--workers", 1, "--out", both / "toy-full")[0] == 0
    assert json.loads((both / "toy-full" / "summary.json").read_text())["size"] == "full"
    _, out, _ = cli("report", both, "--json")
    rows = json.loads(out)["verdicts"]
    assert {row["size"] for row in rows} == {"full"}
    assert sorted(row["verdict"] for row in rows) == ["fails", "holds", "holds if"]  # only a full run settles
    assert cli("report", both)[0] == 0
    assert "The reduced run says" in (both / "report.html").read_text()


def test_verdicts_as_json(complete: Path, cli: Cli) -> None:
    before = snapshot(complete)
    code, out, err = cli("report", complete, "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["errors"] == {}
    assert [(v["claim"], v["verdict"], v["experiment"]) for v in found["verdicts"]] == [
        ("C4", "undecided", "toy"),
        ("C4", "undecided", "toy"),
        ("C12", "undecided", "toy"),
    ]
    assert snapshot(complete) == before


def test_an_incomplete_run_is_named_and_left_out(quick: Path, tmp_path: Path, cli: Cli) -> None:
    copy = shutil.copytree(quick, tmp_path / "copy")
    (copy / "toy_two-reduced" / "results.jsonl").unlink()
    code, out, err = cli("report", copy, "--out", tmp_path / "page.html")
    assert code == 0
    assert "toy_two" not in out
    assert f"{copy / 'toy_two-reduced'} is incomplete and left out" in err


def broken(records: list[dict[str, object]]) -> Analysis:
    raise ZeroDivisionError("no records of that kind")


def test_a_failing_analysis_leaves_the_others_standing(quick: Path, tmp_path: Path, cli: Cli) -> None:
    copy = shutil.copytree(quick, tmp_path / "copy")
    experiments = toy.EXPERIMENTS | {"toy": replace(toy.EXPERIMENT, analyse=broken)}
    code, out, err = cli("report", copy, "--force", experiments=experiments)
    assert code == 1
    assert "toy_two (reduced)" in out
    assert "failed: analysis of toy (reduced): ZeroDivisionError: no records of that kind" in err
    assert "Traceback" in (copy / "toy-reduced" / "analysis-error.txt").read_text()
    assert "ZeroDivisionError" in (copy / "report.html").read_text()


def test_a_figure_that_cannot_be_drawn_is_noted(complete: Path, cli: Cli) -> None:
    figures = [Figure("bad", broken, "cannot be"), Figure("good", toy.draw_means, "can be")]
    experiment = replace(toy.EXPERIMENT, analyse=lambda records: Analysis([], figures))
    code, _, err = cli("report", complete, experiments={"toy": experiment})
    page = Page((complete / "report.html").read_text())
    assert code == 1
    assert "failed: toy (reduced), figure bad: ZeroDivisionError" in err
    assert "could not be drawn" in page.text
    assert {image["alt"] for image in page.all("img")} == {"can be"}


def test_a_changed_source_is_said_on_the_page(complete: Path, cli: Cli) -> None:
    path = complete / "provenance.json"
    path.write_text(path.read_text().replace('"source_sha256": "', '"source_sha256": "0'))
    _, _, err = cli("report", complete)
    assert "the source of toy (reduced) has changed" in err
    assert "The source has changed" in (complete / "report.html").read_text()


def test_a_figure_of_many_points_becomes_pixels(complete: Path, cli: Cli) -> None:
    def cloud(records: list[dict[str, object]]) -> object:
        from matplotlib.figure import Figure as MplFigure

        figure = MplFigure()
        figure.subplots().scatter(*np.random.default_rng(0).random((2, 20_000)))
        return figure

    experiment = replace(toy.EXPERIMENT, analyse=lambda records: Analysis([], [Figure("cloud", cloud, "points")]))
    assert cli("report", complete, experiments={"toy": experiment})[0] == 0
    image = Page((complete / "report.html").read_text()).all("img")[-1]
    assert str(image["src"]).startswith("data:image/png;base64,")
    assert len(str(image["src"])) < 400_000


def test_list_names_everything(cli: Cli) -> None:
    code, out, err = cli("list")
    assert (code, err) == (0, "")
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if line.startswith("│")]
    question = toy.EXPERIMENT.question
    assert rows == [[name, question, "C4, C12", "8", "16"] for name in ("toy", "toy_two")]
