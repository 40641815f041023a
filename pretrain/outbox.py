"""What a tracking server has yet to receive: an append-only file and a cursor beside it.

Each record is one line of JSON. The cursor says how much of the file was delivered and to which
run; it is replaced after every delivery, so that a process which is killed in between delivers the
last records again, never too few.
"""

import json
import logging
import os
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from datastore.store import write_json

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Entry:
    """A record and where its line ends."""

    record: dict[str, Any]
    end: int
    """Bytes of the file up to and with this line."""


class Outbox:
    """A queue that outlives the process: appended to by the training, emptied by one thread."""

    def __init__(self, path: Path | None) -> None:
        """Open a queue, or begin one.

        Args:
            path: The file; none keeps the queue for this process only.
        """
        self._lock = threading.Lock()
        self._cursor_path: Path | None = None
        self.run_id: str | None = None
        self._delivered = 0
        self._file: IO[bytes] = self._open(path)
        self.num_waiting = self._count_waiting()

    def _open(self, path: Path | None) -> IO[bytes]:
        if path is None:
            return tempfile.TemporaryFile()  # lives as long as the queue
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("a+b")
        except OSError as error:
            log.warning("what MLflow misses cannot be kept for a later start: %s", error)
            return tempfile.TemporaryFile()
        end_torn_line(file)
        self._cursor_path = path.with_suffix(".cursor.json")
        try:
            cursor = json.loads(self._cursor_path.read_text(encoding="utf-8"))
            self._delivered, self.run_id = int(cursor["delivered"]), cursor["run_id"]
        except FileNotFoundError:
            pass
        except (ValueError, KeyError, TypeError) as error:
            log.warning("%s cannot be read (%s): all is sent again", self._cursor_path, error)
        return file

    def _count_waiting(self) -> int:
        if self._delivered > self._file.seek(0, os.SEEK_END):  # somebody removed the file
            self._delivered = 0
        self._file.seek(self._delivered)
        return sum(1 for _ in self._file)

    def append(self, record: Mapping[str, Any]) -> None:
        """Add a record at the end.

        Raises:
            OSError: If the disk does not take it.
        """
        line = json.dumps(record, default=str).encode() + b"\n"
        with self._lock:
            self._file.seek(0, os.SEEK_END)
            self._file.write(line)
            self._file.flush()
            self.num_waiting += 1

    def peek(self, limit: int) -> list[Entry]:
        """Look at the next records, oldest first; a line that is no JSON (a torn one) is left out.

        Args:
            limit: At most so many lines.
        """
        entries = []
        with self._lock:
            end = self._file.seek(self._delivered)
            for _ in range(limit):
                line = self._file.readline()
                if not line:
                    break
                end += len(line)
                try:
                    entries.append(Entry(json.loads(line), end))
                except ValueError:
                    entries.append(Entry({}, end))
        return entries

    def close(self) -> None:
        """Close the file; nothing can be added or looked at any more."""
        with self._lock:
            self._file.close()

    def advance(self, entries: Sequence[Entry]) -> None:
        """Note that these records, the oldest, need not be delivered again."""
        with self._lock:
            self._delivered = entries[-1].end
            self.num_waiting -= len(entries)
            if self._cursor_path is not None:
                cursor = {"delivered": self._delivered, "run_id": self.run_id}
                try:
                    write_json(self._cursor_path, cursor)
                except OSError as error:
                    log.warning("%s cannot be written: %s", self._cursor_path, error)


def end_torn_line(file: IO[bytes]) -> None:
    """End a line that a killed process left torn: the next stays whole."""
    torn = file.seek(0, os.SEEK_END) and file.seek(-1, os.SEEK_END) >= 0 and file.read() != b"\n"
    if torn:
        file.write(b"\n")
        file.flush()
