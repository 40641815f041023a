"""Which cells of a store are trained on, and which are held out.

1. Every cell has its side, training or held out, by its place in its generation or by its source.
   The side depends on nothing else: neither on what is selected, nor on what is appended later.
2. `where` keeps the cells with certain values in obs.
3. What is left is ordered: each cell once an epoch, or by the weights of its group.

Without a query, weights and whole sources held out, nothing is read and nothing kept but two spans
of positions for each generation. Else the positions of the chosen cells are kept, 4 bytes each in a
store of up to four billion cells, and obs is read partition by partition.
"""

import logging
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from datastore.config import OrderConfig, SelectionConfig
from datastore.mixture import CellList, CellSet, CellSpan, MixedOrder
from datastore.obs import read_obs
from datastore.randomness import derive_key
from datastore.sampler import Order
from datastore.store import CellStore
from datastore.weights import Group, WeightedOrder, quotas

log = logging.getLogger(__name__)

SOURCE: Final = "source"
_GOLDEN_RATIO: Final = (5**0.5 - 1) / 2
_SHOWN: Final = 20


@dataclass(frozen=True, eq=False)
class Selection:
    """Cells chosen of a store. Without groups, each cell is trained on once an epoch."""

    training: tuple[CellSet, ...]
    """By generation, and by group; none is empty."""
    held_out: tuple[CellSet, ...]
    """By generation; none is empty."""
    groups: tuple[Group, ...] = ()
    """The same cells as `training`, with their places in an epoch."""

    @property
    def num_training(self) -> int:
        """Cells that are trained on."""
        return sum(cells.num_cells for cells in self.training)

    @property
    def num_held_out(self) -> int:
        """Cells that are selected and held out."""
        return sum(cells.num_cells for cells in self.held_out)

    def order(self, seed: int, config: OrderConfig) -> Order:
        """In which order training meets the cells."""
        if self.groups:
            return WeightedOrder(self.groups, seed, config)
        return MixedOrder(self.training, seed, config)

    def validation(self, most: int) -> NDArray[np.int64]:
        """Positions of the held-out cells to evaluate: all, or so many, evenly of the generations.

        Always the same ones; they lie together, so that they are read quickly.
        """
        total = self.num_held_out
        taken, seen, pieces = 0, 0, []
        for cells in self.held_out:
            seen += cells.num_cells
            wanted = min(most, total) * seen // total - taken
            pieces.append(cells.at(np.arange(wanted)))
            taken += wanted
        return np.sort(np.concatenate([np.empty(0, np.int64), *pieces]))


def select_cells(store: CellStore, config: SelectionConfig, held_out_share: float) -> Selection:
    """Choose the cells to train on, and those to hold out.

    Args:
        store: An open store.
        config: What is wanted.
        held_out_share: Share of each generation that is held out, in [0, 1).

    Raises:
        ValueError: If obs has no such column or value, or no cell to train on is left.
    """
    by_source = config.split_by == "source" and held_out_share > 0
    spans = [
        _halves(start, size, config.split_seed, held_out_share)
        for start, size in _generations(store)
    ]
    if config.where or config.weight_by is not None or by_source:
        sources = held_out_sources(store, held_out_share, config.split_seed) if by_source else None
        selection = _select_by_obs(store, config, [held_out for _, held_out in spans], sources)
    else:
        training, held_out = zip(*spans, strict=True)
        selection = Selection(_filled(training), _filled(held_out))
    if not selection.num_training:
        raise ValueError(
            f"data selects no cell of {store.url} to train on; check data.where and data.weights"
        )
    if held_out_share and not selection.num_held_out:
        log.warning("none of the selected cells is held out: there will be no validation metrics")
    return selection


def held_out_sources(store: CellStore, share: float, seed: int) -> set[str]:
    """Choose whole sources of each generation that have about this share of its cells.

    In an order that the seed gives, a source is taken if that brings the generation nearer to the
    share. The first generation gives one at least.

    Raises:
        ValueError: If the store's first generation has but one source.
    """
    chosen: set[str] = set()
    lines = store.header.sources
    for number, (_, size) in enumerate(_generations(store)):
        cells = {line["name"]: line["cells_kept"] for line in lines if line["generation"] == number}
        cells = {name: count for name, count in cells.items() if count}
        if number == 0 and len(cells) < 2:
            raise ValueError(
                f"data.split_by is source, but {store.url} has but one source with cells; hold "
                "out cells instead (--data.split_by cell)"
            )
        missing = share * size
        for name in sorted(cells, key=lambda name: derive_key(seed, "held out", name)):
            if abs(missing - cells[name]) < missing:
                chosen.add(name)
                missing -= cells[name]
        if number == 0 and not chosen:
            chosen.add(min(cells, key=lambda name: (cells[name], name)))
    return chosen


def _generations(store: CellStore) -> list[tuple[int, int]]:
    """First position and cells of each generation that has any."""
    stops = np.cumsum(store.header.generations)
    return [
        (int(stop) - size, size)
        for stop, size in zip(stops, store.header.generations, strict=True)
        if size
    ]


