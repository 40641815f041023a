"""How fast and in how much memory the encoder trains, beside performer-pytorch's.

    python benchmarks/encoder_step.py            # about twenty minutes, 16 GB
    python benchmarks/encoder_step.py --quick    # two minutes, 4,096 positions, 3 GB

One step is forward, backward and update of the published shape (dim 200, depth 6, 10 heads × 64,
266 features) on cells with 900 of 16,906 genes expressed. All cases take turns in one process, on
one thread and with one allocator policy (freed memory is kept), and are timed in CPU-seconds; a
ratio is the median over the rounds of what two cases took in the same round. Rounds count once the
heap has settled: as long as the system is still handing out pages, the baseline, which needs nine
times the memory, takes up to twice its time. Peak memory is measured in a process for each case, as
growth over the model without a batch. The baseline writes logits at every position, as the
published code does; ours only where somebody reads. On a CPU without AVX-512 there is no native
step in bf16: memory, forward, expressed-only and ranks are of float32 then, and bf16 autocast is
left out.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
from runs.encoder import CASES, Trainer, draw, give_memory_back
from turns import RUNS, Bar, Ratios, check_options, finish, publish, result_of

from pretrain.allocator import keep_freed_memory
from pretrain.native import missing
from pretrain.products import multiplies_bf16

BARS = [
    Bar("full_torch", least=2.6),
    Bar("full_native", least=8),
    Bar("full_fp32", least=1.7),
    Bar("native_vs_autocast", least=4),
    Bar("memory", most=0.15),
    Bar("memory_checkpointed", most=0.10),
    Bar("expressed_vs_full", least=12),
    Bar("expressed_zeros", least=60),
    Bar("forward", least=10),
    Bar("linearity", most=1.15),
    Bar("batch_8_vs_1", most=1.0),
    Bar("two_ranks_vs_one", least=1.7),
]
COLUMNS = {
    "cpu_s": "CPU-s/cell",
    "cells_per_s": "cells/s",
    "gflops": "GFLOP/s",
    "of_peak": "of peak",
    "mb": "MB",
}
REFERENCE, AUTOCAST = "performer_pytorch", "performer_pytorch_autocast"
LENGTHS = (1_024, 4_096, 16_907)
MOST_POSITIONS = 17_000
"""Of a batch that the baseline takes: 7 GB, and the heap as much again."""
UNSETTLED = 0.03
"""Share of a round's CPU time that the system takes while it hands out pages."""

SETTLING_ROUNDS = 4
"""At most; a round that is settled is followed by rounds that count."""
OURS = ("native", "fp32", "torch")

Times = dict[str, list[float]]
Grid = dict[str, float]


def main() -> None:
    options = parse()
    keep_freed_memory()
    torch.set_num_threads(1)
    length = LENGTHS[1] if options.quick else LENGTHS[-1]
    rounds = options.rounds or (1 if options.quick else 2)
    cases = [name for name in CASES if runs_here(name)]
    say = (lambda _: None) if options.json else (lambda text: print(text, flush=True))
    say(f"full steps of {length:,} positions")
    trainers = {name: CASES[name](length) for name in cases}
    steps = take_turns(trainers, length, 1, rounds)
    say("forward only")
    labelling = {name: trainers[name] for name in (REFERENCE, AUTOCAST, *OURS) if name in trainers}
    forward = take_turns(labelling, length, 1, rounds, forward=True)
    say("two threads")
    two_threads = measure_two_threads(labelling, length)
    parts = time_by_part(trainers[fastest(cases)], length)
    del trainers, labelling
    give_memory_back()
    say("lengths and batches")
    grid = measure_grid(cases, options.quick)
    say("memory and ranks")
    give_memory_back()
    memory = {name: measure_memory(name, length) for name in cases}
    short = LENGTHS[0] if options.quick else LENGTHS[1]
    ranks = {
        f"{name}, {kind}": measure_ranks(name, short, kind)
        for name in dict.fromkeys((fastest(cases), "fp32"))
        for kind in ("rank", "product")
    }
    ratios = compare(steps, forward, grid, memory, fastest(cases))
    of_ranks = {name: seconds["one"] / seconds["two"] for name, seconds in ranks.items()}
    ratios |= {
        "two_ranks_vs_one": of_ranks[f"{fastest(cases)}, rank"],
        "two_products_vs_one": of_ranks[f"{fastest(cases)}, product"],
        "two_fp32_ranks_vs_one": of_ranks["fp32, rank"],
        "two_fp32_products_vs_one": of_ranks["fp32, product"],
    }
    figures = figures_of(steps, memory, length)
    figures |= {
        "length": length,
        "forward_cpu_s": {k: round(median(v), 3) for k, v in forward.items()},
    }
    figures |= {"grid_cpu_s_per_cell": grid, "seconds_by_part": parts, "ranks_seconds": ranks}
    figures["two_threads_seconds"] = two_threads
    bars = [] if options.quick else BARS  # they are meant for the full length
    publish(result_of("encoder_step", ratios, bars, figures), COLUMNS, options)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="How fast and in how much memory the encoder trains, beside performer-pytorch."
    )
    parser.add_argument(
        "--quick", action="store_true", help="4,096 positions, one round: two minutes"
    )
    parser.add_argument("--rounds", type=int, help="default 2, quick: 1")
    parser.add_argument("--json", action="store_true", help="print nothing but the line of JSON")
    parser.add_argument("--save", metavar="FILE", help="write the line of JSON to a file, too")
    options = parser.parse_args()
    check_options(parser, options)
    return options


