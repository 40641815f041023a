"""Classifiers on encoders of expressed genes, of continuous values, and of both."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import sparse

from finetune.classifier import CellClassifier, load_classifier, predict, save_classifier
from finetune.config import HeadConfig
from pretrain.config import EncoderConfig
from pretrain.encoder import build_encoder
from tests.support.tiny import BINNING, ENCODER, NUM_GENES, tiny_counts, tiny_panel

EXPRESSED = replace(ENCODER, sequence="expressed")
CONTINUOUS = replace(ENCODER, expression="continuous")
BOTH = replace(EXPRESSED, expression="continuous")


@pytest.mark.parametrize("config", [EXPRESSED, CONTINUOUS, BOTH])
def test_predictions_are_a_cells_own_and_survive_saving(
    config: EncoderConfig, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    encoder = build_encoder(config, BINNING, NUM_GENES, seed=0)
    model = CellClassifier(encoder, ("a", "b", "c"), HeadConfig(hidden=8, bottleneck=4)).eval()
    counts = tiny_counts(9)
    counts[4] = 0
    matrix = sparse.csr_matrix(counts)

    together = predict(model, matrix, batch_size=9)
    alone = predict(model, matrix, batch_size=1)
    save_classifier(tmp_path / "export", model, tiny_panel(), {})
    loaded, export = load_classifier(tmp_path / "export")

    np.testing.assert_allclose(alone.probabilities, together.probabilities, atol=1e-6)
    assert np.isfinite(together.probabilities).all()
    assert export.encoder_config.architecture() == config.architecture()
    again = predict(loaded, matrix, batch_size=4)
    np.testing.assert_allclose(again.probabilities, together.probabilities, atol=1e-6)
    assert len(np.unique(together.probabilities.round(6), axis=0)) > 4
