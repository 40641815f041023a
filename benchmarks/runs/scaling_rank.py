"""One rank of a scaling measurement; prints one line of JSON. Started by `benchmarks/scaling.py`.

Training's own parts are run (store, loader, engine, step, checkpoint), without MLflow, whose import
would be counted as memory.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from datastore.loader import CellLoader
from datastore.reader import CellReader
from datastore.sampler import CellSampler
from datastore.selection import select_cells
from datastore.store import open_store
from pretrain import engine as engines
from pretrain.building import build_model
from pretrain.checkpoint import (
    TrainingState,
    checkpoint_problem,
    identity,
    resume,
    save_checkpoint,
)
from pretrain.config import BatchConfig, EncoderConfig, PretrainConfig
from pretrain.distributed import Ranks, start_ranks
from pretrain.engine import TrainingEngine, pretraining_engine
from pretrain.estimate import calibrate
from pretrain.step import StepInfo, training_step
from pretrain.window import Window


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--store", required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--deepspeed", required=True, help="DeepSpeed JSON, as text")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--warm_up", type=int, default=2, help="steps before")
    parser.add_argument("--encoder", type=json.loads, required=True)
    parser.add_argument("--micro", type=int, required=True)
    parser.add_argument("--accumulation", type=int, required=True)
    parser.add_argument("--calibrate", action="store_true")
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with start_ranks(os.environ) as ranks:
        torch.set_num_threads(1)
        found = measure(options, ranks)
    print(json.dumps(found))


def measure(options: argparse.Namespace, ranks: Ranks) -> dict[str, Any]:
    options.work.mkdir(parents=True, exist_ok=True)
    content = options.work / f"zero_{os.getpid()}.json"
    content.write_text(options.deepspeed)
    size = options.micro * options.accumulation * ranks.world_size
    config = PretrainConfig(
        store=options.store,
        output=str(options.work / "run"),
        encoder=EncoderConfig(**options.encoder),
        batch=BatchConfig(global_size=size, micro_size=options.micro),
        deepspeed=str(content),
        validation_share=0.0,
        redraw_every=0,
    )
    engines._import_deepspeed(ranks)
    store = open_store(config.store)
    found: dict[str, Any] = {}
    if options.calibrate:
        found["calibrated_cpu_seconds_per_cell"] = calibrate(
            config, len(store.panel), config.batch.micro_size
        )
    baseline = _reset_peak()
    start = time.perf_counter()
    model = build_model(config, store.panel, construction=engines.construction(config, ranks))
    found["build_bytes"] = _status("VmHWM") - baseline
    engine = pretraining_engine(model, config, ranks)
    found["start_seconds"] = time.perf_counter() - start
    found |= _train(engine, config, options, ranks)
    found["peak_bytes"] = _status("VmHWM") - baseline
    if options.save:
        found |= _save_and_resume(engine, config, options.work / "checkpoints", ranks)
    return found


def _train(
    engine: TrainingEngine, config: PretrainConfig, options: argparse.Namespace, ranks: Ranks
) -> dict[str, Any]:
    store = open_store(config.store)
    order = select_cells(store, config.data, 0.0).order(config.seed, config.order)
    accumulation = config.batch.accumulation_steps(ranks.world_size)
    sampler = CellSampler(
        order, config.batch.global_size, ranks.rank, ranks.world_size, accumulation
    )
    loader = CellLoader(CellReader(store), sampler, len(store.panel), config.binning)
    window = Window(ranks.hosts())
    step, cells, cpu, wall, sent = 0, 0, 0.0, 0.0, 0
    epoch = 0
    metrics: dict[str, float] = {}
    while step < options.warm_up + options.steps:
        packed = config.encoder.sequence == "expressed"
        for batches in loader.packed(epoch, 0) if packed else loader.epoch(epoch, 0):
            window.note_fetched()
            if step == options.warm_up:
                ranks.barrier()
                window.finish(ranks)
                sent, cpu, wall = _sent(), time.process_time(), time.perf_counter()
            done = training_step(
                engine, batches, StepInfo(epoch, step, 1e-4), config, ranks, window
            )
            window.add(done.sums)
            step += 1
            cells += int(done.sums[4]) if step > options.warm_up else 0
            window.restart_clock()
            if step == options.warm_up + options.steps:
                break
        epoch += 1
    ranks.barrier()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    sent = _sent() - sent
    metrics = window.finish(ranks)
    return {
        "cells_per_second": cells / wall,
        "cells_per_cpu_second": cells / cpu,
        "bytes_per_step": sent / options.steps,
        "loader_wait_share": metrics["loader_wait_share"],
    }


def _save_and_resume(
    engine: TrainingEngine, config: PretrainConfig, folder: Path, ranks: Ranks
) -> dict[str, Any]:
    """Seconds of a save, and of a resume by part."""
    store = open_store(config.store)
    who = identity(config, store)
    start = time.perf_counter()
    save_checkpoint(folder, engine, TrainingState(step=1), who, ranks, keep=1)
    stall = time.perf_counter() - start
    ranks.barrier()
    start = time.perf_counter()
    if ranks.is_first:
        assert checkpoint_problem(folder / "step_00000001") is None
    check = time.perf_counter() - start
    ranks.barrier()
    start = time.perf_counter()
    assert resume(folder, engine, who, ranks) is not None
    whole = time.perf_counter() - start
    size = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    return {
        "checkpoint_bytes": size,
        "checkpoint_stall_seconds": stall,
        "resume_check_seconds": check,
        "resume_read_seconds": max(0.0, whole - check),
    }


def _sent() -> int:
    """Bytes that left through the loopback interface of this network namespace."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == "lo":
            return int(numbers.split()[8])
    raise RuntimeError("no loopback interface")


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {name}")


def _reset_peak() -> int:
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


if __name__ == "__main__":
    main()
