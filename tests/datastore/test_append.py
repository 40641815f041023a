"""Appending adds a generation, changes nothing that was there, and survives being killed."""

import random
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest

from datastore import append, store_writing, write_pass
from datastore.append import append_store
from datastore.config import PanelConfig, StoreConfig
from datastore.ingest import build_store
from datastore.measured import MeasuredGenes
from datastore.reader import CellReader
from datastore.store import CellStore, StoreFormatError, open_store
from datastore.verification import verify_store
from tests.support.cells import (
    RawCells,
    Stop,
    dense_store,
    expected_cells,
    file_bytes,
    gene_names,
    random_cells,
    store_config,
    stored_cells,
    stored_parts,
    three_sources,
    write_files,
    write_sources,
)
from tests.support.killing import run_and_kill, seconds_of

FIRST = three_sources()
MORE = [
    random_cells("delta", 11, 33, gene_names(30)[::-1]),
    random_cells("epsilon", 12, 21, [*gene_names(25), "UNKNOWN"]),
]


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> list[list[str]]:
    """Files of the first generation, of the second, and of a third."""
    folder = tmp_path_factory.mktemp("raw")
    third = [random_cells("zeta", 13, 12, gene_names(30))]
    return [write_sources(folder, cells) for cells in (FIRST, MORE, third)]


@pytest.fixture
def base(raw: list[list[str]], tmp_path: Path) -> CellStore:
    return build_store(store_config(raw[0], tmp_path / "s.zarr", seed=7))


