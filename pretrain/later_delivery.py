"""Runs that are kept in files first and sent to MLflow later, by somebody else.

Hundreds of tasks of a Slurm array must not write to one SQLite file at once. Inside ``put_off`` a
run only fills its outbox (``pretrain.outbox``); ``deliver`` empties it later, alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Final

from pretrain.delivery import Delivery
from pretrain.outbox import Outbox

OUTBOX: Final = "mlflow_outbox.jsonl"
"""Name of the outbox beside a run's metrics."""

_is_put_off: ContextVar[bool] = ContextVar("is_put_off", default=False)


@contextlib.contextmanager
def put_off() -> Iterator[None]:
    """Let runs that are opened inside fill their outboxes only; a second start continues them."""
    token = _is_put_off.set(True)
    try:
        yield
    finally:
        _is_put_off.reset(token)


def is_put_off() -> bool:
    """Whether runs that are opened now wait for somebody who delivers them."""
    return _is_put_off.get()


class NoDelivery:
    """In the place of a `Delivery`: leaves the outbox as it is."""

    def __init__(self, outbox: Outbox) -> None:
        self._outbox = outbox

    def run_id(self, token: str, wait_seconds: float = 0.0) -> str | None:
        """Nobody has opened the run."""
        return None

    def wake(self) -> None:
        """Nobody waits for a record."""

    def close(self, patience_seconds: float) -> None:
        """Close the file."""
        self._outbox.close()


def deliver(folder: Path, connect: Callable[[], Any], patience_seconds: float) -> str | None:
    """Send what a run's folder still holds for MLflow.

    Args:
        folder: Where the run's metrics and outbox are.
        connect: Opens a client.
        patience_seconds: How long a silent server is waited for.

    Returns:
        The run's id once all was taken; none if something still waits, or there is no run.
    """
    if not (folder / OUTBOX).is_file():
        return None
    outbox = Outbox(folder / OUTBOX)
    Delivery(outbox, connect).close(patience_seconds)
    return outbox.run_id if not outbox.num_waiting else None
