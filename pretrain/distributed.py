"""Ranks and the few collectives that training needs."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Ranks:
    """Who this process is among all; handed to whatever must know."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

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
        failed = [0.0] * self.world_size
        failed[self.rank] = float(error is not None)
        failed = self.sum(failed)
        if any(failed):
            if error is not None and not any(failed[: self.rank]):
                raise error
            raise SystemExit(2)


@contextmanager
def start_ranks(environ: Mapping[str, str], timeout_minutes: float = 30.0) -> Iterator[Ranks]:
    """Join the process group that the launcher describes, or be the only rank.

    The `deepspeed` launcher, torchrun and srun scripts set RANK, WORLD_SIZE, LOCAL_RANK,
    MASTER_ADDR and MASTER_PORT. CUDA devices talk through NCCL, CPUs through gloo.

    Args:
        environ: The process environment.
        timeout_minutes: How long a collective may wait for a silent rank.
    """
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
    try:
        yield Ranks(rank, world_size, local_rank, device)
    finally:
        dist.destroy_process_group()
