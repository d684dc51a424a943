"""Try mutmut's mutants from one collected pytest session: a fork a mutant, its quickest tests first, until one fails.

    mutmut run --max-children 1 "vcposim.control.x_require_positive*"   # writes the mutants, and which tests cover what
    python tests/mutation.py [--survivors] [--seconds N] [PATTERN ...]  # tries all, or those that survived so far
    mutmut results                                                      # the survivors

mutmut's own runner starts pytest anew for every mutant, with the name of every test that covers it; of a function that
1,400 tests cover that costs ten seconds a mutant. Verdicts are written where mutmut keeps its own.

`--seconds` bounds the processor time of one mutant: tests left out can only make survivors. `--survivors` tries
those again on `WIDER` too, which mutmut's selection (pyproject.toml) leaves out as slow.
"""

import argparse
import json
import math
import os
import resource
import sys
import time
import tomllib
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
from _pytest.runner import runtestprotocol

HANGS = 60
"""seconds of one mutant beyond `--seconds`: it never ends, which is a death"""

WIDER = ("tests/test_step_rules.py", "tests/test_backends.py", "tests/test_testing.py", "tests/test_exact.py")
SILENT = ("-s", "-p", "no:cacheprovider", "--hypothesis-profile=mutation")


class Trials:
    """A plugin that tries mutants in place of running the tests."""

    def __init__(self, patterns: Iterable[str], survivors: bool, budget: float) -> None:
        stats = json.loads(Path("mutmut-stats.json").read_text())
        self.covered, self.seconds = stats["tests_by_mangled_function_name"], stats["duration_by_test"]
        self.patterns, self.survivors, self.budget = tuple(patterns) or ("*",), survivors, budget

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        for path in sorted(Path("vcposim").glob("*.py.meta")):
            record = json.loads(path.read_text())
            codes = record["exit_code_by_key"]
            for mutant in [key for key, code in codes.items() if self._asked(key, code)]:
                codes[mutant] = self._fate(mutant, session.items)
                print(mutant, codes[mutant], flush=True)
                path.write_text(json.dumps(record, indent=4))
        return True

    def _asked(self, mutant: str, code: int | None) -> bool:
        open_ = code in (0, 5, 33) if self.survivors else code is None
        return open_ and any(fnmatch(mutant, pattern) for pattern in self.patterns)

    def _fate(self, mutant: str, items: list[pytest.Item]) -> int:
        tests = set(self.covered.get(mutant.rpartition("__mutmut_")[0], ()))
        ours = [item for item in items if item.nodeid in tests or item.nodeid not in self.seconds]
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--survivors", action="store_true", help="those that survived, on more tests")
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="processor time of one mutant (default: no limit)"
    )
    parser.add_argument("patterns", nargs="*", metavar="PATTERN", help='names of mutants, as in "vcposim.arrays.*"')
    arguments = parser.parse_args()
    os.chdir("mutants")
    sys.path[0] = os.getcwd()
    os.environ["MUTANT_UNDER_TEST"] = ""
    plugin = Trials(arguments.patterns, arguments.survivors, arguments.seconds)
    selected = tomllib.loads(Path("pyproject.toml").read_text())["tool"]["mutmut"]["pytest_add_cli_args_test_selection"]
    return int(pytest.main([*SILENT, *selected, *(WIDER if arguments.survivors else ())], plugins=[plugin]))


if __name__ == "__main__":
    sys.exit(main())
