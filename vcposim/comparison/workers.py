"""Work that survives: files that appear whole or not at all, and pools of processes that end with their parent.

Another machine's workers come through `concurrent.futures.Executor` too (`cluster_executor`).
"""

import contextlib
import multiprocessing
import os
import platform
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from pathlib import Path

from vcposim.errors import InputError

THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS")


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file that appears whole or not at all, even if the machine stops or another process writes the same."""
    temporary = path.with_name(f"{path.name}.{platform.node()}.{os.getpid()}.tmp")  # machines share folders
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    with contextlib.suppress(OSError):  # some file systems cannot sync a directory
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def interrupts_held() -> Iterator[None]:
    """Hold Ctrl-C back for a moment. Processes started meanwhile never see it: the parent decides for them.

    The mask is what they inherit; the handler serves this process, where a thread of a library may catch the signal.
    """
    if not hasattr(signal, "pthread_sigmask") or threading.current_thread() is not threading.main_thread():
        yield
        return
    caught: list[int] = []
    handler = signal.signal(signal.SIGINT, lambda number, frame: caught.append(number))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, handler)
        if caught:
            signal.raise_signal(signal.SIGINT)


@contextlib.contextmanager
def local_executor(workers: int) -> Iterator[Executor]:
    """A pool of fresh processes, one numerical thread each; none outlives this process, even if it is killed."""
    others = set(multiprocessing.active_children())
    saved = {name: os.environ.get(name) for name in THREADS}
    os.environ.update(dict.fromkeys(THREADS, "1"))  # read by the workers when they load their libraries
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_start_worker)
    try:
        yield pool
    except BaseException:
        for worker in set(multiprocessing.active_children()) - others:
            worker.terminate()  # a setting may take minutes; nobody waits for it any more
        raise
    finally:
        pool.shutdown(cancel_futures=True)
        for name, value in saved.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def cluster_executor(address: str) -> Iterator[Executor]:
    """The workers of a dask.distributed scheduler. Start them where this runs, with OMP_NUM_THREADS=1.

    Raises `InputError` if dask.distributed is not installed or the scheduler does not answer.
    """
    try:
        from distributed import Client
    except ImportError:
        raise InputError("--scheduler: needs dask; install it with: python -m pip install distributed") from None
    try:
        client = Client(address, timeout=10)
    except (OSError, ValueError) as error:
        text = " ".join(str(error).split())
        raise InputError(f"--scheduler: {address!r} does not answer ({text}); give tcp://HOST:PORT") from None
    with client:
        yield client.get_executor(pure=False)


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)  # a pool worker whose parent was killed would wait for work for ever
