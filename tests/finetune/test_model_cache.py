"""The cache of pulled models: one download for many tasks, and whole copies only."""

import errno
import fcntl
import hashlib
import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.context import SpawnProcess
from pathlib import Path

import pytest

from finetune.export_files import MANIFEST, make_manifest
from finetune.model_cache import ModelCache, default_cache
from tests.support.disks import small_disk_at
from tests.support.entries import write_entry

NUM_PROCESSES, NUM_THREADS = 4, 50


@pytest.fixture
def entry(tmp_path: Path) -> Path:
    folder = write_entry(tmp_path / "entry", "weights")
    (folder / MANIFEST).write_bytes(make_manifest(folder))
    return folder


@pytest.fixture
def digest(entry: Path) -> str:
    return hashlib.sha256((entry / MANIFEST).read_bytes()).hexdigest()


def copying(entry: Path, log: Path, seconds: float = 0.0) -> Callable[[Path], None]:
    """Stand for a download: copy, and add a line to a log."""

    def fetch(folder: Path) -> None:
        with log.open("a") as file:
            file.write("fetched\n")
        for path in entry.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
            time.sleep(seconds)

    return fetch


def pull_often(cache: Path, digest: str, entry: Path, log: Path) -> None:
    """What each of some processes does: pull in many threads, check each copy."""

    def pull() -> bool:
        found = ModelCache(cache).add(digest, copying(entry, log, 0.02))
        return {path.name: path.read_bytes() for path in found.iterdir()} == {
            path.name: path.read_bytes() for path in entry.iterdir()
        }

    with ThreadPoolExecutor(NUM_THREADS) as tasks:
        pulls = [tasks.submit(pull) for _ in range(NUM_THREADS)]
        intact = [pull.result() for pull in pulls]
    os._exit(0 if all(intact) and len(intact) == NUM_THREADS else 1)


def forked(function: Callable[..., None], *arguments: object) -> SpawnProcess:
    process = multiprocessing.get_context("spawn").Process(target=function, args=arguments)
    process.start()
    return process


@pytest.mark.multiprocess
def test_200_pulls_at_once_give_200_copies_and_one_download(
    entry: Path, digest: str, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    arguments = (tmp_path / "cache", digest, entry, log)
    tasks = [forked(pull_often, *arguments) for _ in range(NUM_PROCESSES)]
    for task in tasks:
        task.join(60)
    assert [task.exitcode for task in tasks] == [0] * NUM_PROCESSES
    assert log.read_text() == "fetched\n"


def hold(cache: Path, digest: str, entry: Path, log: Path) -> None:
    def fetch(folder: Path) -> None:
        copying(entry, log)(folder)
        time.sleep(600)

    ModelCache(cache).add(digest, fetch)


@pytest.mark.multiprocess
def test_a_killed_task_holds_nobody_up(entry: Path, digest: str, tmp_path: Path) -> None:
    cache, log = tmp_path / "cache", tmp_path / "log"
    holder = forked(hold, cache, digest, entry, log)
    deadline = time.monotonic() + 60
    while not log.is_file():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    waiting = threading.Thread(
        target=ModelCache(cache).add, args=(digest, copying(entry, log)), daemon=True
    )
    waiting.start()
    waiting.join(0.3)
    assert waiting.is_alive()  # the lock is held
    assert holder.pid is not None
    os.kill(holder.pid, signal.SIGKILL)
    waiting.join(30)
    holder.join()
    assert not waiting.is_alive()
    assert ModelCache(cache).find(digest) == cache / digest
    assert list((cache / "pulls").iterdir()) == []  # what the killed task left is gone


def test_a_disk_without_locks_costs_downloads_only(
    entry: Path, digest: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    cache, log = ModelCache(tmp_path / "cache"), tmp_path / "log"
    with ThreadPoolExecutor(8) as tasks:
        pulls = [tasks.submit(cache.add, digest, copying(entry, log, 0.05)) for _ in range(8)]
    assert {pull.result() for pull in pulls} == {tmp_path / "cache" / digest}
    assert cache.find(digest) is not None
    assert 1 <= len(log.read_text().splitlines()) <= 8


def test_a_broken_copy_is_replaced(entry: Path, digest: str, tmp_path: Path) -> None:
    cache, log = ModelCache(tmp_path / "cache"), tmp_path / "log"
    path = cache.add(digest, copying(entry, log))
    (path / "genes.txt").write_text("other")
    assert cache.find(digest) is None
    assert cache.add(digest, copying(entry, log)) == cache.find(digest)
    assert len(log.read_text().splitlines()) == 2


def test_what_a_broken_fetch_left_is_nowhere(entry: Path, digest: str, tmp_path: Path) -> None:
    cache = ModelCache(tmp_path / "cache")

    def half(folder: Path) -> None:
        (folder / "genes.txt").write_text("half")
        raise ValueError("the server died")

    with pytest.raises(ValueError, match="the server died"):
        cache.add(digest, half)
    assert cache.find(digest) is None
    assert list((cache.folder / "pulls").iterdir()) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk_at(tmp_path / "disk", "64k") as folder:
        yield folder


def test_a_full_disk_is_one_sentence(entry: Path, digest: str, small_disk: Path) -> None:
    cache = ModelCache(small_disk / "cache")

    def too_much(folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(bytes(100_000))

    with pytest.raises(ValueError, match="is full; free some space, or set XDG_CACHE_HOME"):
        cache.add(digest, too_much)
    assert list((cache.folder / "pulls").iterdir()) == []


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path: Path, digest: str) -> None:
    (tmp_path / "file").write_text("")
    cache = ModelCache(tmp_path / "file" / "models")
    with pytest.raises(ValueError, match=r"no models can be kept in .*set XDG_CACHE_HOME to a"):
        cache.add(digest, lambda folder: None)

    def unreadable(folder: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "/artifacts/genes.txt")

    with pytest.raises(PermissionError, match=r"/artifacts/genes\.txt"):
        ModelCache(tmp_path / "cache").add(digest, unreadable)


def test_references_are_remembered_by_registry(tmp_path: Path) -> None:
    cache = ModelCache(tmp_path / "cache")
    cache.remember("http://a", "models:/x@champion", {"digest": "1"})
    cache.remember("http://b", "models:/x@champion", {"digest": "2"})
    cache.remember("http://b", "models:/x@champion", {"digest": "3"})
    found = [cache.recall(f"http://{name}", "models:/x@champion") for name in "abc"]
    assert [None if facts is None else facts["digest"] for facts in found] == ["1", "3", None]
    assert cache.remembered() == ["models:/x@champion"]
    for path in (tmp_path / "cache" / "references").iterdir():
        assert json.loads(path.read_text())["registry"] in ("http://a", "http://b")
        path.write_text("torn")
    assert cache.recall("http://a", "models:/x@champion") is None


def test_default_cache() -> None:
    assert default_cache({"XDG_CACHE_HOME": "/c"}) == Path("/c/scbert/models")
    assert default_cache({}) == Path.home() / ".cache" / "scbert" / "models"
