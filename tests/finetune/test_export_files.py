"""What a registered model may hold: everything else is refused by name, before it is loaded."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from finetune.export_files import (
    MANIFEST,
    MAX_FILES,
    MAX_HEADER_BYTES,
    check_contents,
    make_manifest,
    read_config,
    read_manifest,
    verify_export,
)
from finetune.serving_contract import mlmodel
from tests.support.entries import write_entry
from tests.support.malicious import (
    foreign_class,
    foreign_loader,
    header,
    loader,
    oversized_header,
    pickle_in_disguise,
)


@pytest.fixture
def entry(tmp_path: Path) -> Path:
    return write_entry(tmp_path / "entry", "weights")


def tensor(start: int, end: int) -> bytes:
    return json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [start, end]}}).encode()


def header_beyond_our_limit(folder: Path) -> None:
    header(folder, b" " * (MAX_HEADER_BYTES + 1))


def offsets_outside(folder: Path) -> None:
    header(folder, tensor(0, 4_000_000_000), data=b"1234")


def offsets_backwards(folder: Path) -> None:
    header(folder, tensor(4, 0), data=b"1234")


def header_too_deep(folder: Path) -> None:
    header(folder, b"[" * 100_000)


def foreign_format(folder: Path) -> None:
    (folder / "config.json").write_text('{"architectures": ["Evil"], "auto_map": {}}')


def list_config(folder: Path) -> None:
    (folder / "config.json").write_text("[1]")


def deep_config(folder: Path) -> None:
    (folder / "config.json").write_text("[" * 100_000)


def pickled_flavor(folder: Path) -> None:
    python = "python_function: {loader_module: finetune.pyfunc, python_model: model.json}"
    loader(folder, f"flavors: {{{python}}}")


def second_flavor(folder: Path) -> None:
    loader(folder, mlmodel().replace("flavors:", "flavors:\n  sklearn: {loader_module: x}", 1))


def yaml_that_constructs(folder: Path) -> None:
    loader(folder, "flavors: !!python/object/apply:os.system ['touch /tmp/owned']")


@pytest.mark.parametrize(
    ("tamper", "message"),
    [
        pytest.param(oversized_header, "would have 4,611,686,018,427,387,904", id="size"),
        pytest.param(header_beyond_our_limit, "are the most we read", id="limit"),
        pytest.param(pickle_in_disguise, "its header would have", id="pickle named safetensors"),
        pytest.param(offsets_outside, "its header points outside the file", id="outside"),
        pytest.param(offsets_backwards, "its header points outside the file", id="backwards"),
        pytest.param(header_too_deep, "its header is not that of safetensors", id="deep header"),
        pytest.param(foreign_class, "of the class 'os.system'; we load encoder and", id="class"),
        pytest.param(foreign_format, "does not say scbert-export/", id="format"),
        pytest.param(list_config, "does not say scbert-export/", id="list"),
        pytest.param(deep_config, "config.json cannot be read", id="deep config"),
        pytest.param(foreign_loader, r"a foreign class .*mlflow\.sklearn", id="loader"),
        pytest.param(pickled_flavor, "a foreign class", id="pickled python model"),
        pytest.param(second_flavor, "a foreign class", id="second flavor"),
        pytest.param(yaml_that_constructs, "no description of an MLflow model", id="yaml"),
    ],
)
def test_contents_are_refused_by_name(
    entry: Path, tamper: Callable[[Path], None], message: str
) -> None:
    check_contents(entry)
    tamper(entry)
    with pytest.raises(ValueError, match=message) as refused:
        make_manifest(entry)
    assert str(entry) in str(refused.value)


def test_what_we_write_is_accepted(entry: Path) -> None:
    loader(entry, mlmodel())
    manifest = make_manifest(entry)
    (entry / MANIFEST).write_bytes(manifest)
    verify_export(entry, hashlib.sha256(manifest).hexdigest())
    list_config(entry)
    with pytest.raises(ValueError, match="holds no settings by name"):
        read_config(entry)
    (entry / "config.json").unlink()
    with pytest.raises(ValueError, match=r"it lacks config\.json"):
        read_config(entry)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param(b"[]", "is no manifest", id="list"),
        pytest.param(
            b'{"files": {"a.txt": {"bytes": "x", "sha256": ""}}}', "no manifest", id="text"
        ),
        pytest.param(b"[" * 100_000, "is no manifest", id="deep"),
        pytest.param(b" " * 1_000_001, "larger than 1,000,000 bytes", id="large"),
        pytest.param(
            json.dumps(
                {"files": {f"{n}.txt": {"bytes": 0, "sha256": ""} for n in range(MAX_FILES + 1)}}
            ).encode(),
            "it names 201 files, 200 at most",
            id="many",
        ),
    ],
)
def test_manifests_are_read_with_care(tmp_path: Path, text: bytes, message: str) -> None:
    (tmp_path / MANIFEST).write_bytes(text)
    with pytest.raises(ValueError, match=message):
        read_manifest(tmp_path, hashlib.sha256(text).hexdigest())
