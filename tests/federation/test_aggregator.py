"""The server receives updates one by one: in any order, in parts, late, or not at all."""

from __future__ import annotations

import pickle
from collections.abc import Sequence

import pytest
import torch

from fedlpp_ray.config import Experiment
from fedlpp_ray.federation.aggregator import Aggregator
from fedlpp_ray.federation.records import Assignment
from fedlpp_ray.federation.server import VARIATES, Server
from fedlpp_ray.messages import Envelope, MessageError, encode
from fedlpp_ray.state import state_digest

OWN = """
import torch
from fedlpp_ray.aggregation import Method


def median(returns, broadcast):
    names = returns[0].update
    return {n: torch.stack([r.update[n].double() for r in returns]).median(0).values for n in names}


MEDIAN = Method(direction=median)
"""


def made_up(server: Server, client: int, started: int = 1, scale: float = 0.01) -> bytes:
    """An update as that client would send it, of random numbers."""
    random = torch.Generator().manual_seed(1000 * started + client)
    rank = server._experiment.lora.rank_of(client)
    schema = server._wire.update(started, rank)
    state = {n: scale * torch.randn(shape, generator=random) for n, shape in schema.items()}
    envelope = Envelope("update", started, client, server.examples()[client])
    return encode(envelope, state, server._wire.uplink, random)


def opened(server: Server, clients: Sequence[int]) -> None:
    """Open round 1."""
    broadcast = server.encode_broadcast(1, clients)
    server.open_round(1, [Assignment(client, 1) for client in clients], {1: broadcast})


def digest(experiment: Experiment, clients: Sequence[int], cohort: Sequence[int]) -> str:
    server = Server(experiment)
    opened(server, cohort)
    for client in clients:
        server.receive(1, client, made_up(server, client))
    return server.aggregate(1)


VALUES = {
    "fedit": {"federation.partition": "dirichlet"},
    "masks": {"downlink.client_mask": 0.5, "downlink.server_mask": 0.25},
    "rotated": {"downlink.rotate": "round", "uplink.bits": 4},
    "rotated and noised for each": {"downlink.rotate": "client", "downlink.perturbation": 0.5},
    "hetlora": {"server.aggregation": "hetlora", "lora.client_ranks": [1, 4]},
    "flexlora": {"server.aggregation": "flexlora", "lora.client_ranks": [1, 4]},
    "flora": {"server.aggregation": "flora", "server.weighting": "uniform"},
    "median": {"server.aggregation": "own_median:MEDIAN"},
    "krum": {"server.robust": "krum", "server.byzantine": 1},
    "geometric median": {"server.robust": "geometric-median", "server.byzantine": 2},
}


