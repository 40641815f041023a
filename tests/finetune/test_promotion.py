"""Promotion: the better version on the same cells, and nothing else unless forced."""

from pathlib import Path
from typing import Any

import pytest

from finetune.promotion import promote
from finetune.registration import register_export
from finetune.registry import describe_model, resolve_model
from pretrain.mlflow_client import connect
from tests.support.entries import classifier_settings, write_entry
from tests.support.mlflow_store import fresh_store

GOOD = classifier_settings(0.9, 0.8)


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return fresh_store(tmp_path_factory.mktemp("store"))


def encoder(accuracy: float, store: str | None) -> dict[str, Any]:
    provenance = {"store_id": store, "seed": 0} if store else {}
    metrics = {"validation_masked_accuracy": accuracy}
    return {"panel_digest": "p", "binning": {}, "metrics": metrics, "provenance": provenance}


@pytest.mark.parametrize(
    ("champion", "challenger", "objection"),
    [
        pytest.param(GOOD, classifier_settings(0.8, 0.9), None, id="F1"),
        pytest.param(
            classifier_settings(0.9, 0.8), classifier_settings(0.91, 0.8), None, id="then"
        ),
        pytest.param(
            classifier_settings(0.9, 0.8), classifier_settings(0.9, 0.8), None, id="equal"
        ),
        pytest.param(
            GOOD,
            classifier_settings(0.95, 0.79),
            "macro f1 is 0.7900, that of models:/.*/1 is 0.8000 on the same cells",
            id="worse",
        ),
        pytest.param(
            GOOD,
            classifier_settings(float("nan"), float("nan")),
            "macro f1 is nan",
            id="no number",
        ),
        pytest.param(
            GOOD,
            classifier_settings(0.95, 0.9, split="other"),
            "not scored on the same held-out cells",
            id="other split",
        ),
        pytest.param(
            classifier_settings(0.9, 0.8, split=None),
            classifier_settings(0.95, 0.9, split=None),
            "not scored on the same held-out cells",
            id="no split",
        ),
        pytest.param(
            GOOD,
            classifier_settings(0.9, 0.9, metrics={}),
            "one of the two has no macro_f1 and accuracy",
            id="no scores",
        ),
        pytest.param(encoder(0.6, "s"), encoder(0.7, "s"), None, id="encoder"),
        pytest.param(encoder(0.6, "s"), encoder(0.5, "s"), "accuracy is 0.5", id="worse encoder"),
        pytest.param(encoder(0.6, "s"), encoder(0.7, "t"), "same held-out", id="other store"),
        pytest.param(encoder(0.6, None), encoder(0.7, None), "same held-out", id="no store"),
        pytest.param(encoder(0.6, "s"), classifier_settings(1.0, 1.0), "of the kind", id="kinds"),
    ],
)
def test_the_challenger_must_not_be_worse(
    uri: str,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    champion: dict[str, Any],
    challenger: dict[str, Any],
    objection: str | None,
) -> None:
    name = request.node.callspec.id.replace(" ", "-")
    cache = tmp_path / "cache"
    for alias, settings in (("champion", champion), ("challenger", challenger)):
        folder = write_entry(tmp_path / alias, alias, **settings)
        register_export(folder, name, uri=uri, alias=alias)
    reference = f"models:/{name}@challenger"
    if objection is None:
        done = promote(reference, uri=uri, cache=cache)
    else:
        with pytest.raises(ValueError, match=objection):
            promote(reference, uri=uri, cache=cache)
        assert resolve_model(f"models:/{name}@champion", uri=uri, cache=cache).version == 1
        done = promote(reference, uri=uri, cache=cache, force=True)
    assert (done.challenger, done.former) == (f"models:/{name}/2", f"models:/{name}/1")
    assert resolve_model(f"models:/{name}@champion", uri=uri, cache=cache).version == 2
    tags = connect(uri).get_model_version(name, "2").tags
    assert tags["promoted.instead_of"] == f"models:/{name}/1"
    assert (tags["promoted.forced"] == "no") == (objection is None)


def test_the_first_champion_needs_nobody_to_beat(uri: str, tmp_path: Path) -> None:
    folder = write_entry(tmp_path / "only", **classifier_settings(0.1, 0.1))
    ref = register_export(folder, "first", uri=uri)
    done = promote(ref.uri, uri=uri, cache=tmp_path / "cache")
    again = promote(ref.uri, uri=uri, cache=tmp_path / "cache")
    assert done == again
    assert (done.former, done.scores, done.objection) == (None, {}, None)
    with pytest.raises(ValueError, match="is a folder; register it"):
        promote(str(folder), uri=uri)


def test_a_version_is_described_by_its_card(uri: str, tmp_path: Path) -> None:
    encoders = write_entry(tmp_path / "encoder")
    parent = register_export(encoders, "parent", uri=uri)
    settings = classifier_settings(
        0.97,
        0.91,
        panel_digest="abc",
        provenance={"pretrained": parent.uri, "git_commit": "c0ffee", "cells_trained_on": 1549},
    )
    folder = write_entry(tmp_path / "classifier", **settings)
    tags = {"licence": "CC-BY-4.0"}
    ref = register_export(folder, "described", uri=uri, alias="champion", tags=tags)
    facts = describe_model("models:/described@champion", uri=uri)
    assert (facts["reference"], facts["aliases"]) == (ref.uri, ["champion"])
    assert facts["tags"]["lineage.pretrained"] == "models:/parent/1"
    assert facts["tags"]["git_commit"] == "c0ffee"
    assert set(facts["files"]) == {
        *("model.safetensors", "config.json", "genes.txt", "MODEL_CARD.md", "MLmodel")
    }
    for line in (
        "- cells trained on: 1,549",
        "- held-out split: s",
        "| this model | 0.9700 | 0.9100 |",
        "| logistic regression | 0.5000 | 0.4000 |",
        "| T cell | 30 | 0.9000 | 0.8000 | 0.8500 |",
        "- pretrained: models:/parent/1",
        "- panel (sha256): abc",
        "CC-BY-4.0",
        f"| model.safetensors | {(folder / 'model.safetensors').stat().st_size} |",
    ):
        assert line in facts["card"], line
