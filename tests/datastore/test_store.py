"""A store is whole or refused: every damage is found, none changes a count in silence."""

import json
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorstore
import zarr

from datastore.reader import CellReader
from datastore.store import (
    GENES,
    MANIFEST,
    CellStore,
    StoreFormatError,
    file_digest,
    open_store,
    publish_manifest,
    record_name,
    record_path,
    write_json,
)
from datastore.store_writing import ArraySizes
from datastore.verification import verify_store
from tests.support.cells import dense_store, file_bytes, random_counts
from tests.support.stores import edit_manifest, flip_bit, write_small_store


def test_a_store_opens_as_it_was_written(store: CellStore) -> None:
    assert store.num_cells == 70
    assert len(store.header.partitions) == 3
    assert store.partition_starts.tolist() == [0, *np.cumsum(store.header.partitions)]
    assert store.header.panel_digest == store.panel.digest
    assert store.header.num_counts == (dense_store(store) > 0).sum()
    assert open_store(str(store.path)).header == store.header
    assert verify_store(store.path) == []


def test_the_root_is_a_zarr_group_of_the_parts(store: CellStore) -> None:
    root = zarr.open_group(store.path, mode="r")
    assert all(isinstance(root[f"dataset_{number}"], zarr.Group) for number in range(3))
    assert root.attrs["encoding-type"] == "annbatch-preshuffled"


@pytest.mark.parametrize("largest", [65_535, 65_536, 2**32 - 1])
def test_count_type_fits_the_largest_count(tmp_path: Path, largest: int) -> None:
    counts = random_counts(0, 30, 9)
    counts[11, 3] = largest
    small = write_small_store(tmp_path / "s.zarr", counts)
    cells = CellReader(small).read(np.arange(30))
    assert cells.counts.dtype == (np.uint16 if largest < 65_536 else np.uint32)
    np.testing.assert_array_equal(dense_store(small), counts)


def test_a_half_written_part_is_replaced(tmp_path: Path) -> None:
    counts = random_counts(0, 30, 9)
    whole = write_small_store(tmp_path / "whole.zarr", counts)
    folder = tmp_path / "again.zarr"
    write_small_store(folder, random_counts(1, 30, 9))
    shutil.rmtree(folder / "dataset_0" / "obs")
    (folder / "dataset_0" / "stray").write_text("")
    (folder / (MANIFEST + ".part")).write_text("{")
    again = write_small_store(folder, counts)
    assert again.header == whole.header
    assert file_bytes(folder) == file_bytes(whole.path)


def test_json_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "note.json"
    write_json(target, {"a": 1})
    with pytest.raises(TypeError):
        write_json(target, {"a": 2, "b": object()})
    assert json.loads(target.read_text()) == {"a": 1}


# --- opening ---


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no cell store at .*absent.*build_store\.py"):
        open_store(tmp_path / "absent")


def test_a_folder_without_manifest_is_not_a_store(copied_store: CellStore) -> None:
    (copied_store.path / MANIFEST).unlink()
    for read in (open_store, verify_store):
        with pytest.raises(StoreFormatError, match=r"not a whole cell store .*manifest\.json"):
            read(copied_store.path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param('{"header": {"schema_ver', "cannot be read", id="truncated"),
        pytest.param("", "cut short or no manifest .*; copy the store again", id="empty"),
        pytest.param("[" * 100_000, "cannot be read", id="nested without end"),
        pytest.param("\ufeff[]", "cannot be read", id="other JSON"),
        pytest.param('{"header": {}}', "cannot be read", id="no version"),
        pytest.param('{"header": {"schema_version": 1}}', "is damaged", id="fields missing"),
        pytest.param('{"header": {"schema_version": 1}, "files": []}', "is damaged", id="a list"),
    ],
)
def test_an_unreadable_manifest_is_refused(
    copied_store: CellStore, content: str, message: str
) -> None:
    (copied_store.path / MANIFEST).write_text(content)
    with pytest.raises(StoreFormatError, match=message):
        open_store(copied_store.path)


