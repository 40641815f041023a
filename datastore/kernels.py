"""The store's native kernels: where rows are cut (`cell_rows`) and cells packed (`packing`).

They do what NumPy does where they cannot be compiled, in half of its time or less
(docs/performance_loader.md, docs/performance_ingest.md).
"""

import ctypes
import functools
import logging
import subprocess
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from datastore.compiling import compile_library

log = logging.getLogger(__name__)

_SOURCES: Final = ("cell_rows.cpp", "cell_packing.cpp")
_FLAGS: Final = ("-std=c++17", "-O3", "-fPIC", "-shared")


@functools.cache
def missing() -> str | None:
    """What this machine lacks to run the kernels, or None; compiles them at the first call."""
    try:
        _library()
    except (OSError, subprocess.SubprocessError) as problem:
        log.debug("NumPy does the work of the kernels: %s", problem)
        return str(problem)
    return None


def has(name: str) -> bool:
    """Tell whether there is a kernel of that name."""
    return missing() is None and hasattr(_library(), name)


def fit(*arrays: NDArray[Any]) -> tuple[NDArray[Any], ...]:
    """Give arrays as kernels take them: contiguous, aligned, of this machine's byte order."""
    return tuple(
        np.require(array, array.dtype.newbyteorder("="), ["C_CONTIGUOUS", "ALIGNED"])
        for array in arrays
    )


def call(name: str, *arguments: Any) -> int:
    """Call a kernel with whole numbers and arrays that `fit`; give what it returns, 64 bits."""
    function = getattr(_library(), name)
    function.restype = ctypes.c_int64
    return int(function(*map(_argument, arguments)))


@functools.cache
def _library() -> ctypes.CDLL:
    sources = [Path(__file__).parent / name for name in _SOURCES]
    return ctypes.CDLL(str(compile_library("cells", sources, _FLAGS)))


def _argument(value: Any) -> Any:
    if not isinstance(value, np.ndarray):
        return ctypes.c_int64(value)
    if not (value.flags.c_contiguous and value.flags.aligned and value.dtype.isnative):
        raise ValueError("kernels take contiguous arrays of this machine's byte order")
    return ctypes.c_void_p(value.ctypes.data)
