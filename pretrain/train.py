"""The pretraining loop: a cell store in, checkpoints and an export out."""

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from datastore.loader import CellLoader, PackedBatch, TokenBatch, to_bins, to_tokens
from datastore.measured import MeasuredGenes
from datastore.reader import CellReader
from datastore.sampler import CellSampler
from datastore.selection import Selection, select_cells
from datastore.store import CellStore, open_store
from datastore.verification import check_complete
from pretrain.agreement import require_agreement
from pretrain.building import build_model, read_gene_vectors
from pretrain.checkpoint import TrainingState, identity, keep_panel, resume, save_checkpoint
from pretrain.config import PretrainConfig
from pretrain.deepspeed_settings import read_deepspeed_json, require_supported
from pretrain.distributed import Ranks
from pretrain.engine import TrainingEngine, construction, pretraining_engine
from pretrain.evaluate import evaluate
from pretrain.export import git_commit, write_export
from pretrain.interruption import StopRequest, only_training_in
from pretrain.micro_batches import cut_by_tokens
from pretrain.mlflow_records import recorded
from pretrain.objective import MaskedGeneModel
from pretrain.schedule import learning_rate
from pretrain.step import StepInfo, redraw, training_step
from pretrain.tracking import Tracker, start_run
from pretrain.watchdog import Watchdog
from pretrain.window import Window

log = logging.getLogger(__name__)


def pretrain(
    config: PretrainConfig, ranks: Ranks, request: StopRequest | None = None
) -> dict[str, Any]:
    """Train, evaluate, checkpoint, and export; continue where an earlier start stopped.

    Args:
        config: Everything there is to choose.
        ranks: This process among all.
        request: Looked at after each step; if any rank is asked to stop, all save and stop.

    Returns:
        What the run came to: step, total_steps, held-out metrics, folder of the export (none when
        the run ended early), whether it was `interrupted` by a request, equal on all ranks; and the
        MLflow run id, which only the first rank knows (none elsewhere).
    """
    with ranks.failing_together():
        accumulation = config.batch.accumulation_steps(ranks.world_size)
        # Refuse it before anything is written.
        require_supported(read_deepspeed_json(config.deepspeed), ranks.device.type)
        store = open_store(config.store)
        if ranks.is_first:
            check_complete(store)
    with ExitStack() as held:
        with ranks.failing_together():
            if ranks.is_first:
                held.enter_context(only_training_in(Path(config.output)))
        return _pretrain(config, store, accumulation, ranks, request or StopRequest())


