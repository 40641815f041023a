"""`scbert doctor`: each check seen failing, with what to do about it."""

import http.server
import json
import os
import re
import threading
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

from launchers import doctor
from launchers import doctor_checks as checks
from launchers.doctor_checks import Finding
from pretrain import native
from tests.support.tiny import tiny_store


def test_this_environment_is_healthy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "none"))
    store = tiny_store(tmp_path / "store").path
    assert doctor.main(["--store", str(store)]) == 0
    printed = capsys.readouterr().out
    assert "[ ok ] packages" in printed
    assert "64 cells × 32 genes" in printed
    assert doctor.main(["--json", "--store", str(tmp_path / "gone")]) == 1
    facts = json.loads(capsys.readouterr().out)
    assert facts["healthy"] is False
    (problem,) = [check for check in facts["checks"] if check["verdict"] == "problem"]
    assert problem["name"] == "store"
    assert "no cell store at" in problem["fact"]


def version_of(name: str) -> str:
    if name == "gone":
        raise metadata.PackageNotFoundError(name)
    return "1.0"


def test_the_builds_that_run_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    builds: dict[str, tuple[str | None, str | None]] = {
        "float32": (None, "no compiler"),
        "bf16": (None, "no AVX-512"),
    }
    monkeypatch.setattr(native, "_choose", lambda family: builds[family])
    found = []
    for chosen in ({}, {"float32": "float32_avx2"}, {"bf16": "avx512"}):
        builds |= {family: (name, None) for family, name in chosen.items()}
        finding = checks.check_attention_kernel()
        found.append((finding.verdict, finding.fact))

    assert found == [
        ("warning", "no compiler"),
        ("ok", "native in float32; for bf16 no AVX-512"),
        ("ok", "native, in float32 and bf16 (float32_avx2 and avx512)"),
    ]


@pytest.mark.parametrize(
    ("finding", "verdict", "said"),
    [
        pytest.param(checks.check_python((3, 10, 1)), "problem", "Python 3.11 or 3.12", id="old"),
        pytest.param(checks.check_cores(1), "warning", "ask for two", id="one core"),
        pytest.param(checks.check_memory(limit=2**30), "warning", "1.0 GiB available", id="memory"),
        pytest.param(checks.check_disk(Path("/"), 2**20), "warning", "free some space", id="disk"),
        pytest.param(
            checks.check_compiler({"CXX": "my-cc"}, lambda name: None),
            "problem",
            "no compiler 'my-cc' .*apt-get install g.*; no ninja",
            id="compiler",
        ),
        pytest.param(
            checks.check_compiler({"CXX": "g++ -pipe"}, {"g++": "/g++"}.get),
            "problem",
            "compiler no ninja",
            id="compiler with arguments",
        ),
        pytest.param(
            next(checks.check_packages(["a>=2", "gone", "b; extra == 'dev'"], version_of)),
            "problem",
            "a is 1.0, needed is >=2; gone is missing",
            id="packages",
        ),
        pytest.param(
            checks.check_mlflow("nonsense", {}, Path()), "problem", "MLFLOW_TRACKING_URI", id="uri"
        ),
        pytest.param(
            checks.check_mlflow("http://me:hunter2@127.0.0.1:9", {}, Path()),
            "problem",
            "http://127.0.0.1:9 does not answer",
            id="server",
        ),
        pytest.param(
            checks.check_mlflow("sqlite:////proc/no/mlflow.db", {}, Path()),
            "problem",
            "cannot be written",
            id="sqlite",
        ),
    ],
)
def test_what_is_amiss_comes_with_a_remedy(finding: Finding, verdict: str, said: str) -> None:
    lines = " ".join("\n".join(checks.show([finding])).split())
    assert finding.verdict == verdict
    assert re.search(said, lines), lines
    assert "→" in lines
    assert "hunter2" not in lines


def test_a_lock_of_a_dead_build_is_found(tmp_path: Path) -> None:
    assert "none compiled yet" in checks.check_deepspeed_ops(tmp_path).fact
    (tmp_path / "op").mkdir()
    (tmp_path / "op" / "op.so").touch()
    lock = tmp_path / "op" / "lock"
    lock.touch()
    assert checks.check_deepspeed_ops(tmp_path).verdict == "ok"  # somebody may be compiling
    os.utime(lock, (1, 1))
    found = checks.check_deepspeed_ops(tmp_path)
    assert (found.verdict, f"rm {lock}" in found.remedy) == ("problem", True)


def test_batch_scripts_are_shown_where_slurm_is() -> None:
    fact = checks.check_cluster_tools(lambda name: name if name == "sbatch" else None).fact
    assert {path.name for path in Path(fact.split("batch scripts: ")[1]).iterdir()} == {
        *("annotate_array.sbatch", "finetune_array.sbatch", "ingest_array.sbatch"),
        "pretrain.sbatch",
    }
    assert "batch scripts" not in checks.check_cluster_tools(lambda name: None).fact


@pytest.fixture
def answering(request: pytest.FixtureRequest) -> Iterator[str]:
    """A server that answers everything with one code."""
    code: int = request.param

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(code)
            self.end_headers()

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize(
    ("answering", "verdict", "said"),
    [(200, "ok", "answers (200)"), (403, "problem", "answers with 403")],
    indirect=["answering"],
)
def test_the_server_is_asked(answering: str, verdict: str, said: str) -> None:
    found = checks.check_mlflow(answering, {}, Path())
    assert (found.verdict, said in found.fact) == (verdict, True)
