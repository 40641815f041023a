"""Import the published scBERT checkpoints (`panglao_pretrain.pth` and others of its layout).

They hold the state dict of a `PerformerLM` below `model_state_dict`: `token_emb`, `pos_emb.emb`
(gene2vec), `performer.net.layers.…`, `norm`, `to_out`. Only tensors and plain values are read
(`weights_only=True`): a file with anything else in it is refused, not executed.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal

import torch
from torch import Tensor

from datastore.config import BinningConfig
from datastore.genes import GenePanel
from datastore.store import file_digest
from pretrain.config import EncoderConfig
from pretrain.encoder import ExpressionEncoder, build_encoder
from pretrain.export import git_commit, write_export

NAMES: Final = {
    "token_emb.weight": "encoder.expression.weight",
    "pos_emb.emb.weight": "encoder.genes.weight",
    "norm.weight": "encoder.norm.weight",
    "norm.bias": "encoder.norm.bias",
    "to_out.weight": "head.weight",
    "to_out.bias": "head.bias",
}
"""Names of the published file → ours; those of the Performer follow a rule."""


def import_published(
    path: Path, panel: GenePanel, output: Path, attention: Literal["published", "stable"]
) -> None:
    """Write an export with the weights of a published checkpoint.

    Args:
        path: The `.pth` file.
        panel: Its genes in order; one fewer than it has positions.
        output: Folder of the export.
        attention: Numerics to use with it, see `encoder.attention`.

    Raises:
        ValueError: If the file is no such checkpoint, or has another number of genes; the first
            name or number that differs is named.
    """
    weights = _renamed(path, _state_dict(path))
    config, binning = _shape(path, weights, attention)
    positions = len(weights["encoder.genes.weight"])
    if positions != len(panel) + 1:
        raise ValueError(
            f"{path} knows {positions - 1:,} genes (and one constant position), --genes names "
            f"{len(panel):,}; give the file with the genes it was trained on, in order"
        )
    encoder = build_encoder(config, binning, len(panel), seed=0)
    _load(path, encoder, weights)
    provenance = {
        "imported_from": path.name,
        "sha256": file_digest(path),
        "git_commit": git_commit(),
    }
    write_export(output, "encoder", encoder, panel, weights, {"provenance": provenance})


def _state_dict(path: Path) -> dict[str, Tensor]:
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # torch raises what its reader does: of unpickling, of archives
        if "weights_only" not in str(error):
            raise ValueError(f"{path} is no PyTorch checkpoint, or damaged: {error}") from error
        raise ValueError(
            f"{path} holds more than tensors and is not loaded, for it could run code; save its "
            "state dict alone: torch.save(checkpoint['model_state_dict'], 'weights.pth')"
        ) from error
    if isinstance(content, Mapping):
        content = content.get("model_state_dict", content)
    if not isinstance(content, Mapping) or not all(torch.is_tensor(x) for x in content.values()):
        raise ValueError(f"{path} holds no state dict (names and tensors)")
    return {str(name).removeprefix("module."): value for name, value in content.items()}


def _renamed(path: Path, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our names for the published ones; every weight is listed there twice, the second is dropped.

    Raises:
        ValueError: If a name is missing or of another model.
    """
    weights = {}
    for name, value in state.items():
        if name in NAMES:
            weights[NAMES[name]] = value.float()
        elif name.startswith("performer.net.layers."):
            weights[f"encoder.{name}"] = value.float()
        elif name.startswith("to_out."):
            raise ValueError(
                f"{path} has {name}: it is a fine-tuned classifier; give the pretrained checkpoint"
            )
        elif not name.startswith("performer.proj_updater."):
            raise ValueError(f"{path} has {name}, which the published layout does not know")
    for name, ours in NAMES.items():
        if ours not in weights:
            raise ValueError(f"{path} has no {name}: it is not of the published layout")
    return weights


def _shape(
    path: Path, weights: Mapping[str, Tensor], attention: Literal["published", "stable"]
) -> tuple[EncoderConfig, BinningConfig]:
    """Read the shape of the model off its tensors."""
    block = "encoder.performer.net.layers.0"
    try:
        num_features, dim_head = weights[f"{block}.0.fn.fast_attention.projection_matrix"].shape
        inner = len(weights[f"{block}.0.fn.to_q.weight"])
        hidden = len(weights[f"{block}.1.fn.fn.w1.weight"])
    except KeyError as error:
        name = str(error.args[0]).removeprefix("encoder.")
        raise ValueError(f"{path} has no {name}: it is not of the published layout") from error
    num_tokens, dim = weights["encoder.expression.weight"].shape
    depth = 1 + max(
        int(found[1]) for name in weights if (found := re.search(r"\.layers\.(\d+)\.", name))
    )
    config = EncoderConfig(
        dim=dim,
        depth=depth,
        heads=inner // dim_head,
        dim_head=dim_head,
        ff_mult=hidden // dim,
        num_features=num_features,
        gene_embedding="gene2vec",
        attention=attention,
    )
    return config, BinningConfig(top_bin=num_tokens - 2)


def _load(path: Path, encoder: ExpressionEncoder, weights: Mapping[str, Tensor]) -> None:
    prefix = "encoder."
    own = {n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)}
    try:
        encoder.load_weights(own)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
