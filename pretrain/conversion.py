"""From a checkpoint of any ZeRO stage and number of ranks to an export, without starting ranks."""

from pathlib import Path
from typing import Any

from torch import Tensor

from datastore.config import BinningConfig
from datastore.genes import GenePanel, read_panel
from pretrain.checkpoint import checkpoint_problem, newest_whole, open_pieces, read_manifest
from pretrain.config import EncoderConfig
from pretrain.encoder import build_encoder
from pretrain.export import git_commit, write_export


def find_checkpoint(path: Path, best: bool = False) -> Path:
    """Find the checkpoint that a path means.

    Args:
        path: A checkpoint (`step_…`), the folder of several, or the output of a training.
        best: Take the one with the lowest held-out loss instead of the newest.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is not whole.
    """
    if not path.name.startswith("step_"):
        folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
        step = newest_whole(folder) if folder.is_dir() else 0
        if not step:
            raise FileNotFoundError(f"there is no whole checkpoint in {path}")
        path = folder / f"step_{step:08d}"
    if best:
        step = read_manifest(path)["state"]["best_step"]
        if step is None:
            raise ValueError(f"{path} knows no best checkpoint: nothing was held out; omit --best")
        path = path.with_name(f"step_{step:08d}")
    if not path.is_dir():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    if problem := checkpoint_problem(path):
        raise ValueError(f"{path} cannot be exported: {problem}")
    return path


def export_checkpoint(checkpoint: Path, output: Path, genes: Path | None = None) -> None:
    """Write the encoder and head of a whole checkpoint as an export.

    Args:
        checkpoint: What `find_checkpoint` found.
        output: Folder of the export; a former one is replaced.
        genes: The panel, one gene a line; none takes `genes.txt` beside the checkpoint.

    Raises:
        ValueError: If the genes are not those of the training.
    """
    manifest = read_manifest(checkpoint)
    who, state = manifest["identity"], manifest["state"]
    panel = _panel(checkpoint, who, genes)
    encoder = build_encoder(
        EncoderConfig(**who["encoder"]), BinningConfig(**who["binning"]), len(panel), seed=0
    )
    prefix = "weight/"
    with open_pieces(checkpoint, manifest["files"]) as tensors:
        weights: dict[str, Tensor] = {
            name.removeprefix(prefix): tensors[name]
            for name in tensors
            if name.startswith(prefix) and ".proj_updater." not in name
        }
    encoder.load_weights(
        {n.removeprefix("encoder."): w for n, w in weights.items() if n.startswith("encoder.")}
    )
    provenance: dict[str, Any] = {
        "checkpoint": checkpoint.name,
        "store_id": who["store_id"],
        "step": state["step"],
        "cells_seen": state["cells_seen"],
        "seed": who["seed"],
        "run_id": state["run_id"],
        "git_commit": git_commit(),
        "gene_vectors": who["gene2vec.vectors"],
    }
    metrics = {}
    if state["best_step"] == state["step"]:
        metrics["validation_loss"] = state["best_loss"]
    metadata = {"metrics": metrics, "provenance": provenance}
    write_export(output, "encoder", encoder, panel, weights, metadata)


def _panel(checkpoint: Path, who: dict[str, Any], genes: Path | None) -> GenePanel:
    path = genes or checkpoint.parent / "genes.txt"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; name the store's: --genes STORE/genes.txt")
    panel = read_panel(path)
    if panel.digest != who["panel_digest"]:
        raise ValueError(f"{path} does not name the genes, in order, that {checkpoint} has")
    return panel
