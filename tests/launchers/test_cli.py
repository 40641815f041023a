"""The command line: precedence, refusals, exit codes."""

import os
import socket
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
import yaml

from datastore.config import StoreConfig
from launchers import (
    annotate,
    build_store,
    cli,
    fetch_pancreas,
    finetune,
    pretrain,
    quickstart,
)
from pretrain.config import PretrainConfig
from pretrain.distributed import start_ranks

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, kw_only=True)
class _Inner:
    rate: float = 1e-4
    """Rate."""


@dataclass(frozen=True, kw_only=True)
class _Outer:
    name: str
    """Name."""
    inner: _Inner = field(default_factory=_Inner)
    flag: bool = False
    """Flag."""


def _parse(*argv: str) -> _Outer:
    return cli.parse(_Outer, argv, launcher="none.py", description="Try.", example="none")


def test_defaults_then_file_then_flags(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("name: file\ninner:\n  rate: 1e-3\n")  # PyYAML alone reads 1e-3 as text
    assert _parse("--name", "x") == _Outer(name="x")
    assert _parse("--config", str(file)) == _Outer(name="file", inner=_Inner(rate=1e-3))
    assert _parse("--config", str(file), "--inner.rate", "2e-3").inner.rate == 2e-3


@pytest.mark.parametrize("flag", ["--local_rank=3", "--local-rank=3"])
def test_local_rank_is_accepted(flag: str) -> None:
    assert _parse("--name", "x", flag) == _Outer(name="x")


@dataclass(frozen=True, kw_only=True)
class _Files:
    files: list[str]
    """Files."""
    more: list[str] | None = None
    """More."""
    inner: _Inner = field(default_factory=_Inner)
    kind: Literal["old", "new"] = "old"
    """Kind."""
    size: int | None = None
    """Size."""
    flag: bool = False
    """Flag."""
    seeds: tuple[int, ...] = (0,)
    """Seeds."""


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        pytest.param("--files a --seeds 1 2", _Files(files=["a"], seeds=(1, 2)), id="numbers"),
        pytest.param(
            "--files a --seeds [1,2]", _Files(files=["a"], seeds=(1, 2)), id="in brackets"
        ),
        pytest.param("--files a.h5ad", _Files(files=["a.h5ad"]), id="one"),
        pytest.param("--files a b c --flag true", _Files(files=list("abc"), flag=True), id="many"),
        pytest.param("--files [a,b]", _Files(files=["a", "b"]), id="brackets"),
        pytest.param("--files=a,b", _Files(files=["a,b"]), id="a comma in a name"),
        pytest.param("--files 1e5", _Files(files=["1e5"]), id="a name like a number"),
        pytest.param("--files a --more b c", _Files(files=["a"], more=["b", "c"]), id="optional"),
        pytest.param("--files a --more null", _Files(files=["a"]), id="none"),
        pytest.param("--flag --files a", _Files(files=["a"], flag=True), id="switch first"),
        pytest.param("--files a --flag", _Files(files=["a"], flag=True), id="switch last"),
        pytest.param("--files a --flag=false", _Files(files=["a"]), id="switch off"),
        pytest.param(
            "--files a --inner.rate 2", _Files(files=["a"], inner=_Inner(rate=2.0)), id="group"
        ),
    ],
)
def test_lists_and_switches_are_taken_as_written(words: str, expected: _Files) -> None:
    argv = words.split()
    assert cli.parse(_Files, argv, launcher="none.py", description="", example="") == expected


def test_flags_with_dashes_are_the_same(tmp_path: Path) -> None:
    config = cli.parse(
        StoreConfig,
        ["--sources", "a-b.h5ad", "--output", "o", "--min-genes", "7", "--panel.min-share-found=0"],
        launcher="build_store.py",
        description="",
        example="",
    )
    assert (config.sources, config.min_genes, config.panel.min_share_found) == (["a-b.h5ad"], 7, 0)


