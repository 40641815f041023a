"""Make an export of a checkpoint, or of a published scBERT model.

python launchers/export.py runs/pretrain --output model
python launchers/export.py runs/pretrain/checkpoints/step_00001000 --output model
python launchers/export.py panglao_pretrain.pth --genes genes.txt --output model
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from launchers import cli


def main(argv: list[str] | None = None) -> int:
    """Write the export and return the exit code."""
    return cli.run(lambda: _main(argv))


def _main(argv: list[str] | None) -> None:
    options = _parser().parse(argv)
    source: Path = options.source
    if not source.exists():
        raise FileNotFoundError(f"there is no {source}; give a training's output or a .pth file")
    checkpoint = None
    if source.is_file():
        _import(source, options)
    else:
        from pretrain.conversion import export_checkpoint, find_checkpoint

        if options.attention is not None:
            raise ValueError("--attention is for published .pth files; a checkpoint knows its own")
        checkpoint = find_checkpoint(source, options.best)
        export_checkpoint(checkpoint, options.output, options.genes)
    if options.json:
        cli.echo_json({"source": checkpoint or source, "export": options.output})
        return
    if checkpoint is not None:
        cli.echo(f"checkpoint: {checkpoint}")
    cli.echo(f"export: {options.output}")


def _import(source: Path, options: argparse.Namespace) -> None:
    if options.genes is None:
        raise ValueError("--genes is missing: a .pth file does not name its genes; give the list")
    if options.best:
        raise ValueError("--best is for trainings of our own; a .pth file holds one model")
    from datastore.genes import read_panel
    from pretrain.published import import_published

    panel = read_panel(options.genes)
    import_published(source, panel, options.output, options.attention or "published")


def _parser() -> cli.CommandParser:
    parser = cli.CommandParser(
        description=(__doc__ or "").partition("\n")[0],
        epilog="Example: scbert export runs/pretrain --best --output export",
    )
    parser.add_argument("source", type=Path, help="output of a training, a step_… in it, or a .pth")
    parser.add_argument("--output", type=Path, required=True, help="folder of the export")
    parser.add_argument("--genes", type=Path, help="gene names, one a line; a .pth needs them")
    parser.add_argument("--best", action="store_true", help="the lowest held-out loss")
    parser.add_argument(
        "--attention",
        choices=["published", "stable"],
        help="numerics of a .pth: as published (default), or with our stabiliser",
    )
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    return parser


if __name__ == "__main__":
    sys.exit(main())
