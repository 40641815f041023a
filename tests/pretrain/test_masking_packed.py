"""Packed cells hide the genes that dense cells hide, and show zeros that were drawn for them."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from numpy.typing import NDArray

from datastore.loader import PackedBatch, TokenBatch
from pretrain.config import EncoderConfig, MaskingConfig, PretrainConfig
from pretrain.embedding import HIDDEN
from pretrain.masking import (
    MaskedBatch,
    Measured,
    PackedMaskedBatch,
    commonest_bins,
    mask_batch,
    mask_packed,
    mask_tokens,
)

NUM_GENES = 40


def config(num_zeros: int = 0, seed: int = 0, zeros: float = 0) -> PretrainConfig:
    encoder = EncoderConfig(sequence="expressed", num_zeros=num_zeros)
    masking = MaskingConfig(ratio=0.3, keep_share=0.2, zeros=zeros)
    return PretrainConfig(store="s", output="o", encoder=encoder, masking=masking, seed=seed)


def cells(*expressed: int) -> tuple[NDArray[np.uint8], PackedBatch]:
    """Tokens (B, G), and the same cells packed, with some counts in bin 0 among them."""
    rng = np.random.default_rng(0)
    tokens = np.zeros((len(expressed), NUM_GENES), np.uint8)
    stored = np.zeros((len(expressed), NUM_GENES), bool)
    for row, number in enumerate(expressed):
        genes = rng.choice(NUM_GENES, number, replace=False)
        tokens[row, genes] = rng.integers(1, 6, number)
        stored[row, rng.choice(NUM_GENES, 5, replace=False)] = True
    stored |= tokens > 0
    at = np.nonzero(stored)
    offsets = np.searchsorted(at[0], np.arange(len(expressed) + 1))
    positions = np.array([10**12, 5, 17, 2, 900, 6])[: len(expressed)]
    return tokens, PackedBatch(positions, offsets, at[1].astype(np.uint16), tokens[at])


def dense(batch: PackedMaskedBatch) -> NDArray[np.uint8]:
    """Spread packed inputs over the panel, (B, G)."""
    spread = np.zeros((len(batch.offsets) - 1, NUM_GENES + 1), np.uint8)
    for cell, (start, stop) in enumerate(pairwise(batch.offsets)):
        assert len(set(batch.genes[start:stop])) == stop - start
        assert (batch.genes[stop - 1], batch.inputs[stop - 1]) == (NUM_GENES, 0)
        spread[cell, batch.genes[start:stop]] = batch.inputs[start:stop]
    return spread[:, :-1]


def measured(positions: NDArray[np.int64]) -> NDArray[np.bool_]:
    """All genes but a few, others in each cell."""
    return (positions[:, None] + np.arange(NUM_GENES)) % 5 > 0


@pytest.mark.parametrize("of", [None, measured])
@pytest.mark.parametrize(
    ("num_zeros", "zeros"), [(0, 0), (3, 0), (100, 0), (0, 1), (3, 2), (0, 50)]
)
def test_hidden_genes_targets_and_rule_are_those_of_dense_cells(
    num_zeros: int, zeros: float, of: Measured | None
) -> None:
    settings = config(num_zeros, zeros=zeros)
    tokens, packed = cells(40, 12, 0, 33, 25, 1)

    ours = mask_packed(packed, 4, settings, NUM_GENES, of)
    theirs = mask_tokens(
        tokens, packed.positions, settings.seed, 4, settings.masking, settings.binning, of
    )

    np.testing.assert_array_equal(dense(ours), theirs.inputs)
    order = np.lexsort((ours.genes[ours.read], ours.cells))  # zeros come last in packed cells
    np.testing.assert_array_equal(ours.cells, theirs.cells)
    np.testing.assert_array_equal(ours.genes[ours.read][order], theirs.genes)
    np.testing.assert_array_equal(ours.targets[order], theirs.targets)
    assert (np.diff(ours.read) > 0).all()
    np.testing.assert_array_equal(
        commonest_bins(ours, settings.binning, zeros)[order],
        commonest_bins(theirs, settings.binning, zeros),
    )


@pytest.mark.parametrize("zeros", [0.5, 1, 3])
def test_zeros_become_targets_in_proportion_and_most_are_hidden(zeros: float) -> None:
    tokens, packed = cells(12, 10, 0, 20)
    visible: list[bool] = []
    for draw in range(200):
        batch = mask_packed(packed, draw, config(zeros=zeros), NUM_GENES, measured)
        is_zero = batch.targets == 0
        of_zero = batch.genes[batch.read[is_zero]]
        assert (tokens[batch.cells[is_zero], of_zero] == 0).all()
        assert measured(packed.positions)[batch.cells[is_zero], of_zero].all()
        visible += list(batch.inputs[batch.read[is_zero]] == 0)
        targets = np.bincount(batch.cells[is_zero], minlength=len(tokens))
        expected = np.rint(np.array([4, 3, 0, 6]) * zeros)  # 0.3 of the expressed genes
        absent = (measured(packed.positions) & (tokens == 0)).sum(axis=1)
        np.testing.assert_array_equal(targets, np.minimum(expected, absent))
    assert np.mean(visible) == pytest.approx(0.2, abs=4 * (0.2 * 0.8 / len(visible)) ** 0.5)


def test_shown_zeros_are_measured_and_no_targets() -> None:
    _, packed = cells(12, 30)

    batch = mask_packed(packed, 0, config(5, zeros=1), NUM_GENES, measured)

    zero = np.flatnonzero((batch.inputs == 0) & (batch.genes < NUM_GENES))
    of_cell = np.searchsorted(batch.offsets, zero, side="right") - 1
    assert measured(packed.positions)[of_cell, batch.genes[zero]].all()
    shown = np.setdiff1d(zero, batch.read)
    assert np.bincount(np.searchsorted(batch.offsets, shown, side="right") - 1)[0] == 5


def test_rule_says_zero_where_zeros_are_commonest() -> None:
    _, packed = cells(30, 30)
    batch = mask_packed(packed, 0, config(zeros=1), NUM_GENES)
    binning = config().binning

    assert (commonest_bins(batch, binning, 1) == 0).all()
    plain = mask_packed(packed, 0, config(), NUM_GENES)
    np.testing.assert_array_equal(
        commonest_bins(plain, binning, 1e-9), commonest_bins(plain, binning)
    )


@pytest.mark.parametrize(("num_zeros", "expected"), [(0, [0] * 6), (3, [0, 3, 3, 3, 3, 3])])
def test_so_many_zeros_as_were_asked_for(num_zeros: int, expected: list[int]) -> None:
    tokens, packed = cells(40, 12, 0, 33, 25, 1)

    batch = mask_packed(packed, 0, config(num_zeros), NUM_GENES)

    zeros = [
        int((batch.inputs[start : stop - 1] == 0).sum()) for start, stop in pairwise(batch.offsets)
    ]
    assert zeros == expected
    lengths = (tokens > 0).sum(axis=1) + expected + 1
    np.testing.assert_array_equal(np.diff(batch.offsets), lengths)


def test_a_cell_has_all_its_zeros_if_it_has_fewer() -> None:
    _, packed = cells(38, 0)

    batch = mask_packed(packed, 0, config(20), NUM_GENES)

    np.testing.assert_array_equal(np.diff(batch.offsets), [38 + 2 + 1, 20 + 1])


def test_zeros_change_with_seed_and_draw_and_not_with_the_batch() -> None:
    _, packed = cells(40, 12, 0, 33, 25, 1)
    _, alone = cells(40, 12)
    first = mask_packed(packed, 0, config(5), NUM_GENES)

    same = mask_packed(alone, 0, config(5), NUM_GENES)
    np.testing.assert_array_equal(same.genes, first.genes[: len(same.genes)])
    for other in (
        mask_packed(packed, 1, config(5), NUM_GENES),
        mask_packed(packed, 0, config(5, seed=1), NUM_GENES),
    ):
        assert not np.array_equal(first.genes, other.genes)


def test_every_absent_gene_is_as_likely_a_zero() -> None:
    _, packed = cells(10)
    absent = np.setdiff1d(np.arange(NUM_GENES), packed.genes[packed.bins > 0])
    times = np.zeros(NUM_GENES, np.int64)
    for draw in range(1_000):
        batch = mask_packed(packed, draw, config(6), NUM_GENES)
        times[batch.genes[:-1][batch.inputs[:-1] == 0]] += 1

    assert times[absent].sum() == times.sum() == 6_000
    # Binomial: 1,000 × 6 / 30.
    assert np.abs(times[absent] - 200).max() < 4.5 * (1_000 * 0.2 * 0.8) ** 0.5


def test_no_cells() -> None:
    _, packed = cells()

    batch = mask_packed(packed, 0, config(3), NUM_GENES)

    assert batch.offsets.tolist() == [0]
    assert len(batch.inputs) == len(batch.genes) == len(batch.targets) == len(batch.read) == 0
    assert len(commonest_bins(batch, config().binning)) == 0


@pytest.mark.parametrize("num_zeros", [0, 3])
def test_values_are_hidden_where_tokens_are(num_zeros: int) -> None:
    _, packed = cells(40, 12, 0, 33, 25, 1)
    values = (packed.bins + 0.25).astype(np.float32)
    with_values = replace(packed, values=values)

    batch = mask_packed(with_values, 0, config(num_zeros), NUM_GENES)
    plain = mask_packed(packed, 0, config(num_zeros), NUM_GENES)

    assert batch.values is not None
    hidden = batch.inputs == 6
    assert (batch.values[hidden] == HIDDEN).all()
    assert hidden.sum() == (plain.inputs == 6).sum() > 0
    np.testing.assert_array_equal(batch.genes[batch.read], plain.genes[plain.read])
    np.testing.assert_array_equal(batch.targets, plain.targets)
    # Genes of bin 0 that were counted are seen, too: 0.25; those that were not are 0.
    low = np.isclose(batch.values, 0.25)
    assert low.sum() == (packed.bins == 0).sum() > 0
    rest = ~hidden & ~low & (batch.inputs > 0)
    np.testing.assert_array_equal(batch.values[rest], batch.inputs[rest] + 0.25)


def test_values_of_whole_cells_are_hidden_where_tokens_are() -> None:
    tokens, packed = cells(12, 30)
    values = tokens.astype(np.float32) + 0.5
    settings = replace(config(), encoder=EncoderConfig(expression="continuous"))

    batch = mask_batch(TokenBatch(packed.positions, tokens, values), 0, settings, NUM_GENES)

    assert batch.values is not None
    hidden = batch.inputs == 6
    assert (batch.values[hidden] == HIDDEN).all()
    np.testing.assert_array_equal(batch.values[~hidden], values[~hidden])
    assert hidden.any()


def test_batches_are_masked_in_the_form_they_come_in() -> None:
    tokens, packed = cells(12, 30)
    settings = replace(config(), encoder=EncoderConfig())

    assert isinstance(mask_batch(packed, 0, config(), NUM_GENES), PackedMaskedBatch)
    whole = mask_batch(TokenBatch(packed.positions, tokens), 0, settings, NUM_GENES)
    assert isinstance(whole, MaskedBatch)
    np.testing.assert_array_equal(
        whole.inputs,
        mask_tokens(tokens, packed.positions, 0, 0, settings.masking, settings.binning).inputs,
    )
