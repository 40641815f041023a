"""Tiles of the sequence against the whole feature maps in float64."""

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pretrain.favor import draw_projection, favor_attention
from pretrain.favor_tiled import tiled_attention
from pretrain.fused import split_fused

Shape = tuple[int, int, int, int]
EPSILON = 1e-3


class Inputs(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    grad: Tensor
    projection: Tensor

    def to(self, dtype: torch.dtype) -> "Inputs":
        q, k, v, grad = (x.to(dtype) for x in self[:4])
        return Inputs(q, k, v, grad, self.projection)


def inputs(shape: Shape, features: int, dtype: torch.dtype) -> Inputs:
    """Queries, keys, values, a gradient, (B, n, H, d), and a projection."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(shape, generator=generator) for _ in range(4))
    return Inputs(q, k, v, grad, draw_projection(features, shape[-1], 0)).to(dtype)


def with_gradients(given: Inputs, rows: int | None) -> list[Tensor]:
    """Attended values and the gradients; `rows` of None stands for the whole feature maps."""
    q, k, v = (x.detach().clone().requires_grad_() for x in given[:3])
    if rows is None:
        out = favor_attention(q, k, v, given.projection, kernel="reference", epsilon=EPSILON)
    else:
        out = tiled_attention(q, k, v, given.projection, EPSILON, rows=rows)
    out.backward(given.grad)
    return [out.detach(), *(x.grad for x in (q, k, v) if x.grad is not None)]


def exact(given: Inputs) -> list[Tensor]:
    """The same from the whole feature maps in float64."""
    return with_gradients(given.to(torch.float64), None)


def relative(ours: list[Tensor], exact: list[Tensor]) -> list[float]:
    """Errors of values and gradients in the Euclidean norm."""
    return [float((a.double() - b).norm() / b.norm()) for a, b in zip(ours, exact, strict=True)]


@pytest.mark.parametrize(
    ("shape", "rows"),
    [
        pytest.param((2, 50, 3, 8), 16, id="long cells"),
        pytest.param((2, 50, 3, 8), 7, id="last tile is one row"),
        pytest.param((5, 6, 3, 8), 20, id="cells share tiles"),
        pytest.param((3, 20, 4, 8), 1000, id="one tile"),
        pytest.param((1, 9, 2, 8), 1, id="tiles of one row"),
    ],
)
class TestEqualsTheWholeMaps:
    def test_in_float64(self, shape: Shape, rows: int) -> None:
        given = inputs(shape, 24, torch.float64)

        errors = relative(with_gradients(given, rows), exact(given))

        assert len(errors) == 4
        assert max(errors) < 1e-14  # worst 9e-16

    def test_in_float32(self, shape: Shape, rows: int) -> None:
        given = inputs(shape, 24, torch.float32)

        assert max(relative(with_gradients(given, rows), exact(given))) < 2e-6  # worst 4.2e-7

    def test_in_bfloat16(self, shape: Shape, rows: int) -> None:
        given = inputs(shape, 24, torch.bfloat16)

        assert max(relative(with_gradients(given, rows), exact(given))) < 0.02  # worst 9e-3


def test_even_attention_leaves_the_queries_a_gradient_in_bfloat16() -> None:
    """All features read nearly the same, and values and gradients have a mean of their own."""
    given = inputs((1, 2000, 2, 64), 266, torch.float32)
    q, k = 0.2 * given.q, 0.2 * given.k
    v, grad = given.v + 3 * given.v[:, :1], given.grad + 3 * given.grad[:, :1]
    given = given._replace(q=q, k=k, v=v, grad=grad).to(torch.bfloat16)

    assert (
        max(relative(with_gradients(given, 512), exact(given))) < 0.01
    )  # worst 5e-3; 0.2 without c


def test_a_long_cell_keeps_its_digits_in_bfloat16() -> None:
    """What is attended is small beside the values: the mean of very many."""
    given = inputs((1, 20_000, 1, 16), 40, torch.bfloat16)
    given = given._replace(k=0.3 * given.k)

    assert max(relative(with_gradients(given, 512), exact(given))) < 0.012


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_packed_cells_are_those_alone(dtype: torch.dtype) -> None:
    """And their gradients lie where those of one product are wanted."""
    given = inputs((1, 60, 2, 8), 24, dtype)
    lengths = [20, 0, 30], [25, 5, 30]  # of queries, and of keys
    joined = torch.stack([x[0] for x in given[:3]], 1).requires_grad_()
    parts = split_fused(joined)
    q, k, v = parts[0][:50], *parts[1:]
    ours = tiled_attention(q, k, v, given.projection, EPSILON, lengths, 14)
    grads = torch.autograd.grad(ours, (q, k, v), given.grad[0, :50])

    for number, (queries, keys) in enumerate(zip(*cut(lengths), strict=True)):
        alone = Inputs(
            q[None, queries], k[None, keys], v[None, keys], given.grad[:, queries], given.projection
        )
        expected = with_gradients(alone, 14)
        found = (
            ours[None, queries],
            *(x[None, s] for x, s in zip(grads, (queries, keys, keys), strict=True)),
        )
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other), number
    assert grads[1].untyped_storage().data_ptr() == grads[2].untyped_storage().data_ptr()


def cut(lengths: tuple[list[int], list[int]]) -> list[list[slice]]:
    """Where each cell's queries and keys are."""
    ends = ([sum(sizes[: i + 1]) for i in range(len(sizes))] for sizes in lengths)
    return [
        [slice(e - n, e) for e, n in zip(end, sizes, strict=True)]
        for end, sizes in zip(ends, lengths, strict=True)
    ]


def test_no_packed_cells() -> None:
    q, k, v, _, projection = inputs((1, 0, 2, 8), 24, torch.float32)

    assert tiled_attention(q[0], k[0], v[0], projection, EPSILON, ([], [])).shape == (0, 2, 8)


def test_values_of_another_type_have_gradients_of_theirs() -> None:
    given = inputs((1, 20, 2, 8), 24, torch.float32)
    q, k, v = (x[0].clone().requires_grad_() for x in given[:3])
    v = v.detach().to(torch.bfloat16).requires_grad_()
    tiled_attention(q, k, v, given.projection, EPSILON, ([20], [20])).float().sum().backward()

    assert [x.grad.dtype for x in (q, k, v) if x.grad is not None] == [
        torch.float32,
        torch.float32,
        torch.bfloat16,
    ]


def test_queries_at_other_positions() -> None:
    given = inputs((2, 30, 3, 8), 24, torch.float64)
    given = given._replace(q=given.q[:, :4], grad=given.grad[:, :4])

    assert max(relative(with_gradients(given, 7), exact(given))) < 1e-14


def test_gradients_are_those_of_finite_differences() -> None:
    q, k, v, _, projection = inputs((2, 5, 2, 4), 10, torch.float64)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # With an epsilon the stabiliser matters, and its own gradient is left out on purpose.
        return tiled_attention(q, k, v, projection, 0.0, rows=3)

    assert torch.autograd.gradcheck(attend, tuple(x.requires_grad_() for x in (q, k, v)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("norm", [0.0, 8.0, 50.0])
def test_large_inputs_stay_finite_and_right(norm: float, dtype: torch.dtype) -> None:
    given = inputs((1, 100, 2, 64), 266, torch.float32)
    q, k = (x / x.norm(dim=-1, keepdim=True) * norm for x in given[:2])
    given = given._replace(q=q, k=k).to(dtype)

    ours = with_gradients(given, 32)

    assert all(bool(x.isfinite().all()) for x in ours)
    errors = relative(ours, exact(given)) if norm else relative(ours[:1], exact(given)[:1])
    assert max(errors) < {torch.float32: 3e-5, torch.bfloat16: 0.03}[dtype]  # worst 1e-5 and 0.02


def test_one_token_attends_to_itself() -> None:
    q, k, v, _, projection = inputs((3, 1, 2, 8), 24, torch.float32)

    torch.testing.assert_close(tiled_attention(q, k, v, projection, EPSILON), v)


def test_keys_that_grow_along_the_cell() -> None:
    given = inputs((1, 64, 2, 8), 24, torch.float64)
    k = (
        given.k * torch.linspace(6, 0.1, 64)[:, None, None]
    )  # each tile has the largest exponent so far
    given = given._replace(k=k)

    assert max(relative(with_gradients(given, 4), exact(given))) < 1e-14


class Largest(TorchDispatchMode):
    """Notes the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor):
            self.elements = max(self.elements, made.numel())
        return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_nothing_is_as_long_as_the_cell_and_as_wide_as_the_features(dtype: torch.dtype) -> None:
    given = inputs((1, 5000, 1, 8), 400, torch.float32).to(dtype)

    with Largest() as ours:
        with_gradients(given, 256)
    with Largest() as whole:
        with_gradients(given, 5000)

    assert ours.elements == 256 * 400  # a tile
    assert whole.elements == 5000 * 400


def test_autocast_changes_nothing() -> None:
    given = inputs((1, 20, 2, 8), 24, torch.float32)
    expected = with_gradients(given, 8)

    with torch.autocast("cpu", torch.bfloat16):
        ours = with_gradients(given, 8)

    for a, b in zip(ours, expected, strict=True):
        assert torch.equal(a, b)


# torch.compile itself instantiates autograd.Function while it traces ours.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.slow
def test_compiles_without_graph_breaks() -> None:
    given = inputs((1, 12, 1, 8), 24, torch.float32)
    q, k, v = (x.clone().requires_grad_() for x in given[:3])

    @torch.compile(fullgraph=True, backend="aot_eager")  # traces both passes, compiles no C++
    def compiled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return tiled_attention(q, k, v, given.projection, EPSILON, rows=6)

    out = compiled(q, k, v)
    out.backward(given.grad)

    ours = [out.detach(), *(x.grad for x in (q, k, v) if x.grad is not None)]
    assert max(relative(ours, exact(given))) < 2e-6


@pytest.mark.slow
def test_a_hundred_thousand_tokens() -> None:
    q, k, v, _, projection = inputs((1, 100_000, 1, 64), 266, torch.float32)

    ours = tiled_attention(q, k, v, projection, EPSILON)

    few = torch.arange(0, 100_000, 9_973)
    whole = favor_attention(
        q[:, few].double(), k.double(), v.double(), projection, kernel="reference", epsilon=EPSILON
    )
    assert relative([ours[:, few]], [whole])[0] < 1e-5
