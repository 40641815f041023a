"""The published model and ours as training steps; and one of them alone, in a process of its own.

`encoder.py CASE LENGTH memory` prints its peak over the model, in MB,
`encoder.py CASE LENGTH rank RANK WORLD STORE` the seconds of some steps beside other ranks, and
`encoder.py CASE LENGTH product RANK WORLD STORE` those of plain products in its precision.
"""

import ctypes
import gc
import json
import resource
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from datastore.config import BinningConfig
from pretrain.allocator import keep_freed_memory
from pretrain.config import EncoderConfig
from pretrain.encoder import build_encoder
from pretrain.favor import Performer
from pretrain.objective import MaskedGeneModel

DIM, DEPTH, HEADS, DIM_HEAD, FEATURES = 200, 6, 10, 64, 266
NUM_BINS, MASK, CHOSEN = 6, 6, 0.15
EXPRESSED = 900 / 16_906
"""Share of a PanglaoDB cell's genes that are expressed."""
SHARES = (0.42, 0.28, 0.14, 0.08, 0.08)
"""Of these, the share in each bin."""


@dataclass(frozen=True)
class Batch:
    """Cells of synthetic bins with hidden genes."""

    tokens: Tensor
    """(B, G)"""
    read: Tensor
    """Places of the targets among B × (G + 1) positions, (T,)."""
    targets: Tensor
    """Their bins, (T,)."""


def draw(num_cells: int, length: int, seed: int = 0) -> Batch:
    """Draw cells of `length` - 1 genes, expressed as PanglaoDB's are."""
    rng = np.random.default_rng(seed)
    shape = (num_cells, length - 1)
    bins = rng.choice(np.arange(1, NUM_BINS), size=shape, p=SHARES)
    bins = np.where(rng.random(shape) < EXPRESSED, bins, 0)
    cells, genes = np.nonzero((bins > 0) & (rng.random(shape) < CHOSEN))
    targets = bins[cells, genes]
    bins[cells, genes] = MASK
    return Batch(*map(torch.from_numpy, (bins, cells * length + genes, targets)))


class Published(nn.Module):
    """scBERT as its authors run it: performer-pytorch, logits at every position."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.expression = nn.Embedding(NUM_BINS + 1, DIM)
        self.genes = nn.Embedding(length, DIM)
        self.genes.weight.requires_grad_(False)
        self.performer = Performer(
            dim=DIM,
            depth=DEPTH,
            heads=HEADS,
            dim_head=DIM_HEAD,
            nb_features=FEATURES,
            auto_check_redraw=False,
        )
        self.norm = nn.LayerNorm(DIM)
        self.head = nn.Linear(DIM, NUM_BINS + 1)

    def forward(self, batch: Batch) -> Tensor:
        tokens = nn.functional.pad(batch.tokens, (0, 1))
        x = self.expression(tokens) + self.genes.weight
        logits = self.head(self.norm(self.performer(x))).flatten(0, 1)
        targets = torch.full((len(logits),), -100)
        targets[batch.read] = batch.targets
        return nn.functional.cross_entropy(logits.float(), targets, ignore_index=-100)


class Ours(nn.Module):
    """The package's model; `Batch` in, mean loss out."""

    def __init__(self, length: int, **settings: object) -> None:
        super().__init__()
        config = EncoderConfig(gene_embedding="gene2vec", **settings)  # type: ignore[arg-type]
        vectors = torch.randn(length - 1, DIM, generator=torch.Generator().manual_seed(0))
        encoder = build_encoder(config, BinningConfig(), length - 1, 0, vectors)
        self.model = MaskedGeneModel(encoder)
        self.expressed = config.sequence == "expressed"
        self.num_zeros = config.num_zeros

    def forward(self, batch: Batch) -> Tensor:
        given = self._packed(batch) if self.expressed else (batch.tokens, batch.read, batch.targets)
        return self.model(*given).loss / len(batch.targets)

    def _packed(self, batch: Batch) -> tuple[Tensor, ...]:
        """The expressed and hidden genes of each cell, some of the others, and its constant one."""
        tokens = nn.functional.pad(batch.tokens, (0, 1))
        present = tokens > 0
        if self.num_zeros:
            place = torch.rand(batch.tokens.shape, generator=torch.Generator().manual_seed(0))
            most = min(self.num_zeros, batch.tokens.shape[1])
            zeros = (place * (batch.tokens == 0)).topk(most).indices
            present.scatter_(1, zeros, True)
        present[:, -1] = True
        place = present.flatten().cumsum(0) - 1
        offsets = nn.functional.pad(present.sum(1).cumsum(0), (1, 0))
        genes = present.nonzero()[:, 1]
        return tokens[present], place[batch.read], batch.targets, genes, offsets


