"""Look at this installation and machine, and say what to do where something is amiss.

python launchers/doctor.py --store cells.zarr
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import os
import shutil

from launchers import cli


def main(argv: list[str] | None = None) -> int:
    """Run every check; exit code 1 if something would keep a training from running."""
    return cli.run(lambda: _main(argv))


def _main(argv: list[str] | None) -> int:
    options = _parser().parse(argv)
    from launchers import doctor_checks as checks

    findings = [
        checks.check_python(),
        *checks.check_packages(),
        checks.check_torch(),
        checks.check_cores(),
        checks.check_memory(),
        checks.check_disk(Path.cwd()),
        checks.check_compiler(os.environ, shutil.which),
        checks.check_deepspeed_ops(checks.extensions_folder(os.environ)),
        checks.check_attention_kernel(),
        checks.check_store_kernels(),
        checks.check_mlflow(options.tracking_uri, os.environ, Path.cwd()),
        *map(checks.check_store, options.store),
        checks.check_cluster_tools(shutil.which),
    ]
    healthy = all(finding.verdict != "problem" for finding in findings)
    if options.json:
        cli.echo(checks.as_json(findings))
    else:
        cli.echo("\n".join(checks.show(findings)))
    return 0 if healthy else 1


def _parser() -> cli.CommandParser:
    parser = cli.CommandParser(
        description=(__doc__ or "").partition("\n")[0],
        epilog="Example: scbert doctor --store cells.zarr --tracking_uri http://mlflow:5000",
    )
    parser.add_argument("--store", nargs="+", default=[], help="cell stores that must open")
    parser.add_argument("--tracking_uri", help="default: MLFLOW_TRACKING_URI, ./mlflow.db")
    parser.add_argument("--json", action="store_true", help="for a script")
    return parser


if __name__ == "__main__":
    sys.exit(main())
