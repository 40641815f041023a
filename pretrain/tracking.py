"""Record a training run in MLflow without ever stopping or stalling the training.

1. ``start_run`` asks for a run, or to continue one, and hands back a ``Tracker``, which does
   nothing on ranks that are not the first.
2. Whatever is logged becomes a record in an outbox, a file beside the metrics; a thread delivers
   the records to MLflow in order (``outbox``, ``delivery``). Metrics are appended to a JSON-lines
   file for people as well. No step waits for a server.
3. What a server that is away has missed is sent when it answers, by this process or by the next
   start with the same output, once and in order. What only a person can cure (an unknown kind of
   address) is refused before training.

The registry opens its client by ``connect`` too: both see one store.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from pretrain.delivery import Delivery
from pretrain.later_delivery import OUTBOX, NoDelivery, is_put_off
from pretrain.mlflow_client import (
    MLFLOW_SETTINGS,
    artifact_location,
    connect,
    resolve_tracking_uri,
    without_credentials,
)
from pretrain.mlflow_records import flatten
from pretrain.outbox import Outbox, end_torn_line

__all__ = [
    "MLFLOW_SETTINGS",
    "Tracker",
    "connect",
    "resolve_tracking_uri",
    "start_run",
    "without_credentials",
]

logger = logging.getLogger(__name__)

RunStatus = Literal["FINISHED", "FAILED", "KILLED"]

START_SECONDS = 30.0
"""How long a start waits to know its run; a server that fails is not waited for."""
FLUSH_SECONDS = 15.0
"""How long ``finish`` waits for a silent server; Slurm's usual grace is 30 s."""


def start_run(
    uri: str | None,
    experiment: str,
    run_name: str,
    *,
    is_first: bool,
    run_id: str | None = None,
    continues: bool = False,
    parent_run_id: str | None = None,
    tags: Mapping[str, str] | None = None,
    metrics_path: Path | None = None,
) -> Tracker:
    """Open a run for this training, or continue the one it had before it was interrupted.

    A server that does not answer costs a warning, not the training: the run is opened, and what was
    logged is sent, when it does. A ``run_id`` that the store no longer holds is replaced by a new
    run, which names it in the tag ``continues_run``.

    Args:
        uri: Tracking store or server; None takes ``MLFLOW_TRACKING_URI``, else an SQLite file in
            the working folder.
        experiment: Name of the experiment; it is created if need be.
        run_name: Name of a new run.
        is_first: Whether this rank writes; on all others the tracker does nothing.
        run_id: Run to continue.
        continues: Without a ``run_id``, continue the run that the former start in this folder had,
            which may have been opened after its last checkpoint.
        parent_run_id: Run under which a new run is shown.
        tags: Tags of the run.
        metrics_path: JSON-lines file to which every call of ``log_metrics`` is appended; beside it
            lies what MLflow has yet to receive.

    Returns:
        The tracker; close it by a ``with`` block or ``finish``.

    Raises:
        ValueError: If ``uri`` is of no known kind or the experiment was deleted.
    """
    if not is_first:
        return Tracker(None, None)
    uri = resolve_tracking_uri(uri, os.environ, Path.cwd())
    record = {
        "kind": "run",
        "token": uuid.uuid4().hex,
        "experiment": experiment,
        "run_name": run_name,
        "run_id": run_id,
        "continues": continues or is_put_off(),
        "parent_run_id": parent_run_id,
        "artifact_location": artifact_location(uri),
        "tags": {key: without_credentials(value) for key, value in (tags or {}).items()},
    }
    tracker = Tracker(lambda: connect(uri), record, metrics_path)
    try:
        found = tracker.wait_for_run(START_SECONDS)
    except ValueError:
        tracker.abandon()
        raise
    if found is not None:
        logger.info("MLflow run %s (%s) at %s", found, run_name, without_credentials(uri))
    return tracker


