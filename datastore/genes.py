"""The ordered gene panel, and the alignment of foreign matrices to it."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from datastore.gene_tables import NO_TABLES, GeneTables, is_ensembl_id
from datastore.harmonize import Harmonization, account_for, species_of, translate


@dataclass(frozen=True)
class GenePanel:
    """The genes a store or model knows, in their fixed order."""

    names: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.names:
            raise ValueError("the gene panel is empty; give at least one gene name")
        for name in self.names:  # the panel is kept as lines of text
            if not name or name != name.strip() or len(name.splitlines()) > 1:
                raise ValueError(
                    f"the gene panel has the name {name!r}: empty, with space around it, or with a "
                    "line break in it; clean the names"
                )
        if len(set(self.names)) != len(self.names):
            twice = Counter(self.names).most_common(1)[0][0]
            raise ValueError(f"the gene panel names {twice!r} twice; remove one of them")

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def positions(self) -> dict[str, int]:
        """Place of each gene in the panel."""
        return {name: place for place, name in enumerate(self.names)}

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the names in order: two panels agree exactly when their digests do."""
        return hashlib.sha256("\n".join(self.names).encode()).hexdigest()


def read_panel(path: Path) -> GenePanel:
    """Read a panel from a text file with one gene name per line.

    Raises:
        ValueError: If it is no text, names no gene, or one twice.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not a text file; a panel has one gene name per line"
        ) from error
    try:
        return GenePanel(tuple(line.strip() for line in lines if line.strip()))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def write_panel(panel: GenePanel, path: Path) -> None:
    """Write a panel as text, one gene name per line."""
    path.write_text("\n".join(panel.names) + "\n", encoding="utf-8")


def panel_of_sources(
    sources: Iterable[tuple[str, Sequence[str]]],
    tables: GeneTables = NO_TABLES,
    min_source_share: float = 0.0,
) -> GenePanel:
    """Make a panel of the genes that enough sources measured, in order of first appearance.

    Args:
        sources: Name and gene names of each source; their order matters for the panel's.
        tables: What the names stand for.
        min_source_share: 0 takes every gene (union), 1 those of all sources (intersection).

    Raises:
        ValueError: If no gene is left, or if sources of two species or of two kinds of gene name
            meet without a table that joins them.
    """
    measured_by: Counter[str] = Counter()
    first_of: dict[str, str] = {}
    first_named_by: dict[bool, str] = {}
    num_sources = 0
    for source, names in sources:
        translation = translate(names, source, tables)
        # Not in the order of a set of strings, which changes from process to process.
        genes = list(dict.fromkeys(gene for gene in translation.genes if gene))
        measured_by.update(genes)
        if genes:
            by_id = bool(np.mean([is_ensembl_id(gene) for gene in genes]) > 0.5)
            first_named_by.setdefault(by_id, source)
        num_sources += 1
        if translation.species is not None:
            first_of.setdefault(translation.species, source)
    if len(first_of) > 1 and not tables.mouse_genes:
        raise ValueError(
            f"the genes of {first_of['human']} look human, those of {first_of['mouse']} mouse: "
            "translate one-to-one orthologues by a table (panel.orthologues), or build two stores"
        )
    if len(first_named_by) > 1:
        raise ValueError(
            f"{first_named_by[True]} names its genes by Ensembl ids, {first_named_by[False]} by "
            "symbols: give a table that knows both (panel.hgnc or panel.ensembl)"
        )
    names = [gene for gene, count in measured_by.items() if count / num_sources >= min_source_share]
    if not names:
        raise ValueError(
            f"no gene is measured by {min_source_share:.0%} of the {num_sources} sources; lower "
            "panel.min_source_share, or bring them to one kind of gene name (panel.hgnc)"
        )
    return GenePanel(tuple(names))


def match_genes(
    names: Sequence[str],
    panel: GenePanel,
    source: str,
    min_share_found: float,
    tables: GeneTables = NO_TABLES,
) -> tuple[NDArray[np.int64], Harmonization]:
    """Find the panel position of each gene of a source.

    Args:
        names: The source's gene names, in its own order.
        panel: What they are matched against.
        source: Name of the source, for messages.
        min_share_found: Refuse the source below this share of the panel.
        tables: What names stand for that the panel does not have. It serves both ways: a panel of
            former symbols or Ensembl ids finds its genes under their present symbols.

    Returns:
        Panel position of each gene or -1 where it has none, and the line for the report.

    Raises:
        ValueError: If too little of the panel is found, or species are mixed up; the message says
            why this may be.
    """
    names = [str(name) for name in names]
    translation = translate(names, source, tables, panel.positions)
    index = _places_by_gene(panel, tables)
    # Only a source that is not translated from another species means the panel's gene by its name.
    own = panel.positions if not (translation.species == "mouse" and tables.mouse_genes) else {}
    places = np.array(
        [
            own[name] if name in own else index.get(gene or "", -1)
            for name, gene in zip(names, translation.genes, strict=True)
        ],
        np.int64,
    )
    line = account_for(names, panel.names, source, places.tolist(), translation)
    if not line.panel_genes_found or line.share_found < min_share_found:
        raise ValueError(
            f"{source}: only {line.panel_genes_found} of {len(panel)} panel genes found "
            f"({line.share_found:.1%}, at least {min_share_found:.0%} needed); "
            + _likely_cause(names, panel, tables)
        )
    return places, line


@lru_cache(maxsize=2)  # one panel meets thousands of sources
def _places_by_gene(panel: GenePanel, tables: GeneTables) -> Mapping[str, int]:
    """Panel position by gene: the panel's own name first, then the gene it is a surer name of."""
    _refuse_mouse_panel(panel, tables)
    index = dict(panel.positions)
    looked_up = [tables.look_up(name) for name in panel.names]
    for kind in ("own", "previous", "alias"):
        claims: dict[str, list[int]] = {}
        for place, (genes, found_by) in enumerate(looked_up):
            if found_by == kind and len(genes) == 1:
                claims.setdefault(genes[0], []).append(place)
        for gene, places in claims.items():
            # Two panel genes that claim one name: neither gets it, nor does a less sure one.
            index.setdefault(gene, places[0] if len(places) == 1 else -1)
    return index


