"""Figures are files of sane size and show what they were given."""

import struct
from pathlib import Path

import numpy as np
import pytest
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from finetune.figures import (
    plot_confusion,
    plot_loss,
    plot_scores,
    plot_umap,
    score_table,
    umap_embedding,
)
from finetune.metrics import ClassificationScores, score

HISTORY = [
    {"step": 1, "loss": 2.0, "masked_accuracy": 0.3, "commonest_bin_accuracy": 0.5},
    {"step": 2, "loss": 1.5, "masked_accuracy": 0.4, "commonest_bin_accuracy": 0.5},
    {"step": 2, "validation_loss": 1.6, "validation_masked_accuracy": 0.35},
    {"step": 3, "loss": 1.2, "masked_accuracy": 0.55, "commonest_bin_accuracy": 0.5},
]


def png_size(path: Path) -> tuple[int, int]:
    """Read width and height from the first bytes of a PNG, or fail."""
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert data[-8:-4] == b"IEND"
    width, height = struct.unpack(">II", data[16:24])
    return width, height


def legend_texts(figure: Figure) -> list[str]:
    legends = [*figure.legends, *(axes.get_legend() for axes in figure.axes)]
    return [text.get_text() for legend in legends if legend for text in legend.get_texts()]


def bar_widths(axes: Axes) -> list[float]:
    return [bar.get_width() for bar in axes.patches if isinstance(bar, Rectangle)]


def confused_scores(num_classes: int) -> ClassificationScores:
    classes = [f"type_with_a_long_name_{i}" for i in range(num_classes)]
    truth = [name for i, name in enumerate(classes) for _ in range(10 + 100 * i)]
    rng = np.random.default_rng(0)
    predicted = np.where(rng.random(len(truth)) < 0.2, rng.choice(classes, len(truth)), truth)
    return score(truth, predicted.tolist(), classes)


def test_loss_shows_accuracy_beside_the_rule(tmp_path: Path) -> None:
    figure = plot_loss(HISTORY, tmp_path / "loss.png")
    assert png_size(tmp_path / "loss.png") == (1500, 600)  # 10 x 4 inches at 150 dpi
    loss, accuracy = figure.axes
    assert [line.get_label() for line in loss.lines] == ["Training", "Validation"]
    np.testing.assert_array_equal(loss.lines[0].get_xydata(), [[1, 2.0], [2, 1.5], [3, 1.2]])
    assert [line.get_label() for line in accuracy.lines] == [
        "Training",
        "Validation",
        "Commonest-bin rule, training",
    ]
    assert accuracy.get_xlabel() == "Step"


@pytest.mark.parametrize(
    ("history", "num_lines"),
    [
        pytest.param([{"step": 1, "loss": 2.0}], 1, id="loss only, one record"),
        pytest.param([{"step": 1, "validation_masked_accuracy": 0.5}], 1, id="validation only"),
        pytest.param([{"loss": 1.0}, {"step": 5, "loss": 2.0}], 1, id="a record without step"),
    ],
)
def test_missing_keys_are_left_out(
    history: list[dict[str, float]], num_lines: int, tmp_path: Path
) -> None:
    figure = plot_loss(history, tmp_path / "loss.png")
    assert sum(len(axes.lines) for axes in figure.axes) == num_lines
    assert len(legend_texts(figure)) == num_lines


@pytest.mark.parametrize("num_classes", [2, 14])
def test_confusion_writes_every_count_and_name(num_classes: int, tmp_path: Path) -> None:
    scores = confused_scores(num_classes)
    figure = plot_confusion(scores, tmp_path / "confusion.png")
    width, height = png_size(tmp_path / "confusion.png")
    assert 600 < height < width < 2000
    axes = figure.axes[0]
    written = {text.get_position(): text.get_text() for text in axes.texts}
    expected = {
        (column, row): f"{scores.confusion[row, column]:,}"
        for row, column in np.argwhere(scores.confusion > 0).tolist()
    }
    assert written == expected
    assert [label.get_text() for label in axes.get_xticklabels()] == list(scores.classes)
    shares = np.asarray(axes.images[0].get_array())
    np.testing.assert_allclose(shares.sum(axis=1), 1)
    assert f"{scores.accuracy:.3f}" in axes.get_title()
    assert f"{scores.macro_f1:.3f}" in axes.get_title()


def test_confusion_of_a_class_without_cells(tmp_path: Path) -> None:
    figure = plot_confusion(score(["a"], ["b"], ["a", "b"]), tmp_path / "confusion.png")
    np.testing.assert_array_equal(
        np.asarray(figure.axes[0].images[0].get_array()), [[0, 1], [0, 0]]
    )


