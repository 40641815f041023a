"""Tiny raw files and the stores made of them, with a plain-loop account of what a store holds."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray
from scipy import sparse

from datastore.config import PanelConfig, StoreConfig
from datastore.store import CellStore


@dataclass(frozen=True)
class RawCells:
    """What one raw file holds: dense counts (cells, genes), and the gene of each column."""

    name: str
    counts: NDArray[np.int64]
    genes: tuple[str, ...]


def random_counts(
    seed: int, num_cells: int, num_genes: int, share: float = 0.4
) -> NDArray[np.int64]:
    """Counts 1 to 40 in about this share of the places, zeros elsewhere."""
    rng = np.random.default_rng(seed)
    values = rng.integers(1, 41, (num_cells, num_genes))
    return np.where(rng.random((num_cells, num_genes)) < share, values, 0)


def gene_names(num_genes: int) -> tuple[str, ...]:
    """Genes G0, G1, …"""
    return tuple(f"G{place}" for place in range(num_genes))


def random_cells(name: str, seed: int, num_cells: int, genes: Sequence[str]) -> RawCells:
    """Cells with random counts of these genes."""
    return RawCells(name, random_counts(seed, num_cells, len(genes)), tuple(genes))


def write_h5ad(folder: Path, raw: RawCells, matrix: Any = None, layer: str | None = None) -> Path:
    """Write cells as `<folder>/<name>.h5ad`; cell names are c0, c1, …

    Args:
        folder: Where to; made if there is none.
        raw: The cells.
        matrix: What to write as X in place of the float32 CSR form of the counts.
        layer: Write the counts into this layer, too.
    """
    folder.mkdir(parents=True, exist_ok=True)
    adata = anndata.AnnData(
        sparse.csr_matrix(raw.counts.astype(np.float32)) if matrix is None else matrix,
        obs=pd.DataFrame(index=[f"c{row}" for row in range(len(raw.counts))]),
        var=pd.DataFrame(index=list(raw.genes)),
    )
    if layer is not None:
        adata.layers[layer] = sparse.csr_matrix(raw.counts)
    path = folder / f"{raw.name}.h5ad"
    adata.write_h5ad(path)
    return path


def three_sources() -> list[RawCells]:
    """70 cells in three files: other gene orders, genes of their own, a gene named twice."""
    genes = gene_names(30)
    return [
        random_cells("alpha", 1, 31, genes[:28]),
        random_cells("beta", 2, 22, [*genes[::-1], "ONLY_BETA"]),
        random_cells("gamma", 3, 17, [*genes[5:], "G7"]),
    ]


def write_sources(folder: Path, cells: Sequence[RawCells]) -> list[str]:
    """Write one file for each and return the paths. Names may repeat within a file."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Variable names are not unique")
        return [str(write_h5ad(folder, raw)) for raw in cells]


def store_config(sources: Sequence[str], output: Path, **changes: Any) -> StoreConfig:
    """A store of several partitions, shards and chunks even for a few dozen cells."""
    settings: dict[str, Any] = {
        "sources": list(sources),
        "output": str(output),
        "panel": PanelConfig(),
        "min_genes": 1,
        "cells_per_partition": 25,
        "cells_per_shard": 16,
        "cells_per_chunk": 4,
        "cells_per_slice": 9,
        "workers": 2,
    }
    return StoreConfig(**{**settings, **changes})


def align_by_hand(raw: RawCells, panel: Sequence[str]) -> NDArray[np.int64]:
    """Bring counts into panel order, one at a time; (cells, G)."""
    aligned = np.zeros((len(raw.counts), len(panel)), np.int64)
    for row in range(len(raw.counts)):
        for column, gene in enumerate(raw.genes):
            if gene in panel:
                aligned[row, list(panel).index(gene)] += raw.counts[row, column]
    return aligned


def expected_cells(
    cells: Sequence[RawCells], panel: Sequence[str], min_genes: int = 1
) -> dict[tuple[str, int], NDArray[np.int64]]:
    """What a store must hold: (source, row in it) → counts in panel order."""
    return {
        (raw.name, row): counts
        for raw in cells
        for row, counts in enumerate(align_by_hand(raw, panel))
        if (counts > 0).sum() >= min_genes
    }


def stored_parts(store: CellStore) -> list[anndata.AnnData]:
    """The parts of a store, opened by anndata without our reader."""
    return [
        anndata.read_zarr(store.partition_path(number))
        for number in range(len(store.header.partitions))
    ]


def stored_cells(store: CellStore) -> dict[tuple[str, int], NDArray[np.int64]]:
    """What a store holds, in the form of `expected_cells`; no cell may occur twice."""
    found: dict[tuple[str, int], NDArray[np.int64]] = {}
    for part in stored_parts(store):
        assert tuple(part.var_names) == store.panel.names
        dense = part.X.toarray().astype(np.int64)
        for row, (source, source_row) in enumerate(
            zip(part.obs["source"], part.obs["source_row"], strict=True)
        ):
            assert part.obs_names[row] == f"{source}/c{source_row}"
            assert (source, source_row) not in found
            found[source, int(source_row)] = dense[row]
    return found


def dense_store(store: CellStore) -> NDArray[np.int64]:
    """All counts by store position, (N, G), read by anndata."""
    return np.concatenate([part.X.toarray() for part in stored_parts(store)]).astype(np.int64)


def file_bytes(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def write_files(folder: Path, files: dict[str, bytes]) -> None:
    """Write what `file_bytes` returned."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


class Stop:
    """Wrap a function of `module`: the call number `at` raises OSError instead, or midway."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> None:
        self.calls = 0
        self.at = -1
        self._function: Callable[..., Any] = getattr(module, name)
        monkeypatch.setattr(module, name, self)

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        self.calls += 1
        if self.calls == self.at:
            raise OSError("the disk is full")
        return self._function(*arguments, **keywords)
