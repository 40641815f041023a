"""Memory that is kept is not faulted in again."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COUNT = """
import ctypes, resource, sys
from pretrain.allocator import keep_freed_memory
kept = sys.argv[1] == "keep" and keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
def use():
    block = libc.malloc(24 << 20)
    ctypes.memset(block, 1, 24 << 20)
    guard = libc.malloc(64)  # or the block would be the end of the heap
    libc.free(block)
    return guard
first = use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
guards = [use() for _ in range(20)]
print(int(kept), resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(mode: str) -> tuple[bool, int]:
    done = subprocess.run(
        [sys.executable, "-c", COUNT, mode], capture_output=True, text=True, check=True, cwd=ROOT
    )
    kept, count = done.stdout.split()
    return kept == "1", int(count)


def test_kept_memory_is_not_faulted_in_again(monkeypatch: pytest.MonkeyPatch) -> None:
    # Dynamic thresholds, glibc's default, would adapt to this one size; a fixed one does not.
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "131072")
    _, given_back = faults("give back")
    kept, few = faults("keep")
    if not kept:
        pytest.skip("this C library has no mallopt")
    assert given_back > 200  # a block has 6,144 pages, or 12 huge ones
    assert few < given_back / 10, (few, given_back)
