"""A store holds every cell of its sources once, whoever builds it, however often it is killed."""

import fcntl
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest
from scipy import sparse

from datastore import align_pass, ingest, scanning, spool, store_writing, write_pass
from datastore.config import PanelConfig, StoreConfig
from datastore.ingest import build_store
from datastore.reader import CellReader
from datastore.scanning import wants_processes
from datastore.sources import OpenSource
from datastore.store import CellStore, StoreFormatError, open_store
from datastore.store_writing import write_manifest
from datastore.verification import verify_store
from tests.support.cells import (
    RawCells,
    Stop,
    align_by_hand,
    dense_store,
    expected_cells,
    file_bytes,
    gene_names,
    random_cells,
    store_config,
    stored_cells,
    stored_parts,
    three_sources,
    write_h5ad,
    write_sources,
)
from tests.support.killing import run_and_kill, seconds_of
from tests.support.raw_files import adata_of, write_10x_mtx, write_rdata, write_table

CELLS = three_sources()
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return write_sources(tmp_path_factory.mktemp("raw"), CELLS)


def assert_holds(built: CellStore, cells: list[RawCells], min_genes: int = 1) -> None:
    found = stored_cells(built)
    expected = expected_cells(cells, built.panel.names, min_genes)
    assert found.keys() == expected.keys()
    for cell, counts in expected.items():
        np.testing.assert_array_equal(found[cell], counts)
    assert built.num_cells == len(expected)
    assert built.header.num_counts == sum((counts > 0).sum() for counts in expected.values())


# --- what a store holds ---


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="three partitions"),
        pytest.param({"cells_per_partition": 1000}, id="one partition"),
        pytest.param({"cells_per_partition": 14, "cells_per_slice": 1000}, id="five partitions"),
        pytest.param(
            {"cells_per_slice": 1, "cells_per_partition": 50, "workers": 1}, id="a cell a slice"
        ),
        pytest.param({"min_genes": 13, "cells_per_partition": 50}, id="poor cells dropped"),
        pytest.param({"min_genes": 15, "cells_per_partition": 5}, id="partitions left empty"),
        pytest.param({"seed": 5, "cells_per_partition": 50}, id="another seed"),
    ],
)
def test_every_cell_is_stored_once_and_aligned(
    tmp_path: Path, sources: list[str], changes: dict[str, Any]
) -> None:
    built = build_store(store_config(sources, tmp_path / "s.zarr", **changes))
    assert_holds(built, CELLS, changes.get("min_genes", 1))
    assert min(built.header.partitions) > 0  # parts that no cell fell into are left out
    assert verify_store(built.path) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s.zarr"]


def test_anndata_opens_a_part_whole(store: CellStore) -> None:
    part = anndata.read_zarr(store.path / "dataset_0")
    assert part.shape == (store.header.partitions[0], len(store.panel))
    assert isinstance(part.X, sparse.csr_matrix)
    assert part.X.has_sorted_indices
    assert part.obs["source"].dtype == "category"
    assert part.obs_names.is_unique


def test_the_panel_is_every_gene_of_the_sources_once(sources: list[str], store: CellStore) -> None:
    genes = {gene for raw in CELLS for gene in raw.genes}
    assert set(store.panel.names) == genes
    assert len(store.panel) == len(genes)


def test_the_manifest_says_what_became_of_each_source(tmp_path: Path, sources: list[str]) -> None:
    built = build_store(store_config(sources, tmp_path / "s.zarr", min_genes=13, seed=3))
    lines = {line["name"]: line for line in built.header.sources}
    assert built.header.seed == 3
    for raw in CELLS:
        line = lines[raw.name]
        aligned = align_by_hand(raw, built.panel.names)
        assert line["cells"] == len(raw.counts)
        assert line["cells_kept"] == ((aligned > 0).sum(axis=1) >= 13).sum()
        assert line["panel_genes_found"] == len(set(raw.genes))
        assert line["duplicate_genes_summed"] == len(raw.genes) - len(set(raw.genes))


