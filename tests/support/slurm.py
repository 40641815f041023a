"""A Slurm cluster on this machine: real munge, slurmctld and several slurmd, without systemd.

Needs root and Debian's slurmctld, slurmd, slurm-client and munge. Every node is a slurmd with a
name and port of its own on this host. Jobs of the partition `urgent` preempt those of `debug`,
which are requeued. Nothing is left behind.
"""

import contextlib
import os
import pwd
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.support.cluster import ROOT
from tests.support.cluster import missing as missing_programs

NEEDS = {
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "sbatch": "slurm-client",
    "munged": "munge",
}


def missing() -> str:
    """Say what must be installed or granted before Slurm can start; empty if nothing."""
    return missing_programs(NEEDS)


@dataclass
class Slurm:
    """A running controller and its nodes."""

    folder: Path

    def call(self, *command: str, cwd: Path | None = None) -> str:
        """Run a Slurm command and return what it prints."""
        environ = {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf")}
        done = subprocess.run(
            command, env=environ, cwd=cwd, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def submit(self, command: str, folder: Path, **environ: str) -> str:
        """Give a line of docs/cluster.md that begins with `sbatch`; return the job's number.

        Args:
            command: The line, with a test's paths and sizes.
            folder: Where to; gets the repository's batch scripts where the page has them.
            environ: Further variables of the job.
        """
        if not (folder / "launchers").exists():
            (folder / "launchers").symlink_to(ROOT / "launchers")
        program, *words = shlex.split(command)
        assert program == "sbatch"
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        pairs = [f"{name}={value}" for name, value in {**environ, "PATH": path}.items()]
        ours = ["--parsable", f"--export={','.join(['ALL', *pairs])}"]
        return self.call(program, *ours, *words, cwd=folder).strip()

    def state(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says."""
        text = self.call("scontrol", "show", "job", job)
        pairs = (word.partition("=") for word in text.split())
        return {key: value for key, _, value in pairs}

    def wait(self, job: str, states: set[str], seconds: float) -> dict[str, str]:
        """Wait until a job is in one of these states."""
        deadline = time.monotonic() + seconds
        while (found := self.state(job))["JobState"] not in states:
            assert time.monotonic() < deadline, f"{found} after {seconds} s"
            time.sleep(0.3)
        return found


@contextlib.contextmanager
def start_slurm(folder: Path, num_nodes: int) -> Iterator[Slurm]:
    """Bring up a controller and nodes n1 …, and take everything down at the end."""
    folder.mkdir(parents=True)
    folder.chmod(0o755)
    for name in ("state", "spool", "log"):
        (folder / name).mkdir()
    (folder / "slurm.conf").write_text(_configuration(folder, num_nodes))
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    slurm = Slurm(folder)
    environ = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    with contextlib.ExitStack() as running:

        def start(name: str, *command: str) -> None:
            log = running.enter_context((folder / "log" / f"{name}.out").open("wb"))
            process = subprocess.Popen(
                command, env={**environ, "PATH": path}, stdout=log, stderr=log
            )
            running.callback(_end, process)

        _start_munge(folder, start)
        start("slurmctld", "slurmctld", "-D", "-i")
        for number in range(1, num_nodes + 1):
            start(f"n{number}", "slurmd", "-D", "-N", f"n{number}")
        _wait_until_idle(slurm, num_nodes)
        try:
            yield slurm
        finally:
            with contextlib.suppress(AssertionError):
                slurm.call("scancel", "--full", "--signal=KILL", "--user=root")
                slurm.call("scancel", "--user=root")


def _configuration(folder: Path, num_nodes: int) -> str:
    host = socket.gethostname()
    first = 26_830
    nodes = "".join(
        f"NodeName=n{number} NodeHostname={host} NodeAddr=127.0.0.1 Port={first + number} CPUs=2 "
        "RealMemory=2000 State=UNKNOWN\n"
        for number in range(1, num_nodes + 1)
    )
    return (
        f"ClusterName=scbert\nSlurmctldHost={host}(127.0.0.1)\nSlurmctldPort={first}\n"
        f"SlurmUser=root\nSlurmdUser=root\nStateSaveLocation={folder}/state\n"
        f"SlurmdSpoolDir={folder}/spool/%n\nSlurmctldPidFile={folder}/slurmctld.pid\n"
        f"SlurmdPidFile={folder}/slurmd-%n.pid\nSlurmctldLogFile={folder}/log/slurmctld.log\n"
        f"SlurmdLogFile={folder}/log/slurmd-%n.log\n"
        f"AuthType=auth/munge\nAuthInfo=socket={folder}/munge/socket,cred_expire=5\n"
        f"CredType=cred/munge\n"
        "ProctrackType=proctrack/linuxproc\nTaskPlugin=task/none\nReturnToService=2\n"
        "SlurmdParameters=config_overrides\nSelectType=select/cons_tres\n"
        "SelectTypeParameters=CR_Core\nKillWait=5\nSlurmctldTimeout=30\nSlurmdTimeout=30\n"
        "MailProg=/bin/true\nSchedulerParameters=sched_interval=2,bf_interval=2\n"
        "PreemptType=preempt/partition_prio\nPreemptMode=REQUEUE\n"
        "SlurmctldParameters=preempt_send_user_signal\n"
        f"{nodes}PartitionName=debug Nodes=ALL Default=YES MaxTime=60 PriorityTier=1 GraceTime=20\n"
        "PartitionName=urgent Nodes=ALL MaxTime=60 PriorityTier=10 PreemptMode=OFF\n"
    )


def _start_munge(folder: Path, start: object) -> None:
    home = folder / "munge"
    home.mkdir(mode=0o755)
    key = home / "key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    assert pwd.getpwuid(os.geteuid()).pw_name == "root"
    assert callable(start)
    start(
        "munged",
        "munged",
        "--foreground",
        "--force",
        f"--key-file={key}",
        f"--socket={home}/socket",
        f"--pid-file={home}/pid",
        f"--log-file={home}/log",
        f"--seed-file={home}/seed",
    )
    deadline = time.monotonic() + 20
    while not (home / "socket").exists():
        assert time.monotonic() < deadline, (folder / "log" / "munged.out").read_text()
        time.sleep(0.1)


def _wait_until_idle(slurm: Slurm, num_nodes: int) -> None:
    deadline = time.monotonic() + 60
    while True:
        with contextlib.suppress(AssertionError):
            idle = slurm.call("sinfo", "-h", "-N", "-t", "idle", "-o", "%N").split()
            if set(idle) == {f"n{number}" for number in range(1, num_nodes + 1)}:
                return
        if time.monotonic() > deadline:
            logs = "\n".join(path.read_text() for path in sorted((slurm.folder / "log").iterdir()))
            raise AssertionError(f"Slurm does not start:\n{logs[-5000:]}")
        time.sleep(0.3)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
