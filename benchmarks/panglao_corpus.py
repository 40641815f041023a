"""Files in the shape of PanglaoDB's human part, with counts that are known.

PanglaoDB's own sample table says what a sample is: 17,000 to 33,000 genes that were found in it,
hundreds to tens of thousands of cells, their middle one with 500 to 4,000 expressed genes. The
published model was pretrained on 209 human data sets of 1,126,580 cells, which express about 900
genes of its panel. Sizes, depths and genes are drawn accordingly; a cell's counts are a multinomial
draw from the profile of its type.

Two thirds of the samples are `.sparse.RData` as PanglaoDB has them, written by R where there is
one (gzip level 1: R's own 6 takes longer, for files a tenth smaller), the others `.h5ad`. Some more
are broken, each in a way of its own.
"""

import gzip
import json
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Final

import anndata
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import sparse

from tests.support.raw_files import r_matrix, write_r_objects

NUM_SAMPLES: Final = 209
NUM_CELLS: Final = 1_126_580
PANEL_GENES: Final = 16_906
ALL_GENES: Final = 33_694
EXPRESSED: Final = 900
MIN_GENES: Final = 200
TYPES_PER_SAMPLE: Final = 8
CELLS_AT_ONCE: Final = 2_048
R_PROGRAM: Final = """
suppressPackageStartupMessages(library(Matrix))
for (base in commandArgs(TRUE)) {
  head <- readBin(paste0(base, ".dim"), "integer", 3)
  sm <- new("dgCMatrix", Dim = head[1:2],
    i = readBin(paste0(base, ".i"), "integer", head[3]),
    p = readBin(paste0(base, ".p"), "integer", head[2] + 1),
    x = as.double(readBin(paste0(base, ".x"), "integer", head[3])),
    Dimnames = list(readLines(paste0(base, ".rows")), readLines(paste0(base, ".columns"))))
  save(sm, file = paste0(base, ".sparse.RData"), compression_level = 1)
}
"""


@dataclass(frozen=True)
class Sample:
    """One file: its name as PanglaoDB's table has it, and what it holds."""

    number: int
    cells: int
    depth: float
    """Counts of a cell, in the middle."""

    @property
    def name(self) -> str:
        return f"SRA{500_000 + self.number // 4}_SRS{2_000_000 + self.number}"

    @property
    def is_rdata(self) -> bool:
        return self.number % 3 != 0


@dataclass(frozen=True)
class Known:
    """What must come out of a sample: cells with enough panel genes, their counts in number and
    sum. Counts of genes beside the panel are no part of it."""

    cells: int
    num_counts: int
    sum_counts: int


def plan_samples(scale: float, seed: int, first: int = 0, count: int = NUM_SAMPLES) -> list[Sample]:
    """Sizes and depths of samples; log-normal, as the table's are."""
    rng = np.random.default_rng([seed, first])
    sizes = np.exp(rng.normal(0.0, 0.95, count))
    sizes = np.maximum(20, sizes / sizes.sum() * NUM_CELLS * scale * count / NUM_SAMPLES)
    depths = 1_500 * np.exp(rng.normal(0.0, 0.35, count))
    return [
        Sample(first + k, int(size), float(depth))
        for k, (size, depth) in enumerate(zip(sizes, depths, strict=True))
    ]


def gene_names() -> list[str]:
    """All genes; the panel is the first of them."""
    return [f"GENE{place:05d}" for place in range(ALL_GENES)]


def write_samples(folder: Path, samples: Sequence[Sample], seed: int) -> dict[str, Known]:
    """Write all samples on two processes, unless they are there; say what each holds."""
    folder.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        known = list(pool.map(partial(_write_sample, folder, seed), samples))
        bases = sorted(str(path.with_suffix("")) for path in folder.glob("*.dim"))
        list(pool.map(_save_with_r, [bases[0::2], bases[1::2]]))
    return {sample.name: what for sample, what in zip(samples, known, strict=True)}


def write_table(folder: Path, samples: Sequence[Sample]) -> Path:
    """PanglaoDB's sample table: no header, quotes, twelve columns."""
    tissues = ("Lung", "Pancreas", "Kidney cortex", "Peripheral blood mononuclear cells", "Tonsil")
    lines = []
    for sample in samples:
        sra, srs = sample.name.split("_")
        facts = (
            sra,
            srs,
            tissues[sample.number % 5],
            "10x chromium",
            "Homo sapiens",
            "NextSeq 500",
        )
        numbers = ("24738", "1516", "12", "0", "1", "0")
        lines.append(",".join(f'"{field}"' for field in (*facts, *numbers)))
    path = folder / "metadata.txt"
    path.write_text("\n".join(lines) + "\n")
    return path


