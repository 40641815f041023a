"""Tasks run on threads, in processes, on a cluster, or in Slurm jobs, and stop together."""

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from datastore import workers as workers_module
from datastore.config import StoreConfig
from datastore.worker_config import SlurmConfig
from datastore.workers import slurm_cluster, workers

ROOT = Path(__file__).resolve().parents[2]


def config(**settings: Any) -> StoreConfig:
    return StoreConfig(sources=["a.h5ad"], output="s.zarr", **settings)


def double(number: int) -> int:
    return 2 * number


def fail(number: int) -> int:
    raise ValueError(f"task {number} is bad")


def test_results_come_in_order() -> None:
    with workers(config(workers=3)) as compute:
        assert compute("double", [(double, n) for n in range(20)]) == [2 * n for n in range(20)]
        assert compute("nothing", []) == []


def test_no_more_threads_than_asked_for() -> None:
    seen: set[int] = set()

    def note() -> None:
        seen.add(threading.get_ident())
        time.sleep(0.01)

    with workers(config(workers=2)) as compute:
        compute("note", [(note,)] * 12)
    assert len(seen) == 2


def test_after_a_failure_no_task_starts_and_those_running_end() -> None:
    ended: list[int] = []

    def slow(number: int) -> None:
        time.sleep(0.05)
        ended.append(number)

    with workers(config(workers=2)) as compute:
        with pytest.raises(ValueError, match="task 1 is bad"):
            compute("mixed", [(fail, 1) if n % 10 == 1 else (slow, n) for n in range(60)])
        before = list(ended)
        time.sleep(0.2)
        assert ended == before
        assert len(ended) < 54


def pid_and_double(number: int) -> tuple[int, int]:
    time.sleep(0.02)
    return os.getpid(), 2 * number


def die(number: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail_or_note(number: int, folder: Path) -> None:
    if number % 10 == 1:
        raise ValueError(f"task {number} is bad")
    time.sleep(0.1)
    (folder / str(number)).touch()


@pytest.mark.multiprocess
def test_processes_give_the_same_results_and_end_together(tmp_path: Path) -> None:
    with workers(config(workers=2), processes=True) as compute:
        found = compute("double", [(pid_and_double, n) for n in range(30)])
        assert [result for _, result in found] == [2 * n for n in range(30)]
        pids = {pid for pid, _ in found}
        assert len(pids) == 2
        assert os.getpid() not in pids
        assert compute("nothing", []) == []
        with pytest.raises(ValueError, match=r"task \d*1 is bad"):
            compute("mixed", [(fail_or_note, n, tmp_path) for n in range(60)])
        ended = sorted(tmp_path.iterdir())
        time.sleep(0.3)
        assert sorted(tmp_path.iterdir()) == ended
        assert len(ended) < 54
    wait_until_gone(pids, 10)


@pytest.mark.multiprocess
def test_a_killed_worker_is_an_error_with_a_remedy() -> None:
    with (
        pytest.raises(ChildProcessError, match=r"a worker process was killed.*--workers 1"),
        workers(config(workers=2), processes=True) as compute,
    ):
        compute("die", [(die if n == 3 else double, n) for n in range(20)])


LEADER = """
import signal
import time
from datastore.workers import workers
from tests.datastore.test_workers import config, pid_and_double

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in background jobs
    with workers(config(workers=2), processes=True) as compute:
        print(*{pid for pid, _ in compute("work", [(pid_and_double, n) for n in range(30)])})
        print("ready", flush=True)
        compute("work on", [(time.sleep, 600)] * 2)
"""


@pytest.mark.multiprocess
@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGINT])
def test_processes_end_with_the_one_that_leads(tmp_path: Path, ending: signal.Signals) -> None:
    script = tmp_path / "leader.py"
    script.write_text(LEADER)
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", str(script)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    ) as leader:
        try:
            assert leader.stdout is not None
            pids = set(map(int, leader.stdout.readline().split()))
            assert leader.stdout.readline() == "ready\n"
            assert all(Path(f"/proc/{pid}").exists() for pid in pids)
            time.sleep(0.2)  # both work by now
            os.killpg(leader.pid, ending) if ending == signal.SIGINT else leader.kill()
            leader.wait(20)
            wait_until_gone(pids, 20)
        finally:
            leader.kill()  # or leaving the block would wait for it


