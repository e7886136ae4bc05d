"""The pool, its jobs and its reactor, without Ray: references are kept by hand."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.exceptions import RayError, RayTaskError

from fedlpp_ray.errors import UserError
from fedlpp_ray.messages import MessageError
from fedlpp_ray.runtime import PlacementError, pool, watch
from fedlpp_ray.runtime.jobs import Answer, Job, Pace, Queue
from fedlpp_ray.runtime.party import OutOfMemoryError, Place
from fedlpp_ray.runtime.pool import OutOfMemoryError as PoolOutOfMemoryError
from fedlpp_ray.runtime.pool import Pool, Slot
from fedlpp_ray.runtime.reactor import Reactor


class LostError(RayError):
    """Of an actor."""


class PreemptedError(RayError):
    preempted = True


@dataclass(eq=False)
class Ref:
    """What a call will have returned, once that is set."""

    values: list[Any] = field(default_factory=list)


@dataclass(eq=False)
class Actor:
    """Notes what it is asked."""

    number: int
    start: Ref = field(default_factory=Ref)
    probe: Ref = field(default_factory=Ref)
    work: dict[str, Ref] = field(default_factory=dict)

    @property
    def answer(self) -> Any:
        return SimpleNamespace(remote=lambda: self.probe)


class World:
    """A pool, the actors that it has made, and what became of its jobs."""

    def __init__(self, size: int, timeout: float = 60.0, reserved: int | None = None) -> None:
        self.whole = True
        self.made: list[Actor] = []
        self.killed: list[Actor] = []
        self.done: list[tuple[str, Any]] = []
        self.failed: dict[str, str] = {}
        self.reactor = Reactor()
        values: dict[str, Any] = {"attempts": 3, "timeout": timeout, "needs": "1 CPU"}
        values |= {"reserved": size if reserved is None else reserved, "whole": lambda: self.whole}
        self.pool = Pool(self.reactor, self.begin, size=size, advise=str, **values)

    def begin(self, slot: Slot) -> tuple[Actor, Ref]:
        actor = slot.actor or Actor(slot.number)
        if actor not in self.made:
            self.made.append(actor)
        actor.start = Ref()
        return actor, actor.start

    def actor(self, number: int) -> Actor:
        """The one that a slot has now."""
        actor = self.pool.slots[number].actor
        assert isinstance(actor, Actor)
        return actor

    def start(self, *numbers: int, nodes: dict[int, str] | None = None) -> None:
        for number in numbers:
            node = (nodes or {}).get(number, f"node {number}")
            self.actor(number).start.values.append(Place(node, ()))
        self.serve()

    def submit(self, name: str, seconds: float = 1.0) -> Job:
        def send(actor: Actor) -> list[Any]:
            actor.work[name] = Ref()
            return [actor.work[name]]

        def done(result: Any, _: Any) -> None:
            self.done.append((name, result))

        job = Job(name, send, done, lambda why: self.failed.update({name: why}), seconds)
        self.pool.submit(job)
        return job

    def finish(self, number: int, name: str, value: Any = None) -> None:
        self.actor(number).work[name].values.append(value)
        self.serve()

    def serve(self) -> None:
        """Until nothing that is waited for is there."""
        self.pool.until(lambda: not any(ref.values for ref in self.reactor._then))

    def at(self, number: int) -> list[str]:
        """What the actor of a slot has been given so far."""
        return list(self.actor(number).work)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Callable[..., World]:
    worlds: list[World] = []

    def wait(refs: list[Ref], **_: Any) -> tuple[list[Ref], list[Ref]]:
        return [ref for ref in refs if ref.values][:1], []

    def get(ref: Ref) -> Any:
        (value,) = ref.values
        if isinstance(value, Exception):
            raise value
        return value

    def kill(actor: Actor) -> None:
        worlds[-1].killed.append(actor)

    def make(*arguments: Any, **named: Any) -> World:
        worlds.append(World(*arguments, **named))
        return worlds[-1]

    monkeypatch.setattr(ray, "wait", wait)
    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr(ray, "kill", kill)
    monkeypatch.setattr(pool, "draining", frozenset)
    return make


def test_actors_without_a_bundle_make_room_until_the_reservation_is_whole(
    world: Callable[..., World], monkeypatch: pytest.MonkeyPatch
) -> None:
    """First those that wait for room, then of those at work one every five seconds."""
    clock = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(time, "monotonic", lambda: clock.seconds)
    w = world(5, reserved=1)
    w.start(0, 1, 2, 3)
    for name in ("a", "b", "c"):
        w.submit(name)

    def tick(seconds: float) -> list[str]:
        clock.seconds += seconds
        w.reactor._do_duties()
        return [slot.state for slot in w.pool.slots]

    w.whole = False
    assert tick(1) == ["busy", "busy", "busy", "waiting", "waiting"]
    assert tick(1) == ["busy", "busy", "busy", "waiting", "waiting"]
    assert tick(5) == ["busy", "busy", "waiting", "waiting", "waiting"]
    w.finish(0, "a")
    assert w.at(0) == ["a", "c"]
    w.whole = True
    assert tick(1) == ["busy", "busy", "starting", "starting", "starting"]


def test_the_longest_job_that_waits_is_next(world: Callable[..., World]) -> None:
    there = world(1)
    for name, seconds in (("b", 2.0), ("d", 0.5), ("a", 3.0), ("c", 2.0)):
        there.submit(name, seconds)
    there.start(0)
    for name, following in pairwise("abcd"):
        assert there.at(0)[-1] == name
        there.finish(0, name)
        assert there.at(0)[-1] == following
    assert [name for name, _ in there.done] == ["a", "b", "c"]


def test_a_node_that_has_notice_gets_a_job_only_if_there_is_no_other(
    monkeypatch: pytest.MonkeyPatch, world: Callable[..., World]
) -> None:
    leaving: set[str] = {"node 0"}
    monkeypatch.setattr(pool, "draining", lambda: frozenset(leaving))
    there = world(2)
    there.start(0, 1)
    for name in "abc":
        there.submit(name)
    assert (there.at(0), there.at(1)) == ([], ["a"])
    there.finish(1, "a")
    assert (there.at(0), there.at(1)) == ([], ["a", "b"])
    leaving.add("node 1")
    there.pool.until(lambda: bool(there.at(0)), time.monotonic())
    assert there.at(0) == ["c"]


def test_a_lost_job_is_begun_again_by_another_until_its_last_attempt(
    world: Callable[..., World],
) -> None:
    there = world(1)
    there.start(0)
    job = there.submit("a")
    for attempt in (1, 2, 3):
        assert there.at(0) == ["a"]
        lost = there.actor(0)
        there.finish(0, "a", LostError("gone"))
        assert there.killed[-1] is lost
        assert job.attempts == attempt
        there.start(0)
    assert there.failed == {"a": "lost in 3 attempts (runtime.attempts): LostError: gone"}
    assert there.at(0) == []
    assert len(there.made) == 4


def test_a_preempted_job_is_begun_again_however_often(world: Callable[..., World]) -> None:
    there = world(1)
    there.start(0)
    job = there.submit("a")
    for _ in range(5):
        there.finish(0, "a", PreemptedError("spot"))
        there.start(0)
    there.finish(0, "a", "result")
    assert job.attempts == 0
    assert there.done == [("a", "result")]


def test_a_loss_after_notice_is_a_preemption_whatever_its_error(
    monkeypatch: pytest.MonkeyPatch, world: Callable[..., World]
) -> None:
    """Who asks before Ray knows that the node is gone hears of an actor that is unavailable."""
    there = world(1)
    there.start(0)
    job = there.submit("a")
    monkeypatch.setattr(pool, "draining", lambda: frozenset({"node 0"}))
    there.finish(0, "a", LostError("unavailable"))
    assert job.attempts == 0


def test_a_notice_is_remembered_when_the_node_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = {"a": 0}
    state = SimpleNamespace(get_draining_nodes=lambda: nodes)
    monkeypatch.setattr(ray._private.state, "state", state)
    monkeypatch.setattr(watch, "_SECONDS", 0.0)
    monkeypatch.setattr(watch, "_found", (0.0, frozenset()))
    assert watch.draining() == {"a"}
    nodes.clear()
    nodes["b"] = 0
    assert watch.draining() == {"a", "b"}


def test_actors_that_are_lost_together_cost_a_job_one_attempt(
    world: Callable[..., World],
) -> None:
    """Idle ones are not known to be lost before they are asked."""
    there = world(4)
    there.start(0, 1, 2, 3)
    job = there.submit("a")
    for number in (1, 2):
        there.actor(number).probe.values.append(LostError("gone"))
    there.finish(0, "a", LostError("gone"))
    assert job.attempts == 1
    assert len(there.killed) == 3
    assert there.at(3) == []  # has not answered yet
    there.actor(3).probe.values.append(None)
    there.serve()
    there.finish(3, "a", "result")
    assert there.done == [("a", "result")]


def test_who_works_at_a_cancelled_job_is_replaced(world: Callable[..., World]) -> None:
    there = world(2)
    there.start(0, 1)
    jobs = [there.submit(name) for name in "abc"]
    old, other = there.actor(0), there.actor(1)
    for job in (jobs[0], jobs[2]):
        there.pool.cancel(job, "late")
    assert there.killed == [old]
    there.start(0)
    old.work["a"].values.append("late result")
    there.serve()
    assert (there.done, there.at(0)) == ([], [])
    there.finish(1, "b")
    assert other is there.actor(1)
    assert there.at(1) == ["b"]  # "c" is never begun


def test_what_is_forgotten_is_finished_and_nobody_is_told(world: Callable[..., World]) -> None:
    there = world(1)
    there.start(0)
    for name in "ab":
        there.submit(name)
    there.pool.forget()
    there.submit("c")
    there.finish(0, "a")
    assert there.at(0) == ["a", "c"]
    there.finish(0, "c", 1)
    assert (there.done, there.killed) == ([("c", 1)], [])


def test_a_forgotten_job_that_is_lost_is_not_begun_again(world: Callable[..., World]) -> None:
    there = world(1)
    there.start(0)
    there.submit("a")
    there.pool.forget()
    there.finish(0, "a", LostError("gone"))
    there.start(0)
    assert (there.at(0), there.failed) == ([], {})


def test_the_same_actors_begin_anew_and_what_they_did_is_void(
    world: Callable[..., World],
) -> None:
    there = world(1)
    there.start(0)
    there.submit("a")
    first = there.actor(0).start
    there.pool.begin()
    assert there.made == [there.actor(0)]
    first.values[:] = [Place("stale", ())]
    there.finish(0, "a", "stale")
    assert there.done == []
    assert there.pool.working == []
    there.start(0)
    assert [slot.place for slot in there.pool.working] == [Place("node 0", ())]


def test_without_any_actor_for_too_long_the_pool_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, world: Callable[..., World]
) -> None:
    now = [0.0]
    monkeypatch.setattr(pool, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(pool, "what_is_missing", lambda: "the cluster has 1 nodes, and nothing")
    there = world(1, timeout=5.0)
    now[0] = 4.0
    there.serve()
    there.start(0)
    there.submit("a")
    now[0] = 100.0  # however long a job takes
    there.serve()
    there.finish(0, "a", LostError("gone"))
    now[0] = 104.0
    there.serve()
    now[0] = 106.0
    words = "has worked for 5 s .*needs 1 CPU; the cluster has 1 nodes, .*last fault: LostError"
    with pytest.raises(PlacementError, match=words):
        there.pool.until(lambda: False)


def test_an_actor_that_does_not_start_thrice_in_a_row_is_given_up(
    world: Callable[..., World],
) -> None:
    there = world(2)
    there.start(1)
    for value in (LostError("a"), LostError("b"), PreemptedError("c")):
        there.actor(0).start.values.append(value)
        there.serve()
    assert there.pool.slots[0].state == "starting"  # preemption is no fault of its own
    there.actor(0).start.values.append(LostError("d"))
    there.serve()
    assert there.pool.slots[0].state == "absent"
    there.submit("x")
    there.finish(1, "x", 1)
    assert there.done == [("x", 1)]
    there.pool.begin()  # another run tries again
    assert there.pool.slots[0].state == "starting"


def test_if_no_actor_starts_the_pool_gives_up(world: Callable[..., World]) -> None:
    there = world(1)
    for _ in range(2):
        there.actor(0).start.values.append(LostError("gone"))
        there.serve()
    there.actor(0).start.values.append(LostError("no such image"))
    with pytest.raises(PlacementError, match="no client actor is left: LostError: no such image"):
        there.pool.until(lambda: False)


def test_a_message_that_is_refused_is_a_result(world: Callable[..., World]) -> None:
    there = world(1)
    there.start(0)
    there.submit("a")
    refusal = MessageError("too long")
    there.finish(0, "a", refusal)
    assert there.done == [("a", refusal)]
    assert there.pool.slots[0].state == "idle"


def test_a_queue_forgets_what_is_cancelled() -> None:
    queue = Queue()
    jobs = [Job(name, lambda _: [], lambda *_: None, lambda _: None, 1.0) for name in "ab"]
    for job in jobs:
        queue.push(job)
    assert queue
    jobs[0].cancelled = True
    assert queue.pop() is jobs[1]
    assert not queue
    assert queue.pop() is None


def test_an_answer_is_a_result_or_why_there_is_none() -> None:
    answer = Answer()
    assert not answer.there
    answer.arrived(None, [])
    assert answer.there
    assert answer.get() is None
    answer = Answer()
    answer.failed("evaluation", "lost")
    with pytest.raises(UserError, match="evaluation: lost"):
        answer.get()


def test_the_pace_of_a_client_is_an_average_and_of_a_new_one_that_of_all() -> None:
    pace = Pace(lambda client: 10 * (client + 1))
    assert pace.expected(0) == pytest.approx(10.0)
    assert pace.expected(1) == pytest.approx(20.0)
    pace.observe(0, 30.0)  # 3 s a step
    assert pace.expected(0) == pytest.approx(30.0)
    assert pace.expected(1) == pytest.approx(20 * (0.7 * 1 + 0.3 * 3))
    pace.observe(0, 10.0)
    assert pace.expected(0) == pytest.approx(10 * (0.7 * 3 + 0.3 * 1))


def test_a_reactor_serves_all_while_it_waits_for_one(world: Callable[..., World]) -> None:
    world(1)
    reactor, seen = Reactor(), []
    first, second, third = Ref([1]), Ref([2]), Ref()
    for ref in (first, third):
        reactor.when(ref, seen.append)
    assert reactor.get(second) == 2
    assert seen == [first]
    reactor.clear()
    assert not reactor.until(lambda: False, time.monotonic() + 0.01)


class DiskError(RayTaskError):
    """Something is wrong with one machine."""

    def __init__(self) -> None:
        self.cause = OSError("No space left on device")


class NoMemoryError(RayTaskError):
    """Torch's out of memory, as it comes from an actor that starts."""

    def __init__(self, place: Place) -> None:
        self.cause = OutOfMemoryError("CUDA out of memory", place)


