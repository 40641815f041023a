"""Fine-tuning: a pretrained encoder and labelled cells in, a classifier and its report out.

1. Labelled cells are split into a training side, of which some cells validate, and a test side.
2. The network learns the types (`finetune.fitting`), on one rank or on several. Afterwards the
   first rank goes on alone, so that no other waits for it.
3. Linear experts on expression are tuned inside the training side (`finetune.experts`); what share
   of the network's logits is added to theirs, validation cells decide.
4. Probabilities are calibrated and novelty thresholds set on cells that nothing was fitted on.
5. The test side is labelled, beside the baselines; export, scores and figures are written.
"""

import json
import logging
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import anndata
import torch

from finetune.baselines import BaselineResult, majority, nearest_mean, regression_of, run_baselines
from finetune.classifier import CellClassifier, Predictions, predict, save_classifier
from finetune.config import FinetuneConfig, LabelledConfig
from finetune.expert_pool import ExpertPool, fit_pool
from finetune.explaining import write_run_reasons
from finetune.figures import score_table
from finetune.metrics import ClassificationScores, score
from finetune.network import complete, train_network
from finetune.outcome import write_outcome
from finetune.page import report
from finetune.resume import finish
from finetune.sides import Sides, file_digest, read_sides, sides_of
from finetune.split_digest import split_digest
from finetune.updates import require_trainable
from finetune.verdict import verdict
from pretrain.distributed import Ranks, alone
from pretrain.export import git_commit
from pretrain.mlflow_records import recorded
from pretrain.tracking import Tracker, start_run

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FinetuneResult:
    """What fine-tuning came to."""

    export: Path
    scores: ClassificationScores
    baselines: list[BaselineResult]
    verdict: str
    table: str
    run_id: str | None
    predictions: Predictions
    """What the classifier says of the test side, in its order."""
    seconds: float
    """Wall-clock time of the training."""


def finetune(config: FinetuneConfig, device: torch.device, *, page: bool = False) -> FinetuneResult:
    """Train a classifier, score it beside its baselines on the same held-out cells, export it.

    An interrupted training, started again with the same settings and cells, continues. With `page`
    the run also gets its page, `report.html`.
    """
    result = finetune_on(config, alone(device), page=page)
    assert result is not None
    return result


def finetune_on(
    config: FinetuneConfig, ranks: Ranks, *, page: bool = False
) -> FinetuneResult | None:
    """As `finetune`, by all ranks together; they need not have been one at the former start.

    Returns:
        What it came to, on the first rank; None on the others, which leave when the network is
        trained.

    Raises:
        ValueError, OSError: If settings, cells or encoder are not usable, or ranks read different
            cells; on one rank, the others leave with `SystemExit` 2.
    """
    with ranks.failing_together():
        require_trainable(config, ranks)
        sides = read_sides(config)
    return run(config, sides, ranks, page=page)


def fit(
    adata: anndata.AnnData,
    output: str | Path,
    *,
    encoder: str = "none",
    label_key: str = "cell_type",
    layer: str | None = None,
    test: anndata.AnnData | None = None,
    device: str | torch.device | None = None,
    **settings: Any,
) -> FinetuneResult:
    """Fine-tune on labelled cells in memory, as `finetune` does on files.

    Args:
        adata: Cells with raw counts and their types.
        output: Folder for metrics, figures and the classifier's export.
        encoder: A pretrained export, `models:/name@alias`, or `none` for random weights.
        label_key: Column of obs with the types.
        layer: Layer with the counts, or `raw`; none takes the first of `X`, `layers["counts"]` and
            `raw` that holds counts.
        test: Held-out cells; none holds out a share of each type.
        device: Where to compute; none takes a GPU if there is one.
        **settings: Further fields of `finetune.FinetuneConfig`.
    """
    config = FinetuneConfig(
        encoder=encoder,
        output=str(output),
        data=LabelledConfig(path="adata", label_key=label_key, layer=layer),
        **settings,
    )
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    result = run(config, sides_of(adata, config, test), alone(chosen))
    assert result is not None
    return result


