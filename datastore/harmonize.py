"""What a source's gene names stand for, and the report of what became of them.

1. A name is read: an Ensembl id (with or without version) is looked up, `SYMBOL_ENSG…` taken apart.
2. The genes of a mouse source become their one-to-one human orthologues.
3. A symbol is the approved one, or else a previous one, or else an alias.
4. What may mean two genes is left out, and the report says so.
"""

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from datastore.gene_tables import NO_TABLES, GeneTables, Species, is_ensembl_id, is_mouse_symbol

# Share of the genes of plain species that may be of the other one before a source is mixed.
_STRAY_SHARE: Final = 0.2
_NAMES_IN_REPORT: Final = 20


@dataclass(frozen=True)
class Translation:
    """The gene that each column of a source stands for."""

    genes: tuple[str | None, ...]
    """Gene of each column; none where it has no gene or may have two."""
    ambiguous: Mapping[int, str]
    """Column left out because its name is ambiguous → what it may mean."""
    species: Species | None
    """What the names look like."""


def translate(
    names: Sequence[str],
    source: str,
    tables: GeneTables = NO_TABLES,
    panel: Collection[str] = frozenset(),
) -> Translation:
    """Find the gene of each name of a source.

    An alias is left out if it may mean two genes, or one that the source also names by its approved
    or a previous symbol. A previous symbol is the same gene by definition and stays.

    Args:
        names: Gene names in the source's order.
        source: Name of the source, for messages.
        tables: What names mean.
        panel: Names that are no riddle, because the panel has just these.

    Raises:
        ValueError: If the source holds genes of two species.
    """
    species = species_of(names, source, tables)
    translated = species == "mouse" and bool(tables.mouse_genes)
    genes: list[str | None] = []
    ambiguous: dict[int, str] = {}
    aliases: dict[int, str] = {}
    for column, name in enumerate(names):
        found, kind = tables.look_up(name, species)
        if name in panel and not translated:
            genes.append(found[0] if len(found) == 1 else name)
            continue
        genes.append(found[0] if len(found) == 1 else None)
        if len(found) > 1:
            ambiguous[column] = f"{name} -> {' or '.join(found)}"
        elif kind == "alias":
            aliases[column] = found[0]
    surely_named = {gene for column, gene in enumerate(genes) if column not in aliases}
    for column, gene in aliases.items():
        if gene in surely_named:
            genes[column] = None
            ambiguous[column] = f"{names[column]} -> {gene}, which has a column of its own"
    return Translation(tuple(genes), dict(sorted(ambiguous.items())), species)


def species_of(names: Iterable[str], source: str, tables: GeneTables = NO_TABLES) -> Species | None:
    """Tell human from mouse by Ensembl ids, genome prefixes, the orthologue table, or letter case.

    Raises:
        ValueError: If the names are plainly of both.
    """
    plain = {"human": 0, "mouse": 0}
    by_case: dict[str, list[str]] = {"human": [], "mouse": []}
    for name in names:
        species = tables.plain_species(name)
        if species is not None:
            plain[species] += 1
        elif is_ensembl_id(name):
            continue  # of a third species
        elif is_mouse_symbol(name):
            by_case["mouse"].append(name)
        elif name.upper() == name:
            by_case["human"].append(name)
    if min(plain.values()) > _STRAY_SHARE * sum(plain.values()):
        raise ValueError(
            f"{source} mixes species: {plain['human']} genes are human, {plain['mouse']} mouse; "
            "split it into one file per species"
        )
    cased = {which: len(found) for which, found in by_case.items()}
    # Names that differ in case only: hardly any in one species, most genes of two.
    both = set(by_case["human"]) & {name.upper() for name in by_case["mouse"]}
    if 2 * len(both) > _STRAY_SHARE * (sum(cased.values()) + sum(plain.values())):
        gene = min(both)
        raise ValueError(
            f"{source} mixes species: {len(both)} genes are there as human and as mouse ones, such "
            f"as {gene} and {gene.capitalize()}; split it into one file per species"
        )
    votes = plain if sum(plain.values()) >= sum(cased.values()) else cased
    if votes["human"] == votes["mouse"]:
        return None
    return "human" if votes["human"] > votes["mouse"] else "mouse"


