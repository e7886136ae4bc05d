"""Any node may come, go, or have notice to go: the bits are those of one process."""

from __future__ import annotations

import os
import signal
import threading
import time
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
from fedlpp_ray.runtime.placement import is_whole
from fedlpp_ray.runtime.pool import Pool
from fedlpp_ray.runtime.server import ServerActor
from fedlpp_ray.runtime.sums import OnNodes
from tests.federation.test_loop import numbers
from tests.runtime.many_nodes import CLIENT_CPUS, SERVER, SERVER_CPUS, Nodes, around, many_nodes
from tests.runtime.test_rounds import EMULATED

pytestmark = pytest.mark.long

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
    """Two client actors that work, each on its node; there is no room for the third.

    What the test before has killed is known of, and has been made good.
    """
    nodes.want(clients=2, servers=1)
    actors.pool.until(lambda: is_whole(actors._group))
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
    hurried = experiment.with_values({"runtime.start_timeout": 3.0})
    with pytest.raises(PlacementError, match=r"no room after 3 s .*CPU"), reserve(hurried):
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
def test_a_node_dies_at_work(  # noqa: PLR0917
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


def test_an_update_is_lost_with_its_node_before_the_verdict(
    monkeypatch: pytest.MonkeyPatch,
    nodes: Nodes,
    backend: RayBackend,
    experiment: Experiment,
    expected: Numbers,
) -> None:
    """On the node that comes, all that actors return is in its object store."""
    nodes.kill(nodes.there(CLIENT_CPUS)[0])
    monkeypatch.setenv("RAY_max_direct_call_object_size", "10")
    new = nodes.add(CLIENT_CPUS)
    assert backend.begin(experiment)
    backend.pool.until(lambda: new in [s.place.node for s in backend.pool.working if s.place])
    lost: list[int] = []

    def kill(_: int, __: CohortTraining, ___: Job, client: int, report: Any, ____: Any) -> None:
        place = backend.pool.slots[report.host].place
        if not lost and place and place.node == new:
            lost.append(client)
            nodes.kill(new)

    names: list[str] = []
    around(monkeypatch, CohortTraining, "_returned", before=kill)
    around(monkeypatch, Job, "begin", before=lambda _, job, __: names.append(job.name))
    assert run(experiment, backend) == expected
    assert names.count(f"round 1, client {lost[0]}") == 2


def test_a_node_with_notice_gets_no_client_and_its_loss_is_no_attempt(
    monkeypatch: pytest.MonkeyPatch,
    nodes: Nodes,
    backend: RayBackend,
    experiment: Experiment,
    expected: Numbers,
) -> None:
    sent: list[tuple[str, str]] = []
    jobs: list[Job] = []

    def act(number: int, job: Job, actor: Any) -> None:
        sent.append((job.name, node_of(backend.pool, actor)))
        jobs.append(job)
        if number == 1:  # hangs until its node is killed
            os.kill(hung, signal.SIGSTOP)
            nodes.drain(sent[0][1], 300)
        if number == 4:
            nodes.kill(sent[0][1])

    first = next(slot for slot in backend.pool.slots if slot.state == "idle")
    hung = ray.get(first.actor.__ray_call__.remote(lambda _: os.getpid()))
    around(monkeypatch, Job, "begin", after=act)
    assert run(experiment, backend) == expected
    leaving = sent[0][1]
    # The second is sent before the notice, or after it to the other.
    assert [name for name, node in sent if node == leaving] == [sent[0][0]]
    assert [name for name, _ in sent].count(sent[0][0]) == 2
    assert [job.attempts for job in jobs] == [0] * len(jobs)


def test_the_pool_follows_nodes_that_come_and_go(
    nodes: Nodes, backend: RayBackend, experiment: Experiment
) -> None:
    longer = experiment.with_values({"federation.rounds": 4})
    assert backend.begin(longer)
    backend.pool.until(lambda: len(backend.pool.working) == 2)
    federation, counts = Federation(longer, backend), []
    for record in finished_rounds(federation):
        counts.append(len(backend.pool.working))
        if record.round == 1:
            nodes.add(CLIENT_CPUS)
            backend.pool.until(lambda: len(backend.pool.working) == 3)
        if record.round == 2:  # while the third trains; the fourth finds out at the latest
            for node in nodes.there(CLIENT_CPUS)[:2]:
                nodes.kill(node)
    assert counts[:2] == [2, 3]
    assert counts[3] == 1
    expected = numbers(list(Federation(longer, InProcess(longer)).run()))
    assert numbers(federation.history) == expected


@pytest.mark.parametrize("lost", ["nothing", "aggregator", "node"])
def test_sums_by_node_give_the_bits_of_one_process(  # noqa: PLR0917
    monkeypatch: pytest.MonkeyPatch,
    nodes: Nodes,
    backend: RayBackend,
    experiment: Experiment,
    expected: Numbers,
    lost: str,
) -> None:
    partial = experiment.with_values({"runtime.partial_sums_from": 2})
    monkeypatch.setattr(backend, "_experiment", partial)
    summed: list[set[str]] = []
    names: list[str] = []

    def added(number: int, sums: OnNodes, _: int, node: str, __: Any) -> None:
        if lost == "aggregator" and number in (2, 3):
            ray.kill(sums._actors[node])

    def collected(number: int, sums: OnNodes) -> None:
        summed.append(set(sums._clients))
        if lost == "node" and number == 1:
            nodes.kill(sorted(sums._clients)[0])

    around(monkeypatch, Job, "begin", before=lambda _, job, __: names.append(job.name))
    around(monkeypatch, OnNodes, "add", after=added)
    around(monkeypatch, OnNodes, "collect", before=collected)
    assert run(experiment, backend) == expected
    assert len(summed[0]) == 2
    again = {name for name in names if name.startswith("round 1") and names.count(name) > 1}
    assert bool(again) == (lost != "nothing")


def test_a_client_without_a_bundle_makes_room_for_one_that_lost_its_own(
    nodes: Nodes, backend: RayBackend
) -> None:
    """It may be first on the node that comes in place of the lost one."""
    slots = backend.pool.slots
    for _ in range(3):
        backend.pool.until(lambda: len(backend.pool.working) == 2 and slots[0].place is not None)
        assert slots[0].place
        nodes.kill(slots[0].place.node)
        backend.pool._probe()
        backend.pool.until(lambda: len(backend.pool.working) == 1)
        nodes.add(CLIENT_CPUS)
        deadline = time.monotonic() + 120
        assert backend.pool.until(lambda: slots[0].state == "idle", deadline)


@pytest.mark.parametrize("values", [{}, EMULATED], ids=["default", "emulator"])
def test_the_servers_node_dies(
    monkeypatch: pytest.MonkeyPatch,
    nodes: Nodes,
    backend: RayBackend,
    tiny_experiment: Experiment,
    values: dict[str, object],
) -> None:
    """And then a client actor, which the next one replaces from what is left."""
    changed = tiny_experiment.with_values(VALUES | values)
    expected = numbers(list(Federation(changed, InProcess(changed)).run()))
    assert backend.begin(changed)
    nodes.add(SERVER_CPUS)
    backend.pool.until(lambda: len(backend.pool.working) == 2)
    federation, killed = Federation(changed, backend), []

    def kill_server(number: int, server: ServerActor, *_: Any) -> None:
        if number == 5:
            killed.append(ray.get(server._start).node)
            nodes.kill(killed[0])

    def kill_client(_: int, __: Job, actor: Any) -> None:
        if len(killed) == 1:
            killed.append(node_of(backend.pool, actor))
            ray.kill(actor)

    around(monkeypatch, ServerActor, "send", before=kill_server)
    around(monkeypatch, Job, "begin", after=kill_client)
    list(finished_rounds(federation))
    assert numbers(federation.history) == expected
    assert len(killed) == 2
    backend.pool.until(lambda: len(backend.pool.working) == 2)
