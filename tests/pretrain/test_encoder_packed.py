"""Packed cells: the same states as dense ones, wherever they stand and whoever else is there."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from pretrain.config import EncoderConfig
from pretrain.encoder import ExpressionEncoder, build_encoder
from tests.support.tiny import BINNING, ENCODER, NUM_GENES

EXPRESSED = replace(ENCODER, sequence="expressed")
LENGTH = NUM_GENES + 1


def build(config: EncoderConfig = EXPRESSED) -> ExpressionEncoder:
    return build_encoder(config, BINNING, NUM_GENES, seed=0).double()


def tiny_tokens(num_cells: int = 5) -> Tensor:
    """Tokens, (num_cells, G), half of them 0; the last cell has nothing but zeros."""
    generator = torch.Generator().manual_seed(0)
    shape = (num_cells, NUM_GENES)
    tokens = torch.randint(0, BINNING.num_tokens, shape, generator=generator, dtype=torch.uint8)
    tokens *= torch.rand(shape, generator=generator) < 0.5
    tokens[-1] = 0
    return tokens


def pack(tokens: Tensor, order: list[int] | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Genes, tokens and offsets of the tokens that are not 0, cell after cell."""
    genes, values, ends = [], [], [0]
    for cell in tokens:
        present = [gene for gene in range(NUM_GENES) if cell[gene]]
        genes += [*present, NUM_GENES]
        values += [*cell[present].tolist(), 0]
        ends.append(len(genes))
    return torch.tensor(genes), torch.tensor(values, dtype=torch.uint8), torch.tensor(ends)


