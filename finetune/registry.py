"""Register exports as versions in MLflow's model registry and pull them back, checked byte by byte.

An export is a flat folder without pickle: ``model.safetensors``, ``config.json``, ``genes.txt`` and
whatever else is text or a picture.

1. ``register_export`` uploads the folder below ``export/`` in a run's artifacts, with a
   ``MANIFEST.json`` (size and sha256 of every file) beside the files and the manifest's own digest
   as a tag of the version.
2. ``resolve_model`` turns ``models:/name@alias``, ``models:/name/3`` or a path into a local folder:
   only the files that the manifest names, only of harmless kinds, only if every hash agrees. Pulled
   versions are published into the cache by one rename, so that many tasks may pull at once.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import logging
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from pretrain.tracking import (
    MLFLOW_SETTINGS,
    connect,
    end_run,
    open_experiment,
    resolve_tracking_uri,
    without_credentials,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion, RegisteredModel

logger = logging.getLogger(__name__)

MANIFEST = "MANIFEST.json"
DIGEST_TAG = "manifest.sha256"
LINEAGE_TAG = "lineage.pretrained"
EXPERIMENT = "registry"  # holds the small runs of exports that come without a run
REQUIRED_FILES = ("model.safetensors", "config.json", "genes.txt")
SUFFIXES = (".safetensors", ".json", ".txt", ".md", ".csv", ".png")
# A tracker must not stall training, so its requests give up soon; here a job cannot go on without
# an answer, and hundreds of tasks may ask one server at once. The user's own settings stand.
PATIENT_HTTP = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "4",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "60",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
}

_REFERENCE = re.compile(r"models:/(?P<name>[^/@]+)(@(?P<alias>[\w.-]+)|/(?P<version>\d+))")
_MODEL_NAME = re.compile(r"[A-Za-z0-9][\w. -]*")
_FILE_NAME = re.compile(r"\w[\w. -]*")


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


def register_export(
    folder: str | Path,
    name: str,
    *,
    uri: str | None = None,
    alias: str | None = None,
    run_id: str | None = None,
    tags: Mapping[str, str] | None = None,
) -> ModelVersionRef:
    """Upload an export and register it as a new version of ``name``.

    Repeating a registration (a requeued job) finds the version with the same files and run, and
    sets only its tags and alias. A lineage tag that names an alias is pinned to the version that
    the alias means now.

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
    folder = Path(folder)
    manifest = make_manifest(folder)
    digest = hashlib.sha256(manifest).hexdigest()
    if not _MODEL_NAME.fullmatch(name):
        raise ValueError(f"the model name is {name!r}; use letters, digits, '.', '_', '-', ' '")
    client, uri = _open(uri, create=True)
    with _explained(uri):
        tags = {**_pinned(client, tags or {}), DIGEST_TAG: digest}
        version = _same_version(client, name, digest, run_id)
        if version is None:
            own_run = None if run_id else _small_run(client, uri, name)
            source = _upload(client, run_id or own_run or "", folder, manifest, digest)
            if own_run is not None:
                end_run(client, own_run)
            _create_model(client, name)
            version = client.create_model_version(name, source, run_id or own_run, tags=tags)
        else:
            logger.info("models:/%s/%s already holds these files", name, version.version)
            for key, value in tags.items():
                client.set_model_version_tag(name, str(version.version), key, value)
        if alias is not None:
            client.set_registered_model_alias(name, alias, str(version.version))
        return _reference(version, client.get_registered_model(name).aliases)


