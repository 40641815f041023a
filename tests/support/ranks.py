"""Several ranks on this machine: real processes, real collectives."""

import multiprocessing
import os
import random
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from pretrain.distributed import Ranks, start_ranks


def run_ranks(
    fn: Callable[..., Any],
    world_size: int,
    tmp_path: Path,
    *arguments: Any,
    timeout_seconds: float = 500,
) -> list[Any]:
    """Call `fn(ranks, *arguments)` in one new process per rank and return what each rank returned.

    `fn` stands at the top of a module, so that the processes can import it; each works in
    `tmp_path` with one thread. Several ranks meet as the launcher arranges it, one rank is alone.

    Raises:
        AssertionError: If a rank raises (with its traceback), dies, or is not done in time; the
            others are killed.
    """
    tmp_path.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    pipes: dict[Connection, int] = {}
    processes = []
    for rank in range(world_size):
        reading, writing = context.Pipe(duplex=False)
        environ = {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)}
        environ |= address if world_size > 1 else {}
        process = context.Process(
            target=_rank_main, args=(writing, environ, tmp_path, fn, arguments), daemon=True
        )
        process.start()
        writing.close()  # so that a dead process reads as the end of its pipe
        pipes[reading] = rank
        processes.append(process)
    try:
        return _collect(pipes, time.monotonic() + timeout_seconds)
    finally:
        for process in processes:
            process.join(5)
            process.kill()


def _collect(pipes: dict[Connection, int], deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    waiting = dict(pipes)
    while waiting:
        ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
        if not ready:
            raise AssertionError(f"ranks {sorted(waiting.values())} are not done in time")
        for pipe in ready:
            assert isinstance(pipe, Connection)
            rank = waiting.pop(pipe)
            try:
                done, result = pipe.recv()
            except EOFError:
                raise AssertionError(f"rank {rank} died without a word") from None
            if not done:
                raise AssertionError(f"rank {rank} of {len(pipes)} failed:\n{result}")
            results[rank] = result
    return [results[rank] for rank in sorted(results)]


def _rank_main(
    pipe: Connection,
    environ: dict[str, str],
    folder: Path,
    fn: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    os.environ.pop("MASTER_ADDR", None)
    os.environ.update(environ)
    os.chdir(folder)
    try:
        with start_ranks(os.environ, timeout_minutes=1) as ranks:
            torch.set_num_threads(1)
            assert isinstance(ranks, Ranks)
            result = fn(ranks, *arguments)
        pipe.send((True, result))
    except BaseException:
        pipe.send((False, traceback.format_exc()))


def _free_port() -> int:
    """Port that nobody listens on, below those that the kernel hands to clients."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port
