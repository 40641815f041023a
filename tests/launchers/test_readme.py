"""Commands of README and docs/getting_started.md, word for word, on tiny cells; its Python, too."""

import re
import shlex
from pathlib import Path

import anndata
import pytest

from tests.support.documents import ROOT, commands, run_shown
from tests.support.labelled import write_labelled

# CI runs the first two itself, `test_wheel.py` installs, and the tests have the environment.
ELSEWHERE = {"make quickstart", "make test", "pip install .", "source .venv/bin/activate"}


def _commands() -> list[str]:
    """Those of README, then those of the page that README has not."""
    shown = [*commands(ROOT / "README.md"), *commands(ROOT / "docs" / "getting_started.md")]
    return [line for line in dict.fromkeys(shown) if line not in ELSEWHERE]


def test_readme_shows_set_up_first() -> None:
    first = re.search(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert first is not None
    assert [line.split("#")[0].strip() for line in first[1].splitlines()] == [
        "make quickstart",
        "make test",
    ]


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.timeout(1200)
def test_readme_commands_run(tmp_path: Path) -> None:
    (tmp_path / "launchers").symlink_to(ROOT / "launchers")
    write_labelled(tmp_path / "data" / "a.h5ad", 80, seed=0)
    write_labelled(tmp_path / "data" / "b.h5ad", 80, seed=1)
    write_labelled(tmp_path / "labelled.h5ad", 60, seed=2)
    query = anndata.read_h5ad(write_labelled(tmp_path / "unlabelled.h5ad", 20, seed=3))
    del query.obs["cell_type"]
    query.write_h5ad(tmp_path / "unlabelled.h5ad")
    shown = _commands()
    assert len(shown) >= 12
    for command in shown:
        # The tiny cells express fewer genes than the preset asks for.
        extra = " --min_genes 1" if "store build" in command else ""
        run_shown(command + extra, tmp_path)
    page = (ROOT / "docs" / "getting_started.md").read_text("utf-8")
    (lines,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    run_shown(f"python -W ignore -c {shlex.quote(lines)}", tmp_path)
    assert (tmp_path / "umap.png").stat().st_size > 0
    annotated = anndata.read_h5ad(tmp_path / "annotated.h5ad")
    assert {"scbert_label", "scbert_confidence", "scbert_novel"} <= set(annotated.obs)
    assert annotated.obsm["X_scbert"].shape[0] == 20