def measured_genes(places: NDArray[np.int64], num_genes: int) -> NDArray[np.bool_]:
    """Tell which panel genes a source measured, (G,): the others are unknown there, not zero."""
    measured = np.zeros(num_genes, np.bool_)
    measured[places[places >= 0]] = True
    return measured


def align_counts(
    matrix: sparse.csr_matrix, places: NDArray[np.int64], num_genes: int
) -> sparse.csr_matrix:
    """Bring a matrix into panel order; genes outside the panel go, duplicates are summed.

    Args:
        matrix: Counts, CSR of shape (B, genes of the source).
        places: Panel position of each source gene, -1 where the panel lacks it.
        num_genes: Length of the panel, G.

    Returns:
        Counts, int64 CSR of shape (B, G), column indices sorted, no stored zeros.
    """
    columns = places[matrix.indices]
    keep = (columns >= 0) & (matrix.data != 0)
    kept_before = np.concatenate([[0], np.cumsum(keep)])
    # int64 first: duplicates of a file in 8-bit numbers have sums that these do not hold.
    aligned = sparse.csr_matrix(
        (matrix.data[keep].astype(np.int64), columns[keep], kept_before[matrix.indptr]),
        shape=(matrix.shape[0], num_genes),
    )
    aligned.sum_duplicates()  # sorts the columns as well
    return aligned


def _refuse_mouse_panel(panel: GenePanel, tables: GeneTables) -> None:
    if tables.mouse_genes and species_of(panel.names, "the gene panel", tables) == "mouse":
        raise ValueError(
            f"panel.orthologues translates mouse genes to human ones, but the panel holds mouse "
            f"genes ({panel.names[0]}); give a human panel, or leave panel.orthologues out"
        )


def _likely_cause(names: Sequence[str], panel: GenePanel, tables: GeneTables) -> str:
    """One sentence on why names and panel do not meet, with the remedy."""
    if not names:
        return "the source has no genes."
    source_ensembl = np.mean([is_ensembl_id(name) for name in names]) > 0.5
    panel_ensembl = np.mean([is_ensembl_id(name) for name in panel.names]) > 0.5
    if source_ensembl != panel_ensembl:
        return _cause_of_ensembl_ids(names[0], panel.names[0], bool(source_ensembl), tables)
    exact = set(names) & set(panel.names)
    if len(exact) > len(names) // 2:
        return (
            "its names fit, but it has too few genes: give the unfiltered matrix (often adata.raw) "
            "or lower panel.min_share_found."
        )
    upper = {name.upper() for name in panel.names}
    if sum(name.upper() in upper for name in names if name not in exact) > len(names) // 4:
        return (
            "the names differ by letter case only, as mouse symbols do: translate them to the "
            "panel's species first, by a table of orthologues (panel.orthologues)."
        )
    return f"the source has names such as {names[0]!r}, the panel such as {panel.names[0]!r}."


def _cause_of_ensembl_ids(
    source_name: str, panel_name: str, source_ensembl: bool, tables: GeneTables
) -> str:
    if source_ensembl:
        start = (
            f"its genes look like Ensembl ids ({source_name}) but the panel holds symbols "
            f"({panel_name}): "
        )
        by_hand = "put the symbols into var_names."
    else:
        start = f"the panel holds Ensembl ids ({panel_name}) but the source has {source_name!r}: "
        by_hand = "put Ensembl ids into var_names."
    if tables.ensembl:
        return f"{start}the tables given do not know these ids; give panel.ensembl for them."
    return (
        f"{start}give a table that knows both (panel.hgnc, or panel.ensembl with lines of "
        f"id<tab>symbol), or {by_hand}"
    )
