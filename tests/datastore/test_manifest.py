"""What a person names becomes a list of files, each once, with what is known of its cells."""

import gzip
from pathlib import Path

import pytest

from datastore.manifest import ListedSource, list_sources

PANGLAO = (
    '"SRA100","SRS1","Lung","10x chromium","Homo sapiens","NextSeq 500","20","9","12","0","1","0"\n'
    '"SRA100","SRS2",\\N,"drop-seq","Mus musculus","NextSeq 500","20000","900","12",\\N,\\N,\\N\n'
    '"SRA200","notused","Liver","C1 Fluidigm","Homo sapiens","HiSeq","2","9","1","1","0","0"\n'
)


def names(folder: Path, *patterns: str) -> list[str]:
    listed = list_sources([str(folder / pattern) for pattern in patterns])
    return [str(source.path.relative_to(folder)) for source in listed]


def touch(folder: Path, *paths: str) -> None:
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).touch()


def test_globs_and_folders_are_expanded_in_order_and_once(tmp_path: Path) -> None:
    touch(tmp_path, "b.h5ad", "a.h5ad", "x[1].h5ad", "notes.txt", "deep/c.h5ad")
    assert names(tmp_path, "") == ["a.h5ad", "b.h5ad", "deep/c.h5ad", "x[1].h5ad"]
    assert names(tmp_path, "?.h5ad") == ["a.h5ad", "b.h5ad"]
    assert names(tmp_path, "**/c.h5ad") == ["deep/c.h5ad"]
    assert names(tmp_path, "b.h5ad", "*.h5ad") == ["b.h5ad", "a.h5ad", "x[1].h5ad"]
    assert names(tmp_path, "x[1].h5ad") == ["x[1].h5ad"]
    with pytest.raises(FileNotFoundError, match=r"sources: nothing matches .*\*\.loom"):
        names(tmp_path, "*.loom")
    (tmp_path / "empty").mkdir()
    assert names(tmp_path, "empty") == ["empty"]  # it is refused by name, like a broken file


def test_a_folder_gives_every_known_kind_and_no_store(tmp_path: Path) -> None:
    known = [
        "a.h5ad",
        "b/c.h5",
        "b/d.loom",
        "b/e.sparse.RData",
        "b/f.csv.gz",
        "b/g.tsv",
        "m/filtered",
        "z.zarr",
    ]
    inside = ["m/filtered/matrix.mtx.gz", "m/filtered/features.tsv.gz", "z.zarr/zarr.json"]
    touch(tmp_path, *(name for name in known if "." in name and name != "z.zarr"), *inside)
    touch(tmp_path, "s.zarr/zarr.json", "s.zarr/manifest.json", "s.zarr.building/x.h5ad")
    touch(tmp_path, "readme.md", ".hidden.h5ad", "z.zarr/deep/y.h5ad")
    (tmp_path / "b" / "circle").symlink_to(tmp_path)
    assert names(tmp_path, "") == known


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("SRA1_SRS2.sparse.RData", "SRA1_SRS2"),
        ("a.b.csv.gz", "a.b"),
        ("cells.zarr", "cells"),
        ("filtered_feature_bc_matrix", "filtered_feature_bc_matrix"),
        ("v1.2", "v1.2"),
    ],
)
def test_a_source_is_named_by_its_file(file: str, name: str) -> None:
    assert ListedSource(Path("x") / file).source_name == name


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".csv.gz"])
def test_a_table_lists_files_with_labels(tmp_path: Path, suffix: str) -> None:
    touch(tmp_path, "raw/a.h5ad", "raw/b.h5ad")
    rows = [
        ["path", "name", "tissue", "species"],
        ["raw/a.h5ad", "first", '"lung"', "human"],
        [str(tmp_path / "raw/b.h5ad"), "", "NA", "mouse"],
        ["../else/x[1]*.h5ad", "", "", ""],
    ]
    text = "".join(("\t" if "tsv" in suffix else ",").join(row) + "\n" for row in rows).encode()
    table = tmp_path / f"samples{suffix}"
    table.write_bytes(gzip.compress(text) if "gz" in suffix else text)
    first = ListedSource(
        tmp_path / "raw/a.h5ad", "first", (("tissue", "lung"), ("species", "human"))
    )
    expected = [
        first,
        ListedSource(tmp_path / "raw/b.h5ad", None, (("species", "mouse"),)),
        ListedSource(tmp_path / "../else/x[1]*.h5ad"),  # not a glob, and left as it is
    ]
    assert list_sources([str(table)]) == expected
    both = list_sources([str(tmp_path / "raw"), str(table)])  # each file once, with its labels
    assert both == expected


def test_panglaodbs_table_labels_the_files_beside_it(tmp_path: Path) -> None:
    touch(tmp_path, *(f"raw/{n}.sparse.RData" for n in ("SRA100_SRS1", "SRA200", "other")))
    (tmp_path / "metadata.txt").write_text(PANGLAO)
    listed = list_sources([str(tmp_path / "metadata.txt"), str(tmp_path / "raw")])
    labels = {source.source_name: dict(source.labels) for source in listed}
    assert labels["other"] == {}
    assert labels["SRA200"]["tissue"] == "Liver"
    assert labels["SRA100_SRS1"] == {
        "SRA": "SRA100",
        "SRS": "SRS1",
        "tissue": "Lung",
        "protocol": "10x chromium",
        "species": "Homo sapiens",
        "instrument": "NextSeq 500",
        "tumor": "0",
        "primary_adult": "1",
        "cell_line": "0",
    }
    with pytest.raises(ValueError, match="no file in sources is named like its rows"):
        list_sources([str(tmp_path / "metadata.txt")])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("path,source\na.h5ad,x\n", "has a column 'source'", id="reserved"),
        pytest.param("path,_index\na.h5ad,x\n", "has a column '_index'", id="zarr's"),
        pytest.param("path,a/b\na.h5ad,x\n", "has a column 'a/b': .* no name for", id="slash"),
        pytest.param("path,..\na.h5ad,x\n", r"has a column '\.\.'", id="folder above"),
        pytest.param(f"path,{'x' * 300}\na.h5ad,x\n", "has a column 'xxx", id="long"),
        pytest.param(f"path,x\na.h5ad,{'b' * 2**18}\n", "is cut short, damaged or", id="field"),
        pytest.param("path,x,x\na.h5ad,1,2\n", "has a column 'x': empty, twice", id="twice"),
        pytest.param("path,\na.h5ad,1\n", "has a column ''", id="nameless"),
        pytest.param("path,x\na.h5ad\n", "row 2 has 1 fields instead of 2", id="short row"),
        pytest.param("x,path\n1,\n", "row 2 has no path; name a file", id="no path"),
        pytest.param("path\na.h5ad\na.h5ad\n", "lists .*a.h5ad twice", id="file twice"),
        pytest.param("path\n", "lists no file", id="no rows"),
    ],
)
def test_unusable_tables_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "samples.csv").write_text(text)
    with pytest.raises(ValueError, match=message) as refusal:
        list_sources([str(tmp_path / "samples.csv")])
    assert "samples.csv" in str(refusal.value)


def test_a_cut_table_is_named(tmp_path: Path) -> None:
    (tmp_path / "samples.csv.gz").write_bytes(gzip.compress(b"path,x\na.h5ad,1\n")[:-9])
    with pytest.raises(ValueError, match=r"samples\.csv\.gz is cut short, damaged or not text"):
        list_sources([str(tmp_path / "samples.csv.gz")])