def wait_until_gone(pids: set[int], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while alive := [pid for pid in pids if is_alive(pid)]:
        assert time.monotonic() < deadline, f"{alive} live on"
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


def test_a_cluster_gives_the_same_results() -> None:
    from dask.distributed import LocalCluster

    with (
        LocalCluster(
            n_workers=1,
            threads_per_worker=2,
            processes=False,
            protocol="tcp://",
            dashboard_address=":0",
        ) as cluster,
        workers(config(scheduler=cluster.scheduler_address)) as compute,
    ):
        assert compute("double", [(double, n) for n in range(5)]) == [0, 2, 4, 6, 8]
        with pytest.raises(ValueError, match="task 3 is bad"):
            compute("fail", [(double, 1), (fail, 3)])


def test_a_cluster_without_workers_is_said_to_be_one(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from dask.distributed import LocalCluster

    monkeypatch.setattr(workers_module, "_PATIENCE_SECONDS", 0.2)
    with (
        LocalCluster(
            n_workers=0, processes=False, protocol="tcp://", dashboard_address=":0"
        ) as cluster,
        workers(config(scheduler=cluster.scheduler_address)) as compute,
        caplog.at_level(logging.WARNING, "datastore"),
    ):
        later = threading.Timer(1.0, cluster.scale, [1])
        later.start()
        assert compute("double", [(double, 4)]) == [8]
        later.join()
    assert f"double: no worker has come to {cluster.scheduler_address} yet; squeue" in caplog.text


def test_slurm_jobs_are_asked_for_as_stated() -> None:
    settings = SlurmConfig(
        jobs=3, cores=6, memory="12GB", walltime="02:30:00", queue="cpu", account="lab"
    )
    with slurm_cluster(settings) as cluster:
        script = cluster.job_script().splitlines()
        assert script[0].startswith("#!")
        assert "#SBATCH -p cpu" in script
        assert "#SBATCH -A lab" in script
        assert "#SBATCH --cpus-per-task=6" in script
        assert "#SBATCH --mem=12G" in script
        assert "#SBATCH -t 02:30:00" in script
        command = script[-1]
        assert "--nthreads 1" in command
        assert "--nworkers 6" in command
        assert "tcp://" in command
    with slurm_cluster(SlurmConfig(jobs=1)) as cluster:
        script = cluster.job_script().splitlines()
        assert not any(line.startswith(("#SBATCH -p", "#SBATCH -A")) for line in script)


def test_jobs_are_submitted_when_an_ingest_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An `sbatch` that starts the job script here stands for a Slurm controller."""
    sbatch = tmp_path / "sbatch"
    sbatch.write_text(
        "#!/bin/sh\n"
        f'cp "$1" {tmp_path}/job.sh; sh {tmp_path}/job.sh > {tmp_path}/job.log 2>&1 &\n'
        "echo Submitted batch job 7\n"
    )
    (tmp_path / "scancel").write_text("#!/bin/sh\n")
    for name in ("sbatch", "scancel"):
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{Path(sys.executable).parent}:/usr/bin:/bin")
    monkeypatch.chdir(tmp_path)
    settings = SlurmConfig(jobs=1, cores=1, memory="1GB")
    with (
        caplog.at_level(logging.INFO, "datastore"),
        workers(config(slurm=settings)) as compute,
    ):
        results = compute("where", [(subprocess.getoutput, "echo $PPID")])
        assert results[0].isdigit()
    assert "asked Slurm for 1 jobs" in caplog.text


def test_slurm_without_its_package_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dask_jobqueue", None)
    with (
        pytest.raises(ValueError, match=r"slurm\.jobs needs dask-jobqueue; install it"),
        workers(config(slurm=SlurmConfig(jobs=1))),
    ):
        pass


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"jobs": -1}, r"slurm\.jobs is -1"),
        ({"cores": 0}, r"slurm\.cores is 0"),
        ({"memory": "8"}, r"slurm\.memory is '8'; give it like 8GB"),
    ],
)
def test_unusable_slurm_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SlurmConfig(**settings)


def test_a_scheduler_and_slurm_exclude_each_other() -> None:
    with pytest.raises(ValueError, match=r"scheduler and slurm\.jobs exclude each other"):
        config(scheduler="tcp://host:8786", slurm=SlurmConfig(jobs=1))
