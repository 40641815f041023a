"""What an attention refuses, in a sentence that names it, and what it says when it falls back."""

import logging
from typing import Any

import pytest
import torch
from torch import Tensor

from pretrain import favor, favor_native
from pretrain.favor import draw_projection, favor_attention

B, H, N, D, M = 2, 3, 11, 8, 24


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys, values, (B, N, H, D), and a projection."""
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(B, N, H, D, generator=generator).to(dtype) for _ in range(3))
    return q, k, v, draw_projection(M, D, 5)


PACKED = {"offsets": [0, 3, 6]}


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        pytest.param(
            (2, 6, H, D), {"kernel": "cuda"}, "kernel is 'cuda'; choose one of auto", id="kernel"
        ),
        pytest.param((6, H, D), {}, r"give \(B, n, H, d\)", id="dense without cells"),
        pytest.param((2, 6, H, D), PACKED, r"give \(tokens, H, d\)", id="packed with cells"),
        pytest.param((2, 6, H, D + 1), {}, "need the heads' width, 9", id="width"),
        pytest.param((2, 0, H, D), {}, "have no keys", id="dense without keys"),
        pytest.param((6, H, D), {"offsets": [0, 3, 3, 6]}, "give cell 1 no token", id="empty cell"),
        pytest.param((6, H, D), {"offsets": [0, 3, 7]}, "tokens, 6", id="too far"),
        pytest.param((6, H, D), {"offsets": [0, 5, 3, 6]}, "must rise from 0", id="not rising"),
        pytest.param((6, H, D), {"offsets": [[0, 6]]}, r"shape \(B \+ 1,\)", id="two-dimensional"),
        pytest.param(
            (6, H, D),
            PACKED | {"query_offsets": [0, 6]},
            "2 cells, query_offsets of 1",
            id="other cells",
        ),
        pytest.param(
            (6, H, D),
            PACKED | {"query_offsets": [0, 1, 5]},
            "query_offsets must rise",
            id="queries",
        ),
    ],
)
def test_refusals(shape: tuple[int, ...], options: dict[str, Any], message: str) -> None:
    x = torch.zeros(shape)
    given: dict[str, Any] = {
        key: torch.tensor(o) if "offsets" in key else o for key, o in options.items()
    }

    with pytest.raises(ValueError, match=message):
        favor_attention(x, x, x, draw_projection(M, D, 0), **given)


def test_refuses_other_heads_in_queries_than_keys() -> None:
    q, k = torch.zeros(2, 5, H, D), torch.zeros(2, 5, H + 1, D)

    with pytest.raises(ValueError, match="cells, heads and their width must be the same"):
        favor_attention(q, k, k, draw_projection(M, D, 0))


NAMES = ("q", "k", "v", "projection")


@pytest.mark.parametrize("kernel", ["auto", "native", "torch", "reference"])
@pytest.mark.parametrize("moved", NAMES)
def test_tensors_on_several_devices_are_refused(moved: str, kernel: str) -> None:
    x = torch.zeros(6, H, D)
    given: dict[str, Any] = dict(zip(NAMES, (x, x, x, draw_projection(M, D, 0)), strict=True))
    given[moved] = given[moved].to("meta")

    with pytest.raises(ValueError, match=f"{moved} on meta.*; move all four to one device"):
        favor_attention(**given, offsets=torch.tensor([0, 6]), kernel=kernel)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64])
@pytest.mark.parametrize("changed", NAMES)
def test_types_without_fractions_are_refused(changed: str, dtype: torch.dtype) -> None:
    x = torch.zeros(2, 6, H, D)
    given: dict[str, Any] = dict(zip(NAMES, (x, x, x, draw_projection(M, D, 0)), strict=True))
    given[changed] = given[changed].to(dtype)

    with pytest.raises(ValueError, match=rf"{changed} is \w+; give float32"):
        favor_attention(**given)


@pytest.mark.parametrize(
    ("shape", "num_features", "options", "message"),
    [
        pytest.param((2, 6, H, D), 0, {}, r"projection is \(0, 8\); give one", id="no features"),
        pytest.param((2, 6, 0, D), M, {}, "at least one head, of width 1", id="no heads"),
        pytest.param((2, 6, H, 0), M, {}, "at least one head, of width 1", id="no width"),
        pytest.param((2, 6, H, D), M, {"epsilon": -1e-4}, "epsilon is -0.0001; give", id="minus"),
        pytest.param((2, 6, H, D), M, {"epsilon": float("nan")}, "epsilon is nan; give", id="NaN"),
        pytest.param(
            (2, 6, H, D),
            M,
            {"query_offsets": torch.tensor([0, 6])},
            "query_offsets are for packed cells",
            id="queries of dense cells",
        ),
        pytest.param(
            (6, H, D),
            M,
            {"offsets": torch.tensor([0, 6], dtype=torch.int32)},
            "offsets must be int64, got int32",
            id="narrow offsets",
        ),
        pytest.param(
            (6, H, D),
            M,
            {"offsets": torch.tensor([0, 6], device="meta")},
            "offsets on meta hold no numbers",
            id="offsets on meta",
        ),
    ],
)
def test_what_would_give_no_numbers_is_refused(
    shape: tuple[int, ...], num_features: int, options: dict[str, Any], message: str
) -> None:
    x = torch.zeros(shape)

    with pytest.raises(ValueError, match=message):
        favor_attention(x, x, x, torch.zeros(num_features, shape[-1]), **options)


def test_mixed_types_are_named_by_a_kernel_of_one_type() -> None:
    q, k, v, projection = inputs(torch.float32)

    with pytest.raises(ValueError, match="q is bfloat16, k is float32, v is float32, and it takes"):
        favor_attention(q.bfloat16(), k, v, projection, kernel="native")
    assert favor_attention(q.bfloat16(), k, v, projection).dtype == torch.float32


@pytest.mark.parametrize("kernel", ["auto", "torch", "reference"])
@pytest.mark.parametrize("offsets", [None, [0, 3, 12]], ids=["dense", "packed"])
def test_on_meta_there_are_shapes(kernel: str, offsets: list[int] | None) -> None:
    x = torch.zeros(*((2, 6) if offsets is None else (12,)), H, D, device="meta").bfloat16()
    x.requires_grad_()
    ends = None if offsets is None else torch.tensor(offsets)
    projection = draw_projection(M, D, 0).to("meta")

    out = favor_attention(x, x, x.float(), projection, ends, kernel=kernel)
    out.sum().backward()

    assert (out.shape, out.dtype, out.device.type) == (x.shape, torch.float32, "meta")
    assert x.grad is not None
    with pytest.raises(ValueError, match="it runs on the CPU, not on meta"):
        favor_attention(x, x, x, projection, ends, kernel="native")


@pytest.mark.parametrize("kernel", ["auto", "torch", "reference"])
def test_no_gradient_flows_to_the_directions(kernel: str) -> None:
    q, k, v, projection = inputs()
    q.requires_grad_()
    projection.requires_grad_()

    favor_attention(q, k, v, projection, kernel=kernel).sum().backward()

    assert q.grad is not None
    assert projection.grad is None


def test_a_float32_attention_without_the_kernel_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(favor_native, "missing", lambda family: "there is no C++ compiler")
    favor._note_fallback.cache_clear()
    given = inputs(torch.float32)

    with caplog.at_level(logging.INFO, logger="pretrain.favor"):
        ours = [favor_attention(*given) for _ in range(3)]

    assert torch.equal(ours[0], favor_attention(*given, kernel="torch"))
    assert [r.getMessage() for r in caplog.records] == [
        "attention runs without the native kernel: there is no C++ compiler"
    ]