def test_cells_are_shuffled_over_the_store(tmp_path: Path) -> None:
    cells = [random_cells(name, seed, 300, gene_names(5)) for seed, name in enumerate("abcd")]
    orders = []
    for seed in (0, 1):
        sources = write_sources(tmp_path / f"raw{seed}", cells)
        config = store_config(sources, tmp_path / f"s{seed}.zarr", seed=seed, cells_per_slice=500)
        parts = stored_parts(build_store(replace(config, cells_per_partition=300)))
        for part in parts:  # each source has a quarter of each part: 75, standard deviation 6.5
            assert part.obs["source"].value_counts().between(75 - 30, 75 + 30).all()
        orders.append([name for part in parts for name in part.obs_names])
    # Seeds give other orders of the same cells (all have a gene with share 1 - 0.6^5 = 92 %).
    assert sorted(orders[0]) == sorted(orders[1])
    assert np.mean([a == b for a, b in zip(*orders, strict=True)]) < 0.02


def test_counts_above_16_bits_survive(tmp_path: Path) -> None:
    raw = random_cells("big", 0, 40, gene_names(8))
    raw.counts[7, 3], raw.counts[8, 3], raw.counts[9, 3] = 65_535, 65_536, 16_777_216
    built = build_store(store_config([str(write_h5ad(tmp_path, raw))], tmp_path / "s.zarr"))
    assert_holds(built, [raw])
    wide = 0
    for part in stored_parts(built):
        assert part.X.dtype == (np.uint16 if part.X.max() <= 65_535 else np.uint32)
        wide += part.X.dtype == np.uint32
    assert wide > 0


def test_sums_of_duplicate_genes_outgrow_the_files_number_type(tmp_path: Path) -> None:
    raw = RawCells("small", np.full((10, 4), 200), ("A", "B", "A", "A"))
    with pytest.warns(UserWarning, match="Variable names are not unique"):
        path = write_h5ad(tmp_path, raw, sparse.csr_matrix(raw.counts.astype(np.uint8)))
    built = build_store(store_config([str(path)], tmp_path / "s.zarr"))
    np.testing.assert_array_equal(dense_store(built), np.tile([600, 200], (10, 1)))


def test_an_archive_holds_the_same_for_all_readers(
    tmp_path: Path, sources: list[str], store: CellStore
) -> None:
    archive = build_store(store_config(sources, tmp_path / "s.zarr", codec="archive"))
    assert archive.header.partitions == store.header.partitions
    np.testing.assert_array_equal(dense_store(archive), dense_store(store))  # by anndata
    everything = np.arange(store.num_cells)
    found, expected = (CellReader(of).read(everything) for of in (archive, store))
    np.testing.assert_array_equal(found.indptr, expected.indptr)
    np.testing.assert_array_equal(found.genes, expected.genes)
    np.testing.assert_array_equal(found.counts, expected.counts)
    assert verify_store(archive.path) == []
    codecs = (archive.path / "dataset_0" / "X" / "data" / "zarr.json").read_text()
    assert '"zstd"' in codecs
    assert '"crc32c"' in codecs


def test_a_layer_is_taken_in_place_of_x(tmp_path: Path) -> None:
    raw = random_cells("layered", 0, 20, gene_names(8))
    path = write_h5ad(tmp_path, raw, np.log1p(raw.counts), layer="counts")
    built = build_store(store_config([str(path)], tmp_path / "s.zarr", layer="counts"))
    assert_holds(built, [raw])


# --- the panel ---


def test_a_panel_file_sets_genes_and_order(tmp_path: Path, sources: list[str]) -> None:
    names = ["G9", "NOWHERE", "G2", "ONLY_BETA", "G20", "G7"]
    (tmp_path / "genes.txt").write_text("\n".join(names))
    panel = PanelConfig(file=str(tmp_path / "genes.txt"))
    built = build_store(store_config(sources, tmp_path / "s.zarr", panel=panel))
    assert built.panel.names == tuple(names)
    assert_holds(built, CELLS)


