"""One run of AnnData backed: random rows of the largest source. Usage: … CASE FOLDER CELLS"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anndata
import numpy as np
from stopwatch import report

BATCH = 512


def batches(source: Path) -> Iterator[Any]:
    data = anndata.read_h5ad(source, backed="r")
    order = np.random.default_rng(0).permutation(data.n_obs)
    for start in range(0, len(order), BATCH):
        yield data[np.sort(order[start : start + BATCH])].to_memory().X


if __name__ == "__main__":
    path = Path(sys.argv[2]) / "raw" / "source_0.h5ad"
    report(lambda: batches(path), lambda batch: int(batch.shape[0]), int(sys.argv[3]), 10.0)
