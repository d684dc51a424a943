"""`python -m llm_bridge.train` as a user meets it: files, resume after kill -9, dumps, interrupts, one-line errors."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("accelerate")

from transformers.utils.logging import disable_progress_bar  # noqa: E402

from llm_bridge import train  # noqa: E402
from llm_bridge.training import TrainConfig, session  # noqa: E402
from llm_bridge.training.checkpoints import TENSORS, checkpoints  # noqa: E402
from tests.llm_bridge.training.toys import tiny  # noqa: E402
from vcposim.commands import main as cli  # noqa: E402

ROOT = Path(train.__file__).parents[1]
SMALL = [
    *[
        "--groups",
        "2",
        "--group-size",
        "3",
        "--max-new-tokens",
        "3",
        "--lr",
        "0.003",
        "--evaluate-problems",
        "4",
        "--lag",
        "2",
    ]
]
LONG = [*SMALL, "--updates", "30", "--checkpoint-every", "4", "--step-rule", "ess"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a model of a few thousand parameters."""
    folder = tmp_path_factory.mktemp("model")
    disable_progress_bar()
    tiny().save_pretrained(folder)
    return str(folder)


def call(*words: Any) -> int:
    return train.main([str(word) for word in words])


def metrics(folder: Path) -> bytes:
    return (folder / "metrics.jsonl").read_bytes()


def test_every_setting_has_a_flag_in_a_section() -> None:
    named = [name for names in train.SECTIONS.values() for name in names]
    assert sorted(named) == sorted(f.name for f in fields(TrainConfig))


