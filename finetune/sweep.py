"""A sweep as a whole: what all rows share, and where each of them stands."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from datastore.store import write_json
from finetune.sweep_row import RowState, find_state
from finetune.sweep_table import SweepRow

STATES: Final = ("done", "running", "interrupted", "failed", "repeated", "missing")


@dataclass(frozen=True)
class RowReport:
    """Where a row stands."""

    row: SweepRow
    state: str
    """One of `STATES`."""
    found: RowState | None

    @property
    def error(self) -> str | None:
        """What went wrong, in one line."""
        return None if self.found is None else self.found.error


def keep_base(output: Path, base: Mapping[str, Any]) -> None:
    """Note what all rows share at the first start; refuse another one later.

    Args:
        output: Folder of the sweep.
        base: JSON-ready settings that do not stand in the table.

    Raises:
        ValueError: If rows of this folder were trained with others.
    """
    output.mkdir(parents=True, exist_ok=True)
    path = output / "sweep.json"
    with alone(output / "sweep.lock"):
        if not path.exists():
            write_json(path, dict(base))
            return
        former = json.loads(path.read_text(encoding="utf-8"))
    if former != json.loads(json.dumps(dict(base))):
        raise ValueError(
            f"{output} holds a sweep with other settings beside the table (see {path}); "
            "use these again, or give another --output"
        )


def report_rows(rows: Sequence[SweepRow], output: Path) -> list[RowReport]:
    """Say where each row stands."""
    reports, seen = [], set()
    for row in rows:
        if row.key in seen:
            reports.append(RowReport(row, "repeated", None))
            continue
        seen.add(row.key)
        found = find_state(output, row)
        reports.append(RowReport(row, "missing" if found is None else found.state, found))
    return reports


def count_states(reports: Iterable[RowReport]) -> dict[str, int]:
    """Count rows by state, in the order of `STATES`."""
    counts = Counter(report.state for report in reports)
    return {state: counts[state] for state in STATES if counts[state]}


def array_of(numbers: Sequence[int]) -> str:
    """Write row numbers as `sbatch --array` takes them: 1-3,7."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ",".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """Wait until no other process has this lock."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
