"""What the folder of a registered model may hold, and whether it is what was registered.

An entry is a flat folder of safetensors, JSON, text and pictures, with ``MANIFEST.json`` (size and
sha256 of every file) beside them. Nothing here opens a file in a way that could run code:

1. names and kinds (``refuse_kinds``, ``refuse_links``) before anything is fetched or uploaded,
2. size and sha256 against the manifest, the manifest against its registered digest,
3. contents (``check_contents``): the header of the weights, the kind of model, the loader.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

MANIFEST: Final = "MANIFEST.json"
MODEL_CARD: Final = "MODEL_CARD.md"
MLMODEL: Final = "MLmodel"
"""What MLflow reads to serve a model; written at registration, and only ever with our loader."""
LOADER: Final = "finetune.pyfunc"
GENERATED: Final = (MANIFEST, MODEL_CARD, MLMODEL)
"""Written at registration, so a pulled model that is registered again brings none of its own."""
REQUIRED_FILES: Final = ("model.safetensors", "config.json", "genes.txt")
SUFFIXES: Final = (".safetensors", ".json", ".txt", ".md", ".csv", ".png")
KINDS: Final = ("encoder", "classifier")
FORMAT_NAME: Final = "scbert-export/"
MAX_MANIFEST_BYTES: Final = 1_000_000
MAX_FILES: Final = 200
MAX_HEADER_BYTES: Final = 10_000_000
"""Header of a safetensors file; ours have a hundred bytes per tensor."""
MAX_TEXT_BYTES: Final = 100_000_000
"""A JSON or text file; a panel of 60,000 genes has less than one million."""

_FILE_NAME = re.compile(r"\w[\w. -]*")


def make_manifest(folder: Path) -> bytes:
    """Return the manifest of an export: size and sha256 of every file, as JSON.

    Raises:
        ValueError: If a file is missing, or is not of the kinds that an export may hold.
    """
    if not folder.is_dir():
        raise ValueError(f"there is no export folder {str(folder)!r}")
    names = sorted({path.name for path in folder.iterdir()} - {MANIFEST})
    refuse_links(folder)
    refuse_kinds(names, folder)
    missing = [name for name in REQUIRED_FILES if name not in names]
    if missing:
        raise ValueError(f"{folder} is no export: it lacks {', '.join(missing)}")
    check_contents(folder)
    files = {name: size_and_hash(folder / name) for name in names}
    return (json.dumps({"files": files}, indent=1) + "\n").encode()


def read_manifest(folder: Path, digest: str) -> dict[str, dict[str, Any]]:
    """Return size and sha256 by file name from a manifest that has the registered digest.

    Raises:
        ValueError: If the manifest is missing, too large, changed, or names what it may not.
    """
    path = folder / MANIFEST
    if path.is_symlink() or not path.is_file():
        raise ValueError(f"{MANIFEST} is missing in {folder}")
    if path.stat().st_size > MAX_MANIFEST_BYTES:
        raise ValueError(f"{MANIFEST} is refused: it is larger than {MAX_MANIFEST_BYTES:,} bytes")
    text = path.read_bytes()
    found = hashlib.sha256(text).hexdigest()
    if found != digest:
        raise ValueError(
            f"{MANIFEST} is damaged or was changed after it was registered: "
            f"expected sha256 {digest}, found {found}"
        )
    files = _records(text)
    refuse_kinds(files, MANIFEST)
    if len(files) > MAX_FILES:
        raise ValueError(f"{MANIFEST} is refused: it names {len(files)} files, {MAX_FILES} at most")
    return files


def verify_export(folder: Path, digest: str) -> None:
    """Compare a pulled folder with its manifest, and the manifest with the registered digest.

    Raises:
        ValueError: Naming the first file that differs.
    """
    files = read_manifest(folder, digest)
    present = {path.name for path in folder.iterdir()} - {MANIFEST}
    if present != set(files):
        different = ", ".join(sorted(present ^ set(files)))
        raise ValueError(f"{folder} does not hold the files of its manifest: {different}")
    for name, expected in files.items():
        found = size_and_hash(folder / name)
        if found != expected:
            raise ValueError(
                f"{name} is damaged or was changed after it was registered: expected "
                f"{expected}, found {found}; register the export again"
            )


def check_contents(folder: Path) -> None:
    """Look into what a model is made of, without loading it.

    Raises:
        ValueError: If the weights' header is not one, the kind is not ours, or MLflow would load
            the entry by another program than ours.
    """
    for path in sorted(folder.glob("*.safetensors")):
        _check_weights(path)
    config = _json(folder / "config.json")
    if not isinstance(config, dict) or not str(config.get("format", "")).startswith(FORMAT_NAME):
        raise ValueError(f"{folder / 'config.json'} is refused: it does not say {FORMAT_NAME}…")
    if config.get("kind") not in KINDS:
        raise ValueError(
            f"{folder / 'config.json'} is refused: it is of the class {config.get('kind')!r}; "
            f"we load {' and '.join(KINDS)} only"
        )
    if (folder / MLMODEL).exists():
        _check_loader(folder / MLMODEL)


def read_config(folder: Path) -> dict[str, Any]:
    """Return ``config.json`` of an export.

    Raises:
        ValueError: If it is missing or no JSON object.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is no export: it lacks config.json")
    config = _json(folder / "config.json")
    if not isinstance(config, dict):
        raise ValueError(f"{folder / 'config.json'} holds no settings by name")
    return config