@pytest.mark.parametrize("rank_by", ["variance", "detection"])
@pytest.mark.parametrize("size", [2, 12, 1000])
def test_a_panel_by_rank_equals_numpy(
    tmp_path: Path, sources: list[str], store: CellStore, rank_by: Any, size: int
) -> None:
    panel = PanelConfig(size=size, rank_by=rank_by, min_share_found=0.0)
    config = store_config(sources, tmp_path / "s.zarr", panel=panel, cells_per_partition=100)
    built = build_store(config)
    names = store.panel.names  # all genes of the same sources
    dense = np.concatenate([align_by_hand(raw, names) for raw in CELLS])
    if rank_by == "detection":
        score = (dense > 0).mean(axis=0)
    else:
        library = np.maximum(dense.sum(axis=1, keepdims=True), 1)
        score = np.log1p(dense / library * 1e4).var(axis=0)
    best = sorted(range(len(names)), key=lambda gene: (-score[gene], gene))[:size]
    assert built.panel.names == tuple(names[gene] for gene in sorted(best))
    assert_holds(built, CELLS)


# --- the same bytes ---


def test_workers_and_places_do_not_change_a_byte(
    tmp_path: Path, sources: list[str], store: CellStore
) -> None:
    for number, workers in enumerate((1, 2, 3)):
        raw = tmp_path / f"raw{number}"
        raw.mkdir()
        moved = [str(shutil.copy(path, raw)) for path in sources[::-1] if workers > 1]
        config = store_config(moved or sources, tmp_path / f"s{number}.zarr", workers=workers)
        built = build_store(config)
        assert built.header.store_id == store.header.store_id
        assert file_bytes(built.path) == file_bytes(store.path)


@pytest.mark.multiprocess
def test_processes_build_the_same_store_and_leave_as_little(
    tmp_path: Path, sources: list[str], store: CellStore
) -> None:
    config = store_config(sources, tmp_path / "s.zarr", processes=True)
    assert file_bytes(build_store(config).path) == file_bytes(store.path)
    bad = replace(bad_value(tmp_path), processes=True, output=str(tmp_path / "t.zarr"))
    with pytest.raises(ValueError, match=r"bad\.h5ad.*not whole"):
        build_store(bad)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.h5ad", "good.h5ad", "s.zarr"]


def test_processes_are_for_large_sources(tmp_path: Path, sources: list[str]) -> None:
    config = store_config(sources, tmp_path / "s.zarr")
    assert not wants_processes(config)
    assert wants_processes(replace(config, processes=True))
    large = tmp_path / "large.h5ad"
    large.write_bytes(Path(sources[0]).read_bytes())
    with large.open("r+b") as file:
        file.truncate(70_000_000)
    config = replace(config, sources=[*sources, str(large)])
    assert wants_processes(config)
    assert not wants_processes(replace(config, processes=False))


def test_relative_paths_are_as_good(
    tmp_path: Path, sources: list[str], store: CellStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(sources[0]).parent)
    output = Path(os.path.relpath(tmp_path / "s.zarr"))
    built = build_store(store_config(["*.h5ad"], output))
    assert built.header.store_id == store.header.store_id
    assert (tmp_path / "s.zarr" / "manifest.json").is_file()


def test_a_dask_cluster_builds_the_same_store(
    tmp_path: Path, sources: list[str], store: CellStore
) -> None:
    from dask.distributed import LocalCluster

    with LocalCluster(
        n_workers=1,
        threads_per_worker=2,
        processes=False,
        protocol="tcp://",
        dashboard_address=":0",
    ) as cluster:
        assert cluster.scheduler_address.startswith("tcp://")
        scheduler = cluster.scheduler_address
        config = store_config(sources, tmp_path / "s.zarr", scheduler=scheduler)
        assert file_bytes(build_store(config).path) == file_bytes(store.path)
        refused = store_config(sources, tmp_path / "t.zarr", scheduler=scheduler, min_genes=100)
        with pytest.raises(ValueError, match="lower min_genes"):
            build_store(refused)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s.zarr"]


# --- restarts ---


