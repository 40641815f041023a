"""Hosts that the cluster tests share; they take half a minute to come up and to train once."""

import re
from collections.abc import Iterator

import pytest

from tests.support.cluster import Cluster, missing, start_cluster
from tests.support.cluster_training import command, losses, settings
from tests.support.slurm import Slurm, start_slurm
from tests.support.slurm import missing as missing_slurm
from tests.support.tiny import tiny_store


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Hosts n1 and n2; the last test takes n2 away."""
    assert not missing(), f"these tests start hosts of their own: {missing()}"
    with start_cluster(tmp_path_factory.mktemp("cluster"), 2) as running:
        tiny_store(running.folder / "store")
        running.hostfile(slots=1)
        yield running


@pytest.fixture(scope="session")
def undisturbed(cluster: Cluster) -> dict[int, float]:
    """Losses of 60 steps on two hosts that nobody disturbed."""
    code, text = cluster.run(
        cluster.hosts[0], command(settings(cluster, "undisturbed", max_steps=60))
    )
    assert code == 0, text
    assert re.search(r"export: .*undisturbed/export", text)
    return losses(cluster, "undisturbed")


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """A Slurm of two nodes."""
    assert not missing_slurm(), f"these tests start Slurm: {missing_slurm()}"
    with start_slurm(tmp_path_factory.mktemp("slurm") / "cluster", 2) as running:
        yield running