class Tracker:
    """The writing face of one run; a context manager that ends the run with the right status."""

    def __init__(
        self,
        connect: Callable[[], Any] | None,
        run: Mapping[str, Any] | None,
        metrics_path: Path | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Begin to log.

        Args:
            connect: Opens a client; none logs nothing at all.
            run: Record that opens the run.
            metrics_path: As in ``start_run``.
            clock: Seconds since the epoch.
        """
        self._metrics_path = metrics_path
        self._clock = clock
        self._warned: set[str] = set()
        self._delivery: Delivery | NoDelivery | None = None
        if connect is None or run is None:
            return
        if metrics_path is not None:
            with self._harmless("open the metrics file"):
                _prepare_lines(metrics_path)
        outbox = None if metrics_path is None else metrics_path.with_name(OUTBOX)
        self._outbox = Outbox(outbox)
        if self._outbox.num_waiting:
            logger.info("%d records of the former start go to MLflow first", self.num_undelivered)
        self._token = str(run["token"])
        self._outbox.append(run)
        put_off = is_put_off()
        self._delivery = NoDelivery(self._outbox) if put_off else Delivery(self._outbox, connect)

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run; none while MLflow has not opened it."""
        return None if self._delivery is None else self._delivery.run_id(self._token)

    @property
    def num_undelivered(self) -> int:
        """Records that MLflow has not taken so far."""
        return self._outbox.num_waiting if hasattr(self, "_outbox") else 0

    def wait_for_run(self, seconds: float) -> str | None:
        """Id of the run once MLflow has opened it; none if it fails or takes longer.

        Raises:
            ValueError: If it is refused for a reason that a person has to cure.
        """
        return None if self._delivery is None else self._delivery.run_id(self._token, seconds)

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Append one line to the metrics file and queue the values for MLflow; never wait or raise.

        A resumed training may log a step twice; the later line is the one that counts.
        """
        if self._delivery is None:
            return
        now = self._clock()
        with self._harmless("log metrics"):
            values = {name: float(value) for name, value in metrics.items()}
            if self._metrics_path is not None:
                with self._harmless("write the metrics file"):
                    _append_line(self._metrics_path, {"step": step, "time": now, **values})
            self._record("metrics", values=values, step=step, time=now)

    def log_params(self, config: Mapping[str, Any]) -> None:
        """Log a nested configuration with dotted names, e.g. ``optim.lr``.

        MLflow's parameters cannot change: a value that differs from the run's (a training resumed
        with other settings) becomes the tag ``resumed.<name>`` and one warning.
        """
        self._record("params", params=flatten(config))

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags of the run."""
        self._record("tags", tags={key: without_credentials(text) for key, text in tags.items()})

    def log_dataset(
        self,
        name: str,
        digest: str,
        source: str | Path,
        num_cells: int,
        num_genes: int | None = None,
        context: str = "training",
    ) -> None:
        """Log a store as an input of the run; only its description is sent, never cells.

        Args:
            name: Name of the data set.
            digest: Hash of the store; MLflow keeps the first 36 characters.
            source: Folder or address of the store.
            num_cells: Cells in it.
            num_genes: Genes of its panel.
            context: What the run uses it for, e.g. ``training`` or ``evaluation``.
        """
        self._record(
            "dataset",
            name=name,
            digest=digest,
            source=without_credentials(str(source)),
            profile={"num_cells": num_cells, "num_genes": num_genes},
            context=context,
        )

    def log_file(self, path: Path, artifact_path: str | None = None) -> None:
        """Upload one file into the folder ``artifact_path`` of the run's artifacts."""
        self._record("artifacts", path=str(path.absolute()), artifact_path=artifact_path)

    def log_artifacts(self, folder: Path, artifact_path: str | None = None) -> None:
        """Upload the files of a folder into the folder ``artifact_path`` of the run's artifacts."""
        self._record("artifacts", path=str(folder.absolute()), artifact_path=artifact_path)

    def finish(self, status: RunStatus = "FINISHED") -> None:
        """End the run, once, and send what still waits while the server takes it."""
        if self._delivery is None:
            return
        self._record("end", status=status, time=self._clock())
        self._close(FLUSH_SECONDS)
        if self.num_undelivered and not isinstance(self._delivery, NoDelivery):
            kept = "is lost: no metrics file was given"
            if self._metrics_path is not None:
                kept = f"is kept in {self._metrics_path.parent}: the next start there sends it"
            logger.warning(
                "%d records did not reach MLflow; what is missing %s", self.num_undelivered, kept
            )

    def abandon(self) -> None:
        """Stop without a word to the server."""
        self._close(0.0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.finish(_status_after(error))

    def _close(self, patience_seconds: float) -> None:
        if self._delivery is not None:
            self._delivery.close(patience_seconds)

    def _record(self, kind: str, **content: Any) -> None:
        if self._delivery is None:
            return
        with self._harmless(f"note what MLflow must get ({kind})"):
            self._outbox.append({"kind": kind, **content})
            self._delivery.wake()

    @contextlib.contextmanager
    def _harmless(self, action: str) -> Iterator[None]:
        """Turn what is raised inside into a warning, once per action: training must go on."""
        try:
            yield
        except Exception as error:
            if action not in self._warned:
                self._warned.add(action)
                text = without_credentials(str(error))
                logger.warning("could not %s, training goes on: %s", action, text)


def _status_after(error: BaseException | None) -> RunStatus:
    if error is None or (isinstance(error, SystemExit) and error.code in (None, 0)):
        return "FINISHED"
    return "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED"


def _prepare_lines(path: Path) -> None:
    """Create the folder and end a line that a killed process left torn: the next stays whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        end_torn_line(file)


def _append_line(path: Path, record: Mapping[str, float]) -> None:
    # JSON has no nan or inf: they are written as text, which float() reads back.
    plain = {key: value if math.isfinite(value) else str(value) for key, value in record.items()}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(plain) + "\n")
