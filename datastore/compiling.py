"""Native kernels, compiled on first use and kept for the next process.

A library is made by the C++ compiler that DeepSpeed needs too ($CXX, else g++ or c++) in
`$SCBERT_KERNEL_CACHE` or `~/.cache/scbert-scale`; its name is a digest of the sources, the flags
and the compiler. It is compiled beside its name and then renamed, one process at a time, under a
lock that the system releases when its owner dies.
"""

import fcntl
import hashlib
import os
import platform
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
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("c++")
    if compiler is None:
        raise FileNotFoundError("there is no C++ compiler (install g++ or set CXX)")
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
    command = [compiler, *flags, *(str(source) for source in sources if source.suffix == ".cpp")]
    text = b"".join(source.read_bytes() for source in sources)
    # Machines of two kinds may share a home folder.
    digest = hashlib.sha256(text + version + " ".join([platform.machine(), *command]).encode())
    folder = _cache_folder()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    library = folder / f"{name}_{digest.hexdigest()[:24]}.so"
    if library.exists():
        return library
    with (folder / "build.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            with tempfile.TemporaryDirectory(dir=folder) as beside:
                made = Path(beside) / library.name
                result = subprocess.run(
                    [*command, "-o", str(made)], capture_output=True, check=False
                )
                if result.returncode:
                    told = result.stderr.decode(errors="replace").splitlines()
                    first = (told or ["no message"])[0]
                    raise OSError(f"{compiler} could not compile the native kernels: {first}")
                made.replace(library)
    return library


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
