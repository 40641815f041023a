"""Label cells of a file or a store with a fine-tuned classifier.

python launchers/annotate.py --model models:/scbert-pancreas@champion \
        --input cells.h5ad --output labelled.h5ad
"""

import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from finetune.annotation_config import AnnotateConfig
from launchers import cli


def main(argv: list[str] | None = None) -> int:
    """Annotate, and count the labels."""
    return cli.run(lambda: _main(argv))


def _main(argv: list[str] | None) -> None:
    words = list(sys.argv[1:] if argv is None else argv)
    if words and not words[0].startswith("-"):
        words.insert(0, "--input")  # `scbert annotate cells.h5ad --model …`
    config, as_json = cli.parse_for_scripts(
        AnnotateConfig,
        words,
        launcher="annotate.py",
        description="Label cells; writes a copy of the AnnData with labels, and a CSV.",
        example="python launchers/annotate.py --model models:/scbert-pancreas@champion "
        "--input cells.h5ad --output labelled.h5ad",
    )
    import torch

    from finetune.annotation import annotate_file
    from finetune.annotation_parts import annotate_store
    from finetune.query import is_store
    from pretrain.allocator import keep_freed_memory

    keep_freed_memory()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    run = annotate_store if is_store(config.input) else annotate_file
    result = run(config, device)
    if as_json:
        cli.echo_json(None if result is None else asdict(result))
        return
    if result is None:
        cli.echo(f"part {config.part} is done; run without --part when all are")
        return
    for label, num_cells in result.cells_of.items():
        cli.echo(f"{label:32} {num_cells:9,}")
    cli.echo(f"{result.num_novel:,} of {result.num_cells:,} cells are flagged as novel")
    cli.echo(f"{result.output} and {result.table}, {result.cells_per_second:,.0f} cells/s")


if __name__ == "__main__":
    sys.exit(main())