def test_a_run_leaves_its_files_and_a_model_to_go_on_with(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tensorboard")
    run, dump = tmp_path / "run", tmp_path / "rollouts.jsonl"
    words = [*SMALL, "--model", model, "--updates", 4, "--output", run, "--dump", dump, "--report-to", "tensorboard"]
    assert call(*words) == 0
    out = capsys.readouterr().err.splitlines()
    assert out[0].startswith("update 1/4  reward ")
    assert out[-1].startswith("4 updates in ")
    records = [json.loads(line) for line in metrics(run).splitlines()]
    assert [record["step"] for record in records] == [0, 1, 2, 3]
    assert [record["lag"] for record in records] == [0, 1, 2, 2]
    assert list(run.glob("log/events*"))
    assert call(*SMALL, "--model", run / "model", "--updates", 1, "--output", tmp_path / "next") == 0

    assert call(*words) == 2
    assert "already holds a run; add --resume" in capsys.readouterr().err

    rows = [json.loads(line) for line in dump.read_text().splitlines()]
    assert len(rows) == 4 * 6
    assert {row["learner_version"] - row["version"] for row in rows} == {0, 1, 2}
    assert cli.main(["replay", str(dump), "--no-figure", "--json"]) == 0
    replayed = json.loads(capsys.readouterr().out)
    assert "score_sq_norm" in json.dumps(replayed)


def killed_at(update: int, words: list[str], run: Path, number: int) -> int:
    """Start the command, send it a signal when its metrics reach `update`, return its exit code."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(
        [sys.executable, "-m", "llm_bridge.train", *words, "--output", str(run)], cwd=ROOT, env=environment,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    file = run / "metrics.jsonl"
    try:
        while process.poll() is None and (not file.exists() or metrics(run).count(b"\n") < update):
            time.sleep(0.002)
        process.send_signal(number)
        return process.wait(timeout=120)
    finally:
        process.kill()


def test_after_kill_9_a_resumed_run_writes_the_same_bytes(model: str, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    words = [*LONG, "--model", model, "--dump"]
    assert call(*words, tmp_path / "whole.jsonl", "--output", whole) == 0
    assert killed_at(10, [*words, str(tmp_path / "broken.jsonl")], broken, signal.SIGKILL) == -signal.SIGKILL
    assert checkpoints(broken / "checkpoints")
    assert metrics(broken) != metrics(whole)
    with (broken / "metrics.jsonl").open("a") as file:
        file.write('{"step": 11, "rew')  # as if cut in the middle of a line
    assert call("--resume", "--output", broken, "--dump", tmp_path / "broken.jsonl") == 0
    assert metrics(broken) == metrics(whole)
    assert (tmp_path / "broken.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    last = [run / "checkpoints" / "update-00000030" / TENSORS for run in (whole, broken)]
    assert last[0].read_bytes() == last[1].read_bytes()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_saves_and_says_how_to_go_on(
    model: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    code: int,
) -> None:
    run, words = tmp_path / "run", [*SMALL, "--model", model, "--updates", 5]
    write = session.Session._write

    def interrupted(self: Any, record: Any) -> None:
        write(self, record)
        if record["step"] == 2:
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(session.Session, "_write", interrupted)
        assert call(*words, "--output", run) == code
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted after update 3, saved; go on with --resume"
    assert call("--resume", "--output", run) == 0
    assert "resumed at update 3" in capsys.readouterr().err
    assert call(*words, "--output", tmp_path / "whole") == 0
    assert metrics(run) == metrics(tmp_path / "whole")


def test_a_finished_run_goes_on_as_a_longer_one(model: str, tmp_path: Path) -> None:
    for name, law in (("fixed", "fixed"), ("in_flight", "in_flight")):
        words = [*SMALL, "--model", model, "--lag-law", law]
        short, long = tmp_path / f"short-{name}", tmp_path / f"long-{name}"
        assert call(*words, "--updates", 2, "--output", short) == 0
        assert call("--resume", "--updates", 5, "--output", short) == 0
        assert call(*words, "--updates", 5, "--output", long) == 0
        assert metrics(short) == metrics(long)


def test_a_run_killed_before_its_first_checkpoint_starts_again(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert call(*SMALL, "--model", model, "--updates", 2, "--output", run) == 0
    expected = metrics(run)
    for path in checkpoints(run / "checkpoints"):
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    assert call("--resume", "--output", run) == 0
    assert "no checkpoint yet: starting again" in capsys.readouterr().err
    assert metrics(run) == expected


def test_wrong_input_is_one_line(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    good = [*SMALL, "--model", model, "--updates", 2]
    assert call(*good, "--output", run) == 0
    capsys.readouterr()
    tensors = checkpoints(run / "checkpoints")[-1] / TENSORS
    tensors.write_bytes(tensors.read_bytes()[:-7])
    (tmp_path / "bad.toml").write_text("lag = = 2")
    new = ["--output", tmp_path / "new"]
    for words, says in (
        (["--resume", "--output", run], f"{tensors}: damaged or cut off"),
        (["--resume", "--output", run, "--lag", 3], "lag: 3 asked for, 2 in"),
        (["--resume", *new], "holds no run (no config.json)"),
        ([*good, *new, "--model", tmp_path / "nowhere"], "nowhere"),
        ([*good, *new, "--task", "additon"], "did you mean 'addition'"),
        ([*good, *new, "--estimator", "vcop"], "did you mean 'vcpo'"),
        ([*good, *new, "--estimator", "vcpo_truncation_aware"], "cannot be served in training"),
        ([*good, *new, "--lag", -1], "lag: -1 is negative"),
        ([*good, *new, "--lag", "two"], "lag: 'two' is not a whole number"),
        ([*good, *new, "--config", tmp_path / "none.toml"], "no such file"),
        ([*good, *new, "--config", tmp_path / "bad.toml"], "not a readable TOML file"),
        ([*good, *new, "--report-to", "tensorbord"], "did you mean 'tensorboard'"),
        ([*good, *new, "--step-rule", "replay", "--step-schedule", "a,b"], "neither numbers like 1,0.5 nor"),
        ([*good, *new, "--task-option", "digits"], "is not NAME=VALUE"),
    ):
        assert call(*words) == 2, says
        err = capsys.readouterr().err
        assert says in err
        assert err.count("\n") == 1
        assert not (tmp_path / "new").exists()
    with pytest.raises(SystemExit):
        call("--estimatr", "vcpo")
    assert "did you mean --estimator" in capsys.readouterr().err
