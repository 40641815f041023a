"""Build a cell store from raw files, or add some to it.

python launchers/build_store.py --sources '[cells.h5ad]' --output cells.zarr
python launchers/build_store.py --sources '[more.h5ad]' --output cells.zarr --append true
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from datastore.config import StoreConfig
from launchers import cli


def main(argv: list[str] | None = None) -> int:
    """Build or append, and say what became of every source."""
    return cli.run(lambda: _main(argv))


def _main(argv: list[str] | None) -> None:
    config, as_json = cli.parse_for_scripts(
        StoreConfig,
        argv,
        launcher="build_store.py",
        description="Build a cell store (sharded Zarr, AnnData-readable) from raw count files.",
        example="python launchers/build_store.py --sources '[data/*.h5ad]' --output cells.zarr",
    )
    from datastore.append import append_store
    from datastore.array_ingest import ingest_in_array
    from datastore.ingest import build_store
    from datastore.summary import summarize

    ingest = append_store if config.append else build_store
    store = ingest_in_array(config, ingest) if config.array.tasks else ingest(config)
    if as_json:
        cli.echo_json(None if store is None else summarize(store))
        return
    if store is None:
        cli.echo(f"task {config.array.task} has worked for another; {config.output} is whole")
        return
    cli.echo(
        f"{'source':32} {'cells':>9} {'kept':>9} {'empty':>7} {'poor':>7} {'repeated':>8} "
        f"{'panel genes found':>18}"
    )
    for line in store.header.sources:
        cli.echo(
            f"{line['name']:32} {line['cells']:9,} {line['cells_kept']:9,} "
            f"{line['cells_empty']:7,} {line['cells_poor']:7,} {line['cells_repeated']:8,} "
            f"{line['panel_genes_found']:9,} of {len(store.panel):,}"
        )
    for broken in store.header.left_out:
        cli.echo(f"left out: {broken['reason']}")
    cli.echo(
        f"{store.path}: {store.num_cells:,} cells × {len(store.panel):,} genes, "
        f"{store.header.num_counts:,} counts, store id {store.header.store_id[:12]}"
    )


if __name__ == "__main__":
    sys.exit(main())