NO_YAML = "the --config file is no YAML with settings by name"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        pytest.param("", "--files is missing; give it here or in", id="required"),
        pytest.param("--files", "--files lacks its value; give one or more, separated", id="empty"),
        pytest.param(
            "--files a --inner.rat 1",
            "no setting --inner.rat; did you mean --inner.rate?",
            id="typo",
        ),
        pytest.param(
            "--files a --rate 1", "no setting --rate; did you mean --inner.rate?", id="group"
        ),
        pytest.param(
            "--files a --colour 1",
            "--colour; launchers/none.py --help lists",
            id="foreign",
        ),
        pytest.param(
            "--flag true stray --files a", "'stray' belongs to no setting; write --NAME", id="stray"
        ),
        pytest.param("--files a --flag maybe", "--flag is 'maybe'; give true or false", id="bool"),
        pytest.param("--files a --size x", "--size is 'x'; give a whole number or null", id="int"),
        pytest.param(
            "--files a --seeds one",
            "--seeds is 'one'; give one or more whole numbers, separated by spaces",
            id="seeds",
        ),
        pytest.param(
            "--files a --size 1.5", "--size is '1.5'; give a whole number or null", id="float"
        ),
        pytest.param(
            "--files a --size", "--size lacks its value; give a whole number", id="no value"
        ),
        pytest.param("--files a --inner.rate x", "--inner.rate is 'x'; give a number", id="rate"),
        pytest.param("--files a --kind odd", "--kind is 'odd'; give one of old, new", id="choice"),
        pytest.param(
            "--files a --inner 3", "--inner is a group; give its settings one by one", id="a group"
        ),
        pytest.param("--config none.yaml", "none.yaml' is no file to read", id="no file"),
        pytest.param("--config list.yaml", NO_YAML, id="a list in a file"),
        pytest.param("--config broken.yaml", NO_YAML, id="broken file"),
        pytest.param("--config extra.yaml", "nane", id="unknown key in a file"),
        pytest.param(
            "--config inner.yaml", "no setting inner.rat; did you mean inner.rate?", id="in group"
        ),
    ],
)
def test_wrong_settings_are_one_sentence(
    words: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("list.yaml").write_text("- a\n")
    Path("broken.yaml").write_text("files: [a\n")
    Path("extra.yaml").write_text("files: [x]\nnane: y\n")
    Path("inner.yaml").write_text("files: [x]\ninner:\n  rat: 1\n")

    def parse() -> None:
        cli.parse(_Files, words.split(), launcher="none.py", description="", example="")

    assert cli.run(parse) == 2
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert not printed.out


@pytest.mark.parametrize("flag", ["--hostfile", "--include", "--num_gpus", "--num_accelerators"])
def test_launcher_flags_behind_the_script_are_refused(
    flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for script, main in (("pretrain", pretrain.main), ("finetune", finetune.main)):
        code = main(["--output", "o", flag, "hosts"])
        message = capsys.readouterr().err
        assert code == 2
        assert f"deepspeed {flag} ... launchers/{script}.py" in message


@pytest.mark.parametrize(
    ("main", "preset"),
    [
        pytest.param(path.parent.name, path.stem, id=f"{path.parent.name} {path.stem}")
        for path in sorted(cli.CONFIGS.glob("*/*.yaml"))
    ],
)
def test_presets_are_whole_and_print(
    main: str, preset: str, capsys: pytest.CaptureFixture[str]
) -> None:
    launcher = {"pretrain": pretrain, "build_store": build_store, "finetune": finetune}[main]
    needed = {
        "pretrain": ["--store", "s", "--output", "o"],
        "build_store": ["--sources", "[a.h5ad]", "--output", "o"],
        "finetune": ["--encoder", "e", "--data.path", "d", "--output", "o"],
    }[main]
    if preset == "scbert" and main == "pretrain":
        needed += ["--gene2vec.vectors", "v.npy", "--gene2vec.names", "n.txt"]
    with pytest.raises(SystemExit) as exit_info:
        launcher.main(["--preset", preset, *needed, "--print_config"])
    assert exit_info.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert {"preset", "local_rank", "config"}.isdisjoint(printed)


def test_published_recipe() -> None:
    config = cli.parse(
        PretrainConfig,
        [
            *("--preset", "scbert", "--store", "s", "--output", "o"),
            *("--gene2vec.vectors", "v.npy", "--gene2vec.names", "n.txt"),
        ],
        launcher="pretrain.py",
        description="",
        example="",
    )
    encoder = config.encoder
    assert (encoder.dim, encoder.depth, encoder.heads, encoder.dim_head) == (200, 6, 10, 64)
    assert encoder.features == 266
    assert config.batch.accumulation_steps(world_size=32) == 60
    assert (config.masking.ratio, config.masking.keep_share) == (0.15, 0.1)
    assert (config.binning.num_tokens, config.binning.mask_token) == (7, 6)


def test_published_recipe_asks_for_gene2vec(capsys: pytest.CaptureFixture[str]) -> None:
    assert pretrain.main(["--preset", "scbert", "--store", "s", "--output", "o"]) == 2
    assert "--gene2vec.vectors" in capsys.readouterr().err


def test_unknown_preset_lists_the_known(capsys: pytest.CaptureFixture[str]) -> None:
    assert pretrain.main(["--preset", "scbret", "--store", "s", "--output", "o"]) == 2
    assert "'medium', 'quickstart', 'scbert'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "launcher",
    [annotate, build_store, fetch_pancreas, finetune, pretrain, quickstart],
    ids=lambda m: m.__name__,
)
def test_help_teaches_by_example(launcher: object, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        launcher.main(["--help"])  # type: ignore[attr-defined]
    assert exit_info.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "Example: " in text
    assert "--config" in text


def test_bugs_keep_their_traceback() -> None:
    def broken() -> None:
        raise KeyError("ours")

    with pytest.raises(KeyError):
        cli.run(broken)


def test_a_port_in_use_is_one_sentence(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def meet() -> None:
        with start_ranks(os.environ, timeout_minutes=0.1):
            pass

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1")):
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("MASTER_PORT", port)
        assert cli.run(meet) == 2
    assert "--master_port 29501" in capsys.readouterr().err


@pytest.mark.parametrize("script", ["pretrain", "finetune"])
def test_scripts_do_not_shadow_their_package_from_anywhere(script: str) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "launchers" / f"{script}.py"), "--help"],
        cwd="/",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert f"launchers/{script}.py" in done.stdout
