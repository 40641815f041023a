"""Hostfiles and hosts that a training cannot start on, each in one sentence."""

import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from launchers import fan_out, hostfile
from pretrain.distributed import start_ranks


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("", "names no host", id="empty"),
        pytest.param("# none\n\n", "names no host", id="comments"),
        pytest.param("n1 slots=2\nn1 slots=2\n", "line 2: n1 is there twice", id="twice"),
        pytest.param("n1 slots=2\nn2 slots=4\n", r"n1 2, n2 4\).*of them 2", id="unequal"),
        pytest.param("n1\n", "line 1: 'n1'; write NAME slots=N", id="no slots"),
        pytest.param("n1 slots=0\n", "write NAME slots=N", id="zero"),
        pytest.param("n1 slots=two\n", "write NAME slots=N", id="no number"),
    ],
)
def test_wrong_hostfiles_are_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        hostfile.read_hostfile(path)


def test_hostfile_is_read(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("# two\nn1 slots=4\n\nn2 slots=4  # the other\n")
    assert hostfile.read_hostfile(path) == {"n1": 4, "n2": 4}


@pytest.mark.parametrize(
    ("wanted", "problem"),
    [
        ("", ""),
        ("eth", ""),
        ("eth0", ""),
        ("=eth0", ""),
        ("ib0,eth1", ""),
        ("^docker,lo", ""),
        ("ib", "only lo, eth0, eth1"),
        ("=eth", "only lo, eth0, eth1"),
    ],
)
def test_interfaces(wanted: str, problem: str) -> None:
    assert hostfile.interface_problem(wanted, ["lo", "eth0", "eth1"]) == problem


READY = "folder True\ninterfaces lo eth0\nport free\n"


@pytest.mark.parametrize(
    ("code", "out", "err", "message"),
    [
        pytest.param(255, "", "No route to host", r"n1 cannot be reached .*No route", id="ssh"),
        pytest.param(127, "", "no such file", "n1 has no such Python", id="python"),
        pytest.param(0, READY.replace("True", "False"), "", "n1 has no folder", id="folder"),
        pytest.param(0, READY.replace("free", "taken"), "", "port 7 of n1 is in use", id="port"),
        pytest.param(0, READY.replace("eth0", "ib0"), "", "only lo, ib0", id="interface"),
    ],
)
def test_hosts_that_are_not_ready_are_refused(
    code: int, out: str, err: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def answer(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        asked.append(command[len(hostfile.SSH)])
        return subprocess.CompletedProcess(command, code, out, err)

    monkeypatch.setattr(subprocess, "run", answer)
    with pytest.raises(ValueError, match=message):
        hostfile.look_at_hosts(["n1", "n2"], Path("/x"), "python", 7, {"NCCL_SOCKET_IFNAME": "eth"})
    assert sorted(asked) == ["n1", "n2"]


def test_an_interface_that_is_not_there_is_refused_by_the_ranks() -> None:
    environ = {"GLOO_SOCKET_IFNAME": "ib7"}
    with (
        pytest.raises(ValueError, match=r"has no interface ib7; there are .*lo"),
        start_ranks(environ),
    ):
        pass


def test_a_command_is_needed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "hosts"
    path.write_text("n1\n")
    assert fan_out.main(["--hostfile", str(path)]) == 2
    assert "error: " in capsys.readouterr().err


@pytest.fixture
def ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An ssh that runs its last word here, in a process group of its own as sshd does.

    Returns:
        File that gets its words.
    """
    words, ssh = tmp_path / "words", tmp_path / "ssh"
    run = 'set -m\nbash -c "${@: -1}" &\nwait $!'
    ssh.write_text(f'#!/bin/bash\necho "$@" >> {words}\n{run}\n')
    ssh.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return words


def wait(remotes: list[fan_out.Remote]) -> int:
    """Wait for all, and leave this process's signals as they were."""
    former = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    try:
        return fan_out._wait(remotes)
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


@pytest.mark.usefixtures("ssh")
@pytest.mark.parametrize(
    ("commands", "code"), [(("exit 0", "exit 7"), 7), (("exit 0", "exit 0"), 0)]
)
def test_the_exit_code_of_a_host_comes_back(
    commands: tuple[str, ...], code: int, tmp_path: Path
) -> None:
    remotes = [
        fan_out.Remote(f"n{number}", command, tmp_path / f"n{number}.log", "", {})
        for number, command in enumerate(commands)
    ]
    assert wait(remotes) == code
    assert all(remote.session.isdigit() for remote in remotes)


def test_hosts_get_the_environment_but_no_command_line_shows_it(ssh: Path, tmp_path: Path) -> None:
    environ = {"MLFLOW_TRACKING_TOKEN": "hunter2 and 'more'", "OMP_NUM_THREADS": "3"}
    command = 'printf "%s %s" "$OMP_NUM_THREADS" "$MLFLOW_TRACKING_TOKEN"'
    remote = fan_out.Remote("n1", command, tmp_path / "log", "", environ)
    assert wait([remote]) == 0
    assert (tmp_path / "log").read_text() == "3 hunter2 and 'more'"
    assert "n1" in ssh.read_text()
    assert "hunter2" not in ssh.read_text()
