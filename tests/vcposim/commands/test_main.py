"""The command as a command: it starts at once, says its version, completes, and answers a misspelled word in a line."""

import json
import logging
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vcposim import __version__
from vcposim.catalogue import CATALOGUE, FAMILIES, entries
from vcposim.commands import catalogue
from vcposim.commands.completion import SHELLS, script
from vcposim.commands.figures import variance_figure
from vcposim.commands.logs import quiet_libraries
from vcposim.commands.main import main, subcommands
from vcposim.estimators import Estimator
from vcposim.weights import Weighting

HEAVY = {"numpy", "scipy", "matplotlib", "rich", "pyarrow", "arviz_stats", "torch", "hypothesis", "shtab"}


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    try:
        code = main(arguments)
    except SystemExit as stopped:
        code = int(stopped.code or 0)
    return code, *capsys.readouterr()


def modules_loaded(*arguments: str) -> set[str]:
    """Top-level names of the modules that a fresh interpreter has loaded after `vcposim` with these arguments."""
    code = f"import sys, vcposim.commands.main as m\ntry: m.main({list(arguments)!r})\nexcept SystemExit: pass\n"
    code += "print('LOADED', *sorted({name.partition('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.rpartition("LOADED")[2].split())


def processor_s(*command: str) -> Iterator[float]:
    """Processor seconds of a command and what it starts, five times: the time of day depends on neighbors."""
    import resource

    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        yield after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


# ------------------------------------------------------------------------------------------------------- starts at once


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["--help"], ["--version"], []])
def test_help_loads_nothing_that_computes(arguments: list[str]) -> None:
    assert not modules_loaded(*arguments) & HEAVY


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "without"),
    [
        (["catalogue"], {"scipy", "matplotlib", "pyarrow", "torch"}),
        (["cite", "vcpo"], {"scipy", "matplotlib", "pyarrow", "rich", "torch"}),
        (["variance", "--json"], {"matplotlib", "pyarrow", "torch", "arviz_stats"}),
        (["plan", "--help"], {"matplotlib", "pyarrow", "torch", "arviz_stats"}),
        (["replay", "--sample", "--no-figure"], {"matplotlib", "pyarrow", "torch", "arviz_stats", "hypothesis"}),
        (["check", "--help"], {"matplotlib", "pyarrow", "torch", "hypothesis"}),
    ],
)
def test_a_subcommand_loads_what_it_uses(arguments: list[str], without: set[str]) -> None:
    assert not modules_loaded(*arguments) & without


@pytest.mark.slow
def test_help_takes_at_most_three_times_an_import_of_numpy() -> None:
    ours = min(processor_s(sys.executable, "-m", "vcposim", "--help"))
    assert ours <= 3 * min(processor_s(sys.executable, "-c", "import numpy"))


@pytest.mark.slow
def test_a_library_that_loads_early_is_noticed() -> None:
    code = "import vcposim, vcposim.catalogue, sys; vcposim.exact; assert 'numpy' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert modules_loaded("variance", "--json") & HEAVY == {"numpy", "scipy", "rich"}


# ------------------------------------------------------------------------------------------------- help, version, words


def test_version_module_and_bare_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(capsys, "--version") == (0, f"vcposim {__version__}\n", "")
    bare = call(capsys)
    assert bare == call(capsys, "--help")
    assert all(f"  {name}" in bare[1] for name in subcommands())
    done = subprocess.run([sys.executable, "-m", "vcposim", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"vcposim {__version__}\n"


@pytest.mark.parametrize("name", subcommands())
def test_every_command_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capsys, name, "--help")
    assert (code, err) == (0, "")
    assert out.startswith(f"usage: vcposim {name} ")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("varianc", "command: unknown name 'varianc'; did you mean 'variance'?"),
        (
            "variance --weigting x",
            "vcposim variance: error: unrecognized arguments: --weigting; did you mean '--weight",
        ),
        ("variance --arms", "vcposim variance: error: argument --arms: expected one argument"),
        ("variance a.json b.json", "unrecognized arguments: b.json"),
        ("variance bandits", "problem: 'bandits' is neither a file nor 'bandit'"),
        ("variance none.json", "none.json: cannot be read"),
        ("variance p.json --problem q.json", "'q.json' and 'p.json' are two problems; name one"),
        ("variance p.json --arms 3", "--arms: 3 is for the random bandit, p.json says all itself; drop one"),
        ("variance --arms 1", "--arms: 1 leaves nothing to choose"),
        ("variance --drift inf", "--drift: inf is not a finite"),
        ("variance --problem-seed -1", "--problem-seed: -1 is negative"),
        ("variance --baseline opob opob", "--baseline: 'opob' is given twice"),
        ("variance --method exat", "method: unknown name 'exat'; did you mean 'exact'?"),
        ("catalogue kpop", "estimator: unknown name 'kpop'; did you mean 'kpo', 'icepop' or 'p4o'? (66 are known)"),
        ("catalogue --family tokn", "family: unknown name 'tokn'; did you mean 'token'?"),
        ("catalogue --family unbiased surrogate", "no entry belongs to unbiased and surrogate"),
        ("cite zzzzzzz", "estimator: unknown name 'zzzzzzz'; nearest: "),
        ("completion fish", "shell: unknown name 'fish'"),
    ],
)
def test_mistakes_get_one_line(capsys: pytest.CaptureFixture[str], arguments: str, says: str) -> None:
    code, out, err = call(capsys, *arguments.split())
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert says.replace("66 are", f"{len(CATALOGUE)} are") in err
    assert len(err) < 300