def test_each_device_is_packed_less_once_also_when_an_actor_starts(
    world: Callable[..., World],
) -> None:
    there = world(4)
    for number, node in enumerate("aabb"):
        there.start(number, nodes={number: node})
    for node in "ab":
        slots = [s for s in there.pool.slots if s.place and s.place.node == node]
        place = slots[0].place
        assert place is not None
        first = slots[0]
        there.pool._replace(first, "lost")
        there.actor(first.number).start.values.append(NoMemoryError(place))
        there.serve()
        assert [slot.state for slot in slots] == ["starting", "absent"]
        assert first.room == 2.0
        there.actor(first.number).start.values.append(NoMemoryError(place))
        with pytest.raises(PoolOutOfMemoryError, match="client actor"):
            there.serve()


def test_a_start_that_fails_while_others_work_costs_that_actor_alone(
    world: Callable[..., World],
) -> None:
    there = world(2)
    there.start(0)
    for _ in range(3):
        there.actor(1).start.values.append(DiskError())
        there.serve()
    assert [slot.state for slot in there.pool.slots] == ["idle", "absent"]


def test_waiting_for_the_server_is_no_time_without_actors(
    world: Callable[..., World], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "what_is_missing", lambda: "all")
    there = world(1, timeout=0.3)
    there.start(0)
    there.pool.until(lambda: True)
    time.sleep(0.5)  # the driver waits for something else
    there.pool._replace(there.pool.slots[0], "lost")
    assert not there.pool.until(lambda: False, time.monotonic() + 0.1)
    with pytest.raises(PlacementError, match="no client actor has worked"):
        there.pool.until(lambda: False, time.monotonic() + 5)
