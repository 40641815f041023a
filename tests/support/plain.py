"""The pretraining of a `tiny_config` a second way: plain PyTorch, one process, whole batches."""

from collections.abc import Container

import numpy as np
import torch
from torch import Tensor

from datastore.loader import to_tokens
from datastore.reader import CellReader
from datastore.sampler import CellOrder
from datastore.store import open_store
from pretrain.building import build_model
from pretrain.config import PretrainConfig
from pretrain.masking import mask_tokens
from pretrain.objective import to_tensors
from pretrain.schedule import learning_rate
from tests.support.tiny import NUM_CELLS

HELD_OUT = 15
NUM_STEPS = 8
"""Of a `tiny_config`: two epochs of four."""


def plain_training(
    config: PretrainConfig, left_out: Container[int] = ()
) -> tuple[list[float], list[float], dict[str, Tensor]]:
    """Do the same without DeepSpeed, ranks or micro-batches: losses, norms, weights.

    Steps in `left_out` update nothing.
    """
    store = open_store(config.store)
    order = CellOrder(HELD_OUT, NUM_CELLS, config.seed, config.order)
    reader, cpu = CellReader(store), torch.device("cpu")
    model = build_model(config, store.panel)
    optimizer = torch.optim.AdamW(model.parameters(), config.optim.lr, weight_decay=0.0)
    losses, norms = [], []
    for step in range(NUM_STEPS):
        epoch, into = divmod(step, 4)
        places = np.arange(16 * into, min(16 * into + 16, order.num_cells))
        batch = to_tokens(
            reader.read(order.positions(epoch, places)), len(store.panel), config.binning
        )
        masked = mask_tokens(
            batch.tokens, batch.positions, config.seed, epoch, config.masking, config.binning
        )
        model.encoder.redraw_projections(config.seed, step // config.redraw_every)
        loss = model(*to_tensors(masked, cpu)).loss / len(masked.targets)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, 4, NUM_STEPS, config.optim)
        if step not in left_out:
            optimizer.step()
        losses.append(loss.item())
        norms.append(norm.item())
    return losses, norms, {name: value.detach() for name, value in model.state_dict().items()}


def largest_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return max(float((value - other[name]).abs().max()) for name, value in one.items())
