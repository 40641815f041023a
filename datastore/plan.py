"""What an ingest is going to do: sources cut into slices, cells dealt to partitions.

The plan alone decides every byte of the store. It is kept beside the work as JSON; an ingest that
finds an equal plan goes on where the former stopped.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datastore.config import StoreConfig
from datastore.randomness import derive_key, permute
from datastore.sources import Source

_HOW_FAST_AND_WHERE = (
    "output",
    "sources",
    "workers",
    "processes",
    "scheduler",
    "slurm",
    "array",
    "overwrite",
    "append",
    "skip_broken",
)


@dataclass(frozen=True)
class Slice:
    """Rows [start, stop) of a source; `first` is the shuffle index of its first cell."""

    source: int
    start: int
    stop: int
    first: int

    @property
    def name(self) -> str:
        """File of the spooled cells."""
        return f"slice_{self.source:05d}_{self.start:010d}"


@dataclass(frozen=True)
class Shuffle:
    """The place of each cell of a generation: a keyed permutation of its index over all sources."""

    num_cells: int
    seed: int
    generation: int

    def places(self, index: NDArray[np.int64]) -> NDArray[np.int64]:
        """Place of each cell, counted from the first cell of the generation."""
        purpose = ("store",) if self.generation == 0 else ("store", self.generation)
        return permute(index, self.num_cells, derive_key(self.seed, *purpose))


@dataclass(frozen=True)
class Plan:
    """Which cells go where.

    Attributes:
        sources: In the order of their digests.
        config: How to ingest.
        seed: Seed of the shuffle.
        generation: 0 builds a store, others are appended.
    """

    sources: tuple[Source, ...]
    config: StoreConfig
    seed: int
    generation: int = 0

    @cached_property
    def num_cells(self) -> int:
        """Cells of all sources, before poor ones are dropped."""
        return sum(source.num_cells for source in self.sources)

    @property
    def shuffle(self) -> Shuffle:
        """The order of the generation."""
        return Shuffle(self.num_cells, self.seed, self.generation)

    @cached_property
    def first_index(self) -> list[int]:
        """Shuffle index of each source's first cell, and their number at the end."""
        return [0, *np.cumsum([source.num_cells for source in self.sources]).tolist()]

    @cached_property
    def edges(self) -> list[int]:
        """Places at which partitions begin, and where the last ends; equal ones end together."""
        number = -(-self.num_cells // self.config.cells_per_partition)
        return [place * self.num_cells // number for place in range(number + 1)]

    @cached_property
    def slices(self) -> list[Slice]:
        """All cells, cut into pieces that fit into memory."""
        return [
            Slice(number, start, stop, first + start)
            for number, (source, first) in enumerate(
                zip(self.sources, self.first_index[:-1], strict=True)
            )
            for start, stop in pairwise(
                [*range(0, source.num_cells, self.config.cells_per_slice), source.num_cells]
            )
        ]

    @property
    def read_together(self) -> list[list[Slice]]:
        """Slices that one task reads: all of a source that is decoded whole, else one."""
        groups: list[list[Slice]] = []
        for part in self.slices:
            if groups and groups[-1][0].source == part.source and self.sources[part.source].whole:
                groups[-1].append(part)
            else:
                groups.append([part])
        return groups

    @property
    def obs_columns(self) -> list[str]:
        """Columns of obs besides source and row: from tables of sources, then from the sources."""
        labels = {name for source in self.sources for name, _ in source.labels}
        return [*sorted(labels), *self.config.obs_columns]

    def identity(self, panel: Sequence[str] | None, tables: dict[str, str]) -> dict[str, Any]:
        """All that the bytes of the result depend on, as JSON has it.

        Args:
            panel: Names of a panel that is given; none if the sources decide it.
            tables: Digests of the gene tables.
        """
        knobs = asdict(self.config)
        for name in _HOW_FAST_AND_WHERE:
            del knobs[name]
        return {
            "generation": self.generation,
            "seed": self.seed,
            "config": knobs,
            "panel": None if panel is None else list(panel),
            "tables": tables,
            "sources": [
                [s.sha256, s.name, [list(label) for label in s.labels]] for s in self.sources
            ],
        }
