"""Where MLflow is, and a quiet client with short timeouts."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlflow import MlflowClient

SCHEMES = ("http", "https", "sqlite", "postgresql", "mysql", "mssql", "databricks")

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


def artifact_location(uri: str) -> str | None:
    """Return the folder of artifacts for an SQLite file; None leaves the choice to the server."""
    if not uri.startswith("sqlite:///"):
        return None
    database = Path(uri.removeprefix("sqlite:///").partition("?")[0])
    return (database.absolute().parent / "mlartifacts").as_uri()


def without_credentials(text: str) -> str:
    """Strip ``user:password@`` and secret query values from the addresses in a text."""
    text = re.sub(r"://[^/?#\s@]*(?:@[^/?#\s@]*)*@", "://", text)
    return re.sub(r"(?i)([?&][\w.-]*(?:password|secret|token|key|signature)=)[^&\s]+", r"\1…", text)


def why_no_answer(text: str) -> str:
    """Say in a sentence what MLflow wraps in addresses and classes of its HTTP library.

    Args:
        text: What MLflow raised, without credentials; returned as it is if no request failed.
    """
    if "API request to" not in text or "failed with" not in text:
        return text
    if refused := re.search(r"failed with error code (\d+)", text):
        cure = "is MLFLOW_TRACKING_URI right?"
        if refused[1] in ("401", "403"):
            cure = (
                "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or "
                "MLFLOW_TRACKING_TOKEN, and ask its keeper which hosts and users it allows"
            )
        return f"it refuses with HTTP status {refused[1]}; {cure}"
    reason = re.search(r"\[Errno -?\d+\] ([\w ,-]+)", text)
    cause = reason[1] if reason else text
    return f"it does not answer; is it running, is MLFLOW_TRACKING_URI right? ({cause})"
