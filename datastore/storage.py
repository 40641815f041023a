"""Where a store's bytes come from: a local folder, or a server (`s3://`, `gs://`, `http(s)://`).

Both sides answer the same few questions; nothing else in the package knows which one it has. A
server is asked again when it drops a connection or is busy, with growing pauses; what stays
unreadable becomes one error that names the address.

Credentials come from the environment, as the servers' own tools take them (`AWS_ACCESS_KEY_ID` and
so on, `GOOGLE_APPLICATION_CREDENTIALS`). `AWS_ENDPOINT_URL` names an S3-compatible server.
"""

import hashlib
import json
import os
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, Protocol

import tensorstore as ts

RETRIES: dict[str, Any] = {"max_retries": 8, "initial_delay": "500ms", "max_delay": "16s"}
"""How often a server is asked again, and after which pauses: about a minute in all."""
SILENCE_SECONDS: Final = "60"
"""A transfer that stands still for so long counts as dropped."""
_DAMAGE: Final = ("DATA_LOSS", "NOT_FOUND", "FAILED_PRECONDITION", "OUT_OF_RANGE")
"""Kinds of TensorStore's errors that speak of the bytes, and not of the way to them."""
_LOCAL_FILE_SYSTEMS: Final = frozenset(
    {"btrfs", "erofs", "ext2", "ext3", "ext4", "f2fs", "overlay", "ramfs", "tmpfs", "xfs", "zfs"}
)
_PIECE: Final = 8 * 2**20
_ADDRESS: Final = re.compile(r"(s3|gs|https?)://([^/?#]+)/?([^?#]*)")
_ANY_ADDRESS: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_RETRY_SETTING: Final = {
    "s3": "s3_request_retries",
    "gcs": "gcs_request_retries",
    "http": "http_request_retries",
}


class StoreFormatError(ValueError):
    """A folder is not a whole cell store of a version that we read."""


class Storage(Protocol):
    """A folder of files that are read, never written. Equal ones are interchangeable."""

    def __hash__(self) -> int: ...

    @property
    def url(self) -> str:
        """The address, as messages show it."""

    @property
    def is_remote(self) -> bool:
        """Whether reading may cost a network's time."""

    def read(self, name: str) -> bytes:
        """Read a file.

        Raises:
            FileNotFoundError: If there is none.
            OSError: If it cannot be read.
        """

    def size_problem(self, name: str, size: int) -> str | None:
        """Say what is wrong with a file that is missing or not `size` bytes long."""

    def digest(self, name: str, size: int) -> str:
        """SHA-256 of a file of `size` bytes, in hexadecimal digits, in bounded memory."""

    def names(self) -> list[str] | None:
        """Every file there is, relative to the folder; none where a server does not tell."""

    def kvstore(self, name: str) -> dict[str, Any]:
        """TensorStore's description of a folder in it."""

    def failure(self, name: str, error: Exception) -> Exception:
        """Make the error to raise of what TensorStore raised when it read `name`."""


@dataclass(frozen=True)
class LocalFolder:
    """A folder of this machine; see `Storage`."""

    path: Path
    is_remote: bool = False

    @property
    def url(self) -> str:  # noqa: D102
        return str(self.path)

    def read(self, name: str) -> bytes:  # noqa: D102
        return (self.path / name).read_bytes()

    def size_problem(self, name: str, size: int) -> str | None:  # noqa: D102
        try:
            found = (self.path / name).stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return "is missing"
        return None if found == size else f"has {found} bytes instead of {size}"

    def digest(self, name: str, size: int) -> str:  # noqa: D102
        with (self.path / name).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def names(self) -> list[str]:  # noqa: D102
        files = (file for file in self.path.rglob("*") if not file.is_dir())
        return [file.relative_to(self.path).as_posix() for file in files]

    def kvstore(self, name: str) -> dict[str, Any]:  # noqa: D102
        return {"driver": "file", "path": f"{(self.path / name).resolve()}/"}

    def failure(self, name: str, error: Exception) -> Exception:  # noqa: D102
        return _damaged(str(self.path / name), error) or OSError(
            f"{self.path / name} cannot be read ({_first_line(error)}); check the disk"
        )


