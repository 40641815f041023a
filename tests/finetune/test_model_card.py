"""The model card says what was recorded, and of what was not that it was not."""

from pathlib import Path

import pytest

from finetune.config import FinetuneConfig, LabelledConfig
from finetune.model_card import MAX_DESCRIPTION, description, model_card
from pretrain.config import TrackingConfig
from pretrain.mlflow_records import recorded
from tests.support.entries import classifier_settings

FILES = {"genes.txt": {"bytes": 1234, "sha256": "ab" * 32}}


def test_nothing_recorded_is_said() -> None:
    card = model_card("bare", {"kind": "classifier"}, FILES)
    assert card.count("not recorded") >= 6
    assert "| this model | not recorded | not recorded |" in card
    assert "Not stated for these weights" in card
    assert f"| genes.txt | 1,234 | {'ab' * 32} |" in card


def test_an_encoder_has_its_own_words() -> None:
    metrics = {"validation_masked_accuracy": 0.61, "validation_commonest_bin_accuracy": 0.58}
    provenance = {"store_id": "s1", "num_cells": 1_000_000}
    card = model_card("e", {"kind": "encoder", "metrics": metrics, "provenance": provenance}, FILES)
    assert "- validation_masked_accuracy: 0.6100" in card
    assert "- cell store: s1" in card
    assert "- cells trained on: 1,000,000" in card
    assert "it names no cell types until it is fine-tuned" in card


def test_sources_are_named_with_their_hashes() -> None:
    sources = [{"name": f"s{n}", "cells": n, "sha256": f"{n:064x}"} for n in range(60)]
    few = {"kind": "encoder", "provenance": {"store_id": "s1", "sources": sources[:2]}}
    card = model_card("e", few, FILES)
    assert "- sources: 2\n\n| source | cells | sha256 |" in card
    assert f"| s1 | 1 | {1:064x} |" in card
    assert "more in config.json" not in card
    many = {"kind": "encoder", "provenance": {"store_id": "s1", "sources": sources}}
    card = model_card("e", many, FILES)
    assert "- sources: 60" in card
    assert f"| s49 | 49 | {49:064x} |\n\n… and 10 more in config.json." in card


@pytest.mark.parametrize("label", ["T | B", "T\nB", "https://me:hunter2@host/T"])
def test_labels_cannot_break_the_table(label: str) -> None:
    settings = classifier_settings(0.9, 0.8)
    settings["per_class"]["per_class"] = {label: settings["per_class"]["per_class"]["T cell"]}
    card = model_card("x", settings, FILES)
    (row,) = [line for line in card.splitlines() if line.endswith("| 0.8000 | 0.8500 |")]
    assert row.replace("\\|", "").count("|") == 6
    assert "hunter2" not in card


def test_settings_are_shown_without_places(tmp_path: Path) -> None:
    config = FinetuneConfig(
        encoder="https://me:hunter2@host/encoder",
        data=LabelledConfig(path="a.h5ad"),
        output=str(tmp_path),
        tracking=TrackingConfig(uri="http://me:hunter2@host"),
    )
    settings = {**classifier_settings(0.9, 0.8), "settings": recorded(config)}
    card = model_card("x", settings, FILES)
    assert "| lr | 0.001 |" in card
    assert "| encoder | https://host/encoder |" in card
    assert "hunter2" not in card
    assert str(tmp_path) not in card


def test_long_cards_are_cut_for_the_database() -> None:
    settings = classifier_settings(0.9, 0.8)
    settings["per_class"]["per_class"] = {
        f"type {number}": {"precision": 1.0, "recall": 1.0, "f1": 1.0, "support": 1}
        for number in range(300)
    }
    card = model_card("x", settings, FILES)
    short = description(card)
    assert len(card) > 5_000 >= len(short)
    assert short.endswith("the whole card is MODEL_CARD.md of this version.")
    assert description("short") == "short"
    assert MAX_DESCRIPTION < 5_000
