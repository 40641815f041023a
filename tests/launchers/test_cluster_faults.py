"""Faults of networks, disks and whole hosts; after each the training goes on.

They come after those of `test_cluster`: the last one leaves a host without power.
"""

import json
import re
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.support.cluster import ROOT, Cluster
from tests.support.cluster_training import (
    PRETRAIN,
    command,
    fan_out,
    losses,
    same_steps,
    settings,
    wait_for_step,
)

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]


def test_fanned_out_signals_and_exit_codes_come_through(
    cluster: Cluster, undisturbed: dict[int, float]
) -> None:
    config = settings(cluster, "asked")
    running = cluster.start(cluster.hosts[0], fan_out(config, "--rank_logs"))
    wait_for_step(cluster, "asked", 7, running)
    # Not the ssh and the shell that have its name in their own command lines.
    cluster.signal(cluster.hosts[0], f"^{sys.executable} {ROOT}/launchers/fan_out.py", "TERM")
    assert running.wait(90) == 75, running.text
    logs = [path.read_text() for path in (cluster.folder / "logs").glob("*rank0*")]
    assert any("saved and stopped as asked" in log for log in logs)
    stopped = max(losses(cluster, "asked"))

    running = cluster.start(cluster.hosts[0], fan_out(config))
    wait_for_step(cluster, "asked", stopped + 3, running)
    cluster.signal(cluster.hosts[1], "launchers/pretrain.py --local_rank", "KILL")
    assert running.wait(90) != 0
    pattern = "pgrep -f 'launchers/[p]retrain.py --local_rank'"
    assert all(cluster.run(host, pattern)[0] == 1 for host in cluster.hosts)  # nobody is left

    config = settings(cluster, "asked", max_steps=max(60, stopped + 10))
    code, text = cluster.run(cluster.hosts[0], fan_out(config))
    assert code == 0, text
    same_steps(losses(cluster, "asked"), undisturbed, 0)


def test_the_network_cut_in_mid_step(cluster: Cluster, undisturbed: dict[int, float]) -> None:
    config = settings(cluster, "cut")
    running = cluster.start(cluster.hosts[0], command(config))
    wait_for_step(cluster, "cut", 12, running)
    cluster.cut_network(cluster.hosts[1])
    try:
        assert running.wait(180) != 0
    finally:
        cluster.restore_network(cluster.hosts[1])
    assert running.text.count("rank 1 (n2) stopped, died or lost the network") == 1, running.text
    wait_until_nobody_trains(cluster)
    stopped = max(losses(cluster, "cut"))
    code, text = cluster.run(
        cluster.hosts[0], command(config, f"--stop_after {max(60, stopped + 1)}")
    )
    assert code == 0, text
    same_steps(losses(cluster, "cut"), undisturbed, 0)


def wait_until_nobody_trains(cluster: Cluster) -> None:
    """A host that was cut off ends its ranks by itself."""
    deadline = time.monotonic() + 90
    pattern = "pgrep -f 'launchers/[p]retrain.py --local_rank'"
    while not all(cluster.run(host, pattern)[0] == 1 for host in cluster.hosts):
        assert time.monotonic() < deadline
        time.sleep(0.5)


def test_the_coordinator_killed_during_a_save(
    cluster: Cluster, undisturbed: dict[int, float]
) -> None:
    config = settings(cluster, "saving", save_every=1)
    running = cluster.start(cluster.hosts[0], command(config))
    wait_for_step(cluster, "saving", 12, running)
    folder = cluster.folder / "saving" / "checkpoints"
    torn: list[Path] = []
    for _ in range(200):  # freeze it, look whether it is writing, else let it go on
        cluster.signal(cluster.hosts[0], "launchers/pretrain.py --local_rank", "STOP")
        torn = [p for p in folder.glob("step_*") if not (p / "checkpoint.json").is_file()]
        if torn:
            break
        cluster.signal(cluster.hosts[0], "launchers/pretrain.py --local_rank", "CONT")
        time.sleep(0.02)
    assert torn
    cluster.signal(cluster.hosts[0], "launchers/pretrain.py --local_rank", "KILL")
    assert running.wait(90) != 0
    stopped = max(losses(cluster, "saving"))

    code, text = cluster.run(
        cluster.hosts[0], command(config, f"--stop_after {max(60, stopped + 1)}")
    )
    assert code == 0, text
    assert f"{torn[0].name} is skipped: it was not finished" in text
    same_steps(losses(cluster, "saving"), undisturbed, 0)