@pytest.mark.parametrize(
    ("module", "name", "at", "calls_per_build"),
    [
        pytest.param(align_pass, "write_spool", 1, 9, id="at the first slice"),
        pytest.param(align_pass, "write_spool", 6, 9, id="among the slices"),
        pytest.param(write_pass, "stream_partition", 1, 3, id="at the first part"),
        pytest.param(write_pass, "stream_partition", 3, 3, id="at the last part"),
        pytest.param(store_writing, "ShardedArray", 5, 9, id="within a part"),
        pytest.param(ingest, "write_manifest", 1, 1, id="before the manifest"),
        pytest.param(ingest, "_publish", 1, 1, id="before publishing"),
    ],
)
def test_a_stopped_ingest_continues_to_the_same_store(
    tmp_path: Path,
    sources: list[str],
    store: CellStore,
    monkeypatch: pytest.MonkeyPatch,
    module: Any,
    name: str,
    at: int,
    calls_per_build: int,
) -> None:
    config = store_config(sources, tmp_path / "s.zarr", workers=1)
    stop = Stop(monkeypatch, module, name)
    stop.at = at
    with pytest.raises(OSError, match="the disk is full"):
        build_store(config)
    assert [path.name for path in tmp_path.iterdir()] == ["s.zarr.building"]
    assert stop.calls == at
    built = build_store(replace(config, workers=2))
    assert file_bytes(built.path) == file_bytes(store.path)
    assert [path.name for path in tmp_path.iterdir()] == ["s.zarr"]
    # Finished pieces are kept; only a part that was half written is written whole again.
    again = at % 3 if name == "ShardedArray" else 1
    assert stop.calls == calls_per_build + again


