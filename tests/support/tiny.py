"""The smallest cell store and pretraining that still have every part."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import sparse

from datastore.config import BinningConfig, OrderConfig
from datastore.genes import GenePanel
from datastore.store import CellStore, open_store
from datastore.store_writing import (
    ArraySizes,
    write_manifest,
    write_measured,
    write_partition,
    write_root,
)
from pretrain.config import (
    BatchConfig,
    EncoderConfig,
    MaskingConfig,
    OptimConfig,
    PretrainConfig,
    TrackingConfig,
)

NUM_CELLS = 64
NUM_GENES = 32

ENCODER = EncoderConfig(dim=16, depth=2, heads=2, dim_head=8, ff_mult=2, num_features=16)
BINNING = BinningConfig(target_sum=300.0)
"""Bins 0 to 5 all occur in `tiny_counts`: 32 genes share 300, not 10,000."""


def tiny_panel(num_genes: int = NUM_GENES) -> GenePanel:
    """Panel GENE0, GENE1, …"""
    return GenePanel(tuple(f"GENE{place}" for place in range(num_genes)))


def tiny_counts(num_cells: int = NUM_CELLS, seed: int = 0) -> NDArray[np.int64]:
    """Counts, (num_cells, NUM_GENES): half of the genes expressed; cells differ in what is high."""
    rng = np.random.default_rng(seed)
    level = np.exp(rng.normal(0.0, 1.2, (4, NUM_GENES)))[np.arange(num_cells) % 4]
    return rng.poisson(level) * rng.integers(1, 4, (num_cells, NUM_GENES))


def tiny_store(folder: Path, num_cells: int = NUM_CELLS, empty: int | None = None) -> CellStore:
    """Write a store of two partitions and open it.

    Args:
        folder: Where to.
        num_cells: Cells in it.
        empty: Position of a cell to leave without a single count.
    """
    counts = tiny_counts(num_cells)
    if empty is not None:
        counts[empty] = 0
    cut = num_cells * 5 // 8
    sizes = ArraySizes(cells_per_chunk=8, cells_per_shard=32)
    for number, part in enumerate((counts[:cut], counts[cut:])):
        names = pd.Index([f"tiny/{number}-{row}" for row in range(len(part))], dtype=object)
        rows = np.arange(len(part))
        side = np.array(["even", "odd"])[rows % 2]
        told = {"source": "tiny", "source_row": rows, "side": pd.Categorical(side)}
        obs = pd.DataFrame(told, index=names)
        matrix = sparse.csr_matrix(part.astype(np.uint32))
        write_partition(folder / f"dataset_{number}", matrix, obs, tiny_panel(), sizes)
    partitions = [cut, num_cells - cut]
    write_root(folder, tiny_panel())
    write_measured(folder, np.packbits(np.ones((1, NUM_GENES), np.bool_), axis=1))
    sources = [{"name": "tiny", "generation": 0, "cells_kept": num_cells}]
    write_manifest(folder, tiny_panel(), partitions, int((counts > 0).sum()), 0, sources)
    return open_store(folder)


def tiny_config(store: str | Path, output: str | Path, **changes: Any) -> PretrainConfig:
    """Pretraining of `ENCODER` on a `tiny_store`: two epochs of 4 steps.

    15 of 64 cells are held out; 49 are trained on, 16 a step, so that an epoch's last step has 1.
    """
    config = PretrainConfig(
        store=str(store),
        output=str(output),
        epochs=2,
        encoder=ENCODER,
        binning=BINNING,
        masking=MaskingConfig(ratio=0.3),
        batch=BatchConfig(global_size=16, micro_size=4),
        optim=OptimConfig(lr=3e-3, schedule="cosine", warmup_steps=2, min_lr=1e-4),
        order=OrderConfig(lanes=4, block=8, window=8),
        redraw_every=2,
        validation_share=15 / NUM_CELLS,
        evaluate_every=4,
        save_every=4,
        log_every=1,
        tracking=TrackingConfig(uri=f"sqlite:///{Path(output).parent / 'mlflow.db'}"),
    )
    return replace(config, **changes)
