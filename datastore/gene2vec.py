"""Gene vectors trained from a store, after gene2vec (Du et al., BMC Genomics 2019).

gene2vec takes pairs of genes that are co-expressed in a data set for two words of a sentence, and
trains skip-gram vectors on them. Its data sets were bulk samples, and co-expressed meant a
correlation above 0.9. In single cells few genes come near that, since most zeros are chance; so
here a pair is a gene and one of those that it correlates with most:

1. The cells of each group (a source, or any column of obs) are sampled. The store is shuffled, so
   the first of a group are a fair sample of it.
2. A Dask task per group: Pearson correlation of log1p(CP10k) between all genes that enough of the
   cells express, a tile of the matrix at a time. Each gene is paired with its nearest neighbours
   above a least correlation. A pair of genes that are neighbours of each other counts twice, one
   found in many groups as often.
3. All pairs are shuffled through files, so that no more than one file's share is in memory.
4. Skip-gram with negative sampling (gensim); each gene of a pair predicts the other.
"""

import logging
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from datastore.config import GeneVectorsConfig
from datastore.gene_embedding import (
    GeneVectors,
    fill_missing,
    load_gene_vectors,
    provenance_of,
    refuse_existing,
    write_gene_vectors,
)
from datastore.genes import GenePanel, read_panel
from datastore.obs import read_obs
from datastore.randomness import derive_key
from datastore.reader import CellReader
from datastore.store import CellStore, open_store
from datastore.workers import workers

log = logging.getLogger(__name__)

_CELLS_AT_ONCE: Final = 512
_GENES_AT_ONCE: Final = 512
_PAIRS_AT_ONCE: Final = 2_000_000
_GROUPS_AT_ONCE: Final = 16
_EPOCHS: Final = 10
_PAIRS_SEEN: Final = 1_000_000
_STANDARD_ERRORS: Final = 4.0
_SETTINGS: Final = (
    *("group_by", "cells_per_group", "min_cells", "neighbours", "min_correlation"),
    *("dim", "negative", "threads", "seed"),
)


def embed_genes(config: GeneVectorsConfig) -> dict[str, Any]:
    """Import gene vectors, or train them, and write them as a folder.

    Returns:
        What the folder's `provenance.json` says.

    Raises:
        ValueError: If the vectors do not fit the panel, or none can be trained from the store.
        FileExistsError: If there is something at the output.
    """
    output = Path(config.output)
    refuse_existing(output)
    if config.vectors is None:
        assert config.store is not None  # the configuration has looked
        store = open_store(config.store)
        panel = store.panel
        vectors, facts = train_gene_vectors(store, config)
    else:
        names = None if config.names is None else Path(config.names)
        panel = _panel(config)
        vectors = load_gene_vectors(Path(config.vectors), names, panel)
        facts = {"method": "imported", "imported": provenance_of(Path(config.vectors))}
    missing = [name for name, has in zip(panel.names, vectors.found, strict=True) if not has]
    facts |= {
        "genes": len(panel),
        "dim": vectors.matrix.shape[1],
        "num_missing": len(missing),
        "missing_vectors_are": config.missing,
        "missing": missing,
    }
    matrix = fill_missing(vectors, config.missing, config.seed)
    return write_gene_vectors(output, matrix, panel, facts)


def _panel(config: GeneVectorsConfig) -> GenePanel:
    if config.panel is not None:
        return read_panel(Path(config.panel))
    assert config.store is not None  # the configuration has looked
    return open_store(config.store).panel


