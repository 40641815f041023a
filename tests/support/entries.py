"""The smallest exports that the registry takes, made without a model."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file


def write_entry(folder: Path, content: str = "", **config: Any) -> Path:
    """Write an encoder's export.

    Args:
        folder: Where to.
        content: Decides the weights.
        config: Settings of `config.json` to add or change.
    """
    folder.mkdir(parents=True)
    weights = np.frombuffer(content.encode() or b"\0", dtype=np.uint8).astype(np.float32)
    save_file({"weight": weights}, folder / "model.safetensors")
    settings = {"format": "scbert-export/1", "kind": "encoder", **config}
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "genes.txt").write_text("CD3D\nCD8A\n")
    return folder


def classifier_settings(
    accuracy: float, macro_f1: float, split: str | None = "s", **changes: Any
) -> dict[str, Any]:
    """Settings of a classifier that got these scores, beside a baseline at 0.5 and 0.4."""
    metrics = {"accuracy": accuracy, "macro_f1": macro_f1}
    baseline = {"logistic_regression_accuracy": 0.5, "logistic_regression_macro_f1": 0.4}
    evaluation = {} if split is None else {"split": split, "num_cells": 30}
    scores = {"precision": 0.9, "recall": 0.8, "f1": 0.85, "support": 30}
    return {
        "kind": "classifier",
        "metrics": {**metrics, **baseline},
        "evaluation": evaluation,
        "per_class": {"num_cells": 30, "per_class": {"T cell": scores}},
        **changes,
    }