def test_a_changed_plan_begins_anew(
    tmp_path: Path, sources: list[str], store: CellStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = Stop(monkeypatch, write_pass, "stream_partition")
    stop.at = 2
    with pytest.raises(OSError, match="the disk is full"):
        build_store(store_config(sources, tmp_path / "s.zarr", seed=1, workers=1))
    built = build_store(store_config(sources, tmp_path / "s.zarr", workers=1))
    assert stop.calls == 2 + 3
    assert file_bytes(built.path) == file_bytes(store.path)


KILLED = """
import os, signal, sys
from datastore import ingest, store_writing
from tests.support.cells import store_config

close, calls = store_writing.ShardedArray.close, []

def close_and_die(array):
    calls.append(1)
    close(array)
    if len(calls) == 5:
        os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    store_writing.ShardedArray.close = close_and_die
    ingest.build_store(store_config(sys.argv[2:], sys.argv[1], workers=1))
"""


@pytest.mark.multiprocess
def test_a_killed_process_leaves_work_that_is_continued(
    tmp_path: Path, sources: list[str], store: CellStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "s.zarr"
    killed = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", KILLED, str(output), *sources],
        cwd=ROOT,
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert not output.exists()
    spooled = Stop(monkeypatch, align_pass, "write_spool")
    written = Stop(monkeypatch, write_pass, "stream_partition")
    built = build_store(store_config(sources, output))
    assert (spooled.calls, written.calls) == (0, 2)
    assert file_bytes(built.path) == file_bytes(store.path)


# --- many kinds of sources, what is known of them, broken ones ---


def mixed_sources(folder: Path) -> tuple[list[RawCells], Path]:
    """Four kinds of file, listed in a table with labels."""
    genes = ["ACTB", *gene_names(9)]
    cells = [random_cells(name, seed, 11, genes) for seed, name in enumerate("abcd")]
    adata = adata_of(cells[0])
    adata.obs["cell_type"] = np.resize(["T", "B"], 11)
    adata.write_h5ad(folder / "a.h5ad")
    write_rdata(folder / "b.sparse.RData", cells[1])
    write_10x_mtx(folder / "matrices", cells[2], 3)
    write_table(folder / "d.csv.gz", cells[3], True)
    table = folder / "samples.tsv"
    table.write_text(
        "path\tname\ttissue\tsample\na.h5ad\t\tlung\ts1\nb.sparse.RData\t\tliver\t\n"
        "matrices\tc\tlung\ts3\nd.csv.gz\t\t\ts4\n"
    )
    return cells, table


def test_sources_of_many_kinds_with_labels_make_one_store(tmp_path: Path) -> None:
    cells, table = mixed_sources(tmp_path)
    config = store_config([str(table)], tmp_path / "s.zarr", obs_columns=["cell_type"])
    built = build_store(replace(config, panel=PanelConfig(size=8), cells_per_partition=6))
    assert len(stored_parts(built)) == 8
    config = replace(config, cells_per_partition=6, overwrite=True)
    built = build_store(config)
    assert_holds(built, cells)
    expected = {
        "a": ("lung", "s1"),
        "b": ("liver", None),
        "c": ("lung", "s3"),
        "d": (None, "s4"),
    }
    seen = []
    for part in stored_parts(built):
        assert list(part.obs) == ["source", "source_row", "sample", "tissue", "cell_type"]
        assert (part.obs.dtypes.drop("source_row") == "category").all()
        obs = part.obs.astype(object).where(part.obs.notna(), None)
        for source, row, sample, tissue, cell_type in obs.itertuples(index=False):
            assert (tissue, sample) == expected[source]
            assert cell_type == (["T", "B"][row % 2] if source == "a" else None)
            seen.append(source)
    assert len(seen) == built.num_cells > 40
    # A source alone, in one slice and in many, is read to the same bytes.
    again = build_store(replace(config, output=str(tmp_path / "t.zarr"), cells_per_slice=3))
    assert file_bytes(again.path) == file_bytes(built.path)


def broken_sources(folder: Path) -> tuple[list[RawCells], list[str]]:
    """Two good sources; one truncated, one missing, one negative, one of other genes."""
    good = [random_cells(name, seed, 12, gene_names(9)) for seed, name in enumerate(("g1", "g2"))]
    paths = write_sources(folder, good)
    cut = write_h5ad(folder, random_cells("cut", 4, 12, gene_names(9)))
    cut.write_bytes(cut.read_bytes()[:-400])
    negative = random_cells("negative", 5, 12, gene_names(9))
    negative.counts[11, 3] = -1
    foreign = random_cells("foreign", 6, 12, [f"X{place}" for place in range(9)])
    paths += [str(cut), str(folder / "absent.h5ad"), *write_sources(folder, [negative, foreign])]
    (folder / "panel.txt").write_text("\n".join(gene_names(9)))
    return good, paths


def test_every_broken_source_is_named_at_once(tmp_path: Path) -> None:
    _, paths = broken_sources(tmp_path)
    panel = PanelConfig(file=str(tmp_path / "panel.txt"))
    config = store_config(paths, tmp_path / "s.zarr", panel=panel)
    with pytest.raises(ValueError, match="3 sources cannot be used") as refusal:
        build_store(config)
    assert re.search(r"cut\.h5ad .*absent\.h5ad.*negative\.h5ad", str(refusal.value), re.DOTALL)
    assert "--skip_broken true goes on without" in str(refusal.value)
    assert not list(tmp_path.glob("s.zarr*"))


@pytest.mark.parametrize("first_cells", [1, 512])  # found late, in the midst of the work, or early
@pytest.mark.parametrize("panel_from", ["file", "variance"])
def test_broken_sources_are_skipped_when_asked(
    tmp_path: Path, panel_from: str, first_cells: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scanning, "_FIRST_CELLS", first_cells)
    good, paths = broken_sources(tmp_path)
    panel = PanelConfig(file=str(tmp_path / "panel.txt"))
    if panel_from == "variance":  # values are read before there is a panel
        panel = PanelConfig(size=6)
        paths = paths[:-1]
    config = store_config(paths, tmp_path / "s.zarr", panel=panel, skip_broken=True)
    built = build_store(config)
    assert_holds(built, good)
    assert verify_store(built.path) == []
    left_out = {Path(line["path"]).stem: line["reason"] for line in built.header.left_out}
    expected = {"cut": "cut short", "absent": "no such file", "negative": "negative value"}
    if panel_from == "file":
        expected["foreign"] = "0 of 9 panel genes"
    assert left_out.keys() == expected.keys()
    assert all(expected[name] in reason for name, reason in left_out.items())
    assert open_store(built.path).header == built.header
    # The same bytes as from the good ones alone.
    alone = build_store(store_config(paths[:2], tmp_path / "alone.zarr", panel=panel))
    assert alone.header.store_id == built.header.store_id
    assert alone.header.left_out == ()


def test_a_source_of_two_species_is_skipped_when_asked(tmp_path: Path) -> None:
    good = random_cells("good", 0, 12, [f"ENSG{place:011d}" for place in range(9)])
    both = [f"{'ENSG' if place % 2 else 'ENSMUSG'}{place:011d}" for place in range(9)]
    paths = write_sources(tmp_path, [good, random_cells("both", 1, 12, both)])
    config = store_config(paths, tmp_path / "s.zarr")
    with pytest.raises(ValueError, match=r"both\.h5ad mixes species: .*; --skip_broken true goes"):
        build_store(config)
    built = build_store(replace(config, skip_broken=True))
    assert_holds(built, [good])
    (line,) = built.header.left_out
    assert "mixes species" in line["reason"]


def test_no_usable_source_is_an_error_even_when_skipping(tmp_path: Path) -> None:
    config = store_config([str(tmp_path / "x.h5ad")], tmp_path / "s.zarr", skip_broken=True)
    with pytest.raises(ValueError, match=r"no such file: .*x\.h5ad$"):
        build_store(config)


def test_obs_columns_that_no_source_has_are_refused(tmp_path: Path) -> None:
    _, table = mixed_sources(tmp_path)
    for column, message in (("celltype", "no source has"), ("tissue", "comes from the table")):
        with pytest.raises(ValueError, match=rf"obs_columns: .*{column}.*|obs_columns: {message}"):
            build_store(store_config([str(table)], tmp_path / "s.zarr", obs_columns=[column]))


# --- refusals ---


def bad_value(folder: Path) -> StoreConfig:
    good, bad = (random_cells(name, 0, 40, gene_names(9)) for name in ("good", "bad"))
    values = bad.counts.astype(np.float32)
    values[33, 2] = 0.5
    paths = [write_h5ad(folder, good), write_h5ad(folder, bad, values)]
    return store_config([str(path) for path in paths], folder / "s.zarr")


def same_file(folder: Path) -> StoreConfig:
    path = write_h5ad(folder, random_cells("a", 0, 20, gene_names(9)))
    shutil.copy(path, folder / "b.h5ad")
    return store_config([str(folder)], folder / "s.zarr")


def same_name(folder: Path) -> StoreConfig:
    paths = [
        write_h5ad(folder / part, random_cells("cells", seed, 20, gene_names(9)))
        for seed, part in enumerate(("one", "two"))
    ]
    return store_config([str(path) for path in paths], folder / "s.zarr")


def other_genes(folder: Path) -> StoreConfig:
    path = write_h5ad(folder, random_cells("a", 0, 20, gene_names(9)))
    (folder / "panel.txt").write_text("\n".join(f"ENSG{place:011d}" for place in range(9)))
    panel = PanelConfig(file=str(folder / "panel.txt"))
    return store_config([str(path)], folder / "s.zarr", panel=panel)


def binary_panel(folder: Path) -> StoreConfig:
    path = write_h5ad(folder, random_cells("a", 0, 20, gene_names(9)))
    panel = PanelConfig(file=str(path))
    return store_config([str(path)], folder / "s.zarr", panel=panel)


def missing_panel(folder: Path) -> StoreConfig:
    path = write_h5ad(folder, random_cells("a", 0, 20, gene_names(9)))
    panel = PanelConfig(file=str(folder / "absent.txt"))
    return store_config([str(path)], folder / "s.zarr", panel=panel)


def poor_cells(folder: Path) -> StoreConfig:
    path = write_h5ad(folder, random_cells("a", 0, 20, gene_names(9)))
    return store_config([str(path)], folder / "s.zarr", min_genes=10)


def odd_gene(folder: Path) -> StoreConfig:
    path = write_h5ad(folder, random_cells("a", 0, 20, ["G1", "G\u20282", "G3"]))
    return store_config([str(path)], folder / "s.zarr")


def missing_source(folder: Path) -> StoreConfig:
    return store_config([str(folder / "absent.h5ad")], folder / "s.zarr")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (bad_value, r"bad\.h5ad, X holds a value that is not whole \(0\.5, row 33, column 2\)"),
        (same_file, r"a\.h5ad and .*b\.h5ad are the same file; name it once"),
        (same_name, r"cells\.h5ad and .*cells\.h5ad have the same name; rename one"),
        (other_genes, r"a\.h5ad: only 0 of 9 panel genes .*put Ensembl ids into var_names"),
        (binary_panel, r"a\.h5ad is not a text file; a panel has one gene name per line"),
        (missing_panel, r"absent\.txt"),
        (poor_cells, r"no cell has 10 expressed panel genes or more; lower min_genes"),
        (odd_gene, r"the gene panel has the name 'G.*line break"),
        (missing_source, r"no such file: .*absent\.h5ad"),
    ],
)
@pytest.mark.parametrize("workers", [1, 2])
def test_a_refused_input_leaves_nothing_behind(
    tmp_path: Path, make: Callable[[Path], StoreConfig], message: str, workers: int
) -> None:
    config = replace(make(tmp_path), workers=workers)
    before = file_bytes(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=re.compile(message, re.DOTALL)):
        build_store(config)
    assert file_bytes(tmp_path) == before
    assert not list(tmp_path.glob("s.zarr*"))


