"""Labels of files of every format and of AnnData in memory, compared with one plain pass."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse

from datastore.config import StoreConfig
from datastore.ingest import build_store
from finetune import annotator, query
from finetune.annotation import annotate, annotate_file
from finetune.annotation_config import AnnotateConfig
from finetune.annotator import auto_batch_size, load_annotator
from finetune.classifier import Predictions, load_classifier, predict
from finetune.explaining import gene_attention
from tests.support.cells import RawCells
from tests.support.labelled import GENES, TYPES, labelled_cells, write_classifier
from tests.support.raw_files import write_10x_h5, write_10x_mtx, write_loom, write_zarr

CPU = torch.device("cpu")
NUM_CELLS = 45


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("annotation")
    write_classifier(folder / "model")
    return folder


@pytest.fixture(scope="module")
def cells() -> anndata.AnnData:
    cells = labelled_cells(NUM_CELLS, seed=1)
    cells.obs["cluster"] = pd.Categorical(["a", "b", "c"] * 14 + ["a", "b", None])
    cells.layers["kept"] = cells.X.copy()
    cells.uns["palette"] = {"alpha": "red"}
    return cells


@pytest.fixture(scope="module")
def expected(folder: Path, cells: anndata.AnnData) -> Predictions:
    model, _ = load_classifier(folder / "model")
    return predict(model, sparse.csr_matrix(cells.X).astype(np.int64), 64)


def label(folder: Path, source: Path, output: Path, **changes: Any) -> anndata.AnnData:
    config = AnnotateConfig(model=str(folder / "model"), input=str(source), output=str(output))
    annotate_file(replace(config, **changes), CPU)
    assert not list(output.parent.glob("*.part"))
    return anndata.read_h5ad(output)


def agrees(found: anndata.AnnData, expected: Predictions, key: str = "scbert") -> None:
    assert list(found.obs[f"{key}_label"]) == expected.best
    # the same products in other batch shapes; worst seen 2.4e-7 and 4.8e-7
    np.testing.assert_allclose(found.obsm[f"{key}_prob"], expected.probabilities, atol=2e-6)
    np.testing.assert_allclose(found.obsm[f"X_{key}"], expected.embedding, atol=5e-6)
    confidence = found.obs[f"{key}_confidence"].to_numpy()
    np.testing.assert_allclose(confidence, expected.confidence, atol=2e-6)
    np.testing.assert_array_equal(found.obs[f"{key}_novel"], confidence < 0.5)


def arrays(path: Path) -> dict[str, Any]:
    """Every array and attribute of an HDF5 file by name."""
    found: dict[str, Any] = {}

    def visit(name: str, element: Any) -> None:
        found.update({f"{name}@{key}": np.asarray(value) for key, value in element.attrs.items()})
        if isinstance(element, h5py.Dataset):
            found[name] = element[()]

    with h5py.File(path) as file:
        file.visititems(visit)
    return found


def test_the_types_are_told_apart_so_that_equal_labels_mean_something(
    expected: Predictions,
) -> None:
    assert set(expected.best) == set(TYPES)
    assert (expected.confidence < 0.5).any()
    assert (expected.confidence > 0.5).any()


def test_a_copy_gets_the_labels_and_nothing_else_changes(
    folder: Path, cells: anndata.AnnData, expected: Predictions, tmp_path: Path
) -> None:
    source = tmp_path / "query.h5ad"
    cells.write_h5ad(source, compression="gzip")
    source.chmod(0o444)
    before = source.read_bytes()
    found = label(folder, source, tmp_path / "out" / "labelled.h5ad")
    assert source.read_bytes() == before
    agrees(found, expected)
    assert list(found.obs.columns) == [
        *cells.obs.columns, "scbert_label", "scbert_confidence", "scbert_novel",
    ]  # fmt: skip
    old, new = arrays(source), arrays(tmp_path / "out" / "labelled.h5ad")
    for name, value in old.items():
        if name != "obs@column-order":
            np.testing.assert_array_equal(new[name], value)
            assert new[name].dtype == value.dtype if hasattr(value, "dtype") else True
    added = {name.split("@")[0].split("/")[1] for name in set(new) - set(old) if "/" in name}
    assert added <= {
        *("scbert_label", "scbert_confidence", "scbert_novel", "scbert", "X_scbert", "scbert_prob")
    }
    assert found.uns["scbert"]["novelty_threshold"] == 0.5
    assert found.uns["scbert"]["counts_from"] == "X"
    assert list(found.uns["scbert"]["labels"]) == list(TYPES)
    table = pd.read_csv(tmp_path / "out" / "labelled.csv")
    assert list(table.columns) == ["cell", "scbert_label", "scbert_confidence", "scbert_novel"]
    assert list(table["cell"]) == list(cells.obs_names)
    assert list(table["scbert_label"]) == expected.best


def _store(path: Path, cells: anndata.AnnData) -> None:
    cells.write_h5ad(path.with_suffix(".h5ad"))
    config = StoreConfig(
        sources=[str(path.with_suffix(".h5ad"))],
        output=str(path),
        min_genes=1,
        cells_per_partition=20,
        obs_columns=["cluster"],
    )
    build_store(config)


def raw(cells: anndata.AnnData) -> RawCells:
    return RawCells("a", cells.X.toarray().astype(np.int64), GENES)


FORMATS = [
    pytest.param("q.zarr", lambda path, c: write_zarr(path, c, 2), id="zarr 2"),
    pytest.param("q.zarr", lambda path, c: write_zarr(path, c, 3), id="zarr 3"),
    pytest.param("q.h5", lambda path, c: write_10x_h5(path, raw(c), 3, 2), id="10x h5"),
    pytest.param("q", lambda path, c: write_10x_mtx(path, raw(c), 3, 2), id="10x mtx"),
    pytest.param("q.loom", lambda path, c: write_loom(path, raw(c)), id="loom"),
]


@pytest.mark.parametrize(("name", "write"), FORMATS)
def test_every_format_gives_the_same_labels(
    name: str,
    write: Callable[[Path, anndata.AnnData], object],
    folder: Path,
    cells: anndata.AnnData,
    expected: Predictions,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(query, "VALUES_PER_SLICE", 1)  # slices of 64 cells at least
    write(tmp_path / name, cells)
    found = label(folder, tmp_path / name, tmp_path / "labelled.h5ad")
    agrees(found, expected)
    np.testing.assert_array_equal(found[:, list(GENES)].X.toarray(), cells.X.toarray())
    if name.endswith("zarr"):
        assert list(found.obs["cell_type"]) == list(cells.obs["cell_type"])
        assert found.uns["palette"] == {"alpha": "red"}
        assert (found.layers["kept"] != cells.X).nnz == 0


def test_a_store_gets_labels_without_its_counts(
    folder: Path, cells: anndata.AnnData, expected: Predictions, tmp_path: Path
) -> None:
    _store(tmp_path / "cells.zarr", cells)
    found = label(folder, tmp_path / "cells.zarr", tmp_path / "o.h5ad", majority_over="cluster")
    assert found.X is None
    rows = cells.obs_names.get_indexer([name.split("/")[1] for name in found.obs_names])
    assert sorted(rows) == list(range(NUM_CELLS))
    assert list(found.obs["scbert_label"]) == [expected.best[row] for row in rows]
    np.testing.assert_allclose(found.obsm["scbert_prob"], expected.probabilities[rows], atol=2e-6)


def test_batch_order_and_split_do_not_matter(
    folder: Path,
    cells: anndata.AnnData,
    expected: Predictions,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    order = np.random.default_rng(0).permutation(NUM_CELLS)
    cells[order].copy().write_h5ad(tmp_path / "shuffled.h5ad")
    cells[:7].copy().write_h5ad(tmp_path / "first.h5ad")
    cells[7:, ::-1].copy().write_h5ad(tmp_path / "rest.h5ad")
    monkeypatch.setattr(query.Query, "slices", lambda self: _slices(self.num_cells, 10))
    shuffled = label(folder, tmp_path / "shuffled.h5ad", tmp_path / "o1.h5ad", batch_size=4)
    agrees(shuffled[np.argsort(order)], expected)
    pieces = [
        label(folder, tmp_path / f"{name}.h5ad", tmp_path / f"o_{name}.h5ad", batch_size=size)
        for name, size in (("first", 3), ("rest", 100))
    ]
    agrees(anndata.concat(pieces), expected)


def _slices(num_cells: int, step: int) -> Any:
    return ((start, min(start + step, num_cells)) for start in range(0, num_cells, step))


@pytest.mark.parametrize("place", ["layers['counts']", "raw"])
def test_counts_are_found_where_they_are(
    place: str, folder: Path, cells: anndata.AnnData, expected: Predictions, tmp_path: Path
) -> None:
    changed = cells.copy()
    if place == "raw":
        changed.raw = cells
        changed = changed[:, :3].copy()
    else:
        changed.layers["counts"] = cells.X.copy()
    changed.X = np.log1p(changed.X.toarray() / 7)
    changed.write_h5ad(tmp_path / "q.h5ad")
    found = label(folder, tmp_path / "q.h5ad", tmp_path / "o.h5ad")
    agrees(found, expected)
    assert found.uns["scbert"]["counts_from"] == place
    annotate(changed, folder / "model")
    agrees(changed, expected)


def test_counts_are_computed_back_on_request(
    folder: Path, cells: anndata.AnnData, expected: Predictions, tmp_path: Path
) -> None:
    changed = cells.copy()
    dense = changed.X.toarray()
    changed.X = sparse.csr_matrix(np.log1p(dense / dense.sum(axis=1, keepdims=True) * 1e4))
    changed.write_h5ad(tmp_path / "q.h5ad")
    agrees(label(folder, tmp_path / "q.h5ad", tmp_path / "o.h5ad", recover_counts=True), expected)


def test_annotated_twice_keeps_the_last_labels(
    folder: Path, cells: anndata.AnnData, expected: Predictions, tmp_path: Path
) -> None:
    cells.write_h5ad(tmp_path / "q.h5ad")
    label(folder, tmp_path / "q.h5ad", tmp_path / "once.h5ad", novelty_threshold=1.0)
    twice = label(folder, tmp_path / "once.h5ad", tmp_path / "twice.h5ad")
    agrees(twice, expected)
    assert len(set(twice.obs.columns)) == len(twice.obs.columns)


def test_majority_counts_labels_within_groups(
    folder: Path, cells: anndata.AnnData, expected: Predictions, tmp_path: Path
) -> None:
    cells.write_h5ad(tmp_path / "q.h5ad")
    found = label(folder, tmp_path / "q.h5ad", tmp_path / "o.h5ad", majority_over="cluster")
    frame = pd.DataFrame(
        {"group": cells.obs["cluster"], "label": expected.best, "sum": expected.confidence}
    )
    votes = frame.groupby(["group", "label"], observed=True)["sum"].agg(["size", "sum"])
    winners = {
        group: max(part.index, key=lambda at: tuple(part.loc[at]))[1]
        for group, part in votes.groupby(level=0, observed=True)
    }
    shown = found.obs["scbert_majority"]
    assert [None if pd.isna(name) else name for name in shown] == [
        None if pd.isna(group) else winners[group] for group in cells.obs["cluster"]
    ]
    assert pd.isna(shown.iloc[-1])
    changed = cells.copy()
    annotate(changed, folder / "model", majority_over="cluster")
    assert list(changed.obs["scbert_majority"].astype(str)) == list(shown.astype(str))


def test_adata_in_memory_is_changed_in_place_or_copied(
    folder: Path, cells: anndata.AnnData, expected: Predictions
) -> None:
    given = cells.copy()
    copied = annotate(given, folder / "model", copy=True, key_added="mine", batch_size=5)
    assert copied is not None
    assert list(given.obs.columns) == list(cells.obs.columns)
    agrees(copied, expected, "mine")
    assert set(copied.uns) == {"palette", "mine"}
    assert annotate(given, folder / "model") is None
    agrees(given, expected)
    assert (given.X != cells.X).nnz == 0


def test_counts_are_taken_from_the_layer_that_is_named(
    folder: Path, cells: anndata.AnnData, expected: Predictions
) -> None:
    given = cells.copy()
    given.X = np.full(given.shape, -0.5, dtype=np.float32)
    copied = annotate(given, folder / "model", layer="kept", copy=True, batch_size=5)
    assert copied is not None
    agrees(copied, expected)
    whys = gene_attention(given, folder / "model", layer="kept", key_added="why", copy=True)
    assert whys is not None
    assert {*given.varm, *given.obsm, *given.uns} == {*cells.varm, *cells.obsm, *cells.uns}
    assert set(whys.varm) - set(given.varm) == {"why_reasons", "why_attention"}
    assert set(whys.uns) - set(given.uns) == {"why_reasons"}
    plain = cells.copy()
    assert gene_attention(plain, folder / "model") is None
    np.testing.assert_array_equal(whys.varm["why_reasons"], plain.varm["scbert_reasons"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"layer": "x"}, "no layer 'x'; it has", id="no such layer"),
        pytest.param({"majority_over": "leiden"}, "no obs", id="no such column"),
        pytest.param({"novelty_threshold": 1.5}, "novelty_threshold is 1.5", id="threshold"),
        pytest.param({"key_added": "a b"}, "key_added is 'a b'", id="key"),
        pytest.param({"batch_size": 0}, "batch_size is 0", id="batch size"),
    ],
)
def test_adata_is_left_alone_when_something_is_refused(
    changes: dict[str, Any], message: str, folder: Path, cells: anndata.AnnData
) -> None:
    given = cells.copy()
    with pytest.raises(ValueError, match=message):
        annotate(given, folder / "model", **changes)
    assert list(given.obs.columns) == list(cells.obs.columns)


def test_an_interrupted_annotation_leaves_the_former_output(
    folder: Path, cells: anndata.AnnData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells.write_h5ad(tmp_path / "q.h5ad")
    label(folder, tmp_path / "q.h5ad", tmp_path / "o.h5ad")
    former = [(tmp_path / name).read_bytes() for name in ("o.h5ad", "o.csv")]
    monkeypatch.setattr(query.Query, "slices", lambda self: _slices(self.num_cells, 10))
    calls = iter(range(10))

    def stops(*_: Any, **__: Any) -> Predictions:
        if next(calls) == 2:
            raise KeyboardInterrupt
        return predict(*_, **__)

    monkeypatch.setattr(annotator, "predict", stops)
    config = AnnotateConfig(
        model=str(folder / "model"),
        input=str(tmp_path / "q.h5ad"),
        output=str(tmp_path / "o.h5ad"),
    )
    with pytest.raises(KeyboardInterrupt):
        annotate_file(config, CPU)
    assert [(tmp_path / name).read_bytes() for name in ("o.h5ad", "o.csv")] == former
    assert {path.name for path in tmp_path.iterdir()} == {"q.h5ad", "o.h5ad", "o.csv"}


def test_a_batch_too_large_for_the_device_is_halved(
    folder: Path, cells: anndata.AnnData, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []

    def small_device(model: Any, counts: Any, batch_size: int, **more: Any) -> Predictions:
        sizes.append(batch_size)
        if batch_size > 8:
            raise torch.OutOfMemoryError
        return predict(model, counts, batch_size, **more)

    monkeypatch.setattr(annotator, "predict", small_device)
    annotate(cells.copy(), folder / "model", batch_size=32)
    assert sizes == [32, 16, 8]


def test_auto_batch_size_goes_by_the_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = load_classifier(folder / "model")
    assert auto_batch_size(model, CPU) == annotator.MOST_CELLS
    monkeypatch.setattr(annotator, "CPU_BYTES", 10)
    assert auto_batch_size(model, CPU) == 1


def test_a_full_disk_is_found_before_the_work(
    folder: Path, cells: anndata.AnnData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells.write_h5ad(tmp_path / "q.h5ad")
    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(ValueError, match=r"GB free, the copy needs .* on a larger disk"):
        label(folder, tmp_path / "q.h5ad", tmp_path / "o.h5ad")
    assert {path.name for path in tmp_path.iterdir()} == {"q.h5ad"}


def test_a_model_without_a_rule_for_novelty_is_refused(folder: Path, tmp_path: Path) -> None:
    import json
    import shutil

    shutil.copytree(folder / "model", tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    del config["novelty"]
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="does not say when a cell is novel"):
        load_annotator(str(tmp_path / "model"), CPU)
    load_annotator(str(tmp_path / "model"), CPU, novelty_threshold=0.3)


def test_reasons_are_written_where_the_scverse_looks(
    folder: Path, cells: anndata.AnnData, tmp_path: Path
) -> None:
    query = cells[:, ::-1].copy()
    query.var_names = [*query.var_names[:-1], "UNKNOWN"]
    query.write_h5ad(tmp_path / "q.h5ad")
    lines = ["gene\tcell_type", *(f"{gene}\talpha" for gene in GENES[:8])]
    (tmp_path / "markers.tsv").write_text("\n".join(lines) + "\n")
    out = tmp_path / "out" / "o.h5ad"
    found = label(folder, tmp_path / "q.h5ad", out, markers=str(tmp_path / "markers.tsv"))
    assert {path.name for path in out.parent.iterdir()} == {
        *("o.h5ad", "o.csv", "o_genes.csv", "o_genes.png", "o_genes.svg")
    }
    table = pd.read_csv(out.parent / "o_genes.csv")
    assert list(found.uns["scbert"]["top_genes"]["gene"]) == list(table["gene"])
    assert "marker_of" in table
    assert "Removing each cell's top" in found.uns["scbert"]["deletion_sentence"]
    for name in ("scbert_reasons", "scbert_attention"):
        assert found.varm[name].shape == (query.n_vars, len(TYPES))
        assert np.isnan(found.varm[name][-1]).all()
        assert np.isfinite(found.varm[name][:-1]).all()
    best = table[table["rank"] == 1].iloc[0]
    place = list(found.var_names).index(best["gene"])
    column = found.varm["scbert_reasons"][:, TYPES.index(best["cell_type"])]
    assert column[place] == pytest.approx(best["specific"], rel=1e-5)
    assert np.nanmax(column) == column[place]
    gene_attention(query, folder / "model", per_cell=True)
    np.testing.assert_allclose(
        query.varm["scbert_reasons"], found.varm["scbert_reasons"], rtol=1e-3, atol=1e-4
    )
    attention = query.obsm["scbert_attention"]
    assert attention.shape == (NUM_CELLS, len(GENES))
    shown = cells.X.toarray() > 0
    shown[:, 0] = False  # the model's GENE0 has no column in the query
    np.testing.assert_array_equal(attention.toarray() > 0, shown)


def test_bfloat16_gives_nearly_the_same_whatever_the_batch(
    folder: Path, cells: anndata.AnnData, expected: Predictions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(annotator, "multiplies_bf16", lambda: True)
    found = [
        annotate(cells, folder / "model", copy=True, batch_size=size, precision="bfloat16")
        for size in (4, 45)
    ]
    probabilities = [adata.obsm["scbert_prob"] for adata in found if adata is not None]
    # eight bits of mantissa, weights of these tests that are four times the usual; worst seen 0.04
    np.testing.assert_allclose(probabilities[0], expected.probabilities, atol=0.15)
    assert not np.array_equal(probabilities[0], expected.probabilities)
    np.testing.assert_allclose(probabilities[0], probabilities[1], atol=0.05)


def test_a_cpu_without_bfloat16_takes_float32_and_says_so(
    folder: Path,
    cells: anndata.AnnData,
    expected: Predictions,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(annotator, "multiplies_bf16", lambda: False)
    found = annotate(cells, folder / "model", copy=True, precision="bfloat16")
    assert found is not None
    np.testing.assert_allclose(found.obsm["scbert_prob"], expected.probabilities, atol=1e-5)
    assert "does not multiply bfloat16" in caplog.text


_PEAK = """
import sys
from pathlib import Path
import torch
from finetune import query
from finetune.annotation import annotate_file
from finetune.annotation_config import AnnotateConfig

