"""Training over several hosts with DeepSpeed's own launcher, and what faults look like there."""

import re
import sys
import time

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
from tests.support.documents import shown

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]


def test_two_hosts_train_as_one(cluster: Cluster, undisturbed: dict[int, float]) -> None:
    config = settings(cluster, "alone", max_steps=60)
    code, text = cluster.run(cluster.hosts[0], f"{sys.executable} {PRETRAIN} --config {config}")
    assert code == 0, text
    same_steps(losses(cluster, "alone"), undisturbed, 1e-5)


def test_a_killed_rank_ends_the_job_which_then_continues(
    cluster: Cluster, undisturbed: dict[int, float]
) -> None:
    config = settings(cluster, "killed")
    running = cluster.start(cluster.hosts[0], command(config))
    wait_for_step(cluster, "killed", 12, running)
    cluster.signal(cluster.hosts[1], "launchers/pretrain.py --local_rank", "KILL")
    assert running.wait(60) != 0
    assert running.text.count("the connection to another rank") <= 1, running.text
    assert "Traceback" not in running.text
    stopped = max(losses(cluster, "killed"))

    code, text = cluster.run(
        cluster.hosts[0], command(config, f"--stop_after {max(60, stopped + 1)}")
    )
    assert code == 0, text
    found = re.search(r"continuing at step (\d+) of", text)
    assert found is not None
    assert stopped - int(found.group(1)) <= 5  # the steps since the last checkpoint, no more
    same_steps(losses(cluster, "killed"), undisturbed, 0)


def test_a_hung_rank_is_named_by_the_watchdog(cluster: Cluster) -> None:
    running = cluster.start(cluster.hosts[0], command(settings(cluster, "hung")))
    wait_for_step(cluster, "hung", 7, running)
    cluster.signal(cluster.hosts[1], "launchers/pretrain.py --local_rank", "STOP")
    deadline = time.monotonic() + 90
    while "no progress" not in running.text:
        assert running.process.poll() is None, running.text
        assert time.monotonic() < deadline, running.text
        time.sleep(0.2)
    # The guard on n2 kills the frozen process, for which pdsh would wait for ever.
    assert running.wait(60) != 0
    assert running.text.count("rank 1 (n2) stopped, died or lost the network") == 1, running.text


def test_without_pdsh_ssh_alone_does_the_same(
    cluster: Cluster, undisturbed: dict[int, float]
) -> None:
    config = settings(cluster, "fanned", max_steps=60)
    code, text = cluster.run(cluster.hosts[0], fan_out(config))
    assert code == 0, text
    same_steps(losses(cluster, "fanned"), undisturbed, 0)
    assert "[n2] " in text  # SCBERT_LOG was passed on: the other rank speaks, too
    assert "step 60/60" in (cluster.folder / "logs" / "n1.log").read_text()
    assert (cluster.folder / "logs" / "n2.log").is_file()


@pytest.mark.parametrize(
    ("hosts", "environ", "message"),
    [
        pytest.param("n1 slots=1\nn9 slots=1\n", "", "n9 cannot be reached by ssh", id="host"),
        pytest.param("n1 slots=1\nn2 slots=2\n", "", "different slots", id="slots"),
        pytest.param("n1 slots=1\nn1 slots=1\n", "", "n1 is there twice", id="twice"),
        pytest.param(
            "n1 slots=1\nn2 slots=1\n",
            "GLOO_SOCKET_IFNAME=ib0",
            "GLOO_SOCKET_IFNAME is ib0, but n1 has only lo, eth0",
            id="interface",
        ),
        pytest.param("n1 slots=1\nn2 slots=1\n", "", "port 29751 of n1 is in use", id="port"),
    ],
)
def test_a_cluster_that_is_not_ready_is_refused_within_seconds(
    hosts: str, environ: str, message: str, cluster: Cluster
) -> None:
    (cluster.folder / "wrong").write_text(hosts)
    listen = "import socket, time; s = socket.create_server(('', 29751)); time.sleep(60)"
    listener = cluster.start(cluster.hosts[0], f'exec {sys.executable} -c "{listen}"')
    time.sleep(1.0)
    changes = {"python launchers/": f"{sys.executable} {ROOT}/launchers/", "hosts": "wrong"}
    asked = f"{environ} {shown('cluster.md', '--check', changes)} --master_port 29751"
    started = time.monotonic()
    code, text = cluster.run(cluster.hosts[0], asked)
    seconds = time.monotonic() - started
    cluster.signal(cluster.hosts[0], "create_server", "KILL")
    listener.wait(20)
    assert code == 2
    assert message in text
    assert text.count("error:") == 1
    assert seconds < 30  # about 3 when the machine is free