@pytest.fixture(scope="module")
def expected(raw: list[list[str]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a store that was built, and appended to once, without a stop."""
    output = tmp_path_factory.mktemp("expected") / "s.zarr"
    build_store(store_config(raw[0], output, seed=7))
    append_store(appending(raw[1], output))
    return file_bytes(output)


def appending(sources: list[str], output: Path, **changes: Any) -> StoreConfig:
    return store_config(sources, output, append=True, **changes)


def test_a_generation_is_added_and_nothing_else_changes(
    base: CellStore, raw: list[list[str]], tmp_path: Path
) -> None:
    before = file_bytes(base.path)
    reader = CellReader(base)
    position = np.arange(base.num_cells)
    cells = reader.read(position)
    grown = append_store(appending(raw[1], base.path))
    after = file_bytes(base.path)
    assert {name for name in before if after[name] != before[name]} == {"manifest.json"}
    added = {name.split("/")[0] for name in after.keys() - before.keys()}
    assert added == {"dataset_3", "dataset_4", "dataset_5", "records"}
    assert [path.name for path in tmp_path.iterdir()] == ["s.zarr"]
    assert verify_store(grown.path) == []

    found = stored_cells(grown)
    wanted = expected_cells([*FIRST, *MORE], grown.panel.names)
    assert found.keys() == wanted.keys()
    assert all((found[cell] == wanted[cell]).all() for cell in wanted)
    header = grown.header
    assert header.generations == (70, 54)
    assert header.num_cells == sum(header.partitions) == 124
    assert header.num_counts == sum((counts > 0).sum() for counts in wanted.values())
    assert header.seed == 7
    by_name = {line["name"]: line["generation"] for line in header.sources}
    assert by_name == {"alpha": 0, "beta": 0, "gamma": 0, "delta": 1, "epsilon": 1}
    assert not grown.measured("epsilon")[grown.panel.positions["G28"]]
    assert grown.measured("delta")[grown.panel.positions["G28"]]
    sources = [name for part in stored_parts(grown) for name in part.obs["source"]]
    of_cells = MeasuredGenes(grown)(np.arange(124)[::-1])
    np.testing.assert_array_equal(of_cells, [grown.measured(name) for name in sources[::-1]])
    # A reader that was open before reads on; positions of old cells are what they were.
    np.testing.assert_array_equal(reader.read(position).counts, cells.counts)
    np.testing.assert_array_equal(dense_store(grown)[:70], dense_store(base))


@pytest.mark.slow
def test_each_generation_has_an_order_of_its_own(raw: list[list[str]], tmp_path: Path) -> None:
    """Two sets of equally many cells get other places, and other seeds other places again."""
    rows = []
    genes = gene_names(9)
    for extra, name in enumerate(("one", "two")):
        cells = RawCells(name, extra + np.arange(1, 401)[:, None] + np.arange(9), tuple(genes))
        rows.append(write_sources(tmp_path / name, [cells]))
    orders = []
    for seed in (0, 1):
        output = tmp_path / f"s{seed}.zarr"
        settings = {"seed": seed, "cells_per_partition": 1000, "duplicates": "keep"}
        build_store(store_config(rows[0], output, **settings))
        store = append_store(appending(rows[1], output, duplicates="keep"))
        for number in range(len(store.header.partitions)):
            part = anndata.read_zarr(store.partition_path(number))
            orders.append(part.obs["source_row"].to_numpy())
    sorted_rows = [np.concatenate(orders[1:17]), np.concatenate(orders[18:])]
    assert [len(part) for part in sorted_rows] == [400, 400]
    firsts = [orders[0], sorted_rows[0], orders[17], sorted_rows[1]]
    for a in range(4):
        assert sorted(firsts[a]) == list(range(400))
        for b in range(a):
            assert (firsts[a] == firsts[b]).mean() < 0.02  # 1 of 400 is expected


def test_generations_follow_each_other(base: CellStore, raw: list[list[str]]) -> None:
    append_store(appending(raw[1], base.path))
    store = append_store(appending(raw[2], base.path))
    assert store.header.generations == (70, 54, 12)
    assert {line["generation"] for line in store.header.sources} == {0, 1, 2}
    assert store.measured("zeta").all() or not store.measured("zeta")[-1]
    assert verify_store(store.path) == []


@pytest.mark.parametrize(
    ("module", "name", "at"),
    [
        pytest.param(write_pass, "stream_partition", 2, id="among the partitions"),
        pytest.param(append, "_publish", 1, id="before publishing"),
        pytest.param(append, "write_manifest", 1, id="before the manifest"),
        pytest.param(append, "clear", 1, id="after the manifest"),
        pytest.param(store_writing, "publish_manifest", 1, id="at the manifest"),
    ],
)
def test_a_stopped_append_is_not_seen_and_continues(
    base: CellStore,
    raw: list[list[str]],
    expected: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    module: Any,
    name: str,
    at: int,
) -> None:
    config = appending(raw[1], base.path, workers=1)
    before = file_bytes(base.path)
    with monkeypatch.context() as patch:
        Stop(patch, module, name).at = at
        with pytest.raises(OSError, match="the disk is full"):
            append_store(config)
    seen = open_store(base.path)
    if name == "clear":
        assert file_bytes(base.path) == expected
    else:
        assert seen.header == base.header
        assert {finding.kind for finding in verify_store(base.path)} <= {"stray"}
        assert {n: b for n, b in file_bytes(base.path).items() if n in before} == before
    append_store(replace(config, workers=2))
    assert file_bytes(base.path) == expected
    assert [path.name for path in base.path.parent.iterdir()] == ["s.zarr"]


def test_leftovers_of_another_append_are_removed(
    base: CellStore,
    raw: list[list[str]],
    expected: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        Stop(patch, append, "write_manifest").at = 1
        with pytest.raises(OSError, match="the disk is full"):
            append_store(appending([*raw[1], *raw[2]], base.path, cells_per_partition=9))
    assert (base.path / "dataset_9").exists()
    append_store(appending(raw[1], base.path))
    assert file_bytes(base.path) == expected


def test_strays_in_a_store_are_left_alone(
    base: CellStore, raw: list[list[str]], expected: dict[str, bytes]
) -> None:
    shutil.copytree(base.path / "dataset_0", base.path / "dataset_copy")
    append_store(appending(raw[1], base.path))
    assert {
        name for name in file_bytes(base.path) if not name.startswith("dataset_copy/")
    } == expected.keys()
    assert (base.path / "dataset_copy" / "zarr.json").exists()


def test_a_lost_partition_is_named(base: CellStore, raw: list[list[str]]) -> None:
    shutil.rmtree(base.path / "dataset_0")
    message = r"dataset_0/.*zarr\.json is missing; copy the store again"
    refuse(appending(raw[1], base.path), message)


def test_a_rebuilt_store_forgets_a_stopped_append(
    base: CellStore,
    raw: list[list[str]],
    expected: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        Stop(patch, append, "write_manifest").at = 1
        with pytest.raises(OSError, match="the disk is full"):
            append_store(appending(raw[1], base.path))
    build_store(store_config(raw[0], base.path, seed=7, overwrite=True))
    append_store(appending(raw[1], base.path))
    assert file_bytes(base.path) == expected


# --- obs ---


def test_columns_of_the_store_are_carried_on(tmp_path: Path) -> None:
    genes = gene_names(9)
    tables: list[Path] = []
    for name, header in (("one", "tissue\tdonor"), ("two", "donor\tage")):
        write_sources(tmp_path, [random_cells(name, len(tables), 10, genes)])
        values = "\t".join(f"{name}_{column}" for column in header.split("\t"))
        tables.append(tmp_path / f"{name}.tsv")
        tables[-1].write_text(f"path\t{header}\n{name}.h5ad\t{values}\n")
    build_store(store_config([str(tables[0])], tmp_path / "s.zarr"))
    store = append_store(appending([str(tables[1])], tmp_path / "s.zarr"))
    old, new = (anndata.read_zarr(store.partition_path(number)).obs for number in range(2))
    assert list(old) == ["source", "source_row", "donor", "tissue"]
    assert list(new) == ["source", "source_row", "donor", "tissue", "age"]
    assert (new["donor"] == "two_donor").all()
    assert new["tissue"].isna().all()
    assert (new["age"] == "two_age").all()


# --- refusals ---


def refuse(config: StoreConfig, message: str, error: type[Exception] = ValueError) -> None:
    output = Path(config.output)
    before = file_bytes(output) if output.exists() else {}
    with pytest.raises(error, match=re.compile(message)):
        append_store(config)
    assert (file_bytes(output) if output.exists() else {}) == before
    assert not list(output.parent.glob("*.appending"))


def test_what_is_in_the_store_is_refused(
    base: CellStore, raw: list[list[str]], tmp_path: Path
) -> None:
    refuse(
        appending([*raw[1], raw[0][1]], base.path), r"beta\.h5ad is in .*s\.zarr already, as 'beta'"
    )
    other = write_sources(tmp_path / "other", [random_cells("beta", 99, 9, gene_names(30))])
    refuse(appending(other, base.path), r"has a source named 'beta' already; rename .*other/beta")


def test_another_panel_is_refused(base: CellStore, raw: list[list[str]], tmp_path: Path) -> None:
    panel = tmp_path / "panel.txt"
    panel.write_text("\n".join(base.panel.names[::-1]))
    config = appending(raw[1], base.path, panel=PanelConfig(file=str(panel)))
    refuse(config, r"two panels: .*panel\.txt is not the panel of .*s\.zarr")
    panel.write_text("\n".join(base.panel.names))
    assert append_store(config).header.generations == (70, 54)


def test_no_store_and_no_cells_are_refused(
    base: CellStore, raw: list[list[str]], tmp_path: Path
) -> None:
    refuse(appending(raw[1], tmp_path / "none"), "no cell store at", FileNotFoundError)
    refuse(appending(raw[1], base.path, min_genes=1000), "lower min_genes")
    refuse(appending([str(tmp_path / "x.h5ad")], base.path), "no such file")


def test_append_and_build_refuse_each_other(
    base: CellStore, raw: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    build = store_config(raw[0], base.path, overwrite=True)
    add = appending(raw[1], base.path)
    refused = []

    def try_other(*arguments: Any) -> Any:
        for function, config in ((build_store, build), (append_store, add)):
            with pytest.raises(StoreFormatError, match="another ingest is writing"):
                function(config)
            refused.append(1)
        return stream(*arguments)

    stream = store_writing.stream_partition
    monkeypatch.setattr(write_pass, "stream_partition", try_other)
    append_store(replace(add, workers=1))
    assert len(refused) == 6
    build_store(replace(build, workers=1))
    assert len(refused) == 12
    assert [path.name for path in base.path.parent.iterdir()] == ["s.zarr"]


def test_settings_that_contradict_appending_are_refused() -> None:
    for settings, message in (
        ({"overwrite": True}, "append and overwrite exclude"),
        ({"panel": PanelConfig(size=5)}, "append takes the store's panel"),
        ({"panel": PanelConfig(min_source_share=0.5)}, "append takes the store's panel"),
    ):
        with pytest.raises(ValueError, match=message):
            appending(["a.h5ad"], Path("s.zarr"), **settings)


# --- kill -9 ---


@pytest.mark.slow
@pytest.mark.multiprocess
def test_an_append_killed_at_random_moments_ends_in_the_same_store(
    base: CellStore, raw: list[list[str]], expected: dict[str, bytes]
) -> None:
    config = appending(raw[1], base.path)
    before = file_bytes(base.path)
    seconds = seconds_of(append_store, config)
    assert file_bytes(base.path) == expected
    rng = random.Random(0)
    kills = 0
    while kills < 10:
        shutil.rmtree(base.path)
        write_files(base.path, before)
        while not run_and_kill(append_store, config, after=rng.uniform(0, 1.2) * seconds):
            kills += 1
            # The old store or the new one, whole.
            assert open_store(base.path).header.generations in ((70,), (70, 54))
        assert file_bytes(base.path) == expected
        assert [path.name for path in base.path.parent.iterdir()] == ["s.zarr"]
