"""Trials of `pretraining_worth.py`: probes on a frozen network, and the network trained further."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from scipy.special import softmax
from torch import nn

from finetune.classifier import token_batches
from finetune.config import FinetuneConfig, FreshConfig, HeadConfig, LabelledConfig
from finetune.dataset import stratified_folds, stratified_split
from finetune.expert_pool import NUM_FOLDS, tune
from finetune.experts import EXPERTS, NUM_GENES
from finetune.expression import counts_per_10k, scaled, variable_genes
from finetune.methods import METHODS, Task
from finetune.metrics import score
from finetune.protocol_config import ProtocolConfig
from finetune.protocols import few_shot
from finetune.sides import Labelled
from pretrain.encoder import ExpressionEncoder
from pretrain.export import Export
from pretrain.products import multiplies_bf16

MOST: Final = 10**9
"""Budget that stands for four fifths of the cells of each type."""
FRESH_NETWORKS: Final = 3
TUNED_CELLS: Final = 300
"""Cells that a trained network labels in a trial."""

Rows = NDArray[np.int64]
Names = NDArray[np.str_]
Values = NDArray[np.float32]
Scores = dict[str, float]
Trials = dict[str, list[Scores]]
"""By method, the scores of each trial."""


@dataclass(frozen=True)
class Cells:
    """A data set in panel order, and the embeddings of its cells.

    Attributes:
        labelled: Counts, (N, G), and types.
        embeddings: By network, (N, D).
    """

    labelled: Labelled
    embeddings: dict[str, Values]


def embed(encoder: ExpressionEncoder, counts: sparse.csr_matrix) -> Values:
    """Mean state of a cell's expressed genes, and that of its constant position, (N, 2 D)."""
    parts = []
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=multiplies_bf16()):
        for tokens in token_batches(counts, 16, encoder):
            shown = nn.functional.pad(tokens > 0, (0, 1), value=True)  # (B, G + 1)
            states = encoder(tokens).float()  # (B, G + 1, D)
            mean = (states * shown[..., None]).sum(1) / shown.sum(1, keepdim=True)
            parts.append(torch.cat([mean, states[:, -1]], dim=1))
    return np.asarray(torch.cat(parts).numpy())


def split(learn: Labelled, query: Labelled, budget: int, seed: int) -> tuple[Rows, Rows]:
    """Rows to learn from and rows of the query to label."""
    if learn is query and budget != MOST:
        (trial,) = few_shot(learn.labels, ProtocolConfig(per_class=(budget,)), seed)
        return trial.train, trial.test
    train, rest = stratified_split(learn.labels, 0.2, seed)
    if learn is query:
        return train, rest
    rng = np.random.default_rng([seed, 4])
    names = np.unique(learn.labels[train])
    train = np.concatenate(
        [rng.permutation(train[learn.labels[train] == name])[:budget] for name in names]
    )
    return np.sort(train), np.flatnonzero(np.isin(query.labels, names))


def frozen_trials(learn: Cells, query: Cells, budget: int, seeds: int) -> Trials:
    """Probes on frozen embeddings, regression on expression, and both together."""
    trials: Trials = {}
    for seed in range(seeds):
        train, test = split(learn.labelled, query.labelled, budget, seed)
        labels, truth = learn.labelled.labels[train], query.labelled.labels[test]
        expression = linear(*expression_of(learn, query, train, test), labels, seed)
        chances = {"logistic regression": expression}
        networks = {"pretrained": "pretrained", "fresh": f"fresh {seed % FRESH_NETWORKS}"}
        if "vectors" in learn.embeddings:
            networks["vectors"] = "vectors"
        for kind, network in networks.items():
            x = learn.embeddings[network][train], query.embeddings[network][test]
            level, spread = x[0].mean(axis=0), x[0].std(axis=0) + 1e-6
            probe = linear((x[0] - level) / spread, (x[1] - level) / spread, labels, seed)
            chances[f"probe, {kind}"] = probe
            chances[f"with probe, {kind}"] = (probe + expression) / 2
        classes = np.unique(labels)
        for name, of in chances.items():
            trials.setdefault(name, []).append(scores(classes[of.argmax(axis=1)], truth, classes))
    return trials


def expression_of(learn: Cells, query: Cells, train: Rows, test: Rows) -> tuple[Values, Values]:
    """Log expression of the training side's variable genes, on both sides."""
    rates = counts_per_10k(learn.labelled.counts[train])
    genes = variable_genes(rates, NUM_GENES)
    others = counts_per_10k(query.labelled.counts[test])
    return scaled(rates, genes, "log"), scaled(others, genes, "log")


def linear(x: Values, others: Values, labels: Names, seed: int) -> NDArray[np.float64]:
    """Probabilities of logistic regression, penalty and temperature tuned out of fold, (M, C)."""
    codes = np.unique(labels, return_inverse=True)[1]
    tuned = tune(EXPERTS["regression"], x, None, codes, stratified_folds(labels, NUM_FOLDS, seed))
    return np.asarray(softmax(tuned.map(others).astype(np.float64), axis=1))


def tuned_trials(
    learn: Labelled, query: Labelled, budget: int, seeds: int, export: Export
) -> Trials:
    """The network trained further, alone and with the experts."""
    own = FinetuneConfig(encoder="none", data=LabelledConfig(path="cells"), output="none")
    own = replace(own, fresh=FreshConfig(encoder=export.encoder_config), epochs=8)
    pooled = HeadConfig(kind="pooled", expression=False)
    alone = replace(own, head=pooled, train="last_block", batch_size=8)
    trials: Trials = {}
    for seed in range(seeds):
        train, test = split(learn, query, budget, seed)
        test = np.random.default_rng(seed).permutation(test)[:TUNED_CELLS]
        side = learn.take(train)
        given = (side, query.counts[test], export.panel.names, seed)
        said = {
            name: answer(METHODS[method], given, config, export)
            for name, method, config in (
                ("experts alone", "experts alone", own),
                ("fine-tuned, pretrained", "ours", alone),
                ("fine-tuned, fresh", "no pretraining", alone),
                ("product, pretrained", "ours", own),
                ("product, fresh", "no pretraining", own),
            )
        }
        truth, classes = query.labels[test], np.unique(side.labels)
        for name, labels in said.items():
            found = scores(labels, truth, classes)
            found["unlike experts"] = float((labels != said["experts alone"]).mean())
            trials.setdefault(name, []).append(found)
    return trials


def answer(
    method: Callable[[Task], Any], given: tuple[Any, ...], config: FinetuneConfig, export: Export
) -> Names:
    """Labels that a method gives to the cells of a trial."""
    train, test, genes, seed = given
    task = Task(
        train=train,
        test=test,
        genes=genes,
        seed=seed,
        config=config,
        export=export,
        markers=None,
    )
    return np.asarray(method(task).labels)


def scores(labels: Names, truth: Names, classes: Names) -> Scores:
    found = score(list(truth), list(labels), [str(name) for name in classes])
    return {"accuracy": found.accuracy, "macro_f1": found.macro_f1}