def runs_here(name: str) -> bool:
    """Whether this CPU has the kernel of a case, or the products that torch's autocast makes.

    Checkpointed and expressed-only steps are of the fastest kind.
    """
    if "autocast" in name:
        return multiplies_bf16()
    return not name.startswith("native" if missing() else "fp32_")


def fastest(cases: list[str]) -> str:
    return "native" if "native" in cases else "fp32"


def cpu_seconds(run: Callable[[], object]) -> float:
    before = time.process_time()
    run()
    return time.process_time() - before


def take_turns(
    trainers: dict[str, Trainer], length: int, cells: int, rounds: int, forward: bool = False
) -> Times:
    """CPU-seconds per cell, round by round, after one to four rounds for the heap to settle."""
    batch = draw(cells, length)
    times: Times = defaultdict(list)
    settling, settled = 0, False
    while min(map(len, times.values()), default=0) < rounds:
        counted = settled or settling == SETTLING_ROUNDS
        before = os.times()
        for name, trainer in trainers.items():
            run = trainer.forward if forward else trainer.step
            seconds = cpu_seconds(partial(run, batch)) / cells
            if counted:
                times[name].append(seconds)
        after = os.times()
        settling += not counted
        system, own = after.system - before.system, after.user - before.user
        settled = settled or system < UNSETTLED * (system + own)
    return times


def measure_two_threads(trainers: dict[str, Trainer], length: int) -> dict[str, float]:
    """Seconds by the clock of a step on two threads, after one that is not counted."""
    batch, seconds = draw(1, length), {}
    torch.set_num_threads(2)
    for name, trainer in trainers.items():
        trainer.step(batch)
        start = time.perf_counter()
        trainer.step(batch)
        seconds[name] = round(time.perf_counter() - start, 3)
    torch.set_num_threads(1)
    return seconds


def measure_grid(cases: list[str], quick: bool) -> Grid:
    """CPU-seconds per cell of steps and of forward passes, by case, length and batch."""
    best, grid = fastest(cases), {}
    for length in LENGTHS[: 2 if quick else 3]:
        for cells in (1, 2, 8):
            positions = length * cells
            fits = positions < MOST_POSITIONS / (4 if quick else 1)
            names = (best, REFERENCE, AUTOCAST) if fits else (best,)
            compared = {name: CASES[name](length) for name in names if name in cases}
            rounds = 2 if fits and not quick else 1
            for kind in ("step",) if quick else ("step", "forward"):
                times = take_turns(compared, length, cells, rounds, kind == "forward")
                for name, seconds in times.items():
                    where = f"{name}, {length} positions, batch {cells}, {kind}"
                    grid[where] = round(min(seconds), 4)
            if cells == 8:
                give_memory_back()
    return grid


