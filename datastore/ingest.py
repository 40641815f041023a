"""Raw files → cell store, with Dask.

1. Scan: size, genes and digest of each source; the panel is read, or made from gene moments.
2. Pass 1, a task per slice of a source (per source, if it can only be decoded whole): decode,
   check, align to the panel, drop poor cells, give each cell its place in the shuffle, and spool
   the cells in that order.
3. Pass 2, a task per partition: gather its cells from all spools, write one AnnData part.
4. Publish: panel, manifest, one rename.

A cell's place is a keyed permutation of (source digest order, row): the store's bytes depend
neither on the number of workers nor on restarts. All work lies in `<output>.building`, each
finished piece published by a rename, so a killed ingest continues where it was.
"""

import fcntl
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import dask
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import sparse
from tqdm import tqdm

from datastore.config import StoreConfig
from datastore.formats import ReadOptions
from datastore.gene_tables import GeneTables, read_tables
from datastore.genes import (
    GenePanel,
    align_counts,
    match_genes,
    measured_genes,
    panel_of_sources,
    read_panel,
)
from datastore.harmonize import Harmonization, write_report
from datastore.manifest import ListedSource, list_sources
from datastore.randomness import derive_key, permute
from datastore.sources import (
    BrokenSource,
    BrokenSources,
    OpenSource,
    Source,
    open_source,
    scan_listed,
)
from datastore.store import (
    MANIFEST,
    RECORDS,
    CellStore,
    StoreFormatError,
    generation_folder,
    open_store,
    write_json,
)
from datastore.store_writing import (
    ArraySizes,
    write_manifest,
    write_measured,
    write_partition,
    write_record,
    write_root,
)

log = logging.getLogger(__name__)

Task = tuple[Any, ...]
Compute = Callable[[str, Sequence[Task]], list[Any]]


@dataclass(frozen=True)
class Slice:
    """Rows [start, stop) of a source; `first` is the shuffle index of its first cell."""

    source: int
    start: int
    stop: int
    first: int

    @property
    def name(self) -> str:
        """Folder of the spooled cells."""
        return f"slice_{self.source:05d}_{self.start:010d}"


def build_store(config: StoreConfig) -> CellStore:
    """Build a store from raw files and open it.

    Raises:
        ValueError: If a source is not usable; all such are in the message, with the remedy.
        FileExistsError: If a store stands at the output and `overwrite` is off.
    """
    output = Path(config.output).absolute()  # a cluster's workers may stand in another folder
    if output.exists() and not config.overwrite:
        raise FileExistsError(f"{output} exists; choose another output or pass --overwrite true")
    if output.exists() and not (output / MANIFEST).is_file():
        raise FileExistsError(
            f"{output} is not a cell store; move it away or choose another output"
        )
    building = output.with_name(output.name + ".building")
    with _locked(building), _workers(config) as compute:
        tables = read_tables(config.panel)
        sources, left_out = _scan(config, compute)
        while True:
            try:
                store_folder = _write_store(building, sources, left_out, config, tables, compute)
                break
            except BrokenSources as found:
                sources, left_out = _go_without(found, sources, left_out, config)
        (building / "plan.json").unlink()  # from here on there is nothing to continue
        _publish(store_folder, output)
        shutil.rmtree(building)
    return open_store(output)


def _scan(config: StoreConfig, compute: Compute) -> tuple[list[Source], list[BrokenSource]]:
    """Look at all sources; return them in the order of their digests, and those left out."""
    panel = read_panel(Path(config.panel.file)).names if config.panel.file is not None else ()
    options = ReadOptions(
        layer=config.layer,
        orientation=config.orientation,
        obs_columns=tuple(config.obs_columns),
        known_genes=frozenset(panel),
    )
    listed = list_sources(config.sources)
    results = compute("scan", [(_scan_one, source, options) for source in listed])
    sources = [result for result in results if isinstance(result, Source)]
    broken = [result for result in results if isinstance(result, BrokenSource)]
    left_out: list[BrokenSource] = []
    if broken:
        sources, left_out = _go_without(BrokenSources(broken), sources, left_out, config)
    _refuse_repeats(sources)
    for name in config.obs_columns:
        if not any(name in source.options.obs_columns for source in sources):
            raise ValueError(
                f"obs_columns: no source has obs[{name!r}]; leave it out, or correct its name"
            )
        if any(name in dict(source.labels) for source in sources):
            raise ValueError(
                f"obs_columns: {name!r} comes from the table of sources already; leave it out"
            )
    return sorted(sources, key=lambda source: (source.sha256, source.path)), left_out


