"""Is a store whole? Sizes before a long run, SHA-256 of every file for certainty."""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Final, Literal, TypeVar

from datastore.storage import Storage, open_storage
from datastore.store import (
    MANIFEST,
    CellStore,
    FileEntry,
    StoreFormatError,
    checked_header,
    is_as_written,
    read_manifest,
    read_record,
    record_name,
    refuse_wrong_sizes,
)

T = TypeVar("T")
R = TypeVar("R")
REQUESTS_AT_ONCE: Final = 32
"""Files of a remote store that are looked at together."""


def check_complete(store: CellStore) -> None:
    """See that every file of every partition is there, with its size.

    For what is about to read a whole store, such as a training: a file that a copy left out is
    named now and not after hours.

    Raises:
        StoreFormatError: If a file is missing or cut short.
    """

    def look(number: int) -> None:
        record = store.partition_files(number)
        sizes = ((f"dataset_{number}/{name}", size) for name, (size, _) in record.items())
        refuse_wrong_sizes(store.storage, sizes)

    numbers = range(len(store.header.partitions))
    for _ in _together(look, numbers, _width(store.storage, None)):
        pass


@dataclass(frozen=True)
class Finding:
    """What `verify_store` found amiss with a file."""

    name: str
    kind: Literal["missing", "size", "altered", "unreadable", "stray"]
    """Not there; longer or shorter; of other content; refused by the disk; not of the store."""
    problem: str

    @property
    def is_damage(self) -> bool:
        """Whether the store is not whole; a file that nobody reads does no harm."""
        return self.kind != "stray"


def verify_store(
    place: str | Path,
    progress: Callable[[int, int], None] | None = None,
    threads: int | None = None,
) -> list[Finding]:
    """Check every file against its SHA-256, and look for files that do not belong there.

    Args:
        place: Folder or address of the store.
        progress: Called after each file with bytes done and bytes in all.
        threads: Files that are read at once; none takes one per core, more of a remote store.

    Returns:
        What is amiss, damage first; empty if the store is as it was written. Files that do not
        belong are not looked for where a server cannot list them (HTTP).

    Raises:
        StoreFormatError: If it is not a store, or its manifest cannot be read.
        OSError: If a remote store cannot be reached.
    """
    storage = open_storage(place)
    manifest = read_manifest(storage)
    try:
        header, files = checked_header(storage, manifest)
    except StoreFormatError:
        problem = "is not as it was written; without it the other files cannot be judged"
        return [Finding(MANIFEST, "altered", problem)]
    findings: list[Finding] = []
    unknown = {MANIFEST}  # and partitions whose files nobody knows
    for number in range(len(header.partitions)):
        name = record_name(number)
        try:
            record = read_record(storage, name, files[name])
        except StoreFormatError:  # its own file will be found damaged, too
            unknown.add(f"dataset_{number}")
            continue
        files |= {f"dataset_{number}/{inside}": entry for inside, entry in record.items()}
    done, total = 0, sum(size for size, _ in files.values())

    def look(file: tuple[str, FileEntry]) -> tuple[int, Finding | None]:
        return file[1][0], _finding(storage, *file)

    for size, finding in _together(look, files.items(), _width(storage, threads)):
        done += size
        if finding is not None:
            findings.append(finding)
        if progress is not None:
            progress(done, total)
    if not is_as_written(storage, manifest):
        findings.append(Finding(MANIFEST, "altered", "is not as it was written"))
    strays = [
        Finding(name, "stray", "is not part of the store")
        for name in sorted(set(storage.names() or ()) - files.keys())
        if name.split("/")[0] not in unknown
    ]
    return [*findings, *strays]


def _finding(storage: Storage, name: str, entry: FileEntry) -> Finding | None:
    size, digest = entry
    try:
        problem = storage.size_problem(name, size)
        if problem is not None:
            return Finding(name, "missing" if problem == "is missing" else "size", problem)
        if storage.digest(name, size) != digest:
            return Finding(name, "altered", "has other content than was written")
    except OSError as error:
        if storage.is_remote:
            raise  # says something of the way there, nothing of the file
        return Finding(name, "unreadable", f"cannot be read ({error.strerror})")
    return None


def _width(storage: Storage, threads: int | None) -> int:
    """How many files to look at together."""
    return threads or (REQUESTS_AT_ONCE if storage.is_remote else os.cpu_count() or 1)


def _together(function: Callable[[T], R], items: Iterable[T], width: int) -> Iterator[R]:
    """Call a function in threads and yield what it returns, in order; holds few items at a time."""
    rest = iter(items)
    with ThreadPoolExecutor(width) as pool:
        while batch := list(islice(rest, 64 * width)):
            yield from pool.map(function, batch)
