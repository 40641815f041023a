"""Panels, and foreign matrices brought into their order."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import sparse

from datastore.config import PanelConfig
from datastore.gene_tables import NO_TABLES, GeneTables
from datastore.genes import (
    GenePanel,
    align_counts,
    match_genes,
    measured_genes,
    panel_of_sources,
    read_panel,
    write_panel,
)
from tests.support.cells import RawCells, align_by_hand, random_counts
from tests.support.genes import genes_by_hand, small_tables

PANEL = GenePanel(("CD3E", "CD19", "GNLY", "LYZ", "MS4A1", "NKG7", "PPBP", "CST3"))
ENSEMBL = tuple(f"ENSG{number:011d}" for number in range(8))


def test_a_panel_knows_places_and_digest() -> None:
    assert len(PANEL) == 8
    assert [PANEL.positions[name] for name in PANEL.names] == list(range(8))
    assert PANEL.digest == hashlib.sha256("\n".join(PANEL.names).encode()).hexdigest()
    assert PANEL.digest != GenePanel(PANEL.names[::-1]).digest


@pytest.mark.parametrize(
    ("names", "message"),
    [
        pytest.param((), "empty; give at least one", id="empty"),
        pytest.param(("A", "B", "A"), "names 'A' twice; remove one", id="twice"),
        pytest.param(("A", ""), "the name ''.*clean the names", id="nameless gene"),
        pytest.param(("A", "B "), "the name 'B '.*space around", id="space around"),
        pytest.param(("A", "B\nC"), "line break", id="line break"),
        pytest.param(("A", "B\u2028C"), "line break", id="line break of Unicode"),
    ],
)
def test_unusable_panels_are_refused(names: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GenePanel(names)


def test_a_panel_survives_its_file(tmp_path: Path) -> None:
    panel = GenePanel(("HLA-A", "Ärger", "a b", "1"))
    write_panel(panel, tmp_path / "genes.txt")
    assert read_panel(tmp_path / "genes.txt") == panel


def test_blank_lines_and_windows_line_ends_are_read(tmp_path: Path) -> None:
    (tmp_path / "genes.txt").write_bytes(b"A\r\n\r\n  B \r\nC")
    assert read_panel(tmp_path / "genes.txt").names == ("A", "B", "C")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(b"\x89HDF\xff\xfe", "genes.txt is not a text file; .*one gene name per line"),
        pytest.param(b"\n \n", "the gene panel is empty"),
        pytest.param(b"A\nB\nB\n", "names 'B' twice"),
    ],
)
def test_unusable_panel_files_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "genes.txt").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_panel(tmp_path / "genes.txt")


def test_matching_counts_what_it_found() -> None:
    names = ["LYZ", "OTHER", "CD19", "LYZ", "LYZ", "CD3E"]
    places, line = match_genes(names, PANEL, "pbmc", 0.3)
    assert places.tolist() == [3, -1, 1, 3, 3, 0]
    assert (line.source, line.genes_in_source, line.panel_genes) == ("pbmc", 6, 8)
    assert (line.panel_genes_found, line.duplicates_summed) == (3, 2)
    assert line.share_found == 3 / 8


@pytest.mark.parametrize(
    ("names", "panel", "min_share", "message"),
    [
        pytest.param(
            ENSEMBL,
            PANEL,
            0.3,
            r"pbmc: only 0 of 8 panel genes found \(0.0%, at least 30% needed\); its genes look "
            r"like Ensembl ids \(ENSG00000000000\).*panel\.hgnc, or panel\.ensembl .*"
            "or put the symbols into var_names",
            id="Ensembl ids against symbols",
        ),
        pytest.param(
            [f"{name}.7" for name in ENSEMBL],
            PANEL,
            0.3,
            "its genes look like Ensembl ids",
            id="Ensembl ids with versions",
        ),
        pytest.param(
            PANEL.names,
            GenePanel(ENSEMBL),
            0.3,
            "panel holds Ensembl ids .*but the source has 'CD3E': give a table that knows both .*"
            "or put Ensembl ids into var_names",
            id="symbols against Ensembl ids",
        ),
        pytest.param(
            [name.capitalize() for name in PANEL.names],
            PANEL,
            0.3,
            "letter case only, as mouse symbols do: translate .*panel.orthologues",
            id="mouse symbols",
        ),
        pytest.param(
            ["FOO", "BAR"],
            PANEL,
            0.0,
            "the source has names such as 'FOO', the panel such as 'CD3E'",
            id="no gene in common",
        ),
        pytest.param(
            ["LYZ", "CD19"],
            PANEL,
            0.3,
            "only 2 of 8 .*its names fit, but it has too few genes: give the unfiltered matrix",
            id="a few genes only",
        ),
        pytest.param([], PANEL, 0.0, "the source has no genes", id="no genes"),
    ],
)
def test_foreign_genes_are_refused_with_their_cause(
    names: list[str], panel: GenePanel, min_share: float, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        match_genes(names, panel, "pbmc", min_share)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int8, np.uint8, np.int32, np.uint32])
def test_alignment_equals_a_dense_loop(dtype: type) -> None:
    genes = ("LYZ", "OTHER", "CD19", "LYZ", "CST3", "CD3E", "LYZ")
    raw = RawCells("pbmc", random_counts(8, 25, len(genes)), genes)
    raw.counts[4] = 0
    raw.counts[5, [0, 3, 6]] = 127  # their sum, 381, is more than 8 bits hold
    places, _ = match_genes(genes, PANEL, "pbmc", 0.3)
    aligned = align_counts(sparse.csr_matrix(raw.counts.astype(dtype)), places, len(PANEL))
    np.testing.assert_array_equal(aligned.toarray(), align_by_hand(raw, PANEL.names))
    assert aligned.has_canonical_format
    assert all(
        (np.diff(aligned.indices[a:b]) > 0).all()
        for a, b in zip(aligned.indptr[:-1], aligned.indptr[1:], strict=True)
    )
    assert (aligned.data > 0).all()


def test_alignment_of_unsorted_columns_and_stored_zeros() -> None:
    # Cell 0 stores column 2 before column 0, column 2 twice, and a zero in column 1.
    matrix = sparse.csr_matrix(
        (np.array([5, 1, 0, 2, 3]), np.array([2, 0, 1, 2, 1]), np.array([0, 4, 5])), shape=(2, 3)
    )
    aligned = align_counts(matrix, np.array([1, 0, 2]), 4)
    assert aligned.toarray().tolist() == [[0, 1, 7, 0], [3, 0, 0, 0]]
    assert aligned.nnz == 3


# --- names that the panel does not have ---


@pytest.fixture(scope="module")
def hgnc(tmp_path_factory: pytest.TempPathFactory) -> GeneTables:
    return small_tables(tmp_path_factory.mktemp("hgnc"), "hgnc")


@pytest.mark.parametrize(
    ("names", "panel", "places"),
    [
        pytest.param(["CD20", "SEPT4"], ["SEPTIN4", "MS4A1"], [1, 0], id="previous symbols"),
        pytest.param(["LCA10", "X"], ["CEP290"], [0, -1], id="alias"),
        pytest.param(["MS4A1"], ["CD20"], [0], id="the panel has the previous symbol"),
        pytest.param(["CEP290"], ["LCA10"], [0], id="the panel has the alias"),
        pytest.param(["PNUTL2"], ["SEPT4"], [0], id="both have a previous symbol"),
        pytest.param(["QARS"], ["EPRS1", "QARS"], [1], id="ambiguous, but the panel says just so"),
        pytest.param(["QARS", "LYZ"], ["EPRS1", "QARS1", "LYZ"], [-1, 2], id="ambiguous"),
        pytest.param(["SHARED", "LYZ"], ["ONE", "LYZ"], [-1, 1], id="alias of two, one in panel"),
        pytest.param(["LCA10", "CEP290"], ["CEP290"], [-1, 0], id="alias beside its own gene"),
        pytest.param(
            ["LCA10", "CEP290"], ["CEP290", "LCA10"], [1, 0], id="the panel has alias and gene"
        ),
        pytest.param(
            ["ARTS", "PNUTL2"], ["SEPTIN4"], [-1, 0], id="alias beside the previous symbol"
        ),
        pytest.param(["AARS", "AARS1"], ["AARS1"], [0, 0], id="previous beside its own: summed"),
        pytest.param(["FAM21A", "FAM21B"], ["WASHC2A"], [0, 0], id="two previous: summed"),
        pytest.param(["LCA10", "BBS14"], ["CEP290"], [0, 0], id="two aliases: summed"),
        pytest.param(
            ["ENSG00000156738.2", "CD3E"], ["MS4A1", "CD3E"], [0, 1], id="id among symbols"
        ),
        pytest.param(["CD20", "CD3E"], ["ENSG00000156738", "CD3E"], [0, 1], id="id in the panel"),
        pytest.param(
            ["ENSG00000156738.2"], ["ENSG00000156738.17"], [0], id="ids of other versions"
        ),
        pytest.param(
            ["WASHC2A", "LYZ"], ["FAM21A", "FAM21B", "LYZ"], [-1, 2], id="two panel genes claim it"
        ),
        pytest.param(
            ["FAM21B", "WASHC2A"], ["FAM21A", "FAM21B", "WASHC2A"], [1, 2], id="exact comes first"
        ),
    ],
)
def test_names_find_their_panel_gene(
    hgnc: GeneTables, names: list[str], panel: list[str], places: list[int]
) -> None:
    found, line = match_genes(names, GenePanel(tuple(panel)), "pbmc", 0.0, hgnc)
    assert found.tolist() == places
    assert line.genes_in_source == (
        line.panel_genes_found + line.summed.count + line.dropped.count + line.ambiguous.count
    )


@pytest.mark.parametrize("seed", range(5))
def test_random_sources_equal_a_search_through_the_rows(hgnc: GeneTables, seed: int) -> None:
    rng = np.random.default_rng(seed)
    # Names that are surely one gene, or no gene of the table; several of a gene may be drawn.
    pool = ["CD20", "MS4A1", "SEPT4", "PNUTL2", "C17orf47", "AARS", "AARS1", "FAM21A", "FAM21B"]
    pool += ["IRF4", "QARS1", "EPRS", "QPRS", "CD3E", "LYZ", "UNKNOWN"]
    names = rng.choice(pool, 12).tolist()
    panel = rng.permutation(["MS4A1", "SEPTIN4", "AARS1", "WASHC2A", "EPRS1", "CD3E", "LYZ"])
    counts = random_counts(seed, 6, len(names))
    places, line = match_genes(names, GenePanel(tuple(panel)), "pbmc", 0.0, hgnc)
    aligned = align_counts(sparse.csr_matrix(counts), places, len(panel)).toarray()
    by_hand = np.zeros_like(aligned)
    for column, name in enumerate(names):
        (gene,) = genes_by_hand(name)
        if gene in panel:
            by_hand[:, panel.tolist().index(gene)] += counts[:, column]
    np.testing.assert_array_equal(aligned, by_hand)
    measured = [any(genes_by_hand(name) == {gene} for name in names) for gene in panel]
    assert measured_genes(places, len(panel)).tolist() == measured
    assert line.panel_genes_found == sum(measured)


def test_mouse_sources_find_human_genes(tmp_path: Path) -> None:
    tables = small_tables(tmp_path)
    panel = GenePanel(("CD3E", "MS4A1", "LYZL1", "AARS1", "KLRA1"))
    names = ["Ms4a1", "Cd3e", "Lyzl1", "Aars", "Klra1", "Gm1992"]
    places, line = match_genes(names, panel, "spleen", 0.3, tables)
    assert places.tolist() == [1, 0, -1, 3, -1, -1]
    assert line.species == "mouse"
    assert line.dropped.first == ("Lyzl1", "Klra1", "Gm1992")
    assert match_genes(["CD3E", "LYZL1"], panel, "blood", 0.3, tables)[0].tolist() == [0, 2]


@pytest.mark.parametrize(
    ("names", "panel", "message"),
    [
        pytest.param(
            ["Cd3e", "Ms4a1", "CD3E", "MS4A1"],
            ("CD3E", "MS4A1"),
            "pbmc mixes species: 2 genes are human, 2 mouse; split it",
            id="symbols of both",
        ),
        pytest.param(
            ["LYZ", "CD19", "Cd19", "Lyz", "CD3E"],  # no table knows the first four
            ("CD3E", "MS4A1"),
            "pbmc mixes species: 2 genes are there as human and as mouse ones, such as CD19 and Cd",
            id="symbols of both, told by case",
        ),
        pytest.param(
            ["ENSG00000198851", "ENSMUSG00000032093"],
            ("CD3E", "MS4A1"),
            "pbmc mixes species: 1 genes are human, 1 mouse",
            id="ids of both",
        ),
        pytest.param(
            ["GRCh38_CD3E", "GRCh38_LYZ", "mm10___Cd3e"],
            ("CD3E", "MS4A1"),
            "pbmc mixes species: 2 genes are human, 1 mouse",
            id="two genomes in one matrix",
        ),
        pytest.param(
            ["Cd3e", "Ms4a1"],
            ("Cd3e", "Ms4a1"),
            r"the panel holds mouse genes \(Cd3e\); give a human panel, or leave panel.orthologues",
            id="mouse panel",
        ),
        pytest.param(
            ["CD3E", "MS4A1"],
            ENSEMBL,
            "the tables given do not know these ids; give panel.ensembl",
            id="ids that no table knows",
        ),
    ],
)
def test_mixed_species_and_unknown_ids_are_refused(
    tmp_path: Path, names: list[str], panel: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        match_genes(names, GenePanel(panel), "pbmc", 0.3, small_tables(tmp_path))


# --- panels of the sources ---

THREE = [("a", ["X", "CD20", "LYZ"]), ("b", ["LYZ", "MS4A1", "Y"]), ("c", ["Y", "LYZ", "LYZ"])]


@pytest.mark.parametrize("share", [0.0, 0.3, 1 / 3, 0.34, 0.5, 2 / 3, 0.7, 1.0])
@pytest.mark.parametrize("with_tables", [False, True])
def test_a_panel_of_sources_equals_counting(
    hgnc: GeneTables, share: float, with_tables: bool
) -> None:
    panel = panel_of_sources(THREE, hgnc if with_tables else NO_TABLES, share)
    sets = [
        {next(iter(genes_by_hand(name))) if with_tables else name for name in names}
        for _, names in THREE
    ]
    expected = {
        gene for gene in set().union(*sets) if sum(gene in genes for genes in sets) / 3 >= share
    }
    assert set(panel.names) == expected
    order = ["X", "MS4A1", "LYZ", "Y"] if with_tables else ["X", "CD20", "LYZ", "MS4A1", "Y"]
    assert list(panel.names) == [gene for gene in order if gene in expected]


def test_an_ambiguous_name_is_no_panel_gene(hgnc: GeneTables) -> None:
    names = ["QARS", "LYZ", "LCA10", "CEP290", "SHARED"]
    assert panel_of_sources([("a", names)], hgnc).names == ("LYZ", "CEP290")


def test_mouse_and_human_sources_share_a_panel_by_orthologues(tmp_path: Path) -> None:
    sources = [("mouse", ["Cd3e", "Aars", "Gm1992"]), ("human", ["AARS", "CD3E", "MS4A1"])]
    panel = panel_of_sources(sources, small_tables(tmp_path))
    assert panel.names == ("CD3E", "AARS1", "MS4A1")
    with pytest.raises(
        ValueError, match=r"genes of human look human, those of mouse mouse: .*panel\.orthologues"
    ):
        panel_of_sources(sources)


def test_sources_without_a_common_gene_are_refused() -> None:
    sources = [("a", ["X", "LYZ"]), ("b", ["Y", "CD3E"])]
    with pytest.raises(
        ValueError, match=r"no gene .*100% of the 2 .*lower panel\.min_source_share"
    ):
        panel_of_sources(sources, min_source_share=1.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"min_source_share": 1.5}, "min_source_share is 1.5; give a share", id="150%"),
        pytest.param({"min_source_share": -0.1}, "min_source_share is -0.1", id="negative"),
        pytest.param({"min_source_share": 0.5, "file": "g.txt"}, "exclude each", id="and file"),
    ],
)
def test_unusable_source_shares_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PanelConfig(**changes)


def test_ids_and_symbols_do_not_make_one_panel() -> None:
    symbols = ("a.h5ad", ["INS", "GCG", "SST"])
    ids = ("b.h5ad", [f"ENSG{place:011d}" for place in range(3)])
    with pytest.raises(ValueError, match=r"b\.h5ad names its genes by Ensembl ids, a\.h5ad by"):
        panel_of_sources([symbols, ids])
