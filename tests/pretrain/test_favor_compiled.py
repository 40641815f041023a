"""Packed attention and the whole encoder under torch.compile: one graph, the same numbers."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from pretrain.config import EncoderConfig
from pretrain.encoder import build_encoder
from pretrain.favor import draw_projection, favor_attention
from tests.support.tiny import BINNING, ENCODER, NUM_GENES

H, D, M = 2, 8, 24

# torch.compile itself instantiates autograd.Function while it traces ours.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


@pytest.fixture(autouse=True)
def _forget_graphs() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled(function: Any) -> Any:
    return torch.compile(function, fullgraph=True, backend="aot_eager")  # compiles no C++


@pytest.mark.parametrize(
    "kernel",
    ["auto", *(pytest.param(name, marks=pytest.mark.slow) for name in ("torch", "reference"))],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_attention_is_the_same_in_a_graph(kernel: str, dtype: torch.dtype) -> None:
    projection = draw_projection(M, D, 0)

    def attend(q: Tensor, k: Tensor, v: Tensor, *offsets: Tensor) -> Tensor:
        return 2 * favor_attention(q * 2, k, v, projection, *offsets, kernel=kernel)

    in_a_graph = compiled(attend)
    for lengths, read in (([4, 1, 7], None), ([3, 9], [5, 0]), ([12], [12]), ([], None)):
        offsets = [torch.tensor([0, *lengths]).cumsum(0)]
        offsets += [] if read is None else [torch.tensor([0, *read]).cumsum(0)]
        tokens, queries = sum(lengths), sum(lengths if read is None else read)
        generator = torch.Generator().manual_seed(tokens)
        q, k, v, weight = (
            torch.randn(n, H, D, generator=generator).to(dtype).requires_grad_()
            for n in (queries, tokens, tokens, queries)
        )

        ours, theirs = (form(q, k, v, *offsets) for form in (in_a_graph, attend))

        assert torch.equal(ours, theirs)
        for a, b in zip(
            torch.autograd.grad(ours, (q, k, v), weight),
            torch.autograd.grad(theirs, (q, k, v), weight, materialize_grads=True),
            strict=True,
        ):
            assert torch.equal(a, b)


def test_offsets_are_checked_when_the_graph_runs() -> None:
    x, projection = torch.zeros(6, H, D), draw_projection(M, D, 0)
    attend = compiled(lambda offsets: favor_attention(x, x, x, projection, offsets))
    attend(torch.tensor([0, 2, 6]))

    with pytest.raises(ValueError, match="offsets must rise from 0 to the number of tokens, 6"):
        attend(torch.tensor([0, 2, 7]))


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(replace(ENCODER, sequence="expressed"), id="expressed"),
        pytest.param(ENCODER, id="full", marks=pytest.mark.slow),
        pytest.param(
            replace(ENCODER, checkpointing=True), id="checkpointing", marks=pytest.mark.slow
        ),
        pytest.param(
            replace(ENCODER, attention="published"), id="published", marks=pytest.mark.slow
        ),
        pytest.param(
            replace(ENCODER, expression="continuous"), id="continuous", marks=pytest.mark.slow
        ),
    ],
)
def test_the_encoder_is_one_graph(config: EncoderConfig) -> None:
    encoder = build_encoder(config, BINNING, NUM_GENES, seed=0)
    tokens = torch.randint(0, 6, (3, NUM_GENES), generator=torch.Generator().manual_seed(0))
    tokens = tokens.float() if config.expression == "continuous" else tokens
    genes, offsets = torch.arange(NUM_GENES + 1).repeat(3), torch.arange(4) * (NUM_GENES + 1)
    packed = genes, torch.nn.functional.pad(tokens, (0, 1)).flatten(), offsets
    read = torch.tensor([1, 2, 40, 90])
    calls: list[tuple[Any, tuple[Tensor, ...]]] = [(encoder.encode, (*packed, read))]
    if config.sequence == "full":
        calls += [(encoder.forward, (tokens,)), (encoder.forward, (tokens, read))]

    for function, arguments in calls:
        found = []
        for form in (compiled(function), function):
            encoder.zero_grad()
            states = form(*arguments)
            states.square().sum().backward()
            grads = [x.grad.clone() for x in encoder.parameters() if x.grad is not None]
            found.append([states.detach(), *grads])
        for ours, theirs in zip(*found, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_expressed_genes_of_dense_cells_are_one_graph_when_it_may_not_know_their_number() -> None:
    encoder = build_encoder(replace(ENCODER, sequence="expressed"), BINNING, NUM_GENES, seed=0)
    encode = compiled(encoder.forward)
    generator = torch.Generator().manual_seed(0)

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        for _ in range(2):
            tokens = torch.randint(0, 6, (3, NUM_GENES), generator=generator)
            tokens *= torch.rand(tokens.shape, generator=generator) < 0.4
            torch.testing.assert_close(encode(tokens), encoder(tokens), rtol=1e-5, atol=1e-6)
