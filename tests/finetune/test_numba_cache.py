"""What is compiled once is there for the next process, and without a place nothing fails."""

import importlib.util
from pathlib import Path
from types import ModuleType

import numba
import pytest

from finetune.numba_cache import keep_compiled

SOURCE = "import numba\n\n@numba.njit\ndef doubled(x):\n    return 2 * x\n"


def module(path: Path) -> ModuleType:
    path.write_text(SOURCE)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def test_the_second_start_does_not_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numba.config, "CACHE_DIR", "")
    hits = []
    for _ in range(2):
        made = module(tmp_path / "made.py")
        keep_compiled(made)
        assert made.doubled(3) == 6
        hits.append(sum(made.doubled.stats.cache_hits.values()))
    assert hits == [0, 1]
    assert len(list((tmp_path / "__pycache__").glob("made.doubled-*.nbi"))) == 1


def test_without_a_place_it_compiles_as_ever() -> None:
    nowhere = ModuleType("nowhere")
    exec(SOURCE, vars(nowhere))  # no file to lie beside
    keep_compiled(nowhere)
    assert vars(nowhere)["doubled"](3) == 6
