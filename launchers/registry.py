"""Register models in MLflow, show them, promote them, pull them by name and verify them.

python launchers/registry.py register out/export --name scbert-pretrained --alias champion
python launchers/registry.py list --tracking_uri http://host:5000
python launchers/registry.py pull models:/scbert-pretrained@champion --to model
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse

from launchers import cli, registry_commands

EXAMPLES = {
    "list": "scbert models list --json",
    "show": "scbert models show models:/scbert-pancreas@champion",
    "register": "scbert models register runs/finetune/export --name scbert-pancreas --alias "
    "challenger --licence CC-BY-4.0",
    "promote": "scbert models promote models:/scbert-pancreas/3",
    "pull": "scbert models pull models:/scbert-pancreas@champion --to model",
    "verify": "scbert models verify models:/scbert-pancreas@champion",
}


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand and return the exit code."""
    return cli.run(lambda: _main(argv))


def _main(argv: list[str] | None) -> None:
    options = _parser().parse(argv)
    cli.echo("\n".join(options.command(options)))


def _parser() -> cli.CommandParser:
    parser = cli.CommandParser(
        description=(__doc__ or "").partition("\n")[0], epilog=f"Example: {EXAMPLES['list']}"
    )
    commands = parser.add_subparsers(required=True, metavar=" | ".join(EXAMPLES))

    def add(name: str, help: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=help, epilog=f"Example: {EXAMPLES[name]}")
        command.add_argument("--tracking_uri", help="default: MLFLOW_TRACKING_URI, ./mlflow.db")
        command.set_defaults(command=getattr(registry_commands, name + "_"))
        return command

    listed = add("list", "show all versions")
    show = add("show", "card, lineage, scores, files and aliases of a version")
    show.add_argument("reference", help="models:/name@alias or models:/name/version")
    register = add("register", "make a version of an export folder")
    register.add_argument("export", type=Path, help="folder with model.safetensors")
    register.add_argument("--name", required=True, help="registered model")
    register.add_argument("--alias", help="alias to point at it, e.g. champion")
    register.add_argument("--run_id", help="default: the run named in the export")
    register.add_argument("--lineage", help="pretrained version it grew from, models:/name/1")
    register.add_argument("--licence", help="of the weights, for the model card")
    promote = add("promote", "point an alias at a version that is no worse on the same cells")
    promote.add_argument("reference", help="the challenger: models:/name@alias or models:/name/3")
    promote.add_argument("--alias", default="champion", help="default: champion")
    promote.add_argument("--force", action="store_true", help="even if worse; this is recorded")
    pull = add("pull", "fetch a version and print its folder")
    pull.add_argument("reference", help="models:/name@alias or models:/name/version")
    pull.add_argument("--to", type=Path, help="new folder; default: the cache")
    pull.add_argument("--offline", action="store_true", help="from the cache, ask no server")
    verify = add("verify", "read every byte where it is kept and compare the hashes")
    verify.add_argument("reference", help="models:/name@alias, models:/name/version or a folder")
    for command in (listed, show, register, promote, pull, verify):
        command.add_argument("--json", action="store_true", help="for a script")
    return parser


if __name__ == "__main__":
    sys.exit(main())
