"""What the engine looks after before DeepSpeed starts. (What it does: test_train.py.)"""

from pathlib import Path

import pytest
import torch

from pretrain.engine import look_at_build_lock, require_compiler


def test_missing_compiler_is_said_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    with pytest.raises(ValueError, match=r"no compiler g\+\+; install .*apt-get install g"):
        require_compiler(which=lambda _: None)
    require_compiler(which=lambda name: f"/usr/bin/{name}")


def test_the_compiler_may_have_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "my-g++ -pipe")

    require_compiler(which={"my-g++": "/opt/my-g++"}.get)


@pytest.mark.parametrize(
    ("age", "stays"),
    [pytest.param(1000.0, False, id="forgotten"), pytest.param(60.0, True, id="in use")],
)
def test_a_forgotten_build_lock_is_cleared(
    age: float, stays: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lock = tmp_path / "py311_cpu" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    with caplog.at_level("INFO"):
        look_at_build_lock(tmp_path, lock.stat().st_mtime + age)
    assert lock.exists() == stays
    assert str(lock) in caplog.text
