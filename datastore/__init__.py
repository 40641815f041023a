"""Cells on disk and their way into memory: build a store, open it, read it in training order.

    import datastore

    datastore.build_store(datastore.StoreConfig(sources=["a.h5ad"], output="cells.zarr"))
    store = datastore.open_store("cells.zarr")

What is named here is imported when it is first used, so that `import datastore` is quick.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datastore.append import append_store
    from datastore.config import StoreConfig
    from datastore.ingest import build_store
    from datastore.store import open_store

__all__ = ["StoreConfig", "append_store", "build_store", "open_store"]

_HOMES = {
    "StoreConfig": "datastore.config",
    "append_store": "datastore.append",
    "build_store": "datastore.ingest",
    "open_store": "datastore.store",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'datastore' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
