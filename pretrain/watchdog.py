"""End a training whose ranks have fallen silent, and say which.

A rank that stops, hangs or loses its network leaves the others waiting in a collective until the
process group gives up, half an hour by default. Here each rank has a thread that publishes two
numbers in the store where the ranks met: its own ticks, and the beats of the training. When a rank
has had no beat for too long, it looks at the others: who does not tick has stopped or is cut off;
if all tick, who has the fewest beats holds up the rest. A rank that is frozen itself is killed by a
guard, so that its launcher does not wait for it.
"""

import contextlib
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from pretrain.interruption import EXIT_REQUEUE

log = logging.getLogger(__name__)


class KeyValueStore(Protocol):
    """What we need of torch's store."""

    def set(self, key: str, value: str) -> None:
        """Put a value."""

    def get(self, key: str) -> bytes:
        """Get a value; waits for it, and raises when it does not come."""


@dataclass(frozen=True)
class Pulse:
    """What a rank last published."""

    ticks: int
    beats: int
    host: str


@dataclass(frozen=True)
class Verdict:
    """Who holds up the others, in words, and which rank is to say so."""

    reason: str
    speaker: int


def judge(before: Sequence[Pulse | None], after: Sequence[Pulse | None]) -> Verdict:
    """Find the ranks that hold up the others.

    Args:
        before: Pulse of each rank, None where it could not be had.
        after: The same, some seconds later.
    """
    alive = {
        rank: new
        for rank, (old, new) in enumerate(zip(before, after, strict=True))
        if old is not None and new is not None and old.ticks != new.ticks
    }
    if len(alive) < len(after):
        silent = [rank for rank in range(len(after)) if rank not in alive]
        named = [_named(rank, after[rank] or before[rank]) for rank in silent]
        return Verdict(f"{_listed(named)} stopped, died or lost the network", min(alive, default=0))
    fewest = min(pulse.beats for pulse in alive.values())
    waiting = [rank for rank, pulse in alive.items() if pulse.beats > fewest]
    if not waiting:
        return Verdict("all ranks wait and none is behind", 0)
    named = [_named(rank, pulse) for rank, pulse in alive.items() if pulse.beats == fewest]
    return Verdict(f"{_listed(named)} made no progress, the others wait for it", min(waiting))


_GUARD: Final = """
import os, select, signal, sys
while select.select([0], [], [], float(sys.argv[2]))[0]:
    if not os.read(0, 4096):
        sys.exit()
try:
    os.kill(int(sys.argv[1]), signal.SIGKILL)
except ProcessLookupError:
    pass
"""
"""Program that kills a process which does not tick any more, and ends when it ends."""


class Guard:
    """A small process that kills this one when it is frozen: a launcher would wait for it for ever.

    A stopped process cannot leave by itself, nor can one that never gives up Python's lock.
    """

    def __init__(self, silence_seconds: float) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-S", "-E", "-c", _GUARD, str(os.getpid()), str(silence_seconds)],
            stdin=subprocess.PIPE,
            start_new_session=True,  # what stops the training's processes must not stop it
        )

    def tick(self) -> None:
        """Say that this process lives."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            os.write(self._process.stdin.fileno(), b".")

    def stop(self) -> None:
        """End the guard."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        self._process.kill()  # it has nothing to tidy up, and a busy machine may let it wait
        self._process.wait()


class Watchdog:
    """Watches the beats of this rank; a thread that lives until `stop`."""

    def __init__(
        self,
        store: KeyValueStore,
        rank: int,
        world_size: int,
        silence_seconds: float,
        leave: Callable[[Verdict], None] | None = None,
    ) -> None:
        self._store = store
        self._rank, self._world_size = rank, world_size
        self._silence = silence_seconds
        self._interval = min(5.0, silence_seconds / 6)
        self._leave = leave or self._end_process
        self._beats, self._last = 0, time.monotonic()
        # The others need to name a frozen rank before it is gone: it goes after them.
        self._guard = Guard(2 * silence_seconds + 6 * self._interval)
        self._publish(0)  # so that its host is known however early this rank falls silent
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def beat(self) -> None:
        """Note progress; cheap enough for every micro-batch."""
        self._beats += 1
        self._last = time.monotonic()

    def stop(self) -> None:
        """End the thread."""
        self._stopped.set()
        self._thread.join(2 * self._interval)
        self._guard.stop()

    def _watch(self) -> None:
        ticks = 0
        while not self._stopped.wait(self._interval):
            ticks += 1
            self._guard.tick()
            self._publish(ticks)
            if time.monotonic() - self._last < self._silence:
                continue
            before = self._pulses()
            # Long enough for everybody who lives to publish again.
            if self._stopped.wait(2 * self._interval):
                return
            ticks += 1
            self._publish(ticks)
            verdict = judge(before, self._pulses())
            if time.monotonic() - self._last >= self._silence:  # and not just gone on
                self._guard.stop()
                self._leave(verdict)
                return

    def _publish(self, ticks: int) -> None:
        try:
            self._store.set(f"pulse/{self._rank}", f"{ticks} {self._beats} {socket.gethostname()}")
        except (RuntimeError, OSError):  # the first rank keeps the store and may be the one lost
            return

    def _pulses(self) -> list[Pulse | None]:
        return [self._pulse(rank) for rank in range(self._world_size)]

    def _pulse(self, rank: int) -> Pulse | None:
        try:
            ticks, beats, host = self._store.get(f"pulse/{rank}").decode().split(" ", 2)
        except (RuntimeError, OSError):
            return None
        return Pulse(int(ticks), int(beats), host)

    def _end_process(self, verdict: Verdict) -> None:
        # The main thread sits in a collective and cannot be woken: leave from here.
        if verdict.speaker == self._rank:
            log.error(
                "no progress for %.0f s: %s; the same command continues from the last checkpoint",
                self._silence,
                verdict.reason,
            )
        else:
            # Else the launcher, which ends all ranks when one leaves, might cut the speaker short.
            time.sleep(self._interval)
        os._exit(EXIT_REQUEUE)


def _named(rank: int, pulse: Pulse | None) -> str:
    return f"rank {rank} ({pulse.host})" if pulse is not None else f"rank {rank}"


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:8])
    return shown if len(names) <= 8 else f"{shown} and {len(names) - 8} more"
