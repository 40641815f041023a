"""The commands that README and the pages in docs/ show, and how a test runs them."""

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def pages() -> list[Path]:
    """README and every page."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def bash_blocks(page: Path) -> list[str]:
    """What stands in the page's blocks of shell commands."""
    return re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def commands(page: Path) -> list[str]:
    """All commands of a page, without comments, continued lines joined."""
    text = "\n".join(bash_blocks(page)).replace("\\\n", " ")
    lines = [re.sub(r"(^|\s)#.*", "", line).strip() for line in text.splitlines()]
    return [line for line in lines if line]


def shown(page: str, part: str, changes: Mapping[str, str]) -> str:
    """The one command of a page in docs/ that has this part, with a test's paths and sizes.

    Args:
        page: Name of the page.
        part: What tells the command from the page's others.
        changes: What takes the place of what the page has, each once in the command.
    """
    (command,) = {line for line in commands(ROOT / "docs" / page) if part in line}
    for before, after in changes.items():
        assert command.count(before) == 1, f"{before!r} is not once in {command!r}"
        command = command.replace(before, after)
    return command


def inline_code(page: Path) -> list[str]:
    """All code in the page's running text, each on one line; some of it is commands."""
    text = re.sub(r"^ *```.*?^ *```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    return [" ".join(code.split()) for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", text)]


def run_shown(command: str, folder: Path, programs: Path | None = None) -> None:
    """Run a command as a reader would in a shell, with this environment's programs on PATH.

    Args:
        command: As shown, or with smaller settings behind it.
        folder: Where the reader stands; runs and models are kept in its `mlflow.db`.
        programs: Folder of stand-ins, which go before all other programs.
    """
    ours = Path(sys.executable).parent
    path = [*([programs] if programs else []), ours, os.environ["PATH"]]
    environ = {**os.environ, "PATH": os.pathsep.join(map(str, path))}
    environ.pop("MLFLOW_TRACKING_URI", None)
    # A machine that runs tests may run a training at the default port, too.
    for launcher in ("deepspeed", "python launchers/fan_out.py"):
        if command.startswith(f"{launcher} "):
            port = f" --master_port {free_port()} "
            command = launcher + port + command.removeprefix(f"{launcher} ")
    started = time.perf_counter()
    done = subprocess.run(
        command,
        shell=True,
        cwd=folder,
        env=environ,
        capture_output=True,
        text=True,
        check=False,
    )
    print(f"{time.perf_counter() - started:6.1f} s  {command}")
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"


def free_port() -> int:
    """A port that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
