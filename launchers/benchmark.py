"""Compare methods on labelled cells: the referee.

python launchers/benchmark.py --data labelled.h5ad --protocol.name k-fold --output runs/benchmark
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from finetune.benchmark_config import BenchmarkConfig
from launchers import cli


def main(argv: list[str] | None = None) -> int:
    """Run the methods, print table and verdict."""
    return cli.run(lambda: _main(argv))


def _main(argv: list[str] | None) -> None:
    config, as_json = cli.parse_for_scripts(
        BenchmarkConfig,
        argv,
        launcher="benchmark.py",
        description="Compare methods of cell-type annotation on the same splits of labelled cells.",
        example="python launchers/benchmark.py --data labelled.h5ad --protocol.name k-fold "
        "--output runs/benchmark",
    )
    from finetune.referee import run_benchmark

    report = run_benchmark(config)
    if as_json:
        trials = f"{config.output}/benchmark.json"
        cli.echo_json({**report.summary, "verdict": report.verdict, "trials": trials})
        return
    cli.echo(report.table)
    cli.echo(report.verdict)
    cli.echo(f"every trial: {config.output}/benchmark.json")


if __name__ == "__main__":
    sys.exit(main())
