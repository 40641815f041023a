"""Tables that say what gene names stand for, read from files that the user gives.

HGNC's complete set knows previous symbols, aliases and Ensembl ids; a list of Ensembl ids serves
other releases and species; a list of orthologues leads from mouse to human.
"""

import csv
import gzip
import hashlib
import io
import re
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

from datastore.config import PanelConfig

Kind = Literal["own", "previous", "alias"]
Species = Literal["human", "mouse"]

HGNC_COLUMNS: Final = ("symbol", "alias_symbol", "prev_symbol", "ensembl_gene_id")
# GENCODE marks the Y copy of a pseudoautosomal gene by a suffix; it is the same gene.
_ENSEMBL: Final = re.compile(r"(?:(.+)_)?(ENS[A-Z]*G\d{6,})(?:\.\d+)?(?:_PAR_Y)?")
_SPECIES_OF_PREFIX: Final[dict[str, Species]] = {"ENSG": "human", "ENSMUSG": "mouse"}
_GENOME: Final = re.compile(r"(hg19|hg38|GRCh3[78]|mm9|mm10|GRCm3[89])_+.")
_MOUSE_SYMBOL: Final = re.compile(r"[A-Z0-9][a-z0-9-]*[a-z][a-z0-9-]*")


@dataclass(frozen=True, eq=False)
class GeneTables:
    """What the tables say. Without tables a name stands for itself, an Ensembl id for its gene."""

    approved: frozenset[str] = frozenset()
    """Symbols in use."""
    previous: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Former symbol → the genes that had it."""
    aliases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Alias → the genes that go by it."""
    ensembl: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Ensembl id without version → symbols, one unless the table contradicts itself."""
    orthologues: Mapping[str, str] = field(default_factory=dict)
    """Mouse symbol → human symbol, one-to-one pairs only."""
    human_genes: frozenset[str] = frozenset()
    """Human symbols of the orthologue table that are no mouse symbols, paired or not."""
    mouse_genes: frozenset[str] = frozenset()
    """Mouse symbols of the orthologue table that are no human symbols, paired or not."""
    digests: Mapping[str, str] = field(default_factory=dict)
    """SHA-256 of each table, by the option that named it."""

    def look_up(self, name: str, species: Species | None = None) -> tuple[tuple[str, ...], Kind]:
        """Find the genes a name may stand for: none, one, or several.

        Args:
            name: Symbol, Ensembl id, or `SYMBOL_ENSG…`.
            species: With "mouse" and an orthologue table, the answer is the human gene.

        Returns:
            Genes by their approved symbols, and by what kind of name they were found.
        """
        match = _match_ensembl(name)
        if match is not None:
            symbol, identifier = match.groups()
            known = self.ensembl.get(identifier, (symbol,) if symbol else ())
            if len(known) != 1:
                return known or (identifier,), "own"
            name = known[0]
        if species == "mouse" and self.mouse_genes:
            if name not in self.orthologues:
                return (), "own"
            name = self.orthologues[name]
        if name not in self.approved:
            if name in self.previous:
                return self.previous[name], "previous"
            if name in self.aliases:
                return self.aliases[name], "alias"
        return (name,), "own"

    def plain_species(self, name: str) -> Species | None:
        """Tell the species from an Ensembl id, a genome prefix, or the table of orthologues."""
        match = _match_ensembl(name)
        if match is not None:
            return _SPECIES_OF_PREFIX.get(match[2].rstrip("0123456789"))
        genome = _GENOME.match(name) if "_" in name else None
        if genome is not None:
            return "human" if genome[1].startswith(("hg", "GRCh")) else "mouse"
        if name in self.human_genes:
            return "human"
        return "mouse" if name in self.mouse_genes else None


NO_TABLES: Final = GeneTables()


def _match_ensembl(name: str) -> re.Match[str] | None:
    # The plain test first: millions of names are symbols.
    return _ENSEMBL.fullmatch(name) if "ENS" in name else None


def is_ensembl_id(name: str) -> bool:
    """Tell whether a name is an Ensembl gene id, with or without version."""
    match = _match_ensembl(name)
    return match is not None and match[1] is None


def is_mouse_symbol(name: str) -> bool:
    """Tell whether a name is written like a mouse gene: a capital, then small letters."""
    return _MOUSE_SYMBOL.fullmatch(name) is not None


def read_tables(config: PanelConfig) -> GeneTables:
    """Read the tables that `panel.hgnc`, `panel.ensembl` and `panel.orthologues` name.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a file is not such a table; option, file and place are in the message.
    """
    approved: set[str] = set()
    previous: dict[str, dict[str, None]] = defaultdict(dict)
    aliases: dict[str, dict[str, None]] = defaultdict(dict)
    ensembl: dict[str, dict[str, None]] = defaultdict(dict)
    digests: dict[str, str] = {}
    if config.hgnc is not None:
        text, digests["panel.hgnc"] = _read_text(config.hgnc, "panel.hgnc")
        for symbol, alias_symbols, previous_symbols, identifier in _hgnc_rows(text, config.hgnc):
            approved.add(symbol)
            for alias in _split(alias_symbols):
                aliases[alias][symbol] = None
            for former in _split(previous_symbols):
                previous[former][symbol] = None
            if identifier:
                ensembl[identifier][symbol] = None
    by_hgnc = frozenset(ensembl)
    if config.ensembl is not None:
        text, digests["panel.ensembl"] = _read_text(config.ensembl, "panel.ensembl")
        for identifier, symbol in _ensembl_rows(text, config.ensembl):
            if identifier not in by_hgnc:  # whose symbols are the approved ones
                ensembl[identifier][symbol] = None
    pairs: list[tuple[str, str]] = []
    if config.orthologues is not None:
        text, digests["panel.orthologues"] = _read_text(config.orthologues, "panel.orthologues")
        pairs = list(_orthologue_rows(text, config.orthologues))
    human = {pair[0] for pair in pairs} - {""}
    mouse = {pair[1] for pair in pairs} - {""}
    if 2 * sum(map(is_mouse_symbol, human)) > len(human):
        raise ValueError(
            f"panel.orthologues: {config.orthologues} does not look like human symbol,mouse symbol "
            f"({pairs[0]}); put the human symbol first"
        )
    return GeneTables(
        approved=frozenset(approved),
        previous={name: tuple(sorted(genes)) for name, genes in previous.items()},
        aliases={name: tuple(sorted(genes)) for name, genes in aliases.items()},
        ensembl={name: tuple(sorted(genes)) for name, genes in ensembl.items()},
        orthologues=_one_to_one(pairs),
        human_genes=frozenset(human - mouse),
        mouse_genes=frozenset(mouse - human),
        digests=digests,
    )


def _one_to_one(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Mouse → human, for pairs in which neither has another partner."""
    distinct = {pair for pair in pairs if all(pair)}
    partners: dict[tuple[int, str], int] = defaultdict(int)
    for pair in distinct:
        for side in (0, 1):
            partners[side, pair[side]] += 1
    return {
        mouse: human
        for human, mouse in sorted(distinct)
        if partners[0, human] == 1 and partners[1, mouse] == 1
    }


