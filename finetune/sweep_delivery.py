"""The way of a sweep's runs into MLflow: one run per row, under one parent.

Rows keep their runs in files (``pretrain.later_delivery``), because hundreds of tasks that write to
one SQLite file at once would break it or wait for each other. They are sent by one process at a
time; what was sent is not sent again.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from datastore.store import write_json
from finetune.registry_client import explained, open_registry
from finetune.sweep import alone
from finetune.sweep_row import RowState, find_state, row_folder
from finetune.sweep_table import SweepRow
from pretrain.later_delivery import OUTBOX, deliver
from pretrain.mlflow_client import artifact_location
from pretrain.mlflow_records import open_experiment

if TYPE_CHECKING:
    from mlflow import MlflowClient

PATIENCE_SECONDS: Final = 30.0
"""How long a silent server is waited for, per row."""


def deliver_rows(
    rows: Sequence[SweepRow], output: Path, name: str, uri: str, experiment: str
) -> tuple[int, list[int]]:
    """Send to MLflow what ended rows have kept for it, each as one run under one parent.

    Args:
        rows: Those to send; rows that are being trained are left alone.
        output: Folder of the sweep.
        name: Name of the parent run.
        uri: Tracking store or server.
        experiment: Name of the experiment.

    Returns:
        How many runs MLflow has now, and the numbers of rows of which something still waits.

    Raises:
        ValueError: If MLflow does not answer or refuses; what was not sent waits.
    """
    client, uri = open_registry(uri, create=True)
    with alone(output / "deliver.lock"):
        with explained(uri):
            parent = _parent(client, output, name, uri, experiment)
        sent, waiting = 0, []
        for row in rows:
            folder = row_folder(output, row) / "run"
            state = find_state(output, row)
            if state is None or state.state == "running" or not (folder / OUTBOX).is_file():
                continue
            run_id = deliver(folder, lambda: client, PATIENCE_SECONDS)
            if run_id is None:
                waiting.append(row.number)
                continue
            with explained(uri):
                _adopt(client, run_id, parent, row, state)
            sent += 1
        ended = not waiting and sent == len(rows)
        with explained(uri):
            client.update_run(parent, status="FINISHED" if ended else "RUNNING")
    return sent, waiting


def _parent(client: MlflowClient, output: Path, name: str, uri: str, experiment: str) -> str:
    """Return the parent run, which is made once and noted in the folder."""
    from mlflow.exceptions import MlflowException

    path = output / "parent.json"
    if path.is_file():
        noted = str(json.loads(path.read_text(encoding="utf-8"))["run_id"])
        with contextlib.suppress(MlflowException):
            return str(client.get_run(noted).info.run_id)
    number = open_experiment(client, experiment, artifact_location(uri))
    run_id = str(client.create_run(number, run_name=name, tags={"kind": "sweep"}).info.run_id)
    write_json(path, {"run_id": run_id})
    return run_id


def _adopt(client: MlflowClient, run_id: str, parent: str, row: SweepRow, state: RowState) -> None:
    tags = {"mlflow.parentRunId": parent, "sweep.row": str(row.number), "sweep.state": state.state}
    if state.error:
        tags["sweep.error"] = state.error[:1_000]
    for key, value in tags.items():
        client.set_tag(run_id, key, value)
