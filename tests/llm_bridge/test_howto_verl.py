"""HOWTO_VERL.md, line by line, as far as a CPU goes: options in verl's configuration, module, functions. Needs verl."""

import os
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("verl", reason="verl is not installed in this environment; pip install 'vcposim[verl]'")

from tests.llm_bridge.howto import ADAPTERS, blocks, wrapped_lines

PAGE, ROOT = "HOWTO_VERL.md", ADAPTERS.parents[1]
INSTALL, EXPORT, TRAIN = wrapped_lines(PAGE)

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def test_the_extra_exists_and_is_the_version_of_the_page() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert INSTALL == 'python -m pip install -e ".[verl]"'
    assert "verl[verl-core]==0.9.1" in extras["verl"]


def test_verls_configuration_takes_the_options() -> None:
    import verl
    from hydra import compose, initialize_config_dir

    program, *overrides = shlex.split(TRAIN)[2:]
    assert program == "verl.trainer.main_ppo"
    with initialize_config_dir(str(Path(verl.__file__).parent / "trainer" / "config"), version_base=None):
        config = compose("ppo_trainer", overrides=overrides)
    assert config.algorithm.adv_estimator == "vcposim/vcpo/length"
    assert config.actor_rollout_ref.actor.policy_loss.loss_mode == "vcposim"


def test_the_lines_run_with_the_module_loaded_by_verl(tmp_path: Path) -> None:
    (script,) = blocks(PAGE, "python")
    name, value = EXPORT.removeprefix("export ").split("=")
    environment = {**os.environ, name: value, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "tensor([" in done.stdout
