"""Native CPU kernels, compiled on first use for what this processor can do.

There are two families, `bf16` for x86-64 with AVX-512 and `float32` for AVX2 too; `missing` says
what stands against one elsewhere. `datastore.compiling` says how they are compiled.
"""

import ctypes
import functools
import logging
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from datastore.compiling import compile_library

_logger = logging.getLogger(__name__)

Family = Literal["bf16", "float32"]

COMMON_FLAGS: Final = "-std=c++17 -O3 -w -fPIC -shared -pthread -ffp-contract=fast"
SOURCES: Final[Mapping[Family, tuple[str, ...]]] = {
    "bf16": (
        "attention_call.h",
        "favor_native.cpp",
        "favor_strips.h",
        "feed_forward_native.cpp",
        "feed_forward_plan.h",
        "native_tiles.h",
        "native_threads.h",
    ),
    "float32": (
        "attention_call.h",
        "float32_attention.cpp",
        "float32_feed_forward.cpp",
        "float32_vectors.h",
        "native_threads.h",
    ),
}
_AVX512: Final = ("avx512f", "avx512bw", "avx512vl", "avx512dq", "fma")


@dataclass(frozen=True)
class Variant:
    """A build: what it is of, and the CPU flags that it needs and is compiled for."""

    family: Family
    needs: tuple[str, ...]
    more: str = ""
    """Flags for the compiler besides."""

    @property
    def flags(self) -> str:
        """What the compiler is told."""
        names = (name.replace("avx512_", "avx512").replace("_", "-") for name in self.needs)
        cpu = " ".join(f"-m{name}" for name in names)
        return f"{COMMON_FLAGS} {cpu} {self.more}"


VARIANTS: Final[Mapping[str, Variant]] = {
    "amx": Variant("bf16", (*_AVX512, "avx512_bf16", "amx_tile", "amx_bf16"), "-DFAVOR_AMX"),
    "avx512_bf16": Variant("bf16", (*_AVX512, "avx512_bf16")),
    "avx512": Variant("bf16", _AVX512),
    "float32_avx512": Variant("float32", _AVX512),
    "float32_avx2": Variant("float32", ("avx2", "fma")),
}
"""Builds by name, the fastest of a family first."""


def missing(family: Family = "bf16") -> str | None:
    """What this machine lacks to run a family, or None; compiles it at the first call."""
    return _choose(family)[1]


def best_variant(family: Family = "bf16") -> str:
    """The fastest build of a family that runs here.

    Raises:
        OSError: If none does, for the reason that `missing` gives.
    """
    variant, problem = _choose(family)
    if variant is None:
        raise OSError(f"there are no native kernels in {family}: {problem}")
    return variant


@functools.cache
def _choose(family: Family) -> tuple[str | None, str | None]:
    """The first build that loads, or why there is none; tells once which were passed over."""
    variants = supported_variants(family)
    if not variants:
        least = {"bf16": "AVX-512 (x86-64 with F, BW, VL and DQ)", "float32": "AVX2 (x86-64)"}
        return None, f"the CPU has no {least[family]}"
    problems = {}
    for variant in variants:
        try:
            load(variant)
        except (OSError, subprocess.SubprocessError) as problem:
            problems[variant] = str(problem)
            continue
        for name, reason in problems.items():
            _logger.warning("native kernels: %s in place of %s: %s", variant, name, reason)
        return variant, None
    return None, "; ".join(dict.fromkeys(problems.values()))


@functools.cache
def supported_variants(family: Family = "bf16") -> tuple[str, ...]:
    """The builds of a family that this CPU can run, fastest first."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return ()
    line = next((line for line in text.splitlines() if line.startswith("flags")), "")
    flags = set(line.split())
    of = (name for name, variant in VARIANTS.items() if variant.family == family)
    return tuple(name for name in of if flags.issuperset(VARIANTS[name].needs))


@functools.cache
def load(variant: str) -> ctypes.CDLL:
    """Load a build, compiling it if it is not in the cache.

    Raises:
        OSError: If there is no compiler, no place for the library, or no permission to use AMX, or
            if the compiler fails.
        subprocess.SubprocessError: If the compiler does not tell its version.
    """
    library = ctypes.CDLL(str(build(variant)))
    if VARIANTS[variant].family == "bf16" and library.favor_prepare():
        raise OSError("the system does not let this process use AMX tiles")
    return library


def build(variant: str) -> Path:
    """Compile a build unless it is there, and return the library's path.

    Raises:
        OSError: If there is no compiler, no place for the library, or the compiler fails.
        subprocess.SubprocessError: If the compiler does not tell its version.
    """
    sources = [Path(__file__).parent / name for name in SOURCES[VARIANTS[variant].family]]
    return compile_library(f"kernels_{variant}", sources, VARIANTS[variant].flags.split())


def run(function: Any, call: ctypes.Structure) -> None:
    """Call a kernel.

    Raises:
        MemoryError: If it found no memory for its buffers.
    """
    if function(ctypes.byref(call)):
        raise MemoryError("a native kernel found no memory for its tiles")
