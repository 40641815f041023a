"""Tables of gene names: what they say, and which files are none."""

import gzip
import hashlib
import re
from pathlib import Path

import pytest

from datastore.config import PanelConfig
from datastore.gene_tables import NO_TABLES, GeneTables, is_ensembl_id, read_tables
from tests.support.genes import (
    HGNC,
    ORTHOLOGUES,
    genes_by_hand,
    panel_config,
    small_tables,
    write_hgnc,
)


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> GeneTables:
    return small_tables(tmp_path_factory.mktemp("tables"))


@pytest.mark.parametrize(
    ("name", "genes", "kind"),
    [
        pytest.param("CD3E", ("CD3E",), "own", id="approved, though an alias of another"),
        pytest.param("SEPT4", ("SEPTIN4",), "previous", id="previous"),
        pytest.param("CD20", ("MS4A1",), "previous", id="previous, known from the clinic"),
        pytest.param("AARS", ("AARS1",), "previous", id="previous, though an alias of another"),
        pytest.param("LCA10", ("CEP290",), "alias", id="alias"),
        pytest.param("QARS", ("EPRS1", "QARS1"), "previous", id="previous symbol of two"),
        pytest.param("MUM1", ("IRF4", "PWWP3A"), "previous", id="previous symbol of two others"),
        pytest.param("SHARED", ("ONE", "TWO"), "alias", id="alias of two"),
        pytest.param("RP11-34P13.7", ("RP11-34P13.7",), "own", id="unknown"),
        pytest.param("GONE~withdrawn", ("GONE~withdrawn",), "own", id="withdrawn entry"),
        pytest.param("cd3e", ("cd3e",), "own", id="letter case counts"),
        pytest.param("ENSG00000156738", ("MS4A1",), "own", id="id"),
        pytest.param("ENSG00000156738.17", ("MS4A1",), "own", id="id with version"),
        pytest.param("ENSG00000156738.17_PAR_Y", ("MS4A1",), "own", id="id of a Y copy"),
        pytest.param("ENSG00000282222.1", ("AC073488.4",), "own", id="id of the second table"),
        pytest.param("ENSG00000090382", ("LYZ",), "own", id="HGNC before the second table"),
        pytest.param("ENSG00000999999", ("EPRS1",), "previous", id="id, then previous symbol"),
        pytest.param("ENSG00000000001.2", ("ENSG00000000001",), "own", id="unknown id"),
        pytest.param("CD20_ENSG00000156738.17", ("MS4A1",), "own", id="symbol and id"),
        pytest.param("CD20_ENSG00000000001", ("MS4A1",), "previous", id="symbol and unknown id"),
    ],
)
def test_names_mean_what_the_tables_say(
    tables: GeneTables, name: str, genes: tuple[str, ...], kind: str
) -> None:
    assert tables.look_up(name) == (genes, kind)


def test_every_symbol_equals_a_search_through_the_rows(tables: GeneTables) -> None:
    names = {name for row in HGNC for cell in row[:3] for name in cell.split("|")} - {""}
    assert len(names) > 30
    for name in names:
        assert set(tables.look_up(name)[0]) == genes_by_hand(name)


@pytest.mark.parametrize(
    ("name", "genes"),
    [
        pytest.param("Cd3e", ("CD3E",), id="one to one"),
        pytest.param("Aars", ("AARS1",), id="one to one, then previous symbol"),
        pytest.param("ENSMUSG00000032093.9", ("CD3E",), id="id, then one to one"),
        pytest.param("Lyzl1", (), id="two human genes"),
        pytest.param("Klra1", (), id="two mouse genes"),
        pytest.param("Gm1992", (), id="no orthologue"),
        pytest.param("CD3E", (), id="a human name among mouse genes"),
    ],
)
def test_mouse_genes_become_one_to_one_orthologues(
    tables: GeneTables, name: str, genes: tuple[str, ...]
) -> None:
    assert tables.look_up(name, "mouse")[0] == genes


def test_one_to_one_pairs_equal_a_search_through_the_rows(tables: GeneTables) -> None:
    pairs = {(human, mouse) for human, mouse in ORTHOLOGUES if human and mouse}
    alone = {
        mouse: human
        for human, mouse in pairs
        if sum(human == other for other, _ in pairs) == sum(mouse == other for _, other in pairs)
        and sum(human == other for other, _ in pairs) == 1
    }
    assert tables.orthologues == alone == {"Cd3e": "CD3E", "Aars": "AARS", "Ms4a1": "MS4A1"}


