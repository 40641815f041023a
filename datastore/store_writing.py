"""Writing a cell store: partitions, their records, and last of all the manifest.

The format is told in `datastore.store`. Nothing here changes a partition that a manifest names.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd
import zarr
from anndata.io import write_elem
from numpy.typing import NDArray
from scipy import sparse

from datastore.config import Codec
from datastore.genes import GenePanel
from datastore.shards import ShardedArray
from datastore.store import (
    GENES,
    MEASURED,
    RECORDS,
    SCHEMA_VERSION,
    StoreHeader,
    content_id,
    file_digest,
    generation_folder,
    publish_manifest,
    record_path,
    write_json,
)

_CHUNK_ROUNDING: Final = 1024


@dataclass(frozen=True, kw_only=True)
class ArraySizes:
    """How many cells are decoded at once, how many share a file, and how hard it is compressed."""

    cells_per_chunk: int
    cells_per_shard: int
    codec: Codec = "fast"


def write_partition(
    path: Path, counts: sparse.csr_matrix, obs: pd.DataFrame, panel: GenePanel, sizes: ArraySizes
) -> None:
    """Write one AnnData part from a matrix in memory.

    Args:
        path: Folder of the part; replaced if it exists half-written.
        counts: Whole counts, CSR of shape (B, G), columns sorted.
        obs: One row per cell.
        panel: The genes, G.
        sizes: How many cells share a chunk and a shard.
    """
    largest = int(counts.data.max()) if counts.nnz else 0
    pieces = [(counts.indices, counts.data)]
    stream_partition(path, counts.indptr, pieces, largest, obs, panel, sizes)


def stream_partition(
    path: Path,
    indptr: NDArray[np.integer[Any]],
    pieces: Iterable[tuple[NDArray[Any], NDArray[Any]]],
    largest: int,
    obs: pd.DataFrame,
    panel: GenePanel,
    sizes: ArraySizes,
) -> None:
    """Write one AnnData part from counts that come piece by piece; otherwise as `write_partition`.

    Args:
        path: Folder of the part.
        indptr: Where each cell's counts begin, and their number at the end, (B + 1,).
        pieces: Panel positions and counts, in the order of the cells and sorted within them.
        largest: No count is higher.
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
            "shape": [len(indptr) - 1, len(panel)],
        }
    )
    num_counts = int(indptr[-1])
    per_cell = max(1.0, num_counts / max(1, len(indptr) - 1))
    count_type = np.uint16 if largest <= np.iinfo(np.uint16).max else np.uint32
    gene_type = np.uint16 if len(panel) <= np.iinfo(np.uint16).max + 1 else np.uint32
    data = _new_array(path / "X", "data", num_counts, count_type, per_cell, sizes)
    indices = _new_array(path / "X", "indices", num_counts, gene_type, per_cell, sizes)
    for genes, counts in pieces:
        indices.extend(genes)
        data.extend(counts)
    pointers = _new_array(path / "X", "indptr", len(indptr), np.int64, 16.0, sizes)
    pointers.extend(indptr)
    for array in (data, indices, pointers):
        array.close()


def write_record(path: Path, number: int) -> None:
    """Note size and SHA-256 of every file of partition `number` of the store at `path`.

    Open stores read only the manifest, which names this record; so opening costs the same however
    many shards there are.
    """
    target = record_path(path, number)
    target.parent.mkdir(exist_ok=True)
    write_json(target, digests_below(path / f"dataset_{number}"))


def write_measured(path: Path, bits: NDArray[np.uint8], generation: int = 0) -> None:
    """Write which genes each source of a generation measured, a bit each, packed by source."""
    folder = generation_folder(path, generation)
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / MEASURED, bits, allow_pickle=False)


def write_root(path: Path, panel: GenePanel) -> None:
    """Make a folder the root group of a store, with its panel."""
    group = zarr.open_group(path, mode="a", zarr_format=3)
    group.attrs.update(
        {"encoding-type": "annbatch-preshuffled", "encoding-version": "0.1.0", "scbert-store": 1}
    )
    (path / GENES).write_text("\n".join(panel.names) + "\n", encoding="utf-8")


def write_manifest(
    path: Path,
    panel: GenePanel,
    partitions: Sequence[int],
    num_counts: int,
    seed: int,
    sources: Sequence[dict[str, Any]],
    left_out: Sequence[dict[str, str]] = (),
    generations: Sequence[int] | None = None,
) -> StoreHeader:
    """Make a folder of partitions a store, by the one rename that publishes its manifest.

    Equal sources, panel and seed give an equal store id.

    Args:
        path: Folder with root group, panel, partitions and what is known of each generation.
            Partitions without a record get one.
        panel: The genes, G.
        partitions: Cells of each partition.
        num_counts: Stored counts of all partitions.
        seed: Seed of the shuffle.
        sources: What to keep of each source; with `name` and `generation`.
        left_out: Path and reason of each source that could not be used.
        generations: Cells that each ingest added, in order; one ingest added all if not given.
    """
    for number in range(len(partitions)):
        if not record_path(path, number).is_file():
            write_record(path, number)
    header = StoreHeader(
        schema_version=SCHEMA_VERSION,
        store_id="",
        panel_digest=panel.digest,
        partitions=tuple(partitions),
        generations=(sum(partitions),) if generations is None else tuple(generations),
        num_counts=num_counts,
        seed=seed,
        sources=tuple(sources),
        left_out=tuple(left_out),
    )
    files = {name: _size_and_digest(path / name) for name in ("zarr.json", GENES)}
    files |= {
        f"{RECORDS}/{name}": entry
        for name, entry in digests_below(path / RECORDS).items()
        if not name.endswith(".part")
    }
    header = replace(header, store_id=content_id(asdict(header), files))
    publish_manifest(path, asdict(header), files)
    return header


def digests_below(folder: Path) -> dict[str, tuple[int, str]]:
    """Size and SHA-256 of every file below a folder, by its name from there."""
    return {
        file.relative_to(folder).as_posix(): _size_and_digest(file)
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def _size_and_digest(file: Path) -> tuple[int, str]:
    return file.stat().st_size, file_digest(file)


def _new_array(
    folder: Path,
    name: str,
    length: int,
    kind: type[np.integer[Any]],
    values_per_cell: float,
    sizes: ArraySizes,
) -> ShardedArray:
    chunk = _rounded(values_per_cell * sizes.cells_per_chunk)
    shard = chunk * max(1, round(values_per_cell * sizes.cells_per_shard / chunk))
    return ShardedArray(
        folder, name, length, np.dtype(kind), chunk=chunk, shard=shard, codec=sizes.codec
    )


def _rounded(length: float) -> int:
    return max(1, round(length / _CHUNK_ROUNDING)) * _CHUNK_ROUNDING
