"""A work folder keeps what is finished, names what is missing, and lets one ingest in."""

import errno
import fcntl
import json
import re
import shutil
from collections import namedtuple
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from datastore import align_pass, ingest, work_folder, write_pass
from datastore.append import append_store
from datastore.ingest import build_store
from datastore.store import CellStore, StoreFormatError, open_store
from datastore.verification import verify_store
from tests.support.cells import (
    Stop,
    file_bytes,
    gene_names,
    random_cells,
    store_config,
    three_sources,
    write_sources,
)
from tests.support.disks import small_disk_at


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return write_sources(tmp_path_factory.mktemp("raw"), three_sources())


def stop_at_writing(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave an ingest that has spooled everything and written one part."""
    with monkeypatch.context() as patch:
        Stop(patch, write_pass, "stream_partition").at = 2
        with pytest.raises(OSError, match="the disk is full"):
            build_store(replace(config, workers=1))


# --- what is kept ---


@pytest.mark.parametrize(
    "mistake",
    [
        pytest.param({"sources": ["mistyped.h5ad"]}, id="a mistyped source"),
        pytest.param({"sources": ["*.nothing"]}, id="a glob without a match"),
        pytest.param({"obs_columns": ["celltype"]}, id="a mistyped column"),
    ],
)
def test_a_mistake_on_a_rerun_does_not_lose_the_work(
    tmp_path: Path,
    sources: list[str],
    store: CellStore,
    monkeypatch: pytest.MonkeyPatch,
    mistake: dict[str, Any],
) -> None:
    config = store_config(sources, tmp_path / "s.zarr")
    stop_at_writing(config, monkeypatch)
    before = file_bytes(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError)):
        build_store(replace(config, **mistake))
    assert file_bytes(tmp_path) == before
    spooled = Stop(monkeypatch, align_pass, "write_spool")
    written = Stop(monkeypatch, write_pass, "stream_partition")
    assert file_bytes(build_store(config).path) == file_bytes(store.path)
    assert (spooled.calls, written.calls) == (0, 2)


def test_what_was_left_unfinished_goes_when_the_ingest_continues(
    tmp_path: Path, sources: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = store_config(sources, tmp_path / "s.zarr")
    stop_at_writing(config, monkeypatch)
    work = tmp_path / "s.zarr.building"
    half = work_folder.unfinished(work / "spool" / "slice_00000_0000000000")
    half.write_bytes(b"half")
    part = work_folder.unfinished(work / "parts" / "dataset_2")
    (part / "X").mkdir(parents=True)
    continued = Stop(monkeypatch, ingest, "write_generation")
    continued.at = 1
    with pytest.raises(OSError, match="the disk is full"):
        build_store(config)
    assert not half.exists()
    assert not part.exists()
    assert len(list((work / "parts").glob("dataset_*.json"))) == 1  # what is finished stays


def test_a_plan_that_is_refused_late_leaves_nothing(
    tmp_path: Path, sources: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = store_config(sources, tmp_path / "s.zarr")
    stop_at_writing(config, monkeypatch)
    with pytest.raises(ValueError, match="lower min_genes"):
        build_store(replace(config, min_genes=1000))
    assert list(tmp_path.iterdir()) == []


# --- killed while publishing ---


@pytest.mark.parametrize(
    ("module", "name"),
    [
        pytest.param(ingest, "write_root", id="before the root"),
        pytest.param(ingest, "set_whole", id="before it is noted as whole"),
        pytest.param(ingest, "_publish", id="before publishing"),
        pytest.param(ingest, "clear", id="before clearing"),
        pytest.param(work_folder, "_remove_work", id="while clearing"),
    ],
)
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_stop_around_publishing_is_made_good(
    tmp_path: Path,
    sources: list[str],
    store: CellStore,
    monkeypatch: pytest.MonkeyPatch,
    module: Any,
    name: str,
    overwrite: bool,
) -> None:
    config = store_config(sources, tmp_path / "s.zarr", overwrite=overwrite)
    if overwrite:
        build_store(replace(config, seed=1))
    with monkeypatch.context() as patch:
        # The folder is also looked through when an ingest begins.
        Stop(patch, module, name).at = 2 if name == "_remove_work" else 1
        with pytest.raises(OSError, match="the disk is full"):
            build_store(config)
    if overwrite:
        assert verify_store(tmp_path / "s.zarr") == []
    spooled = Stop(monkeypatch, align_pass, "write_spool")
    assert file_bytes(build_store(config).path) == file_bytes(store.path)
    assert spooled.calls == 0
    assert [path.name for path in tmp_path.iterdir()] == ["s.zarr"]


def test_a_store_killed_between_two_renames_is_put_back(
    tmp_path: Path, sources: list[str], store: CellStore
) -> None:
    shutil.copytree(store.path, tmp_path / "s.zarr.former")
    config = store_config(sources, tmp_path / "s.zarr", seed=1)
    with pytest.raises(FileExistsError, match="overwrite true to replace it"):
        build_store(config)
    assert open_store(tmp_path / "s.zarr").header == store.header
    assert build_store(replace(config, overwrite=True)).header.seed == 1
    assert [path.name for path in tmp_path.iterdir()] == ["s.zarr"]


def test_a_published_store_is_not_replaced_by_another_plan(
    tmp_path: Path, sources: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = store_config(sources, tmp_path / "s.zarr")
    with monkeypatch.context() as patch:
        Stop(patch, ingest, "clear").at = 1
        with pytest.raises(OSError, match="the disk is full"):
            build_store(config)
    before = file_bytes(tmp_path / "s.zarr")
    with pytest.raises(FileExistsError, match="overwrite true to replace it"):
        build_store(replace(config, seed=1))
    assert file_bytes(tmp_path / "s.zarr") == before


def test_a_published_store_that_was_removed_is_built_again(
    tmp_path: Path, sources: list[str], store: CellStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = store_config(sources, tmp_path / "s.zarr")
    with monkeypatch.context() as patch:
        Stop(patch, ingest, "clear").at = 1
        with pytest.raises(OSError, match="the disk is full"):
            build_store(config)
    shutil.rmtree(tmp_path / "s.zarr")
    assert file_bytes(build_store(config).path) == file_bytes(store.path)


# --- one at a time ---


def test_the_lock_of_a_removed_folder_counts_for_nothing(
    tmp_path: Path, sources: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who opened the lock of an ingest that then ended and removed it must not go on."""
    flock = fcntl.flock

    def folder_goes_first(file: Any, how: int) -> None:
        shutil.rmtree(tmp_path / "s.zarr.building")
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", folder_goes_first)
    with pytest.raises(StoreFormatError, match="another ingest is writing"):
        build_store(store_config(sources, tmp_path / "s.zarr"))


# --- space ---

Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize("append", [False, True])
def test_a_disk_too_small_is_refused_before_anything_is_written(
    tmp_path: Path, sources: list[str], monkeypatch: pytest.MonkeyPatch, append: bool
) -> None:
    config = store_config(sources, tmp_path / "s.zarr")
    if append:
        more = write_sources(tmp_path, [random_cells("more", 9, 10, gene_names(30))])
        build_store(config)
        config = replace(config, sources=more, append=True)
    before = file_bytes(tmp_path / "s.zarr") if append else {}
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10_000, 9_000, 1_000))
    message = r"too small: about 0\.0 MB are needed .*, 0\.0 MB are free; free some, choose another"
    with pytest.raises(OSError, match=message):
        append_store(config) if append else build_store(config)
    assert (file_bytes(tmp_path / "s.zarr") if append else {}) == before
    assert not list(tmp_path.glob("s.zarr.*"))
    monkeypatch.undo()
    store = append_store(config) if append else build_store(config)
    assert store.num_cells == (80 if append else 70)


