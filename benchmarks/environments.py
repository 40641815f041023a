"""Virtual environments for what we compare ourselves with, outside the repository."""

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Environment:
    """A Python for some peers, or why there is none."""

    python: Path | None
    problem: str = ""


def find_python312(given: str | None) -> str | None:
    """Find an interpreter of version 3.12 that runs: the one given, ours, or the one on PATH."""
    if given is None and sys.version_info[:2] == (3, 12):
        return sys.executable
    candidate = given or shutil.which("python3.12")
    if candidate is None:
        return None
    code = "import sys; sys.exit(sys.version_info[:2] != (3, 12))"
    try:
        found = subprocess.run([candidate, "-c", code], capture_output=True, check=False)
    except OSError:
        return None
    return candidate if found.returncode == 0 else None


def environment(folder: Path, python: str | None, requirements: list[str]) -> Environment:
    """Make a virtual environment and install packages with pip, unless that is done already.

    Args:
        folder: Where to; `installed.txt` in it says what is there.
        python: Interpreter to make it from.
        requirements: What to install.

    Returns:
        The environment's interpreter, or the reason why it could not be made.
    """
    if python is None:
        return Environment(None, "no Python 3.12 found; name one with --python312")
    inside, done = folder / "bin" / "python", folder / "installed.txt"
    if done.is_file() and done.read_text().split() == requirements:
        return Environment(inside)
    for command in (
        [python, "-m", "venv", "--clear", str(folder)],
        [str(inside), "-m", "pip", "install", "--quiet", *requirements],
    ):
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            lines = [line for line in result.stderr.splitlines() if line.startswith("ERROR")]
            return Environment(None, (lines or result.stderr.splitlines() or ["pip failed"])[-1])
    done.write_text("\n".join(requirements))
    return Environment(inside)
