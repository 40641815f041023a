"""Rows cut and spread, by the native kernel and by NumPy, against a loop over single values."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from datastore import cell_rows, kernels


@pytest.fixture(params=["native", "numpy"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which of the two does it; what is tested must run, so a missing compiler is a failure."""
    assert kernels.missing() is None
    if request.param == "numpy":
        monkeypatch.setattr(kernels, "missing", lambda: "not wanted")
    else:
        monkeypatch.setattr(cell_rows, "_outside", None)  # which NumPy's way begins with
    return str(request.param)


def ranges(rng: np.random.Generator, rows: int, length: int) -> tuple[Any, Any]:
    """Ranges anywhere, overlapping, some of them empty."""
    edges = np.sort(rng.integers(0, length + 1, (rows, 2)), axis=1)
    edges[rng.random(rows) < 0.2, 1] = edges[rng.random(rows) < 0.2, 0].max(initial=0)
    return edges[:, 0].copy(), np.maximum(edges[:, 0], edges[:, 1])


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.float64])
def test_ranges_are_cut_one_behind_the_other(way: str, dtype: Any) -> None:
    rng = np.random.default_rng(0)
    values = rng.integers(0, 256, 9_000).astype(dtype)
    for rows in (0, 1, 2, 3, 40):
        starts, stops = ranges(rng, rows, len(values))
        expected = [values[at] for a, b in zip(starts, stops, strict=True) for at in range(a, b)]
        out = np.empty(len(expected), dtype)
        cell_rows.cut(values, starts, stops, out)
        assert out.tolist() == expected


@pytest.mark.parametrize("genes", [np.uint16, np.uint32, np.int32, np.int64])
@pytest.mark.parametrize(
    ("values", "dense"),
    [
        (np.uint8, np.uint8),
        (np.uint16, np.float32),
        (np.uint32, np.float32),
        (np.float32, np.float32),
    ],
)
@pytest.mark.parametrize("panel", [1, 15, 16, 17, 333])
def test_ranges_are_spread(way: str, genes: Any, values: Any, dense: Any, panel: int) -> None:
    rng = np.random.default_rng(panel)
    sizes = rng.integers(0, panel + 1, 30)
    ends = np.cumsum(sizes)
    columns = np.concatenate([rng.permutation(panel)[:size] for size in sizes]).astype(genes)
    content = rng.integers(1, 256, len(columns)).astype(values)
    order = rng.permutation(30)[:20]
    starts, stops = (ends - sizes)[order], ends[order]
    for shift in range(3):  # rows that begin anywhere in a line of the cache
        room = np.full(20 * panel + shift, 7, dense)
        out = room[shift:].reshape(20, panel)
        cell_rows.spread(columns, content, starts, stops, out)
        expected = np.zeros((20, panel), dense)
        for row, (a, b) in enumerate(zip(starts, stops, strict=True)):
            for at in range(a, b):
                expected[row, columns[at]] = content[at]
        np.testing.assert_array_equal(out, expected)
        assert (room[:shift] == 7).all()


def test_types_that_the_kernel_does_not_know() -> None:
    genes, values = np.array([2, 0, 1], np.uint64), np.array([0.5, 1.5, 2.5])
    for dense in (np.float64, np.float32):
        out = np.full((2, 3), 7, dense)
        cell_rows.spread(genes, values, np.array([1, 0]), np.array([3, 1]), out)
        assert out.tolist() == [[1.5, 2.5, 0], [0, 0, 0.5]]


@pytest.mark.parametrize(
    ("start", "stop"), [(-1, 2), (3, 2), (9, 11), (0, 2**62), (-(2**62), 2**62)]
)
def test_a_range_outside_the_array_is_refused(way: str, start: int, stop: int) -> None:
    values = np.arange(10, dtype=np.uint16)
    starts, stops = np.array([0, start]), np.array([4, stop])
    with pytest.raises(ValueError, match=rf"values {start} to {stop} lie outside 10|do not fit"):
        cell_rows.cut(values, starts, stops, np.empty(max(0, min(4 + stop - start, 20)), np.uint16))
    with pytest.raises(ValueError, match=rf"values {start} to {stop} lie outside 10 of them"):
        cell_rows.spread(values, values, starts, stops, np.empty((2, 20), np.float32))


