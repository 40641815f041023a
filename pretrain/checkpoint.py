"""Save and resume training.

A checkpoint is DeepSpeed's folder for one step plus `identity.json`, which says what the training
is. `latest` names the newest whole one and is renamed into place after all ranks have written.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from datastore.store import CellStore, write_json
from pretrain.config import PretrainConfig
from pretrain.distributed import Ranks
from pretrain.engine import TrainingEngine


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


def identity(config: PretrainConfig, store: CellStore, world_size: int) -> dict[str, Any]:
    """Describe what may not change between a checkpoint and its continuation."""
    return {
        "store_id": store.header.store_id,
        "world_size": world_size,
        "seed": config.seed,
        "encoder": asdict(config.encoder),
        "binning": asdict(config.binning),
        "masking": asdict(config.masking),
        "order": asdict(config.order),
        "batch": asdict(config.batch),
        "optim": asdict(config.optim),
        "redraw_every": config.redraw_every,
        "validation_share": config.validation_share,
    }


def save_checkpoint(
    folder: Path,
    engine: TrainingEngine,
    state: TrainingState,
    who: Mapping[str, Any],
    ranks: Ranks,
    keep: int,
) -> None:
    """Write a checkpoint on all ranks, then publish it and drop the oldest beyond `keep`."""
    tag = f"step_{state.step:08d}"
    engine.save(folder, tag, asdict(state))
    ranks.barrier()
    if ranks.is_first:
        write_json(folder / tag / "identity.json", who)
        write_json(folder / "latest", tag)
        # A killed save may have left a later step, half written: it does not count.
        whole = [old for old in sorted(folder.glob("step_*")) if old.name <= tag]
        for old in whole[:-keep]:
            shutil.rmtree(old)
    ranks.barrier()


def resume(folder: Path, engine: TrainingEngine, who: Mapping[str, Any]) -> TrainingState | None:
    """Restore the newest checkpoint; none if there is none.

    Raises:
        CheckpointMismatchError: If it belongs to another training; the first differing field is
            named.
    """
    latest = folder / "latest"
    if not latest.exists():
        return None
    tag = json.loads(latest.read_text(encoding="utf-8"))
    saved = json.loads((folder / tag / "identity.json").read_text(encoding="utf-8"))
    former, present = _flat(saved), _flat(who)
    for name, now in present.items():
        if former.get(name) != now:
            raise CheckpointMismatchError(
                f"{folder / tag} was trained with {name} = {former.get(name)}, now it is {now}; "
                "continue with the former setting or choose another output"
            )
    return TrainingState(**engine.load(folder, tag))


def _flat(who: Mapping[str, Any]) -> dict[str, Any]:
    """Name every field as on the command line, e.g. `encoder.dim`."""
    flat: dict[str, Any] = {}
    for name, value in who.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}.{inner}": content for inner, content in value.items()}
        else:
            flat[name] = value
    return flat
