"""Raw files → cell store.

1. Scan (`scanning`): size, genes and digest of each source.
2. The panel is read, or made of the sources (`panel_choice`).
3. All cells are written as one generation (`generation`), in a folder beside the store
   (`work_folder`). Each finished piece is published there by a rename, so a killed ingest continues
   where it was.
4. Publish: panel, manifest, one rename.

A cell's place is a keyed permutation of (source digest order, row): the store's bytes depend
neither on the number of workers nor on restarts. `datastore.append` adds sources later.
"""

import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from datastore.config import StoreConfig
from datastore.gene_tables import GeneTables, read_tables
from datastore.generation import write_generation
from datastore.genes import read_panel
from datastore.panel_choice import choose_panel
from datastore.plan import Plan
from datastore.scanning import go_without, scan_sources, wants_processes
from datastore.sources import BrokenSource, BrokenSources
from datastore.store import MANIFEST, CellStore, open_store
from datastore.store_writing import write_manifest, write_root
from datastore.work_folder import (
    APPENDING,
    BUILDING,
    DECODED,
    clear,
    has_plan,
    is_whole,
    locked,
    output_folder,
    set_whole,
    start_or_continue,
)
from datastore.workers import Compute, workers


def build_store(config: StoreConfig) -> CellStore:
    """Build a store from raw files and open it.

    Raises:
        ValueError: If a source is not usable; all such are in the message, with the remedy.
        FileExistsError: If a store stands at the output and `overwrite` is off.
        OSError: If the disk is too small; what is finished is kept.
    """
    output = output_folder(config)
    with locked(output, BUILDING) as work, workers(config, wants_processes(config)) as compute:
        _restore_former(output)
        if not is_whole(work):
            _refuse_to_replace(output, config)
        tables = read_tables(config.panel)
        sources, left_out = scan_sources(config, compute, work / DECODED)
        plan = Plan(tuple(sources), config, config.seed)
        if not _published_already(work, plan, tables, output):
            _refuse_to_replace(output, config)
            while True:
                try:
                    _build(work, plan, left_out, tables, compute)
                    break
                except BrokenSources as found:
                    sources, left_out = go_without(found, list(plan.sources), left_out, config)
                    plan = replace(plan, sources=tuple(sources))
            _publish(work / "store", output)
        shutil.rmtree(_former(output), ignore_errors=True)
        clear(work)
    return open_store(output)


def _build(
    work: Path, plan: Plan, left_out: list[BrokenSource], tables: GeneTables, compute: Compute
) -> None:
    """Write a whole store inside `work`.

    Raises:
        BrokenSources: If some turn out to be unusable, after all have been looked at.
    """
    start_or_continue(work, plan, _identity(plan, tables))
    if is_whole(work):
        return
    panel = choose_panel(plan, tables, compute)
    made = write_generation(work, plan, panel, tables, plan.obs_columns, compute)
    write_root(work / "store", panel)
    write_manifest(
        work / "store",
        panel,
        made.partitions,
        made.num_counts,
        plan.seed,
        made.lines,
        [asdict(source) for source in left_out],
    )
    set_whole(work)


def _identity(plan: Plan, tables: GeneTables) -> dict[str, Any]:
    file = plan.config.panel.file
    panel = None if file is None else read_panel(Path(file)).names
    return plan.identity(panel, dict(tables.digests))


def _publish(folder: Path, output: Path) -> None:
    """Put the whole store in its place; a former one goes only now."""
    if output.exists():
        former = _former(output)
        for left in (former, output.with_name(output.name + APPENDING)):  # by killed ingests
            shutil.rmtree(left, ignore_errors=True)
        output.rename(former)
    folder.rename(output)


def _published_already(work: Path, plan: Plan, tables: GeneTables, output: Path) -> bool:
    """Tell whether just this store was published when its ingest was killed."""
    gone = not (work / "store").exists()
    return is_whole(work) and gone and output.exists() and has_plan(work, _identity(plan, tables))


def _restore_former(output: Path) -> None:
    """Put back the store that an ingest was about to replace when it was killed."""
    former = _former(output)
    if not output.exists() and (former / MANIFEST).is_file():
        former.rename(output)


def _former(output: Path) -> Path:
    return output.with_name(output.name + ".former")


def _refuse_to_replace(output: Path, config: StoreConfig) -> None:
    if not output.exists():
        return
    if not (output / MANIFEST).is_file():
        raise FileExistsError(
            f"{output} is not a cell store; move it away or choose another output"
        )
    if not config.overwrite:
        raise FileExistsError(
            f"{output} exists; choose another output, pass --overwrite true to replace it, or "
            "--append true to add to it"
        )
