"""Defences of the broadcast's codes in a run: what is sent, what it costs, and what is refused."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fedlpp_ray.config import ConfigError, Experiment
from fedlpp_ray.federation import Federation, preflight
from fedlpp_ray.federation.in_process import InProcess
from fedlpp_ray.federation.ladder import Ladder
from fedlpp_ray.federation.wire import Broadcast, Wire
from fedlpp_ray.messages import KEY_BYTES, quantized
from fedlpp_ray.quantization import QuantizedTensor
from fedlpp_ray.state import State
from tests.federation.test_loop import interrupted, numbers, run, tensor_bytes

STICKY = {"downlink.bits": 2, "downlink.hysteresis": 0.5, "downlink.hold_scales": True}
SECRET = {"downlink.dither": "subtractive-run", "downlink.kind": "int"}
BASE = {"downlink.bits": 2, "downlink.block": 16, "federation.local_steps": 2}


class Watched(InProcess):
    """Remembers the server's state in the rounds in which it made a broadcast, and these."""

    def __init__(self, experiment: Experiment) -> None:
        super().__init__(experiment)
        self.states: dict[int, State] = {}
        self.sent: dict[int, Broadcast] = {}
        encode = self._server.encode_broadcast

        def watched(round: int, *readers: Collection[int]) -> Broadcast:
            self.states[round] = dict(self._server._state)
            self.sent[round] = encode(round, *readers)
            return self.sent[round]

        self.encode_broadcast = watched

    def codes(self, round: int, edition: int = 4) -> dict[str, QuantizedTensor]:
        wire: Wire = self._server._wire
        schema = wire.broadcast(wire.rank(edition))
        return quantized(self.sent[round][edition], schema, wire.downlink)


def watched(experiment: Experiment) -> tuple[Watched, Federation]:
    preflight.check([experiment])
    backend = Watched(experiment)
    federation = Federation(experiment, backend)
    list(federation.run())
    return backend, federation


@pytest.mark.parametrize(
    "values",
    [
        {"downlink.rounding": "stochastic"},
        {"downlink.hysteresis": 0.5},
        {"downlink.hysteresis": 1.0, "downlink.hold_scales": True, "adversary.rounds": "sampled"},
        {"downlink.dither": "run", "downlink.hold_scales": True, "downlink.kind": "lloyd-max"},
        {"downlink.magnitude": "norm", "downlink.scale": "double"},
        {"downlink.dither": "subtractive-round", "downlink.kind": "int"},
        {"downlink.dither": "subtractive-run", "downlink.bits": "ternary"},
    ],
    ids=str,
)
def test_the_servers_state_is_inside_the_cells_that_the_adversary_has(
    tiny_experiment: Experiment, values: dict[str, object]
) -> None:
    """Without any tolerance, and in every broadcast; and not in those of who knows no defence."""
    two = {"adversary.colluders": 2, "federation.rounds": 2}
    experiment = tiny_experiment.with_values(BASE | two | values)
    backend, federation = watched(experiment)
    ladder = Ladder(experiment, backend.sent, federation.history)
    assert ladder.view.received
    wrong = 0
    for each in ladder.view.received:
        assert each.cells.keys() == backend.states[each.made].keys()
        for name, (low, high) in each.cells.items():
            secret, sent = backend.states[each.made][name], backend.codes(each.made)[name]
            assert ((low <= secret) & (secret <= high)).all()
            plain = replace(sent, quantizer=replace(sent.quantizer, rounding="nearest"))
            least, most = plain.cells()
            wrong += int(((secret < least - 1e-6) | (secret > most + 1e-6)).sum())
    assert wrong > 10


def test_codes_change_less_and_scales_stay(tiny_experiment: Experiment) -> None:
    """Where the server learns slowly; and no byte more travels."""
    changed, held, sizes = {}, {}, set()
    slow = BASE | {"server.lr": 0.1, "federation.rounds": 4}
    for name, values in {"plain": {}, "sticky": STICKY}.items():
        backend, _ = watched(tiny_experiment.with_values(slow | values))
        before, after = backend.codes(4), backend.codes(5)
        sizes.add(tensor_bytes(backend.sent[5][4]))
        changed[name] = sum(int((after[n].codes() != t.codes()).sum()) for n, t in before.items())
        same = [after[n].scales() == t.scales() for n, t in before.items()]
        held[name] = float(torch.cat(same).float().mean())
    assert len(sizes) == 1
    assert changed["sticky"] < 0.7 * changed["plain"]
    assert held["plain"] < 0.1
    assert held["sticky"] > 0.7


