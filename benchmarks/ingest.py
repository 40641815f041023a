"""How fast and in how much memory a store is made, beside annbatch, of the same synthetic cells.

    python benchmarks/ingest.py --quick                      # a minute or two, small data
    python benchmarks/ingest.py --workdir DIR --python312 PY  # the full one, keeps data in DIR
    python benchmarks/ingest.py --memory                     # peak memory at 100,000 and 1,000,000

Ours aligns the genes of four sources of different order to a panel, looks for duplicates, and
shuffles uniformly; annbatch joins the sources and shuffles runs of 1,000 cells. Each run is a
process of its own that times itself without imports; the runs take turns, and a ratio is the median
over the rounds of what two runs measured in the same round. Ends with one line of JSON.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import h5py

from benchmarks.cells import Corpus, generate
from benchmarks.environments import environment, find_python312
from benchmarks.loader import PEERS, RUNS, Bar, Numbers, finish, medians

BARS = [
    Bar("cpu_vs_annbatch", least=2.0),
    Bar("wall_two_workers_vs_annbatch", least=3.0),
    Bar("disk_vs_annbatch", most=0.62),
    Bar("archive_disk_vs_annbatch", most=0.45),
    Bar("peak_mb_per_worker", most=1_200),
    Bar("rss_growth_100k_to_1m", most=1.3),
    Bar("peak_mb_1m", most=2_000),
]
SMALL = Corpus(num_cells=100_000, num_genes=4_000, expressed=320)
"""Cells whose million still fits on a disk; memory follows the slices and partitions alike."""


def main() -> None:
    options = parse()
    with tempfile.TemporaryDirectory(prefix="ingest_benchmark_") as scratch:
        folder = Path(options.workdir or scratch).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        ratios: dict[str, float | None] = {}
        figures: dict[str, Any] = {}
        if options.memory:
            measure_memory(folder, options, ratios, figures)
        else:
            measure_speed(folder, options, ratios, figures)
    result = {
        "benchmark": "ingest",
        "ratios": {name: None if v is None else round(v, 3) for name, v in ratios.items()},
        "bars": {
            bar.ratio: f"{bar}: {bar.judge(ratios[bar.ratio])}"
            for bar in BARS
            if bar.ratio in ratios
        },
        "figures": figures,
        "machine": {
            "cores": len(os.sched_getaffinity(0)),
            "architecture": platform.machine(),
            "system": platform.system(),
            "python": platform.python_version(),
        },
    }
    if not options.json:
        print(table(result))
    line = json.dumps(result)
    print(line)
    if options.save:
        Path(options.save).write_text(line + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="40,000 cells, two rounds")
    parser.add_argument("--memory", action="store_true", help="peak memory instead of speed")
    parser.add_argument("--json", action="store_true", help="print nothing but the line of JSON")
    parser.add_argument("--save", metavar="FILE", help="write the line of JSON to a file, too")
    parser.add_argument("--workdir", metavar="DIR", help="keep data and environments here")
    parser.add_argument("--python312", metavar="PY", help="Python 3.12 for annbatch")
    parser.add_argument("--cells", type=int, help="default 200,000, quick: 40,000")
    parser.add_argument("--rounds", type=int, help="default 3, quick: 2")
    parser.add_argument("--seed", type=int, default=0, help="of the synthetic cells")
    options = parser.parse_args()
    options.cells = options.cells or (40_000 if options.quick else 200_000)
    options.rounds = options.rounds or (2 if options.quick else 3)
    return options


# --- speed, size ---


def measure_speed(
    folder: Path,
    options: argparse.Namespace,
    ratios: dict[str, float | None],
    figures: dict[str, Any],
) -> None:
    """Let ours (one and two workers, and the archive codec) and annbatch take turns."""
    corpus = Corpus(num_cells=options.cells, seed=options.seed)
    data = folder / f"cells_{options.cells}_{options.seed}"
    prepare(data, corpus)
    _, requirements = PEERS["annbatch"]
    python312 = find_python312(options.python312)
    peer = environment(folder / "environments" / "annbatch", python312, requirements)
    runs = {
        "one_worker": (None, "ingest_ours", "1", "fast"),
        "two_workers": (None, "ingest_ours", "2", "fast"),
        "archive": (None, "ingest_ours", "2", "archive"),
    }
    if peer.python is not None:
        runs["annbatch"] = (peer.python, "ingest_with_annbatch", "build", "")
    rounds: dict[str, list[Numbers]] = defaultdict(list)
    for number in range(options.rounds):
        for name, (python, script, command, codec) in runs.items():
            if name == "archive" and number:
                continue  # its size is what is asked for, and that does not vary
            rounds[name].append(run(data, python, script, command, codec))
        if not options.json:
            print(f"round {number + 1} of {options.rounds}", flush=True)

    def ratio(one: str, other: str, what: str) -> float | None:
        pairs = zip(rounds[one], rounds[other], strict=False)
        return median([mine[what] / theirs[what] for mine, theirs in pairs] or [float("nan")])

    known = peer.python is not None
    ratios["cpu_vs_annbatch"] = ratio("one_worker", "annbatch", "per_cpu_second") if known else None
    ratios["cpu_two_workers_vs_annbatch"] = (
        ratio("two_workers", "annbatch", "per_cpu_second") if known else None
    )
    ratios["wall_vs_annbatch"] = ratio("one_worker", "annbatch", "per_second") if known else None
    ratios["wall_two_workers_vs_annbatch"] = (
        ratio("two_workers", "annbatch", "per_second") if known else None
    )
    ratios["wall_two_workers_vs_one"] = ratio("two_workers", "one_worker", "per_second")
    ratios["disk_vs_annbatch"] = ratio("one_worker", "annbatch", "disk_mb") if known else None
    ratios["archive_disk_vs_annbatch"] = ratio("archive", "annbatch", "disk_mb") if known else None
    ratios["rss_vs_annbatch"] = ratio("two_workers", "annbatch", "peak_mb") if known else None
    ratios["peak_mb_per_worker"] = median(run["peak_mb"] for run in rounds["one_worker"])
    figures.update(
        {
            "cells": options.cells,
            "rounds": options.rounds,
            "not_measured": {} if known else {"annbatch": peer.problem},
            **{name: medians(results) for name, results in rounds.items()},
        }
    )


def run(data: Path, python: Path | None, script: str, command: str, codec: str) -> Numbers:
    arguments = [str(RUNS / f"{script}.py"), command, str(data), codec]
    return finish(
        subprocess.Popen(
            [str(python or sys.executable), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    )


def prepare(data: Path, corpus: Corpus) -> list[Path]:
    paths = generate(data / "raw", corpus)
    (data / "panel.txt").write_text("\n".join(corpus.gene_names()) + "\n")
    return paths


# --- memory ---


def measure_memory(
    folder: Path,
    options: argparse.Namespace,
    ratios: dict[str, float | None],
    figures: dict[str, Any],
) -> None:
    """Ingest cells, and ten times as many, with two workers."""
    few = folder / "memory_100k"
    paths = prepare(few, SMALL)
    many = folder / "memory_1m"
    (many / "raw").mkdir(parents=True, exist_ok=True)
    (many / "panel.txt").write_text((few / "panel.txt").read_text())
    for copy in range(10):
        for path in paths:
            target = many / "raw" / f"{path.stem}_{copy}.h5ad"
            if not target.exists():
                copy_with_other_names(path, target, copy)
    for name, data in (("memory_100k", few), ("memory_1m", many)):
        figures[name] = run(data, None, "ingest_ours", "2", "fast")
    ratios["peak_mb_1m"] = figures["memory_1m"]["peak_mb"]
    ratios["rss_growth_100k_to_1m"] = (
        figures["memory_1m"]["peak_mb"] / figures["memory_100k"]["peak_mb"]
    )


def copy_with_other_names(path: Path, target: Path, copy: int) -> None:
    """Copy a source, its genes moved by a few columns, so that its cells are others."""
    beside = target.with_suffix(".part")
    shutil.copy(path, beside)
    with h5py.File(beside, "r+") as file:
        names = file["var/_index"][:]
        file["var/_index"][:] = [*names[copy:], *names[:copy]]
    beside.rename(target)


def table(result: dict[str, Any]) -> str:
    lines = ["", f"{'run':16}{'cells/s':>10}{'per CPU-s':>11}{'seconds':>9}{'peak MB':>9}{'MB':>8}"]
    for name, numbers in result["figures"].items():
        if isinstance(numbers, dict) and "per_second" in numbers:
            lines.append(
                f"{name:16}{numbers['per_second']:10,.0f}{numbers['per_cpu_second']:11,.0f}"
                f"{numbers['seconds']:9.1f}{numbers['peak_mb']:9,.0f}{numbers['disk_mb']:8,.0f}"
            )
    lines += ["", f"{'ratio':32}{'measured':>12}  bar"]
    for name, value in result["ratios"].items():
        text = "—" if value is None else f"{value:,.3f}"
        lines.append(f"{name:32}{text:>12}  {result['bars'].get(name, '')}")
    for name, problem in result["figures"].get("not_measured", {}).items():
        lines.append(f"{name} was not measured: {problem}")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
