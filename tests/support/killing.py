"""Run a function in a process of its own and kill it midway."""

import multiprocessing
import signal
import time
from collections.abc import Callable
from typing import Any, Final

# Children are forked from a server that has imported what they need, so that a kill after a tenth
# of a second meets the function at work and not its imports.
_CONTEXT: Final = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["datastore.append", "datastore.ingest", "tests.support.cells"])


def run_and_kill(function: Callable[..., Any], *arguments: Any, after: float | None) -> bool:
    """Call a function in another process; SIGKILL it after some seconds, if it has not ended.

    Returns:
        Whether it ended by itself: it returned, or refused to do again what is done. The caller
        looks at the result to know that it is.
    """
    process = _CONTEXT.Process(target=function, args=arguments)
    process.start()
    process.join(after)
    if process.exitcode is None:
        process.kill()
        process.join()
    return process.exitcode != -signal.SIGKILL


def seconds_of(function: Callable[..., Any], *arguments: Any) -> float:
    """Run a function whole in a process like those that are killed; return how long it took."""
    run_and_kill(print, after=None)  # the server imports now
    started = time.monotonic()
    assert run_and_kill(function, *arguments, after=None)
    return time.monotonic() - started
