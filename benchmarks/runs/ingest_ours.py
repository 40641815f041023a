"""One ingest of ours. Usage: ingest_ours.py WORKERS FOLDER fast|archive"""

import resource
import shutil
import sys
import time
from multiprocessing import forkserver
from pathlib import Path

from stopwatch import cpu_seconds, peak_mb, say

from datastore.config import Codec, PanelConfig, StoreConfig
from datastore.ingest import build_store


def main(workers: int, folder: Path, codec: Codec) -> None:
    output = folder / "ingested.zarr"
    shutil.rmtree(output, ignore_errors=True)
    config = StoreConfig(
        sources=[str(path) for path in sorted((folder / "raw").glob("*.h5ad"))],
        output=str(output),
        panel=PanelConfig(file=str(folder / "panel.txt")),
        min_genes=1,
        workers=workers,
        processes=workers > 1,
        codec=codec,
    )
    begin, cpu = time.perf_counter(), cpu_seconds()
    store = build_store(config)
    seconds = time.perf_counter() - begin
    # The workers are children of this server; only when it has ended does their time count as ours.
    forkserver._forkserver._stop()  # type: ignore[attr-defined]
    cpu = cpu_seconds() - cpu
    worker_mb = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1000
    files = [path for path in output.rglob("*") if path.is_file()]
    say(
        per_second=store.num_cells / seconds,
        per_cpu_second=store.num_cells / cpu,
        seconds=seconds,
        peak_mb=worker_mb if workers > 1 else peak_mb(),
        leader_peak_mb=peak_mb(),
        disk_mb=sum(path.stat().st_size for path in files) / 1e6,
    )
    shutil.rmtree(output)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])  # type: ignore[arg-type]