def test_an_unknown_header_field_is_refused(copied_store: CellStore) -> None:
    edit_manifest(copied_store, colour="blue")
    with pytest.raises(StoreFormatError, match=r"damaged.*colour"):
        open_store(copied_store.path)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"partitions": [-70], "generations": [-70]}, id="fewer than no cells"),
        pytest.param({"partitions": [70.5], "generations": [70.5]}, id="half a cell"),
        pytest.param({"num_counts": "many"}, id="text for a number"),
        pytest.param({"sources": [3]}, id="a source that is a number"),
        pytest.param({"sources": [{}]}, id="a source without a name"),
        pytest.param({"left_out": ["x"]}, id="left out without a reason"),
    ],
)
def test_a_sealed_header_of_other_values_is_refused(
    copied_store: CellStore, changes: dict[str, Any]
) -> None:
    edit_manifest(copied_store, **changes)
    with pytest.raises(StoreFormatError, match=r"manifest\.json is damaged \("):
        open_store(copied_store.path)


@pytest.mark.parametrize("name", ["../other.zarr/x", "/etc/passwd", "records/../../x"])
def test_a_manifest_that_leads_out_of_the_store_is_refused(
    copied_store: CellStore, name: str
) -> None:
    content = json.loads((copied_store.path / MANIFEST).read_text())
    publish_manifest(
        copied_store.path, content["header"], {**content["files"], name: [1, "0" * 64]}
    )
    with pytest.raises(StoreFormatError, match=rf"damaged \(it names '{name}', outside the store"):
        open_store(copied_store.path)


@pytest.mark.parametrize("name", [GENES, "records/dataset_0.json"])
def test_a_sealed_file_of_other_content_is_named(copied_store: CellStore, name: str) -> None:
    (copied_store.path / name).write_bytes(b"\xff[")
    content = json.loads((copied_store.path / MANIFEST).read_text())
    entry = [2, file_digest(copied_store.path / name)]
    publish_manifest(copied_store.path, content["header"], {**content["files"], name: entry})
    with pytest.raises(StoreFormatError, match=rf"{name} is no (panel|record) .*copy the store"):
        open_store(copied_store.path).partition_files(0)


@pytest.mark.parametrize("field", ["num_counts", "seed", "left_out"])
def test_an_altered_manifest_is_refused(copied_store: CellStore, field: str) -> None:
    text = (copied_store.path / MANIFEST).read_text()
    manifest = json.loads(text)
    manifest["header"][field] = 17 if field != "left_out" else [{"path": "p", "reason": "r"}]
    (copied_store.path / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(StoreFormatError, match=r"damaged .*not as it was written"):
        open_store(copied_store.path)


def test_a_manifest_without_a_partition_is_refused(copied_store: CellStore) -> None:
    edit_manifest(copied_store, partitions=[25, 25, 10, 10])
    with pytest.raises(StoreFormatError, match=r"does not list records/dataset_3\.json"):
        open_store(copied_store.path)


def test_a_newer_schema_is_refused(copied_store: CellStore) -> None:
    edit_manifest(copied_store, schema_version=2, colour="blue")
    with pytest.raises(StoreFormatError, match="schema version 2, this program reads 1; update"):
        open_store(copied_store.path)


@pytest.mark.parametrize("name", ["genes.txt", "records/dataset_1.json"])
def test_truncated_and_missing_files_are_named(copied_store: CellStore, name: str) -> None:
    path = copied_store.path / name
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    size = len(content)
    with pytest.raises(StoreFormatError, match=f"{name} has {size - 1} bytes instead of {size}"):
        open_store(copied_store.path)
    path.unlink()
    with pytest.raises(StoreFormatError, match=f"{name} is missing; copy the store again"):
        open_store(copied_store.path)


def test_another_panel_is_refused(copied_store: CellStore) -> None:
    names = list(copied_store.panel.names)
    names[0], names[1] = names[1], names[0]  # the same size in bytes
    (copied_store.path / "genes.txt").write_text("\n".join(names) + "\n")
    with pytest.raises(StoreFormatError, match=r"genes\.txt is not as it was written"):
        open_store(copied_store.path)


def test_a_manifest_of_another_panel_is_refused(copied_store: CellStore) -> None:
    edit_manifest(copied_store, panel_digest="0" * 64)
    with pytest.raises(StoreFormatError, match=r"genes\.txt is not the panel"):
        open_store(copied_store.path)


# --- damage ---


def test_cells_that_do_not_add_up_are_refused(copied_store: CellStore) -> None:
    edit_manifest(copied_store, generations=[69])
    with pytest.raises(StoreFormatError, match="partitions and generations differ"):
        open_store(copied_store.path)


@pytest.mark.parametrize("array", ["data", "indices", "indptr"])
def test_reading_finds_flipped_bits_or_is_not_touched(tmp_path: Path, array: str) -> None:
    counts = random_counts(2, 300, 40)  # several chunks of 1,024 counts in a shard
    small = write_small_store(
        tmp_path / "s.zarr", counts, ArraySizes(cells_per_chunk=64, cells_per_shard=128)
    )
    shards = sorted((small.path / "dataset_0" / "X" / array / "c").iterdir())
    assert array == "indptr" or len(shards) > 1
    rng = np.random.default_rng(3)
    expected = CellReader(small).read(np.arange(300))
    caught = 0
    for flip in range(100):
        path = shards[flip % len(shards)]
        before = path.read_bytes()
        flip_bit(path, int(rng.integers(len(before))), int(rng.integers(8)))
        try:
            cells = CellReader(small).read(np.arange(300))
        except StoreFormatError as error:
            caught += "copy the store again or rebuild it" in str(error)
        else:
            np.testing.assert_array_equal(cells.indptr, expected.indptr)
            np.testing.assert_array_equal(cells.genes, expected.genes)
            np.testing.assert_array_equal(cells.counts, expected.counts)
        path.write_bytes(before)
    assert caught == 100  # every byte of a shard is either a chunk, its sum, or the index


@pytest.mark.parametrize("array", ["data", "indices", "indptr"])
def test_a_file_that_goes_missing_is_not_read_as_zeros(copied_store: CellStore, array: str) -> None:
    reader = CellReader(copied_store)
    shutil.rmtree(copied_store.partition_path(0) / "X" / array / "c")
    with pytest.raises(StoreFormatError, match="damaged"):
        reader.read(np.array([0]))


def test_a_panel_of_one_gene_has_all_its_chunks(tmp_path: Path) -> None:
    # All gene places are 0, Zarr's fill value, which it would rather not write.
    small = write_small_store(tmp_path / "s.zarr", np.arange(1, 31)[:, None])
    assert CellReader(small).read(np.arange(30)).counts.tolist() == list(range(1, 31))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        pytest.param("{", "", id="cut short"),
        pytest.param("uint16", "uint32", id="another type"),
        pytest.param("crc32c", "crc32d", id="another codec"),
    ],
)
def test_damaged_array_metadata_is_refused(copied_store: CellStore, old: str, new: str) -> None:
    path = copied_store.partition_path(0) / "X" / "data" / "zarr.json"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(StoreFormatError, match=r"dataset_0/X/data/zarr\.json (has|is not as)"):
        CellReader(copied_store).read(np.array([0]))