query.VALUES_PER_SLICE = 2**20  # several slices in either file
model, source, output = sys.argv[1:]
annotate_file(AnnotateConfig(model=model, input=source, output=output), torch.device("cpu"))
status = Path("/proc/self/status").read_text()
print([line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")][0])
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_cells(folder: Path, tmp_path: Path) -> None:
    """Almost five times the cells; most of their counts are on genes the model does not know."""
    peaks = []
    for num_cells in (1_500, 7_000):
        rng = np.random.default_rng(0)
        columns = rng.integers(0, 10_000, num_cells * 2_000)
        starts, ones = np.arange(num_cells + 1) * 2_000, np.ones(len(columns), np.float32)
        counts = sparse.csr_matrix((ones, columns, starts), shape=(num_cells, 10_000))
        counts.sum_duplicates()
        names = [*GENES, *(f"OTHER{place}" for place in range(10_000 - len(GENES)))]
        obs = pd.DataFrame(index=[f"c{row}" for row in range(num_cells)])
        source = tmp_path / f"{num_cells}.h5ad"
        anndata.AnnData(counts, obs=obs, var=pd.DataFrame(index=names)).write_h5ad(source)
        words = [str(folder / "model"), str(source), str(tmp_path / "o.h5ad")]
        done = subprocess.run(
            [sys.executable, "-c", _PEAK, *words],
            cwd=Path(__file__).resolve().parents[2],
            capture_output=True,
            text=True,
            check=True,
        )
        peaks.append(int(done.stdout.split()[-1]) / 1024)
    growth, added = peaks[1] - peaks[0], 5_500 * 1_800 * 8 / 2**20
    assert added > 70
    assert growth < 30, f"{peaks} MiB for {added:.0f} MiB more of counts"
