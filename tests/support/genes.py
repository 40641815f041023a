"""Small tables of real gene names, as HGNC, GENCODE and Ensembl write them, and a plain look-up."""

import gzip
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datastore.config import PanelConfig
from datastore.gene_tables import GeneTables, read_tables

# symbol, aliases, previous symbols, Ensembl id (HGNC complete set, 2020).
HGNC = [
    ("AARS1", "CMT2N|AlaRS", "AARS", "ENSG00000090861"),
    ("EPRS1", "EARS|PARS|GLUPRORS", "QPRS|QARS|EPRS", "ENSG00000136628"),
    ("QARS1", "", "QARS", "ENSG00000172053"),
    ("CEP290", "KIAA0373|3H11Ag|LCA10|BBS14", "", "ENSG00000198707"),
    ("IRF4", "LSIRF", "MUM1", "ENSG00000137265"),
    ("PWWP3A", "MUM-1|EXPAND1", "MUM1", "ENSG00000160953"),
    ("MS4A1", "B1|Bp35|MS4A2", "CD20", "ENSG00000156738"),
    ("SEPTIN4", "H5|ARTS|MART", "PNUTL2|C17orf47|SEPT4", "ENSG00000108387"),
    ("WASHC2A", "FLJ10824", "FAM21B|FAM21A", "ENSG00000099290"),
    ("CD3E", "", "", "ENSG00000198851"),
    ("LYZ", "LYZF1", "", "ENSG00000090382"),
    # Made up: one alias for two genes, and an alias that is also a former symbol and a symbol.
    ("ONE", "SHARED|AARS|CD3E", "", ""),
    ("TWO", "SHARED", "", ""),
]
# GENCODE names an id that HGNC lacks; and a mouse gene.
ENSEMBL = [
    ("ENSG00000282222", "AC073488.4"),
    ("ENSG00000090382", "LYZ-BY-GENCODE"),
    ("ENSG00000999999", "EPRS"),
    ("ENSMUSG00000032093", "Cd3e"),
]
ORTHOLOGUES = [
    ("CD3E", "Cd3e"),
    ("AARS", "Aars"),
    ("MS4A1", "Ms4a1"),
    ("LYZL1", "Lyzl1"),
    ("LYZL2", "Lyzl1"),
    ("KLRA1", "Klra1"),
    ("KLRA1", "Klra3"),
    ("MT-TF", ""),
]


def write_hgnc(path: Path, rows: Sequence[Sequence[str]] = HGNC) -> str:
    """Write rows as HGNC does: more columns than we read, lists in quotes, withdrawn entries."""
    lines = ["hgnc_id\tsymbol\tstatus\talias_symbol\tprev_symbol\tensembl_gene_id\tomim_id"]
    for number, (symbol, aliases, previous, identifier) in enumerate(rows):
        quoted = [f'"{cell}"' if "|" in cell else cell for cell in (aliases, previous)]
        lines.append("\t".join([f"HGNC:{number}", symbol, "Approved", *quoted, identifier, ""]))
    lines.append("HGNC:99\tGONE~withdrawn\tEntry Withdrawn\tLYZ\tCD3E\t\t")
    text = ("\n".join(lines) + "\n").encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return str(path)


def write_ensembl(path: Path) -> str:
    """Write the two-column table."""
    path.write_text("".join(f"{identifier}\t{symbol}\n" for identifier, symbol in ENSEMBL))
    return str(path)


def write_orthologues(path: Path) -> str:
    """Write human,mouse pairs."""
    path.write_text("".join(f"{human},{mouse}\n" for human, mouse in ORTHOLOGUES))
    return str(path)


def small_tables(folder: Path, *options: str) -> GeneTables:
    """Write and read the tables of these options, or of all."""
    files = {
        "hgnc": write_hgnc(folder / "hgnc.txt.gz"),
        "ensembl": write_ensembl(folder / "ids.tsv"),
        "orthologues": write_orthologues(folder / "orthologues.csv"),
    }
    return read_tables(panel_config({name: files[name] for name in options or files}))


def panel_config(settings: Mapping[str, Any]) -> PanelConfig:
    """Settings whose names are drawn from a table."""
    return PanelConfig(**settings)


def genes_by_hand(name: str) -> set[str]:
    """Genes that a human symbol may stand for by `HGNC`, one row at a time."""
    if any(name == row[0] for row in HGNC):
        return {name}
    for column in (2, 1):
        found = {row[0] for row in HGNC if name in row[column].split("|")}
        if found:
            return found
    return {name}
