"""What becomes of updates whose verdicts or sums are lost, without Ray."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from fedlpp_ray.federation.records import Assignment, ClientReport
from fedlpp_ray.runtime import cohort
from fedlpp_ray.runtime.cohort import CohortTraining
from fedlpp_ray.runtime.jobs import Pace
from fedlpp_ray.runtime.sums import AtServer, OnNodes
from tests.runtime.test_pool import Actor, LostError, Ref, World, world

__all__ = ["world"]  # a fixture


class Sums:
    """Verdicts are given by hand."""

    def __init__(self) -> None:
        self.verdicts: dict[int, Ref] = {}
        self.lost_with: list[int] = []
        self.lost_sums: list[dict[int, str]] = []

    def add(self, client: int, node: str, payload: Any) -> Ref:
        self.verdicts[client] = Ref()
        return self.verdicts[client]

    def lost(self, client: int) -> list[int]:
        return self.lost_with

    def collect(self) -> dict[int, str]:
        return self.lost_sums.pop() if self.lost_sums else {}


class Round:
    """A round of some clients at two actors."""

    def __init__(self, there: World, clients: Sequence[int]) -> None:
        self.there, self.sums = there, Sums()
        server: Any = SimpleNamespace(result=lambda _: None)
        self.training = CohortTraining(1, server, there.pool, Pace(lambda _: 1), self.sums)
        for client in clients:
            self.training.begin(Assignment(client, 1), None, None)

    def train(self, client: int) -> None:
        """Let the client return from wherever it trains."""
        (slot,) = (s for s in self.there.pool.slots if s.job and s.job.name.endswith(f" {client}"))
        report = ClientReport(client, seconds=1.0, host=slot.number)
        self.there.finish(slot.number, f"{client}", report)

    def judge(self, client: int, verdict: Any = None) -> None:
        self.sums.verdicts[client].values.append(verdict)
        self.there.serve()
        self.training._judge_all()

    def trains(self) -> list[str]:
        """Who trains at this moment."""
        return sorted(slot.job.name[-1] for slot in self.there.pool.slots if slot.job)

    def reports(self) -> dict[int, bool]:
        """Which clients were accepted."""
        return {r.client: r.fault is None for r in self.training.reports(None, math.inf)}


@pytest.fixture
def begin(
    monkeypatch: pytest.MonkeyPatch, world: Callable[..., World]
) -> Callable[[Sequence[int]], Round]:
    def train(actor: Actor) -> Any:
        def remote(_: int, client: int, *__: Any) -> list[Ref]:
            actor.work[f"{client}"] = Ref()
            return [actor.work[f"{client}"], Ref()]

        return SimpleNamespace(options=lambda **_: SimpleNamespace(remote=remote))

    monkeypatch.setattr(Actor, "train", property(train), raising=False)
    monkeypatch.setattr(cohort, "draining", frozenset)

    def make(clients: Sequence[int]) -> Round:
        there = world(2)
        there.start(0, 1)
        return Round(there, clients)

    return make


def test_an_update_of_which_the_answer_alone_is_lost_is_not_sent_again(
    begin: Callable[[Sequence[int]], Round],
) -> None:
    made = begin([3])
    made.train(3)
    made.judge(3, LostError("no answer"))
    assert made.trains() == []
    assert made.reports() == {3: True}


def test_who_was_added_up_with_a_lost_update_trains_again(
    begin: Callable[[Sequence[int]], Round],
) -> None:
    made = begin([1, 2, 3])
    for client in (1, 2, 3):
        made.train(client)
    made.judge(1)
    made.sums.lost_with = [1, 2, 3]
    stale = made.sums.verdicts[3]
    made.judge(2, LostError("gone"))
    assert made.trains() == ["1", "2"]
    stale.values.append(None)  # of the aggregator that is gone
    for client in (1, 2, 3):
        made.train(client)
        made.judge(client)
    assert made.reports() == {1: True, 2: True, 3: True}


def test_a_refused_update_stays_so_when_its_sum_is_lost(
    begin: Callable[[Sequence[int]], Round],
) -> None:
    made = begin([1])
    made.train(1)
    made.judge(1, "not finite")
    made.sums.lost_sums = [{1: "its node is gone"}]
    assert made.reports() == {1: False}


class Server:
    """Holds some clients."""

    def __init__(self, *clients: int) -> None:
        self.clients = list(clients)

    def ask(self, method: str, round: int) -> list[int]:
        assert (method, round) == ("returned", 1)
        return self.clients

    def send(self, *_: Any) -> Ref:
        return Ref([LostError("no answer")])

    def check(self) -> None:
        """It is there."""


def test_the_server_says_whether_it_has_an_update() -> None:
    server: Any = Server(3)
    assert AtServer(server, 1).lost(3) == []
    assert AtServer(server, 1).lost(4) == [4]


def test_a_sum_is_not_lost_where_the_server_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    killed: list[str] = []
    monkeypatch.setattr(ray, "kill", killed.append)
    server: Any = Server(1, 2)
    reactor: Any = SimpleNamespace(get=ray_get)
    sums = OnNodes(server, reactor)
    sums.open(1, None)
    call = SimpleNamespace(remote=lambda *_: Ref())
    actors: Any = {name: SimpleNamespace(call=call) for name in ("a", "b", "c")}
    sums._actors = dict(actors)
    sums._clients = {"a": [1, 2], "b": [3]}
    found = sums.collect()
    assert list(found) == [3]
    sums._clients = {"c": [4, 5]}
    assert sums.lost(4) == [4, 5]
    assert sums.lost(5) == [5]
    assert killed == [actors["a"], actors["b"], actors["c"]]


def ray_get(reference: Ref) -> Any:
    raise reference.values[0]


def test_what_is_lost_after_the_deadline_is_late(begin: Callable[[Sequence[int]], Round]) -> None:
    """And is not begun again, without a limit by now, at an actor that may hang."""
    made = begin([1, 2])
    made.train(1)
    made.training._close("not done in time")
    made.sums.lost_with = [1]
    made.judge(1, LostError())
    found = {r.client: r.fault for r in made.training.reports(None, math.inf)}
    assert {client: fault and fault.kind for client, fault in found.items()} == {
        1: "late",
        2: "late",
    }


def test_many_lost_verdicts_do_not_nest(begin: Callable[[Sequence[int]], Round]) -> None:
    made = begin(range(500))
    there = made.there
    for _ in range(500):
        slot = next(slot for slot in there.pool.slots if slot.job)
        client = int(str(slot.job and slot.job.name).rpartition(" ")[2])
        there.finish(slot.number, f"{client}", ClientReport(client, seconds=1.0, host=slot.number))
    asked = []

    def lost(client: int) -> list[int]:
        asked.append(client)
        there.serve()  # as asking the server does
        return []

    made.sums.lost = lost  # type: ignore[method-assign]
    for verdict in made.sums.verdicts.values():
        verdict.values.append(LostError())
    there.serve()
    made.training._judge_all()
    assert sorted(asked) == list(range(500))
    assert len(made.reports()) == 500
