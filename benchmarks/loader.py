"""How fast, how large and how well mixed: our loader beside others, on the same synthetic cells.

    python benchmarks/loader.py --quick                      # a minute or two, small data
    python benchmarks/loader.py --workdir DIR --python312 PY  # the full one, keeps data in DIR
    python benchmarks/loader.py --workdir DIR --python312 PY --prepare  # its data only, no timing

Each case runs in a process of its own; all cases take turns, round after round (`turns`). Peers are
installed with pip into environments inside the working folder; one that cannot be installed is
named, and its ratios are null. Shuffling loaders read two epochs: the memory that a
process touches for the first time is a third of the first. The full run takes about ten minutes on
two quiet cores, a minute or two of which prepare data and environments.
"""

import argparse
import os
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import zarr
from anndata.io import read_elem
from cells import Corpus, generate
from environments import Environment, environment, find_python312
from turns import (
    PEERS,
    Bar,
    Numbers,
    Ratios,
    add_output_flags,
    finish,
    medians,
    publish,
    ratio,
    result_of,
    run,
    start,
)

from datastore.config import OrderConfig, PanelConfig, StoreConfig
from datastore.ingest import build_store
from datastore.sampler import CellOrder, CellSampler
from datastore.store import CellStore, open_store

BATCH = 512


@dataclass(frozen=True)
class Case:
    """One kind of run: `script.py command`, by the interpreter of a peer (none is ours)."""

    name: str
    script: str
    command: str
    peer: str | None = None
    beside: str | None = None
    """Command that runs at the same time."""
    cold: str | None = None
    """Folder whose files leave the page cache first."""


CASES = [
    Case("csr", "ours", "cells"),
    Case("annbatch_512", "with_annbatch", "chunk_512", "annbatch"),
    Case("annbatch_32", "with_annbatch", "chunk_32", "annbatch"),
    Case("cellstream", "with_cellstream", "threads_1", "cellstream"),
    Case("cellstream_2_threads", "with_cellstream", "threads_2", "cellstream"),
    Case("limits", "ours", "limits"),
    Case("dense", "ours", "dense"),
    Case("annbatch_dense", "with_annbatch", "dense", "annbatch"),
    Case("tokens", "ours", "tokens"),
    Case("packed", "ours", "packed"),
    Case("starts", "ours", "starts"),
    Case("two_loaders", "ours", "rank_0", beside="rank_1"),
    Case("annbatch_two_loaders", "with_annbatch", "rank_0", "annbatch", beside="rank_1"),
    Case("cold_reads", "ours", "cells", cold="ours.zarr"),
    Case("annbatch_cold_reads", "with_annbatch", "chunk_512", "annbatch", cold="annbatch.zarr"),
    Case("memory_map", "ours", "memory_map"),
    Case("copying", "ours", "copying"),
    Case("scdataset", "with_scdataset", "run", "scdataset"),
    Case("scdl", "with_scdl", "run", "scdl"),
    Case("anndata_backed", "with_anndata", "run"),
]


COLUMNS = {
    "per_second": "cells/s",
    "per_cpu_second": "per CPU-s",
    "first_batch_seconds": "first batch s",
    "peak_mb": "peak MB",
}
BARS = [
    Bar("csr_wall_vs_annbatch", least=2.2),
    Bar("csr_cpu_vs_annbatch", least=1.8),
    Bar("csr_wall_vs_annbatch_chunk_32", least=3.2),
    Bar("csr_wall_vs_cellstream", least=2.0),
    Bar("of_composed_limit", least=0.9),
    Bar("dense_wall_vs_annbatch", least=2.0),
    Bar("dense_cpu_vs_annbatch", least=2.0),
    Bar("tokens_per_cpu_second", least=60_000),
    Bar("rss_vs_annbatch", most=0.5),
    Bar("first_batch_vs_annbatch", most=0.5),
    Bar("seek_vs_cold_start", most=1.2),
    Bar("disk_vs_annbatch", most=0.62),
    Bar("mixing_variance", least=0.95, most=1.05),
]


def main() -> None:
    options = parse()
    with tempfile.TemporaryDirectory(prefix="loader_benchmark_") as scratch:
        folder = Path(options.workdir or scratch).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        say = (lambda _: None) if options.json else (lambda text: print(text, flush=True))
        ready = prepare_all(folder, options, say)
        if not options.prepare:
            publish(measure(ready, options, say), COLUMNS, options)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Our loader beside others, on the same synthetic cells. The full run takes "
        "about ten minutes on two quiet cores, --quick one or two."
    )
    parser.add_argument("--quick", action="store_true", help="40,000 cells, two rounds, two peers")
    parser.add_argument("--prepare", action="store_true", help="data and environments, no timing")
    add_output_flags(parser)
    parser.add_argument("--peers", default=None, help="comma-separated; default all, quick: two")
    parser.add_argument("--cells", type=int, help="default 200,000, quick: 40,000")
    parser.add_argument("--rounds", type=int, help="default 3, quick: 2")
    parser.add_argument("--epochs", type=int, default=2, help="that each case reads; default 2")
    options = parser.parse_args()
    options.cells = options.cells or (40_000 if options.quick else 200_000)
    options.rounds = options.rounds or (2 if options.quick else 3)
    if min(options.epochs, options.cells, options.rounds) < 1:
        parser.error("--epochs, --cells and --rounds must be 1 or more")
    peers = options.peers if options.peers is not None else "annbatch,cellstream"
    options.peers = list(PEERS) if options.peers is None and not options.quick else peers.split(",")
    unknown = set(options.peers) - set(PEERS) - {""}
    if unknown:
        parser.error(f"--peers {', '.join(sorted(unknown))}; known are {', '.join(PEERS)}")
    return options


