"""Gene vectors are brought into panel order by name, and folders of them say their origin."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from datastore.gene_embedding import (
    GeneVectors,
    fill_missing,
    load_gene_vectors,
    provenance_of,
    write_gene_vectors,
)
from datastore.genes import GenePanel

VECTORS = np.random.default_rng(0).normal(size=(5, 3))
NAMES = ("D", "A", "X", "C", "B")


def write_files(folder: Path, vectors: object, names: tuple[str, ...] = NAMES) -> tuple[Path, Path]:
    if isinstance(vectors, bytes):
        (folder / "vectors.npy").write_bytes(vectors)
    else:
        np.save(folder / "vectors.npy", np.asarray(vectors))
    (folder / "names.txt").write_text("\n".join(names) + "\n", encoding="utf-8")
    return folder / "vectors.npy", folder / "names.txt"


def test_vectors_follow_the_panel(tmp_path: Path) -> None:
    panel = GenePanel(("A", "NEW", "B", "C"))
    loaded = load_gene_vectors(*write_files(tmp_path, VECTORS), panel)
    aligned = loaded.matrix
    assert aligned.dtype == np.float32
    assert loaded.found.tolist() == [True, False, True, True]
    for place, name in enumerate(panel.names):
        expected = VECTORS[NAMES.index(name)] if name in NAMES else np.zeros(3)
        np.testing.assert_array_equal(aligned[place], expected.astype(np.float32))


@pytest.mark.parametrize(
    ("vectors", "names", "message"),
    [
        pytest.param(VECTORS[:4], NAMES, r"shape \(4, 3\) but .*names 5 genes", id="too few rows"),
        pytest.param(VECTORS[0], NAMES, r"shape \(3,\)", id="one vector"),
        pytest.param(b"gene 0.1 0.2\n", NAMES, "not a plain NumPy array file", id="text"),
        pytest.param(b"", NAMES, "not a plain NumPy array file", id="empty file"),
        pytest.param(np.array([{}] * 5), NAMES, "not a plain NumPy array file", id="pickled"),
        pytest.param(np.full((5, 3), np.nan), NAMES, "values that are not finite", id="nan"),
        pytest.param(VECTORS.astype(str), NAMES, "not an array of numbers", id="not numbers"),
        pytest.param(VECTORS, tuple("VWXYZ"), "shares no gene with the panel", id="other genes"),
        pytest.param(VECTORS, tuple("AABCD"), "names 'A' twice", id="a gene twice"),
    ],
)
def test_unusable_files_are_refused(
    tmp_path: Path, vectors: object, names: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load_gene_vectors(*write_files(tmp_path, vectors, names), GenePanel(("A", "B")))


def test_an_archive_of_arrays_is_refused(tmp_path: Path) -> None:
    _, names = write_files(tmp_path, VECTORS)
    np.savez(tmp_path / "vectors.npz", vectors=VECTORS)
    with pytest.raises(ValueError, match=r"give one \.npy file, not \.npz"):
        load_gene_vectors(tmp_path / "vectors.npz", names, GenePanel(("A",)))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    _, names = write_files(tmp_path, VECTORS)
    with pytest.raises(FileNotFoundError, match=r"absent\.npy"):
        load_gene_vectors(tmp_path / "absent.npy", names, GenePanel(("A",)))


def test_names_may_stand_beside_the_array(tmp_path: Path) -> None:
    vectors, names = write_files(tmp_path, VECTORS)
    names.rename(vectors.with_suffix(".txt"))
    panel = GenePanel(("A", "B"))
    np.testing.assert_array_equal(
        load_gene_vectors(vectors, None, panel).matrix, VECTORS[[1, 4]].astype(np.float32)
    )


# --- word2vec text ---

LINES = [f"{name} {' '.join(map(str, row))}" for name, row in zip(NAMES, VECTORS, strict=True)]


@pytest.mark.parametrize("header", [True, False], ids=["header", "no header"])
@pytest.mark.parametrize("packed", [True, False], ids=["gzipped", "plain"])
@pytest.mark.parametrize("between", [" ", "\t"], ids=["spaces", "tabs"])
def test_word2vec_text_is_read(tmp_path: Path, header: bool, packed: bool, between: str) -> None:
    lines = [*(["5 3"] if header else []), *LINES, ""]
    content = "\n".join(lines).replace(" ", between).encode()
    path = tmp_path / ("vectors.txt.gz" if packed else "vectors.txt")
    path.write_bytes(gzip.compress(content) if packed else content)
    loaded = load_gene_vectors(path, None, GenePanel(("C", "Q", "D")))
    assert loaded.found.tolist() == [True, False, True]
    expected = np.stack([VECTORS[3], np.zeros(3), VECTORS[0]]).astype(np.float32)
    np.testing.assert_array_equal(loaded.matrix, expected)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(b"", "has 0 vectors, cut short", id="empty"),
        pytest.param("\n".join(["6 3", *LINES]).encode(), "has 5 vectors, cut short", id="lines"),
        pytest.param(
            "\n".join([*LINES[:4], LINES[4][:-30]]).encode(), "not word2vec text", id="line"
        ),
        pytest.param(b"A 1 2\nB 1 2 x\n", "not word2vec text", id="not a number"),
        pytest.param(b"A\nB\n", r"line 1 is not a name and 0 numbers", id="names only"),
        pytest.param(b"5 3\n1 2 3\n", r"line 2 is not a name and 3 numbers", id="no name"),
        pytest.param(b"A 1 2\nA 1 2\n", "names 'A' twice", id="a gene twice"),
        pytest.param(b"A 1 inf\n", "values that are not finite", id="infinite"),
        pytest.param(gzip.compress(b"A 1 2\n" * 999)[:-20], "not word2vec text", id="cut gzip"),
        pytest.param(b"\x93NUMPY\xff\xfe", "not word2vec text", id="binary"),
    ],
)
def test_other_text_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / ("v.txt.gz" if content[:2] == b"\x1f\x8b" else "v.txt")
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_gene_vectors(path, None, GenePanel(("A", "B")))


# --- genes without a vector ---


def test_random_vectors_have_the_spread_of_the_others() -> None:
    rng = np.random.default_rng(0)
    found = np.arange(400) % 2 == 0
    matrix = np.where(found[:, None], rng.normal(3, 0.5, (400, 50)), 0).astype(np.float32)
    filled = fill_missing(GeneVectors(matrix, found), "random", seed=1)
    np.testing.assert_array_equal(filled[found], matrix[found])
    assert filled[~found].mean() == pytest.approx(3, abs=0.03)  # standard error 0.005
    assert filled[~found].std() == pytest.approx(0.5, abs=0.02)
    again = fill_missing(GeneVectors(matrix, found), "random", seed=1)
    np.testing.assert_array_equal(filled, again)
    assert (
        fill_missing(GeneVectors(matrix, found), "random", seed=2)[~found] != filled[~found]
    ).all()
    np.testing.assert_array_equal(fill_missing(GeneVectors(matrix, found), "zeros", 1), matrix)
    assert not matrix[~found].any()  # the input stays


# --- provenance ---


def test_a_folder_says_where_its_vectors_come_from(tmp_path: Path) -> None:
    panel = GenePanel(("A", "B"))
    matrix = np.eye(2, dtype=np.float32)
    said = write_gene_vectors(tmp_path / "v", matrix, panel, {"method": "by hand"})
    assert sorted(path.name for path in (tmp_path / "v").iterdir()) == [
        "genes.npy",
        "genes.txt",
        "provenance.json",
    ]
    assert provenance_of(tmp_path / "v" / "genes.npy") == {"file": "genes.npy", **said}
    assert said["panel_digest"] == panel.digest
    np.testing.assert_array_equal(
        load_gene_vectors(tmp_path / "v" / "genes.npy", None, panel).matrix, matrix
    )
    with pytest.raises(FileExistsError, match="choose another output"):
        write_gene_vectors(tmp_path / "v", matrix, panel, {})


def test_any_file_has_a_digest(tmp_path: Path) -> None:
    vectors, _ = write_files(tmp_path, VECTORS)
    assert set(provenance_of(vectors)) == {"file", "sha256"}


def test_a_note_of_other_vectors_is_refused(tmp_path: Path) -> None:
    write_gene_vectors(tmp_path / "v", np.eye(2, dtype=np.float32), GenePanel(("A", "B")), {})
    np.save(tmp_path / "v" / "genes.npy", np.ones((2, 2)))
    with pytest.raises(
        ValueError, match=r"genes\.npy is not the file that .*provenance\.json desc"
    ):
        provenance_of(tmp_path / "v" / "genes.npy")
    for broken in ("{", "[]", json.dumps({"method": "x"})):
        (tmp_path / "v" / "provenance.json").write_text(broken)
        with pytest.raises(ValueError, match=r"provenance\.json cannot be read"):
            provenance_of(tmp_path / "v" / "genes.npy")
