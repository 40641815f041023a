"""Labels for new cells: of a file or a store into a copy of it, or of an AnnData in place.

1. The query is inspected: where its counts are, which of its genes are the model's.
2. Slice by slice its counts are read, brought into panel order and classified.
3. Results go into a copy beside the target, which is renamed when all of it is there.

Memory does not grow with the number of cells, but for a few bytes each. A cell's result depends on
its own counts alone: not on batch, order, or how cells are spread over files.
"""

import logging
import time
from pathlib import Path
from typing import Literal

import anndata
import numpy as np
import torch

from finetune.annotation_config import AnnotateConfig, GeneTablesConfig
from finetune.annotator import AnnotateResult, Annotator, load_annotator
from finetune.check import Alignment, align, gene_tables, inspect, log_inspection
from finetune.finishing import finish
from finetune.labelled import KeptMatrices, collect_labels
from finetune.labelled_files import LabelledFile, refuse_output
from finetune.markers import read_markers
from finetune.query import Query, adata_query, open_query

log = logging.getLogger(__name__)


def annotate_file(config: AnnotateConfig, device: torch.device) -> AnnotateResult:
    """Label every cell of a file.

    With the default `key_added` this adds `obs["scbert_label"]` (likeliest type),
    `obs["scbert_confidence"]` (its probability), `obs["scbert_novel"]` (of no known type),
    `obsm["X_scbert"]` (cell embedding), `obsm["scbert_prob"]` (all probabilities) and
    `uns["scbert"]` (where they come from); with `majority_over` also `obs["scbert_majority"]`.
    Nothing else of the copy differs from the input, and the input never changes.

    Raises:
        FileNotFoundError: If input or model do not exist.
        ValueError: If the input has no counts, too few of the model's genes, or another fault.
    """
    refuse_output(Path(config.output), config.input)
    if config.part is not None:
        raise ValueError(
            f"part is {config.part} but {config.input} is no cell store; leave --part out"
        )
    if config.markers is not None:
        read_markers(config.markers)  # refuses before the work, not after it
    with open_query(
        config.input,
        config.layer,
        recover_counts=config.recover_counts,
        obs_column=config.majority_over,
    ) as query:
        annotator = load_annotator(
            config.model,
            device,
            batch_size=config.batch_size,
            novelty_threshold=config.novelty_threshold,
            precision=config.precision,
            tracking_uri=config.tracking_uri,
        )
        tables = gene_tables(config.panel)
        alignment = align(query, annotator.export.panel, config.min_share_found, tables)
        refuse_other_scales(query)
        log_inspection(inspect(query, annotator.export.panel, config.min_share_found, tables))
        log.info("annotating %d cells with %s", query.num_cells, annotator.reference)
        return _write(config, query, alignment, annotator)


def annotate(
    adata: anndata.AnnData,
    model: str | Path,
    *,
    layer: str | None = None,
    key_added: str = "scbert",
    copy: bool = False,
    majority_over: str | None = None,
    novelty_threshold: float | None = None,
    batch_size: int | Literal["auto"] = "auto",
    precision: Literal["float32", "bfloat16"] = "float32",
    min_share_found: float = 0.3,
    panel: GeneTablesConfig | None = None,
    tracking_uri: str | None = None,
    device: str | torch.device | None = None,
) -> anndata.AnnData | None:
    """Label the cells of an AnnData in memory (or backed), as `annotate_file` does a file's.

    Args:
        adata: Cells with raw counts.
        model: Export of a classifier: a folder, or `models:/name@alias`.
        layer: Layer with the counts, or `raw`; none takes the first of `X`, `layers["counts"]` and
            `raw` that holds counts.
        key_added: What everything added begins with.
        copy: Return a copy with the labels and leave `adata` as it is.
        majority_over: Column of obs, such as a clustering, whose groups get their commonest label.
        novelty_threshold: Probability below which a cell is novel; none takes the model's rule.
        batch_size: Cells per forward pass; the result does not depend on it.
        precision: Numbers that the encoder calculates with.
        min_share_found: Refuse cells that measured less than this share of the model's genes.
        panel: Tables that translate gene names.
        tracking_uri: Registry to pull from.
        device: Where to compute; none takes a GPU if there is one.

    Returns:
        The copy, or None if `adata` itself was changed.

    Raises:
        FileNotFoundError: If the model does not exist.
        ValueError: As `annotate_file`.
    """
    checked = AnnotateConfig(
        model=str(model),
        input="",
        output="",
        key_added=key_added,
        novelty_threshold=novelty_threshold,
        batch_size=batch_size,
        min_share_found=min_share_found,
    )
    if copy and adata.isbacked:
        raise ValueError("copy is True but adata is backed by a file; use adata.to_memory() first")
    query = adata_query(adata, layer)
    if majority_over is not None and majority_over not in adata.obs:
        raise ValueError(f"adata has no obs[{majority_over!r}]; name a column that it has")
    annotator = load_annotator(
        checked.model,
        torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")),
        batch_size=batch_size,
        novelty_threshold=novelty_threshold,
        precision=precision,
        tracking_uri=tracking_uri,
    )
    tables = gene_tables(panel or GeneTablesConfig())
    alignment = align(query, annotator.export.panel, min_share_found, tables)
    kept = KeptMatrices()
    slices = annotator.slices(query, alignment)
    labels = collect_labels(slices, query, annotator.model.labels, kept, majority_over)
    target = adata.copy() if copy else adata
    for name, values in labels.columns(key_added).items():
        target.obs[name] = values
    target.obsm[f"X_{key_added}"] = np.concatenate(kept.embedding)
    target.obsm[f"{key_added}_prob"] = np.concatenate(kept.probabilities)
    target.uns[key_added] = annotator.provenance(query, alignment)
    return target if copy else None


def refuse_other_scales(query: Query) -> None:
    """Read some cells of a query whose sample held no counts, which says what they are.

    Raises:
        ValueError: With the value, its place and the remedy.
    """
    size = min(256, query.num_cells)
    for start in (0, (query.num_cells - size) // 2, query.num_cells - size):
        query.counts(start, start + size)


def _write(
    config: AnnotateConfig, query: Query, alignment: Alignment, annotator: Annotator
) -> AnnotateResult:
    """Stream predictions into the output; publish table and file when both are whole."""
    started = time.perf_counter()
    output = Path(config.output)
    with LabelledFile(output, query, config.key_added) as file:
        slices = annotator.slices(query, alignment)
        labels = collect_labels(slices, query, annotator.model.labels, file, config.majority_over)
        finish(config, file, query, alignment, annotator, labels)
    return AnnotateResult.of(config, annotator.reference, labels, time.perf_counter() - started)
