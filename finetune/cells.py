"""An AnnData from a user: read, check, align to a model's panel."""

import logging
import warnings
from pathlib import Path

import anndata
import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from datastore.gene_tables import NO_TABLES, GeneTables
from datastore.genes import GenePanel
from datastore.sources import scan_source
from finetune.check import align
from finetune.dataset import check_labels
from finetune.query import Query

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
    query: Query,
    panel: GenePanel,
    min_share_found: float = 0.0,
    tables: GeneTables = NO_TABLES,
) -> sparse.csr_matrix:
    """Read all counts of a query, checked and in panel order.

    Returns:
        Raw counts, CSR of shape (N, G).

    Raises:
        ValueError: If these are not counts, or too few genes are the panel's.
    """
    alignment = align(query, panel, min_share_found, tables)
    log.info(
        "%s: counts from %s, %.1f %% of the model's %d genes found",
        *(query.where, query.place, 100 * alignment.line.share_found, len(panel)),
    )
    return alignment.counts(query, 0, query.num_cells)


def labels_of(adata: anndata.AnnData, key: str, where: str) -> NDArray[np.str_]:
    """Cell types of an AnnData as text.

    Raises:
        ValueError: If the column is missing or its labels are not usable.
    """
    if key not in adata.obs:
        columns = ", ".join(map(str, adata.obs.columns)) or "no columns"
        raise ValueError(f"{where} has no obs[{key!r}]; it has {columns} (--data.label_key)")
    return check_labels(adata.obs[key], key)
