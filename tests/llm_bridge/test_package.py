"""The package as a user meets it: its README runs, its names exist, and without torch it says so in one line."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import tests

pytestmark = pytest.mark.slow

ROOT = Path(tests.__file__).parents[1]


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )


def blocks() -> list[str]:
    """The Python examples of the README."""
    return re.findall(r"```python\n(.*?)```", (ROOT / "llm_bridge" / "README.md").read_text(), re.S)


def test_without_torch_one_line_says_what_to_install() -> None:
    done = run("import sys; sys.modules['torch'] = None; import llm_bridge")
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last == "ModuleNotFoundError: llm_bridge needs torch; install it with: pip install 'vcposim[torch]'"
    assert "During handling" not in done.stderr


def test_public_names_exist_and_need_no_transformers() -> None:
    pytest.importorskip("torch")
    done = run(
        "import sys; sys.modules['transformers'] = None; import llm_bridge\n"
        "assert sorted(llm_bridge.__all__) == llm_bridge.__all__\n"
        "print(all(hasattr(llm_bridge, name) for name in llm_bridge.__all__))"
    )
    assert done.stdout == "True\n", done.stderr


def test_the_readmes_update_runs(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    seen: dict[str, object] = {}
    exec(blocks()[0], seen)
    brake = seen["brake"]
    assert 0 < brake.record.step_scale < 1  # type: ignore[attr-defined]
    assert brake.record.trajectories == 8  # type: ignore[attr-defined]
    printed = capsys.readouterr().out
    for name in ("step_scale", "ess_fraction_sequence", "ess_fraction_token", "ess_fraction_gradient"):
        assert f"vcpo/{name}" in printed


def test_the_readmes_rollouts_run(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("reasoning_gym")
    exec(blocks()[1], {})
    assert "torch.Size([32, " in capsys.readouterr().out
