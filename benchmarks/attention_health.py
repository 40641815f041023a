"""What the number of random features and their redraw do to attention and to training.

    python benchmarks/attention_health.py --store quickstart_run/cells.zarr

Trains the quickstart's shape in bfloat16 with several numbers of features, and with several
intervals between redraws; each from the same weights, over the same cells. Then, on held-out cells:
masked accuracy and loss with the features the model has, and again after one redraw (a model that
holds on to the very features it was trained with loses by it); share of key features at the floor,
as we compute them and as performer-pytorch's stabiliser would; entropy of the mean attention; and
the error of each head's attended values against exact softmax attention. Ends with a line of JSON.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch
from loss_curves import SHAPE, Batch, Trainee, batches
from torch import Tensor, nn
from turns import check_options

from datastore.config import BinningConfig
from pretrain.encoder import build_encoder
from pretrain.favor import EPSILON, favor_attention
from pretrain.health import attention_health
from pretrain.objective import MaskedGeneModel

FEATURES: Final = (16, 32, 64, SHAPE.features, 256)
REDRAWS: Final = (0, 17, 100)
HELD_OUT_BATCHES: Final = 12
MEASURED_CELLS: Final = 4


def train(data: list[Batch], num_genes: int, features: int, redraw_every: int) -> MaskedGeneModel:
    """Train from the same weights; the projections are those of the last step's draw."""
    shape = replace(SHAPE, num_features=features)
    encoder = build_encoder(shape, BinningConfig(), num_genes, seed=0)
    torch.manual_seed(0)
    model = MaskedGeneModel(encoder)
    trainee = Trainee(model, torch.bfloat16)
    for step, batch in enumerate(data):
        if redraw_every:
            encoder.redraw_projections(0, step // redraw_every)
        trainee.step(batch, num_genes + 1)
    return model.float()


def held_out(model: MaskedGeneModel, data: list[Batch]) -> dict[str, float]:
    """Mean loss and masked accuracy."""
    loss, correct, count = 0.0, 0, 0
    with torch.no_grad():
        for tokens, read, targets in data:
            found = model(tokens, read, targets)
            loss, correct = loss + float(found.loss), correct + int(found.correct)
            count += len(targets)
    return {"loss": loss / count, "masked_accuracy": correct / count}


def published_floor_share(k: Tensor, directions: Tensor) -> float:
    """Key features below epsilon when the maximum is taken before |k|²/2 is subtracted."""
    k = k.float().transpose(0, 1) * k.shape[-1] ** -0.25  # (H, n, d)
    product = k @ directions.float().t()
    largest = product.amax((-1, -2), keepdim=True)
    exponent = product - k.square().sum(-1, keepdim=True) / 2 - largest
    return float((exponent.exp() < EPSILON).float().mean())


def softmax_error(q: Tensor, k: Tensor, v: Tensor, directions: Tensor) -> float:
    """Error of attended values against exact softmax attention, relative to their spread."""
    ours = favor_attention(q[None], k[None], v[None], directions, kernel="reference")[0]
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(0, 1)
    return float((ours - exact).norm() / (exact - v.mean(1)).norm())


class Recorder:
    """Queries, keys, directions and inputs of every attention of one forward pass."""

    def __init__(self, model: MaskedGeneModel) -> None:
        self._attentions = [block[0].fn for block in model.encoder.performer.net.layers]
        self._given: list[tuple[Tensor, Tensor, Tensor]] = []
        self._inputs: list[Tensor] = []

    def figures(self, model: MaskedGeneModel, tokens: Tensor) -> list[dict[str, float]]:
        """Figures of each block, means over heads, for one cell's tokens, (G,)."""
        self._given.clear()
        self._inputs.clear()
        hooks = [of.register_forward_pre_hook(self._note_input) for of in self._attentions]
        for attention in self._attentions:
            attention.observer = self._note
        with torch.no_grad():
            model.encoder(tokens[None])
        for attention, hook in zip(self._attentions, hooks, strict=True):
            attention.observer = None
            hook.remove()
        return [
            self._of_block(attention, x, *given)
            for attention, x, given in zip(self._attentions, self._inputs, self._given, strict=True)
        ]

    def _note(self, q: Tensor, k: Tensor, directions: Tensor, *_: Tensor | None) -> None:
        self._given.append((q, k, directions))

    def _note_input(self, _: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        self._inputs.append(arguments[0])

    def _of_block(
        self, attention: Any, x: Tensor, q: Tensor, k: Tensor, directions: Tensor
    ) -> dict[str, float]:
        with torch.no_grad():
            floor, entropy = attention_health(q, k, directions)
            return {
                "floor_share": float(floor.mean()),
                "published_floor_share": published_floor_share(k, directions),
                "entropy": float(entropy.mean()),
                "softmax_error": softmax_error(q, k, attention.to_v(x).view(q.shape), directions),
            }


def attention_figures(model: MaskedGeneModel, tokens: Tensor) -> dict[str, float]:
    """Means over blocks, heads and cells; tokens are (B, G)."""
    recorder = Recorder(model)
    found = [of_block for cell in tokens for of_block in recorder.figures(model, cell)]
    return {name: sum(of[name] for of in found) / len(found) for name in found[0]}


def figures(model: MaskedGeneModel, data: list[Batch]) -> dict[str, float]:
    """All figures of a trained model."""
    own = held_out(model, data) | attention_figures(model, data[0][0][:MEASURED_CELLS])
    model.encoder.redraw_projections(1, 0)
    after = held_out(model, data)
    return own | {f"{name}_after_redraw": value for name, value in after.items()}


def run(store: str, steps: int, batch_size: int) -> dict[str, Any]:
    """Train and measure one model after another."""
    num_genes, data = batches(store, steps + HELD_OUT_BATCHES, batch_size)
    learn, test = data[:steps], data[steps:]
    found: dict[str, dict[str, float]] = {}
    settings = [(number, 0) for number in FEATURES] + [(SHAPE.features, n) for n in REDRAWS if n]
    for number, redraw_every in settings:
        name = f"{number} features" + (f", redrawn every {redraw_every}" if redraw_every else "")
        found[name] = figures(train(learn, num_genes, number, redraw_every), test)
        print(name, {key: round(value, 4) for key, value in found[name].items()}, flush=True)
    return {
        "benchmark": "attention_health",
        "figures": {"steps": steps, "cells_per_step": batch_size, "genes": num_genes, **found},
    }


def main() -> None:
    """Run and print one line of JSON at the end."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--store", required=True, help="cell store, such as the quickstart's")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--quick", action="store_true", help="10 steps")
    parser.add_argument("--json", type=Path, help="where to write the result")
    options = parser.parse_args()
    check_options(parser, options)
    torch.set_num_threads(1)
    steps = 10 if options.quick else options.steps
    result = run(options.store, steps, options.batch_size)
    if options.json is not None:
        options.json.write_text(json.dumps(result) + "\n", encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
