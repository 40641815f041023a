"""Memory, speed and traffic of a pretraining, before it is queued.

python launchers/estimate.py --preset 1b --nodes 16 --gpus_per_node 8 --gpu h100 --num_cells 1e7
python launchers/estimate.py --preset quickstart --gpu cpu --num_genes 2000
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from launchers import cli
from launchers.flags import with_underscores
from pretrain.config import PretrainConfig


def main(argv: list[str] | None = None) -> int:
    """Print the estimate and return the exit code."""
    return cli.run(lambda: _main(argv))


def _main(argv: list[str] | None) -> None:
    words = [with_underscores(word) for word in (sys.argv[1:] if argv is None else argv)]
    options, settings = _parser().parse_known_args(words)
    config = cli.parse(
        PretrainConfig,
        ["--store", "none", "--output", "none", *_with_vectors(settings)],
        launcher="pretrain.py",
        description="Estimate a pretraining with these settings.",
        example="scbert estimate --preset 1b --nodes 16 --gpus_per_node 8 --gpu h100",
    )
    from pretrain.deepspeed_settings import read_deepspeed_json
    from pretrain.estimate import precision_of
    from pretrain.estimate_report import report
    from pretrain.memory_moments import Placement

    content = read_deepspeed_json(config.deepspeed)
    zero = content.get("zero_optimization", {})
    placement = Placement(
        nodes=options.nodes,
        ranks_per_node=options.gpus_per_node,
        stage=int(zero.get("stage", 0)),
        offload="offload_optimizer" in zero,
        precision=precision_of(content),
        gloo=options.gpu == "cpu",
    )
    facts = report(config, placement, options.gpu, options.num_genes, int(options.num_cells))
    cli.show(facts, options.json)


def _with_vectors(settings: list[str]) -> list[str]:
    """Gene vectors need not be there yet: their file says nothing that the shape does not."""
    return ["--gene2vec.vectors", "later.npy", *settings] if "scbert" in settings else settings


def _parser() -> argparse.ArgumentParser:
    parser = cli.CommandParser(
        description=(__doc__ or "").partition("\n")[0],
        epilog="Further settings are those of `scbert pretrain`: --preset, --encoder.dim, …. "
        "Example: scbert estimate --preset 1b --nodes 16 --gpus_per_node 8",
    )
    parser.add_argument("--nodes", type=int, default=1, help="machines")
    parser.add_argument("--gpus_per_node", type=int, default=1, help="ranks on each")
    parser.add_argument("--gpu", choices=["h100", "a100", "cpu"], default="h100", help="device")
    parser.add_argument("--num_genes", type=int, default=16_906, help="length of the panel")
    parser.add_argument("--num_cells", type=float, default=1e6, help="training cells an epoch")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    return parser


if __name__ == "__main__":
    sys.exit(main())
