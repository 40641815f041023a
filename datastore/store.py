"""The cell store on disk: format, manifest, opening, verifying.

A store is a folder. Each `dataset_<k>` in it is a whole AnnData group in Zarr v3 (CSR counts, obs,
var), so `anndata.read_zarr` opens it. `records/dataset_<k>.json` has size and SHA-256 of each of
its files, and `manifest.json` those of the records and of everything else. The manifest is written
last, so a folder without it is not a store. `datastore.store_writing` writes all of it,
`datastore.storage` says where the bytes come from; docs/store_format.md tells it file by file.

`open_store` looks at the manifest and the files it names; `datastore.verification` at all others.
"""

import hashlib
import io
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from datastore.genes import GenePanel
from datastore.storage import LocalFolder, Storage, open_storage
from datastore.storage import StoreFormatError as StoreFormatError

SCHEMA_VERSION: Final = 1
MANIFEST: Final = "manifest.json"
GENES: Final = "genes.txt"
RECORDS: Final = "records"
MEASURED: Final = "measured.npy"

FileEntry = tuple[int, str]
"""Size and SHA-256 of a file."""


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

    storage: Storage
    header: StoreHeader
    panel: GenePanel
    files: Mapping[str, FileEntry]
    """Every file that the manifest names; those of partitions stand in their records."""

    @property
    def url(self) -> str:
        """Where the store is, folder or address."""
        return self.storage.url

    @property
    def path(self) -> Path:
        """Folder of a store on this machine.

        Raises:
            ValueError: If the store is remote.
        """
        if isinstance(self.storage, LocalFolder):
            return self.storage.path
        raise ValueError(f"{self.url} is no folder of this machine; copy the store here for that")

    @property
    def num_cells(self) -> int:
        """Cells in the store, N."""
        return self.header.num_cells

    @cached_property
    def partition_starts(self) -> NDArray[np.int64]:
        """Position of each partition's first cell, and N at the end; (partitions + 1,)."""
        return np.concatenate([[0], np.cumsum(self.header.partitions)]).astype(np.int64)

    def partition_path(self, number: int) -> Path:
        """Folder of one AnnData part, on this machine."""
        return self.path / f"dataset_{number}"

    def partition_files(self, number: int) -> Mapping[str, FileEntry]:
        """Size and SHA-256 of each file of a partition, by its name inside the partition."""
        name = f"{RECORDS}/dataset_{number}.json"
        return read_record(self.storage, name, self.files[name])

    def partition_file(self, number: int, name: str) -> bytes:
        """Read a file of a partition and compare it with the partition's record."""
        entry = self.partition_files(number)[name]
        return _read_whole(self.storage, f"dataset_{number}/{name}", entry)

    def array_spec(self, number: int, array: str) -> dict[str, Any]:
        """Describe an array of a partition, such as `X/data`, for TensorStore.

        Its metadata is compared with the partition's record and goes into the description, to be
        opened with `assume_metadata`: a chunk has a checksum of its own, `zarr.json` has not.

        Raises:
            StoreFormatError: If the metadata is damaged or missing.
        """
        name = f"{array}/zarr.json"
        entry = self.partition_files(number)[name]
        metadata = _read_whole(self.storage, f"dataset_{number}/{name}", entry)
        return {
            "driver": "zarr3",
            "kvstore": self.storage.kvstore(f"dataset_{number}/{array}"),
            "metadata": json.loads(metadata),
            "fill_missing_data_reads": False,  # a file that went missing is an error, not zeros
        }

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
            raise ValueError(f"{self.url} has no source {source!r}; it has {', '.join(lines)}")
        generation = lines[source]["generation"]
        together = [name for name, line in lines.items() if line["generation"] == generation]
        file = f"{RECORDS}/generation_{generation}/{MEASURED}"
        if file not in self.files:
            raise StoreFormatError(
                f"{self.url} does not say which genes its sources measured ({MEASURED} is "
                "missing); rebuild it"
            )
        bits = _measured_bits(self.storage, file, self.files[file])[together.index(source)]
        return np.unpackbits(bits, count=len(self.panel)).astype(np.bool_)


