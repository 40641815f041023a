"""Knobs of work that is shared out: jobs that Slurm starts for us, or tasks of an array."""

import re
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class SlurmConfig:
    """Slurm jobs that ingest as Dask workers (needs the extra `slurm`: dask-jobqueue)."""

    jobs: int = 0
    """How many jobs to start; 0 ingests without Slurm."""
    cores: int = 4
    """Cores of a job; each has a worker process, and ingests a slice or a partition at a time."""
    memory: str = "8GB"
    """Memory of a job; allow 1.2 GB for each core at 1,500 expressed genes per cell."""
    walltime: str = "04:00:00"
    """Time limit of a job, as Slurm writes it; work that a job did not finish is done again."""
    queue: str | None = None
    """Partition of the cluster; none takes Slurm's default."""
    account: str | None = None
    """Account to charge; none takes Slurm's default."""

    def __post_init__(self) -> None:
        if self.jobs < 0:
            raise ValueError(f"slurm.jobs is {self.jobs}; give 0 (no Slurm) or more")
        if self.cores < 1:
            raise ValueError(f"slurm.cores is {self.cores}; give 1 or more")
        if not re.fullmatch(r"\d+(\.\d+)? ?[KMGT]i?B", self.memory):
            raise ValueError(f"slurm.memory is {self.memory!r}; give it like 8GB")


@dataclass(frozen=True, kw_only=True)
class ArrayConfig:
    """This process as a task of a job array whose tasks build one store together."""

    tasks: int = 0
    """How many tasks the array has, at most one for each source; 0 ingests alone."""
    task: int = 0
    """Number of this task."""
    job: str = ""
    """Name of the array; the same in all its tasks, another in every array."""

    def __post_init__(self) -> None:
        if self.tasks < 0:
            raise ValueError(f"array.tasks is {self.tasks}; give 0 (no array) or more")
        if self.tasks and not self.job:
            raise ValueError("array.job is empty; give the number of the array's job")
