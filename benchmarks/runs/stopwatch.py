"""One timed pass over batches, reported as a line of JSON. Standard library only: peers have their
own environments.
"""

import json
import resource
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any


def report(
    open_batches: Callable[[], Iterable[Any]],
    size: Callable[[Any], int],
    cells: int,
    seconds: float = 600.0,
) -> None:
    """Open a loader, take batches until there are enough or none, and print what it cost.

    Args:
        open_batches: Opens the data and gives the batches; its time counts.
        size: Cells of a batch.
        cells: Stop at so many cells.
        seconds: Stop at the first batch after so long.
    """
    begin, cpu, first, done = time.perf_counter(), cpu_seconds(), 0.0, 0
    half = (0.0, 0)  # time and cells when half of them were there
    for batch in open_batches():
        done += size(batch)
        first = first or time.perf_counter() - begin
        if done <= cells / 2:
            half = time.perf_counter() - begin, done
        if done >= cells or time.perf_counter() - begin > seconds:
            break
    wall = time.perf_counter() - begin
    settled = {}
    if done >= cells:
        settled["second_half_per_second"] = (done - half[1]) / (wall - half[0])
    say(
        cells=done,
        per_second=done / wall,
        per_cpu_second=done / (cpu_seconds() - cpu),
        first_batch_seconds=first,
        peak_mb=peak_mb(),
        **settled,
    )


def say(**numbers: float) -> None:
    print(json.dumps(numbers))


def cpu_seconds() -> float:
    """CPU time of all threads of this process and of the children it waited for."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def peak_mb() -> float:
    """Most memory this program had resident; ru_maxrss would count the parent's before exec."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1000
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
