"""What docs/store_format.md says: its code runs word for word, and its list of files is true."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from datastore.store import CellStore, open_store
from tests.support.cells import dense_store, file_bytes

DOCUMENT = (Path(__file__).resolve().parents[2] / "docs" / "store_format.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", DOCUMENT, re.DOTALL)


@pytest.mark.parametrize("place", range(len(SNIPPETS)))
def test_code_of_the_page_runs(
    place: int, copied_store: CellStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = open_store(copied_store.path.rename(copied_store.path.with_name("cells.zarr")))
    monkeypatch.chdir(opened.path.parent)
    names: dict[str, Any] = {}
    exec(compile(SNIPPETS[place], f"snippet {place}", "exec"), names)
    np.testing.assert_array_equal(np.asarray(names["counts"]), dense_store(opened)[:10])


def test_files_of_the_page_are_those_of_a_store(store: CellStore) -> None:
    block = re.search(r"```\ncells\.zarr/\n(.*?)```", DOCUMENT, re.DOTALL)
    assert block is not None
    patterns = []
    for line in block[1].splitlines():
        name = line.split("  ")[0].strip()
        pattern = (
            re.escape(name).replace("<k>", r"\d+").replace("<g>", r"\d+").replace(r"\*\*", ".+")
        )
        patterns.append(pattern.replace("<column>", r"[^/]+"))
    for name in file_bytes(store.path):
        assert any(re.fullmatch(pattern, name) for pattern in patterns), name
    for pattern in patterns:
        assert any(re.fullmatch(pattern, name) for name in file_bytes(store.path)), pattern
