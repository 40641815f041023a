"""Writing a sharded Zarr v3 array from pieces, one encoded chunk at a time.

A shard is its chunks one after another, then a table of where each begins and how long it is, with
a checksum (the `sharding_indexed` codec of the Zarr specification). zarr-python makes the array's
metadata; we write the shards ourselves, because there the work per chunk is many times the encoding
and a shard would have to be in memory whole.
"""

from pathlib import Path
from typing import Any, Final

import google_crc32c
import numpy as np
import zarr
from numcodecs import blosc
from numpy.typing import NDArray
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, ShardingCodec

from datastore.config import Codec

# From level 5 on Blosc's blocks are larger: lz4 finds longer matches, so counts are smaller by a
# tenth and decoded quicker by a quarter than at level 3, and are compressed as quickly.
_COMPRESSORS: Final[dict[Codec, tuple[Any, int]]] = {"fast": ("lz4", 5), "archive": ("zstd", 5)}
_BEYOND_THE_END: Final = np.iinfo(np.uint64).max


class ShardedArray:
    """A one-dimensional array under construction.

    Args:
        folder: Group that the array goes into, on this machine.
        name: Its name there.
        length: How many values it will have.
        dtype: Their type.
        chunk: Values that are decoded at once; each chunk has a crc32c, which is what catches a
            flipped bit on reading.
        shard: Values that share a file; a multiple of `chunk`.
        codec: How hard to compress.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        length: int,
        dtype: np.dtype[Any],
        *,
        chunk: int,
        shard: int,
        codec: Codec,
    ) -> None:
        compressor, level = _COMPRESSORS[codec]
        array = zarr.create_array(
            folder / name,
            shape=(length,),
            dtype=dtype,
            chunks=(shard,),
            fill_value=0,
            filters=None,
            compressors=None,
            serializer=ShardingCodec(
                chunk_shape=(chunk,),
                codecs=[
                    BytesCodec(endian="little"),
                    BloscCodec(
                        cname=compressor, clevel=level, shuffle="shuffle", typesize=dtype.itemsize
                    ),
                    Crc32cCodec(),
                ],
                index_codecs=[BytesCodec(endian="little"), Crc32cCodec()],
            ),
        )
        array.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
        self._folder = folder / name / "c"
        self._folder.mkdir()
        self._blosc = (compressor.encode(), level, blosc.SHUFFLE)
        self._chunks_per_shard = shard // chunk
        self._open_chunk = np.zeros(chunk, dtype.newbyteorder("<"))
        self._filled = 0
        self._encoded: list[bytes] = []
        self._num_shards = 0

    def extend(self, values: NDArray[Any]) -> None:
        """Append values."""
        at = 0
        while at < len(values):
            taken = min(len(values) - at, len(self._open_chunk) - self._filled)
            self._open_chunk[self._filled : self._filled + taken] = values[at : at + taken]
            self._filled += taken
            at += taken
            if self._filled == len(self._open_chunk):
                self._close_chunk()

    def close(self) -> None:
        """Write what is left; the last chunk is padded with zeros."""
        if self._filled:
            self._open_chunk[self._filled :] = 0
            self._close_chunk()
        if self._encoded:
            self._close_shard()

    def _close_chunk(self) -> None:
        frame = blosc.compress(self._open_chunk, *self._blosc)
        self._encoded.append(frame + _crc32c(frame))
        self._filled = 0
        if len(self._encoded) == self._chunks_per_shard:
            self._close_shard()

    def _close_shard(self) -> None:
        lengths = np.array([len(chunk) for chunk in self._encoded], "<u8")
        index = np.full((self._chunks_per_shard, 2), _BEYOND_THE_END, "<u8")
        index[: len(lengths)] = np.stack([np.cumsum(lengths) - lengths, lengths], axis=1)
        with (self._folder / str(self._num_shards)).open("wb") as file:
            file.writelines(self._encoded)
            file.write(index.tobytes() + _crc32c(index.tobytes()))
        self._encoded.clear()
        self._num_shards += 1


def _crc32c(data: bytes) -> bytes:
    return int(google_crc32c.value(data)).to_bytes(4, "little")
