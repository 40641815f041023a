"""`deepspeed launchers/finetune.py`: killed, continued by torchrun, and beside one process."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient

from launchers import finetune
from pretrain.export import read_export
from tests.support.documents import ROOT, free_port
from tests.support.labelled import write_encoder, write_labelled

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]

DEEPSPEED = ["deepspeed.launcher.runner", "--num_gpus", "2"]
TORCHRUN = ["torch.distributed.run", "--nproc_per_node", "2"]
ENVIRON = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


def words(folder: Path, output: str) -> list[str]:
    return [
        *("--encoder", str(folder / "encoder"), "--data.path", str(folder / "cells.h5ad")),
        *("--output", str(folder / output), "--tracking.uri", f"sqlite:///{folder}/mlflow.db"),
        *("--head.kind", "pooled", "--head.bottleneck", "8", "--train", "all", "--batch_size", "7"),
        *(
            "--epochs",
            "12",
            "--epoch_steps",
            "1",
            "--patience",
            "12",
            "--lr",
            "5e-3",
            "--reasons_cells",
            "2",
        ),
    ]


def started_by(launcher: list[str], folder: Path, output: str) -> list[str]:
    port = ["--master_port", str(free_port())]
    script = str(ROOT / "launchers" / "finetune.py")
    return [sys.executable, "-m", *launcher, *port, script, *words(folder, output)]


def rank_process(output: Path, rank: int) -> int:
    """Process of the rank that trains into a folder."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            line = (process / "cmdline").read_bytes().split(b"\0")
        except OSError:  # it is gone
            continue
        if f"--local_rank={rank}".encode() in line and str(output).encode() in line:
            return int(process.name)
    raise AssertionError(f"no rank {rank} trains into {output}")


def test_two_ranks_are_killed_continue_and_say_what_one_process_says(tmp_path: Path) -> None:
    write_encoder(tmp_path / "encoder")
    write_labelled(tmp_path / "cells.h5ad", 90)
    two = tmp_path / "two"
    command = started_by(DEEPSPEED, tmp_path, "two")
    with (tmp_path / "log").open("w") as log:
        running = subprocess.Popen(command, cwd=tmp_path, env=ENVIRON, stdout=log, stderr=log)
        try:
            while not (two / "progress" / "progress.json").is_file():
                assert running.poll() is None, (tmp_path / "log").read_text()
                time.sleep(0.02)
            os.kill(rank_process(two, 1), signal.SIGKILL)
            code = running.wait(60)
        finally:
            running.terminate()
    said = (tmp_path / "log").read_text()
    assert code != 0, said
    assert "Traceback" not in said
    assert not (two / "scores.json").exists()

    command = started_by(TORCHRUN, tmp_path, "two")
    again = subprocess.run(
        command, cwd=tmp_path, env=ENVIRON, capture_output=True, text=True, check=False
    )
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("continuing after epoch") == 1
    assert again.stdout.count("export: ") == 1
    assert (two / "report.html").is_file()
    assert not (two / "progress").exists()

    assert finetune.main(words(tmp_path, "one")) == 0
    one = tmp_path / "one"
    ours, theirs = (np.load(run / "heldout.npz") for run in (two, one))
    np.testing.assert_array_equal(ours["truth"], theirs["truth"])
    np.testing.assert_allclose(ours["probabilities"], theirs["probabilities"], atol=1e-3)
    np.testing.assert_array_equal(ours["is_novel"], theirs["is_novel"])
    weights, alone = (read_export(run / "export").weights for run in (two, one))
    assert set(weights) == set(alone)
    for name, value in alone.items():
        np.testing.assert_allclose(weights[name], value, atol=1e-3, err_msg=name)
    verdicts = [json.loads((run / "scores.json").read_text())["verdict"] for run in (two, one)]
    assert verdicts[0] == verdicts[1]
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (experiment,) = client.search_experiments(filter_string="name = 'scbert-finetune'")
    runs = client.search_runs([experiment.experiment_id])
    finished = [run for run in runs if run.info.status == "FINISHED"]
    assert sorted(run.data.params["world_size"] for run in finished) == ["1", "2"]


def test_a_file_that_is_not_there_is_told_once(tmp_path: Path) -> None:
    write_encoder(tmp_path / "encoder")
    done = subprocess.run(
        started_by(DEEPSPEED, tmp_path, "run"),
        cwd=tmp_path,
        env=ENVIRON,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.count("error: ") == 1
    assert "cells.h5ad" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()
