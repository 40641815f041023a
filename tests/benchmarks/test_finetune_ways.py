"""Ways of fine-tuning: adapters begin as nothing, rates fall towards the input."""

import torch
from torch import nn

from benchmarks.finetune_ways import BASE, DECAY, adapter_groups, layer_groups, table_of
from datastore.config import BinningConfig
from finetune.classifier import CellClassifier
from pretrain.config import EncoderConfig
from pretrain.encoder import build_encoder


def classifier() -> CellClassifier:
    shape = EncoderConfig(dim=16, depth=2, heads=1, dim_head=16, gene_embedding="learned")
    encoder = build_encoder(shape, BinningConfig(), 30, seed=0)
    return CellClassifier(encoder, ("a", "b"), BASE.head).eval()


def test_adapters_begin_as_nothing_and_learn_alone() -> None:
    model, tokens = classifier(), torch.randint(0, 6, (3, 30))
    before = model(tokens)[0]
    kept = {id(weight): weight.detach().clone() for weight in model.encoder.parameters()}
    (group,) = adapter_groups(model)
    torch.testing.assert_close(model(tokens)[0], before)
    model(tokens)[0].square().sum().backward()
    learning = {id(weight) for weight in group["params"]}
    own = [weight for weight in model.encoder.parameters() if id(weight) not in learning]
    assert {id(weight) for weight in own} == set(kept)
    assert all(torch.equal(weight, kept[id(weight)]) for weight in own)
    assert all(weight.grad is None for weight in own)
    products = sum(isinstance(module, nn.Linear) for module in model.encoder.blocks.modules())
    head = list(model.head.parameters())
    assert len(learning) == len(head) + 2 * products
    outs = [weight for weight in group["params"] if weight.shape[-1:] == (8,)]
    assert any(bool(weight.grad.abs().sum()) for weight in outs if weight.grad is not None)


def test_rates_fall_towards_the_input() -> None:
    model = classifier()
    groups = layer_groups(model)
    rates = [group["lr_factor"] for group in groups]
    first, second, embedding = 1.0, DECAY, DECAY**2
    factors = [1.0, first, second, embedding, embedding]
    assert rates == [BASE.lr, *(factor * BASE.encoder_lr for factor in factors)]
    given = [id(weight) for group in groups for weight in group["params"]]
    assert len(given) == len(set(given))
    assert set(given) == {id(weight) for weight in model.parameters()}


def test_tables_mark_what_is_sure() -> None:
    def of(mean: float, low: float, high: float) -> dict[str, object]:
        scores = {"mean": 0.5, "gain": [mean, low, high]}
        return {"accuracy": scores, "macro_f1": scores}

    table = table_of("title", {"head": of(0, 0, 0), "all": of(0.02, 0.01, 0.03)})
    assert "| head | 50.0 | 50.0 |  |  |" in table
    assert "| all | 50.0 | 50.0 | **+2.0 ± 1.0** | **+2.0 ± 1.0** |" in table