def _scan_one(listed: ListedSource, options: ReadOptions) -> Source | BrokenSource:
    try:
        return scan_listed(listed, options)
    except OSError as error:
        text = f"{listed.path}: {error.strerror}" if error.strerror else str(error)
        return BrokenSource(str(listed.path), text)
    except ValueError as error:
        return BrokenSource(str(listed.path), str(error))


def _go_without(
    found: BrokenSources,
    sources: list[Source],
    left_out: list[BrokenSource],
    config: StoreConfig,
) -> tuple[list[Source], list[BrokenSource]]:
    """Leave broken sources out if that is allowed, else raise."""
    paths = {source.path for source in found.sources}
    remaining = [source for source in sources if source.path not in paths]
    if not remaining:
        raise found
    if not config.skip_broken:
        raise ValueError(f"{found}; --skip_broken true goes on without what is broken") from found
    for source in found.sources:
        log.warning("left out: %s", source.reason)
    return remaining, [*left_out, *found.sources]


def _write_store(
    building: Path,
    sources: list[Source],
    left_out: list[BrokenSource],
    config: StoreConfig,
    tables: GeneTables,
    compute: Compute,
) -> Path:
    """Write the whole store inside `building`; return its folder.

    Raises:
        BrokenSources: If some turn out to be unusable, after all have been looked at.
    """
    slices = _slices(sources, config.cells_per_slice)
    _start_or_continue(building, sources, config, tables)
    panel = _panel(config, sources, slices, tables, compute)
    matches = _usable([_or_broken(s.path, _match, s, panel, config, tables) for s in sources])
    num_cells = sum(source.num_cells for source in sources)
    aligned = compute(
        "align",
        [
            (
                *(_or_broken, sources[parts[0].source].path, _spool_source, building),
                *(sources[parts[0].source], parts, matches[parts[0].source][0]),
                *(len(panel), num_cells, config),
            )
            for parts in _read_together(sources, slices)
        ],
    )
    spools = [kept for group in _usable(aligned) for kept in group]
    if not sum(spools):
        raise ValueError(
            f"no cell has {config.min_genes} expressed panel genes or more; lower min_genes "
            "(shallow or already filtered cells) or choose another panel"
        )
    edges = [*range(0, num_cells, config.cells_per_partition), num_cells]
    columns = _obs_columns(sources, config)
    written = compute(
        "write",
        [
            (_write_part, building, number, start, stop, slices, panel, columns, config)
            for number, (start, stop) in enumerate(pairwise(edges))
        ],
    )
    store_folder = _collect_parts(building, written)
    partitions = [cells for cells, _ in written if cells]
    compute("digest", [(write_record, store_folder, number) for number in range(len(partitions))])
    write_measured(
        store_folder, np.stack([measured_genes(places, len(panel)) for places, _ in matches])
    )
    write_report(
        generation_folder(store_folder, 0),
        [replace(line, source=s.name) for s, (_, line) in zip(sources, matches, strict=True)],
        _shares_of_counts(building, slices, len(sources)),
        tables,
    )
    write_root(store_folder, panel)
    write_manifest(
        store_folder,
        panel,
        partitions,
        sum(counts for _, counts in written),
        config.seed,
        _source_lines(sources, slices, spools, [line for _, line in matches]),
        [asdict(source) for source in left_out],
    )
    return store_folder


def _panel(
    config: StoreConfig,
    sources: list[Source],
    slices: list[Slice],
    tables: GeneTables,
    compute: Compute,
) -> GenePanel:
    """Read the panel, or make it: the genes of enough sources, or those that rank highest."""
    if config.panel.file is not None:
        return read_panel(Path(config.panel.file))
    named = [(source.path, source.genes) for source in sources]
    everything = panel_of_sources(named, tables, config.panel.min_source_share)
    names = everything.names
    if config.panel.size is None or config.panel.size >= len(names):
        return everything
    places = [match_genes(s.genes, everything, s.path, 0.0, tables)[0] for s in sources]
    moments = _usable(
        compute(
            "genes",
            [
                (
                    *(_or_broken, sources[parts[0].source].path, _gene_moments),
                    *(sources[parts[0].source], parts, places[parts[0].source], len(names)),
                )
                for parts in _read_together(sources, slices)
            ],
        )
    )
    num_cells = sum(source.num_cells for source in sources)
    detected, total, squares = np.sum(moments, axis=0)
    rank = detected if config.panel.rank_by == "detection" else squares - total**2 / num_cells
    best = np.argsort(-rank, kind="stable")[: config.panel.size]
    return GenePanel(tuple(names[place] for place in np.sort(best)))


