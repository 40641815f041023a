"""The packages of the extra `benchmark` label cells, in an environment that has them.

They are no part of the project's own environment. The one made here borrows what is installed
already, under the pinned versions, and gets the peers from the package index.
"""

import configparser
import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.multiclass import OneVsRestClassifier

from finetune.methods import OneAgainstRest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import json
import numpy as np
from finetune.config import FinetuneConfig, LabelledConfig
from finetune.methods import METHODS, Task
from finetune.sides import Labelled
from tests.support.simulated import simulated_cells

counts, labels = simulated_cells((60, 60, 60, 40))
learnt = np.arange(len(labels)) % 2 == 0
task = Task(
    train=Labelled(counts[learnt], labels[learnt]),
    test=counts[~learnt],
    genes=tuple(f"G{place}" for place in range(counts.shape[1])),
    seed=0,
    config=FinetuneConfig(encoder="none", output="", data=LabelledConfig(path="")),
    export=None,
    markers=None,
)
right = {name: METHODS[name](task).labels == labels[~learnt] for name in ("CellTypist", "SingleR")}
print(json.dumps({name: float(found.mean()) for name, found in right.items()}))
"""


@pytest.mark.parametrize("num_types", [2, 4])
def test_one_against_rest_is_scikit_learns(num_types: int) -> None:
    rng = np.random.default_rng(0)
    labels = np.array(["a", "b", "c", "d"])[rng.integers(num_types, size=90)]
    x = rng.normal(size=(90, 12)) + (labels[:, None] == np.array(["a", "b", "c", "d"] * 3))
    ours = OneAgainstRest(C=0.3, max_iter=500).fit(x, labels)
    theirs = OneVsRestClassifier(LogisticRegression(C=0.3, max_iter=500)).fit(x, labels)
    assert (ours.predict(x) == theirs.predict(x)).all()
    np.testing.assert_allclose(ours.decision_function(x), theirs.decision_function(x), atol=1e-6)


@pytest.mark.slow
def test_celltypist_and_singler_tell_simulated_types_apart(tmp_path: Path) -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    extra = setup["options.extras_require"]["benchmark"].splitlines()
    peers = [line for line in extra if line and not line.startswith("#")]
    assert len(peers) == 2
    venv.create(tmp_path / "env", with_pip=False)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    packages = tmp_path / "env" / "lib" / version / "site-packages"
    (packages / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python = str(tmp_path / "env" / "bin" / "python")
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet"]
    subprocess.run([*pip, "-c", str(ROOT / "constraints.txt"), *peers], check=True)
    done = subprocess.run(
        [python, "-c", SCRIPT],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    right = json.loads(done.stdout.splitlines()[-1])
    assert min(right.values()) > 0.9, right  # 0.98 and 0.96
