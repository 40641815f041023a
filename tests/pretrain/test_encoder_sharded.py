"""A model is made under DeepSpeed's zero.Init: no rank ever holds all of it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pretrain.building import build_model
from pretrain.config import Gene2VecConfig
from pretrain.distributed import Ranks
from pretrain.engine import construction, pretraining_engine
from tests.support.ranks import run_ranks
from tests.support.tiny import ENCODER, NUM_GENES, tiny_config, tiny_panel

GENE2VEC = replace(ENCODER, gene_embedding="gene2vec")


def build(ranks: Ranks, stage: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Build an engine in bf16 as training does; whole weights, and what was held before."""
    content = Path(f"zero{stage}.json").absolute()
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
    content.write_text(json.dumps({"zero_optimization": zero, "bf16": {"enabled": True}}))
    named: dict[str, Any] = {"gene2vec": Gene2VecConfig(vectors="genes.npy")}
    config = tiny_config("store", "output", encoder=GENE2VEC, deepspeed=str(content), **named)
    vectors = torch.randn(NUM_GENES, ENCODER.dim, generator=torch.Generator().manual_seed(0))
    model = build_model(config, tiny_panel(), vectors, construction(config, ranks))
    held = sum(weight.numel() for weight in model.parameters())
    shares = sum(getattr(w, "ds_tensor", w).numel() for w in model.parameters())
    engine = pretraining_engine(model, config, ranks)
    return engine.whole_weights(), {
        "held": held,
        "shares": shares,
        "types": {str(weight.dtype) for weight in engine.model.parameters()},
    }


def build_under_both(ranks: Ranks) -> dict[str, Any]:
    whole, plain = build(ranks, 1)
    sharded, cut = build(ranks, 3)
    assert whole.keys() == sharded.keys()
    differing = [name for name in whole if not torch.equal(whole[name], sharded[name])]
    return {"differing": differing, "plain": plain, "cut": cut}


@pytest.mark.slow
@pytest.mark.multiprocess
def test_weights_are_cut_as_they_are_made_and_are_those_of_every_other_stage(
    tmp_path: Path,
) -> None:
    found = run_ranks(build_under_both, 2, tmp_path)

    assert found[0] == found[1]
    assert found[0]["differing"] == []
    whole = found[0]["plain"]["held"]
    assert whole > 5_000
    assert found[0]["cut"]["held"] == 0
    assert found[0]["cut"]["shares"] < 0.51 * whole
    assert found[0]["cut"]["types"] == {"torch.bfloat16"}
