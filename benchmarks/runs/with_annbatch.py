"""One run of annbatch, in an environment of its own. Usage: with_annbatch.py CASE FOLDER CELLS"""

import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import zarr
from annbatch import DatasetCollection, Loader
from stopwatch import cpu_seconds, peak_mb, report, say

BATCH = 512
PRELOAD = {512: 32, 32: 256}
"""Chunks read at once for each chunk size: the class's default, and the README's."""


def build(folder: Path) -> None:
    def load(path: str) -> Any:
        lazy = anndata.experimental.read_lazy(path)
        return anndata.AnnData(X=lazy.X, obs=lazy.obs.to_memory(), var=lazy.var.to_memory())

    begin, cpu = time.perf_counter(), cpu_seconds()
    sources = sorted((folder / "raw").glob("*.h5ad"))
    target = DatasetCollection(str(folder / "annbatch.zarr"))
    target.add_adatas(sources, load_adata=load, dataset_size="1GB")
    say(seconds=time.perf_counter() - begin, cpu=cpu_seconds() - cpu, peak_mb=peak_mb())


def batches(folder: Path, chunk: int, seed: int = 0) -> Iterator[Any]:
    loader = Loader(
        batch_size=BATCH,
        chunk_size=chunk,
        preload_nchunks=PRELOAD[chunk],
        shuffle=True,
        rng=np.random.default_rng(seed),
    )
    loader.use_collection(
        DatasetCollection(str(folder / "annbatch.zarr")),
        load_adata=lambda group: anndata.AnnData(X=anndata.io.sparse_dataset(group["X"])),
    )
    while True:  # one epoch after another
        for batch in loader:
            yield batch["X"]


def main(case: str, folder: Path, cells: int) -> None:
    warnings.simplefilter("ignore")
    zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"})
    if case == "build":
        build(folder)
    elif case in ("chunk_512", "chunk_32"):
        report(lambda: batches(folder, int(case.split("_")[1])), len_of, cells)
    elif case == "dense":
        report(lambda: (rows.toarray() for rows in batches(folder, 512)), len_of, cells)
    else:
        report(lambda: batches(folder, 512, seed=int(case.split("_")[1])), len_of, cells // 2)


def len_of(batch: Any) -> int:
    return int(batch.shape[0])


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
