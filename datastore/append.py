"""More sources for a store that is there already: a generation with partitions of its own.

The work is that of a new store (`datastore.ingest`), with the store's panel and seed and in the
folder `<store>.appending`. Then the new partitions move into the store, where nobody looks for
them before the manifest names them; the manifest is replaced last, by a rename. Whoever opened the
store before goes on reading what it was; nothing of that is touched.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from datastore.config import StoreConfig
from datastore.gene_tables import GeneTables, read_tables
from datastore.generation import Generation, write_generation
from datastore.genes import read_panel
from datastore.plan import Plan
from datastore.scanning import go_without, scan_sources, wants_processes
from datastore.sources import BrokenSource, BrokenSources, Source
from datastore.store import RECORDS, CellStore, open_store
from datastore.store_writing import write_manifest
from datastore.work_folder import (
    APPENDING,
    DECODED,
    clear,
    has_plan,
    locked,
    output_folder,
    start_or_continue,
)
from datastore.workers import Compute, workers


def append_store(config: StoreConfig) -> CellStore:
    """Add sources to the store at `config.output` and open it.

    Raises:
        ValueError: If a source is not usable, or in the store already.
        FileNotFoundError: If there is no store at the output.
        OSError: If the disk is too small; what is finished is kept.
    """
    output = output_folder(config)
    open_store(output)  # before anything is made beside it
    with locked(output, APPENDING) as work, workers(config, wants_processes(config)) as compute:
        store = open_store(output)
        _refuse_other_panel(store, config)
        tables = read_tables(config.panel)
        sources, left_out = scan_sources(config, compute, work / DECODED)
        plan = Plan(tuple(sources), config, store.header.seed, len(store.header.generations))
        if not _appended_already(work, plan, tables, store):
            _refuse_known(store, plan.sources)
            while True:
                try:
                    made = _write(work, plan, tables, store, compute)
                    break
                except BrokenSources as found:
                    sources, left_out = go_without(found, list(plan.sources), left_out, config)
                    plan = replace(plan, sources=tuple(sources))
            _publish(work / "store", store, made, left_out)
        clear(work)
    return open_store(output)


def _write(
    work: Path, plan: Plan, tables: GeneTables, store: CellStore, compute: Compute
) -> Generation:
    """Write a generation inside `work`.

    Raises:
        BrokenSources: If some turn out to be unusable, after all have been looked at.
    """
    if not start_or_continue(work, plan, _identity(plan, tables, store)):
        _remove_beyond_the_manifest(store)
    columns = list(dict.fromkeys([*_columns(store), *plan.obs_columns]))
    return write_generation(work, plan, store.panel, tables, columns, compute, store)


def _columns(store: CellStore) -> list[str]:
    """Columns of obs in the store, but for source and row: new partitions have them, too."""
    metadata = json.loads(store.partition_file(0, "obs/zarr.json"))
    names: list[str] = metadata["attributes"]["column-order"]
    return names[2:]


def _publish(
    folder: Path, store: CellStore, made: Generation, left_out: Sequence[BrokenSource]
) -> None:
    header = store.header
    first = len(header.partitions)
    partitions = [f"dataset_{first + place}" for place in range(len(made.partitions))]
    records = [f"{RECORDS}/{name}.json" for name in partitions]
    for name in [*partitions, *records, f"{RECORDS}/generation_{len(header.generations)}"]:
        target = store.path / name
        if (folder / name).exists():  # else a stopped append has moved it
            if target.is_dir():
                shutil.rmtree(target)
            (folder / name).rename(target)
    write_manifest(
        store.path,
        store.panel,
        [*header.partitions, *made.partitions],
        header.num_counts + made.num_counts,
        header.seed,
        [*header.sources, *made.lines],
        [*header.left_out, *(asdict(source) for source in left_out)],
        [*header.generations, sum(made.partitions)],
    )


def _remove_beyond_the_manifest(store: CellStore) -> None:
    """Remove what a killed append of another plan has moved into the store."""
    partitions, generations = len(store.header.partitions), len(store.header.generations)
    for folder, prefix, known in (
        (store.path, "dataset_", partitions),
        (store.path / RECORDS, "dataset_", partitions),
        (store.path / RECORDS, "generation_", generations),
    ):
        for child in folder.glob(f"{prefix}*"):
            number = child.name.removeprefix(prefix).removesuffix(".json")
            if number.isdecimal() and int(number) >= known:  # others are strays, and not ours
                shutil.rmtree(child) if child.is_dir() else child.unlink()


def _identity(plan: Plan, tables: GeneTables, store: CellStore) -> dict[str, Any]:
    """All that the generation depends on, and the part of the store that it comes after."""
    cells = sum(store.header.generations[: plan.generation])
    return {
        **plan.identity(store.panel.names, dict(tables.digests)),
        "after": {
            "partitions": int(np.searchsorted(store.partition_starts, cells)),
            "sources": [
                [line["name"], line["sha256"]]
                for line in store.header.sources
                if line["generation"] < plan.generation
            ],
        },
    }


def _appended_already(work: Path, plan: Plan, tables: GeneTables, store: CellStore) -> bool:
    """Tell whether just these sources were appended last when their ingest was killed."""
    last = replace(plan, generation=plan.generation - 1)
    return has_plan(work, _identity(last, tables, store))


def _refuse_other_panel(store: CellStore, config: StoreConfig) -> None:
    if config.panel.file is None:
        return
    if read_panel(Path(config.panel.file)).digest != store.panel.digest:
        raise ValueError(
            f"two panels: {config.panel.file} is not the panel of {store.path}; leave panel.file "
            "out, or build another store"
        )


def _refuse_known(store: CellStore, sources: Sequence[Source]) -> None:
    names = {line["name"]: line["sha256"] for line in store.header.sources}
    digests = {digest: name for name, digest in names.items()}
    for source in sources:
        if source.sha256 in digests:
            raise ValueError(
                f"{source.path} is in {store.path} already, as {digests[source.sha256]!r}; leave "
                "it out"
            )
        if source.name in names:
            raise ValueError(
                f"{store.path} has a source named {source.name!r} already; rename {source.path}, "
                "or link to it under another name"
            )
