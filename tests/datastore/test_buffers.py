"""Memory comes back when nobody holds it any more, and never before."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from datastore.buffers import BufferPool


def address(array: NDArray[Any]) -> int:
    return int(array.__array_interface__["data"][0])


def test_memory_that_nobody_holds_is_used_again() -> None:
    pool = BufferPool()
    taken = pool.take((100, 3), np.float32)
    assert taken.shape == (100, 3)
    assert taken.dtype == np.float32
    place = address(taken)
    del taken
    assert address(pool.take(290, np.float32)) == place


@pytest.mark.parametrize(
    "hold",
    [
        pytest.param(lambda array: array, id="itself"),
        pytest.param(lambda array: array[5:6], id="slice"),
        pytest.param(lambda array: array.view(np.uint8)[::2], id="view of a view"),
        pytest.param(lambda array: array.reshape(10, 10)[3], id="row"),
        pytest.param(memoryview, id="buffer"),
    ],
)
def test_memory_that_somebody_holds_is_left_alone(hold: object) -> None:
    assert callable(hold)
    pool = BufferPool()
    held = hold(pool.take(100, np.int64))
    content = np.asarray(held)
    content[...] = 7
    for _ in range(20):
        pool.take(100, np.int64)[:] = 1
    assert (np.asarray(held) == 7).all()
    del held, content
    assert len({address(pool.take(100, np.int64)) for _ in range(3)}) == 1


def test_a_pool_forgets_what_it_cannot_lend() -> None:
    pool = BufferPool(2)
    kept = [pool.take(1000, np.uint8) for _ in range(10)]
    for number, array in enumerate(kept):
        array[:] = number
    assert [int(array[0]) for array in kept] == list(range(10))
    assert len(pool._buffers) == 2


def test_small_requests_do_not_occupy_large_memory() -> None:
    pool = BufferPool()
    large = address(pool.take(10**6, np.uint8))
    assert address(pool.take(10, np.uint8)) != large


def test_nothing_can_be_taken() -> None:
    assert BufferPool().take((0, 5), np.uint16).shape == (0, 5)
