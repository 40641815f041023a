"""Fine-tune an exported encoder into a cell-type classifier, on one process or many.

python launchers/finetune.py --encoder models:/scbert-pretrained@champion \
        --data.path labelled.h5ad --output runs/finetune
deepspeed --hostfile hosts launchers/finetune.py --config finetune.yaml
"""

import os
import sys
from contextlib import nullcontext
from pathlib import Path

# Else Python finds this script when it looks for the package of the same name.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from finetune.config import FinetuneConfig
from launchers import cli


def main(argv: list[str] | None = None) -> int:
    """Train, score beside the baselines, and say who won."""
    return cli.run(lambda: _main(argv))


def _main(argv: list[str] | None) -> int:
    config, as_json = cli.parse_for_scripts(
        FinetuneConfig,
        argv,
        launcher="finetune.py",
        description="Fine-tune an exported encoder on labelled cells, on one process or, started "
        "by `deepspeed --num_gpus 2 launchers/finetune.py`, on several.",
        example="python launchers/finetune.py --encoder models:/scbert-pretrained@champion "
        "--data.path labelled.h5ad --output runs/finetune",
    )
    import torch

    from finetune.train import finetune_on
    from pretrain.distributed import LostRankError, alone, start_ranks
    from pretrain.interruption import EXIT_REQUEUE

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    try:
        with start_ranks(os.environ) if several else nullcontext(alone(device)) as ranks:
            result = finetune_on(config, ranks, page=True)
    except LostRankError as error:
        if error.is_first_to_tell():
            print(f"error: {error}", file=sys.stderr)
        return EXIT_REQUEUE
    if result is None:
        return 0  # the first rank tells
    page = f"{config.output}/report.html"
    if as_json:
        scores = {"scBERT": result.scores, **{line.name: line.scores for line in result.baselines}}
        found = {
            name: {"accuracy": s.accuracy, "macro_f1": s.macro_f1} for name, s in scores.items()
        }
        facts = {"scores": found, "verdict": result.verdict, "export": result.export, "page": page}
        cli.echo_json(facts | {"run_id": result.run_id})
        return 0
    cli.echo(result.table)
    cli.echo(result.verdict)
    cli.echo(f"export: {result.export}, page: {page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
