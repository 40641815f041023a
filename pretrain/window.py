"""What happened between two log lines: sums over the ranks, and who was slow."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import numpy as np
from numpy.typing import NDArray

from pretrain.distributed import Ranks

log = logging.getLogger(__name__)

_STRAGGLER: Final = 2.0
"""A rank that needs so many times as long as the others for its own work, and over a second, …"""
_STRAGGLER_WINDOWS: Final = 3
"""… in so many log windows in a row is named."""


class Window:
    """Sums over the steps between two log lines."""

    def __init__(self, hosts: list[str]) -> None:
        self._hosts = hosts
        self._slow = 0, 0
        """The slowest rank, and in how many windows in a row it was much slower."""
        self._begin()

    def _begin(self) -> None:
        self._sums, self._seconds = np.zeros(5), 0.0
        self._own_seconds, self._fetch_seconds = 0.0, 0.0
        self.restart_clock()

    def restart_clock(self) -> None:
        """Count time from here on: fetching cells and training on them."""
        self._clock = time.perf_counter()

    def note_fetched(self) -> None:
        """Count the time since the clock was started as this rank's own, waiting for nobody."""
        waited = time.perf_counter() - self._clock
        self._own_seconds += waited
        self._fetch_seconds += waited

    @contextmanager
    def own_work(self) -> Iterator[None]:
        """Count the time inside as this rank's own."""
        start = time.perf_counter()
        yield
        self._own_seconds += time.perf_counter() - start

    def add(self, sums: NDArray[np.float64]) -> None:
        """Take a step's sums and the time since the clock was started."""
        self._sums += sums
        self._seconds += time.perf_counter() - self._clock

    def finish(self, ranks: Ranks) -> dict[str, float]:
        """Reduce over ranks, begin anew, and return the window's metrics."""
        loss, correct, rule, targets, cells, fetch = ranks.sum([*self._sums, self._fetch_seconds])
        own, seconds = ranks.gather(self._own_seconds), self._seconds
        self._begin()
        self.look_for_straggler(own)
        targets = max(1.0, targets)
        return {
            "loss": loss / targets,
            "masked_accuracy": correct / targets,
            "commonest_bin_accuracy": rule / targets,
            "cells_per_second": cells / seconds,
            "loader_wait_share": fetch / ranks.world_size / seconds,
        }

    def look_for_straggler(self, own: list[float]) -> None:
        """Name a rank that was much slower than the others in several windows in a row."""
        slowest = int(np.argmax(own))
        others = own[:slowest] + own[slowest + 1 :]
        slow = own[slowest] > 1.0 and own[slowest] > _STRAGGLER * float(np.median(others or own))
        former, count = self._slow
        self._slow = slowest, (count if former == slowest else 0) + 1 if slow else 0
        if self._slow[1] == _STRAGGLER_WINDOWS:
            log.warning(
                "rank %d (%s) is a straggler: %.2f s of its own work, the others' median %.2f s",
                slowest,
                self._hosts[slowest],
                own[slowest],
                np.median(others),
            )
