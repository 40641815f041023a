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
    config, as_json = cli.parse_for_scripts(
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
    page = f"{config.output}/report.html"
    if as_json:
        scores = {"scBERT": result.scores, **{line.name: line.scores for line in result.baselines}}
        found = {
            name: {"accuracy": s.accuracy, "macro_f1": s.macro_f1} for name, s in scores.items()
        }
        facts = {"scores": found, "verdict": result.verdict, "export": result.export, "page": page}
        cli.echo_json(facts | {"run_id": result.run_id})
        return
    cli.echo(result.table)
    cli.echo(result.verdict)
    cli.echo(f"export: {result.export}, page: {page}")


if __name__ == "__main__":
    sys.exit(main())
