"""Loss of 200 steps on real cells, ours beside performer-pytorch's, from the same initial weights.

    python benchmarks/loss_curves.py --store quickstart_run/cells.zarr --plot loss_curves.png

All variants see the same hidden genes of the same cells in the same order:

- `performer_pytorch`: its blocks and its attention, nothing of ours but embedding, norm and head.
- `formula`: its blocks, our formula of the attention written down (whole feature maps).
- `formula_reordered`: the same with each batch's cells in reverse: another rounding of the same
  sums, which says how far two right answers may lie apart.
- `ours`: our blocks and kernels, float32.
- `ours_bf16`: the same in bfloat16 with float32 master weights and Adam.
- `ours_redrawn`: `ours` with other random features.

At the end the gradients of bf16 are compared with those of float64, at the same weights (rounded to
bf16) and batch: all of them together, and those of the weights of queries and keys one by one.
"""

import argparse
import copy
import json
import time
from pathlib import Path
from statistics import median
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from performer_pytorch import Performer
from torch import Tensor, nn
from turns import check_options, cpu_model

from datastore.config import BinningConfig, OrderConfig, SelectionConfig
from datastore.loader import CellLoader
from datastore.reader import CellReader
from datastore.sampler import CellSampler
from datastore.selection import select_cells
from datastore.store import open_store
from pretrain.config import EncoderConfig, MaskingConfig
from pretrain.encoder import ExpressionEncoder, build_encoder
from pretrain.favor import FavorAttention, favor_attention
from pretrain.masking import mask_tokens
from pretrain.objective import MaskedGeneModel, to_tensors

SHAPE: Final = EncoderConfig(dim=64, depth=2, heads=2, dim_head=32)
"""The quickstart's."""
LEARNING_RATE: Final = 1e-3
PAIRS: Final = (
    ("formula_reordered", "formula"),
    ("ours", "formula"),
    ("ours_bf16", "ours"),
    ("ours_redrawn", "ours"),
    ("performer_pytorch", "ours"),
)
"""What is compared with what, step by step."""
Batch = tuple[Tensor, Tensor, Tensor]
"""Tokens (B, G), positions of the targets (T,), true bins (T,)."""


class WholeMaps(FavorAttention):
    """Our formula without tiles, in the place of performer-pytorch's attention."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend; all are (B, H, n, d)."""
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = favor_attention(q, k, v, self.projection_matrix, kernel="reference")
        return out.transpose(1, 2)


