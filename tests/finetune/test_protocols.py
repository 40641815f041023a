"""Protocols: which cells, how many, and the same for the same seed."""

import numpy as np
import pytest

from finetune.protocol_config import ProtocolConfig
from finetune.protocols import (
    few_shot,
    imbalance,
    k_fold,
    leave_group_out,
    leave_type_out,
    marker_deletion,
)

LABELS = np.repeat(["a", "b", "c", "d", "e"], (200, 120, 60, 40, 3))


def test_folds_label_each_cell_once() -> None:
    trials = k_fold(LABELS, ProtocolConfig(num_folds=4), seed=0)
    assert sorted(np.concatenate([trial.test for trial in trials])) == list(range(len(LABELS)))
    for trial in trials:
        assert not set(trial.train) & set(trial.test)
        assert set(LABELS[trial.train]) == set(LABELS)


def test_groups_are_left_out_with_the_types_that_only_they_have() -> None:
    labels = np.array(["a", "b", "a", "b", "only", "a", "b"])
    groups = np.array(["x", "x", "y", "y", "y", "z", "z"])
    trials = {trial.name: trial for trial in leave_group_out(labels, groups)}
    assert set(trials) == {"x", "y", "z"}
    assert trials["y"].test.tolist() == [2, 3]
    assert trials["y"].train.tolist() == [0, 1, 5, 6]
    with pytest.raises(ValueError, match="needs two"):
        leave_group_out(labels, np.array(["x"] * 7))


def test_few_cells_of_each_type_and_at_most_half() -> None:
    one, ten = few_shot(LABELS, ProtocolConfig(name="few-shot", per_class=(1, 10)), seed=3)
    assert np.unique(LABELS[one.train], return_counts=True)[1].tolist() == [1] * 5
    assert np.unique(LABELS[ten.train], return_counts=True)[1].tolist() == [10, 10, 10, 10, 1]
    assert len(ten.train) + len(ten.test) == len(LABELS)
    again = few_shot(LABELS, ProtocolConfig(name="few-shot", per_class=(1, 10)), seed=3)
    assert (again[1].train == ten.train).all()


def test_imbalance_is_a_hundred_to_one_for_four_types() -> None:
    (trial,) = imbalance(LABELS, ProtocolConfig(name="imbalance", test_share=0.25), seed=0)
    assert sorted(np.unique(LABELS[trial.train], return_counts=True)[1]) == [2, 2, 30, 30]
    assert "e" not in LABELS[trial.test]
    with pytest.raises(ValueError, match="four types"):
        imbalance(LABELS[:300], ProtocolConfig(), 0)


def test_markers_are_deleted_more_and_more() -> None:
    config = ProtocolConfig(name="marker-deletion", deleted=(0.0, 0.5, 1.0))
    trials = marker_deletion(LABELS, [7, 3, 3, 9, 5], config, seed=0)
    assert [len(trial.deleted) for trial in trials] == [0, 2, 4]
    assert set(trials[1].deleted) < set(trials[2].deleted) == {3, 5, 7, 9}
    with pytest.raises(ValueError, match="no marker of these types"):
        marker_deletion(LABELS, [], config, 0)


def test_a_type_is_left_out_of_learning_alone() -> None:
    trials = leave_type_out(LABELS, ProtocolConfig(name="leave-type-out"), seed=0)
    assert [trial.novel for trial in trials] == ["a", "b", "c", "d"]  # e has 3 cells
    for trial in trials:
        assert trial.novel not in LABELS[trial.train]
        assert trial.novel in LABELS[trial.test]
    with pytest.raises(ValueError, match="types has 'x'"):
        leave_type_out(LABELS, ProtocolConfig(types=("x",)), 0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_folds": 1}, "num_folds is 1"),
        ({"test_share": 1.0}, "test_share is 1.0"),
        ({"per_class": (0,)}, "per_class"),
        ({"deleted": (2.0,)}, "deleted"),
        ({"name": "leave-group-out"}, "group_key names the groups"),
        ({"group_key": "donor"}, "group_key names the groups"),
    ],
)
def test_refusals(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ProtocolConfig(**fields)  # type: ignore[arg-type]
