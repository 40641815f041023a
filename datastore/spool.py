"""Aligned cells on their way from a slice of a source to the partitions of the store.

Pass 1 writes one file per slice: its cells in shuffle order, in one block per partition, and a
table of where the blocks begin. Pass 2 reads one block of each file. Layout: a line of JSON, the
table, the blocks, the content hashes; in a block the packed counts, then the columns one by one.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from datastore.packing import Packed, PackedCells
from datastore.work_folder import unfinished

_ROW: Final = 16
"""Bytes of a row of the table: where a block's cells and its packed counts begin."""

_BUFFER_BYTES: Final = 2**20


@dataclass(frozen=True, kw_only=True)
class SpooledCells:
    """Cells of one source, ascending by their place in the store.

    Attributes:
        position: Place of each cell in the store, (B,).
        row: Its row in the source, (B,).
        num_genes: How many genes it expresses, (B,).
        name: Its name, UTF-8 bytes, (B,).
        labels: Column of obs and its value in all of these cells.
        codes: Column of obs and the code of each cell's value, -1 where it is missing.
        categories: What the codes stand for.
    """

    position: NDArray[np.int64]
    row: NDArray[np.int64]
    num_genes: NDArray[np.int64]
    name: NDArray[np.bytes_]
    labels: Mapping[str, str]
    codes: Mapping[str, NDArray[np.int32]] = field(default_factory=dict)
    categories: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.position)


def write_spool(
    target: Path,
    spooled: SpooledCells,
    counts: Sequence[Packed],
    edges: Sequence[int],
    tally: Mapping[str, int],
    digests: NDArray[np.uint64],
    index: NDArray[np.int64],
) -> None:
    """Write cells beside `target` and rename the file into place.

    Args:
        target: The file.
        spooled: The cells.
        counts: The packed counts of each, all of one width.
        edges: Places at which partitions begin, and where the last ends; (P + 1,).
        tally: What became of the cells of the slice, kept for a restart.
        digests: Content hash of each cell, (B,), or (0,) if nobody will ask for duplicates.
        index: Index of each cell over all sources, (B,).
    """
    columns = {
        "position": spooled.position.astype("<i8"),
        "row": spooled.row.astype("<i8"),
        "num_genes": spooled.num_genes.astype("<i8"),
        "name": spooled.name,
        **{f"code {column}": codes.astype("<i4") for column, codes in spooled.codes.items()},
    }
    indptr = np.concatenate([[0], np.cumsum(spooled.num_genes)])
    header = {
        "columns": [[name, values.dtype.str] for name, values in columns.items()],
        "packed": (counts[0].dtype if counts else np.dtype("<u4")).str,
        "partitions": len(edges) - 1,
        "tally": dict(tally),
        "labels": dict(spooled.labels),
        "categories": {name: list(values) for name, values in spooled.categories.items()},
    }
    starts = np.searchsorted(spooled.position, edges).astype("<i8")
    table = np.stack([starts, indptr[starts]], axis=1).astype("<i8")
    beside = unfinished(target)
    with beside.open("wb", buffering=_BUFFER_BYTES) as file:
        file.write(json.dumps(header).encode() + b"\n")
        file.write(table.tobytes())
        for start, stop in pairwise(starts.tolist()):
            file.writelines(cell.data for cell in counts[start:stop])
            for values in columns.values():
                file.write(values[start:stop].tobytes())
        by_digest = np.argsort(digests)
        for numbers in (digests, index[: len(digests)]):
            file.write(numbers[by_digest].astype("<u8").tobytes())
    beside.rename(target)


def read_tally(path: Path) -> dict[str, int]:
    """Read what became of the cells of a slice."""
    with path.open("rb") as file:
        tally: dict[str, int] = json.loads(file.readline())["tally"]
        return tally


def read_block(path: Path, number: int) -> tuple[SpooledCells, PackedCells]:
    """Read the cells of one partition, and their counts, from a slice's file."""
    with path.open("rb") as file:
        header = json.loads(file.readline())
        columns = [(name, np.dtype(kind)) for name, kind in header["columns"]]
        kind = np.dtype(header["packed"])
        table_start = file.tell()
        file.seek(_ROW * number, os.SEEK_CUR)
        (start, first), (stop, last) = np.frombuffer(file.read(2 * _ROW), "<i8").reshape(2, 2)
        width = sum(column.itemsize for _, column in columns)
        blocks_start = table_start + _ROW * (header["partitions"] + 1)
        file.seek(blocks_start + int(width * start + kind.itemsize * first))
        # An array: NumPy asks for large pages, which a file's read() does not.
        block = np.empty(int(width * (stop - start) + kind.itemsize * (last - first)), np.uint8)
        if file.readinto(block.data) != len(block):
            raise OSError(f"{path} is cut short; remove {path.parent.parent} and ingest again")
    packed = np.frombuffer(block, kind, last - first)
    values: dict[str, NDArray[Any]] = {}
    offset = packed.nbytes
    for name, column in columns:
        values[name] = np.frombuffer(block, column, stop - start, offset)
        offset += column.itemsize * (stop - start)
    indptr = np.concatenate([[0], np.cumsum(values["num_genes"])]).astype(np.int64)
    spooled = SpooledCells(
        position=values["position"],
        row=values["row"],
        num_genes=values["num_genes"],
        name=values["name"],
        labels=header["labels"],
        codes={column: values[f"code {column}"] for column in header["categories"]},
        categories=header["categories"],
    )
    return spooled, PackedCells(indptr, packed)


def read_digests(path: Path) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Read the content hash of each cell of a slice, ascending, and its index over all sources."""
    with path.open("rb") as file:
        num_cells = json.loads(file.readline())["tally"]["kept"]
        file.seek(-2 * 8 * num_cells, os.SEEK_END)
        numbers = np.frombuffer(file.read(), "<u8").reshape(2, num_cells)
    return numbers[0], numbers[1].astype(np.int64)
