"""The connection to MLflow's model registry: patient, explained, and silent about credentials.

Looks up models and versions by reference; ``finetune.registry`` says what is done with them.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pretrain.mlflow_client import (
    MLFLOW_SETTINGS,
    connect,
    resolve_tracking_uri,
    why_no_answer,
    without_credentials,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion, RegisteredModel

DIGEST_TAG: Final = "manifest.sha256"
# A tracker must not stall training, so its requests give up soon; here a job cannot go on without
# an answer, and hundreds of tasks may ask one server at once. The user's own settings stand.
PATIENT_HTTP: Final = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "4",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "60",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
}

_REFERENCE = re.compile(r"models:/(?P<name>[^/@]+)(@(?P<alias>[\w.-]+)|/(?P<version>\d+))")
_MODEL_NAME = re.compile(r"[A-Za-z0-9][\w. -]*")


def open_registry(uri: str | None, create: bool = False) -> tuple[MlflowClient, str]:
    """Connect, and say to what.

    Args:
        uri: Tracking server or store; None as in ``resolve_tracking_uri``.
        create: Something is to be written: a missing SQLite file is no mistake.

    Raises:
        ValueError: If the address is of no known kind, or there is nothing to read, or the database
            does not open.
    """
    uri = resolve_tracking_uri(uri, os.environ, Path.cwd())
    database = uri.removeprefix("sqlite:///").partition("?")[0]
    if not create and uri.startswith("sqlite:///") and not Path(database).exists():
        raise ValueError(
            f"there is no registry at {uri}; set MLFLOW_TRACKING_URI to yours, "
            "or register an export first"
        )
    with _database_explained(uri):
        return connect(uri), uri


@contextlib.contextmanager
def explained(uri: str) -> Iterator[None]:
    """Be patient with the registry and turn what MLflow raises into a ValueError that names it."""
    from mlflow.exceptions import MlflowException

    before = {name: os.environ.get(name) for name in PATIENT_HTTP}
    ours = [name for name, value in before.items() if value in (None, MLFLOW_SETTINGS[name])]
    os.environ.update({name: PATIENT_HTTP[name] for name in ours})
    try:
        yield
    except MlflowException as error:
        address, text = without_credentials(uri), why_no_answer(without_credentials(str(error)))
        # The original may hold the address with its password, which a traceback would show.
        raise ValueError(f"MLflow at {address}: {text}") from None
    finally:
        os.environ.update({name: before[name] or MLFLOW_SETTINGS[name] for name in ours})


@contextlib.contextmanager
def _database_explained(uri: str) -> Iterator[None]:
    """Turn what a database or its driver raises into a ValueError that names it."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ValueError(
            f"MLflow at {without_credentials(uri)}: {error}; install the driver of this database, "
            "or give the address of an `mlflow server` before it"
        ) from None
    except Exception as error:
        from sqlalchemy.exc import SQLAlchemyError

        if not isinstance(error, SQLAlchemyError):
            raise
        # Behind the first line stand the statement and an address on the web.
        cause = re.sub(r"^\([\w.]+\) ", "", without_credentials(str(error)).splitlines()[0])
        raise ValueError(
            f"MLflow at {without_credentials(uri)}: the database does not open ({cause}); is it "
            "running, is MLFLOW_TRACKING_URI right?"
        ) from None


def is_reference(reference: str | Path) -> bool:
    """Whether a model is named by the registry, not by its folder."""
    return str(reference).startswith("models:")


def check_name(name: str) -> None:
    """Refuse what cannot be the name of a model.

    Raises:
        ValueError: Saying which characters may be used.
    """
    if not _MODEL_NAME.fullmatch(name):
        raise ValueError(f"the model name is {name!r}; use letters, digits, '.', '_', '-', ' '")


def find_version(client: MlflowClient, reference: str) -> tuple[ModelVersion, str | None]:
    """Look up a reference; return the version and the alias it was found by.

    Raises:
        ValueError: If there is no such model, alias or version, with what there is instead.
    """
    parts = _REFERENCE.fullmatch(reference)
    if parts is None or not _MODEL_NAME.fullmatch(parts["name"]):
        raise ValueError(
            f"the reference is {reference!r}; write models:/name@alias or models:/name/version"
        )
    model, alias = find_model(client, parts["name"]), parts["alias"]
    if alias is not None and alias not in model.aliases:
        known = ", ".join(f"@{key} (version {value})" for key, value in model.aliases.items())
        raise ValueError(
            f"{model.name} has no alias @{alias}; {nearest(alias, list(model.aliases), '@')}"
            f"it has: {known or 'none'}"
        )
    number = str(model.aliases[alias] if alias is not None else int(parts["version"]))
    versions = {str(version.version): version for version in all_versions(client, model.name)}
    if number not in versions:
        known = ", ".join(sorted(versions, key=int))
        raise ValueError(f"{model.name} has no version {number}; it has: {known or 'none'}")
    return versions[number], alias


def find_model(client: MlflowClient, name: str) -> RegisteredModel:
    """Look up a model by name.

    Raises:
        ValueError: If there is none, with the nearest names.
    """
    from mlflow.exceptions import MlflowException

    try:
        return client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
    names = sorted(model.name for model in all_pages(client.search_registered_models))
    there = ", ".join(names) or "nothing"
    raise ValueError(f"no model {name!r} is registered; {nearest(name, names)}there is: {there}")


def nearest(word: str, known: list[str], mark: str = "") -> str:
    """Ask whether one of the nearest known words was meant; empty if none is near."""
    close = difflib.get_close_matches(word, known)
    return f"did you mean {' or '.join(mark + name for name in close)}? " if close else ""


def digest_of(version: ModelVersion) -> str:
    """Return the sha256 of a version's manifest.

    Raises:
        ValueError: If it was registered without one.
    """
    digest = version.tags.get(DIGEST_TAG, "")
    if not re.fullmatch(r"[0-9a-f]{64}", digest):
        raise ValueError(
            f"models:/{version.name}/{version.version} has no tag {DIGEST_TAG}, so its files "
            "cannot be checked; register the export with `scbert models register`"
        )
    return str(digest)


def all_versions(client: MlflowClient, name: str) -> Iterator[ModelVersion]:
    """Yield every version of a model; none if there is no such model."""
    yield from all_pages(client.search_model_versions, f"name='{name}'")


def all_pages(search: Callable[..., Any], filter_string: str | None = None) -> Iterator[Any]:
    """Yield what a search of MLflow's finds, page after page."""
    token = None
    while True:
        page = search(filter_string=filter_string, page_token=token)
        yield from page
        token = page.token
        if not token:
            return