@dataclass(frozen=True)
class NameList:
    """How many names, and the first of them."""

    count: int
    first: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Harmonization:
    """What became of a source's genes; one line of the report.

    `genes_in_source` = `panel_genes_found` + `summed` + `dropped` + `ambiguous`.
    """

    source: str
    species: Species | None
    """What the names look like."""
    genes_in_source: int
    panel_genes: int
    panel_genes_found: int
    renamed: NameList
    """Columns that got to their panel gene under another name."""
    summed: NameList
    """Columns whose panel gene had one already; their counts are added to it."""
    dropped: NameList
    """Columns whose gene is not in the panel."""
    ambiguous: NameList
    """Columns that may be one of two genes, left out."""

    @property
    def share_found(self) -> float:
        """Share of the panel that the source measured."""
        return self.panel_genes_found / self.panel_genes

    @property
    def duplicates_summed(self) -> int:
        """Columns beyond the first of each panel gene."""
        return self.summed.count


def account_for(
    names: Sequence[str],
    panel_names: Sequence[str],
    source: str,
    places: Sequence[int],
    translation: Translation,
) -> Harmonization:
    """Say what became of each gene name of a source.

    Args:
        names: Gene names in the source's order.
        panel_names: The panel's names in its order.
        source: Name of the source.
        places: Panel position of each gene, -1 where it has none.
        translation: What `translate` made of the names.
    """
    renamed, summed, dropped, unclear = [], [], [], []
    taken: set[int] = set()
    for column, (name, place) in enumerate(zip(names, places, strict=True)):
        if place < 0:
            if column in translation.ambiguous:
                unclear.append(translation.ambiguous[column])
            else:
                dropped.append(name)
            continue
        change = name if panel_names[place] == name else f"{name} -> {panel_names[place]}"
        if change != name:
            renamed.append(change)
        if place in taken:
            summed.append(change)
        taken.add(place)
    return Harmonization(
        source=source,
        species=translation.species,
        genes_in_source=len(names),
        panel_genes=len(panel_names),
        panel_genes_found=len(taken),
        renamed=_name_list(renamed),
        summed=_name_list(summed),
        dropped=_name_list(dropped),
        ambiguous=_name_list(unclear),
    )


def _name_list(names: Sequence[str]) -> NameList:
    return NameList(len(names), tuple(names[:_NAMES_IN_REPORT]))


def write_report(
    folder: Path,
    lines: Sequence[Harmonization],
    shares_of_counts: Sequence[float],
    tables: GeneTables = NO_TABLES,
    cell_tallies: Sequence[Mapping[str, int]] | None = None,
    shared_cells: Sequence[Mapping[str, str | int]] = (),
) -> None:
    """Write `harmonization.json` and the same as a table, `harmonization.txt`.

    Args:
        folder: Where to.
        lines: What became of each source's genes.
        shares_of_counts: Share of each source's counts that fell on panel genes, 0 to 1.
        tables: The tables used, whose digests are kept.
        cell_tallies: For each source how many cells were empty, poor, recovered.
        shared_cells: `source`, `first` and `cells`: how many cells of a source have the counts of
            an earlier cell, and whose.
    """
    tallies = [{} for _ in lines] if cell_tallies is None else cell_tallies
    report = {
        "tables": dict(tables.digests),
        "sources": [
            {
                **asdict(line),
                "share_found": line.share_found,
                "share_of_counts_kept": share,
                **cells,
            }
            for line, share, cells in zip(lines, shares_of_counts, tallies, strict=True)
        ],
        "shared_cells": [dict(shared) for shared in shared_cells],
    }
    text = json.dumps(report, indent=1) + "\n"
    (folder / "harmonization.json").write_text(text, encoding="utf-8")
    titles = list(tallies[0]) if tallies else []
    rows = [
        f"{'source':32} {'genes':>8} {'panel found':>11} {'counts kept':>11} "
        f"{'renamed':>8} {'summed':>8} {'dropped':>8} {'ambiguous':>9}"
        + "".join(f" {title.replace('_', ' '):>15}" for title in titles)
    ]
    details = []
    for line, share, cells in zip(lines, shares_of_counts, tallies, strict=True):
        rows.append(
            f"{line.source:32} {line.genes_in_source:8,} {line.share_found:11.1%} {share:11.1%} "
            f"{line.renamed.count:8,} {line.summed.count:8,} {line.dropped.count:8,} "
            f"{line.ambiguous.count:9,}" + "".join(f" {cells[title]:15,}" for title in titles)
        )
        for title in ("renamed", "summed", "dropped", "ambiguous"):
            names: NameList = getattr(line, title)
            if names.count:
                more = ", …" if names.count > len(names.first) else ""
                details.append(f"{line.source}, {title}: {', '.join(names.first)}{more}")
    details += [
        f"{shared['source']}: {shared['cells']:,} cells have the counts of cells of "
        f"{shared['first'] if shared['first'] != shared['source'] else 'the same source'}"
        for shared in shared_cells
    ]
    text = "\n".join([*rows, "", *details]) + "\n"
    (folder / "harmonization.txt").write_text(text, encoding="utf-8")