def test_ranges_that_only_add_up_write_nothing_beyond_the_target(way: str) -> None:
    values, room = np.arange(100, dtype=np.uint16), np.full(100, 7, np.uint16)
    with pytest.raises(ValueError, match="values 90 to 10 lie outside"):
        cell_rows.cut(values, np.array([0, 90]), np.array([90, 10]), room[:10])
    assert (room == 7).all()


@pytest.mark.parametrize("gene", [20, 65_535, -1])
@pytest.mark.parametrize("dense", [np.uint8, np.float32])
def test_a_gene_outside_the_panel_is_refused(way: str, gene: int, dense: Any) -> None:
    genes = np.array([3, gene, 4], np.uint16 if gene > 0 else np.int32)
    values = np.ones(3, dense)
    room = np.full((4, 20), 7, dense)
    with pytest.raises(ValueError, match=rf"gene {gene} lies outside the panel of 20 genes"):
        cell_rows.spread(genes, values, np.array([0, 0]), np.array([1, 3]), room[1:3])
    assert (room[[0, 3]] == 7).all()


def test_arrays_that_do_not_belong_together(way: str) -> None:
    one, two = np.array([0]), np.array([2])
    with pytest.raises(ValueError, match="2 values of uint16 do not fit 2 of uint8"):
        cell_rows.cut(np.zeros(4, np.uint16), one, two, np.empty(2, np.uint8))
    with pytest.raises(ValueError, match="3 genes, 4 values"):
        cell_rows.spread(np.zeros(3, int), np.zeros(4), one, two, np.empty((1, 5)))
    with pytest.raises(ValueError, match="4 genes, 4 values"):
        cell_rows.spread(np.zeros(4, int), np.zeros(4), np.zeros(2, int), two, np.empty((2, 5)))
    sealed = np.empty(2, np.uint16)
    sealed.flags.writeable = False
    with pytest.raises(ValueError, match="do not fit"):
        cell_rows.cut(np.zeros(4, np.uint16), one, two, sealed)


def test_arrays_of_any_layout_and_byte_order(way: str) -> None:
    genes, counts = np.array([2, 0, 1, 4]), np.array([5, 300, 7, 1])
    starts, stops = np.array([2, 0]), np.array([4, 2])
    for order in ("<", ">"):
        for step in (1, 2):
            laid = np.zeros((2, 4 * step), f"{order}u2")
            laid[:, ::step] = genes, counts
            out = np.empty((2, 5), np.float32)
            cell_rows.spread(laid[0, ::step], laid[1, ::step], starts, stops, out)
            assert out.tolist() == [[0, 7, 0, 0, 1], [300, 0, 5, 0, 0]]
            if order == ">" and way == "native":
                continue  # NumPy cuts these
            cells = np.empty(4, f"{order}u2")
            cell_rows.cut(laid[1, ::step], starts, stops, cells)
            assert cells.tolist() == [7, 1, 5, 300]


def test_without_a_home_numpy_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("SCBERT_KERNEL_CACHE", raising=False)
    monkeypatch.setattr(Path, "home", nobody)
    kernels.missing.cache_clear()
    kernels._library.cache_clear()
    try:
        assert "set SCBERT_KERNEL_CACHE" in str(kernels.missing())
    finally:
        kernels.missing.cache_clear()


def test_without_a_compiler_numpy_does_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("SCBERT_KERNEL_CACHE", str(tmp_path))
    kernels.missing.cache_clear()
    kernels._library.cache_clear()
    try:
        assert "no C++ compiler" in str(kernels.missing())
        out = np.empty(2, np.uint16)
        cell_rows.cut(np.arange(4, dtype=np.uint16), np.array([2]), np.array([4]), out)
        assert out.tolist() == [2, 3]
    finally:
        kernels.missing.cache_clear()
