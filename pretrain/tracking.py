"""Record a training run in MLflow without ever stopping or stalling the training.

1. ``start_run`` opens a run, or continues one, and hands back a ``Tracker``, which does nothing on
   ranks that are not the first.
2. Metrics are appended to a local JSON-lines file at once and sent to MLflow by a thread: no step
   waits for a server.
3. Everything else (parameters, tags, data sets, artifacts) is sent in place, within short timeouts.
   What MLflow refuses becomes one warning; what only a person can cure (an unknown kind of
   address) is refused before training.

The registry (``finetune/registry.py``) opens its client by ``connect`` too: both see one store.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import os
import queue
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

logger = logging.getLogger(__name__)

RunStatus = Literal["FINISHED", "FAILED", "KILLED"]

SCHEMES = ("http", "https", "sqlite", "postgresql", "mysql", "mssql", "databricks")
FLUSH_SECONDS = (
    15.0  # how long finish() waits for metrics on their way; Slurm's usual grace is 30 s
)
MAX_WAITING_CALLS = 10_000  # log_metrics calls held in memory while the server is slow
# MLflow's own limits (mlflow.utils.validation), which a server enforces as well.
MAX_PARAM_LENGTH = 6_000
MAX_KEY_LENGTH = 250
MAX_DIGEST_LENGTH = 36
MAX_PARAMS_PER_BATCH = 100
MAX_METRICS_PER_BATCH = 1_000

# Used unless the user set them. MLflow's defaults retry for minutes (7 times, 120 s each).
MLFLOW_SETTINGS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_CONFIGURE_LOGGING": "false",  # its handlers would bypass those of launchers/cli.py
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
NOISY_LOGGERS = {"alembic": logging.WARNING, "mlflow": logging.WARNING, "urllib3": logging.ERROR}


def start_run(
    uri: str | None,
    experiment: str,
    run_name: str,
    *,
    is_first: bool,
    run_id: str | None = None,
    parent_run_id: str | None = None,
    tags: Mapping[str, str] | None = None,
    metrics_path: Path | None = None,
) -> Tracker:
    """Open a run for this training, or continue the one it had before it was interrupted.

    A server that does not answer costs a warning, not the training: metrics then go to
    ``metrics_path`` only. A ``run_id`` that the store no longer holds is replaced by a new run,
    which names it in the tag ``continues_run``.

    Args:
        uri: Tracking store or server; None takes ``MLFLOW_TRACKING_URI``, else an SQLite file in
            the working folder.
        experiment: Name of the experiment; it is created if need be.
        run_name: Name of a new run.
        is_first: Whether this rank writes; on all others the tracker does nothing.
        run_id: Run to continue.
        parent_run_id: Run under which a new run is shown.
        tags: Tags of the run.
        metrics_path: JSON-lines file to which every call of ``log_metrics`` is appended.

    Returns:
        The tracker; close it by a ``with`` block or ``finish``.

    Raises:
        ValueError: If ``uri`` is of no known kind or the experiment was deleted.
    """
    if not is_first:
        return Tracker(None, None)
    uri = resolve_tracking_uri(uri, os.environ, Path.cwd())
    tags = {key: without_credentials(value) for key, value in (tags or {}).items()}
    try:
        client = connect(uri)
        continued = run_id is not None and _continue_run(client, run_id, tags)
        if not continued:
            tags |= {"mlflow.parentRunId": parent_run_id} if parent_run_id else {}
            tags |= {"continues_run": run_id} if run_id else {}
            run_id = _create_run(client, uri, experiment, run_name, tags)
    except ValueError:
        raise
    except Exception as error:  # training goes on whatever MLflow raises
        logger.warning(
            "MLflow at %s cannot be used, training goes on without it: %s",
            without_credentials(uri),
            without_credentials(str(error)),
        )
        return Tracker(None, None, metrics_path)
    logger.info("MLflow run %s (%s) at %s", run_id, run_name, without_credentials(uri))
    return Tracker(client, run_id, metrics_path)


class Tracker:
    """The writing face of one run; a context manager that ends the run with the right status.

    Attributes:
        run_id: MLflow's id of the run; None when nothing is sent to MLflow.
        num_undelivered: Calls of ``log_metrics`` that did not reach MLflow so far.
    """

    def __init__(
        self,
        client: MlflowClient | None,
        run_id: str | None,
        metrics_path: Path | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.run_id = run_id
        self.num_undelivered = 0
        self._client = client
        self._metrics_path = metrics_path
        self._clock = clock
        self._warned: set[str] = set()
        self._waiting: queue.Queue[list[Metric] | None] = queue.Queue(MAX_WAITING_CALLS)
        if metrics_path is not None:
            with self._harmless("open the metrics file"):
                _prepare_lines(metrics_path)
        if client is not None and run_id is not None:
            sender = (client, run_id)
            self._sender = threading.Thread(target=self._send_metrics, args=sender, daemon=True)
            self._sender.start()

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Append one line to the metrics file and queue the values for MLflow; never wait or raise.

        A resumed training may log a step twice; the later line is the one that counts.
        """
        if self._client is None and self._metrics_path is None:
            return
        now = self._clock()
        with self._harmless("log metrics"):
            values = {name: float(value) for name, value in metrics.items()}
            if self._metrics_path is not None:
                with self._harmless("write the metrics file"):
                    _append_line(self._metrics_path, {"step": step, "time": now, **values})
            if self._client is not None:
                self._queue_metrics(values, step, now)

    def log_params(self, config: Mapping[str, Any]) -> None:
        """Log a nested configuration with dotted names, e.g. ``optim.lr``.

        MLflow's parameters cannot change: a value that differs from the run's (a training resumed
        with other settings) becomes the tag ``resumed.<name>`` and one warning.
        """
        if self._client is None or self.run_id is None:
            return
        with self._harmless("log parameters"):
            from mlflow.entities import Param

            known = self._client.get_run(self.run_id).data.params
            params = flatten(config)
            new = [Param(name, text) for name, text in params.items() if name not in known]
            for start in range(0, len(new), MAX_PARAMS_PER_BATCH):
                batch = new[start : start + MAX_PARAMS_PER_BATCH]
                self._client.log_batch(self.run_id, params=batch, synchronous=True)
            changed = {name: text for name, text in params.items() if known.get(name, text) != text}
            if changed:
                logger.warning("the run continues with changed settings: %s", ", ".join(changed))
                self.set_tags({f"resumed.{name}": text for name, text in changed.items()})

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags of the run."""
        if self._client is None or self.run_id is None:
            return
        for key, value in tags.items():
            with self._harmless("set tags"):
                self._client.set_tag(self.run_id, key, without_credentials(value))

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
        if self._client is None or self.run_id is None:
            return
        with self._harmless(f"log the data set {name}"):
            from mlflow.entities import Dataset, DatasetInput, InputTag

            address = without_credentials(str(source))
            dataset = Dataset(
                name=name,
                digest=digest[:MAX_DIGEST_LENGTH],
                source_type=urlsplit(address).scheme or "local",
                source=json.dumps({"uri": address}),
                profile=json.dumps({"num_cells": num_cells, "num_genes": num_genes}),
            )
            used = DatasetInput(dataset, [InputTag("mlflow.data.context", context)])
            self._client.log_inputs(self.run_id, datasets=[used])

    def log_file(self, path: Path, artifact_path: str | None = None) -> None:
        """Upload one file into the folder ``artifact_path`` of the run's artifacts."""
        if self._client is None or self.run_id is None:
            return
        with self._harmless(f"log the file {path.name}"):
            self._client.log_artifact(self.run_id, str(path), artifact_path)

    def log_artifacts(self, folder: Path, artifact_path: str | None = None) -> None:
        """Upload the files of a folder into the folder ``artifact_path`` of the run's artifacts."""
        if self._client is None or self.run_id is None:
            return
        with self._harmless(f"log the folder {folder.name}"):
            self._client.log_artifacts(self.run_id, str(folder), artifact_path)

    def finish(self, status: RunStatus = "FINISHED") -> None:
        """Send what still waits, for at most ``FLUSH_SECONDS``, and end the run, once."""
        client, self._client = self._client, None
        if client is None or self.run_id is None:
            return
        # A full queue means that the server is away: then there is nothing worth waiting for.
        with contextlib.suppress(queue.Full):
            self._waiting.put_nowait(None)
            self._sender.join(FLUSH_SECONDS)
        self.num_undelivered += sum(1 for call in list(self._waiting.queue) if call is not None)
        if self.num_undelivered:
            kept = self._metrics_path or "nowhere else, no metrics file was given"
            logger.warning(
                "%d calls of log_metrics did not reach MLflow; kept in: %s",
                self.num_undelivered,
                kept,
            )
        with self._harmless("end the run"):
            end_run(client, self.run_id, status)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.finish(_status_after(error))

    def _queue_metrics(self, values: Mapping[str, float], step: int, now: float) -> None:
        from mlflow.entities import Metric

        milliseconds = int(now * 1000)
        metrics = [Metric(name, value, milliseconds, step) for name, value in values.items()]
        try:
            self._waiting.put_nowait(metrics)
        except queue.Full:
            self.num_undelivered += 1

    def _send_metrics(self, client: MlflowClient, run_id: str) -> None:
        """Send queued metrics until ``finish`` queues None; runs in a thread."""
        while (metrics := self._waiting.get()) is not None:
            self.num_undelivered += 1
            with self._harmless("send metrics"):
                for start in range(0, len(metrics), MAX_METRICS_PER_BATCH):
                    batch = metrics[start : start + MAX_METRICS_PER_BATCH]
                    client.log_batch(run_id, metrics=batch, synchronous=True)
                self.num_undelivered -= 1

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


