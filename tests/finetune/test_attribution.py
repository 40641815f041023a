"""Attention compared with the explicit matrix; gradients with differences; deletions by hand."""

import numpy as np
import pytest
import torch
from scipy import sparse

from datastore.genes import GenePanel
from finetune.attribution import attribute, column_mean_attention
from finetune.classifier import (
    CellClassifier,
    dense_rates,
    load_classifier,
    predict,
    token_batches,
)
from finetune.reasons import (
    deletion_test,
    describe_deletions,
    rows_per_type,
    type_reasons,
)
from pretrain.favor import draw_projection, favor_attention
from tests.support.labelled import GENES, TYPES, labelled_cells, write_classifier


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> CellClassifier:
    folder = write_classifier(tmp_path_factory.mktemp("attribution") / "model")
    return load_classifier(folder)[0]


@pytest.fixture(scope="module")
def counts() -> sparse.csr_matrix:
    return sparse.csr_matrix(labelled_cells(21, seed=4).X).astype(np.int64)


def _explicit(q: torch.Tensor, k: torch.Tensor, projection: torch.Tensor) -> torch.Tensor:
    """The attention matrices of all heads, (H, n, n), by attending to one-hot values."""
    n, heads, width = q.shape
    columns = torch.eye(-(-n // width) * width, dtype=q.dtype)[:n]
    pieces = [
        favor_attention(q[None], k[None], some[None, :, None].expand(1, n, heads, width).clone(),
                        projection, kernel="reference")[0]
        for some in columns.split(width, dim=1)
    ]  # fmt: skip
    return torch.cat(pieces, dim=-1)[..., :n].transpose(0, 1)


def test_column_means_are_those_of_the_explicit_matrix() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 13, 3, 8, dtype=torch.float64, generator=generator)
    projection = draw_projection(20, 8, 1).double()
    matrix = _explicit(q, k, projection)
    torch.testing.assert_close(matrix.sum(-1), torch.ones(3, 13, dtype=torch.float64))
    means = column_mean_attention(q, k, projection)
    torch.testing.assert_close(means, matrix.mean(dim=(0, 1)))
    assert float(means.std()) > 1e-3  # they differ, so that agreeing says something


def test_attention_of_the_whole_model_is_that_of_its_blocks(
    model: CellClassifier, counts: sparse.csr_matrix
) -> None:
    (tokens,) = token_batches(counts[:4], 4, model.encoder)
    matrices: list[torch.Tensor] = []

    def keep(q: torch.Tensor, k: torch.Tensor, directions: torch.Tensor, *_: object) -> None:
        cells = [_explicit(a, b, directions) for a, b in zip(q.chunk(4), k.chunk(4), strict=True)]
        matrices.append(torch.stack(cells))

    attentions = [block[0].fn for block in model.encoder.performer.net.layers]
    for attention in attentions:
        attention.observer = keep
    with torch.no_grad():
        model.encoder(tokens)
    for attention in attentions:
        attention.observer = None
    expected = torch.stack(matrices).mean(dim=(0, 2, 3)) * (len(GENES) + 1)
    (found,) = attribute(model, counts[:4], 8, views=("attention",))
    shown = (tokens > 0).numpy()
    np.testing.assert_allclose(
        found.views["attention"], expected[:, :-1].numpy() * shown, rtol=1e-4, atol=1e-6
    )


def test_gradient_is_the_slope_towards_no_expression(
    model: CellClassifier, counts: sparse.csr_matrix, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Move the embedding of one gene a little towards that of no expression."""
    part = counts[:3]
    (found,) = attribute(model, part, 3)
    (tokens,) = token_batches(part, 3, model.encoder)
    rates = dense_rates(part, torch.device("cpu"))
    gene, step = int(tokens[0].float().argmax()), 1e-2

    def margin(change: float) -> float:
        original = model.encoder.expression.forward
        zero = original(torch.zeros_like(tokens[:1, :1]))

        def forward(given: torch.Tensor) -> torch.Tensor:
            output = original(given)
            if output.shape[0] == 3:
                output = output.clone()
                output[0, gene] += change * (output[0, gene] - zero[0, 0])
            return output

        monkeypatch.setattr(model.encoder.expression, "forward", forward)
        with torch.no_grad():
            logits = model(tokens, rates)[0][0]
        monkeypatch.undo()
        return float(logits[int(found.codes[0])] - logits.mean())

    slope = (margin(step) - margin(-step)) / (2 * step)
    assert found.views["gradient"][0, gene] == pytest.approx(slope, rel=2e-2, abs=1e-3)
    np.testing.assert_allclose(
        found.views["logit"], found.views["gradient"] + found.views["expression"], rtol=1e-5
    )


def test_views_do_not_depend_on_the_batch_and_skip_what_is_not_expressed(
    model: CellClassifier, counts: sparse.csr_matrix
) -> None:
    whole = list(attribute(model, counts, 32))
    pieces = list(attribute(model, counts, 4))
    assert len(whole) == 1
    for view, values in whole[0].views.items():
        joined = np.concatenate([piece.views[view] for piece in pieces])
        np.testing.assert_allclose(joined, values, rtol=1e-3, atol=1e-4)
        assert not values[counts.toarray() == 0].any()


def test_removing_top_genes_hurts_more_than_random_ones(
    model: CellClassifier, counts: sparse.csr_matrix
) -> None:
    """Scores made by trying each gene must win; the same scores upside down must not."""
    dense = counts.toarray()
    before = predict(model, counts, 32, progress=False).probabilities
    codes = before.argmax(axis=1)
    alone = np.zeros(dense.shape, np.float32)
    for gene in range(dense.shape[1]):
        changed = dense.copy()
        changed[:, gene] = 0
        after = predict(model, sparse.csr_matrix(changed), 32, progress=False).probabilities
        alone[:, gene] = (before - after)[np.arange(len(codes)), codes]
    good, bad, most, random = deletion_test(
        model, counts, {"logit": alone, "attention": -alone}, 3, seed=0
    )
    assert [d.removed for d in (good, bad, most, random)] == [
        *("logit", "attention", "most expressed", "random")
    ]
    assert good.drop > random.drop > bad.drop
    assert good.p_value is not None
    assert good.p_value < 0.01
    sentence = describe_deletions((good, bad, most, random), 3)
    assert "top 3 genes by logit hurts more than" in sentence
    assert f"by attention ({bad.drop:.3f}) hurt no more than random ones" in sentence


def test_reasons_of_types_are_means_over_their_cells(
    model: CellClassifier, counts: sparse.csr_matrix
) -> None:
    reasons = type_reasons(model, GenePanel(GENES), counts, num_removed=3, batch_size=5)
    (whole,) = attribute(model, counts, 32)
    for code in np.unique(whole.codes):
        rows = whole.codes == code
        assert reasons.num_cells[code] == rows.sum()
        for view, values in whole.views.items():
            expected = values[rows].mean(axis=0)
            np.testing.assert_allclose(reasons.views[view][code], expected, rtol=1e-3, atol=1e-4)
    table = reasons.top_genes(num_top=4, markers={"mine": GENES[:8], "other": ["X"]})
    first = table[table["rank"] == 1].set_index("cell_type")
    specific = reasons.specific()
    for name in first.index:
        assert first.loc[name, "gene"] == GENES[int(specific[TYPES.index(name)].argmax())]
    assert set(table["marker_of"]) <= {"mine", ""}
    told = reasons.as_json()
    assert told["genes_removed"] == 3
    assert set(told["top_genes"]) == {"attention", "gradient", "expression", "logit"}


def test_cells_are_chosen_from_each_type() -> None:
    codes = np.repeat([0, 2], [100, 3]).astype(np.int32)
    rows = rows_per_type(codes, 3, 10)
    assert list(np.bincount(codes[rows], minlength=3)) == [10, 0, 3]
    assert list(rows) == sorted(set(rows))
