"""Pretrain the encoder on a cell store, on one process or many.

deepspeed --num_gpus 2 launchers/pretrain.py --store cells.zarr --output runs/pretrain
deepspeed --hostfile hosts launchers/pretrain.py --config pretrain.yaml
"""

import os
import sys
from pathlib import Path

# Else Python finds this script when it looks for the package of the same name.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from launchers import cli
from pretrain.config import PretrainConfig


def main(argv: list[str] | None = None) -> int:
    """Train, or continue; the first rank says how it went."""
    return cli.run(lambda: _main(argv))


def _main(argv: list[str] | None) -> int:
    config, as_json = cli.parse_for_scripts(
        PretrainConfig,
        argv,
        launcher="pretrain.py",
        description="Pretrain the Performer encoder by masked-gene reconstruction.",
        example="deepspeed --num_gpus 2 launchers/pretrain.py --preset quickstart "
        "--store cells.zarr --output runs/pretrain",
    )
    from pretrain.distributed import LostRankError, start_ranks
    from pretrain.interruption import EXIT_REQUEUE, stop_on_signals
    from pretrain.train import pretrain

    try:
        with stop_on_signals(leaving=argv is None) as request, start_ranks(os.environ) as ranks:
            result = pretrain(config, ranks, request)
    except LostRankError as error:
        if error.is_first_to_tell():
            print(f"error: {error}", file=sys.stderr)
        return EXIT_REQUEUE
    if not ranks.is_first:
        return 0  # a launcher ends all ranks when one fails: let the first have the last word
    code = EXIT_REQUEUE if result["interrupted"] else 0
    if as_json:
        cli.echo_json(result)
        return code
    cli.echo(f"step {result['step']} of {result['total_steps']}")
    for name, value in result["metrics"].items():
        cli.echo(f"{name:36} {cli.unwrap(value)}")
    if result["interrupted"]:
        cli.echo("saved and stopped as asked; the same command continues")
    elif result["export"] is None:
        cli.echo("stopped early; the same command without --stop_after continues")
    else:
        cli.echo(f"export: {result['export']}")
    return code


if __name__ == "__main__":
    sys.exit(main())