class PublishedModel(nn.Module):
    """Our embedding and head around blocks that performer-pytorch runs."""

    def __init__(self, model: MaskedGeneModel, attention: type[nn.Module] | None) -> None:
        super().__init__()
        encoder = model.encoder
        shape = encoder.config
        self.performer = Performer(
            dim=shape.dim,
            depth=shape.depth,
            heads=shape.heads,
            dim_head=shape.dim_head,
            ff_mult=shape.ff_mult,
            nb_features=shape.features,
            qkv_bias=False,
            attn_out_bias=True,
            auto_check_redraw=False,
        )
        self.performer.load_state_dict(encoder.performer.state_dict(), strict=True)
        if attention is not None:
            for block in self.performer.net.layers:
                block[0].fn.fast_attention.__class__ = attention
        assert encoder.genes is not None
        self.expression, self.genes = encoder.expression, encoder.genes
        self.norm, self.head = encoder.norm, model.head

    def forward(self, tokens: Tensor, read: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Sum of the targets' cross-entropy, and nothing beside it."""
        tokens = nn.functional.pad(tokens.long(), (0, 1))
        states = self.norm(self.performer(self.expression(tokens) + self.genes.weight))
        logits = self.head(states.flatten(0, 1)[read])
        loss = nn.functional.cross_entropy(logits.float(), targets.long(), reduction="sum")
        return loss, loss


class Trainee:
    """A model and Adam over float32 weights, whatever the model computes in."""

    def __init__(
        self, model: nn.Module, dtype: torch.dtype = torch.float32, reverse: bool = False
    ) -> None:
        self._master: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
        self._reverse = reverse
        self.model = model
        if dtype != torch.float32:
            self._master = [p.detach().clone().requires_grad_() for p in self._master]
            self.model = model.to(dtype)
        self._own = [p for p in self.model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.Adam(self._master, lr=LEARNING_RATE)
        self.losses: list[float] = []
        self.cpu_seconds = 0.0

    def step(self, batch: Batch, length: int) -> None:
        """Train on a batch and note its mean loss."""
        start = time.process_time()
        tokens, read, targets = _reversed(batch, length) if self._reverse else batch
        loss = self.model(tokens, read, targets)[0] / len(targets)
        loss.backward()
        for own, master in zip(self._own, self._master, strict=True):
            if own is not master:
                assert own.grad is not None
                master.grad, own.grad = own.grad.float(), None
        self._optimizer.step()
        self._optimizer.zero_grad()
        with torch.no_grad():
            for own, master in zip(self._own, self._master, strict=True):
                own.copy_(master)
        self.losses.append(float(loss.detach()))
        self.cpu_seconds += time.process_time() - start


def _reversed(batch: Batch, length: int) -> Batch:
    tokens, read, targets = batch
    turned = (len(tokens) - 1 - read // length) * length + read % length
    order = turned.argsort()
    return tokens.flip(0), turned[order], targets[order]


def batches(store_path: str, steps: int, batch_size: int) -> tuple[int, list[Batch]]:
    """Genes of the panel, and masked batches of the training cells."""
    store = open_store(store_path)
    binning = BinningConfig()
    order = select_cells(store, SelectionConfig(), 0.1).order(0, OrderConfig())
    sampler = CellSampler(order, batch_size, 0, 1, 1)
    loader = CellLoader(CellReader(store), sampler, len(store.panel), binning)
    found: list[Batch] = []
    epoch = 0
    while len(found) < steps:
        for (cells,) in loader.epoch(epoch):
            masked = mask_tokens(cells.tokens, cells.positions, 0, epoch, MaskingConfig(), binning)
            found.append(to_tensors(masked, torch.device("cpu")))  # type: ignore[arg-type]
        epoch += 1
    return len(store.panel), found[:steps]


def variants(num_genes: int) -> dict[str, Trainee]:
    """Models of equal weights."""

    def model(draw: int = 0) -> MaskedGeneModel:
        encoder: ExpressionEncoder = build_encoder(SHAPE, BinningConfig(), num_genes, seed=0)
        encoder.redraw_projections(0, draw)
        torch.manual_seed(0)
        return MaskedGeneModel(encoder)

    return {
        "performer_pytorch": Trainee(PublishedModel(model(), None)),
        "formula": Trainee(PublishedModel(model(), WholeMaps)),
        "formula_reordered": Trainee(PublishedModel(model(), WholeMaps), reverse=True),
        "ours": Trainee(model()),
        "ours_bf16": Trainee(model(), torch.bfloat16),
        "ours_redrawn": Trainee(model(draw=1)),
    }


def gradient_errors(model: nn.Module, batch: Batch, autocast: bool) -> dict[str, float]:
    """Relative errors of gradients in bf16, by autocast or with weights in bf16, in norm."""
    rounded = copy.deepcopy(model).bfloat16().double()
    exact = _gradients(rounded, batch)
    narrow = rounded.float() if autocast else rounded.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ours = _gradients(narrow, batch)
    errors = {name: ours[name] - gradient for name, gradient in exact.items()}
    together = [sum(float(x.norm() ** 2) for x in of.values()) ** 0.5 for of in (errors, exact)]
    single = [
        float(errors[name].norm() / gradient.norm())
        for name, gradient in exact.items()
        if "to_q" in name or "to_k" in name
    ]
    return {
        "all": together[0] / together[1],
        "worst of queries and keys": max(single),
        "median of queries and keys": median(single),
    }


def _gradients(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    tokens, read, targets = batch
    model.zero_grad()
    (model(tokens, read, targets)[0] / len(targets)).backward()
    found = {name: of.grad for name, of in model.named_parameters() if of.grad is not None}
    return {name: gradient.double().clone() for name, gradient in found.items()}


def run(store: str, steps: int, batch_size: int) -> dict[str, Any]:
    """Train all variants in turn, step by step."""
    num_genes, data = batches(store, steps, batch_size)
    trainees = variants(num_genes)
    for number, batch in enumerate(data):
        for trainee in trainees.values():
            trainee.step(batch, num_genes + 1)
        if (number + 1) % 50 == 0:
            print(number + 1, {name: round(t.losses[-1], 4) for name, t in trainees.items()})
    errors = {
        name: gradient_errors(trainees[name].model, data[0], name == "performer_pytorch")
        for name in ("performer_pytorch", "ours")
    }
    torch_only = copy.deepcopy(trainees["ours"].model)
    for module in torch_only.modules():
        if hasattr(module, "kernel"):
            module.kernel = "torch"  # type: ignore[assignment]
    errors["ours, tiles in PyTorch"] = gradient_errors(torch_only, data[0], autocast=False)
    losses = {name: np.array(trainee.losses) for name, trainee in trainees.items()}
    worst = {f"{one} vs {other}": _worst(losses[one], losses[other]) for one, other in PAIRS}
    return {
        "benchmark": "loss_curves",
        "figures": {
            "steps": steps,
            "cells_per_step": batch_size,
            "genes": num_genes,
            "worst_relative_difference": worst,
            "mean_loss_of_last_20": {name: float(of[-20:].mean()) for name, of in losses.items()},
            "gradient_errors_of_bf16": errors,
            "cpu_seconds": {name: trainee.cpu_seconds for name, trainee in trainees.items()},
        },
        "machine": {"cpu": cpu_model(), "threads": 1},
        "losses": {name: of.tolist() for name, of in losses.items()},
    }


def _worst(losses: NDArray[np.float64], others: NDArray[np.float64]) -> float:
    return float(np.abs(losses / others - 1).max())


def plot(losses: dict[str, NDArray[np.float64]], path: Path) -> None:
    """Draw the curves, and how far each is from ours."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for name in ("performer_pytorch", "ours", "ours_bf16"):
        left.plot(losses[name], label=name, linewidth=1)
    left.set(xlabel="step", ylabel="loss (nats per hidden gene)")
    left.legend(frameon=False)
    for one, other in PAIRS:
        difference = np.abs(losses[one] / losses[other] - 1)
        right.semilogy(np.maximum(difference, 1e-9), label=f"{one} vs {other}", linewidth=0.8)
    right.set(xlabel="step", ylabel="relative difference")
    right.legend(frameon=False, fontsize=7)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Run and print one line of JSON at the end."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--store", required=True, help="cell store, such as the quickstart's")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--quick", action="store_true", help="20 steps")
    parser.add_argument("--plot", type=Path, help="where to write the figure")
    parser.add_argument("--json", type=Path, help="where to write the result with all losses")
    options = parser.parse_args()
    check_options(parser, options)
    torch.set_num_threads(1)
    steps = 20 if options.quick else options.steps
    result = run(options.store, steps, options.batch_size)
    losses = {name: np.array(of) for name, of in result["losses"].items()}
    if options.plot is not None:
        plot(losses, options.plot)
    if options.json is not None:
        options.json.write_text(json.dumps(result) + "\n", encoding="utf-8")
    del result["losses"]
    print(json.dumps(result))


if __name__ == "__main__":
    main()
