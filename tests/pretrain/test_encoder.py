"""The shared encoder: performer-pytorch's parameters, our attention, seeded weights."""

import copy
import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
from performer_pytorch import Performer
from torch import Tensor, nn

from pretrain.config import EncoderConfig
from pretrain.encoder import ExpressionEncoder, build_encoder
from pretrain.favor import FavorAttention
from tests.support.tiny import BINNING, ENCODER, NUM_GENES

GENE2VEC = replace(ENCODER, gene_embedding="gene2vec")


def build(config: EncoderConfig = ENCODER, seed: int = 0) -> ExpressionEncoder:
    return build_encoder(config, BINNING, NUM_GENES, seed)


def tiny_tokens(num_cells: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (num_cells, NUM_GENES)
    return torch.randint(0, BINNING.num_tokens, shape, generator=generator, dtype=torch.uint8)


def plain_performer() -> Performer:
    """The same shape as `ENCODER`, as performer-pytorch makes it."""
    torch.manual_seed(3)
    return Performer(
        dim=16,
        depth=2,
        heads=2,
        dim_head=8,
        ff_mult=2,
        nb_features=16,
        qkv_bias=False,
        attn_out_bias=True,
    )


def test_state_dict_is_that_of_an_unmodified_performer() -> None:
    plain, encoder = plain_performer(), build()

    names = {name for name in encoder.state_dict() if name.startswith("performer.")}
    assert names == {f"performer.{name}" for name in plain.state_dict()}
    encoder.performer.load_state_dict(plain.state_dict(), strict=True)


def published(encoder: ExpressionEncoder, plain: Performer, tokens: Tensor) -> Tensor:
    """What the encoder computes, with performer-pytorch's own forward passes."""
    assert encoder.genes is not None
    tokens = nn.functional.pad(tokens.long(), (0, 1))
    states: Tensor = encoder.norm(plain(encoder.expression(tokens) + encoder.genes.weight))
    return states


def test_states_are_those_of_an_unmodified_performer() -> None:
    plain, encoder = plain_performer().eval(), build().eval()
    encoder.performer.load_state_dict(plain.state_dict(), strict=True)
    tokens = tiny_tokens()

    with torch.no_grad():
        ours, theirs = encoder(tokens), published(encoder, plain, tokens)

    # Keys are short at initialisation; what differs is what epsilon is relative to. Worst 5.3e-4.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=3e-3)


def test_with_our_attention_performers_own_forward_gives_the_same() -> None:
    plain, encoder = plain_performer(), build(replace(ENCODER, kernel="reference")).double()
    encoder.performer.load_state_dict(plain.state_dict(), strict=True)
    for block in plain.double().net.layers:
        block[0].fn.fast_attention.__class__ = FavorAttention
    tokens = tiny_tokens()

    ours, theirs = encoder(tokens), published(encoder, plain, tokens)
    ours.square().mul(torch.arange(16)).sum().backward()
    theirs.square().mul(torch.arange(16)).sum().backward()

    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)  # worst 0
    for (name, one), other in zip(
        encoder.performer.named_parameters(), plain.parameters(), strict=True
    ):
        torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=1e-11, msg=name)  # 1.1e-13


def test_published_shape_is_the_default() -> None:
    config = EncoderConfig()

    assert (config.dim, config.depth, config.heads, config.dim_head) == (200, 6, 10, 64)
    assert config.features == 266  # int(64 ln 64)


def test_same_seed_same_weights() -> None:
    torch.manual_seed(1)
    first = build(seed=4).weights()
    torch.manual_seed(2)
    state = torch.get_rng_state()
    again, other = build(seed=4).weights(), build(seed=5).weights()

    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["expression.weight"], other["expression.weight"])
    projections = [name for name in first if name.endswith("projection_matrix")]
    assert len(projections) == 2
    assert not torch.equal(first[projections[0]], first[projections[1]])
    assert not torch.equal(first[projections[0]], other[projections[0]])


def test_redrawn_projections_depend_on_seed_number_and_layer_only() -> None:
    one, other = build(seed=0), build(seed=9)
    name = "performer.net.layers.1.0.fn.fast_attention.projection_matrix"
    first = one.weights()[name].clone()

    one.redraw_projections(0, 3)
    third = one.weights()[name].clone()
    other.redraw_projections(0, 3)

    assert not torch.equal(first, third)
    assert torch.equal(other.weights()[name], third)
    one.redraw_projections(0, 0)
    assert torch.equal(one.weights()[name], first)


def test_an_encoder_is_copied_and_pickled() -> None:
    encoder, tokens = build().eval(), tiny_tokens()

    for again in (copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))):  # noqa: S301
        assert torch.equal(again(tokens), encoder(tokens))