@pytest.mark.parametrize("case", VALUES)
def test_neither_order_nor_the_place_of_aggregation_changes_a_bit(
    tiny_experiment: Experiment, case: str, tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_median.py").write_text(OWN)  # type: ignore[operator]
    monkeypatch.syspath_prepend(str(tmp_path))
    experiment = tiny_experiment.with_values(VALUES[case])
    cohort, server = [0, 1, 2, 5, 7], Server(experiment)
    before = dict(server._state)
    payloads = {client: made_up(server, client) for client in cohort}
    found = []
    for order, cut in (([0, 1, 2, 5, 7], 5), ([7, 2, 0, 5, 1], 5), ([5, 0, 7, 1, 2], 2)):
        server._state = before
        opened(server, cohort)
        opening = pickle.loads(pickle.dumps(server._aggregator._opening))
        for client in order[:cut]:
            server.receive(1, client, payloads[client])
        node, empty = Aggregator(opening), Aggregator(opening)
        for client in order[cut:]:
            node.receive(client, payloads[client])
        assert server.merge(1, node.partial()) == sorted(order[cut:]) == node.clients
        assert server.merge(1, empty.partial()) == []
        found.append(server.aggregate(1))
    assert len(set(found)) == 1
    assert found[0] != state_digest(before)


def test_a_partial_cohort_is_the_mean_of_those_who_returned(tiny_experiment: Experiment) -> None:
    some = digest(tiny_experiment, [3, 1], cohort=[0, 1, 2, 3])
    assert some == digest(tiny_experiment, [1, 3], cohort=[1, 3])
    assert some != digest(tiny_experiment, [1, 2, 3], cohort=[0, 1, 2, 3])


@pytest.mark.parametrize("optimizer", ["fedavg", "fedavgm", "fedadam"])
def test_where_nobody_returns_the_state_stays(tiny_experiment: Experiment, optimizer: str) -> None:
    server = Server(tiny_experiment.with_values({"server.optimizer": optimizer}))
    before, memory = state_digest(server._state), state_digest(server._optimizer.state_dict())
    opened(server, [0, 1])
    assert server.aggregate(1) == before
    server.open_round(2, [], {})
    assert server.aggregate(2) == before
    assert state_digest(server._optimizer.state_dict()) == memory


def test_a_round_is_open_from_its_opening_to_its_end(tiny_experiment: Experiment) -> None:
    server = Server(tiny_experiment)
    payload = made_up(server, 0)
    for call in (
        lambda: server.receive(1, 0, payload),
        lambda: server.aggregate(1),
        lambda: server.merge(1, b""),
    ):
        with pytest.raises(MessageError, match="round 1 is not open"):
            call()
    opened(server, [0, 1])
    with pytest.raises(MessageError, match="round 2 is not open"):
        server.receive(2, 0, payload)
    server.receive(1, 0, payload)
    with pytest.raises(MessageError, match="round 1: client 0 has returned before"):
        server.receive(1, 0, payload)
    with pytest.raises(MessageError, match="round 1: 4 is no client of the cohort"):
        server.receive(1, 4, made_up(server, 4))
    server.aggregate(1)
    with pytest.raises(MessageError, match="round 1 is not open"):
        server.receive(1, 1, made_up(server, 1))


def test_a_late_update_is_read_against_its_own_broadcast_and_discounted(
    tiny_experiment: Experiment,
) -> None:
    """Client 1 started in round 1, client 0 in round 2: S + (w_0 u_0 + w_1 d u_1) / (w_0 + w_1).
    Tolerance: fp32."""
    server = Server(tiny_experiment.with_values({"federation.partition": "dirichlet"}))
    state, counts = dict(server._state), server.examples()
    broadcasts = {r: server.encode_broadcast(r) for r in (1, 2)}
    server.open_round(2, [Assignment(0, 2), Assignment(1, 1, 0.25)], broadcasts)
    with pytest.raises(MessageError, match="round is 2, expected 1"):
        server.receive(2, 1, made_up(server, 1, started=2))
    server.receive(2, 1, made_up(server, 1, started=1))
    server.receive(2, 0, made_up(server, 0, started=2))
    server.aggregate(2)
    weights, discounts = [counts[0], counts[1]], [1.0, 0.25]
    for client, started in ((0, 2), (1, 1)):
        random = torch.Generator().manual_seed(1000 * started + client)
        for name, shape in server._wire.update(started, 4).items():
            update = 0.01 * torch.randn(shape, generator=random)
            share = discounts[client] * weights[client] / sum(weights)
            state[name] = state[name] + share * update
    for name, tensor in state.items():
        torch.testing.assert_close(server._state[name], tensor, rtol=0, atol=1e-7)


def test_scaffolds_share_is_that_of_the_accepted(tiny_experiment: Experiment) -> None:
    values = {"client.scaffold": True, "client.optimizer": "sgd", "client.lr": 0.1}
    experiment = tiny_experiment.with_values(values | {"federation.partition": "dirichlet"})
    found = []
    for cohort in ([0, 1, 2, 3], [1, 3]):
        server = Server(experiment)
        opened(server, cohort)
        for client in (3, 1):
            server.receive(1, client, made_up(server, client))
        server.aggregate(1)
        found.append(server.adapter()[VARIATES])
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("cohort", "rounds", "words"),
    [
        ([Assignment(0, 1), Assignment(0, 1)], [1], "has a client twice"),
        ([Assignment(8, 1)], [1], "client 8 is not one of 8"),
        ([Assignment(-1, 1)], [1], "client -1 is not one of 8"),
        ([Assignment(0, 2)], [1], "client 0: the broadcast of round 2 is missing"),
        ([Assignment(0, 1, 0.0)], [1], "client 0: discount 0.0; allowed: 1e-06 to 1"),
        ([Assignment(0, 1, float("nan"))], [1], "discount nan"),
    ],
)
def test_a_round_that_cannot_be_opened(
    tiny_experiment: Experiment, cohort: list[Assignment], rounds: list[int], words: str
) -> None:
    server = Server(tiny_experiment)
    with pytest.raises(ValueError, match=words):
        server.open_round(1, cohort, {r: server.encode_broadcast(r) for r in rounds})


def test_clients_of_rounds_that_train_other_parts_do_not_mix(tiny_experiment: Experiment) -> None:
    server = Server(tiny_experiment.with_values({"server.aggregation": "rolora"}))
    broadcasts = {r: server.encode_broadcast(r) for r in (1, 2)}
    with pytest.raises(ValueError, match="'rolora' trains other parts"):
        server.open_round(2, [Assignment(0, 1), Assignment(1, 2)], broadcasts)