def test_without_tables_a_name_is_itself() -> None:
    assert NO_TABLES.look_up("QARS") == (("QARS",), "own")
    assert NO_TABLES.look_up("Cd3e", "mouse") == (("Cd3e",), "own")
    assert NO_TABLES.look_up("ENSG00000156738.17") == (("ENSG00000156738",), "own")
    assert NO_TABLES.look_up("A_B_ENSG00000156738.17") == (("A_B",), "own")
    assert read_tables(PanelConfig()).digests == {}


def test_plain_and_gzipped_tables_say_the_same(tmp_path: Path) -> None:
    plain, packed = write_hgnc(tmp_path / "a.txt"), write_hgnc(tmp_path / "b.gz")
    first, second = (read_tables(PanelConfig(hgnc=path)) for path in (plain, packed))
    assert first.approved == second.approved == {row[0] for row in HGNC}
    assert (first.previous, first.aliases) == (second.previous, second.aliases)
    assert first.digests == {"panel.hgnc": hashlib.sha256(Path(plain).read_bytes()).hexdigest()}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ENSG00000156738", True),
        ("ENSMUSG00000032093.9", True),
        ("ENSG1", False),
        ("CD20_ENSG00000156738", False),
        ("ENSA", False),
    ],
)
def test_ensembl_ids_are_known_by_their_form(name: str, expected: bool) -> None:
    assert is_ensembl_id(name) is expected


@pytest.mark.parametrize(
    ("option", "content", "message"),
    [
        pytest.param("hgnc", b"symbol\tname\nA\tB\n", "no column alias_symbol, prev", id="columns"),
        pytest.param(
            "hgnc",
            b"symbol\talias_symbol\tprev_symbol\tensembl_gene_id\nA\tB\t\tE\nA\t",
            "2 instead of 4 columns in row 3",
            id="cut short",
        ),
        pytest.param("hgnc", b"\x1f\x8b\x08\x00junk", "not a whole text file", id="broken gzip"),
        pytest.param(
            "hgnc", gzip.compress(b"symbol\t" * 500)[:-9], "not a whole text file", id="half a gzip"
        ),
        pytest.param("ensembl", b"\x89HDF\xff\xfe", "not a whole text file", id="binary"),
        pytest.param("ensembl", b"\n", "holds no table", id="empty"),
        pytest.param(
            "ensembl", b"id\tname\nCD3E\tCD3E\n", "line 2 of .*give an Ensembl gene id", id="no id"
        ),
        pytest.param("orthologues", b"CD3E\tCd3e\n", "line 1 of .*1 columns", id="tabs"),
        pytest.param(
            "orthologues", b"Cd3e,CD3E\nLyz2,LYZ\n", "put the human symbol first", id="swapped"
        ),
    ],
)
def test_files_that_are_no_such_table_are_refused(
    tmp_path: Path, option: str, content: bytes, message: str
) -> None:
    path = tmp_path / "table"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"panel\.{option}: .*{re.escape(str(path))}.*") as error:
        read_tables(panel_config({option: str(path)}))
    assert re.search(message, str(error.value))


@pytest.mark.parametrize("option", ["hgnc", "ensembl", "orthologues"])
def test_a_missing_table_is_named(tmp_path: Path, option: str) -> None:
    with pytest.raises(FileNotFoundError, match=rf"panel\.{option}: no such file: .*absent"):
        read_tables(panel_config({option: str(tmp_path / "absent")}))


def test_headings_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "o.csv").write_text("Human gene,Mouse gene\nCD3E,Cd3e\n")
    (tmp_path / "e.tsv").write_text("gene_id\tsymbol\nENSG00000198851.4\tCD3E\n\n")
    tables = read_tables(
        PanelConfig(orthologues=str(tmp_path / "o.csv"), ensembl=str(tmp_path / "e.tsv"))
    )
    assert tables.orthologues == {"Cd3e": "CD3E"}
    assert tables.ensembl == {"ENSG00000198851": ("CD3E",)}
