"""Try mutmut's mutants from one collected pytest session: a fork a mutant, its quickest tests first, until one fails.

    mutmut run --max-children 1 "vcposim.control.x_require_positive*"   # writes the mutants, and which tests cover what
    python tests/kit/mutation.py [--survivors] [--seconds N] [PATTERN ...]  # tries all, or those that survived so far
    python tests/kit/mutation.py --report                                   # what came of them

mutmut's own runner starts pytest anew for every mutant, with the name of every test that covers it; of a function that
1,400 tests cover that costs ten seconds a mutant. Verdicts are written where mutmut keeps its own.

`--seconds` bounds the processor time of one mutant: tests left out can only make survivors. `--survivors` tries
those again, on tests that they have not met: new ones, and `WIDER`, which mutmut's selection leaves out as slow.
"""

import argparse
import ast
import json
import math
import os
import resource
import sys
import time
import tomllib
import zlib
from collections import Counter
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
from _pytest.runner import runtestprotocol

EQUIVALENT = json.loads(Path(__file__).with_name("equivalent_mutants.json").read_text())
"""reason -> function -> mutated lines that compute the same"""

HANGS = 60
"""seconds of one mutant beyond `--seconds`: it never ends, which is a death"""

SURVIVED = (0, 5, 33)
"""exit codes of a mutant that no test fails for, or none tries"""

WIDER = (
    "tests/vcposim/test_backends.py",
    "tests/vcposim/testing/test_testing.py",
    "tests/vcposim/laboratory/test_exact.py",
    "tests/vcposim/laboratory/test_any_estimator.py",
    "tests/vcposim/learning/test_learning.py",
)
SILENT = ("-s", "-p", "no:cacheprovider", "--hypothesis-profile=mutation")


class Trials:
    """A plugin that tries mutants in place of running the tests."""

    def __init__(self, patterns: Iterable[str], survivors: bool, budget: float) -> None:
        stats = json.loads(Path("mutmut-stats.json").read_text())
        self.covered, self.seconds = stats["tests_by_mangled_function_name"], stats["duration_by_test"]
        self.patterns, self.survivors, self.budget = tuple(patterns) or ("*",), survivors, budget

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        paths = sorted(Path("vcposim").glob("*.py.meta"))
        records = {path: json.loads(path.read_text()) for path in paths}
        asked = [(key, path) for path in paths for key, code in self._codes(records[path]) if self._asked(key, code)]
        # in an order that knows nothing of the code, so that an interrupted run has tried a sample of it
        for mutant, path in sorted(asked, key=lambda pair: zlib.crc32(pair[0].encode())):
            fate = self._fate(mutant, session.items)
            records[path]["exit_code_by_key"][mutant] = fate
            path.write_text(json.dumps(records[path], indent=4))
            print(mutant, fate, flush=True)
        return True

    @staticmethod
    def _codes(record: dict[str, Any]) -> Iterable[tuple[str, int | None]]:
        return record["exit_code_by_key"].items()

    def _asked(self, mutant: str, code: int | None) -> bool:
        open_ = code in SURVIVED if self.survivors else code is None
        return open_ and any(fnmatch(mutant, pattern) for pattern in self.patterns)

    def _fate(self, mutant: str, items: list[pytest.Item]) -> int:
        tests = set(self.covered.get(mutant.rpartition("__mutmut_")[0], ()))
        ours = [i for i in items if i.nodeid not in self.seconds or (i.nodeid in tests and not self.survivors)]
        ours.sort(key=lambda item: self.seconds.get(item.nodeid, 60.0 * item.nodeid.startswith(WIDER)))
        child = os.fork()
        if not child:
            os._exit(_first_failure(mutant, ours, self.budget))
        _, status = os.waitpid(child, 0)
        return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def _first_failure(mutant: str, items: list[pytest.Item], budget: float) -> int:
    os.environ["MUTANT_UNDER_TEST"] = mutant
    start = time.process_time()
    resource.setrlimit(resource.RLIMIT_CPU, (int(min(start + budget, 1e6)) + HANGS, resource.RLIM_INFINITY))
    for item in items:
        reports: list[Any] = runtestprotocol(item, log=False, nextitem=None)
        if any(report.failed for report in reports):
            return 1
        if time.process_time() > start + budget:
            break
    return 0 if items else 33


def changed_lines(path: Path) -> dict[str, str]:
    """mutant -> its lines that differ from the original's, of a module that mutmut has written."""
    functions = {f.name: f for f in ast.walk(ast.parse(path.read_text())) if isinstance(f, ast.FunctionDef)}
    lines = {name: ast.unparse(f.body).splitlines() for name, f in functions.items() if "__mutmut_" in name}
    out = {}
    for name, mutated in lines.items():
        original = lines[name.rpartition("__mutmut_")[0] + "__mutmut_orig"]
        out[f"vcposim.{path.stem}.{name}"] = " ".join(x.strip() for x in mutated if x not in original)
    return out


def report() -> str:
    """Mutants by module and fate, the survivors by reason, and the share of the others that died."""
    fates: dict[str, Counter[str]] = {}
    excused = {(f"vcposim.{f}", line): why for why, of in EQUIVALENT.items() for f, ls in of.items() for line in ls}
    reasons: Counter[str] = Counter()
    alive = []
    for path in sorted(Path("vcposim").glob("*.py.meta")):
        count, changed = Counter[str](), changed_lines(path.with_suffix(""))
        fates[path.name.removesuffix(".py.meta")] = count
        for mutant, code in json.loads(path.read_text())["exit_code_by_key"].items():
            why = excused.get((mutant.rpartition("__mutmut_")[0], changed[mutant]), "survived")
            why = why if changed[mutant] else "the same syntax tree"
            fate = "untried" if code is None else "killed" if code not in SURVIVED else why
            reasons[fate] += 1
            count[fate if fate in ("untried", "killed", "survived") else "equivalent"] += 1
            alive += [f"{mutant}\n    {changed[mutant]}"] if fate == "survived" else []
    names = ("killed", "survived", "equivalent", "untried")
    lines = [f"{module:15s}" + "".join(f"{count[name]:5d} {name}" for name in names) for module, count in fates.items()]
    lines += [f"{n:5d} {why}" for why, n in reasons.most_common()] + alive
    share = reasons["killed"] / (reasons["killed"] + reasons["survived"])
    return "\n".join([*lines, f"{share:.1%} of the tried mutants that are not equivalent died"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--survivors", action="store_true", help="those that survived, on more tests")
    parser.add_argument("--report", action="store_true", help="only say what came of all of them")
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="processor time of one mutant (default: no limit)"
    )
    parser.add_argument("patterns", nargs="*", metavar="PATTERN", help='names of mutants, as in "vcposim.arrays.*"')
    arguments = parser.parse_args()
    os.chdir("mutants")
    sys.path[0] = os.getcwd()
    os.environ["MUTANT_UNDER_TEST"] = ""
    if arguments.report:
        print(report())
        return 0
    plugin = Trials(arguments.patterns, arguments.survivors, arguments.seconds)
    selected = tomllib.loads(Path("pyproject.toml").read_text())["tool"]["mutmut"]["pytest_add_cli_args_test_selection"]
    return int(pytest.main([*SILENT, *selected, *(WIDER if arguments.survivors else ())], plugins=[plugin]))


if __name__ == "__main__":
    sys.exit(main())
