"""A cell's counts as one array of numbers: the gene in the upper bits, the count in the lower.

Packed so, a cell is spooled, shuffled and gathered as one array instead of two. A native kernel
puts its counts where their genes stand in the panel; NumPy sorts the numbers instead.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from datastore import kernels
from datastore.genes import align_counts
from datastore.randomness import derive_key, mix

Packed = NDArray[np.unsignedinteger[Any]]
_NARROW: Final = np.dtype(np.uint32)
_WIDE: Final = np.dtype(np.uint64)
# Cells whose numbers stay in a core's cache from one step to the next.
_CELLS_AT_ONCE: Final = 64
_CELLS_HASHED_AT_ONCE: Final = 16
_DONE: Final = -1
_NO_MEMORY: Final = -2


@dataclass(frozen=True)
class PackedCells:
    """Cells in panel order.

    Attributes:
        indptr: Where each cell's counts begin, and their number at the end; int64, (B + 1,).
        packed: Counts, ascending by gene within a cell, none zero, no gene twice; uint32 if genes
            and counts fit into 16 bits each, else uint64.
    """

    indptr: NDArray[np.int64]
    packed: Packed

    @property
    def num_genes(self) -> NDArray[np.int64]:
        """Expressed genes of each cell, (B,)."""
        return np.diff(self.indptr)

    def cells(self) -> list[Packed]:
        """The counts of each cell, as views."""
        return [self.packed[start:stop] for start, stop in pairwise(self.indptr.tolist())]


def cells_of(blocks: Sequence[PackedCells]) -> list[Packed]:
    """The counts of each cell of several blocks, in one width."""
    if len({block.packed.dtype for block in blocks}) > 1:
        blocks = [PackedCells(block.indptr, widen(block.packed)) for block in blocks]
    return [cell for block in blocks for cell in block.cells()]


def pack_counts(
    matrix: sparse.csr_matrix, places: NDArray[np.int64], num_genes: int
) -> PackedCells:
    """Bring a matrix into panel order; genes outside the panel go, duplicates are summed.

    Args:
        matrix: Whole counts, CSR of shape (B, genes of the source).
        places: Panel position of each source gene, -1 where the panel lacks it.
        num_genes: Length of the panel, G.

    Raises:
        ValueError: If a place lies outside the panel, or a gene's columns add up to 2^32 or more.
    """
    if len(places) and places.max() >= num_genes:
        raise ValueError(f"place {places.max()} lies outside the panel of {num_genes} genes")
    cells = _pack(matrix, places, num_genes)
    if cells is None:
        cells = _pack(align_counts(matrix, places, num_genes), np.arange(num_genes), num_genes)
    assert cells is not None, "aligned counts name no gene twice"
    return cells


def _pack(
    matrix: sparse.csr_matrix, places: NDArray[np.int64], num_genes: int
) -> PackedCells | None:
    """Pack counts, a few cells at a time; none if a cell has counts of one gene in two columns."""
    largest = int(matrix.data.max()) if matrix.nnz else 0
    if largest > np.iinfo(np.uint32).max:
        raise ValueError(f"a gene's columns add up to {largest}, which no raw count reaches")
    kind = _NARROW if max(num_genes - 1, largest) <= np.iinfo(np.uint16).max else _WIDE
    kernel = f"pack_{matrix.indices.dtype.str[1:]}_{matrix.data.dtype.str[1:]}"
    if kind == _NARROW and kernels.has(kernel):
        return _pack_natively(kernel, matrix, places, num_genes)
    gene_bits = (np.maximum(places, 0) << _count_bits(kind)).astype(kind)
    known = places >= 0
    packed = np.empty(matrix.nnz, kind)
    indptr = np.zeros(matrix.shape[0] + 1, np.int64)
    for start in range(0, matrix.shape[0], _CELLS_AT_ONCE):
        pointers = matrix.indptr[start : start + _CELLS_AT_ONCE + 1].astype(np.int64)
        values = slice(pointers[0], pointers[-1])
        genes, counts = matrix.indices[values], matrix.data[values]
        block = np.take(gene_bits, genes)  # indexing would take three times as long
        block |= counts.astype(kind)
        edges = pointers - pointers[0]
        if not (known.all() and counts.all()):
            keep = np.take(known, genes) & (counts != 0)
            block = block[keep]
            edges = np.concatenate([[0], np.cumsum(keep)])[edges]
        for first, last in pairwise(edges.tolist()):
            block[first:last].sort()
        if _repeats_a_gene(block, edges):
            return None
        filled = indptr[start]
        packed[filled : filled + len(block)] = block
        indptr[start + 1 : start + len(pointers)] = filled + edges[1:]
    return PackedCells(indptr, packed[: indptr[-1]])


def _pack_natively(
    kernel: str, matrix: sparse.csr_matrix, places: NDArray[np.int64], num_genes: int
) -> PackedCells | None:
    packed = np.empty(matrix.nnz, _NARROW)
    indptr = np.zeros(matrix.shape[0] + 1, np.int64)
    edges, at = matrix.indptr.astype(np.int64), places.astype(np.int32)
    sizes = matrix.shape[0], at, len(at), num_genes
    columns, counts = kernels.fit(matrix.indices, matrix.data)
    state = kernels.call(kernel, columns, counts, edges, *sizes, packed, indptr)
    if state == _NO_MEMORY:
        raise MemoryError(f"there is no memory for {num_genes} genes")
    return PackedCells(indptr, packed[: indptr[-1]]) if state == _DONE else None


def _repeats_a_gene(packed: Packed, edges: NDArray[np.int64]) -> bool:
    same = (packed[1:] ^ packed[:-1]) < packed.dtype.type(1 << _count_bits(packed.dtype))
    inner = edges[(edges > 0) & (edges < len(packed))]
    same[inner - 1] = False  # there the cell before ended
    return bool(same.any())


def unpack_genes(packed: Packed) -> Packed:
    """Panel position of each packed count, as a view of it."""
    return _halves(packed)[1::2]


def unpack_counts(packed: Packed) -> Packed:
    """The counts themselves, as a view."""
    return _halves(packed)[::2]


def highest_count(cells: PackedCells) -> int:
    """A number that no count exceeds; the highest count itself if that takes more than 16 bits."""
    if cells.packed.dtype == _NARROW:
        return int(np.iinfo(np.uint16).max)
    return int(unpack_counts(cells.packed).max(initial=0))


def widen(packed: Packed) -> Packed:
    """Pack into 64 bits what may be packed into 32, so that it can be joined with such."""
    if packed.dtype == _WIDE:
        return packed
    return unpack_genes(packed).astype(_WIDE) << np.uint64(32) | unpack_counts(packed)


def packed_digests(cells: PackedCells, num_genes: int) -> NDArray[np.uint64]:
    """Hash each cell's counts; see `content_digests`."""
    if cells.packed.dtype == _NARROW and kernels.has("hash_packed"):
        digests = np.empty(len(cells.indptr) - 1, np.uint64)
        content = kernels.fit(cells.packed, cells.indptr)
        sizes = len(digests), _weights(num_genes), num_genes
        wrong = kernels.call("hash_packed", *content, *sizes, digests)
        if wrong != _DONE:
            raise IndexError(f"cell {wrong} has a gene outside the panel of {num_genes} genes")
        return digests
    genes, counts = unpack_genes(cells.packed), unpack_counts(cells.packed)
    return content_digests(cells.indptr, genes, counts, num_genes)