def whole(tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Genes, tokens and offsets of every gene of every cell."""
    genes = torch.arange(LENGTH).repeat(len(tokens))
    offsets = torch.arange(len(tokens) + 1) * LENGTH
    return genes, torch.nn.functional.pad(tokens, (0, 1)).flatten(), offsets


def gradients(encoder: ExpressionEncoder, states: Tensor) -> dict[str, Tensor]:
    encoder.zero_grad()
    states.square().mul(torch.arange(states.shape[-1])).sum().backward()
    return {
        name: weight.grad.clone()
        for name, weight in encoder.named_parameters()
        if weight.grad is not None
    }


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor], worst: float) -> None:
    # Worst over all tests 5.7e-14.
    assert set(one) == set(other)
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=0, atol=worst, msg=name)


def test_all_genes_packed_give_what_dense_cells_give() -> None:
    encoder, tokens = build(ENCODER), tiny_tokens()

    dense, packed = encoder(tokens), encoder.encode(*whole(tokens))

    torch.testing.assert_close(packed.view(dense.shape), dense, rtol=0, atol=1e-14)  # worst 0
    assert_same(gradients(encoder, packed), gradients(encoder, encoder(tokens)), 1e-11)


@pytest.mark.parametrize("config", [ENCODER, EXPRESSED], ids=["full", "expressed"])
def test_states_that_are_read_are_those_of_all(config: EncoderConfig) -> None:
    encoder, tokens = build(config), tiny_tokens()
    cells = whole(tokens) if config.sequence == "full" else pack(tokens)
    read = torch.tensor([0, 3, 3, int(cells[2][1]), int(cells[2][-1]) - 1])  # cells 2, 3: none

    some, every = encoder.encode(*cells, read), encoder.encode(*cells)

    torch.testing.assert_close(some, every[read], rtol=0, atol=1e-13)  # worst 4.4e-16
    assert_same(
        gradients(encoder, encoder.encode(*cells, read)),
        gradients(encoder, encoder.encode(*cells)[read]),
        1e-11,
    )


@pytest.mark.parametrize("config", [ENCODER, EXPRESSED], ids=["full", "expressed"])
def test_checkpointed_blocks_give_the_same_bits(config: EncoderConfig) -> None:
    plain, again = build(config), build(replace(config, checkpointing=True))
    cells = whole(tiny_tokens()) if config.sequence == "full" else pack(tiny_tokens())
    read = torch.tensor([2, 5, 9])

    one, other = plain.encode(*cells, read), again.encode(*cells, read)

    assert torch.equal(one, other)
    assert_same(gradients(plain, one), gradients(again, other), 0.0)


def test_checkpointing_keeps_less_for_the_backward_pass() -> None:
    def kept(checkpointing: bool) -> int:
        sizes: list[int] = []
        encoder = build(replace(ENCODER, checkpointing=checkpointing))

        def note(tensor: Tensor) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            encoder(tiny_tokens(8))
        return sum(sizes)

    assert kept(True) < kept(False) / 4


def test_a_cell_depends_neither_on_its_batch_nor_on_the_order_of_its_genes() -> None:
    encoder, tokens = build(), tiny_tokens()
    genes, values, offsets = pack(tokens)
    together = encoder.encode(genes, values, offsets)

    for cell, (start, stop) in enumerate(pairwise(offsets.tolist())):
        alone = encoder.encode(*pack(tokens[cell : cell + 1]))
        torch.testing.assert_close(alone, together[start:stop], rtol=0, atol=1e-13)  # worst 1.1e-15
        back = torch.tensor([*range(stop - 2, start - 1, -1), stop - 1])  # the constant one ends
        turned = encoder.encode(genes[back], values[back], torch.tensor([0, len(back)]))
        torch.testing.assert_close(turned, together[back], rtol=0, atol=1e-13)


def test_dense_tokens_of_an_expressed_encoder_are_packed_and_spread_again() -> None:
    encoder, tokens = build(), tiny_tokens()

    states = encoder(tokens)

    packed, present = encoder.encode(*pack(tokens)), torch.nn.functional.pad(tokens, (0, 1)) != 0
    present[:, -1] = True
    assert states.shape == (5, LENGTH, 16)
    torch.testing.assert_close(states[present], packed, rtol=0, atol=0)
    assert not states[~present].any()
    assert_same(gradients(encoder, states), gradients(encoder, encoder.encode(*pack(tokens))), 0.0)


def test_absent_genes_change_a_full_cell_and_not_an_expressed_one() -> None:
    tokens = tiny_tokens(1) * 0
    tokens[0, 4] = 3
    packed = pack(tokens)

    assert len(packed[0]) == 2
    read = torch.tensor([4])
    full = build(ENCODER)(tokens, read)
    expressed = build().encode(*packed, torch.tensor([0]))
    assert not torch.allclose(full, expressed)


@pytest.mark.parametrize("config", [ENCODER, EXPRESSED], ids=["full", "expressed"])
@pytest.mark.parametrize("num_cells", [0, 2])
def test_reading_nothing_gives_no_states_and_zero_gradients(
    config: EncoderConfig, num_cells: int
) -> None:
    encoder, nowhere = build(config), torch.zeros(0, dtype=torch.int64)
    cells = whole(tiny_tokens(2)) if config.sequence == "full" else pack(tiny_tokens(2))
    if not num_cells:
        cells = (nowhere, nowhere.to(torch.uint8), torch.zeros(1, dtype=torch.int64))

    for read in (nowhere, *([None] if not num_cells else [])):
        states = encoder.encode(*cells, read)
        found = gradients(encoder, states)

        assert states.shape == (0, 16)
        assert len(found) == len(list(encoder.parameters()))
        assert not any(gradient.any() for gradient in found.values())


@pytest.mark.parametrize("config", [ENCODER, EXPRESSED], ids=["full", "expressed"])
def test_no_dense_cells_give_no_states_and_zero_gradients(config: EncoderConfig) -> None:
    encoder = build(config)

    states = encoder(tiny_tokens()[:0])

    assert states.shape == (0, LENGTH, 16)
    assert not any(gradient.any() for gradient in gradients(encoder, states).values())


def test_how_to_compute_is_no_part_of_the_architecture() -> None:
    other = replace(EXPRESSED, kernel="reference", checkpointing=True)

    assert other.architecture() == EXPRESSED.architecture() != ENCODER.architecture()
    assert EncoderConfig(**other.architecture()) == EXPRESSED
