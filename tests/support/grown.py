"""Small stores that grew, with obs: what is known of their cells is known to the test as well."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import sparse

from datastore.genes import GenePanel
from datastore.store import CellStore, open_store
from datastore.store_writing import ArraySizes, write_manifest, write_partition, write_root

PARTITION = 100


def write_grown_store(folder: Path, generations: Sequence[pd.DataFrame]) -> CellStore:
    """Write cells with this obs in partitions of 100; a column `source` makes the sources known."""
    panel = GenePanel(("A", "B"))
    sizes = ArraySizes(cells_per_chunk=16, cells_per_shard=64)
    write_root(folder, panel)
    partitions: list[int] = []
    sources = []
    for number, obs in enumerate(generations):
        for begin in range(0, len(obs), PARTITION):
            part = obs.iloc[begin : begin + PARTITION]
            part = part.set_axis([f"c{number}_{begin + row}" for row in range(len(part))])
            counts = sparse.csr_matrix(np.ones((len(part), 2), np.uint32))
            write_partition(folder / f"dataset_{len(partitions)}", counts, part, panel, sizes)
            partitions.append(len(part))
        if "source" in obs:
            sources += [
                {"name": name, "generation": number, "cells_kept": int(cells)}
                for name, cells in obs["source"].value_counts().items()
            ]
    write_manifest(
        folder,
        panel,
        partitions,
        2 * sum(partitions),
        0,
        sources,
        generations=[len(obs) for obs in generations],
    )
    return open_store(folder)
