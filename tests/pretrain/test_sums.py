"""Sums over many tokens against float64, where PyTorch's own go wrong in bf16."""

import pytest
import torch
from torch import Tensor, nn

from pretrain.sums import TokenEmbedding, TokenNorm

TOKENS, DIM = 16_000, 32


def upstream(dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(TOKENS, DIM, generator=generator)
    return (drawn + 0.3 * torch.randn(DIM, generator=generator)).bfloat16().to(dtype)


def of_norm(kind: type[nn.LayerNorm], dtype: torch.dtype) -> list[Tensor]:
    """Output and gradients of x, weight and bias."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, TOKENS // 4, DIM, generator=generator).bfloat16().to(dtype).requires_grad_()
    norm = kind(DIM)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_(torch.rand(DIM, generator=generator).bfloat16())
    norm = norm.to(dtype)
    out = norm(x)
    out.backward(upstream(dtype).view_as(out))
    found = [out.detach(), x.grad, norm.weight.grad, norm.bias.grad]
    return [each for each in found if each is not None]


def of_embedding(kind: type[nn.Embedding], dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(0, 7, (TOKENS,), generator=generator)
    weight = torch.randn(7, DIM, generator=generator).bfloat16().to(dtype)
    embedding = kind(7, DIM, _weight=weight)
    out = embedding(tokens)
    out.backward(upstream(dtype))
    assert embedding.weight.grad is not None
    return [out.detach(), embedding.weight.grad]


def errors(ours: list[Tensor], exact: list[Tensor]) -> list[float]:
    pairs = zip(ours, exact, strict=True)
    return [float((a.double() - b).norm() / b.norm()) for a, b in pairs]


def test_gradients_of_a_norm() -> None:
    exact = of_norm(nn.LayerNorm, torch.float64)

    assert len(exact) == 4
    assert max(errors(of_norm(TokenNorm, torch.bfloat16), exact)) < 5e-3  # a rounding is 4e-3


def test_gradients_of_an_embedding() -> None:
    exact = of_embedding(nn.Embedding, torch.float64)

    assert max(errors(of_embedding(TokenEmbedding, torch.bfloat16), exact)) < 5e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_outputs_are_those_of_pytorch(dtype: torch.dtype) -> None:
    for ours, theirs in (
        (of_norm(TokenNorm, dtype), of_norm(nn.LayerNorm, dtype)),
        (of_embedding(TokenEmbedding, dtype), of_embedding(nn.Embedding, dtype)),
    ):
        assert torch.equal(ours[0], theirs[0])
        if dtype == torch.float32:
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_frozen_table_gets_no_gradient() -> None:
    embedding = TokenEmbedding(3, 4).bfloat16()
    embedding.weight.requires_grad_(False)

    assert not embedding(torch.tensor([0, 2])).requires_grad
