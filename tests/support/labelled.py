"""Labelled cells of three easy types, and a small encoder that knows their genes."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import anndata
import numpy as np
import pandas as pd
import torch
from scipy import sparse

from datastore.config import BinningConfig
from datastore.genes import GenePanel
from finetune.classifier import CellClassifier, save_classifier, token_batches
from finetune.config import HeadConfig
from pretrain.config import EncoderConfig
from pretrain.encoder import build_encoder
from pretrain.export import read_export, write_export

NUM_GENES = 32
GENES = tuple(f"GENE{place}" for place in range(NUM_GENES))
TYPES = ("alpha", "beta", "delta")


def labelled_cells(num_cells: int, seed: int) -> anndata.AnnData:
    """Cells whose type raises eight of the genes; counts, CSR float32."""
    rng = np.random.default_rng(seed)
    codes = np.arange(num_cells) % len(TYPES)
    rates = np.full((num_cells, NUM_GENES), 0.7)
    for code in range(len(TYPES)):
        rates[codes == code, 8 * code : 8 * code + 8] = 12.0
    counts = rng.poisson(rates).astype(np.float32)
    return anndata.AnnData(
        sparse.csr_matrix(counts),
        obs=pd.DataFrame(
            {"cell_type": np.array(TYPES)[codes]}, index=[f"cell{row}" for row in range(num_cells)]
        ),
        var=pd.DataFrame(index=list(GENES)),
    )


def write_labelled(path: Path, num_cells: int = 90, seed: int = 0) -> Path:
    """Write labelled cells as `.h5ad`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    labelled_cells(num_cells, seed).write_h5ad(path)
    return path


def write_encoder(
    folder: Path,
    genes: tuple[str, ...] = GENES,
    provenance: Mapping[str, str] = MappingProxyType({}),
    sequence: Literal["full", "expressed"] = "full",
) -> Path:
    """Write the export of a small encoder with random weights."""
    config = EncoderConfig(dim=16, depth=2, heads=2, dim_head=8, sequence=sequence)
    encoder = build_encoder(config, BinningConfig(), len(genes), seed=0)
    weights = {f"encoder.{name}": value for name, value in encoder.state_dict().items()}
    write_export(
        folder, "encoder", encoder, GenePanel(genes), weights, {"provenance": dict(provenance)}
    )
    return folder


def write_classifier(folder: Path, genes: tuple[str, ...] = GENES, threshold: float = 0.5) -> Path:
    """Write the export of a classifier with random weights, whose opinions are strong."""
    encoder = read_export(write_encoder(folder.with_name(folder.name + "_encoder"), genes))
    torch.manual_seed(3)
    model = CellClassifier(encoder.encoder(), TYPES, HeadConfig(hidden=12, bottleneck=6))
    cells = labelled_cells(60, seed=9)
    counts = sparse.csr_matrix(cells.X, shape=(60, len(genes)))
    (tokens,) = token_batches(counts, 60, model.encoder)
    model.train()
    with torch.no_grad():
        model(tokens)  # gives the normalization something to remember
        for layer in (model.head.hidden, model.head.bottleneck, model.head.classes):
            layer.weight *= 4
    metadata = {"novelty": {"score": "max_probability", "threshold": threshold}}
    save_classifier(folder, model.eval(), GenePanel(genes), metadata)
    return folder
