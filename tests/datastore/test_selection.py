"""Chosen cells against pandas; sides that stay; weights of groups; refusals by name."""

import logging
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray

from datastore.append import append_store
from datastore.config import BinningConfig, OrderConfig, SelectionConfig
from datastore.ingest import build_store
from datastore.loader import CellLoader
from datastore.mixture import CellSet, CellSpan
from datastore.reader import CellReader
from datastore.sampler import CellSampler
from datastore.selection import Selection, held_out_sources, select_cells
from datastore.store import CellStore
from tests.support.cells import (
    dense_store,
    gene_names,
    random_cells,
    store_config,
    stored_parts,
    write_sources,
)
from tests.support.grown import write_grown_store

SMALL = OrderConfig(lanes=4, block=8, window=8)
TISSUES = ["Blood", "Bone marrow", "Lung", None]


def random_obs(seed: int, num_cells: int, sources: Mapping[str, float]) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    source = rng.choice(list(sources), num_cells, p=list(sources.values()))
    tissue = np.array(TISSUES, object)[rng.choice(4, num_cells, p=[0.6, 0.2, 0.15, 0.05])]
    return pd.DataFrame(
        {
            "source": pd.Categorical(source),
            "tissue": pd.Categorical(tissue),
            "species": pd.Categorical(rng.choice(["human", "mouse"], num_cells, p=[0.7, 0.3])),
        }
    )


FIRST = random_obs(0, 530, {"a": 0.5, "b": 0.2, "c": 0.15, "d": 0.1, "e": 0.05})
SECOND = random_obs(1, 210, {"f": 0.5, "g": 0.3, "h": 0.2})
OBS = pd.concat([FIRST, SECOND], ignore_index=True)
OBS["tissue"] = OBS["tissue"].astype(object).where(OBS["tissue"].notna(), "(missing)")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> CellStore:
    """740 cells in two generations, 6 + 3 partitions."""
    return write_grown_store(tmp_path_factory.mktemp("grown") / "s.zarr", [FIRST, SECOND])


@pytest.fixture(scope="module")
def former(tmp_path_factory: pytest.TempPathFactory) -> CellStore:
    """The store before it grew."""
    return write_grown_store(tmp_path_factory.mktemp("former") / "s.zarr", [FIRST])


def choose(store: CellStore, share: float = 0.1, **settings: Any) -> Selection:
    return select_cells(store, SelectionConfig(**settings), share)


def positions_of(cells: tuple[CellSet, ...]) -> NDArray[np.int64]:
    return np.sort(np.concatenate([np.empty(0, np.int64), *map(all_of, cells)]))


def all_of(cells: CellSet) -> NDArray[np.int64]:
    return cells.at(np.arange(cells.num_cells))


# --- sides ---


@pytest.mark.parametrize("split_seed", [0, 1, 2, 77])
def test_a_share_of_every_generation_is_held_out(store: CellStore, split_seed: int) -> None:
    chosen = choose(store, split_seed=split_seed)
    held_out = positions_of(chosen.held_out)
    assert (held_out < 530).sum() == 53
    assert (held_out >= 530).sum() == 21
    both = np.sort(np.concatenate([held_out, positions_of(chosen.training)]))
    np.testing.assert_array_equal(both, np.arange(740))
    assert (chosen.num_training, chosen.num_held_out) == (666, 74)


