"""Cells that are to be labelled: any raw file, a cell store, or an AnnData in memory, in slices.

All of them look the same from outside: gene names, and checked counts of rows [start, stop). Only a
slice is in memory at a time, but for files that can only be decoded whole (CSC matrices, mtx, text,
`.RData`).
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Final

import anndata
import numpy as np
from scipy import sparse

from datastore.formats import FORMATS
from datastore.obs import read_cell_names, read_obs
from datastore.raw_cells import Names, RawCells, ReadOptions
from datastore.reader import CellReader
from datastore.recognition import is_own_folder, recognise
from datastore.sources import OpenSource, Source, damage_named
from datastore.store import CellStore, open_store
from finetune.scales import Scale, scale_of

IN_MEMORY: Final = "AnnData in memory"
STORE: Final = "cell store"
VALUES_PER_SLICE = 2**21
"""Stored counts of a slice, about: 80 MB with the copies that it goes through."""
_PLACES: Final = (None, "counts", "raw")
"""Where counts are looked for in an AnnData: `X`, `layers["counts"]`, `raw`."""
_SAMPLE: Final = 256


@dataclass(frozen=True, kw_only=True)
class Query:
    """Open cells, read by row.

    Attributes:
        where: File or address, for messages.
        kind: Key of `FORMATS`, `STORE` or `IN_MEMORY`.
        num_cells: Rows, N.
        genes: Gene name of each column.
        counts: Rows [start, stop) as checked counts, CSR.
        names: Names of rows [start, stop).
        obs: Columns of obs that were asked for, by row.
        num_counts: Stored counts, about.
        place: Where the counts are, such as `X`.
        scales: What each place of the file holds that was looked at.
        recovers: Whether counts are computed back from normalised expression.
    """

    where: str
    kind: str
    num_cells: int
    genes: tuple[str, ...]
    counts: Callable[[int, int], sparse.csr_matrix]
    names: Callable[[int, int], Names]
    obs: Mapping[str, Callable[[int, int], Names]] = field(default_factory=dict)
    num_counts: int = 0
    place: str = "X"
    scales: Mapping[str, Scale] = field(default_factory=dict)
    recovers: bool = False

    def slices(self) -> Iterator[tuple[int, int]]:
        """Cut the rows into slices of about `VALUES_PER_SLICE` counts."""
        per_cell = max(1, self.num_counts // max(1, self.num_cells))
        step = int(np.clip(VALUES_PER_SLICE // per_cell, 64, 8192))
        for start in range(0, self.num_cells, step):
            yield start, min(start + step, self.num_cells)


@contextmanager
def open_query(
    place: str | Path,
    layer: str | None = None,
    *,
    recover_counts: bool = False,
    obs_column: str | None = None,
) -> Iterator[Query]:
    """Open a raw file or a cell store.

    Args:
        place: File or folder of any format that a store is built from, or a store.
        layer: Layer with the counts, or `raw`; none takes the first of `X`, `layers["counts"]` and
            `raw` that holds counts.
        recover_counts: Compute counts back from normalised expression where that can be proved.
        obs_column: Column of obs to carry along.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is none of the formats we read, has no cells, or lacks layer or column.
    """
    if is_store(place):
        yield store_query(place, obs_column=obs_column)
        return
    path = Path(place)
    kind = recognise(path)
    columns = () if obs_column is None else (obs_column,)
    scales: dict[str, Scale] = {}
    if layer is None and not recover_counts and kind in ("h5ad", "zarr"):
        layer = _layer_with_counts(path, kind, scales)
    options = ReadOptions(layer=layer, obs_columns=columns, recover_counts=recover_counts)
    with ExitStack() as stack:
        with damage_named(path):
            cells = stack.enter_context(FORMATS[kind](path, options))
            _refuse_empty(path, cells)
            if not scales:
                scales[cells.place] = _sampled_scale(cells)
        if obs_column is not None and obs_column not in cells.obs:
            raise ValueError(f"{path} has no obs[{obs_column!r}]; name a column that it has")
        source = Source(
            path=str(path),
            name=path.name,
            format=kind,
            options=options,
            sha256="",
            num_cells=cells.num_cells,
            genes=cells.genes,
        )
        yield Query(
            where=str(path),
            kind=kind,
            num_cells=cells.num_cells,
            genes=cells.genes,
            counts=OpenSource(source, cells).counts,
            names=cells.cell_names,
            obs=cells.obs,
            num_counts=cells.num_counts(),
            place=cells.place,
            scales=scales,
            recovers=recover_counts and not scales[cells.place].is_counts,
        )


def is_store(place: str | Path) -> bool:
    """Tell a cell store, folder or address, from a raw file."""
    return "://" in str(place) or (Path(place).is_dir() and is_own_folder(Path(place)))


def store_query(place: str | Path, part: int | None = None, obs_column: str | None = None) -> Query:
    """Open a cell store, or one of its partitions.

    Raises:
        ValueError: If it is no whole store, or has no such partition or column.
    """
    store = open_store(place)
    starts = store.partition_starts
    if part is not None and not 0 <= part < len(starts) - 1:
        raise ValueError(
            f"part is {part}; {store.url} has {len(starts) - 1} parts, numbered from 0"
        )
    first = 0 if part is None else int(starts[part])
    last = store.num_cells if part is None else int(starts[part + 1])
    reader = CellReader(store)
    num_genes = len(store.panel)

    def counts(start: int, stop: int) -> sparse.csr_matrix:
        block = reader.read(np.arange(first + start, first + stop))
        return sparse.csr_matrix(
            (block.counts, block.genes.astype(np.int64), block.indptr),
            shape=(stop - start, num_genes),
        )

    # Slices follow each other, so a partition is read once for all of them.
    names = lru_cache(maxsize=1)(partial(read_cell_names, store))
    column = lru_cache(maxsize=1)(partial(_store_column, store, obs_column or ""))
    return Query(
        where=store.url if part is None else f"{store.url}, part {part}",
        kind=STORE,
        num_cells=last - first,
        genes=store.panel.names,
        counts=counts,
        names=lambda start, stop: _store_rows(store, names, first + start, first + stop),
        obs={}
        if obs_column is None
        else {obs_column: lambda a, b: _store_rows(store, column, first + a, first + b)},
        num_counts=store.header.num_counts * (last - first) // max(1, store.num_cells),
        place="the store",
        scales={"the store": Scale("counts")},
    )


def adata_query(adata: anndata.AnnData, layer: str | None = None, where: str = "adata") -> Query:
    """Take an AnnData in memory, or one that is backed by a file; as `open_query`.

    Args:
        adata: The cells.
        layer: Layer with the counts, or `raw`; none looks for them.
        where: What messages call it.

    Raises:
        ValueError: If it has no cells, or lacks the layer.
    """
    if not adata.n_obs or not adata.n_vars:
        raise ValueError(f"{where} has {adata.n_obs} cells and {adata.n_vars} genes; give some")
    scales: dict[str, Scale] = {}
    chosen = None
    for name in _PLACES if layer is None else (layer,):
        found = _place_in_memory(adata, name)
        if found is None:
            continue
        chosen = found if chosen is None else chosen
        scales[found[0]] = scale_of(sparse.csr_matrix(found[1][:_SAMPLE]))
        if scales[found[0]].is_counts:
            chosen = found
            break
    if chosen is None:
        also = " (and raw)" if adata.raw is not None else ""
        raise ValueError(
            f"{where} has no layer {layer!r}; it has {sorted(adata.layers) or 'none'}{also}"
            if layer is not None
            else f"{where} has no X; name the layer that holds the counts (layer=…)"
        )
    place, matrix, genes = chosen
    cells = RawCells(
        num_cells=adata.n_obs,
        genes=genes,
        counts=lambda start, stop: sparse.csr_matrix(matrix[start:stop]),
        cell_names=lambda start, stop: np.asarray(adata.obs_names[start:stop], object),
        num_counts=lambda: 0,
        place=place,
    )
    source = Source(
        path=where,
        name=where,
        format=IN_MEMORY,
        options=ReadOptions(layer=layer),
        sha256="",
        num_cells=adata.n_obs,
        genes=genes,
    )
    return Query(
        where=where,
        kind=IN_MEMORY,
        num_cells=adata.n_obs,
        genes=genes,
        counts=OpenSource(source, cells).counts,
        names=cells.cell_names,
        obs={str(name): partial(_column, adata.obs[name]) for name in adata.obs},
        num_counts=int(getattr(matrix, "nnz", 0)) or adata.n_obs * len(genes) // 8,
        place=place,
        scales=scales,
    )


def _layer_with_counts(path: Path, kind: str, scales: dict[str, Scale]) -> str | None:
    """Look where the counts of an AnnData are; `X` if nowhere, to be refused with its values."""
    for layer in _PLACES:
        try:
            with damage_named(path), FORMATS[kind](path, ReadOptions(layer=layer)) as cells:
                if not cells.num_cells:
                    return None
                scale = scales[cells.place] = _sampled_scale(cells)
        except ValueError:
            continue  # it is not there, or cannot be read, which is said when it is opened
        if scale.is_counts:
            return layer
    return None


def _sampled_scale(cells: RawCells) -> Scale:
    """Scale of the first cells, some from the middle and the last."""
    size = min(_SAMPLE, cells.num_cells)
    starts = sorted({0, (cells.num_cells - size) // 2, cells.num_cells - size})
    blocks = [sparse.csr_matrix(cells.counts(start, start + size)) for start in starts]
    return scale_of(sparse.vstack(blocks, format="csr"))


def _refuse_empty(path: Path, cells: RawCells) -> None:
    for what, number in (("cells", cells.num_cells), ("genes", len(cells.genes))):
        if not number:
            raise ValueError(f"{path} holds no {what}; there is nothing to label")


def _place_in_memory(
    adata: anndata.AnnData, layer: str | None
) -> tuple[str, Any, tuple[str, ...]] | None:
    """Place, matrix and genes of X, a layer or raw, if it is there."""
    if layer is None:
        return None if adata.X is None else ("X", adata.X, tuple(map(str, adata.var_names)))
    if layer in adata.layers:
        return f"layers[{layer!r}]", adata.layers[layer], tuple(map(str, adata.var_names))
    if layer == "raw" and adata.raw is not None:
        return "raw", adata.raw.X, tuple(map(str, adata.raw.var_names))
    return None


def _column(values: Any, start: int, stop: int) -> Names:
    part = values.iloc[start:stop]
    return np.asarray(part.astype(object).where(part.notna(), None), object)


def _store_rows(store: CellStore, read: Callable[[int], Names], start: int, stop: int) -> Names:
    """Values of rows [start, stop) of a store, of which each partition is read whole."""
    starts = store.partition_starts
    pieces = [np.empty(0, object)]
    for part in range(len(starts) - 1):
        low, high = max(start, int(starts[part])), min(stop, int(starts[part + 1]))
        if low < high:
            pieces.append(read(part)[low - int(starts[part]) : high - int(starts[part])])
    return np.concatenate(pieces)


def _store_column(store: CellStore, column: str, part: int) -> Names:
    found = read_obs(store, part, column)
    return np.array(found.values, object)[found.codes]
