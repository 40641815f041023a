"""What the numbers of a matrix are: counts, log(1 + x) of them, or something else.

A cell that was scaled to a common library size gives itself away: the sums of its cells, or of
what they were before the logarithm, are all the same.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

HIGHEST_LOG: Final = 20.0
"""No logarithm of a count is larger, to base 2 or e."""
_SPREAD: Final = 0.01
"""Library sizes that differ by less, relative to their mean, were made equal."""


@dataclass(frozen=True)
class Scale:
    """What numbers are, in words.

    Attributes:
        name: `counts`, `counts per 10,000`, `log(1 + counts per 10,000)`, …
        is_counts: Whether they are raw counts.
    """

    name: str

    @property
    def is_counts(self) -> bool:
        """Whether these are raw counts."""
        return self.name == "counts"


def scale_of(matrix: sparse.csr_matrix) -> Scale:
    """Tell what the numbers of some cells are.

    Args:
        matrix: Cells × genes, CSR; as the file has them.
    """
    data = matrix.data
    if not np.issubdtype(data.dtype, np.number):
        return Scale(f"{data.dtype} values, no numbers")
    data = data.astype(np.float64)
    if not np.isfinite(data).all():
        return Scale("values that are not all finite")
    if (data < 0).any():
        return Scale("scaled expression with negative values")
    if (data == np.rint(data)).all():
        return Scale("counts")
    values = sparse.csr_matrix((data, matrix.indices, matrix.indptr), shape=matrix.shape)
    if (size := _common_sum(values, data)) is not None:
        return Scale(f"counts per {size:,}")
    if data.max() >= HIGHEST_LOG:
        return Scale("values that are not whole (normalised or estimated), without a logarithm")
    for name, factor in (("log(1 + {})", 1.0), ("log2(1 + {})", np.log(2.0))):
        if (size := _common_sum(values, np.expm1(data * factor))) is not None:
            return Scale(name.format(f"counts per {size:,}"))
    return Scale("log-normalised expression")


def _common_sum(matrix: sparse.csr_matrix, values: NDArray[np.float64]) -> int | None:
    """The library size that all cells share, if they do; it is lost when genes were left out."""
    linear = sparse.csr_matrix((values, matrix.indices, matrix.indptr), shape=matrix.shape)
    sums = np.asarray(linear.sum(axis=1)).ravel()
    sums = sums[sums > 0]
    if len(sums) < 2 or sums.std() > _SPREAD * sums.mean():
        return None
    return int(round(sums.mean(), 2 - int(np.ceil(np.log10(sums.mean())))))
