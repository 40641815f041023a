"""A classifier that labels cells: how it is loaded, how many cells at a time, what it says."""

import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from tqdm import tqdm

from datastore.genes import align_counts
from finetune.annotation_config import AnnotateConfig
from finetune.check import Alignment
from finetune.classifier import CellClassifier, Predictions, load_classifier, predict
from finetune.labelled import CellLabels, LabelledSlice
from finetune.novelty import Rule, novelty_of
from finetune.query import Query
from finetune.registry import resolve_model
from pretrain.export import Export
from pretrain.products import multiplies_bf16

log = logging.getLogger(__name__)

CPU_BYTES: Final = 2**27
"""Memory for the activations of a batch on the CPU."""
MOST_CELLS: Final = 256
_SECONDS_BETWEEN_LINES: Final = 15.0


@dataclass(frozen=True, kw_only=True)
class AnnotateResult:
    """What was labelled, and where it is.

    Attributes:
        output: The copy with labels.
        table: The labels as CSV.
        model: The model, by its version where it has one.
        num_cells: Cells labelled.
        cells_of: How many cells got each label, most first.
        num_novel: Cells that are called novel.
        cells_per_second: Of reading, classifying and writing together.
    """

    output: Path
    table: Path
    model: str
    num_cells: int
    cells_of: Mapping[str, int]
    num_novel: int
    cells_per_second: float

    @staticmethod
    def of(
        config: AnnotateConfig, model: str, labels: CellLabels, seconds: float
    ) -> "AnnotateResult":
        """Sum up what was written."""
        log.info("%d cells in %.1f s, %.0f cells/s", len(labels), seconds, len(labels) / seconds)
        return AnnotateResult(
            output=Path(config.output),
            table=Path(config.output).with_suffix(".csv"),
            model=model,
            num_cells=len(labels),
            cells_of=labels.cells_of(),
            num_novel=int(labels.is_novel.sum()),
            cells_per_second=len(labels) / seconds,
        )


@dataclass(frozen=True)
class Annotator:
    """A classifier ready to label cells.

    Attributes:
        model: In evaluation mode, on its device.
        export: What it was read from.
        reference: The version it is.
        threshold: Probability below which a cell is novel, if the user gave one.
        batch_size: Cells per forward pass.
        precision: `float32` or `bfloat16`.
    """

    model: CellClassifier
    export: Export
    reference: str
    threshold: float | None
    batch_size: int
    precision: str = "float32"

    def slices(self, query: Query, alignment: Alignment) -> Iterator[LabelledSlice]:
        """Read and classify a query slice by slice; a line tells how far it is, and how fast."""
        started = last = time.perf_counter()
        with tqdm(total=query.num_cells, unit="cell", disable=None) as bar:
            for start, stop in query.slices():
                counts = query.counts(start, stop)
                aligned = align_counts(counts, alignment.places, len(alignment.panel))
                predictions = self.predict(aligned)
                yield LabelledSlice(start, counts, predictions, self.is_novel(predictions))
                bar.update(stop - start)
                now = time.perf_counter()
                if bar.disable and now - last > _SECONDS_BETWEEN_LINES:
                    last, speed = now, stop / (now - started)
                    log.info("%d of %d cells, %.0f cells/s", stop, query.num_cells, speed)

    def predict(self, counts: sparse.csr_matrix) -> Predictions:
        """Classify cells; a batch that is too large for the device is made smaller."""
        batch_size, narrow = self.batch_size, self.precision == "bfloat16"
        device = next(self.model.parameters()).device.type
        while True:
            try:
                with torch.autocast(device, torch.bfloat16, enabled=narrow):
                    return predict(self.model, counts, batch_size, progress=False)
            except torch.OutOfMemoryError:
                if batch_size == 1:
                    raise
                batch_size = batch_size // 2
                torch.cuda.empty_cache()
                log.warning("the device's memory is full: %d cells per batch", batch_size)

    def is_novel(self, predictions: Predictions) -> NDArray[np.bool_]:
        """Say which cells are of no known type, by the user's threshold or the model's rule."""
        threshold = self.threshold
        if threshold is None and self.model.novelty is None:
            threshold = float(self.export.metadata["novelty"]["threshold"])
        rule: Rule | None = None if threshold is None else "probability"
        return novelty_of(predictions, self.model.novelty, rule, threshold)[1]

    def provenance(self, query: Query, alignment: Alignment) -> dict[str, Any]:
        """Say where labels come from, for `uns`."""
        novelty = dict(self.export.metadata.get("novelty", {}))
        threshold = self.threshold if self.threshold is not None else novelty["threshold"]
        own = self.threshold is None and self.model.novelty is not None
        return {
            "model": self.reference,
            "labels": np.array(self.model.labels, object),
            "novelty_rule": str(novelty.get("rule")) if own else "probability",
            "novelty_threshold": float(threshold),
            "panel_digest": self.export.panel.digest,
            "counts_from": query.place,
            "share_of_genes_found": alignment.line.share_found,
        }


def load_annotator(
    model: str,
    device: torch.device,
    *,
    batch_size: int | Literal["auto"] = "auto",
    novelty_threshold: float | None = None,
    precision: Literal["float32", "bfloat16"] = "float32",
    tracking_uri: str | None = None,
) -> Annotator:
    """Pull and load a classifier.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If there is no such model, or it is not a whole export of a classifier.
    """
    resolved = resolve_model(model, uri=tracking_uri)
    classifier, export = load_classifier(resolved.path)
    if "novelty" not in export.metadata and novelty_threshold is None:
        raise ValueError(
            f"{export.path}/config.json does not say when a cell is novel; export the classifier "
            "again, or give a threshold (--novelty_threshold)"
        )
    size = auto_batch_size(classifier, device) if batch_size == "auto" else batch_size
    classifier = classifier.to(device)
    if precision == "bfloat16" and device.type == "cpu" and not multiplies_bf16():
        log.warning("this CPU does not multiply bfloat16 (it has no AVX-512): taking float32")
        precision = "float32"
    return Annotator(classifier, export, resolved.uri, novelty_threshold, size, precision)


def auto_batch_size(model: CellClassifier, device: torch.device) -> int:
    """Choose cells per forward pass by the memory that their activations take.

    On a GPU half of the free memory, on the CPU `CPU_BYTES`. The estimate is generous: the largest
    tensors of one block at once, features of queries and keys included.
    """
    shape = model.encoder.config
    widths = shape.dim * (8 + 2 * shape.ff_mult) + shape.heads * (
        4 * shape.dim_head + 3 * shape.features
    )
    per_cell = 4 * (model.encoder.num_genes + 1) * widths
    room = CPU_BYTES
    if device.type == "cuda":
        room = torch.cuda.mem_get_info(device)[0] // 2
    return int(np.clip(room // per_cell, 1, MOST_CELLS))
