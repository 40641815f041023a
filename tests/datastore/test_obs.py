"""Columns of obs come back as text, whatever they were; damage in them is found."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from datastore.obs import MISSING, obs_columns, read_obs
from datastore.store import StoreFormatError, open_store
from tests.support.grown import write_grown_store
from tests.support.stores import flip_bit

OBS = pd.DataFrame(
    {
        "tissue": pd.Categorical(["skin", None, "blood"] * 50),
        "label": pd.Series(["x", "y", "z"] * 50, dtype=object),
        "dose": np.tile([0.5, np.nan, 2.0], 50),
        "plate": np.tile([3, 1, 2], 50),
        "fresh": np.tile([True, False, True], 50),
    }
)
TEXTS = {
    "tissue": ["skin", MISSING, "blood"],
    "label": ["x", "y", "z"],
    "dose": ["0.5", MISSING, "2.0"],
    "plate": ["3", "1", "2"],
    "fresh": ["True", "False", "True"],
}


@pytest.mark.parametrize("column", TEXTS)
def test_a_column_is_text(tmp_path: Path, column: str) -> None:
    store = write_grown_store(tmp_path / "s.zarr", [OBS])
    texts = [
        [found.values[code] for code in found.codes]
        for found in (read_obs(store, partition, column) for partition in (0, 1))
    ]
    assert texts[0] == (TEXTS[column] * 34)[:100]
    assert texts[1] == (TEXTS[column] * 50)[100:]


def test_cells_with_some_values_are_told(tmp_path: Path) -> None:
    column = read_obs(write_grown_store(tmp_path / "s.zarr", [OBS]), 0, "tissue")
    assert column.is_one_of(["skin"]).tolist()[:6] == [True, False, False] * 2
    assert column.is_one_of(["skin", MISSING]).tolist()[:6] == [True, True, False] * 2
    assert not column.is_one_of([]).any()


@pytest.mark.parametrize("name", ["tissu", "_index", ""])
def test_an_unknown_column_is_refused_with_the_known(tmp_path: Path, name: str) -> None:
    store = write_grown_store(tmp_path / "s.zarr", [OBS])
    assert obs_columns(store) == sorted(TEXTS)
    with pytest.raises(ValueError, match=r"has no obs\[.*\]; it has dose, fresh, label, plate, ti"):
        read_obs(store, 0, name)


def test_a_flipped_bit_is_found(tmp_path: Path) -> None:
    store = write_grown_store(tmp_path / "s.zarr", [OBS])
    flip_bit(store.partition_path(1) / "obs" / "tissue" / "codes" / "c" / "0", 3, 1)
    read_obs(store, 0, "tissue")
    with pytest.raises(StoreFormatError, match="dataset_1/obs/tissue/codes/c/0 is not as it was"):
        read_obs(open_store(store.path), 1, "tissue")
