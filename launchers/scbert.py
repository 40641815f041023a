"""The command `scbert`: every launcher by one name."""

import importlib
import sys
from typing import Final

from launchers import cli

COMMANDS: Final = {
    "store build": ("launchers.build_store",),
    "store append": ("launchers.build_store", "--append", "true"),
    "store verify": ("launchers.store", "verify"),
    "store info": ("launchers.store", "info"),
    "store bench": ("launchers.store", "bench"),
    "genes": ("launchers.genes",),
    "pretrain": ("launchers.pretrain",),
    "estimate": ("launchers.estimate",),
    "export": ("launchers.export",),
    "finetune": ("launchers.finetune",),
    "report": ("launchers.report",),
    "benchmark": ("launchers.benchmark",),
    "check": ("launchers.check",),
    "annotate": ("launchers.annotate",),
    "models": ("launchers.registry",),
    "sweep": ("launchers.sweep",),
    "quickstart": ("launchers.quickstart",),
    "doctor": ("launchers.doctor",),
    "completion": ("launchers.completion",),
}
"""Words → module of the launcher, and the words that it is called with besides the user's."""

HELP: Final = """\
scbert: pretrain single-cell transformers on millions of cells, and label cell types.

  scbert store build     raw count files → a shuffled cell store
  scbert store append    more files → a store that is there
  scbert store verify    is every byte as it was written?
  scbert store info      cells, genes, sources, sizes
  scbert store bench     how fast does it read here?
  scbert genes embed     gene vectors: import gene2vec, or train them from a store
  scbert pretrain        masked-gene pretraining on a store
  scbert estimate        memory, speed and traffic of a pretraining before it is queued
  scbert export          a checkpoint, or a published .pth, as a model for use
  scbert finetune        a cell-type classifier from a pretrained encoder
  scbert report          a page that shows a fine-tuning: scores, errors, genes
  scbert benchmark       methods side by side on labelled cells, and who wins
  scbert check           what a file of cells holds, and what annotation would do
  scbert annotate        labels for the cells of a file or a store
  scbert models          register, list, show, promote, pull and verify models (MLflow)
  scbert sweep           a table of trainings: data sets × folds × seeds, by a Slurm array
  scbert quickstart      all of it on real cells, in minutes
  scbert doctor          is this machine ready, and if not, what is to be done?
  scbert completion      words and flags for bash or zsh: source <(scbert completion bash)

  scbert store build --preset quickstart --sources data/*.h5ad --output cells.zarr
  scbert pretrain --preset quickstart --store cells.zarr --output runs/pretrain
  scbert models register runs/pretrain/export --name scbert-pretrained --alias champion
  scbert finetune --encoder models:/scbert-pretrained@champion \\
                  --data.path labelled.h5ad --output runs/finetune

A store may be a folder or s3://bucket/cells.zarr, gs://… or https://…. Each command shows its
settings with --help; pretraining and fine-tuning on several processes or machines are started by
`deepspeed launchers/pretrain.py …` and `deepspeed launchers/finetune.py …`, same settings.

Exit codes: 0 done, 1 found wanting (verify, doctor, collect) or a bug of ours, 2 wrong input or
setting (one sentence), 75 stopped as asked (start the same command again), 130 interrupted.
"""


def main(argv: list[str] | None = None) -> int:
    """Hand the command line to the launcher that its first words name."""
    words = list(sys.argv[1:] if argv is None else argv)
    for name, (module, *more) in COMMANDS.items():
        parts = name.split()
        if words[: len(parts)] == parts:
            with cli.called_as(f"scbert {name}".removesuffix(f" {more[0]}" if more else "")):
                launcher = importlib.import_module(module)
                code: int = launcher.main([*more, *words[len(parts) :]])
                return code
    if not words or words[-1] in ("-h", "--help", "help"):
        cli.echo(HELP.rstrip())
        return 0
    return cli.run(lambda: _refuse(words))


def _refuse(words: list[str]) -> int:
    group = [name for name in COMMANDS if name.split()[0] == words[0]]
    raise ValueError(
        f"there is no command `scbert {' '.join(words[:2])}`; there are "
        f"{', '.join(group or dict.fromkeys(name.split()[0] for name in COMMANDS))}"
    )


if __name__ == "__main__":
    sys.exit(main())