def resolve_tracking_uri(uri: str | None, environ: Mapping[str, str], cwd: Path) -> str:
    """Say where runs are kept: ``uri``, ``MLFLOW_TRACKING_URI`` or ``mlflow.db`` in ``cwd``.

    Raises:
        ValueError: If the address is of no known kind.
    """
    chosen = uri or environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{cwd / 'mlflow.db'}"
    scheme, separator, _ = chosen.partition("://")
    if chosen != "databricks" and (not separator or scheme.partition("+")[0] not in SCHEMES):
        raise ValueError(
            f"the tracking address is {without_credentials(chosen)!r}; "
            "give http://host:port of a server or sqlite:////path/to/mlflow.db"
        )
    return chosen


def connect(uri: str) -> MlflowClient:
    """Open a quiet client on a resolved address; a new SQLite store takes seconds to create."""
    for name, value in MLFLOW_SETTINGS.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient  # takes about two seconds: only the rank that writes pays

    for name, level in NOISY_LOGGERS.items():
        logging.getLogger(name).setLevel(level)
    return MlflowClient(tracking_uri=uri)


def open_experiment(client: MlflowClient, uri: str, name: str) -> str:
    """Return the id of an experiment, creating it if need be.

    Artifacts of an SQLite store lie in ``mlartifacts`` beside the file; MLflow would put them into
    the working folder of whoever writes first.

    Raises:
        ValueError: If the experiment was deleted; MLflow keeps its name.
    """
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return client.create_experiment(name, artifact_location=_artifact_location(uri))
        except MlflowException:  # another job created it in between, or the store cannot be written
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    if found.lifecycle_stage != "active":
        raise ValueError(
            f"the MLflow experiment {name!r} is deleted; choose another name or restore it: "
            f"mlflow experiments restore --experiment-id {found.experiment_id}"
        )
    return str(found.experiment_id)


