"""Which genes are hidden: by hand, by statistics, and independent of everything else."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from datastore.config import BinningConfig
from pretrain.config import MaskingConfig
from pretrain.masking import MaskedBatch, commonest_bins, mask_tokens

BINNING = BinningConfig()
MASKING = MaskingConfig(ratio=0.15, keep_share=0.1)


def cells_with(*expressed: int, num_genes: int = 40) -> NDArray[np.uint8]:
    """Tokens, (B, G): a cell for each number of expressed genes, at random genes."""
    rng = np.random.default_rng(0)
    tokens = np.zeros((len(expressed), num_genes), np.uint8)
    for row, number in enumerate(expressed):
        genes = rng.choice(num_genes, number, replace=False)
        tokens[row, genes] = rng.integers(1, 6, number)
    return tokens


def mask(
    tokens: NDArray[np.uint8],
    positions: NDArray[np.int64] | None = None,
    seed: int = 0,
    epoch: int = 0,
    masking: MaskingConfig = MASKING,
) -> MaskedBatch:
    if positions is None:
        positions = np.arange(len(tokens))
    return mask_tokens(tokens, positions, seed, epoch, masking, BINNING)


@pytest.mark.parametrize(
    ("expressed", "ratio", "expected"),
    [
        pytest.param(0, 0.15, 0, id="nothing expressed"),
        pytest.param(1, 0.15, 1, id="at least one"),
        pytest.param(3, 0.15, 1, id="0.45, at least one"),
        pytest.param(9, 0.15, 1, id="1.35"),
        pytest.param(11, 0.15, 2, id="1.65"),
        pytest.param(20, 0.15, 3, id="3 exactly"),
        pytest.param(40, 0.15, 6, id="all genes expressed"),
        pytest.param(40, 0.5, 20, id="half"),
        pytest.param(40, 0.99, 40, id="39.6, all of them"),
    ],
)
def test_number_of_targets(expressed: int, ratio: float, expected: int) -> None:
    batch = mask(cells_with(20, expressed, 7), masking=MaskingConfig(ratio=ratio))

    assert int((batch.cells == 1).sum()) == expected


def test_targets_are_the_true_bins_of_expressed_genes() -> None:
    tokens = cells_with(*range(41))

    batch = mask(tokens)

    assert batch.targets.min() >= 1
    np.testing.assert_array_equal(batch.targets, tokens[batch.cells, batch.genes])
    assert len(set(zip(batch.cells, batch.genes, strict=True))) == len(batch.targets)
    changed = batch.inputs != tokens
    assert set(batch.inputs[changed]) == {BINNING.mask_token}
    targets = np.zeros(tokens.shape, bool)
    targets[batch.cells, batch.genes] = True
    assert not (changed & ~targets).any()


def test_tokens_handed_in_stay_as_they_are() -> None:
    tokens = cells_with(20, 30)
    before = tokens.copy()

    mask(tokens)

    np.testing.assert_array_equal(tokens, before)


@pytest.mark.parametrize("keep_share", [0.0, 0.1, 0.6])
def test_share_of_targets_that_stay_visible(keep_share: float) -> None:
    batch = mask(cells_with(*[40] * 1_000), masking=MaskingConfig(ratio=0.5, keep_share=keep_share))

    kept = batch.inputs[batch.cells, batch.genes] == batch.targets
    deviation = (keep_share * (1 - keep_share) / len(kept)) ** 0.5  # 20,000 targets
    assert abs(kept.mean() - keep_share) <= 4 * deviation


def test_every_gene_is_as_likely_a_target() -> None:
    batch = mask(cells_with(*[40] * 4_000), masking=MaskingConfig(ratio=0.25))

    times = np.bincount(batch.genes, minlength=40)  # binomial: 4,000 × 1/4
    assert np.abs(times - 1_000).max() < 4.5 * (4_000 * 0.25 * 0.75) ** 0.5


def test_cell_without_expressed_genes_has_no_target() -> None:
    batch = mask(cells_with(0, 0))

    assert len(batch.targets) == len(batch.cells) == len(batch.genes) == 0
    assert not batch.inputs.any()


def test_no_cells() -> None:
    batch = mask(np.zeros((0, 40), np.uint8), np.zeros(0, np.int64))

    assert batch.inputs.shape == (0, 40)
    assert len(batch.targets) == 0
    assert len(commonest_bins(batch, BINNING)) == 0


def test_a_cell_does_not_depend_on_its_batch_place_or_order() -> None:
    tokens = cells_with(40, 12, 0, 33, 25, 1)
    positions = np.array([10**12, 5, 17, 2, 900, 6])
    together = mask(tokens, positions)
    order = np.array([4, 0, 3, 5, 2, 1])

    shuffled = mask(tokens[order], positions[order])
    np.testing.assert_array_equal(shuffled.inputs, together.inputs[order])
    for row in range(len(tokens)):
        alone = mask(tokens[row : row + 1], positions[row : row + 1])
        np.testing.assert_array_equal(alone.inputs[0], together.inputs[row])
        mine = together.cells == row
        np.testing.assert_array_equal(alone.genes, together.genes[mine])
        np.testing.assert_array_equal(alone.targets, together.targets[mine])


@pytest.mark.parametrize(
    "other",
    [
        pytest.param({"seed": 1}, id="seed"),
        pytest.param({"epoch": 1}, id="epoch"),
        pytest.param({"epoch": -1}, id="held-out cells"),
        pytest.param({"positions": np.arange(2) + 1}, id="cell"),
    ],
)
def test_targets_change_with(other: dict[str, object]) -> None:
    tokens = cells_with(40, 40)

    first, second = mask(tokens), mask(tokens, **other)  # type: ignore[arg-type]

    assert not np.array_equal(first.genes, second.genes)
    assert np.array_equal(first.genes, mask(tokens).genes)


def test_one_dimensional_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(40,\)"):
        mask(np.ones(40, np.uint8), np.arange(1))


@pytest.mark.parametrize(
    ("field", "value"), [("ratio", 0.0), ("ratio", 1.0), ("keep_share", -0.1), ("keep_share", 1.0)]
)
def test_impossible_shares_are_refused(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"masking.{field} is {value}"):
        replace(MASKING, **{field: value})


def test_commonest_bins_equals_a_loop() -> None:
    tokens = np.random.default_rng(0).integers(0, 6, (50, 12)).astype(np.uint8)
    batch = mask(tokens, masking=MaskingConfig(ratio=0.4, keep_share=0.3))

    expected = []
    for cell in batch.cells:
        visible = Counter(int(token) for token in batch.inputs[cell] if 1 <= token <= 5)
        most = max(visible.values(), default=0)
        lowest = min((token for token, times in visible.items() if times == most), default=1)
        expected.append(lowest)

    np.testing.assert_array_equal(commonest_bins(batch, BINNING), expected)


def test_commonest_bin_of_a_cell_without_visible_genes_is_one() -> None:
    tokens = np.array([[0, 4, 0]], np.uint8)

    batch = mask(tokens, masking=MaskingConfig(keep_share=0.0))

    assert batch.inputs.tolist() == [[0, 6, 0]]
    assert commonest_bins(batch, BINNING).tolist() == [1]
