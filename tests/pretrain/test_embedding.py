"""Embeddings of expression: rows by bin, or mixtures that change with the value."""

import numpy as np
import pytest
import torch

from datastore.binning import bin_cells, expression_values
from datastore.config import BinningConfig
from pretrain.embedding import HIDDEN, BinnedExpression, ContinuousExpression

BINNING = BinningConfig()


def continuous() -> ContinuousExpression:
    torch.manual_seed(0)
    return ContinuousExpression(BINNING, 16)


def test_binned_rows_are_the_table() -> None:
    embedding = BinnedExpression(BINNING, 16)
    tokens = torch.tensor([[0, 5, 6]], dtype=torch.uint8)

    assert torch.equal(embedding(tokens), embedding.weight[tokens.long()])
    assert embedding.num_embeddings == 7


def test_a_value_is_a_mixture_of_rows_by_hand() -> None:
    embedding = continuous()
    centres = np.array([0.0, 1.5, 2.5, 3.5, 4.5, 5.5])

    for value in (0.0, 0.4, 2.5, 3.0, 9.0):
        weights = np.exp(-4.0 * (value - centres) ** 2)
        expected = weights / weights.sum() @ embedding.weight[:6].detach().numpy()
        found = embedding(torch.tensor([value])).detach().numpy()[0]
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_a_hidden_gene_is_the_mask_row_alone() -> None:
    embedding = continuous()

    torch.testing.assert_close(embedding(torch.tensor([HIDDEN]))[0], embedding.weight[6])


def test_embedding_varies_continuously_across_the_edges_of_bins() -> None:
    embedding = continuous()
    values = torch.linspace(0, 7, 7_001)

    with torch.no_grad():
        steps = embedding(values).diff(dim=0).norm(dim=1)
        jump = (embedding.weight[1] - embedding.weight[2]).norm()

    assert float(steps.max()) < 0.03  # worst 0.015, for a step of 0.001
    assert float(jump) > 4  # what bins would jump by


def test_centres_and_sharpness_learn() -> None:
    embedding = continuous()
    embedding(torch.tensor([0.3, 2.2, HIDDEN])).square().sum().backward()

    for weight in embedding.parameters():
        assert weight.grad is not None
        assert torch.isfinite(weight.grad).all()
    assert embedding.centres.grad is not None
    assert embedding.centres.grad.any()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.5, -2.0])
def test_what_is_no_expression_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match=r"1 expression values are NaN, infinite or negative"):
        continuous().check(torch.tensor([0.0, value, HIDDEN]))


@pytest.mark.parametrize("value", [13.4, 1e4, 1e19, 3e38])
def test_more_than_a_cell_can_have_is_refused(value: float) -> None:
    message = r"an expression value is .*, but log2\(1 \+ counts per 10,000\) is 13.29 at most"
    with pytest.raises(ValueError, match=message):
        continuous().check(torch.tensor([0.0, value, HIDDEN]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("target_sum", [1.0, 10_000.0, 1e6])
def test_all_counts_of_a_cell_in_one_gene_are_accepted(
    target_sum: float, dtype: torch.dtype
) -> None:
    binning = BinningConfig(target_sum=target_sum)
    values = expression_values(np.array([0, 1]), np.array([7]), binning)

    ContinuousExpression(binning, 16).check(torch.from_numpy(values).to(dtype))

    with pytest.raises(ValueError, match=rf"counts per {target_sum:,.15g}\) is .* at most"):
        ContinuousExpression(binning, 16).check(torch.from_numpy(values * 1.01).double())


def test_types_are_not_mixed_up() -> None:
    with pytest.raises(ValueError, match=r"values are torch.uint8, but encoder.expression is cont"):
        continuous().check(torch.zeros(3, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"tokens are torch.float32, but encoder.expression is bi"):
        BinnedExpression(BINNING, 4).check(torch.zeros(3))


def test_values_and_bins_agree() -> None:
    rng = np.random.default_rng(0)
    counts = rng.integers(1, 400, 300)
    indptr = np.array([0, 0, 40, 300])

    values = expression_values(indptr, counts, BINNING)

    library = np.repeat([0, counts[:40].sum(), counts[40:].sum()], [0, 40, 260])
    np.testing.assert_allclose(values, np.log2(1 + 1e4 * counts / library), rtol=1e-6)
    bins = bin_cells(indptr, counts, BINNING)
    np.testing.assert_array_equal(bins, np.minimum(np.floor(values), 5))
    assert values.dtype == np.float32
