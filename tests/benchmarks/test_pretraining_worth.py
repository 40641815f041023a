"""The parts of the pretraining benchmark; `--quick` runs it whole."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import sparse

from benchmarks.page_tables import BEGIN, END
from benchmarks.pretraining_document import write_document, write_figure
from benchmarks.pretraining_run import curve_of
from benchmarks.pretraining_trials import MOST, Cells, embed, frozen_trials, split
from benchmarks.pretraining_worth import differences, rows_of, summary, write_whole
from datastore.config import BinningConfig
from finetune.sides import Labelled
from pretrain.config import EncoderConfig
from pretrain.encoder import build_encoder

GENES = 30


def labelled(per_type: int, seed: int = 0) -> Labelled:
    """Cells of two types that five genes tell apart."""
    rng = np.random.default_rng(seed)
    rates = np.ones((2 * per_type, GENES))
    rates[:per_type, :5] = 6
    counts = rng.poisson(rates).astype(np.float32)
    return Labelled(sparse.csr_matrix(counts), np.repeat(["a", "b"], per_type))


def test_embedding_is_the_mean_state_of_expressed_genes_and_the_constant_one() -> None:
    shape = EncoderConfig(dim=16, depth=2, heads=2, dim_head=8, sequence="expressed")
    encoder = build_encoder(shape, BinningConfig(), GENES, 0).eval()
    counts = labelled(2).counts

    found = embed(encoder, counts)

    genes = torch.from_numpy(np.append(counts[1].indices.astype(np.int64), GENES))
    values = np.log2(1 + counts[1].data * 10_000 / counts[1].data.sum())
    tokens = torch.from_numpy(np.append(np.minimum(5, np.floor(values)), 0).astype(np.int64))
    shown = tokens[:-1] > 0
    keep = torch.cat([shown, torch.tensor([True])])
    states = encoder.encode(genes[keep], tokens[keep], torch.tensor([0, int(keep.sum())]))
    expected = torch.cat([states.mean(0), states[-1]]).detach().numpy()
    assert np.allclose(found[1], expected, atol=0.05)
    assert np.abs(found[0] - found[1]).max() > 0


def test_trials_do_not_label_what_they_learn_from() -> None:
    cells, other = labelled(20), labelled(20, 1)
    for budget, each in ((5, 5), (MOST, 16)):
        train, test = split(cells, cells, budget, 0)
        assert [int((cells.labels[train] == name).sum()) for name in "ab"] == [each, each]
        assert not set(train) & set(test)
        assert len(train) + len(test) == 40
    train, test = split(cells, other, 5, 0)
    assert len(train) == 10
    assert len(test) == 40


def test_a_telling_embedding_is_ahead_and_a_mute_one_is_not() -> None:
    data = labelled(30)
    rng = np.random.default_rng(1)
    telling = (data.labels == "a")[:, None] + 0.1 * rng.normal(size=(60, 4))
    mute = rng.normal(size=(60, 4))
    fresh = {f"fresh {seed}": mute.astype(np.float32) for seed in range(3)}
    cells = Cells(data, {"pretrained": telling.astype(np.float32), **fresh})

    trials = frozen_trials(cells, cells, 5, 3)

    found = differences(trials)["probe, pretrained − probe, fresh"]
    mean, low, high = found["accuracy"]
    assert mean > 0.2
    assert low > 0
    assert low < mean < high
    assert summary(trials)["probe, pretrained"]["accuracy"][0] == 1


def test_rows_of_another_encoder_do_not_count(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    assert rows_of(None, "a") == rows_of(path, "a") == {"frozen": {}, "trained": {}}
    rows: dict[str, dict[str, Any]] = {"frozen": {"cells, 5": {"methods": {}}}, "trained": {}}
    write_whole(path, {"figures": {"encoder": "a", **rows}})
    assert rows_of(path, "a") == rows
    assert rows_of(path, "b") == {"frozen": {}, "trained": {}}
    assert [file.name for file in tmp_path.iterdir()] == ["rows.json"]


def test_page_and_figure(tmp_path: Path) -> None:
    history = tmp_path / "metrics.jsonl"
    rows = [
        {"step": 1, "time": 0.0, "loss": 2.0, "masked_accuracy": 0.5, "commonest_bin_accuracy": 0.6}
        | {"cells_per_second": 20.0},
        {"step": 2, "time": 36.0, "validation_loss": 1.5, "validation_masked_accuracy": 0.7}
        | {"validation_commonest_bin_accuracy": 0.6},
    ]
    history.write_text("".join(json.dumps(row) + "\n" for row in rows))
    curve = curve_of(history)
    assert curve["training"] == [[1, 0.5, 0.6, 2.0]]
    assert curve["held_out"] == [[2, 0.7, 0.6, 1.5]]
    assert curve["hours"] == pytest.approx(0.01)
    assert curve["cells_per_second"] == 20

    better = {"accuracy": (0.9, 0.8, 1.0), "macro_f1": (0.9, 0.8, 1.0)}
    names = ("logistic regression", "probe, fresh", "probe, pretrained")
    apart = {
        f"{one} − {other}": {"accuracy": (0.1, 0.05, 0.15), "macro_f1": (0.1, -0.1, 0.3)}
        for one, other in (
            ("probe, pretrained", "probe, fresh"),
            ("probe, pretrained", "logistic regression"),
            ("with probe, pretrained", "logistic regression"),
        )
    }
    setting = {"methods": dict.fromkeys(names, better), "differences": apart}
    result = {"figures": {"frozen": {"cells, 5": setting}, "trained": {}, "pretraining": curve}}
    page = tmp_path / "page.md"
    page.write_text("before\n")
    with pytest.raises(ValueError, match="add them"):
        write_document(result, page)
    page.write_text(f"before\n\n{BEGIN}\n{END}\n\nafter\n")
    write_document(result, page)
    once = page.read_text()
    assert "**+10.0 ± 5.0**" in once
    assert "| +10.0 ± 20.0 |" in once
    assert "ahead in 1 of 1 rows" in once
    assert once.endswith(f"{END}\n\nafter\n")
    write_document(result, page)
    assert page.read_text() == once
    write_figure(result, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 5_000
