"""Commands of docs/cluster.md, word for word, on tiny cells and one machine.

Slurm and ssh are stand-ins that run here what they would run elsewhere; what they themselves do
(several hosts, requeueing, preemption) is tested with real ones by the markers `cluster` and
`slurm`.
"""

import json
import re
import shutil
from pathlib import Path

import anndata
import pytest
import yaml

from finetune.registration import register_export
from tests.support import slurm_stand_in
from tests.support.documents import ROOT, commands, run_shown
from tests.support.labelled import write_classifier, write_encoder, write_labelled

PAGE = ROOT / "docs" / "cluster.md"
SMALLER = {
    "ingest_array.sbatch": "--min_genes 1 --cells_per_partition 50",
    "store append": "--min_genes 1",
    "launchers/finetune.py": "--epochs 1 --head.hidden 8 --head.bottleneck 4",
    "finetune_array.sbatch": "--epochs 1 --head.hidden 8 --head.bottleneck 4",
}
"""What a command gets besides, because cells and machine are small."""
TRAINING = {
    "store": "cells.zarr",
    "output": "runs/pretrain",
    "epochs": 1000,
    "max_steps": 3,
    "encoder": {"dim": 8, "depth": 1, "heads": 2, "dim_head": 8},
    "batch": {"global_size": 16, "micro_size": 4},
    "order": {"lanes": 4, "block": 8, "window": 8},
    "validation_share": 0.2,
}
SSH = """#!/bin/bash
while [[ $1 == -* ]]; do [ "$1" = -o ] && shift; shift; done
shift # the host
set -m # a process group of its own, as sshd does it
bash -c "$*" &
wait $!
"""


def prepare(folder: Path) -> Path:
    """Lay out what the page takes for given; return the folder of stand-ins."""
    (folder / "launchers").symlink_to(ROOT / "launchers")
    for seed, path in enumerate(("raw/a.h5ad", "raw/b.h5ad", "more/c.h5ad", "a.h5ad")):
        write_labelled(folder / path, 60, seed=seed)
    (folder / "pretrain.yaml").write_text(yaml.safe_dump(TRAINING))
    (folder / "hosts").write_text("localhost slots=2\n")
    (table,) = re.findall(r"```text\n(data,.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    (folder / "table.csv").write_text(table)
    uri = f"sqlite:///{folder}/mlflow.db"
    encoder, classifier = write_encoder(folder / "encoder"), write_classifier(folder / "classifier")
    register_export(encoder, "scbert-pretrained", uri=uri, alias="champion")
    register_export(classifier, "scbert-mytissue", uri=uri, alias="champion")
    programs = slurm_stand_in.install(folder / "programs", most=2)
    ssh = programs / "ssh"
    ssh.write_text(SSH)
    ssh.chmod(0o755)
    return programs


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.timeout(1500)
def test_commands_of_the_cluster_guide_run(tmp_path: Path) -> None:
    programs = prepare(tmp_path)
    # The page asks whether the store opens before it tells how to make one.
    shown = sorted(dict.fromkeys(commands(PAGE)), key=lambda line: "ingest_array" not in line)
    assert len(shown) >= 16
    for command in shown:
        more = [words for part, words in SMALLER.items() if part in command]
        trains = "--config pretrain.yaml" in command
        if trains:  # else the second one would find the training done
            shutil.rmtree(tmp_path / "runs", ignore_errors=True)
        run_shown(" ".join([command, *more]), tmp_path, programs)
        assert not trains or (tmp_path / "runs" / "pretrain" / "export").is_dir(), command
    config = json.loads((tmp_path / "runs" / "pretrain" / "export" / "config.json").read_text())
    assert {line["name"]: line["cells"] for line in config["provenance"]["sources"]} == {
        "a": 60,
        "b": 60,
        "c": 60,
    }
    labelled = anndata.read_h5ad(tmp_path / "labelled.h5ad")
    assert labelled.n_obs == 180
    assert labelled.obs["scbert_label"].notna().all()
    assert (tmp_path / "sweep" / "results.csv").read_text().count(",done,") == 2
