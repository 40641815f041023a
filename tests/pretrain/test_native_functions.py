"""What lies inside the native kernels, by itself: functions of vectors, and threads."""

import ctypes
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

import pretrain
from datastore.compiling import compile_library
from pretrain.native import COMMON_FLAGS, VARIANTS
from tests.support.native_builds import names, runnable

KERNELS = Path(pretrain.__file__).parent
SUPPORT = Path(__file__).parents[1] / "support"


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile each time: a library's name does not tell of the headers that are included here."""
    monkeypatch.setenv("SCBERT_KERNEL_CACHE", str(tmp_path))


def computed(variant: str, x: Tensor, count: int) -> list[Tensor]:
    """What `tests/support/native_functions_*.cpp` computes of numbers, in a build."""
    build = VARIANTS[variant]
    source = SUPPORT / f"native_functions_{build.family}.cpp"
    flags = [*build.flags.split(), f"-I{KERNELS}"]
    library = ctypes.CDLL(str(compile_library("functions", [source], flags)))
    found = [torch.empty_like(x) for _ in range(count)]
    addresses = (ctypes.c_void_p(each.data_ptr()) for each in (x, *found))
    library.functions(*addresses, ctypes.c_int64(len(x)))
    return [each.double() for each in found]


def relative(found: Tensor, exact: Tensor) -> float:
    return float(((found - exact) / exact).abs().max())


def gelu(x: Tensor) -> tuple[Tensor, Tensor]:
    """GELU and its slope, float64."""
    wide = x.double().requires_grad_()
    value = torch.nn.functional.gelu(wide)
    (slope,) = torch.autograd.grad(value.sum(), wide)
    return value.detach(), slope


@pytest.mark.parametrize("name", names("bf16"))
def test_functions_of_the_bf16_kernels(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    variant = runnable(name, monkeypatch)
    x = torch.linspace(-120, 20, 1 << 19)
    powers, *_ = computed(variant, x, 4)
    assert relative(powers, x.double().exp2()) < 3e-6  # worst 2.7e-6

    x = torch.linspace(-8, 8, 1 << 19)  # farther, log2(e) x is rounded more coarsely
    _, exponentials, values, slopes = computed(variant, x, 4)
    value, slope = gelu(x)
    assert relative(exponentials, x.double().exp()) < 4e-6  # worst 3.1e-6
    assert float((values - value).abs().max()) < 8e-7  # worst 5.8e-7
    assert float((slopes - slope).abs().max()) < 1e-6  # worst 6.5e-7


@pytest.mark.parametrize("name", names("float32"))
def test_functions_of_the_float32_kernels(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    variant = runnable(name, monkeypatch)
    x = torch.linspace(-87, 0, 1 << 19)
    exponentials, _ = computed(variant, x, 2)
    assert relative(exponentials, x.double().exp()) < 1.1e-7  # worst 8.5e-8

    x = torch.linspace(-8, 8, 1 << 19)
    _, values = computed(variant, x, 2)
    assert float((values - gelu(x)[0]).abs().max()) < 6e-7  # worst 4.2e-7, half a digit at 8


def test_threads_that_cannot_be_had_are_done_without(tmp_path: Path) -> None:
    program = tmp_path / "starved"
    flags = COMMON_FLAGS.replace("-shared", "").split()
    source = str(SUPPORT / "starved_threads.cpp")
    command = ["g++", *flags, "-mavx2", f"-I{KERNELS}", source, "-o", str(program)]
    subprocess.run(command, check=True)

    result = subprocess.run([program], capture_output=True, text=True, check=False)

    assert result.returncode == 0, result.stderr
    # None fails, where none is left; before it, the list of threads and each of three.
    assert result.stdout.split() == ["0", "1", "2", "3", "4"]
