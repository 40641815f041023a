"""The model registry: what is registered comes back byte for byte, and nothing else comes back."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import threading
import traceback
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import requests

from finetune import registry
from finetune.export_files import MANIFEST, MODEL_CARD, size_and_hash
from finetune.registration import LINEAGE_TAG, provenance_run_id, register_export
from finetune.registry import ModelVersionRef, list_models, resolve_model, verify_model
from finetune.registry_client import DIGEST_TAG, explained
from finetune.registry_files import download
from pretrain.mlflow_client import connect
from tests.support.entries import write_entry
from tests.support.malicious import (
    foreign_class,
    foreign_loader,
    oversized_header,
    pickle_in_disguise,
)
from tests.support.mlflow_store import fresh_run, fresh_store


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One SQLite store for all tests of this module: creating it takes seconds."""
    return fresh_store(tmp_path_factory.mktemp("a store"))


@pytest.fixture
def export(tmp_path: Path) -> Path:
    """An export whose weights differ from test to test."""
    return write_entry(tmp_path / "export", str(tmp_path))


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def artifacts(ref: ModelVersionRef) -> Path:
    """Return the version's folder in the artifact store."""
    return Path(unquote(urlsplit(ref.source).path))


def contents(folder: Path) -> dict[str, bytes]:
    """Return what the export itself holds."""
    made = {MANIFEST, MODEL_CARD}
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in made}


def test_alias_and_version_give_back_what_was_registered(
    uri: str, export: Path, cache: Path
) -> None:
    ref = register_export(export, "round-trip", uri=uri, alias="champion", tags={"fold": "3"})
    assert (ref.uri, ref.aliases) == ("models:/round-trip/1", ("champion",))
    version = connect(uri).get_model_version("round-trip", "1")
    digest = hashlib.sha256((artifacts(ref) / MANIFEST).read_bytes()).hexdigest()
    assert version.tags == {"fold": "3", "kind": "encoder", DIGEST_TAG: digest}
    assert (version.description or "").startswith("# round-trip\n")

    by_alias = resolve_model("models:/round-trip@champion", uri=uri, cache=cache)
    by_version = resolve_model("models:/round-trip/1", uri=uri, cache=cache)
    assert by_alias.path == by_version.path == cache / digest
    assert contents(by_alias.path) == contents(export)
    assert (by_alias.path / MODEL_CARD).read_text() == version.description
    assert (by_alias.name, by_alias.version, by_alias.alias) == ("round-trip", 1, "champion")
    assert (by_version.alias, by_version.uri) == (None, "models:/round-trip/1")
    assert list((cache / "pulls").iterdir()) == []


def test_second_version_of_a_run_leaves_the_first_alone(
    uri: str, export: Path, cache: Path
) -> None:
    run_id = fresh_run(uri)
    options: dict[str, Any] = {"uri": uri, "alias": "champion", "run_id": run_id}
    first = register_export(export, "two", **options)
    before = contents(export)
    assert register_export(export, "two", **options) == first  # repeating adds nothing
    flip_a_byte(export)
    (export / "notes.md").write_text("better")
    second = register_export(export, "two", **options)

    assert second.uri == "models:/two/2"
    assert connect(uri).get_model_version("two", "2").run_id == run_id
    assert contents(resolve_model(first.uri, uri=uri, cache=cache).path) == before
    moved = resolve_model("models:/two@champion", uri=uri, cache=cache)
    assert contents(moved.path) == contents(export)
    listed = [ref for ref in list_models(uri) if ref.name == "two"]
    assert [(ref.version, ref.aliases) for ref in listed] == [(1, ()), (2, ("champion",))]


def test_a_pulled_model_can_be_registered_again(uri: str, export: Path, cache: Path) -> None:
    register_export(export, "origin", uri=uri, alias="champion")
    pulled = resolve_model("models:/origin@champion", uri=uri, cache=cache)
    lineage = {LINEAGE_TAG: "models:/origin@champion"}
    ref = register_export(pulled.path, "copy", uri=uri, tags=lineage)
    # An alias may move later: the tag keeps the version.
    assert connect(uri).get_model_version("copy", "1").tags[LINEAGE_TAG] == "models:/origin/1"
    assert contents(resolve_model(ref.uri, uri=uri, cache=cache).path) == contents(export)
    with pytest.raises(ValueError, match="origin has no version 9; it has: 1"):
        register_export(export, "copy", uri=uri, tags={LINEAGE_TAG: "models:/origin/9"})


