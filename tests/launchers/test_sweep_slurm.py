"""launchers/slurm/finetune_array.sbatch under a real Slurm: every row ends exactly once.

Commands are those of docs/cluster.md, on smaller data.
"""

import contextlib
import json
import os
import re
import shlex
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from finetune.config import FinetuneConfig
from finetune.sweep import RowReport, count_states, report_rows
from finetune.sweep_table import SweepRow, read_table
from launchers import scbert
from launchers.flags import setting_types
from pretrain.mlflow_client import connect
from tests.support.documents import shown
from tests.support.labelled import write_encoder, write_labelled
from tests.support.mlflow_store import fresh_store
from tests.support.slurm import Slurm, missing, start_slurm

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]

NUM_ROWS = 24
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"}


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    assert not missing(), f"these tests start Slurm: {missing()}"
    with start_slurm(tmp_path_factory.mktemp("slurm") / "cluster", 2) as running:
        yield running


class Sweep:
    """A sweep of tiny trainings in a folder, and the tasks that train them."""

    def __init__(self, slurm: Slurm, folder: Path) -> None:
        self.slurm, self.folder = slurm, folder
        write_labelled(folder / "a.h5ad", 30)
        write_encoder(folder / "encoder")
        lines = [f"{'late' if seed in (5, 9) else 'a'}.h5ad,{seed}" for seed in range(NUM_ROWS)]
        (folder / "table.csv").write_text("\n".join(["data,seed", *lines]) + "\n")
        self.rows: list[SweepRow] = read_table(folder / "table.csv", setting_types(FinetuneConfig))

    def submit(self, array: str) -> str:
        changes = {"1-200%20": f"{array}%4", "models:/scbert-pretrained@champion": "encoder"}
        small = "--epochs 1 --head.hidden 4 --head.bottleneck 4 --head.expression false"
        command = shown("cluster.md", "finetune_array.sbatch", changes)
        return self.slurm.submit(f"{command} {small}", self.folder)

    def reports(self) -> list[RowReport]:
        return report_rows(self.rows, self.folder / "sweep")

    def running(self, but: set[int], seconds: float = 120) -> RowReport:
        """Wait for a row that is being trained."""
        deadline = time.monotonic() + seconds
        while True:
            for report in self.reports():
                if report.state == "running" and report.row.number not in but:
                    return report
            assert time.monotonic() < deadline, self.logs()
            time.sleep(0.1)

    def process(self, number: int) -> Path | None:
        """The training of a row, as a folder of /proc."""
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                words = (folder / "cmdline").read_bytes().split(b"\0")
                ours = words[-3:-1] == [b"--row", str(number).encode()] and b"sweep" in words
                if ours and (folder / "cwd").samefile(self.folder):
                    return folder
        return None

    def strike(self, hit: set[int], blow: Callable[[int, Path], object]) -> None:
        """Do something to a task whose row is being trained, and add the row to `hit`."""
        while True:
            number = self.running(hit).row.number
            hit.add(number)
            process = self.process(number)
            if process is not None:
                blow(number, process)
                return

    def preempt(self, seconds: float = 150) -> None:
        """Submit a job of higher priority that wants all nodes, and wait until it has run."""
        urgent = self.slurm.call(
            *("sbatch", "--parsable", "--partition=urgent", "--nodes=2", "--exclusive"),
            *("--output=/dev/null", "--wrap=sleep 2"),
            cwd=self.folder,
        )
        self.slurm.wait(urgent.strip(), {"COMPLETED"}, seconds)

    def requeue(self, task: str) -> None:
        """As an administrator does it; Slurm may be busy with this very task for a moment."""
        deadline = time.monotonic() + 30
        while True:
            with contextlib.suppress(AssertionError):
                self.slurm.call("scontrol", "requeue", task)
                return
            assert time.monotonic() < deadline, self.slurm.call("squeue")
            time.sleep(0.2)

    def wait_until_idle(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while self.slurm.call("squeue", "--noheader").strip():
            assert time.monotonic() < deadline, self.slurm.call("squeue") + self.logs()
            time.sleep(0.5)

    def logs(self) -> str:
        return "\n".join(p.read_text() for p in sorted(self.folder.glob("scbert-sweep-*.log")))


def test_every_row_of_an_array_ends_once(
    slurm: Slurm,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sweep = Sweep(slurm, tmp_path)
    job = sweep.submit(f"1-{NUM_ROWS + 1}")  # one task more than there are rows
    hit: set[int] = set()

    def warn(number: int, process: Path) -> None:
        """What --signal=B:USR1@120 does before the time limit: tell the batch shell."""
        status = (process / "status").read_text()
        os.kill(int(status.partition("PPid:")[2].split()[0]), signal.SIGUSR1)

    sweep.strike(hit, warn)
    sweep.strike(hit, lambda number, process: os.kill(int(process.name), signal.SIGKILL))
    sweep.strike(hit, lambda number, process: sweep.requeue(f"{job}_{number}"))
    preempted: list[int] = []
    sweep.strike(set(hit), lambda number, process: preempted.append(number))
    sweep.preempt()

    sweep.wait_until_idle(600)
    said = sweep.logs()
    reports = sweep.reports()
    assert count_states(reports) == {"done": NUM_ROWS - 2, "failed": 2}, said
    failed = [report.row.number for report in reports if report.state == "failed"]
    assert failed == [6, 10]
    assert all("late.h5ad" in str(report.error) for report in reports if report.error)
    assert f"there is no row {NUM_ROWS + 1}; submit with --array=1-{NUM_ROWS}" in said
    attempts = {report.row.number: report.found.attempts for report in reports if report.found}
    restarted = {int(found) for found in re.findall(r"row (\d+) as \S+, start [1-9]", said)}
    assert {number for number, count in attempts.items() if count > 1} <= restarted
    # Whatever ran when the urgent job came had to make room, and was trained to its end later.
    assert restarted - hit, said
    assert sum(count > 1 for count in attempts.values()) >= 2, attempts
    assert "requeued after exit code 75" in said or "requeued after exit code 138" in said
    assert "requeued after exit code 137" in said

    write_labelled(tmp_path / "late.h5ad", 30)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    capsys.readouterr()
    assert scbert.main(shlex.split(shown("cluster.md", "--rows failed", {}))[1:]) == 0
    array = capsys.readouterr().out.strip()
    assert array == "6,10"
    sweep.submit(array)
    sweep.wait_until_idle(200)
    assert count_states(sweep.reports()) == {"done": NUM_ROWS}, sweep.logs()
    assert sweep.logs().count(" is done: accuracy") >= NUM_ROWS

    uri = fresh_store(tmp_path)
    assert scbert.main(shlex.split(shown("cluster.md", "sweep collect", {}))[1:]) == 0
    client = connect(uri)
    numbers = [e.experiment_id for e in client.search_experiments() if e.name != "Default"]
    runs = client.search_runs(numbers, max_results=500)
    children = [run for run in runs if "mlflow.parentRunId" in run.data.tags]
    assert sorted(int(run.data.tags["sweep.row"]) for run in children) == [*range(1, NUM_ROWS + 1)]
    assert len(runs) == NUM_ROWS + 1
    assert len(json.loads((tmp_path / "sweep" / "results.json").read_text())["rows"]) == NUM_ROWS
