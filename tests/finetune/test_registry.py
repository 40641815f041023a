"""The model registry: what is registered comes back byte for byte, and nothing else comes back."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from finetune import registry
from finetune.registry import (
    DIGEST_TAG,
    LINEAGE_TAG,
    MANIFEST,
    ModelVersionRef,
    default_cache,
    list_models,
    make_manifest,
    provenance_run_id,
    register_export,
    resolve_model,
)
from launchers.registry import main
from pretrain.tracking import connect, resolve_tracking_uri, start_run


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One SQLite store for all tests of this module: creating it takes seconds."""
    return resolve_tracking_uri(None, {}, tmp_path_factory.mktemp("a store"))


@pytest.fixture
def export(tmp_path: Path) -> Path:
    """An export whose weights differ from test to test."""
    folder = tmp_path / "export"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(str(tmp_path).encode())
    (folder / "config.json").write_text('{"width": 16}')
    (folder / "genes.txt").write_text("CD3D\nCD8A\n")
    return folder


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def artifacts(ref: ModelVersionRef) -> Path:
    """Return the version's folder in the artifact store."""
    return Path(unquote(urlsplit(ref.source).path))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != MANIFEST}


def test_alias_and_version_give_back_what_was_registered(
    uri: str, export: Path, cache: Path
) -> None:
    ref = register_export(export, "round-trip", uri=uri, alias="champion", tags={"fold": "3"})
    assert (ref.uri, ref.aliases) == ("models:/round-trip/1", ("champion",))
    digest = hashlib.sha256(make_manifest(export)).hexdigest()
    version = connect(uri).get_model_version("round-trip", "1")
    assert version.tags == {"fold": "3", DIGEST_TAG: digest}

    by_alias = resolve_model("models:/round-trip@champion", uri=uri, cache=cache)
    by_version = resolve_model("models:/round-trip/1", uri=uri, cache=cache)
    assert by_alias.path == by_version.path == cache / "round-trip" / f"1-{digest[:12]}"
    assert contents(by_alias.path) == contents(export)
    assert (by_alias.name, by_alias.version, by_alias.alias) == ("round-trip", 1, "champion")
    assert (by_version.alias, by_version.uri) == (None, "models:/round-trip/1")
    assert [path.name for path in by_alias.path.parent.iterdir()] == [by_alias.path.name]


def test_second_version_of_a_run_leaves_the_first_alone(
    uri: str, export: Path, cache: Path
) -> None:
    with start_run(uri, "pretrain", "tiny", is_first=True) as run:
        pass
    options: dict[str, Any] = {"uri": uri, "alias": "champion", "run_id": run.run_id}
    first = register_export(export, "two", **options)
    before = contents(export)
    assert register_export(export, "two", **options) == first  # repeating adds nothing
    (export / "model.safetensors").write_bytes(b"more training")
    (export / "card.md").write_text("better")
    second = register_export(export, "two", **options)

    assert second.uri == "models:/two/2"
    assert connect(uri).get_model_version("two", "2").run_id == run.run_id
    assert contents(resolve_model(first.uri, uri=uri, cache=cache).path) == before
    moved = resolve_model("models:/two@champion", uri=uri, cache=cache)
    assert contents(moved.path) == contents(export)
    listed = [ref for ref in list_models(uri) if ref.name == "two"]
    assert [(ref.version, ref.aliases) for ref in listed] == [(1, ()), (2, ("champion",))]


def test_a_pulled_model_can_be_registered_again(uri: str, export: Path, cache: Path) -> None:
    register_export(export, "origin", uri=uri, alias="champion")
    pulled = resolve_model("models:/origin@champion", uri=uri, cache=cache)
    lineage = {LINEAGE_TAG: "models:/origin@champion"}
    register_export(pulled.path, "copy", uri=uri, tags=lineage)
    # An alias may move later: the tag keeps the version.
    assert connect(uri).get_model_version("copy", "1").tags[LINEAGE_TAG] == "models:/origin/1"
    with pytest.raises(ValueError, match="origin has no version 9; it has: 1"):
        register_export(export, "copy", uri=uri, tags={LINEAGE_TAG: "models:/origin/9"})


def test_path_is_taken_as_it_is(export: Path) -> None:
    model = resolve_model(export)
    assert (model.path, model.name, model.version, model.uri) == (export, None, None, str(export))
    with pytest.raises(ValueError, match="there is no model folder 'nowhere'"):
        resolve_model("nowhere")


