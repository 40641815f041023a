"""Say what a file of cells holds and what annotation would do with it.

scbert check cells.h5ad --model models:/scbert-pancreas@champion
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from launchers import cli


def main(argv: list[str] | None = None) -> int:
    """Check; returns 2 if annotation would refuse the file."""
    return cli.run(lambda: _main(argv))


def _main(argv: list[str] | None) -> int:
    options = _parser().parse(argv)
    from datastore.genes import read_panel
    from finetune.annotation_config import GeneTablesConfig
    from finetune.check import check, gene_tables
    from finetune.registry import resolve_model

    panel = None
    if options.model is not None:
        folder = resolve_model(options.model, uri=options.tracking_uri).path
        if not (folder / "genes.txt").is_file():
            raise ValueError(f"{folder} is not an export: genes.txt is missing")
        panel = read_panel(folder / "genes.txt")
    names = GeneTablesConfig(
        hgnc=options.hgnc, ensembl=options.ensembl, orthologues=options.orthologues
    )
    found = check(
        options.file,
        panel,
        layer=options.layer,
        recover_counts=options.recover_counts,
        min_share_found=options.min_share_found,
        tables=gene_tables(names),
    )
    facts = found.as_json()
    if options.json:
        cli.echo_json(facts)
    else:
        cli.echo("\n".join(_lines(facts)))
    return 2 if found.problems else 0


def _lines(facts: dict[str, object]) -> list[str]:
    told = {name: value for name, value in facts.items() if name not in ("plan", "problems")}
    lines = list(cli.table(told))
    for name, title in (("plan", "annotation"), ("problems", "cannot be annotated")):
        sentences = facts.get(name, ())
        assert isinstance(sentences, tuple)
        lines += [f"{title}: {sentence}" for sentence in sentences]
    return lines


def _parser() -> cli.CommandParser:
    parser = cli.CommandParser(
        description=(__doc__ or "").partition("\n")[0],
        epilog="Example: scbert check cells.h5ad --model models:/scbert-pancreas@champion",
    )
    parser.add_argument("file", help=".h5ad, AnnData Zarr, 10x .h5 or mtx folder, …, or a store")
    parser.add_argument("--model", help="classifier: a folder or models:/name@alias")
    parser.add_argument("--layer", help="layer with the counts, or raw; default: found out")
    parser.add_argument("--recover_counts", action="store_true", help="from log-normalised values")
    parser.add_argument("--min_share_found", type=float, default=0.3, help="of the model's genes")
    for name in ("hgnc", "ensembl", "orthologues"):
        parser.add_argument(f"--panel.{name}", dest=name, help="table of gene names, as annotate's")
    parser.add_argument("--tracking_uri", help="default: MLFLOW_TRACKING_URI, ./mlflow.db")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    return parser


if __name__ == "__main__":
    sys.exit(main())
