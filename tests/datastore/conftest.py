"""One small store that tests only read; those that damage it work on a copy."""

import shutil
from pathlib import Path

import pytest

from datastore.ingest import build_store
from datastore.store import CellStore, open_store
from tests.support.cells import store_config, three_sources, write_sources


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> CellStore:
    """70 cells of `three_sources` in three partitions."""
    folder = tmp_path_factory.mktemp("store")
    sources = write_sources(folder / "raw", three_sources())
    return build_store(store_config(sources, folder / "cells.zarr"))


@pytest.fixture
def copied_store(store: CellStore, tmp_path: Path) -> CellStore:
    """A copy to damage."""
    shutil.copytree(store.path, tmp_path / "copy.zarr")
    return open_store(tmp_path / "copy.zarr")