def test_lineage_is_what_the_export_records(
    uri: str, export: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    register_export(export, "parent", uri=uri)
    for number, parent in enumerate(["models:/parent/1", "models:/elsewhere/4", "a/folder"]):
        child = write_entry(tmp_path / str(number), provenance={"pretrained": parent})
        ref = register_export(child, "child", uri=uri)
        tags = connect(uri).get_model_version("child", str(ref.version)).tags
        assert tags.get(LINEAGE_TAG) == (parent if number == 0 else None)
    assert caplog.text.count("is not in this registry") == 1  # a folder is no reference


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

    monkeypatch.setattr(registry, "download", no_download)
    assert resolve_model(ref.uri, uri=uri, cache=cache).path == path


def test_tasks_that_pull_at_once_all_get_the_model(
    uri: str, export: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ref = register_export(export, "crowd", uri=uri)
    downloads: list[Path] = []

    def counted(source: str, folder: Path, digest: str, address: str) -> None:
        downloads.append(folder)
        download(source, folder, digest, address)

    monkeypatch.setattr(registry, "download", counted)
    with ThreadPoolExecutor(16) as tasks:
        pulls = [tasks.submit(resolve_model, ref.uri, uri=uri, cache=cache) for _ in range(16)]
    assert [contents(pull.result().path) for pull in pulls] == [contents(export)] * 16
    assert len(downloads) == 1


def test_an_alias_that_moves_during_the_pull_changes_nothing(
    uri: str, export: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register_export(export, "moving", uri=uri, alias="champion")
    other = write_entry(tmp_path / "other", "other weights")

    def moved(source: str, folder: Path, digest: str, address: str) -> None:
        register_export(other, "moving", uri=uri, alias="champion")
        download(source, folder, digest, address)

    monkeypatch.setattr(registry, "download", moved)
    pulled = resolve_model("models:/moving@champion", uri=uri, cache=cache)
    assert pulled.version == 1
    assert contents(pulled.path) == contents(export)
    monkeypatch.setattr(registry, "download", download)
    again = resolve_model("models:/moving@champion", uri=uri, cache=cache)
    assert (again.version, contents(again.path)) == (2, contents(other))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        pytest.param(ConnectionResetError("reset"), "broke off, nothing kept", id="connection"),
        pytest.param(requests.ConnectionError("http://a:b@h"), r"try again \(http://h", id="http"),
        pytest.param(OSError(errno.ENOSPC, "full"), "the disk of .* is full", id="disk"),
    ],
)
def test_a_pull_that_breaks_off_leaves_nothing(
    uri: str,
    export: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: OSError,
    message: str,
) -> None:
    import mlflow.artifacts

    ref = register_export(export, "broken-off", uri=uri)
    whole = mlflow.artifacts.download_artifacts

    def half(artifact_uri: str, dst_path: str, tracking_uri: str) -> str:
        if artifact_uri.endswith(".safetensors"):
            (Path(dst_path) / "model.safetensors").write_bytes(b"ha")
            raise error
        return str(whole(artifact_uri=artifact_uri, dst_path=dst_path, tracking_uri=tracking_uri))

    with monkeypatch.context() as patched:
        patched.setattr(mlflow.artifacts, "download_artifacts", half)
        with pytest.raises(ValueError, match=message):
            resolve_model(ref.uri, uri=uri, cache=cache)
    assert {path.name for path in cache.iterdir()} == {"locks", "pulls"}
    assert list((cache / "pulls").iterdir()) == []
    assert contents(resolve_model(ref.uri, uri=uri, cache=cache).path) == contents(export)


def test_a_disk_too_small_is_found_before_the_download(
    uri: str, export: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ref = register_export(export, "small-disk", uri=uri)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=20))
    with pytest.raises(ValueError, match="is full; free some space, or set XDG_CACHE_HOME"):
        resolve_model(ref.uri, uri=uri, cache=cache)


