"""The encoder can be made under DeepSpeed's zero.Init: no rank ever holds all of it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pretrain.distributed import Ranks
from pretrain.encoder import build_encoder
from tests.support.ranks import run_ranks
from tests.support.tiny import BINNING, ENCODER, NUM_GENES

GENE2VEC = replace(ENCODER, gene_embedding="gene2vec")


def build_sharded(ranks: Ranks) -> dict[str, float]:
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    vectors = torch.randn(NUM_GENES, ENCODER.dim, generator=torch.Generator().manual_seed(0))
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3},
        "bf16": {"enabled": True},
    }
    whole = build_encoder(GENE2VEC, BINNING, NUM_GENES, 3, vectors)
    init = deepspeed.zero.Init(config_dict_or_path=config)
    sharded = build_encoder(GENE2VEC, BINNING, NUM_GENES, 3, vectors, init)
    held = sum(weight.numel() for weight in sharded.parameters())
    buffers = dict(sharded.named_buffers())
    projections = [
        float((buffers[name].float() - value).abs().max() / value.abs().max())
        for name, value in whole.named_buffers()
        if name.endswith("projection_matrix")
    ]
    assert sharded.genes is not None
    with deepspeed.zero.GatheredParameters(list(sharded.parameters())):
        table = sharded.genes.weight.float()
        difference = float((table[:-1] - vectors).abs().max())
        numbers = sum(weight.numel() for weight in sharded.parameters())
    return {
        "held": held,
        "numbers": numbers,
        "table": difference,
        "constant": float(table[-1].abs().max()),
        "projections": max(projections),
    }


@pytest.mark.slow
@pytest.mark.multiprocess
def test_weights_are_cut_as_they_are_made_and_projections_drawn_whole(tmp_path: Path) -> None:
    found = run_ranks(build_sharded, 2, tmp_path)

    assert found[0] == found[1]
    assert found[0]["held"] == 0
    assert found[0]["numbers"] > 5_000
    assert found[0]["constant"] == 0
    # bf16 keeps 8 bits.
    assert found[0]["table"] < 2**-7
    assert found[0]["projections"] < 2**-8
