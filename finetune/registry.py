"""Models by name: list, pull and verify what is in MLflow's model registry, byte by byte.

An entry is a flat folder without pickle: ``model.safetensors``, ``config.json``, ``genes.txt`` and
whatever else is text or a picture (``finetune.registration`` makes it).

1. A reference is resolved to one version first: an alias may move during what follows.
2. Only the files that its manifest names are fetched, only of harmless kinds, and only kept if
   every hash agrees (``registry_files``, ``export_files``).
3. Pulled versions are kept by content (``model_cache``), so that many tasks may pull at once.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.export_files import MANIFEST, MODEL_CARD, make_manifest, verify_export
from finetune.model_cache import ModelCache, default_cache
from finetune.registry_client import (
    all_pages,
    digest_of,
    explained,
    find_version,
    is_reference,
    nearest,
    open_registry,
)
from finetune.registry_files import download, download_card
from pretrain.mlflow_client import resolve_tracking_uri, without_credentials

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

OFFLINE = "SCBERT_OFFLINE"
"""Environment variable: anything but empty or 0 keeps every command from asking the registry."""


@dataclass(frozen=True, kw_only=True)
class ModelVersionRef:
    """One version of a registered model."""

    name: str
    version: int
    source: str
    """Address of its files in the artifact store."""
    aliases: tuple[str, ...] = ()

    @property
    def uri(self) -> str:
        """The reference that always means this version."""
        return f"models:/{self.name}/{self.version}"


@dataclass(frozen=True, kw_only=True)
class ResolvedModel:
    """A model folder on this machine; a path has no name, version or alias."""

    path: Path
    name: str | None = None
    version: int | None = None
    alias: str | None = None

    @property
    def uri(self) -> str:
        """The registry's reference to exactly this version, or the path."""
        return str(self.path) if self.name is None else f"models:/{self.name}/{self.version}"


def resolve_model(
    reference: str | Path,
    *,
    uri: str | None = None,
    cache: Path | None = None,
    offline: bool | None = None,
) -> ResolvedModel:
    """Return a local folder for a path, ``models:/name@alias`` or ``models:/name/version``.

    Args:
        reference: What the user gave.
        uri: Tracking server or store; None as in ``resolve_tracking_uri``.
        cache: Where pulled versions are kept; None means ``$XDG_CACHE_HOME/scbert/models``.
        offline: Use what was pulled before and ask no registry; None asks ``SCBERT_OFFLINE``.

    Raises:
        ValueError: If the folder, model, alias or version does not exist, the registry does not
            answer, or the files are not what was registered.
    """
    if not is_reference(reference):
        if not Path(reference).is_dir():
            raise ValueError(
                f"there is no model folder {str(reference)!r}; "
                "give a folder, models:/name@alias or models:/name/version"
            )
        return ResolvedModel(path=Path(reference))
    reference, models = str(reference), ModelCache(cache or default_cache(os.environ))
    if os.environ.get(OFFLINE, "0") not in ("", "0") if offline is None else offline:
        return _from_cache(reference, uri, models)
    client, uri = open_registry(uri)
    with explained(uri):
        # Everything after this line is about one version: an alias may move meanwhile.
        found, alias = find_version(client, reference)
        digest = digest_of(found)
        path = models.find(digest)
        if path is None:
            source = client.get_model_version_download_uri(found.name, str(found.version))
            path = models.add(digest, lambda folder: download(source, folder, digest, uri))
    model = ResolvedModel(path=path, name=found.name, version=int(found.version), alias=alias)
    meaning = {"name": model.name, "version": model.version, "alias": alias, "digest": digest}
    models.remember(without_credentials(uri), reference, meaning)
    return model


