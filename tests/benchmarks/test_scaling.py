"""The scaling benchmark's arithmetic and page; `--quick` runs the measurements."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks import scaling, scaling_document
from pretrain.config import EncoderConfig
from pretrain.estimate import measure_size


def figures() -> dict[str, Any]:
    return {
        "weak": [[9.0, 10.0], [19.0, 20.0], [8.0, 10.0]],
        "memory": {"small, ZeRO 1": {"peak_bytes": 110e6, "estimated_bytes": 100e6}},
        "traffic": {"1": {"sent_bytes": 60e6, "sent_bytes_in_theory": 50e6}},
        "ranks": {
            "1": {
                "cells_per_second": 5.0,
                "loader_wait_share": 0.01,
                "calibrated_cpu_seconds": 0.1,
                "cpu_seconds": 0.12,
            },
            "4": {"cells_per_second": 6.0, "loader_wait_share": 0.02},
        },
        "building": {
            "ranks": 4,
            "parameters": 100e6,
            "whole_bytes": 400e6,
            "largest_bytes": 60e6,
            "build_bytes": 170e6,
        },
        "checkpoint": {
            "checkpoint_bytes": 1.2e9,
            "checkpoint_stall_seconds": 3.0,
            "resume_check_seconds": 1.5,
            "resume_read_seconds": 2.5,
            "start_seconds": 4.5,
        },
    }


def test_ratios_by_hand() -> None:
    found = scaling.ratios(figures())
    assert found["weak_two_ranks"] == 0.9  # the median of 0.9, 0.95 and 0.8
    assert found["memory_vs_estimate"] == {"small, ZeRO 1": pytest.approx(1.1)}
    assert found["traffic_vs_estimate"] == {"1": pytest.approx(1.2)}
    assert found["cpu_seconds_vs_calibration"] == pytest.approx(1.2)


def test_parts_that_were_not_measured_are_left_out() -> None:
    assert set(scaling.ratios({"weak": [[9.0, 10.0]]})) == {
        "weak_two_ranks",
        "memory_vs_estimate",
        "traffic_vs_estimate",
    }


def test_the_page_says_what_was_measured_and_what_is_predicted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "images").mkdir()
    monkeypatch.setattr(scaling_document, "activation_bytes", lambda *_: 1e8)  # seconds each
    result: dict[str, Any] = {
        "figures": figures(),
        "load": {"weak": 0.5, "ranks": 7.2},
        "ratios": scaling.ratios(figures()),
        "machine": {"cpu": "a CPU", "cores": 2, "quick": True},
    }
    scaling_document.write_document(result, tmp_path)
    page = (tmp_path / "scaling.md").read_text()
    assert "| small, ZeRO 1 | 110 MB | 100 MB | 1.10 |" in page
    assert "| 1 | 60.0 MB | 50.0 MB | 1.200 |" in page
    assert "takes 170 MB of each at most while it is built; a share is 100 MB" in page
    assert "| 4 (time-sliced) | 6.0 | 2.0% |" in page
    assert "90.0% of what two" in page
    assert "other work meanwhile (load average at the start): ranks 7." in page
    assert "not measured" not in page
    del result["figures"]["memory"]
    scaling_document.write_document(result, tmp_path)
    assert "memory: not measured yet." in (tmp_path / "scaling.md").read_text()
    assert (tmp_path / "images" / "scaling.png").stat().st_size > 10_000


def test_predicted_efficiency_falls_and_strong_scaling_faster(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(scaling_document, "activation_bytes", lambda *_: 1e8)
    rows = list(scaling_document.predict("scbert", 1))
    for name in ("weak", "strong"):
        values = [row[name] for row in rows]
        assert values == sorted(values, reverse=True)
        assert 0 < values[-1] <= values[0] <= 1
    assert rows[-1]["strong"] < rows[-1]["weak"]


def test_scaling_of_what_was_measured_by_hand() -> None:
    rows = list(scaling_document.predict_measured({"cells_per_second": 10.0}, 6.25e9))
    # 180 cells of a tenth of a second, and 2 s × 7/8 on the wire.
    assert rows[0]["weak"] == pytest.approx(18 / (18 + 1.75))
    assert rows[0]["weak_cells"] == pytest.approx(180 * 8 / 19.75)
    assert rows[-1]["strong"] == pytest.approx(0.4 / (0.4 + 2 * 4_095 / 4_096))


def test_the_checkpoint_of_the_benchmark_has_a_hundred_million_parameters() -> None:
    size = measure_size(EncoderConfig(**scaling.LARGE), scaling.NUM_GENES)
    assert size.trained == pytest.approx(100e6, rel=0.02)
