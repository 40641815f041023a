"""The whole job on real cells, in minutes on two CPU cores: raw counts in, labels out.

Every step is a launcher that a user would call; its command is shown before it runs.

    python launchers/quickstart.py --output quickstart_run
"""

import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from launchers import cli

ROOT: Final = Path(__file__).resolve().parent.parent
MARKER: Final = ".quickstart"


@dataclass(frozen=True, kw_only=True)
class QuickstartConfig:
    """Choices of the first run."""

    output: str = "quickstart_run"
    """Folder for everything it writes; a former quickstart there is replaced."""
    processes: int = 2
    """Processes that pretrain together."""
    pause_at: int = 60
    """Step at which pretraining is stopped once, to show that it continues from its checkpoint."""
    test_share: float = 0.2
    """Share of each cell type that neither pretraining nor fine-tuning sees."""
    seed: int = 0
    """Seed of the split and of all training."""
    cache: str | None = None
    """Folder that keeps the download; none takes $XDG_CACHE_HOME/scbert or ~/.cache/scbert."""

    def __post_init__(self) -> None:
        if not 0 < self.test_share < 1:
            raise ValueError(f"test_share is {self.test_share}; give a share inside 0 to 1")
        if self.processes < 1 or self.pause_at < 1:
            raise ValueError("processes and pause_at must be 1 or more")


def main(argv: list[str] | None = None) -> int:
    """Run all steps and show the summary."""
    return cli.run(lambda: _main(argv))


def _main(argv: list[str] | None) -> None:
    config = cli.parse(
        QuickstartConfig,
        argv,
        launcher="quickstart.py",
        description="Store, pretraining, fine-tuning, registry and annotation on real cells.",
        example="python launchers/quickstart.py --output quickstart_run",
    )
    started = time.perf_counter()
    run = _fresh_folder(Path(config.output))
    database = f"sqlite:///{(run / 'mlflow.db').resolve()}"
    steps = _Steps(database)
    seed = ("--seed", str(config.seed))
    cli.echo("\n1/6  Real cells: human pancreas (Baron et al. 2016), split by cell type")
    steps.python(
        "fetch_pancreas",
        *("--output", f"{run}/data", "--test_share", str(config.test_share), *seed),
        *(("--cache", config.cache) if config.cache else ()),
    )
    cli.echo("\n2/6  Cell store")
    steps.python(
        "build_store",
        *("--preset", "quickstart", "--sources", f"[{run}/data/train.h5ad]"),
        *("--output", f"{run}/cells.zarr"),
    )
    cli.echo("\n3/6  Pretraining: masked genes, DeepSpeed ZeRO 1, stopped once and continued")
    train = [
        *("--preset", "quickstart", "--store", f"{run}/cells.zarr"),
        *("--output", f"{run}/pretrain", *seed),
    ]
    pause = ("--stop_after", str(config.pause_at))
    steps.deepspeed(config.processes, "pretrain", *train, *pause)
    steps.deepspeed(config.processes, "pretrain", *train)
    steps.python(
        "registry",
        *("register", f"{run}/pretrain/export", "--name", "scbert-pretrained"),
        *("--alias", "champion"),
    )
    cli.echo("\n4/6  Fine-tuning, beside logistic regression and majority on the same cells")
    steps.python(
        "finetune",
        *("--encoder", "models:/scbert-pretrained@champion"),
        *("--data.path", f"{run}/data/train.h5ad"),
        *("--data.test_path", f"{run}/data/heldout_truth.h5ad"),
        *("--output", f"{run}/finetune", *seed),
    )
    steps.python(
        "registry",
        *("register", f"{run}/finetune/export", "--name", "scbert-pancreas"),
        *("--alias", "champion", "--lineage", "models:/scbert-pretrained@champion"),
    )
    cli.echo("\n5/6  Annotation of the held-out cells, without their labels")
    steps.python(
        "annotate",
        *("--model", "models:/scbert-pancreas@champion"),
        *("--input", f"{run}/data/heldout.h5ad", "--output", f"{run}/annotated.h5ad"),
    )
    cli.echo("\n6/6  Summary and figures")
    _summarize(run, database, time.perf_counter() - started)


def _fresh_folder(run: Path) -> Path:
    """Make the run's folder; only a former quickstart is replaced."""
    if run.exists():
        if any(run.iterdir()) and not (run / MARKER).exists():
            raise ValueError(f"{run} holds something else; choose another --output")
        shutil.rmtree(run)
    run.mkdir(parents=True)
    (run / MARKER).touch()
    return run