def _hgnc_rows(text: str, path: str) -> Iterator[tuple[str, ...]]:
    """Symbol, aliases, previous symbols and Ensembl id of each approved entry."""
    try:
        rows = csv.reader(io.StringIO(text), delimiter="\t")
        header = next(rows, [])
        missing = [name for name in HGNC_COLUMNS if name not in header]
        if missing:
            raise ValueError(
                f"panel.hgnc: {path} has no column {', '.join(missing)}; give HGNC's complete set "
                "as tab-separated text (hgnc_complete_set.txt)"
            )
        places = [header.index(name) for name in HGNC_COLUMNS]
        status = header.index("status") if "status" in header else None
        for number, row in enumerate(rows, 2):
            if not row:
                continue
            if len(row) != len(header):
                raise ValueError(
                    f"panel.hgnc: {path} has {len(row)} instead of {len(header)} columns in row "
                    f"{number}; it was cut short or edited, fetch it again"
                )
            if row[places[0]] and (status is None or row[status] == "Approved"):
                yield tuple(row[place].strip() for place in places)
    except csv.Error as error:
        raise ValueError(f"panel.hgnc: {path} is not tab-separated text: {error}") from error


def _ensembl_rows(text: str, path: str) -> Iterator[tuple[str, str]]:
    """Ensembl id without version, and symbol; a first line with headings is passed over."""
    for number, line in enumerate(text.splitlines(), 1):
        cells = [cell.strip() for cell in line.split("\t")]
        match = _match_ensembl(cells[0])
        if len(cells) == 2 and match is not None and match[1] is None:
            if cells[1]:
                yield match[2], cells[1]
        elif line.strip() and number > 1:
            raise ValueError(
                f"panel.ensembl: line {number} of {path} is {line[:60]!r}; give an Ensembl gene "
                "id, a tab and a symbol per line"
            )


def _orthologue_rows(text: str, path: str) -> Iterator[tuple[str, str]]:
    """Human and mouse symbol, the other empty where there is none; headings are passed over."""
    for number, row in enumerate(csv.reader(io.StringIO(text)), 1):
        if not row or (number == 1 and "human" in row[0].lower()):
            continue
        if len(row) != 2:
            raise ValueError(
                f"panel.orthologues: line {number} of {path} has {len(row)} columns; give "
                "human symbol,mouse symbol per line"
            )
        yield row[0].strip(), row[1].strip()


def _read_text(path: str, option: str) -> tuple[str, str]:
    """Text of a plain or gzipped file, and its SHA-256."""
    try:
        content = Path(path).read_bytes()
    except (FileNotFoundError, IsADirectoryError) as error:
        raise FileNotFoundError(f"{option}: no such file: {path}") from error
    digest = hashlib.sha256(content).hexdigest()
    try:
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
        text = content.decode("utf-8-sig")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ValueError(
            f"{option}: {path} is not a whole text file, plain or gzipped: {error}"
        ) from error
    if "\0" in text or not text.strip():
        raise ValueError(f"{option}: {path} holds no table; give a text file, plain or gzipped")
    return text, digest


def _split(cell: str) -> list[str]:
    return [name.strip() for name in cell.split("|") if name.strip()]
