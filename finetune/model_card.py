"""The model card: what a registered model is, in Markdown, from what its export records.

The same export always gives the same card, so that registering it twice finds the same version.
What an export does not record is said to be so, never guessed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, Final

from finetune.serving_contract import SIGNATURES
from pretrain.mlflow_client import without_credentials

UNKNOWN: Final = "not recorded"
MAX_DESCRIPTION: Final = 4_900
"""MLflow's databases keep 5,000 characters of a version's description."""
MAX_SOURCES: Final = 50
"""Sources that a card names; `config.json` has all."""

LIMITS: Final = {
    "encoder": (
        "It fills in hidden expression bins; it names no cell types until it is fine-tuned.",
        "It knows the genes of its panel only, under the names in genes.txt.",
    ),
    "classifier": (
        "It knows the cell types of its table only; any cell gets the likeliest of them, and may "
        "be flagged as novel.",
        "It expects raw counts under the gene names in genes.txt, and has seen no other tissue, "
        "species or technology than its training cells.",
        "Scores are those of the held-out cells below; another data set may score lower.",
        "It is for research, not for diagnosis.",
    ),
}


def model_card(
    name: str,
    config: Mapping[str, Any],
    files: Mapping[str, Mapping[str, Any]],
    licence: str | None = None,
) -> str:
    """Write the card.

    Args:
        name: Registered model.
        config: The export's ``config.json``.
        files: Size (``bytes``) and ``sha256`` by file name.
        licence: Under which the weights are given; None says that it is not stated.
    """
    kind = str(config["kind"])
    sections = [
        f"# {name}\n\nA {_KIND[kind]} by scbert-scale.",
        _section("Data", _data(config)),
        _section("Signature", [SIGNATURES[kind]]),
        _section("Panel and recipe", _recipe(config)),
        *_scores(config),
        _section("Lineage", _lineage(config)),
        _section("Settings", _settings(config)),
        _section("Limits", [f"- {line}" for line in LIMITS[kind]]),
        _section("Licence", [licence or "Not stated for these weights; ask who registered them."]),
        _section("Files", _table(("file", "bytes", "sha256"), _file_rows(files))),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def description(card: str) -> str:
    """Shorten a card to what the registry's own page can hold."""
    if len(card) <= MAX_DESCRIPTION:
        return card
    cut = card[:MAX_DESCRIPTION].rpartition("\n")[0]
    return f"{cut}\n\n… the whole card is MODEL_CARD.md of this version."


_KIND: Final = {
    "encoder": "pretrained encoder of single-cell expression (scBERT, Yang et al. 2022)",
    "classifier": "cell-type classifier, fine-tuned from a pretrained encoder (scBERT, "
    "Yang et al. 2022)",
}


def _data(config: Mapping[str, Any]) -> list[str]:
    provenance = _group(config, "provenance")
    evaluation = _group(config, "evaluation")
    cells = provenance.get("cells_trained_on", provenance.get("num_cells"))
    facts: dict[str, Any] = {"cells trained on": cells}
    if config["kind"] == "encoder":
        sources = provenance.get("sources")
        facts["cell store"] = provenance.get("store_id")
        facts["sources"] = None if sources is None else len(sources)
        return [*_facts(facts), *_sources(sources or [])]
    facts["data"] = provenance.get("data", evaluation.get("data"))
    facts["held-out cells"] = evaluation.get("num_cells", _support(config))
    facts["held-out data"] = evaluation.get("data")
    facts["held-out split"] = evaluation.get("split")
    return _facts(facts)


def _sources(sources: list[Mapping[str, Any]]) -> list[str]:
    """A row for each of the first sources."""
    rows = [(line.get("name"), line.get("cells"), line.get("sha256")) for line in sources]
    more = len(rows) - MAX_SOURCES
    lines = ["", *_table(("source", "cells", "sha256"), rows[:MAX_SOURCES])] if rows else []
    return [*lines, "", f"… and {more:,} more in config.json."] if more > 0 else lines


def _recipe(config: Mapping[str, Any]) -> list[str]:
    binning = _group(config, "binning")
    return _facts(
        {
            "panel (sha256)": config.get("panel_digest"),
            "encoder": _group(config, "encoder"),
            "tokens": binning,
            "head": config.get("head"),
            "seed": _group(config, "provenance").get("seed"),
        }
    )


def _scores(config: Mapping[str, Any]) -> Iterator[str]:
    """Ours beside every baseline, then the classes; for an encoder whatever was measured."""
    metrics = _group(config, "metrics")
    if config["kind"] == "encoder":
        yield _section("Scores", _facts(metrics) or [UNKNOWN])
        return
    rows = [("this model", metrics.get("accuracy"), metrics.get("macro_f1"))]
    rows += [
        (key.removesuffix("_accuracy").replace("_", " "), value, metrics.get(_f1_of(key)))
        for key, value in metrics.items()
        if key.endswith("_accuracy") and _f1_of(key) in metrics
    ]
    yield _section("Scores on held-out cells", _table(("method", "accuracy", "macro-F1"), rows))
    classes = _group(_group(config, "per_class"), "per_class")
    per_class = [
        (label, scores["support"], scores["precision"], scores["recall"], scores["f1"])
        for label, scores in classes.items()
    ]
    if per_class:
        header = ("cell type", "cells", "precision", "recall (accuracy)", "F1")
        yield _section("By cell type", _table(header, per_class))


def _lineage(config: Mapping[str, Any]) -> list[str]:
    provenance = _group(config, "provenance")
    facts = {"run": provenance.get("run_id"), "git commit": provenance.get("git_commit")}
    if config["kind"] == "classifier":
        store = provenance.get("pretrained_store_id")
        facts = {"pretrained": provenance.get("pretrained"), "on cell store": store, **facts}
    return _facts(facts)


def _settings(config: Mapping[str, Any]) -> list[str]:
    """The resolved configuration of the training, a row per setting."""
    rows: list[tuple[Any, ...]] = list(_group(config, "settings").items())
    return _table(("setting", "value"), rows) if rows else [UNKNOWN]


def _f1_of(accuracy: str) -> str:
    return accuracy.removesuffix("_accuracy") + "_macro_f1"


def _support(config: Mapping[str, Any]) -> Any:
    return _group(config, "per_class").get("num_cells")


def _group(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = config.get(name)
    return found if isinstance(found, Mapping) else {}


def _section(title: str, lines: list[str]) -> str:
    return f"## {title}\n\n" + "\n".join(lines) if lines else ""


def _facts(facts: Mapping[str, Any]) -> list[str]:
    return [f"- {name}: {_shown(value)}" for name, value in facts.items()]


def _table(header: tuple[str, ...], rows: list[tuple[Any, ...]]) -> list[str]:
    lines = [header, tuple("---" for _ in header), *rows]
    return [f"| {' | '.join(_shown(cell) for cell in line)} |" for line in lines]


def _file_rows(files: Mapping[str, Mapping[str, Any]]) -> list[tuple[Any, ...]]:
    return [(name, record["bytes"], record["sha256"]) for name, record in files.items()]


def _shown(value: Any) -> str:
    """One line of plain text: a bar or a line break in a label must not break the table."""
    if value is None or value == {}:
        return UNKNOWN
    if isinstance(value, float):
        return f"{value:.4f}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    text = json.dumps(value, default=str) if isinstance(value, Mapping | list) else str(value)
    return without_credentials(" ".join(text.split()).replace("|", "\\|"))