def test_draws_of_the_run_are_the_same_in_every_round(tiny_experiment: Experiment) -> None:
    sizes: dict[str, set[int]] = {"int": set(), "nf": set()}
    cases = {"run": True, "round": False, "subtractive-run": True, "subtractive-round": False}
    for dither, same in cases.items():
        kind = "int" if dither.startswith("sub") else "nf"
        values = {"downlink.bits": 2, "downlink.dither": dither, "downlink.kind": kind}
        backend = Watched(tiny_experiment.with_values(values))
        for made in (1, 2):
            backend.encode_broadcast(made)
        one, two = (torch.cat([t.codes() for t in backend.codes(m).values()]) for m in (1, 2))
        assert torch.equal(one, two) is same
        sizes[kind].add(tensor_bytes(backend.sent[1][4]))
    for kind, found in sizes.items():
        plain = InProcess(tiny_experiment.with_values({"downlink.bits": 2, "downlink.kind": kind}))
        assert found == {tensor_bytes(plain.encode_broadcast(1)[4])}


def test_what_clients_subtract_costs_a_key_and_is_the_dither_on_the_wire(
    tiny_experiment: Experiment,
) -> None:
    """Each client's 32 bytes come with the first broadcast that it receives."""
    base = BASE | {"downlink.kind": "int", "federation.rounds": 3}
    plain, secret = (
        tiny_experiment.with_values(base | {"downlink.dither": dither})
        for dither in ("round", "subtractive-round")
    )
    assert InProcess(plain).encode_broadcast(1) == InProcess(secret).encode_broadcast(1)
    backend, federation = watched(secret)
    known: set[int] = set()
    for record in federation.history:
        for each in record.ledger:
            key = 0 if each.client in known else KEY_BYTES
            assert each.down == len(backend.sent[record.round][4]) + key
            known.add(each.client)
    assert KEY_BYTES == 32
    assert InProcess(tiny_experiment.with_values({"downlink.bits": 2})).download() == 0


def test_every_reader_subtracts_its_own_draws(tiny_experiment: Experiment) -> None:
    """Messages of a client alone: what it reads is within half a step of what it was sent, also
    where the server reads it again, and a run goes through."""
    values = {
        "downlink.kind": "int",
        "downlink.dither": "subtractive-round",
        "downlink.rotate": "client",
        "federation.rounds": 1,
    }
    backend, federation = watched(tiny_experiment.with_values(BASE | values))
    wire: Wire = backend._server._wire
    clients = [each.client for each in federation.history[0].clients]
    read = {client: wire.read(1, client, backend.sent[1][client]) for client in clients}
    for client, found in read.items():
        turned = wire.rotate(1, client, backend.states[1])
        for name, sent in backend.codes(1, client).items():
            scales = sent.scales().repeat_interleave(16)[: sent.numel].view(sent.shape)
            assert ((found[name] - turned[name]).abs() <= 0.5001 * scales).all()
    one, other, *_ = (torch.cat([t.flatten() for t in found.values()]) for found in read.values())
    assert not torch.equal(one, other)


def test_a_subtracted_dither_goes_on_from_a_checkpoint(
    tiny_experiment: Experiment, tmp_path: Path
) -> None:
    values = {"downlink.kind": "int", "downlink.dither": "subtractive-run", "downlink.every": 2}
    whole, restored = interrupted(tiny_experiment.with_values(BASE | values), tmp_path, after=2)
    assert numbers(restored.history) == numbers(whole.history)


def test_a_broadcast_is_made_again_from_the_same_past(tiny_experiment: Experiment) -> None:
    """What it is made from counts as sent when its own round is closed, not when it is made."""
    experiment = tiny_experiment.with_values(STICKY | {"federation.rounds": 1})
    backend, _ = watched(experiment)
    again = backend._server.encode_broadcast(2)
    assert again == backend.sent[2]
    assert backend._server.encode_broadcast(2) == again
    files = backend.adapter()
    assert [name for name in files if name.startswith("sent-")] == ["sent-4.safetensors"]
    assert files["sent-4.safetensors"] == backend.sent[1][4]
    other = InProcess(experiment)
    other.restore(files)
    assert other.encode_broadcast(2) == again
    del files["sent-4.safetensors"]
    other.restore(files)
    assert other.encode_broadcast(2) != again


def test_without_memory_nothing_is_kept(tiny_experiment: Experiment) -> None:
    values = {"downlink.bits": 2, "downlink.dither": "run", "federation.rounds": 1}
    backend, _ = watched(tiny_experiment.with_values(values))
    assert not [name for name in backend.adapter() if name.startswith("sent-")]


def test_several_ranks_each_remember_their_own(tiny_experiment: Experiment, tmp_path: Path) -> None:
    values = {
        "lora.client_ranks": [2, 4],
        "server.aggregation": "hetlora",
        "downlink.dither": "run",
    }
    experiment = tiny_experiment.with_values(BASE | STICKY | values)
    preflight.check([experiment])
    whole, restored = interrupted(experiment, tmp_path, after=2)
    assert numbers(restored.history) == numbers(whole.history)
    names = [name for name in whole.backend.adapter() if name.startswith("sent-")]
    assert sorted(names) == ["sent-2.safetensors", "sent-4.safetensors"]