def test_cache_is_used_and_checked(
    uri: str, export: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ref = register_export(export, "cached", uri=uri)
    path = resolve_model(ref.uri, uri=uri, cache=cache).path
    (path / "genes.txt").write_text("CD3D\nCD8B\n")  # same size, other bytes
    assert contents(resolve_model(ref.uri, uri=uri, cache=cache).path) == contents(export)

    def no_download(*arguments: Any) -> None:
        raise AssertionError("the cache was not used")

    monkeypatch.setattr(registry, "_download", no_download)
    assert resolve_model(ref.uri, uri=uri, cache=cache).path == path


def test_tasks_that_pull_at_once_all_get_the_model(uri: str, export: Path, cache: Path) -> None:
    ref = register_export(export, "crowd", uri=uri)
    found: list[dict[str, bytes]] = []

    def task() -> None:
        found.append(contents(resolve_model(ref.uri, uri=uri, cache=cache).path))

    threads = [threading.Thread(target=task) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [contents(export)] * 6
    assert len(list((cache / "crowd").iterdir())) == 1


def flip_a_byte(folder: Path) -> None:
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[3] ^= 1
    weights.write_bytes(data)


def add_pickle(folder: Path) -> None:
    (folder / "weights.pkl").write_bytes(b"cos\nsystem\n")


def link_outside(folder: Path) -> None:
    (folder / "genes.txt").unlink()
    (folder / "genes.txt").symlink_to("/etc/hostname")


def add_folder(folder: Path) -> None:
    (folder / "more").mkdir()
    (folder / "more" / "x.txt").write_text("x")


def drop_file(folder: Path) -> None:
    (folder / "genes.txt").unlink()


def add_unknown(folder: Path) -> None:
    (folder / "labels.txt").write_text("T cell\n")


def edit_manifest(folder: Path) -> None:
    (folder / MANIFEST).write_bytes((folder / MANIFEST).read_bytes() + b" ")


@pytest.mark.parametrize(
    ("tamper", "message"),
    [
        pytest.param(flip_a_byte, "model.safetensors is damaged", id="flipped byte"),
        pytest.param(add_pickle, "'weights.pkl' .* is refused", id="pickle"),
        pytest.param(link_outside, "'genes.txt' .* is not a regular file", id="symlink"),
        pytest.param(add_folder, "'more' .* is refused", id="folder"),
        pytest.param(drop_file, "genes.txt is missing", id="missing file"),
        pytest.param(add_unknown, "does not know labels.txt", id="file outside the manifest"),
        pytest.param(edit_manifest, "MANIFEST.json is damaged", id="manifest"),
    ],
)
def test_changed_artifacts_are_refused(
    uri: str, export: Path, cache: Path, tamper: Any, message: str
) -> None:
    ref = register_export(export, "tampered", uri=uri)
    tamper(artifacts(ref))
    with pytest.raises(ValueError, match=message):
        resolve_model(ref.uri, uri=uri, cache=cache)
    assert list((cache / "tampered").iterdir()) == []  # nothing was published


@pytest.mark.parametrize("name", ["../../evil.txt", "/tmp/evil.txt", "model.pt", ".hidden.txt"])
def test_manifest_cannot_name_other_places(uri: str, export: Path, cache: Path, name: str) -> None:
    ref = register_export(export, "climbing", uri=uri)
    text = json.dumps({"files": {name: {"bytes": 0, "sha256": "0"}}}).encode()
    (artifacts(ref) / MANIFEST).write_bytes(text)
    digest = hashlib.sha256(text).hexdigest()
    connect(uri).set_model_version_tag(ref.name, str(ref.version), DIGEST_TAG, digest)
    with pytest.raises(ValueError, match="is refused: an export is a flat folder"):
        resolve_model(ref.uri, uri=uri, cache=cache)


def test_listing_cannot_name_other_places(
    uri: str, export: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow.artifacts
    from mlflow.entities import FileInfo

    ref = register_export(export, "listing", uri=uri)
    listed = [FileInfo("../../evil.txt", False, 1)]
    monkeypatch.setattr(mlflow.artifacts, "list_artifacts", lambda **options: listed)
    with pytest.raises(ValueError, match=r"evil.txt' .* is refused"):
        resolve_model(ref.uri, uri=uri, cache=cache)


@pytest.mark.parametrize(
    ("tamper", "message"),
    [
        pytest.param(add_pickle, "'weights.pkl' .* pickle could run code", id="pickle"),
        pytest.param(link_outside, "'genes.txt' .* not a regular file", id="symlink"),
        pytest.param(add_folder, "'more' .* not a regular file", id="folder"),
        pytest.param(drop_file, "is no export: it lacks genes.txt", id="missing file"),
    ],
)
def test_only_exports_are_registered(uri: str, export: Path, tamper: Any, message: str) -> None:
    tamper(export)
    with pytest.raises(ValueError, match=message):
        register_export(export, "refused", uri=uri)


def test_messages_say_what_there_is(uri: str, export: Path) -> None:
    register_export(export, "annotator", uri=uri, alias="champion")
    wrong = {
        "models:/anotator@champion": "no model 'anotator' .* did you mean annotator.* there is: ",
        "models:/annotator@best": r"has no alias @best; it has: @champion \(version 1\)",
        "models:/annotator/7": "has no version 7; it has: 1",
        "models:/annotator": "write models:/name@alias or models:/name/version",
        "models:/../1": "write models:/name@alias or models:/name/version",
    }
    for reference, message in wrong.items():
        with pytest.raises(ValueError, match=message):
            resolve_model(reference, uri=uri)
    with pytest.raises(ValueError, match=r"the model name is '\.\./x'"):
        register_export(export, "../x", uri=uri)
    with pytest.raises(ValueError, match=r"Run with id=0+ not found"):
        register_export(export, "annotator", uri=uri, run_id="0" * 32)


def test_version_without_hashes_is_refused(uri: str) -> None:
    client = connect(uri)
    client.create_registered_model("foreign")
    client.create_model_version("foreign", "/somewhere")
    with pytest.raises(ValueError, match=r"has no tag manifest\.sha256"):
        resolve_model("models:/foreign/1", uri=uri)


def test_registry_is_more_patient_than_a_tracker(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("MLFLOW_HTTP_REQUEST_TIMEOUT", "MLFLOW_HTTP_REQUEST_MAX_RETRIES")
    monkeypatch.setenv(names[0], "10")  # what a tracker set in this process
    monkeypatch.setenv(names[1], "9")  # what the user set
    connect(uri)
    with registry._explained(uri):
        assert [os.environ[name] for name in names] == ["60", "9"]
    assert [os.environ[name] for name in names] == ["10", "9"]


def test_registry_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(ValueError, match=r"MLflow at http://127.0.0.1:9: it does not answer"):
        resolve_model("models:/x@y", uri="http://me:pw@127.0.0.1:9")
    with pytest.raises(ValueError, match="there is no registry at sqlite:"):
        list_models(f"sqlite:///{tmp_path}/mlflow.db")
    assert not (tmp_path / "mlflow.db").exists()


def test_run_named_in_the_export(uri: str, export: Path) -> None:
    assert provenance_run_id(export, uri=uri) is None
    with start_run(uri, "pretrain", "tiny", is_first=True) as run:
        pass
    for run_id, expected in ((run.run_id, run.run_id), ("0" * 32, None), ("odd", None)):
        (export / "config.json").write_text(json.dumps({"provenance": {"run_id": run_id}}))
        assert provenance_run_id(export, uri=uri) == expected


def test_default_cache() -> None:
    assert default_cache({"XDG_CACHE_HOME": "/c"}) == Path("/c/scbert/models")
    assert default_cache({}) == Path.home() / ".cache" / "scbert" / "models"


def test_launcher(
    uri: str,
    export: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    address = ["--tracking-uri", uri]
    target = tmp_path / "there" / "model"
    alias = ["--alias", "champion"]
    assert main(["register", str(export), "--name", "shell", *alias, *address]) == 0
    assert capsys.readouterr().out == "models:/shell/1\n"
    assert main(["list", *address]) == 0
    assert "models:/shell/1 @champion\n" in capsys.readouterr().out
    pull = ["pull", "models:/shell@champion", "--to", str(target), *address]
    assert main(pull) == 0
    assert contents(target) == contents(export)
    assert main(pull) == 2
    assert "exists; name a folder" in capsys.readouterr().err
