"""The native kernel against the whole feature maps in float64, build by build."""

import functools
import logging
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pretrain import favor, favor_native
from pretrain.favor import draw_projection, favor_attention
from pretrain.favor_native import native_attention
from pretrain.native import supported_variants
from tests.support.native_builds import names, runnable

EPSILON = 1e-3


@pytest.fixture(params=names("bf16"))
def variant(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    return runnable(request.param, monkeypatch)


class Packed:
    """Seeded bf16 cells of some lengths, their queries, and a gradient."""

    def __init__(
        self, lengths: list[int], queries: list[int] | None, heads: int, dim: int, features: int
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        self.offsets = torch.tensor([0, *lengths]).cumsum(0)
        self.query_offsets = torch.tensor([0, *(queries or lengths)]).cumsum(0)
        num_keys, num_queries = int(self.offsets[-1]), int(self.query_offsets[-1])

        def drawn(rows: int) -> Tensor:
            return torch.randn(rows, heads, dim, generator=generator).bfloat16()

        self.q, self.grad = drawn(num_queries), drawn(num_queries)
        self.k, self.v = drawn(num_keys), drawn(num_keys)
        self.projection = draw_projection(features, dim, 0)

    def leaves(self, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
        return [x.to(dtype).detach().clone().requires_grad_() for x in (self.q, self.k, self.v)]

    def native(self, variant: str) -> list[Tensor]:
        """Attended values and gradients."""
        q, k, v = self.leaves()
        out = native_attention(
            q, k, v, self.projection, EPSILON, self.offsets, self.query_offsets, variant
        )
        return self._with_gradients(out, [q, k, v])

    def exact(self) -> list[Tensor]:
        q, k, v = self.leaves(torch.float64)
        offsets = self.offsets, self.query_offsets
        out = favor_attention(
            q, k, v, self.projection, *offsets, kernel="reference", epsilon=EPSILON
        )
        return self._with_gradients(out, [q, k, v])

    def _with_gradients(self, out: Tensor, leaves: list[Tensor]) -> list[Tensor]:
        out.backward(self.grad.to(out.dtype))
        return [out.detach(), *(x.grad for x in leaves if x.grad is not None)]


def relative(ours: list[Tensor], exact: list[Tensor]) -> list[float]:
    assert len(ours) == len(exact) == 4
    return [float((a.double() - b).norm() / b.norm()) for a, b in zip(ours, exact, strict=True)]


@pytest.mark.parametrize(
    "given",
    [
        pytest.param(Packed([70], None, 2, 64, 266), id="published width"),
        pytest.param(Packed([33, 1, 300, 5], [5, 1, 0, 11], 3, 64, 266), id="chosen queries"),
        pytest.param(Packed([40, 9], None, 2, 8, 24), id="narrow heads"),
        pytest.param(Packed([100], None, 2, 40, 50), id="odd widths"),
        pytest.param(Packed([31], None, 1, 128, 33), id="wide heads"),
        pytest.param(Packed([256, 257], None, 1, 32, 16), id="whole blocks"),
    ],
)
def test_equals_the_whole_maps(given: Packed, variant: str) -> None:
    errors = relative(given.native(variant), given.exact())

    assert max(errors) < 0.015  # worst 9e-3; a bf16 rounds by 4e-3 at most


@pytest.mark.parametrize("norm", [0.0, 8.0, 50.0])
def test_large_inputs_stay_finite_and_right(norm: float, variant: str) -> None:
    given = Packed([100], None, 2, 64, 266)
    given.q, given.k = (
        (x.float() / x.float().norm(dim=-1, keepdim=True) * norm).bfloat16()
        for x in (given.q, given.k)
    )

    ours = given.native(variant)
    out, of_queries, *gradients = relative(ours, given.exact())

    assert all(bool(x.isfinite().all()) for x in ours)
    # Exponents reach 150 at |q| = 50, where a bf16 product of directions is off by 0.2.
    assert out < 0.015  # worst 7e-3
    assert max(gradients) < 0.06  # worst 4.5e-2, of the keys
    assert of_queries < 0.03 or not norm  # worst 1.9e-2; zero keys leave the queries no gradient


@functools.cache
def long_cell() -> tuple[Packed, list[Tensor]]:
    given = Packed([100_000], None, 1, 16, 40)
    return given, given.exact()


def test_a_long_cell_keeps_its_digits(variant: str) -> None:
    """What is attended is small beside the values: the mean of very many."""
    given, exact = long_cell()

    assert max(relative(given.native(variant), exact)) < 0.012  # worst 8.2e-3


def test_keys_that_grow_along_the_cell(variant: str) -> None:
    given = Packed([700], None, 1, 8, 24)
    # Small keys have the larger exponents: the running maximum rises again and again.
    given.k = (given.k * torch.linspace(6, 0.1, 700)[:, None, None]).bfloat16()

    assert max(relative(given.native(variant), given.exact())) < 0.015


def test_even_attention_leaves_the_queries_a_gradient(variant: str) -> None:
    """All features read nearly the same, and values and gradients have a mean of their own."""
    given = Packed([2000], None, 2, 64, 266)
    given.q, given.k = 0.2 * given.q, 0.2 * given.k
    given.v, given.grad = given.v + 3 * given.v[:1], given.grad + 3 * given.grad[:1]

    assert max(relative(given.native(variant), given.exact())) < 0.01  # worst 5e-3; 0.6 without c


def test_one_token_attends_to_itself(variant: str) -> None:
    given = Packed([1, 1, 1], None, 2, 64, 266)

    torch.testing.assert_close(given.native(variant)[0], given.v, rtol=0.01, atol=1e-3)


def test_a_cell_does_not_depend_on_its_mates_nor_on_threads(variant: str) -> None:
    together = Packed([50, 300, 7], [50, 3, 7], 3, 64, 266)
    threads = torch.get_num_threads()
    try:
        results = []
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            results.append(together.native(variant))
    finally:
        torch.set_num_threads(threads)
    for others in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True))

    alone = Packed([300], [3], 3, 64, 266)
    alone.q, alone.grad = together.q[50:53], together.grad[50:53]
    alone.k, alone.v = together.k[50:350], together.v[50:350]
    parts = [results[0][0][50:53], results[0][1][50:53], *(x[50:350] for x in results[0][2:])]
    assert all(torch.equal(a, b) for a, b in zip(alone.native(variant), parts, strict=True))


def test_strided_views_of_a_fused_product(variant: str) -> None:
    given = Packed([60], None, 2, 64, 266)
    q, k, v = torch.stack([given.q, given.k, given.v], 1).unbind(1)
    assert not k.is_contiguous()

    offsets = given.offsets, given.offsets
    ours = native_attention(q, k, v, given.projection, EPSILON, *offsets, variant)

    assert torch.equal(ours, given.native(variant)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["q", "k", "v", "projection", "offsets", "query_offsets"])
def test_tensors_elsewhere_are_refused(name: str, dtype: torch.dtype) -> None:
    given = arguments(dtype)
    given[name] = given[name].to("meta")

    with pytest.raises(ValueError, match=f"^{name} is on meta; native kernels run on the CPU"):
        native_attention(**given, epsilon=EPSILON)
    if name in ("q", "k", "v"):
        told = favor_native.unavailable(given["q"], given["k"], given["v"])
        assert told == "it runs on the CPU, not on meta"


@pytest.mark.parametrize(
    ("name", "changed", "told"),
    [
        pytest.param("k", torch.zeros(9, 2, 8), "v bfloat16; native attention takes", id="type"),
        pytest.param("q", torch.zeros(9, 16, dtype=torch.bfloat16), r"q \(9, 16\)", id="two axes"),
        pytest.param("v", torch.zeros(8, 2, 8, dtype=torch.bfloat16), r"v \(8, ", id="rows"),
        pytest.param("q", torch.zeros(9, 3, 8, dtype=torch.bfloat16), r"q \(9, 3", id="heads"),
        pytest.param("projection", torch.zeros(24, 9), "need the heads' width, 8", id="width"),
        pytest.param(
            "offsets", torch.tensor([0, 9], dtype=torch.int32), "offsets must", id="int32"
        ),
        pytest.param("query_offsets", torch.tensor([0, 4, 9]), "query_offsets must", id="cells"),
    ],
)
def test_what_does_not_fit_is_refused(name: str, changed: Tensor, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        native_attention(**(arguments(torch.bfloat16) | {name: changed}), epsilon=EPSILON)


def arguments(dtype: torch.dtype) -> dict[str, Any]:
    rows = {name: torch.zeros(9, 2, 8, dtype=dtype) for name in ("q", "k", "v")}
    ends = {name: torch.tensor([0, 9]) for name in ("offsets", "query_offsets")}
    return {**rows, **ends, "projection": torch.zeros(24, 8)}


@pytest.mark.skipif(not supported_variants(), reason="this CPU cannot run the kernel")
class TestChoice:
    def test_auto_is_native_for_bfloat16(self) -> None:
        given = Packed([40, 30], None, 2, 64, 266)
        q, k, v = given.q[:60], given.k[:60], given.v[:60]
        a, b, c = (x.view(2, 30, 2, 64) for x in (q, k, v))

        for name in ("auto", "native"):
            ours = favor_attention(a, b, c, given.projection, kernel=name)
            offsets = torch.tensor([0, 30, 60])
            packed = favor_attention(q, k, v, given.projection, offsets, kernel=name)
            assert torch.equal(ours.flatten(0, 1), packed)
            expected = native_attention(q, k, v, given.projection, 1e-4, offsets, offsets)
            assert torch.equal(packed, expected)

    def test_checkpointing_gives_the_same_gradients(self) -> None:
        given = Packed([70], None, 2, 64, 266)
        (q, k, v), again = given.leaves(), given.leaves()

        favor_attention(q, k, v, given.projection, given.offsets).backward(given.grad)
        out = checkpoint(
            favor_attention, *again, given.projection, given.offsets, use_reentrant=False
        )
        assert isinstance(out, Tensor)
        out.backward(given.grad)

        for a, b in zip((q, k, v), again, strict=True):
            assert a.grad is not None
            assert b.grad is not None
            assert torch.equal(a.grad, b.grad)


def test_a_machine_without_it_falls_back_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(favor_native, "missing", lambda family: "there is no C++ compiler")
    favor._note_fallback.cache_clear()
    given = Packed([40], None, 2, 64, 266)
    arguments = given.q, given.k, given.v, given.projection, given.offsets

    with caplog.at_level(logging.INFO, logger="pretrain.favor"):
        ours = [favor_attention(*arguments) for _ in range(3)]

    assert torch.equal(ours[0], favor_attention(*arguments, kernel="torch"))
    assert [r.getMessage() for r in caplog.records] == [
        "attention runs without the native kernel: there is no C++ compiler"
    ]
    with pytest.raises(ValueError, match=r"kernel is 'native', but there is no C\+\+ compiler"):
        favor_attention(*arguments, kernel="native")


def test_wide_heads_are_left_to_the_tiles() -> None:
    x = torch.zeros(3, 1, 520, dtype=torch.bfloat16)

    with pytest.raises(ValueError, match="heads are 520 wide, 512 at most"):
        favor_attention(x, x, x, torch.zeros(4, 520), torch.tensor([0, 3]), kernel="native")
