"""Tasks of a Slurm array that build one store together, with one commit at the end.

1. One task leads: it has the lock in `<output>.array`, starts a Dask scheduler and ingests as it
   would alone (`ingest`, `append`).
2. The others work for it, whenever they start: slices of sources first, then partitions.
3. A leader that ends, however it ends, frees the lock. The next task that takes it finds a note
   that the work is done or refused, or leads in its turn and goes on from what is finished.
4. The last task to end removes the folder.
"""

import json
import logging
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from datastore.array_workers import leading, work_for_leader
from datastore.config import StoreConfig
from datastore.manifest import list_sources
from datastore.store import CellStore, write_json
from datastore.work_folder import locks, output_folder
from datastore.worker_config import ArrayConfig

log = logging.getLogger(__name__)

_PAUSE_SECONDS: Final = 1.0
_LOCK: Final = "lock"
_LEADER: Final = "leader.json"
_OUTCOME: Final = "outcome.json"


def ingest_in_array(
    config: StoreConfig, ingest: Callable[[StoreConfig], CellStore]
) -> CellStore | None:
    """Take part in an ingest until it is done.

    Args:
        config: How to ingest, and which task of the array this process is.
        ingest: `build_store` or `append_store`.

    Returns:
        The store if this task was the one to finish it, else none.

    Raises:
        ValueError: If there are more tasks than sources, or the ingest was refused, here or by the
            task that led.
        OSError: If the disk is too small; what is finished is kept.
    """
    _refuse_idle_tasks(config)
    folder = Path(f"{output_folder(config)}.array")
    number = config.workers or os.cpu_count() or 1
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / _LOCK).open("w") as file:
            if locks(file.fileno(), folder):
                return _lead_or_leave(folder, config, ingest, number)
        if not work_for_leader(folder / _LEADER, number):
            time.sleep(_PAUSE_SECONDS)  # it is about to start, out of reach, or gone


def _lead_or_leave(
    folder: Path, config: StoreConfig, ingest: Callable[[StoreConfig], CellStore], number: int
) -> CellStore | None:
    """With the lock: ingest, unless another task has brought it to an end."""
    array = config.array
    outcome = _outcome(folder, array)
    try:
        if outcome is None:
            return _lead(folder, config, ingest, number)
        if outcome["refused"]:
            raise ValueError(f"task {outcome['task']} was refused: {outcome['refused']}")
        return None
    finally:
        if _outcome(folder, array) is not None:
            _leave(folder, array)


def _lead(
    folder: Path, config: StoreConfig, ingest: Callable[[StoreConfig], CellStore], number: int
) -> CellStore:
    array = config.array
    for left in folder.iterdir():  # by a leader that was killed, or by another array
        if left.name != _LOCK:
            left.unlink()
    note: dict[str, Any] = {"job": array.job, "task": array.task, "refused": None}
    try:
        with leading(folder / _LEADER, array.task, number) as address:
            log.info("task %d leads at %s", array.task, address)
            store = ingest(replace(config, scheduler=address, array=ArrayConfig()))
    except (ValueError, FileNotFoundError, FileExistsError) as error:
        write_json(folder / _OUTCOME, {**note, "refused": str(error)})
        raise
    write_json(folder / _OUTCOME, note)
    return store


def _outcome(folder: Path, array: ArrayConfig) -> dict[str, Any] | None:
    """How the ingest of this array ended, if it has."""
    try:
        found: dict[str, Any] = json.loads((folder / _OUTCOME).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return found if found["job"] == array.job else None


def _leave(folder: Path, array: ArrayConfig) -> None:
    (folder / f"ended_{array.task}").touch()
    if len(list(folder.glob("ended_*"))) >= array.tasks:
        shutil.rmtree(folder)


def _refuse_idle_tasks(config: StoreConfig) -> None:
    number, tasks = len(list_sources(config.sources)), config.array.tasks
    if tasks > number:
        there = "is 1 source" if number == 1 else f"are {number} sources"
        raise ValueError(
            f"array.tasks is {tasks}, but there {there}; submit with --array=1-{number}"
        )
