"""Scaling of pretraining over ranks of one thread each: speed, memory, traffic, checkpoints.

python benchmarks/scaling.py --quick
python benchmarks/scaling.py --write    # also the results, docs/scaling.md and its plot

1. Weak scaling: two ranks beside two processes that do the same without communication, in turns.
2. Peak memory of each rank under ZeRO 0 to 3 beside `pretrain.estimate`.
3. Bytes on the wire per step beside theory, counted by the kernel on the loopback interface; as
   root in a network namespace of its own, where nobody else sends.
4. Share of time waiting for cells; seconds that a save stops training, and of a resume by part,
   with 100 million parameters.
5. CPU seconds per cell beside the calibration run of `scbert estimate --gpu cpu`.

Four ranks share two cores: their figures of speed are time-sliced and say nothing of scaling.
"""

import argparse
import json
import os
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np
import pandas as pd
from scipy import sparse

from benchmarks.scaling_document import write_document
from datastore.genes import GenePanel
from datastore.store_writing import ArraySizes, write_manifest, write_partition, write_root
from pretrain.config import BatchConfig, EncoderConfig, PretrainConfig
from pretrain.estimate import Placement, activation_bytes, bytes_per_step, measure_size, memory

NUM_GENES = 1_000
NUM_CELLS = 4_096
SPEED: dict[str, Any] = {"dim": 128, "depth": 4, "heads": 8, "dim_head": 32}
STATE: dict[str, Any] = {"dim": 512, "depth": 4, "heads": 8, "dim_head": 64}
LARGE: dict[str, Any] = {"dim": 768, "depth": 14, "heads": 12, "dim_head": 64}
"""100 million parameters with the 1,000 genes here."""
Run = list[dict[str, Any]]


def main() -> None:
    options = parse()
    if os.geteuid() == 0 and shutil.which("unshare") and not options.inside:
        inside = 'ip link set lo up && exec "$@"'
        command = [sys.executable, __file__, "--inside", *sys.argv[1:]]
        os.execvp("unshare", ["unshare", "--net", "sh", "-c", inside, "sh", *command])
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        make_store(work / "store")
        figures = measure(work, options.quick)
    result = {
        "benchmark": "scaling",
        "ratios": ratios(figures),
        "figures": figures,
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "quick": options.quick},
    }
    if options.write:
        folder = ROOT / "benchmarks" / "results"
        (folder / "scaling.json").write_text(json.dumps(result, indent=1) + "\n")
        write_document(result, ROOT / "docs")
    if options.json:
        options.json.write_text(json.dumps(result))
    print(json.dumps(result))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="about a minute")
    parser.add_argument("--write", action="store_true", help="results, docs/scaling.md, plot")
    parser.add_argument("--json", type=Path, help="write the result there, too")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def measure(work: Path, quick: bool) -> dict[str, Any]:
    steps, rounds = (3, 1) if quick else (8, 5)
    stages = (1, 3) if quick else (0, 1, 2, 3)
    figures: dict[str, Any] = {"weak": [], "stages": {}, "ranks": {}}
    for _ in range(rounds):
        alone = together(work, 2, steps, SPEED, communicate=False)
        joined = together(work, 2, steps, SPEED, communicate=True)
        figures["weak"].append([rate(joined), rate(alone)])
    for stage in stages:
        found = together(work, 2, 2, STATE, stage=stage, micro=2, accumulation=2)
        figures["stages"][stage] = beside_theory(found, stage, 2)
    for world_size in (1, 2) if quick else (1, 2, 4):
        found = together(work, world_size, steps, SPEED, calibrate=world_size == 1)
        figures["ranks"][world_size] = {
            "cells_per_second": rate(found),
            "loader_wait_share": found[0]["loader_wait_share"],
        }
        if world_size == 1:
            figures["calibration"] = {
                "predicted": found[0]["calibrated_cpu_seconds_per_cell"],
                "measured": 1 / found[0]["cells_per_cpu_second"],
            }
    large = SPEED if quick else LARGE
    saved = together(work, 2, 1, large, stage=1, micro=1, accumulation=1, save=True)[0]
    figures["checkpoint"] = {name: saved[name] for name in saved if name.startswith(("ch", "re"))}
    figures["checkpoint"]["start_seconds"] = saved["start_seconds"]
    return figures


