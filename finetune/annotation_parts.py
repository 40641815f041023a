"""Labels for a cell store, part by part: here, on a Dask cluster, or as rows of a Slurm array.

1. Each partition of the store is one part. Its results go into a file of their own in
   `<output>.parts`, written beside and renamed, so a part is there whole or not at all.
2. Whoever runs next, on any machine that sees the folder, does only the parts that are missing.
3. When all are there, they become one table and one AnnData, in the store's order of cells.
"""

import hashlib
import json
import logging
import os
import shutil
import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Final

import numpy as np
import torch

from datastore.store import open_store, write_json
from datastore.workers import workers
from finetune.annotation_config import AnnotateConfig
from finetune.annotator import AnnotateResult, Annotator, load_annotator
from finetune.check import align, gene_tables
from finetune.classifier import Predictions
from finetune.finishing import finish
from finetune.labelled import CellLabels, LabelledSlice, collect_labels
from finetune.labelled_files import LabelledFile, refuse_output
from finetune.markers import read_markers
from finetune.query import store_query
from finetune.registry import resolve_model

log = logging.getLogger(__name__)

PLAN: Final = "plan.json"


def annotate_store(config: AnnotateConfig, device: torch.device) -> AnnotateResult | None:
    """Label every cell of a store, or with `config.part` only those of one partition.

    Returns:
        What was labelled; none after a single part.

    Raises:
        ValueError: If the store or the model is not whole, they do not fit each other, or the
            folder of parts belongs to others.
    """
    started = time.perf_counter()
    output = Path(config.output)
    refuse_output(output, config.input)
    if config.markers is not None:
        read_markers(config.markers)  # refuses before the work, not after it
    # An alias may move while tasks start: all of them must take the version that it means now.
    model = resolve_model(config.model, uri=config.tracking_uri)
    config = replace(config, model=model.uri)
    num_parts = len(open_store(config.input).header.partitions)
    numbers = range(num_parts) if config.part is None else [config.part]
    store_query(config.input, config.part)  # refuses a part that is not there
    annotator = _annotator(config, str(device))
    align(
        store_query(config.input),
        annotator.export.panel,
        config.min_share_found,
        gene_tables(config.panel),
    )
    folder = _parts_folder(config, annotator)
    missing = [number for number in numbers if not _part_file(folder, number).exists()]
    log.info("%d of %d parts to annotate with %s", len(missing), num_parts, annotator.reference)
    with workers(config) as compute:
        compute("annotate", [(annotate_part, config, str(folder), part) for part in missing])
    if config.part is not None:
        return None
    labels = _join(config, annotator, folder, num_parts)
    shutil.rmtree(folder)
    return AnnotateResult.of(config, annotator.reference, labels, time.perf_counter() - started)


def annotate_part(config: AnnotateConfig, folder: str, part: int) -> int:
    """Label one partition of a store into its file; where it runs does not matter.

    Returns:
        How many cells.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    annotator = _annotator(config, device)
    query = store_query(config.input, part)
    alignment = align(
        query, annotator.export.panel, config.min_share_found, gene_tables(config.panel)
    )
    labels = CellLabels(annotator.model.labels, query.num_cells)
    slices = list(annotator.slices(query, alignment))
    for found in slices:
        labels.put(found.start, found.predictions, found.is_novel)
    target = _part_file(Path(folder), part)
    beside = target.with_name(f"{target.name}.{socket.gethostname()}-{os.getpid()}.part")
    with beside.open("wb") as file:
        np.savez(
            file,
            is_novel=labels.is_novel,
            probabilities=np.concatenate([found.predictions.probabilities for found in slices]),
            embedding=np.concatenate([found.predictions.embedding for found in slices]),
        )
        file.flush()
        os.fsync(file.fileno())
    beside.replace(target)
    return query.num_cells


@lru_cache(maxsize=2)  # a worker labels many parts
def _annotator(config: AnnotateConfig, device: str) -> Annotator:
    return load_annotator(
        config.model,
        torch.device(device),
        batch_size=config.batch_size,
        novelty_threshold=config.novelty_threshold,
        precision=config.precision,
        tracking_uri=config.tracking_uri,
    )


def _parts_folder(config: AnnotateConfig, annotator: Annotator) -> Path:
    """Folder of finished parts; made, or found to be of this store, model and setting."""
    folder = Path(f"{config.output}.parts")
    weights = annotator.export.path / "model.safetensors"
    with weights.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    plan = {
        "store": open_store(config.input).header.store_id,
        "model": digest,
        "novelty_threshold": config.novelty_threshold,
        "precision": config.precision,
        "panel": [config.panel.hgnc, config.panel.ensembl, config.panel.orthologues],
    }
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / PLAN).exists():
        own = folder / f"{socket.gethostname()}-{os.getpid()}"
        write_json(own, plan)
        own.replace(folder / PLAN)  # tasks that start together write the same
    found = json.loads((folder / PLAN).read_text(encoding="utf-8"))
    if found != plan:
        different = next(name for name in plan if found.get(name) != plan[name])
        raise ValueError(
            f"{folder} holds parts of another annotation ({different} differs); remove it, or "
            "choose another --output"
        )
    return folder


def _part_file(folder: Path, part: int) -> Path:
    return folder / f"part_{part:06d}.npz"


def _join(config: AnnotateConfig, annotator: Annotator, folder: Path, parts: int) -> CellLabels:
    """Make one file and one table of all parts."""
    output = Path(config.output)
    query = store_query(config.input, obs_column=config.majority_over)
    alignment = align(
        query, annotator.export.panel, config.min_share_found, gene_tables(config.panel)
    )
    with LabelledFile(output, query, config.key_added) as file:
        labels = collect_labels(
            _read_parts(folder, parts, annotator.model.labels),
            query,
            annotator.model.labels,
            file,
            config.majority_over,
        )
        finish(config, file, query, alignment, annotator, labels)
    return labels


def _read_parts(folder: Path, parts: int, labels: tuple[str, ...]) -> Iterator[LabelledSlice]:
    start = 0
    for part in range(parts):
        path = _part_file(folder, part)
        try:
            with np.load(path, allow_pickle=False) as stored:
                predictions = Predictions(stored["probabilities"], stored["embedding"], labels)
                is_novel = stored["is_novel"]
        except (OSError, ValueError, KeyError, EOFError) as error:
            raise ValueError(f"{path} is damaged ({error}); remove it and run again") from error
        yield LabelledSlice(start, None, predictions, is_novel)
        start += len(is_novel)
