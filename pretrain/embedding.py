"""Expression → vector: a row per bin, or a mixture of such rows that changes with the value.

The published model looks bins up in a table. The continuous form keeps that table and weighs its
rows by how near the value log2(1 + CP10k) is to each bin's learned centre, so that two values on
both sides of an edge are embedded alike (soft assignment, as the paper argues for).
"""

from typing import Final

import torch
from torch import Tensor, nn

from datastore.config import BinningConfig
from pretrain.sums import TokenEmbedding

HIDDEN: Final = -1.0
"""What stands for a hidden gene among continuous values, which are 0 or more."""


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
        if tokens.numel():
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
            ValueError: If the type is not a float's, or a value is NaN, infinite or negative.
        """
        if not values.is_floating_point():
            raise ValueError(
                f"values are {values.dtype}, but encoder.expression is continuous; give "
                "log2(1 + counts per 10,000) as floats"
            )
        wrong = ~(torch.isfinite(values) & ((values >= 0) | (values == HIDDEN)))
        if wrong.any():
            raise ValueError(
                f"{int(wrong.sum())} expression values are NaN, infinite or negative, the first is "
                f"{float(values[wrong][0])}; give log2(1 + counts per 10,000), "
                f"and {HIDDEN:g} for hidden genes"
            )


EXPRESSIONS: Final[dict[str, type[BinnedExpression] | type[ContinuousExpression]]] = {
    "binned": BinnedExpression,
    "continuous": ContinuousExpression,
}
"""Embeddings by the word in `encoder.expression`."""
