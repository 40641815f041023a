"""Runs that take turns, each a process of its own, and what is made of their numbers.

A ratio is the median over the rounds of what two runs measured in the same round. A benchmark ends
with one line of JSON: `benchmark`, `ratios` (null where a peer is missing), `bars`, `figures`,
`machine`.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Final

RUNS: Final = Path(__file__).resolve().parent / "runs"
PEERS: Final = {
    "annbatch": ("312", ["annbatch[zarrs,numba]==0.3.*"]),
    "cellstream": ("312", ["cellstream==0.11.*"]),
    "scdataset": ("same", ["scDataset==0.3.*", "anndata<0.13"]),
    "scdl": ("same", ["bionemo-scdl==0.1.*"]),
}
"""Which Python a peer gets, and what pip installs."""

Numbers = dict[str, float]
Ratios = dict[str, float | None]


@dataclass(frozen=True)
class Bar:
    """What a ratio has to reach."""

    ratio: str
    least: float | None = None
    most: float | None = None

    def judge(self, value: float | None) -> str:
        if value is None:
            return "not measured"
        below = self.least is not None and value < self.least
        above = self.most is not None and value > self.most
        return "missed" if below or above else "met"

    def __str__(self) -> str:
        least = f"≥ {self.least:g}" if self.least is not None else ""
        most = f"≤ {self.most:g}" if self.most is not None else ""
        return f"{least} {most}".strip()


def add_output_flags(parser: argparse.ArgumentParser) -> None:
    """Flags that all benchmarks of the store share."""
    parser.add_argument("--json", action="store_true", help="print nothing but the line of JSON")
    parser.add_argument("--save", metavar="FILE", help="write the line of JSON to a file, too")
    parser.add_argument("--workdir", metavar="DIR", help="keep data and environments here")
    parser.add_argument("--python312", metavar="PY", help="Python 3.12 for annbatch and cellstream")
    parser.add_argument("--seed", type=int, default=0, help="of the synthetic cells")


def check_options(parser: argparse.ArgumentParser, options: Any) -> None:
    """Refuse at once what would fail after minutes: numbers below 1, folders that are not there."""
    for name, value in vars(options).items():
        if name in ("rounds", "steps", "batch_size") and value is not None and value < 1:
            parser.error(f"--{name} is {value}; give 1 or more")
        if name in ("save", "plot", "json") and isinstance(value, str | Path):
            folder = Path(value).resolve().parent
            if not folder.is_dir():
                parser.error(f"--{name} {value}: there is no folder {folder}; make it first")
        if name == "store" and not Path(value).is_dir():
            parser.error(f"--store {value}: there is no cell store; `make quickstart` leaves one")


def start(python: Path | None, script: str, *arguments: object) -> "subprocess.Popen[str]":
    """Start `runs/<script>.py`, by a peer's interpreter or (none) by ours."""
    command = [str(python or sys.executable), str(RUNS / f"{script}.py"), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: "subprocess.Popen[str]") -> Numbers:
    """Wait for a run; its last line has its numbers."""
    out, error = process.communicate()
    if process.returncode:
        raise RuntimeError(f"{process.args!r} failed:\n{error}")
    numbers: Numbers = json.loads(out.splitlines()[-1])
    return numbers


def run(python: Path | None, script: str, *arguments: object) -> Numbers:
    return finish(start(python, script, *arguments))


def ratio(
    rounds: Mapping[str, Sequence[Numbers]], one: str, other: str, what: str = "per_second"
) -> float | None:
    """Median over the rounds that both have; none if one was not run."""
    pairs = list(zip(rounds.get(one, ()), rounds.get(other, ()), strict=False))
    return median(mine[what] / theirs[what] for mine, theirs in pairs) if pairs else None


def medians(results: Sequence[Numbers]) -> Numbers:
    return {name: round(median(result[name] for result in results), 4) for name in results[0]}


def result_of(
    benchmark: str, ratios: Ratios, bars: Sequence[Bar], figures: Mapping[str, Any]
) -> dict[str, Any]:
    return {
        "benchmark": benchmark,
        "ratios": {name: None if v is None else round(v, 3) for name, v in ratios.items()},
        "bars": {
            bar.ratio: f"{bar}: {bar.judge(ratios[bar.ratio])}"
            for bar in bars
            if bar.ratio in ratios
        },
        "figures": dict(figures),
        "machine": {
            "cpu": cpu_model(),
            "cores": len(os.sched_getaffinity(0)),
            "architecture": platform.machine(),
            "system": platform.system(),
            "python": platform.python_version(),
        },
    }


def cpu_model() -> str:
    """What the processor calls itself."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    named = (line for line in text.splitlines() if line.startswith("model name"))
    return next(named, "").partition(":")[2].strip() or platform.processor()


def publish(result: dict[str, Any], columns: Mapping[str, str], options: Any) -> None:
    """Print figures and ratios as tables, then the line of JSON; save it where that is asked for.

    Args:
        result: Made by `result_of`.
        columns: Title of each number of a run that the table shows.
        options: With `json` and `save`.
    """
    if not options.json:
        print(_table(result, columns))
    line = json.dumps(result)
    print(line)
    if options.save:
        Path(options.save).write_text(line + "\n")


def _table(result: dict[str, Any], columns: Mapping[str, str]) -> str:
    lines = ["", f"{'run':24}" + "".join(f"{title:>14}" for title in columns.values())]
    for name, numbers in result["figures"].items():
        if isinstance(numbers, dict) and columns.keys() & numbers.keys():
            cells = [f"{numbers[c]:14,.2f}" if c in numbers else f"{'—':>14}" for c in columns]
            lines.append(f"{name:24}" + "".join(cells))
    lines += ["", f"{'ratio':36}{'measured':>12}  bar"]
    for name, value in result["ratios"].items():
        text = "—" if value is None else f"{value:,.3f}"
        lines.append(f"{name:36}{text:>12}  {result['bars'].get(name, '')}")
    for name, problem in result["figures"].get("not_measured", {}).items():
        lines.append(f"{name} was not measured: {problem}")
    return "\n".join([*lines, ""])