def test_nothing_is_read_or_listed_without_need(
    store: CellStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datastore.selection.read_obs", None)
    chosen = choose(store, split_seed=3)
    assert all(isinstance(part, CellSpan) for part in (*chosen.training, *chosen.held_out))
    choose(store, share=0.0, split_by="source")


def test_the_first_cells_are_held_out_by_default_and_seeds_hold_out_others(
    store: CellStore,
) -> None:
    sides = [set(positions_of(choose(store, split_seed=seed).held_out)) for seed in range(5)]
    assert sides[0] == {*range(53), *range(530, 551)}
    for one in range(5):
        for other in range(one):
            assert not sides[one] & sides[other]


@pytest.mark.parametrize("split_by", ["cell", "source"])
@pytest.mark.parametrize("split_seed", [0, 5])
def test_a_cell_keeps_its_side_when_the_store_grows_or_others_are_chosen(
    store: CellStore, former: CellStore, split_by: str, split_seed: int
) -> None:
    settings: dict[str, Any] = {"split_by": split_by, "split_seed": split_seed}
    before = set(positions_of(choose(former, **settings).held_out))
    after = choose(store, **settings)
    assert {p for p in positions_of(after.held_out) if p < 530} == before
    more: list[dict[str, Any]] = [{"where": {"tissue": ["Lung"]}}, {"weight_by": "tissue"}]
    for one in more:
        some = choose(store, **settings, **one)
        assert set(positions_of(some.held_out)) <= set(positions_of(after.held_out))
        assert set(positions_of(some.training)) <= set(positions_of(after.training))


@pytest.mark.parametrize("split_seed", range(6))
@pytest.mark.parametrize("share", [0.05, 0.2, 0.4])
def test_whole_sources_are_held_out(store: CellStore, split_seed: int, share: float) -> None:
    names = held_out_sources(store, share, split_seed)
    chosen = choose(store, share, split_by="source", split_seed=split_seed)
    expected = np.flatnonzero(OBS["source"].isin(names))
    np.testing.assert_array_equal(positions_of(chosen.held_out), expected)
    np.testing.assert_array_equal(
        positions_of(chosen.training), np.setdiff1d(np.arange(740), expected)
    )
    assert names & set("abcde")
    # The nearest that whole sources of 5 to 50 % can come.
    assert (expected < 530).sum() / 530 == pytest.approx(share, abs=0.1)


def test_other_seeds_hold_out_other_sources(store: CellStore) -> None:
    assert len({frozenset(held_out_sources(store, 0.2, seed)) for seed in range(20)}) > 3


# --- where ---


@pytest.mark.parametrize(
    "where",
    [
        pytest.param({"species": ["human"]}, id="one value"),
        pytest.param({"species": ["human"], "tissue": ["Blood", "Bone marrow"]}, id="two columns"),
        pytest.param({"tissue": ["(missing)", "Lung"]}, id="no value"),
        pytest.param({"source": ["f"]}, id="second generation only"),
        pytest.param({"source": ["e"]}, id="first generation only"),
    ],
)
@pytest.mark.parametrize("split_seed", [0, 1])
def test_chosen_cells_are_those_of_pandas(
    store: CellStore, where: dict[str, list[str]], split_seed: int
) -> None:
    chosen = choose(store, where=where, split_seed=split_seed)
    wanted = np.ones(740, bool)
    for column, values in where.items():
        wanted &= OBS[column].isin(values).to_numpy()
    held_out = np.isin(np.arange(740), positions_of(choose(store, split_seed=split_seed).held_out))
    np.testing.assert_array_equal(positions_of(chosen.training), np.flatnonzero(wanted & ~held_out))
    np.testing.assert_array_equal(positions_of(chosen.held_out), np.flatnonzero(wanted & held_out))


@pytest.mark.parametrize("world_size", [1, 2, 3, 7, 64])
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize(
    "settings",
    [{}, {"where": {"tissue": ["Blood", "Lung"]}}, {"split_by": "source", "split_seed": 1}],
    ids=["all", "where", "by source"],
)
def test_each_chosen_cell_once_an_epoch(
    store: CellStore, settings: dict[str, Any], world_size: int, accumulation: int
) -> None:
    chosen = choose(store, **settings)
    order = chosen.order(0, SMALL)
    assert order.num_cells == chosen.num_training
    samplers = [
        CellSampler(order, 60, rank, world_size, accumulation) for rank in range(world_size)
    ]
    steps = range(samplers[0].steps_per_epoch)
    cells = [c for s in samplers for step in s.plan(1, steps) for micro in step for c in micro]
    np.testing.assert_array_equal(np.sort(cells), positions_of(chosen.training))


@pytest.mark.parametrize("most", [0, 1, 10, 73, 74, 5_000])
def test_validation_cells_are_spread_over_generations(store: CellStore, most: int) -> None:
    cells = choose(store).validation(most)
    assert len(cells) == len(set(cells)) == min(most, 74)
    assert set(cells) <= set(positions_of(choose(store).held_out))
    assert (cells < 530).sum() == min(most, 74) * 53 // 74


# --- weights ---


def shares_of(store: CellStore, settings: dict[str, Any], epochs: int = 3) -> dict[str, int]:
    order = choose(store, **settings).order(0, SMALL)
    cells = [order.positions(epoch, np.arange(order.num_cells)) for epoch in range(epochs)]
    column = OBS[settings["weight_by"]].to_numpy()
    return dict(Counter(column[np.concatenate(cells)]))


def test_weights_multiply_a_groups_share(store: CellStore) -> None:
    plain = shares_of(store, {"weight_by": "tissue"})
    assert sum(plain.values()) == 3 * 666
    tissues = OBS["tissue"][positions_of(choose(store).training)].value_counts()
    assert plain == {tissue: 3 * count for tissue, count in tissues.items()}
    doubled = shares_of(store, {"weight_by": "tissue", "weights": {"Lung": 2.0}})
    assert sum(doubled.values()) == 3 * 666
    for tissue in ("Blood", "Bone marrow"):
        ratio = doubled["Lung"] / doubled[tissue] / (plain["Lung"] / plain[tissue])
        assert ratio == pytest.approx(2, rel=0.03)  # quotas are whole numbers


def test_balance_brings_the_groups_together(store: CellStore) -> None:
    even = shares_of(store, {"weight_by": "tissue", "balance": 1.0})
    assert sum(even.values()) == 3 * 666
    assert max(even.values()) - min(even.values()) <= 3 * 2  # two generations round
    plain = shares_of(store, {"weight_by": "tissue"})
    half = shares_of(store, {"weight_by": "tissue", "balance": 0.5})
    for tissue in ("Bone marrow", "Lung"):
        expected = (plain[tissue] / plain["Blood"]) ** 0.5
        assert half[tissue] / half["Blood"] == pytest.approx(expected, rel=0.03)


def test_a_group_of_weight_0_is_left_out(store: CellStore) -> None:
    settings: dict[str, Any] = {"weight_by": "tissue", "weights": {"Blood": 0.0, "(missing)": 0.0}}
    chosen = choose(store, **settings)
    assert set(OBS["tissue"][positions_of(chosen.training)]) == {"Bone marrow", "Lung"}
    assert chosen.order(0, SMALL).num_cells == chosen.num_training
    assert set(shares_of(store, settings)) == {"Bone marrow", "Lung"}


def test_weights_and_a_query_go_together(store: CellStore) -> None:
    settings: dict[str, Any] = {
        "weight_by": "source",
        "weights": {"b": 3.0},
        "where": {"species": ["mouse"], "source": ["a", "b", "f"]},
    }
    chosen = choose(store, **settings)
    shares = shares_of(store, settings)
    cells = OBS.loc[positions_of(chosen.training)]
    assert set(cells["species"]) == {"mouse"}
    counts = cells["source"].value_counts()
    assert shares["b"] / shares["a"] == pytest.approx(3 * counts["b"] / counts["a"], rel=0.05)
    assert shares["f"] / shares["a"] == pytest.approx(counts["f"] / counts["a"], rel=0.05)


# --- refusals ---


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        pytest.param(
            {"where": {"tisue": ["Blood"]}},
            r"has no obs\['tisue'\]; it has source, species, tissue",
            id="unknown column",
        ),
        pytest.param(
            {"where": {"tissue": ["Lung", "blood"]}},
            r"data\.where: no cell has obs\['tissue'\] = 'blood'; there are \(missing\), Blood, Bo",
            id="unknown value",
        ),
        pytest.param(
            {"weight_by": "tissue", "weights": {"Liver": 2.0}},
            r"data\.weights: no cell has obs\['tissue'\] = 'Liver'; there are",
            id="unknown group",
        ),
        pytest.param(
            {"where": {"source": ["a"], "species": ["human"]}, "split_by": "source"},
            r"data selects no cell of .* to train on; check data\.where",
            id="nothing left",
        ),
        pytest.param(
            {"weight_by": "species", "weights": {"human": 0.0, "mouse": 0.0}},
            r"data selects no cell of .* to train on",
            id="all weights 0",
        ),
    ],
)
def test_what_cannot_be_chosen_is_refused(
    store: CellStore, settings: dict[str, Any], message: str
) -> None:
    # Seed 8 holds out source a.
    assert "a" in held_out_sources(store, 0.4, 8)
    with pytest.raises(ValueError, match=message):
        choose(store, 0.4, split_seed=8, **settings)


