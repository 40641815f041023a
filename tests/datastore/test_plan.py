"""A plan deals every cell to one slice and one partition."""

from pathlib import Path

import numpy as np
import pytest

from datastore.plan import Plan, Shuffle
from datastore.raw_cells import ReadOptions
from datastore.sources import Source
from tests.support.cells import store_config


def source(name: str, num_cells: int, whole: bool = False) -> Source:
    return Source(
        path=f"/data/{name}.h5ad",
        name=name,
        format="h5ad",
        options=ReadOptions(),
        sha256=name * 64,
        num_cells=num_cells,
        genes=("G0",),
        whole=whole,
    )


def plan(
    sizes: list[int], per_slice: int = 9, per_partition: int = 25, whole: bool = False
) -> Plan:
    config = store_config(
        ["a"], Path("s.zarr"), cells_per_slice=per_slice, cells_per_partition=per_partition
    )
    sources = [source("abcdef"[number], size, whole) for number, size in enumerate(sizes)]
    return Plan(tuple(sources), config, seed=3)


@pytest.mark.parametrize("sizes", [[1], [9, 9], [10, 1, 27], [70]])
def test_slices_hold_every_cell_once(sizes: list[int]) -> None:
    made = plan(sizes)
    indexes = [part.first + row for part in made.slices for row in range(part.stop - part.start)]
    assert indexes == list(range(sum(sizes)))
    assert all(0 < part.stop - part.start <= 9 for part in made.slices)
    rows = {(p.source, row) for p in made.slices for row in range(p.start, p.stop)}
    assert rows == {(number, row) for number, size in enumerate(sizes) for row in range(size)}
    assert len({part.name for part in made.slices}) == len(made.slices)


@pytest.mark.parametrize("num_cells", [1, 24, 25, 26, 70, 1000])
def test_partitions_are_equal_and_not_too_large(num_cells: int) -> None:
    sizes = np.diff(plan([num_cells]).edges)
    assert sizes.sum() == num_cells
    assert len(sizes) == -(-num_cells // 25)
    assert sizes.max() <= 25
    assert sizes.max() - sizes.min() <= 1


def test_a_source_decoded_whole_is_read_by_one_task() -> None:
    assert [len(parts) for parts in plan([20, 10], whole=True).read_together] == [3, 2]
    assert [len(parts) for parts in plan([20, 10]).read_together] == [1, 1, 1, 1, 1]


def test_places_are_a_permutation_of_seed_and_generation() -> None:
    index = np.arange(500)
    orders = [Shuffle(500, seed, g).places(index) for seed in (0, 1) for g in (0, 1, 2)]
    for number, order in enumerate(orders):
        assert sorted(order) == index.tolist()
        assert all((order == other).mean() < 0.02 for other in orders[:number])


def test_what_is_fast_or_elsewhere_is_the_same_plan() -> None:
    first = plan([20, 10])
    identity = first.identity(None, {})
    faster = store_config(["b"], Path("/elsewhere"), workers=7, overwrite=True, skip_broken=True)
    assert Plan(first.sources, faster, 3).identity(None, {}) == identity
    for other in (
        Plan(first.sources, store_config(["a"], Path("s.zarr"), min_genes=2), 3),
        Plan(first.sources, store_config(["a"], Path("s.zarr"), codec="archive"), 3),
        Plan(first.sources, store_config(["a"], Path("s.zarr"), duplicates="drop"), 3),
        Plan(first.sources[:1], first.config, 3),
        Plan(first.sources, first.config, 4),
        Plan(first.sources, first.config, 3, generation=1),
    ):
        assert other.identity(None, {}) != identity
    assert first.identity(["G1"], {}) != identity
    assert first.identity(None, {"panel.hgnc": "0"}) != identity
