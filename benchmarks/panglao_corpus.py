"""Files in the shape of PanglaoDB's human part, with counts that are known.

PanglaoDB's own sample table says what a sample is: 17,000 to 33,000 genes that were found in it,
hundreds to tens of thousands of cells, their middle one with 500 to 4,000 expressed genes. The
published model was pretrained on 209 human data sets of 1,126,580 cells, which express about 900
genes of its panel. Sizes, depths and genes are drawn accordingly; a cell's counts are a multinomial
draw from the profile of its type.

Two thirds of the samples are `.sparse.RData` as PanglaoDB has them, written by R where there is
one (gzip level 1: R's own 6 takes longer, for files a tenth smaller), the others `.h5ad`. Some more
are broken, each in a way of its own.

Largest first, a process draws a sample, has R save it, and renames the file into place: little is
on disk twice, and a run that was killed goes on where it was.
"""

import gzip
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
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
PROGRESS_SECONDS: Final = 20
"""How often a line on standard error says how far the files are."""
UNFINISHED: Final = ".unfinished"
"""Folder of what becomes a file by a rename; the ingest looks into no hidden folder."""
R_PROGRAM: Final = """
suppressPackageStartupMessages(library(Matrix))
dim <- readBin("dim", "integer", 3)
sm <- new("dgCMatrix", Dim = dim[1:2],
  i = readBin("i", "integer", dim[3]),
  p = readBin("p", "integer", dim[2] + 1),
  x = readBin("x", "double", dim[3]),
  Dimnames = list(readLines("rows"), readLines("columns")))
save(sm, file = "sm.RData", compression_level = 1)
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
    shutil.rmtree(folder / UNFINISHED, ignore_errors=True)  # of a run that was killed
    (folder / UNFINISHED).mkdir(parents=True)
    began, shown = time.perf_counter(), 0.0
    known: dict[str, Known] = {}
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        largest_first = sorted(samples, key=lambda sample: -sample.cells)
        tasks = {pool.submit(_write_sample, folder, seed, one): one for one in largest_first}
        for task in as_completed(tasks):
            known[tasks[task].name] = task.result()
            seconds = time.perf_counter() - began
            if seconds - shown > PROGRESS_SECONDS:
                shown = seconds
                done = f"{len(known)} of {len(samples)} files"
                print(f"{folder.name}: {done}, {seconds:.0f} s", file=sys.stderr)
    (folder / UNFINISHED).rmdir()
    return {sample.name: known[sample.name] for sample in samples}


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
    """Write one sample, unless it is there already. Its note comes last and says what it is of."""
    note, described = folder / f".{sample.name}.json", {"seed": seed, **asdict(sample)}
    if note.exists():
        noted = json.loads(note.read_text())
        if noted["sample"] == described:
            return Known(**noted["known"])
    genes, counts = _draw_sample(seed, sample)
    everything = gene_names()
    names = [everything[place] for place in genes]
    cells = [f"ACGT{row:07d}" for row in range(sample.cells)]
    beside = folder / UNFINISHED / sample.name
    beside.mkdir()
    if sample.is_rdata:
        rows = [f"{name}_ENSG{place:011d}.1" for name, place in zip(names, genes, strict=True)]
        written = _write_rdata(beside, counts, rows, cells)
    else:
        var, obs = pd.DataFrame(index=names), pd.DataFrame(index=cells)
        written = beside / "sample.h5ad"
        anndata.AnnData(counts.astype(np.float32), obs, var).write_h5ad(written)
    on_panel = counts[:, genes < PANEL_GENES]
    kept = on_panel[np.diff(on_panel.indptr) >= MIN_GENES]
    known = Known(kept.shape[0], int(kept.nnz), int(kept.data.sum(dtype=np.int64)))
    (beside / "note").write_text(json.dumps({"sample": described, "known": asdict(known)}))
    written.rename(_path(folder, sample))
    (beside / "note").rename(note)
    shutil.rmtree(beside)
    return known


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
    ends[:, -1] = 1.0  # whatever the sum was rounded to
    types = rng.integers(TYPES_PER_SAMPLE, size=sample.cells)
    totals = np.maximum(1, sample.depth * np.exp(rng.normal(0.0, 0.5, sample.cells))).astype(int)
    columns, counts = [], []
    for kind, total in zip(types, totals, strict=True):
        # Sorted, one is found beside the other, which the cache likes, and equal ones are together.
        drawn = np.searchsorted(ends[kind], np.sort(rng.random(total)), side="right")
        first = np.flatnonzero(np.diff(drawn, prepend=-1))
        columns.append(drawn[first].astype(np.int32))
        counts.append(np.diff(first, append=total).astype(np.int32))
    indptr = np.concatenate([[0], np.cumsum([len(cell) for cell in columns])])
    shape = (sample.cells, len(genes))
    return genes, sparse.csr_matrix(
        (np.concatenate(counts), np.concatenate(columns), indptr), shape=shape
    )


def _write_rdata(
    folder: Path, counts: sparse.csr_matrix, rows: list[str], columns: list[str]
) -> Path:
    """Have R save genes × cells; without R, use the writer that the tests have for it."""
    target = folder / "sm.RData"
    if shutil.which("Rscript") is None:
        matrix = r_matrix(sparse.csc_matrix(counts.T), rows, columns)
        return write_r_objects(target, {"sm": matrix}, partial(gzip.compress, compresslevel=1))
    counts.indices.astype("<i4").tofile(folder / "i")
    counts.indptr.astype("<i4").tofile(folder / "p")
    counts.data.astype("<f8").tofile(folder / "x")
    np.array([len(rows), len(columns), counts.nnz], "<i4").tofile(folder / "dim")
    (folder / "rows").write_text("".join(f"{name}\n" for name in rows))
    (folder / "columns").write_text("".join(f"{name}\n" for name in columns))
    subprocess.run(["Rscript", "--vanilla", "-e", R_PROGRAM], check=True, cwd=folder)
    return target
