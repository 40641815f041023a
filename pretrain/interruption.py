"""Stopping on request, and keeping a second training out of an output folder."""

import fcntl
import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Final

log = logging.getLogger(__name__)

EXIT_REQUEUE: Final = 75
"""Exit code of a training that saved and stopped on request (EX_TEMPFAIL): start it again."""


class StopRequest:
    """Whether somebody asked this process to save and stop."""

    def __init__(self) -> None:
        self.signal: str | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Note a signal; the training loop looks after each step."""
        self.signal = signal.Signals(number).name


@contextmanager
def stop_on_signals(leaving: bool = False) -> Iterator[StopRequest]:
    """Take SIGTERM (preemption, `scancel`) and SIGUSR1 (Slurm's `--signal`) as requests to stop.

    Args:
        leaving: The process ends right afterwards: ignore them from then on, so that a launcher
            which ends all ranks with the first does not replace this rank's own exit code.
    """
    request = StopRequest()
    former = {number: signal.signal(number, request) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield request
    finally:
        for number, handler in former.items():
            signal.signal(number, signal.SIG_IGN if leaving else handler)


@contextmanager
def only_training_in(folder: Path) -> Iterator[None]:
    """Hold a folder for this training; the lock goes with the process, however it ends.

    Raises:
        ValueError: If another training holds it, or it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / "training.lock").open("w")
    except OSError as error:
        raise ValueError(
            f"{folder} cannot be written ({error.strerror}); choose another output"
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"another training is writing {folder}; wait for it, stop it, or choose another "
                "output"
            ) from error
        except OSError as error:  # some network file systems have no locks
            log.warning("%s cannot be locked (%s); start one training there only", folder, error)
        yield