def write_broken(folder: Path, seed: int) -> dict[str, str]:
    """Write files that no ingest may take; return a word that the reason must have, by name."""
    rdata, h5ad = Sample(9_001, 300, 3_000.0), Sample(9_003, 300, 3_000.0)
    whole = folder.parent / "whole"
    write_samples(whole, [rdata, h5ad], seed)
    whole_rdata, whole_h5ad = _path(whole, rdata), _path(whole, h5ad)
    content = anndata.read_h5ad(whole_h5ad)
    broken = {}

    def cut(source: Path, name: str) -> None:
        (folder / name).write_bytes(source.read_bytes()[: source.stat().st_size // 2])

    cut(whole_rdata, "cut.sparse.RData")
    broken["cut.sparse.RData"] = "cut short"
    cut(whole_h5ad, "cut.h5ad")
    broken["cut.h5ad"] = "cut short"
    log = content.copy()
    log.X.data = np.log1p(log.X.data / 3.7)
    log.write_h5ad(folder / "log_normalised.h5ad")
    broken["log_normalised.h5ad"] = "log-normalised"
    negative = content.copy()
    negative.X.data[7] = -1.0
    negative.write_h5ad(folder / "negative.h5ad")
    broken["negative.h5ad"] = "negative"
    foreign = content.copy()
    foreign.var_names = [f"AT1G{place:05d}" for place in range(foreign.n_vars)]
    foreign.write_h5ad(folder / "thale_cress.h5ad")
    broken["thale_cress.h5ad"] = "panel genes"
    (folder / "web_page.h5ad").write_text("<html>404 Not Found</html>")
    broken["web_page.h5ad"] = "another kind of file"
    objects = {"counts": r_matrix(sparse.csc_matrix(np.eye(3)), ["a", "b", "c"], ["x", "y", "z"])}
    write_r_objects(folder / "other_object.sparse.RData", objects)
    broken["other_object.sparse.RData"] = "no R object sm"
    return broken


def _path(folder: Path, sample: Sample) -> Path:
    return folder / f"{sample.name}.{'sparse.RData' if sample.is_rdata else 'h5ad'}"


def _write_sample(folder: Path, seed: int, sample: Sample) -> Known:
    """Write one sample, unless it is there already."""
    note = folder / f".{sample.name}.json"
    if not note.exists():
        genes, counts = _draw_sample(seed, sample)
        path = _path(folder, sample)
        everything = gene_names()
        names = [everything[place] for place in genes]
        cells = [f"ACGT{row:07d}" for row in range(sample.cells)]
        if sample.is_rdata:
            rows = [f"{name}_ENSG{place:011d}.1" for name, place in zip(names, genes, strict=True)]
            _write_rdata(path, counts, rows, cells)
        else:
            var, obs = pd.DataFrame(index=names), pd.DataFrame(index=cells)
            anndata.AnnData(counts.astype(np.float32), obs, var).write_h5ad(path)
        on_panel = counts[:, genes < PANEL_GENES]
        kept = on_panel[np.diff(on_panel.indptr) >= MIN_GENES]
        note.write_text(json.dumps([kept.shape[0], int(kept.nnz), int(kept.data.sum())]))
    return Known(*json.loads(note.read_text()))


def _draw_sample(seed: int, sample: Sample) -> tuple[NDArray[np.int64], sparse.csr_matrix]:
    """Genes found in the sample in an order of its own, and counts, cells × genes."""
    rng = np.random.default_rng([seed, 7, sample.number])
    # How common genes are is the same everywhere; types change it.
    common = np.random.default_rng([seed, 8]).normal(0.0, 1.9, ALL_GENES)
    common[PANEL_GENES:] -= 2.0  # genes that no panel has are rare
    found = np.sort(rng.choice(ALL_GENES, int(rng.integers(17_000, ALL_GENES)), replace=False))
    genes = rng.permutation(found)
    level = np.exp(common[genes] + rng.normal(0.0, 0.8, (TYPES_PER_SAMPLE, len(genes))))
    ends = np.cumsum(level / level.sum(axis=1, keepdims=True), axis=1)
    types = rng.integers(TYPES_PER_SAMPLE, size=sample.cells)
    totals = np.maximum(1, sample.depth * np.exp(rng.normal(0.0, 0.5, sample.cells))).astype(int)
    blocks = []
    for start in range(0, sample.cells, CELLS_AT_ONCE):
        kinds, depths = types[start : start + CELLS_AT_ONCE], totals[start : start + CELLS_AT_ONCE]
        kind = np.repeat(kinds, depths)
        row = np.repeat(np.arange(len(kinds)), depths)
        column = np.empty(len(kind), np.int64)
        uniform = rng.random(len(kind))
        for number in range(TYPES_PER_SAMPLE):
            mine = kind == number
            column[mine] = np.searchsorted(ends[number], uniform[mine])
        column = np.minimum(column, len(genes) - 1)
        ones = np.ones(len(row), np.int32)
        block = sparse.coo_matrix((ones, (row, column)), shape=(len(kinds), len(genes))).tocsr()
        block.sort_indices()
        blocks.append(block)
    return genes, sparse.vstack(blocks, format="csr")


def _write_rdata(
    path: Path, counts: sparse.csr_matrix, rows: list[str], columns: list[str]
) -> None:
    """Leave genes × cells for R to write; without R, use the writer that the tests have for it."""
    if shutil.which("Rscript") is None:
        matrix = r_matrix(sparse.csc_matrix(counts.T), rows, columns)
        write_r_objects(path, {"sm": matrix}, partial(gzip.compress, compresslevel=1))
        return
    base = str(path).removesuffix(".sparse.RData")
    pieces = {
        ".i": counts.indices.astype("<i4").tobytes(),
        ".p": counts.indptr.astype("<i4").tobytes(),
        ".x": counts.data.astype("<i4").tobytes(),
        ".rows": "".join(f"{name}\n" for name in rows).encode(),
        ".columns": "".join(f"{name}\n" for name in columns).encode(),
        ".dim": np.array([len(rows), len(columns), counts.nnz], "<i4").tobytes(),
    }
    for suffix, content in pieces.items():
        Path(base + suffix).write_bytes(content)


def _save_with_r(bases: Sequence[str]) -> None:
    """Let R make `.sparse.RData` files of the arrays that lie there for it."""
    if bases:
        command = ["Rscript", "--vanilla", "-e", R_PROGRAM, *bases]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    for base in bases:
        for suffix in (".i", ".p", ".x", ".rows", ".columns", ".dim"):
            Path(base + suffix).unlink()
