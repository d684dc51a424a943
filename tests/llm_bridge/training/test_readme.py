"""What the README says about training can be typed: its commands parse, its example runs."""

import re
import shlex
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("accelerate")

import llm_bridge
from llm_bridge import train
from llm_bridge.training import TrainConfig

TEXT = (Path(llm_bridge.__file__).parent / "README.md").read_text()


def test_its_commands_are_understood() -> None:
    lines = re.sub(r"\\\n", " ", TEXT).splitlines()
    commands = [line.strip() for line in lines if line.strip().startswith("python -m llm_bridge.train --")]
    assert len(commands) == 2
    for command in commands:
        filled = command.replace("$seed", "0").replace("$lag", "16").replace("$1", "vcpo").replace("$2", "ess_sqrt")
        given = train.settings(train.parser().parse_args(shlex.split(filled)[3:]))
        assert TrainConfig.from_dict(given).lag in (0, 16)


def test_its_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", TEXT, re.S) if "Trainer(" in block)
    exec(code, {})
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[2] for line in printed[:3]] == ["0.0", "1.0", "2.0"]  # lags
