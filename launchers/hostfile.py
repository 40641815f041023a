"""Hosts of a training: read from a hostfile, and looked at before anything is started on them."""

import shlex
import subprocess
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

SSH: Final = ("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=5")
INTERFACES: Final = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
"""Environment variables that name network interfaces."""
_PROBE: Final = """
import os, socket, sys
folder, port = sys.argv[1], int(sys.argv[2])
print("folder", os.path.isdir(folder))
print("interfaces", *(name for _, name in socket.if_nameindex()))
with socket.socket() as probe:
    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        probe.bind(("", port))
        print("port free")
    except OSError:
        print("port taken")
"""


def read_hostfile(path: Path) -> dict[str, int]:
    """Read `name slots=N` lines, as DeepSpeed takes them.

    Raises:
        ValueError: If a line is wrong, a host comes twice, slots differ, or there is no host.
    """
    hosts: dict[str, int] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        name, slots = words[0], words[1].removeprefix("slots=") if len(words) == 2 else ""
        if not slots.isdigit() or int(slots) < 1:
            raise ValueError(
                f"{path}, line {number}: {line!r}; write NAME slots=N, for example n1 slots=8"
            )
        if name in hosts:
            raise ValueError(f"{path}, line {number}: {name} is there twice; name each host once")
        hosts[name] = int(slots)
    if not hosts:
        raise ValueError(f"{path} names no host; write a line NAME slots=N for each")
    if len(set(hosts.values())) > 1:
        counts = ", ".join(f"{name} {slots}" for name, slots in hosts.items())
        raise ValueError(
            f"{path} gives the hosts different slots ({counts}); ranks are dealt evenly: give all "
            f"of them {min(hosts.values())}"
        )
    return hosts


def look_at_hosts(
    hosts: Sequence[str], folder: Path, python: str, port: int, environ: Mapping[str, str]
) -> None:
    """Ask all hosts at once whether a training can start on them; takes seconds.

    Args:
        hosts: Names; at the first, the ranks meet.
        folder: Has to be there on each.
        python: Interpreter to run, at the same path on each.
        port: Has to be free on the first.
        environ: May name network interfaces, which each has to have.

    Raises:
        ValueError: With what is wrong on the first host where something is.
    """
    command = shlex.join([python, "-c", _PROBE, str(folder), str(port)])

    def ask(host: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*SSH, host, command], capture_output=True, text=True, check=False, timeout=30
        )

    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(ask, hosts))
    both = sorted(zip(hosts, answers, strict=True), key=lambda pair: pair[1].returncode == 0)
    for host, answer in both:  # who does not answer first
        _judge(host, answer, host == hosts[0], port, folder, environ)


def _judge(
    host: str,
    answer: subprocess.CompletedProcess[str],
    is_first: bool,
    port: int,
    folder: Path,
    environ: Mapping[str, str],
) -> None:
    if answer.returncode:
        said = (answer.stderr.strip() or f"exit code {answer.returncode}").splitlines()[-1]
        if answer.returncode == 255:
            raise ValueError(
                f"{host} cannot be reached by ssh without a password ({said}); cure it or take it "
                "out of the hostfile"
            )
        raise ValueError(f"{host} has no such Python or it fails ({said}); install the same there")
    facts = dict(line.partition(" ")[::2] for line in answer.stdout.splitlines())
    if facts.get("folder") != "True":
        raise ValueError(f"{host} has no folder {folder}; share it or copy it there")
    there = facts.get("interfaces", "").split()
    for variable in INTERFACES:
        if problem := interface_problem(environ.get(variable, ""), there):
            raise ValueError(f"{variable} is {environ[variable]}, but {host} has {problem}")
    if is_first and facts.get("port") != "free":
        raise ValueError(f"port {port} of {host} is in use; choose one: --master_port 29501")


def interface_problem(wanted: str, there: Sequence[str]) -> str:
    """Say which interfaces there are if none is wanted; empty if one is.

    `eth` means each name that begins so, `=eth0` just that one, `^docker` all others.
    """
    if not wanted or wanted.startswith("^"):
        return ""
    exact = wanted.startswith("=")
    names = [name.partition(":")[0] for name in wanted.removeprefix("=").split(",")]
    for name in names:
        if any(have == name if exact else have.startswith(name) for have in there):
            return ""
    return f"only {', '.join(there)}"
