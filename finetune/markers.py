"""Marker genes of cell types, from a table that the user gives, and whether genes agree with them.

The table is tab-separated text, plain or gzipped, with a heading: PanglaoDB's (`official gene
symbol`, `cell type`, `species`), or any with the columns `gene` and `cell_type`.
"""

import csv
import gzip
import io
import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from scipy.stats import hypergeom

_GENE_COLUMNS: Final = ("official gene symbol", "gene", "symbol")
_TYPE_COLUMNS: Final = ("cell type", "cell_type", "type")
_SPECIES_CODES: Final = {"human": "Hs", "mouse": "Mm"}


@dataclass(frozen=True, kw_only=True)
class MarkerOverlap:
    """How the top genes of a type meet the markers of one.

    Attributes:
        cell_type: Whose markers these are.
        genes: Top genes that are markers.
        num_markers: Markers that the panel has.
        num_top: Top genes.
        p_value: Chance of as many or more, had the top genes been drawn from the panel at random.
    """

    cell_type: str
    genes: tuple[str, ...]
    num_markers: int
    num_top: int
    p_value: float


def read_markers(path: str | Path, species: str = "human") -> dict[str, tuple[str, ...]]:
    """Read marker genes by cell type, in the table's order.

    Args:
        path: The table.
        species: `human` or `mouse`; counts where the table has a column `species`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no such table; file and remedy are in the message.
    """
    rows = _rows(Path(path))
    header = [name.strip().lower() for name in rows[0]]
    columns = []
    for names in (_GENE_COLUMNS, _TYPE_COLUMNS):
        present = [name for name in names if name in header]
        if not present:
            raise ValueError(
                f"{path} has the columns {', '.join(header)}; a table of markers needs one of "
                f"{', '.join(map(repr, names))}, separated by tabs"
            )
        columns.append(header.index(present[0]))
    of_species = header.index("species") if "species" in header else None
    markers: dict[str, dict[str, None]] = {}
    for number, row in enumerate(rows[1:], 2):
        if not row:
            continue
        if len(row) != len(header):
            raise ValueError(
                f"{path} has {len(row)} instead of {len(header)} columns in line {number}; it was "
                "cut short or edited, fetch it again"
            )
        if of_species is None or _SPECIES_CODES[species] in row[of_species].split():
            gene, cell_type = (row[column].strip() for column in columns)
            markers.setdefault(cell_type, {})[gene] = None
    if not markers:
        raise ValueError(f"{path} holds no markers of {species} cells; give a table that does")
    return {name: tuple(genes) for name, genes in markers.items()}


def marker_overlap(
    top_genes: Sequence[str],
    markers: Mapping[str, Collection[str]],
    panel: Collection[str],
    most: int = 3,
) -> list[MarkerOverlap]:
    """Find the types whose markers the top genes hold more of than chance would.

    Args:
        top_genes: Genes of the panel, each once.
        markers: Marker genes by type.
        panel: All genes that could have been among the top.
        most: How many types to return at most.

    Returns:
        The types of the smallest hypergeometric p-values (upper tail), not corrected for the number
        of types; none without a single marker among the top genes.
    """
    known = set(panel)
    found = []
    for name, genes in markers.items():
        of_panel = known & set(genes)
        hits = tuple(gene for gene in top_genes if gene in of_panel)
        if hits:
            p_value = hypergeom.sf(len(hits) - 1, len(known), len(of_panel), len(top_genes))
            found.append(
                MarkerOverlap(
                    cell_type=name,
                    genes=hits,
                    num_markers=len(of_panel),
                    num_top=len(top_genes),
                    p_value=float(p_value),
                )
            )
    return sorted(found, key=lambda overlap: (overlap.p_value, overlap.cell_type))[:most]


def _rows(path: Path) -> list[list[str]]:
    try:
        content = path.read_bytes()
    except (FileNotFoundError, IsADirectoryError) as error:
        raise FileNotFoundError(f"no such table of markers: {path}") from error
    try:
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
        rows = list(csv.reader(io.StringIO(content.decode("utf-8-sig")), delimiter="\t"))
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is not a whole table of text: {error}") from error
    if not rows:
        raise ValueError(f"{path} is empty; give a table of markers")
    return rows
