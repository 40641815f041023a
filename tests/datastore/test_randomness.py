"""Permutations are bijections that look random; hashes are uniform; both need no state."""

import tracemalloc

import numpy as np
import pytest
from numpy.typing import NDArray

from datastore.randomness import derive_key, mix, permute


def chi_square(observed: NDArray[np.integer], freedom: int) -> float:
    """Chi-square against equal shares, as standard deviations from its expectation."""
    expected = observed.sum() / observed.size
    statistic = float(((observed - expected) ** 2 / expected).sum())
    return (statistic - freedom) / float(np.sqrt(2 * freedom))


@pytest.mark.parametrize(
    "size",
    [*range(1, 71), 255, 256, 257, 1023, 4097, 65_535, 65_536, 65_537, 100_003, 262_145],
)
def test_each_place_is_taken_once(size: int) -> None:
    for key in (0, 1, derive_key(7, "test", size), 2**64 - 1):
        places = permute(np.arange(size), size, key)
        assert places.dtype == np.int64
        np.testing.assert_array_equal(np.sort(places), np.arange(size))


def test_arrays_of_sizes_and_keys_equal_one_call_each() -> None:
    sizes = np.repeat(np.arange(1, 40), np.arange(1, 40))
    index = np.concatenate([np.arange(size) for size in range(1, 40)])
    keys = np.array([derive_key(3, int(size)) for size in sizes], np.uint64)
    shuffle = np.random.default_rng(0).permutation(len(index))
    together = np.empty_like(index)
    together[shuffle] = permute(index[shuffle], sizes[shuffle], keys[shuffle])
    for size in range(1, 40):
        alone = permute(np.arange(size), size, derive_key(3, size))
        np.testing.assert_array_equal(together[sizes == size], alone)


def test_shape_is_the_broadcast_of_the_arguments() -> None:
    places = permute(np.arange(10), 10, np.arange(4, dtype=np.uint64)[:, None])
    assert places.shape == (4, 10)
    np.testing.assert_array_equal(np.sort(places, axis=1), np.tile(np.arange(10), (4, 1)))
    assert permute(3, 10, 1).shape == ()
    assert permute(np.empty(0, np.int64), 10, 1).shape == (0,)


@pytest.mark.parametrize(
    ("index", "size"),
    [pytest.param([-1], 4, id="negative"), pytest.param([0, 4], 4, id="past the end")],
)
def test_an_index_outside_is_refused(index: list[int], size: int) -> None:
    with pytest.raises(ValueError, match=r"\[0, size\)"):
        permute(index, size, 0)


def test_keys_name_different_permutations() -> None:
    keys = np.arange(2000, dtype=np.uint64)
    orders = permute(np.arange(100), 100, keys[:, None])
    assert len({order.tobytes() for order in orders}) == len(keys)
    # Two random permutations of 100 agree in one place on average.
    assert (orders[1:] == orders[:-1]).sum(axis=1).mean() == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("size", [2, 3, 4, 5, 6, 7, 8, 9, 12, 16, 17])
def test_every_index_goes_everywhere_equally_often(size: int) -> None:
    keys = mix(derive_key(11, "keys"), np.arange(60_000))
    places = permute(np.arange(size), size, keys[:, None])
    table = np.zeros((size, size), np.int64)
    np.add.at(table, (np.broadcast_to(np.arange(size), places.shape), places), 1)
    # Measured: 2.6 at most. Six rounds of the network in place of ten give 24 at size 5.
    assert chi_square(table, (size - 1) ** 2) < 4.5


def test_neighbours_are_parted() -> None:
    size = 100_000
    places = permute(np.arange(size), size, derive_key(5, "store")).astype(np.float64)
    bound = 5 / np.sqrt(size)
    for distance in (1, 2, 64, 512):
        correlation = np.corrcoef(places[:-distance], places[distance:])[0, 1]
        assert abs(correlation) < bound
    assert abs(np.corrcoef(np.arange(size), places)[0, 1]) < bound
    steps = np.diff(places)
    assert (np.abs(steps) < size / 1000).mean() < 0.004  # 0.002 for a random order


def test_a_billion_in_constant_memory() -> None:
    size = 10**9
    index = np.arange(size - 20_000, size)
    tracemalloc.start()
    places = permute(index, size, 42)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 * 2**20  # bytes; 20,000 indices and their temporaries
    assert len(np.unique(places)) == len(index)
    assert places.min() >= 0
    assert places.max() < size
    counts = np.bincount(places * 50 // size, minlength=50)
    assert abs(chi_square(counts, 49)) < 4.5


def test_hashes_are_uniform_in_every_bit() -> None:
    hashes = mix(derive_key(1, "mask", 0), np.arange(100_000))
    bits = (hashes[:, None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)
    assert np.abs(bits.mean(axis=0) - 0.5).max() < 5 * 0.5 / np.sqrt(len(hashes))
    for shift in (0, 28, 56):  # low, middle and high byte
        byte = (hashes >> np.uint64(shift)) & np.uint64(255)
        assert abs(chi_square(np.bincount(byte.astype(np.int64), minlength=256), 255)) < 4.5
    assert len(np.unique(hashes)) == len(hashes)


def test_one_flipped_input_bit_flips_half_of_the_output() -> None:
    index = np.arange(2000)
    for bit in (0, 1, 17, 40, 63):
        other_key = mix(np.uint64(9) ^ (np.uint64(1) << np.uint64(bit)), index)
        flipped = np.bitwise_count(mix(9, index) ^ other_key)
        assert flipped.mean() == pytest.approx(32, abs=0.6)  # standard error 0.09
        other_index = index.astype(np.uint64) ^ (np.uint64(1) << np.uint64(bit))
        flipped = np.bitwise_count(mix(9, index) ^ mix(9, other_index))
        assert flipped.mean() == pytest.approx(32, abs=0.6)


def splitmix_finaliser(value: int) -> int:
    """SplitMix64's finaliser in Python's unbounded integers (Steele et al. 2014)."""
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB % 2**64
    return value ^ (value >> 31)


def test_mix_is_splitmix_of_key_then_index() -> None:
    golden = 0x9E3779B97F4A7C15
    # The first output of SplitMix64 seeded with 0, as published with its reference code.
    assert splitmix_finaliser(golden) == 0xE220A8397B1DCDAF
    for key, index in [(0, 0), (1, 0), (2**64 - 1, 5), (12345, 10**12)]:
        state = splitmix_finaliser((key + golden) % 2**64)
        expected = splitmix_finaliser(state ^ (index * golden % 2**64))
        assert int(mix(np.uint64(key), index)) == expected


def test_keys_differ_by_seed_and_purpose_and_never_change() -> None:
    purposes: list[tuple[int | str, ...]] = [(), ("mask",), ("mask", 0), ("mask", 1), ("mask", "1")]
    keys = {derive_key(seed, *purpose) for seed in (0, 1, 10) for purpose in purposes}
    assert len(keys) == 15
    assert all(0 <= key < 2**64 for key in keys)
    # A checkpoint's order of cells hangs on this number.
    assert derive_key(0, "store") == 0xA15FA58A7E54B312
