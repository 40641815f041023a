"""Commands of README and docs/getting_started.md, word for word, on tiny cells."""

import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import anndata
import pytest

from tests.support.documents import ROOT, commands
from tests.support.labelled import write_labelled

# CI runs these two themselves, and the tests have the environment.
ELSEWHERE = {"make quickstart", "make test", "source .venv/bin/activate"}


def _commands() -> list[str]:
    """Those of README, then those of the page that README has not."""
    shown = [*commands(ROOT / "README.md"), *commands(ROOT / "docs" / "getting_started.md")]
    return [line for line in dict.fromkeys(shown) if line not in ELSEWHERE]


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
    shown = _commands()
    assert len(shown) >= 12
    for command in shown:
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
