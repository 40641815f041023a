"""Exports: a model as plain files, for use and for travel.

`model.safetensors` weights · `config.json` shape, tokens, provenance · `genes.txt` the panel in
order · `labels.txt` cell types, if it is a classifier. Nothing in it can execute.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from datastore.config import BinningConfig
from datastore.genes import GenePanel, read_panel, write_panel
from datastore.store import write_json
from pretrain.config import EncoderConfig
from pretrain.encoder import ExpressionEncoder, build_encoder

FORMAT: Final = "scbert-export/1"
T = TypeVar("T")


@dataclass(frozen=True)
class Export:
    """An export as read: configuration, panel, weights by name."""

    path: Path
    kind: str
    encoder_config: EncoderConfig
    binning: BinningConfig
    panel: GenePanel
    weights: dict[str, Tensor]
    metadata: dict[str, Any]

    def encoder(self) -> ExpressionEncoder:
        """Build the encoder with the exported weights and projections, in evaluation mode."""
        encoder = build_encoder(self.encoder_config, self.binning, len(self.panel), seed=0)
        prefix = "encoder."
        encoder.load_weights(
            {
                name.removeprefix(prefix): value
                for name, value in self.weights.items()
                if name.startswith(prefix)
            }
        )
        return encoder.eval()


def write_export(
    folder: Path,
    kind: str,
    encoder: ExpressionEncoder,
    panel: GenePanel,
    weights: Mapping[str, Tensor],
    metadata: Mapping[str, Any],
    text_files: Mapping[str, str] | None = None,
) -> None:
    """Write an export beside its target and rename it into place.

    Args:
        folder: Target; a former export there is replaced.
        kind: `encoder` or `classifier`.
        encoder: Says shape and tokens.
        panel: The genes in model order.
        weights: State dict of the whole model; the encoder's names begin with `encoder.`.
        metadata: JSON-ready description: metrics, provenance, whatever the kind needs.
        text_files: Further text files by name.
    """
    if len(panel) != encoder.num_genes:
        raise ValueError(f"panel of {len(panel)} genes for an encoder of {encoder.num_genes}")
    beside = folder.with_name(folder.name + ".part")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    tensors = {
        name: value.detach().cpu().clone()
        for name, value in weights.items()
        if ".proj_updater." not in name  # performer-pytorch lists every weight twice
    }
    save_file(tensors, beside / "model.safetensors")
    write_panel(panel, beside / "genes.txt")
    for name, text in (text_files or {}).items():
        (beside / name).write_text(text, encoding="utf-8")
    config = {
        "format": FORMAT,
        "kind": kind,
        "encoder": encoder.config.architecture(),
        "binning": asdict(encoder.binning),
        "panel_digest": panel.digest,
        **metadata,
    }
    write_json(beside / "config.json", config)
    former = folder.with_name(folder.name + ".former")
    shutil.rmtree(former, ignore_errors=True)
    if folder.exists():
        folder.rename(former)
    beside.rename(folder)
    shutil.rmtree(former, ignore_errors=True)


def read_export(folder: str | Path, kind: str | None = None) -> Export:
    """Read an export and check that its parts belong together.

    Args:
        folder: What `write_export` wrote.
        kind: Refuse an export of another kind.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If a file is missing, damaged, or of another kind or version.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no export at {folder}")
    for name in ("config.json", "genes.txt", "model.safetensors"):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} is not an export: {name} is missing")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        found = config["format"]
        if found == FORMAT and (
            gone := {"kind", "encoder", "binning", "panel_digest"} - set(config)
        ):
            raise KeyError(min(gone))
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{folder}/config.json cannot be read: {error}") from error
    if found != FORMAT:
        raise ValueError(f"{folder} has format {found!r}, this program reads {FORMAT!r}")
    if kind is not None and config["kind"] != kind:
        raise ValueError(f"{folder} holds a model of kind {config['kind']!r}, needed is {kind!r}")
    panel = read_panel(folder / "genes.txt")
    if panel.digest != config["panel_digest"]:
        raise ValueError(f"{folder}/genes.txt is not the panel that config.json names")
    try:
        weights = load_file(folder / "model.safetensors")
    except SafetensorError as error:
        raise ValueError(f"{folder}/model.safetensors is damaged: {error}") from error
    return Export(
        folder,
        config["kind"],
        _record(EncoderConfig, config["encoder"], folder),
        _record(BinningConfig, config["binning"], folder),
        panel,
        weights,
        config,
    )


def git_commit(folder: Path | None = None) -> str | None:
    """Commit of the running code, with `+dirty` if files changed; none outside a repository."""
    here = folder or Path(__file__).parent
    try:
        head = _git(here, "rev-parse", "HEAD")
        dirty = _git(here, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+dirty" if dirty else "")


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments],
        cwd=folder,
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
    )
    return done.stdout.strip()


def _record(kind: Callable[..., T], values: Mapping[str, Any], folder: Path) -> T:
    known = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    if unknown := sorted(set(values) - known):
        raise ValueError(
            f"{folder}/config.json has {unknown[0]!r}, which this program does not know; "
            "update scbert-scale"
        )
    return kind(**values)
