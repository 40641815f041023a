"""A Dask cluster made of an array's tasks: one has the scheduler, all have workers.

The leader writes its address and a certificate of this one cluster into a file that only its user
can read; who has not read it cannot connect.
"""

import asyncio
import json
import logging
import multiprocessing
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Final

import dask

from datastore.work_folder import unfinished

log = logging.getLogger(__name__)

_REACHED_WITHIN_SECONDS: Final = 15
_LOOK_EVERY_SECONDS: Final = 0.5
_LET_GO_WITHIN_SECONDS: Final = 5
_SETTINGS: Final = {
    "distributed.comm.require-encryption": True,
    # Web pages about the work, which anybody could read.
    "distributed.scheduler.http.routes": [],
    "distributed.worker.http.routes": [],
    "logging.distributed": "warning",
}


@contextmanager
def leading(file: Path, task: int, number: int) -> Iterator[str]:
    """Yield the address of a scheduler with workers here; others that read `file` join it.

    Args:
        file: Where to say so.
        task: Number of the task, for people.
        number: Worker processes on this machine.
    """
    with dask.config.set(_SETTINGS):
        from dask.distributed import LocalCluster
        from distributed.security import Security
        from distributed.utils import get_ip

        security = Security.temporary()
        tls = _as_settings(security)
        with (
            dask.config.set(tls),
            LocalCluster(
                n_workers=number,
                threads_per_worker=1,  # most of a task holds the interpreter's lock
                memory_limit=0,
                host=get_ip(),
                dashboard_address=":0",
                security=security,
            ) as cluster,
        ):
            _tell(file, {"task": task, "address": cluster.scheduler_address, "tls": tls})
            try:
                yield str(cluster.scheduler_address)
            finally:
                file.unlink(missing_ok=True)


def work_for_leader(file: Path, number: int) -> bool:
    """Work in so many processes until the leader lets them go.

    Returns:
        Whether it could be reached.
    """
    facts = _leader(file)
    if facts is None:
        return False
    log.info("working for task %d at %s", facts["task"], facts["address"])
    # Started anew, and not forked: this process may have threads.
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=_work, args=(facts["address"], facts["tls"]), daemon=True)
        for _ in range(number)
    ]
    for process in processes:
        process.start()
    while any(process.is_alive() for process in processes) and _leader(file) == facts:
        wait([process.sentinel for process in processes], _LOOK_EVERY_SECONDS)
    wait_until = time.monotonic() + _LET_GO_WITHIN_SECONDS
    for process in processes:
        process.join(max(0.0, wait_until - time.monotonic()))
        process.terminate()  # it never met the leader, who is gone
        process.join()
    if any(process.exitcode == 0 for process in processes):
        return True
    log.warning("task %d, which leads at %s, was not reached", facts["task"], facts["address"])
    return False


def _leader(file: Path) -> dict[str, Any] | None:
    try:
        facts: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return facts


def _tell(file: Path, facts: Mapping[str, Any]) -> None:
    beside = unfinished(file)
    beside.touch(mode=0o600)
    beside.write_text(json.dumps(facts), encoding="utf-8")
    beside.replace(file)


def _work(address: str, tls: Mapping[str, Any]) -> None:
    """Be a worker of one thread; in a process of its own."""

    async def until_let_go() -> None:
        from dask.distributed import Worker

        patience = _REACHED_WITHIN_SECONDS
        async with Worker(address, nthreads=1, memory_limit=0, death_timeout=patience) as worker:
            await worker.finished()

    with dask.config.set({**_SETTINGS, **tls}), suppress(KeyboardInterrupt):
        try:
            asyncio.run(until_let_go())
        except (OSError, TimeoutError):
            raise SystemExit(1) from None


def _as_settings(security: Any) -> dict[str, Any]:
    """Certificate and key as settings of Dask, for the roles that tasks of an array have."""
    tls = "distributed.comm.tls"
    return {
        f"{tls}.ca-file": security.tls_ca_file,
        **{
            f"{tls}.{role}.{kind}": getattr(security, f"tls_{role}_{kind}")
            for role in ("client", "worker")
            for kind in ("key", "cert")
        },
    }
