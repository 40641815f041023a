"""launchers/slurm/pretrain.sbatch under a real Slurm, by the line of docs/cluster.md."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.support.documents import shown
from tests.support.slurm import Slurm, missing, start_slurm
from tests.support.tiny import tiny_store

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]

STEPS = 120


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    assert not missing(), f"these tests start Slurm: {missing()}"
    with start_slurm(tmp_path_factory.mktemp("slurm") / "cluster", 2) as running:
        yield running


def settings(folder: Path, **changes: object) -> Path:
    tiny_store(folder / "store")
    config = {
        "store": str(folder / "store"),
        "output": str(folder / "run"),
        "epochs": 1000,
        "max_steps": STEPS,
        "encoder": {"dim": 8, "depth": 1, "heads": 2, "dim_head": 8},
        "batch": {"global_size": 16, "micro_size": 4},
        "order": {"lanes": 4, "block": 8, "window": 8},
        "validation_share": 0.2,
        "log_every": 1,
        "tracking": {"uri": f"sqlite:///{folder / 'mlflow.db'}"},
        **changes,
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def submit(slurm: Slurm, config: Path) -> tuple[str, Path]:
    smaller = {"--nodes 4": "--nodes 2", "--ntasks-per-node 8": "--ntasks-per-node 1"}
    smaller |= {" --gpus-per-node 8": "", "pretrain.yaml": config.name}
    command = shown("cluster.md", "pretrain.sbatch", smaller)
    # The nodes are names on this host that no name service knows.
    job = slurm.submit(command, config.parent, MASTER_ADDR="127.0.0.1")
    return job, config.parent / f"scbert-pretrain-{job}.log"


def steps(folder: Path) -> list[int]:
    path = folder / "run" / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    return [line["step"] for line in lines if "loss" in line]


def test_a_job_that_is_warned_saves_is_requeued_and_continues_its_run(
    slurm: Slurm, tmp_path: Path
) -> None:
    job, log = submit(slurm, settings(tmp_path))
    deadline = time.monotonic() + 180
    while len(steps(tmp_path)) < 5:
        assert time.monotonic() < deadline, log.read_text() if log.is_file() else slurm.state(job)
        time.sleep(0.2)
    slurm.call("scancel", "--batch", "--signal=USR1", job)  # as --signal=B:USR1@120 does it

    ended = slurm.wait(job, {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"}, 400)
    said = log.read_text()
    assert ended["JobState"] == "COMPLETED", said
    assert ended["Restarts"] == "1", said
    assert "requeued after exit code 75" in said
    assert said.count("saved and stopped as asked") == 1
    assert "2 ranks on n[1-2]" in said
    assert steps(tmp_path) == [*range(1, STEPS + 1)]  # none twice, none left out
    assert said.count("MLflow run ") == 2
    assert len(set(mlflow_runs(tmp_path))) == 1


def test_a_refused_setting_ends_the_job(slurm: Slurm, tmp_path: Path) -> None:
    job, log = submit(slurm, settings(tmp_path, batch={"global_size": 15, "micro_size": 4}))
    ended = slurm.wait(job, {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"}, 180)
    said = log.read_text()
    assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", "2:0"), said
    assert said.count("batch.global_size is 15, not a multiple") == 1
    assert "not requeued" in said


def mlflow_runs(folder: Path) -> list[str]:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    experiments = [found.experiment_id for found in client.search_experiments()]
    return [run.info.run_id for run in client.search_runs(experiments)]
