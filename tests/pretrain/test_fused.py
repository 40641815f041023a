"""Slices of one product and the gradient they share."""

import pytest
import torch
from torch import Tensor

from pretrain.favor import draw_projection, favor_attention
from pretrain.fused import empty_slices, split_fused


def drawn(dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(40, 3, 2, 8, generator=generator).to(dtype).requires_grad_()


def test_gradients_of_separate_tensors_are_stacked() -> None:
    joined = drawn()

    assert torch.autograd.gradcheck(
        lambda x: [part * i for i, part in enumerate(split_fused(x))], joined
    )


@pytest.mark.parametrize("kernel", ["auto", "torch"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def test_attention_has_the_gradient_of_unbind(dtype: torch.dtype, kernel: str) -> None:
    ours, theirs = drawn(dtype), drawn(dtype)
    projection, offsets = draw_projection(24, 8, 0), torch.tensor([0, 30, 40])

    for joined, parts in ((ours, split_fused(ours)), (theirs, theirs.unbind(1))):
        q, k, v = parts
        favor_attention(q, k, v, projection, offsets, kernel=kernel).square().sum().backward()
        assert joined.grad is not None

    assert torch.equal(ours.grad, theirs.grad)  # type: ignore[arg-type]


def test_slices_of_one_tensor_are_taken_as_they_are() -> None:
    joined = drawn(torch.float32)
    parts = split_fused(joined)
    slices = empty_slices(*parts)
    for number, part in enumerate(slices):
        part.fill_(number)

    (whole,) = torch.autograd.grad(parts, joined, slices)

    assert whole.data_ptr() == slices[0].data_ptr()
    assert whole.is_contiguous()
    assert whole[:, 2].eq(2).all()


def test_slices_in_another_order_are_not() -> None:
    joined = drawn(torch.float32)
    parts = split_fused(joined)
    slices = empty_slices(*parts)[::-1]
    for number, part in enumerate(slices):
        part.fill_(number)

    (whole,) = torch.autograd.grad(parts, joined, slices)

    assert [float(whole[0, i, 0, 0]) for i in range(3)] == [0, 1, 2]


def test_other_shapes_have_tensors_of_their_own() -> None:
    q, k = torch.empty(3, 2, 8), torch.empty(5, 2, 8)

    a, b, c = empty_slices(q, k, k)

    assert [x.shape for x in (a, b, c)] == [q.shape, k.shape, k.shape]
    assert a.untyped_storage().data_ptr() != b.untyped_storage().data_ptr()
    assert b.untyped_storage().data_ptr() == c.untyped_storage().data_ptr()
