"""Sweeps of learning experiments: the same bytes from one worker, from two, and from a dask.distributed cluster."""

import contextlib
from collections.abc import Iterator
from concurrent.futures import Executor
from dataclasses import replace
from pathlib import Path

import pytest

from simulations.protocol import Setting
from simulations.questions import async_learning
from simulations.runner import RunFolder, cluster_executor, local_executor, sweep

pytestmark = pytest.mark.slow


def tiny(size: str) -> list[Setting]:
    place = {"task": "exact_match_8", "law": "uniform", "lag": 4, "updates": 20}
    return [{**place, "seeds": [seed]} for seed in range(3)]


def swept(path: Path, executor: contextlib.AbstractContextManager[Executor]) -> bytes:
    folder = RunFolder.plan(path, replace(async_learning.EXPERIMENT, settings=tiny), "reduced")
    folder.start(["test"])
    with executor as pool:
        assert sweep([folder], pool) == []
    return folder.results.read_bytes()


@contextlib.contextmanager
def cluster() -> Iterator[Executor]:
    distributed = pytest.importorskip("distributed")
    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, host="127.0.0.1", dashboard_address=None) as local,
        cluster_executor(local.scheduler_address) as executor,
    ):
        yield executor


def test_records_do_not_depend_on_who_computes_them(tmp_path: Path) -> None:
    one, two = (swept(tmp_path / str(n), local_executor(n)) for n in (1, 2))
    assert one == two
    assert swept(tmp_path / "cluster", cluster()) == one
