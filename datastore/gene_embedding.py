"""Gene vectors (gene2vec): read by gene name, brought into panel order, kept with their provenance.

A folder of gene vectors has `genes.npy`, float32 of shape (G, D), `genes.txt` with the gene of each
row, and `provenance.json`, which says where they come from and has the SHA-256 of the vectors.
"""

import json
import shutil
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from datastore.genes import GenePanel, read_panel, write_panel
from datastore.store import file_digest, write_json
from datastore.text_tables import open_text

VECTORS: Final = "genes.npy"
NAMES: Final = "genes.txt"
PROVENANCE: Final = "provenance.json"


@dataclass(frozen=True, eq=False)
class GeneVectors:
    """Vectors in panel order, float32 of shape (G, D), zeros for genes without one."""

    matrix: NDArray[np.float32]
    found: NDArray[np.bool_]
    """Which genes of the panel have one."""


def load_gene_vectors(vectors: Path, names: Path | None, panel: GenePanel) -> GeneVectors:
    """Import gene vectors by gene name.

    Args:
        vectors: NumPy file (`.npy`) of shape (genes, D), or word2vec text.
        names: Text file with the gene name of each row of a `.npy` file; none takes the `.txt` of
            the same name beside it. Word2vec text has its own names.
        panel: Order to bring them into.

    Raises:
        ValueError: If the files do not fit each other or the panel shares no gene with them.
    """
    if vectors.suffix == ".npy" or names is not None:
        names = names or vectors.with_suffix(".txt")
        known, matrix = read_panel(names), _read_array(vectors)
        if matrix.ndim != 2 or len(matrix) != len(known):
            raise ValueError(
                f"{vectors} has shape {matrix.shape} but {names} names {len(known)} genes; "
                "give one row per name"
            )
    else:
        known, matrix = _read_text(vectors)
    if not np.isfinite(matrix).all():
        raise ValueError(f"{vectors} has values that are not finite; export the vectors again")
    rows = np.array([known.positions.get(name, -1) for name in panel.names])
    found = rows >= 0
    if not found.any():
        raise ValueError(
            f"{names or vectors} shares no gene with the panel; both must use the same kind of name"
        )
    aligned = np.zeros((len(panel), matrix.shape[1]), np.float32)
    aligned[found] = matrix[rows[found]]
    return GeneVectors(aligned, found)


def fill_missing(vectors: GeneVectors, how: str, seed: int) -> NDArray[np.float32]:
    """Give genes without a vector `random` ones with mean and spread of the others, or `zeros`."""
    matrix = vectors.matrix.copy()
    if how == "random":
        present = vectors.matrix[vectors.found].astype(np.float64)
        shape = (int((~vectors.found).sum()), matrix.shape[1])
        drawn = np.random.default_rng([seed, 1]).normal(present.mean(), present.std(), shape)
        matrix[~vectors.found] = drawn.astype(np.float32)
    return matrix


def write_gene_vectors(
    folder: Path, matrix: NDArray[np.float32], panel: GenePanel, provenance: Mapping[str, Any]
) -> dict[str, Any]:
    """Write a folder of gene vectors beside its target and rename it into place.

    Returns:
        The provenance as written: with the digests of panel and vectors.

    Raises:
        FileExistsError: If there is something at the target.
    """
    beside = folder.with_name(folder.name + ".part")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    np.save(beside / VECTORS, matrix, allow_pickle=False)
    write_panel(panel, beside / NAMES)
    digests = {"panel_digest": panel.digest, "sha256": file_digest(beside / VECTORS)}
    facts = {**provenance, **digests}
    write_json(beside / PROVENANCE, facts)
    refuse_existing(folder)
    beside.rename(folder)
    return facts


def refuse_existing(folder: Path) -> None:
    """Refuse a target that is there already."""
    if folder.exists():
        raise FileExistsError(f"{folder} exists; choose another output")


def provenance_of(vectors: Path) -> dict[str, Any]:
    """Say where gene vectors come from: their file, and what the folder says of them.

    Raises:
        ValueError: If the folder's `provenance.json` is of other vectors.
    """
    facts: dict[str, Any] = {"file": vectors.name, "sha256": file_digest(vectors)}
    note = vectors.with_name(PROVENANCE)
    if vectors.name != VECTORS or not note.is_file():
        return facts
    try:
        said = json.loads(note.read_text(encoding="utf-8"))
        same = said["sha256"] == facts["sha256"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{note} cannot be read ({error}); remove it") from error
    if not same:
        raise ValueError(f"{vectors} is not the file that {note} describes; make both again")
    return {**said, **facts}


def _read_array(path: Path) -> NDArray[Any]:
    try:
        matrix = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is not a plain NumPy array file (.npy): {error}") from error
    if not isinstance(matrix, np.ndarray) or not np.issubdtype(matrix.dtype, np.number):
        raise ValueError(f"{path} is not an array of numbers; give one .npy file, not .npz")
    return matrix


def _read_text(path: Path) -> tuple[GenePanel, NDArray[np.float32]]:
    """Read word2vec text: a name and its numbers on each line; the first may have the sizes."""
    names: list[str] = []
    rows: list[NDArray[np.float32]] = []
    sizes: tuple[int, int] | None = None
    try:
        with open_text(path) as file:
            for number, line in enumerate(file, 1):
                words = line.split()
                if number == 1 and len(words) == 2 and all(word.isdigit() for word in words):
                    sizes = (int(words[0]), int(words[1]))
                elif words:
                    length = sizes[1] if sizes else len(rows[0]) if rows else len(words) - 1
                    if length < 1 or len(words) <= length:
                        raise ValueError(f"line {number} is not a name and {length} numbers")
                    names.append(" ".join(words[:-length]))
                    rows.append(np.array(words[-length:], np.float32))
    except (ValueError, EOFError, OSError, zlib.error) as error:
        if isinstance(error, FileNotFoundError | PermissionError):
            raise
        raise ValueError(
            f"{path} is not word2vec text ({error}); each line needs a gene name and its numbers"
        ) from error
    if not rows or (sizes is not None and len(rows) != sizes[0]):
        raise ValueError(f"{path} has {len(rows)} vectors, cut short; fetch it again")
    return GenePanel(tuple(names)), np.stack(rows)
