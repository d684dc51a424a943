"""What the README and `docs/ask.md`, its longer half, tell a newcomer to type works as typed."""

import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text() + (ROOT / "docs" / "ask.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.DOTALL)
SHELL = [line for kind, block in BLOCKS if kind == "sh" for line in block.replace("\\\n", " ").strip().splitlines()]

ROLLOUTS = "".join(
    f'{{"group": {g}, "score": {float(i % 3 == 0)}, "length": {3 + i}, "rollout_log_probs": {-4.0 - i / 7},'
    f' "log_prob": {-4.1 - i / 8}, "score_sq_norm": {2.0 + i % 4}}}\n'
    for g in range(12)
    for i in range(6)
)


def shell(line: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a line as bash would, with this interpreter's `python` and `vcposim` first on the path."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        ["bash", "-c", line], cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def test_set_up_commands_are_the_two_promised() -> None:
    install = [line for line in SHELL if "pip install" in line]
    assert install == [
        "python -m pip install -e . && python -m simulations run quick",
        'python -m pip install -e ".[dev]" && python -m pytest -n 3 --dist loadfile',
    ]


def test_extras_and_command_of_the_readme_exist() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(re.findall(r"\.\[(\w+)\]", README)) <= set(project["optional-dependencies"])
    assert project["scripts"] == {"vcposim": "vcposim.commands.main:main"}


@pytest.mark.slow
def test_questions_are_answered_as_typed(tmp_path: Path) -> None:
    (tmp_path / "rollouts.jsonl").write_text(ROLLOUTS)
    asked = [line for line in SHELL if line.startswith(("echo", "vcposim"))]
    assert len(asked) >= 3
    for line in asked:
        done = shell(line, tmp_path)
        assert done.returncode == 0, f"{line}\n{done.stderr}"
        assert not done.stderr, line
    assert {path.name for path in tmp_path.glob("*.png")} - {"first.png"} == {
        f"vcposim-{name}.png" for name in ("variance", "replay", "check")
    }


@pytest.mark.slow
def test_experiments_of_the_readme_exist(tmp_path: Path) -> None:
    listed = shell("python -m simulations list", tmp_path)
    assert listed.returncode == 0, listed.stderr
    named = [shlex.split(line)[4] for line in SHELL if line.startswith("python -m simulations run")]
    assert named
    assert all(name in listed.stdout for name in named)


@pytest.mark.parametrize("code", [block for kind, block in BLOCKS if kind == "python"])
def test_library_example_runs(code: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", code + "\nprint(c, scale)"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "nan" not in done.stdout