def test_the_estimate_is_what_an_ingest_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = [random_cells(name, seed, 900, gene_names(600)) for seed, name in enumerate("ab")]
    sources = write_sources(tmp_path, cells)
    config = store_config(
        sources,
        tmp_path / "s.zarr",
        cells_per_partition=600,
        cells_per_shard=300,
        cells_per_chunk=64,
        cells_per_slice=600,
    )
    with monkeypatch.context() as patch:
        Stop(patch, ingest, "_publish").at = 1
        with pytest.raises(OSError, match="the disk is full"):
            build_store(config)
    building = tmp_path / "s.zarr.building"
    needed = json.loads((building / "needed.json").read_text())
    files = [path for path in building.rglob("*") if path.is_file()]
    taken = sum(path.stat().st_size for path in files)
    assert 0.9 * needed < taken < 1.15 * needed


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB."""
    with small_disk_at(tmp_path / "disk", "2m") as folder:
        yield folder


def test_a_disk_that_fills_up_loses_nothing(
    small_disk: Path, tmp_path: Path, sources: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = small_disk / "s.zarr"
    former = build_store(store_config(sources, output))
    before = file_bytes(output)
    cells = [random_cells(name, seed, 150, gene_names(700)) for seed, name in enumerate("ab")]
    bigger = write_sources(tmp_path, cells)
    config = store_config(
        bigger,
        output,
        overwrite=True,
        workers=2,
        cells_per_slice=40,
        cells_per_partition=100,
        cells_per_shard=50,
    )
    expected = build_store(replace(config, output=str(tmp_path / "whole.zarr")))

    filler = small_disk / "filler"
    filler.write_bytes(b"x" * 1_150_000)
    with pytest.raises(OSError, match=r"too small: about .* are needed"):  # seen beforehand
        build_store(config)
    with monkeypatch.context() as patch:  # as if another program took the space meanwhile
        patch.setattr(work_folder, "_refuse_small_disk", lambda *_: None)
        with pytest.raises(OSError, match=r"is full: .*what is finished is kept") as refusal:
            build_store(config)
    assert re.search(r"about [\d.]+ MB more are needed, [\d.]+ MB are free", str(refusal.value))
    assert file_bytes(output) == before
    assert open_store(output).header == former.header
    spooled = list((small_disk / "s.zarr.building" / "spool").glob("*[0-9]"))
    assert spooled  # finished work is kept ...

    filler.unlink()
    again = Stop(monkeypatch, align_pass, "write_spool")
    built = build_store(config)
    assert again.calls <= 8 - len(spooled)  # ... and used
    assert file_bytes(built.path) == file_bytes(expected.path)


def test_other_errors_of_the_system_are_passed_on(
    tmp_path: Path, sources: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "/data/x")

    monkeypatch.setattr(write_pass, "stream_partition", refuse)
    with pytest.raises(PermissionError, match="/data/x"):
        build_store(store_config(sources, tmp_path / "s.zarr"))


# --- paths ---


def test_names_from_a_table_never_become_paths(tmp_path: Path) -> None:
    """A source may be called what it likes: the name lands in the cells' names, nowhere else."""
    raw, inside = tmp_path / "raw", tmp_path / "inside"
    inside.mkdir()
    names = ["../../escaped", "/tmp/escaped", "a/../../b", "..", "dataset_0"]
    cells = [random_cells(f"f{number}", number, 12, gene_names(9)) for number in range(5)]
    write_sources(raw, cells)
    rows = [f"f{number}.h5ad\t{name}\t../{name}\n" for number, name in enumerate(names)]
    (raw / "table.tsv").write_text("path\tname\ttissue\n" + "".join(rows))
    before = file_bytes(raw)
    built = build_store(store_config([str(raw / "table.tsv")], inside / "s.zarr"))
    assert {line["name"] for line in built.header.sources} == set(names)
    assert verify_store(built.path) == []
    assert [path.name for path in inside.iterdir()] == ["s.zarr"]
    assert {path.name for path in tmp_path.iterdir()} == {"raw", "inside"}
    assert not Path("/tmp/escaped").exists()
    assert file_bytes(raw) == before
    top = {path.name for path in built.path.iterdir()}
    assert top - {f"dataset_{n}" for n in range(9)} == {
        "genes.txt",
        "manifest.json",
        "records",
        "zarr.json",
    }
