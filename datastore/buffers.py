"""Memory that is used again: most of the time of a large fresh array goes into its page faults."""

import sys
from typing import Any, Final

import numpy as np
from numpy.typing import DTypeLike, NDArray

_PAGE: Final = 4096
_HELD_BY_US: Final = 3  # the list, the loop variable and the argument of getrefcount


class BufferPool:
    """Hands out arrays whose memory comes back as soon as nobody holds them or a view of them.

    So an array taken from a pool is the taker's for as long as it is kept, as a fresh one would be.

    Args:
        size: Most buffers to remember; what is handed out beyond that is freed as usual.
    """

    def __init__(self, size: int = 8) -> None:
        self._size = size
        self._buffers: list[NDArray[np.uint8]] = []

    def take(self, shape: int | tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """Give an array of any content."""
        kind = np.dtype(dtype)
        num_bytes = int(np.prod(shape)) * kind.itemsize
        return self._buffer(num_bytes)[:num_bytes].view(kind).reshape(shape)

    def _buffer(self, num_bytes: int) -> NDArray[np.uint8]:
        for buffer in self._buffers:
            fits = num_bytes <= len(buffer) <= 4 * num_bytes + _PAGE
            if fits and sys.getrefcount(buffer) == _HELD_BY_US:
                return buffer
        if len(self._buffers) == self._size:
            del self._buffers[0]
        # Batches differ a little in size; room to spare lets the next one in.
        buffer = np.empty(num_bytes + num_bytes // 8 + _PAGE, np.uint8)
        self._buffers.append(buffer)
        return buffer
