"""What somebody might put into a registry instead of a model."""

import json
from pathlib import Path

from finetune.export_files import MLMODEL

WEIGHTS = "model.safetensors"


def header(folder: Path, text: bytes, length: int | None = None, data: bytes = b"") -> None:
    """Write weights with this header, which says of itself that it has `length` bytes."""
    said = len(text) if length is None else length
    (folder / WEIGHTS).write_bytes(said.to_bytes(8, "little") + text + data)


def oversized_header(folder: Path) -> None:
    header(folder, b"{}", length=1 << 62)


def pickle_in_disguise(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(b"\x80\x04cos\nsystem\n(S'id'\ntR.")


def foreign_class(folder: Path) -> None:
    config = {"format": "scbert-export/1", "kind": "os.system"}
    (folder / "config.json").write_text(json.dumps(config))


def loader(folder: Path, text: str) -> None:
    """Write what MLflow would load the entry by."""
    (folder / MLMODEL).write_text(text)


def foreign_loader(folder: Path) -> None:
    loader(folder, "flavors: {python_function: {loader_module: mlflow.sklearn}}")
