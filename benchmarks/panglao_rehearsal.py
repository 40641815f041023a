"""PanglaoDB's human part in shape and number of files, through everything a store goes through.

    python benchmarks/panglao_rehearsal.py --quick     # minutes: a fifth of the files
    python benchmarks/panglao_rehearsal.py             # ten minutes: a tenth
    python benchmarks/panglao_rehearsal.py --scale 1   # all 1.13 million cells: half an hour

Makes 209 samples of unequal size and some broken files (`panglao_corpus`), ingests all of them
with two Dask workers, verifies the store, appends ten samples, and reads an epoch as two ranks.
Each step runs in processes of its own, whose time and peak memory are noted. What comes out is
compared with what went in.

Two more ingests tell what a file costs from what a cell costs: a third of the samples, and some of
PanglaoDB's own sizes. By these slopes the figures are extrapolated to 100 million cells in samples
of PanglaoDB's size. Ends with one line of JSON.
"""

import argparse
import json
import logging
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from scipy.optimize import nnls

from benchmarks.panglao_corpus import (
    MIN_GENES,
    NUM_CELLS,
    NUM_SAMPLES,
    PANEL_GENES,
    Known,
    Sample,
    gene_names,
    plan_samples,
    write_broken,
    write_samples,
    write_table,
)
from benchmarks.runs.stopwatch import cpu_seconds, peak_mb
from datastore.append import append_store
from datastore.config import (
    BinningConfig,
    OrderConfig,
    PanelConfig,
    SelectionConfig,
    StoreConfig,
)
from datastore.ingest import build_store
from datastore.loader import CellLoader
from datastore.reader import CellReader
from datastore.sampler import CellSampler
from datastore.selection import select_cells
from datastore.store import open_store
from datastore.verification import check_complete, verify_store

TARGET: Final = 100_000_000
"""Cells that the figures are extrapolated to."""
NUM_APPENDED: Final = 10
NUM_RANKS: Final = 2
BATCH: Final = 512
Numbers = dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="--scale 0.02 --samples 42")
    parser.add_argument("--samples", type=int, help="files; default 209, as PanglaoDB has them")
    parser.add_argument("--scale", type=float, help="share of PanglaoDB's cells; default 0.1")
    parser.add_argument("--seed", type=int, default=0, help="of the synthetic cells")
    parser.add_argument("--workdir", metavar="DIR", help="keep the files here")
    parser.add_argument("--json", action="store_true", help="print nothing but the line of JSON")
    parser.add_argument("--save", metavar="FILE", help="write the line of JSON to a file, too")
    options = parser.parse_args()
    scale = options.scale or (0.02 if options.quick else 0.1)
    with tempfile.TemporaryDirectory(prefix="panglao_rehearsal_") as scratch:
        folder = Path(options.workdir or scratch).absolute()
        count = options.samples or (42 if options.quick else NUM_SAMPLES)
        result = rehearse(folder, plan_samples(scale, options.seed, count=count), options.seed)
    if not options.json:
        print("\n".join(table(result["figures"])))
    line = json.dumps(result)
    print(line)
    if options.save:
        Path(options.save).write_text(line + "\n")


