"""Gene vectors: import gene2vec by gene name, or train vectors from a cell store.

python launchers/genes.py embed --vectors gene2vec.npy --store cells.zarr --output vectors
python launchers/genes.py embed --store cells.zarr --output vectors
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from datastore.config import GeneVectorsConfig
from launchers import cli


def main(argv: list[str] | None = None) -> int:
    """Run `embed`: import or train, and say how many genes have a vector."""
    return cli.run(lambda: _main(list(sys.argv[1:] if argv is None else argv)))


def _main(words: list[str]) -> None:
    if words[:1] != ["embed"] and words not in ([], ["-h"], ["--help"]):
        raise ValueError(f"there is no command {words[0]!r}; there is `genes embed`")
    with cli.called_as("scbert genes embed"):
        config, as_json = cli.parse_for_scripts(
            GeneVectorsConfig,
            words[1:] if words[:1] == ["embed"] else ["--help"],
            launcher="genes.py",
            description="Import gene vectors by gene name, or train them from a store (gene2vec).",
            example="scbert genes embed --vectors gene2vec.npy --store cells.zarr --output vectors",
        )
    from datastore.gene2vec import embed_genes

    facts = embed_genes(config)
    if as_json:
        cli.echo_json({"output": config.output, **facts})
        return
    if facts["num_missing"]:
        some = ", ".join([*facts["missing"][:5], *(["…"] if facts["num_missing"] > 5 else [])])
        cli.echo(
            f"{facts['num_missing']:,} of {facts['genes']:,} genes have no vector ({some}); "
            f"theirs are {facts['missing_vectors_are']}"
        )
    cli.echo(
        f"{config.output}: {facts['genes']:,} genes × {facts['dim']}, {facts['method']}; pretrain "
        f"with --encoder.gene_embedding gene2vec --encoder.dim {facts['dim']} "
        f"--gene2vec.vectors {config.output}/genes.npy"
    )


if __name__ == "__main__":
    sys.exit(main())