class Trainer:
    """A model with Adam; bf16 weights have float32 masters, as DeepSpeed keeps them."""

    def __init__(self, model: nn.Module, dtype: torch.dtype, autocast: bool = False) -> None:
        self.model = model.to(dtype)
        self.autocast = autocast
        self.weights = [p for p in model.parameters() if p.requires_grad]
        narrow = dtype != torch.float32
        self.masters = [p.detach().float().clone() for p in self.weights] if narrow else None
        self.adam = torch.optim.Adam(self.masters or self.weights, lr=1e-4, fused=True)
        self.before_update: Callable[[], None] = lambda: None

    def loss(self, batch: Batch) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            loss: Tensor = self.model(batch)
        return loss

    def forward(self, batch: Batch) -> None:
        with torch.no_grad():
            self.loss(batch)

    def step(self, batch: Batch) -> None:
        """Forward, backward and update."""
        self.loss(batch).backward()
        self.before_update()
        if self.masters is None:
            self.adam.step()
        else:
            for master, weight in zip(self.masters, self.weights, strict=True):
                master.grad = None if weight.grad is None else weight.grad.float()
            self.adam.step()
            with torch.no_grad():
                for master, weight in zip(self.masters, self.weights, strict=True):
                    weight.copy_(master)
        for weight in self.weights:
            weight.grad = None


BF16, FP32 = torch.bfloat16, torch.float32
WITH_ZEROS: dict[str, object] = {"sequence": "expressed", "num_zeros": 1_000}
CASES: dict[str, Callable[[int], Trainer]] = {
    "performer_pytorch": lambda n: Trainer(Published(n), FP32),
    "performer_pytorch_autocast": lambda n: Trainer(Published(n), FP32, autocast=True),
    "fp32": lambda n: Trainer(Ours(n), FP32),
    "torch": lambda n: Trainer(Ours(n, kernel="torch"), BF16),
    "native": lambda n: Trainer(Ours(n, kernel="native"), BF16),
    "native_checkpointed": lambda n: Trainer(Ours(n, kernel="native", checkpointing=True), BF16),
    "fp32_checkpointed": lambda n: Trainer(Ours(n, checkpointing=True), FP32),
    "fp32_expressed": lambda n: Trainer(Ours(n, sequence="expressed"), FP32),
    "fp32_expressed_zeros": lambda n: Trainer(Ours(n, **WITH_ZEROS), FP32),
    "native_expressed_zeros": lambda n: Trainer(Ours(n, kernel="native", **WITH_ZEROS), BF16),
    "native_expressed": lambda n: Trainer(Ours(n, kernel="native", sequence="expressed"), BF16),
}


def give_memory_back() -> None:
    """Undo what `keep_freed_memory` has kept, before other processes need it."""
    gc.collect()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def resident() -> int:
    """Bytes of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def peak_memory(trainer: Trainer, batch: Batch) -> dict[str, float]:
    """Growth over what the model takes without a batch, in MB."""
    before, largest, done = resident(), 0, threading.Event()

    def watch() -> None:
        nonlocal largest
        while not done.is_set():
            largest = max(largest, resident())
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    for _ in range(2):  # the second with Adam's moments in place
        trainer.step(batch)
    done.set()
    watcher.join()
    return {"mb": (largest - before) / 1e6}


def rank_seconds(
    trainer: Trainer, batch: Batch, rank: int, world: int, store: str
) -> dict[str, float]:
    """Seconds by the clock of five steps after the first, gradients averaged over all ranks."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world
    )

    def average() -> None:
        gradients = [weight.grad for weight in trainer.weights if weight.grad is not None]
        joined = torch.cat([gradient.flatten() for gradient in gradients]) / world
        torch.distributed.all_reduce(joined)
        parts = joined.split([gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))

    trainer.before_update = average
    trainer.step(batch)
    torch.distributed.barrier()
    start = time.perf_counter()
    for _ in range(5):
        trainer.step(batch)
    seconds = time.perf_counter() - start
    torch.distributed.destroy_process_group()
    return {"seconds": seconds}


def product_seconds(dtype: torch.dtype, rank: int, world: int, store: str) -> dict[str, float]:
    """Seconds by the clock of plain products, begun at the same time as the other ranks'."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world
    )
    a, b = (torch.randn(2_048, 2_048).to(dtype) for _ in range(2))
    out = torch.empty(2_048, 2_048, dtype=dtype)
    torch.mm(a, b, out=out)
    torch.distributed.barrier()
    start = time.perf_counter()
    for _ in range(20):
        torch.mm(a, b, out=out)
    seconds = time.perf_counter() - start
    torch.distributed.destroy_process_group()
    return {"seconds": seconds}


def main() -> None:
    """Print one line of JSON."""
    case, length, kind, *rest = sys.argv[1:]
    torch.set_num_threads(1)
    if kind == "product":
        dtype = BF16 if case.startswith("native") else FP32
        print(json.dumps(product_seconds(dtype, int(rest[0]), int(rest[1]), rest[2])))
        return
    if kind == "rank":
        keep_freed_memory()
    trainer, batch = CASES[case](int(length)), draw(1, int(length))
    if kind == "memory":
        numbers = peak_memory(trainer, batch)
    else:
        rank, world, store = rest
        numbers = rank_seconds(trainer, batch, int(rank), int(world), store)
    print(json.dumps(numbers))


if __name__ == "__main__":
    main()
