"""Labels are checked by name; splits are stratified and repeatable."""

from collections.abc import Iterable

import numpy as np
import pandas as pd
import pytest

from finetune.dataset import check_labels, stratified_split


def labels_of(*num_cells: int) -> np.ndarray:
    names = [f"type_{i}" for i in range(len(num_cells))]
    return np.random.default_rng(0).permutation(np.repeat(names, num_cells))


@pytest.mark.parametrize(
    ("num_cells", "share", "num_test"),
    [
        pytest.param((100, 50), 0.2, (20, 10), id="exact shares"),
        pytest.param((7, 3), 0.2, (1, 1), id="nearest whole number, at least one"),
        pytest.param((10, 2), 0.01, (1, 1), id="a small share still tests every class"),
        pytest.param((10, 2), 0.99, (9, 1), id="a large share still trains every class"),
        pytest.param((10, 1), 0.5, (5, 0), id="a single cell is trained on"),
        pytest.param((5, 5), 0.5, (3, 3), id="halves are rounded up"),
    ],
)
def test_each_class_is_shared_out(
    num_cells: tuple[int, ...], share: float, num_test: tuple[int, ...]
) -> None:
    labels = labels_of(*num_cells)
    train, test = stratified_split(labels, share, seed=3)
    np.testing.assert_array_equal(np.sort(np.concatenate([train, test])), np.arange(len(labels)))
    np.testing.assert_array_equal(train, np.sort(train))
    np.testing.assert_array_equal(test, np.sort(test))
    found = tuple(int(np.sum(labels[test] == f"type_{i}")) for i in range(len(num_cells)))
    assert found == num_test


def test_split_is_a_pure_function() -> None:
    labels = labels_of(40, 30, 9)
    np.random.seed(0)  # noqa: NPY002 - the global generator must not matter
    first = stratified_split(labels, 0.2, seed=1)
    np.random.seed(1)  # noqa: NPY002
    again = stratified_split(labels.copy(), 0.2, seed=1)
    other = stratified_split(labels, 0.2, seed=2)
    np.testing.assert_array_equal(first[1], again[1])
    assert not np.array_equal(first[1], other[1])


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, 20.0, float("nan")])
def test_share_outside_zero_to_one_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match=f"test_share is {share}"):
        stratified_split(labels_of(5, 5), share, seed=0)


@pytest.mark.parametrize("labels", [labels_of(5), labels_of()], ids=["one class", "no cells"])
def test_fewer_than_two_classes_are_refused(labels: np.ndarray) -> None:
    with pytest.raises(ValueError, match="needs two or more"):
        stratified_split(labels, 0.2, seed=0)


@pytest.mark.parametrize(
    "values",
    [
        pytest.param(["b", "a", "b"], id="list"),
        pytest.param(np.array(["b", "a", "b"]), id="array"),
        pytest.param(pd.Series(["b", "a", "b"], index=["x", "y", "z"]), id="series"),
        pytest.param(pd.Series(pd.Categorical(["b", "a", "b"])), id="categorical"),
    ],
)
def test_labels_come_back_as_text(values: Iterable[object]) -> None:
    labels = check_labels(values, "cell_type")
    assert labels.dtype.kind == "U"
    assert labels.tolist() == ["b", "a", "b"]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        pytest.param(np.array([1, 0]), ["1", "0"], id="whole numbers"),
        pytest.param(np.array([1.0, 0.5]), ["1", "0.5"], id="floats"),
        pytest.param(pd.Series(pd.Categorical(["1", "0"])), ["1", "0"], id="clusters as text"),
    ],
)
def test_numbers_are_taken_as_text_with_a_warning(
    values: Iterable[object], expected: list[str]
) -> None:
    with pytest.warns(UserWarning, match=r"obs\['leiden'\] holds numbers"):
        labels = check_labels(values, "leiden")
    assert labels.tolist() == expected


@pytest.mark.parametrize(
    ("values", "message"),
    [
        pytest.param(None, r"obs\['type'\] has no labels", id="no column"),
        pytest.param([], "has no labels", id="no cells"),
        pytest.param(["a", np.nan, None, "b"], "for 2 of 4 cells .*notna", id="NaN and None"),
        pytest.param(
            pd.Series(["a", None, "b"], dtype="category"), "for 1 of 3 cells", id="categorical NaN"
        ),
        pytest.param(pd.array(["a", pd.NA], dtype="string"), "1 of 2 cells", id="pandas NA"),
        pytest.param(["a", "nan", " ", "b"], "2 of 4 cells.*isin", id="text for missing"),
        pytest.param(["a", "a"], r"one cell type only \('a', 2 cells\)", id="one type"),
    ],
)
def test_unusable_labels_are_refused_by_name(values: Iterable[object] | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_labels(values, "type")


def test_the_remedy_for_missing_labels_works() -> None:
    column = pd.Series(["a", None, "b", "b"])
    assert check_labels(column[column.notna()], "type").tolist() == ["a", "b", "b"]
