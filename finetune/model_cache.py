"""Pulled models on this machine or a shared disk, by content.

``<cache>/<sha256 of the manifest>/`` holds a model; equal models of different names are one folder.

1. ``find`` returns a whole copy, checked byte by byte, without taking a lock.
2. ``add`` fetches under a lock of that content, so that of hundreds of tasks one downloads; the
   operating system takes the lock from a task that dies.
3. What was fetched is checked beside its place and published by one rename: with or without locks
   (some network disks have none) a reader sees no model or a whole one.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from finetune.export_files import check_contents, verify_export

logger = logging.getLogger(__name__)

NO_LOCKS: Final = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL)
NOT_WRITABLE: Final = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)


def default_cache(environ: Mapping[str, str]) -> Path:
    """Return the folder for pulled models: ``$XDG_CACHE_HOME`` or ``~/.cache``, scbert/models."""
    home = environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "scbert" / "models"


@dataclass(frozen=True)
class ModelCache:
    """Models by content, and which reference meant which content when it was last resolved."""

    folder: Path

    def find(self, digest: str) -> Path | None:
        """Return the folder of a whole copy, or None."""
        target = self.folder / digest
        if not target.is_dir():
            return None
        try:
            verify_export(target, digest)
        except (ValueError, OSError) as error:
            logger.warning("the cached copy %s is pulled again: %s", target, error)
            return None
        return target

    def add(self, digest: str, fetch: Callable[[Path], None]) -> Path:
        """Return a whole copy; unless another task has made one meanwhile, fetch it.

        Args:
            digest: Sha256 of the manifest.
            fetch: Fills the folder it is given.

        Raises:
            ValueError: If what was fetched is not what was registered, the disk is full, or the
                folder may not be written to.
        """
        target = self.folder / digest
        try:
            with self._lock(digest) as alone:
                found = self.find(digest)
                if found is None:
                    self._fetch(digest, fetch, alone)
        except OSError as error:
            if error.errno in NOT_WRITABLE and self._is_ours(error.filename):
                raise ValueError(
                    f"no models can be kept in {self.folder} ({error.strerror}); set "
                    "XDG_CACHE_HOME to a folder you may write to"
                ) from error
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise ValueError(
                f"the disk of {self.folder} is full; free some space, or set XDG_CACHE_HOME to a "
                "folder on another disk"
            ) from error
        return target

    def remember(self, registry: str, reference: str, facts: Mapping[str, Any]) -> None:
        """Note what a reference means now, for work without the registry."""
        path = self._note(registry, reference)
        text = json.dumps({"registry": registry, "reference": reference, **facts})
        if path.is_file() and path.read_text(encoding="utf-8") == text:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            beside = path.with_suffix(f".{uuid.uuid4().hex}")
            beside.write_text(text, encoding="utf-8")
            beside.replace(path)
        except OSError as error:  # a cache that only some may write to serves the others as well
            logger.debug("not remembered: %s", error)

    def recall(self, registry: str, reference: str) -> dict[str, Any] | None:
        """Return what a reference meant when it was last resolved, or None."""
        path = self._note(registry, reference)
        facts: dict[str, Any] | None = None
        if path.is_file():
            with contextlib.suppress(ValueError):
                facts = json.loads(path.read_text(encoding="utf-8"))
        return facts

    def remembered(self) -> list[str]:
        """Return every reference that was resolved here, sorted."""
        known = set()
        for path in (self.folder / "references").glob("*.json"):
            with contextlib.suppress(ValueError):
                known.add(str(json.loads(path.read_text(encoding="utf-8"))["reference"]))
        return sorted(known)

    def _is_ours(self, name: object) -> bool:
        """Whether an error is about the cache or a folder above it, not about what is fetched."""
        path = Path(str(name or "."))
        return path.is_relative_to(self.folder) or self.folder.is_relative_to(path)

    def _note(self, registry: str, reference: str) -> Path:
        key = hashlib.sha256(f"{registry}\n{reference}".encode()).hexdigest()
        return self.folder / "references" / f"{key}.json"

    def _fetch(self, digest: str, fetch: Callable[[Path], None], alone: bool) -> None:
        """Fetch beside, check, publish."""
        target, beside = self.folder / digest, self.folder / "pulls"
        beside.mkdir(exist_ok=True)
        if alone:  # what a killed task left: nobody else can be at work on it
            for left in beside.glob(f"{digest}-*"):
                shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=beside, prefix=f"{digest}-") as scratch:
            folder = Path(scratch) / "model"
            folder.mkdir()
            fetch(folder)
            verify_export(folder, digest)
            check_contents(folder)
            if target.exists() and self.find(digest) is None:
                with contextlib.suppress(FileNotFoundError):  # another task was faster
                    target.rename(Path(scratch) / "broken")
            try:
                folder.rename(target)
            except OSError:  # another task published first: its copy must be as good
                verify_export(target, digest)

    @contextlib.contextmanager
    def _lock(self, digest: str) -> Iterator[bool]:
        """Wait until no other task fetches this content; say whether the disk knows locks."""
        locks = self.folder / "locks"
        locks.mkdir(parents=True, exist_ok=True)
        # Never removed: who waits for a removed file would not exclude one that comes later.
        descriptor = os.open(locks / digest, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                alone = True
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
                alone = False
            yield alone
        finally:
            os.close(descriptor)
