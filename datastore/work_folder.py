"""The folder beside a store in which an ingest works: its lock, its plan, the space it needs.

`<store>.building` makes a store, `<store>.appending` a generation of it. What is finished in there
is kept by a stop of any kind, and an ingest with an equal plan goes on from it.
"""

import errno
import fcntl
import json
import logging
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from datastore.config import StoreConfig
from datastore.plan import Plan
from datastore.store import StoreFormatError, write_json

log = logging.getLogger(__name__)

BUILDING: Final = ".building"
APPENDING: Final = ".appending"
_FOLDERS: Final = ("parts", "spool", "places", "duplicates", "store")
DECODED: Final = "decoded"
"""Folder of sources that are kept decoded; no part of the work that a plan decides."""
_PLAN: Final = "plan.json"
_WHOLE: Final = "whole.json"
_NEEDED: Final = "needed.json"
_UNFINISHED: Final = ".part"
_SPOOL_BYTES: Final = 4  # per count
_STORE_BYTES: Final = {"fast": 2.2, "archive": 1.6}  # per count; measured: 1.9 and 1.4
_BYTES_PER_CELL: Final = 200  # name, place, hash and row
_SECOND: Final = "another ingest is writing {}; wait for it, or choose another output"


def output_folder(config: StoreConfig) -> Path:
    """Where a store is, or will be; of a link what it leads to, for a rename would replace it.

    Absolute: a cluster's workers may stand in another folder.
    """
    output = Path(config.output).absolute()
    return output.resolve() if output.is_symlink() else output


@contextmanager
def locked(output: Path, suffix: str) -> Iterator[Path]:
    """Yield the folder in which an ingest works, for one ingest of a store at a time.

    A folder that this ingest began goes again when its input is refused, or the disk too small.

    Raises:
        StoreFormatError: If another ingest builds the store or appends to it.
    """
    work = output.with_name(output.name + suffix)
    other = output.with_name(output.name + (APPENDING if suffix == BUILDING else BUILDING))
    work.mkdir(parents=True, exist_ok=True)
    with (work / "lock").open("w") as file:
        # Both kinds of ingest take their own lock and then look at the other's, so that of two that
        # start at once one or both stop, and never none.
        if not locks(file.fileno(), work):
            raise StoreFormatError(_SECOND.format(work))
        if _is_locked(other):
            if _plan_text(work) is None:
                clear(work)
            raise StoreFormatError(_SECOND.format(other))
        before = _plan_text(work)
        try:
            yield work
        except (ValueError, FileNotFoundError, FileExistsError):
            if _plan_text(work) != before or before is None:
                clear(work)  # nothing here can be continued
            raise
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise OSError(_full_disk(work)) from error
            if _plan_text(work) is None:
                clear(work)  # nothing was begun
            raise


def start_or_continue(work: Path, plan: Plan, identity: dict[str, Any]) -> bool:
    """Keep an earlier ingest's finished work if it had the same plan, else clear it.

    Returns:
        Whether it had, and there is work to continue.

    Raises:
        OSError: If there is less space on the disk than the ingest needs.
    """
    # What is whole but gone has been published, and then removed by somebody.
    same = has_plan(work, identity) and not (is_whole(work) and not (work / "store").exists())
    if same:
        log.info("continuing the unfinished ingest in %s", work)
        _remove_unfinished(work)
    else:
        _remove_work(work)
        for name in _FOLDERS:
            (work / name).mkdir()
    _refuse_small_disk(work, plan)
    if not same:
        write_json(work / _NEEDED, bytes_needed(plan))
        write_json(work / _PLAN, identity)
    return same


def unfinished(target: Path) -> Path:
    """Name what becomes `target` by a rename.

    No name comes twice: a killed ingest's workers may live on for a moment, a cluster's for longer.
    """
    return target.with_name(f"{target.name}.{uuid.uuid4().hex}{_UNFINISHED}")


def has_plan(work: Path, identity: dict[str, Any]) -> bool:
    """Tell whether the folder's plan is just this one."""
    text = _plan_text(work)
    return text is not None and json.loads(text) == identity


def is_whole(work: Path) -> bool:
    """Tell whether all work is done, and only its publishing may be missing."""
    return (work / _WHOLE).exists()


def set_whole(work: Path) -> None:
    """Note that all work is done."""
    write_json(work / _WHOLE, True)


def clear(work: Path) -> None:
    """Remove the folder; the plan last, so that a stopped removal is known for what it is."""
    _remove_work(work)
    shutil.rmtree(work)


def bytes_needed(plan: Plan) -> int:
    """Estimate what spools and partitions of a plan take on disk together."""
    counts = sum(source.num_counts for source in plan.sources)
    per_count = _SPOOL_BYTES + _STORE_BYTES[plan.config.codec]
    return int(counts * per_count + plan.num_cells * _BYTES_PER_CELL)


def _remove_work(work: Path) -> None:
    for child in work.iterdir():
        if child.is_dir() and child.name != DECODED:
            shutil.rmtree(child)
    for name in (_NEEDED, _PLAN, _WHOLE):
        (work / name).unlink(missing_ok=True)


def _remove_unfinished(work: Path) -> None:
    for left in work.glob(f"*/*{_UNFINISHED}"):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def _refuse_small_disk(work: Path, plan: Plan) -> None:
    needed, there, free = bytes_needed(plan), _bytes_below(work), shutil.disk_usage(work).free
    if needed - there > free:
        raise OSError(
            f"the disk of {work} is too small: about {_size(needed - there)} are needed for the "
            f"store and the work on it, {_size(free)} are free; free some, choose another output, "
            "or fewer sources at a time (append adds the others)"
        )


def _full_disk(work: Path) -> str:
    try:
        needed = int(json.loads((work / _NEEDED).read_text(encoding="utf-8")))
        missing = f"about {_size(max(0, needed - _bytes_below(work)))} more are needed"
    except (FileNotFoundError, json.JSONDecodeError):
        missing = "how much is needed is not known yet"
    return (
        f"the disk of {work} is full: {missing}, {_size(shutil.disk_usage(work).free)} are free; "
        "what is finished is kept: free some space and run the same command again"
    )


def _bytes_below(folder: Path) -> int:
    return sum(file.stat().st_blocks * 512 for file in folder.rglob("*") if file.is_file())


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.1f} MB"


def _plan_text(work: Path) -> str | None:
    try:
        return (work / _PLAN).read_text(encoding="utf-8")
    except FileNotFoundError:
        return None


def locks(descriptor: int, work: Path) -> bool:
    """Lock an open `lock` of a folder unless somebody else has; tell whether it is ours now."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Another ingest may have removed the folder between our opening of the file and its lock.
        return os.fstat(descriptor).st_ino == (work / "lock").stat().st_ino
    except (BlockingIOError, FileNotFoundError):
        return False


def _is_locked(work: Path) -> bool:
    try:
        with (work / "lock").open() as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return False
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