def run(
    config: FinetuneConfig, sides: Sides, ranks: Ranks, *, page: bool = False
) -> FinetuneResult | None:
    """Fine-tune on cells that are read and split; see `finetune_on`."""
    output = Path(config.output)
    with ranks.failing_together():
        tracker = _start_tracker(config, sides, ranks)
    with tracker:
        started = time.perf_counter()
        model = train_network(config, sides.start, sides.learn, ranks, tracker, output)
        if not ranks.is_first:
            return None
        pool, pool_started = None, time.perf_counter()
        if config.head.expression:
            pool = fit_pool(sides.learn.counts, sides.learn.labels, config.seed)
            log.info("experts on expression: %s", pool.setting)
        pool_seconds = time.perf_counter() - pool_started
        complete(model, sides.learn, pool, config)
        seconds = time.perf_counter() - started
        result = _score(config, sides, model, pool, (pool_seconds, seconds), tracker.run_id)
        metrics = write_outcome(result, model, sides.test.labels, output)
        if config.reasons_cells:
            write_run_reasons(
                model,
                sides.start.panel,
                sides.test.counts,
                result.predictions.probabilities.argmax(axis=1),
                output,
                cells_per_type=config.reasons_cells,
            )
        save_classifier(
            result.export, model, sides.start.panel, _metadata(config, sides, result, metrics)
        )
        tracker.log_metrics(metrics, 0)
        if page:
            tracker.log_file(report(output))
        tracker.log_artifacts(output / "figures", "figures")
        tracker.log_artifacts(result.export, "export")
    finish(output)
    return result


def _start_tracker(config: FinetuneConfig, sides: Sides, ranks: Ranks) -> Tracker:
    output = Path(config.output)
    if ranks.is_first:
        output.mkdir(parents=True, exist_ok=True)
    tracker = start_run(
        config.tracking.uri,
        config.tracking.experiment,
        config.tracking.run_name or output.name,
        is_first=ranks.is_first,
        tags={
            "kind": "finetune",
            "pretrained": sides.start.lineage,
            "git_commit": git_commit() or "unknown",
        },
        metrics_path=output / "metrics.jsonl",
    )
    tracker.log_params({**asdict(config), "world_size": ranks.world_size})
    return tracker


def _score(
    config: FinetuneConfig,
    sides: Sides,
    model: CellClassifier,
    pool: ExpertPool | None,
    seconds: tuple[float, float],
    run_id: str | None,
) -> FinetuneResult:
    """Label the test side with the model and its baselines."""
    test = sides.test
    predicted = predict(model, test.counts, config.batch_size)
    classes = model.labels + tuple(sorted({str(x) for x in test.labels} - set(model.labels)))
    scores = score(list(test.labels), predicted.best, classes)
    log.info("held-out accuracy %.4f; scoring the baselines", scores.accuracy)
    both = (sides.learn.counts, sides.learn.labels, test.counts, test.labels, classes, config.seed)
    if pool is None:
        baselines = run_baselines(*both)
    else:
        regression = regression_of(pool, seconds[0], (test.counts, test.labels), classes)
        first = majority(sides.learn.labels, test.labels, classes)
        baselines = [first, nearest_mean(*both), regression]
    rows = [("scBERT", scores, seconds[1])] + [(b.name, b.scores, b.seconds) for b in baselines]
    return FinetuneResult(
        export=Path(config.output) / "export",
        scores=scores,
        baselines=baselines,
        verdict=verdict(scores, baselines),
        table=score_table(rows),
        run_id=run_id,
        predictions=predicted,
        seconds=seconds[1],
    )


def _metadata(
    config: FinetuneConfig, sides: Sides, result: FinetuneResult, metrics: dict[str, float]
) -> dict[str, Any]:
    """What the export says of itself besides its shape."""
    learned, path = config.data.path, config.data.test_path or config.data.path
    return {
        "metrics": metrics,
        "per_class": result.scores.as_json(),
        "evaluation": {
            "split": split_digest(sides.test.counts, sides.test.labels),
            "num_cells": len(sides.test.labels),
            "data": {"name": Path(path).name, "sha256": file_digest(path)},
        },
        "settings": recorded(config),
        "provenance": {
            "pretrained": sides.start.lineage,
            "pretrained_store_id": sides.start.store_id,
            "data": {
                "name": Path(learned).name,
                "sha256": file_digest(learned),
                "cells": split_digest(sides.learn.counts, sides.learn.labels),
            },
            "run_id": result.run_id,
            "seed": config.seed,
            "cells_trained_on": len(sides.learn.labels),
            "git_commit": git_commit(),
        },
    }


def read_history(path: Path) -> list[dict[str, float]]:
    """Read `metrics.jsonl`; where a resumed run repeated a step, the later line counts."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    merged: dict[int, dict[str, Any]] = {}
    for line in lines:
        merged.setdefault(line["step"], {}).update(line)
    return [merged[step] for step in sorted(merged)]
