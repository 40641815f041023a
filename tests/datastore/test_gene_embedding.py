"""Gene vectors are brought into panel order by name."""

from pathlib import Path

import numpy as np
import pytest

from datastore.gene_embedding import load_gene_vectors
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
    aligned, share = load_gene_vectors(*write_files(tmp_path, VECTORS), panel)
    assert aligned.dtype == np.float32
    assert share == 0.75
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