def _pretrain(
    config: PretrainConfig, store: CellStore, accumulation: int, ranks: Ranks, request: StopRequest
) -> dict[str, Any]:
    output = Path(config.output)
    selection = select_cells(store, config.data, config.validation_share)
    log.info(
        "training on %s of the store's %s cells, %s held out",
        *(f"{n:,}" for n in (selection.num_training, store.num_cells, selection.num_held_out)),
    )
    order = selection.order(config.seed, config.order)
    sampler = CellSampler(
        order, config.batch.global_size, ranks.rank, ranks.world_size, accumulation
    )
    total_steps = config.epochs * sampler.steps_per_epoch
    total_steps = min(total_steps, config.max_steps or total_steps)
    stop = min(total_steps, config.stop_after or total_steps)

    reader = CellReader(store)
    loader = CellLoader(
        reader,
        sampler,
        len(store.panel),
        config.binning,
        with_values=config.encoder.expression == "continuous",
    )
    validation = list(_validation_batches(reader, store, selection, config, ranks))
    asks_zeros = config.encoder.num_zeros or config.masking.zeros or config.cell_objective
    measured = MeasuredGenes(store) if asks_zeros else None

    vectors, origin = read_gene_vectors(config, store.panel)
    model = build_model(config, store.panel, vectors, construction(config, ranks))
    engine = pretraining_engine(model, config, ranks)
    who = identity(config, store)
    checkpoints = output / "checkpoints"
    state = resume(checkpoints, engine, who, ranks) or TrainingState()
    with ranks.failing_together():
        if ranks.is_first:
            keep_panel(checkpoints, store.panel)
    if state.step:
        log.info("continuing at step %d of %d", state.step, total_steps)

    with (
        _start_tracker(config, ranks, state, store, selection) as tracker,
        _watched(engine, config.watchdog_minutes * 60, ranks),
    ):
        window = Window(ranks.hosts())
        metrics: dict[str, float] = {}
        interrupted = False
        for epoch, batches in _steps(loader, config, state.step, stop, sampler.steps_per_epoch):
            window.note_fetched()
            rate = learning_rate(state.step, sampler.steps_per_epoch, total_steps, config.optim)
            redraw(engine, state.step, config)
            info = StepInfo(epoch, state.step, rate, state.skipped_steps)
            done = training_step(engine, batches, info, config, ranks, window, measured)
            window.add(done.sums)
            state = replace(
                state,
                step=state.step + 1,
                skipped_steps=state.skipped_steps + done.skipped,
                cells_seen=min(
                    state.cells_seen + config.batch.global_size, (epoch + 1) * order.num_cells
                ),
            )
            # Every rank must stop at the same step, whichever was asked.
            interrupted = any(ranks.sum([float(request.signal is not None)]))
            last = state.step == stop or interrupted
            if state.step % config.log_every == 0 or last:
                numbers = window.finish(ranks) | {
                    "learning_rate": rate,
                    "gradient_norm": engine.gradient_norm,
                    "epoch": state.step / sampler.steps_per_epoch,
                }
                tracker.log_metrics(numbers, state.step)
                _log_step(state.step, total_steps, numbers)
            if config.check_ranks_every and (state.step % config.check_ranks_every == 0 or last):
                require_agreement(engine.model, state.step, ranks)
            metrics = {}
            if state.step % config.evaluate_every == 0 or (last and not interrupted):
                metrics = evaluate(engine, validation, config, ranks, measured)
                tracker.log_metrics(metrics, state.step)
                _log_evaluation(state.step, metrics)
            if state.step % config.save_every == 0 or last:
                state = replace(_with_best(state, metrics), run_id=tracker.run_id)
                save_checkpoint(checkpoints, engine, state, who, ranks, config.keep_checkpoints)
            if interrupted:
                log.info("%s: saved at step %d", request.signal or "asked to stop", state.step)
                tracker.finish("KILLED")
                break
            window.restart_clock()  # what is between two steps is no training time
        export = None
        if state.step >= total_steps:
            metrics = metrics or evaluate(engine, validation, config, ranks, measured)
            state = replace(state, run_id=tracker.run_id)
            export = _export(engine, store, config, state, metrics, origin, ranks)
            tracker.log_artifacts(export, "export")
    return {
        "step": state.step,
        "total_steps": total_steps,
        "metrics": metrics,
        "export": None if export is None else str(export),
        "interrupted": interrupted,
        "run_id": tracker.run_id,
    }


@contextmanager
def _watched(engine: TrainingEngine, silence_seconds: float, ranks: Ranks) -> Iterator[None]:
    """Let a watchdog end the process when the engine makes no progress for too long."""
    if ranks.world_size == 1 or not silence_seconds:
        yield
        return
    store = ranks.open_store()
    ranks.barrier()  # the first rank may come late from its tracker
    watchdog = Watchdog(store, ranks.rank, ranks.world_size, silence_seconds)
    engine.on_progress = watchdog.beat
    try:
        yield
    finally:
        watchdog.stop()


def _with_best(state: TrainingState, metrics: dict[str, float]) -> TrainingState:
    """Note the checkpoint that is about to be written, if no other had a lower held-out loss."""
    loss = metrics.get("validation_loss", math.inf)
    if loss < (math.inf if state.best_loss is None else state.best_loss):
        return replace(state, best_step=state.step, best_loss=loss)
    return state


def _steps(
    loader: CellLoader, config: PretrainConfig, first: int, stop: int, steps_per_epoch: int
) -> Iterator[tuple[int, Sequence[TokenBatch | PackedBatch]]]:
    """Yield (epoch, micro-batches) of each step from `first` to before `stop`."""
    expressed = config.encoder.sequence == "expressed"
    step = first
    while step < stop:
        epoch, into = divmod(step, steps_per_epoch)
        for batches in loader.packed(epoch, into) if expressed else loader.epoch(epoch, into):
            if step == stop:
                return
            yield epoch, batches
            step += 1