@pytest.mark.parametrize(
    ("num_types", "num_novel"),
    [
        pytest.param(3, 0, id="few types"),
        pytest.param(20, 7, id="twenty types and novel cells"),
        pytest.param(45, 1, id="more types than styles"),
    ],
)
def test_umap_legend_names_types_and_novel_cells(
    num_types: int, num_novel: int, tmp_path: Path
) -> None:
    points = np.random.default_rng(0).normal(size=(num_types * 10, 2))
    labels = [f"type {i % num_types}" for i in range(len(points))]
    novel = np.arange(len(points)) % num_types == 0
    novel &= np.arange(len(points)) < num_novel * num_types
    figure = plot_umap(points, labels, tmp_path / "umap.png", "Cells", novel)
    width, height = png_size(tmp_path / "umap.png")
    assert 600 < height < width < 2500
    names = legend_texts(figure)
    assert len(names) == num_types + int(num_novel > 0)
    assert "type 1 (10)" in names
    assert (f"Novel ({num_novel})" in names) == (num_novel > 0)
    num_drawn = sum(len(np.asarray(c.get_offsets())) for c in figure.axes[0].collections)
    assert num_drawn == len(points)


def test_first_twenty_types_look_different(tmp_path: Path) -> None:
    points = np.random.default_rng(0).normal(size=(20, 2))
    figure = plot_umap(points, [str(i) for i in range(20)], tmp_path / "umap.png", "Cells")
    colours = {str(np.asarray(c.get_facecolor())) for c in figure.axes[0].collections}
    assert len(colours) == 20


def test_umap_refuses_unequal_lengths(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="3, 2 and 3 cells"):
        plot_umap(np.zeros((3, 2)), ["a", "b"], tmp_path / "umap.png", "Cells")


def test_scores_are_bars_with_ours_in_colour(tmp_path: Path) -> None:
    good, bad = score(["a", "b"], ["a", "b"], ["a", "b"]), score(["a", "b"], ["a", "a"], ["a", "b"])
    figure = plot_scores({"scBERT": good, "majority": bad}, tmp_path / "scores.png")
    assert png_size(tmp_path / "scores.png")[0] == 1350
    accuracy, macro_f1 = figure.axes
    assert bar_widths(accuracy) == [1, 0.5]
    assert bar_widths(macro_f1) == pytest.approx([1, 1 / 3])
    ours, others = (bar.get_facecolor() for bar in accuracy.patches)
    assert ours != others
    assert [label.get_text() for label in accuracy.get_yticklabels()] == ["scBERT", "majority"]
    with pytest.raises(ValueError, match="named_scores is empty"):
        plot_scores({}, tmp_path / "none.png")


def test_files_are_whole_repeatable_and_of_a_known_format(tmp_path: Path) -> None:
    for name in ("one.svg", "two.svg"):
        plot_confusion(confused_scores(3), tmp_path / name)
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()
    assert (tmp_path / "one.svg").read_text().startswith("<?xml")
    with pytest.raises(ValueError, match=r"end in \.png or \.svg"):
        plot_loss(HISTORY, tmp_path / "loss.pdf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.svg", "two.svg"]
    assert pyplot.get_fignums() == []


def test_nothing_to_draw_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="history has nothing to draw"):
        plot_loss([{"step": 1, "lr": 0.1}], tmp_path / "loss.png")


def test_score_table_is_aligned() -> None:
    scores = score(["a", "b"], ["a", "a"], ["a", "b"])
    rows = [("scBERT", scores, None), ("logistic regression", scores, 1234.56)]
    assert score_table(rows).splitlines() == [
        "method               accuracy  macro-F1  seconds",
        "scBERT                  0.500     0.333        -",
        "logistic regression     0.500     0.333  1,234.6",
    ]


@pytest.mark.slow
def test_umap_repeats_itself_and_takes_few_cells() -> None:
    x = np.random.default_rng(0).normal(size=(40, 6))
    x[:20] += 20
    points = umap_embedding(x, seed=1)
    assert points.shape == (40, 2)
    assert points.dtype == np.float32
    np.testing.assert_array_equal(points, umap_embedding(x, seed=1))
    # Two far groups stay apart: each cell's nearest neighbour is of its own group.
    distances = np.linalg.norm(points[:, None] - points[None], axis=-1) + np.diag([np.inf] * 40)
    assert np.all((distances.argmin(axis=1) < 20) == (np.arange(40) < 20))
    for num_cells in (1, 2, 3, 4, 14, 15, 16):
        few = umap_embedding(x[:num_cells], seed=1)
        assert few.shape == (num_cells, 2)
        assert np.isfinite(few).all()


@pytest.mark.parametrize(
    ("x", "message"),
    [
        pytest.param(np.zeros((0, 3)), "shape", id="no cells"),
        pytest.param(np.zeros(3), "shape", id="one dimension"),
        pytest.param(np.full((5, 2), np.nan), "NaN", id="not finite"),
    ],
)
def test_umap_refuses_what_it_cannot_lay_out(x: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        umap_embedding(x, seed=0)