def test_a_long_list_of_values_is_cut(tmp_path: Path) -> None:
    obs = pd.DataFrame({"batch": [f"b{number:03}" for number in range(150)]})
    store = write_grown_store(tmp_path / "s.zarr", [obs])
    with pytest.raises(ValueError, match=r"b000, b001, .* b019 and 130 more$"):
        choose(store, where={"batch": ["x"]})


def test_one_source_cannot_be_split_by_source(tmp_path: Path) -> None:
    store = write_grown_store(tmp_path / "s.zarr", [pd.DataFrame({"source": ["only"] * 50})])
    with pytest.raises(ValueError, match=r"has but one source with cells; hold out cells instead"):
        choose(store, split_by="source")


def test_no_held_out_cell_among_the_chosen_is_said(
    store: CellStore, caplog: pytest.LogCaptureFixture
) -> None:
    away = sorted(held_out_sources(store, 0.2, 0))
    kept = [name for name in "abcde" if name not in away]
    with caplog.at_level(logging.WARNING):
        chosen = choose(store, 0.2, split_by="source", where={"source": kept})
    assert "no validation metrics" in caplog.text
    assert len(chosen.validation(100)) == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"where": {"tissue": []}}, "data.where names no value of 'tissue'"),
        ({"weights": {"Blood": 2.0}}, "name a column with data.weight_by"),
        ({"balance": 0.5}, "name a column with data.weight_by"),
        ({"weight_by": "tissue", "balance": 1.5}, "data.balance is 1.5; give a number from 0 to 1"),
        ({"weight_by": "tissue", "weights": {"x": -1.0}}, "data.weights gives 'x' -1.0; give 0"),
        ({"weight_by": "tissue", "weights": {"x": np.inf}}, "data.weights gives 'x' inf"),
    ],
)
def test_settings_are_refused_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SelectionConfig(**settings)


