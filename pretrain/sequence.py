"""Packed cells: positions of many cells, one behind the other, and what must hold for them."""

from torch import Tensor


def check_packed(genes: Tensor, tokens: Tensor, offsets: Tensor, num_genes: int) -> None:
    """Refuse packed cells whose parts do not fit each other or the panel.

    Args:
        genes: Panel position of each token, or `num_genes` for the constant position, (n,).
        tokens: One per position, (n,).
        offsets: First token of each cell, and n at the end, (B + 1,).
        num_genes: Length of the panel.

    Raises:
        ValueError: What does not fit, by name.
    """
    if genes.shape != tokens.shape or tokens.ndim != 1:
        raise ValueError(
            f"genes have shape {tuple(genes.shape)} and tokens {tuple(tokens.shape)}; packed cells "
            "have one of each per position, (n,)"
        )
    if offsets.ndim != 1 or len(offsets) < 2:
        raise ValueError(
            f"offsets have shape {tuple(offsets.shape)}; give the first token of each cell and the "
            "number of tokens, (cells + 1,)"
        )
    first, last, shortest = int(offsets[0]), int(offsets[-1]), int(offsets.diff().min())
    if first or last != len(tokens):
        raise ValueError(
            f"offsets run from {first} to {last} over {len(tokens)} tokens; they must begin with 0 "
            "and end with the number of tokens"
        )
    if shortest < 1:
        raise ValueError(
            f"cell {int(offsets.diff().argmin())} has {shortest} positions; every cell has at "
            "least the constant one"
        )
    low, high = (int(end) for end in genes.aminmax())
    if low < 0 or high > num_genes:
        raise ValueError(
            f"gene {low if low < 0 else high} is out of range; the encoder knows {num_genes} genes "
            f"(0 to {num_genes - 1}) and the constant position, {num_genes}"
        )


def check_whole(offsets: Tensor, num_genes: int) -> None:
    """Refuse cells that do not show all genes.

    Raises:
        ValueError: If a cell is shorter or longer than panel and constant position.
    """
    lengths = offsets.diff()
    if bool((lengths != num_genes + 1).any()):
        wrong = int((lengths != num_genes + 1).int().argmax())
        raise ValueError(
            f"cell {wrong} has {int(lengths[wrong])} positions, but this encoder was trained with "
            f"encoder.sequence full: {num_genes} genes and the constant position in every cell"
        )


def check_read(read: Tensor | None, num_positions: int) -> None:
    """Refuse positions to read that are out of range or out of order.

    Raises:
        ValueError: If they are.
    """
    if read is None or not len(read):
        return
    if int(read[0]) < 0 or int(read[-1]) >= num_positions or bool((read.diff() < 0).any()):
        raise ValueError(
            f"read must name positions from 0 to {num_positions - 1} in rising order; it begins "
            f"with {int(read[0])} and ends with {int(read[-1])}"
        )
