"""What a slice's file gives back, partition by partition, is what was spooled."""

from pathlib import Path

import numpy as np
import pytest
from scipy import sparse

from datastore.packing import PackedCells, pack_counts
from datastore.spool import SpooledCells, read_block, read_digests, read_tally, write_spool

TALLY = {"kept": 6, "empty": 1}


def spooled(high: int = 9) -> tuple[SpooledCells, PackedCells]:
    counts = np.random.default_rng(0).integers(0, 3, (6, 5))
    counts[:, 2] = high
    cells = pack_counts(sparse.csr_matrix(counts), np.arange(5), 5)
    found = SpooledCells(
        position=np.array([2, 3, 10, 11, 12, 29]),
        row=np.array([5, 0, 1, 4, 3, 2]),
        name=np.array([name.encode() for name in ("s/a", "s/bb", "s/é", "s/d", "s/", "s/f")]),
        num_genes=cells.num_genes,
        labels={"source": "s", "tissue": "Lunge"},
        codes={"type": np.array([0, -1, 1, 0, 0, 1], np.int32)},
        categories={"type": ["B", "T"]},
    )
    return found, cells


@pytest.mark.parametrize("high", [9, 70_000])
def test_blocks_are_the_cells_of_each_partition(tmp_path: Path, high: int) -> None:
    cells, packed = spooled(high)
    digests = np.array([9, 3, 2**64 - 1, 3, 0, 7], np.uint64)
    edges = [0, 10, 20, 25, 30]
    write_spool(tmp_path / "f", cells, packed.cells(), edges, TALLY, digests, np.arange(40, 46))
    assert [path.name for path in tmp_path.iterdir()] == ["f"]
    for number, chosen in enumerate([slice(0, 2), slice(2, 5), slice(5, 5), slice(5, 6)]):
        block, counts = read_block(tmp_path / "f", number)
        assert len(block) == len(cells.position[chosen])
        np.testing.assert_array_equal(block.position, cells.position[chosen])
        np.testing.assert_array_equal(block.row, cells.row[chosen])
        np.testing.assert_array_equal(block.name, cells.name[chosen])
        np.testing.assert_array_equal(block.codes["type"], cells.codes["type"][chosen])
        of_block = packed.cells()[chosen]
        assert len(counts.cells()) == len(of_block)
        assert counts.packed.dtype == packed.packed.dtype
        for found_cell, cell in zip(counts.cells(), of_block, strict=True):
            np.testing.assert_array_equal(found_cell, cell)
        assert block.labels == cells.labels
        assert block.categories == cells.categories
    assert read_tally(tmp_path / "f") == TALLY
    found, index = read_digests(tmp_path / "f")
    assert found.tolist() == [0, 3, 3, 7, 9, 2**64 - 1]
    assert index[[0, 3, 4, 5]].tolist() == [44, 45, 40, 42]
    assert sorted(index[1:3].tolist()) == [41, 43]


def test_a_slice_may_hold_no_cell(tmp_path: Path) -> None:
    cells, _ = spooled()
    none = SpooledCells(
        position=cells.position[:0],
        row=cells.row[:0],
        name=np.array([], np.bytes_),
        num_genes=cells.num_genes[:0],
        labels=cells.labels,
    )
    nothing = np.empty(0, np.uint64)
    write_spool(tmp_path / "f", none, [], [0, 5], {"kept": 0}, nothing, nothing.astype(np.int64))
    assert len(read_block(tmp_path / "f", 0)[0]) == 0
    assert len(read_digests(tmp_path / "f")[0]) == 0


def test_nothing_is_there_before_all_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two that write the same, because one was taken for dead, neither spoils the other's."""
    cells, packed = spooled()
    target, begun = tmp_path / "f", list[str]()
    digests, index = np.zeros(6, np.uint64), np.arange(6)

    def write() -> None:
        write_spool(target, cells, packed.cells(), [0, 30], TALLY, digests, index)

    rename = Path.rename

    def rename_after_another(path: Path, to: Path) -> Path:
        begun.append(path.name)
        if len(begun) == 1:
            assert not target.exists()
            write()
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", rename_after_another)
    write()
    assert len(set(begun)) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["f"]
    assert len(read_block(target, 0)[0]) == 6
