"""Stores on servers: the same cells as from the disk, whatever the network does, or one error."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from datastore import storage
from datastore.arenas import CellBlock
from datastore.reader import CellReader
from datastore.storage import LocalFolder, RemoteFolder, is_on_local_disk, open_storage
from datastore.store import CellStore, StoreFormatError, open_store
from datastore.store_writing import ArraySizes
from datastore.verification import check_complete, verify_store
from tests.support.cells import file_bytes, random_counts
from tests.support.http_server import Fault, FolderServer, serve_folder
from tests.support.s3_server import s3_environment, serve_s3, upload
from tests.support.stores import write_small_store

ROOT = Path(__file__).resolve().parents[2]
ALL = np.arange(70)
REAL_RETRIES = storage.RETRIES["max_retries"]


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses = {"max_retries": 4, "initial_delay": "2ms", "max_delay": "20ms"}
    monkeypatch.setattr(storage, "RETRIES", pauses)


@pytest.fixture
def server(store: CellStore) -> Iterator[FolderServer]:
    with serve_folder(store.path.parent) as server:
        yield server


@pytest.fixture(scope="module")
def endpoint(store: CellStore) -> Iterator[str]:
    with serve_s3("cells") as endpoint:
        upload(file_bytes(store.path), f"{endpoint}/cells/deep/down/{store.path.name}")
        yield endpoint


@pytest.fixture(params=["s3", "gs", "http"])
def address(
    request: pytest.FixtureRequest,
    store: CellStore,
    endpoint: str,
    server: FolderServer,
    monkeypatch: pytest.MonkeyPatch,
) -> str:
    """The store of the session, on a server of each kind."""
    if request.param == "s3":
        for name, value in s3_environment(endpoint).items():
            monkeypatch.setenv(name, value)
        return f"s3://cells/deep/down/{store.path.name}"
    if request.param == "gs":
        monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", server.url)
        monkeypatch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "token")
        return f"gs://cells/{store.path.name}"
    return f"{server.url}/{store.path.name}"


def assert_same_cells(found: CellBlock, expected: CellBlock) -> None:
    for name in ("positions", "indptr", "genes", "counts"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))


# --- addresses ---


@pytest.mark.parametrize(
    ("place", "kvstore"),
    [
        pytest.param(
            "s3://bucket/a/b.zarr",
            {"driver": "s3", "bucket": "bucket", "path": "a/b.zarr/inside/"},
            id="s3",
        ),
        pytest.param(
            "s3://bucket", {"driver": "s3", "bucket": "bucket", "path": "inside/"}, id="root"
        ),
        pytest.param(
            "gs://bucket/b.zarr/",
            {"driver": "gcs", "bucket": "bucket", "path": "b.zarr/inside/"},
            id="gs",
        ),
        pytest.param(
            "https://host:81/b.zarr",
            {"driver": "http", "base_url": "https://host:81/b.zarr/inside/"},
            id="https",
        ),
    ],
)
def test_addresses(place: str, kvstore: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ACCESS_KEY_ID", "AWS_REGION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("AWS_DEFAULT_REGION", raising=False)
    spec = open_storage(place).kvstore("inside")
    assert {name: value for name, value in spec.items() if "retries" not in name} == kvstore
    assert [value for name, value in spec.items() if "retries" in name] == [storage.RETRIES]


def test_folders_are_no_addresses(tmp_path: Path) -> None:
    assert open_storage(tmp_path) == LocalFolder(tmp_path)
    assert open_storage("cells.zarr") == LocalFolder(Path("cells.zarr"))
    assert open_storage("file:///data/cells.zarr") == LocalFolder(Path("/data/cells.zarr"))
    assert open_storage("s3://b/c/") == RemoteFolder("s3://b/c") == open_storage("s3://b/c")


@pytest.mark.parametrize("place", ["ftp://host/x", "s3://", "http://host/x?key=1", "az://b/x"])
def test_other_addresses_are_refused(place: str) -> None:
    with pytest.raises(ValueError, match=r"is no address of a store; give a folder, s3://"):
        open_store(place)


def test_the_environment_speaks_of_s3(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://other:9000")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://minio:9000/")
    monkeypatch.setenv("AWS_REGION", "eu-west-1")
    spec = open_storage("s3://bucket/x").kvstore("")
    assert (spec["endpoint"], spec["aws_region"]) == ("http://minio:9000", "eu-west-1")


# --- reading ---


def test_cells_from_a_server_are_those_of_the_disk(address: str, store: CellStore) -> None:
    remote = open_store(address)
    assert (remote.header, remote.panel, remote.url) == (store.header, store.panel, address)
    check_complete(remote)
    local = CellReader(store)
    reader = CellReader(remote)
    rng = np.random.default_rng(0)
    for positions in (ALL, rng.permutation(70), np.array([69, 0, 0])):
        assert_same_cells(reader.read(positions), local.read(positions))
    name = store.header.sources[0]["name"]
    np.testing.assert_array_equal(remote.measured(name), store.measured(name))
    assert verify_store(address) == []
    with pytest.raises(ValueError, match="is no folder of this machine"):
        _ = remote.path


def test_opening_reads_little(server: FolderServer, store: CellStore) -> None:
    remote = open_store(f"{server.url}/{store.path.name}")
    assert [path.rpartition("/")[2] for path in server.requests] == ["manifest.json", "genes.txt"]
    server.requests.clear()
    CellReader(remote).read(np.array([3]))
    metadata = [path for path in server.requests if path.endswith(".json")]
    assert len(metadata) == len(set(metadata)) == 4  # the record and three arrays, once each


def test_verify_tells_what_became_of_remote_files(
    store: CellStore, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3_environment(endpoint).items():
        monkeypatch.setenv(name, value)
    address, files = "s3://cells/spoiled", file_bytes(store.path)
    data, indices, indptr = (f"dataset_1/X/{name}/c/0" for name in ("data", "indices", "indptr"))
    obs = "dataset_0/obs/_index/c/0"
    spoiled = files | {
        indices: files[indices][:-1],
        indptr: files[indptr] + b"x",
        obs: bytes([files[obs][0] ^ 1]) + files[obs][1:],
        "dataset_9/X/data/c/0": b"stray",
    }
    del spoiled[data]
    upload(spoiled, f"{endpoint}/cells/spoiled")
    found = {finding.name: (finding.kind, finding.problem) for finding in verify_store(address)}
    size = {name: len(content) for name, content in files.items()}
    assert found == {
        data: ("missing", "is missing"),
        indices: ("size", f"has less than {size[indices]} bytes"),
        indptr: ("size", f"has {size[indptr] + 1} bytes instead of {size[indptr]}"),
        obs: ("altered", "has other content than was written"),
        "dataset_9/X/data/c/0": ("stray", "is not part of the store"),
    }
    with pytest.raises(StoreFormatError, match=r"s3://cells/spoiled: dataset_1/X/"):
        check_complete(open_store(address))
    with pytest.raises(StoreFormatError, match=r"s3://cells/spoiled.*(missing|damaged)"):
        CellReader(open_store(address)).read(ALL)


def test_a_disk_that_fails_is_not_a_damaged_store(store: CellStore) -> None:
    refused = store.storage.failure("dataset_0/X/data", ValueError("PERMISSION_DENIED: no"))
    assert not isinstance(refused, StoreFormatError)
    assert f"{store.path}/dataset_0/X/data cannot be read" in str(refused)


# --- what networks do ---


def random_faults(seed: int, share: float, kinds: list[Fault]) -> Callable[[str], Fault]:
    rng, lock = np.random.default_rng(seed), threading.Lock()

    def fault(path: str) -> Fault:
        with lock:  # requests come from several threads
            return kinds[rng.integers(len(kinds))] if rng.random() < share else ""

    return fault


@pytest.mark.parametrize("seed", range(3))
def test_a_bad_network_costs_time_only(
    server: FolderServer, store: CellStore, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As many retries as there really are: of a hundred requests, one in six runs would have four
    # faults one after another.
    monkeypatch.setitem(storage.RETRIES, "max_retries", REAL_RETRIES)
    server.fault = random_faults(seed, 0.2, ["503", "drop", "cut"])
    remote = open_store(f"{server.url}/{store.path.name}")
    check_complete(remote)
    assert_same_cells(CellReader(remote).read(ALL), CellReader(store).read(ALL))
    assert verify_store(remote.url) == []
    assert set(server.faults) == {"503", "drop", "cut"}


@pytest.mark.parametrize("kind", ["short", "garble"])
def test_a_lying_network_never_changes_a_cell(
    server: FolderServer, store: CellStore, kind: Fault
) -> None:
    expected = CellReader(store).read(ALL)
    remote = open_store(f"{server.url}/{store.path.name}")
    refused = right = 0
    for seed in range(40):
        server.fault = random_faults(seed, 0.03, [kind])
        reader = CellReader(remote)
        try:
            found = reader.read(ALL)
        except StoreFormatError:
            refused += 1
        else:
            right += 1
            assert_same_cells(found, expected)
    assert min(refused, right) >= 5  # both were seen


@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [
        pytest.param("503", ConnectionError, "Service Unavailable.*check the network", id="busy"),
        pytest.param("drop", ConnectionError, "check the network", id="closed at once"),
        pytest.param("cut", ConnectionError, "partial file.*check the network", id="cut short"),
        pytest.param("403", PermissionError, "check the credentials", id="forbidden"),
        pytest.param("400", ConnectionError, "Bad Request.*check the network", id="refused"),
        pytest.param("404", StoreFormatError, "copy the store again", id="lost"),
        pytest.param("short", StoreFormatError, "copy the store again", id="shorter"),
        pytest.param("garble", StoreFormatError, "copy the store again", id="a flipped bit"),
    ],
)
def test_a_broken_network_is_one_sentence(
    server: FolderServer,
    store: CellStore,
    fault: Fault,
    error: type[Exception],
    message: str,
) -> None:
    remote = open_store(f"{server.url}/{store.path.name}")
    reader = CellReader(remote)
    reader.read(np.array([0]))
    server.fault = lambda path: fault if "/c/" in path else ""
    with pytest.raises(error, match=message) as refusal:
        reader.read(np.array([1]))
    assert str(refusal.value).startswith(f"{server.url}/{store.path.name}")
    assert "\n" not in str(refusal.value)


def test_a_server_without_byte_ranges_is_named(tmp_path: Path) -> None:
    sizes = ArraySizes(cells_per_chunk=64, cells_per_shard=256)  # several chunks in a shard
    small = write_small_store(tmp_path / "s.zarr", random_counts(2, 300, 40), sizes)
    with serve_folder(tmp_path) as server:
        address = f"{server.url}/{small.path.name}"
        some = CellReader(open_store(address)).read(np.array([0]))
        assert_same_cells(some, CellReader(small).read(np.array([0])))
        server.fault = lambda path: "no ranges"  # as `python -m http.server` does
        remote = open_store(address)
        for look in (
            lambda: CellReader(remote).read(np.array([0])),
            lambda: check_complete(remote),
            lambda: verify_store(address),
        ):
            with pytest.raises(ConnectionError, match=f"{address}.*ignores byte ranges"):
                look()


def test_a_server_that_is_not_there_is_named(
    server: FolderServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StoreFormatError, match=r"/absent is not a whole cell store"):
        open_store(f"{server.url}/absent")
    for name, value in s3_environment("http://127.0.0.1:9").items():
        monkeypatch.setenv(name, value)
    for address in ("http://127.0.0.1:9/s.zarr", "s3://bucket/s.zarr"):
        with pytest.raises(ConnectionError, match=f"{address}/manifest.json could not be read"):
            open_store(address)


@pytest.mark.slow
def test_a_server_that_falls_silent_counts_as_gone(store: CellStore, server: FolderServer) -> None:
    server.fault = lambda path: "stall" if "/X/data/c/" in path else ""
    program = (
        "import sys, numpy as np\n"
        "from datastore import storage, store, reader\n"
        "storage.RETRIES = {'max_retries': 0, 'initial_delay': '1ms', 'max_delay': '1ms'}\n"
        "storage.SILENCE_SECONDS = '1'\n"
        "reader.CellReader(store.open_store(sys.argv[1])).read(np.arange(70))\n"
    )
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", program, f"{server.url}/{store.path.name}"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if not k.startswith("TENSORSTORE_")},
    )
    assert time.perf_counter() - started < 15.0  # the server is silent for 20 seconds
    assert "ConnectionError" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("folder", "local"),
    [
        ("/data/cells.zarr", True),
        ("/data/lustre/cells.zarr", False),
        ("/data/my disk/cells.zarr", True),
        ("/home/me/cells.zarr", False),
        ("/elsewhere/cells.zarr", True),
    ],
)
def test_only_file_systems_of_this_machine_count_as_local(
    folder: str, local: bool, tmp_path: Path
) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(
        "overlay / overlay rw 0 0\n/dev/sdb1 /data xfs rw 0 0\nmgs:/x /data/lustre lustre rw 0 0\n"
        "/dev/sdc1 /data/my\\040disk ext4 rw 0 0\n/dev/sdd1 /home ext4 rw 0 0\n"
        "server:/home /home nfs4 rw 0 0\n"
    )
    assert is_on_local_disk(LocalFolder(Path(folder)), mounts) is local
    assert not is_on_local_disk(LocalFolder(Path(folder)), tmp_path / "no table")
