"""HOWTO_TRL.md, line by line: the script runs as it stands, with the three lines, on two ranks. Needs TRL."""

import os
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("trl", reason="TRL is not installed in this environment; pip install 'vcposim[trl]'")

from tests.llm_bridge.howto import ADAPTERS, blocks, patched, wrapped_lines

PAGE, ROOT = "HOWTO_TRL.md", ADAPTERS.parents[1]
STOCK, REPORT, CHOICES = blocks(PAGE, "python")
(DIFF,) = blocks(PAGE, "diff")

pytestmark = pytest.mark.slow


def run(line: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable if word == "python" else word for word in shlex.split(line)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def test_the_extra_exists_and_allows_what_the_page_says() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert wrapped_lines(PAGE)[0] == 'python -m pip install -e ".[trl]"'
    assert "trl>=1.16,<1.17" in extras["trl"]


def test_the_script_runs_without_us(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(STOCK)
    done = run("python train.py", tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "vcpo/" not in done.stdout


@pytest.mark.parametrize("line", wrapped_lines(PAGE)[1:])
def test_three_lines_switch_it_on(line: str, tmp_path: Path) -> None:
    lines = {x[1:] for x in DIFF.splitlines() if x.startswith("+")} - set(STOCK.splitlines())
    assert len(lines) == 3
    ending = "" if "torch.distributed" in line else REPORT + CHOICES
    (tmp_path / "train.py").write_text(patched(STOCK, DIFF) + ending)
    done = run(line, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "'vcpo/step_scale'" in done.stdout
    assert not ending or done.stdout.count("'max_leverage'") == 6
