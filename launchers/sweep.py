"""Train a table of data sets × folds × seeds × settings, a row per task of a Slurm array.

python launchers/sweep.py check table.csv
python launchers/sweep.py run table.csv --output sweep --row 1 --encoder models:/scbert@champion
python launchers/sweep.py collect table.csv --output sweep
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse

from launchers import cli, sweep_commands

EXAMPLES = {
    "check": "scbert sweep check table.csv",
    "run": "scbert sweep run table.csv --output sweep --row 3 --encoder models:/scbert@champion",
    "status": "scbert sweep status table.csv --output sweep --rows failed",
    "collect": "scbert sweep collect table.csv --output sweep",
}


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand and return the exit code."""
    return cli.run(lambda: _main(argv))


def _main(argv: list[str] | None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    if words[:1] == ["run"] and not {"-h", "--help"} & set(words):
        # What the table's own words do not know goes to fine-tuning, for all rows alike.
        options, base = parser.parse_known_args(words)
        return sweep_commands.run(options, base)
    options = parser.parse(words)
    code: int = options.command(options)
    return code


def _parser() -> cli.CommandParser:
    parser = cli.CommandParser(
        description=(__doc__ or "").partition("\n")[0], epilog=f"Example: {EXAMPLES['check']}"
    )
    commands = parser.add_subparsers(required=True, metavar=" | ".join(EXAMPLES))

    def add(name: str, help: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=help, epilog=f"Example: {EXAMPLES[name]}")
        command.add_argument("table", type=Path, help="CSV; columns: data, fold, seed, settings")
        command.set_defaults(command=getattr(sweep_commands, name))
        return command

    add("check", "read the table and print the command that submits it")
    run = add("run", "train one row; any further --FIELD VALUE is a setting of all rows")
    run.add_argument("--row", type=int, required=True, help="from 1, as in sbatch --array=1-N")
    status = add("status", "which rows are done, running, failed (with the reason) or missing")
    status.add_argument("--rows", choices=sweep_commands.CHOICES, help="their numbers, for --array")
    status.add_argument("--json", action="store_true", help="for a script")
    collect = add("collect", "send runs to MLflow; write tables of results, means and a figure")
    collect.add_argument("--tracking_uri", help="default: MLFLOW_TRACKING_URI, ./mlflow.db")
    collect.add_argument("--experiment", default="scbert-sweep", help="default: scbert-sweep")
    collect.add_argument("--json", action="store_true", help="for a script")
    for command in (run, status, collect):
        command.add_argument("--output", type=Path, required=True, help="folder of the sweep")
    return parser


if __name__ == "__main__":
    sys.exit(main())
