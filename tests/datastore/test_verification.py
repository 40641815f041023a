"""Whatever happened to a file of a store is found and told apart."""

import errno
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from datastore.reader import CellReader
from datastore.storage import LocalFolder
from datastore.store import MANIFEST, CellStore, StoreFormatError, open_store, read_record
from datastore.verification import check_complete, verify_store
from tests.support.cells import file_bytes, random_counts
from tests.support.stores import edit_manifest, flip_bit, write_small_store

SHARD = "dataset_1/X/data/c/0"


def findings(path: Path) -> list[tuple[str, str]]:
    return [(finding.kind, finding.name) for finding in verify_store(path)]


def test_a_store_as_written_has_no_findings(store: CellStore) -> None:
    assert verify_store(store.path) == []
    check_complete(store)


def test_a_flipped_bit_is_found_in_every_file(copied_store: CellStore) -> None:
    kinds = set()
    rng = np.random.default_rng(0)
    for name in file_bytes(copied_store.path):
        path = copied_store.path / name
        before = path.read_bytes()
        if name == MANIFEST or not before:
            continue
        flip_bit(path, int(rng.integers(len(before))), int(rng.integers(8)))
        assert findings(copied_store.path) == [("altered", name)]
        path.write_bytes(before)
        kinds.add(re.sub(r"\d+", "0", name))
    for kind in ("genes.txt", "dataset_0/zarr.json", "dataset_0/obs/_index/c/0"):
        assert kind in kinds
    for array in ("data", "indices", "indptr"):
        assert {f"dataset_0/X/{array}/c/0", f"dataset_0/X/{array}/zarr.json"} <= kinds
    assert verify_store(copied_store.path) == []


def caught_flips(folder: Path, flips: int, seed: int) -> int:
    """Flip single bits anywhere in a store, one at a time; count those that `verify` notices."""
    names = [name for name, content in file_bytes(folder).items() if content]
    rng = np.random.default_rng(seed)
    caught = 0
    for _ in range(flips):
        path = folder / names[rng.integers(len(names))]
        place, bit = int(rng.integers(path.stat().st_size)), int(rng.integers(8))
        flip_bit(path, place, bit)
        try:
            caught += any(finding.is_damage for finding in verify_store(folder, threads=1))
        except StoreFormatError as error:
            caught += MANIFEST in str(error) or "schema version" in str(error)
        flip_bit(path, place, bit)
    return caught


def test_hundred_random_flips_are_found(tmp_path: Path) -> None:
    small = write_small_store(tmp_path / "s.zarr", random_counts(0, 60, 20))
    assert caught_flips(small.path, 100, seed=1) == 100
    assert verify_store(small.path) == []


@pytest.mark.slow
def test_thousand_random_flips_are_found(copied_store: CellStore) -> None:
    assert caught_flips(copied_store.path, 1000, seed=2) == 1000


READ = re.compile(
    r"manifest\.json|genes\.txt|records/dataset_.*|dataset_\d+/X/\w+/(c/\d+|zarr\.json)"
)


def flips_caught_by_reading(folder: Path, flips: int, seed: int) -> int:
    """Flip single bits in the files that reading needs; count the refusals."""
    names = [name for name in file_bytes(folder) if READ.fullmatch(name)]
    rng = np.random.default_rng(seed)
    caught = 0
    for _ in range(flips):
        path = folder / names[rng.integers(len(names))]
        place, bit = int(rng.integers(path.stat().st_size)), int(rng.integers(8))
        flip_bit(path, place, bit)
        read_record.cache_clear()  # as a process that has just started
        try:
            store = open_store(folder)
            CellReader(store).read(np.arange(store.num_cells))
        except StoreFormatError:
            caught += 1
        flip_bit(path, place, bit)
    return caught


@pytest.mark.parametrize(
    ("flips", "seed"),
    [pytest.param(100, 3, id="100"), pytest.param(1000, 4, id="1000", marks=pytest.mark.slow)],
)
def test_random_flips_are_found_by_reading(copied_store: CellStore, flips: int, seed: int) -> None:
    assert flips_caught_by_reading(copied_store.path, flips, seed) == flips
    read_record.cache_clear()
    assert len(CellReader(open_store(copied_store.path)).read(np.arange(70)).positions) == 70


