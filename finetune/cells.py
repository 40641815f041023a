"""An AnnData from a user: read, check, align to a model's panel."""

import logging
import warnings
from pathlib import Path

import anndata
import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from datastore.genes import GenePanel, align_counts, match_genes
from datastore.sources import check_counts, scan_source
from finetune.dataset import check_labels

log = logging.getLogger(__name__)


def read_adata(path: str | Path, layer: str | None) -> anndata.AnnData:
    """Read an `.h5ad` whole.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is not an AnnData, has no cells, or lacks the layer.
    """
    path = Path(path)
    source = scan_source(path, layer)
    if source.format != "h5ad":
        raise ValueError(f"{path} is a {source.format} source; write it as .h5ad with anndata")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on duplicate names: we sum genes and keep cells by row
        return anndata.read_h5ad(path)


def panel_counts(
    adata: anndata.AnnData,
    panel: GenePanel,
    where: str,
    layer: str | None,
    min_share_found: float,
) -> sparse.csr_matrix:
    """Check the counts of an AnnData and bring them into panel order.

    Returns:
        Raw counts, CSR of shape (N, G).

    Raises:
        ValueError: If these are not counts, or too few genes are the panel's.
    """
    table, place = adata, "X"
    matrix = adata.X
    if layer is not None and layer in adata.layers:
        matrix, place = adata.layers[layer], f"layers[{layer!r}]"
    elif layer is not None:  # read_adata has seen that there is raw
        table, place = adata.raw, "raw"
        matrix = adata.raw.X
    matrix = sparse.csr_matrix(matrix)
    check_counts(matrix, f"{where}, {place}")
    places, found = match_genes(list(table.var_names), panel, where, min_share_found)
    log.info(
        "%s: %.1f %% of the model's %d genes found", where, 100 * found.share_found, len(panel)
    )
    return align_counts(matrix, places, len(panel))


def labels_of(adata: anndata.AnnData, key: str, where: str) -> NDArray[np.str_]:
    """Cell types of an AnnData as text.

    Raises:
        ValueError: If the column is missing or its labels are not usable.
    """
    if key not in adata.obs:
        columns = ", ".join(map(str, adata.obs.columns)) or "no columns"
        raise ValueError(f"{where} has no obs[{key!r}]; it has {columns} (--data.label_key)")
    return check_labels(adata.obs[key], key)
