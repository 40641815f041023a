"""What each record of an outbox does to MLflow; doing it twice changes nothing."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from pretrain.mlflow_client import without_credentials

if TYPE_CHECKING:
    from mlflow import MlflowClient

logger = logging.getLogger(__name__)

# MLflow's own limits (mlflow.utils.validation), which a server enforces as well.
MAX_DIGEST_LENGTH = 36
MAX_KEY_LENGTH = 250
MAX_PARAM_LENGTH = 6_000
MAX_PARAMS_PER_BATCH = 100
MAX_METRICS_PER_BATCH = 1_000


def open_run(client: MlflowClient, record: Mapping[str, Any], former: str | None) -> str:
    """Open the run that a record describes, or continue one.

    A run that the store no longer holds is replaced by a new one, which names it in the tag
    `continues_run`.

    Raises:
        ValueError: If the experiment was deleted.
    """
    tags = dict(record["tags"])
    run_id = record["run_id"] or (former if record["continues"] else None)
    if run_id is not None and _continue_run(client, run_id, tags):
        return str(run_id)
    tags |= {"continues_run": run_id} if run_id else {}
    if record["parent_run_id"]:
        tags |= {"mlflow.parentRunId": record["parent_run_id"]}
    experiment = open_experiment(client, record["experiment"], record["artifact_location"])
    # A creation whose answer was lost is found again by its token.
    found = client.search_runs([experiment], f"tags.opened_by = '{record['token']}'", max_results=1)
    if found:
        return str(found[0].info.run_id)
    tags |= {"opened_by": record["token"]}
    run = client.create_run(experiment, tags=tags, run_name=record["run_name"])
    return str(run.info.run_id)


def open_experiment(client: MlflowClient, name: str, artifact_location: str | None) -> str:
    """Return the id of an experiment, creating it if need be.

    Raises:
        ValueError: If the experiment was deleted; MLflow keeps its name.
    """
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return client.create_experiment(name, artifact_location=artifact_location)
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


def send_metrics(client: MlflowClient, run_id: str, records: Sequence[Mapping[str, Any]]) -> None:
    """Send what several calls of `log_metrics` had, in their order."""
    from mlflow.entities import Metric

    metrics = [
        Metric(name, float(value), int(record["time"] * 1000), record["step"])
        for record in records
        for name, value in record["values"].items()
    ]
    for start in range(0, len(metrics), MAX_METRICS_PER_BATCH):
        batch = metrics[start : start + MAX_METRICS_PER_BATCH]
        client.log_batch(run_id, metrics=batch, synchronous=True)


def _send_params(client: MlflowClient, run_id: str, record: Mapping[str, Any]) -> None:
    from mlflow.entities import Param

    params = record["params"]
    known = client.get_run(run_id).data.params
    new = [Param(name, text) for name, text in params.items() if name not in known]
    for start in range(0, len(new), MAX_PARAMS_PER_BATCH):
        batch = new[start : start + MAX_PARAMS_PER_BATCH]
        client.log_batch(run_id, params=batch, synchronous=True)
    changed = {name: text for name, text in params.items() if known.get(name, text) != text}
    if changed:
        logger.warning("the run continues with changed settings: %s", ", ".join(changed))
    for name, text in changed.items():
        client.set_tag(run_id, f"resumed.{name}", text)


def _send_tags(client: MlflowClient, run_id: str, record: Mapping[str, Any]) -> None:
    for key, value in record["tags"].items():
        client.set_tag(run_id, key, value)


def _send_dataset(client: MlflowClient, run_id: str, record: Mapping[str, Any]) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    address = record["source"]
    dataset = Dataset(
        name=record["name"],
        digest=record["digest"][:MAX_DIGEST_LENGTH],
        source_type=urlsplit(address).scheme or "local",
        source=json.dumps({"uri": address}),
        profile=json.dumps(record["profile"]),
    )
    used = DatasetInput(dataset, [InputTag("mlflow.data.context", record["context"])])
    client.log_inputs(run_id, datasets=[used])


def _send_artifacts(client: MlflowClient, run_id: str, record: Mapping[str, Any]) -> None:
    path = Path(record["path"])
    if not path.exists():
        raise FileNotFoundError(f"{path} is no longer there")
    if path.is_dir():
        client.log_artifacts(run_id, str(path), record["artifact_path"])
    else:
        client.log_artifact(run_id, str(path), record["artifact_path"])


def _end_run(client: MlflowClient, run_id: str, record: Mapping[str, Any]) -> None:
    # set_terminated prints "View run … at …" when it talks to a server.
    with contextlib.redirect_stdout(io.StringIO()):
        client.set_terminated(run_id, record["status"], int(record["time"] * 1000))


SENDERS: dict[str, Callable[[MlflowClient, str, Mapping[str, Any]], None]] = {
    "params": _send_params,
    "tags": _send_tags,
    "dataset": _send_dataset,
    "artifacts": _send_artifacts,
    "end": _end_run,
}
"""What is done with a record of each kind; runs and metrics apart."""


def recorded(config: Any) -> dict[str, str]:
    """Return the resolved settings as an export keeps them: without places of this machine.

    Args:
        config: The configuration of a training, a dataclass with `output` and `tracking`.
    """
    kept = {
        key: value for key, value in asdict(config).items() if key not in ("output", "tracking")
    }
    return flatten(kept)


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