def rehearse(folder: Path, samples: list[Sample], seed: int) -> dict[str, Any]:
    """Do everything, once."""
    third = samples[: len(samples) // 3]
    scale = sum(sample.cells for sample in samples) / NUM_CELLS
    more = plan_samples(scale, seed, first=1_000, count=NUM_APPENDED)
    began = time.perf_counter()
    known = write_samples(folder / "raw", samples, seed)
    known_more = write_samples(folder / "more", more, seed)
    broken = write_broken(folder / "raw", seed)
    for name, files in (("raw", samples), ("more", more)):
        write_table(folder / name, files)
    (folder / "panel.txt").write_text("\n".join(gene_names()[:PANEL_GENES]) + "\n")
    print(f"files: {time.perf_counter() - began:.1f} s", file=sys.stderr)

    whole = plan_samples(1.0, seed, first=2_000, count=max(3, len(samples) // 20))
    known_whole = write_samples(folder / "whole_size", whole, seed)
    thirds = {sample.name: known[sample.name] for sample in third}
    small = trial(folder, "raw", third, thirds)
    large = trial(folder, "whole_size", whole, known_whole)
    store = folder / "cells.zarr"
    shutil.rmtree(store, ignore_errors=True)
    built = ingest(folder, store.name, [str(folder / "raw")])
    reasons = check_store(store, known, broken)
    opened = in_process(_open, str(store))
    verified = in_process(_verify, str(store))
    appended = in_process(_append, str(folder), str(store), [str(folder / "more")])
    check_store(store, known | known_more, broken)
    epoch = read_epoch(store, known | known_more)
    cells = sum(what.cells for what in known.values())
    figures = {
        "scale": scale,
        "sources": len(samples),
        "cells": cells,
        "expressed_panel_genes_per_cell": sum(k.num_counts for k in known.values()) / cells,
        "files": {"bytes": size_of(folder / "raw")},
        "ingest": {
            **built,
            "files": len(samples),
            "cells": cells,
            "cells_per_second": cells / built["seconds"],
        },
        "ingest_of_a_third": small,
        "ingest_of_whole_sizes": large,
        "broken_files_named": reasons,
        "store_bytes": size_of(store),
        "bytes_per_cell": size_of(store) / open_store(store).num_cells,
        "open": opened,
        "verify": {**verified, "megabytes_per_second": size_of(store) / 1e6 / verified["seconds"]},
        "append": appended,
        "epoch": epoch,
    }
    return {
        "benchmark": "panglao_rehearsal",
        "ratios": {"ingest_memory_all_vs_third": built["worker_peak_mb"] / small["worker_peak_mb"]},
        "figures": {**figures, "at_100_million": extrapolate(figures)},
        "machine": {
            "processor": platform.machine(),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
        },
    }


def extrapolate(figures: dict[str, Any]) -> Numbers:
    """What 100 million cells in samples of PanglaoDB's size would take on this machine."""
    third = figures["ingest_of_a_third"]
    runs = [figures["ingest"], third, figures["ingest_of_whole_sizes"]]
    costs = np.array([[run["files"], run["cells"]] for run in runs], np.float64)
    seconds = np.array([run["seconds"] for run in runs])
    # Where all runs have samples of PanglaoDB's size, files and cells cannot be told apart.
    (per_file, per_cell), _ = nnls(costs, seconds)
    files = TARGET * NUM_SAMPLES / NUM_CELLS
    more_files = figures["ingest"]["files"] - third["files"]
    mb_per_file = (figures["ingest"]["peak_mb"] - third["peak_mb"]) / more_files
    store_bytes = TARGET * figures["bytes_per_cell"]
    return {
        "files": files,
        "ingest_seconds_per_file": per_file,
        "ingest_seconds_per_1000_cells": per_cell * 1_000,
        "ingest_hours": (per_file * files + per_cell * TARGET) / 3600,
        "coordinator_gigabytes": mb_per_file * files / 1_000,
        "store_gigabytes": store_bytes / 1e9,
        "verify_hours": store_bytes / (figures["verify"]["megabytes_per_second"] * 1e6) / 3600,
        "epoch_hours_of_two_ranks": TARGET / figures["epoch"]["cells_per_second"] / 3600,
    }


def config_of(folder: Path, output: Path, sources: list[str], **more: Any) -> StoreConfig:
    return StoreConfig(
        sources=sources,
        output=str(output),
        panel=PanelConfig(file=str(folder / "panel.txt")),
        min_genes=MIN_GENES,
        skip_broken=True,
        workers=2,
        **more,
    )


def ingest(folder: Path, name: str, sources: list[str]) -> Numbers:
    """Build a store with two Dask worker processes."""
    return in_process(_build, str(folder), str(folder / name), sources)


def trial(folder: Path, raw: str, samples: list[Sample], known: dict[str, Known]) -> Numbers:
    """Build a store of some samples, check it, and let it go."""
    output = folder / "trial.zarr"
    numbers = ingest(folder, output.name, [path_of(folder / raw, sample) for sample in samples])
    check_store(output, known, {})
    shutil.rmtree(output)
    return {**numbers, "files": len(samples), "cells": sum(k.cells for k in known.values())}


def check_store(
    path: Path, known: dict[str, Known], broken: dict[str, str]
) -> list[dict[str, str]]:
    """Compare a store with what its files hold; return why each broken file was left out."""
    store = open_store(path)
    kept = {line["name"]: line["cells_kept"] for line in store.header.sources}
    assert kept == {name: what.cells for name, what in known.items()}
    assert store.num_cells == sum(what.cells for what in known.values())
    assert store.header.num_counts == sum(what.num_counts for what in known.values())
    reasons = {Path(line["path"]).name: line["reason"] for line in store.header.left_out}
    assert reasons.keys() == broken.keys(), reasons.keys() ^ broken.keys()
    for name, word in broken.items():
        assert name in reasons[name], reasons[name]
        assert word in reasons[name], reasons[name]
    return [
        {"file": name, "reason": reason.replace(str(path.parent), "…")}
        for name, reason in sorted(reasons.items())
    ]


def read_epoch(path: Path, known: dict[str, Known]) -> Numbers:
    """Read an epoch as two ranks do, and see that each cell came once, with its counts."""
    began = time.perf_counter()
    with ProcessPoolExecutor(NUM_RANKS, mp_context=get_context("spawn")) as pool:
        ranks = list(pool.map(partial(_read_rank, str(path)), range(NUM_RANKS)))
    wall = time.perf_counter() - began
    positions = np.concatenate([rank["positions"] for rank in ranks])
    assert np.array_equal(np.sort(positions), np.arange(open_store(path).num_cells))
    assert sum(rank["sum_counts"] for rank in ranks) == sum(k.sum_counts for k in known.values())
    return {
        "seconds": wall,
        "cells_per_second": len(positions) / max(rank["seconds"] for rank in ranks),
        "cells_per_cpu_second": len(positions) / sum(rank["cpu_seconds"] for rank in ranks),
        "first_batch_seconds": max(rank["first_batch_seconds"] for rank in ranks),
        "rank_peak_mb": max(rank["peak_mb"] for rank in ranks),
    }


def in_process(function: Callable[..., Numbers], *arguments: Any) -> Numbers:
    """Run a step in a process of its own; its peak memory is the step's."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        numbers = pool.submit(_measured, function, *arguments).result()
    print(f"{function.__name__.strip('_')}: {numbers['seconds']:.1f} s", file=sys.stderr)
    return numbers


def _measured(function: Callable[..., Numbers], *arguments: Any) -> Numbers:
    began = time.perf_counter()
    numbers = function(*arguments)
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "cpu_seconds": cpu_seconds(), "peak_mb": peak_mb(), **numbers}


def _build(folder: str, output: str, sources: list[str]) -> Numbers:
    from distributed import Client, LocalCluster

    with (
        LocalCluster(
            n_workers=2, threads_per_worker=1, dashboard_address=None, silence_logs=logging.CRITICAL
        ) as cluster,
        Client(cluster) as client,
    ):
        config = config_of(Path(folder), Path(output), sources, scheduler=cluster.scheduler_address)
        began = time.perf_counter()
        build_store(config)
        seconds = time.perf_counter() - began
        peaks = client.run(peak_mb)
    return {"seconds": seconds, "worker_peak_mb": max(peaks.values())}


def _append(folder: str, store: str, sources: list[str]) -> Numbers:
    before = open_store(store).num_cells
    grown = append_store(config_of(Path(folder), Path(store), sources, append=True))
    return {"cells": grown.num_cells - before}


def _open(store: str) -> Numbers:
    check_complete(open_store(store))
    return {}


def _verify(store: str) -> Numbers:
    findings = verify_store(store, threads=2)
    assert not findings, findings
    return {}


def _read_rank(path: str, rank: int) -> dict[str, Any]:
    began, cpu = time.perf_counter(), cpu_seconds()
    store = open_store(path)
    order = select_cells(store, SelectionConfig(), 0.0).order(0, OrderConfig())
    sampler = CellSampler(order, BATCH * NUM_RANKS, rank, NUM_RANKS, 1)
    loader = CellLoader(CellReader(store), sampler, len(store.panel), BinningConfig())
    positions, total, first = [], 0, 0.0
    for (cells,) in loader.cells(0):
        first = first or time.perf_counter() - began
        positions.append(cells.positions)
        total += int(cells.counts.sum(dtype=np.int64))
    return {
        "positions": np.concatenate(positions),
        "sum_counts": total,
        "first_batch_seconds": first,
        "seconds": time.perf_counter() - began,
        "cpu_seconds": cpu_seconds() - cpu,
        "peak_mb": peak_mb(),
    }


def path_of(folder: Path, sample: Sample) -> str:
    return str(folder / f"{sample.name}.{'sparse.RData' if sample.is_rdata else 'h5ad'}")


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def table(facts: dict[str, Any], indent: str = "") -> list[str]:
    """Figures in lines; those of a step below its name."""
    lines = []
    for name, value in facts.items():
        label = f"{indent}{name.replace('_', ' ')}"
        if isinstance(value, dict):
            lines += [label, *table(value, f"{indent}  ")]
        elif isinstance(value, list):
            lines += [label, *(f"{indent}  {item['file']}: {item['reason']}" for item in value)]
        else:
            shown = f"{value:,.0f}" if float(value).is_integer() else f"{value:,.2f}"
            lines.append(f"{label:36} {shown:>16}")
    return lines


if __name__ == "__main__":
    main()