def open_store(place: str | Path) -> CellStore:
    """Open a store for reading: a folder, or an address such as `s3://bucket/cells.zarr`.

    Looks at the manifest and that all the files which it names are there (of a remote store, only
    those read here); so it costs the same for large shards and small. A shard that is missing is
    found by `check_complete`, or when it is read.

    Raises:
        FileNotFoundError: If there is no such folder.
        StoreFormatError: If it is not a whole store, or of a newer schema.
        OSError: If a remote store cannot be reached.
    """
    storage = open_storage(place)
    header, files = checked_header(storage, read_manifest(storage))
    if not storage.is_remote:
        refuse_wrong_sizes(storage, ((name, size) for name, (size, _) in files.items()))
    genes = _read_whole(storage, GENES, files[GENES])
    try:
        panel = GenePanel(tuple(genes.decode().splitlines()))
    except ValueError as error:
        raise _damaged(storage, GENES, f"is no panel ({error})") from error
    if panel.digest != header.panel_digest:
        raise StoreFormatError(f"{storage.url}: {GENES} is not the panel that the manifest names")
    return CellStore(storage, header, panel, files)


def record_name(number: int) -> str:
    """Name of the file with size and SHA-256 of each file of a partition."""
    return f"{RECORDS}/dataset_{number}.json"


def record_path(path: Path, number: int) -> Path:
    """Where a partition's record is."""
    return path / record_name(number)


def generation_folder(path: Path, generation: int) -> Path:
    """Folder with what is known of the sources of one ingest: report of genes, measured genes."""
    return path / RECORDS / f"generation_{generation}"


def content_id(header: Mapping[str, Any], files: Mapping[str, Any]) -> str:
    """Digest of all that a store holds; equal for equal cells, wherever the store was built."""
    # The sources that were left out are named by paths of the machine that could not read them.
    said = {name: value for name, value in header.items() if name not in ("store_id", "left_out")}
    return hashlib.sha256(json.dumps([said, files], sort_keys=True).encode()).hexdigest()


def publish_manifest(path: Path, header: Mapping[str, Any], files: Mapping[str, Any]) -> None:
    """Write the manifest, sealed: this makes a folder a store, or a store a longer one."""
    manifest = {"header": header, "files": files}
    write_json(path / MANIFEST, {**manifest, "seal": _seal(manifest)})


def write_json(path: Path, content: Any) -> None:
    """Write JSON beside its target and rename it into place."""
    beside = path.with_name(path.name + ".part")
    with beside.open("w", encoding="utf-8") as file:
        file.write(_json_text(content))
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_manifest(storage: Storage) -> dict[str, Any]:
    """Read the manifest of a store that we know the format of.

    Raises:
        FileNotFoundError: If there is no such folder.
        StoreFormatError: If there is none in it, or of another schema, or it is no JSON.
    """
    if isinstance(storage, LocalFolder) and not storage.path.is_dir():
        raise FileNotFoundError(
            f"no cell store at {storage.url}; make one with launchers/build_store.py"
        )
    try:
        manifest: dict[str, Any] = json.loads(storage.read(MANIFEST).decode())
        version = manifest["header"]["schema_version"]
    except FileNotFoundError:
        raise StoreFormatError(
            f"{storage.url} is not a whole cell store ({MANIFEST} is missing): an ingest did not "
            "finish, or a copy was cut short; run launchers/build_store.py again"
        ) from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise StoreFormatError(
            f"{storage.url}/{MANIFEST} cannot be read: it is cut short or no manifest ({error}); "
            "copy the store again or rebuild it"
        ) from error
    if version != SCHEMA_VERSION:
        raise StoreFormatError(
            f"{storage.url} has schema version {version}, this program reads {SCHEMA_VERSION}; "
            "update scbert-scale or rebuild the store"
        )
    return manifest


