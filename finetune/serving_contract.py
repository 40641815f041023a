"""What a served classifier takes and gives: MLflow's signature and its ``MLmodel`` file.

The file names ``finetune.pyfunc`` as the loader and holds no code and no pickle; the same export
always gives the same bytes.
"""

from __future__ import annotations

import json
import sys
from typing import Any, Final

from finetune.export_files import LOADER

GENES: Final = "genes"
COUNTS: Final = "counts"
PROBABILITIES: Final = "probabilities"

SIGNATURES: Final = {
    "encoder": "raw counts of N cells in panel order, CSR (N, G) → states, float32 (N, G + 1, D)",
    "classifier": "a record per cell, `counts` in panel order or with their gene names in `genes` "
    "→ `label`, `confidence` (0 to 1), `novel` (true or false), on request `probabilities`",
}
"""By kind of model, as the card shows it."""


def mlmodel() -> str:
    """Return the text of ``MLmodel`` for a classifier."""
    import yaml

    version = f"{sys.version_info.major}.{sys.version_info.minor}.0"
    python = {"loader_module": LOADER, "python_version": version}
    description = {"flavors": {"python_function": python}, "signature": signature()}
    return str(yaml.safe_dump(description, sort_keys=True))


def signature() -> dict[str, str]:
    """Return MLflow's signature: columns as JSON texts."""
    inputs = [_column(COUNTS, "any", True), _column(GENES, "any", False)]
    outputs = [
        _column("label", "string", True),
        _column("confidence", "double", True),
        _column("novel", "boolean", True),
        _column(PROBABILITIES, "any", False),
    ]
    parameter = {"name": PROBABILITIES, "type": "boolean", "default": False, "shape": None}
    return {
        "inputs": json.dumps(inputs),
        "outputs": json.dumps(outputs),
        "params": json.dumps([parameter]),
    }


def _column(name: str, kind: str, required: bool) -> dict[str, Any]:
    return {"name": name, "type": kind, "required": required}
