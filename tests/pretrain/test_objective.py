"""Loss and accuracy, target by target."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import norm
from torch import nn

from pretrain.config import MaskingConfig
from pretrain.encoder import build_encoder
from pretrain.masking import UNKNOWN, MaskedBatch, PackedMaskedBatch, mask_tokens
from pretrain.objective import MaskedGeneModel, to_tensors
from tests.support.tiny import BINNING, ENCODER, NUM_GENES

CPU = torch.device("cpu")


def build() -> MaskedGeneModel:
    torch.manual_seed(0)
    return MaskedGeneModel(build_encoder(ENCODER, BINNING, NUM_GENES, seed=0))


@pytest.fixture
def sums_up() -> MaskedGeneModel:
    """With a cell objective and spread variances."""
    torch.manual_seed(0)
    encoder = build_encoder(ENCODER, BINNING, NUM_GENES, seed=0)
    model = MaskedGeneModel(encoder, sums_up=True)
    assert model.cell_head is not None
    nn.init.normal_(model.cell_head.log_variance)
    return model


def masked(num_cells: int, expressed: bool = True) -> MaskedBatch:
    tokens = np.random.default_rng(0).integers(0, 6, (num_cells, NUM_GENES)) * expressed
    positions = np.arange(num_cells)
    masking = MaskingConfig(ratio=0.3)
    return mask_tokens(tokens.astype(np.uint8), positions, 0, 0, masking, BINNING)


def test_sums_equal_a_loop_over_targets() -> None:
    model, batch = build(), masked(6)

    loss, correct, _ = model(*to_tensors(batch, CPU))

    expected_loss, expected_correct = 0.0, 0
    with torch.no_grad():
        logits = model.head(model.encoder(torch.from_numpy(batch.inputs))).double()
    for cell, gene, target in zip(batch.cells, batch.genes, batch.targets, strict=True):
        scores = logits[cell, gene]
        expected_loss += float(nn.functional.cross_entropy(scores, torch.tensor(int(target))))
        expected_correct += int(scores.argmax()) == target
    assert len(batch.targets) > 30
    np.testing.assert_allclose(loss.item(), expected_loss, rtol=1e-6)  # worst 5.0e-8
    assert int(correct) == expected_correct
    assert loss.requires_grad


def test_cell_objective_equals_a_loop_over_genes(sums_up: MaskedGeneModel) -> None:
    batch = masked(5)
    whole = np.random.default_rng(1).integers(0, 6, (5, NUM_GENES)).astype(np.uint8)
    whole[1, 3:9] = UNKNOWN
    whole[4] = UNKNOWN

    *plain, cell = sums_up(*to_tensors(replace(batch, whole=whole), CPU))

    assert cell.item() == pytest.approx(nats_by_hand(sums_up, batch, whole), rel=1e-5)
    *without, nothing = sums_up(*to_tensors(batch, CPU))
    for ours, expected in zip(plain, without, strict=True):
        torch.testing.assert_close(ours, expected)
    assert nothing.item() == 0


def nats_by_hand(model: MaskedGeneModel, batch: MaskedBatch, whole: NDArray[np.uint8]) -> float:
    """Each cell's mean over its known genes, as often as it has targets."""
    assert model.cell_head is not None
    with torch.no_grad():
        states = model.encoder(torch.from_numpy(batch.inputs))[:, -1]
        means = model.cell_head.mean(states).double().numpy()
    deviations = np.exp(model.cell_head.log_variance.detach().double().numpy() / 2)
    total = 0.0
    for cell, bins in enumerate(whole):
        known = np.flatnonzero(bins != UNKNOWN)
        nats = [
            -norm.logpdf(bins[gene], means[cell, gene], deviations[gene]) - np.log(2 * np.pi) / 2
            for gene in known
        ]
        total += (batch.cells == cell).sum() * (np.mean(nats) if len(known) else 0)
    return float(total)


def test_cell_objective_of_packed_cells_is_that_of_whole_ones(sums_up: MaskedGeneModel) -> None:
    batch = masked(4)
    whole = np.random.default_rng(1).integers(0, 6, (4, NUM_GENES)).astype(np.uint8)
    length = NUM_GENES + 1
    tokens = np.pad(batch.inputs, ((0, 0), (0, 1))).ravel()
    packed = PackedMaskedBatch(
        tokens,
        np.tile(np.arange(length), 4),
        np.arange(5) * length,
        batch.cells,
        batch.cells * length + batch.genes,
        batch.targets,
        whole=whole,
    )

    ours = sums_up(*to_tensors(packed, CPU))
    expected = sums_up(*to_tensors(replace(batch, whole=whole), CPU))

    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other)
    ours.cell.backward()
    for name, weight in sums_up.named_parameters():
        if not name.startswith("head."):
            assert weight.grad is not None, name
            assert weight.grad.any(), name


def test_cells_without_targets_have_no_cell_objective(sums_up: MaskedGeneModel) -> None:
    for batch in (masked(3, expressed=False), masked(0)):
        whole = np.zeros_like(batch.inputs)
        found = sums_up(*to_tensors(replace(batch, whole=whole), CPU))
        (found.loss + found.cell).backward()
        assert found.cell.item() == 0
        for name, weight in sums_up.named_parameters():
            assert weight.grad is not None, name
            assert not weight.grad.any(), name


def test_head_names_every_token() -> None:
    assert build().head.out_features == BINNING.num_tokens


def check_nothing_to_learn(batch: MaskedBatch) -> None:
    model = build()

    loss, correct, _ = model(*to_tensors(batch, CPU))
    loss.backward()

    assert loss.item() == 0.0
    assert int(correct) == 0
    for name, weight in model.named_parameters():
        assert weight.grad is not None, name
        assert not weight.grad.any(), name  # NaN would count as true


def test_cells_without_targets_give_zero_loss_and_gradient() -> None:
    check_nothing_to_learn(masked(3, expressed=False))


def test_no_cells_give_zero_loss_and_gradient() -> None:
    check_nothing_to_learn(masked(0))


def test_to_tensors_keeps_values_and_types() -> None:
    batch = masked(2)

    inputs, read, targets = to_tensors(batch, CPU)

    assert inputs is not None
    assert read is not None
    assert targets is not None
    assert (inputs.dtype, read.dtype, targets.dtype) == (torch.uint8, torch.int64, torch.uint8)
    np.testing.assert_array_equal(inputs, batch.inputs)
    np.testing.assert_array_equal(read // (NUM_GENES + 1), batch.cells)
    np.testing.assert_array_equal(read % (NUM_GENES + 1), batch.genes)
    np.testing.assert_array_equal(targets, batch.targets)