def test_a_second_job_is_refused_and_a_slow_host_named(cluster: Cluster) -> None:
    config = settings(cluster, "slow", log_every=20)
    running = cluster.start(cluster.hosts[0], command(config))
    wait_for_step(cluster, "slow", 20, running)
    code, text = cluster.run(cluster.hosts[0], command(config).replace("29731", "29732"))
    assert code == 2, text
    assert text.count("error: ") == 1, text
    assert f"another training is writing {cluster.folder}/slow" in text

    deadline = time.monotonic() + 180
    while "is a straggler" not in running.text:
        assert running.process.poll() is None, running.text
        assert time.monotonic() < deadline, running.text
        for signal, seconds in (("STOP", 0.45), ("CONT", 0.05)):  # a tenth of its speed
            cluster.signal(cluster.hosts[1], "launchers/pretrain.py --local_rank", signal)
            time.sleep(seconds)
    assert "rank 1 (n2) is a straggler" in running.text
    cluster.signal(cluster.hosts[0], "launchers/pretrain.py --local_rank", "TERM")
    assert running.wait(90) != 0


def test_a_full_disk_during_a_save(cluster: Cluster, undisturbed: dict[int, float]) -> None:
    """Host n1 writes on a small disk of its own; a larger one, seen by all, takes its place."""
    folder = cluster.folder / "full"
    cluster.mount(cluster.hosts[0], folder, "1m")
    config = settings(cluster, "full", save_every=1)
    running = cluster.start(cluster.hosts[0], command(config))
    deadline = time.monotonic() + 120
    while cluster.run(cluster.hosts[0], f"test -s {folder}/checkpoints/latest")[0]:
        assert running.process.poll() is None, running.text
        assert time.monotonic() < deadline, running.text
        time.sleep(0.2)
    cluster.run(cluster.hosts[0], f"dd if=/dev/zero of={folder}/ballast bs=1k count=2000")
    assert running.wait(90) == 2, running.text
    assert len(re.findall("^n1: error: ", running.text, re.MULTILINE)) == 1, running.text
    assert "former checkpoints are kept" in running.text
    moved = (
        f"rm {folder}/ballast && cp -a {folder} {folder}.saved && umount {folder}"
        f" && cp -a {folder}.saved/. {folder}/"
    )
    code, text = cluster.run(cluster.hosts[0], moved)
    assert code == 0, text

    code, text = cluster.run(cluster.hosts[0], command(config, "--stop_after 60"))
    assert code == 0, text
    assert re.search(r"continuing at step \d+ of", text), text
    _, lines = cluster.run(cluster.hosts[0], f"cat {folder}/metrics.jsonl")
    steps: dict[int, float] = {}
    for line in lines.splitlines():
        if line.endswith("}") and '"loss"' in line:  # a full disk may have cut a line short
            steps[json.loads(line)["step"]] = json.loads(line)["loss"]
    last = {step: loss for step, loss in undisturbed.items() if step in steps}
    assert max(last) == 60
    np.testing.assert_array_equal([steps[step] for step in last], list(last.values()))


def test_a_host_without_power_is_named_and_the_others_continue(
    cluster: Cluster, undisturbed: dict[int, float]
) -> None:
    """The last test: host n2 does not come back."""
    config = settings(cluster, "power")
    running = cluster.start(cluster.hosts[0], command(config))
    wait_for_step(cluster, "power", 12, running)
    cluster.lose_power(cluster.hosts[1])
    assert running.wait(180) != 0  # pdsh returns its own 255 for the host that is gone
    assert running.text.count("rank 1 (n2) stopped, died or lost the network") == 1, running.text
    stopped = max(losses(cluster, "power"))

    code, text = cluster.run(
        cluster.hosts[0],
        f"{sys.executable} {PRETRAIN} --config {config} --stop_after {max(60, stopped + 1)}",
    )
    assert code == 0, text
    same_steps(losses(cluster, "power"), undisturbed, 1e-5)