def checked_header(
    storage: Storage, manifest: dict[str, Any]
) -> tuple[StoreHeader, dict[str, FileEntry]]:
    """Header and files of a manifest that says what was written.

    Raises:
        StoreFormatError: If it does not.
    """
    try:
        said = manifest["header"]
        lists = ("partitions", "generations", "sources", "left_out")
        header = StoreHeader(**{**said, **{name: tuple(said[name]) for name in lists}})
        _refuse_odd(header)
        files = _entries(manifest["files"])
        expected = [GENES, *(record_name(number) for number in range(len(header.partitions)))]
        missing = [name for name in expected if name not in files]
        if missing:
            raise ValueError(f"it does not list {missing[0]}")
        if header.num_cells != sum(header.generations):
            raise ValueError("partitions and generations differ in cells")
        if manifest["seal"] != _seal(manifest):
            raise ValueError("it is not as it was written")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StoreFormatError(
            f"{storage.url}/{MANIFEST} is damaged ({error}); copy the store again or rebuild it"
        ) from error
    return header, files


def is_as_written(storage: Storage, manifest: dict[str, Any]) -> bool:
    """Whether a manifest is what we write, byte for byte, and its store id that of its files."""
    identity = content_id(manifest["header"], manifest["files"])
    return (
        manifest["header"]["store_id"] == identity
        and storage.read(MANIFEST) == _json_text(manifest).encode()
    )


def _refuse_odd(header: StoreHeader) -> None:
    """Refuse a header whose values are of other kinds than we write; its seal may be true."""
    numbers = [*header.partitions, *header.generations, header.num_counts, header.seed]
    if any(type(number) is not int for number in numbers) or min(numbers[:-1]) < 0:
        raise ValueError("a number in the header is none")
    if not all(isinstance(source, dict) and "name" in source for source in header.sources):
        raise ValueError("a source in the header has no name")
    if not all(
        isinstance(out, dict) and {"path", "reason"} <= out.keys() for out in header.left_out
    ):
        raise ValueError("a source that was left out has no reason")


def _entries(listed: Mapping[str, Any]) -> dict[str, FileEntry]:
    """Size and SHA-256 by file name; a name may not lead out of the folder."""
    for name in listed:
        if ".." in name.split("/") or name.startswith("/"):
            raise ValueError(f"it names {name!r}, outside the store")
    return {name: (int(size), str(digest)) for name, (size, digest) in listed.items()}


@lru_cache(maxsize=16)  # the arrays of a partition are opened one after another
def read_record(storage: Storage, name: str, entry: FileEntry) -> Mapping[str, FileEntry]:
    """Read size and SHA-256 of each file of a partition."""
    content = _read_whole(storage, name, entry)
    try:
        return _entries(json.loads(content))
    except (ValueError, TypeError, AttributeError) as error:
        raise _damaged(storage, name, f"is no record ({error})") from error


def refuse_wrong_sizes(storage: Storage, files: Iterable[tuple[str, int]]) -> None:
    """Look at files and refuse the first that is missing or not as long as it should be."""
    for name, size in files:
        problem = storage.size_problem(name, size)
        if problem is not None:
            raise _damaged(storage, name, problem)


def _read_whole(storage: Storage, name: str, entry: FileEntry) -> bytes:
    """Read a file and compare it with what is known of it.

    Raises:
        StoreFormatError: If it is missing or of other content.
    """
    size, digest = entry
    problem = ""
    for _ in range(3 if storage.is_remote else 1):  # what a server garbled once may come well again
        try:
            content = storage.read(name)
        except FileNotFoundError:
            problem = "is missing"
            break
        if hashlib.sha256(content).hexdigest() == digest:
            return content
        problem = "is not as it was written"
        if len(content) != size:
            problem = f"has {len(content)} bytes instead of {size}"
    raise _damaged(storage, name, problem)


@lru_cache(maxsize=16)
def _measured_bits(storage: Storage, name: str, entry: FileEntry) -> NDArray[np.uint8]:
    bits: NDArray[np.uint8] = np.load(
        io.BytesIO(_read_whole(storage, name, entry)), allow_pickle=False
    )
    return bits


def _damaged(storage: Storage, name: str, problem: str) -> StoreFormatError:
    return StoreFormatError(f"{storage.url}: {name} {problem}; copy the store again or rebuild it")


def _seal(manifest: Mapping[str, Any]) -> str:
    """Digest of all that a manifest says."""
    said = [manifest["header"], manifest["files"]]
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _json_text(content: Any) -> str:
    return json.dumps(content, indent=1) + "\n"
