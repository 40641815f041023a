"""The referee on simulated cells: every method, every protocol, files, refusals."""

import json
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest

from finetune.benchmark_config import METHODS as NAMES
from finetune.benchmark_config import BenchmarkConfig
from finetune.config import FinetuneConfig, FreshConfig, HeadConfig, LabelledConfig
from finetune.methods import METHODS
from finetune.protocol_config import ProtocolConfig
from finetune.published import DATASETS, references
from finetune.referee import benchmark, run_benchmark
from pretrain.config import EncoderConfig
from tests.support.labelled import write_encoder
from tests.support.simulated import simulated_cells

GENES = [f"GENE{place}" for place in range(60)]
OWN = ("majority", "nearest mean", "logistic regression", "ours")


def simulated(sizes: tuple[int, ...] = (40, 30, 30, 24), seed: int = 0) -> anndata.AnnData:
    counts, labels = simulated_cells(sizes, seed, depth=3)
    donors = np.array(["d1", "d2"])[np.arange(len(labels)) % 2]
    return anndata.AnnData(
        counts,
        obs=pd.DataFrame(
            {"cell_type": labels, "donor": donors}, index=[f"c{row}" for row in range(len(labels))]
        ),
        var=pd.DataFrame(index=GENES),
    )


def settings(output: Path, **fields: Any) -> BenchmarkConfig:
    small = FinetuneConfig(
        encoder="none",
        output="",
        data=LabelledConfig(path=""),
        head=HeadConfig(kind="pooled", bottleneck=8),
        fresh=FreshConfig(encoder=EncoderConfig(dim=16, depth=1, heads=2, dim_head=8)),
        epochs=1,
    )
    given: dict[str, Any] = {"data": "cells", "output": str(output), "train": small}
    return BenchmarkConfig(**(given | fields))


def test_every_method_of_our_own_on_folds(tmp_path: Path) -> None:
    table = tmp_path / "markers.tsv"
    rows = [
        (f"GENE{place}", name) for i, name in enumerate("abc") for place in range(5 * i, 5 * i + 5)
    ]
    table.write_text("gene\tcell_type\n" + "".join(f"{gene}\t{name}\n" for gene, name in rows))
    genes = tuple(GENES[:40])
    config = settings(
        tmp_path / "out",
        methods=tuple(name for name in NAMES if name not in ("CellTypist", "SingleR")),
        protocol=ProtocolConfig(num_folds=2),
        encoder=str(write_encoder(tmp_path / "encoder", genes)),
        markers=str(table),
        name="Zheng68k",
    )
    report = benchmark(simulated((40, 30, 30)), config)
    found = report.summary["methods"]
    assert set(found) == set(config.methods)
    for name in set(config.methods) - {"majority", "network alone"}:
        assert found[name]["accuracy"].mean > 0.9, name
    assert found["majority"]["accuracy"].mean == pytest.approx(0.4)
    assert (
        "Published: logistic regression L1 (Boiarsky et al. 2023): accuracy 81.2" in report.verdict
    )
    assert "logistic regression by" in report.verdict or "level" in report.verdict
    written = json.loads((tmp_path / "out" / "benchmark.json").read_text())
    assert len(written["records"]) == 2 * len(config.methods)
    assert sum(record["num_cells"] for record in written["records"][: len(config.methods)]) > 0
    ours = [record for record in written["records"] if record["method"] == "ours"]
    assert sum(record["num_cells"] for record in ours) == 100
    assert min(record["peak_megabytes"] for record in ours) > 50
    assert (tmp_path / "out" / "benchmark.png").read_bytes()[:4] == b"\x89PNG"
    assert report.table in (tmp_path / "out" / "benchmark.md").read_text()