def refuse_kinds(names: Iterable[str], where: object) -> None:
    """Refuse names that climb out of the folder or do not belong into an export.

    Raises:
        ValueError: Naming the first such file.
    """
    for name in names:
        known = name == MLMODEL or Path(name).suffix in SUFFIXES
        if not _FILE_NAME.fullmatch(name) or not known:
            raise ValueError(
                f"{name!r} in {where} is refused: an export is a flat folder of "
                f"{' '.join(SUFFIXES)} files (a pickle could run code)"
            )


def refuse_links(folder: Path) -> None:
    """Refuse whatever is no regular file.

    Raises:
        ValueError: Naming the first link or folder.
    """
    for path in folder.iterdir():
        if path.is_symlink() or not path.is_file():
            raise ValueError(f"{path.name!r} in {folder} is refused: it is not a regular file")


def size_and_hash(path: Path) -> dict[str, Any]:
    """Return ``bytes`` and ``sha256`` of a regular file.

    Raises:
        ValueError: If it is a link or no file.
    """
    if path.is_symlink() or not path.is_file():
        raise ValueError(f"{path} is refused: it is not a regular file")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def _records(text: bytes) -> dict[str, dict[str, Any]]:
    try:
        files = json.loads(text)["files"]
        return {
            str(name): {"bytes": int(record["bytes"]), "sha256": str(record["sha256"])}
            for name, record in files.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{MANIFEST} is no manifest: register the export again") from None


def _check_weights(path: Path) -> None:
    """Read the header as far as it says of itself, and no further."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
            raise ValueError(
                f"{path} is refused: its header would have {length:,} bytes, the file has {size:,} "
                f"and {MAX_HEADER_BYTES:,} are the most we read"
            )
        header = file.read(length)
    try:
        tensors = json.loads(header)
        ends = [
            (int(tensor["data_offsets"][0]), int(tensor["data_offsets"][1]))
            for name, tensor in tensors.items()
            if name != "__metadata__"
        ]
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{path} is refused: its header is not that of safetensors") from None
    if any(not 0 <= start <= end <= size - 8 - length for start, end in ends):
        raise ValueError(f"{path} is refused: its header points outside the file")


def _check_loader(path: Path) -> None:
    import yaml

    try:
        flavors = yaml.safe_load(path.read_text(encoding="utf-8"))["flavors"]
        loaders = {name: flavor.get("loader_module") for name, flavor in flavors.items()}
        others = set().union(*flavors.values()) - {"loader_module", "data", "python_version"}
    except (yaml.YAMLError, KeyError, TypeError, AttributeError, ValueError, RecursionError):
        raise ValueError(f"{path} is refused: it is no description of an MLflow model") from None
    if loaders != {"python_function": LOADER} or others:
        raise ValueError(
            f"{path} is refused: it has MLflow run a foreign class ({loaders}); "
            f"an entry of ours is loaded by {LOADER} alone"
        )


def _json(path: Path) -> Any:
    if path.stat().st_size > MAX_TEXT_BYTES:
        raise ValueError(f"{path} is refused: it is larger than {MAX_TEXT_BYTES:,} bytes")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
