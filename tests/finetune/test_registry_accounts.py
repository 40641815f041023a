"""MLflow's own accounts, as docs/operations.md has them: who may do what, and no password anywhere.

One server with the page's option; its administrator runs the page's lines of Python.
"""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.support.documents import ROOT, commands
from tests.support.entries import write_entry
from tests.support.labelled import write_labelled
from tests.support.mlflow_server import mlflow_server

# Its server takes ten seconds to start on a free machine, minutes on a busy one.
pytestmark = [pytest.mark.slow, pytest.mark.multiprocess, pytest.mark.timeout(1500)]

PAGE = ROOT / "docs" / "operations.md"
USERS = ("ada", "bob", "cyd")
SECRETS = {
    "MLFLOW_AUTH_ADMIN_PASSWORD": "hunter-of-the-admin",
    "MLFLOW_FLASK_SERVER_SECRET_KEY": "hunter-of-cookies",
}


def password(user: str) -> str:
    return SECRETS["MLFLOW_AUTH_ADMIN_PASSWORD"] if user == "admin" else f"hunter-of-{user}"


def option() -> list[str]:
    """What the page's command adds to that of the server without accounts."""
    (shown,) = [line for line in commands(PAGE) if line.startswith("mlflow server --app-name")]
    *words, rest = shlex.split(shown)[2:]
    assert rest == "…"
    return words


@dataclass
class Lab:
    """A server with accounts, and people who use it from a folder."""

    uri: str
    folder: Path
    said: list[str] = field(default_factory=list)

    def python(self, user: str, code: str, answers: str = "") -> None:
        """Run lines of Python as this user, who answers questions."""
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code],
            env=self._environ(user, password(user)),
            input=answers,
            capture_output=True,
            text=True,
            check=False,
            start_new_session=True,  # else the questions go to the terminal
        )
        assert done.returncode == 0, done.stderr

    def scbert(
        self, command: str, user: str | None = None, word: str | None = None, level: str = "INFO"
    ) -> int:
        """Run `scbert` as a user, with the right password or this one; return the exit code."""
        done = subprocess.run(
            [sys.executable, "-m", "launchers.scbert", *shlex.split(command)],
            cwd=self.folder,
            env=self._environ(user, word or password(user or "")) | {"SCBERT_LOG": level},
            capture_output=True,
            text=True,
            check=False,
        )
        self.said.append(done.stdout + done.stderr)
        return done.returncode

    def _environ(self, user: str | None, word: str) -> dict[str, str]:
        ours = {"MLFLOW_TRACKING_URI": self.uri, "PYTHONPATH": str(ROOT)}
        ours |= {"HOME": str(self.folder / "home"), "XDG_CACHE_HOME": str(self.folder / "cache")}
        who = {"MLFLOW_TRACKING_USERNAME": user, "MLFLOW_TRACKING_PASSWORD": word} if user else {}
        # Not the short patience that this process has with servers of its own.
        shell = {
            key: value for key, value in os.environ.items() if not key.startswith("MLFLOW_HTTP")
        }
        return {**shell, **ours, **who}


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    folder = tmp_path_factory.mktemp("lab")
    (lines,) = re.findall(r"```python\n(from getpass .*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    (folder / "home" / ".mlflow").mkdir(parents=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)  # where the accounts' database comes to lie
        with mlflow_server(folder / "server", None, None, *option(), **SECRETS) as uri:
            lab = Lab(uri, folder)
            assert "https://mlflow.lab.example" in lines
            answers = "".join(f"{password(user)}\n" for user in USERS)
            lab.python("admin", lines.replace("https://mlflow.lab.example", uri), answers)
            assert (folder / "basic_auth.db").is_file()
            yield lab


def test_without_a_password_the_server_does_not_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    key = {name: value for name, value in SECRETS.items() if "KEY" in name}
    with (
        pytest.raises(AssertionError, match="MLflow ships no default admin password"),
        mlflow_server(tmp_path, None, None, *option(), **key),
    ):
        pass


def test_trainers_write_and_everybody_reads(lab: Lab) -> None:
    for name in ("first", "second", "third"):
        write_entry(lab.folder / name, name)
    assert lab.scbert("models register first --name lab --alias champion", "ada") == 0
    assert lab.scbert("models register second --name lab --alias challenger", "bob") == 0
    assert lab.scbert("models pull models:/lab@champion --to pulled", "cyd") == 0
    weights = "model.safetensors"
    assert (lab.folder / "pulled" / weights).read_bytes() == (
        lab.folder / "first" / weights
    ).read_bytes()
    assert lab.scbert("models register third --name lab", "cyd") == 2
    refused(lab.said[-1], "403")


@pytest.mark.parametrize(
    ("user", "word"), [(None, None), ("cyd", "a wrong password")], ids=["nobody", "wrong"]
)
def test_who_is_not_known_is_told_what_to_set(lab: Lab, user: str | None, word: str | None) -> None:
    assert lab.scbert("models list", user, word) == 2
    refused(lab.said[-1], "401")


def refused(said: str, status: str) -> None:
    """One sentence, with the remedy."""
    assert said.count("error: ") == 1
    assert f"it refuses with HTTP status {status}; set MLFLOW_TRACKING_USERNAME and" in said
    assert "Traceback" not in said


def test_a_file_of_credentials_does_for_variables(lab: Lab) -> None:
    (lines,) = re.findall(r"```ini\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    path = lab.folder / "home" / ".mlflow" / "credentials"
    path.write_text(lines.replace("…", password("cyd")))
    try:
        assert lab.scbert("models list") == 0
    finally:
        path.unlink()


def test_a_training_tells_nobody_the_password(lab: Lab) -> None:
    write_labelled(lab.folder / "a.h5ad", 60)
    small = "--encoder none --data.path a.h5ad --epochs 1 --head.kind pooled"
    small += " --fresh.encoder.dim 16 --fresh.encoder.depth 1"
    assert lab.scbert(f"finetune {small} --output run", "bob", level="DEBUG") == 0
    assert lab.scbert("models register run/export --name trained", "bob", level="DEBUG") == 0
    assert lab.scbert("models list", "bob", "hunter-of-nothing", level="DEBUG") == 2
    kept = [path for path in lab.folder.rglob("*") if path.is_file()]
    names = {path.name for path in kept}
    assert {"mlflow.db", "basic_auth.db", "server.log", "config.json", "MODEL_CARD.md"} <= names
    assert b"scbert-finetune" in (lab.folder / "server" / "mlflow.db").read_bytes()
    assert [path for path in kept if b"hunter" in path.read_bytes()] == []
    assert [said for said in lab.said if "hunter" in said] == []  # nor in a traceback