@pytest.mark.parametrize(
    ("protocol", "num_trials"),
    [
        (ProtocolConfig(name="leave-group-out", group_key="donor"), 2),
        (ProtocolConfig(name="few-shot", per_class=(3,)), 1),
        (ProtocolConfig(name="imbalance"), 1),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_protocols_run_and_seeds_repeat_them(
    tmp_path: Path, protocol: ProtocolConfig, num_trials: int
) -> None:
    config = settings(
        tmp_path, protocol=protocol, methods=("majority", "nearest mean"), seeds=(0, 1)
    )
    report = benchmark(simulated(), config)
    assert len(report.records) == 2 * 2 * num_trials
    assert {record.seed for record in report.records} == {0, 1}


def test_an_unknown_type_is_found_and_does_not_count_as_wrong(tmp_path: Path) -> None:
    protocol = ProtocolConfig(name="leave-type-out", types=("rare",))
    report = benchmark(simulated(), settings(tmp_path, protocol=protocol, methods=OWN))
    found = report.summary["methods"]["ours"]
    assert found["novelty"]["auroc"].mean > 0.8  # of 87 cells learnt; chance is 0.5
    assert "AUROC" in report.table
    assert "| without rare | ours | " in report.table
    assert "rare" not in report.records[-1].scores.classes
    assert "novelty" not in report.summary["methods"]["majority"]


def test_another_file_is_labelled_by_common_genes_and_types(tmp_path: Path) -> None:
    config = settings(
        tmp_path,
        query="query",
        protocol=ProtocolConfig(name="cross-data-set"),
        methods=("nearest mean",),
    )
    query = simulated((20, 20, 20, 20), seed=5)[:, GENES[:50][::-1]].copy()
    report = benchmark(simulated((40, 30, 30)), config, query)
    assert report.records[0].scores.num_cells == 60  # rare was never learnt
    assert report.records[0].scores.accuracy > 0.7
    query.var_names = [f"X{name}" for name in query.var_names]
    with pytest.raises(ValueError, match="no gene name in common"):
        benchmark(simulated(), config, query)


def test_deleting_all_markers_hurts(tmp_path: Path) -> None:
    table = tmp_path / "markers.tsv"
    table.write_text(
        "gene\tcell_type\n" + "".join(f"GENE{i}\tT{'abc'[i // 5]}\n" for i in range(15))
    )
    config = settings(
        tmp_path / "out",
        protocol=ProtocolConfig(name="marker-deletion", deleted=(0.0, 1.0)),
        methods=("nearest mean",),
        markers=str(table),
        marker_types={name: f"T{name}" for name in "abc"},
    )
    whole, none = benchmark(simulated((60, 50, 50)), config).records
    assert whole.scores.accuracy > none.scores.accuracy + 0.2


def test_missing_packages_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(__import__("sys").modules, "celltypist", None)
        with pytest.raises(ValueError, match=r"CellTypist is not installed.*\[benchmark\]"):
            run_benchmark(settings(tmp_path, methods=("CellTypist",)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"methods": ("magic",)}, "methods has 'magic'; there are majority"),
        ({"methods": ()}, "name one or more"),
        ({"query": "q"}, "only of it"),
        ({"protocol": ProtocolConfig(name="cross-data-set")}, "query names the file"),
        ({"methods": ("marker scoring",)}, "needs a table of markers"),
        ({"protocol": ProtocolConfig(name="marker-deletion")}, "needs a table of markers"),
    ],
)
def test_refusals(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings(tmp_path, **fields)


def test_a_column_that_is_not_there_is_named(tmp_path: Path) -> None:
    protocol = ProtocolConfig(name="leave-group-out", group_key="technology")
    with pytest.raises(ValueError, match=r"no obs\['technology'\]; it has cell_type, donor"):
        benchmark(simulated(), settings(tmp_path, protocol=protocol, methods=("majority",)))


def test_a_data_set_of_the_paper_has_the_papers_types(tmp_path: Path) -> None:
    adata = simulated()
    names = {"a": "PP", "b": "alpha cell", "c": "acinar"}
    adata.obs["cell_type"] = adata.obs["cell_type"].astype(str).replace(names)
    report = benchmark(adata, settings(tmp_path, name="Xin", methods=("majority",)))
    assert {"gamma", "alpha", "acinar"} <= set(report.records[0].scores.classes)
    report = benchmark(adata, settings(tmp_path, name="mine", methods=("majority",)))
    assert "PP" in report.records[0].scores.classes


def test_names_agree_and_nine_data_sets_are_defined() -> None:
    assert tuple(METHODS) == NAMES
    assert len(DATASETS) == 9
    assert references("Zheng68k")[0] == (
        "Published: scBERT (Yang et al. 2022): accuracy 75.9, macro-F1 69.1."
    )
    assert references("mine") == references(None) == []