def test_a_large_store_is_chosen_from_in_little_memory() -> None:
    """Without a query, a billion cells are two spans for each generation."""

    class Header:
        generations = (900_000_000, 0, 100_000_000)

    class Store:
        header = Header()

    chosen = select_cells(Store(), SelectionConfig(split_seed=4), 0.01)  # type: ignore[arg-type]
    assert chosen.num_training == 990_000_000
    assert len(chosen.training) == 2
    cells = chosen.validation(10_000)
    assert len(np.unique(cells)) == 10_000
    assert (cells >= 900_000_000).sum() == 1_000


# --- with a store that was built and grew, and the loader ---


def test_two_ranks_read_the_chosen_cells_of_a_grown_store(tmp_path: Path) -> None:
    raw = [random_cells(name, seed, 60, gene_names(12)) for seed, name in enumerate("abcd")]
    files = write_sources(tmp_path / "raw", raw)
    tissues = {"a": "blood", "b": "skin", "c": "skin", "d": "blood"}
    for number in (0, 1):
        lines = [f"{file},{tissues[Path(file).stem]}" for file in files[2 * number :][:2]]
        text = "\n".join(["path,tissue", *lines]) + "\n"
        (tmp_path / "raw" / f"table{number}.csv").write_text(text)
    tables = [[str(tmp_path / "raw" / f"table{number}.csv")] for number in (0, 1)]
    build_store(store_config(tables[0], tmp_path / "s.zarr"))
    store = append_store(store_config(tables[1], tmp_path / "s.zarr", append=True))
    assert store.header.generations == (120, 120)
    dense = dense_store(store)
    tissue = np.concatenate([part.obs["tissue"].to_numpy(str) for part in stored_parts(store)])
    choices: list[dict[str, Any]] = [
        {},
        {"where": {"tissue": ["skin"]}},
        {"split_by": "source", "split_seed": 3},
        {"weight_by": "tissue", "weights": {"skin": 3.0}},
    ]
    for settings in choices:
        chosen = choose(store, 0.2, **settings)
        seen: Counter[int] = Counter()
        for rank in range(2):
            sampler = CellSampler(chosen.order(0, SMALL), 32, rank, 2, 2)
            loader = CellLoader(CellReader(store), sampler, len(store.panel), BinningConfig())
            for block in (micro for step in loader.cells(1) for micro in step):
                seen.update(block.positions.tolist())
                sums = np.add.reduceat(block.counts.astype(np.int64), block.indptr[:-1])
                np.testing.assert_array_equal(sums, dense[block.positions].sum(axis=1))
        training = positions_of(chosen.training)
        assert set(seen) <= set(training.tolist())
        assert seen.total() == len(training)
        if "weights" in settings:
            often = {
                name: sum(times for cell, times in seen.items() if tissue[cell] == name)
                / (tissue[training] == name).sum()
                for name in ("skin", "blood")
            }
            assert often["skin"] / often["blood"] == pytest.approx(3, rel=0.05)
        else:
            assert set(seen.values()) == {1}
            wanted = settings.get("where", {}).get("tissue", ["skin", "blood"])
            assert set(tissue[training]) == set(wanted)
