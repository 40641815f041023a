"""Masked-gene reconstruction: the encoder, its training loop, checkpoints and exports.

    import os
    import pretrain

    config = pretrain.PretrainConfig(store="cells.zarr", output="runs/pretrain")
    with pretrain.start_ranks(os.environ) as ranks:
        pretrain.pretrain(config, ranks)

What is named here is imported when it is first used, so that `import pretrain` is quick.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pretrain.config import PretrainConfig
    from pretrain.distributed import start_ranks
    from pretrain.export import read_export
    from pretrain.train import pretrain

__all__ = ["PretrainConfig", "pretrain", "read_export", "start_ranks"]

_HOMES = {
    "PretrainConfig": "pretrain.config",
    "pretrain": "pretrain.train",
    "read_export": "pretrain.export",
    "start_ranks": "pretrain.distributed",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'pretrain' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
