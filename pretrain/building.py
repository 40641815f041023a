"""From a configuration to a model: seeded weights, gene vectors."""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from datastore.gene_embedding import load_gene_vectors, provenance_of
from datastore.genes import GenePanel
from pretrain.config import PretrainConfig
from pretrain.encoder import build_encoder
from pretrain.objective import MaskedGeneModel

log = logging.getLogger(__name__)


def build_model(
    config: PretrainConfig,
    panel: GenePanel,
    vectors: Tensor | None = None,
    construction: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> MaskedGeneModel:
    """Build the model with the same weights on every rank.

    Args:
        config: Its shape and seed.
        panel: Its genes, G.
        vectors: Gene vectors in panel order, (G, D).
        construction: Gives what is entered while modules are made; see `engine.construction`.
    """
    if config.encoder.gene_embedding == "none":
        log.warning(
            "encoder.gene_embedding is none: without gene identity the published model collapses "
            "to the commonest-bin rule; use learned or gene2vec"
        )
    encoder = build_encoder(
        config.encoder, config.binning, len(panel), config.seed, vectors, construction()
    )
    with torch.random.fork_rng(devices=[]), construction():
        torch.manual_seed(config.seed)
        return MaskedGeneModel(encoder, sums_up=config.cell_objective > 0)


def read_gene_vectors(
    config: PretrainConfig, panel: GenePanel
) -> tuple[Tensor | None, dict[str, Any] | None]:
    """Read gene vectors in panel order and where they come from, if the configuration names any.

    Those that a learned table begins with are brought to a spread of 1.

    Raises:
        ValueError: If they are not as wide as the encoder.
    """
    if config.gene2vec.vectors is None:
        return None, None
    path, names = Path(config.gene2vec.vectors), config.gene2vec.names
    vectors = load_gene_vectors(path, None if names is None else Path(names), panel)
    if vectors.matrix.shape[1] != config.encoder.dim:
        raise ValueError(
            f"gene2vec.vectors have {vectors.matrix.shape[1]} columns but encoder.dim is "
            f"{config.encoder.dim}; set --encoder.dim {vectors.matrix.shape[1]}"
        )
    without = int((~vectors.found).sum())
    log.info("gene2vec: vectors for %d of %d genes", len(panel) - without, len(panel))
    if without:
        log.warning(
            "%d genes of the panel have no gene2vec vector: theirs are zeros, which tell the model "
            "nothing of the gene (scbert genes embed --missing random gives them some)",
            without,
        )
    matrix = torch.from_numpy(vectors.matrix)
    if config.encoder.gene_embedding == "learned":
        # As wide as a random table, or the expression embedding drowns them: gene2vec spreads 0.2.
        matrix = matrix / matrix.std().clamp(min=1e-6)
    return matrix, {
        **provenance_of(path),
        "genes_of_panel_without": without,
    }