# ------------------------------------------------------------------------------------------------------------ catalogue


def test_the_catalogue_prints_formulas_as_they_are_and_cuts_no_name(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)  # a runner of tests may set it
    _, out, _ = call(capsys, "catalogue")
    for name, one in CATALOGUE.items():
        (line,) = (line for line in out.splitlines() if line.split()[:1] == [name])
        assert one.formula in line
    monkeypatch.setenv("COLUMNS", "60")
    narrow = call(capsys, "catalogue")[1]
    assert all(name in narrow.split() for name in CATALOGUE)
    assert max(map(len, narrow.splitlines()[:-3])) <= 60


def test_one_entry_in_full_as_text_and_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = call(capsys, "catalogue", "token_mis", "vcpo")
    assert "r_t 1[r_t <= 2] (R - mean) per token" in out
    assert "arXiv:2602.17616" in out
    found = json.loads(call(capsys, "catalogue", "vcpo", "--json")[1])
    assert list(found) == ["vcpo"]
    assert found["vcpo"]["host"] == "on_policy_optimal"
    assert found["vcpo"]["needs"] == ["scores"]


def test_the_python_of_an_entry_makes_it() -> None:
    names = {**vars(entries), "Estimator": Estimator, "Weighting": Weighting}
    for name, one in CATALOGUE.items():
        assert eval(catalogue.python(one.estimator), dict(names)) == one.estimator, name


def test_every_surrogate_says_what_it_does() -> None:
    """Beyond its kind: an entry with a surrogate that belongs to no family of what surrogates do is a forgotten one."""
    mechanisms = set(FAMILIES) - {"on_policy", "weighted", "surrogate", "token", "sequence", "unbiased", "baseline"}
    for name, one in CATALOGUE.items():
        assert set(one.families) <= set(FAMILIES)
        if one.estimator.surrogate is not None:
            assert set(one.families) & mechanisms, name


def test_families_split_the_catalogue(capsys: pytest.CaptureFixture[str]) -> None:
    def named(*families: str) -> set[str]:
        return set(json.loads(call(capsys, "catalogue", "--json", "--family", *families)[1]))

    kinds = [named("on_policy"), named("weighted"), named("surrogate")]
    assert set.union(*kinds) == set(CATALOGUE)
    assert sum(map(len, kinds)) == len(CATALOGUE)
    assert named("token") | named("sequence") == set(CATALOGUE)
    assert not named("token") & named("sequence")
    by_family = {name: named(name) for name in FAMILIES}
    assert all(by_family.values()), "a family that nothing belongs to"
    assert {"ppo_clip", "gspo", "a3po", "clip_cov"} < by_family["clip"]
    assert not by_family["clip"] & {"sequence_tis", "vespo", "rloo", "prefix_is"}
    assert {"sequence_mis", "geometric_mis", "ppo_negative_advantage_mask", "cppo"} < by_family["mask"]
    assert {"rloo", "opo", "vcpo", "mc_grpo"} < by_family["baseline"]
    assert not by_family["baseline"] & {"dr_grpo", "grpo", "reinforce", "sequence_is"}
    assert {"grpo", "delta_l", "maxrl", "vcpo_released_script"} < by_family["normalizer"]
    assert {"kimi_k15", "tba", "p3o"} < by_family["pull"]
    assert {"sapo", "gipo", "vespo", "drpo"} <= by_family["soft"]
    assert by_family["importance"] == {name for name in CATALOGUE if "_is" in name} | {"self_normalized"}
    assert {"sequence_is"} < named("unbiased") < named("sequence")
    assert "rloo" not in named("unbiased")
    assert named("weighted", "token") == named("weighted") & named("token")


