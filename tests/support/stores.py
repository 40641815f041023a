"""Small stores written without an ingest, and ways to spoil a store."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import sparse

from datastore.genes import GenePanel
from datastore.store import MANIFEST, CellStore, open_store, publish_manifest
from datastore.store_writing import (
    ArraySizes,
    write_manifest,
    write_partition,
    write_record,
    write_root,
)
from tests.support.cells import gene_names


def write_small_store(
    folder: Path, counts: NDArray[np.int64], sizes: ArraySizes | None = None
) -> CellStore:
    """One partition with these counts, (cells, genes); cells are c0, c1, …"""
    panel = GenePanel(gene_names(counts.shape[1]))
    obs = pd.DataFrame(index=pd.Index([f"c{row}" for row in range(len(counts))], dtype=object))
    sizes = sizes or ArraySizes(cells_per_chunk=4, cells_per_shard=16)
    write_partition(folder / "dataset_0", sparse.csr_matrix(counts), obs, panel, sizes)
    write_root(folder, panel)
    write_record(folder, 0)
    write_manifest(folder, panel, [len(counts)], int((counts > 0).sum()), 0, [])
    return open_store(folder)


def edit_manifest(store: CellStore, **header: Any) -> None:
    """Change the header, as a writer with a fault would: sealed, but not true."""
    manifest = json.loads((store.path / MANIFEST).read_text())
    publish_manifest(store.path, manifest["header"] | header, manifest["files"])


def flip_bit(path: Path, place: int, bit: int) -> None:
    """Flip one bit of a file."""
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << bit
    path.write_bytes(content)
