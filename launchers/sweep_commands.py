"""What each word of `scbert sweep` does; the returned number is the exit code."""

import argparse
import json
import os
import shlex
import signal
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Final

from launchers import cli
from launchers.flags import setting_types

if TYPE_CHECKING:
    from finetune.sweep_table import SweepRow

TEMPLATE: Final = Path(__file__).parent / "slurm" / "finetune_array.sbatch"
CHOICES: Final = ("failed", "missing", "interrupted", "open")
"""What `status --rows` can print; `open` is all of them."""
EXIT_REQUEUE: Final = 75
LAUNCHER: Final = "finetune.py"


def check(options: argparse.Namespace) -> int:
    """Read every row as its task will, and say how to submit them."""
    from finetune.sweep_table import row_of

    rows = _rows(options.table)
    for row in rows:
        row_of(rows, row.number, options.table)
        _ = row.flags
        if not Path(row.settings["data"]).exists():
            raise ValueError(f"row {row.number}: there is no file {row.settings['data']!r}")
    cli.echo(f"{len(rows)} rows in {len({row.group for row in rows})} groups")
    table = shlex.quote(str(options.table))
    cli.echo(f"sbatch --array=1-{len(rows)}%20 {TEMPLATE} {table} --output sweep --encoder …")
    return 0


def run(options: argparse.Namespace, base: list[str]) -> int:
    """Train one row, if it is not done."""
    from finetune.config import FinetuneConfig
    from finetune.sweep import keep_base
    from finetune.sweep_row import run_row
    from finetune.sweep_table import row_of

    row = row_of(_rows(options.table), options.row, options.table)
    keep_base(options.output, {"settings": base, "config": _config_text(base)})
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, _leave)

    def train(folder: Path) -> Mapping[str, float]:
        config = cli.parse(
            FinetuneConfig,
            [*base, *row.flags, "--output", str(folder)],
            launcher=LAUNCHER,
            description="",
            example="",
        )
        return _train(config)

    state = run_row(row, options.output, train)
    metrics = state.metrics or {}
    shown = [f"{name} {metrics[name]:.4f}" for name in ("accuracy", "macro_f1") if name in metrics]
    cli.echo(f"row {row.number} is done: {', '.join(shown)}")
    return 0


def status(options: argparse.Namespace) -> int:
    """Say where each row stands."""
    from finetune.sweep import array_of, count_states, report_rows

    reports = report_rows(_rows(options.table), options.output)
    if options.rows:
        wanted = CHOICES[:-1] if options.rows == "open" else (options.rows,)
        cli.echo(array_of([report.row.number for report in reports if report.state in wanted]))
        return 0
    if options.json:
        lines = [
            {"row": r.row.number, "state": r.state, "error": r.error, **r.row.settings}
            for r in reports
        ]
        cli.echo(json.dumps({"states": count_states(reports), "rows": lines}))
        return 0
    for report in reports:
        if report.state != "done":
            reason = f": {report.error}" if report.error else ""
            cli.echo(f"row {report.row.number:4d}  {report.state}{reason}")
    cli.echo(_counted(count_states(reports)))
    return 0


def collect(options: argparse.Namespace) -> int:
    """Send runs, write results; exit code 1 while rows are open."""
    from finetune.sweep import count_states, report_rows
    from finetune.sweep_delivery import deliver_rows
    from finetune.sweep_results import table, write_results
    from pretrain.mlflow_client import resolve_tracking_uri, without_credentials

    if not options.output.is_dir():
        raise ValueError(f"there is no sweep in {options.output}; run its rows first")
    rows = _rows(options.table)
    reports = report_rows(rows, options.output)
    summaries = write_results(reports, options.output)
    uri = resolve_tracking_uri(options.tracking_uri, os.environ, Path.cwd())
    unique = [report.row for report in reports if report.state != "repeated"]
    sent, waiting = deliver_rows(
        unique, options.output, options.table.stem, uri, options.experiment
    )
    states = count_states(reports)
    complete = set(states) == {"done"} and not waiting
    if options.json:
        text = (options.output / "results.json").read_text(encoding="utf-8")
        facts = {"states": states, "mlflow_runs": sent, "mlflow_waiting": waiting}
        cli.echo(json.dumps({**facts, **json.loads(text)}))
        return 0 if complete else 1
    for line in table(summaries):
        cli.echo(line)
    cli.echo(_counted(states))
    cli.echo(f"{sent} runs at {without_credentials(uri)}")
    if waiting:
        cli.echo(f"MLflow did not take rows {waiting}; collect again when it answers")
    cli.echo(f"{options.output}/results.csv, summary.csv and results.png")
    return 0 if complete else 1


def _train(config: object) -> Mapping[str, float]:
    import torch

    from finetune.config import FinetuneConfig
    from finetune.train import finetune
    from pretrain.later_delivery import put_off

    assert isinstance(config, FinetuneConfig)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with put_off():
        finetune(config, device)
    scores = json.loads((Path(config.output) / "scores.json").read_text(encoding="utf-8"))
    metrics: Mapping[str, float] = scores["metrics"]
    return {name: value for name, value in metrics.items() if isinstance(value, int | float)}


def _rows(path: Path) -> "list[SweepRow]":
    from finetune.config import FinetuneConfig
    from finetune.sweep_table import read_table

    return read_table(path, setting_types(FinetuneConfig))


def _config_text(base: list[str]) -> str | None:
    """Text of the `--config` file: a file that changes would change what the rows share."""
    for place, word in enumerate(base):
        flag, _, value = word.partition("=")
        if flag == "--config":
            name = value or (base[place + 1] if place + 1 < len(base) else "")
            return Path(name).read_text(encoding="utf-8") if Path(name).is_file() else None
    return None


def _counted(states: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {state}" for state, count in states.items()) or "no rows"


def _leave(number: int, frame: FrameType | None) -> None:
    """End between two lines of Python: what the training has kept is whole."""
    raise SystemExit(EXIT_REQUEUE)
