"""Fine-tune an exported encoder into a cell-type classifier.

python launchers/finetune.py --encoder models:/scbert-pretrained@champion \
        --data.path labelled.h5ad --output runs/finetune
"""

import sys
from pathlib import Path

# Else Python finds this script when it looks for the package of the same name.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from finetune.config import FinetuneConfig
from launchers import cli


def main(argv: list[str] | None = None) -> int:
    """Train, score beside the baselines, and say who won."""
    return cli.run(lambda: _main(argv))


def _main(argv: list[str] | None) -> None:
    config = cli.parse(
        FinetuneConfig,
        argv,
        launcher="finetune.py",
        description="Fine-tune an exported encoder on labelled cells.",
        example="python launchers/finetune.py --encoder models:/scbert-pretrained@champion "
        "--data.path labelled.h5ad --output runs/finetune",
    )
    import torch

    from finetune.train import finetune

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    result = finetune(config, device, page=True)
    cli.echo(result.table)
    cli.echo(result.verdict)
    cli.echo(f"export: {result.export}, page: {config.output}/report.html")


if __name__ == "__main__":
    sys.exit(main())
