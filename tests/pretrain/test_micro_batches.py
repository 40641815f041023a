"""Pieces of at most so many tokens: nothing lost, none too long, as many on every rank."""

from dataclasses import replace
from typing import cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from datastore.loader import PackedBatch
from pretrain.config import BatchConfig, EncoderConfig, PretrainConfig
from pretrain.distributed import Ranks
from pretrain.micro_batches import cut_by_tokens, micro_batches, piece_ends, token_counts

ALONE = Ranks(0, 1, 0, torch.device("cpu"))


def config(tokens: int | None = 12, num_zeros: int = 0) -> PretrainConfig:
    encoder = EncoderConfig(sequence="expressed", num_zeros=num_zeros)
    batch = BatchConfig(global_size=8, micro_size=8, tokens=tokens)
    return PretrainConfig(store="s", output="o", encoder=encoder, batch=batch)


def packed(*expressed: int) -> PackedBatch:
    """Cells with so many genes of bin 1 or more, and one of bin 0 each."""
    lengths = np.array(expressed, np.int64) + 1
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    bins = np.array([code for number in expressed for code in (0, *[3] * number)], np.uint8)
    genes = np.arange(len(bins), dtype=np.uint16)
    positions = np.arange(len(expressed)) + 100
    return PackedBatch(positions, offsets, genes, bins)


class FakeRanks:
    """Ranks of which another one needs `other` pieces."""

    def __init__(self, other: int) -> None:
        self._other = other

    def gather(self, value: float) -> list[float]:
        return [value, self._other]


def test_token_counts_by_hand() -> None:
    np.testing.assert_array_equal(token_counts(packed(4, 0, 7), config()), [5, 1, 8])
    np.testing.assert_array_equal(token_counts(packed(4, 0, 7), config(num_zeros=3)), [8, 4, 11])


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        pytest.param([], [], id="no cells"),
        pytest.param([12], [1], id="just fits"),
        pytest.param([6, 6, 1], [2, 3], id="full, then one more"),
        pytest.param([5, 5, 5, 5], [2, 4], id="two and two"),
        pytest.param([1, 50, 1], [1, 2, 3], id="too long goes alone"),
        pytest.param([50], [1], id="too long at first"),
    ],
)
def test_pieces_are_filled_in_turn(lengths: list[int], expected: list[int]) -> None:
    assert piece_ends(np.array(lengths, np.int64), 12) == expected


def joined(pieces: list[PackedBatch], name: str) -> NDArray[np.generic]:
    return np.concatenate([getattr(piece, name) for piece in pieces])


@pytest.mark.parametrize("num_zeros", [0, 4])
def test_pieces_are_the_cells_in_order(num_zeros: int) -> None:
    lengths = np.random.default_rng(0).integers(0, 12, 40).tolist()
    whole = packed(*lengths)

    pieces = cut_by_tokens(whole, config(12, num_zeros), ALONE)

    for name in ("positions", "genes", "bins"):
        np.testing.assert_array_equal(joined(pieces, name), getattr(whole, name))
    np.testing.assert_array_equal(
        np.concatenate([np.diff(piece.offsets) for piece in pieces]), np.diff(whole.offsets)
    )
    assert len(pieces) > 10
    for piece in pieces:
        assert piece.offsets[0] == 0
        total = token_counts(piece, config(12, num_zeros)).sum()
        assert total <= 12 or len(piece.positions) == 1


def test_every_rank_has_as_many_pieces() -> None:
    pieces = cut_by_tokens(packed(8, 8), config(), cast(Ranks, FakeRanks(5)))

    assert [len(piece.positions) for piece in pieces] == [1, 1, 0, 0, 0]
    assert all(piece.offsets.tolist() == [0] for piece in pieces[2:])
    assert len(cut_by_tokens(packed(), config(), ALONE)) == 1, "a rank without cells runs, too"


def test_without_a_budget_the_loaders_micro_batches_stay() -> None:
    batches = [packed(3), packed(30, 2)]

    assert micro_batches(batches, config(None), ALONE) == batches
    assert len(micro_batches(batches[1:], config(), ALONE)) == 2


def test_a_budget_is_for_expressed_genes() -> None:
    with pytest.raises(ValueError, match=r"batch\.tokens is 12, but encoder\.sequence is full"):
        replace(config(), encoder=EncoderConfig())


def test_impossible_budgets_are_refused() -> None:
    with pytest.raises(ValueError, match=r"batch\.tokens is 0; give 1 or more"):
        BatchConfig(tokens=0)
    with pytest.raises(ValueError, match="not a multiple of"):
        BatchConfig(global_size=8, micro_size=3).accumulation_steps(1)


def test_a_budget_needs_no_micro_size() -> None:
    batch = BatchConfig(global_size=8, micro_size=3, tokens=100)

    assert batch.accumulation_steps(1) == batch.accumulation_steps(3) == 1
