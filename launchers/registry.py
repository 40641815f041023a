"""Register exports in MLflow, list the registered models and pull one by its reference.

python launchers/registry.py register out/export --name scbert-pretrained --alias champion
python launchers/registry.py list --tracking_uri http://host:5000
python launchers/registry.py pull models:/scbert-pretrained@champion --to model
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import shutil
import tempfile

from finetune import registry
from launchers import cli


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand and return the exit code."""
    return cli.run(lambda: _main(argv))


def _main(argv: list[str] | None) -> None:
    options = _parser().parse(argv)
    cli.echo("\n".join(options.command(options)))


def _register(options: argparse.Namespace) -> list[str]:
    uri = options.tracking_uri
    run = options.run_id or registry.provenance_run_id(options.export, uri=uri)
    tags = {registry.LINEAGE_TAG: options.lineage} if options.lineage else {}
    ref = registry.register_export(
        options.export, options.name, uri=uri, alias=options.alias, run_id=run, tags=tags
    )
    return [ref.uri]


def _list(options: argparse.Namespace) -> list[str]:
    refs = registry.list_models(options.tracking_uri)
    return [" ".join([ref.uri, *(f"@{alias}" for alias in ref.aliases)]) for ref in refs]


def _pull(options: argparse.Namespace) -> list[str]:
    if options.to is not None and options.to.exists():
        raise ValueError(f"--to {options.to} exists; name a folder that does not")
    model = registry.resolve_model(options.reference, uri=options.tracking_uri)
    if options.to is None:
        return [str(model.path)]
    options.to.absolute().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.to.absolute().parent) as scratch:
        shutil.copytree(model.path, Path(scratch) / "copy").rename(options.to)
    return [str(options.to)]


def _parser() -> cli.CommandParser:
    parser = cli.CommandParser(description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(required=True, metavar="register | list | pull")
    register = commands.add_parser("register", help="make a version of an export folder")
    register.add_argument("export", type=Path, help="folder with model.safetensors")
    register.add_argument("--name", required=True, help="registered model")
    register.add_argument("--alias", help="alias to point at it, e.g. champion")
    register.add_argument("--run_id", help="default: the run named in the export")
    register.add_argument("--lineage", help="pretrained version it grew from, models:/name/1")
    register.set_defaults(command=_register)
    commands.add_parser("list", help="show all versions").set_defaults(command=_list)
    pull = commands.add_parser("pull", help="fetch a version and print its folder")
    pull.add_argument("reference", help="models:/name@alias or models:/name/version")
    pull.add_argument("--to", type=Path, help="new folder; default: the cache")
    pull.set_defaults(command=_pull)
    for command in commands.choices.values():
        command.add_argument("--tracking_uri", help="default: MLFLOW_TRACKING_URI, ./mlflow.db")
    return parser


if __name__ == "__main__":
    sys.exit(main())
