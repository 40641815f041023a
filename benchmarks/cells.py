"""Synthetic cells at the size of a real corpus: h5ad files of several sources.

Counts are negative binomial: a gene of mean m is not expressed with probability (1 + m / r)^-r.
Each source has a depth, its own order of the genes and a mixture of cell types; a type has its own
profile over the genes. A cell's expressed genes are found by comparing a uniform number with the
probability of zero, and the count of each by walking up the distribution from there, so the work is
a comparison per gene and a few steps per expressed gene. Memory holds one block of cells.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import anndata
import h5py
import numpy as np
import pandas as pd
from numpy.typing import NDArray

BLOCK_CELLS: Final = 256
HIGHEST_COUNT: Final = 5_000
DISPERSION: Final = 1.5
"""Size parameter r of the negative binomial: the variance is m + m² / r."""


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """What to generate."""

    num_cells: int = 200_000
    num_genes: int = 18_000
    expressed: int = 1_450
    """Expressed genes per cell, on average over all sources."""
    num_sources: int = 4
    num_types: int = 12
    seed: int = 0

    def gene_names(self) -> list[str]:
        """Genes in panel order."""
        return [f"GENE{place:05d}" for place in range(self.num_genes)]

    def source_sizes(self) -> list[int]:
        """Cells of each source; the first has the most."""
        shares = np.arange(self.num_sources, 0, -1, dtype=np.float64)
        edges = np.rint(np.cumsum([0, *shares]) / shares.sum() * self.num_cells).astype(int)
        return [int(size) for size in np.diff(edges)]

    def gene_order(self, source: int) -> NDArray[np.int64]:
        """Panel position of each column of a source's file."""
        return np.random.default_rng([self.seed, 1, source]).permutation(self.num_genes)


def generate(folder: Path, corpus: Corpus) -> list[Path]:
    """Write `source_<k>.h5ad` for each source, unless they stand there already.

    Args:
        folder: Where to; `corpus.json` in it is written last and says what the files hold.
        corpus: What to generate; the same corpus gives the same counts.

    Returns:
        The files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"source_{number}.h5ad" for number in range(corpus.num_sources)]
    done = folder / "corpus.json"
    if done.is_file() and json.loads(done.read_text()) == asdict(corpus):
        return paths
    profiles = _profiles(corpus)
    for number, (path, size) in enumerate(zip(paths, corpus.source_sizes(), strict=True)):
        _write_source(path, corpus, number, size, profiles)
    done.write_text(json.dumps(asdict(corpus)))
    return paths


def blocks(
    corpus: Corpus, source: int, num_cells: int, profiles: NDArray[np.float32]
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32], NDArray[np.int64]]]:
    """Yield (rows, panel positions, counts, types) of the cells of a source, in blocks."""
    rng = np.random.default_rng([corpus.seed, 2, source])
    mixture = rng.dirichlet(np.full(corpus.num_types, 0.5))
    depth = (0.8, 1.0, 1.25)[source % 3]
    for start in range(0, num_cells, BLOCK_CELLS):
        types = rng.choice(corpus.num_types, min(BLOCK_CELLS, num_cells - start), p=mixture)
        depths = (depth * rng.lognormal(0.0, 0.35, len(types))).astype(np.float32)
        yield *_draw(rng, profiles[types] * depths[:, None]), types


def _draw(
    rng: np.random.Generator, means: NDArray[np.float32]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """Draw counts of these means, (B, G): row, gene and count of what is expressed."""
    zero = np.exp(np.float32(-DISPERSION) * np.log(np.float32(1.0) + means / DISPERSION))
    uniform = rng.random(means.shape, np.float32)
    expressed = np.flatnonzero(uniform > zero)
    mean = means.ravel()[expressed].astype(np.float64)
    ratio = mean / (mean + DISPERSION)
    probability = zero.ravel()[expressed].astype(np.float64)
    remaining = uniform.ravel()[expressed] - probability
    counts = np.zeros(len(expressed), np.float32)
    active = np.arange(len(expressed))
    for value in range(1, HIGHEST_COUNT + 1):
        probability = probability * ratio * ((value - 1 + DISPERSION) / value)
        counts[active] = value
        remaining = remaining - probability
        more = np.flatnonzero(remaining > 0)
        if not more.size:
            break
        active, remaining = active[more], remaining[more]
        probability, ratio = probability[more], ratio[more]
    rows, genes = np.divmod(expressed, means.shape[1])
    return rows, genes, counts


def _profiles(corpus: Corpus) -> NDArray[np.float32]:
    """Mean count of each gene in each type, (types, genes), scaled to `corpus.expressed` genes."""
    rng = np.random.default_rng([corpus.seed, 0])
    common = rng.normal(0.0, 2.0, corpus.num_genes)
    level = np.exp(common + rng.normal(0.0, 1.0, (corpus.num_types, corpus.num_genes)))
    level /= level.sum(axis=1, keepdims=True)
    low, high = np.ones((corpus.num_types, 1)), np.full((corpus.num_types, 1), 1e7)
    for _ in range(60):  # the number of expressed genes grows with the total: bisect its logarithm
        total = np.sqrt(low * high)
        expressed = (1.0 - (1.0 + total * level / DISPERSION) ** -DISPERSION).sum(axis=1)
        few = expressed[:, None] < corpus.expressed
        low, high = np.where(few, total, low), np.where(few, high, total)
    profiles: NDArray[np.float32] = (level * total).astype(np.float32)
    return profiles


def _write_source(
    path: Path, corpus: Corpus, number: int, num_cells: int, profiles: NDArray[np.float32]
) -> None:
    """Write an AnnData file block by block: CSR float32 counts, genes in the source's order."""
    order = corpus.gene_order(number)
    column_of = np.empty(corpus.num_genes, np.int32)
    column_of[order] = np.arange(corpus.num_genes, dtype=np.int32)
    names = np.array(corpus.gene_names())[order]
    types: list[NDArray[np.int64]] = []
    with h5py.File(path, "w") as file:
        file.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        matrix = file.create_group("X")
        matrix.attrs.update(
            {
                "encoding-type": "csr_matrix",
                "encoding-version": "0.1.0",
                "shape": np.array([num_cells, corpus.num_genes]),
            }
        )
        layout: dict[str, Any] = {"maxshape": (None,), "chunks": (1 << 17,)}
        data = matrix.create_dataset("data", (0,), np.float32, **layout)
        indices = matrix.create_dataset("indices", (0,), np.int32, **layout)
        indptr = [np.zeros(1, np.int64)]
        for rows, genes, counts, kinds in blocks(corpus, number, num_cells, profiles):
            columns = column_of[genes]
            by_column = np.argsort(rows * corpus.num_genes + columns)
            stop = len(data) + len(counts)
            for dataset, values in ((data, counts), (indices, columns)):
                dataset.resize((stop,))
                dataset[stop - len(values) :] = values[by_column]
            lengths = np.bincount(rows, minlength=len(kinds))
            indptr.append(indptr[-1][-1] + np.cumsum(lengths))
            types.append(kinds)
        matrix["indptr"] = np.concatenate(indptr)
        kinds = np.concatenate(types)
        obs = pd.DataFrame(
            {"cell_type": pd.Categorical([f"type{kind}" for kind in kinds])},
            index=[f"s{number}_c{row}" for row in range(num_cells)],
        )
        anndata.io.write_elem(file, "obs", obs)
        anndata.io.write_elem(file, "var", pd.DataFrame(index=names))
        for name in ("obsm", "varm", "obsp", "varp", "layers", "uns"):
            anndata.io.write_elem(file, name, {})
