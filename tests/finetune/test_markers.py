"""Marker tables as PanglaoDB writes them; overlaps counted by hand and by drawing."""

import gzip
from pathlib import Path

import numpy as np
import pytest

from finetune.markers import marker_overlap, read_markers

TABLE = (
    "species\tofficial gene symbol\tcell type\n"
    "Mm Hs\tINS\tBeta cells\nHs\tIAPP\tBeta cells\nMm\tIns2\tBeta cells\n"
    "Hs\tGCG\tAlpha cells\nHs\tINS\tBeta cells\n"
)


def test_markers_of_a_species_are_read_once_each(tmp_path: Path) -> None:
    (tmp_path / "m.tsv").write_text(TABLE)
    (tmp_path / "m.tsv.gz").write_bytes(gzip.compress(TABLE.encode()))
    expected = {"Beta cells": ("INS", "IAPP"), "Alpha cells": ("GCG",)}
    assert read_markers(tmp_path / "m.tsv") == expected
    assert read_markers(tmp_path / "m.tsv.gz") == expected
    assert read_markers(tmp_path / "m.tsv", "mouse") == {"Beta cells": ("INS", "Ins2")}


def test_two_plain_columns_are_enough(tmp_path: Path) -> None:
    (tmp_path / "m.tsv").write_text("cell_type\tgene\nbeta\tINS\n")
    assert read_markers(tmp_path / "m.tsv") == {"beta": ("INS",)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("", "is empty", id="empty"),
        pytest.param("gene,cell_type\nINS,beta\n", "separated by tabs", id="commas"),
        pytest.param("gene\tcell_type\nINS\n", "columns in line 2", id="short line"),
        pytest.param("gene\tcell_type\tspecies\nIns2\tbeta\tMm\n", "no markers of human", id="Mm"),
    ],
)
def test_other_tables_are_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "m.tsv").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_markers(tmp_path / "m.tsv")


def test_a_missing_table_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no such table of markers: .*none\.tsv"):
        read_markers(tmp_path / "none.tsv")


def test_overlap_is_the_chance_of_a_random_draw() -> None:
    panel = [f"G{place}" for place in range(20)]
    markers = {"a": ["G0", "G1", "G2", "G3", "OUTSIDE"], "b": ["G19"], "c": ["G10", "G11"]}
    first, second = marker_overlap(["G0", "G1", "G7", "G10", "G2"], markers, panel)
    assert (first.cell_type, first.genes, first.num_markers) == ("a", ("G0", "G1", "G2"), 4)
    assert second.cell_type == "c"
    rng = np.random.default_rng(0)
    draws = np.array([(rng.permutation(20)[:5] < 4).sum() for _ in range(20_000)])
    # three standard errors of 20,000 draws
    assert first.p_value == pytest.approx((draws >= 3).mean(), abs=3 * 0.18 / 141)
