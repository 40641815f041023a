"""How the native kernels are compiled and where the library is kept."""

import subprocess
import sys
from pathlib import Path

import pytest

from pretrain import native


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SCBERT_KERNEL_CACHE", str(tmp_path / "kernels"))
    return tmp_path / "kernels"


def test_processes_that_start_together_compile_once(folder: Path) -> None:
    folder.mkdir()
    (folder / "build.lock").touch()  # left by a process that was killed
    code = "from pretrain.native import build; print(build('avx512'))"
    command = [sys.executable, "-W", "ignore", "-c", code]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    named = {process.communicate()[0].strip() for process in started}

    assert len(named) == 1
    library = Path(named.pop())
    assert sorted(path.name for path in folder.iterdir()) == ["build.lock", library.name]
    before = library.stat().st_mtime_ns
    assert native.build("avx512") == library
    assert library.stat().st_mtime_ns == before


def test_another_source_is_another_library(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in (1, 2):
        source = tmp_path / f"{number}.cpp"
        source.write_text(f"int answer() {{ return {number}; }}")
        monkeypatch.setattr(native, "SOURCES", {"bf16": (str(source),)})
        native.build("avx512")

    assert len(list(folder.glob("*.so"))) == 2


def test_a_compiler_that_fails_is_quoted_and_leaves_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "broken.cpp"
    source.write_text("#error not today\n")
    monkeypatch.setattr(native, "SOURCES", {"bf16": (str(source),)})

    with pytest.raises(OSError, match=r"could not compile the native kernels: .*not today"):
        native.build("avx512")

    assert [path.name for path in folder.iterdir()] == ["build.lock"]


def test_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))

    with pytest.raises(FileNotFoundError, match=r"no C\+\+ compiler \(install g\+\+"):
        native.build("avx512")


@pytest.mark.parametrize("name", native.VARIANTS)
def test_every_build_compiles_whatever_this_cpu_is(name: str) -> None:
    assert native.build(name).exists()