def _validation_batches(
    reader: CellReader,
    store: CellStore,
    selection: Selection,
    config: PretrainConfig,
    ranks: Ranks,
) -> Iterator[TokenBatch | PackedBatch]:
    """This rank's held-out cells, in as many batches as every other rank has."""
    cells = selection.validation(config.validation_cells)
    per_rank = -(-len(cells) // ranks.world_size)
    share = np.array_split(cells, ranks.world_size)[ranks.rank]
    with_values = config.encoder.expression == "continuous"
    if config.batch.tokens is not None:
        whole = to_bins(reader.read(share), config.binning, with_values=with_values)
        yield from cut_by_tokens(whole, config, ranks)
        return
    for positions in np.array_split(share, max(1, -(-per_rank // config.batch.micro_size))):
        block = reader.read(positions)
        if config.encoder.sequence == "expressed":
            yield to_bins(block, config.binning, with_values=with_values)
        else:
            yield to_tokens(block, len(store.panel), config.binning, with_values=with_values)


def _start_tracker(
    config: PretrainConfig,
    ranks: Ranks,
    state: TrainingState,
    store: CellStore,
    selection: Selection,
) -> Tracker:
    output = Path(config.output)
    tracker = start_run(
        config.tracking.uri,
        config.tracking.experiment,
        config.tracking.run_name or output.name,
        is_first=ranks.is_first,
        run_id=state.run_id,
        continues=state.step > 0,
        tags={"kind": "pretrain", "git_commit": git_commit() or "unknown"},
        metrics_path=output / "metrics.jsonl",
    )
    # As text: what stands in obs may not be what MLflow takes for the name of a parameter.
    data = {name: str(value) for name, value in asdict(config.data).items()}
    chosen = {"training_cells": selection.num_training, "held_out_cells": selection.num_held_out}
    tracker.log_params({**asdict(config), "data": data, **chosen, "world_size": ranks.world_size})
    tracker.log_dataset(
        Path(config.store).name, store.header.store_id, str(config.store), store.num_cells
    )
    return tracker


def _export(
    engine: TrainingEngine,
    store: CellStore,
    config: PretrainConfig,
    state: TrainingState,
    metrics: dict[str, float],
    gene_vectors: dict[str, Any] | None,
    ranks: Ranks,
) -> Path:
    """Write the export on the first rank; all ranks take part in gathering the weights."""
    folder = Path(config.output) / "export"
    weights = engine.whole_weights(keep=ranks.is_first)
    model = engine.model
    assert isinstance(model, MaskedGeneModel)
    if ranks.is_first:
        write_export(
            folder,
            "encoder",
            model.encoder,
            store.panel,
            weights,
            {
                "metrics": metrics,
                "settings": recorded(config),
                "provenance": {
                    "store_id": store.header.store_id,
                    "num_cells": store.num_cells,
                    "sources": [
                        {
                            "name": line.get("name"),
                            "cells": line.get("cells_kept"),
                            "sha256": line.get("sha256"),
                        }
                        for line in store.header.sources
                    ],
                    "step": state.step,
                    "cells_seen": state.cells_seen,
                    "seed": config.seed,
                    "run_id": state.run_id,
                    "git_commit": git_commit(),
                    "gene_vectors": gene_vectors,
                },
            },
        )
    ranks.barrier()
    return folder


def _log_step(step: int, total_steps: int, numbers: dict[str, float]) -> None:
    log.info(
        "step %d/%d  loss %.4f  masked accuracy %.4f (commonest-bin rule %.4f)  %.1f cells/s",
        step,
        total_steps,
        numbers["loss"],
        numbers["masked_accuracy"],
        numbers["commonest_bin_accuracy"],
        numbers["cells_per_second"],
    )


def _log_evaluation(step: int, metrics: dict[str, float]) -> None:
    if metrics:
        log.info(
            "held-out cells at step %d: loss %.4f  masked accuracy %.4f (commonest-bin rule %.4f)",
            step,
            metrics["validation_loss"],
            metrics["validation_masked_accuracy"],
            metrics["validation_commonest_bin_accuracy"],
        )
