"""A message for each client: what is in it, what the server makes of it, and who reads which."""

from __future__ import annotations

import math

import pytest
import safetensors.torch
import torch

from fedlpp_ray.aggregation.products import product
from fedlpp_ray.config import Experiment
from fedlpp_ray.federation import Federation
from fedlpp_ray.federation.ladder import Ladder
from fedlpp_ray.federation.sampling import sample_cohort
from fedlpp_ray.federation.server import Server
from fedlpp_ray.federation.wire import Broadcast
from fedlpp_ray.state import State, layers_of
from tests.federation.test_loop import Recording, tensor_bytes

NOISE = {"downlink.perturbation": 0.5, "downlink.bits": 32}


def moved(experiment: Experiment) -> Server:
    """A server whose state is no longer the first, in which B is 0."""
    server = Server(experiment)
    random = torch.Generator().manual_seed(0)
    server._state = {n: torch.randn(t.shape, generator=random) for n, t in server._state.items()}
    return server


def read(broadcast: Broadcast) -> dict[int, State]:
    return {client: safetensors.torch.load(message) for client, message in broadcast.items()}


def test_each_client_has_the_same_model_in_a_gauge_of_its_own(tiny_experiment: Experiment) -> None:
    """fp32: the tolerance is that of its products."""
    server = moved(tiny_experiment.with_values({"downlink.rotate": "client", "downlink.bits": 32}))
    first, second = (read(server.encode_broadcast(r, [0, 3], [5])) for r in (1, 2))
    assert list(first) == list(second) == [0, 3, 5]
    states = [*first.values(), *second.values()]
    layers = layers_of(sorted(server._state))
    for layer in layers:
        secret = product(server._state, layer).dense()
        name = f"{layer}.lora_A.weight"
        for number, state in enumerate(states):
            torch.testing.assert_close(product(state, layer).dense(), secret, rtol=0, atol=1e-4)
            others = [*states[:number], server._state]
            assert all((state[name] - other[name]).abs().max() > 0.1 for other in others)


@pytest.mark.parametrize("weighting", ["examples", "uniform"])
def test_noise_cancels_with_the_servers_weights_and_has_the_size_asked_for(
    tiny_experiment: Experiment, weighting: str
) -> None:
    """A size is of 2243 draws: its standard error is 1.5 %, and four are tolerated. The rest is
    fp32's."""
    values = {"federation.partition": "dirichlet", "federation.dirichlet_alpha": 0.5}
    experiment = tiny_experiment.with_values(NOISE | values | {"server.weighting": weighting})
    server, cohort = moved(experiment), [0, 2, 3, 7]
    counts = [server.examples()[client] for client in cohort]
    assert len(set(counts)) > 1
    weights = [n / sum(counts) if weighting == "examples" else 1 / 4 for n in counts]
    states = read(server.encode_broadcast(1, cohort, [5]))
    squares = dict.fromkeys(states, 0.0)
    total = 0.0
    for name, tensor in server._state.items():
        noise = {client: state[name] - tensor for client, state in states.items()}
        left = sum(w * noise[client] for w, client in zip(weights, cohort, strict=True))
        assert left.abs().max() < 1e-6
        assert noise[0].abs().max() > 0.1
        scale = float(tensor.square().mean())
        for client, each in noise.items():
            squares[client] += float(each.square().sum()) / scale
        total += tensor.numel()
    sizes = {client: math.sqrt(found / total) / 0.5 for client, found in squares.items()}
    mean = math.sqrt(sum(sizes[client] ** 2 for client in cohort) / 4)
    assert mean == pytest.approx(1, rel=0.04)
    assert sizes[5] == pytest.approx(1, rel=0.06)  # who is only measured
    if weighting == "uniform":
        assert all(size == pytest.approx(1, rel=0.06) for size in sizes.values())
    else:
        common = 1 - 2 / 4 + sum(w**2 for w in weights)
        expected = [(1 - 2 * w + sum(v**2 for v in weights)) / common for w in weights]
        for client, square in zip(cohort, expected, strict=True):
            assert sizes[client] ** 2 == pytest.approx(square, rel=0.12)


def test_noise_is_drawn_anew_in_each_round(tiny_experiment: Experiment) -> None:
    server = moved(tiny_experiment.with_values(NOISE))
    one, two = (read(server.encode_broadcast(r, [0, 1]))[0] for r in (1, 2))
    name = next(iter(one))
    assert not torch.equal(one[name], two[name])
    again = read(server.encode_broadcast(1, [0, 1]))[0]
    assert torch.equal(one[name], again[name])


def test_nothing_of_the_noise_comes_into_the_servers_state(tiny_experiment: Experiment) -> None:
    """Clients that do not move, some of which drop out: the server adds differences to what it
    sent, so that it stays where it is, but for fp32's rounding of what moves by 1e-9."""
    still = {"client.lr": 1e-9, "simulation.dropout": 0.4, "client.weight_decay": 0.0}
    experiment = tiny_experiment.with_values(NOISE | still | {"downlink.perturbation": 2.0})
    backend = Recording(experiment)
    backend._server._state = moved(experiment)._state
    before = dict(backend._server._state)
    history = list(Federation(experiment, backend).run())
    assert any(client.fault for record in history for client in record.clients)
    assert any(record.folded for record in history)
    for name, tensor in backend._server._state.items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=1e-6)


def test_it_costs_no_byte(tiny_experiment: Experiment) -> None:
    """Each client downloads one message, as before; who was sampled has the one that is booked."""
    own = {"downlink.rotate": "client", "downlink.perturbation": 0.5}
    shared, backend = Server(tiny_experiment), Recording(tiny_experiment.with_values(own))
    history = list(Federation(backend._server._experiment, backend).run())
    size = tensor_bytes(shared.encode_broadcast(1)[4])
    for record in history:
        for transfer in record.ledger:
            message = backend.sent[record.round][transfer.client]
            assert transfer.down == len(message)
            assert tensor_bytes(message) == size


def test_the_ladder_reads_the_editions_of_its_colluders_alone(tiny_experiment: Experiment) -> None:
    experiment = tiny_experiment.with_values(
        NOISE | {"adversary.colluders": 3, "evaluation.every": 3, "downlink.rotate": "client"}
    )
    sent: dict[int, Broadcast] = {}
    backend = Recording(experiment)
    federation = Federation(experiment, backend, sent.__setitem__)
    history = list(federation.run())
    view = Ladder(experiment, sent, history).view
    colluders, last = view.tools.clients, history[-1].round + 1
    sampled = [
        (r, client)
        for r in range(1, last)
        for client in sample_cohort(
            experiment.federation, experiment.seed, r, backend._host._text.examples
        )
        if client in colluders
    ]
    assert len(sampled) > 3
    found = [(each.made, each.client) for each in view.received]
    assert found == [*sampled, (last, backend._host._text.strongest)]
    for each in view.received:
        message = safetensors.torch.load(sent[each.made][each.client])
        for name in message:
            assert torch.equal(each.state[name], message[name])
        assert not each.cells
