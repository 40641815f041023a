"""What the encoder refuses: cells, tokens, positions and shapes that do not fit, each by name."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from pretrain.config import EncoderConfig
from tests.pretrain.test_encoder_packed import EXPRESSED, LENGTH, build, pack, tiny_tokens
from tests.support.tiny import ENCODER, NUM_GENES


def test_values_that_are_not_numbers_are_refused_before_any_computing() -> None:
    for config in (ENCODER, EXPRESSED):
        encoder = build(replace(config, expression="continuous"))
        values = tiny_tokens().double()
        assert torch.isfinite(encoder(values)).all()
        values[1, 3] = float("nan")
        with pytest.raises(ValueError, match="1 expression values are NaN"):
            encoder(values)


def changed(what: str, index: int, value: int) -> dict[str, Tensor]:
    parts = dict(zip(("genes", "tokens", "offsets"), pack(tiny_tokens()), strict=True))
    parts[what] = parts[what].long()
    parts[what][index] = value
    return parts


TOTAL = len(pack(tiny_tokens())[0])
FIRST = int(pack(tiny_tokens())[0][0])


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        pytest.param(changed("tokens", 3, 7), "token 7 is out of range.* 0 to 6", id="token"),
        pytest.param(changed("tokens", 3, -1), "token -1 is out of range", id="negative token"),
        pytest.param(changed("genes", 3, 33), "gene 33 is out of range.* 32 genes", id="gene"),
        pytest.param(changed("genes", 3, -1), "gene -1 is out of range", id="negative gene"),
        pytest.param(changed("offsets", 0, 1), "offsets run from 1 to", id="late start"),
        pytest.param(changed("offsets", -1, 9), f"to 9 over {TOTAL} tokens", id="early end"),
        pytest.param(changed("offsets", 1, 0), "cell 0 has 0 positions", id="zero-length cell"),
        pytest.param(changed("offsets", 1, -2), "cell 0 has -2 positions", id="falling offsets"),
        pytest.param(changed("genes", 3, FIRST), f"gene {FIRST} more than once", id="a gene twice"),
        pytest.param(changed("genes", -1, 5), "cell 4 ends with gene 5", id="no constant position"),
        pytest.param(changed("genes", 0, 32), "gene 32 more than once", id="two constant ones"),
        pytest.param(changed("tokens", -1, 5), "and token 5; the last pos", id="constant token"),
    ],
)
def test_packed_cells_that_do_not_fit_are_refused(parts: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build().encode(**parts)


def test_packed_cells_of_other_shapes_are_refused() -> None:
    encoder, (genes, tokens, offsets) = build(), pack(tiny_tokens())

    with pytest.raises(ValueError, match=rf"genes have shape \({TOTAL - 1},\)"):
        encoder.encode(genes[1:], tokens, offsets)
    with pytest.raises(ValueError, match=r"offsets have shape \(1, 6\)"):
        encoder.encode(genes, tokens, offsets[None])
    with pytest.raises(ValueError, match=r"tokens are torch.float32, but encoder.expression is bi"):
        encoder.encode(genes, tokens.float(), offsets)
    with pytest.raises(ValueError, match=r"offsets have shape \(\)"):
        encoder.encode(genes, tokens, torch.tensor(0))


@pytest.mark.parametrize("gene_embedding", ["none", "learned"])
@pytest.mark.parametrize(("name", "kind"), [("genes", "float32"), ("offsets", "int32")])
def test_genes_and_offsets_are_whole_numbers(name: str, kind: str, gene_embedding: Any) -> None:
    parts = changed("tokens", 0, 1)
    parts[name] = parts[name].to(getattr(torch, kind))

    with pytest.raises(ValueError, match=f"{name} are torch.{kind}; give whole numbers as int64"):
        build(replace(EXPRESSED, gene_embedding=gene_embedding)).encode(**parts)


@pytest.mark.parametrize("config", [ENCODER, EXPRESSED], ids=["full", "expressed"])
@pytest.mark.parametrize(
    ("num_genes", "offsets", "message"),
    [
        (0, [5], "offsets run from 5 to 5 over 0 tokens"),
        (9, [0], r"genes have shape \(9,\) and tokens \(0,\)"),
        (0, [], "offsets have shape"),
        (0, [0, 0], "cell 0 has 0 positions"),
    ],
)
def test_no_tokens_are_checked_like_any(
    config: EncoderConfig, num_genes: int, offsets: list[int], message: str
) -> None:
    genes, tokens = torch.zeros(num_genes).long(), torch.zeros(0, dtype=torch.uint8)

    with pytest.raises(ValueError, match=message):
        build(config).encode(genes, tokens, torch.tensor(offsets).long())


def test_a_full_cell_has_every_gene_once() -> None:
    tokens = torch.zeros(LENGTH, dtype=torch.uint8)
    encoder, genes, offsets = build(ENCODER), torch.arange(LENGTH), torch.tensor([0, LENGTH])
    encoder.encode(genes, tokens, offsets)

    with pytest.raises(ValueError, match="cell 0 ends with gene 0"):
        encoder.encode(genes * 0, tokens, offsets)
    genes[7] = 6
    with pytest.raises(ValueError, match="cell 0 has gene 6 more than once; give each gene once"):
        encoder.encode(genes, tokens, offsets)


@pytest.mark.parametrize("read", [[-1, 3], [3, 10_000], [5, 4]])
def test_positions_that_cannot_be_read_are_refused(read: list[int]) -> None:
    with pytest.raises(ValueError, match="read must name positions from 0 to"):
        build().encode(*pack(tiny_tokens()), torch.tensor(read))


@pytest.mark.parametrize(
    "read",
    [
        pytest.param(torch.tensor([0.0, 3.0]), id="floats"),
        pytest.param(torch.tensor([True, False]), id="a mask"),
        pytest.param(torch.tensor([[0, 3]]), id="two-dimensional"),
        pytest.param(torch.tensor([0, 3], dtype=torch.int32), id="int32"),
        pytest.param(torch.zeros(0), id="no floats"),
    ],
)
def test_what_names_no_positions_is_refused(read: Tensor) -> None:
    with pytest.raises(ValueError, match=rf"read is {read.dtype} of shape .*; give the positions"):
        build().encode(*pack(tiny_tokens()), read)
    with pytest.raises(ValueError, match=rf"read is {read.dtype} of shape .*; give the positions"):
        build(ENCODER)(tiny_tokens(), read)


@pytest.mark.parametrize("dtype", [torch.uint16, torch.complex64, torch.bool])
def test_tokens_of_other_types_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=f"tokens are {dtype}; give whole numbers as uint8"):
        build(ENCODER)(torch.zeros(1, NUM_GENES, dtype=dtype))


def test_part_of_the_genes_is_refused_by_an_encoder_of_all() -> None:
    with pytest.raises(ValueError, match=r"trained with encoder\.sequence full: 32 genes"):
        build(ENCODER).encode(*pack(tiny_tokens()))


def test_token_out_of_range_is_refused_in_dense_cells() -> None:
    for encoder in (build(), build(ENCODER)):
        with pytest.raises(ValueError, match="token 9 is out of range"):
            encoder(torch.full((1, NUM_GENES), 9))


def test_reading_from_dense_cells_is_for_all_genes() -> None:
    with pytest.raises(ValueError, match=r"reads positions in encode\(\) only"):
        build()(tiny_tokens(), torch.tensor([0]))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_zeros": -1}, "encoder.num_zeros is -1"),
        ({"kernel": "fast"}, "encoder.kernel is 'fast'; choose one of auto, native, torch, refer"),
        ({"sequence": "some"}, "encoder.sequence is 'some'; choose one of full, expressed"),
        ({"num_zeros": 5}, "encoder.num_zeros is 5, but encoder.sequence is full"),
        ({"dim_head": 0}, "encoder.dim_head is 0; give 2 or more"),
        ({"dim_head": 1}, "encoder.dim_head is 1; give 2 or more"),
        ({"num_features": 0}, "encoder.num_features is 0; give 1 or more"),
        ({"kernel": "native", "attention": "published"}, "of which there is no native kernel"),
        ({"dim": 200, "heads": 7}, "encoder.dim is 200, not a multiple of encoder.heads 7"),
    ],
)
def test_impossible_shapes_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EncoderConfig(**fields)  # type: ignore[arg-type]