def verify_model(reference: str | Path, *, uri: str | None = None) -> int:
    """Read every byte of a model where it is kept, not of a copy, and compare the hashes.

    Args:
        reference: ``models:/name@alias``, ``models:/name/version`` or a folder; a folder without
            a manifest can only be checked for what an export may hold.
        uri: Tracking server or store; None as in ``resolve_tracking_uri``.

    Returns:
        The number of files that were checked.

    Raises:
        ValueError: Naming the first file that is not as it was registered.
    """
    if not is_reference(reference):
        folder = Path(reference)
        if (folder / MANIFEST).is_file():
            verify_export(folder, hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest())
        return len(json.loads(make_manifest(folder))["files"])
    client, uri = open_registry(uri)
    with explained(uri), tempfile.TemporaryDirectory(prefix="scbert-verify-") as scratch:
        found, _ = find_version(client, str(reference))
        digest = digest_of(found)
        source = client.get_model_version_download_uri(found.name, str(found.version))

        def fetch(folder: Path) -> None:
            download(source, folder, digest, uri)

        fresh = ModelCache(Path(scratch)).add(digest, fetch)
        return len(list(fresh.iterdir())) - 1


def describe_model(reference: str, *, uri: str | None = None) -> dict[str, Any]:
    """Return what is known of a version: aliases, run, tags, card, files. No weights are fetched.

    Args:
        reference: ``models:/name@alias`` or ``models:/name/version``.
        uri: Tracking server or store; None as in ``resolve_tracking_uri``.

    Raises:
        ValueError: If there is no such version, or card and manifest are not what was registered.
    """
    client, uri = open_registry(uri)
    with explained(uri), tempfile.TemporaryDirectory(prefix="scbert-show-") as scratch:
        found, _ = find_version(client, reference)
        digest, folder = digest_of(found), Path(scratch)
        source = client.get_model_version_download_uri(found.name, str(found.version))
        files = download_card(source, folder, digest, uri)
        card = folder / MODEL_CARD
        aliases = client.get_registered_model(found.name).aliases
        reference_now = reference_to(found, aliases)
        return {
            "reference": reference_now.uri,
            "aliases": list(reference_now.aliases),
            "run_id": found.run_id,
            "registered": _time(found.creation_timestamp),
            "tags": dict(sorted(found.tags.items())),
            "bytes": sum(record["bytes"] for record in files.values()),
            "files": files,
            "card": card.read_text(encoding="utf-8") if card.is_file() else found.description,
        }


def list_models(uri: str | None = None) -> list[ModelVersionRef]:
    """Return every version of every registered model, by name and version."""
    client, uri = open_registry(uri)
    with explained(uri):
        aliases = {
            model.name: model.aliases for model in all_pages(client.search_registered_models)
        }
        versions = list(all_pages(client.search_model_versions))
    found = [reference_to(version, aliases.get(version.name, {})) for version in versions]
    return sorted(found, key=lambda ref: (ref.name, ref.version))


def _time(milliseconds: int) -> str:
    return datetime.fromtimestamp(milliseconds / 1000, UTC).isoformat(timespec="seconds")


def _from_cache(reference: str, uri: str | None, models: ModelCache) -> ResolvedModel:
    registry = without_credentials(resolve_tracking_uri(uri, os.environ, Path.cwd()))
    facts = models.recall(registry, reference)
    path = None if facts is None else models.find(str(facts["digest"]))
    if facts is None or path is None:
        known = models.remembered()
        raise ValueError(
            f"{reference} of {registry} is not in {models.folder}; "
            f"{nearest(reference, known)}pull it once without --offline (there is: "
            f"{', '.join(known) or 'nothing'})"
        )
    return ResolvedModel(
        path=path, name=facts["name"], version=facts["version"], alias=facts["alias"]
    )


def reference_to(version: ModelVersion, aliases: Mapping[str, Any]) -> ModelVersionRef:
    """Describe a version; ``aliases`` are those of its model, by name."""
    number = int(version.version)
    own = tuple(sorted(alias for alias, value in aliases.items() if int(value) == number))
    source = without_credentials(version.source or "")
    return ModelVersionRef(name=version.name, version=number, source=source, aliases=own)
