"""Expression → vector: a row per bin, or a mixture of such rows that changes with the value.

The published model looks bins up in a table. The continuous form keeps that table and weighs its
rows by how near the value log2(1 + CP10k) is to each bin's learned centre, so that two values on
both sides of an edge are embedded alike (soft assignment, as the paper argues for).
"""

import math
from typing import Final

import torch
from torch import Tensor, nn

from datastore.config import BinningConfig
from pretrain.sequence import has_values
from pretrain.sums import TokenEmbedding

HIDDEN: Final = -1.0
"""What stands for a hidden gene among continuous values, which are 0 or more."""

_WHOLE: Final = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_SLACK: Final = 1.004
"""bfloat16 rounds a value by a 512th part at most; this is twice that."""


class BinnedExpression(TokenEmbedding):
    """A row for each bin and one for the mask token."""

    def __init__(self, binning: BinningConfig, dim: int) -> None:
        super().__init__(binning.num_tokens, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """Look tokens up, integers of any shape; a dimension D is added."""
        return super().forward(tokens.long())

    def check(self, tokens: Tensor) -> None:
        """Refuse what is no token.

        Raises:
            ValueError: If the type is not an integer's, or a token is out of range.
        """
        if tokens.is_floating_point():
            raise ValueError(
                f"tokens are {tokens.dtype}, but encoder.expression is binned; give whole numbers "
                "(continuous values need a model that was trained on them)"
            )
        if tokens.dtype not in _WHOLE:
            raise ValueError(
                f"tokens are {tokens.dtype}; give whole numbers as uint8, int16, int32 or int64"
            )
        if has_values(tokens) and tokens.numel():
            low, high = (int(end) for end in tokens.aminmax())
            if low < 0 or high >= self.num_embeddings:
                raise ValueError(
                    f"token {low if low < 0 else high} is out of range; the encoder knows 0 to "
                    f"{self.num_embeddings - 1} (binning.top_bin is {self.num_embeddings - 2})"
                )


class ContinuousExpression(nn.Embedding):
    """Rows as those of `BinnedExpression`, weighed by a softmax over distances to bin centres."""

    def __init__(self, binning: BinningConfig, dim: int) -> None:
        super().__init__(binning.num_tokens, dim)
        self.scale = f"log2(1 + counts per {binning.target_sum:,.15g})"
        # A gene has at most all counts of its cell.
        self.largest = math.log2(1 + binning.target_sum)
        # Not expressed is 0; a bin b holds the values from b to b + 1.
        middle = torch.arange(binning.top_bin + 1, dtype=torch.float32) + 0.5
        middle[0] = 0.0
        self.centres = nn.Parameter(middle)
        self.sharpness = nn.Parameter(torch.full((1,), 4.0))

    def forward(self, values: Tensor) -> Tensor:
        """Embed values log2(1 + CP10k), or `HIDDEN`, of any shape; a dimension D is added."""
        distance = (values.unsqueeze(-1).float() - self.centres.float()).square()
        shares = (-self.sharpness.float() * distance).softmax(-1)  # (..., top_bin + 1)
        hidden = (values == HIDDEN).unsqueeze(-1)
        shares = torch.cat([shares.masked_fill(hidden, 0.0), hidden.to(shares)], -1)
        return shares.to(self.weight) @ self.weight

    def check(self, values: Tensor) -> None:
        """Refuse what is no expression value.

        Raises:
            ValueError: If the type is not a float's, or a value is NaN, infinite, negative or more
                than a cell can have.
        """
        if not values.is_floating_point():
            raise ValueError(
                f"values are {values.dtype}, but encoder.expression is continuous; give "
                f"{self.scale} as floats"
            )
        if not has_values(values) or not values.numel():
            return
        wrong = ~(torch.isfinite(values) & ((values >= 0) | (values == HIDDEN)))
        if wrong.any():
            raise ValueError(
                f"{int(wrong.sum())} expression values are NaN, infinite or negative, the first is "
                f"{float(values[wrong][0])}; give {self.scale}, and {HIDDEN:g} for hidden genes"
            )
        highest = float(values.max())
        if highest > self.largest * _SLACK:
            raise ValueError(
                f"an expression value is {highest:g}, but {self.scale} is {self.largest:.2f} at "
                "most; give that, not raw counts"
            )


EXPRESSIONS: Final[dict[str, type[BinnedExpression] | type[ContinuousExpression]]] = {
    "binned": BinnedExpression,
    "continuous": ContinuousExpression,
}
"""Embeddings by the word in `encoder.expression`."""
