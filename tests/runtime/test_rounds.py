"""Rounds in Ray: the bits of one process whatever the number of actors, and what is sent to whom.

One run after the other has the same actors, as the trials of a sweep do.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import pytest
import ray

from fedlpp_ray.config import Experiment
from fedlpp_ray.federation import Federation
from fedlpp_ray.federation.in_process import InProcess
from fedlpp_ray.federation.records import Floor
from fedlpp_ray.runtime import RayBackend, connect, reserve
from fedlpp_ray.runtime.sums import Sums
from tests.federation.test_loop import numbers

STATEFUL = {
    "server.aggregation": "flexlora",
    "lora.client_ranks": [2, 4],
    "uplink.bits": 4,
    "uplink.error_feedback": True,
    "downlink.rounding": "stochastic",
}


LASTING = {"downlink.every": 3, "downlink.rotate": "round", "federation.rounds": 4}
MASKED = {"downlink.server_mask": 0.2, "downlink.client_mask": 0.3, "downlink.bits": 4}
OWN = {"downlink.rotate": "client", "downlink.perturbation": 0.5}
EMULATED = {
    "adapter.kind": "prompt",
    "adapter.tokens": 4,
    "emulator.kind": "shared-layer",
    "emulator.steps": 2,
    "server.examples": 40,
}


ROBUST = {
    "server.robust": "trimmed-mean",
    "server.byzantine": 1,
    "server.weighting": "uniform",
    "federation.min_updates": 3,
}

PRIVATE = {
    "dp.clip": 0.1,
    "dp.adaptive": True,
    "dp.count_noise": 1.0,
    "server.weighting": "uniform",
}
SECURE = {"secure.threshold": 3, "federation.min_updates": 3, "simulation.dropout": 0.15, "seed": 4}
FINISHED = {
    "server.final_average": 2,
    "server.final_tune_steps": 2,
    "server.examples": 21,
    "server.base_correction": 16,
    "client.base_bits": 2,
}
Numbers = list[dict[str, object]]
KINDS: dict[str, dict[str, object]] = {
    "default": {},
    "ranks and memories": STATEFUL,
    "broadcasts that last": LASTING,
    "masks": MASKED,
    "own messages": OWN,
    "emulator": EMULATED,
    "robust": ROBUST,
    "differential privacy": PRIVATE,
    "secure aggregation": SECURE,
    "final model": FINISHED,
}


@pytest.fixture(scope="module")
def expected(tiny_experiment: Experiment) -> Callable[[str], tuple[Numbers, Floor]]:
    """Of a kind: what one process makes of it."""

    @functools.cache
    def run(kind: str) -> tuple[Numbers, Floor]:
        experiment = tiny_experiment.with_values(KINDS[kind])
        backend = InProcess(experiment)
        federation = Federation(experiment, backend)
        list(federation.run())
        return numbers_of(federation), backend.measure_floor()

    return run


QUICK = ("default", "secure aggregation")
"""Kinds that the default tests run."""


@pytest.fixture(scope="module", params=[pytest.param(1, marks=pytest.mark.slow), 3])
def actors(request: pytest.FixtureRequest, tiny_experiment: Experiment) -> Iterator[RayBackend]:
    experiment = tiny_experiment.with_values({"runtime.client_actors": request.param})
    with (
        connect(),
        reserve(experiment) as group,
        closing(RayBackend(experiment, group)) as backend,
    ):
        assert len(backend.pool.slots) == request.param
        yield backend


def run(experiment: Experiment, actors: RayBackend) -> Numbers:
    own = experiment.with_values({"runtime.client_actors": len(actors.pool.slots)})
    assert actors.begin(own)
    federation = Federation(own, actors)
    list(federation.run())
    return numbers_of(federation)


def numbers_of(federation: Federation) -> Numbers:
    """Those of the final model too."""
    final = [federation.final.to_dict()] if federation.final else []
    return numbers(federation.history) + final


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=[pytest.mark.slow] * (kind not in QUICK)) for kind in KINDS],
)
def test_one_and_three_actors_give_the_bits_of_one_process(
    tiny_experiment: Experiment,
    actors: RayBackend,
    expected: Callable[[str], tuple[Numbers, Floor]],
    kind: str,
) -> None:
    found = run(tiny_experiment.with_values(KINDS[kind]), actors)
    assert (found, actors.measure_floor()) == expected(kind)


def test_updates_that_a_rule_needs_travel_in_the_sum_of_their_node(
    tiny_experiment: Experiment,
    actors: RayBackend,
    expected: Callable[[str], tuple[Numbers, Floor]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def on_nodes(backend: RayBackend, *opening: Any) -> Sums:
        backend._on_nodes.open(opening[0], backend.server.send("opening", *opening))
        return backend._on_nodes

    monkeypatch.setattr(RayBackend, "_sums", on_nodes)
    assert run(tiny_experiment.with_values(ROBUST), actors) == expected("robust")[0]


@pytest.fixture
def puts(monkeypatch: pytest.MonkeyPatch) -> list[dict[int, bytes]]:
    """What is put into the object store."""
    found: list[dict[int, bytes]] = []
    original = ray.put
    monkeypatch.setattr(ray, "put", lambda value: found.append(value) or original(value))
    return found


def test_the_broadcast_is_put_once_a_round(
    tiny_experiment: Experiment, actors: RayBackend, puts: list[dict[int, bytes]]
) -> None:
    run(tiny_experiment.with_values({"adversary.watch": []}), actors)
    # One for each of 3 rounds, and one for the state that the last evaluation measures.
    assert len(puts) == tiny_experiment.federation.rounds + 1
    assert all(list(map(type, value.values())) == [bytes] for value in puts)


def test_a_broadcast_that_lasts_is_put_once(
    tiny_experiment: Experiment, actors: RayBackend, puts: list[dict[int, bytes]]
) -> None:
    run(tiny_experiment.with_values(LASTING | {"adversary.watch": []}), actors)
    assert len(puts) == 2  # of rounds 1 and 4


def test_the_broadcasts_that_are_attacked_are_put_once_more_when_the_leak_is_due(
    tiny_experiment: Experiment, actors: RayBackend, puts: list[dict[int, Any]]
) -> None:
    run(tiny_experiment, actors)
    *made, newest = puts
    assert newest == dict(enumerate(made, 1))


def test_a_client_is_sent_its_own_edition_alone(
    tiny_experiment: Experiment, actors: RayBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[tuple[int, list[int]]] = []
    original = RayBackend._for_client

    def recorded(backend: RayBackend, client: int, made: int, broadcast: Any) -> Any:
        message = original(backend, client, made, broadcast)
        sent.append((client, list(message)))
        return message

    monkeypatch.setattr(RayBackend, "_for_client", recorded)
    run(tiny_experiment.with_values(MASKED | {"federation.rounds": 2}), actors)
    assert len(sent) == 2 * 4
    assert all(keys == [client] for client, keys in sent)
