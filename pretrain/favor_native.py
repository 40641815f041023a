"""FAVOR+ attention by a native CPU kernel, `favor_native.cpp`, built on first use.

For bf16 inputs on x86-64 with AVX-512; `unavailable` says why it cannot run elsewhere. The library
is compiled by the C++ compiler that DeepSpeed needs too ($CXX, else g++ or c++), for what this CPU
can do, into `$SCBERT_KERNEL_CACHE` or `~/.cache/scbert-scale`; its name is a digest of the source,
the flags and the compiler. It is compiled beside its name and then renamed, one process at a time,
under a lock that the system releases when its owner dies.
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

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pretrain.fused import empty_slices

SOURCE = Path(__file__).with_name("favor_native.cpp")
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

MAX_DIM = 512
"""Widest head; the kernel rounds a row of it on the stack."""


def native_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    projection: Tensor,
    epsilon: float,
    offsets: Tensor,
    query_offsets: Tensor,
    variant: str | None = None,
) -> Tensor:
    """Attend within packed cells; see `pretrain.favor.favor_attention`.

    The result does not depend on the number of threads (`torch.get_num_threads`).

    Args:
        q: Queries, bf16 on the CPU, (Q, H, d); as `k` and `v`, of any strides but the last.
        k: Keys, (tokens, H, d).
        v: Values, (tokens, H, d).
        projection: Random directions, (m, d).
        epsilon: Added to each feature.
        offsets: First token of each cell, and their number, int64 (B + 1,), already checked.
        query_offsets: The same for the queries.
        variant: A key of `VARIANTS`; by default the fastest this machine has.

    Returns:
        Attended values, bf16 (Q, H, d).
    """
    variant = variant or best_variant()
    attended: Tensor = _NativeAttention.apply(
        q, k, v, projection, epsilon, offsets.contiguous(), query_offsets.contiguous(), variant
    )
    return attended


def unavailable(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why the kernel cannot attend to these tensors here, or None if it can."""
    if any(x.dtype != torch.bfloat16 for x in (q, k, v)):
        return f"it takes bfloat16, not {str(q.dtype).removeprefix('torch.')}"
    if q.device.type != "cpu":
        return f"it runs on the CPU, not on {q.device.type}"
    if q.shape[-1] > MAX_DIM:
        return f"heads are {q.shape[-1]} wide, {MAX_DIM} at most"
    return missing()


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
    for name in ("favor_forward", "favor_backward"):
        getattr(library, name).argtypes = [ctypes.POINTER(_Call)]
    if library.favor_prepare():
        raise OSError("the system does not let this process use AMX tiles")
    return library


def build(variant: str) -> Path:
    """Compile a build unless it is there, and return the library's path."""
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("c++")
    if compiler is None:
        raise FileNotFoundError("there is no C++ compiler (install g++ or set CXX)")
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
    command = [compiler, *COMMON_FLAGS.split(), *VARIANTS[variant][1].split(), str(SOURCE)]
    digest = hashlib.sha256(SOURCE.read_bytes() + version + " ".join(command).encode())
    folder = Path(os.environ.get("SCBERT_KERNEL_CACHE") or Path.home() / ".cache" / "scbert-scale")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    library = folder / f"favor_{variant}_{digest.hexdigest()[:24]}.so"
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
                    raise OSError(f"{compiler} could not compile {SOURCE.name}: {first}")
                made.replace(library)
    return library


class _Rows(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("token", ctypes.c_int64), ("head", ctypes.c_int64)]


class _Call(ctypes.Structure):
    """Mirrors `struct Call` of the source."""

    _fields_ = [
        *((name, _Rows) for name in ("q", "k", "v", "out", "grad", "grad_q", "grad_k", "grad_v")),
        *((name, ctypes.c_void_p) for name in ("directions", "offsets", "query_offsets")),
        *((name, ctypes.c_void_p) for name in ("divisors", "sums", "maxima")),
        *((name, ctypes.c_int64) for name in ("cells", "heads", "dim", "features", "threads")),
        ("epsilon", ctypes.c_double),
        ("scale", ctypes.c_double),
    ]


class _NativeAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        projection: Tensor,
        epsilon: float,
        offsets: Tensor,
        query_offsets: Tensor,
        variant: str,
    ) -> Tensor:
        q, k, v = (_dense_rows(x) for x in (q, k, v))
        heads, dim = q.shape[1:]
        features, cells = len(projection), len(offsets) - 1
        directions = (projection.float() * dim**-0.25).contiguous()
        out = torch.empty(q.shape, dtype=torch.bfloat16)
        divisors = torch.empty(q.shape[:2])
        columns = (dim + 31) // 32 * 32, (features + 15) // 16 * 16
        sums = torch.empty(cells, heads, columns[0] + 1, columns[1])
        maxima = torch.empty(cells, heads)
        saved = q, k, v, out, directions, offsets, query_offsets, divisors, sums, maxima
        _run(load(variant).favor_forward, _call(saved, epsilon))
        ctx.save_for_backward(*saved)
        ctx.epsilon, ctx.variant = epsilon, variant
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        grad = _dense_rows(grad.to(torch.bfloat16))
        call = _call(saved, ctx.epsilon)
        gradients = empty_slices(*saved[:3])
        call.grad = _rows(grad)
        call.grad_q, call.grad_k, call.grad_v = (_rows(x) for x in gradients)
        _run(load(ctx.variant).favor_backward, call)
        return *gradients, None, None, None, None, None


def _dense_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _rows(x: Tensor) -> _Rows:
    return _Rows(x.data_ptr(), x.stride(0), x.stride(1))


def _call(saved: tuple[Tensor, ...], epsilon: float) -> _Call:
    q, k, v, out, directions, offsets, query_offsets, divisors, sums, maxima = saved
    return _Call(
        q=_rows(q),
        k=_rows(k),
        v=_rows(v),
        out=_rows(out),
        directions=directions.data_ptr(),
        offsets=offsets.data_ptr(),
        query_offsets=query_offsets.data_ptr(),
        divisors=divisors.data_ptr(),
        sums=sums.data_ptr(),
        maxima=maxima.data_ptr(),
        cells=len(offsets) - 1,
        heads=q.shape[1],
        dim=q.shape[2],
        features=len(directions),
        threads=torch.get_num_threads(),
        epsilon=epsilon,
        scale=q.shape[2] ** -0.25,
    )


def _run(function: Any, call: _Call) -> None:
    if function(ctypes.byref(call)):
        raise MemoryError("the attention kernel found no memory for its tiles")
