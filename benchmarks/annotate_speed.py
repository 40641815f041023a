"""How fast cells are labelled, beside the published way: one cell at a time, performer-pytorch.

    python benchmarks/annotate_speed.py --save benchmarks/results/annotate_speed.json

At full length (16,906 genes + 1, 6 blocks × 200, 10 heads, 266 features, untrained weights, 900
expressed genes a cell) these take turns, on one thread, measured in CPU seconds:

- `published`: performer-pytorch's blocks and attention, a cell at a time, as the published
  prediction script does; in a process of its own, whose allocator is the system's.
- `published, memory kept`: the same beside ours, in a process that keeps freed memory as
  `launchers/annotate.py` does: nearly half of its time are page faults else.
- `ours`: `finetune.classifier.predict`, float32, and the same in bfloat16 (`--precision bfloat16`)
  where the CPU has it.
- `expressed`: the same shape on expressed genes only (another model, trained so).

Then cells per CPU second of the quickstart's shape (2 blocks × 64, 2,000 genes), and cells per
second on all cores. Each ratio is the median over rounds of what was measured in the same round,
beside `published`. Ends with a line of JSON.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Final

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from performer_pytorch import Performer
from scipy import sparse
from torch import Tensor, nn

from datastore.binning import tokenize
from datastore.config import BinningConfig
from finetune.annotator import auto_batch_size
from finetune.classifier import CellClassifier, predict
from finetune.config import HeadConfig
from pretrain.allocator import keep_freed_memory
from pretrain.config import EncoderConfig
from pretrain.encoder import build_encoder
from pretrain.products import multiplies_bf16

FULL: Final = EncoderConfig(dim=200, depth=6, heads=10, dim_head=64, gene_embedding="learned")
FULL_GENES: Final = 16_906
QUICKSTART: Final = EncoderConfig(dim=64, depth=2, heads=2, dim_head=32, gene_embedding="learned")
QUICKSTART_GENES: Final = 2_000
Way = Callable[[sparse.csr_matrix], float]
"""Labels cells; CPU seconds per cell."""
Found = dict[str, list[float]]
LABELS: Final = tuple(f"type {number}" for number in range(14))
CPU: Final = torch.device("cpu")


class PublishedClassifier(nn.Module):
    """The published model's parts as performer-pytorch runs them."""

    def __init__(self, shape: EncoderConfig, num_genes: int) -> None:
        super().__init__()
        self.expression = nn.Embedding(7, shape.dim)
        self.genes = nn.Embedding(num_genes + 1, shape.dim)
        self.performer = Performer(
            dim=shape.dim,
            depth=shape.depth,
            heads=shape.heads,
            dim_head=shape.dim_head,
            ff_mult=shape.ff_mult,
            nb_features=shape.features,
            qkv_bias=False,
            attn_out_bias=True,
        )
        self.norm = nn.LayerNorm(shape.dim)
        self.per_gene = nn.Linear(shape.dim, 1)
        self.head = nn.Sequential(
            nn.Linear(num_genes + 1, 512),
            nn.ReLU(),
            nn.Linear(512, 128),
            nn.ReLU(),
            nn.Linear(128, len(LABELS)),
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (1, G) to logits (1, C)."""
        tokens = nn.functional.pad(tokens.long(), (0, 1))
        x = self.expression(tokens) + self.genes.weight
        return self.head(self.per_gene(self.norm(self.performer(x))).squeeze(-1).relu())


def one_at_a_time(model: PublishedClassifier, counts: sparse.csr_matrix) -> None:
    with torch.no_grad():
        for cell in counts:
            starts = cell.indptr.astype(np.int64)
            tokens = tokenize(starts, cell.indices, cell.data, cell.shape[1], BinningConfig())
            model(torch.from_numpy(tokens)).softmax(-1).numpy()


def labelling(shape: EncoderConfig, num_genes: int, narrow: bool) -> Callable[..., None]:
    encoder = build_encoder(shape, BinningConfig(), num_genes, seed=0)
    model = CellClassifier(encoder, LABELS, HeadConfig()).eval()
    size = auto_batch_size(model, CPU)

    def label(counts: sparse.csr_matrix) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
            predict(model, counts, size, progress=False)

    return label


def cells(num_cells: int, num_genes: int, expressed: int, seed: int) -> sparse.csr_matrix:
    rng = np.random.default_rng(seed)
    columns = np.concatenate([rng.permutation(num_genes)[:expressed] for _ in range(num_cells)])
    values = 1 + rng.geometric(0.4, len(columns))
    starts = np.arange(num_cells + 1) * expressed
    return sparse.csr_matrix((values, columns, starts), shape=(num_cells, num_genes))


def cpu_seconds(function: Callable[[sparse.csr_matrix], None], counts: sparse.csr_matrix) -> float:
    """CPU seconds per cell."""
    started = time.process_time()
    function(counts)
    return (time.process_time() - started) / counts.shape[0]


def cells_per_second(label: Callable[..., None], counts: sparse.csr_matrix, rounds: int) -> float:
    """By the clock, on a thread for each core; the middle one of the rounds."""
    torch.set_num_threads(os.cpu_count() or 1)
    seconds = []
    for _ in range(rounds):
        started = time.perf_counter()
        label(counts)
        seconds.append(time.perf_counter() - started)
    torch.set_num_threads(1)
    return counts.shape[0] / median(seconds)


def published_apart(counts: sparse.csr_matrix) -> float:
    """CPU seconds per cell of the published way, in a process of its own."""
    command = [sys.executable, "-W", "ignore", __file__, "--published_alone"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout)


def published_alone() -> None:
    """What `published_apart` starts: a cell to warm up, then one that is measured."""
    model, counts = PublishedClassifier(FULL, FULL_GENES).eval(), cells(2, FULL_GENES, 900, 0)
    one_at_a_time(model, counts[:1])
    print(cpu_seconds(partial(one_at_a_time, model), counts[1:]))


def measure(ways: dict[str, Way], counts: dict[str, sparse.csr_matrix], rounds: int) -> Found:
    """CPU seconds per cell of each way in each round."""
    found: Found = {name: [] for name in ways}
    for turn in range(rounds):
        for name, way in ways.items():
            found[name].append(way(counts[name]))
            print(f"round {turn + 1}  {name:22} {found[name][-1]:8.4f} CPU s per cell", flush=True)
    return found


def warm(label: Callable[[sparse.csr_matrix], None], cell: sparse.csr_matrix) -> Way:
    """Label a cell, so that kernels are built and memory is taken; then the way to measure."""
    label(cell)
    return partial(cpu_seconds, label)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="accepted for uniformity")
    parser.add_argument("--save", metavar="FILE", help="write the line of JSON to a file, too")
    parser.add_argument("--published_alone", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if options.published_alone:
        published_alone()
        return
    rounds = 1 if options.quick else options.rounds
    keep_freed_memory()
    few, more = cells(1, FULL_GENES, 900, 0), cells(4, FULL_GENES, 900, 1)
    full = partial(labelling, FULL, FULL_GENES)
    expressed = partial(labelling, replace(FULL, sequence="expressed"), FULL_GENES)
    published = partial(one_at_a_time, PublishedClassifier(FULL, FULL_GENES).eval())
    ways: dict[str, Way] = {
        "published": published_apart,
        "published, memory kept": warm(published, few),
        "ours": warm(full(narrow=False), few),
        "expressed": warm(expressed(narrow=False), few),
    }
    if multiplies_bf16():
        ways["ours_bf16"] = warm(full(narrow=True), few)
    given = dict.fromkeys(ways, few) | {"ours_bf16": more, "expressed": more}
    found = measure(ways, given, rounds)
    many = cells(64, QUICKSTART_GENES, 400, 2)
    shape = partial(labelling, QUICKSTART, QUICKSTART_GENES)
    small = {
        "float32": shape(narrow=False),
        "expressed": labelling(
            replace(QUICKSTART, sequence="expressed"), QUICKSTART_GENES, narrow=False
        ),
    }
    if multiplies_bf16():
        small["bfloat16"] = shape(narrow=True)
    quickstart = measure(
        {name: warm(label, many[:1]) for name, label in small.items()},
        dict.fromkeys(small, many),
        rounds,
    )
    lots = cells(256, QUICKSTART_GENES, 400, 3)
    on_all_cores = {name: cells_per_second(label, lots, rounds) for name, label in small.items()}
    ratios = {
        name: round(median(a / b for a, b in zip(found["published"], found[name], strict=True)), 2)
        for name in found
        if name != "published"
    }
    result = {
        "benchmark": "annotate_speed",
        "ratios": ratios,
        "figures": {
            "cpu_seconds_per_cell": {name: median(values) for name, values in found.items()},
            "quickstart_cells_per_cpu_second": {
                name: 1 / median(values) for name, values in quickstart.items()
            },
            "quickstart_cells_per_second_on_all_cores": on_all_cores,
            "rounds": rounds,
        },
        "machine": {
            "cpu": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "load": os.getloadavg()[0],
            "torch": torch.__version__,
        },
    }
    print(json.dumps(result))
    if options.save:
        Path(options.save).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
