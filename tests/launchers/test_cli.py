"""The command line: precedence, refusals, exit codes."""

import os
import socket
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

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


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        pytest.param(["--name", "x", "--inner.rat", "1"], "inner.rat", id="unknown flag"),
        pytest.param(["--name", "x", "--flag", "maybe"], "flag", id="not a bool"),
        pytest.param([], "name", id="required field"),
    ],
)
def test_unknown_or_wrong_settings_exit_with_2(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        _parse(*argv)
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


def test_unknown_key_in_a_file_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("name: x\nnane: y\n")
    with pytest.raises(SystemExit):
        _parse("--config", str(file))
    assert "nane" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--hostfile", "--include", "--num_gpus"])
def test_launcher_flags_behind_the_script_are_refused(
    flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code = pretrain.main(["--store", "s", "--output", "o", flag, "hosts"])
    message = capsys.readouterr().err
    assert code == 2
    assert f"deepspeed {flag} ... launchers/pretrain.py" in message


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
    text = capsys.readouterr().out
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
