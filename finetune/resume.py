"""Progress of a fine-tuning on disk, so that a training that was stopped continues.

One folder, `progress/`, replaced whole after each epoch and removed when the training is done:
`epoch_<n>.safetensors` has the weights, the best ones so far and Adam's moments, all by name and
whole, so that any number of ranks continues; `progress.json` has the rest. What it belongs to is
named by a digest of settings and cells; a training of anything else begins anew.
"""

import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from datastore.store import write_json

log = logging.getLogger(__name__)

FOLDER: Final = "progress"
FORMAT: Final = "2"
"""Progress in another format is not continued."""


@dataclass(frozen=True)
class Progress:
    """How far a training is.

    Attributes:
        epoch: Epochs that are done.
        best: Validation macro-F1 and log-likelihood of the best epoch.
        since: Epochs since then.
        kept: Weights of the best epoch.
        identity: What is trained on what.
    """

    epoch: int = 0
    best: tuple[float, float] = (-1.0, 0.0)
    since: int = 0
    kept: dict[str, Tensor] = field(default_factory=dict)

    def after(self, epoch: int, score: tuple[float, float], network: nn.Module) -> "Progress":
        """Progress after one more epoch with this score."""
        if score <= self.best:
            return Progress(epoch, self.best, self.since + 1, self.kept)
        kept = {name: value.clone() for name, value in network.state_dict().items()}
        return Progress(epoch, score, 0, kept)


def begin(folder: Path, identity: str) -> None:
    """Keep progress of the same training; remove that of another one."""
    path, identity = folder / FOLDER, f"{FORMAT} {identity}"
    known = path / "identity.txt"
    if known.is_file() and known.read_text(encoding="utf-8") == identity:
        return
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    known.write_text(identity, encoding="utf-8")


def finish(folder: Path) -> None:
    """Remove the progress of a training that is done."""
    shutil.rmtree(folder / FOLDER, ignore_errors=True)


def save_progress(
    folder: Path, network: nn.Module, moments: Mapping[str, Tensor], progress: Progress
) -> None:
    """Write progress beside the former one, and put it in its place.

    Args:
        folder: Folder of the run.
        network: What learns, with its present weights.
        moments: Adam's, `exp_avg/<weight>` and `exp_avg_sq/<weight>`.
        progress: How far it is.
    """
    path = folder / FOLDER
    tensors = {f"weight/{name}": value for name, value in _without_copies(network.state_dict())}
    tensors |= {f"kept/{name}": value for name, value in _without_copies(progress.kept)}
    name = f"epoch_{progress.epoch}"
    beside = path / f"{name}.safetensors"
    tensors |= moments
    save_file({key: value.detach().cpu().clone() for key, value in tensors.items()}, beside)
    facts = {"weights": name, "epoch": progress.epoch, "best": progress.best}
    write_json(path / "progress.json.part", {**facts, "since": progress.since})
    (path / "progress.json.part").replace(path / "progress.json")
    for former in path.glob("epoch_*.safetensors"):
        if former != beside:
            former.unlink()


def load_progress(folder: Path, network: nn.Module) -> tuple[Progress, dict[str, Tensor]] | None:
    """Fill the network with the weights that were saved.

    What cannot be read is as good as nothing: the training begins anew, and the log says so.

    Returns:
        How far it was, and Adam's moments as `save_progress` got them; None if there is nothing.
    """
    path = folder / FOLDER
    if not (path / "progress.json").is_file():
        return None
    try:
        facts = json.loads((path / "progress.json").read_text(encoding="utf-8"))
        tensors = load_file(path / f"{facts['weights']}.safetensors")
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        log.warning("%s cannot be read (%s): training begins anew", path, error)
        return None
    names = list(network.state_dict())
    network.load_state_dict(_part(tensors, "weight/", names), strict=False)
    log.info("continuing after epoch %d", facts["epoch"])
    kept = {**network.state_dict(), **_part(tensors, "kept/", names)}
    kept = {name: value.clone() for name, value in kept.items()}
    moments = {name: value for name, value in tensors.items() if name.startswith("exp_avg")}
    best = (facts["best"][0], facts["best"][1])
    return Progress(facts["epoch"], best, facts["since"], kept), moments


def _without_copies(state: dict[str, Tensor]) -> list[tuple[str, Tensor]]:
    """Weights by name; performer-pytorch lists every one twice."""
    return [(name, value) for name, value in state.items() if ".proj_updater." not in name]


def _part(tensors: dict[str, Tensor], prefix: str, names: list[str]) -> dict[str, Tensor]:
    """Tensors under a prefix, and again under the names of performer-pytorch's copies."""
    found = {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }
    for name in names:
        original = name.replace("performer.proj_updater.instance.", "performer.net.")
        if name not in found and original in found:
            found[name] = found[original]
    return found
