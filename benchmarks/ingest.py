"""How fast and in how much memory a store is made, beside annbatch, of the same synthetic cells.

    python benchmarks/ingest.py --quick                      # a minute or two, small data
    python benchmarks/ingest.py --workdir DIR --python312 PY  # the full one, keeps data in DIR
    python benchmarks/ingest.py --memory                     # peak memory at 100,000 and 1,000,000

Ours aligns the genes of four sources of different order to a panel, looks for duplicates, and
shuffles uniformly; annbatch joins the sources and shuffles runs of 1,000 cells. Each run is a
process of its own that times itself without its imports (but with the start of its workers); the
runs take turns (`turns`). Each form takes under ten minutes on two quiet cores; `--memory` needs
25 GB of disk.
"""

import argparse
import tempfile
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
from cells import Corpus, generate
from environments import environment, find_python312
from turns import (
    PEERS,
    Bar,
    Numbers,
    Ratios,
    add_output_flags,
    medians,
    publish,
    ratio,
    result_of,
    run,
)

BARS = [
    Bar("cpu_vs_annbatch", least=2.0),
    Bar("wall_two_workers_vs_annbatch", least=3.0),
    Bar("disk_vs_annbatch", most=0.62),
    Bar("archive_disk_vs_annbatch", most=0.45),
    Bar("peak_mb_per_worker", most=1_200),
    Bar("rss_growth_100k_to_1m", most=1.3),
    Bar("peak_mb_1m", most=2_000),
]
COLUMNS = {
    "per_second": "cells/s",
    "per_cpu_second": "per CPU-s",
    "seconds": "seconds",
    "leader_peak_mb": "leader MB",
    "peak_mb": "worker MB",
    "disk_mb": "store MB",
}
FEW, COPIES = 100_000, 10
"""Cells whose memory is compared with that of so many times as many."""


def main() -> None:
    options = parse()
    with tempfile.TemporaryDirectory(prefix="ingest_benchmark_") as scratch:
        folder = Path(options.workdir or scratch).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        measure = measure_memory if options.memory else measure_speed
        ratios, figures = measure(folder, options)
    publish(result_of("ingest", ratios, BARS, figures), COLUMNS, options)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="How fast and in how much memory a store is made. The full run takes under "
        "ten minutes on two quiet cores, so does --memory; --quick takes one or two."
    )
    parser.add_argument("--quick", action="store_true", help="40,000 cells, two rounds")
    parser.add_argument("--memory", action="store_true", help="peak memory instead of speed")
    add_output_flags(parser)
    parser.add_argument("--cells", type=int, help="default 200,000, quick: 40,000")
    parser.add_argument("--rounds", type=int, help="default 3, quick: 2")
    options = parser.parse_args()
    options.cells = options.cells or (40_000 if options.quick else 200_000)
    options.rounds = options.rounds or (2 if options.quick else 3)
    return options


# --- speed, size ---


def measure_speed(folder: Path, options: argparse.Namespace) -> tuple[Ratios, dict[str, Any]]:
    """Let ours (one and two workers, and the archive codec) and annbatch take turns."""
    corpus = Corpus(num_cells=options.cells, seed=options.seed)
    data = folder / f"cells_{options.cells}_{options.seed}"
    prepare(data, corpus)
    _, requirements = PEERS["annbatch"]
    python312 = find_python312(options.python312)
    peer = environment(folder / "environments" / "annbatch", python312, requirements)
    runs: dict[str, tuple[Any, ...]] = {
        "one_worker": (None, "ingest_ours", 1, data, "fast"),
        "two_workers": (None, "ingest_ours", 2, data, "fast"),
        "archive": (None, "ingest_ours", 2, data, "archive"),
    }
    if peer.python is not None:
        runs["annbatch"] = (peer.python, "ingest_with_annbatch", "build", data)
    rounds: dict[str, list[Numbers]] = defaultdict(list)
    for number in range(options.rounds):
        for name, arguments in runs.items():
            if name == "archive" and number:
                continue  # its size is what is asked for, and that does not vary
            rounds[name].append(run(*arguments))
        if not options.json:
            print(f"round {number + 1} of {options.rounds}", flush=True)
    figures = {
        "cells": options.cells,
        "rounds": options.rounds,
        "not_measured": {} if peer.python is not None else {"annbatch": peer.problem},
        **{name: medians(results) for name, results in rounds.items()},
    }
    return compare(rounds), figures


