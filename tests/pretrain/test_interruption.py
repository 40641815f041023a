"""Stopping on request, one training per folder, and what is not finite. Real processes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pretrain.config import PretrainConfig
from pretrain.distributed import Ranks
from pretrain.interruption import EXIT_REQUEUE, StopRequest, only_training_in, stop_on_signals
from pretrain.train import pretrain
from tests.support.ranks import run_ranks
from tests.support.tiny import tiny_config, tiny_store

LAUNCHER = Path(__file__).resolve().parents[2] / "launchers" / "pretrain.py"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_noted_and_the_handlers_are_put_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with stop_on_signals() as request:
        asked = [request.signal]
        os.kill(os.getpid(), number)
        asked.append(request.signal)
    assert asked == [None, number.name]
    assert signal.getsignal(number) is before


def test_a_second_training_is_kept_out(tmp_path: Path) -> None:
    with (
        only_training_in(tmp_path / "run"),
        pytest.raises(ValueError, match=r"another training is writing .*run; wait for it"),
        only_training_in(tmp_path / "run"),
    ):
        pass
    with only_training_in(tmp_path / "run"):
        pass


def test_an_output_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(
            ValueError, match=r"file/run cannot be written \(.+\); choose another output"
        ),
        only_training_in(tmp_path / "file" / "run"),
    ):
        pass


class AskedAfter(StopRequest):
    """Is asked to stop once it has been looked at a number of times."""

    def __init__(self, looks: int) -> None:
        self._left = looks

    @property
    def signal(self) -> str | None:  # type: ignore[override]
        self._left -= 1
        return "SIGUSR1" if self._left < 0 else None


def train_with_requests(ranks: Ranks, config: PretrainConfig) -> list[dict[str, Any]]:
    """Only the last rank is asked, after the second step; then the run goes on to its end."""
    request = AskedAfter(2) if ranks.rank == ranks.world_size - 1 else StopRequest()
    return [pretrain(config, ranks, request), pretrain(config, ranks)]


def status_of(folder: Path, run_id: str) -> str:
    from mlflow import MlflowClient

    return str(MlflowClient(f"sqlite:///{folder / 'mlflow.db'}").get_run(run_id).info.status)


@pytest.mark.multiprocess
@pytest.mark.slow
def test_all_ranks_save_and_stop_when_one_is_asked(tmp_path: Path) -> None:
    store = tiny_store(tmp_path / "store").path
    first, second = run_ranks(
        train_with_requests, 2, tmp_path, tiny_config(store, tmp_path / "run")
    )

    for stopped, finished in (first, second):
        assert (stopped["step"], stopped["interrupted"], stopped["export"]) == (3, True, None)
        assert (finished["step"], finished["interrupted"]) == (8, False)
    assert first[1]["run_id"] == first[0]["run_id"]
    assert status_of(tmp_path, first[0]["run_id"]) == "FINISHED"
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [*range(1, 9)]


@pytest.mark.multiprocess
@pytest.mark.slow
def test_sigterm_saves_and_the_same_command_continues(tmp_path: Path) -> None:
    store = tiny_store(tmp_path / "store").path
    output = tmp_path / "run"
    config = tiny_config(store, output)
    arguments = {
        "store": store,
        "output": output,
        "epochs": 400,
        "encoder.dim": 8,
        "encoder.depth": 1,
        "encoder.heads": 2,
        "encoder.dim_head": 8,
        "batch.global_size": 16,
        "batch.micro_size": 4,
        "log_every": 1,
        "tracking.uri": config.tracking.uri,
    }
    command = [sys.executable, str(LAUNCHER)]
    command += [f"--{name}={value}" for name, value in arguments.items()]
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (tmp_path / "log").open("w") as log:
        running = subprocess.Popen(command, cwd=tmp_path, env=environ, stderr=log, stdout=log)
        try:
            wait_for_line(output / "metrics.jsonl", running)
            second = subprocess.run(
                command, cwd=tmp_path, env=environ, capture_output=True, text=True, check=False
            )
            running.send_signal(signal.SIGTERM)
            code = running.wait(120)
        finally:
            running.kill()
    said = (tmp_path / "log").read_text()

    assert second.returncode == 2
    assert "another training is writing" in second.stderr
    assert code == EXIT_REQUEUE, said
    assert "saved and stopped as asked; the same command continues" in said
    step = int(json.loads((output / "checkpoints/latest").read_text()).removeprefix("step_"))
    again = subprocess.run(
        [*command, f"--stop_after={step + 1}", "--json"],
        cwd=tmp_path,
        env=environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert again.returncode == 0, again.stderr
    assert f"continuing at step {step} of" in again.stderr
    said = json.loads(again.stdout.splitlines()[-1])
    assert (said["step"], said["interrupted"], said["export"]) == (step + 1, False, None)


def wait_for_line(path: Path, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while not (path.is_file() and path.read_text().count("\n") > 2):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