def test_a_refusal_waits_for_the_other_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(bad_value(tmp_path), cells_per_slice=40, workers=2)
    save = spool.write_spool
    started, saved = threading.Event(), []

    def slow_save(*arguments: Any) -> None:
        started.set()
        time.sleep(0.5)
        save(*arguments)
        saved.append(1)

    read = OpenSource.counts

    def read_after_other(cells: OpenSource, start: int, stop: int) -> Any:
        if cells.source.name == "bad":
            started.wait(20)
        return read(cells, start, stop)

    monkeypatch.setattr(scanning, "_FIRST_CELLS", 1)  # so that the bad value is found later
    monkeypatch.setattr(align_pass, "write_spool", slow_save)
    monkeypatch.setattr(OpenSource, "counts", read_after_other)
    with pytest.raises(ValueError, match="not whole"):
        build_store(config)
    assert saved == [1]
    assert not list(tmp_path.glob("s.zarr*"))


def test_a_store_is_replaced_only_when_asked_and_when_the_new_one_is_whole(
    tmp_path: Path, sources: list[str]
) -> None:
    config = store_config(sources, tmp_path / "s.zarr")
    first = build_store(config)
    with pytest.raises(FileExistsError, match=r"s\.zarr exists; .*--overwrite true"):
        build_store(replace(config, seed=1))
    with pytest.raises(ValueError, match="lower min_genes"):
        build_store(replace(config, min_genes=1000, overwrite=True))
    assert open_store(first.path).header == first.header
    (tmp_path / "s.zarr.former").mkdir()  # what a killed publishing leaves
    (tmp_path / "s.zarr.former" / "manifest.json").touch()
    second = build_store(replace(config, seed=1, overwrite=True))
    assert second.header.store_id != first.header.store_id
    assert second.header.seed == 1
    assert [path.name for path in tmp_path.iterdir()] == ["s.zarr"]


