"""The last step of annotating a file: columns, reasons if asked for, and the tables beside."""

from pathlib import Path

from finetune.annotation_config import AnnotateConfig
from finetune.annotator import Annotator
from finetune.check import Alignment
from finetune.explaining import Explained, explain
from finetune.labelled import CellLabels
from finetune.labelled_files import LabelledFile, write_beside, write_table
from finetune.query import Query


def finish(
    config: AnnotateConfig,
    file: LabelledFile,
    query: Query,
    alignment: Alignment,
    annotator: Annotator,
    labels: CellLabels,
) -> None:
    """Enter what is known of all cells into the file, and write what stands beside it."""
    output = Path(config.output)
    provenance = annotator.provenance(query, alignment)
    varm = None
    if config.reasons or config.markers is not None:
        found = explain(
            annotator,
            query,
            alignment,
            labels,
            markers=config.markers,
            cells_per_type=config.reasons_cells,
        )
        provenance |= found.for_uns()
        if query.place != "raw":  # whose genes are others than the file's
            varm = found.matrices
        _write_reasons(output, found)
    file.finish(labels, provenance, varm)
    write_table(output.with_suffix(".csv"), query, labels, config.key_added)


def _write_reasons(output: Path, found: Explained) -> None:
    """Write the top genes as a table and as a heat map."""
    from finetune import pl

    table = output.with_name(f"{output.stem}_genes.csv")
    write_beside(table, lambda path: found.table.to_csv(path, index=False))
    if len(found.table):
        axes = pl.top_genes(found.table)
        for suffix in (".png", ".svg"):
            pl.save(axes, output.with_name(f"{output.stem}_genes{suffix}"))
