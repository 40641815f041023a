"""One run of cellstream, on the largest source. Usage: with_cellstream.py CASE FOLDER CELLS"""

import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cellstream
import numpy as np
from stopwatch import peak_mb, report, say

BATCH = 512


def batches(path: Path, threads: int) -> Iterator[Any]:
    store = cellstream.open(str(path))
    rng = np.random.default_rng(0)
    while True:  # one epoch after another
        rows = rng.permutation(store.shape[0])
        for start in range(0, len(rows), BATCH):
            yield store.gather_rows(rows[start : start + BATCH], n_threads=threads)


def main(case: str, folder: Path, cells: int) -> None:
    warnings.simplefilter("ignore")
    target = folder / "cellstream.csad"
    if case == "build":
        source = str(folder / "raw" / "source_0.h5ad")
        cellstream.write_sharded(source, str(target), layout="cell", overwrite=True)
        say(peak_mb=peak_mb())
        return
    threads = int(case.split("_")[1])
    report(lambda: batches(target, threads), lambda batch: int(batch.shape[0]), cells)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
