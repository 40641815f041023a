"""Labels for new cells, written into a copy of their AnnData."""

import logging
from dataclasses import dataclass
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import torch

from finetune.cells import panel_counts, read_adata
from finetune.classifier import load_classifier, predict
from finetune.config import AnnotateConfig
from finetune.registry import resolve_model

log = logging.getLogger(__name__)

NOVEL = "scbert_novel"


@dataclass(frozen=True)
class AnnotateResult:
    """Where the labels are, and a count of each."""

    adata: anndata.AnnData
    output: Path
    table: Path
    model: str


def annotate(config: AnnotateConfig, device: torch.device) -> AnnotateResult:
    """Label every cell of a file.

    Adds `obs["scbert_label"]` (likeliest type), `obs["scbert_confidence"]` (its probability),
    `obs["scbert_novel"]` (probability below the model's threshold), `obsm["X_scbert"]` (cell
    embedding), `obsm["scbert_prob"]` (all probabilities) and `uns["scbert"]` (where they come
    from). Nothing else of the AnnData changes, and the input file never does.
    """
    output = Path(config.output)
    if output.resolve() == Path(config.input).resolve():
        raise ValueError(f"output is the input file {config.input}; choose another name")
    if output.suffix != ".h5ad":
        raise ValueError(f"output is {output.name}; its name must end in .h5ad")
    adata = read_adata(config.input, config.layer)
    resolved = resolve_model(config.model, uri=config.tracking_uri)
    model, export = load_classifier(resolved.path)
    counts = panel_counts(adata, export.panel, config.input, config.layer, config.min_share_found)
    output.parent.mkdir(parents=True, exist_ok=True)
    beside = output.with_name(output.name + ".part")
    beside.touch()  # refuse a read-only folder before the work, not after it
    log.info("annotating %d cells with %s", adata.n_obs, config.model)
    predictions = predict(model.to(device), counts, config.batch_size)
    threshold = float(export.metadata["novelty"]["threshold"])

    adata.obs["scbert_label"] = pd.Categorical(predictions.best, categories=model.labels)
    adata.obs["scbert_confidence"] = predictions.confidence
    adata.obs[NOVEL] = predictions.confidence < threshold
    adata.obsm["X_scbert"] = predictions.embedding
    adata.obsm["scbert_prob"] = predictions.probabilities
    adata.uns["scbert"] = {
        "model": resolved.uri or str(config.model),
        "labels": np.array(model.labels, object),
        "novelty_threshold": threshold,
        "panel_digest": export.panel.digest,
    }
    table = output.with_suffix(".csv")
    adata.write_h5ad(beside)
    columns = ["scbert_label", "scbert_confidence", NOVEL]
    beside_table = table.with_name(table.name + ".part")
    adata.obs[columns].to_csv(beside_table, index_label="cell")
    beside_table.replace(table)
    beside.replace(output)
    return AnnotateResult(adata, output, table, str(config.model))