def test_a_store_behind_a_link_is_replaced_and_the_link_stays(
    tmp_path: Path, sources: list[str]
) -> None:
    link = tmp_path / "link.zarr"
    link.symlink_to(tmp_path / "s.zarr")
    for seed in range(3):
        build_store(store_config(sources, link, seed=seed, overwrite=True))
        assert link.is_symlink()
        assert open_store(tmp_path / "s.zarr").header.seed == seed
        assert {path.name for path in tmp_path.iterdir()} == {"link.zarr", "s.zarr"}


def test_a_folder_that_is_no_store_is_never_replaced(tmp_path: Path, sources: list[str]) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.tex").touch()
    with pytest.raises(FileExistsError, match="home is not a cell store; move it away"):
        build_store(store_config(sources, home, overwrite=True))
    assert (home / "thesis.tex").exists()


def test_two_ingests_at_once_are_refused(
    tmp_path: Path, sources: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = store_config(sources, tmp_path / "s.zarr")
    building = tmp_path / "s.zarr.building"
    building.mkdir()
    with (building / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(
            StoreFormatError, match=r"another ingest is writing .*s\.zarr\.building"
        ):
            build_store(config)
        assert building.is_dir()
    # And the ingest itself holds that lock while it works.

    def try_again(*arguments: Any) -> Any:
        with pytest.raises(StoreFormatError, match="another ingest"):
            build_store(config)
        return write_manifest(*arguments)

    monkeypatch.setattr(ingest, "write_manifest", try_again)
    assert build_store(config).num_cells == 70


def test_the_plan_is_plain_text_while_an_ingest_is_stopped(
    tmp_path: Path, sources: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Stop(monkeypatch, write_pass, "stream_partition").at = 1
    with pytest.raises(OSError, match="the disk is full"):
        build_store(store_config(sources, tmp_path / "s.zarr", workers=1))
    plan = json.loads((tmp_path / "s.zarr.building" / "plan.json").read_text())
    assert sorted(name for _, name, _ in plan["sources"]) == ["alpha", "beta", "gamma"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        pytest.param({"sources": []}, "sources is empty", id="no sources"),
        pytest.param({"obs_columns": ["source"]}, "obs_columns has 'source'", id="own column"),
        pytest.param({"obs_columns": ["a", "a"]}, "obs_columns has 'a': twice", id="column twice"),
        pytest.param({"min_genes": 0}, "min_genes is 0", id="no gene"),
        pytest.param({"workers": 0}, "workers is 0", id="no workers"),
        pytest.param({"cells_per_slice": 0}, r"cells_per_\* must all be 1", id="empty slices"),
    ],
)
def test_unusable_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StoreConfig(**{"sources": ["a.h5ad"], "output": "s.zarr", **settings})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        pytest.param({"size": 1}, "panel.size is 1; give 2", id="one gene"),
        pytest.param({"size": 5, "file": "g.txt"}, "exclude each other", id="size and file"),
        pytest.param({"min_share_found": 30.0}, "share from 0 to 1", id="percent"),
    ],
)
def test_unusable_panels_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PanelConfig(**settings)


