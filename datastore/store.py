"""The cell store on disk: format, manifest, opening, verifying.

A store is a folder. Each `dataset_<k>` in it is a whole AnnData group in Zarr v3 (CSR counts, obs,
var), so `anndata.read_zarr` opens it. `records/dataset_<k>.json` has size and SHA-256 of each of
its files, and `manifest.json` those of the records and of everything else. The manifest is written
last, so a folder without it is not a store. `datastore.store_writing` writes all of it;
docs/store_format.md tells it file by file.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from datastore.genes import GenePanel

SCHEMA_VERSION: Final = 1
MANIFEST: Final = "manifest.json"
GENES: Final = "genes.txt"
RECORDS: Final = "records"
MEASURED: Final = "measured.npy"


class StoreFormatError(ValueError):
    """A folder is not a whole cell store of a version that we read."""


@dataclass(frozen=True, kw_only=True)
class StoreHeader:
    """What the manifest says of a store, besides its files."""

    schema_version: int
    store_id: str
    panel_digest: str
    partitions: tuple[int, ...]
    """Cells of each partition."""
    generations: tuple[int, ...]
    """Cells that each ingest added: the first built the store, the others appended. Each is
    uniformly shuffled and has partitions of its own."""
    num_counts: int
    seed: int
    sources: tuple[dict[str, Any], ...]
    left_out: tuple[dict[str, str], ...] = ()
    """Path and reason of each source that could not be used."""

    @property
    def num_cells(self) -> int:
        """Cells in the store, N."""
        return sum(self.partitions)


@dataclass(frozen=True)
class CellStore:
    """An open store: where it is, what it holds. Cells are read by `datastore.reader`."""

    path: Path
    header: StoreHeader
    panel: GenePanel

    @property
    def num_cells(self) -> int:
        """Cells in the store, N."""
        return self.header.num_cells

    @cached_property
    def partition_starts(self) -> NDArray[np.int64]:
        """Position of each partition's first cell, and N at the end; (partitions + 1,)."""
        return np.concatenate([[0], np.cumsum(self.header.partitions)]).astype(np.int64)

    def partition_path(self, number: int) -> Path:
        """Folder of one AnnData part."""
        return self.path / f"dataset_{number}"

    def measured(self, source: str) -> NDArray[np.bool_]:
        """Tell which panel genes a source measured; a zero of the others says nothing.

        Args:
            source: Name of the source, as in `obs["source"]`.

        Returns:
            Bool of shape (G,).

        Raises:
            ValueError: If the store has no such source.
            StoreFormatError: If the store was written without this knowledge.
        """
        lines = {line["name"]: line for line in self.header.sources}
        if source not in lines:
            raise ValueError(f"{self.path} has no source {source!r}; it has {', '.join(lines)}")
        generation = lines[source]["generation"]
        together = [name for name, line in lines.items() if line["generation"] == generation]
        file = generation_folder(self.path, generation) / MEASURED
        if not file.is_file():
            raise StoreFormatError(
                f"{self.path} does not say which genes its sources measured ({MEASURED} is "
                "missing); rebuild it"
            )
        bits = np.load(file, mmap_mode="r")[together.index(source)]
        return np.unpackbits(bits, count=len(self.panel)).astype(np.bool_)


def open_store(path: str | Path) -> CellStore:
    """Open a store for reading.

    Looks at the manifest and that all the files which it names are there; so it costs the same for
    large shards and small. A shard that is missing is found by `verify_store`, or when it is read.

    Raises:
        FileNotFoundError: If there is no such folder.
        StoreFormatError: If it is not a whole store, or of a newer schema.
    """
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"no cell store at {path}; make one with launchers/build_store.py")
    manifest = _read_manifest(path)
    try:
        header = StoreHeader(
            **{
                **manifest["header"],
                **{
                    name: tuple(manifest["header"][name])
                    for name in ("partitions", "generations", "sources", "left_out")
                },
            }
        )
        sizes = {name: int(size) for name, (size, _) in manifest["files"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StoreFormatError(
            f"{path}/{MANIFEST} is damaged ({error}); copy the store again or rebuild it"
        ) from error
    if header.num_cells != sum(header.generations):
        raise StoreFormatError(
            f"{path}/{MANIFEST} is damaged (partitions and generations differ in cells); "
            "copy the store again or rebuild it"
        )
    for name, problem in _wrong_sizes(path, sizes).items():
        raise StoreFormatError(f"{path}: {name} {problem}; copy the store again or rebuild it")
    panel = GenePanel(tuple((path / GENES).read_text(encoding="utf-8").splitlines()))
    if panel.digest != header.panel_digest:
        raise StoreFormatError(f"{path}: {GENES} is not the panel that the manifest names")
    return CellStore(path, header, panel)


def verify_store(path: str | Path) -> list[str]:
    """Check every file against its SHA-256 and return the names of the damaged ones."""
    path = Path(path)
    manifest = _read_manifest(path)
    damaged = _damaged(path, manifest["files"])
    for number in range(len(manifest["header"]["partitions"])):
        record = record_path(path, number)
        if record.relative_to(path).as_posix() not in damaged:
            inside = _damaged(path / f"dataset_{number}", json.loads(record.read_text("utf-8")))
            damaged += [f"dataset_{number}/{name}" for name in inside]
    if content_id(manifest["header"], manifest["files"]) != manifest["header"]["store_id"]:
        damaged.append(MANIFEST)
    return damaged


def record_path(path: Path, number: int) -> Path:
    """File with size and SHA-256 of each file of a partition."""
    return path / RECORDS / f"dataset_{number}.json"


def generation_folder(path: Path, generation: int) -> Path:
    """Folder with what is known of the sources of one ingest: report of genes, measured genes."""
    return path / RECORDS / f"generation_{generation}"


def content_id(header: Mapping[str, Any], files: Mapping[str, Any]) -> str:
    """Digest of all that a store holds; equal for equal cells, wherever the store was built."""
    # The sources that were left out are named by paths of the machine that could not read them.
    said = {name: value for name, value in header.items() if name not in ("store_id", "left_out")}
    return hashlib.sha256(json.dumps([said, files], sort_keys=True).encode()).hexdigest()


def write_json(path: Path, content: Any) -> None:
    """Write JSON beside its target and rename it into place."""
    beside = path.with_name(path.name + ".part")
    with beside.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        version = manifest["header"]["schema_version"]
    except FileNotFoundError:
        raise StoreFormatError(
            f"{path} is not a whole cell store ({MANIFEST} is missing): an ingest did not finish, "
            "or a copy was cut short; run launchers/build_store.py again"
        ) from None
    except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise StoreFormatError(f"{path}/{MANIFEST} cannot be read: {error}") from error
    if version != SCHEMA_VERSION:
        raise StoreFormatError(
            f"{path} has schema version {version}, this program reads {SCHEMA_VERSION}; "
            "update scbert-scale or rebuild the store"
        )
    return manifest


def _wrong_sizes(folder: Path, sizes: Mapping[str, int]) -> dict[str, str]:
    """What is wrong with each file that is missing or of another size."""
    wrong = {}
    for name, size in sizes.items():
        file = folder / name
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            wrong[name] = "is missing" if found is None else f"has {found} bytes instead of {size}"
    return wrong


def _damaged(folder: Path, files: Mapping[str, tuple[int, str]]) -> list[str]:
    return [
        name
        for name, (_, digest) in files.items()
        if not (folder / name).is_file() or file_digest(folder / name) != digest
    ]
