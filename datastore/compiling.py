"""Native kernels, compiled on first use and kept for the next process.

A library is made by the C++ compiler that DeepSpeed needs too ($CXX, else g++ or c++) in
`$SCBERT_KERNEL_CACHE` or `~/.cache/scbert-scale`; its name is a digest of the sources, the flags
and the compiler. It is compiled beside its name and then renamed, one process at a time, under a
lock that the system releases when its owner dies. It ends in a digest of its own bytes: one that a
full disk or a crash has cut short would kill the process that loads it, so it is made anew.
"""

import fcntl
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path


def compile_library(name: str, sources: Sequence[Path], flags: Sequence[str]) -> Path:
    """Compile a shared library unless it is there.

    Args:
        name: What the file's name begins with.
        sources: C++ files, and the headers that they include.
        flags: What the compiler is told.

    Returns:
        The library's path.

    Raises:
        OSError: If there is no compiler, no place for the library, or a source does not compile.
        subprocess.SubprocessError: If the compiler does not tell its version.
    """
    compiler = _find_compiler()
    version = subprocess.run([*compiler, "--version"], capture_output=True, check=True).stdout
    command = [*compiler, *flags, *(str(source) for source in sources if source.suffix == ".cpp")]
    text = b"".join(source.read_bytes() for source in sources)
    # Machines of two kinds may share a home folder.
    digest = hashlib.sha256(text + version + " ".join([platform.machine(), *command]).encode())
    folder = _cache_folder()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    library = folder / f"{name}_{digest.hexdigest()[:24]}.so"
    if _is_whole(library):
        return library
    with (folder / "build.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not _is_whole(library):
            with tempfile.TemporaryDirectory(dir=folder) as beside:
                made = Path(beside) / library.name
                _compile(command, made)
                _seal(made)
                made.replace(library)
    return library


def _find_compiler() -> list[str]:
    """The compiler and the arguments that $CXX gives it."""
    named = os.environ.get("CXX", "").strip()
    if not named:
        found = shutil.which("g++") or shutil.which("c++")
        if found is None:
            raise FileNotFoundError("there is no C++ compiler (install g++ or set CXX)")
        return [found]
    try:
        program, *arguments = shlex.split(named)
    except ValueError as error:
        raise OSError(f"CXX is {named!r}, which is no command line: {error}") from error
    found = shutil.which(program)
    if found is None:
        raise FileNotFoundError(f"there is no C++ compiler {program!r}; correct CXX or unset it")
    return [found, *arguments]


def _compile(command: Sequence[str], made: Path) -> None:
    result = subprocess.run([*command, "-o", str(made)], capture_output=True, check=False)
    if result.returncode:
        told = result.stderr.decode(errors="replace").splitlines()
        first = (told or ["no message"])[0]
        raise OSError(f"{command[0]} could not compile the native kernels: {first}")


def _seal(library: Path) -> None:
    """Put a digest of a library's bytes behind them, where the loader does not look."""
    with library.open("r+b") as file:
        digest = hashlib.sha256(file.read()).digest()
        file.write(digest)
        file.flush()
        os.fsync(file.fileno())


def _is_whole(library: Path) -> bool:
    try:
        content = library.read_bytes()
    except FileNotFoundError:
        return False
    size = hashlib.sha256().digest_size
    return hashlib.sha256(content[:-size]).digest() == content[-size:]


def _cache_folder() -> Path:
    named = os.environ.get("SCBERT_KERNEL_CACHE")
    if named:
        return Path(named)
    try:
        return Path.home() / ".cache" / "scbert-scale"
    except RuntimeError as error:
        raise OSError(
            f"there is no place for kernels ({error}); set SCBERT_KERNEL_CACHE"
        ) from error
