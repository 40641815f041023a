"""Scaling of pretraining over ranks of one thread each: speed, memory, traffic, checkpoints.

python benchmarks/scaling.py --quick
python benchmarks/scaling.py --write                 # also the results, docs/scaling.md, its plot
python benchmarks/scaling.py --write --only memory   # this part anew, the others as they were

1. Weak scaling: two ranks beside two processes that do the same without communication, in turns.
2. Peak memory of each rank beside `pretrain.estimate`, over shapes, ZeRO stages, precisions.
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
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.scaling_document import write_document
from benchmarks.scaling_memory import MALLOC, POINTS, STATE, Point, estimated_bytes
from benchmarks.scaling_store import make_store
from pretrain.config import BatchConfig, EncoderConfig, PretrainConfig
from pretrain.estimate import bytes_per_step, measure_size
from pretrain.memory_moments import Placement

NUM_GENES = 1_000
MEMORY_GENES = 300
"""Where memory is measured: weights and what belongs to them weigh more there."""
SPEED: dict[str, Any] = {"dim": 128, "depth": 4, "heads": 8, "dim_head": 32}
LARGE: dict[str, Any] = {"dim": 768, "depth": 14, "heads": 12, "dim_head": 64}
"""100 million parameters with the 1,000 genes here."""
BROAD: dict[str, Any] = {"dim": 2048, "depth": 2, "heads": 32, "dim_head": 64}
"""The preset `1b` with two of its blocks."""
Run = list[dict[str, Any]]


def main() -> None:
    options = parse()
    if os.geteuid() == 0 and shutil.which("unshare") and not options.inside:
        inside = 'ip link set lo up && exec "$@"'
        command = [sys.executable, __file__, "--inside", *sys.argv[1:]]
        os.execvp("unshare", ["unshare", "--net", "sh", "-c", inside, "sh", *command])
    results = ROOT / "benchmarks" / "results" / "scaling.json"
    former = json.loads(results.read_text()) if options.write and results.is_file() else {}
    figures, load = former.get("figures", {}), former.get("load", {})
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        make_store(Path(scratch) / "store", NUM_GENES)
        make_store(Path(scratch) / "narrow", MEMORY_GENES)
        for part in options.only:
            load[part] = os.getloadavg()[0]
            figures[part] = MEASURE[part](Path(scratch), options.quick)
            result = {
                "benchmark": "scaling",
                "ratios": ratios(figures),
                "figures": figures,
                "load": load,
                "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "quick": options.quick},
            }
            if options.write:  # each part as soon as it is there
                results.write_text(json.dumps(result, indent=1) + "\n")
    if options.write:
        write_document(result, ROOT / "docs")
    if options.json:
        options.json.write_text(json.dumps(result))
    print(json.dumps(result))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="about a minute")
    parser.add_argument("--only", nargs="+", choices=MEASURE, default=list(MEASURE), metavar="PART")
    parser.add_argument("--write", action="store_true", help="results, docs/scaling.md, plot")
    parser.add_argument("--json", type=Path, help="write the result there, too")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.write and options.quick:
        parser.error("--write is for whole runs; leave out --quick")
    return options


def measure_weak(work: Path, quick: bool) -> list[list[float]]:
    """Cells per second of two ranks and of two processes without communication, by turns."""
    steps, rounds = (3, 1) if quick else (8, 5)
    found = []
    for _ in range(rounds):
        alone = together(work, 2, steps, SPEED, communicate=False)
        joined = together(work, 2, steps, SPEED, communicate=True)
        found.append([rate(joined), rate(alone)])
    return found


def measure_traffic(work: Path, quick: bool) -> dict[str, dict[str, float]]:
    """Bytes on the wire per step of two ranks, for each ZeRO stage."""
    size = measure_size(EncoderConfig(**STATE), NUM_GENES)
    found = {}
    for stage in (1, 3) if quick else (0, 1, 2, 3):
        run = together(work, 2, 2, STATE, zero={"stage": stage}, micro=2, accumulation=2)
        config = PretrainConfig(store="", output="", batch=BatchConfig(global_size=8, micro_size=2))
        placement = Placement(ranks_per_node=2, stage=stage, gloo=True)
        found[str(stage)] = {
            "sent_bytes": run[0]["bytes_per_step"],
            "sent_bytes_in_theory": bytes_per_step(config, size, placement) * 2,
        }
    return found


def measure_memory(work: Path, quick: bool) -> dict[str, dict[str, float]]:
    """Highest memory of the fullest rank beside the estimate, for each point."""
    found = {}
    for point in POINTS[:2] if quick else POINTS:
        peak = max(rank["peak_bytes"] for rank in run_point(work, point))
        expected = estimated_bytes(point, MEMORY_GENES)
        found[point.name] = {"peak_bytes": peak, "estimated_bytes": expected}
        print(f"{point.name}: {peak / expected:.3f} of the estimate", file=sys.stderr)
    return found


def measure_building(work: Path, quick: bool) -> dict[str, float]:
    """Highest memory while a wide model is made under ZeRO 3, beside that of the whole model."""
    ranks, shape = (2, STATE) if quick else (4, BROAD)
    run = together(
        work, ranks, 1, shape, zero={"stage": 3}, bf16=True, micro=1, accumulation=1, environ=MALLOC
    )
    size = measure_size(EncoderConfig(**shape), NUM_GENES)
    return {
        "ranks": ranks,
        "parameters": size.trained,
        "whole_bytes": 4.0 * size.trained,
        "largest_bytes": 4.0 * size.largest,
        "build_bytes": max(rank["build_bytes"] for rank in run),
    }


def run_point(work: Path, point: Point) -> Run:
    """Train one step at a point, under an allocator that gives back at once what is freed."""
    return together(
        work,
        point.ranks,
        1,
        point.encoder,
        zero=point.zero,
        bf16=point.precision == "bf16",
        micro=point.micro,
        accumulation=point.accumulation,
        store="narrow",
        warm_up=1,
        environ=MALLOC,
    )


def measure_ranks(work: Path, quick: bool) -> dict[str, dict[str, float]]:
    """Speed and loader wait of one, two and four ranks; of one its calibration, too."""
    found = {}
    for world_size in (1, 2) if quick else (1, 2, 4):
        run = together(work, world_size, 3 if quick else 8, SPEED, calibrate=world_size == 1)
        found[str(world_size)] = {
            "cells_per_second": rate(run),
            "loader_wait_share": run[0]["loader_wait_share"],
        }
        if world_size == 1:
            found["1"] |= {
                "calibrated_cpu_seconds": run[0]["calibrated_cpu_seconds_per_cell"],
                "cpu_seconds": 1 / run[0]["cells_per_cpu_second"],
            }
    return found


def measure_checkpoint(work: Path, quick: bool) -> dict[str, float]:
    """Seconds of a save and of a resume, by part."""
    large = SPEED if quick else LARGE
    run = together(work, 2, 1, large, zero={"stage": 1}, micro=1, accumulation=1, save=True)[0]
    names = [name for name in run if name.startswith(("ch", "re"))]
    return {name: run[name] for name in [*names, "start_seconds"]}


MEASURE: dict[str, Callable[[Path, bool], Any]] = {
    "weak": measure_weak,
    "traffic": measure_traffic,
    "memory": measure_memory,
    "building": measure_building,
    "ranks": measure_ranks,
    "checkpoint": measure_checkpoint,
}


def together(
    work: Path,
    num: int,
    steps: int,
    shape: dict[str, Any],
    *,
    zero: Mapping[str, Any] = MappingProxyType({"stage": 1}),
    bf16: bool = False,
    micro: int = 4,
    accumulation: int = 4,
    communicate: bool = True,
    calibrate: bool = False,
    save: bool = False,
    store: str = "store",
    warm_up: int = 2,
    environ: Mapping[str, str] = MappingProxyType({}),
) -> Run:
    """Run ranks at the same time, one thread each: one training, or as many without each other."""
    content = json.dumps({"zero_optimization": dict(zero), "bf16": {"enabled": bf16}})
    arguments = ["--store", str(work / store), "--deepspeed", content, "--steps", str(steps)]
    arguments += ["--warm_up", str(warm_up)]
    arguments += ["--encoder", json.dumps(shape), "--micro", str(micro)]
    arguments += ["--accumulation", str(accumulation)]
    arguments += ["--calibrate"] * calibrate + ["--save"] * save
    port, folder = free_port(), Path(tempfile.mkdtemp(dir=work))
    processes = []
    for rank in range(num):
        told = {**os.environ, **environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        told["LOCAL_RANK"] = "0"
        for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE"):
            told.pop(name, None)
        if communicate and num > 1:
            told |= {"RANK": str(rank), "WORLD_SIZE": str(num), "LOCAL_RANK": str(rank)}
            told |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        own = folder if communicate else folder / str(rank)
        script = str(ROOT / "benchmarks" / "runs" / "scaling_rank.py")
        processes.append(
            subprocess.Popen(
                [sys.executable, "-W", "ignore", script, *arguments, "--work", str(own)],
                env=told,
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


def ratios(figures: dict[str, Any]) -> dict[str, Any]:
    """What the figures come to, of the parts that were measured."""
    found: dict[str, Any] = {}
    if "weak" in figures:
        found["weak_two_ranks"] = statistics.median(a / b for a, b in figures["weak"])
    for part, measured, expected in (
        ("memory", "peak_bytes", "estimated_bytes"),
        ("traffic", "sent_bytes", "sent_bytes_in_theory"),
    ):
        rows = figures.get(part, {})
        found[f"{part}_vs_estimate"] = {
            name: row[measured] / row[expected] for name, row in rows.items()
        }
    if "ranks" in figures:
        alone = figures["ranks"]["1"]
        found["cpu_seconds_vs_calibration"] = alone["cpu_seconds"] / alone["calibrated_cpu_seconds"]
    return found


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