# --- kill -9 ---


@pytest.mark.slow
@pytest.mark.multiprocess
def test_an_ingest_killed_at_random_moments_ends_in_the_same_store(
    tmp_path: Path, sources: list[str], store: CellStore
) -> None:
    expected = file_bytes(store.path)
    config = store_config(sources, tmp_path / "s.zarr")
    seconds = seconds_of(build_store, config)
    rng = random.Random(0)
    kills = 0
    while kills < 20:
        shutil.rmtree(tmp_path / "s.zarr")
        workers = 1
        while not run_and_kill(
            build_store, replace(config, workers=workers), after=rng.uniform(0, 1.2) * seconds
        ):
            kills += 1
            workers = 3 - workers
        assert file_bytes(tmp_path / "s.zarr") == expected
        assert [path.name for path in tmp_path.iterdir()] == ["s.zarr"]


@pytest.mark.slow
@pytest.mark.multiprocess
def test_processes_whose_leader_is_killed_end_in_the_same_store(
    tmp_path: Path, sources: list[str], store: CellStore
) -> None:
    config = store_config(sources, tmp_path / "s.zarr", processes=True)
    seconds = seconds_of(build_store, config)
    rng = random.Random(1)
    kills = 0
    while kills < 4:
        shutil.rmtree(tmp_path / "s.zarr")
        before = kills
        # Its server of processes imports first, for most of the time, and at each attempt again: on
        # a machine that has become slower none would end without more time for each, and on one
        # that has become quicker none would be killed without less.
        while not run_and_kill(build_store, config, after=rng.uniform(0.6, 1.1) * seconds):
            kills += 1
            seconds *= 1.1
        if kills == before:
            seconds *= 0.8
        assert file_bytes(tmp_path / "s.zarr") == file_bytes(store.path)
        assert [path.name for path in tmp_path.iterdir()] == ["s.zarr"]
