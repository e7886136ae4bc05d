"""Any node may come, go, or have notice to go: the bits are those of one process."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from fedlpp_ray.config import Experiment
from fedlpp_ray.federation import Federation
from fedlpp_ray.federation.in_process import InProcess
from fedlpp_ray.federation.recovery import finished_rounds
from fedlpp_ray.runtime import PlacementError, RayBackend, connect, reserve
from fedlpp_ray.runtime.cohort import CohortTraining
from fedlpp_ray.runtime.jobs import Job
from fedlpp_ray.runtime.pool import Pool
from fedlpp_ray.runtime.server import ServerActor
from fedlpp_ray.runtime.sums import OnNodes
from tests.federation.test_loop import numbers
from tests.runtime.many_nodes import CLIENT_CPUS, SERVER, SERVER_CPUS, Nodes, around, many_nodes

pytestmark = pytest.mark.slow

VALUES = {
    "uplink.bits": 4,
    "uplink.error_feedback": True,
    "server.optimizer": "fedadam",
    "server.lr": 0.01,
    "runtime.client_actors": 3,
    "runtime.min_client_actors": 1,
    "runtime.client_cpus": float(CLIENT_CPUS),
    "runtime.server_cpus": float(SERVER_CPUS),
    "runtime.start_timeout": 300.0,
}

Numbers = list[dict[str, object]]


@pytest.fixture(scope="module")
def experiment(tiny_experiment: Experiment) -> Experiment:
    return tiny_experiment.with_values(VALUES)


@pytest.fixture(scope="module")
def expected(experiment: Experiment) -> Numbers:
    return numbers(list(Federation(experiment, InProcess(experiment)).run()))


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with many_nodes() as found, connect():
        yield found


@pytest.fixture(scope="module")
def actors(nodes: Nodes, experiment: Experiment) -> Iterator[RayBackend]:
    nodes.want(clients=2, servers=1)
    with reserve(experiment) as group:
        backend = RayBackend(experiment, group)
        yield backend
        backend.close()


@pytest.fixture
def backend(actors: RayBackend, nodes: Nodes, experiment: Experiment) -> RayBackend:
    """Two client actors that work, each on its node; there is no room for the third."""
    nodes.want(clients=2, servers=1)
    assert actors.begin(experiment)
    actors.pool.until(lambda: len(actors.pool.working) == 2)
    return actors


def run(experiment: Experiment, backend: RayBackend) -> Numbers:
    federation = Federation(experiment, backend)
    list(finished_rounds(federation))
    return numbers(federation.history)


def node_of(pool: Pool, actor: Any) -> str:
    """Where an actor works."""
    (place,) = (slot.place for slot in pool.slots if slot.actor is actor)
    assert place
    return place.node


def test_no_worker_node_is_refused_unless_one_may_be_started(
    monkeypatch: pytest.MonkeyPatch, nodes: Nodes, experiment: Experiment
) -> None:
    with pytest.raises(PlacementError, match="no node has that"), reserve(experiment):
        pass
    kinds = [{"CPU": CLIENT_CPUS}, {"CPU": SERVER_CPUS, SERVER: 1}]
    state = ray._private.state.state
    groups = [SimpleNamespace(resources=kind, max_count=3) for kind in kinds]
    config = SimpleNamespace(node_group_configs=groups)
    monkeypatch.setattr(state, "get_cluster_config", lambda: config)
    monkeypatch.setattr(state, "get_max_resources_from_cluster_config", lambda: {"CPU": 9, SERVER: 3})
    hurried = experiment.with_values({"runtime.start_timeout": 3.0})
    with pytest.raises(PlacementError, match="no room after 3 s .*CPU"), reserve(hurried):
        pass
    reserved: list[int] = []

    def wait() -> None:
        with reserve(experiment) as group:
            reserved.append(group.bundle_count)

    waiting = threading.Thread(target=wait)
    waiting.start()
    nodes.want(clients=1, servers=0)
    assert not reserved
    nodes.want(clients=1, servers=1)
    waiting.join(120)
    assert reserved == [2]


@pytest.mark.parametrize("work", ["round 1", "evaluation"])
def test_a_node_dies_at_work(
    monkeypatch: pytest.MonkeyPatch,
    nodes: Nodes,
    backend: RayBackend,
    experiment: Experiment,
    expected: Numbers,
    work: str,
) -> None:
    names: list[str] = []

    def kill(_: int, job: Job, actor: Any) -> None:
        names.append(job.name)
        if job.name.startswith(work) and len(nodes.there(CLIENT_CPUS)) == 2:
            nodes.kill(node_of(backend.pool, actor))

    around(monkeypatch, Job, "begin", after=kill)
    assert run(experiment, backend) == expected
    killed = next(name for name in names if name.startswith(work))
    assert names.count(killed) >= 2
