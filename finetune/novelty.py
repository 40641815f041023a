"""Cells of no known type: a score for how strange a cell is, and a threshold for each type.

Three scores, higher is stranger:

- `distance` (the default): the Mahalanobis distance of log(1 + counts per 2,000) to the nearest
  class mean, in principal components, with the covariance within types pooled and shrunk. It sees a
  type that shares no programme with the class it resembles, which probabilities cannot: they only
  say which class is nearest. Components fit the noise of the cells they are made of, which puts
  those cells farther out than fresh ones; so there is a view for each fold, made without its cells,
  and the least distance of all views counts: every training cell has a view that did not see it.
- `probability`: 1 − the highest probability.
- `energy`: minus the log of the sum of exponentiated logits (Liu et al. 2020).

Thresholds are quantiles of the scores of training cells (probabilities and energy by a model that
did not see them), so that the chosen share of each type's known cells is rejected. The paper's
rule, a highest probability below 0.5, stays available as the rule `probability`.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, Literal

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from torch import Tensor, nn

from finetune.dataset import stratified_folds
from finetune.expression import counts_per_10k

if TYPE_CHECKING:
    from finetune.classifier import Predictions

Score = Literal["distance", "probability", "energy"]
Rule = Literal["thresholds", "probability"]
Values = NDArray[np.floating]

NUM_COMPONENTS: Final = 30
NUM_VIEWS: Final = 3
RATE: Final = 0.2
"""Counts per 10,000 are multiplied by this before the logarithm: near the depth of common data, so
that a single count is no leap. With 1, components follow single counts: worse AUROC on Baron's
pancreas, 10x's pbmc3k and Kang's blood cells."""
SHRINKAGE: Final = 0.1
"""Share of the identity in the covariance within types."""
FEW_CELLS: Final = 50
"""A type with fewer held-out cells takes the spread of all types around its own median."""


class NoveltyDetector(nn.Module):
    """Scores cells and holds a threshold for each type; all of it is in the export.

    Args:
        num_views: Views, each made without one fold of the training cells, V.
        num_genes: Genes that are seen, K.
        num_components: Width of each view's space, k.
        num_classes: Types, C.
        score: What is scored.
        rule: Whether the thresholds decide, or the paper's rule on probabilities.
        probability: Threshold of the paper's rule.
    """

    genes: Tensor
    centre: Tensor
    basis: Tensor
    means: Tensor
    thresholds: Tensor

    def __init__(
        self,
        num_views: int,
        num_genes: int,
        num_components: int,
        num_classes: int,
        score: Score = "distance",
        rule: Rule = "thresholds",
        probability: float = 0.5,
    ) -> None:
        super().__init__()
        self.kind, self.rule, self.probability = score, rule, probability
        self.register_buffer("genes", torch.zeros(num_genes, dtype=torch.long))
        self.register_buffer("centre", torch.zeros(num_views, num_genes))
        self.register_buffer("basis", torch.zeros(num_views, num_genes, num_components))
        self.register_buffer("means", torch.zeros(num_views, num_classes, num_components))
        self.register_buffer("thresholds", torch.full((num_classes,), torch.inf))

    def forward(self, logits: Tensor, rates: Tensor) -> Tensor:
        """Score cells.

        Args:
            logits: Calibrated logits, (B, C).
            rates: Counts per 10,000 in panel order, (B, G).

        Returns:
            Scores, (B,).
        """
        if self.kind == "probability":
            # The sum of the others, which is exact where the highest is almost 1.
            return logits.softmax(-1).sort(-1).values[:, :-1].sum(-1)
        if self.kind == "energy":
            return -logits.logsumexp(-1)
        return self.distance(torch.log1p(RATE * rates[:, self.genes]))

    def distance(self, x: Tensor) -> Tensor:
        """Least distance to a class mean in any view, (B,); x is log(1 + RATE × rate), (B, K)."""
        least = []
        for centre, basis, means in zip(self.centre, self.basis, self.means, strict=True):
            place = (x - centre) @ basis
            # Not torch.cdist, which takes a less exact path for larger batches.
            least.append((place[:, None] - means).square().sum(-1).min(-1).values)
        return torch.stack(least).min(0).values.sqrt()


def novelty_of(
    predictions: "Predictions",
    detector: NoveltyDetector | None,
    rule: Rule | None = None,
    probability: float | None = None,
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Say how strange cells are, and which are of no known type.

    Args:
        predictions: What `finetune.classifier.predict` returned.
        detector: The model's (`model.novelty`); none, of a model without one, leaves the paper's
            rule.
        rule: `thresholds` of each type, or `probability`, the paper's rule; none takes the model's.
        probability: Threshold of the paper's rule; none takes the model's, else 0.5.

    Returns:
        Scores, (N,), higher is stranger, and whether each cell is novel, (N,).

    Raises:
        ValueError: If thresholds are asked of a model that has none.
    """
    chosen = rule or (detector.rule if detector is not None else "probability")
    if chosen == "probability":
        level = probability
        if level is None:
            level = detector.probability if detector is not None else 0.5
        return 1 - predictions.confidence, np.asarray(predictions.confidence < level)
    if detector is None or predictions.novelty is None:
        raise ValueError(
            "the model has no novelty thresholds; fine-tune it again, or choose the rule "
            "'probability'"
        )
    thresholds = detector.thresholds.cpu().numpy()
    given = predictions.probabilities.argmax(axis=1)
    return predictions.novelty, np.asarray(predictions.novelty > thresholds[given])


