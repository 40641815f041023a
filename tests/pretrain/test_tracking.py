"""Runs in MLflow: what is recorded, and that training goes on when recording fails."""

from __future__ import annotations

import json
import logging
import math
import os
from pathlib import Path
from typing import Any

import pytest

from pretrain.mlflow_records import flatten
from pretrain.tracking import (
    MLFLOW_SETTINGS,
    Tracker,
    connect,
    resolve_tracking_uri,
    start_run,
    without_credentials,
)


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One SQLite store for all tests of this module: creating it takes seconds."""
    folder = tmp_path_factory.mktemp("a store")
    return resolve_tracking_uri(None, {}, folder)


def start(uri: str, **options: Any) -> Tracker:
    return start_run(uri, "pretrain", "tiny", is_first=True, **options)


def get_run(uri: str, tracker: Tracker) -> Any:
    assert tracker.run_id is not None
    return connect(uri).get_run(tracker.run_id)


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    ("uri", "environ", "expected"),
    [
        pytest.param("http://host:5000", {"MLFLOW_TRACKING_URI": "http://x"}, "http://host:5000"),
        pytest.param(None, {"MLFLOW_TRACKING_URI": "http://x"}, "http://x", id="environment"),
        pytest.param(None, {}, "sqlite:////home/me/mlflow.db", id="a file in the folder"),
        pytest.param("", {"MLFLOW_TRACKING_URI": ""}, "sqlite:////home/me/mlflow.db", id="empty"),
        pytest.param("mysql+pymysql://u@h/db", {}, "mysql+pymysql://u@h/db", id="with a driver"),
    ],
)
def test_tracking_uri(uri: str | None, environ: dict[str, str], expected: str) -> None:
    assert resolve_tracking_uri(uri, environ, Path("/home/me")) == expected


@pytest.mark.parametrize("uri", ["localhost:5000", "mlruns", "htp://host", "file:///tmp/mlruns"])
def test_unknown_kind_of_address_is_refused_before_training(uri: str) -> None:
    with pytest.raises(ValueError, match="give http://host:port"):
        start(uri)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param("https://me:pw@host/x", "https://host/x", id="user and password"),
        pytest.param("at https://me:p@w@host: no", "at https://host: no", id="an @ in it"),
        pytest.param("sqlite:////home/a@b/m.db", "sqlite:////home/a@b/m.db", id="@ in a path"),
        pytest.param("pg://h/db?x=1&password=p&y=2", "pg://h/db?x=1&password=…&y=2", id="query"),
    ],
)
def test_credentials_are_stripped(text: str, expected: str) -> None:
    assert without_credentials(text) == expected


def test_flatten() -> None:
    config = {
        "optim": {"lr": 1e-4, "betas": [0.9, 0.99], "name": "adam"},
        "store": Path("/data/x"),
        "resume": None,
        "shuffle": True,
        "empty": {},
        "long": "x" * 7000,
        "odd:key": "https://me:pw@host",
    }
    assert flatten(config) == {
        "optim.lr": "0.0001",
        "optim.betas": "[0.9, 0.99]",
        "optim.name": "adam",
        "store": "/data/x",
        "resume": "null",
        "shuffle": "true",
        "empty": "{}",
        "long": "x" * 6000,
        "odd_key": "https://host",
    }


def test_run_holds_what_was_logged(uri: str, tmp_path: Path) -> None:
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "page.md").write_text("done")
    lines = tmp_path / "out" / "metrics.jsonl"
    with start(uri, tags={"source": "https://me:pw@host"}, metrics_path=lines) as tracker:
        tracker.log_params({"optim": {"lr": 1e-4}} | {f"knob{i}": i for i in range(150)})
        tracker.log_dataset("pancreas", "ab" * 32, "/data/pancreas", num_cells=64, num_genes=32)
        tracker.log_metrics({"loss": 2.0, "grad_norm": math.nan}, step=1)
        tracker.log_metrics({"loss": 1.5}, step=2)
        tracker.log_artifacts(tmp_path / "report", "report")
        tracker.log_file(lines)
        tracker.set_tags({"store": "abc"})

    run = get_run(uri, tracker)
    assert run.info.status == "FINISHED"
    assert tracker.num_undelivered == 0
    assert len(run.data.params) == 151
    assert run.data.params["optim.lr"] == "0.0001"
    assert run.data.tags["source"] == "https://host"
    assert run.data.tags["store"] == "abc"
    assert run.data.metrics["loss"] == 1.5
    assert math.isnan(run.data.metrics["grad_norm"])
    (used,) = run.inputs.dataset_inputs
    assert used.dataset.name == "pancreas"
    assert json.loads(used.dataset.profile) == {"num_cells": 64, "num_genes": 32}
    database = Path(uri.removeprefix("sqlite:///"))
    artifacts = database.parent / "mlartifacts" / run.info.run_id / "artifacts"
    assert (artifacts / "report" / "page.md").read_text() == "done"
    assert (artifacts / "metrics.jsonl").exists()

    first, second = read_lines(lines)
    assert first.pop("time") <= second.pop("time")
    assert first == {"step": 1, "loss": 2.0, "grad_norm": "nan"}  # text: JSON knows no nan
    assert second == {"step": 2, "loss": 1.5}


def test_resumed_training_continues_its_run(
    uri: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lines = tmp_path / "metrics.jsonl"
    former = start(uri, metrics_path=lines)
    former.log_params({"lr": 1e-4, "steps": 10})
    former.log_metrics({"loss": 2.0}, step=1)
    with pytest.raises(KeyboardInterrupt), former:
        raise KeyboardInterrupt
    assert get_run(uri, former).info.status == "KILLED"
    with lines.open("a") as file:
        file.write('{"step": 2, "lo')  # the line a killed process was writing

    with start(uri, run_id=former.run_id, metrics_path=lines) as resumed:
        assert get_run(uri, resumed).info.status == "RUNNING"
        resumed.log_params({"lr": 2e-4, "steps": 10, "workers": 2})
        resumed.log_metrics({"loss": 1.0}, step=2)

    assert resumed.run_id == former.run_id
    run = get_run(uri, resumed)
    assert run.info.status == "FINISHED"
    assert run.data.params == {"lr": "0.0001", "steps": "10", "workers": "2"}
    assert run.data.tags["resumed.lr"] == "0.0002"
    assert "changed settings: lr" in caplog.text
    history = connect(uri).get_metric_history(run.info.run_id, "loss")
    assert [(point.step, point.value) for point in history] == [(1, 2.0), (2, 1.0)]
    assert json.loads(lines.read_text().splitlines()[-1])["step"] == 2


def test_lost_run_is_replaced(uri: str) -> None:
    with start(uri, run_id="0" * 32, parent_run_id="1" * 32) as tracker:
        pass
    tags = get_run(uri, tracker).data.tags
    assert tracker.run_id != "0" * 32
    assert tags["continues_run"] == "0" * 32
    assert tags["mlflow.parentRunId"] == "1" * 32


@pytest.mark.parametrize(
    ("error", "status"),
    [
        pytest.param(ValueError("boom"), "FAILED", id="error"),
        pytest.param(SystemExit(3), "FAILED", id="exit code"),
        pytest.param(SystemExit(0), "FINISHED", id="exit without fault"),
    ],
)
def test_status_after_leaving(uri: str, error: BaseException, status: str) -> None:
    with pytest.raises(type(error)), start(uri) as tracker:
        raise error
    assert get_run(uri, tracker).info.status == status


RUN: dict[str, Any] = {
    "kind": "run",
    "token": "t0",
    "experiment": "pretrain",
    "run_name": "tiny",
    "run_id": None,
    "continues": False,
    "parent_run_id": None,
    "artifact_location": None,
    "tags": {},
}
"""Record that opens a run."""


class AwayClient:
    """A client whose server went away."""

    def __getattr__(self, name: str) -> Any:
        def fail(*arguments: Any, **options: Any) -> None:
            raise ConnectionError("https://me:pw@host does not answer")

        return fail


def test_training_goes_on_when_mlflow_raises(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lines = tmp_path / "metrics.jsonl"
    with Tracker(AwayClient, RUN, lines, clock=lambda: 7.0) as tracker:
        tracker.log_params({"lr": 1})
        tracker.log_dataset("x", "y", "z", num_cells=1)
        tracker.log_file(lines)
        tracker.set_tags({"a": "b"})
        for step in range(3):
            tracker.log_metrics({"loss": 1.0}, step)
    assert read_lines(lines) == [{"step": step, "time": 7.0, "loss": 1.0} for step in range(3)]
    assert tracker.run_id is None
    assert tracker.num_undelivered == 9  # the run, five things logged before … and its end
    assert caplog.text.count("MLflow does not take what is logged") == 1
    assert "9 records did not reach MLflow" in caplog.text
    assert "the next start there sends it" in caplog.text
    assert "pw" not in caplog.text


class RefusingClient:
    """A client whose user may not write yet."""

    def __getattr__(self, name: str) -> Any:
        from mlflow.exceptions import MlflowException

        def fail(*arguments: Any, **options: Any) -> None:
            text = "API request to endpoint /x failed with error code 403 != 200. Response body: ''"
            raise MlflowException(text, error_code=7)  # PERMISSION_DENIED

        return fail


def test_what_a_user_may_not_write_yet_is_kept_for_later(
    uri: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lines = tmp_path / "metrics.jsonl"
    with Tracker(RefusingClient, RUN | {"token": "refused"}, lines) as former:
        former.log_metrics({"loss": 1.0}, 1)
    assert former.num_undelivered == 3  # the run, the metric, its end
    assert "it refuses with HTTP status 403; set MLFLOW_TRACKING_USERNAME and" in caplog.text
    with start(uri, continues=True, metrics_path=lines) as tracker:
        tracker.log_metrics({"loss": 2.0}, 2)
    assert tracker.num_undelivered == 0
    assert history(uri, tracker, "loss") == [(1, 1.0), (2, 2.0)]


def test_training_starts_without_a_server(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")  # the user's settings hold
    lines = tmp_path / "metrics.jsonl"
    with start("http://me:pw@127.0.0.1:9", metrics_path=lines) as tracker:
        tracker.log_params({"lr": 1})
        tracker.log_metrics({"loss": 1.0}, step=1)
    assert tracker.run_id is None
    assert len(read_lines(lines)) == 1
    assert "training goes on and it is sent later" in caplog.text
    assert "pw" not in caplog.text
    assert "pw" not in (tmp_path / "mlflow_outbox.jsonl").read_text()


def test_the_next_start_delivers_what_the_former_could_not(uri: str, tmp_path: Path) -> None:
    lines = tmp_path / "metrics.jsonl"
    with Tracker(AwayClient, RUN, lines) as former:
        former.log_params({"lr": 1})
        for step in range(1500):  # more than fit into one call
            former.log_metrics({"loss": step, "accuracy": 0.5}, step)
    with (tmp_path / "mlflow_outbox.jsonl").open("a") as file:
        file.write('{"kind": "metr')  # the line a killed process was writing

    with start(uri, continues=True, metrics_path=lines) as tracker:
        tracker.log_metrics({"loss": 9.0}, 1500)
    assert tracker.num_undelivered == 0
    run = get_run(uri, tracker)
    assert run.info.status == "FINISHED"
    assert run.data.params == {"lr": "1"}
    expected = [(line["step"], line["loss"]) for line in read_lines(lines)]
    assert history(uri, tracker, "loss") == expected
    assert len(expected) == 1501


def history(uri: str, tracker: Tracker, name: str) -> list[tuple[int, float]]:
    assert tracker.run_id is not None
    points = connect(uri).get_metric_history(tracker.run_id, name)
    return [(point.step, point.value) for point in points]


def test_another_training_in_the_folder_leaves_the_former_run_alone(
    uri: str, tmp_path: Path
) -> None:
    """Records go to the run that they were logged for, even when it is opened later."""
    lines = tmp_path / "metrics.jsonl"
    with Tracker(AwayClient, RUN | {"token": "t1"}, lines) as former:
        former.log_metrics({"loss": 1.0}, 1)
    with start(uri, metrics_path=lines) as tracker:
        tracker.log_metrics({"loss": 2.0}, 1)
    assert history(uri, tracker, "loss") == [(1, 2.0)]
    client = connect(uri)
    experiment = client.get_experiment_by_name("pretrain")
    assert experiment is not None
    (found,) = client.search_runs([experiment.experiment_id], "tags.opened_by = 't1'")
    assert found.data.metrics == {"loss": 1.0}
    assert found.info.status == "FINISHED"


def test_a_delivery_that_is_repeated_changes_nothing(uri: str, tmp_path: Path) -> None:
    lines = tmp_path / "metrics.jsonl"
    with start(uri, metrics_path=lines) as tracker:
        tracker.log_params({"lr": 1})
        for step in range(5):
            tracker.log_metrics({"loss": math.nan if step == 3 else step}, step)
    before = history(uri, tracker, "loss")
    # As if the process had been killed before the cursor was written at all.
    (tmp_path / "mlflow_outbox.cursor.json").unlink()
    with start(uri, run_id=tracker.run_id, metrics_path=lines) as again:
        pass
    assert again.run_id == tracker.run_id
    after = history(uri, again, "loss")
    assert len(before) == len(after) == 5
    assert str(after) == str(before)


def test_what_the_server_refuses_does_not_hold_up_the_rest(
    uri: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with start(uri, metrics_path=tmp_path / "metrics.jsonl") as tracker:
        tracker.log_metrics({"loss": 1.0}, 1)
        tracker.log_metrics({"not: a name?": 1.0}, 1)
        tracker.log_artifacts(tmp_path / "gone")
        tracker.log_metrics({"loss": 2.0}, 2)
    assert tracker.num_undelivered == 0
    assert history(uri, tracker, "loss") == [(1, 1.0), (2, 2.0)]
    assert "MLflow refused to log metrics" in caplog.text
    assert "gone is no longer there" in caplog.text


def test_unwritable_metrics_file_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = Tracker(AwayClient, RUN, tmp_path)  # a folder where the file should be
    tracker.log_metrics({"loss": 1.0}, step=1)
    tracker.log_metrics({"loss": 1.0}, step=2)
    tracker.abandon()
    assert caplog.text.count("could not write the metrics file") == 1


def test_other_ranks_do_nothing(tmp_path: Path) -> None:
    lines = tmp_path / "metrics.jsonl"
    with start_run("sqlite:///x", "e", "r", is_first=False, metrics_path=lines) as tracker:
        tracker.log_params({"lr": 1})
        tracker.log_metrics({"loss": 1.0}, step=1)
        tracker.log_dataset("x", "y", "z", num_cells=1)
        tracker.log_file(lines)
        tracker.log_artifacts(tmp_path)
        tracker.set_tags({"a": "b"})
    assert tracker.run_id is None
    assert list(tmp_path.iterdir()) == []


def test_users_settings_hold_and_output_stays_quiet(
    uri: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in MLFLOW_SETTINGS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "77")
    connect(uri)
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "77"
    assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "1"
    assert logging.getLogger("alembic").getEffectiveLevel() >= logging.WARNING
    with start(uri):
        pass
    assert capfd.readouterr().out == ""
