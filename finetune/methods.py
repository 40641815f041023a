"""Methods that the referee compares; each labels the test side of a trial after learning the other.

CellTypist and SingleR are not installed with the project: `pip install 'scbert-scale[benchmark]'`.
Asked for by name and missing, they are refused.
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any, Final

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from sklearn.multiclass import OneVsRestClassifier

from datastore.genes import GenePanel, align_counts
from finetune.classifier import dense_rates, predict
from finetune.config import FinetuneConfig
from finetune.expert_pool import fit_pool
from finetune.expression import counts_per_10k, scaled, variable_genes
from finetune.network import complete, train_network
from finetune.novelty import fit_detector, novelty_of
from finetune.sides import Labelled, Start, fresh_start
from pretrain.distributed import alone
from pretrain.export import Export, read_export

L1_PENALTIES: Final = (0.1, 1.0, 10.0)
"""Values of scikit-learn's ``C`` for the L1 penalty."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """One trial as a method sees it.

    Attributes:
        train: Counts to learn from, (N, G), and types.
        test: Counts to label, (M, G).
        genes: Name of each gene.
        seed: Of everything random.
        config: How ours is trained.
        export: The pretrained encoder; none for a fresh one.
        markers: Marker genes by type.
    """

    train: Labelled
    test: sp.csr_matrix
    genes: tuple[str, ...]
    seed: int
    config: FinetuneConfig
    export: Export | None
    markers: Mapping[str, Sequence[str]] | None


@dataclass(frozen=True)
class Answer:
    """Labels of the test side, (M,), and what a method says of novelty, if it does: (M,) each."""

    labels: NDArray[np.str_]
    strangeness: NDArray[np.floating] | None = None
    is_novel: NDArray[np.bool_] | None = None


def majority(task: Task) -> Answer:
    """Commonest type."""
    names, sizes = np.unique(task.train.labels, return_counts=True)
    return Answer(np.full(task.test.shape[0], names[np.argmax(sizes)]))


def _expert(name: str) -> Callable[[Task], Answer]:
    def method(task: Task) -> Answer:
        pool = fit_pool(task.train.counts, task.train.labels, task.seed, [name])
        logits = pool.predict(task.test).astype(np.float64)
        odds = np.exp(logits - logits.max(axis=1, keepdims=True))
        highest = 1 / odds.sum(axis=1)
        labels = np.array(pool.classes)[logits.argmax(axis=1)]
        return Answer(labels, 1 - highest, highest < 0.5)

    return method


def l1_regression(task: Task) -> Answer:
    """One-against-rest logistic regression with L1 penalty, C by three-fold cross-validation."""
    rates = counts_per_10k(task.train.counts)
    genes = variable_genes(rates, 2_000)
    x, codes = scaled(rates, genes, "log"), np.unique(task.train.labels, return_inverse=True)[1]

    def model(penalty: float) -> OneVsRestClassifier:
        one = LogisticRegression(
            C=penalty, l1_ratio=1, solver="liblinear", class_weight="balanced", random_state=0
        )
        return OneVsRestClassifier(one)

    quality = dict.fromkeys(L1_PENALTIES, 0.0)
    if np.bincount(codes).min() >= 3:
        for rows, held_out in StratifiedKFold(3, shuffle=True, random_state=task.seed).split(
            x, codes
        ):
            for penalty in L1_PENALTIES:
                fitted = model(penalty).fit(x[rows], codes[rows])
                quality[penalty] += float(fitted.score(x[held_out], codes[held_out]))
    else:
        quality[1.0] = 1.0
    best = model(max(L1_PENALTIES, key=lambda penalty: quality[penalty])).fit(x, codes)
    found = best.predict(scaled(counts_per_10k(task.test), genes, "log"))
    return Answer(np.unique(task.train.labels)[found])


def markers(task: Task) -> Answer:
    """Type whose markers have the highest mean of standardised expression."""
    from finetune.baselines import marker_types

    if task.markers is None:
        raise ValueError("marker scoring needs a table of markers (--markers)")
    classes = [str(name) for name in np.unique(task.train.labels)]
    return Answer(marker_types(task.test, task.genes, classes, task.markers))


def ours(task: Task) -> Answer:
    """The network on its encoder, with the experts."""
    return _network(task, task.config, task.export)


def no_pretraining(task: Task) -> Answer:
    """The same with an encoder of random weights of the same shape and genes."""
    if task.export is None:
        return _network(task, task.config, None)
    start = fresh_start(
        task.export.panel,
        replace(task.config.fresh, encoder=task.export.encoder_config),
        task.seed,
    )
    return _network(task, task.config, task.export, start)


def network_alone(task: Task) -> Answer:
    """Ours without the experts on expression, as published."""
    head = replace(task.config.head, expression=False)
    return _network(task, replace(task.config, head=head), task.export)


def experts_alone(task: Task) -> Answer:
    """The pool of experts without a network: what the network has to improve on."""
    train = task.train
    pool = fit_pool(train.counts, train.labels, task.seed)
    codes = np.searchsorted(pool.classes, train.labels)
    detector = fit_detector(train.counts, codes, pool.variable, pool.folds, pool.logits)
    logits = pool.predict(task.test)
    parts = [
        detector(torch.from_numpy(logits[rows]), dense_rates(task.test[rows], torch.device("cpu")))
        for rows in np.array_split(np.arange(len(logits)), -(-len(logits) // 1_000))
    ]
    strangeness, given = torch.cat(parts).numpy(), logits.argmax(axis=1)
    is_novel = strangeness > detector.thresholds.numpy()[given]
    return Answer(np.array(pool.classes)[given], strangeness, is_novel)


class OneAgainstRest(LogisticRegression):  # type: ignore[misc]
    """Logistic regressions of one type against all others, as CellTypist trains them."""

    def fit(self, x: NDArray[Any], labels: NDArray[np.str_]) -> "OneAgainstRest":
        """Fit x, (N, K); of two types the second's regression serves both."""
        names = np.unique(labels)
        settings = {"C": self.C, "solver": self.solver, "max_iter": self.max_iter}
        one = [
            LogisticRegression(**settings).fit(x, labels == name)
            for name in (names if len(names) > 2 else names[1:])
        ]
        self.classes_, self.n_features_in_ = names, x.shape[1]
        self.coef_ = np.concatenate([model.coef_ for model in one])
        self.intercept_ = np.concatenate([model.intercept_ for model in one])
        return self


