"""Register an export as a version in MLflow's model registry, with all that its user must know.

1. The export is checked and completed by a model card and, for a classifier, by the description
   with which MLflow serves it.
2. It is uploaded below ``export/`` in a run's artifacts, with ``MANIFEST.json`` (size and sha256 of
   every file) beside the files; the manifest's own digest becomes a tag of the version.
3. Lineage, kind and scores become tags, so that versions can be searched by them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from finetune.export_files import (
    GENERATED,
    MLMODEL,
    MODEL_CARD,
    make_manifest,
    read_config,
    size_and_hash,
)
from finetune.model_card import description, model_card
from finetune.registry import ModelVersionRef, reference_to
from finetune.registry_client import (
    DIGEST_TAG,
    all_versions,
    check_name,
    explained,
    find_version,
    is_reference,
    open_registry,
)
from finetune.registry_files import upload
from finetune.serving_contract import mlmodel
from pretrain.mlflow_client import artifact_location, without_credentials
from pretrain.mlflow_records import SENDERS, open_experiment

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

logger = logging.getLogger(__name__)

LINEAGE_TAG: Final = "lineage.pretrained"
LICENCE_TAG: Final = "licence"
EXPERIMENT: Final = "registry"
"""Holds the small runs of exports that come without a run."""


def register_export(
    folder: str | Path,
    name: str,
    *,
    uri: str | None = None,
    alias: str | None = None,
    run_id: str | None = None,
    tags: Mapping[str, str] | None = None,
) -> ModelVersionRef:
    """Upload an export with its model card and register it as a new version of ``name``.

    Repeating a registration (a requeued job) finds the version with the same files and run, and
    sets only its tags and alias. A lineage tag that names an alias is pinned to the version that
    the alias means now; without one, the lineage is what the export itself records.

    Args:
        folder: The export.
        name: Registered model; it is created if need be.
        uri: Tracking server or store; None as in ``resolve_tracking_uri``.
        alias: Alias to point at this version, e.g. ``champion``.
        run_id: Run that made the export; None creates a small run to hold the files.
        tags: Tags of the version, e.g. ``{LINEAGE_TAG: "models:/scbert-pretrained/1"}``.

    Raises:
        ValueError: If the folder is no export, the run or the lineage does not exist, or the
            registry does not answer.
    """
    folder, tags = Path(folder), dict(tags or {})
    check_name(name)
    with tempfile.TemporaryDirectory(prefix="scbert-register-") as scratch:
        generated = Path(scratch)
        manifest = _complete(folder, generated, name, tags.get(LICENCE_TAG))
        card = (generated / MODEL_CARD).read_text(encoding="utf-8")
        digest = hashlib.sha256(manifest).hexdigest()
        client, uri = open_registry(uri, create=True)
        with explained(uri):
            tags = {**_facts(folder), **_lineage(client, tags, folder), DIGEST_TAG: digest}
            version = _same_version(client, name, digest, run_id)
            if version is None:
                own_run = None if run_id else _small_run(client, uri, name)
                run = run_id or own_run or ""
                source = upload(client, run, [folder, generated], manifest)
                if own_run is not None:
                    SENDERS["end"](client, own_run, {"status": "FINISHED", "time": time.time()})
                _create_model(client, name)
                version = client.create_model_version(
                    name, source, run, tags=tags, description=description(card)
                )
            else:
                logger.info("models:/%s/%s already holds these files", name, version.version)
                for key, value in tags.items():
                    client.set_model_version_tag(name, str(version.version), key, value)
            if alias is not None:
                client.set_registered_model_alias(name, alias, str(version.version))
            return reference_to(version, client.get_registered_model(name).aliases)


def provenance_run_id(folder: str | Path, *, uri: str | None = None) -> str | None:
    """Return the run that an export names in ``config.json``, if the store still holds that run."""
    config = Path(folder) / "config.json"
    run_id = _provenance(read_config(Path(folder))).get("run_id") if config.is_file() else None
    if not run_id:
        return None
    client, uri = open_registry(uri, create=True)
    from mlflow.exceptions import MlflowException

    with explained(uri):
        try:
            return str(client.get_run(str(run_id)).info.run_id)
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
    logger.warning("the run %s of this export is not at %s", run_id, without_credentials(uri))
    return None


def _complete(folder: Path, generated: Path, name: str, licence: str | None) -> bytes:
    """Write what a registered model has besides its export; return the manifest of all of it."""
    files = json.loads(make_manifest(folder))["files"]
    files = {file: record for file, record in files.items() if file not in GENERATED}
    config = read_config(folder)
    (generated / MODEL_CARD).write_text(model_card(name, config, files, licence), encoding="utf-8")
    if config["kind"] == "classifier":
        (generated / MLMODEL).write_text(mlmodel(), encoding="utf-8")
    for path in sorted(generated.iterdir()):
        files[path.name] = size_and_hash(path)
    return (json.dumps({"files": dict(sorted(files.items()))}, indent=1) + "\n").encode()


def _facts(folder: Path) -> dict[str, str]:
    """What a script may want to search versions by."""
    config = read_config(folder)
    provenance = _provenance(config)
    named = {
        "kind": config["kind"],
        "git_commit": provenance.get("git_commit"),
        "store_id": provenance.get("store_id") or provenance.get("pretrained_store_id"),
        "panel_digest": config.get("panel_digest"),
    }
    metrics = config.get("metrics")
    for key in ("accuracy", "macro_f1", "validation_masked_accuracy"):
        named[key] = metrics.get(key) if isinstance(metrics, Mapping) else None
    return {
        key: without_credentials(str(value)) for key, value in named.items() if value is not None
    }


def _provenance(config: Mapping[str, Any]) -> Mapping[str, Any]:
    found = config.get("provenance")
    return found if isinstance(found, Mapping) else {}


def _lineage(client: MlflowClient, tags: dict[str, str], folder: Path) -> dict[str, str]:
    """Replace an alias in the lineage tag by its version, for aliases move."""
    given = tags.get(LINEAGE_TAG)
    recorded = str(_provenance(read_config(folder)).get("pretrained") or "")
    if given is None and not is_reference(recorded):
        return tags
    try:
        version, _ = find_version(client, given or recorded)
    except ValueError as error:
        if given is not None:
            raise
        logger.warning("no lineage is set, %s is not in this registry: %s", recorded, error)
        return tags
    return {**tags, LINEAGE_TAG: f"models:/{version.name}/{version.version}"}


def _same_version(
    client: MlflowClient, name: str, digest: str, run_id: str | None
) -> ModelVersion | None:
    for version in all_versions(client, name):
        same_run = run_id is None or version.run_id == run_id
        if same_run and version.tags.get(DIGEST_TAG) == digest:
            return version
    return None


def _small_run(client: MlflowClient, uri: str, name: str) -> str:
    experiment_id = open_experiment(client, EXPERIMENT, artifact_location(uri))
    return str(client.create_run(experiment_id, run_name=f"register {name}").info.run_id)


def _create_model(client: MlflowClient, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
