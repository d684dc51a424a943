"""What is released works alone: the wheel, in a fresh environment, away from any checkout.

Needs the package registries and a minute, so it is asked for (extra `release`), as the gate does:

    VCPOSIM_RELEASE=1 python -m pytest tests/test_release.py
"""

import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.environ.get("VCPOSIM_RELEASE") != "1", reason="asked for with VCPOSIM_RELEASE=1"),
]


def ran(*command: str | Path, cwd: Path) -> str:
    """What a command prints, its errors too; it must succeed."""
    done = run(*command, cwd=cwd)
    assert done.returncode == 0, done.stdout
    return done.stdout


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    return subprocess.run(
        [str(x) for x in command],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
    )


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wheel and sdist of what git knows of this tree; of VCPOSIM_DIST where they are built already."""
    if "VCPOSIM_DIST" in os.environ:
        return Path(os.environ["VCPOSIM_DIST"]).resolve()
    pytest.importorskip("build", reason="needs build (extra release)")
    folder = tmp_path_factory.mktemp("release")
    ran("git", "clone", "--quiet", ROOT, folder / "tree", cwd=folder)
    ran(sys.executable, "-m", "build", "--outdir", folder / "dist", folder / "tree", cwd=folder)
    return folder / "dist"


@pytest.fixture(scope="module")
def installed(dist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the programs of an environment that holds the wheel and what it asks for, nothing else."""
    folder = tmp_path_factory.mktemp("alone")
    venv.create(folder / "venv", with_pip=True)
    programs = folder / "venv" / ("Scripts" if os.name == "nt" else "bin")
    ran(programs / "python", "-m", "pip", "install", "--quiet", "--no-compile", next(dist.glob("*.whl")), cwd=folder)
    return programs


def test_the_long_description_renders(dist: Path) -> None:
    pytest.importorskip("twine", reason="needs twine (extra release)")
    said = ran(sys.executable, "-m", "twine", "check", "--strict", *sorted(dist.iterdir()), cwd=dist)
    assert said.count("PASSED") == 2


def test_the_wheel_holds_the_packages_and_their_data_and_nothing_else(dist: Path) -> None:
    with zipfile.ZipFile(next(dist.glob("*.whl"))) as wheel:
        names = wheel.namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert tops == {"vcposim", "llm_bridge"}
    assert {"vcposim/py.typed", "llm_bridge/py.typed", "vcposim/replay/sample.jsonl"} <= set(names)
    with tarfile.open(next(dist.glob("*.tar.gz"))) as sdist:
        kept = {name.split("/", 1)[1] for name in sdist.getnames() if "/" in name}
    assert {"LICENSE", "README.md", "pyproject.toml"} <= kept


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("vcposim variance --no-figure", "Moments of the gradient estimate"),
        ("vcposim variance --estimator vcpo gspo --figure one.png", "figure: one.png"),
        ("vcposim replay --sample --no-figure", "Staleness:"),
        ("vcposim compare vcpo --size tiny --alone", "page: "),
        ("vcposim advise --lag 16 --prompts 16", "Evidence: "),
        ("vcposim catalogue vcpo", "coefficient"),
        ("vcposim check sequence_is --examples 5 --no-figure", "holds"),
        ("vcposim --help", "a checkout of the repository"),
        ("vcposim cite vcpo", "@misc{vcpo"),
        ("python -m vcposim --version", "vcposim "),
    ],
)
def test_a_wheel_alone_runs(installed: Path, tmp_path: Path, line: str, says: str) -> None:
    program, *words = line.split()
    assert says in ran(installed / program, *words, cwd=tmp_path)


def test_what_a_wheel_alone_cannot_do_ends_in_how(installed: Path, tmp_path: Path) -> None:
    done = run(installed / "python", "-m", "llm_bridge.train", "--task", "addition", cwd=tmp_path)
    assert done.returncode != 0
    assert "vcposim[torch]" in done.stdout.strip().splitlines()[-1]
