"""Ranks of a process group, without the seconds that each would take to import torch and transformers.

They are forked from a server (that of `multiprocessing`) which has imported both and done nothing else: no thread runs
in it, no autograd has. A rank's environment is what `torchrun` gives its own, and the store that they meet at is held
here, as the agent of `torchrun` holds it; how `torchrun` itself starts them is looked at where that is the question.
"""

import multiprocessing
import multiprocessing.connection
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

PATIENCE_S = 300
"""a bound on waiting for a rank, not on anything measured"""
IMPORTED = ("tests.llm_bridge.two_ranks", "tests.llm_bridge.training.two_ranks", "llm_bridge.training.session")
"""what brings in all that ranks of the tests use"""


def server() -> Any:
    """The context whose processes are forked from one that has imported `IMPORTED`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(IMPORTED))
    return context


def together(folder: Path, job: Callable[..., Any], *words: Any, ranks: int = 2) -> list[str]:
    """Run `job(*words)` on every rank at once; what each said on standard error. `folder` is for that.

    Raises AssertionError if one of them fails, with what it said; the others, which may wait for it, are then killed.
    """
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=PATIENCE_S))
    given = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    given |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": "1"}
    folder.mkdir(parents=True, exist_ok=True)
    said = [folder / f"said.{rank}" for rank in range(ranks)]
    started = [
        server().Process(target=_rank, args=(given | {"RANK": str(k), "LOCAL_RANK": str(k)}, str(file), job, words))
        for k, file in enumerate(said)
    ]
    for one in started:
        one.start()
    try:
        left = set(started)
        while left:
            ended = multiprocessing.connection.wait([one.sentinel for one in left], timeout=PATIENCE_S)
            assert ended, "ranks hang"
            for one in [one for one in left if one.sentinel in ended]:
                one.join()
                assert one.exitcode == 0, said[started.index(one)].read_text()[-4000:]
                left.remove(one)
    finally:
        for one in started:
            one.kill()
            one.join()
    return [file.read_text() for file in said]


def _rank(environment: dict[str, str], said: str, job: Callable[..., Any], words: tuple[Any, ...]) -> None:
    os.environ.update(environment)
    file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for standard in (1, 2):
        os.dup2(file, standard)
    job(*words)
