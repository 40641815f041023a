"""Save and resume training, on any number of ranks and under any ZeRO stage.

A checkpoint is a folder `step_<n>` with the whole training state in float32, cut into safetensors
files that the ranks write in turn, and `checkpoint.json`, written last, which says what the
training is and has size and SHA-256 of every file. A folder without it does not count. `latest`
names the newest for whoever looks; resuming takes the newest that is whole.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from datastore.genes import GenePanel, write_panel
from datastore.store import CellStore, file_digest, write_json
from pretrain.config import PretrainConfig
from pretrain.distributed import Ranks
from pretrain.engine import TrainingEngine

log = logging.getLogger(__name__)

MANIFEST: Final = "checkpoint.json"
PIECE_BYTES: Final = 2**28
"""A rank holds about this much of the gathered state at a time."""


class CheckpointMismatchError(ValueError):
    """A checkpoint belongs to another training than the one that is starting."""


@dataclass(frozen=True)
class TrainingState:
    """What must survive a restart, besides weights and optimizer; counted over all ranks."""

    step: int = 0
    """Optimizer steps done."""
    cells_seen: int = 0
    """Cells trained on, counting repeats."""
    run_id: str | None = None
    """MLflow run that the training writes to."""
    best_step: int | None = None
    """Checkpoint with the lowest held-out loss so far; it is kept."""
    best_loss: float | None = None
    """That loss, in nats per target."""
    skipped_steps: int = 0
    """Steps without an update, because something was not finite."""


def identity(config: PretrainConfig, store: CellStore) -> dict[str, Any]:
    """Describe what may not change between a checkpoint and its continuation."""
    return {
        "store_id": store.header.store_id,
        "panel_digest": store.panel.digest,
        "seed": config.seed,
        "data": asdict(config.data),
        "encoder": config.encoder.architecture(),
        "gene2vec.vectors": _digest_of_vectors(config),
        "binning": asdict(config.binning),
        "masking": asdict(config.masking),
        "cell_objective": config.cell_objective,
        "order": asdict(config.order),
        "batch.global_size": config.batch.global_size,
        "optim": asdict(config.optim),
        "redraw_every": config.redraw_every,
        "validation_share": config.validation_share,
    }


def _digest_of_vectors(config: PretrainConfig) -> str | None:
    vectors = config.gene2vec.vectors
    return None if vectors is None else file_digest(Path(vectors))


def keep_panel(folder: Path, panel: GenePanel) -> None:
    """Write the genes beside the checkpoints, so that they can be exported without the store."""
    folder.mkdir(parents=True, exist_ok=True)
    beside = folder / "genes.txt.part"
    write_panel(panel, beside)
    beside.replace(folder / "genes.txt")


def save_checkpoint(
    folder: Path,
    engine: TrainingEngine,
    state: TrainingState,
    who: Mapping[str, Any],
    ranks: Ranks,
    keep: int,
) -> None:
    """Write a checkpoint on all ranks, publish it, and drop the oldest beyond `keep` and the best.

    Raises:
        ValueError: On all ranks, if one could not write; former checkpoints stay.
    """
    target = folder / f"step_{state.step:08d}"
    with ranks.failing_together():
        if ranks.is_first:
            shutil.rmtree(target, ignore_errors=True)  # what a killed save left
            target.mkdir(parents=True)
    with ranks.failing_together():
        error: OSError | None = None
        for number, names in enumerate(_pieces(engine.state_sizes())):
            tensors = engine.read_state(names)  # all ranks take part, whoever writes
            if number % ranks.world_size == ranks.rank and error is None:
                try:
                    _write_piece(target / f"state_{number:05d}.safetensors", tensors)
                except (OSError, SafetensorError) as problem:
                    error = OSError(f"{target}: {problem}; former checkpoints are kept")
        if error is not None:
            raise error
    with ranks.failing_together():
        if ranks.is_first:
            _publish(folder, target, state, who, engine.optimizer_step, keep)


def resume(
    folder: Path, engine: TrainingEngine, who: Mapping[str, Any], ranks: Ranks
) -> TrainingState | None:
    """Restore the newest whole checkpoint; none if there is none.

    Raises:
        CheckpointMismatchError: If it belongs to another training; the first differing field is
            named.
    """
    with ranks.failing_together():
        step = newest_whole(folder) if ranks.is_first else 0
    step = int(ranks.sum([step])[0])
    if not step:
        return None
    chosen = folder / f"step_{step:08d}"
    manifest = read_manifest(chosen)
    with ranks.failing_together():
        _require_same(chosen, manifest["identity"], who)
    with open_pieces(chosen, manifest["files"]) as tensors:
        engine.write_state(tensors, int(manifest["optimizer_step"]))
    return TrainingState(**manifest["state"])


def _pieces(sizes: Mapping[str, int]) -> Iterator[list[str]]:
    """Cut names into groups of about `PIECE_BYTES`."""
    names: list[str] = []
    total = 0
    for name, size in sizes.items():
        if names and total + size > PIECE_BYTES:
            yield names
            names, total = [], 0
        names.append(name)
        total += size
    if names:
        yield names


def _write_piece(path: Path, tensors: dict[str, Tensor]) -> None:
    save_file(tensors, path)
    (path.with_suffix(".sha256")).write_text(file_digest(path), encoding="utf-8")


def _publish(
    folder: Path,
    target: Path,
    state: TrainingState,
    who: Mapping[str, Any],
    optimizer_step: int,
    keep: int,
) -> None:
    files = {
        piece.name: [piece.stat().st_size, piece.with_suffix(".sha256").read_text("utf-8")]
        for piece in sorted(target.glob("*.safetensors"))
    }
    manifest = {
        "state": asdict(state),
        "identity": dict(who),
        "optimizer_step": optimizer_step,
        "files": files,
    }
    write_json(target / MANIFEST, {**manifest, "sha256": _digest(manifest)})
    write_json(folder / "latest", target.name)
    whole = sorted(old for old in folder.glob("step_*") if (old / MANIFEST).is_file())
    # A later step that is whole belongs to a training that somebody took back: it goes, too.
    for old in whole:
        number = int(old.name.removeprefix("step_"))
        recent = old in [other for other in whole if other <= target][-keep:]
        if not recent and number != state.best_step:
            shutil.rmtree(old)


def newest_whole(folder: Path) -> int:
    """Find the step of the newest whole checkpoint, 0 without any; the others are named."""
    for candidate in sorted(folder.glob("step_*"), reverse=True):
        problem = checkpoint_problem(candidate)
        if problem is None:
            return int(candidate.name.removeprefix("step_"))
        log.warning("%s is skipped: %s", candidate, problem)
    return 0


def checkpoint_problem(candidate: Path) -> str | None:
    """Say what is wrong with a checkpoint; none if nothing is."""
    if not (candidate / MANIFEST).is_file():
        return "it was not finished"
    try:
        files = read_manifest(candidate)["files"]
    except ValueError as error:
        return str(error)
    for name, (size, digest) in files.items():
        piece = candidate / name
        if not piece.is_file():
            return f"{name} is missing"
        if piece.stat().st_size != size:
            return f"{name} has {piece.stat().st_size} bytes instead of {size}"
        if file_digest(piece) != digest:
            return f"{name} is damaged"
    return None


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """Read what a checkpoint says of itself.

    Raises:
        ValueError: If it is missing or damaged.
    """
    try:
        manifest: dict[str, Any] = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        digest = manifest.pop("sha256")
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{MANIFEST} cannot be read ({error})") from error
    if digest != _digest(manifest):
        raise ValueError(f"{MANIFEST} is damaged")
    return manifest


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _require_same(checkpoint: Path, saved: Mapping[str, Any], who: Mapping[str, Any]) -> None:
    former, present = _flat(saved), _flat(who)
    for name, now in present.items():
        if former.get(name) != now:
            raise CheckpointMismatchError(
                f"{checkpoint} was trained with {name} = {former.get(name)}, now it is {now}; "
                "continue with the former setting or choose another output"
            )


@contextmanager
def open_pieces(checkpoint: Path, files: Iterable[str]) -> Iterator[Mapping[str, Tensor]]:
    """Give the tensors of all files of a checkpoint by key, each read when it is asked for."""
    with ExitStack() as opened:
        where: dict[str, Any] = {}
        for name in files:
            piece = opened.enter_context(safe_open(checkpoint / name, framework="pt"))
            where |= dict.fromkeys(piece.keys(), piece)
        yield _LazyTensors(where)


class _LazyTensors(Mapping[str, Tensor]):
    def __init__(self, where: Mapping[str, Any]) -> None:
        self._where = where

    def __getitem__(self, key: str) -> Tensor:
        tensor: Tensor = self._where[key].get_tensor(key)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)


def _flat(who: Mapping[str, Any]) -> dict[str, Any]:
    """Name every field as on the command line, e.g. `encoder.dim`."""
    flat: dict[str, Any] = {}
    for name, value in who.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}.{inner}": content for inner, content in value.items()}
        else:
            flat[name] = value
    return flat