def compare(rounds: dict[str, list[Numbers]]) -> Ratios:
    """Ratios of runs to each other, each the median over the rounds."""
    return {
        "cpu_vs_annbatch": ratio(rounds, "one_worker", "annbatch", "per_cpu_second"),
        "cpu_two_workers_vs_annbatch": ratio(rounds, "two_workers", "annbatch", "per_cpu_second"),
        "wall_vs_annbatch": ratio(rounds, "one_worker", "annbatch"),
        "wall_two_workers_vs_annbatch": ratio(rounds, "two_workers", "annbatch"),
        "wall_two_workers_vs_one": ratio(rounds, "two_workers", "one_worker"),
        "disk_vs_annbatch": ratio(rounds, "one_worker", "annbatch", "disk_mb"),
        "archive_disk_vs_annbatch": ratio(rounds, "archive", "annbatch", "disk_mb"),
        "rss_vs_annbatch": ratio(rounds, "two_workers", "annbatch", "peak_mb"),
        "peak_mb_per_worker": median(run["peak_mb"] for run in rounds["two_workers"]),
    }


def prepare(data: Path, corpus: Corpus) -> list[Path]:
    paths = generate(data / "raw", corpus)
    (data / "panel.txt").write_text("\n".join(corpus.gene_names()) + "\n")
    return paths


# --- memory ---


def measure_memory(folder: Path, options: argparse.Namespace) -> tuple[Ratios, dict[str, Any]]:
    """Ingest cells, and ten times as many, with two workers."""
    few = FEW // 10 if options.quick else FEW
    small, large = folder / f"memory_{few}", folder / f"memory_{few}_x{COPIES}"
    paths = prepare(small, Corpus(num_cells=few, seed=options.seed))
    (large / "raw").mkdir(parents=True, exist_ok=True)
    (large / "panel.txt").write_text((small / "panel.txt").read_text())
    for copy in range(COPIES):
        for path in paths:
            link_with_other_names(path, large / "raw" / f"{path.stem}_{copy}.h5ad", copy)
    figures = {}
    for data, cells in ((small, few), (large, COPIES * few)):
        numbers = run(None, "ingest_ours", 2, data, "fast")
        # The sum of peaks is at least the peak of the sum.
        all_mb = numbers["leader_peak_mb"] + 2 * numbers["peak_mb"]
        figures[f"cells_{cells}"] = numbers | {"peak_mb_all": all_mb}
        if not options.json:
            print(f"{cells:,} cells: {all_mb:,.0f} MB", flush=True)
    less, more = (numbers["peak_mb_all"] for numbers in figures.values())
    if options.quick:
        return {"rss_growth_10k_to_100k": more / less, "peak_mb_100k": more}, figures
    return {"rss_growth_100k_to_1m": more / less, "peak_mb_1m": more}, figures


def link_with_other_names(path: Path, target: Path, copy: int) -> None:
    """Make a source of another's counts, its genes moved by a few columns: other cells."""
    source = anndata.read_h5ad(path, backed="r")
    genes = np.roll(source.var_names.to_numpy(), -copy)
    source.file.close()
    var = pd.DataFrame(index=pd.Index(genes, dtype=object))
    anndata.AnnData(obs=source.obs, var=var).write_h5ad(target)
    with h5py.File(target, "r+") as file:
        file.pop("X", None)
        file["X"] = h5py.ExternalLink(str(path), "X")


if __name__ == "__main__":
    main()
