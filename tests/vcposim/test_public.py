"""What `import vcposim` offers: names that exist, loaded when used; results that show and convert themselves."""

import ast
import inspect
import math
import subprocess
import sys

import numpy as np
import pytest

import vcposim
from tests.kit.statistical import near
from vcposim.commands.replay import SAMPLE
from vcposim.pipeline.lengths import fixed
from vcposim.pipeline.plan import Cluster, survey
from vcposim.results import Records, Result


def fresh(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_every_public_name_exists_and_type_checkers_see_the_same() -> None:
    assert sorted(vcposim.__all__) == sorted(vcposim._PLACES)
    assert all(getattr(vcposim, name) is not None for name in vcposim.__all__)
    assert set(vcposim.__all__) <= set(dir(vcposim))
    with pytest.raises(AttributeError, match="module 'vcposim' has no attribute 'estimate'"):
        vcposim.estimate  # type: ignore[attr-defined]  # noqa: B018
    tree = ast.parse(inspect.getsource(vcposim))
    (typed,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.asname or alias.name for node in typed.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert seen == set(vcposim.__all__)


def test_importing_it_loads_nothing_and_star_loads_all() -> None:
    heavy = "{'numpy', 'scipy', 'rich', 'torch', 'matplotlib'} & set(sys.modules)"
    assert fresh(f"import sys, vcposim; print({heavy})") == "set()\n"
    assert fresh("from vcposim import *; print(Batch.__name__, exact.__name__)") == "Batch vcposim.laboratory.exact\n"


def test_a_newcomers_first_lines_work() -> None:
    code = """
from vcposim import CATALOGUE, Batch, Estimator, bandit_problem, check_estimator, entry, exact, monte_carlo, replay
from vcposim import records_of
problem = bandit_problem([0.7, 0.3], [0.4, 0.6], [1.0, 0.0])
names = ["reinforce", "vcpo"]
known = {name: exact.moments(problem, entry(name).estimator, 4) for name in names}
drawn = monte_carlo.moments(problem, {n: CATALOGUE[n].estimator for n in names}, group_size=4, samples=400, seed=0)
print([sorted(row)[:2] for row in records_of(known)], len(records_of(drawn)), replay.__name__)
check_estimator("rloo", examples=2)
"""
    assert fresh(code) == "[['cosine', 'descent_efficiency'], ['cosine', 'descent_efficiency']] 2 vcposim.replay\n"


def results() -> dict[str, Result]:
    problem = vcposim.bandit_problem([0.7, 0.3], [0.4, 0.6], [1.0, 0.0])
    estimator = vcposim.entry("vcpo").estimator
    drawn = vcposim.monte_carlo.moments(problem, {"vcpo": estimator}, group_size=4, samples=400, seed=0)
    cluster = Cluster(fixed(10), 2, 4, 4.0, 4, 2, train_s=6.0, train_devices=2, sync_s=1.0)
    gauges = vcposim.panel(problem.sample(np.random.default_rng(0), 1, 50))
    sample = vcposim.replay.replay(vcposim.read_dump(SAMPLE), resamples=100)
    return {
        "replay": sample,
        "exact": vcposim.exact.moments(problem, estimator, 4),
        "drawn": drawn["vcpo"],
        "pipeline": next(iter(survey(cluster, [1], [1], steps=3, seeds=2))).outcomes[0],
        "gauge": next(iter(gauges.values())),
    }


def test_results_convert_to_plain_records_and_show_them_in_a_notebook() -> None:
    found = results()
    for name, result in found.items():
        for record in result.records():
            assert record, name
            assert all(type(value) in (float, int, str, bool, type(None)) for value in record.values()), record
            numbers = [value for value in record.values() if type(value) is float and math.isfinite(value)]
            html = result._repr_html_()
            assert all(f"<td>{value:.4g}</td>" in html for value in numbers)
            assert all(f"<th>{key}</th>" in html for key in record)
    both = vcposim.records_of({"a": found["exact"], "b": found["exact"]})
    assert [row["name"] for row in both] == ["a", "b"]
    assert both[0]["mse"] == near(float(found["exact"].mse))  # type: ignore[attr-defined]


def test_what_is_shown_is_escaped_and_what_is_missing_is_a_dash() -> None:
    html = Records([{"name": "<b>", "x": math.nan}, {"name": "c", "y": None}])._repr_html_()
    assert "<td>&lt;b&gt;</td><td>—</td><td>—</td>" in html
    with pytest.raises(NotImplementedError, match="Result has no records"):
        Result().records()
