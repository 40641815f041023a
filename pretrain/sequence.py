"""Packed cells: positions of many cells, one behind the other, and what must hold for them."""

import torch
from torch import Tensor


def has_values(x: Tensor) -> bool:
    """Whether values can be looked at now: not while torch.compile traces, and not on meta."""
    return not (torch.compiler.is_compiling() or x.is_meta)


def check_packed(genes: Tensor, tokens: Tensor, offsets: Tensor, num_genes: int) -> None:
    """Refuse packed cells whose parts do not fit each other or the panel.

    Args:
        genes: Panel position of each token, or `num_genes` for the constant position, int64 (n,).
        tokens: One per position, (n,); 0 at the constant position.
        offsets: First token of each cell, and n at the end, int64 (B + 1,).
        num_genes: Length of the panel.

    Raises:
        ValueError: What does not fit, by name.
    """
    if genes.shape != tokens.shape or tokens.ndim != 1:
        raise ValueError(
            f"genes have shape {tuple(genes.shape)} and tokens {tuple(tokens.shape)}; packed cells "
            "have one of each per position, (n,)"
        )
    if offsets.ndim != 1 or not len(offsets):
        raise ValueError(
            f"offsets have shape {tuple(offsets.shape)}; give the first token of each cell and the "
            "number of tokens, (cells + 1,)"
        )
    for name, x in (("genes", genes), ("offsets", offsets)):
        if x.dtype != torch.int64:
            raise ValueError(f"{name} are {x.dtype}; give whole numbers as int64")
    if not has_values(tokens):
        return
    first, last = int(offsets[0]), int(offsets[-1])
    if first or last != len(tokens):
        raise ValueError(
            f"offsets run from {first} to {last} over {len(tokens)} tokens; they must begin with 0 "
            "and end with the number of tokens"
        )
    if len(offsets) > 1:
        _check_cells(genes, tokens, offsets, num_genes)


def _check_cells(genes: Tensor, tokens: Tensor, offsets: Tensor, num_genes: int) -> None:
    lengths = offsets.diff()
    if int(lengths.min()) < 1:
        wrong = int(lengths.argmin())
        raise ValueError(
            f"cell {wrong} has {int(lengths[wrong])} positions; every cell has at least the "
            "constant one"
        )
    low, high = (int(end) for end in genes.aminmax())
    if low < 0 or high > num_genes:
        raise ValueError(
            f"gene {low if low < 0 else high} is out of range; the encoder knows {num_genes} genes "
            f"(0 to {num_genes - 1}) and the constant position, {num_genes}"
        )
    ends = offsets[1:] - 1
    constant = (genes[ends] == num_genes) & (tokens[ends] == 0)
    if not bool(constant.all()):
        wrong = int(constant.int().argmin())
        raise ValueError(
            f"cell {wrong} ends with gene {int(genes[ends[wrong]])} and token "
            f"{tokens[ends[wrong]].item():g}; the last position of every cell is the constant one, "
            f"gene {num_genes} with token 0"
        )
    # A row of places for each cell; repeat_interleave would start threads for every few cells.
    rows = torch.zeros_like(genes).index_fill_(0, offsets[1:-1], num_genes + 1).cumsum(0)
    places = genes + rows
    seen = torch.zeros(len(lengths) * (num_genes + 1), dtype=torch.bool, device=genes.device)
    seen[places] = True
    if int(seen.count_nonzero()) != len(genes):
        wrong = int(places.bincount().argmax())
        raise ValueError(
            f"cell {wrong // (num_genes + 1)} has gene {wrong % (num_genes + 1)} more than once; "
            "give each gene once, and the constant position only at the end"
        )


def check_whole(offsets: Tensor, num_genes: int) -> None:
    """Refuse cells that do not show all genes; each gene comes once, says `check_packed`.

    Raises:
        ValueError: If a cell is shorter or longer than panel and constant position.
    """
    if not has_values(offsets):
        return
    lengths = offsets.diff()
    if bool((lengths != num_genes + 1).any()):
        wrong = int((lengths != num_genes + 1).int().argmax())
        raise ValueError(
            f"cell {wrong} has {int(lengths[wrong])} positions, but this encoder was trained with "
            f"encoder.sequence full: {num_genes} genes and the constant position in every cell"
        )


def check_read(read: Tensor | None, num_positions: int) -> None:
    """Refuse positions to read that are no whole numbers in a row, out of range or out of order.

    Raises:
        ValueError: If they are.
    """
    if read is None:
        return
    if read.dtype != torch.int64 or read.ndim != 1:
        raise ValueError(
            f"read is {read.dtype} of shape {tuple(read.shape)}; give the positions as int64 of "
            "shape (T,)"
        )
    if not len(read) or not has_values(read):
        return
    if int(read[0]) < 0 or int(read[-1]) >= num_positions or bool((read.diff() < 0).any()):
        raise ValueError(
            f"read must name positions from 0 to {num_positions - 1} in rising order; it begins "
            f"with {int(read[0])} and ends with {int(read[-1])}"
        )
