"""Completion in a real bash: words, then their words, then flags."""

import shutil
import subprocess
from pathlib import Path

import pytest

from launchers import completion
from launchers.completion_script import script, words_by_command
from launchers.scbert import COMMANDS

ASK = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
_scbert
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def bash_script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("completion") / "scbert"
    path.write_text(script(words_by_command()))
    return path


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        pytest.param("st", {"store"}, id="command"),
        pytest.param("models pro", {"promote"}, id="word of a command"),
        pytest.param("store b", {"build", "bench"}, id="two"),
        pytest.param("models promote --f", {"--force"}, id="flag of argparse"),
        pytest.param("pretrain --optim.l", {"--optim.lr"}, id="flag of a setting"),
        pytest.param("sweep run t.csv --row 1 --head.hid", {"--head.hidden"}, id="after values"),
        pytest.param("nonsense --f", set(), id="nothing"),
    ],
)
def test_bash_completes(bash_script: Path, tmp_path: Path, words: str, expected: set[str]) -> None:
    done = subprocess.run(
        ["bash", "-c", ASK, "bash", str(bash_script), "scbert", *words.split(" ")],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    assert set(done.stdout.split()) == expected


def test_all_commands_are_known(capsys: pytest.CaptureFixture[str]) -> None:
    words = words_by_command()
    assert {name.split()[0] for name in COMMANDS} == set(words[""])
    assert all("--help" in words[f" {name}"] for name in COMMANDS)
    assert completion.main(["zsh"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("autoload -U +X bashcompinit")
    assert completion.main(["fish"]) == 2
    if shell := shutil.which("zsh"):
        subprocess.run([shell, "-c", "source /dev/stdin"], input=printed, text=True, check=True)