def _match(
    source: Source, panel: GenePanel, config: StoreConfig, tables: GeneTables
) -> tuple[NDArray[np.int64], Harmonization]:
    return match_genes(source.genes, panel, source.path, config.panel.min_share_found, tables)


def _or_broken(path: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function that reads a source; what it refuses is returned, so that others go on."""
    try:
        return function(*arguments)
    except ValueError as error:
        return BrokenSource(path, str(error))


def _usable(results: Sequence[Any]) -> list[Any]:
    """Results of `_or_broken`, if all are usable."""
    broken = {result.path: result for result in results if isinstance(result, BrokenSource)}
    if broken:
        raise BrokenSources(list(broken.values()))
    return list(results)


def _read_together(sources: Sequence[Source], slices: Sequence[Slice]) -> list[list[Slice]]:
    """Slices that one task reads: all of a source that is decoded whole, else one."""
    groups: list[list[Slice]] = []
    for part in slices:
        if groups and groups[-1][0].source == part.source and sources[part.source].whole:
            groups[-1].append(part)
        else:
            groups.append([part])
    return groups


def _gene_moments(
    source: Source, parts: Sequence[Slice], places: NDArray[np.int64], num_genes: int
) -> NDArray[np.float64]:
    """Cells that express each gene, and the sums of log1p(CP10k) and of its square; (3, genes)."""
    moments = np.zeros((3, num_genes))
    with open_source(source) as cells:
        for part in parts:
            matrix = align_counts(cells.counts(part.start, part.stop), places, num_genes)
            library = np.asarray(matrix.sum(axis=1), np.float64).ravel()
            rows = np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr))
            values = np.log1p(matrix.data / library[rows] * 1e4)
            for moment, weights in zip(
                moments, (np.ones(len(values)), values, values**2), strict=True
            ):
                moment += np.bincount(matrix.indices, weights=weights, minlength=num_genes)
    return moments


def _spool_source(
    building: Path,
    source: Source,
    parts: Sequence[Slice],
    places: NDArray[np.int64],
    num_genes: int,
    num_cells: int,
    config: StoreConfig,
) -> list[int]:
    """Align slices of one source, keep their cells in shuffle order; return how many were kept."""
    targets = [building / "spool" / part.name for part in parts]
    if not all(target.exists() for target in targets):
        with open_source(source) as cells:
            for part, target in zip(parts, targets, strict=True):
                if not target.exists():
                    _spool_slice(target, cells, part, places, num_genes, num_cells, config)
    return [len(np.load(target / "position.npy", mmap_mode="r")) for target in targets]


def _spool_slice(
    target: Path,
    cells: OpenSource,
    part: Slice,
    places: NDArray[np.int64],
    num_genes: int,
    num_cells: int,
    config: StoreConfig,
) -> None:
    """Align one slice and keep its cells in shuffle order."""
    raw = cells.counts(part.start, part.stop)
    in_source = raw.data.sum(dtype=np.float64)
    matrix = align_counts(raw, places, num_genes)
    del raw
    kept = np.flatnonzero(np.diff(matrix.indptr) >= config.min_genes)
    index = part.first + kept
    position = permute(index, num_cells, derive_key(config.seed, "store"))
    order = np.argsort(position)
    on_panel = matrix.data.sum(dtype=np.float64)  # of poor cells, too: it is said of the genes
    matrix = matrix[kept[order]]
    names = cells.cell_names(part.start, part.stop)[kept[order]]
    obs = {
        column: pd.Categorical(values[kept[order]])
        for column, values in cells.obs(part.start, part.stop).items()
    }
    _save_spool(
        target,
        {
            "same": {"source": cells.source.name, **dict(cells.source.labels)},
            "categories": {column: list(values.categories) for column, values in obs.items()},
        },
        position=position[order],
        row=part.start + kept[order],
        name=np.array([str(name).encode() for name in names], dtype=np.bytes_),
        indptr=matrix.indptr.astype(np.int64),
        indices=matrix.indices.astype(np.uint32),
        data=matrix.data.astype(np.uint32),
        counts=np.array([on_panel, in_source]),
        **{f"codes_{number}": values.codes for number, values in enumerate(obs.values())},
    )


def _write_part(
    building: Path,
    number: int,
    start: int,
    stop: int,
    slices: list[Slice],
    panel: GenePanel,
    columns: Sequence[str],
    config: StoreConfig,
) -> tuple[int, int]:
    """Write the part that takes positions [start, stop); return its cells and stored counts."""
    target = building / "parts" / f"dataset_{number}"
    note = target.with_suffix(".json")
    if note.exists():
        cells, counts = json.loads(note.read_text(encoding="utf-8"))
        return int(cells), int(counts)
    pieces = [_spooled(building / "spool" / part.name, start, stop, columns) for part in slices]
    position = np.concatenate([piece[0] for piece in pieces])
    order = np.argsort(position)
    matrix = sparse.vstack(
        [
            sparse.csr_matrix((data, indices, indptr), shape=(len(indptr) - 1, len(panel)))
            for _, _, indptr, indices, data in pieces
        ],
        format="csr",
    )[order]
    if len(position):
        obs = pd.concat([piece[1] for piece in pieces if len(piece[1])]).iloc[order]
        for column in ("source", *columns):
            obs[column] = obs[column].astype("category")
        sizes = ArraySizes(
            cells_per_chunk=config.cells_per_chunk, cells_per_shard=config.cells_per_shard
        )
        write_partition(target, matrix, obs, panel, sizes)
    write_json(note, [len(position), int(matrix.nnz)])
    return len(position), int(matrix.nnz)


def _spooled(
    folder: Path, start: int, stop: int, columns: Sequence[str]
) -> tuple[NDArray[np.int64], pd.DataFrame, NDArray[np.int64], NDArray[Any], NDArray[Any]]:
    """Cells of one spool with positions in [start, stop): position, obs, and CSR arrays."""
    array = {
        name: np.load(folder / f"{name}.npy", mmap_mode="r")
        for name in ("position", "row", "name", "indptr", "indices", "data")
    }
    low, high = np.searchsorted(array["position"], [start, stop])
    first, last = array["indptr"][low], array["indptr"][high]
    names = [bytes(name).decode() for name in array["name"][low:high]]
    texts = json.loads((folder / "obs.json").read_text(encoding="utf-8"))
    obs = pd.DataFrame(
        {"source": texts["same"]["source"], "source_row": np.asarray(array["row"][low:high])},
        index=pd.Index(names, dtype=object),
    )
    carried = list(texts["categories"])
    for column in columns:  # the same in all parts, whichever sources have cells there
        if column in carried:
            codes = np.load(folder / f"codes_{carried.index(column)}.npy", mmap_mode="r")[low:high]
            categories = np.array([*texts["categories"][column], None], object)
            obs[column] = pd.Series(categories[codes], obs.index, object)  # code -1 is missing
        else:
            obs[column] = pd.Series(texts["same"].get(column), obs.index, object)
    return (
        np.asarray(array["position"][low:high]),
        obs,
        np.asarray(array["indptr"][low : high + 1]) - first,
        np.asarray(array["indices"][first:last]),
        np.asarray(array["data"][first:last]),
    )


def _save_spool(target: Path, texts: dict[str, dict[str, Any]], **arrays: NDArray[Any]) -> None:
    """Save cells; `texts` has obs columns with one value, and the categories of the coded ones."""
    beside = target.with_name(target.name + ".part")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()  # without parents: a refused ingest has removed them
    (beside / "obs.json").write_text(json.dumps(texts), encoding="utf-8")
    for name, array in arrays.items():
        np.save(beside / f"{name}.npy", array, allow_pickle=False)
    beside.rename(target)


def _shares_of_counts(building: Path, slices: Sequence[Slice], num_sources: int) -> list[float]:
    """Share of each source's counts that fell on panel genes, from what the spools noted."""
    totals = np.zeros((num_sources, 2))
    for part in slices:  # whole numbers far below 2^53: exact in any order
        totals[part.source] += np.load(building / "spool" / part.name / "counts.npy")
    return [float(on_panel / max(1.0, counts)) for on_panel, counts in totals]


def _collect_parts(building: Path, written: list[tuple[int, int]]) -> Path:
    """Give the parts that hold cells consecutive numbers inside one folder."""
    folder = building / "store"
    (folder / RECORDS).mkdir(parents=True, exist_ok=True)
    filled = [number for number, (cells, _) in enumerate(written) if cells]
    for place, number in enumerate(filled):
        part = building / "parts" / f"dataset_{number}"
        if part.exists():
            part.rename(folder / f"dataset_{place}")
    return folder


def _publish(folder: Path, output: Path) -> None:
    """Put the whole store in its place; a former one goes only now."""
    former = output.with_name(output.name + ".former")
    if output.exists():
        shutil.rmtree(former, ignore_errors=True)  # what an interrupted publishing left
        output.rename(former)
    folder.rename(output)
    shutil.rmtree(former, ignore_errors=True)


def _start_or_continue(
    building: Path, sources: list[Source], config: StoreConfig, tables: GeneTables
) -> None:
    """Keep an earlier ingest's finished work if it had the same plan, else clear it."""
    panel_file = config.panel.file
    panel = list(read_panel(Path(panel_file)).names) if panel_file is not None else None
    knobs = asdict(config)
    for name in ("output", "workers", "scheduler", "overwrite", "skip_broken", "sources"):
        del knobs[name]  # these change where and how fast, not what
    plan = {
        "config": knobs,
        "panel": panel,
        "tables": dict(tables.digests),
        "sources": [[s.sha256, s.name, dict(s.labels)] for s in sources],
    }
    plan_file = building / "plan.json"
    if plan_file.exists() and json.loads(plan_file.read_text(encoding="utf-8")) == plan:
        log.info("continuing the unfinished ingest in %s", building)
        return
    for child in building.iterdir():
        if child.is_dir():
            shutil.rmtree(child)
    (building / "parts").mkdir()
    (building / "spool").mkdir()
    write_json(plan_file, plan)


def _obs_columns(sources: Sequence[Source], config: StoreConfig) -> list[str]:
    """Columns of obs besides source and row: from tables of sources, then from the sources."""
    labels = [name for source in sources for name, _ in source.labels]
    return [*sorted(set(labels)), *config.obs_columns]


def _slices(sources: list[Source], cells: int) -> list[Slice]:
    slices = []
    first = 0
    for number, source in enumerate(sources):
        edges = [*range(0, source.num_cells, cells), source.num_cells]
        slices += [Slice(number, a, b, first + a) for a, b in pairwise(edges)]
        first += source.num_cells
    return slices


def _refuse_repeats(sources: list[Source]) -> None:
    for former, latter in pairwise(sources):  # sorted by digest
        if former.sha256 == latter.sha256:
            raise ValueError(f"{former.path} and {latter.path} are the same file; name it once")
    paths: dict[str, str] = {}
    for source in sources:
        if source.name in paths:  # a cell is known by its source's name and its row
            raise ValueError(
                f"{paths[source.name]} and {source.path} have the same name; rename one of them, "
                "or link to it under another name"
            )
        paths[source.name] = source.path


def _source_lines(
    sources: Sequence[Source],
    slices: Sequence[Slice],
    spools: Sequence[int],
    lines: Sequence[Harmonization],
) -> list[dict[str, Any]]:
    """What the manifest keeps of each source."""
    kept = np.bincount([s.source for s in slices], weights=spools, minlength=len(sources))
    return [
        {
            "name": source.name,
            "generation": 0,
            "sha256": source.sha256,
            "cells": source.num_cells,
            "cells_kept": int(cells),
            "panel_genes_found": line.panel_genes_found,
            "genes": line.genes_in_source,
            "duplicate_genes_summed": line.duplicates_summed,
        }
        for source, cells, line in zip(sources, kept, lines, strict=True)
    ]


@contextmanager
def _workers(config: StoreConfig) -> Iterator[Compute]:
    """Yield `compute(title, tasks)`: run `(function, *arguments)` tasks through Dask, in order."""

    def local(title: str, tasks: Sequence[Task]) -> list[Any]:
        failures: list[Exception] = []
        # A bar on standard error when somebody watches.
        with tqdm(total=len(tasks), desc=title, unit="task", disable=None) as bar:

            def run(task: Task) -> Any:
                if failures:
                    return None
                try:
                    result = task[0](*task[1:])
                except Exception as error:
                    # Dask would return at once and leave the other threads writing.
                    failures.append(error)
                    return None
                bar.update()
                return result

            # partial keeps Dask from walking into the arguments in search of graph keys
            graph = [dask.delayed(partial(run, task), traverse=False)() for task in tasks]
            workers = config.workers or os.cpu_count() or 1
            results = list(dask.compute(*graph, scheduler="threads", num_workers=workers))
        if failures:
            raise failures[0]
        return results

    if config.scheduler is None:
        yield local
        return
    from dask.distributed import Client

    with Client(config.scheduler) as client:

        def remote(title: str, tasks: Sequence[Task]) -> list[Any]:
            futures = [client.submit(task[0], *task[1:], pure=False) for task in tasks]
            log.info("%s: %d tasks on %s", title, len(futures), config.scheduler)
            try:
                return list(client.gather(futures))
            except Exception:
                client.cancel(futures)
                raise

        yield remote


@contextmanager
def _locked(building: Path) -> Iterator[None]:
    """Let one ingest at a time into a folder, and clear it when the input was refused."""
    building.mkdir(parents=True, exist_ok=True)
    with (building / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise StoreFormatError(
                f"another ingest is writing {building}; wait for it, or choose another output"
            ) from error
        try:
            yield
        except (ValueError, FileNotFoundError):
            shutil.rmtree(building)  # another plan is needed: nothing here can be continued
            raise