def train_gene_vectors(
    store: CellStore, config: GeneVectorsConfig
) -> tuple[GeneVectors, dict[str, Any]]:
    """Train gene vectors from a store; also return how that was done.

    Raises:
        ValueError: If gensim is not installed, the store has no such column, or no pair is found.
    """
    gensim = _gensim()
    groups = sample_groups(store, config.group_by, config.cells_per_group)
    num_cells = sum(map(len, groups.values()))
    log.info("correlating genes over %s cells in %d groups", f"{num_cells:,}", len(groups))
    tasks = [(_pairs_of_group, store.url, positions, config) for positions in groups.values()]
    with tempfile.TemporaryDirectory(prefix="gene2vec") as scratch, workers(config) as compute:
        # A few groups at a time, so that their pairs do not add up in memory.
        found = (
            pairs
            for begin in range(0, len(tasks), _GROUPS_AT_ONCE)
            for pairs in compute("correlate", tasks[begin : begin + _GROUPS_AT_ONCE])
        )
        corpus = Path(scratch) / "pairs.txt"
        num_pairs = write_corpus(found, corpus, config.seed)
        if not num_pairs:
            raise ValueError(
                f"no two genes of {store.url} correlate by {config.min_correlation} in any group; "
                "lower min_correlation or min_cells, or choose larger groups (group_by)"
            )
        epochs = config.epochs or max(_EPOCHS, -(-_PAIRS_SEEN // num_pairs))
        log.info("training %d times on %s pairs", epochs, f"{num_pairs:,}")
        words = gensim.models.Word2Vec(
            corpus_file=str(corpus),
            vector_size=config.dim,
            window=1,
            sg=1,
            hs=0,
            negative=config.negative,
            min_count=1,
            sample=0,
            epochs=epochs,
            seed=config.seed,
            workers=config.threads,
        ).wv
    rows = np.array([words.key_to_index.get(str(gene), -1) for gene in range(len(store.panel))])
    matrix = np.zeros((len(store.panel), config.dim), np.float32)
    matrix[rows >= 0] = words.vectors[rows[rows >= 0]]
    return GeneVectors(matrix, rows >= 0), {
        "method": "gene2vec: skip-gram on pairs of co-expressed genes",
        "store_id": store.header.store_id,
        "settings": {name: getattr(config, name) for name in _SETTINGS},
        "epochs": epochs,
        "pairs": num_pairs,
        "cells_by_group": {name: len(positions) for name, positions in groups.items()},
        "gensim": gensim.__version__,
    }


def sample_groups(
    store: CellStore, column: str, cells_per_group: int
) -> dict[str, NDArray[np.int64]]:
    """Positions of the first cells of each group, rising; groups by name."""
    pieces: dict[str, list[NDArray[np.int64]]] = {}
    taken: dict[str, int] = {}
    for partition, start in enumerate(store.partition_starts[:-1].tolist()):
        obs = read_obs(store, partition, column)
        order = np.argsort(obs.codes, kind="stable")
        codes, firsts = np.unique(obs.codes[order], return_index=True)
        for code, rows in zip(codes, np.split(order, firsts[1:]), strict=True):
            name = obs.values[code]
            wanted = rows[: cells_per_group - taken.get(name, 0)]
            taken[name] = taken.get(name, 0) + len(wanted)
            if len(wanted):
                pieces.setdefault(name, []).append(start + wanted)
    return {name: np.concatenate(pieces[name]) for name in sorted(pieces)}


def coexpressed_pairs(
    expression: sparse.csr_matrix, min_cells: int, neighbours: int, min_correlation: float
) -> NDArray[np.int32]:
    """Pair each gene with those that it correlates with most.

    Args:
        expression: log1p(CP10k), cells × G.
        min_cells: Genes expressed in fewer cells have no pairs.
        neighbours: Most pairs of a gene.
        min_correlation: Least Pearson correlation; four standard errors of no correlation (4 / √n
            of n cells) if that is more.

    Returns:
        Panel positions of gene and neighbour, (pairs, 2).
    """
    num_cells = expression.shape[0]
    genes = np.flatnonzero(np.diff(expression.tocsc().indptr) >= min_cells)
    if num_cells < 2 or len(genes) < 2:
        return np.empty((0, 2), np.int32)
    matrix = expression[:, genes].astype(np.float32)
    mean = np.asarray(matrix.sum(axis=0, dtype=np.float64)).ravel() / num_cells
    square = np.asarray(matrix.power(2).sum(axis=0, dtype=np.float64)).ravel() / num_cells
    variance = np.where(square - mean**2 > 1e-9 * square, square - mean**2, np.inf)
    least = max(min_correlation, _STANDARD_ERRORS / np.sqrt(num_cells))
    count = min(neighbours, len(genes) - 1)
    pairs = []
    for begin in range(0, len(genes), _GENES_AT_ONCE):
        tile = slice(begin, min(begin + _GENES_AT_ONCE, len(genes)))
        correlation = _correlation(matrix, mean, np.sqrt(variance), tile)
        own = np.arange(tile.stop - tile.start)
        correlation[own, begin + own] = -1.0
        nearest = np.argpartition(correlation, -count, axis=1)[:, -count:]
        row, place = np.nonzero(np.take_along_axis(correlation, nearest, axis=1) >= least)
        pairs.append(np.stack([genes[begin + row], genes[nearest[row, place]]], axis=1))
    return np.concatenate(pairs).astype(np.int32)


def _correlation(
    matrix: sparse.csr_matrix,
    mean: NDArray[np.float64],
    deviation: NDArray[np.float64],
    tile: slice,
) -> NDArray[np.float32]:
    """Correlation of a tile of genes with all, (tile, genes), summed over some cells at a time."""
    total = np.zeros((tile.stop - tile.start, len(mean)), np.float32)
    for first in range(0, matrix.shape[0], _CELLS_AT_ONCE):
        cells = matrix[first : first + _CELLS_AT_ONCE].toarray()
        total += cells[:, tile].T @ cells
    total /= matrix.shape[0]
    total -= np.outer(mean[tile], mean).astype(np.float32)
    total /= deviation[tile, None].astype(np.float32)
    total /= deviation.astype(np.float32)
    return total


def _pairs_of_group(
    store: str, positions: NDArray[np.int64], config: GeneVectorsConfig
) -> NDArray[np.int32]:
    """Read a group's cells and pair their genes; a task of its own, so it opens the store."""
    opened = open_store(store)
    reader = CellReader(opened)
    pieces = []
    for first in range(0, len(positions), _CELLS_AT_ONCE):
        cells = reader.read(positions[first : first + _CELLS_AT_ONCE])
        lengths = np.diff(cells.indptr)
        rows = np.repeat(np.arange(len(lengths)), lengths)
        library = np.bincount(rows, weights=cells.counts, minlength=len(lengths))
        values = np.log1p(cells.counts / np.repeat(library, lengths) * 1e4).astype(np.float32)
        shape = (len(lengths), len(opened.panel))
        genes = cells.genes.astype(np.int32)
        pieces.append(sparse.csr_matrix((values, genes, cells.indptr.astype(np.int64)), shape))
    expression = sparse.vstack(pieces, format="csr")
    return coexpressed_pairs(
        expression, config.min_cells, config.neighbours, config.min_correlation
    )


def write_corpus(found: Iterable[NDArray[np.int32]], target: Path, seed: int) -> int:
    """Write all pairs as lines of text, shuffled; return how many they are.

    Pairs are dealt to files at random, and each file is shuffled in memory.
    """
    rng = np.random.default_rng(derive_key(seed, "gene pairs"))
    parts: list[Path] = []
    num_pairs = 0
    for number, pairs in enumerate(found):
        path = target.with_name(f"found_{number}.npy")
        np.save(path, pairs, allow_pickle=False)
        parts.append(path)
        num_pairs += len(pairs)
    num_files = -(-num_pairs // _PAIRS_AT_ONCE)
    dealt = [target.with_name(f"dealt_{number}") for number in range(num_files)]
    for path in parts:
        pairs = np.load(path, allow_pickle=False)
        where = rng.integers(num_files, size=len(pairs)) if num_files else np.empty(0, np.int64)
        for number, file in enumerate(dealt):
            with file.open("ab") as stream:
                stream.write(pairs[where == number].tobytes())
        path.unlink()
    with target.open("w", encoding="ascii") as text:
        for file in dealt:
            pairs = np.fromfile(file, np.int32).reshape(-1, 2)
            for one, other in pairs[rng.permutation(len(pairs))].tolist():
                text.write(f"{one} {other}\n")
            file.unlink()
    return num_pairs


def _gensim() -> Any:
    try:
        import gensim
    except ImportError as error:
        raise ValueError(
            "training gene vectors needs gensim; install it (pip install 'scbert-scale[genes]'), "
            "or import vectors (--vectors FILE)"
        ) from error
    return gensim
