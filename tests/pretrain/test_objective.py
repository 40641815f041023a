"""Loss and accuracy, target by target."""

import numpy as np
import torch
from torch import nn

from pretrain.config import MaskingConfig
from pretrain.encoder import build_encoder
from pretrain.masking import MaskedBatch, mask_tokens
from pretrain.objective import MaskedGeneModel, to_tensors
from tests.support.tiny import BINNING, ENCODER, NUM_GENES

CPU = torch.device("cpu")


def build() -> MaskedGeneModel:
    torch.manual_seed(0)
    return MaskedGeneModel(build_encoder(ENCODER, BINNING, NUM_GENES, seed=0))


def masked(num_cells: int, expressed: bool = True) -> MaskedBatch:
    tokens = np.random.default_rng(0).integers(0, 6, (num_cells, NUM_GENES)) * expressed
    positions = np.arange(num_cells)
    masking = MaskingConfig(ratio=0.3)
    return mask_tokens(tokens.astype(np.uint8), positions, 0, 0, masking, BINNING)


def test_sums_equal_a_loop_over_targets() -> None:
    model, batch = build(), masked(6)

    loss, correct = model(*to_tensors(batch, CPU))

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


def test_head_names_every_token() -> None:
    assert build().head.out_features == BINNING.num_tokens


def check_nothing_to_learn(batch: MaskedBatch) -> None:
    model = build()

    loss, correct = model(*to_tensors(batch, CPU))
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

    assert (inputs.dtype, read.dtype, targets.dtype) == (torch.uint8, torch.int64, torch.uint8)
    np.testing.assert_array_equal(inputs, batch.inputs)
    np.testing.assert_array_equal(read // (NUM_GENES + 1), batch.cells)
    np.testing.assert_array_equal(read % (NUM_GENES + 1), batch.genes)
    np.testing.assert_array_equal(targets, batch.targets)
