"""A row of a sweep and what became of it: run once, however often its task is started.

``<output>/rows/<key>/`` has ``state.json`` (replaced as a whole), ``lock``, and ``run/``, the
output of the training. The lock is the operating system's: it is free as soon as the task is dead.
"""

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, Self

from datastore.store import write_json
from finetune.sweep_table import SweepRow
from pretrain.mlflow_client import without_credentials

LOCK_SECONDS = 3.0
"""How long a task waits for the lock: who looks at the state has it for a moment."""
State = Literal["running", "done", "failed", "interrupted"]
Metrics = Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class RowState:
    """What is known of a row that was started."""

    state: State
    settings: dict[str, str]
    attempts: int = 1
    """How often it was started."""
    host: str = ""
    job: str = ""
    """Slurm's name of the task, if there is one."""
    started: float = 0.0
    """Seconds since the epoch; as `ended`, of the last attempt."""
    ended: float | None = None
    error: str | None = None
    """Last line of what went wrong."""
    metrics: dict[str, float] | None = None

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """Return the state that a row's folder holds, or None."""
        path = folder / "state.json"
        if not path.is_file():
            return None
        return cls(**json.loads(path.read_text(encoding="utf-8")))


def row_folder(output: Path, row: SweepRow) -> Path:
    """Where a row's state and run are kept."""
    return output / "rows" / row.key


def run_row(row: SweepRow, output: Path, train: Callable[[Path], Metrics]) -> RowState:
    """Train a row unless it is done; keep what became of it.

    Args:
        row: The row.
        output: Folder of the sweep.
        train: Trains into the folder it is given and returns metrics by name.

    Raises:
        ValueError: If another task has the row at this moment; else what ``train`` raises, after
            it was noted.
    """
    folder = row_folder(output, row)
    folder.mkdir(parents=True, exist_ok=True)
    with _lock(folder, row.number, LOCK_SECONDS):
        former = RowState.read(folder)
        if former is not None and former.state == "done":
            return former
        state = RowState(
            state="running",
            settings=row.settings,
            attempts=1 if former is None else former.attempts + 1,
            host=os.uname().nodename,
            job=_job(os.environ),
            started=time.time(),
        )
        _write(folder, state)
        try:
            metrics = {name: float(value) for name, value in train(folder / "run").items()}
        except Exception as error:
            _write(folder, _ended(state, "failed", error=_last_line(error)))
            raise
        except BaseException:
            _write(folder, _ended(state, "interrupted"))
            raise
        done = _ended(state, "done", metrics=metrics)
        _write(folder, done)
        return done


def find_state(output: Path, row: SweepRow) -> RowState | None:
    """Return what became of a row; a row whose task died without a word is interrupted."""
    folder = row_folder(output, row)
    found = RowState.read(folder)
    if found is None or found.state != "running":
        return found
    try:
        with _lock(folder, row.number, 0.0):
            found = RowState.read(folder) or found  # it may have ended meanwhile
    except ValueError:
        return found
    return _ended(found, "interrupted") if found.state == "running" else found


@contextlib.contextmanager
def _lock(folder: Path, number: int, wait_seconds: float) -> Iterator[None]:
    deadline = time.monotonic() + wait_seconds
    with (folder / "lock").open("a+") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise ValueError(
                        f"row {number} is being trained by another task; this one leaves it alone"
                    ) from None
                time.sleep(0.1)
        yield


def _write(folder: Path, state: RowState) -> None:
    write_json(folder / "state.json", asdict(state))


def _ended(
    state: RowState,
    how: State,
    *,
    error: str | None = None,
    metrics: dict[str, float] | None = None,
) -> RowState:
    return replace(state, state=how, ended=time.time(), error=error, metrics=metrics)


def _job(environ: Mapping[str, str]) -> str:
    array, task = environ.get("SLURM_ARRAY_JOB_ID"), environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else environ.get("SLURM_JOB_ID", "")


def _last_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return without_credentials(lines[-1].strip())
