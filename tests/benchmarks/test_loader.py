"""The loader's benchmark: environments that cannot be made are named, and a small run is whole."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.environments import environment, find_python312

ROOT = Path(__file__).resolve().parents[2]


def test_a_python_that_is_not_312_is_not_taken(tmp_path: Path) -> None:
    broken = tmp_path / "python3.12"
    broken.write_text("#!/bin/sh\nexit 3\n")
    broken.chmod(0o755)
    assert find_python312(str(broken)) is None
    assert find_python312(str(tmp_path / "nowhere")) is None
    found = find_python312(sys.executable)
    assert (found == sys.executable) == (sys.version_info[:2] == (3, 12))


def test_an_environment_is_made_once(tmp_path: Path) -> None:
    (tmp_path / "installed.txt").write_text("one==1\ntwo")
    found = environment(tmp_path, "/no/python", ["one==1", "two"])
    assert found.python == tmp_path / "bin" / "python"


def test_an_environment_without_its_python_is_named(tmp_path: Path) -> None:
    found = environment(tmp_path / "none", None, ["x"])
    assert (found.python, found.problem.split(";")[0]) == (None, "no Python 3.12 found")


@pytest.mark.slow
def test_what_cannot_be_installed_is_named(tmp_path: Path) -> None:
    missing = environment(tmp_path / "venv", sys.executable, [str(tmp_path / "no_such_package")])
    assert missing.python is None
    assert "no_such_package" in missing.problem


@pytest.mark.slow
def test_a_small_run_measures_all_that_needs_no_peer(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "loader.py"), "--quick", "--json"]
    sizes = ["--cells", "3000", "--rounds", "1", "--peers", "", "--workdir", str(tmp_path)]
    done = subprocess.run([*command, *sizes], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    measured = {name for name, value in result["ratios"].items() if value is not None}
    assert measured >= {"of_composed_limit", "seek_vs_cold_start", "mixing_variance"}
    assert {name for name in result["ratios"] if "annbatch" in name}.isdisjoint(measured)
    assert set(result["figures"]["not_measured"]) == {"annbatch", "cellstream", "scdataset", "scdl"}
    assert result["figures"]["csr"]["cells"] == 2 * 3000  # epochs
    assert 0.8 < result["ratios"]["mixing_variance"] < 1.2
    assert result["bars"]["csr_wall_vs_annbatch"].endswith("not measured")