# ------------------------------------------------------------------------------------------------------------- variance


def test_the_default_problem_is_said_and_three_ways_to_name_one_agree(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    says = "problem: none given, so a random bandit: 10 arms, drift 0.5, seed 0"
    _, default, _ = call(capsys, "variance", "--no-figure")
    assert default.startswith(says + "\n")
    assert default.replace("none given, so ", "") == call(capsys, "variance", "bandit", "--no-figure")[1]
    assert default.replace("none given, so ", "") == call(capsys, "variance", "--problem", "bandit", "--no-figure")[1]
    file = tmp_path / "[bold]p.json"  # rich would read this as a mark
    file.write_text('{"kind": "bandit", "target": [0.5, 0.5], "behavior": [0.25, 0.75], "reward": [1, 0]}')
    positional = call(capsys, "variance", str(file), "--no-figure")
    assert positional == call(capsys, "variance", "--problem", str(file), "--no-figure")
    assert positional[1].startswith(f"problem: {file}\n")
    assert json.loads(call(capsys, "variance", str(file), "--json")[1])["problem"] == str(file)


@pytest.mark.parametrize("columns", ["40", "80", "200"])
def test_no_number_of_the_table_is_cut(columns: str, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    _, out, _ = call(capsys, "variance", "--no-figure", "--weighting", "importance", "self_normalize")
    assert "…" not in out
    assert out.count("(self_normalize)") == 3


def test_columns_are_explained_under_the_table_and_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    table, usage = call(capsys, "variance", "--no-figure")[1], call(capsys, "variance", "--help")[1]
    for words in ("more noise than signal", "points uphill", "0 is unbiased"):
        assert words in table
        assert words in usage


# ----------------------------------------------------------------------------------------------------------- completion


@pytest.mark.parametrize("shell", SHELLS)
def test_every_shell_gets_commands_options_and_names(shell: str) -> None:
    text = script(shell)
    for word in (*subcommands(), "--weighting", "leverage_damped_mean", "vcpo_released_winsorized"):
        assert word in text, word


def test_bash_completes(tmp_path: Path) -> None:
    (tmp_path / "my problem.json").touch()
    (tmp_path / "vcposim.bash").write_text(script("bash"))
    ask = """
    source vcposim.bash
    try() {
        COMP_WORDS=("$@") COMP_CWORD=$(($# - 1)) COMPREPLY=()
        $(complete -p vcposim | sed 's/.*-F \\([^ ]*\\).*/\\1/') vcposim "${COMP_WORDS[COMP_CWORD]}"
        printf '%s|' "${COMPREPLY[@]}"; echo
    }
    try vcposim va; try vcposim variance --wei; try vcposim variance --weighting tru; try vcposim cite rl
    try vcposim variance my
    """
    done = subprocess.run(["bash", "-c", ask], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split("\n") == ["variance|", "--weighting|", "truncate|", "rloo|", "my problem.json|", ""]


# ----------------------------------------------------------------------------------------------------------------- logs


def test_other_libraries_say_errors_in_one_line_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    other = logging.getLogger("matplotlib.font_manager")
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        with quiet_libraries("vcposim"):
            other.warning("building the font cache")
            other.error("no font\nat all")
            warnings.warn_explicit("old", DeprecationWarning, "/x/site-packages/lib/a.py", 3)
            warnings.warn_explicit("overflow", RuntimeWarning, "/x/mine.py", 3)
    err = capsys.readouterr().err
    assert "vcposim: matplotlib: no font at all\n" in err
    assert "font cache" not in err
    assert "vcposim: mine.py, line 3: RuntimeWarning: overflow\n" in err
    assert not shown
    assert not logging.getLogger().handlers or all(
        "OneLine" not in type(h).__name__ for h in logging.getLogger().handlers
    )


@pytest.mark.slow
def test_the_trainer_explains_itself_within_two_seconds() -> None:
    pytest.importorskip("torch")
    assert any(seconds <= 2 for seconds in processor_s(sys.executable, "-m", "llm_bridge.train", "--help"))


def test_the_longest_bar_ends_within_the_frame() -> None:
    """Also where it has no bias, and where some estimator has no moments at all."""
    shown = (("sequence_is", 2.0, 2.0), ("vcpo", 1.0, 1.5), ("broken", None, None))
    rows: list[Any] = [{"estimator": n, "variance_of_mean": v, "mse": m} for n, v, m in shown]
    axes = variance_figure(rows).axes[0]
    assert axes.get_xlim()[0] == 0
    assert 2.05 < axes.get_xlim()[1] < 2.5
