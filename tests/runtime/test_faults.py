"""Any actor may die at any moment of a run: the bits are those of a run without a fault."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from fedlpp_ray.config import Experiment
from fedlpp_ray.federation import Federation, checkpoint
from fedlpp_ray.federation.in_process import InProcess
from fedlpp_ray.federation.recovery import finished_rounds
from fedlpp_ray.messages import MessageError
from fedlpp_ray.runtime import PlacementError, RayBackend, connect, reserve
from fedlpp_ray.runtime.jobs import Job
from fedlpp_ray.runtime.pool import OutOfMemoryError, Pool
from fedlpp_ray.runtime.server import ServerActor
from tests.federation.test_loop import numbers


def long(value: int) -> Any:
    return pytest.param(value, marks=pytest.mark.long)


STATEFUL = {
    "uplink.bits": 4,
    "uplink.error_feedback": True,
    "server.optimizer": "fedadam",
    "server.lr": 0.01,
    "downlink.hysteresis": 0.5,
    "downlink.hold_scales": True,
    "runtime.client_actors": 2,
    "runtime.start_timeout": 120.0,
}


@pytest.fixture(scope="module")
def experiment(tiny_experiment: Experiment) -> Experiment:
    """With all kinds of state that a fault could spoil."""
    return tiny_experiment.with_values(STATEFUL)


@pytest.fixture(scope="module")
def expected(experiment: Experiment) -> list[dict[str, object]]:
    return numbers(list(Federation(experiment, InProcess(experiment)).run()))


@pytest.fixture(scope="module")
def actors(experiment: Experiment) -> Iterator[RayBackend]:
    with connect(), reserve(experiment) as group:
        backend = RayBackend(experiment, group)
        yield backend
        backend.close()


@pytest.fixture
def backend(actors: RayBackend, experiment: Experiment) -> RayBackend:
    """The same actors, as before any fault."""
    assert actors.begin(experiment)
    return actors


def run(experiment: Experiment, backend: RayBackend) -> list[dict[str, object]]:
    federation = Federation(experiment, backend)
    list(finished_rounds(federation))
    return numbers(federation.history)


def before_call(
    monkeypatch: pytest.MonkeyPatch, owner: type, method: str, act: Callable[..., None]
) -> list[int]:
    """Have `act` called with the number and the arguments of each call of a method."""
    original, calls = getattr(owner, method), [0]

    def wrapped(self: Any, *arguments: Any) -> Any:
        calls[0] += 1
        act(calls[0], self, *arguments)
        return original(self, *arguments)

    monkeypatch.setattr(owner, method, wrapped)
    return calls


@pytest.mark.slow
@pytest.mark.parametrize("call", [long(1), long(3), 5, long(9), long(14)])
def test_the_server_dies_before_any_of_its_calls(
    monkeypatch: pytest.MonkeyPatch,
    backend: RayBackend,
    experiment: Experiment,
    expected: list[dict[str, object]],
    call: int,
) -> None:
    federation = Federation(experiment, backend)

    def kill(number: int, server: ServerActor, *_: Any) -> None:
        if number == call:
            ray.kill(server.actor)

    calls = before_call(monkeypatch, ServerActor, "send", kill)
    list(finished_rounds(federation))
    assert calls[0] > call
    assert numbers(federation.history) == expected


@pytest.mark.parametrize("job", [long(1), 4, long(6), long(13)])
def test_a_client_actor_dies_at_any_of_its_jobs(
    monkeypatch: pytest.MonkeyPatch,
    backend: RayBackend,
    experiment: Experiment,
    expected: list[dict[str, object]],
    job: int,
) -> None:
    """Jobs of 3 rounds: 4 clients each, and an evaluation."""
    sent: list[str] = []

    def kill(self: Job, actor: Any) -> Any:
        sent.append(self.name)
        references = original(self, actor)
        if len(sent) == job:
            ray.kill(actor)
        return references

    original = Job.begin
    monkeypatch.setattr(Job, "begin", kill)
    assert run(experiment, backend) == expected
    assert sent.count(sent[job - 1]) == 1 + (sent[job - 1] != "evaluation") or "evaluation" in sent
    assert len(sent) == 3 * 5 + 1


@pytest.fixture(scope="module")
def masked(tiny_experiment: Experiment) -> Experiment:
    """Rounds of secure aggregation."""
    own = {"secure.threshold": 3, "federation.min_updates": 3, "downlink.bits": 4}
    return tiny_experiment.with_values(
        own | {k: v for k, v in STATEFUL.items() if k.startswith("runtime.")}
    )


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["server", "client"])
def test_a_masked_round_that_loses_a_party_has_the_sum_of_all(
    monkeypatch: pytest.MonkeyPatch, actors: RayBackend, masked: Experiment, lost: str
) -> None:
    """The server once it holds masked updates; a client's actor while it is to mask one."""
    assert actors.begin(masked)
    killed: list[str] = []
    calls: list[str] = []

    def kill_server(_: int, server: ServerActor, method: str, *__: Any) -> None:
        calls.append(method)
        if calls.count("exchange") == 7 and not killed:  # 4 a round; 7 asks who has come in round 2
            killed.append(calls[-2])
            ray.kill(server.actor)

    def kill_client(self: Job, actor: Any) -> Any:
        references = original(self, actor)
        if self.name.startswith("round 2, client") and not killed:
            killed.append(self.name)
            ray.kill(actor)
        return references

    original = Job.begin
    if lost == "server":
        before_call(monkeypatch, ServerActor, "send", kill_server)
    else:
        monkeypatch.setattr(Job, "begin", kill_client)
    assert run(masked, actors) == numbers(list(Federation(masked, InProcess(masked)).run()))
    assert len(killed) == 1
    if lost == "server":
        first, second = [i for i, method in enumerate(calls) if method == "aggregate"][:2]
        # Of round 2 keys, shares and the survivors that nobody answered, and all four again.
        assert calls[first:second].count("exchange") == 3 + 4


