"""Deliver the records of an outbox to MLflow, in order, in a thread that nobody waits for.

When the server does not answer, the thread tries again with growing pauses. A delivery that was cut
off is repeated: MLflow keeps one copy of a metric with the same name, value, time and step, and the
other records set what is set already. A record that the server refuses for good is dropped with a
warning, so that it does not hold up those behind it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from pretrain.mlflow_client import why_no_answer, without_credentials
from pretrain.mlflow_records import MAX_METRICS_PER_BATCH, SENDERS, open_run, send_metrics
from pretrain.outbox import Entry, Outbox

logger = logging.getLogger(__name__)

FIRST_PAUSE_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 60.0

REFUSED_FOR_GOOD = {
    "BAD_REQUEST",
    "INVALID_PARAMETER_VALUE",
    "MALFORMED_REQUEST",
    "RESOURCE_ALREADY_EXISTS",
    "RESOURCE_DOES_NOT_EXIST",
}
"""MLflow's error codes that trying again does not cure."""


class Delivery:
    """Empties an outbox; opened runs are told by the token of their record."""

    def __init__(self, outbox: Outbox, connect: Callable[[], Any]) -> None:
        self._outbox = outbox
        self._connect = connect
        self._changed = threading.Condition()
        self._closing = self._abandoned = False
        self._failing = False
        self._failures = 0
        self._uploading = False
        self._limit = MAX_METRICS_PER_BATCH
        self._last_progress = time.monotonic()
        self._refusals: dict[str, ValueError] = {}
        self._run_ids: dict[str, str] = {}
        self._client: Any = None
        self._thread = threading.Thread(target=self._deliver, name="mlflow", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """Say that the outbox has a new record."""
        with self._changed:
            self._changed.notify_all()

    def run_id(self, token: str, wait_seconds: float = 0.0) -> str | None:
        """Id of the run that a record opened; none while the server has not taken it.

        Args:
            token: The record's.
            wait_seconds: Wait so long for a server that answers; not for one that failed.

        Raises:
            ValueError: If the run was refused for a reason that a person has to cure.
        """

        def known() -> bool:
            return self._failing or token in self._run_ids or token in self._refusals

        with self._changed:
            self._changed.wait_for(known, wait_seconds)
            if token in self._refusals:
                raise self._refusals.pop(token)
            return self._run_ids.get(token)

    def close(self, patience_seconds: float) -> None:
        """Wait until all is delivered, unless the server fails or is silent for so long."""
        with self._changed:
            self._closing = True
            self._last_progress = time.monotonic()
            former = self._failures
            self._changed.notify_all()  # a pause ends: one more attempt
            while self._thread.is_alive() and self._failures == former:
                quiet = time.monotonic() - self._last_progress
                if quiet > patience_seconds and not self._uploading:
                    break
                self._changed.wait(0.05)
            self._abandoned = True
            self._changed.notify_all()
        self._thread.join(0.5)  # it may sit in a request; then it ends with the process

    def _deliver(self) -> None:
        pause = FIRST_PAUSE_SECONDS
        while entries := self._next():
            try:
                if self._client is None:
                    self._client = self._connect()
                self._send(self._client, entries)
            except Exception as error:
                if not _refused_for_good(error):
                    self._note_failure(error)
                    self._pause(min(pause, LONGEST_PAUSE_SECONDS))
                    pause *= 2
                    continue
                if len(entries) > 1:
                    self._limit = 1  # one of them is refused: find it
                    continue
                self._note_refusal(entries[0], error)
            pause, self._limit = FIRST_PAUSE_SECONDS, MAX_METRICS_PER_BATCH
            self._outbox.advance(entries)
            self._note_progress()
        self._outbox.close()

    def _pause(self, seconds: float) -> None:
        with self._changed:
            if not self._closing:
                self._changed.wait_for(lambda: self._closing, seconds)
            else:
                self._changed.wait_for(lambda: self._abandoned, seconds)

    def _next(self) -> list[Entry]:
        """Wait for the next record, or metrics that can go together; none at the end."""
        while True:
            with self._changed:
                if self._abandoned:
                    return []
            entries = self._outbox.peek(self._limit)
            if entries:
                break
            with self._changed:
                if self._closing:
                    return []
                self._changed.wait(1.0)
        together, size = [entries[0]], 0
        if _kind(entries[0]) == "metrics":
            together = []
            for entry in entries:
                size += len(entry.record.get("values", ()))
                if _kind(entry) != "metrics" or (together and size > MAX_METRICS_PER_BATCH):
                    break
                together.append(entry)
        return together

    def _send(self, client: Any, entries: Sequence[Entry]) -> None:
        record = entries[0].record
        kind = _kind(entries[0])
        if kind == "run":
            run_id = open_run(client, record, self._outbox.run_id)
            self._outbox.run_id = run_id
            with self._changed:
                self._run_ids[record["token"]] = run_id
            return
        run_id = self._outbox.run_id or ""
        if kind == "metrics" and run_id:
            send_metrics(client, run_id, [entry.record for entry in entries])
        elif kind in SENDERS and run_id:
            with self._changed:
                self._uploading = kind == "artifacts"
            SENDERS[kind](client, run_id, record)

    def _note_failure(self, error: Exception) -> None:
        if not self._failing:
            logger.warning(
                "MLflow does not take what is logged, training goes on and it is sent later: %s",
                why_no_answer(without_credentials(str(error))),
            )
        with self._changed:
            self._failing, self._uploading = True, False
            self._failures += 1
            self._changed.notify_all()

    def _note_refusal(self, entry: Entry, error: Exception) -> None:
        if _kind(entry) == "run":
            self._outbox.run_id = None
            if isinstance(error, ValueError) and not hasattr(error, "error_code"):
                with self._changed:
                    self._refusals[entry.record["token"]] = error
                return
        text = without_credentials(str(error))
        logger.warning("MLflow refused to log %s, training goes on: %s", _kind(entry), text)

    def _note_progress(self) -> None:
        with self._changed:
            if self._failing:
                logger.warning("MLflow answers again, what was missed is being sent")
            self._failing, self._uploading = False, False
            self._last_progress = time.monotonic()
            self._changed.notify_all()


def _kind(entry: Entry) -> str:
    return str(entry.record.get("kind", "nothing"))


def _refused_for_good(error: Exception) -> bool:
    code = getattr(error, "error_code", None)
    if code is not None:
        return code in REFUSED_FOR_GOOD
    # A folder that is gone, an address that is none. No answer is an OSError of another kind.
    return isinstance(error, ValueError | TypeError | FileNotFoundError)
