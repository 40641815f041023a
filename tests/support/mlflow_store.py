"""MLflow stores in SQLite: one is made per process and then copied, for making it takes seconds."""

import functools
import shutil
import tempfile
from pathlib import Path

from pretrain.mlflow_client import artifact_location, connect, resolve_tracking_uri
from pretrain.mlflow_records import open_experiment


def fresh_store(folder: Path) -> str:
    """Put an empty store into a folder and return its address."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(_template(), folder / "mlflow.db")
    return resolve_tracking_uri(None, {}, folder)


def fresh_run(uri: str, experiment: str = "tests") -> str:
    """Make a run whose artifacts lie beside the store, and return its id."""
    client = connect(uri)
    number = open_experiment(client, experiment, artifact_location(uri))
    return str(client.create_run(number).info.run_id)


@functools.cache
def _template() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="mlflow-template-"))
    connect(f"sqlite:///{folder / 'mlflow.db'}").search_experiments()
    return folder / "mlflow.db"
