"""Several "hosts" on this machine: network namespaces with an sshd, processes and /dev/shm of each.

Every host has its address, name, process table (so that a `pkill` on one leaves the others alone)
and shared memory; the file system is common, like a cluster's home. Needs root on Linux, and from
Debian iproute2, openssh-server and openssh-client; pdsh for DeepSpeed's own launcher. Nothing is
left behind: namespaces, bridge and processes go with the `with` block.
"""

import contextlib
import itertools
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_BRIDGE = "scbertbr"
_NEEDS = {"ip": "iproute2", "sshd": "openssh-server", "ssh": "openssh-client", "pdsh": "pdsh"}


def missing(programs: Mapping[str, str] = _NEEDS) -> str:
    """Say what must be installed or granted before a cluster can start; empty if nothing."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        return "namespaces need root on Linux"
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    packages = [
        package for name, package in programs.items() if shutil.which(name, path=path) is None
    ]
    return f"apt-get install {' '.join(packages)}" if packages else ""


@dataclass
class Host:
    """One of the hosts."""

    name: str
    address: str
    namespace: str
    init: subprocess.Popen[bytes]
    """First process of its process table; with it all others go."""


@dataclass
class Running:
    """A command that was started on a host."""

    process: subprocess.Popen[bytes]
    log: Path

    @property
    def text(self) -> str:
        """What it has printed so far."""
        return self.log.read_text(errors="replace")

    def wait(self, timeout_seconds: float) -> int:
        """Wait for its end and return the exit code; kill it if it takes too long."""
        try:
            return self.process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError(f"not done after {timeout_seconds} s:\n{self.text}") from None


@dataclass
class Cluster:
    """Running hosts n1, n2, …; commands are run on them through ssh, as a user would."""

    folder: Path
    hosts: list[Host] = field(default_factory=list)
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    def hostfile(self, slots: int) -> Path:
        """Write a hostfile for `deepspeed --hostfile`."""
        path = self.folder / "hostfile"
        path.write_text("".join(f"{host.name} slots={slots}\n" for host in self.hosts))
        return path

    def start(self, host: Host, command: str) -> Running:
        """Start a shell command on a host, in the folder of the cluster."""
        log = self.folder / f"output_{next(self._numbers)}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*self._enter(host), "ssh", host.name, f"cd {self.folder} && {command}"],
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        return Running(process, log)

    def run(self, host: Host, command: str, timeout_seconds: float = 400) -> tuple[int, str]:
        """Run a shell command on a host; return its exit code and all that it printed."""
        running = self.start(host, command)
        return running.wait(timeout_seconds), running.text

    def signal(self, host: Host, pattern: str, signal: str) -> None:
        """Send a signal to the processes of a host whose command line has a pattern."""
        subprocess.run([*self._enter(host), "pkill", f"-{signal}", "-f", pattern], check=True)

    def cut_network(self, host: Host) -> None:
        """Pull the plug of a host's network."""
        _ip("-n", host.namespace, "link", "set", "eth0", "down")

    def restore_network(self, host: Host) -> None:
        """Plug a host's network in again."""
        _ip("-n", host.namespace, "link", "set", "eth0", "up")

    def mount(self, host: Host, folder: Path, size: str) -> None:
        """Give a host a small disk of its own at a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        subprocess.run([*self._enter(host), *command], check=True)

    def lose_power(self, host: Host) -> None:
        """Let a host vanish without a word: no packet leaves it, all its processes are gone."""
        self.cut_network(host)
        host.init.kill()
        host.init.wait()

    def _enter(self, host: Host) -> list[str]:
        # unshare's child is the first process of the namespaces.
        (child,) = Path(f"/proc/{host.init.pid}/task/{host.init.pid}/children").read_text().split()
        return ["nsenter", "--target", child, "--all"]


@contextlib.contextmanager
def start_cluster(folder: Path, num_hosts: int) -> Iterator[Cluster]:
    """Bring hosts n1 … up, and take everything down at the end."""
    folder.mkdir(parents=True, exist_ok=True)
    cluster = Cluster(folder)
    keys = _make_keys(folder)
    names = [f"n{number}" for number in range(1, num_hosts + 1)]
    addresses = [f"10.83.0.{number}" for number in range(1, num_hosts + 1)]
    table = "127.0.0.1 localhost\n" + "".join(
        f"{address} {name}\n" for address, name in zip(addresses, names, strict=True)
    )
    (folder / "hosts").write_text(table)
    _remove_leftovers(names)
    try:
        _ip("link", "add", _BRIDGE, "type", "bridge")
        _ip("link", "set", _BRIDGE, "up")
        for name, address in zip(names, addresses, strict=True):
            cluster.hosts.append(_start_host(folder, keys, name, address))
        for host in cluster.hosts:
            _wait_for_ssh(cluster, host)
        yield cluster
    finally:
        for host in cluster.hosts:
            host.init.kill()
            host.init.wait()
        _remove_leftovers(names)


def _start_host(folder: Path, keys: Path, name: str, address: str) -> Host:
    namespace = f"scbert-{name}"
    _ip("netns", "add", namespace)
    _ip("link", "add", f"sb{name}", "type", "veth", "peer", "name", "eth0", "netns", namespace)
    _ip("link", "set", f"sb{name}", "master", _BRIDGE, "up")
    _ip("-n", namespace, "addr", "add", f"{address}/24", "dev", "eth0")
    _ip("-n", namespace, "link", "set", "eth0", "up")
    _ip("-n", namespace, "link", "set", "lo", "up")
    config = folder / f"sshd_{name}"
    config.write_text(
        f"HostKey {keys}/host\nPidFile none\nAuthorizedKeysFile {keys}/user.pub\n"
        "PermitRootLogin yes\nStrictModes no\nUsePAM no\nPasswordAuthentication no\n"
    )
    inside = [
        "mount --make-rprivate /",
        "mount -t tmpfs tmpfs /dev/shm",
        f"hostname {name}",
        f"mount --bind {folder}/hosts /etc/hosts",
        f"mkdir -p /root/.ssh && mount --bind {keys} /root/.ssh",
        "mkdir -p /run/sshd",
        f"exec $(command -v sshd || echo /usr/sbin/sshd) -D -e -f {config}",
    ]
    namespaces = ["--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc"]
    with (folder / f"sshd_{name}.log").open("wb") as log:
        init = subprocess.Popen(
            [
                "ip",
                "netns",
                "exec",
                namespace,
                "unshare",
                *namespaces,
                "sh",
                "-ec",
                "\n".join(inside),
            ],
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    return Host(name, address, namespace, init)


def _make_keys(folder: Path) -> Path:
    keys = folder / "ssh"
    keys.mkdir(mode=0o700)
    for name in ("host", "user"):
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(keys / name)], check=True
        )
    # In place of /root/.ssh on every host.
    (keys / "config").write_text(
        "Host *\n  IdentityFile /root/.ssh/user\n  StrictHostKeyChecking no\n"
        "  UserKnownHostsFile /dev/null\n  LogLevel ERROR\n  ConnectTimeout 5\n"
        # Else pdsh waits for hours for a host that has lost power.
        "  ServerAliveInterval 3\n  ServerAliveCountMax 3\n"
    )
    return keys


def _wait_for_ssh(cluster: Cluster, host: Host) -> None:
    for _ in range(100):
        if host.init.poll() is not None:
            break
        with contextlib.suppress(ValueError):  # there is no process inside yet
            code, _ = cluster.run(host, "true", timeout_seconds=10)
            if code == 0:
                return
        time.sleep(0.1)
    log = (cluster.folder / f"sshd_{host.name}.log").read_text()
    raise AssertionError(f"{host.name} does not answer: {log}")


def _remove_leftovers(names: Sequence[str]) -> None:
    for arguments in itertools.chain(
        (("netns", "delete", f"scbert-{name}") for name in names),
        (("link", "delete", f"sb{name}") for name in names),
        [("link", "delete", _BRIDGE)],
    ):
        subprocess.run(["ip", *arguments], capture_output=True, check=False)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