def resolve_model(
    reference: str | Path, *, uri: str | None = None, cache: Path | None = None
) -> ResolvedModel:
    """Return a local folder for a path, ``models:/name@alias`` or ``models:/name/version``.

    Args:
        reference: What the user gave.
        uri: Tracking server or store; None as in ``resolve_tracking_uri``.
        cache: Where pulled versions are kept; None means ``$XDG_CACHE_HOME/scbert/models``.

    Raises:
        ValueError: If the folder, model, alias or version does not exist, the registry does not
            answer, or the files are not what was registered.
    """
    if not str(reference).startswith("models:"):
        if not Path(reference).is_dir():
            raise ValueError(
                f"there is no model folder {str(reference)!r}; "
                "give a folder, models:/name@alias or models:/name/version"
            )
        return ResolvedModel(path=Path(reference))
    client, uri = _open(uri)
    with _explained(uri):
        found, alias = _find_version(client, str(reference))
        digest = _digest_of(found)
        source = client.get_model_version_download_uri(found.name, str(found.version))
        cache = cache or default_cache(os.environ)
        target = cache / str(found.name) / f"{found.version}-{digest[:12]}"
        if not _is_cached(target, digest):
            _pull(source, target, digest, uri)
    return ResolvedModel(path=target, name=found.name, version=int(found.version), alias=alias)


def list_models(uri: str | None = None) -> list[ModelVersionRef]:
    """Return every version of every registered model, by name and version."""
    client, uri = _open(uri)
    with _explained(uri):
        aliases = {
            model.name: model.aliases for model in _all_pages(client.search_registered_models)
        }
        versions = list(_all_pages(client.search_model_versions))
    found = [_reference(version, aliases.get(version.name, {})) for version in versions]
    return sorted(found, key=lambda ref: (ref.name, ref.version))


def provenance_run_id(folder: str | Path, *, uri: str | None = None) -> str | None:
    """Return the run that an export names in ``config.json``, if the store still holds that run."""
    config = Path(folder) / "config.json"
    provenance = json.loads(config.read_text()).get("provenance") if config.is_file() else None
    run_id = provenance.get("run_id") if isinstance(provenance, dict) else None
    if not run_id:
        return None
    client, uri = _open(uri, create=True)
    from mlflow.exceptions import MlflowException

    with _explained(uri):
        try:
            return str(client.get_run(str(run_id)).info.run_id)
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
    logger.warning("the run %s of this export is not at %s", run_id, without_credentials(uri))
    return None


def default_cache(environ: Mapping[str, str]) -> Path:
    """Return the folder for pulled models: ``$XDG_CACHE_HOME`` or ``~/.cache``, scbert/models."""
    home = environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "scbert" / "models"


def make_manifest(folder: Path) -> bytes:
    """Return the manifest of an export: size and sha256 of every file, as JSON.

    Raises:
        ValueError: If a file is missing, or is not of the kinds that an export may hold.
    """
    if not folder.is_dir():
        raise ValueError(f"there is no export folder {str(folder)!r}")
    names = sorted({path.name for path in folder.iterdir()} - {MANIFEST})
    _refuse_links(folder)
    _refuse_kinds(names, folder)
    missing = [name for name in REQUIRED_FILES if name not in names]
    if missing:
        raise ValueError(f"{folder} is no export: it lacks {', '.join(missing)}")
    files = {name: _size_and_hash(folder / name) for name in names}
    return (json.dumps({"files": files}, indent=1) + "\n").encode()


def verify_export(folder: Path, digest: str) -> None:
    """Compare a pulled folder with its manifest, and the manifest with the registered digest.

    Raises:
        ValueError: Naming the first file that differs.
    """
    files = _read_manifest(folder, digest)
    present = {path.name for path in folder.iterdir()} - {MANIFEST}
    if present != set(files):
        different = ", ".join(sorted(present ^ set(files)))
        raise ValueError(f"{folder} does not hold the files of its manifest: {different}")
    for name, expected in files.items():
        found = _size_and_hash(folder / name)
        if found != expected:
            raise ValueError(
                f"{name} is damaged or was changed after it was registered: expected "
                f"{expected}, found {found}; register the export again"
            )


def _open(uri: str | None, create: bool = False) -> tuple[MlflowClient, str]:
    """Connect; a missing SQLite file is refused unless something is to be written."""
    uri = resolve_tracking_uri(uri, os.environ, Path.cwd())
    database = uri.removeprefix("sqlite:///").partition("?")[0]
    if not create and uri.startswith("sqlite:///") and not Path(database).exists():
        raise ValueError(
            f"there is no registry at {uri}; set MLFLOW_TRACKING_URI to yours, "
            "or register an export first"
        )
    return connect(uri), uri


