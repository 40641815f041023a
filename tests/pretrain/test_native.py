"""How the native kernels are compiled and where the library is kept."""

import ctypes
import functools
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain import native


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SCBERT_KERNEL_CACHE", str(tmp_path / "kernels"))
    return tmp_path / "kernels"


def small_source(folder: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a source in the place of the kernels'."""
    source = folder / "small.cpp"
    source.write_text(text)
    monkeypatch.setattr(native, "SOURCES", {"bf16": (str(source),)})


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
    small_source(tmp_path, "#error not today\n", monkeypatch)

    with pytest.raises(OSError, match=r"could not compile the native kernels: .*not today"):
        native.build("avx512")

    assert [path.name for path in folder.iterdir()] == ["build.lock"]


def test_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))

    with pytest.raises(FileNotFoundError, match=r"no C\+\+ compiler \(install g\+\+"):
        native.build("avx512")


@pytest.mark.parametrize(
    ("named", "told"),
    [
        pytest.param("no-such-cc -O1", r"no C\+\+ compiler 'no-such-cc'", id="unknown"),
        pytest.param("'g++", r'CXX is "\'g\+\+", which is no command line', id="open quote"),
    ],
)
def test_a_compiler_that_is_none_is_refused(
    named: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", named)

    with pytest.raises(OSError, match=told):
        native.build("avx512")


def test_arguments_of_the_compiler_are_passed_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_source(tmp_path, "int answer() { return ANSWER; }", monkeypatch)
    monkeypatch.setenv("CXX", "g++ -DANSWER=42")

    assert ctypes.CDLL(str(native.build("avx512")))._Z6answerv() == 42


@pytest.mark.parametrize("left", [0, 40, 5000], ids=lambda left: f"{left} bytes left")
def test_a_damaged_library_is_made_anew(
    left: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_source(tmp_path, "int answer() { return 42; }", monkeypatch)
    library = native.build("avx512")
    whole = library.read_bytes()
    library.write_bytes(whole[:left])

    assert native.build("avx512") == library
    assert library.stat().st_size == len(whole) > 5000
    assert ctypes.CDLL(str(library))._Z6answerv() == 42


class TestChoice:
    """Builds are tried from the fastest on."""

    @pytest.fixture(autouse=True)
    def three_builds(self, monkeypatch: pytest.MonkeyPatch) -> None:
        three = ("amx", "avx512_bf16", "avx512")
        monkeypatch.setattr(native, "supported_variants", lambda family: three)
        # As at the start of a process; the choice of this one is left as it is.
        monkeypatch.setattr(native, "_choose", functools.cache(native._choose.__wrapped__))

    @staticmethod
    def refuse(monkeypatch: pytest.MonkeyPatch, **reasons: str) -> None:
        def load(variant: str) -> None:
            if variant in reasons:
                raise OSError(reasons[variant])

        monkeypatch.setattr(native, "load", load)

    def test_the_next_build_is_taken_and_said_once(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        self.refuse(monkeypatch, amx="no permission")
        with caplog.at_level(logging.WARNING, logger="pretrain.native"):
            assert native.missing() is None
            assert native.best_variant() == native.best_variant() == "avx512_bf16"
        assert [record.getMessage() for record in caplog.records] == [
            "native kernels: avx512_bf16 in place of amx: no permission"
        ]

    def test_none_loads(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.refuse(monkeypatch, amx="no permission", avx512_bf16="no disk", avx512="no disk")

        assert native.missing() == "no permission; no disk"
        with pytest.raises(OSError, match="no native kernels in bf16: no permission; no disk"):
            native.best_variant()


@pytest.mark.parametrize("name", native.VARIANTS)
def test_every_build_compiles_whatever_this_cpu_is(name: str) -> None:
    assert native.build(name).exists()