def test_offline_takes_what_was_pulled(
    uri: str, export: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register_export(export, "offline", uri=uri, alias="champion")
    pulled = resolve_model("models:/offline@champion", uri=uri, cache=cache)
    monkeypatch.setattr(registry, "open_registry", lambda uri: pytest.fail("was asked"))
    again = resolve_model("models:/offline@champion", uri=uri, cache=cache, offline=True)
    assert again == pulled
    monkeypatch.setenv("SCBERT_OFFLINE", "1")
    assert resolve_model("models:/offline@champion", uri=uri, cache=cache) == pulled
    with pytest.raises(
        ValueError, match=r"models:/ofline@champion of .* did you mean models:/offline@champion\?"
    ):
        resolve_model("models:/ofline@champion", uri=uri, cache=cache)
    (pulled.path / "genes.txt").write_text("other")
    with pytest.raises(ValueError, match="pull it once without --offline"):
        resolve_model("models:/offline@champion", uri=uri, cache=cache)


def test_verify_reads_what_the_registry_holds(uri: str, export: Path, cache: Path) -> None:
    ref = register_export(export, "verified", uri=uri)
    assert verify_model(ref.uri, uri=uri) == 4  # the export's three and the card
    assert verify_model(export) == 3
    pulled = resolve_model(ref.uri, uri=uri, cache=cache).path
    assert verify_model(pulled) == 4
    flip_a_byte(artifacts(ref))
    assert resolve_model(ref.uri, uri=uri, cache=cache).path == pulled  # the cache is whole
    with pytest.raises(ValueError, match=r"model.safetensors is damaged"):
        verify_model(ref.uri, uri=uri)
    flip_a_byte(pulled)
    with pytest.raises(ValueError, match=r"model.safetensors is damaged"):
        verify_model(pulled)


def test_no_credentials_anywhere(
    uri: str,
    export: Path,
    cache: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    secret = "hunter2"
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    config = json.loads((export / "config.json").read_text())
    config["provenance"] = {"git_commit": f"https://me:{secret}@host/repository"}
    (export / "config.json").write_text(json.dumps(config))
    caplog.set_level("DEBUG")
    with pytest.raises(ValueError, match="it does not answer") as refused:
        resolve_model("models:/x@y", uri=f"http://me:{secret}@127.0.0.1:9", cache=cache)
    said = "".join(traceback.format_exception(refused.value)) + caplog.text
    assert secret not in said
    ref = register_export(export, "secret", uri=uri, alias="champion")
    version = connect(uri).get_model_version("secret", "1")
    assert version.tags["git_commit"] == "https://host/repository"
    texts = [ref.source, str(version.description), *version.tags.values(), caplog.text]
    pulled = resolve_model("models:/secret@champion", uri=uri, cache=cache)
    texts += [(pulled.path / MODEL_CARD).read_text()]
    texts += [path.read_text() for path in (cache / "references").iterdir()]
    assert [text for text in texts if secret in text] == []


def flip_a_byte(folder: Path) -> None:
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
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
    assert {path.name for path in cache.iterdir()} == {"locks", "pulls"}  # nothing was published


@pytest.mark.parametrize("name", ["../../evil.txt", "/tmp/evil.txt", "model.pt", ".hidden.txt"])
def test_manifest_cannot_name_other_places(uri: str, export: Path, cache: Path, name: str) -> None:
    ref = register_export(export, "climbing", uri=uri)
    text = json.dumps({"files": {name: {"bytes": 0, "sha256": "0"}}}).encode()
    (artifacts(ref) / MANIFEST).write_bytes(text)
    digest = hashlib.sha256(text).hexdigest()
    connect(uri).set_model_version_tag(ref.name, str(ref.version), DIGEST_TAG, digest)
    with pytest.raises(ValueError, match="is refused: an export is a flat folder"):
        resolve_model(ref.uri, uri=uri, cache=cache)


@pytest.mark.parametrize(
    ("tamper", "message"),
    [
        pytest.param(oversized_header, "model.safetensors is refused: its header would", id="size"),
        pytest.param(pickle_in_disguise, "model.safetensors is refused: its header", id="pickle"),
        pytest.param(foreign_class, "config.json is refused: .* class 'os.system'", id="class"),
        pytest.param(foreign_loader, "MLmodel is refused: .* a foreign class", id="loader"),
    ],
)
def test_hashes_that_fit_make_no_model(
    uri: str, export: Path, cache: Path, tamper: Any, message: str
) -> None:
    """Who may write to the registry can give its own hashes, too."""
    ref = register_export(export, "fitting", uri=uri)
    folder = artifacts(ref)
    tamper(folder)
    names = {path.name for path in folder.iterdir()} - {MANIFEST}
    text = json.dumps({"files": {name: size_and_hash(folder / name) for name in names}}).encode()
    (folder / MANIFEST).write_bytes(text)
    digest = hashlib.sha256(text).hexdigest()
    connect(uri).set_model_version_tag(ref.name, str(ref.version), DIGEST_TAG, digest)
    with pytest.raises(ValueError, match=message):
        resolve_model(ref.uri, uri=uri, cache=cache)
    with pytest.raises(ValueError, match=message):
        verify_model(ref.uri, uri=uri)
    assert {path.name for path in cache.iterdir()} == {"locks", "pulls"}


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
    with explained(uri):
        assert [os.environ[name] for name in names] == ["60", "9"]
    assert [os.environ[name] for name in names] == ["10", "9"]


def test_registry_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    sentence = r"MLflow at http://127.0.0.1:9: it does not answer; [^()]* \(Connection refused\)$"
    with pytest.raises(ValueError, match=sentence):
        resolve_model("models:/x@y", uri="http://me:pw@127.0.0.1:9")
    with pytest.raises(ValueError, match="there is no registry at sqlite:"):
        list_models(f"sqlite:///{tmp_path}/mlflow.db")
    assert not (tmp_path / "mlflow.db").exists()


@pytest.mark.parametrize(
    ("address", "sentence"),
    [
        pytest.param(
            "sqlite:///{folder}/torn.db",
            r"torn\.db: the database does not open \(file is not a database\); is it",
            id="no database",
        ),
        pytest.param(
            "mysql+nodriver://me:hunter2@host/runs",
            r"MLflow at mysql\+nodriver://host/runs: .*nodriver",
            id="no driver",
        ),
        pytest.param(
            "postgresql+psycopg2://me:hunter2@127.0.0.1:9/runs",
            r"postgresql\+psycopg2://127.0.0.1:9/runs: the database does not open \(connection to",
            id="nobody there",
        ),
    ],
)
def test_database_that_does_not_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str, sentence: str
) -> None:
    import mlflow.store.db.utils

    monkeypatch.setattr(mlflow.store.db.utils, "MAX_RETRY_COUNT", 0)  # it waits for minutes
    (tmp_path / "torn.db").write_bytes(b"no database" * 100)
    with pytest.raises(ValueError, match=sentence) as refused:
        list_models(address.format(folder=tmp_path))
    assert "hunter2" not in "".join(traceback.format_exception(refused.value))
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("status", "cure"),
    [(401, "set MLFLOW_TRACKING_USERNAME"), (403, "which hosts"), (418, "is MLFLOW_TRACKING_URI")],
)
def test_registry_that_refuses(status: int, cure: str) -> None:
    class Refuse(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *words: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Refuse) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            with pytest.raises(ValueError, match=f"it refuses with HTTP status {status}; .*{cure}"):
                resolve_model("models:/x@y", uri=f"http://127.0.0.1:{server.server_port}")
        finally:
            server.shutdown()
            thread.join()


def test_run_named_in_the_export(uri: str, export: Path) -> None:
    assert provenance_run_id(export, uri=uri) is None
    mine = fresh_run(uri)
    for run_id, expected in ((mine, mine), ("0" * 32, None), ("odd", None)):
        (export / "config.json").write_text(json.dumps({"provenance": {"run_id": run_id}}))
        assert provenance_run_id(export, uri=uri) == expected
