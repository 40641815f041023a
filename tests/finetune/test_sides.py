"""Both sides of a split, and what a fresh encoder knows."""

from pathlib import Path

import numpy as np
import pytest

from finetune.config import FinetuneConfig, FreshConfig, LabelledConfig
from finetune.sides import file_digest, read_sides, sides_of, split_rows
from pretrain.config import EncoderConfig
from tests.support.labelled import GENES, labelled_cells, write_encoder, write_labelled

SMALL = EncoderConfig(dim=16, depth=1, heads=2, dim_head=8)


def settings(data: LabelledConfig, fresh: FreshConfig, encoder: str = "none") -> FinetuneConfig:
    return FinetuneConfig(encoder=encoder, output="o", data=data, fresh=fresh)


def test_folds_hold_out_each_cell_once_whatever_the_seed() -> None:
    labels = labelled_cells(60, seed=0).obs["cell_type"].to_numpy(str)
    held_out = []
    for fold in range(4):
        data = LabelledConfig(path="p", num_folds=4, fold=fold)
        rows, test = split_rows(labels, data, seed=fold)
        assert sorted([*rows, *test]) == list(range(60))
        held_out += list(test)
    assert sorted(held_out) == list(range(60))


def test_a_fresh_panel_is_chosen_on_the_learning_side() -> None:
    cells = labelled_cells(90, seed=0)
    config = settings(LabelledConfig(path="p"), FreshConfig(encoder=SMALL, num_genes=12))
    sides = sides_of(cells, config)
    assert len(sides.start.panel) == 12
    assert sides.learn.counts.shape[1] == sides.test.counts.shape[1] == 12
    assert sides.start.lineage == "none"
    _, test = split_rows(cells.obs["cell_type"].to_numpy(str), config.data, config.seed)
    changed = cells.copy()
    table = changed.X.toarray()
    table[test] = np.random.default_rng(0).poisson(50, size=(len(test), table.shape[1]))
    changed.X = type(cells.X)(table.astype(np.float32))
    assert sides_of(changed, config).start.panel == sides.start.panel


def test_panel_file_and_test_file(tmp_path: Path) -> None:
    (tmp_path / "genes.txt").write_text("\n".join(GENES[3:9]) + "\n")
    data = LabelledConfig(
        path=str(write_labelled(tmp_path / "a.h5ad", 45)),
        test_path=str(write_labelled(tmp_path / "b.h5ad", 30, seed=1)),
    )
    fresh = FreshConfig(encoder=SMALL, panel=str(tmp_path / "genes.txt"))
    sides = read_sides(settings(data, fresh))
    assert sides.start.panel.names == GENES[3:9]
    assert (len(sides.learn.labels), len(sides.test.labels)) == (45, 30)
    pretrained = settings(data, fresh, str(write_encoder(tmp_path / "encoder")))
    assert read_sides(pretrained).start.panel.names == GENES
    assert file_digest(data.path) != file_digest(data.test_path or "")
    assert file_digest("adata") is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_folds": 3, "fold": 3}, "data.fold is 3 of data.num_folds 3"),
        ({"num_folds": 1}, "must be 2 or more"),
        ({"num_folds": 2, "test_path": "t"}, "goes without data.test_path"),
    ],
)
def test_refusals(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LabelledConfig(path="p", **fields)  # type: ignore[arg-type]
