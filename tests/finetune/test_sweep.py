"""A sweep: every row ends once, whatever its tasks meet, and its runs reach MLflow once."""

import csv
import json
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from finetune.sweep import array_of, count_states, keep_base, report_rows
from finetune.sweep_delivery import deliver_rows
from finetune.sweep_results import interval, table, write_results
from finetune.sweep_row import RowState, find_state, row_folder, run_row
from finetune.sweep_table import SweepRow, read_table, row_of
from pretrain.later_delivery import put_off
from pretrain.mlflow_client import connect
from pretrain.tracking import start_run
from tests.support.mlflow_store import fresh_store

KNOWN = {"data.path", "data.fold", "data.num_folds", "seed", "lr", "output", "head.hidden"}


def rows_of(number: int) -> list[SweepRow]:
    return [SweepRow(n + 1, {"data": "a.h5ad", "seed": str(n)}) for n in range(number)]


def trained(folder: Path) -> Mapping[str, float]:
    """Stand for a training: a run with metrics, kept in files."""
    address = "sqlite:////nowhere/at/all.db"
    with (
        put_off(),
        start_run(address, "x", "row", is_first=True, metrics_path=folder / "metrics.jsonl") as run,
    ):
        run.log_params({"lr": 0.1})
        run.log_metrics({"loss": 1.0}, 1)
        run.log_metrics({"loss": 0.5}, 2)
    return {"accuracy": 0.9, "macro_f1": 0.8}


# --- the table ---


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_a_table_is_read(tmp_path: Path) -> None:
    text = "data, fold ,seed,lr\na.h5ad,0/5,0,\n\na.h5ad,1/5,0,1e-4\n"
    rows = read_table(write(tmp_path / "t.csv", text), KNOWN)
    assert [row.number for row in rows] == [1, 2]
    flags = "--data.path a.h5ad --data.fold 1 --data.num_folds 5 --seed 0 --lr 1e-4"
    assert " ".join(rows[1].flags) == flags
    assert rows[0].settings == {"data": "a.h5ad", "fold": "0/5", "seed": "0"}
    assert (rows[0].group, rows[1].group) == ("data a.h5ad", "data a.h5ad, lr 1e-4")
    assert rows[0].key != rows[1].key
    other = SweepRow(9, dict(reversed(rows[0].settings.items())))
    assert other.key == rows[0].key  # neither place nor order of columns matters


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param(
            "fold,seed\n0/5,1\n", "lacks the column 'data'; it has: fold, seed", id="data"
        ),
        pytest.param("data,fold\na,0/5\n", "lacks the column 'seed'", id="seed"),
        pytest.param(
            "data,seed,lrr\na,0,1\n", "'lrr', which is no setting; did you mean 'lr'", id="?"
        ),
        pytest.param("data,seed,output\na,0,1\n", "'output', which is no setting", id="output"),
        pytest.param("data,seed,seed\na,0,1\n", "'seed' twice", id="twice"),
        pytest.param("data,seed\n", "has no rows", id="no rows"),
        pytest.param("data,seed\na\n", "row 1 has 1 fields, the header has 2", id="short"),
        pytest.param(b"\xff\xfe\x00", "is no CSV table", id="bytes"),
    ],
)
def test_what_is_no_table_is_refused(tmp_path: Path, text: str | bytes, message: str) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message):
        read_table(path, KNOWN)


@pytest.mark.parametrize(
    ("number", "message"),
    [
        pytest.param(5, "has 4 rows, there is no row 5; submit with --array=1-4", id="too many"),
        pytest.param(0, "there is no row 0", id="zero"),
        pytest.param(3, "row 3 repeats row 1; remove one of them", id="repeated"),
        pytest.param(4, "row 4 has no seed; fill it in", id="empty field"),
    ],
)
def test_one_wrong_row_harms_no_other(tmp_path: Path, number: int, message: str) -> None:
    path = write(tmp_path / "t.csv", "data,seed\na,0\na,1\na,0\nb,\n")
    rows = read_table(path, KNOWN)
    with pytest.raises(ValueError, match=message):
        row_of(rows, number, path)
    assert [row_of(rows, other, path).number for other in (1, 2)] == [1, 2]


def test_a_fold_is_written_as_one() -> None:
    with pytest.raises(ValueError, match="row 1: fold is '3'; write 0/5"):
        _ = SweepRow(1, {"data": "a", "fold": "3", "seed": "0"}).flags


