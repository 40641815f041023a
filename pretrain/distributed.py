"""Ranks and the few collectives that training needs."""

import os
import re
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Final

import torch
import torch.distributed as dist
from torch import Tensor

_LOST: Final = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "No route to host",
    "Timed out",
)
"""How gloo and NCCL say that another rank is gone."""


class LostRankError(RuntimeError):
    """Another rank died or its network is gone; starting again continues from a checkpoint."""

    def __init__(self, message: str, ranks: "Ranks") -> None:
        super().__init__(message)
        self._ranks = ranks

    def is_first_to_tell(self) -> bool:
        """Tell whether no other rank has asked this before, so that one cause is told once."""
        try:
            return self._ranks.open_store().add("told", 1) == 1
        except RuntimeError:  # the store was the lost rank's
            return True


def _lost_connection(error: RuntimeError) -> str:
    found = re.search(r"\[?((?:\d{1,3}\.){3}\d{1,3}|[0-9a-f:]+:[0-9a-f]+)\]?:\d+", str(error))
    where = f" at {found.group(1)}" if found else ""
    return (
        f"the connection to another rank{where} was lost: it died, or its host or network did; "
        "the same command continues from the last checkpoint"
    )


@dataclass(frozen=True)
class Ranks:
    """Who this process is among all; handed to whatever must know."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    meeting: tuple[str, int] | None = None
    """Address and port of the store where the ranks met; none for one rank alone."""

    @property
    def is_first(self) -> bool:
        """True on the one rank that writes and logs."""
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Add numbers over all ranks, in float64; every rank gets the sums."""
        if self.world_size == 1:
            return [float(value) for value in values]
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return [float(value) for value in total.tolist()]

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.sum([0.0])

    def gather(self, value: float) -> list[float]:
        """Bring together one number of each rank, in their order."""
        values = [0.0] * self.world_size
        values[self.rank] = value
        return self.sum(values)

    def gather_rows(self, values: Sequence[float]) -> list[list[float]]:
        """Bring together as many numbers of each rank, exact up to 2⁵³; one row for each rank."""
        own = torch.tensor(values, dtype=torch.float64, device=self.device)
        rows = [torch.zeros_like(own) for _ in range(self.world_size)]
        if self.world_size > 1:
            dist.all_gather(rows, own)
        else:
            rows = [own]
        return [row.tolist() for row in rows]

    def gather_texts(self, text: str) -> list[str]:
        """Bring together a text of each rank, in their order; slow, for what happens rarely."""
        codes = [float(code) for code in text.encode()]
        longest = max(1, int(max(self.gather(float(len(codes))))))
        rows = self.gather_rows([*codes, *([0.0] * (longest - len(codes)))])
        return [bytes(int(code) for code in row if code).decode() for row in rows]

    def of_first(self, values: Sequence[float]) -> list[float]:
        """Give every rank the first one's numbers, bit for bit."""
        return self.sum([value if self.is_first else 0.0 for value in values])

    def part(self, num_rows: int, rank: int | None = None) -> slice:
        """Rows that are a rank's, this one's if none is named; the parts differ by one at most."""
        rank = self.rank if rank is None else rank
        return slice(num_rows * rank // self.world_size, num_rows * (rank + 1) // self.world_size)

    def join_parts(self, own: Tensor, num_rows: int) -> Tensor:
        """Bring together rows of which each rank has its `part`, in order.

        Args:
            own: This rank's rows, (rows, …); type and further sizes are equal on all ranks.
            num_rows: Rows of all ranks together, N.

        Returns:
            All rows, (N, …), the same bits on every rank.
        """
        if self.world_size == 1:
            return own
        whole = own.new_empty(num_rows, *own.shape[1:])
        whole[self.part(num_rows)] = own
        for rank in range(self.world_size):
            rows = self.part(num_rows, rank)
            if rows.start < rows.stop:
                dist.broadcast(whole[rows], rank)
        return whole

    def hosts(self) -> list[str]:
        """Bring together the name of each rank's host, in their order."""
        return self.gather_texts(socket.gethostname())

    def open_store(self, timeout_seconds: float = 5.0) -> dist.TCPStore:
        """Open a connection of one's own to the store where the ranks met.

        Raises:
            RuntimeError: If there is one rank only, or the store does not answer.
        """
        if self.meeting is None:
            raise RuntimeError("one rank alone has no store")
        timeout = timedelta(seconds=timeout_seconds)
        return dist.TCPStore(*self.meeting, is_master=False, timeout=timeout)

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """Let an input error of one rank end all of them; entered and left by all ranks.

        Raises:
            ValueError, OSError: What was raised inside, on the lowest rank where it was.
            SystemExit: With code 2 on the others, so that the cause is told once.
        """
        error: ValueError | OSError | None = None
        try:
            yield
        except (ValueError, OSError) as problem:
            error = problem
        failed = self.gather(float(error is not None))
        if any(failed):
            if error is not None and not any(failed[: self.rank]):
                raise error
            raise SystemExit(2)


def alone(device: torch.device) -> Ranks:
    """The only rank; it needs no process group."""
    return Ranks(0, 1, 0, device)


def _require_interfaces(environ: Mapping[str, str]) -> None:
    """Refuse a network interface that this host has not: gloo would say so in C++ words."""
    wanted = environ.get("GLOO_SOCKET_IFNAME", "")
    there = [name for _, name in socket.if_nameindex()]
    for name in filter(None, wanted.split(",")):
        if name not in there:
            raise ValueError(
                f"GLOO_SOCKET_IFNAME is {wanted}, but {socket.gethostname()} has no interface "
                f"{name}; there are {', '.join(there)}"
            )


@contextmanager
def start_ranks(environ: Mapping[str, str], timeout_minutes: float = 30.0) -> Iterator[Ranks]:
    """Join the process group that the launcher describes, or be the only rank.

    The `deepspeed` launcher, torchrun and srun scripts set RANK, WORLD_SIZE, LOCAL_RANK,
    MASTER_ADDR and MASTER_PORT. CUDA devices talk through NCCL, CPUs through gloo.

    Args:
        environ: The process environment.
        timeout_minutes: How long a collective may wait for a silent rank.

    Raises:
        ValueError: If the environment names a network interface that is not there.
    """
    _require_interfaces(environ)
    rank = int(environ.get("RANK", "0"))
    world_size = int(environ.get("WORLD_SIZE", "1"))
    local_rank = int(environ.get("LOCAL_RANK", "0"))
    # DS_ACCELERATOR=cpu is how DeepSpeed is told to leave the GPUs alone; we follow it.
    if torch.cuda.is_available() and environ.get("DS_ACCELERATOR") != "cpu":
        device, backend = torch.device("cuda", local_rank), "nccl"
        torch.cuda.set_device(device)
    else:
        device, backend = torch.device("cpu"), "gloo"
        local_size = int(environ.get("LOCAL_WORLD_SIZE", environ.get("LOCAL_SIZE", world_size)))
        if "OMP_NUM_THREADS" not in environ or local_size > 1:
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_size))
    alone = world_size == 1 and "MASTER_ADDR" not in environ
    dist.init_process_group(
        backend,
        rank=rank,
        world_size=world_size,
        store=dist.HashStore() if alone else None,
        timeout=timedelta(minutes=timeout_minutes),
    )
    meeting = None
    if world_size > 1:
        meeting = environ["MASTER_ADDR"], int(environ["MASTER_PORT"])
    ranks = Ranks(rank, world_size, local_rank, device, meeting)
    try:
        yield ranks
    except RuntimeError as error:
        if not any(words in str(error) for words in _LOST):
            raise
        raise LostRankError(_lost_connection(error), ranks) from error
    finally:
        dist.destroy_process_group()