class _Steps:
    """Runs launchers as a user would, showing each command."""

    def __init__(self, database: str) -> None:
        # Two CPU processes everywhere: the first run must not depend on what GPUs there are.
        self._environ = {
            **os.environ,
            "MLFLOW_TRACKING_URI": database,
            "DS_ACCELERATOR": "cpu",
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        }
        cli.echo(f"$ export MLFLOW_TRACKING_URI={database} DS_ACCELERATOR=cpu")

    def python(self, launcher: str, *arguments: str) -> None:
        """Run a launcher in one process."""
        self._run([sys.executable], launcher, arguments)

    def deepspeed(self, processes: int, launcher: str, *arguments: str) -> None:
        """Run a launcher in several processes."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        options = ["--quiet", "--num_gpus", str(processes), "--master_port", str(port)]
        self._run(["deepspeed", *options], launcher, arguments)

    def _run(self, program: list[str], launcher: str, arguments: Sequence[str]) -> None:
        shown = [Path(program[0]).name, *program[1:], f"launchers/{launcher}.py", *arguments]
        cli.echo(f"$ {shlex.join(shown)}")
        command = [*program, str(ROOT / "launchers" / f"{launcher}.py"), *arguments]
        done = subprocess.run(command, env=self._environ, check=False)
        if done.returncode:
            raise ValueError(
                f"the step above failed with exit code {done.returncode}; its message says why"
            )


def _summarize(run: Path, database: str, seconds: float) -> None:
    """Draw the figures and say how it went."""
    import anndata
    import pandas as pd

    from finetune.figures import plot_confusion, plot_loss, plot_umap, umap_embedding
    from finetune.metrics import score
    from finetune.train import read_history

    truth = anndata.read_h5ad(run / "data" / "heldout_truth.h5ad").obs["cell_type"].astype(str)
    annotated = anndata.read_h5ad(run / "annotated.h5ad")
    table = pd.read_csv(run / "annotated.csv", index_col="cell").loc[truth.index]
    labels = table["scbert_label"].astype(str)
    scores = score(list(truth), list(labels), sorted(set(truth) | set(labels)))
    history = read_history(run / "pretrain" / "metrics.jsonl")
    figures = run / "figures"
    figures.mkdir()
    plot_loss(history, figures / "loss.png")
    plot_confusion(scores, figures / "confusion.png")
    points = umap_embedding(annotated.obsm["X_scbert"], seed=0)
    novel = annotated.obs["scbert_novel"].to_numpy(bool)
    title = "Held-out pancreas cells by predicted type"
    plot_umap(points, annotated.obs["scbert_label"].astype(str), figures / "umap.png", title, novel)
    shutil.copy(run / "finetune" / "figures" / "scores.png", figures / "scores.png")

    last = [line for line in history if "validation_masked_accuracy" in line][-1]
    report = json.loads((run / "finetune" / "scores.json").read_text(encoding="utf-8"))
    numbers = report["metrics"]
    lines = [
        f"Pretraining  masked accuracy {last['validation_masked_accuracy']:.4f} on held-out cells, "
        f"commonest-bin rule {last['validation_commonest_bin_accuracy']:.4f}",
        f"Annotation   accuracy {scores.accuracy:.4f}, macro-F1 {scores.macro_f1:.4f} on "
        f"{scores.num_cells} held-out cells; {int(novel.sum())} flagged as novel",
        f"Baselines    logistic regression {numbers['logistic_regression_accuracy']:.4f} / "
        f"{numbers['logistic_regression_macro_f1']:.4f}, majority "
        f"{numbers['majority_accuracy']:.4f} / {numbers['majority_macro_f1']:.4f}",
        f"Verdict      {report['verdict']}",
        "Model        small, for a first run: 2 blocks of width 64 on the 2,000 genes of highest "
        "variance; the published model is --preset scbert",
        f"Files        {run}/annotated.h5ad, {run}/annotated.csv, figures in {figures}/",
        f"Page         {run}/finetune/report.html: scores, errors, genes that decided",
        f"Runs         mlflow ui --backend-store-uri {database}",
        f"Time         {seconds / 60:.1f} minutes",
    ]
    (run / "summary.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    cli.echo("\n".join(lines))


if __name__ == "__main__":
    sys.exit(main())
