"""Exports: read back bit for bit, or refused with the reason."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.encoder import ExpressionEncoder, build_encoder
from pretrain.export import read_export, write_export
from pretrain.objective import MaskedGeneModel
from tests.support.tiny import BINNING, ENCODER, NUM_GENES, tiny_panel


def build() -> ExpressionEncoder:
    encoder = build_encoder(ENCODER, BINNING, NUM_GENES, seed=3)
    encoder.redraw_projections(3, 7)
    return encoder


def export(folder: Path, encoder: ExpressionEncoder | None = None) -> Path:
    encoder = encoder or build()
    weights = MaskedGeneModel(encoder).state_dict()
    metadata = {"metrics": {"validation_loss": 1.5}, "provenance": {"seed": 3}}
    write_export(
        folder, "encoder", encoder, tiny_panel(), weights, metadata, {"labels.txt": "B cell\n"}
    )
    return folder


def test_round_trip_is_bit_for_bit(tmp_path: Path) -> None:
    encoder = build()
    read = read_export(export(tmp_path / "new" / "export", encoder), kind="encoder")
    tokens = torch.arange(NUM_GENES).remainder(6)[None]

    again = read.encoder()

    written = encoder.weights()
    assert set(again.weights()) == set(written)
    assert all(torch.equal(value, written[name]) for name, value in again.weights().items())
    assert torch.equal(again(tokens), encoder.eval()(tokens))
    assert not again.training
    assert (read.encoder_config, read.binning, read.panel) == (ENCODER, BINNING, tiny_panel())
    assert read.metadata["metrics"] == {"validation_loss": 1.5}
    assert (read.path / "labels.txt").read_text() == "B cell\n"


def test_every_weight_is_written_once(tmp_path: Path) -> None:
    weights = read_export(export(tmp_path / "export")).weights

    assert not [name for name in weights if ".proj_updater." in name]
    assert {"head.weight", "head.bias", "encoder.norm.weight"} <= set(weights)


def test_nothing_in_the_folder_is_pickled(tmp_path: Path) -> None:
    folder = export(tmp_path / "export")

    names = {path.name for path in folder.iterdir()}
    assert names == {"config.json", "genes.txt", "labels.txt", "model.safetensors"}
    for name in names:
        content = (folder / name).read_bytes()
        assert not content.startswith((b"\x80", b"PK")), f"{name} is a pickle or a zip of them"


def test_former_export_is_replaced_and_nothing_stays_beside(tmp_path: Path) -> None:
    (export(tmp_path / "export") / "old.txt").write_text("old")
    (tmp_path / "export.part").mkdir()

    export(tmp_path / "export")

    assert [path.name for path in tmp_path.iterdir()] == ["export"]
    assert not (tmp_path / "export" / "old.txt").exists()


def test_panel_of_another_length_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="panel of 31 genes for an encoder of 32"):
        write_export(tmp_path / "export", "encoder", build(), tiny_panel(31), {}, {})
    assert not list(tmp_path.iterdir())


def set_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def damage(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(lambda f: (f / "genes.txt").unlink(), "genes.txt is missing", id="no panel"),
        pytest.param(
            lambda f: (f / "model.safetensors").unlink(), "safetensors is missing", id="no weights"
        ),
        pytest.param(lambda f: (f / "config.json").unlink(), "config.json is m", id="no config"),
        pytest.param(
            lambda f: (f / "config.json").write_text("{"), "cannot be read", id="config cut short"
        ),
        pytest.param(lambda f: (f / "config.json").write_text("[]"), "cannot be read", id="a list"),
        pytest.param(
            lambda f: set_config(f, format=None), "cannot be read: 'format'", id="no format"
        ),
        pytest.param(
            lambda f: set_config(f, format="scbert-export/2"), "'scbert-export/2', this", id="newer"
        ),
        pytest.param(lambda f: set_config(f, kind="classifier"), "kind 'classifier'", id="kind"),
        pytest.param(
            lambda f: set_config(f, encoder=None), "cannot be read: 'encoder'", id="no encoder"
        ),
        pytest.param(
            lambda f: set_config(f, encoder={"rotary": 1}), "'rotary', which .* update", id="key"
        ),
        pytest.param(
            lambda f: (f / "genes.txt").write_text("A\nB\n"), "is not the panel", id="panel"
        ),
        pytest.param(damage, "model.safetensors is damaged", id="weights cut short"),
    ],
)
def test_what_does_not_belong_together_is_refused(
    change: Any, message: str, tmp_path: Path
) -> None:
    folder = export(tmp_path / "export")
    change(folder)

    with pytest.raises(ValueError, match=message):
        read_export(folder, kind="encoder")


def test_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    folder = export(tmp_path / "export")
    config = json.loads((folder / "config.json").read_text())
    set_config(folder, encoder={**config["encoder"], "dim": 32})

    with pytest.raises(ValueError, match="do not fit the encoder"):
        read_export(folder).encoder()


def test_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no export at .*/nowhere"):
        read_export(tmp_path / "nowhere")