def test_defences_go_with_a_mask_that_stays_and_scaffold(tiny_experiment: Experiment) -> None:
    for values in (
        {"downlink.server_mask": 0.25, "downlink.magnitude": "norm", "downlink.hold_scales": False},
        {"client.scaffold": True, "client.optimizer": "sgd", "client.weight_decay": 0.0},
    ):
        experiment = tiny_experiment.with_values(BASE | STICKY | {"federation.rounds": 2} | values)
        preflight.check([experiment])
        assert len(run(experiment)) == 2


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"downlink.hysteresis": 0.5, "downlink.bits": 32}, r"hysteresis = 0.5: downlink.bits 32"),
        ({"downlink.hold_scales": True, "downlink.bits": "full"}, r"hold_scales: downlink.bits 32"),
        ({"downlink.dither": "run", "downlink.bits": 32}, r"dither 'run': downlink.bits 32"),
        ({"downlink.magnitude": "norm", "downlink.bits": 32}, r"'norm': downlink.bits 32"),
        ({"downlink.hysteresis": 1, "downlink.rotate": "round"}, r"= 1: downlink.rotate"),
        ({"downlink.hold_scales": True, "downlink.rotate": "round"}, r"scales: downlink.rotate"),
        ({"downlink.dither": "run", "downlink.rotate": "round"}, r"'run': downlink.rotate"),
        ({"downlink.hysteresis": 1, "downlink.client_mask": 0.1}, r"= 1: downlink.client_mask"),
        ({"downlink.hold_scales": True, "downlink.client_mask": 0.1}, r"s: downlink.client_mask"),
        ({"downlink.dither": "run", "downlink.client_mask": 0.1}, r"'run': downlink.client_mask"),
        ({"downlink.hysteresis": 1, "downlink.rotate": "client"}, r"= 1: downlink.rotate"),
        ({"downlink.hysteresis": 1, "downlink.perturbation": 1}, r"= 1: downlink.perturbation"),
        ({"downlink.hold_scales": True, "downlink.perturbation": 1}, r"s: downlink.perturbation"),
        ({"downlink.dither": "run", "downlink.perturbation": 1}, r"'run': downlink.perturbation"),
        (
            {"downlink.hysteresis": 1, "downlink.rounding": "stochastic"},
            r"downlink.rounding 'stochastic' moves the end.*allowed: nearest",
        ),
        ({"downlink.hysteresis": 1, "downlink.dither": "round"}, r"= 1: downlink.dither 'round'"),
        ({"downlink.hold_scales": True, "downlink.scale": "double"}, r"scales: downlink.scale"),
        ({"downlink.hold_scales": True, "downlink.magnitude": "norm"}, r"downlink.magnitude 'n"),
        ({"downlink.dither": "run", "downlink.rounding": "stochastic"}, r"'run': downlink.round"),
        (SECRET | {"downlink.kind": "nf"}, r"'subtractive-run': downlink.kind 'nf' .*allowed: int"),
        (SECRET | {"downlink.bits": 32}, r"'subtractive-run': downlink.bits 32"),
        (SECRET | {"downlink.hysteresis": 1}, r"hysteresis = 1: downlink.dither 'subtractive-run'"),
        (SECRET | {"downlink.hold_scales": True}, r"hold_scales: downlink.dither 'subtractive-run"),
        (SECRET | {"downlink.magnitude": "norm"}, r"'norm': .*downlink.dither"),
        (SECRET | {"downlink.rounding": "stochastic"}, r"'subtractive-run': downlink.rounding"),
        (SECRET | {"downlink.rotate": "round"}, r"'subtractive-run': downlink.rotate"),
        (SECRET | {"downlink.perturbation": 1}, r"'subtractive-run': downlink.perturbation"),
        (SECRET | {"downlink.client_mask": 0.1}, r"'subtractive-run': downlink.client_mask"),
        ({"downlink.magnitude": "norm", "downlink.dither": "round"}, r"'norm': .*downlink.dither"),
        ({"downlink.magnitude": "norm", "downlink.rounding": "stochastic"}, r"'norm': .*rounding"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_with_both_keys(
    tiny_experiment: Experiment, values: dict[str, object], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        preflight.check([tiny_experiment.with_values(values)])


@pytest.mark.parametrize(
    "values",
    [{"downlink.hysteresis": -0.1}, {"downlink.dither": "once"}, {"downlink.magnitude": 2}],
)
def test_values_that_are_none_are_refused(
    tiny_experiment: Experiment, values: dict[str, object]
) -> None:
    (key,) = values
    with pytest.raises(ConfigError, match=key):
        tiny_experiment.with_values(values)
