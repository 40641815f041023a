"""Raw files: every layout gives the same counts, whatever is wrong is said with its remedy."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from scipy import sparse

from datastore.sources import Source, check_counts, open_source, scan_source
from tests.support.cells import gene_names, random_cells, write_h5ad

RAW = random_cells("pbmc", 5, 23, gene_names(11))


def read_cells(source: Source, start: int, stop: int) -> sparse.csr_matrix:
    with open_source(source) as cells:
        return cells.counts(start, stop)


LAYOUTS: dict[str, Callable[[Any], Any]] = {
    "CSR float32": lambda dense: sparse.csr_matrix(dense.astype(np.float32)),
    "CSR int64": lambda dense: sparse.csr_matrix(dense),
    "CSC": lambda dense: sparse.csc_matrix(dense.astype(np.float32)),
    "dense float64": lambda dense: dense.astype(np.float64),
    "dense uint8": lambda dense: dense.astype(np.uint8),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_slices_of_every_layout_are_the_whole(tmp_path: Path, layout: str) -> None:
    path = write_h5ad(tmp_path, RAW, LAYOUTS[layout](RAW.counts))
    source = scan_source(path, None)
    assert (source.num_cells, source.genes, source.name) == (23, RAW.genes, "pbmc")
    np.testing.assert_array_equal(read_cells(source, 0, 23).toarray(), RAW.counts)
    for step in (1, 7, 22):
        pieces = [
            read_cells(source, start, min(start + step, 23)).toarray()
            for start in range(0, 23, step)
        ]
        np.testing.assert_array_equal(np.concatenate(pieces), RAW.counts)


def test_a_layer_is_read_in_place_of_x(tmp_path: Path) -> None:
    path = write_h5ad(tmp_path, RAW, np.log1p(RAW.counts), layer="counts")
    source = scan_source(path, "counts")
    np.testing.assert_array_equal(read_cells(source, 3, 9).toarray(), RAW.counts[3:9])


def test_cell_names_carry_their_source(tmp_path: Path) -> None:
    source = scan_source(write_h5ad(tmp_path, RAW), None)
    with open_source(source) as cells:
        assert cells.cell_names(4, 7).tolist() == ["pbmc/c4", "pbmc/c5", "pbmc/c6"]


def test_equal_bytes_have_equal_digests(tmp_path: Path) -> None:
    path = write_h5ad(tmp_path, RAW)
    copy = tmp_path / "copy.h5ad"
    copy.write_bytes(path.read_bytes())
    other = write_h5ad(tmp_path, replace(RAW, name="other", counts=RAW.counts + 1))
    digests = [scan_source(file, None).sha256 for file in (path, copy, other)]
    assert digests[0] == digests[1] != digests[2]


def text_file(folder: Path) -> Path:
    (folder / "pbmc.h5ad").write_text("gene,c0,c1\n")
    return folder / "pbmc.h5ad"


def other_hdf5(folder: Path) -> Path:
    with h5py.File(folder / "pbmc.h5ad", "w") as file:
        file["matrix"] = np.eye(3)
    return folder / "pbmc.h5ad"


def former_anndata(folder: Path) -> Path:
    with h5py.File(folder / "pbmc.h5ad", "w") as file:
        file["X"] = np.eye(2)
        table = np.array([(b"a",), (b"b",)], dtype=[("index", "S1")])
        file["obs"], file["var"] = table, table
    return folder / "pbmc.h5ad"


def truncated(folder: Path) -> Path:
    path = write_h5ad(folder, RAW)
    path.write_bytes(path.read_bytes()[:-500])
    return path


def folder_in_place(folder: Path) -> Path:
    (folder / "pbmc.h5ad").mkdir()
    return folder / "pbmc.h5ad"


def no_cells(folder: Path) -> Path:
    return write_h5ad(folder, replace(RAW, counts=RAW.counts[:0]))


def other_genes(folder: Path) -> Path:
    path = write_h5ad(folder, RAW, RAW.counts.astype(np.float32))
    with h5py.File(path, "r+") as file:
        del file["X"]
        file["X"] = np.eye(4)
    return path


def without_x(folder: Path) -> Path:
    path = write_h5ad(folder, RAW, layer="counts")
    with h5py.File(path, "r+") as file:
        del file["X"]
    return path


@pytest.mark.parametrize(
    ("make", "layer", "message"),
    [
        pytest.param(text_file, None, "cannot be read as .h5ad.*another kind", id="text"),
        pytest.param(
            truncated, None, r"cannot be read as HDF5 \(\.h5ad\).*cut short", id="truncated"
        ),
        pytest.param(other_hdf5, None, "not an AnnData .*obs, var or X missing", id="other HDF5"),
        pytest.param(
            former_anndata, None, r"anndata older than 0\.7; read it", id="former anndata"
        ),
        pytest.param(
            folder_in_place, None, "is a folder, but neither .*; name a file", id="folder"
        ),
        pytest.param(no_cells, None, "holds no cells; leave it out", id="no cells"),
        pytest.param(other_genes, None, r"matrix is \(4, 4\) but var has 11", id="other genes"),
        pytest.param(without_x, None, r"has no X; name the layer .*--layer", id="no X"),
        pytest.param(without_x, "raw", r"no layer 'raw'; it has \['counts'\]", id="other layer"),
        pytest.param(truncated, "raw", "cannot be read", id="truncated, with a layer"),
    ],
)
def test_other_files_are_refused(
    tmp_path: Path, make: Callable[[Path], Path], layer: str | None, message: str
) -> None:
    path = make(tmp_path)
    with pytest.raises(ValueError, match=message) as refusal:
        scan_source(path, layer)
    assert str(path) in str(refusal.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no such file: .*absent\.h5ad"):
        scan_source(tmp_path / "absent.h5ad", None)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        pytest.param(-1, r"a negative value \(-1, row 13, column 4\); .*scaled expr", id="-1"),
        pytest.param(np.nan, r"not finite \(nan, row 13, column 4\)", id="nan"),
        pytest.param(np.inf, r"not finite \(inf, row 13, column 4\)", id="inf"),
        pytest.param(2.5, r"not whole \(2.5, row 13, column 4\); give the raw", id="not whole"),
        pytest.param(2.0**32, r"above 4294967295 \(4.29497e\+09, row 13, col", id="too large"),
    ],
)
@pytest.mark.parametrize("layout", ["CSR", "CSC", "dense"])
def test_what_is_not_a_count_is_refused_with_its_place(
    tmp_path: Path, layout: str, value: float, message: str
) -> None:
    values = RAW.counts.astype(np.float64)
    values[13, 4] = value
    matrix = {"CSR": sparse.csr_matrix, "CSC": sparse.csc_matrix, "dense": np.asarray}[layout](
        values
    )
    source = scan_source(write_h5ad(tmp_path, RAW, matrix), None)
    read_cells(source, 0, 13)
    with pytest.raises(ValueError, match=rf"pbmc.h5ad, X holds .*{message}"):
        read_cells(source, 9, 23)


def test_log_normalised_expression_is_recognised(tmp_path: Path) -> None:
    scaled = np.log1p(RAW.counts / RAW.counts.sum(axis=1, keepdims=True) * 1e4)
    source = scan_source(write_h5ad(tmp_path, RAW, scaled.astype(np.float32)), None)
    with pytest.raises(ValueError, match=r"log-normalised .* layers\['counts'\] \(--layer counts"):
        read_cells(source, 0, 23)


def test_a_layer_is_named_in_the_refusal() -> None:
    with pytest.raises(ValueError, match=r"^pbmc, layers\['x'\] holds a negative value"):
        check_counts(sparse.csr_matrix([[0, -3]]), "pbmc, layers['x']")


def test_booleans_are_not_counts() -> None:
    with pytest.raises(ValueError, match="holds bool values; raw counts are needed"):
        check_counts(sparse.csr_matrix([[True]]), "pbmc, X")


def _replace(file: h5py.File, name: str, values: Any) -> None:
    attributes = dict(file[name].attrs)
    del file[name]
    file[name] = values
    file[name].attrs.update(attributes)


def pointer(place: int, value: int) -> Callable[[h5py.File], None]:
    def spoil(file: h5py.File) -> None:
        file["X/indptr"][place] = value

    return spoil


@pytest.mark.parametrize("layout", ["CSR float32", "CSC"])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        pytest.param(pointer(-1, 10**6), "pointers go from 0 to 1000000", id="beyond the end"),
        pytest.param(pointer(-1, 90), "pointers go from 0 to 90", id="before the end"),
        pytest.param(pointer(0, 3), "pointers go from 3", id="not from 0"),
        pytest.param(
            lambda file: _replace(file, "X/indptr", file["X/indptr"][:-2]), "pointers", id="few"
        ),
        pytest.param(
            lambda file: _replace(file, "X/data", file["X/data"][:-2]), "indices and", id="values"
        ),
        pytest.param(
            lambda file: _replace(file, "X/indices", file["X/indices"][:] + 0.5),
            "indices are float64",
            id="indices of another kind",
        ),
        pytest.param(
            lambda file: _replace(file, "obs/_index", file["obs/_index"][:-3]),
            r"\(23, 11\) but obs\['_index'\] has 20 cells",
            id="fewer names than cells",
        ),
        pytest.param(lambda file: file.pop("X/indptr"), "cut short .*'indptr'", id="no pointers"),
    ],
)
def test_arrays_that_do_not_belong_together_are_damage(
    tmp_path: Path, layout: str, spoil: Callable[[h5py.File], Any], message: str
) -> None:
    path = write_h5ad(tmp_path, RAW, LAYOUTS[layout](RAW.counts))
    with h5py.File(path, "r+") as file:
        spoil(file)
    with pytest.raises(ValueError, match=rf"pbmc\.h5ad.*{message}"):
        scan_source(path, None)


@pytest.mark.parametrize("value", ["text", "complex"])
def test_other_kinds_of_values_are_not_counts(tmp_path: Path, value: str) -> None:
    path = write_h5ad(tmp_path, RAW, RAW.counts.astype(np.float32))
    kinds: dict[str, Any] = {"text": "S1", "complex": complex}
    with h5py.File(path, "r+") as file:
        _replace(file, "X", np.ones((23, 11)).astype(kinds[value]))
    with pytest.raises(ValueError, match=r"pbmc\.h5ad, X holds .* values; raw counts are needed"):
        scan_source(path, None)


@pytest.mark.parametrize("table", ["obs", "var"])
def test_names_that_are_not_utf8_are_named_with_their_file(tmp_path: Path, table: str) -> None:
    path = write_h5ad(tmp_path, RAW)
    with h5py.File(path, "r+") as file:
        names = file[f"{table}/_index"][:].astype("S9")
        names[1] = b"\xffG"
        _replace(file, f"{table}/_index", names)
    message = r"pbmc\.h5ad has a name that is not UTF-8 \(b'.xffG'\)"
    with pytest.raises(ValueError, match=message), open_source(scan_source(path, None)) as cells:
        cells.cell_names(0, 3)


def test_a_file_with_a_name_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    path = write_h5ad(tmp_path, RAW)
    odd = path.rename(tmp_path / os.fsdecode(b"caf\xe9.h5ad"))
    with pytest.raises(ValueError, match=r"caf.*\.h5ad has a name that is not UTF-8; rename it"):
        scan_source(odd, None)


def test_what_breaks_after_the_scan_is_named(tmp_path: Path) -> None:
    path = write_h5ad(tmp_path, RAW)
    source = scan_source(path, None)
    path.write_bytes(path.read_bytes()[:900])
    with pytest.raises(ValueError, match=r"pbmc\.h5ad is damaged or cut short \("):
        read_cells(source, 0, 3)
    path.unlink()
    with pytest.raises(ValueError, match=r"pbmc\.h5ad is damaged or cut short \("):
        read_cells(source, 0, 3)


def test_what_is_done_with_cells_is_not_blamed_on_their_file(tmp_path: Path) -> None:
    source = scan_source(write_h5ad(tmp_path, RAW), None)
    with pytest.raises(OSError, match="disk is full"), open_source(source):
        raise OSError("disk is full")


def test_columns_outside_the_matrix_are_damage(tmp_path: Path) -> None:
    path = write_h5ad(tmp_path, RAW)
    with h5py.File(path, "r+") as file:
        file["X"]["indices"][0] = 5000
    source = scan_source(path, None)
    with pytest.raises(ValueError, match=r"pbmc.h5ad is damaged or .*indices.*; fetch it again"):
        read_cells(source, 0, 3)
