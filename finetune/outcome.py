"""What a fine-tuning leaves for people and programs: scores, predictions, figures."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from datastore.store import write_json
from finetune.calibration import area_under_risk, calibration_error
from finetune.classifier import CellClassifier, Predictions
from finetune.figures import plot_confusion, plot_scores
from finetune.novelty import novelty_of

if TYPE_CHECKING:
    from finetune.train import FinetuneResult


def write_outcome(
    result: "FinetuneResult", model: CellClassifier, truth: NDArray[np.str_], output: Path
) -> dict[str, float]:
    """Write `scores.json`, `heldout.npz` and figures.

    Args:
        result: Scores and predictions of the test side.
        model: The classifier.
        truth: True types of the test side, (N,).
        output: Folder of the run.

    Returns:
        The metrics by name, as in `scores.json`.
    """
    _, is_novel = novelty_of(result.predictions, model.novelty)
    metrics = _metrics(result) | calibration_metrics(
        result.predictions, truth, float(model.temperature)
    )
    metrics |= {"correction": float(model.correction), "called_novel": float(is_novel.mean())}
    figures = output / "figures"
    figures.mkdir(exist_ok=True)
    plot_confusion(result.scores, figures / "confusion.png")
    named = {"scBERT": result.scores}
    named |= {baseline.name: baseline.scores for baseline in result.baselines}
    plot_scores(named, figures / "scores.png")
    beside = output / "heldout.part.npz"
    np.savez(
        beside,
        truth=truth.astype(np.str_),
        labels=np.array(result.predictions.labels),
        probabilities=result.predictions.probabilities,
        embedding=result.predictions.embedding,
        is_novel=is_novel,
    )
    beside.replace(output / "heldout.npz")
    write_json(
        output / "scores.json",
        {
            "verdict": result.verdict,
            "metrics": metrics,
            "ours": result.scores.as_json(),
            "methods": _methods(result),
        },
    )
    return metrics


def calibration_metrics(
    predictions: Predictions, truth: NDArray[np.str_], temperature: float
) -> dict[str, float]:
    """Calibration error with and without the temperature, and area under risk by coverage."""
    is_right = np.array(predictions.best) == truth
    logits = np.log(np.maximum(predictions.probabilities.astype(np.float64), 1e-30)) * temperature
    before = np.exp(logits - logits.max(axis=1, keepdims=True))
    before /= before.sum(axis=1, keepdims=True)
    confidence = np.clip(predictions.confidence, 0, 1)
    return {
        "calibration_error": calibration_error(confidence, is_right),
        "calibration_error_uncalibrated": calibration_error(before.max(axis=1), is_right),
        "area_under_risk": area_under_risk(confidence, is_right),
        "temperature": temperature,
    }


def _metrics(result: "FinetuneResult") -> dict[str, float]:
    metrics = {"accuracy": result.scores.accuracy, "macro_f1": result.scores.macro_f1}
    for baseline in result.baselines:
        name = baseline.name.replace(" ", "_")
        metrics[f"{name}_accuracy"] = baseline.scores.accuracy
        metrics[f"{name}_macro_f1"] = baseline.scores.macro_f1
    return metrics


def _methods(result: "FinetuneResult") -> list[dict[str, Any]]:
    rows = [("scBERT", result.scores, result.seconds, "")]
    rows += [(b.name, b.scores, b.seconds, b.setting) for b in result.baselines]
    return [
        {
            "name": name,
            "accuracy": scores.accuracy,
            "macro_f1": scores.macro_f1,
            "seconds": seconds,
            "setting": setting,
        }
        for name, scores, seconds, setting in rows
    ]