def measure_memory(name: str, length: int) -> float:
    """Peak of a process of its own over what it held before its first batch, in MB."""
    command = [sys.executable, "-W", "ignore", str(RUNS / "encoder.py"), name, str(length)]
    started = subprocess.Popen(
        [*command, "memory"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    return finish(started)["mb"]


def measure_ranks(name: str, length: int, kind: str = "rank") -> dict[str, float]:
    """Seconds by the clock for as many steps of one process of one thread, and of two at once.

    The two average their gradients as data-parallel ranks do (gloo); they do twice the cells, so
    the time of two is halved. With `product` the steps are plain products, which share nothing but
    the machine: what two ranks could reach at most.
    """
    seconds = {}
    command = [sys.executable, "-W", "ignore", str(RUNS / "encoder.py"), name, str(length), kind]
    for world in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            started = [
                subprocess.Popen(
                    [*command, str(rank), str(world), f"{folder}/store"],
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
                for rank in range(world)
            ]
            slowest = max(finish(run)["seconds"] for run in started)
        seconds["one" if world == 1 else "two"] = round(slowest / world, 3)
    return seconds


def time_by_part(trainer: Trainer, length: int) -> dict[str, float]:
    """Shares of a step's operator time, by what the operators do."""
    batch = draw(1, length)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        trainer.step(batch)
    parts: dict[str, float] = defaultdict(float)
    for event in profiler.key_averages():
        name = event.key.lower()
        if "attention" in name:
            part = "attention"
        elif "feedforward" in name:
            part = "feed-forward"
        elif any(word in name for word in ("aten::mm", "addmm", "bmm")):
            part = "other products"
        elif "adam" in name:
            part = "update"
        elif "layer_norm" in name:
            part = "LayerNorm"
        else:
            part = "copies, sums and the rest"
        parts[part] += event.self_cpu_time_total
    total = sum(parts.values())
    return {part: round(time / total, 3) for part, time in sorted(parts.items())}


def compare(
    steps: Times, forward: Times, grid: dict[str, float], memory: dict[str, float], best: str
) -> Ratios:
    def times(one: str, other: str, of: Times = steps) -> float | None:
        pairs = zip(of.get(one, ()), of.get(other, ()), strict=False)
        ratios = [theirs / ours for theirs, ours in pairs]
        return median(ratios) if ratios else None

    longest = max(int(name.split(", ")[1].split()[0]) for name in grid if name.startswith(best))

    def per_token(length: int) -> float:
        return grid[f"{best}, {length} positions, batch 1, step"] / length

    def share(name: str) -> float:
        return memory[name] / memory[REFERENCE]

    return {
        "full_torch": times(REFERENCE, "torch"),
        "full_native": times(REFERENCE, "native"),
        "full_fp32": times(REFERENCE, "fp32"),
        "native_vs_autocast": times(AUTOCAST, "native"),
        "autocast": times(REFERENCE, AUTOCAST),
        "memory": share(best),
        "memory_checkpointed": share(f"{best}_checkpointed"),
        "expressed_vs_full": times(best, f"{best}_expressed"),
        "expressed": times(REFERENCE, f"{best}_expressed"),
        "expressed_zeros": times(REFERENCE, f"{best}_expressed_zeros"),
        "forward": times(REFERENCE, best, forward),
        "forward_vs_autocast": times(AUTOCAST, best, forward),
        "forward_fp32": times(REFERENCE, "fp32", forward),
        "linearity": per_token(longest) / per_token(LENGTHS[0]),
        "linearity_from_4096": per_token(longest) / per_token(LENGTHS[1]),
        "batch_8_vs_1": grid[f"{best}, {longest} positions, batch 8, step"]
        / grid[f"{best}, {longest} positions, batch 1, step"],
    }


def figures_of(steps: Times, memory: dict[str, float], length: int) -> dict[str, Any]:
    """CPU-seconds, memory, and arithmetic beside the peak of a plain product, case by case."""
    own = PRECISIONS if multiplies_bf16() else {"fp32": torch.float32}
    peaks = {name: product_peak(dtype) for name, dtype in own.items()}
    figures: dict[str, Any] = {"product_peak_gflops": {k: round(v) for k, v in peaks.items()}}
    for name, seconds in steps.items():
        narrow = "bf16" in peaks and name != REFERENCE and not name.startswith("fp32")
        numbers = {"cpu_s": round(median(seconds), 3)}
        numbers["cells_per_s"] = 1 / median(seconds)
        if "_expressed" not in name:  # the published model's arithmetic, however it is computed
            rate = step_gflop(length) / median(seconds)
            numbers |= {"gflops": rate, "of_peak": rate / peaks["bf16" if narrow else "fp32"]}
        if name in memory:
            numbers["mb"] = memory[name]
        figures[name] = {key: round(value, 3) for key, value in numbers.items()}
    return figures


PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def product_peak(dtype: torch.dtype) -> float:
    """GFLOP/s of the fastest of a few plain products into memory that is there already."""
    rates = []
    for rows, inner, columns in ((2_048, 2_048, 2_048), (4_096, 512, 512), (4_096, 224, 1_920)):
        a, b = torch.randn(rows, inner).to(dtype), torch.randn(inner, columns).to(dtype)
        out = torch.empty(rows, columns, dtype=dtype)
        seconds = min(cpu_seconds(partial(torch.mm, a, b, out=out)) for _ in range(6))
        rates.append(2 * rows * inner * columns / seconds / 1e9)
    return max(rates)


def step_gflop(length: int) -> float:
    """Floating-point operations of forward and backward of the published model, in 10⁹.

    Each weight multiplies twice more in the backward pass. Attention makes four products of
    (m × 64) per token and head forward and, with features kept, six more backward.
    """
    dim, inner, depth, features = 200, 640, 6, 266
    weights = 3 * dim * inner + inner * dim + 2 * 4 * dim * dim
    attention = 10 * inner * features
    return 2 * length * depth * (3 * weights + attention) / 1e9


if __name__ == "__main__":
    main()