@dataclass(frozen=True)
class Ready:
    """What a run needs."""

    data: Path
    corpus: Corpus
    store: CellStore
    pythons: dict[str, Environment]
    built: dict[str, Numbers]
    """What the stores of peers took to make, if this run made them."""

    @property
    def missing(self) -> dict[str, str]:
        return {name: at.problem for name, at in self.pythons.items() if at.python is None}


def prepare_all(folder: Path, options: argparse.Namespace, say: Callable[[str], None]) -> Ready:
    """Make data, environments and the stores of peers, as far as they are not there."""
    corpus = Corpus(num_cells=options.cells, seed=options.seed)
    data = folder / f"cells_{options.cells}_{options.seed}"
    say(f"{corpus.num_cells:,} cells × {corpus.num_genes:,} genes in {data}")
    store = prepare(data, corpus)
    pythons = {name: install(folder, name, options, say) for name in PEERS}
    built = {
        name: run(pythons[name].python, f"with_{name}", "build", data, options.cells)
        for name, target in {
            "annbatch": "annbatch.zarr",
            "cellstream": "cellstream.csad",
            "scdl": "scdl",
        }.items()
        if pythons[name].python is not None and not (data / target).exists()
    }
    return Ready(data, corpus, store, pythons, built)


def measure(
    ready: Ready, options: argparse.Namespace, say: Callable[[str], None]
) -> dict[str, Any]:
    """Run all cases in turns and put the numbers together."""
    data, missing = ready.data, ready.missing
    cases = [case for case in CASES if case.peer is None or case.peer not in missing]
    rounds: dict[str, list[Numbers]] = defaultdict(list)
    for number in range(options.rounds):
        for case in cases:
            python = ready.pythons[case.peer].python if case.peer else None
            rounds[case.name].append(turn(data, python, case, options.cells * options.epochs))
        say(f"round {number + 1} of {options.rounds}: csr {rounds['csr'][-1]['per_second']:,.0f}/s")
    ratios = compare(rounds)
    ratios["disk_vs_annbatch"] = (
        None if "annbatch" in missing else size(data / "ours.zarr") / size(data / "annbatch.zarr")
    )
    ratios["mixing_variance"] = mixing_variance(ready.store)
    figures = {
        "cells": options.cells,
        "rounds": options.rounds,
        "epochs": options.epochs,
        "bytes_per_cell": bytes_per_cell(data, ready.corpus),
        "not_measured": missing,
        "built": ready.built,
        **{name: medians(results) for name, results in rounds.items()},
    }
    return result_of("loader", ratios, BARS, figures)


def prepare(data: Path, corpus: Corpus) -> CellStore:
    """Make sources, our store, one of 16,906 genes, and the uncompressed arrays."""
    paths = [str(path) for path in generate(data / "raw", corpus)]
    names = corpus.gene_names()
    for name, sources, genes in (
        ("ours", paths, names),
        ("panel_16906", paths[:1], names[:16_906]),
    ):
        panel = data / f"{name}.txt"
        panel.write_text("\n".join(genes) + "\n")
        try:
            open_store(data / f"{name}.zarr")
        except (FileNotFoundError, ValueError):  # there is none, or one of another version
            build_store(
                StoreConfig(
                    sources=sources,
                    output=str(data / f"{name}.zarr"),
                    panel=PanelConfig(file=str(panel)),
                )
            )
    if not (data / "flat" / "indptr.npy").is_file():
        run(None, "ours", "flatten", data, corpus.num_cells)
    return open_store(data / "ours.zarr")


def install(
    folder: Path, name: str, options: argparse.Namespace, say: Callable[[str], None]
) -> Environment:
    if name not in options.peers:
        return Environment(None, "not asked for")
    which, requirements = PEERS[name]
    python = find_python312(options.python312) if which == "312" else sys.executable
    found = environment(folder / "environments" / name, python, requirements)
    if found.python is None:
        say(f"{name} is not measured: {found.problem}")
    return found