def test_performers_own_redraw_draws() -> None:
    encoder = build()
    attention: Any = encoder.performer.net.layers[0][0].fn.fast_attention
    first = attention.projection_matrix.clone()

    torch.manual_seed(0)
    attention.redraw_projection_matrix(first.device)

    drawn = attention.projection_matrix.clone()
    assert drawn.all()
    assert not torch.equal(drawn, first)


@pytest.mark.parametrize(
    "tokens",
    [
        pytest.param(torch.zeros(2, NUM_GENES - 1, dtype=torch.uint8), id="a gene less"),
        pytest.param(torch.zeros(2, NUM_GENES + 1, dtype=torch.uint8), id="a gene more"),
        pytest.param(torch.zeros(NUM_GENES, dtype=torch.uint8), id="no cells dimension"),
        pytest.param(torch.zeros(0, 3, dtype=torch.uint8), id="no cells and other genes"),
    ],
)
def test_wrong_number_of_genes_is_refused(tokens: Tensor) -> None:
    with pytest.raises(ValueError, match="the encoder knows 32 genes"):
        build()(tokens)


def test_states_have_a_constant_position_after_the_genes() -> None:
    encoder = build()

    states = encoder(tiny_tokens())

    assert states.shape == (5, NUM_GENES + 1, 16)
    assert len(encoder.blocks) == 2


def test_no_cells_give_no_states_and_zero_gradients() -> None:
    encoder = build()

    states = encoder(tiny_tokens(0))
    states.sum().backward()

    assert states.shape == (0, NUM_GENES + 1, 16)
    assert all(weight.grad is not None for weight in encoder.parameters())
    assert not any(weight.grad.any() for weight in encoder.parameters() if weight.grad is not None)


def test_a_cell_does_not_depend_on_its_batch() -> None:
    encoder, tokens = build().eval(), tiny_tokens(9)

    with torch.no_grad():
        together = encoder(tokens)
        alone = torch.cat([encoder(cell[None]) for cell in tokens])
        other_mates = encoder(torch.cat([tokens[:1], 6 - tokens[1:]]))

    torch.testing.assert_close(alone, together, rtol=0, atol=1e-6)  # worst 0 here
    torch.testing.assert_close(other_mates[0], together[0], rtol=0, atol=0)


class TestGeneEmbedding:
    def test_gene2vec_table_is_frozen_and_zero_for_the_constant_position(self) -> None:
        vectors = torch.randn(NUM_GENES, 16, generator=torch.Generator().manual_seed(0))

        encoder = build_encoder(GENE2VEC, BINNING, NUM_GENES, 0, vectors)

        assert encoder.genes is not None
        assert torch.equal(encoder.genes.weight[:NUM_GENES], vectors)
        assert not encoder.genes.weight[NUM_GENES].any()
        assert not encoder.genes.weight.requires_grad
        encoder(tiny_tokens()).sum().backward()
        assert encoder.genes.weight.grad is None

    def test_learned_table_is_trained_and_tells_genes_apart(self) -> None:
        encoder = build()

        assert encoder.genes is not None
        assert encoder.genes.weight.requires_grad
        states = encoder(torch.ones(1, NUM_GENES, dtype=torch.uint8))
        assert not torch.allclose(states[0, 0], states[0, 1])

    def test_without_a_table_equal_tokens_are_alike(self) -> None:
        encoder = build(replace(ENCODER, gene_embedding="none"))

        states = encoder(torch.ones(1, NUM_GENES, dtype=torch.uint8))

        assert encoder.genes is None
        torch.testing.assert_close(states[0, 0], states[0, 1], rtol=0, atol=1e-5)


class TestWeights:
    def test_round_trip(self) -> None:
        one, other = build(seed=0), build(seed=1)
        one.redraw_projections(0, 5)

        other.load_weights(one.weights())

        assert torch.equal(one(tiny_tokens()), other(tiny_tokens()))

    def test_no_weight_is_listed_twice(self) -> None:
        names = list(build().weights())

        assert not [name for name in names if "proj_updater" in name]
        assert len(names) < len(build().state_dict())

    @pytest.mark.parametrize(
        ("name", "value", "message"),
        [
            pytest.param("norm.bias", None, "norm.bias", id="missing"),
            pytest.param("norm.gain", torch.zeros(16), "norm.gain", id="unknown"),
            pytest.param("norm.bias", torch.zeros(8), r"norm.bias is \(8,\), exp", id="shape"),
        ],
    )
    def test_what_does_not_fit_is_refused(
        self, name: str, value: Tensor | None, message: str
    ) -> None:
        encoder = build()
        weights = {key: tensor.clone() for key, tensor in encoder.weights().items()}
        weights["expression.weight"] += 1
        before = encoder.expression.weight.detach().clone()
        if value is None:
            del weights[name]
        else:
            weights[name] = value

        with pytest.raises(ValueError, match=message):
            encoder.load_weights(weights)
        assert torch.equal(encoder.expression.weight, before), "refused, but partly loaded"
