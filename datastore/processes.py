"""Local worker processes for tasks that hold the interpreter's lock.

They are forked from a server that has imported what they need, and never from the process that
leads, which may have threads. They end with it, however it ends.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Final, Protocol, Self

_PRELOADED: Final = ["datastore.append", "datastore.ingest"]


class Flag(Protocol):
    """An event of threads or of processes."""

    def is_set(self) -> bool:
        """Whether it was set."""

    def set(self) -> None:
        """Set it."""


@dataclass(frozen=True)
class Outcome:
    """What a task returned or raised; neither if it was not begun because another had failed."""

    result: Any = None
    error: Exception | None = None


def attempt(failed: Flag, task: tuple[Any, ...]) -> Outcome:
    """Run a task unless one has failed; so all end before the first error is raised.

    Dask would raise it at once and leave the other workers writing.
    """
    if failed.is_set():
        return Outcome()
    try:
        return Outcome(task[0](*task[1:]))
    except Exception as error:
        failed.set()
        return Outcome(error=error)


def attempt_in_worker(task: tuple[Any, ...]) -> Outcome:
    """Run a task in a process of a pool; see `attempt`."""
    assert _failed is not None, "_begin has run"
    return attempt(_failed, task)


class ProcessPool:
    """Worker processes for as long as the pool is open."""

    def __init__(self, number: int) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOADED)
        leader_lives, self._life = context.Pipe(duplex=False)
        self.executor = ProcessPoolExecutor(
            number, context, _begin, (leader_lives, context.Event())
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            self._life.close()  # what they are doing is not wanted any more
        self.executor.shutdown(cancel_futures=True)
        self._life.close()

    @contextmanager
    def losses_named(self) -> Iterator[None]:
        """Say what it may mean that a worker is gone."""
        try:
            yield
        except BrokenProcessPool as error:
            raise ChildProcessError(
                "a worker process was killed or could not start: if memory ran out, use fewer "
                "(--workers 1) or lower cells_per_slice and cells_per_partition; what is finished "
                "is kept. A Python script that ingests needs if __name__ == '__main__':"
            ) from error


_failed: Flag | None = None
"""In a worker: whether a task of the pool has failed."""


def _begin(leader_lives: Connection, failed: Flag) -> None:
    """Make a process a worker."""
    global _failed
    _failed = failed
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the leader gets it, too, and ends its workers
    threading.Thread(target=_end_with_leader, args=(leader_lives,), daemon=True).start()


def _end_with_leader(leader_lives: Connection) -> None:
    try:
        leader_lives.recv_bytes()
    except (EOFError, OSError):
        os._exit(1)