def fit_view(
    detector: NoveltyDetector, view: int, x: NDArray[np.float32], codes: NDArray[np.int64]
) -> None:
    """Fit components, class means and covariance of a view to cells: x (N, K), type codes (N,)."""
    width = detector.basis.shape[2]
    # Randomised and seeded: the leading components are all that is needed.
    found = PCA(width, svd_solver="randomized", random_state=0).fit(x)
    place = found.transform(x)
    num_classes = detector.means.shape[1]
    means = np.stack([place[codes == code].mean(axis=0) for code in range(num_classes)])
    apart = place - means[codes]
    within = apart.T @ apart / len(x)
    level = max(float(np.trace(within)) / width, 1e-8)
    values, vectors = np.linalg.eigh((1 - SHRINKAGE) * within + SHRINKAGE * level * np.eye(width))
    whiten = vectors / np.sqrt(values)
    detector.centre[view] = torch.from_numpy(found.mean_)
    detector.basis[view] = torch.from_numpy(found.components_.T @ whiten)
    detector.means[view] = torch.from_numpy(means @ whiten)


def fit_detector(
    counts: sp.csr_matrix,
    codes: NDArray[np.int64],
    genes: NDArray[np.int64],
    folds: NDArray[np.int64],
    logits: NDArray[np.float32],
    *,
    score: Score = "distance",
    rule: Rule = "thresholds",
    probability: float = 0.5,
    false_rejection: float = 0.05,
) -> NoveltyDetector:
    """Fit a detector on training cells, its thresholds on scores that did not see the scored cell.

    Args:
        counts: Raw counts, (N, G).
        codes: Type of each cell, (N,), 0 to C − 1.
        genes: Columns of the counts that are seen, (K,).
        folds: Fold of each cell whose logits are by a model that did not see it, (N,), else -1.
        logits: Calibrated logits, (N, C).
        score: What is scored.
        rule: What decides by default.
        probability: Threshold of the paper's rule.
        false_rejection: Share of each type's known cells that the thresholds reject.
    """
    num_classes = logits.shape[1]
    is_scored, given = folds >= 0, np.where(folds >= 0, logits.argmax(axis=1), codes)
    parts = stratified_folds(codes.astype(str), NUM_VIEWS, 0)
    views = np.unique(parts[parts >= 0])
    if not len(views):  # a single cell of each type: one view of them all
        views = np.array([NUM_VIEWS])
    smallest = min(int((parts != part).sum()) for part in views)
    width = max(1, min(NUM_COMPONENTS, smallest // 2, len(genes) - 1))
    detector = NoveltyDetector(len(views), len(genes), width, num_classes, score, rule, probability)
    detector.genes.copy_(torch.from_numpy(genes))
    if score == "distance":
        x = np.log1p(np.float32(RATE) * counts_per_10k(counts)[:, genes].toarray())
        for view, part in enumerate(views):
            fit_view(detector, view, x[parts != part], codes[parts != part])
        is_scored = parts >= 0
        scores = detector.distance(torch.from_numpy(x)).numpy()
    else:
        scores = detector(torch.from_numpy(logits), torch.empty(0)).numpy()
    if is_scored.any():
        found = class_thresholds(scores[is_scored], given[is_scored], num_classes, false_rejection)
        detector.thresholds.copy_(torch.from_numpy(found))
    return detector


def class_thresholds(
    scores: Values, given: NDArray[np.int64], num_classes: int, false_rejection: float
) -> NDArray[np.float64]:
    """Threshold of each class, above which a share of the known cells given its label lies.

    A class with few cells takes the quantile of all cells around their own class's median, placed
    around its own median, itself drawn to that of all cells.

    Args:
        scores: Of held-out known cells, (N,).
        given: The label that each got, (N,).
        num_classes: C.
        false_rejection: The share, in (0, 1).
    """
    medians = np.full(num_classes, np.median(scores), dtype=np.float64)
    sizes = np.bincount(given, minlength=num_classes)
    for code in np.flatnonzero(sizes):
        share = sizes[code] / (sizes[code] + 5)
        medians[code] += share * (np.median(scores[given == code]) - medians[code])
    above = float(np.quantile(scores - medians[given], 1 - false_rejection))
    thresholds = medians + above
    for code in np.flatnonzero(sizes >= FEW_CELLS):
        thresholds[code] = np.quantile(scores[given == code], 1 - false_rejection)
    return thresholds


def novelty_scores(
    scores: Values, is_flagged: NDArray[np.bool_], is_novel: NDArray[np.bool_]
) -> dict[str, float]:
    """Summarise a leave-one-type-out trial: AUROC, share of novel cells found, of known cells kept.

    Args:
        scores: Strangeness, (N,).
        is_flagged: What was called novel, (N,).
        is_novel: What is, (N,).
    """
    from finetune.calibration import auroc

    return {
        "auroc": auroc(scores, is_novel),
        "novel_found": float(is_flagged[is_novel].mean()),
        "known_kept": float((~is_flagged[~is_novel]).mean()),
    }


def detector_shape(detector: NoveltyDetector) -> dict[str, float | str | Sequence[int]]:
    """What `NoveltyDetector` needs besides its arrays, JSON-ready; `threshold` is the paper's."""
    return {
        "score": detector.kind,
        "rule": detector.rule,
        "threshold": detector.probability,
        "shape": [*detector.basis.shape, len(detector.thresholds)],
    }
