"""The way of a model's files into the artifact store and back.

Upload: files, then manifest, below ``export/<content>/`` of a run. Download: the manifest, then the
files that it names, of the sizes that it names, and nothing else.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from finetune.export_files import (
    MANIFEST,
    MAX_MANIFEST_BYTES,
    MODEL_CARD,
    read_manifest,
    refuse_kinds,
    refuse_links,
    size_and_hash,
)
from pretrain.mlflow_client import without_credentials

if TYPE_CHECKING:
    from mlflow import MlflowClient


def upload(client: MlflowClient, run_id: str, folders: Sequence[Path], manifest: bytes) -> str:
    """Upload folders as one, then its manifest, to a run, and return the address."""
    # A folder per content: a later export of the same run must not overwrite this one.
    place = f"export/{hashlib.sha256(manifest).hexdigest()[:12]}"
    root = client.get_run(run_id).info.artifact_uri
    for folder in folders:
        client.log_artifacts(run_id, str(folder), place)
    client.log_text(run_id, manifest.decode(), f"{place}/{MANIFEST}")
    return f"{root}/{place}"


def download(source: str, folder: Path, digest: str, uri: str) -> None:
    """Fetch the manifest, then the files that it names; refuse whatever else lies there.

    Args:
        source: Address of the files.
        folder: Empty folder to fill.
        digest: Registered sha256 of the manifest.
        uri: Tracking server or store.

    Raises:
        ValueError: If files are missing, too many, of another size or kind, or do not arrive.
        OSError: If the disk is full.
    """
    sizes = _listed(source, uri)
    files = _manifest(source, folder, digest, sizes, uri)
    for name, expected in files.items():
        if sizes.get(name) not in (None, expected["bytes"]):
            raise ValueError(
                f"{name} is damaged or was changed after it was registered: it has {sizes[name]:,} "
                f"bytes, registered were {expected['bytes']:,}; register the export again"
            )
    _refuse_full_disk(folder, sum(record["bytes"] for record in files.values()))
    for name in files:
        _fetch(source, name, folder, sizes, uri)


def download_card(source: str, folder: Path, digest: str, uri: str) -> dict[str, dict[str, Any]]:
    """Fetch manifest and model card only, and return the manifest's files.

    Raises:
        ValueError: As ``download``, and if the card is not what was registered.
    """
    sizes = _listed(source, uri)
    files = _manifest(source, folder, digest, sizes, uri)
    if MODEL_CARD in files:
        _fetch(source, MODEL_CARD, folder, sizes, uri)
        if size_and_hash(folder / MODEL_CARD) != files[MODEL_CARD]:
            raise ValueError(f"{MODEL_CARD} was changed after it was registered; register it again")
    return files


def _manifest(
    source: str, folder: Path, digest: str, sizes: dict[str, int | None], uri: str
) -> dict[str, dict[str, Any]]:
    refuse_kinds(set(sizes) - {MANIFEST}, source)
    if (sizes.get(MANIFEST) or 0) > MAX_MANIFEST_BYTES:
        raise ValueError(f"{MANIFEST} is refused: it is larger than {MAX_MANIFEST_BYTES:,} bytes")
    _fetch(source, MANIFEST, folder, sizes, uri)
    files = read_manifest(folder, digest)
    if extra := set(sizes) - set(files) - {MANIFEST}:
        raise ValueError(
            f"the manifest does not know {', '.join(sorted(extra))} "
            f"at {without_credentials(source)}"
        )
    return files


def _listed(source: str, uri: str) -> dict[str, int | None]:
    """Name and size of what lies at an address; a folder has no size."""
    from mlflow.artifacts import list_artifacts

    address = urlsplit(source)
    if address.scheme in ("", "file"):
        refuse_links(Path(unquote(address.path)))
    try:
        listed = list_artifacts(artifact_uri=source, tracking_uri=uri)
    except OSError as error:
        raise ValueError(_broken_off(source, error)) from None
    prefix = f"{Path(address.path).name}/"
    return {entry.path.removeprefix(prefix): entry.file_size for entry in listed}


def _fetch(source: str, name: str, folder: Path, sizes: dict[str, int | None], uri: str) -> None:
    from mlflow.artifacts import download_artifacts

    if name not in sizes:
        raise ValueError(f"{name} is missing from {without_credentials(source)}")
    try:
        download_artifacts(artifact_uri=f"{source}/{name}", dst_path=str(folder), tracking_uri=uri)
    except OSError as error:
        if error.errno is not None and not isinstance(error, ConnectionError):
            raise  # of this machine's disk
        raise ValueError(_broken_off(f"{source}/{name}", error)) from None


def _broken_off(source: str, error: OSError) -> str:
    # Not `from error`: its text may hold an address with a password.
    return (
        f"the download of {without_credentials(source)} broke off, nothing kept; "
        f"try again ({without_credentials(str(error))})"
    )


def _refuse_full_disk(folder: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if num_bytes > free:
        # Before the download, not in its middle.
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
