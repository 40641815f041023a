"""A training on the hosts of a `cluster`: its settings, the commands that start it, its losses."""

import json
import re
import sys
import time
from pathlib import Path

import numpy as np
import yaml

from tests.support.cluster import ROOT, Cluster, Running
from tests.support.documents import shown

PRETRAIN = ROOT / "launchers" / "pretrain.py"
_BIN = Path(sys.executable).parent


def settings(cluster: Cluster, name: str, **changes: object) -> Path:
    """Write the configuration of a training that would go on for a long time."""
    config = {
        "store": str(cluster.folder / "store"),
        "output": str(cluster.folder / name),
        "epochs": 1000,
        "seed": 3,
        "encoder": {"dim": 8, "depth": 1, "heads": 2, "dim_head": 8},
        "batch": {"global_size": 16, "micro_size": 4},
        "order": {"lanes": 4, "block": 8, "window": 8},
        "optim": {"lr": 1.0e-3, "schedule": "constant"},
        "validation_share": 0.2,
        "evaluate_every": 1000,
        "save_every": 5,
        "log_every": 1,
        "watchdog_minutes": 0.15,
        "tracking": {"uri": f"sqlite:///{cluster.folder / 'mlflow.db'}"},
        **changes,
    }
    path = cluster.folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def command(config: Path, more: str = "") -> str:
    return f"{_of_the_page('deepspeed --hostfile', config, '29731')} {more}"


def losses(cluster: Cluster, name: str) -> dict[int, float]:
    """Loss by step; of a step that was logged twice the later line counts."""
    path = cluster.folder / name / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def wait_for_step(cluster: Cluster, name: str, step: int, running: Running) -> None:
    deadline = time.monotonic() + 180
    while max(losses(cluster, name), default=0) < step:
        assert running.process.poll() is None, running.text
        assert time.monotonic() < deadline, running.text
        time.sleep(0.1)


def same_steps(found: dict[int, float], expected: dict[int, float], rtol: float) -> None:
    assert len(expected) == 60
    np.testing.assert_allclose(
        [found[step] for step in expected], list(expected.values()), rtol=rtol
    )


def fan_out(config: Path, more: str = "", port: int = 29741) -> str:
    options = f"{port} --logs logs {more}"
    command = _of_the_page("fan_out.py --hostfile hosts launchers", config, options)
    return f"SCBERT_LOG=INFO exec {command}"


def _of_the_page(part: str, config: Path, port: str) -> str:
    """A line of docs/cluster.md with this cluster's address and port, and a test's paths."""
    command = shown(
        "cluster.md",
        part,
        {
            "--hostfile hosts": f"--hostfile hostfile --master_addr n1 --master_port {port}",
            " launchers/pretrain.py": f" {PRETRAIN}",
            "pretrain.yaml": str(config),
        },
    )
    command = re.sub(r"^deepspeed", f"{_BIN}/deepspeed", command)
    return re.sub(r"^python launchers/", f"{sys.executable} {ROOT}/launchers/", command)
