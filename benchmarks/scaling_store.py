"""The store that `benchmarks/scaling.py` trains on."""

from pathlib import Path

import numpy as np
import pandas as pd
from scipy import sparse

from datastore.genes import GenePanel
from datastore.store_writing import ArraySizes, write_manifest, write_partition, write_root

NUM_CELLS = 4_096


def make_store(folder: Path, num_genes: int) -> None:
    """Write a store of made-up counts: a twentieth of the genes expressed, as in real cells."""
    rng = np.random.default_rng(0)
    panel = GenePanel(tuple(f"GENE{number}" for number in range(num_genes)))
    counts = rng.poisson(3.0, (NUM_CELLS, num_genes)) * (rng.random((NUM_CELLS, num_genes)) < 0.053)
    counts[:, 0] += 1
    names = pd.Index([f"cell-{row}" for row in range(NUM_CELLS)], dtype=object)
    obs = pd.DataFrame({"source_row": np.arange(NUM_CELLS)}, index=names)
    matrix = sparse.csr_matrix(counts.astype(np.uint32))
    sizes = ArraySizes(cells_per_chunk=64, cells_per_shard=2_048)
    write_partition(folder / "dataset_0", matrix, obs, panel, sizes)
    write_root(folder, panel)
    write_manifest(folder, panel, [NUM_CELLS], int(matrix.nnz), seed=0, sources=[])
