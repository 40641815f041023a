"""Label the cells of an `.h5ad` with a fine-tuned classifier.

python launchers/annotate.py --model models:/scbert-pancreas@champion \
        --input cells.h5ad --output labelled.h5ad
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from finetune.config import AnnotateConfig
from launchers import cli


def main(argv: list[str] | None = None) -> int:
    """Annotate, and count the labels."""
    return cli.run(lambda: _main(argv))


def _main(argv: list[str] | None) -> None:
    config = cli.parse(
        AnnotateConfig,
        argv,
        launcher="annotate.py",
        description="Label cells; writes a copy of the AnnData with labels, and a CSV.",
        example="python launchers/annotate.py --model models:/scbert-pancreas@champion "
        "--input cells.h5ad --output labelled.h5ad",
    )
    import torch

    from finetune.annotate import NOVEL, annotate

    result = annotate(config, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    obs = result.adata.obs
    for label, count in obs["scbert_label"].value_counts().items():
        if count:
            cli.echo(f"{label!s:32} {count:9,}")
    cli.echo(f"{int(obs[NOVEL].sum()):,} of {len(obs):,} cells are flagged as novel")
    cli.echo(f"{result.output} and {result.table}")


if __name__ == "__main__":
    sys.exit(main())
