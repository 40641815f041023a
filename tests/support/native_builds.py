"""Native builds to test: each that this CPU runs, and the one for AMX on any CPU with AVX-512."""

import hashlib
from pathlib import Path
from typing import Final

import pytest

from pretrain.native import VARIANTS, Family, Variant, supported_variants

EMULATED: Final = "amx_emulated"
"""The build for AMX, its tiles in memory."""
_TILES: Final = Path(__file__).with_name("emulated_tiles.h")


def names(family: Family) -> list[str]:
    """All builds of a family."""
    return [name for name in VARIANTS if VARIANTS[name].family == family]


def runnable(name: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The build of that name, or with emulated tiles; skips if this CPU runs neither."""
    supported = supported_variants(VARIANTS[name].family)
    if name in supported:
        return name
    if name != "amx" or not supported:
        pytest.skip(f"this CPU cannot run the {name} build")
    monkeypatch.setitem(VARIANTS, EMULATED, _emulated(supported[0]))
    return EMULATED


def _emulated(host: str) -> Variant:
    # Libraries are named by a digest of the kernels and of all flags; the header is neither.
    digest = hashlib.sha256(_TILES.read_bytes()).hexdigest()[:16]
    more = f"-DFAVOR_AMX -DTILES_{digest} -include {_TILES}"
    return Variant("bf16", VARIANTS[host].needs, more)
