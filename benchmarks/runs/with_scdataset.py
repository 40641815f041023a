"""One run of scDataset on the largest source. Usage: with_scdataset.py CASE FOLDER CELLS"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anndata
from scdataset import BlockShuffling, scDataset
from stopwatch import report

BATCH = 512


def batches(source: Path) -> Iterator[Any]:
    yield from scDataset(
        anndata.read_h5ad(source, backed="r"),
        BlockShuffling(block_size=16),
        batch_size=BATCH,
        fetch_factor=8,
        fetch_transform=lambda fetched: fetched.to_memory().X,
    )


if __name__ == "__main__":
    path = Path(sys.argv[2]) / "raw" / "source_0.h5ad"
    report(lambda: batches(path), lambda batch: int(batch.shape[0]), int(sys.argv[3]), 10.0)