# --- the rows ---


def test_a_row_is_trained_once(tmp_path: Path) -> None:
    (row,) = rows_of(1)
    first = run_row(row, tmp_path, trained)
    second = run_row(row, tmp_path, lambda folder: pytest.fail("trained again"))
    assert first == second == RowState.read(row_folder(tmp_path, row))
    assert (first.state, first.attempts, first.metrics) == (
        "done",
        1,
        {"accuracy": 0.9, "macro_f1": 0.8},
    )


@pytest.mark.parametrize(
    ("error", "state", "said"),
    [
        pytest.param(
            ValueError("two\nlines: a.h5ad is gone"), "failed", "lines: a.h5ad is gone", id="failed"
        ),
        pytest.param(OSError("http://me:pw@host/x"), "failed", "http://host/x", id="credentials"),
        pytest.param(SystemExit(75), "interrupted", None, id="interrupted"),
    ],
)
def test_a_row_that_ends_early_is_noted_and_runs_again(
    tmp_path: Path, error: BaseException, state: str, said: str | None
) -> None:
    (row,) = rows_of(1)

    def broken(folder: Path) -> Mapping[str, float]:
        raise error

    with pytest.raises(type(error)):
        run_row(row, tmp_path, broken)
    (report,) = report_rows([row], tmp_path)
    assert (report.state, report.error) == (state, said)
    again = run_row(row, tmp_path, trained)
    assert (again.state, again.attempts, again.error) == ("done", 2, None)


def forked(function: Callable[..., None], *arguments: Any) -> Any:
    process = multiprocessing.get_context("spawn").Process(target=function, args=arguments)
    process.start()
    return process


def hold(output: Path) -> None:
    def train(folder: Path) -> Mapping[str, float]:
        (output / "started").touch()
        time.sleep(600)
        return {}

    run_row(rows_of(1)[0], output, train)


@pytest.mark.multiprocess
def test_two_tasks_do_not_share_a_row_and_a_dead_one_frees_it(tmp_path: Path) -> None:
    (row,) = rows_of(1)
    holder = forked(hold, tmp_path)
    deadline = time.monotonic() + 60
    while not (tmp_path / "started").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    found = find_state(tmp_path, row)
    assert found is not None
    assert found.state == "running"
    with pytest.raises(ValueError, match="row 1 is being trained by another task"):
        run_row(row, tmp_path, trained)
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    (report,) = report_rows([row], tmp_path)
    assert report.state == "interrupted"
    assert run_row(row, tmp_path, trained).attempts == 2


def test_what_rows_share_cannot_change(tmp_path: Path) -> None:
    keep_base(tmp_path, {"settings": ["--lr", "1"]})
    keep_base(tmp_path, {"settings": ["--lr", "1"]})
    with pytest.raises(ValueError, match=r"other settings beside the table .* another --output"):
        keep_base(tmp_path, {"settings": ["--lr", "2"]})


def test_numbers_as_slurm_takes_them() -> None:
    assert array_of([]) == ""
    assert array_of([7, 1, 2, 3]) == "1-3,7"


# --- results ---


def returning(metrics: Mapping[str, float]) -> Callable[[Path], Mapping[str, float]]:
    return lambda folder: metrics


