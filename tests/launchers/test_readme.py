"""The README's commands, word for word, on tiny cells in an empty folder."""

import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import anndata
import pytest

from tests.support.labelled import write_labelled

ROOT = Path(__file__).resolve().parents[2]
MAKE_COMMANDS = {"make quickstart", "make test"}  # CI runs these two themselves


def _commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    lines = [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line and line not in MAKE_COMMANDS]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_readme_shows_set_up_first() -> None:
    first = re.search(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert first is not None
    assert [line.split("#")[0].strip() for line in first[1].splitlines()] == [
        "make quickstart",
        "make test",
    ]


@pytest.mark.slow
@pytest.mark.multiprocess
def test_readme_commands_run(tmp_path: Path) -> None:
    (tmp_path / "launchers").symlink_to(ROOT / "launchers")
    write_labelled(tmp_path / "data" / "a.h5ad", 80, seed=0)
    write_labelled(tmp_path / "data" / "b.h5ad", 80, seed=1)
    write_labelled(tmp_path / "labelled.h5ad", 60, seed=2)
    query = anndata.read_h5ad(write_labelled(tmp_path / "unlabelled.h5ad", 20, seed=3))
    del query.obs["cell_type"]
    query.write_h5ad(tmp_path / "unlabelled.h5ad")
    environ = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    environ.pop("MLFLOW_TRACKING_URI", None)
    commands = _commands()
    assert len(commands) >= 7
    for command in commands:
        # The tiny cells express fewer genes than the preset asks for.
        extra = " --min_genes 1" if "store build" in command else ""
        # A machine that runs tests may run a training at the default port, too.
        command = command.replace("deepspeed ", f"deepspeed --master_port {_free_port()} ")
        started = time.perf_counter()
        done = subprocess.run(
            command + extra,
            shell=True,
            cwd=tmp_path,
            env=environ,
            capture_output=True,
            text=True,
            check=False,
        )
        print(f"{time.perf_counter() - started:6.1f} s  {command}")
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    annotated = anndata.read_h5ad(tmp_path / "annotated.h5ad")
    assert {"scbert_label", "scbert_confidence", "scbert_novel"} <= set(annotated.obs)
    assert annotated.obsm["X_scbert"].shape[0] == 20
