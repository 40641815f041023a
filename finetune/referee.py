"""The referee: methods on trials of a protocol, and who won, in numbers and in words.

Every method sees the same cells and genes. What is printed is made of one record per method and
trial, kept in the JSON, so that nothing has to be believed.
"""

import logging
import resource
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata
import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from datastore.genes import GenePanel
from finetune.benchmark_config import BenchmarkConfig
from finetune.benchmark_report import BenchmarkReport, Record, summarise, write_report
from finetune.cells import labels_of, panel_counts, read_adata
from finetune.config import FinetuneConfig, LabelledConfig
from finetune.markers import read_markers
from finetune.methods import METHODS, Answer, Task, need
from finetune.metrics import score
from finetune.novelty import novelty_scores
from finetune.protocols import PROTOCOLS, Trial, leave_group_out, marker_deletion
from finetune.published import renamed
from finetune.query import adata_query
from finetune.registry import resolve_model
from finetune.sides import Labelled
from pretrain.export import Export, read_export

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Cells:
    """Cells of the benchmark: what is split, what another file adds, names of the genes."""

    own: Labelled
    query: Labelled | None
    genes: tuple[str, ...]


def run_benchmark(config: BenchmarkConfig) -> BenchmarkReport:
    """Run all methods on all trials and write the report.

    Raises:
        FileNotFoundError: If a file does not exist.
        ValueError: If a method is missing its package or its table, or the cells do not suit the
            protocol.
    """
    for name, module in (("CellTypist", "celltypist"), ("SingleR", "singler")):
        if name in config.methods:
            need(module, name)  # before minutes of work
    adata = read_adata(config.data, config.layer)
    query = None if config.query is None else read_adata(config.query, config.layer)
    return benchmark(adata, config, query)


def benchmark(
    adata: anndata.AnnData, config: BenchmarkConfig, query: anndata.AnnData | None = None
) -> BenchmarkReport:
    """Run all methods on all trials of cells in memory and write the report.

    Args:
        adata: Labelled cells with raw counts.
        config: Protocol and methods; its paths are for messages.
        query: Cells to label in `cross-data-set`.
    """
    cells = _cells(adata, query, config)
    markers = _markers(config, cells)
    export = None
    if config.encoder != "none":
        export = read_export(resolve_model(config.encoder).path, "encoder")
    records = []
    for seed in config.seeds:
        for trial in _trials(adata, cells, config, markers, seed):
            log.info("%s, seed %d: %d cells to learn from", trial.name, seed, len(trial.train))
            records += _run_trial(cells, trial, config, markers, export, seed)
    report = summarise(records, config)
    write_report(report, Path(config.output))
    return report


def _cells(adata: anndata.AnnData, query: anndata.AnnData | None, config: BenchmarkConfig) -> Cells:
    """Bring all cells to the genes that all files have, in the order of the first."""
    own = adata_query(adata, config.layer, config.data)
    other = None if query is None else adata_query(query, config.layer, str(config.query))
    genes = list(dict.fromkeys(own.genes))
    if other is not None:
        shared = set(other.genes)
        genes = [name for name in genes if name in shared]
        if not genes:
            raise ValueError(f"{config.data} and {config.query} have no gene name in common")
    panel = GenePanel(tuple(genes))
    labels = renamed(labels_of(adata, config.label_key, config.data), config.name)
    side = Labelled(panel_counts(own, panel), labels)
    if query is None or other is None:
        return Cells(side, None, panel.names)
    labels = renamed(labels_of(query, config.label_key, str(config.query)), config.name)
    return Cells(side, Labelled(panel_counts(other, panel), labels), panel.names)


def _markers(config: BenchmarkConfig, cells: Cells) -> dict[str, tuple[str, ...]] | None:
    if config.markers is None:
        return None
    table = read_markers(config.markers)
    names = {str(name) for name in np.unique(cells.own.labels)}
    found = {name: table.get(config.marker_types.get(name, name), ()) for name in names}
    if absent := sorted(name for name, genes in found.items() if not genes):
        log.warning("the table of markers does not know %s (--marker_types)", ", ".join(absent))
    return found


def _trials(
    adata: anndata.AnnData,
    cells: Cells,
    config: BenchmarkConfig,
    markers: dict[str, tuple[str, ...]] | None,
    seed: int,
) -> list[Trial]:
    labels, protocol = cells.own.labels, config.protocol
    if cells.query is not None:
        whole, none = np.arange(len(labels)), np.empty(0, np.int64)
        return [Trial(name="cross-data-set", train=whole, test=none)]
    if protocol.name == "leave-group-out":
        if protocol.group_key not in adata.obs:
            columns = ", ".join(map(str, adata.obs.columns))
            raise ValueError(f"{config.data} has no obs[{protocol.group_key!r}]; it has {columns}")
        return leave_group_out(labels, adata.obs[protocol.group_key].astype(str).to_numpy())
    if protocol.name == "marker-deletion":
        known = {gene for genes in (markers or {}).values() for gene in genes}
        places = [place for place, gene in enumerate(cells.genes) if gene in known]
        return marker_deletion(labels, places, protocol, seed)
    return PROTOCOLS[protocol.name](labels, protocol, seed)


def _run_trial(
    cells: Cells,
    trial: Trial,
    config: BenchmarkConfig,
    markers: dict[str, tuple[str, ...]] | None,
    export: Export | None,
    seed: int,
) -> list[Record]:
    train = cells.own.take(trial.train)
    test = cells.own.take(trial.test)
    if cells.query is not None:  # types that cannot be known are not asked for
        known = np.flatnonzero(np.isin(cells.query.labels, train.labels))
        test = cells.query.take(known)
    if not len(test.labels):
        raise ValueError(f"{trial.name} has no cell to label whose type was learnt")
    if len(trial.deleted):
        train, test = (_without(side, trial.deleted) for side in (train, test))
    data = LabelledConfig(path=config.data, label_key=config.label_key)
    base = config.train or FinetuneConfig(encoder="none", output="", data=data)
    task = Task(
        train=train,
        test=test.counts,
        genes=cells.genes,
        seed=seed,
        config=base,
        export=export,
        markers=markers,
    )
    return [_record(name, METHODS[name], task, test.labels, trial) for name in config.methods]


def _record(name: str, method: Any, task: Task, truth: NDArray[np.str_], trial: Trial) -> Record:
    _reset_peak()
    started = time.perf_counter()
    answer: Answer = method(task)
    seconds = time.perf_counter() - started
    novelty = None
    is_asked = truth != trial.novel
    if trial.novel is not None and answer.strangeness is not None and answer.is_novel is not None:
        novelty = novelty_scores(answer.strangeness, answer.is_novel, ~is_asked)
    known, given = truth[is_asked], answer.labels[is_asked]
    classes = sorted({*map(str, known), *map(str, given)})
    scores = score(list(known), list(given), classes)
    log.info("%s: accuracy %.4f, macro-F1 %.4f", name, scores.accuracy, scores.macro_f1)
    return Record(
        name, trial.name, task.seed, scores, known == given, seconds, _peak_megabytes(), novelty
    )


def _without(side: Labelled, columns: NDArray[np.int64]) -> Labelled:
    kept = np.ones(side.counts.shape[1])
    kept[columns] = 0
    counts = sparse.csr_matrix(side.counts @ sparse.diags(kept))
    counts.eliminate_zeros()
    return Labelled(counts, side.labels)


def _reset_peak() -> None:
    """Let the kernel measure peak memory anew, where it can (Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        log.debug("peak memory is that of the whole process here")


def _peak_megabytes() -> float:
    """Highest memory of this process since `_reset_peak`."""
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
