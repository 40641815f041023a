"""A local S3-compatible server, with moto."""

import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from moto.server import ThreadedMotoServer


@contextmanager
def serve_s3(bucket: str) -> Iterator[str]:
    """Run a server with one bucket; yield its address."""
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        endpoint = f"http://{host}:{port}"
        put(f"{endpoint}/{bucket}", b"")
        yield endpoint
    finally:
        server.stop()


def s3_environment(endpoint: str) -> dict[str, str]:
    """What a user sets to reach it."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
    }


def upload(files: Mapping[str, bytes], address: str) -> None:
    """Put files at an address of the server."""
    for name, content in files.items():
        put(f"{address}/{name}", content)


def put(address: str, content: bytes) -> None:
    kind = {"Content-Type": "application/octet-stream"}
    request = urllib.request.Request(address, data=content, headers=kind, method="PUT")
    with urllib.request.urlopen(request) as answer:
        assert answer.status == 200