def end_run(client: MlflowClient, run_id: str, status: RunStatus = "FINISHED") -> None:
    """Set the final status of a run, in silence."""
    # set_terminated prints "View run … at …" when it talks to a server.
    with contextlib.redirect_stdout(io.StringIO()):
        client.set_terminated(run_id, status)


def without_credentials(text: str) -> str:
    """Strip ``user:password@`` and secret query values from the addresses in a text."""
    text = re.sub(r"://[^/?#\s@]*(?:@[^/?#\s@]*)*@", "://", text)
    return re.sub(r"(?i)([?&][\w.-]*(?:password|secret|token|key|signature)=)[^&\s]+", r"\1…", text)


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Flatten a nested mapping to dotted names and texts in MLflow's limits; lists become JSON."""
    flat: dict[str, str] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{name}.")
        else:
            plain = value is None or isinstance(value, bool | int | float | list | tuple | Mapping)
            text = json.dumps(value, default=str) if plain else str(value)
            name = re.sub(r"[^\w\-./ ]", "_", name)[:MAX_KEY_LENGTH]
            flat[name] = without_credentials(text)[:MAX_PARAM_LENGTH]
    return flat


def _continue_run(client: MlflowClient, run_id: str, tags: Mapping[str, str]) -> bool:
    """Set a former run to running again; False if the store does not hold it."""
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        run = None
    if run is None or run.info.lifecycle_stage != "active":
        logger.warning("MLflow no longer holds run %s: a new run takes its place", run_id)
        return False
    client.update_run(run_id, status="RUNNING")
    for key, value in tags.items():
        client.set_tag(run_id, key, value)
    return True


def _create_run(
    client: MlflowClient, uri: str, experiment: str, run_name: str, tags: Mapping[str, str]
) -> str:
    experiment_id = open_experiment(client, uri, experiment)
    run = client.create_run(experiment_id, tags=dict(tags), run_name=run_name)
    return str(run.info.run_id)


def _artifact_location(uri: str) -> str | None:
    """Return the folder of artifacts for an SQLite file; None leaves the choice to the server."""
    if not uri.startswith("sqlite:///"):
        return None
    database = Path(uri.removeprefix("sqlite:///").partition("?")[0])
    return (database.absolute().parent / "mlartifacts").as_uri()


def _status_after(error: BaseException | None) -> RunStatus:
    if error is None or (isinstance(error, SystemExit) and error.code in (None, 0)):
        return "FINISHED"
    return "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED"


def _prepare_lines(path: Path) -> None:
    """Create the folder and end a line that a killed process left torn: the next stays whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        torn = file.tell() and file.seek(-1, os.SEEK_END) >= 0 and file.read() != b"\n"
        if torn:
            file.write(b"\n")


def _append_line(path: Path, record: Mapping[str, float]) -> None:
    # JSON has no nan or inf: they are written as text, which float() reads back.
    plain = {key: value if math.isfinite(value) else str(value) for key, value in record.items()}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(plain) + "\n")