def test_means_have_intervals(tmp_path: Path) -> None:
    values = [0.9, 0.8, 0.85, 0.95]
    rows = [SweepRow(n + 1, {"data": "a", "seed": str(n)}) for n in range(4)]
    rows += [SweepRow(5, {"data": "b", "seed": "0"}), SweepRow(6, {"data": "c", "seed": "0"})]
    rows += [SweepRow(7, {"data": "a", "seed": "0"})]
    for row, value in zip(rows, [*values, 0.5], strict=False):
        found: dict[str, float] = {"accuracy": value, "majority": 0.1}
        run_row(row, tmp_path, returning(found))
    reports = report_rows(rows, tmp_path)
    assert count_states(reports) == {"done": 5, "repeated": 1, "missing": 1}
    summaries = write_results(reports, tmp_path)
    (summary,) = [s for s in summaries if (s.group, s.metric) == ("data a", "accuracy")]
    error = stats.sem(values)
    expected = stats.t.interval(0.95, 3, loc=np.mean(values), scale=error)
    assert summary.num_rows == 4
    assert summary.mean == pytest.approx(np.mean(values))
    assert (summary.low, summary.high) == pytest.approx(expected)
    assert all(np.isnan(interval([0.5])))
    assert table(summaries) == [
        "data a    4 rows  accuracy 0.8750 (0.7723 to 0.9777)",
        "data b    1 rows  accuracy 0.5000",
    ]
    with (tmp_path / "results.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["state"] for line in lines] == ["done"] * 5 + ["missing", "repeated"]
    assert [line["accuracy"] for line in lines[:4]] == [str(value) for value in values]
    kept = json.loads((tmp_path / "results.json").read_text())
    assert kept["summary"][2]["low"] is None
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")


def runs_at(uri: str) -> list[Any]:
    client = connect(uri)
    numbers = [e.experiment_id for e in client.search_experiments() if e.name != "Default"]
    runs: list[Any] = []
    page = client.search_runs(numbers, max_results=500)
    while True:
        runs.extend(page)
        if not page.token:
            return runs
        page = client.search_runs(numbers, max_results=500, page_token=page.token)


def test_each_row_is_one_run_under_one_parent(tmp_path: Path) -> None:
    uri, output = fresh_store(tmp_path), tmp_path / "sweep"
    rows = rows_of(3)

    def stopped(folder: Path) -> Mapping[str, float]:
        trained(folder)
        raise SystemExit(75)

    with pytest.raises(SystemExit):
        run_row(rows[0], output, stopped)
    for row in rows[:2]:
        run_row(row, output, trained)
    assert deliver_rows(rows, output, "table", uri, "sweep") == (2, [])
    assert deliver_rows(rows, output, "table", uri, "sweep") == (2, [])  # nothing again
    run_row(rows[2], output, trained)
    assert deliver_rows(rows, output, "table", uri, "sweep") == (3, [])
    runs = runs_at(uri)
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    children = [run for run in runs if run is not parent]
    assert (parent.info.run_name, parent.info.status) == ("table", "FINISHED")
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent.info.run_id}
    assert sorted(run.data.tags["sweep.row"] for run in children) == ["1", "2", "3"]
    assert [run.data.metrics["loss"] for run in children] == [0.5] * 3
    assert {run.info.status for run in children} == {"FINISHED"}
    assert {run.data.params["lr"] for run in children} == {"0.1"}


@pytest.mark.parametrize(
    ("address", "sentence"),
    [
        pytest.param("http://me:hunter2@127.0.0.1:9", "it does not answer", id="server"),
        pytest.param("sqlite:///{folder}/torn.db", "the database does not open", id="database"),
    ],
)
def test_runs_wait_for_an_mlflow_that_is_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str, sentence: str
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    (tmp_path / "torn.db").write_bytes(b"no database" * 100)
    rows, output = rows_of(1), tmp_path / "sweep"
    run_row(rows[0], output, trained)
    with pytest.raises(ValueError, match=sentence) as refused:
        deliver_rows(rows, output, "table", address.format(folder=tmp_path), "sweep")
    assert "hunter2" not in "".join(traceback.format_exception(refused.value))
    uri = fresh_store(tmp_path)
    assert deliver_rows(rows, output, "table", uri, "sweep") == (1, [])
    assert len(runs_at(uri)) == 2


NUM_TASKS = 200


def train_all_at_once(output: Path) -> None:
    """200 processes that start together, as the tasks of an array do."""
    rows, children = rows_of(NUM_TASKS), []
    for row in rows:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                code = 0 if run_row(row, output, trained).state == "done" else 1
            finally:
                os._exit(code)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    os._exit(0 if codes == [0] * NUM_TASKS else 1)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_200_tasks_at_once_and_one_sqlite_file(tmp_path: Path) -> None:
    uri, output = fresh_store(tmp_path), tmp_path / "sweep"
    task = forked(train_all_at_once, output)
    task.join(120)
    assert task.exitcode == 0
    rows = rows_of(NUM_TASKS)
    assert count_states(report_rows(rows, output)) == {"done": NUM_TASKS}
    assert deliver_rows(rows, output, "table", uri, "sweep") == (NUM_TASKS, [])
    runs = runs_at(uri)
    assert len(runs) == NUM_TASKS + 1
    assert len({run.data.tags.get("sweep.row") for run in runs}) == NUM_TASKS + 1
