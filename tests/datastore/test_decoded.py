"""What must be decoded whole is decoded once, and is afterwards what it was."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import sparse

from datastore import decoded
from datastore.config import PanelConfig
from datastore.formats import FORMATS
from datastore.ingest import build_store
from datastore.manifest import ListedSource
from datastore.raw_cells import ReadOptions, decoded_whole
from datastore.sources import open_source, scan_listed
from tests.support.cells import (
    expected_cells,
    gene_names,
    random_cells,
    store_config,
    stored_cells,
)
from tests.support.raw_files import write_10x_mtx, write_rdata, write_table

RAW = random_cells("a", 3, 21, ["ACTB", *gene_names(9)])
WRITERS: dict[str, Callable[[Path], Path]] = {
    "rdata": lambda folder: write_rdata(folder / "a.RData", RAW),
    "10x mtx": lambda folder: write_10x_mtx(folder / "a", RAW, 3),
    "table": lambda folder: write_table(folder / "a.csv.gz", RAW, True),
}


class Counted:
    """How often each format's file was opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened: list[str] = []
        for kind, opener in dict(FORMATS).items():

            def count(*arguments: Any, kind: str = kind, opener: Any = opener) -> Any:
                self.opened.append(kind)
                return opener(*arguments)

            monkeypatch.setitem(FORMATS, kind, count)


def test_the_formats_are_those_that_are_kept() -> None:
    assert set(WRITERS) == set(decoded.KEPT_FORMATS)


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("rank", [False, True])
def test_a_file_is_decoded_once_an_ingest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, rank: bool
) -> None:
    path = WRITERS[kind](tmp_path)
    counted = Counted(monkeypatch)
    panel = PanelConfig(size=9 if rank else None)
    built = build_store(store_config([str(path)], tmp_path / "s.zarr", panel=panel))
    assert counted.opened == [kind]
    found, expected = stored_cells(built), expected_cells([RAW], built.panel.names, 1)
    assert found.keys() == expected.keys()
    for cell, counts in expected.items():
        np.testing.assert_array_equal(found[cell], counts)
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted([path.name, "s.zarr"])


@pytest.mark.parametrize("kind", WRITERS)
def test_what_is_kept_is_what_was_read(tmp_path: Path, kind: str) -> None:
    path = WRITERS[kind](tmp_path)
    plain = scan_listed(ListedSource(path), ReadOptions())
    kept = scan_listed(ListedSource(path), ReadOptions(), tmp_path / "kept")
    assert plain.decoded is None
    assert kept.decoded is not None
    with open_source(plain) as one, open_source(kept) as other:
        assert other.cells.counts(0, 21).data.dtype == np.uint16
        np.testing.assert_array_equal(
            one.counts(2, 19).toarray(), other.counts(2, 19).toarray(), strict=False
        )
        np.testing.assert_array_equal(one.cell_names(2, 19), other.cell_names(2, 19))
        assert one.cells.place == other.cells.place


@pytest.mark.parametrize("value", [0.5, -1.0, float("nan"), 70_000.0])
def test_other_values_than_small_counts_stay_as_they_are(tmp_path: Path, value: float) -> None:
    counts = np.array([[1.0, 0.0], [value, 3.0]])
    cells = decoded_whole(sparse.csr_matrix(counts), ("a", "b"), ("x", "y"))
    assert decoded.keep_decoded(tmp_path / "kept", cells)
    with decoded.open_decoded(tmp_path / "kept") as found:
        assert found.counts(0, 2).dtype == np.float64
        np.testing.assert_array_equal(found.counts(0, 2).toarray(), counts)


def test_a_full_disk_only_costs_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = WRITERS["rdata"](tmp_path)

    def full(*_: object, **__: object) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(np, "save", full)
    source = scan_listed(ListedSource(path), ReadOptions(), tmp_path / "kept")
    assert source.decoded is None
    assert list((tmp_path / "kept").iterdir()) == []
    with open_source(source) as cells:
        np.testing.assert_array_equal(cells.counts(0, 21).toarray(), RAW.counts)
