"""Sources that can only be decoded whole, kept decoded from the scan until they are aligned.

An `.RData`, an mtx folder or a table of text takes a second or minutes to decode. Its counts are
kept beside the ingest's other work as plain NumPy arrays and mapped into memory from there.
"""

import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from datastore.raw_cells import RawCells, decoded_whole

log = logging.getLogger(__name__)

KEPT_FORMATS: Final = ("rdata", "10x mtx", "table")
_FACTS: Final = "facts.json"
_ARRAYS: Final = ("data", "indices", "indptr")


def keep_decoded(folder: Path, cells: RawCells) -> bool:
    """Write the cells of a source into a new folder, unless the disk is full.

    Args:
        folder: Where to; nobody reads it before this returns.
        cells: The open source.

    Returns:
        Whether they are there.
    """
    matrix = cells.counts(0, cells.num_cells)
    facts = {
        "shape": list(matrix.shape),
        "place": cells.place,
        "names": [str(name) for name in cells.cell_names(0, cells.num_cells)],
    }
    try:
        folder.mkdir(parents=True)
        for name in _ARRAYS:
            values = getattr(matrix, name)
            kept = _narrow(values) if name == "data" else values
            np.save(folder / f"{name}.npy", kept, allow_pickle=False)
        (folder / _FACTS).write_text(json.dumps(facts), encoding="utf-8")
    except OSError as error:
        log.debug("%s is not kept: %s", folder, error)
        shutil.rmtree(folder, ignore_errors=True)
        return False
    return True


def is_kept(folder: str | None) -> bool:
    """Tell whether decoded cells are there."""
    return folder is not None and (Path(folder) / _FACTS).is_file()


@contextmanager
def open_decoded(folder: Path) -> Iterator[RawCells]:
    """Open what was kept. It has no gene names: the scan has read them."""
    facts = json.loads((folder / _FACTS).read_text(encoding="utf-8"))
    arrays = [np.load(folder / f"{name}.npy", mmap_mode="r") for name in _ARRAYS]
    matrix = sparse.csr_matrix(tuple(arrays), shape=facts["shape"])
    yield decoded_whole(matrix, (), facts["names"], place=facts["place"])


def _narrow(values: NDArray[Any]) -> NDArray[Any]:
    """Hold counts in two bytes each if they fit; anything else stays as it is."""
    with np.errstate(invalid="ignore"):
        counts = values.astype(np.uint16)
    return counts if np.array_equal(counts, values) else values