def test_every_byte_of_a_manifest_counts(tmp_path: Path) -> None:
    small = write_small_store(tmp_path / "s.zarr", random_counts(0, 5, 4))
    edit_manifest(small, left_out=[{"path": "\u00d7.h5ad", "reason": "caf\u00e9, J1"}])
    whole = open_store(small.path)
    path = small.path / MANIFEST
    content = path.read_bytes()
    assert b"\\u00e9" in content  # where another case of letters says the same
    bits = np.random.default_rng(5).integers(8, size=len(content))
    for place, bit in enumerate(bits.tolist()):
        changed = bytes([content[place] ^ 1 << bit])
        path.write_bytes(content[:place] + changed + content[place + 1 :])
        try:
            opened = open_store(small.path)
        except StoreFormatError:
            continue
        assert (opened.header, opened.files) == (whole.header, whole.files)  # it says the same
        assert findings(small.path) == [("altered", MANIFEST)]
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("spoil", "kind", "problem"),
    [
        pytest.param(lambda path: path.unlink(), "missing", "is missing", id="missing"),
        pytest.param(
            lambda path: os.truncate(path, path.stat().st_size - 1),
            "size",
            r"has \d+ bytes instead of \d+",
            id="cut short",
        ),
        pytest.param(
            lambda path: path.write_bytes(path.read_bytes() + b"x"),
            "size",
            r"has \d+ bytes instead of \d+",
            id="too long",
        ),
        pytest.param(
            lambda path: path.write_bytes(bytes(path.stat().st_size)),
            "altered",
            "has other content",
            id="zeros",
        ),
        pytest.param(
            lambda path: (path.unlink(), path.mkdir()), "size", "has .* bytes", id="a folder"
        ),
    ],
)
def test_what_became_of_a_shard_is_told(
    copied_store: CellStore, spoil: Callable[[Path], None], kind: str, problem: str
) -> None:
    spoil(copied_store.path / SHARD)
    (finding,) = verify_store(copied_store.path)
    assert (finding.name, finding.kind, finding.is_damage) == (SHARD, kind, True)
    assert re.match(problem, finding.problem)
    opened = open_store(copied_store.path)
    if kind != "altered":  # only sizes are looked at
        with pytest.raises(StoreFormatError, match=f"{SHARD} {problem}.*copy the store again"):
            check_complete(opened)
    else:
        check_complete(opened)


def test_a_partition_that_was_not_copied_is_named(copied_store: CellStore) -> None:
    shutil.rmtree(copied_store.path / "dataset_2")
    found = verify_store(copied_store.path)
    assert {finding.kind for finding in found} == {"missing"}
    assert {finding.name for finding in found} == {
        name for name in file_bytes(copied_store.path) if name.startswith("dataset_2/")
    } | {f"dataset_2/{name}" for name in copied_store.partition_files(2)}


def test_strays_are_named_and_do_no_harm(copied_store: CellStore) -> None:
    strays = ["dataset_0/X/data/c/99", "dataset_3/X/data/c/0", "manifest.json.part"]
    for name in strays:
        (copied_store.path / name).parent.mkdir(parents=True, exist_ok=True)
        (copied_store.path / name).write_bytes(b"left by a writer that was killed")
    found = verify_store(copied_store.path)
    assert [(finding.kind, finding.name) for finding in found] == [("stray", n) for n in strays]
    assert not any(finding.is_damage for finding in found)
    check_complete(open_store(copied_store.path))


def test_a_damaged_record_is_named_alone(copied_store: CellStore) -> None:
    (copied_store.path / "records/dataset_1.json").write_text("{}")
    assert findings(copied_store.path) == [("size", "records/dataset_1.json")]


def test_a_manifest_that_is_true_but_not_ours_is_found(copied_store: CellStore) -> None:
    path = copied_store.path / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text())))
    assert open_store(copied_store.path).header == copied_store.header
    assert findings(copied_store.path) == [("altered", MANIFEST)]


@pytest.mark.parametrize("field", ["num_counts", "seed"])
def test_a_header_that_belies_the_store_id_is_found(copied_store: CellStore, field: str) -> None:
    edit_manifest(copied_store, **{field: 17})
    assert findings(copied_store.path) == [("altered", MANIFEST)]


def test_a_list_of_files_that_lacks_one_is_found(copied_store: CellStore) -> None:
    manifest = json.loads((copied_store.path / MANIFEST).read_text())
    del manifest["files"]["records/generation_0/measured.npy"]
    (copied_store.path / MANIFEST).write_text(json.dumps(manifest))
    assert findings(copied_store.path) == [("altered", MANIFEST)]


def test_a_file_that_the_disk_refuses_is_told(
    copied_store: CellStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = LocalFolder.digest

    def failing(folder: LocalFolder, name: str, size: int) -> str:
        if name == SHARD:
            raise OSError(errno.EIO, "Input/output error")
        return digest(folder, name, size)

    monkeypatch.setattr(LocalFolder, "digest", failing)
    (finding,) = verify_store(copied_store.path)
    assert (finding.kind, finding.name) == ("unreadable", SHARD)
    assert finding.problem == "cannot be read (Input/output error)"


def test_progress_comes_to_the_end(store: CellStore) -> None:
    seen: list[tuple[int, int]] = []
    for threads in (1, 3):
        seen.clear()
        verify_store(store.path, lambda done, total: seen.append((done, total)), threads)
        total = sum(len(c) for n, c in file_bytes(store.path).items() if n != MANIFEST)
        assert seen[-1] == (total, total)
        assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert len(seen) == len(file_bytes(store.path)) - 1


def test_all_files_of_a_store_are_known(store: CellStore) -> None:
    """An independent account: what the manifest and the records name is what lies there."""
    manifest = json.loads((store.path / MANIFEST).read_text())
    named = [MANIFEST, *manifest["files"]]
    for number in range(len(store.header.partitions)):
        record = json.loads((store.path / f"records/dataset_{number}.json").read_text())
        named += [f"dataset_{number}/{name}" for name in record]
    assert Counter(named) == Counter(file_bytes(store.path).keys())