@dataclass(frozen=True)
class RemoteFolder:
    """A folder of a server; see `Storage`."""

    url: str
    is_remote: bool = True

    def read(self, name: str) -> bytes:  # noqa: D102
        return self._read(name)

    def size_problem(self, name: str, size: int) -> str | None:  # noqa: D102
        if not size:
            try:
                return "is not empty" if self._read(name) else None
            except FileNotFoundError:
                return "is missing"
        try:  # asked for the last byte and all behind it, a server tells both short and long files
            found = len(self._read(name, slice(size - 1, None)))
        except FileNotFoundError:
            return "is missing"
        except StoreFormatError:  # what was asked for is behind the end
            return f"has less than {size} bytes"
        return None if found == 1 else f"has {size - 1 + found} bytes instead of {size}"

    def digest(self, name: str, size: int) -> str:  # noqa: D102
        digest = hashlib.sha256()
        for start in range(0, size, _PIECE):
            digest.update(self._read(name, slice(start, min(start + _PIECE, size))))
        return digest.hexdigest()

    def names(self) -> list[str] | None:  # noqa: D102
        if self.kvstore("")["driver"] == "http":
            return None
        try:
            keys = _open(json.dumps(self.kvstore(""))).list().result()
        except ValueError as error:
            raise self.failure("", error) from error
        return [key.decode() for key in keys]

    def kvstore(self, name: str) -> dict[str, Any]:  # noqa: D102
        folder = f"{name}/" if name else ""
        return _remote_kvstore(self.url, folder)

    def failure(self, name: str, error: Exception) -> Exception:  # noqa: D102
        cause, where = _first_line(error), f"{self.url}/{name}".rstrip("/")
        if "was ignored by server" in cause:
            return ConnectionError(
                f"{where}: the server ignores byte ranges, which reading cells needs; serve the "
                "store with one that honours them"
            )
        if cause.startswith(("PERMISSION_DENIED", "UNAUTHENTICATED")):
            return PermissionError(
                f"{where}: the server refuses to show it ({cause}); check the credentials in the "
                "environment"
            )
        return _damaged(where, error) or ConnectionError(
            f"{where} could not be read to its end ({cause}); check the network and the address, "
            "then start again"
        )

    def _read(self, name: str, part: slice | None = None) -> bytes:
        folder = _open(json.dumps(self.kvstore("")))
        try:
            answer = folder.read(name, byte_range=part).result()
        except ValueError as error:
            raise self.failure(name, error) from error
        if answer.state != "value":
            raise FileNotFoundError(f"there is no {self.url}/{name}")
        value: bytes = answer.value
        return value


def open_storage(place: str | Path) -> Storage:
    """Say where the bytes of a folder come from; does not look whether it is there.

    Raises:
        ValueError: If it is an address that we do not read.
    """
    text = str(place)
    if isinstance(place, Path) or not _ANY_ADDRESS.match(text):
        return LocalFolder(Path(place))
    if text.startswith("file://"):
        return LocalFolder(Path(text.removeprefix("file://")))
    if not _ADDRESS.fullmatch(text):
        raise ValueError(
            f"{text} is no address of a store; give a folder, s3://bucket/path, gs://bucket/path "
            "or http(s)://host/path"
        )
    return RemoteFolder(text.rstrip("/"))


def _remote_kvstore(url: str, folder: str) -> dict[str, Any]:
    match = _ADDRESS.fullmatch(url)
    assert match is not None  # open_storage has looked
    scheme, place, path = match.groups()
    path = "/".join(piece for piece in (path, folder) if piece)
    path = path if not path or path.endswith("/") else f"{path}/"
    # TensorStore reads this one from the environment only, when it first transfers something.
    os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS", SILENCE_SECONDS)
    os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES", "1")
    os.environ.setdefault("TENSORSTORE_CURL_CONNECT_TIMEOUT_SECONDS", "20")
    kvstore: dict[str, Any]
    if scheme == "s3":
        kvstore = {"driver": "s3", "bucket": place, "path": path, **_s3_settings()}
    elif scheme == "gs":
        kvstore = {"driver": "gcs", "bucket": place, "path": path}
    else:
        kvstore = {"driver": "http", "base_url": f"{scheme}://{place}/{path}"}
    return {**kvstore, _RETRY_SETTING[kvstore["driver"]]: RETRIES}


def _s3_settings() -> dict[str, Any]:
    """What the environment says of S3, where TensorStore does not look for it by itself."""
    settings: dict[str, Any] = {}
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if endpoint:
        settings |= {"endpoint": endpoint.rstrip("/"), "aws_region": region or "us-east-1"}
    elif region:
        settings["aws_region"] = region
    if "AWS_ACCESS_KEY_ID" in os.environ:
        settings["aws_credentials"] = {"type": "environment"}
    return settings


@lru_cache(maxsize=8)
def _open(kvstore: str) -> Any:
    return ts.KvStore.open(json.loads(kvstore)).result()


def _damaged(where: str, error: Exception) -> StoreFormatError | None:
    """Say that a file is damaged, if that is what TensorStore says."""
    if not str(error).startswith(_DAMAGE):
        return None
    return StoreFormatError(
        f"{where} is damaged: {_first_line(error)}; copy the store again or rebuild it"
    )


def _first_line(error: Exception) -> str:
    return " ".join((str(error).splitlines() or [type(error).__name__])[0].split())[:300]


def is_on_local_disk(storage: Storage, mounts: Path = Path("/proc/self/mounts")) -> bool:
    """Tell whether a store lies on a file system of this machine, as far as the machine says.

    Args:
        storage: Where the store is.
        mounts: The kernel's table of mounts; without one (macOS) nothing counts as local.
    """
    if not isinstance(storage, LocalFolder) or not mounts.is_file():
        return False
    folder = storage.path.resolve()
    best, kind = -1, ""
    for line in mounts.read_text(encoding="utf-8", errors="replace").splitlines():
        _, point, found, *_ = line.split(" ")
        mounted = Path(point.replace("\\040", " "))
        # Of equal points the later one lies on top.
        if folder.is_relative_to(mounted) and len(mounted.parts) >= best:
            best, kind = len(mounted.parts), found
    return kind in _LOCAL_FILE_SYSTEMS