def celltypist(task: Task) -> Answer:
    """CellTypist, trained on the learning side.

    CellTypist 1.7.1 asks scikit-learn for one regression against the rest by an argument that is
    gone from there, and is given `OneAgainstRest` instead.
    """
    peer = need("celltypist", "CellTypist")
    training: Any = importlib.import_module("celltypist.train")
    anndata = importlib.import_module("anndata")
    train, test = (counts_per_10k(x).log1p() for x in (task.train.counts, task.test))
    names = list(task.genes)
    former = training.LogisticRegression
    training.LogisticRegression = lambda multi_class, **settings: OneAgainstRest(**settings)
    try:
        model = peer.train(train, labels=task.train.labels, genes=names, check_expression=False)
    finally:
        training.LogisticRegression = former
    query = anndata.AnnData(test)
    query.var_names = names
    found = peer.annotate(query, model=model).predicted_labels["predicted_labels"]
    return Answer(found.to_numpy(str))


def singler(task: Task) -> Answer:
    """SingleR, with the learning side as its reference."""
    peer = need("singler", "SingleR")
    train, test = (
        counts_per_10k(x).log1p().toarray().T.astype(np.float64)
        for x in (task.train.counts, task.test)
    )
    result = peer.annotate_single(
        test_data=test,
        test_features=list(task.genes),
        ref_data=train,
        ref_features=list(task.genes),
        ref_labels=task.train.labels.tolist(),
    )
    return Answer(np.array(list(result.column("best")), dtype=str))


def need(module: str, name: str) -> Any:
    """Import a package of the extra `benchmark`.

    Raises:
        ValueError: If it is not installed, with the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(
            f"{name} is not installed ({error}); pip install 'scbert-scale[benchmark]', or leave "
            f"it out of --methods"
        ) from error


METHODS: dict[str, Callable[[Task], Answer]] = {
    "majority": majority,
    "nearest mean": _expert("correlation"),
    "marker scoring": markers,
    "logistic regression": _expert("regression"),
    "logistic regression L1": l1_regression,
    "CellTypist": celltypist,
    "SingleR": singler,
    "experts alone": experts_alone,
    "network alone": network_alone,
    "no pretraining": no_pretraining,
    "ours": ours,
}
"""Methods by the name in `methods`."""


def _network(
    task: Task, config: FinetuneConfig, export: Export | None, start: Start | None = None
) -> Answer:
    """Train and apply a classifier."""
    if start is None and export is not None:
        export = read_export(export.path, "encoder")  # weights of its own: they may be trained
        start = Start(export.encoder(), export.panel, str(export.path))
    if start is None:
        genes = variable_genes(counts_per_10k(task.train.counts), config.fresh.num_genes)
        panel = GenePanel(tuple(task.genes[place] for place in genes))
        start = fresh_start(panel, config.fresh, task.seed)
    places = np.array([start.panel.positions.get(name, -1) for name in task.genes], np.int64)
    train, test = (
        align_counts(counts, places, len(start.panel)) for counts in (task.train.counts, task.test)
    )
    learn = Labelled(train, task.train.labels)
    config = replace(config, seed=task.seed)
    pool = fit_pool(train, learn.labels, task.seed) if config.head.expression else None
    silent: Any = SimpleNamespace(log_metrics=lambda metrics, step: None)
    with TemporaryDirectory() as folder:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model = train_network(config, start, learn, alone(device), silent, Path(folder))
    complete(model, learn, pool, config)
    said = predict(model, test, config.batch_size, progress=False)
    strangeness, is_novel = novelty_of(said, model.novelty)
    return Answer(np.array(said.best), strangeness, is_novel)
