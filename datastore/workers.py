"""Where an ingest's tasks run: local threads, a running Dask cluster, or Slurm jobs.

The only door to Dask. All three give the same function, and the store does not depend on which.
"""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

from dask.threaded import get
from tqdm import tqdm

from datastore.config import SlurmConfig

log = logging.getLogger(__name__)

Task = tuple[Any, ...]
"""A function and its arguments."""
Compute = Callable[[str, Sequence[Task]], list[Any]]
"""Run tasks under a title and return their results in order."""


class WorkerConfig(Protocol):
    """What a configuration says of workers."""

    @property
    def workers(self) -> int | None:
        """Local threads; none takes one per core."""

    @property
    def scheduler(self) -> str | None:
        """Address of a running cluster, if any."""

    @property
    def slurm(self) -> SlurmConfig:
        """Jobs to start, if any."""


@contextmanager
def workers(config: WorkerConfig) -> Iterator[Compute]:
    """Yield `compute(title, tasks)` for as long as the workers live."""
    if config.slurm.jobs:
        with slurm_cluster(config.slurm) as cluster:
            cluster.scale(jobs=config.slurm.jobs)
            log.info("asked Slurm for %d jobs", config.slurm.jobs)
            with _client(cluster) as compute:
                yield compute
    elif config.scheduler is not None:
        with _client(config.scheduler) as compute:
            yield compute
    else:
        yield partial(_on_threads, config.workers or os.cpu_count() or 1)


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
        processes=1,  # tasks release the interpreter's lock, and threads share what they import
        memory=config.memory,
        walltime=config.walltime,
        queue=config.queue,
        account=config.account,
        scheduler_options={"dashboard_address": ":0"},  # any free port
    )


def _on_threads(num_threads: int, title: str, tasks: Sequence[Task]) -> list[Any]:
    failures: list[Exception] = []
    # A bar on standard error when somebody watches.
    with tqdm(total=len(tasks), desc=title, unit="task", disable=None) as bar:

        def run(task: Task) -> Any:
            if failures:
                return None
            try:
                result = task[0](*task[1:])
            except Exception as error:
                # Dask would return at once and leave the other threads writing.
                failures.append(error)
                return None
            bar.update()
            return result

        # partial keeps Dask from walking into the arguments in search of graph keys
        graph = {f"{title} {number}": (partial(run, task),) for number, task in enumerate(tasks)}
        results = list(get(graph, list(graph), num_workers=num_threads))
    if failures:
        raise failures[0]
    return results


@contextmanager
def _client(cluster: Any) -> Iterator[Compute]:
    from dask.distributed import Client, wait

    with Client(cluster) as client:

        def compute(title: str, tasks: Sequence[Task]) -> list[Any]:
            futures = [client.submit(task[0], *task[1:], pure=False) for task in tasks]
            log.info("%s: %d tasks on %s", title, len(futures), client.scheduler.address)
            wait(futures)  # all: after a failure none may write on while its folder is cleared
            return list(client.gather(futures))

        yield compute
