"""Native CPU kernels, compiled on first use for what this processor can do.

They are for x86-64 with AVX-512; `missing` says what stands against them elsewhere. The library is
compiled by the C++ compiler that DeepSpeed needs too ($CXX, else g++ or c++) into
`$SCBERT_KERNEL_CACHE` or `~/.cache/scbert-scale`; its name is a digest of the sources, the flags
and the compiler. It is compiled beside its name and then renamed, one process at a time, under a
lock that the system releases when its owner dies.
"""

import ctypes
import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

SOURCES = tuple(
    Path(__file__).with_name(name)
    for name in ("favor_native.cpp", "feed_forward_native.cpp", "native_tiles.h")
)
COMMON_FLAGS = (
    "-std=c++17 -O3 -w -fPIC -shared -pthread -mfma -mavx512f -mavx512bw -mavx512vl -mavx512dq"
)
VARIANTS = {
    "amx": (
        {"amx_tile", "amx_bf16", "avx512_bf16"},
        "-mavx512bf16 -mamx-tile -mamx-bf16 -DFAVOR_AMX",
    ),
    "avx512": ({"avx512f", "avx512bw", "avx512vl", "avx512dq", "fma"}, ""),
}
"""Builds by name, fastest first: CPU flags they need besides the last one's, and compiler flags."""


@functools.cache
def missing() -> str | None:
    """What this machine lacks to run the kernel, or None; compiles it at the first call."""
    variants = supported_variants()
    if not variants:
        return "the CPU has no AVX-512 (x86-64 with F, BW, VL and DQ)"
    try:
        load(variants[0])
    except (OSError, subprocess.SubprocessError) as problem:
        return str(problem)
    return None


@functools.cache
def supported_variants() -> tuple[str, ...]:
    """The builds this CPU can run, fastest first."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return ()
    line = next((line for line in text.splitlines() if line.startswith("flags")), "")
    flags = set(line.split())
    base = VARIANTS["avx512"][0]
    return tuple(name for name, (needed, _) in VARIANTS.items() if needed | base <= flags)


def best_variant() -> str:
    """The fastest build this CPU can run."""
    return supported_variants()[0]


@functools.cache
def load(variant: str) -> ctypes.CDLL:
    """Load a build, compiling it if it is not in the cache.

    Raises:
        OSError: If there is no compiler, no place for the library, or no permission to use AMX.
        subprocess.SubprocessError: If the compiler fails.
    """
    library = ctypes.CDLL(str(build(variant)))
    if library.favor_prepare():
        raise OSError("the system does not let this process use AMX tiles")
    return library


def build(variant: str) -> Path:
    """Compile a build unless it is there, and return the library's path."""
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("c++")
    if compiler is None:
        raise FileNotFoundError("there is no C++ compiler (install g++ or set CXX)")
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
    command = [compiler, *COMMON_FLAGS.split(), *VARIANTS[variant][1].split()]
    command += [str(source) for source in SOURCES if source.suffix == ".cpp"]
    text = b"".join(source.read_bytes() for source in SOURCES)
    digest = hashlib.sha256(text + version + " ".join(command).encode())
    folder = Path(os.environ.get("SCBERT_KERNEL_CACHE") or Path.home() / ".cache" / "scbert-scale")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    library = folder / f"kernels_{variant}_{digest.hexdigest()[:24]}.so"
    if library.exists():
        return library
    with (folder / "build.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            with tempfile.TemporaryDirectory(dir=folder) as beside:
                made = Path(beside) / library.name
                result = subprocess.run(
                    [*command, "-o", str(made)], capture_output=True, text=True, check=False
                )
                if result.returncode:
                    first = (result.stderr.splitlines() or ["no message"])[0]
                    raise OSError(f"{compiler} could not compile the native kernels: {first}")
                made.replace(library)
    return library


def run(function: Any, call: ctypes.Structure) -> None:
    """Call a kernel.

    Raises:
        MemoryError: If it found no memory for its buffers.
    """
    if function(ctypes.byref(call)):
        raise MemoryError("a native kernel found no memory for its tiles")
