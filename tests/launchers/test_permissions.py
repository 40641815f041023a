"""What a person may not read or write is named in one sentence, and nothing is left of it."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from datastore.ingest import build_store
from datastore.store import open_store
from tests.support.cells import file_bytes, store_config, three_sources, write_sources
from tests.support.cluster import ROOT

AS_NOBODY = """
import contextlib, io, json, os, sys
from launchers import build_store, store
import datastore.append, datastore.ingest, datastore.verification

if os.geteuid() == 0:  # no file is closed to root
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
for name, *arguments in json.loads(sys.argv[1]):
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        code = (build_store if name == "build" else store).main(arguments)
    print(json.dumps([code, said.getvalue()]))
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that anybody may enter and write into; pytest's own are closed to others."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o777)
        yield Path(name)


def as_nobody(*commands: list[str]) -> list[tuple[int, str]]:
    """Run launchers without root's rights; return exit code and standard error of each."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", AS_NOBODY, json.dumps(commands)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"},
        cwd="/",
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


def build(sources: Path, output: Path, *more: str) -> list[str]:
    flags = ["--output", str(output), "--min_genes", "1", "--workers", "1", *more]
    return ["build", "--sources", f"[{sources}]", *flags]


def assert_one_sentence(done: tuple[int, str], *words: str) -> None:
    code, error = done
    assert code == 2, error
    (line,) = [line for line in error.splitlines() if line.startswith("error:")]
    for word in (*words, "Permission denied"):
        assert word in line
    assert "Traceback" not in error


@pytest.mark.multiprocess
def test_what_may_not_be_read_or_written_is_named(folder: Path) -> None:
    raw, closed, owned = folder / "raw", folder / "closed", folder / "owned"
    sources = write_sources(raw, three_sources())
    build_store(store_config(sources, owned / "s.zarr"))
    shutil.copytree(owned / "s.zarr", folder / "secret.zarr")
    Path(sources[1]).chmod(0)
    closed.mkdir(mode=0o555)
    owned.chmod(0o555)
    (folder / "secret.zarr" / "manifest.json").chmod(0)
    before = file_bytes(owned)
    refused, skipped, no_folder, no_overwrite, no_store = as_nobody(
        build(raw, folder / "a.zarr"),
        build(raw, folder / "b.zarr", "--skip_broken", "true"),
        build(raw, closed / "s.zarr"),
        build(raw, owned / "s.zarr", "--overwrite", "true"),
        ["store", "verify", str(folder / "secret.zarr")],
    )
    assert_one_sentence(refused, sources[1], "--skip_broken")
    assert not list(folder.glob("a.zarr*"))
    assert skipped[0] == 0, skipped[1]
    header = open_store(folder / "b.zarr").header
    assert [line["path"] for line in header.left_out] == [sources[1]]
    assert len(header.sources) == 2
    assert_one_sentence(no_folder, str(closed))
    assert list(closed.iterdir()) == []
    assert_one_sentence(no_overwrite, str(owned))
    assert file_bytes(owned) == before
    assert_one_sentence(no_store, "manifest.json")
