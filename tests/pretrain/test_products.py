"""Products in bf16 where the CPU has none: as torch's, rounded once."""

import pytest
import torch
from torch import nn

from pretrain import products
from pretrain.products import linear


@pytest.fixture(params=[False, True], ids=["slow", "fast"])
def cpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the CPU multiplies bf16."""
    monkeypatch.setattr(products, "multiplies_bf16", lambda: request.param)
    return bool(request.param)


def layer(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    shapes = (5, 24), (7, 24), (7,)
    x, weight, bias = (torch.randn(shape, generator=random) for shape in shapes)
    return x, weight, bias


@pytest.mark.parametrize("with_bias", [False, True])
def test_bf16_is_the_exact_product_rounded_once(cpu: bool, with_bias: bool) -> None:
    x, weight, bias = (part.bfloat16() for part in layer())
    exact = x.double() @ weight.double().t() + (bias.double() if with_bias else 0)
    found = linear(x, weight, bias if with_bias else None)
    assert found.dtype == torch.bfloat16
    # Half a unit in the last of eight digits, and what float32 sums lose.
    torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=1e-5)


def test_gradients_are_those_of_torch(cpu: bool) -> None:
    ours = [part.bfloat16().requires_grad_() for part in layer()]
    theirs = [part.detach().clone().requires_grad_() for part in ours]
    linear(*ours).float().square().sum().backward()
    nn.functional.linear(*theirs).float().square().sum().backward()
    for one, other in zip(ours, theirs, strict=True):
        assert one.grad is not None
        assert one.grad.dtype == torch.bfloat16
        torch.testing.assert_close(one.grad, other.grad, rtol=2**-6, atol=0.25)


def test_autocast_gives_bf16_and_float32_stays(cpu: bool) -> None:
    x, weight, bias = layer()
    with torch.autocast("cpu", torch.bfloat16):
        narrow = linear(x, weight, bias)
    assert narrow.dtype == torch.bfloat16
    wide = linear(x, weight, bias)
    assert torch.equal(wide, nn.functional.linear(x, weight, bias))
    torch.testing.assert_close(narrow.float(), wide, rtol=2**-6, atol=2**-5)
