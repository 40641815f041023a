"""One ingest of annbatch. Usage: ingest_with_annbatch.py build FOLDER"""

import shutil
import sys
import time
import warnings
from pathlib import Path

import zarr
from annbatch import DatasetCollection
from stopwatch import cpu_seconds, peak_mb, say


def main(folder: Path) -> None:
    warnings.simplefilter("ignore")
    zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"})
    output = folder / "annbatch_ingested.zarr"
    shutil.rmtree(output, ignore_errors=True)
    begin, cpu = time.perf_counter(), cpu_seconds()
    sources = sorted((folder / "raw").glob("*.h5ad"))
    # Its default of 20 GB takes all cells into memory, and is the fastest.
    collection = DatasetCollection(str(output)).add_adatas(sources)
    seconds, cpu = time.perf_counter() - begin, cpu_seconds() - cpu
    num_cells = sum(int(group["X"].attrs["shape"][0]) for group in collection)
    files = [path for path in output.rglob("*") if path.is_file()]
    say(
        per_second=num_cells / seconds,
        per_cpu_second=num_cells / cpu,
        seconds=seconds,
        peak_mb=peak_mb(),
        disk_mb=sum(path.stat().st_size for path in files) / 1e6,
    )
    shutil.rmtree(output)


if __name__ == "__main__":
    main(Path(sys.argv[2]))