@contextlib.contextmanager
def _explained(uri: str) -> Iterator[None]:
    """Be patient with the registry and turn what MLflow raises into a ValueError that names it."""
    from mlflow.exceptions import MlflowException

    before = {name: os.environ.get(name) for name in PATIENT_HTTP}
    ours = [name for name, value in before.items() if value in (None, MLFLOW_SETTINGS[name])]
    os.environ.update({name: PATIENT_HTTP[name] for name in ours})
    try:
        yield
    except MlflowException as error:
        address, text = without_credentials(uri), without_credentials(str(error))
        if "API request to" in text and "failed with" in text:
            text = f"it does not answer; is it running, is MLFLOW_TRACKING_URI right? ({text})"
        raise ValueError(f"MLflow at {address}: {text}") from error
    finally:
        os.environ.update({name: before[name] or MLFLOW_SETTINGS[name] for name in ours})


def _find_version(client: MlflowClient, reference: str) -> tuple[ModelVersion, str | None]:
    """Look up a reference; return the version and the alias it was found by."""
    parts = _REFERENCE.fullmatch(reference)
    if parts is None or not _MODEL_NAME.fullmatch(parts["name"]):
        raise ValueError(
            f"the reference is {reference!r}; write models:/name@alias or models:/name/version"
        )
    model, alias = _find_model(client, parts["name"]), parts["alias"]
    if alias is not None and alias not in model.aliases:
        known = ", ".join(f"@{key} (version {value})" for key, value in model.aliases.items())
        raise ValueError(f"{model.name} has no alias @{alias}; it has: {known or 'none'}")
    number = str(model.aliases[alias] if alias is not None else int(parts["version"]))
    versions = {
        str(version.version): version
        for version in _all_pages(client.search_model_versions, f"name='{model.name}'")
    }
    if number not in versions:
        known = ", ".join(sorted(versions, key=int))
        raise ValueError(f"{model.name} has no version {number}; it has: {known or 'none'}")
    return versions[number], alias


def _find_model(client: MlflowClient, name: str) -> RegisteredModel:
    from mlflow.exceptions import MlflowException

    try:
        return client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        names = sorted(model.name for model in _all_pages(client.search_registered_models))
        close = difflib.get_close_matches(name, names)
        hint = f"did you mean {' or '.join(close)}? " if close else ""
        there = ", ".join(names) or "nothing"
        raise ValueError(f"no model {name!r} is registered; {hint}there is: {there}") from error


def _digest_of(version: ModelVersion) -> str:
    digest = version.tags.get(DIGEST_TAG, "")
    if not re.fullmatch(r"[0-9a-f]{64}", digest):
        raise ValueError(
            f"models:/{version.name}/{version.version} has no tag {DIGEST_TAG}, so its files "
            "cannot be checked; register the export with launchers/registry.py"
        )
    return str(digest)


def _is_cached(target: Path, digest: str) -> bool:
    """Check the cached copy of a version, if there is one."""
    if not target.is_dir():
        return False
    try:
        verify_export(target, digest)
    except (ValueError, OSError) as error:
        logger.warning("the cached copy %s is pulled again: %s", target, error)
        return False
    return True


