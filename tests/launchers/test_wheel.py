"""A built wheel works outside the repository, in an environment that holds nothing else of ours.

The environment borrows the installed dependencies by a .pth file, so that nothing is downloaded;
the editable installation beside them is not seen through it.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from tests.support import slurm_stand_in
from tests.support.labelled import write_classifier, write_labelled

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("datastore", "pretrain", "finetune", "launchers")
pytestmark = [pytest.mark.slow]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = tmp_path_factory.mktemp("source")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, source / package)
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    words = ["wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation", "."]
    subprocess.run([sys.executable, "-m", "pip", *words], cwd=source, check=True)
    (built,) = source.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    packages = folder / "lib" / version / "site-packages"
    (packages / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python = str(folder / "bin" / "python")
    words = ["--python", python, "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            *words,
            "--force-reinstall",
            "--no-warn-conflicts",
            str(wheel),
        ],
        check=True,
        env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
    )
    return folder


def run(environment: Path, *words: str, cwd: Path) -> str:
    environ = {
        **{key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
        "PATH": f"{environment / 'bin'}{os.pathsep}{os.environ['PATH']}",
    }
    done = subprocess.run(words, cwd=cwd, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
    return done.stdout


def test_everything_that_is_no_python_is_inside(wheel: Path) -> None:
    inside = set(zipfile.ZipFile(wheel).namelist())
    kinds = (".yaml", ".json", ".sbatch", ".sh", ".cpp")
    for package in PACKAGES:
        assert f"{package}/py.typed" in inside
        for path in (ROOT / package).rglob("*"):
            name = str(path.relative_to(ROOT))
            wanted = path.suffix in (".py", *kinds) and name != "launchers/setup_env.sh"
            if wanted and "__pycache__" not in name:
                assert name in inside


def test_the_wheel_works_outside_the_repository(environment: Path, tmp_path: Path) -> None:
    where = "import datastore, pretrain, finetune, launchers as l; print(l.__file__)"
    assert run(environment, "python", "-c", where, cwd=tmp_path).startswith(str(environment))
    assert "scbert store build" in run(environment, "scbert", "--help", cwd=tmp_path)
    write_labelled(tmp_path / "cells.h5ad", 40)
    small = ["--preset", "quickstart", "--min_genes", "1"]
    words = ["store", "build", "--sources", "cells.h5ad", "--output", "cells.zarr", *small]
    run(environment, "scbert", *words, cwd=tmp_path)
    facts = json.loads(
        run(environment, "scbert", "store", "info", "cells.zarr", "--json", cwd=tmp_path)
    )
    assert facts["cells"] == 40
    words = ["pretrain", "--preset", "medium", "--store", "cells.zarr", "--output", "run"]
    assert "depth: 4" in run(environment, "scbert", *words, "--print_config", cwd=tmp_path)
    (tmp_path / "table.csv").write_text("data,seed\ncells.h5ad,0\n")
    said = run(environment, "scbert", "sweep", "check", "table.csv", cwd=tmp_path)
    (template,) = [Path(word) for word in said.split() if word.endswith(".sbatch")]
    assert template.is_file()
    assert template.is_relative_to(environment)
    doctor = json.loads(run(environment, "scbert", "doctor", "--json", cwd=tmp_path))
    assert doctor["healthy"] is True


@pytest.mark.multiprocess
@pytest.mark.timeout(600)
def test_batch_scripts_of_the_wheel_run_outside_the_repository(
    environment: Path, tmp_path: Path
) -> None:
    slurm_stand_in.install(environment / "bin", most=2)
    where = "import launchers; print(launchers.__path__[0])"
    scripts = Path(run(environment, "python", "-c", where, cwd=tmp_path).strip()) / "slurm"
    for place in range(2):
        write_labelled(tmp_path / "raw" / f"{place}.h5ad", 60, seed=place)
    write_classifier(tmp_path / "model")

    def submit(script: str, array: str, *words: str) -> None:
        options = [array] if array else ["--nodes", "1", "--ntasks-per-node", "2"]
        run(environment, "sbatch", *options, str(scripts / script), *words, cwd=tmp_path)

    small = ["--min_genes", "1", "--cells_per_partition", "60"]
    submit("ingest_array.sbatch", "--array=1-2", "--sources", "raw/", "--output", "c.zarr", *small)
    shape = ["--encoder.dim", "8", "--encoder.depth", "1", "--encoder.heads", "2"]
    shape += ["--encoder.dim_head", "8", "--batch.global_size", "16", "--batch.micro_size", "4"]
    shape += ["--order.lanes", "4", "--order.block", "8", "--order.window", "8"]
    store = ["--store", "c.zarr", "--output", "pretrained", "--max_steps", "2"]
    submit("pretrain.sbatch", "", *store, *shape, "--validation_share", "0.2")
    (tmp_path / "table.csv").write_text("data,seed\nraw/0.h5ad,0\n")
    base = ["--output", "sweep", "--encoder", "pretrained/export", "--epochs", "1"]
    base += ["--head.kind", "pooled", "--head.bottleneck", "4"]
    submit("finetune_array.sbatch", "--array=1-1", "table.csv", *base)
    labels = ["c.zarr", "--model", "model", "--output", "labelled.h5ad"]
    submit("annotate_array.sbatch", "--array=0-1", *labels)
    run(environment, "scbert", "annotate", *labels, cwd=tmp_path)
    table = (tmp_path / "labelled.csv").read_text().splitlines()
    assert len(table) == 1 + 120