# --- many partitions ---


@pytest.fixture(scope="module")
def many_partitions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store that says it has 10,000 partitions of 30 cells; all are the same one."""
    folder = tmp_path_factory.mktemp("many") / "s.zarr"
    small = write_small_store(folder, random_counts(0, 30, 9))
    entries = dict(small.files)
    for number in range(1, 10_000):
        record_path(folder, number).hardlink_to(record_path(folder, 0))
        entries[record_name(number)] = small.files[record_name(0)]
    for number in (1, 5_000, 9_999):
        (folder / f"dataset_{number}").symlink_to(folder / "dataset_0")
    header = asdict(small.header) | {"partitions": [30] * 10_000, "generations": [300_000]}
    publish_manifest(folder, header, entries)
    return folder


def test_ten_thousand_partitions_open_in_a_second(many_partitions: Path) -> None:
    started = time.perf_counter()
    many = open_store(many_partitions)
    reader = CellReader(many)
    first = reader.read(np.arange(30))
    assert time.perf_counter() - started < 1.0  # measured: 0.15 s
    for partition in (5_000, 9_999):  # of all arrays only those that are read are looked for
        cells = reader.read(np.arange(30) + 30 * partition)
        np.testing.assert_array_equal(cells.counts, first.counts)
    with pytest.raises(StoreFormatError, match=r"dataset_2/X/indptr/zarr\.json is missing"):
        reader.read(np.array([60]))


def test_two_readers_agree_on_the_format(store: CellStore) -> None:
    """zarr-python and TensorStore decode the same arrays."""
    for number in range(len(store.header.partitions)):
        group = zarr.open_group(store.partition_path(number), mode="r")
        for name in ("data", "indices", "indptr"):
            array = group[f"X/{name}"]
            assert isinstance(array, zarr.Array)
            path = f"{store.partition_path(number)}/X/{name}/"
            spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": path}}
            theirs = tensorstore.open(spec, open=True).result().read().result()
            np.testing.assert_array_equal(np.asarray(array[:]), theirs)
