"""The table of a sweep: a CSV with a row per training.

Columns are settings of fine-tuning under their dotted names; three have short ones: `data` is
`data.path`, `fold` (`2/5`: the third of five, counted from 0) is `data.fold` of `data.num_folds`,
`seed` is itself. An empty field leaves the setting as it is.
"""

import csv
import difflib
import hashlib
import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Final

REQUIRED: Final = ("data", "seed")
REPEATS: Final = ("fold", "seed")
"""Columns over which a mean is taken; rows that agree in all others are one group."""
OWN: Final = ("output", "tracking.run_name")
"""Settings that the sweep itself gives."""


@dataclass(frozen=True)
class SweepRow:
    """One training of a sweep."""

    number: int
    """Place in the table, from 1, as in `sbatch --array=1-N`."""
    settings: dict[str, str]
    """By column."""

    @property
    def key(self) -> str:
        """Name of the row's folder: its settings, whatever its place in the table."""
        text = json.dumps(sorted(self.settings.items()))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def group(self) -> str:
        """What the row has in common with its repeats."""
        return ", ".join(
            f"{name} {value}" for name, value in self.settings.items() if name not in REPEATS
        )

    @property
    def flags(self) -> list[str]:
        """The settings as words of a command line.

        Raises:
            ValueError: If the fold is not written as one.
        """
        words = []
        for name, value in self.settings.items():
            if name == "fold":
                match = re.fullmatch(r"(\d+)/(\d+)", value)
                if match is None:
                    raise ValueError(
                        f"row {self.number}: fold is {value!r}; write 0/5 for the first of five"
                    )
                words += ["--data.fold", match[1], "--data.num_folds", match[2]]
            else:
                words += ["--data.path" if name == "data" else f"--{name}", value]
        return words


def read_table(path: Path, known: Collection[str]) -> list[SweepRow]:
    """Read a table.

    Args:
        path: CSV with a header.
        known: Names of all settings.

    Raises:
        ValueError: If the file is no table, a column is missing or unknown, or it has no rows.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = [line for line in csv.reader(file) if any(map(str.strip, line))]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is no CSV table: {error}") from error
    if len(lines) < 2:
        raise ValueError(f"{path} has no rows; write a header and a line per training")
    header = [name.strip() for name in lines[0]]
    _check_header(path, header, known)
    rows = []
    for number, line in enumerate(lines[1:], start=1):
        if len(line) != len(header):
            raise ValueError(
                f"{path}: row {number} has {len(line)} fields, the header has {len(header)}"
            )
        values = zip(header, (value.strip() for value in line), strict=True)
        rows.append(SweepRow(number, {name: value for name, value in values if value}))
    return rows


def row_of(rows: list[SweepRow], number: int, path: Path) -> SweepRow:
    """Return one row.

    Raises:
        ValueError: If the table has no such row, or the row repeats another or lacks a setting.
    """
    if not 1 <= number <= len(rows):
        raise ValueError(
            f"{path} has {len(rows)} rows, there is no row {number}; submit with "
            f"--array=1-{len(rows)}"
        )
    row = rows[number - 1]
    first = next(other.number for other in rows if other.key == row.key)
    if first != number:
        raise ValueError(f"{path}: row {number} repeats row {first}; remove one of them")
    missing = [name for name in REQUIRED if name not in row.settings]
    if missing:
        raise ValueError(f"{path}: row {number} has no {' and no '.join(missing)}; fill it in")
    return row


def _check_header(path: Path, header: list[str], known: Collection[str]) -> None:
    for name in REQUIRED:
        if name not in header:
            raise ValueError(f"{path} lacks the column {name!r}; it has: {', '.join(header)}")
    allowed = {*known, "data", "fold"} - {*OWN, "data.path", "data.fold", "data.num_folds"}
    for name in header:
        if name not in allowed:
            near = difflib.get_close_matches(name, allowed, 1)
            hint = f"did you mean {near[0]!r}?" if near else "scbert finetune --help lists them"
            raise ValueError(f"{path} has the column {name!r}, which is no setting; {hint}")
        if header.count(name) > 1:
            raise ValueError(f"{path} has the column {name!r} twice; keep one of them")
