"""Where an ingest's tasks run: local threads or processes, a running Dask cluster, or Slurm jobs.

The door to Dask, with `array_workers`. All give the same function, and the store does not depend on
which. Threads start at once, but most of a task holds the interpreter's lock: two hardly do more
than one. So long ingests run in processes (`datastore.processes`).
"""

import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Final, Protocol

from dask.callbacks import Callback
from dask.multiprocessing import get as get_on_processes
from dask.threaded import get as get_on_threads
from tqdm import tqdm

from datastore.processes import Outcome, ProcessPool, attempt, attempt_in_worker
from datastore.worker_config import SlurmConfig

log = logging.getLogger(__name__)

_PATIENCE_SECONDS: Final = 60
"""After so long without a worker we say so, again and again."""

Task = tuple[Any, ...]
"""A function and its arguments."""
Compute = Callable[[str, Sequence[Task]], list[Any]]
"""Run tasks under a title and return their results in order."""


class WorkerConfig(Protocol):
    """What a configuration says of workers."""

    @property
    def workers(self) -> int | None:
        """Local threads or processes; none takes one per core."""

    @property
    def scheduler(self) -> str | None:
        """Address of a running cluster, if any."""

    @property
    def slurm(self) -> SlurmConfig:
        """Jobs to start, if any."""


@contextmanager
def workers(config: WorkerConfig, processes: bool = False) -> Iterator[Compute]:
    """Yield `compute(title, tasks)` for as long as the workers live.

    Args:
        config: How many, and where.
        processes: Whether several local workers are processes rather than threads.
    """
    number = config.workers or os.cpu_count() or 1
    if config.slurm.jobs:
        with slurm_cluster(config.slurm) as cluster:
            cluster.scale(jobs=config.slurm.jobs)
            log.info("asked Slurm for %d jobs", config.slurm.jobs)
            with _client(cluster) as compute:
                yield compute
    elif config.scheduler is not None:
        with _client(config.scheduler) as compute:
            yield compute
    elif processes and number > 1:
        with ProcessPool(number) as pool:
            yield partial(_on_processes, pool)
    else:
        yield partial(_on_threads, number)


def slurm_cluster(config: SlurmConfig) -> Any:
    """Describe the Slurm jobs; none is submitted before it is scaled.

    Raises:
        ValueError: If dask-jobqueue is not installed.
    """
    try:
        from dask_jobqueue import SLURMCluster
    except ImportError as error:
        raise ValueError(
            "slurm.jobs needs dask-jobqueue; install it (pip install 'scbert-scale[slurm]'), or "
            "start a Dask cluster yourself and give its address (--scheduler)"
        ) from error
    return SLURMCluster(
        cores=config.cores,
        processes=config.cores,  # most of a task holds the interpreter's lock
        memory=config.memory,
        walltime=config.walltime,
        queue=config.queue,
        account=config.account,
        scheduler_options={"dashboard_address": ":0"},  # any free port
    )


def _on_threads(num_threads: int, title: str, tasks: Sequence[Task]) -> list[Any]:
    failed = threading.Event()
    graph = _graph(title, tasks, partial(attempt, failed))
    with _progress(title, len(tasks)):
        return _results(get_on_threads(graph, list(graph), num_workers=num_threads))


def _on_processes(pool: ProcessPool, title: str, tasks: Sequence[Task]) -> list[Any]:
    graph = _graph(title, tasks, attempt_in_worker)
    with _progress(title, len(tasks)), pool.losses_named():
        found = get_on_processes(
            graph, list(graph), pool=pool.executor, chunksize=1, optimize_graph=False
        )
    return _results(found)


def _graph(
    title: str, tasks: Sequence[Task], run: Callable[[Task], Outcome]
) -> dict[str, tuple[Callable[[], Outcome]]]:
    # partial keeps Dask from walking into the arguments in search of graph keys
    return {f"{title} {number}": (partial(run, task),) for number, task in enumerate(tasks)}


@contextmanager
def _progress(title: str, num_tasks: int) -> Iterator[None]:
    """Show a bar on standard error when somebody watches."""
    with tqdm(total=num_tasks, desc=title, unit="task", disable=None) as bar:

        def advance(*_: object) -> None:
            bar.update()

        with Callback(posttask=advance):
            yield


def _results(outcomes: Sequence[Outcome]) -> list[Any]:
    """Unpack the results of all tasks, or raise what the first that failed did."""
    for outcome in outcomes:
        if outcome.error is not None:
            raise outcome.error
    return [outcome.result for outcome in outcomes]


@contextmanager
def _client(cluster: Any) -> Iterator[Compute]:
    from dask.distributed import Client, wait

    with Client(cluster) as client:

        def compute(title: str, tasks: Sequence[Task]) -> list[Any]:
            futures = [client.submit(task[0], *task[1:], pure=False) for task in tasks]
            log.info("%s: %d tasks on %s", title, len(futures), client.scheduler.address)
            # All: after a failure none may write on while its folder is cleared.
            while futures:
                try:
                    wait(futures, timeout=_PATIENCE_SECONDS)
                    break
                except TimeoutError:
                    if not client.scheduler_info(n_workers=-1)["workers"]:
                        log.warning(
                            "%s: no worker has come to %s yet; squeue, or the log of the workers, "
                            "says why",
                            *(title, client.scheduler.address),
                        )
            return list(client.gather(futures))

        yield compute