def content_digests(
    indptr: NDArray[np.int64], genes: NDArray[Any], counts: NDArray[Any], num_genes: int
) -> NDArray[np.uint64]:
    """Hash each cell's counts to 64 bits; of cells that differ, one pair in 2^64 collides.

    The sum of each count times a random number of its gene, modulo 2^64.

    Args:
        indptr: Where each cell's counts begin, and their number at the end, (B + 1,).
        genes: Panel position of each count, (nnz,).
        counts: The counts, unsigned whole numbers, (nnz,).
        num_genes: Length of the panel, G.

    Returns:
        Hashes, (B,); 0 for a cell without counts.
    """
    weights = _weights(num_genes)
    digests = np.zeros(len(indptr) - 1, np.uint64)
    filled = np.flatnonzero(np.diff(indptr))
    for first in range(0, len(filled), _CELLS_HASHED_AT_ONCE):
        rows = filled[first : first + _CELLS_HASHED_AT_ONCE]
        start, stop = indptr[rows[0]], indptr[rows[-1] + 1]
        products = np.take(weights, genes[start:stop])
        products *= counts[start:stop]
        digests[rows] = np.add.reduceat(products, indptr[rows] - start)
    return digests


@lru_cache(maxsize=2)
def _weights(num_genes: int) -> NDArray[np.uint64]:
    """A random number of each gene."""
    return mix(derive_key(0, "content"), np.arange(num_genes)) | np.uint64(1)


def _halves(packed: Packed) -> Packed:
    """Lower and upper half in turn (numbers are little-endian, here as in the spool)."""
    return packed.view(f"<u{packed.dtype.itemsize // 2}")


def _count_bits(kind: np.dtype[Any]) -> int:
    return 8 * kind.itemsize // 2
