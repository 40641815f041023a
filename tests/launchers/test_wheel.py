"""A built wheel works outside the repository, in an environment that holds nothing else.

That environment begins empty and gets what a user's gets: torch as `make` installs it, the wheel,
and the dependencies that the wheel names, from pip's index. It takes minutes, so there is one.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import anndata
import pytest

from tests.support import slurm_stand_in
from tests.support.labelled import write_classifier, write_labelled

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
PACKAGES = ("datastore", "pretrain", "finetune", "launchers")
EVERY_MODULE = f"""
import importlib, pkgutil
for name in {PACKAGES}:
    for found in pkgutil.walk_packages(importlib.import_module(name).__path__, name + "."):
        importlib.import_module(found.name)
import launchers
print(launchers.__path__[0])
"""
# The installation comes within the first test's time: 4 minutes on two cores, more beside others.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]


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
    """A new environment with torch, the wheel, and what the wheel asks for."""
    folder = tmp_path_factory.mktemp("environment") / "venv"
    begun = subprocess.run(
        ["sh", "launchers/setup_env.sh", "torch", str(folder)],
        cwd=ROOT,
        env={**outside(folder), "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=False,
    )
    if begun.returncode and not os.environ.get("CI"):
        pytest.skip(f"no package index to install from: {begun.stderr}")
    assert begun.returncode == 0, begun.stdout + begun.stderr
    words = ["install", "--quiet", "--constraint", str(ROOT / "constraints.txt"), str(wheel)]
    run(folder, "python", "-m", "pip", *words, cwd=folder)
    return folder


def outside(environment: Path) -> dict[str, str]:
    """Variables of a shell in which that environment is active, and no other."""
    ours = Path(sys.executable).parent
    path = [place for place in os.environ["PATH"].split(os.pathsep) if Path(place) != ours]
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    kept |= {"PATH": os.pathsep.join([str(environment / "bin"), *path]), "PYTHONNOUSERSITE": "1"}
    # What DeepSpeed compiles is built anew whenever another environment's torch asks for it.
    kept |= {"TORCH_EXTENSIONS_DIR": str(environment.parent / "torch_extensions")}
    return {key: value for key, value in kept.items() if key != "VIRTUAL_ENV"}


def run(environment: Path, *words: str, cwd: Path) -> str:
    done = subprocess.run(
        words, cwd=cwd, env=outside(environment), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
    return done.stdout


def test_everything_that_is_no_python_is_inside(wheel: Path) -> None:
    inside = set(zipfile.ZipFile(wheel).namelist())
    kinds = (".yaml", ".json", ".sbatch", ".sh", ".cpp", ".h")
    for package in PACKAGES:
        assert f"{package}/py.typed" in inside
        for path in (ROOT / package).rglob("*"):
            name = str(path.relative_to(ROOT))
            wanted = path.suffix in (".py", *kinds) and name != "launchers/setup_env.sh"
            if wanted and "__pycache__" not in name:
                assert name in inside


def test_the_wheel_brings_what_it_needs_and_nothing_else(environment: Path, tmp_path: Path) -> None:
    assert "No broken requirements" in run(environment, "pip", "check", cwd=tmp_path)
    listed = json.loads(run(environment, "pip", "list", "--format", "json", cwd=tmp_path))
    names = {package["name"].lower() for package in listed}
    assert {"scbert-scale", "torch", "mlflow"} <= names
    assert not names & {"pytest", "ruff", "mypy", "moto", "mkdocs", "gensim", "dask-jobqueue"}
    home = run(environment, "python", "-W", "ignore", "-c", EVERY_MODULE, cwd=tmp_path)
    assert home.startswith(str(environment))


def test_the_wheel_works_outside_the_repository(environment: Path, tmp_path: Path) -> None:
    assert "scbert store build" in run(environment, "scbert", "--help", cwd=tmp_path)
    assert "[ ok ] packages" in run(environment, "scbert", "doctor", cwd=tmp_path)
    doctor = json.loads(run(environment, "scbert", "doctor", "--json", cwd=tmp_path))
    assert doctor["healthy"] is True
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


def test_three_commands_of_the_readme_lead_from_raw_files_to_labels(
    environment: Path, tmp_path: Path
) -> None:
    (block,) = re.findall(r"```bash\n(pip install \.\n.*?)```", README.read_text("utf-8"), re.S)
    install, finetune, annotate = block.splitlines()
    assert install == "pip install ."  # what the fixture did
    write_labelled(tmp_path / "labelled.h5ad", 60)
    write_labelled(tmp_path / "unlabelled.h5ad", 20, seed=1)
    for command in (finetune, annotate):
        run(environment, *shlex.split(command), cwd=tmp_path)
    annotated = anndata.read_h5ad(tmp_path / "annotated.h5ad")
    right = annotated.obs["scbert_label"].astype(str) == annotated.obs["cell_type"].astype(str)
    assert right.mean() > 0.8


@pytest.mark.multiprocess
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
