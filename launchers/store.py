"""Look into a cell store: is it whole, what does it hold, how fast does it read."""

import argparse
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

from datastore.store import open_store
from datastore.summary import measure_reading, summarize
from datastore.verification import verify_store
from launchers import cli


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand; `verify` returns 1 if the store is damaged."""

    def run() -> int:
        options = _parser().parse(argv)
        return int(options.command(options))

    return cli.run(run)


def _verify(options: argparse.Namespace) -> int:
    with tqdm(unit="B", unit_scale=True, desc="verify", disable=None) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        findings = verify_store(options.store, progress, options.threads)
    damaged = sum(finding.is_damage for finding in findings)
    lines = [f"{finding.kind:10} {finding.name}: {finding.problem}" for finding in findings]
    verdict = "is whole, byte for byte"
    if damaged:
        verdict = f"is damaged: {damaged} files; copy these again or rebuild it"
    elif findings:
        verdict = f"is whole; {len(findings)} files do not belong to it"
    facts = {"store": options.store, "whole": not damaged, "findings": [*lines]}
    lines.append(f"{options.store} {verdict}")
    if options.json:
        cli.echo_json(facts)
    else:
        cli.echo("\n".join(lines))
    return 1 if damaged else 0


def _info(options: argparse.Namespace) -> int:
    cli.show(summarize(open_store(options.store)), options.json)
    return 0


def _bench(options: argparse.Namespace) -> int:
    knobs = (options.form, options.batch_size, options.seconds)
    cli.show(measure_reading(open_store(options.store), *knobs).as_dict(), options.json)
    return 0


def _parser() -> cli.CommandParser:
    parser = cli.CommandParser(description=__doc__, epilog="Example: scbert store info cells.zarr")
    commands = parser.add_subparsers(required=True, metavar="verify | info | bench")

    def command(name: str, run: Callable[[argparse.Namespace], int], text: str) -> Any:
        added = commands.add_parser(name, help=text, epilog=f"Example: scbert store {name} c.zarr")
        added.add_argument("store", help="folder, s3://, gs:// or http(s):// address")
        added.set_defaults(command=run)
        return added

    verify = command("verify", _verify, "compare every file with its SHA-256")
    verify.add_argument("--threads", type=int, help="files read at once; default: one per core")
    info = command("info", _info, "show cells, genes, sources, sizes")
    bench = command("bench", _bench, "measure shuffled reading")
    bench.add_argument("--form", default="counts", help="counts (CSR) or tokens (dense uint8)")
    bench.add_argument("--batch_size", type=int, default=512, help="cells of a batch")
    bench.add_argument("--seconds", type=float, default=10.0, help="stop after so long")
    for printing in (verify, info, bench):
        printing.add_argument("--json", action="store_true", help="print one line of JSON")
    return parser
