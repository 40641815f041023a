"""Held-out metrics against a loop over targets."""

from itertools import pairwise
from typing import Any, cast

import numpy as np
import pytest
import torch

from datastore.binning import tokenize
from datastore.loader import TokenBatch
from pretrain.config import PretrainConfig
from pretrain.distributed import Ranks
from pretrain.encoder import build_encoder
from pretrain.engine import TrainingEngine
from pretrain.evaluate import evaluate
from pretrain.masking import commonest_bins, mask_tokens
from pretrain.objective import MaskedGeneModel
from tests.support.tiny import BINNING, ENCODER, NUM_GENES, tiny_config, tiny_counts

ALONE = Ranks(0, 1, 0, torch.device("cpu"))
CONFIG: PretrainConfig = tiny_config("s", "o")


class PlainEngine:
    """A model without DeepSpeed that remembers how it was called."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = MaskedGeneModel(build_encoder(ENCODER, BINNING, NUM_GENES, seed=0))
        self.modes: list[bool] = []

    def __call__(self, *inputs: torch.Tensor) -> Any:
        assert self.modes == [False]
        assert not torch.is_grad_enabled()
        return self.model(*inputs)

    def train(self, mode: bool = True) -> None:
        self.modes.append(mode)


def batch(positions: range) -> TokenBatch:
    rows = np.array(positions, np.int64)
    counts = tiny_counts()[rows]
    cells, genes = np.nonzero(counts)
    indptr = np.searchsorted(cells, np.arange(len(rows) + 1))
    return TokenBatch(rows, tokenize(indptr, genes, counts[cells, genes], NUM_GENES, BINNING))


@pytest.mark.parametrize("cuts", [[0, 10], [0, 3, 3, 10], [0, 4, 8, 10]])
def test_equals_a_loop_whatever_the_batches(cuts: list[int]) -> None:
    engine = PlainEngine()
    batches = [batch(range(a, b)) for a, b in pairwise(cuts)]

    metrics = evaluate(cast(TrainingEngine, engine), batches, CONFIG, ALONE)

    losses, correct, rule = [], [], []
    for position in range(10):
        one = batch(range(position, position + 1))
        masked = mask_tokens(one.tokens, one.positions, CONFIG.seed, -1, CONFIG.masking, BINNING)
        with torch.no_grad():
            scores = engine.model.head(engine.model.encoder(torch.from_numpy(masked.inputs)))[0]
        rule += list(commonest_bins(masked, BINNING) == masked.targets)
        for gene, target in zip(masked.genes, masked.targets, strict=True):
            losses.append(-float(scores[gene].double().log_softmax(0)[target]))
            correct.append(int(scores[gene].argmax()) == target)
    assert metrics == {
        "validation_loss": pytest.approx(np.mean(losses), rel=1e-6),  # worst 1e-7
        "validation_masked_accuracy": pytest.approx(np.mean(correct)),
        "validation_commonest_bin_accuracy": pytest.approx(np.mean(rule)),
    }
    assert engine.modes == [False, True]


@pytest.mark.parametrize("batches", [[], [batch(range(0))]], ids=["no batch", "no cells"])
def test_nothing_held_out_gives_no_metrics(batches: list[TokenBatch]) -> None:
    assert evaluate(cast(TrainingEngine, PlainEngine()), batches, CONFIG, ALONE) == {}
