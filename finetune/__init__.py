"""Cell-type annotation from an exported encoder.

    import finetune

    finetune.fit(labelled, "runs/finetune", encoder="models:/scbert-pretrained@champion")
    finetune.report("runs/finetune")
    finetune.annotate(adata, "models:/scbert-pancreas@champion")
    finetune.gene_attention(adata, "models:/scbert-pancreas@champion")
    finetune.pl.umap(adata)

What is named here is imported when it is first used, so that `import finetune` is quick.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from finetune import pl
    from finetune.annotation import annotate
    from finetune.benchmark_config import BenchmarkConfig
    from finetune.config import FinetuneConfig
    from finetune.explaining import gene_attention
    from finetune.page import report
    from finetune.referee import benchmark
    from finetune.train import fit

__all__ = [
    "BenchmarkConfig",
    "FinetuneConfig",
    "annotate",
    "benchmark",
    "fit",
    "gene_attention",
    "pl",
    "report",
]

_HOMES = {
    "BenchmarkConfig": "finetune.benchmark_config",
    "FinetuneConfig": "finetune.config",
    "annotate": "finetune.annotation",
    "benchmark": "finetune.referee",
    "fit": "finetune.train",
    "gene_attention": "finetune.explaining",
    "report": "finetune.page",
}


def __getattr__(name: str) -> Any:
    if name == "pl":
        return importlib.import_module("finetune.pl")
    if name not in _HOMES:
        raise AttributeError(f"module 'finetune' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
