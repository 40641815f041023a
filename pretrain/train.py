"""The pretraining loop: a cell store in, checkpoints and an export out."""

import logging
import math
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from datastore.gene_embedding import load_gene_vectors, provenance_of
from datastore.genes import GenePanel
from datastore.loader import CellLoader, TokenBatch, to_tokens
from datastore.reader import CellReader
from datastore.sampler import CellSampler
from datastore.selection import Selection, select_cells
from datastore.store import CellStore, open_store
from datastore.verification import check_complete
from pretrain.checkpoint import TrainingState, identity, resume, save_checkpoint
from pretrain.config import PretrainConfig
from pretrain.distributed import Ranks
from pretrain.encoder import build_encoder
from pretrain.engine import TrainingEngine, read_deepspeed_json
from pretrain.evaluate import evaluate
from pretrain.export import git_commit, write_export
from pretrain.interruption import StopRequest, only_training_in
from pretrain.masking import MaskedBatch, commonest_bins, mask_tokens
from pretrain.objective import MaskedGeneModel, to_tensors
from pretrain.schedule import learning_rate
from pretrain.tracking import Tracker, start_run
from pretrain.watchdog import Watchdog

log = logging.getLogger(__name__)

_STRAGGLER: Final = 2.0
"""A rank that needs so many times as long as the others for its own work, and over a second, …"""
_STRAGGLER_WINDOWS: Final = 3
"""… in so many log windows in a row is named."""


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
        read_deepspeed_json(config.deepspeed)  # refuse it before anything is written
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
    loader = CellLoader(reader, sampler, len(store.panel), config.binning)
    validation = list(_validation_batches(reader, store, selection, config, ranks))

    vectors, origin = _gene_vectors(config, store.panel)
    engine = TrainingEngine(_build_model(config, store.panel, vectors), config, ranks)
    who = identity(config, store)
    checkpoints = output / "checkpoints"
    state = resume(checkpoints, engine, who, ranks) or TrainingState()
    if state.step:
        log.info("continuing at step %d of %d", state.step, total_steps)

    with (
        _start_tracker(config, ranks, state, store, selection) as tracker,
        _watched(engine, config.watchdog_minutes * 60, ranks),
    ):
        state = replace(state, run_id=tracker.run_id)
        window = _Window(ranks.hosts())
        metrics: dict[str, float] = {}
        interrupted = False
        for epoch, batches in _steps(loader, state.step, stop, sampler.steps_per_epoch):
            window.note_fetched()
            rate = learning_rate(state.step, sampler.steps_per_epoch, total_steps, config.optim)
            _redraw(engine, state.step, config)
            window.add(
                _training_step(engine, batches, epoch, state.step, rate, config, ranks, window)
            )
            state = replace(
                state,
                step=state.step + 1,
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
            metrics = {}
            if state.step % config.evaluate_every == 0 or (last and not interrupted):
                metrics = evaluate(engine, validation, config, ranks)
                tracker.log_metrics(metrics, state.step)
                _log_evaluation(state.step, metrics)
            if state.step % config.save_every == 0 or last:
                state = _with_best(state, metrics)
                save_checkpoint(checkpoints, engine, state, who, ranks, config.keep_checkpoints)
            if interrupted:
                log.info("%s: saved at step %d", request.signal or "asked to stop", state.step)
                tracker.finish("KILLED")
                break
            window.restart_clock()  # what is between two steps is no training time
        export = None
        if state.step >= total_steps:
            metrics = metrics or evaluate(engine, validation, config, ranks)
            export = _export(engine, store, config, state, metrics, origin, ranks)
            tracker.log_artifacts(export, "export")
    return {
        "step": state.step,
        "total_steps": total_steps,
        "metrics": metrics,
        "export": None if export is None else str(export),
        "interrupted": interrupted,
        "run_id": state.run_id,
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


def _training_step(
    engine: TrainingEngine,
    batches: list[TokenBatch],
    epoch: int,
    step: int,
    rate: float,
    config: PretrainConfig,
    ranks: Ranks,
    window: "_Window",
) -> NDArray[np.float64]:
    """One optimizer step; return this rank's loss, correct, rule correct, targets, cells.

    Raises:
        ValueError: If a loss or gradient is not finite, before the weights change.
    """
    # With weights a cell may come again in an epoch; other genes are hidden then.
    draw = epoch if config.data.weight_by is None else step
    masked: list[MaskedBatch] = [
        mask_tokens(b.tokens, b.positions, config.seed, draw, config.masking, config.binning)
        for b in batches
    ]
    targets = sum(len(batch.targets) for batch in masked)
    # Every target of the global batch weighs the same, however ranks and micro-batches share them.
    (all_targets,) = ranks.sum([targets])
    sums = np.zeros(5)
    broken: list[int] = []
    for number, batch in enumerate(masked):
        with window.own_work():
            loss, correct = engine(*to_tensors(batch, ranks.device))
        engine.backward(loss / max(1.0, all_targets))
        if not (math.isfinite(loss.detach()) and engine.gradient_is_finite()):
            broken += batches[number].positions.tolist()
        if number == len(masked) - 1:
            with ranks.failing_together():  # before the update, which would spoil the weights
                _refuse_broken(broken, step, ranks)
        engine.step(rate)
        rule = commonest_bins(batch, config.binning) == batch.targets
        sums[:3] += [float(loss.detach()), float(correct), float(rule.sum())]
    sums[3:] = targets, sum(len(batch.positions) for batch in batches)
    return sums


def _refuse_broken(cells: list[int], step: int, ranks: Ranks) -> None:
    if cells:
        raise ValueError(
            f"loss or gradient is not finite at step {step} on rank {ranks.rank} "
            f"({socket.gethostname()}), store positions {cells}; no weight was changed: lower "
            "optim.lr or optim.clip_norm and start again from the last checkpoint"
        )


class _Window:
    """Sums over the steps between two log lines."""

    def __init__(self, hosts: list[str]) -> None:
        self._hosts = hosts
        self._slow = 0, 0
        """The slowest rank, and in how many windows in a row it was much slower."""
        self._begin()

    def _begin(self) -> None:
        self._sums, self._seconds, self._own_seconds = np.zeros(5), 0.0, 0.0
        self.restart_clock()

    def restart_clock(self) -> None:
        """Count time from here on: fetching cells and training on them."""
        self._clock = time.perf_counter()

    def note_fetched(self) -> None:
        """Count the time since the clock was started as this rank's own, waiting for nobody."""
        self._own_seconds += time.perf_counter() - self._clock

    @contextmanager
    def own_work(self) -> Iterator[None]:
        """Count the time inside as this rank's own."""
        start = time.perf_counter()
        yield
        self._own_seconds += time.perf_counter() - start

    def add(self, sums: NDArray[np.float64]) -> None:
        """Take a step's sums and the time since the clock was started."""
        self._sums += sums
        self._seconds += time.perf_counter() - self._clock

    def finish(self, ranks: Ranks) -> dict[str, float]:
        """Reduce over ranks, begin anew, and return the window's metrics."""
        loss, correct, rule, targets, cells = ranks.sum(list(self._sums))
        own, seconds = ranks.gather(self._own_seconds), self._seconds
        self._begin()
        self._look_for_straggler(own)
        targets = max(1.0, targets)
        return {
            "loss": loss / targets,
            "masked_accuracy": correct / targets,
            "commonest_bin_accuracy": rule / targets,
            "cells_per_second": cells / seconds,
        }

    def _look_for_straggler(self, own: list[float]) -> None:
        """Name a rank that was much slower than the others in several windows in a row."""
        slowest = int(np.argmax(own))
        others = own[:slowest] + own[slowest + 1 :]
        slow = own[slowest] > 1.0 and own[slowest] > _STRAGGLER * float(np.median(others or own))
        former, count = self._slow
        self._slow = slowest, (count if former == slowest else 0) + 1 if slow else 0
        if self._slow[1] == _STRAGGLER_WINDOWS:
            log.warning(
                "rank %d (%s) is a straggler: %.2f s of its own work, the others' median %.2f s",
                slowest,
                self._hosts[slowest],
                own[slowest],
                np.median(others),
            )


def _steps(
    loader: CellLoader, first: int, stop: int, steps_per_epoch: int
) -> Iterator[tuple[int, list[TokenBatch]]]:
    """Yield (epoch, micro-batches) of each step from `first` to before `stop`."""
    step = first
    while step < stop:
        epoch, into = divmod(step, steps_per_epoch)
        for batches in loader.epoch(epoch, into):
            if step == stop:
                return
            yield epoch, batches
            step += 1


def _build_model(
    config: PretrainConfig, panel: GenePanel, vectors: Tensor | None = None
) -> MaskedGeneModel:
    """Model with the same weights on every rank."""
    if config.encoder.gene_embedding == "none":
        log.warning(
            "encoder.gene_embedding is none: without gene identity the published model collapses "
            "to the commonest-bin rule; use learned or gene2vec"
        )
    encoder = build_encoder(config.encoder, config.binning, len(panel), config.seed, vectors)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return MaskedGeneModel(encoder)


def _gene_vectors(
    config: PretrainConfig, panel: GenePanel
) -> tuple[Tensor | None, dict[str, Any] | None]:
    """Gene vectors in panel order and where they come from, if any are given."""
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
    return torch.from_numpy(vectors.matrix), {
        **provenance_of(path),
        "genes_of_panel_without": without,
    }


def _redraw(engine: TrainingEngine, step: int, config: PretrainConfig) -> None:
    """Set the projections that belong to a step; a function of the step, so resuming is exact."""
    if config.redraw_every:
        model = engine.model
        assert isinstance(model, MaskedGeneModel)
        number = step // config.redraw_every
        model.encoder.redraw_projections(config.seed, number)


def _validation_batches(
    reader: CellReader,
    store: CellStore,
    selection: Selection,
    config: PretrainConfig,
    ranks: Ranks,
) -> Iterator[TokenBatch]:
    """This rank's held-out cells, in as many batches as every other rank has."""
    cells = selection.validation(config.validation_cells)
    per_rank = -(-len(cells) // ranks.world_size)
    share = np.array_split(cells, ranks.world_size)[ranks.rank]
    for positions in np.array_split(share, max(1, -(-per_rank // config.batch.micro_size))):
        yield to_tokens(reader.read(positions), len(store.panel), config.binning)


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
    weights = engine.whole_weights()
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
                "provenance": {
                    "store_id": store.header.store_id,
                    "num_cells": store.num_cells,
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
