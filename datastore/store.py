"""The cell store on disk: format, manifest, opening.

A store is a folder. Each `dataset_<k>` in it is a whole AnnData group in Zarr v3 (CSR counts, obs,
var), so `anndata.read_zarr` opens it. `manifest.json` names every file with its size and SHA-256;
it is written last, so a folder without it is not a store. docs/architecture.md has the picture.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd
import zarr
from anndata.io import write_elem
from numpy.typing import NDArray
from scipy import sparse
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, ShardingCodec

from datastore.genes import GenePanel

SCHEMA_VERSION: Final = 1
MANIFEST: Final = "manifest.json"
MEASURED: Final = "measured.npy"
_CHUNK_ROUNDING: Final = 1024


class StoreFormatError(ValueError):
    """A folder is not a whole cell store of a version that we read."""


@dataclass(frozen=True, kw_only=True)
class StoreHeader:
    """What the manifest says of a store, besides its files."""

    schema_version: int
    store_id: str
    panel_digest: str
    partitions: tuple[int, ...]
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
        names = [line["name"] for line in self.header.sources]
        if source not in names:
            raise ValueError(f"{self.path} has no source {source!r}; it has {', '.join(names)}")
        if not (self.path / MEASURED).is_file():
            raise StoreFormatError(
                f"{self.path} does not say which genes its sources measured ({MEASURED} is "
                "missing); rebuild it"
            )
        bits = np.load(self.path / MEASURED, mmap_mode="r")[names.index(source)]
        return np.unpackbits(bits, count=len(self.panel)).astype(np.bool_)


def open_store(path: str | Path) -> CellStore:
    """Open a store for reading.

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
                "partitions": tuple(manifest["header"]["partitions"]),
                "sources": tuple(manifest["header"]["sources"]),
                "left_out": tuple(manifest["header"].get("left_out", ())),
            }
        )
        sizes = {name: size for name, (size, _) in manifest["files"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StoreFormatError(
            f"{path}/{MANIFEST} is damaged ({error}); copy the store again or rebuild it"
        ) from error
    for name, size in sizes.items():
        found = (path / name).stat().st_size if (path / name).is_file() else None
        if found != size:
            state = "is missing" if found is None else f"has {found} bytes instead of {size}"
            raise StoreFormatError(f"{path}: {name} {state}; copy the store again or rebuild it")
    panel = GenePanel(tuple((path / "genes.txt").read_text(encoding="utf-8").splitlines()))
    if panel.digest != header.panel_digest:
        raise StoreFormatError(f"{path}: genes.txt is not the panel that the manifest names")
    return CellStore(path, header, panel)


def verify_store(path: str | Path) -> list[str]:
    """Check every file against its SHA-256 and return the names of the damaged ones."""
    path = Path(path)
    manifest = _read_manifest(path)
    files = manifest["files"]
    damaged = [
        name
        for name, (_, digest) in files.items()
        if not (path / name).is_file() or _file_digest(path / name) != digest
    ]
    if _store_id(files) != manifest["header"]["store_id"]:
        damaged.append(MANIFEST)
    return damaged


def write_partition(
    path: Path, counts: sparse.csr_matrix, obs: pd.DataFrame, panel: GenePanel, sizes: "ArraySizes"
) -> None:
    """Write one AnnData part.

    Args:
        path: Folder of the part; replaced if it exists half-written.
        counts: Whole counts, CSR of shape (B, G), columns sorted.
        obs: One row per cell.
        panel: The genes, G.
        sizes: How many cells share a chunk and a shard.
    """
    group = zarr.open_group(path, mode="w", zarr_format=3)
    group.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
    # One chunk per file in these tables, whatever anndata's default is or becomes.
    unsharded: dict[str, Any] = {"shards": None}
    write_elem(group, "obs", obs, dataset_kwargs=unsharded)
    var = pd.DataFrame(index=pd.Index(panel.names, dtype=object))
    write_elem(group, "var", var, dataset_kwargs=unsharded)
    for name in ("obsm", "varm", "obsp", "varp", "layers", "uns"):
        write_elem(group, name, {})
    matrix = group.create_group("X")
    matrix.attrs.update(
        {
            "encoding-type": "csr_matrix",
            "encoding-version": "0.1.0",
            "shape": [int(length) for length in counts.shape],
        }
    )
    per_cell = max(1.0, counts.nnz / max(1, counts.shape[0]))
    largest = int(counts.data.max()) if counts.nnz else 0
    count_type = np.uint16 if largest <= np.iinfo(np.uint16).max else np.uint32
    gene_type = np.uint16 if len(panel) <= np.iinfo(np.uint16).max + 1 else np.uint32
    _write_array(matrix, "data", counts.data.astype(count_type), per_cell, sizes)
    _write_array(matrix, "indices", counts.indices.astype(gene_type), per_cell, sizes)
    _write_array(matrix, "indptr", counts.indptr.astype(np.int64), 16.0, sizes)


@dataclass(frozen=True, kw_only=True)
class ArraySizes:
    """How many cells are decoded at once, and how many share a file."""

    cells_per_chunk: int
    cells_per_shard: int


def write_root(
    path: Path,
    panel: GenePanel,
    partitions: list[int],
    num_counts: int,
    seed: int,
    sources: list[dict[str, Any]],
    left_out: Sequence[dict[str, str]] = (),
) -> StoreHeader:
    """Make a folder of parts a store: root group, panel, and last of all the manifest.

    The store id is the digest of all contents: equal sources, panel and seed give equal stores.
    """
    group = zarr.open_group(path, mode="a", zarr_format=3)
    group.attrs.update(
        {"encoding-type": "annbatch-preshuffled", "encoding-version": "0.1.0", "scbert-store": 1}
    )
    (path / "genes.txt").write_text("\n".join(panel.names) + "\n", encoding="utf-8")
    files = {
        str(file.relative_to(path)): (file.stat().st_size, _file_digest(file))
        for file in sorted(path.rglob("*"))
        if file.is_file() and file.name not in (MANIFEST, _beside(path / MANIFEST).name)
    }
    header = StoreHeader(
        schema_version=SCHEMA_VERSION,
        store_id=_store_id(files),
        panel_digest=panel.digest,
        partitions=tuple(partitions),
        num_counts=num_counts,
        seed=seed,
        sources=tuple(sources),
        left_out=tuple(left_out),
    )
    write_json(path / MANIFEST, {"header": asdict(header), "files": files})
    return header


def write_measured(path: Path, measured: NDArray[np.bool_]) -> None:
    """Write which genes each source measured, (sources, G), as bits in the order of the sources."""
    np.save(path / MEASURED, np.packbits(measured, axis=1), allow_pickle=False)


def write_json(path: Path, content: Any) -> None:
    """Write JSON beside its target and rename it into place."""
    beside = _beside(path)
    with beside.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def _beside(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def _store_id(files: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def _write_array(
    group: zarr.Group,
    name: str,
    values: NDArray[np.generic],
    values_per_cell: float,
    sizes: ArraySizes,
) -> None:
    """Write a sharded array; crc32c on every chunk is what catches a flipped bit on reading."""
    chunk = _rounded(values_per_cell * sizes.cells_per_chunk)
    shard = chunk * max(1, round(values_per_cell * sizes.cells_per_shard / chunk))
    size = values.dtype.itemsize
    array = zarr.create_array(
        group.store_path / name,
        shape=values.shape,
        dtype=values.dtype,
        chunks=(shard,),
        fill_value=0,
        config={"write_empty_chunks": True},  # so that a missing one is damage
        filters=None,
        compressors=None,
        serializer=ShardingCodec(
            chunk_shape=(chunk,),
            codecs=[
                BytesCodec(endian="little"),
                BloscCodec(cname="lz4", clevel=3, shuffle="shuffle", typesize=size),
                Crc32cCodec(),
            ],
            index_codecs=[BytesCodec(endian="little"), Crc32cCodec()],
        ),
    )
    array.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
    edges = [*range(0, len(values), shard), len(values)]
    for start, stop in pairwise(edges):
        array[start:stop] = values[start:stop]


def _rounded(length: float) -> int:
    return max(1, round(length / _CHUNK_ROUNDING)) * _CHUNK_ROUNDING


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


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