@pytest.mark.long
def test_a_client_that_always_kills_its_actor_has_failed_and_is_reported(
    monkeypatch: pytest.MonkeyPatch, backend: RayBackend, experiment: Experiment
) -> None:
    fatal = "round 1, client 5"

    def kill(self: Job, actor: Any) -> Any:
        references = original(self, actor)
        if self.name == fatal:
            ray.kill(actor)
        return references

    original = Job.begin
    monkeypatch.setattr(Job, "begin", kill)
    federation = Federation(experiment, backend)
    first = next(finished_rounds(federation))
    faults = {c.client: c.fault for c in first.clients if c.fault}
    assert list(faults) == [5]
    assert faults[5].kind == "failed"
    assert "lost in 3 attempts (runtime.attempts)" in faults[5].reason
    assert len(first.folded) == 3


def party(actor: Any, change: Callable[[Any], None]) -> None:
    """Change the party inside an actor's process."""
    ray.get(actor.__ray_call__.remote(lambda self: change(self._party)))


@pytest.mark.slow
def test_a_poisoned_return_is_refused_and_the_round_goes_on(
    backend: RayBackend, experiment: Experiment
) -> None:
    def poison(host: Any) -> None:
        train = host.train

        def changed(round: int, client: int, *rest: Any) -> Any:
            update = train(round, client, *rest)
            if client == 6:
                object.__setattr__(update, "payload", update.payload[:-1])
            return update

        host.train = changed

    backend.pool.until(lambda: len(backend.pool.working) == 2)
    for slot in backend.pool.slots:
        party(slot.actor, poison)
    federation = Federation(experiment, backend)
    records = list(finished_rounds(federation))
    refused = [(r.round, c.client) for r in records for c in r.clients if c.fault]
    assert refused == [(r.round, 6) for r in records if 6 in [c.client for c in r.clients]]
    assert refused
    assert all(len(r.folded) >= 3 for r in records)
    assert 6 not in federation.snapshot().memories


def test_if_nothing_can_be_used_the_run_says_why(
    backend: RayBackend, experiment: Experiment
) -> None:
    assert backend.begin(experiment.with_values({"server.max_update_norm": 1e-9}))
    with pytest.raises(MessageError, match=r"round 1: no update could be used: .*its norm is"):
        list(Federation(experiment, backend).run())


@pytest.mark.long
def test_a_hung_client_is_late_after_the_deadline_of_the_clock(
    backend: RayBackend, experiment: Experiment
) -> None:
    limited = experiment.with_values({"runtime.round_deadline": 20.0, "federation.rounds": 1})
    fresh = Federation(limited, backend)
    backend._experiment = limited
    backend.pool.until(lambda: len(backend.pool.working) == 2)
    hung = backend.pool.slots[0]
    pid = ray.get(hung.actor.__ray_call__.remote(lambda _: os.getpid()))
    os.kill(pid, signal.SIGSTOP)
    try:
        (record,) = finished_rounds(fresh)
    finally:
        os.kill(pid, signal.SIGKILL)
        backend._experiment = experiment
    late = [c for c in record.clients if c.fault]
    assert [c.fault.kind for c in late if c.fault] == ["late"]
    assert "runtime.round_deadline" in str(late[0].fault)
    assert len(record.folded) == 3


@pytest.mark.slow
def test_out_of_memory_leaves_half_of_the_actors_on_the_device(
    backend: RayBackend, experiment: Experiment, expected: list[dict[str, object]]
) -> None:
    def exhaust(host: Any) -> None:
        def train(*_: Any) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

        host.train = train

    backend.pool.until(lambda: len(backend.pool.working) == 2)
    for slot in backend.pool.slots:
        party(slot.actor, exhaust)
    assert run(experiment, backend) == expected
    assert sorted(slot.state for slot in backend.pool.slots)[0] == "absent"
    (left,) = (slot for slot in backend.pool.slots if slot.state != "absent")
    assert left.room == 2.0
    # The second time there is nobody left to make room.
    party(left.actor, exhaust)
    with pytest.raises(OutOfMemoryError, match=r"one of 1 actors there: out of memory.*batch_size"):
        run(experiment, backend)


def test_a_run_goes_on_from_a_checkpoint_of_another_backend(
    backend: RayBackend,
    experiment: Experiment,
    expected: list[dict[str, object]],
    tmp_path: Path,
) -> None:
    federation = Federation(experiment, backend)
    for record in finished_rounds(federation):
        if record.round == 2:
            checkpoint.save(federation, tmp_path)
            break
    assert backend.begin(experiment)
    restored = Federation(experiment, backend)
    checkpoint.restore(restored, tmp_path)
    list(restored.run())
    assert numbers(restored.history) == expected


def test_actors_that_cannot_come_back_are_given_up_in_time(
    monkeypatch: pytest.MonkeyPatch, backend: RayBackend, experiment: Experiment
) -> None:
    monkeypatch.setattr(backend.pool, "_timeout", 3.0)
    monkeypatch.setattr(Pool, "_started", lambda *_: None)  # none is ever ready again
    for slot in backend.pool.slots:
        backend.pool._replace(slot, "killed")
    with pytest.raises(
        PlacementError, match=r"no client actor has worked for 3 s .* needs 0.5 CPU"
    ):
        run(experiment, backend)
