"""Who is named when ranks fall silent."""

import subprocess
import sys
import threading
import time

import pytest

from pretrain.watchdog import Pulse, Verdict, Watchdog, judge


class Store:
    """A store in memory that can be lost."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}
        self.lost = False

    def set(self, key: str, value: str) -> None:
        if self.lost:
            raise RuntimeError("Connection reset by peer")
        self.values[key] = value

    def get(self, key: str) -> bytes:
        if self.lost or key not in self.values:
            raise RuntimeError("wait timeout")
        return self.values[key].encode()


def pulses(*numbers: tuple[int, int] | None) -> list[Pulse | None]:
    return [
        None if pair is None else Pulse(*pair, host=f"n{rank}") for rank, pair in enumerate(numbers)
    ]


@pytest.mark.parametrize(
    ("before", "after", "reason", "speaker"),
    [
        pytest.param(
            pulses((5, 9), (5, 9), (5, 9)),
            pulses((6, 9), (5, 9), (7, 9)),
            "rank 1 (n1) stopped, died or lost the network",
            0,
            id="one does not tick",
        ),
        pytest.param(
            pulses((5, 9), (5, 9), (5, 9)),
            pulses((5, 9), (6, 9), None),
            "rank 0 (n0), rank 2 (n2) stopped, died",
            1,
            id="the first is among them",
        ),
        pytest.param(
            pulses((5, 7), (5, 9), (5, 9)),
            pulses((6, 7), (6, 9), (6, 9)),
            "rank 0 (n0) made no progress",
            1,
            id="one hangs while its watchdog ticks",
        ),
        pytest.param(
            pulses((5, 9), (5, 9)), pulses((6, 9), (6, 9)), "none is behind", 0, id="all wait"
        ),
        pytest.param(pulses(None, None), pulses(None, None), "rank 0, rank 1", 0, id="no store"),
    ],
)
def test_the_culprit_is_named(
    before: list[Pulse | None], after: list[Pulse | None], reason: str, speaker: int
) -> None:
    verdict = judge(before, after)
    assert reason in verdict.reason
    assert verdict.speaker == speaker


def test_a_thousand_culprits_are_not_listed() -> None:
    lost: list[Pulse | None] = [None] * 1000
    assert judge(lost, lost).reason.count("rank") == 8
    assert "and 992 more" in judge(lost, lost).reason


def test_silence_is_noticed_and_beats_keep_it_away() -> None:
    store, verdicts, left = Store(), list[Verdict](), threading.Event()

    def leave(verdict: Verdict) -> None:
        verdicts.append(verdict)
        left.set()

    watchdog = Watchdog(store, 0, 2, 0.3, leave)
    other = Watchdog(store, 1, 2, 60.0, leave)
    other._interval = 0.05
    for _ in range(10):
        watchdog.beat()
        time.sleep(0.1)
    assert not verdicts
    other.stop()  # it ticks no more
    assert left.wait(10)
    watchdog.stop()
    assert "rank 1" in verdicts[0].reason
    assert "rank 0" not in verdicts[0].reason


def test_a_lost_store_is_silence_too() -> None:
    store, verdicts, left = Store(), list[Verdict](), threading.Event()
    store.lost = True

    def leave(verdict: Verdict) -> None:
        verdicts.append(verdict)
        left.set()

    Watchdog(store, 1, 2, 0.2, leave)
    assert left.wait(10)
    assert "rank 0, rank 1 stopped, died or lost the network" in verdicts[0].reason


FROZEN = """
import time
from pretrain.watchdog import Guard
guard = Guard(1.0)
for _ in range(10):
    guard.tick()
    time.sleep(0.2)
print("lives", flush=True)
{end}
"""


@pytest.mark.parametrize(
    ("end", "code"),
    [
        pytest.param("import os; os.kill(os.getpid(), 19); time.sleep(60)", -9, id="stopped"),
        pytest.param("time.sleep(60)", -9, id="no ticks"),
        pytest.param("guard.stop(); time.sleep(1.5)", 0, id="stopped guard"),
        pytest.param("", 0, id="ended"),
    ],
)
def test_a_guard_kills_a_process_that_does_not_tick(end: str, code: int) -> None:
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", FROZEN.format(end=end)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (code, "lives\n")
    assert time.monotonic() - started < 50
