"""A client host: what it remembers between clients changes nothing for them."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedlpp_ray.config import Experiment
from fedlpp_ray.federation import wire
from fedlpp_ray.federation.adapter import AdapterFiles
from fedlpp_ray.federation.client import ClientHost
from fedlpp_ray.federation.server import Server
from fedlpp_ray.federation.wire import Broadcast
from fedlpp_ray.lora import add_adapter, read_state, save_adapter
from fedlpp_ray.messages import Envelope, MessageError, encode
from fedlpp_ray.models import load_classifier


def payload(experiment: Experiment, broadcast: Broadcast, client: int) -> bytes:
    return ClientHost(experiment).train(1, client, broadcast).payload


def test_the_next_client_has_its_own_broadcast_whatever_the_last_one_had(
    tiny_experiment: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = tiny_experiment.with_values({"lora.rank": 4, "lora.client_ranks": [4, 2]})
    server, host = Server(experiment), ClientHost(experiment)
    one = server.encode_broadcast(1)
    state = {name: tensor + 0.1 for name, tensor in server._state.items()}
    other = {4: encode(Envelope("broadcast", 1), state, host._wire.downlink), 2: one[2]}
    swapped = {4: one[2], 2: one[4]}
    decoded, real = [], wire.decode
    monkeypatch.setattr(wire, "decode", lambda *a, **k: decoded.append(a[0]) or real(*a, **k))
    # clients 0 and 2 have rank 4, clients 1 and 3 rank 2
    calls = [(0, one), (2, one), (1, one), (3, one), (0, other), (2, one), (1, other)]
    found = [host.train(1, number, broadcast).payload for number, broadcast in calls]
    assert decoded == [one[4], one[2], other[4], one[4], one[2]]
    with pytest.raises(MessageError, match="broadcast refused"):
        host.train(1, 0, swapped)
    with pytest.raises(MessageError, match="round is 1, expected 2"):
        host.train(2, 1, one)
    assert found == [payload(experiment, broadcast, number) for number, broadcast in calls]


ADAPTERS: dict[str, dict[str, object]] = {
    "lora": {},
    "prompt": {"adapter.tokens": 3},
    "layers": {"adapter.outer": 1},
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapter_files_are_those_that_are_saved(
    tiny_experiment: Experiment, tmp_path: Path, kind: str
) -> None:
    config = tiny_experiment.with_values(ADAPTERS[kind] | {"adapter.kind": kind})
    base = load_classifier(config.model, 3, pad=0, seed=0)
    model = add_adapter(base, config.adapter, config.lora, 0)
    files, state = AdapterFiles(model), read_state(model)
    files.of(state)  # what it keeps is of another state than what it is asked for next
    for parameter in model.parameters():
        parameter.data.add_(0.5)
    save_adapter(model, tmp_path)
    written = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert files.of(read_state(model)) == written
    assert files.of(state) != written
