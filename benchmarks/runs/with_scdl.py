"""One run of bionemo-scdl on the largest source. Usage: with_scdl.py CASE FOLDER CELLS"""

import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bionemo.scdl.io.single_cell_memmap_dataset import SingleCellMemMapDataset
from bionemo.scdl.util.torch_dataloader_utils import collate_sparse_matrix_batch
from stopwatch import peak_mb, report, say
from torch.utils.data import DataLoader

BATCH = 512


def batches(folder: Path) -> Iterator[Any]:
    cells = SingleCellMemMapDataset(str(folder / "scdl"))
    together = collate_sparse_matrix_batch
    yield from DataLoader(cells, batch_size=BATCH, shuffle=True, collate_fn=together)


def main(case: str, folder: Path, cells: int) -> None:
    warnings.simplefilter("ignore")
    if case == "build":
        source = folder / "raw" / "source_0.h5ad"
        SingleCellMemMapDataset(str(folder / "scdl"), str(source), use_X_not_raw=True)
        say(peak_mb=peak_mb())
    else:
        report(lambda: batches(folder), lambda batch: int(batch.shape[0]), cells, 10.0)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
