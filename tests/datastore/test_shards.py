"""Our shards are read alike by zarr-python and TensorStore, whole and damaged."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorstore as ts
import zarr
from numpy.typing import NDArray

from datastore.config import Codec
from datastore.shards import ShardedArray


def write(
    folder: Path,
    values: np.ndarray[Any, np.dtype[Any]],
    piece: int = 10**9,
    codec: Codec = "fast",
    chunk: int = 8,
    shard: int = 32,
) -> Path:
    zarr.open_group(folder, mode="w", zarr_format=3)
    array = ShardedArray(
        folder, "a", len(values), values.dtype, chunk=chunk, shard=shard, codec=codec
    )
    for start in range(0, len(values), piece):
        array.extend(values[start : start + piece])
    array.close()
    return folder / "a"


def by_tensorstore(path: Path) -> Any:
    kvstore = {"driver": "file", "path": f"{path}/"}
    spec = {"driver": "zarr3", "kvstore": kvstore, "fill_missing_data_reads": False}
    return ts.open(spec, open=True, read=True).result().read().result()


@pytest.mark.parametrize("codec", ["fast", "archive"])
@pytest.mark.parametrize("kind", [np.uint16, np.uint32, np.int64])
@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 31, 32, 33, 64, 100])
def test_two_libraries_read_what_was_written(
    tmp_path: Path, length: int, kind: type, codec: Codec
) -> None:
    numbers = np.random.default_rng(length).integers(0, 60_000, length)
    values: NDArray[Any] = numbers.astype(kind)
    path = write(tmp_path, values, codec=codec)
    found = zarr.open_array(path, mode="r")
    assert found.dtype == kind
    np.testing.assert_array_equal(found[:], values)
    assert found.attrs["encoding-type"] == "array"
    if length:
        np.testing.assert_array_equal(by_tensorstore(path), values)
    assert len(list((path / "c").iterdir())) == -(-length // 32)


def test_pieces_do_not_change_a_byte(tmp_path: Path) -> None:
    values = np.arange(100, dtype=np.uint16)
    whole = write(tmp_path / "whole", values)
    for piece in (1, 5, 8, 33):
        pieces = write(tmp_path / str(piece), values, piece)
        for shard in (whole / "c").iterdir():
            assert (pieces / "c" / shard.name).read_bytes() == shard.read_bytes()


def test_zarr_writes_the_same_values_in_as_many_bytes(tmp_path: Path) -> None:
    """The same chunks, encoded by the same codecs: only their order in a shard may differ."""
    values = np.random.default_rng(0).poisson(2.0, 5_000).astype(np.uint16)
    ours = write(tmp_path / "ours", values, chunk=256, shard=1024)
    theirs = write(tmp_path / "theirs", values[:0], chunk=256, shard=1024)
    array = zarr.open_array(theirs, mode="r+")
    array.resize(len(values))
    array[:] = values
    for shard in (ours / "c").iterdir():
        assert (theirs / "c" / shard.name).stat().st_size == shard.stat().st_size


def test_the_archive_is_smaller(tmp_path: Path) -> None:
    values = np.random.default_rng(0).poisson(2.0, 100_000).astype(np.uint16)
    sizes = {}
    codecs: tuple[Codec, Codec] = ("fast", "archive")
    for codec in codecs:
        path = write(tmp_path / codec, values, codec=codec, chunk=16_384, shard=65_536)
        sizes[codec] = sum(file.stat().st_size for file in (path / "c").iterdir())
    assert sizes["archive"] < 0.8 * sizes["fast"] < 0.8 * values.nbytes


def test_every_flipped_byte_is_noticed(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 50, 40).astype(np.uint16)
    path = write(tmp_path, values)
    shard = path / "c" / "0"
    whole = shard.read_bytes()
    for place in range(len(whole)):
        shard.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(ValueError, match=r"(?s)."):
            by_tensorstore(path)
