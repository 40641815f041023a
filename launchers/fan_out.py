"""Start a training on several hosts over ssh, without pdsh: one DeepSpeed command on each.

python launchers/fan_out.py --hostfile hosts launchers/pretrain.py --config pretrain.yaml
python launchers/fan_out.py --hostfile hosts --check

The hosts share this folder and Python. Output is shown with the host's name and kept in --logs;
SIGTERM and SIGUSR1 are passed on to all ranks. When a host ends in failure, the others get some
seconds to say why and are then ended, frozen processes too. Returns the first exit code that is
not 0; 75 means that the same command continues, also after a host was lost.
"""

import argparse
import contextlib
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from launchers import cli
from launchers.hostfile import SSH, look_at_hosts, read_hostfile

PASSED_ON = (
    "CUDA_VISIBLE",
    "DS_ACCELERATOR",
    "GLOO_",
    "MLFLOW_",
    "NCCL_",
    "OMP_",
    "PYTHONPATH",
    "SCBERT_",
    "TORCH_",
)
"""Beginnings of the names of environment variables that every host gets; --env adds others."""
GRACE_SECONDS = 20.0
EXIT_LOST = 75
_SSH_FAILED = 255


class Remote:
    """The command of one host, in a session of its own there."""

    def __init__(
        self, host: str, command: str, log: Path, show: str, environ: Mapping[str, str]
    ) -> None:
        self.host = host
        self.session = ""
        # The shell leads a session that holds all ranks; its number comes first.
        script = f'echo session $$; eval "$(cat)"; {command}'
        wrapped = f"setsid --wait sh -c {shlex.quote(script)}"
        self.process = subprocess.Popen(
            [*SSH, "-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=3", host, wrapped],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        # Not in the command: everybody on these hosts sees command lines, and there may be a token.
        lines = [f"export {name}={shlex.quote(value)}\n" for name, value in environ.items()]
        with contextlib.suppress(BrokenPipeError), self.process.stdin as script_input:
            script_input.write("".join(lines).encode())
        self.reader = threading.Thread(target=self._read, args=(self.process.stdout, log, show))
        self.reader.start()

    def _read(self, lines: IO[bytes], log: Path, show: str) -> None:
        with lines, log.open("ab") as file:
            for line in lines:
                if not self.session and line.startswith(b"session "):
                    self.session = line.split()[1].decode()
                    continue
                file.write(line)
                file.flush()
                sys.stdout.write(show + line.decode(errors="replace"))
                sys.stdout.flush()

    def signal(self, name: str, ranks_only: bool) -> None:
        """Send a signal to this host's ranks, or to all of its processes."""
        if self.session:
            which = ["-f", "--", "--local_rank="] if ranks_only else []
            command = ["pkill", f"-{name}", "-s", self.session, *which]
            subprocess.run([*SSH, self.host, shlex.join(command)], check=False, timeout=30)


def main(argv: list[str] | None = None) -> int:
    """Run the command on all hosts and return the exit code."""
    return cli.run(lambda: _main(argv))


def _main(argv: list[str] | None) -> int:
    options = _parser().parse_args(argv)
    hosts = read_hostfile(options.hostfile)
    here = Path.cwd()
    passed = {
        name: value
        for name, value in os.environ.items()
        if name.startswith(PASSED_ON) or name in options.env
    }
    look_at_hosts(list(hosts), here, sys.executable, options.master_port, passed)
    if options.check:
        cli.echo(f"{len(hosts)} hosts are ready")
        return 0
    if not options.command:
        raise ValueError("nothing to run: name launchers/pretrain.py and its settings at the end")
    options.logs.mkdir(parents=True, exist_ok=True)
    # Else a bare login has no PATH to this environment's programs.
    passed["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    remotes = []
    for number, host in enumerate(hosts):
        command = _command(options, number, next(iter(hosts)), here)
        show = "" if number == 0 else f"[{host}] "
        remotes.append(Remote(host, command, options.logs / f"{host}.log", show, passed))
    return _wait(remotes)


def _command(options: argparse.Namespace, number: int, first: str, here: Path) -> str:
    words = [sys.executable, "-m", "deepspeed.launcher.runner", "--no_ssh"]
    words += ["--hostfile", str(options.hostfile.absolute()), "--node_rank", str(number)]
    words += ["--master_addr", options.master_addr or first]
    words += ["--master_port", str(options.master_port)]
    if options.rank_logs:
        words += ["--enable_each_rank_log", str(options.logs.absolute())]
    ours = shlex.join([*words, *options.command])
    return f"cd {shlex.quote(str(here))} && exec {ours}"


def _wait(remotes: list[Remote]) -> int:
    """Wait for all; pass signals on; end the others some time after the first failure."""

    def pass_on(number: int, _: object) -> None:
        for remote in remotes:
            remote.signal(signal.Signals(number).name.removeprefix("SIG"), ranks_only=True)

    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, pass_on)
    code, deadline = 0, float("inf")
    while running := [remote for remote in remotes if remote.process.poll() is None]:
        if not code and (failed := [r for r in remotes if r.process.returncode]):
            lost = failed[0].process.returncode == _SSH_FAILED
            code = EXIT_LOST if lost else failed[0].process.returncode
            deadline = time.monotonic() + GRACE_SECONDS
            if lost:
                print(f"error: the connection to {failed[0].host} was lost", file=sys.stderr)
        if time.monotonic() > deadline:
            for remote in running:
                remote.signal("KILL", ranks_only=False)
                remote.process.terminate()
            deadline = float("inf")
        time.sleep(0.1)
    for remote in remotes:
        remote.reader.join()
    codes = [r.process.returncode for r in remotes if r.process.returncode]
    return code or (codes[0] if codes else 0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--hostfile", type=Path, required=True, help="lines NAME slots=N")
    parser.add_argument("--master_addr", help="address of the first host, if its name is not it")
    parser.add_argument("--master_port", type=int, default=29500)
    parser.add_argument("--env", nargs=1, action="extend", default=[], help="variable to pass on")
    parser.add_argument("--logs", type=Path, default=Path("logs"), help="folder of a log per host")
    parser.add_argument("--rank_logs", action="store_true", help="and of a log per rank instead")
    parser.add_argument("--check", action="store_true", help="look at the hosts, start nothing")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="script and its settings")
    return parser


if __name__ == "__main__":
    sys.exit(main())