def _halves(start: int, size: int, seed: int, share: float) -> tuple[CellSpan, CellSpan]:
    """Training and held-out cells of a generation.

    A generation is shuffled, so any run of positions is a fair sample. Those of consecutive seeds
    lie as far apart as can be.
    """
    first, held_out = int(size * (seed * _GOLDEN_RATIO % 1)), int(size * share)
    return (
        CellSpan(start, size, first + held_out, size - held_out),
        CellSpan(start, size, first, held_out),
    )


@dataclass(frozen=True, eq=False)
class _Wanted:
    """Cells that `where` keeps, of a partition or a generation."""

    positions: NDArray[Any]
    held_out: NDArray[np.bool_]
    group: NDArray[Any]
    """Number of each cell's group."""

    @staticmethod
    def joined(pieces: Sequence["_Wanted"]) -> "_Wanted":
        """Put partitions together."""
        return _Wanted(
            np.concatenate([piece.positions for piece in pieces]),
            np.concatenate([piece.held_out for piece in pieces]),
            np.concatenate([piece.group for piece in pieces]),
        )


def _select_by_obs(
    store: CellStore,
    config: SelectionConfig,
    spans: Sequence[CellSpan],
    sources: set[str] | None,
) -> Selection:
    """Select by what obs says, a partition at a time; hold out sources if given, else the spans."""
    columns = {*config.where, config.weight_by, SOURCE if sources is not None else None} - {None}
    seen: dict[str, set[str]] = {str(column): set() for column in sorted(map(str, columns))}
    groups: dict[str, int] = {}
    pieces: list[list[_Wanted]] = [[] for _ in spans]
    starts = [span.start for span in spans]
    for partition, start in enumerate(store.partition_starts[:-1].tolist()):
        stop = int(store.partition_starts[partition + 1])
        obs = {column: read_obs(store, partition, column) for column in seen}
        for column, values in obs.items():
            seen[column].update(values.values[code] for code in np.unique(values.codes))
        generation = bisect_right(starts, start) - 1
        positions = np.arange(start, stop)
        if sources is None:
            held_out = spans[generation].holds(positions)
        else:
            held_out = obs[SOURCE].is_one_of(sources)
        wanted = np.ones(len(positions), np.bool_)
        for column, values_wanted in config.where.items():
            wanted &= obs[column].is_one_of(values_wanted)
        group = np.zeros(len(positions), np.uint32)
        if config.weight_by is not None:
            of = obs[config.weight_by]
            numbers = [groups.setdefault(value, len(groups)) for value in of.values]
            group = np.array(numbers, np.uint32)[of.codes]
        compact = positions.astype(np.uint32 if store.num_cells <= 2**32 else np.int64)
        pieces[generation].append(_Wanted(compact[wanted], held_out[wanted], group[wanted]))
    _refuse_unknown(config, seen)
    generations = [_Wanted.joined(inside) for inside in pieces if inside]
    held_out_cells = _filled(CellList(cells.positions[cells.held_out]) for cells in generations)
    if config.weight_by is None:
        training = _filled(CellList(cells.positions[~cells.held_out]) for cells in generations)
        return Selection(training, held_out_cells)
    weighted = _groups(generations, list(groups), config)
    training = _filled(CellList(group.positions) for group in weighted)
    return Selection(training, held_out_cells, weighted)


def _groups(
    generations: Sequence[_Wanted], names: Sequence[str], config: SelectionConfig
) -> tuple[Group, ...]:
    """Cells to train on by group and generation, each with its quota; without those of weight 0."""
    parts: list[tuple[int, int, NDArray[Any]]] = []
    for generation, cells in enumerate(generations):
        positions, group = cells.positions[~cells.held_out], cells.group[~cells.held_out]
        order = np.argsort(group, kind="stable")
        numbers, firsts = np.unique(group[order], return_index=True)
        for number, inside in zip(numbers, np.split(order, firsts[1:]), strict=True):
            if config.weights.get(names[number], 1.0) > 0:
                parts.append((generation, int(number), positions[inside]))
    if not parts:
        return ()
    totals: Counter[int] = Counter()
    for _, number, positions in parts:
        totals[number] += len(positions)
    weights = np.array(
        [
            config.weights.get(names[number], 1.0) * totals[number] ** -config.balance
            for _, number, _ in parts
        ]
    )
    sizes = np.array([len(positions) for _, _, positions in parts], np.int64)
    shares = quotas(sizes, weights, int(sizes.sum()))
    return tuple(
        Group(names[number], generation, positions, int(quota))
        for (generation, number, positions), quota in zip(parts, shares, strict=True)
    )


def _refuse_unknown(config: SelectionConfig, seen: Mapping[str, set[str]]) -> None:
    """Refuse values that no cell of the store has."""
    asked = [("data.where", column, values) for column, values in config.where.items()]
    if config.weight_by is not None:
        asked.append(("data.weights", config.weight_by, list(config.weights)))
    for setting, column, values in asked:
        for value in values:
            if value not in seen[column]:
                known = sorted(seen[column])
                more = f" and {len(known) - _SHOWN} more" if len(known) > _SHOWN else ""
                raise ValueError(
                    f"{setting}: no cell has obs[{column!r}] = {value!r}; there are "
                    f"{', '.join(known[:_SHOWN])}{more}"
                )


def _filled(cells: Iterable[CellSet]) -> tuple[CellSet, ...]:
    return tuple(some for some in cells if some.num_cells)