def turn(data: Path, python: Path | None, case: Case, cells: int) -> Numbers:
    """Run a case once."""
    if case.cold is not None:
        drop_from_cache(data / case.cold)
    if case.beside is None:
        return run(python, case.script, case.command, data, cells)
    both = [
        start(python, case.script, command, data, cells) for command in (case.command, case.beside)
    ]
    one, other = (finish(process) for process in both)
    return {
        "per_second": one["per_second"] + other["per_second"],
        "per_cpu_second": (one["per_cpu_second"] + other["per_cpu_second"]) / 2,
        "peak_mb": one["peak_mb"] + other["peak_mb"],
    }


def compare(rounds: dict[str, list[Numbers]]) -> Ratios:
    """Ratios of cases to each other, each the median over the rounds."""
    return {
        "csr_wall_vs_annbatch": ratio(rounds, "csr", "annbatch_512"),
        "csr_cpu_vs_annbatch": ratio(rounds, "csr", "annbatch_512", "per_cpu_second"),
        "csr_wall_vs_annbatch_chunk_32": ratio(rounds, "csr", "annbatch_32"),
        "csr_cpu_vs_annbatch_chunk_32": ratio(rounds, "csr", "annbatch_32", "per_cpu_second"),
        "csr_wall_vs_cellstream": ratio(rounds, "csr", "cellstream"),
        "csr_wall_vs_cellstream_2_threads": ratio(rounds, "csr", "cellstream_2_threads"),
        "csr_cpu_vs_cellstream": ratio(rounds, "csr", "cellstream", "per_cpu_second"),
        # The limit is without the page faults of a process's first reads, so this is, too.
        "of_composed_limit": ratio(rounds, "csr", "limits", "second_half_per_second"),
        "dense_wall_vs_annbatch": ratio(rounds, "dense", "annbatch_dense"),
        "dense_cpu_vs_annbatch": ratio(rounds, "dense", "annbatch_dense", "per_cpu_second"),
        "tokens_cpu_vs_annbatch_dense": ratio(rounds, "tokens", "annbatch_dense", "per_cpu_second"),
        "tokens_per_cpu_second": median(run["per_cpu_second"] for run in rounds["tokens"]),
        "rss_vs_annbatch": ratio(rounds, "csr", "annbatch_512", "peak_mb"),
        "first_batch_vs_annbatch": ratio(rounds, "csr", "annbatch_512", "first_batch_seconds"),
        "seek_vs_cold_start": median(run["seek_vs_cold_start"] for run in rounds["starts"]),
        "seek_cpu_vs_cold_start": median(run["seek_cpu_vs_cold_start"] for run in rounds["starts"]),
        "two_loaders_vs_annbatch": ratio(rounds, "two_loaders", "annbatch_two_loaders"),
        "two_loaders_vs_one": ratio(rounds, "two_loaders", "csr"),
        "cold_reads_vs_annbatch": ratio(rounds, "cold_reads", "annbatch_cold_reads"),
        "csr_vs_memory_map": ratio(rounds, "csr", "memory_map"),
        "csr_vs_copying": ratio(rounds, "csr", "copying"),
        "csr_wall_vs_scdataset": ratio(rounds, "csr", "scdataset"),
        "csr_wall_vs_scdl": ratio(rounds, "csr", "scdl"),
        "csr_wall_vs_anndata_backed": ratio(rounds, "csr", "anndata_backed"),
    }


def mixing_variance(store: CellStore, epochs: int = 20) -> float:
    """Variance of a source's share of a batch, over that of batches drawn without replacement."""
    parts = [
        read_elem(zarr.open_group(store.partition_path(number), mode="r")["obs"])["source"]
        for number in range(len(store.header.partitions))
    ]
    names = np.concatenate([part.astype(str).to_numpy() for part in parts])
    sources, label = np.unique(names, return_inverse=True)
    sampler = CellSampler(CellOrder(0, store.num_cells, 1, OrderConfig()), BATCH, 0, 1, 1)
    whole = range(store.num_cells // BATCH)
    counts = [
        np.bincount(label[step[0]], minlength=len(sources))
        for epoch in range(epochs)
        for step in sampler.plan(epoch, whole)
    ]
    share = np.bincount(label) / len(label)
    without_return = (store.num_cells - BATCH) / (store.num_cells - 1)
    expected = BATCH * share * (1 - share) * without_return
    found = np.mean((np.array(counts) - BATCH * share) ** 2, axis=0)
    return float(np.mean(found / expected))


def bytes_per_cell(data: Path, corpus: Corpus) -> Numbers:
    """Bytes on disk for each cell, of the stores that are there; cellstream has one source."""
    cells = {
        "ours.zarr": corpus.num_cells,
        "annbatch.zarr": corpus.num_cells,
        "cellstream.csad": corpus.source_sizes()[0],
    }
    return {
        name.split(".")[0]: round(size(data / name) / number, 1)
        for name, number in cells.items()
        if (data / name).exists()
    }


def size(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def drop_from_cache(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    main()