def together(
    work: Path,
    num: int,
    steps: int,
    shape: dict[str, Any],
    *,
    stage: int = 1,
    micro: int = 4,
    accumulation: int = 4,
    communicate: bool = True,
    calibrate: bool = False,
    save: bool = False,
) -> Run:
    """Run ranks at the same time, one thread each: one training, or as many without each other."""
    arguments = ["--store", str(work / "store"), "--stage", str(stage), "--steps", str(steps)]
    arguments += ["--encoder", json.dumps(shape), "--micro", str(micro)]
    arguments += ["--accumulation", str(accumulation)]
    arguments += ["--calibrate"] * calibrate + ["--save"] * save
    port, folder = free_port(), Path(tempfile.mkdtemp(dir=work))
    processes = []
    for rank in range(num):
        environ = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "LOCAL_RANK": "0"}
        for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE"):
            environ.pop(name, None)
        if communicate and num > 1:
            environ |= {"RANK": str(rank), "WORLD_SIZE": str(num), "LOCAL_RANK": str(rank)}
            environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        own = folder if communicate else folder / str(rank)
        script = str(ROOT / "benchmarks" / "runs" / "scaling_rank.py")
        processes.append(
            subprocess.Popen(
                [sys.executable, "-W", "ignore", script, *arguments, "--work", str(own)],
                env=environ,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    outcomes = [process.communicate() for process in processes]
    for process, (_, said) in zip(processes, outcomes, strict=True):
        if process.returncode:
            raise RuntimeError(said)
    shutil.rmtree(folder)
    return [json.loads(out.splitlines()[-1]) for out, _ in outcomes]


def rate(found: Run) -> float:
    """Cells per second of all ranks."""
    return float(sum(rank["cells_per_second"] for rank in found))


def beside_theory(found: Run, stage: int, world_size: int) -> dict[str, float]:
    """Measured memory and traffic beside the estimate's."""
    config = PretrainConfig(
        store="",
        output="",
        encoder=EncoderConfig(**STATE),
        batch=BatchConfig(global_size=4 * world_size, micro_size=2),
    )
    size = measure_size(config.encoder, NUM_GENES)
    placement = Placement(ranks_per_node=world_size, stage=stage, gloo=True)
    kept = activation_bytes(config, size.tokens, "fp32")
    return {
        "peak_bytes": max(rank["peak_bytes"] for rank in found),
        "estimated_bytes": memory(config, size, placement, kept).total,
        "sent_bytes": found[0]["bytes_per_step"],
        "sent_bytes_in_theory": bytes_per_step(config, size, placement) * world_size,
    }


def ratios(figures: dict[str, Any]) -> dict[str, Any]:
    stages = figures["stages"]
    calibration = figures["calibration"]
    return {
        "weak_two_ranks": statistics.median(a / b for a, b in figures["weak"]),
        "memory_vs_estimate": {
            stage: found["peak_bytes"] / found["estimated_bytes"] for stage, found in stages.items()
        },
        "bytes_vs_theory": {
            stage: found["sent_bytes"] / found["sent_bytes_in_theory"]
            for stage, found in stages.items()
        },
        "cpu_seconds_vs_calibration": calibration["measured"] / calibration["predicted"],
    }


def make_store(folder: Path) -> None:
    """Write a store of made-up counts: a twentieth of the genes expressed, as in real cells."""
    rng = np.random.default_rng(0)
    panel = GenePanel(tuple(f"GENE{number}" for number in range(NUM_GENES)))
    counts = rng.poisson(3.0, (NUM_CELLS, NUM_GENES)) * (rng.random((NUM_CELLS, NUM_GENES)) < 0.053)
    counts[:, 0] += 1
    names = pd.Index([f"cell-{row}" for row in range(NUM_CELLS)], dtype=object)
    obs = pd.DataFrame({"source_row": np.arange(NUM_CELLS)}, index=names)
    matrix = sparse.csr_matrix(counts.astype(np.uint32))
    sizes = ArraySizes(cells_per_chunk=64, cells_per_shard=2_048)
    write_partition(folder / "dataset_0", matrix, obs, panel, sizes)
    write_root(folder, panel)
    write_manifest(folder, panel, [NUM_CELLS], int(matrix.nnz), seed=0, sources=[])


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    main()