def _pull(source: str, target: Path, digest: str, uri: str) -> None:
    """Download a version beside its place in the cache, check it, and publish it by one rename."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".pull-") as scratch:
        folder = Path(scratch) / "export"
        folder.mkdir()
        _download(source, folder, digest, uri)
        verify_export(folder, digest)
        if target.exists() and not _is_cached(target, digest):
            with contextlib.suppress(FileNotFoundError):  # another task was faster
                target.rename(Path(scratch) / "broken")
        try:
            folder.rename(target)
        except OSError:  # another task published first: its copy must be as good
            verify_export(target, digest)


def _download(source: str, folder: Path, digest: str, uri: str) -> None:
    """Fetch the manifest, then the files that it names; refuse whatever else lies there."""
    from mlflow.artifacts import download_artifacts, list_artifacts

    address = urlsplit(source)
    if address.scheme in ("", "file"):
        _refuse_links(Path(unquote(address.path)))
    listed = list_artifacts(artifact_uri=source, tracking_uri=uri)
    names = {entry.path.removeprefix(f"{Path(address.path).name}/") for entry in listed}
    _refuse_kinds(names - {MANIFEST}, source)

    def fetch(name: str) -> None:
        if name not in names:
            raise ValueError(f"{name} is missing from {without_credentials(source)}")
        download_artifacts(artifact_uri=f"{source}/{name}", dst_path=str(folder), tracking_uri=uri)

    fetch(MANIFEST)
    for name in _read_manifest(folder, digest):
        fetch(name)
    extra = names - {path.name for path in folder.iterdir()}
    if extra:
        raise ValueError(f"the manifest does not know {', '.join(sorted(extra))} at {source}")


def _read_manifest(folder: Path, digest: str) -> dict[str, Any]:
    """Return size and hash by file name from a manifest that has the registered digest."""
    text = (folder / MANIFEST).read_bytes()
    found = hashlib.sha256(text).hexdigest()
    if found != digest:
        raise ValueError(
            f"{MANIFEST} is damaged or was changed after it was registered: "
            f"expected sha256 {digest}, found {found}"
        )
    files: dict[str, Any] = json.loads(text)["files"]
    _refuse_kinds(files, MANIFEST)
    return files


def _refuse_kinds(names: Iterable[str], where: object) -> None:
    """Refuse names that climb out of the folder or do not belong into an export."""
    for name in names:
        if not _FILE_NAME.fullmatch(name) or Path(name).suffix not in SUFFIXES:
            raise ValueError(
                f"{name!r} in {where} is refused: an export is a flat folder of "
                f"{' '.join(SUFFIXES)} files (a pickle could run code)"
            )


def _refuse_links(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_symlink() or not path.is_file():
            raise ValueError(f"{path.name!r} in {folder} is refused: it is not a regular file")


def _size_and_hash(path: Path) -> dict[str, Any]:
    if path.is_symlink() or not path.is_file():
        raise ValueError(f"{path} is refused: it is not a regular file")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def _pinned(client: MlflowClient, tags: Mapping[str, str]) -> dict[str, str]:
    """Replace an alias in the lineage tag by its version: aliases move."""
    lineage = tags.get(LINEAGE_TAG)
    if lineage is None:
        return dict(tags)
    version, _ = _find_version(client, lineage)
    return {**tags, LINEAGE_TAG: f"models:/{version.name}/{version.version}"}


def _same_version(
    client: MlflowClient, name: str, digest: str, run_id: str | None
) -> ModelVersion | None:
    version: ModelVersion
    for version in _all_pages(client.search_model_versions, f"name='{name}'"):
        same_run = run_id is None or version.run_id == run_id
        if same_run and version.tags.get(DIGEST_TAG) == digest:
            return version
    return None


def _small_run(client: MlflowClient, uri: str, name: str) -> str:
    experiment_id = open_experiment(client, uri, EXPERIMENT)
    return str(client.create_run(experiment_id, run_name=f"register {name}").info.run_id)


def _upload(client: MlflowClient, run_id: str, folder: Path, manifest: bytes, digest: str) -> str:
    """Upload files, then manifest, and return their address."""
    # A folder per content: a later export of the same run must not overwrite this one.
    place = f"export/{digest[:12]}"
    root = client.get_run(run_id).info.artifact_uri
    client.log_artifacts(run_id, str(folder), place)
    client.log_text(run_id, manifest.decode(), f"{place}/{MANIFEST}")
    return f"{root}/{place}"


def _create_model(client: MlflowClient, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _reference(version: ModelVersion, aliases: Mapping[str, Any]) -> ModelVersionRef:
    number = int(version.version)
    own = tuple(sorted(alias for alias, value in aliases.items() if int(value) == number))
    source = without_credentials(version.source or "")
    return ModelVersionRef(name=version.name, version=number, source=source, aliases=own)


def _all_pages(search: Callable[..., Any], filter_string: str | None = None) -> Iterator[Any]:
    token = None
    while True:
        page = search(filter_string=filter_string, page_token=token)
        yield from page
        token = page.token
        if not token:
            return
