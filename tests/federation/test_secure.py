"""Secure aggregation in whole rounds: the sum of who came, and nothing else at the server."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from fedlpp_ray.config import ConfigError, Experiment
from fedlpp_ray.errors import UserError
from fedlpp_ray.federation import ClientReport, Federation, RoundRecord, preflight
from fedlpp_ray.federation.client import ClientHost
from fedlpp_ray.federation.combinations import check_combinations
from fedlpp_ray.federation.in_process import InProcess
from fedlpp_ray.federation.records import Assignment
from fedlpp_ray.federation.recovery import finished_rounds
from fedlpp_ray.federation.secure import Halves, grid_of
from fedlpp_ray.federation.server import Server
from fedlpp_ray.messages import Envelope, MessageError, decode, encode
from fedlpp_ray.privacy.secure import Grid, traffic
from fedlpp_ray.privacy.secure.primitives import Vector
from fedlpp_ray.state import State, state_digest
from tests.federation.test_loop import Recording, interrupted, numbers
from tests.federation.test_rounds import Fragile

SECURE: dict[str, object] = {
    "secure.threshold": 3,
    "federation.min_updates": 3,
    "adversary.watch": [],
    "evaluation.server": False,
}
SHORT: dict[str, object] = {"federation.rounds": 1, "federation.local_steps": 2}
UNIFORM: dict[str, object] = {"server.weighting": "uniform"}
ADAPTING: dict[str, object] = {"dp.clip": 0.1, "dp.adaptive": True, "dp.count_noise": 1.0}
DROPOUT: dict[str, object] = {"simulation.dropout": 0.15, "seed": 4}
"""Of the 4 clients of the first three rounds 4, 3 and 2 return."""
CLIENTS = (0, 1, 2, 3)
"""As many as a cohort has."""


def plain(experiment: Experiment) -> Experiment:
    return experiment.with_values({"secure.threshold": None})


def ended(experiment: Experiment) -> tuple[list[RoundRecord], InProcess]:
    preflight.check([experiment])
    backend = InProcess(experiment)
    return list(Federation(experiment, backend).run()), backend


def flat(state: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([state[name].double().flatten() for name in sorted(state)])


def made_up(server: Server, client: int, unit: float = 2.0**-20) -> State:
    """An update of multiples of a unit, below 1."""
    random = torch.Generator().manual_seed(client)
    schema = server._wire.update(1, 4)
    most = int(0.9 / unit)
    return {
        name: torch.randint(-most, most, shape, generator=random).float() * unit
        for name, shape in schema.items()
    }


class ByHand:
    """A first round of made-up updates, at a server alone."""

    def __init__(self, experiment: Experiment) -> None:
        self.experiment, self.server = experiment, Server(experiment)
        self.before = dict(self.server._state)
        self.secure = experiment.secure.threshold is not None
        session = self.server.open_session(1, CLIENTS)
        self.halves = Halves(session, partial(self.server.exchange, 1))
        broadcast = self.server.encode_broadcast(1, CLIENTS)
        self.server.open_round(1, [Assignment(client, 1) for client in CLIENTS], {1: broadcast})

    def vector(self, client: int) -> Vector:
        examples = self.server.examples()
        weight = examples[client] if self.experiment.server.weighting == "examples" else 1
        return grid_of(self.experiment, examples).encode(made_up(self.server, client), weight)

    def send(self, client: int) -> bytes:
        if self.secure:
            masking = self.halves.maskings[client]
            payload = masking.half.masked(masking.inbox, self.vector(client))
        else:
            envelope = Envelope("update", 1, client, self.server.examples()[client])
            payload = encode(envelope, made_up(self.server, client), self.server._wire.uplink)
        self.server.receive(1, client, payload)
        return payload

    def close(self, clients: Sequence[int]) -> str:
        for client in clients:
            self.send(client)
        self.unmask(clients)
        return self.server.aggregate(1)

    def unmask(self, clients: Sequence[int]) -> None:
        maskings = self.halves.maskings
        self.halves.unmask(ClientReport(c, half=maskings[c].half) for c in clients if maskings)

    def moved(self) -> torch.Tensor:
        return flat(self.server._state) - flat(self.before)


@pytest.fixture
def secure(tiny_experiment: Experiment) -> Experiment:
    return tiny_experiment.with_values(SECURE)


@pytest.mark.parametrize(("weighting", "clients"), [("examples", (3, 0, 2)), ("uniform", CLIENTS)])
def test_on_the_grid_the_state_has_the_bits_of_the_plain_one(
    secure: Experiment, weighting: str, clients: tuple[int, ...]
) -> None:
    """Whoever drops out, in whatever order the others come, and whatever the secrets."""
    values = {"server.weighting": weighting, "federation.partition": "dirichlet"}
    experiment = secure.with_values(values)
    expected = ByHand(plain(experiment)).close(clients)
    assert ByHand(experiment).close(clients) == expected
    assert ByHand(experiment).close(clients[::-1]) == expected


VARIANTS: dict[str, dict[str, object]] = {
    "of 32 bits, rotated": {
        "secure.bits": 32,
        "downlink.rotate": "round",
        "federation.partition": "dirichlet",
    },
    "noised for each, masked": {"downlink.perturbation": 0.5, "downlink.server_mask": 0.5},
    "half, replaced": {
        "server.aggregation": "ffa-lora",
        "server.rule": "replace",
        "downlink.bits": 4,
    },
    "scaffold": {"client.scaffold": True, "client.optimizer": "sgd", "client.lr": 0.1},
    "dp": UNIFORM | {"dp.clip": 0.1, "server.optimizer": "fedavgm"},
    "dp of clients, adapting": UNIFORM | ADAPTING | {"dp.noise": "clients", "secure.clip": 6.0},
}


SLOW = ("half, replaced", "dp")
"""Whose parts the other cases have too."""


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[pytest.mark.slow] * (case in SLOW)) for case in VARIANTS],
)
def test_a_round_ends_at_the_plain_state_within_half_a_unit(secure: Experiment, case: str) -> None:
    """And two roundings to fp32. Of dp all is on the grid: else the noise would be another."""
    experiment = secure.with_values(SHORT | VARIANTS[case])
    states = []
    for each in (experiment, plain(experiment)):
        (record,), backend = ended(each)
        assert len(record.folded) == 4
        states.append(flat(backend._server._state))
    unit = grid_of(experiment, backend.examples()).unit
    assert unit < 1e-9 if experiment.secure.bits == 64 else unit < 1e-5
    torch.testing.assert_close(*states, rtol=1.2e-7, atol=unit / 2 + 1e-8)


def test_the_digests_do_not_depend_on_the_secrets(secure: Experiment) -> None:
    first, second = (ended(secure.with_values(SHORT))[0] for _ in range(2))
    assert numbers(first) == numbers(second)


def test_who_drops_out_in_the_simulation_is_not_in_the_sum(secure: Experiment) -> None:
    """Of 4 sampled clients 3 are enough, of 2 nothing is folded."""
    values = SHORT | DROPOUT | {"federation.rounds": 3, "client.lr": 1e-4}
    experiment = secure.with_values(values)
    (ours, backend), (theirs, other) = ended(experiment), ended(plain(experiment))
    folded = [[c.client for c in record.folded] for record in ours]
    assert folded == [[c.client for c in record.folded] for record in theirs]
    assert list(map(len, folded)) == [4, 3, 0]
    for record, before in zip(ours[1:], ours, strict=False):
        assert (record.digest == before.digest) == (not record.folded)
    for record in ours:
        kinds = {c.fault.kind for c in record.clients if c.fault}
        assert kinds <= ({"dropped"} if record.folded else {"dropped", "abandoned"})
    # Training turns the difference of a round, half a unit and fp32, into a larger one.
    states = flat(backend._server._state), flat(other._server._state)
    torch.testing.assert_close(*states, rtol=0, atol=1e-5)


def test_a_client_beyond_the_clip_drops_out_and_sends_nothing(secure: Experiment) -> None:
    experiment = secure.with_values(SHORT)
    recording = Recording(plain(experiment))
    (record,) = Federation(plain(experiment), recording).run()
    server = recording._server
    largest = {}
    for client, payload in zip(record.clients, recording.received[1], strict=True):
        envelope = Envelope("update", 1, client.client, server.examples()[client.client])
        state = decode(payload, envelope, server._wire.update(1, 4), server._wire.uplink)
        largest[client.client] = float(flat(state).abs().max())
    *others, last = sorted(largest, key=largest.__getitem__)
    clip = (largest[others[-1]] + largest[last]) / 2
    (ours,), backend = ended(experiment.with_values({"secure.clip": clip}))
    assert [each.client for each in ours.folded] == sorted(others)
    (fault,) = [each for each in ours.clients if each.fault]
    assert fault.client == last
    assert fault.fault is not None
    assert fault.fault.kind == "refused"
    assert f"secure.clip = {clip:g}" in fault.fault.reason
    session = backend.open_session(1, [each.client for each in ours.clients])
    assert session is not None
    assert fault.up < min(each.up for each in traffic(session)) - 8 * session.length + 8


class Wiretap(InProcess):
    """Remembers all that the server is given."""

    def __init__(self, experiment: Experiment) -> None:
        super().__init__(experiment)
        self.masked: dict[int, bytes] = {}
        self.vectors: dict[int, Vector] = {}
        self.taken: list[object] = []
        server, encode_vector = self._server, Grid.encode
        grid = self._host._grid
        assert grid is not None

        def encode(state: State, weight: int = 1) -> Vector:
            vector = encode_vector(grid, state, weight)
            self.vectors[len(self.vectors)] = vector
            return vector

        class Listening:
            def encode(self, state: State, weight: int = 1) -> Vector:
                return encode(state, weight)

        self._host._grid = Listening()  # type: ignore[assignment]
        for name in ("verdict", "exchange", "open_round", "open_session", "aggregate"):
            setattr(server, name, partial(self._told, getattr(server, name)))
        self.exchange, self.open_session = server.exchange, server.open_session
        self.aggregate = server.aggregate

    def _told(self, method: object, *arguments: object) -> object:
        self.taken.append(arguments)
        return method(*arguments)  # type: ignore[operator]


def test_the_server_is_given_no_update_that_is_not_masked(secure: Experiment) -> None:
    """Nothing it is given holds a run of an update's bytes, and what it adds up looks random."""
    experiment = secure.with_values(SHORT)
    backend = Wiretap(experiment)
    (record,) = Federation(experiment, backend).run()
    assert len(backend.vectors) == len(record.folded) == 4
    given = pickle.dumps(backend.taken)
    payloads = [a[2] for a in backend.taken if len(a) == 3 and isinstance(a[2], bytes)]  # type: ignore[arg-type,index,misc]
    assert len(payloads) == 4
    assert all(payload in given for payload in payloads)
    for vector in backend.vectors.values():
        raw = vector.tobytes()
        assert not any(raw[i : i + 16] in given for i in range(0, len(raw) - 16, 512))
    for payload in payloads:
        row = np.frombuffer(payload[-8 * len(vector) :], "<u8")
        top = row >> np.uint64(56)  # of an unmasked one all 0 or 255
        assert len(np.unique(top)) > 200


def test_the_server_refuses_an_update_that_is_not_masked(secure: Experiment) -> None:
    hand = ByHand(secure)
    envelope = Envelope("update", 1, 0, hand.server.examples()[0])
    update = encode(envelope, made_up(hand.server, 0), hand.server._wire.uplink)
    verdict = hand.server.verdict(1, 0, update)
    assert verdict is not None
    assert "masked update of client 0 refused" in verdict
    assert hand.server.returned(1) == []
    with pytest.raises(MessageError, match="not as sums"):
        hand.server.merge(1, update)


def test_a_host_sends_no_update_unmasked(secure: Experiment) -> None:
    host, server = ClientHost(secure), Server(secure)
    with pytest.raises(ValueError, match=r"secure\.threshold"):
        host.train(1, 0, server.encode_broadcast(1))


def test_a_client_that_is_begun_again_sends_the_same_bytes(secure: Experiment) -> None:
    """From copies of its half, as actors have them."""
    hand, host = ByHand(secure.with_values(SHORT)), ClientHost(secure.with_values(SHORT))
    broadcast = hand.server.encode_broadcast(1)
    kept = pickle.dumps(hand.halves.maskings[2])
    first, second = (host.train(1, 2, broadcast, None, pickle.loads(kept)) for _ in range(2))
    assert first.payload == second.payload


def test_a_round_without_a_session_is_not_opened(secure: Experiment) -> None:
    server = Server(secure)
    with pytest.raises(MessageError, match="round 1 has no session"):
        server.open_round(1, [Assignment(0, 1)], {1: server.encode_broadcast(1)})


def test_a_mean_beyond_the_limit_is_not_folded(secure: Experiment) -> None:
    hand = ByHand(secure.with_values({"server.max_update_norm": 1.0}))
    for client in CLIENTS:
        hand.send(client)
    with pytest.raises(MessageError, match=r"its norm is .*, allowed is 1"):
        hand.unmask(CLIENTS)
    assert hand.server.discard(1) == state_digest(hand.before)


def test_a_sum_that_cannot_be_unmasked_abandons_the_round(secure: Experiment) -> None:
    experiment = secure.with_values(SHORT)
    backend = InProcess(experiment)
    before, exchange, calls = state_digest(backend._server._state), backend.exchange, []

    def losing(round: int, sent: Mapping[int, bytes]) -> dict[int, bytes]:
        calls.append(len(sent))
        return exchange(round, dict(list(sent.items())[:2]) if len(calls) == 4 else sent)

    backend.exchange = losing  # type: ignore[method-assign]
    (record,) = Federation(experiment, backend).run()
    assert calls == [4, 4, 0, 4]
    assert record.digest == before
    (reason,) = {c.fault.reason for c in record.clients if c.fault}
    assert reason.startswith("no sum was unmasked: 2 of 4 clients are left at step 'unmask'")


def test_sums_that_are_never_unmasked_are_said_and_end_the_run(
    secure: Experiment, caplog: pytest.LogCaptureFixture
) -> None:
    limit = {"server.max_update_norm": 1e-6, "federation.rounds": 5}
    experiment = secure.with_values(SHORT | limit)
    federation = Federation(experiment, InProcess(experiment))
    with pytest.raises(
        MessageError, match=r"round 3: no sum .* \(server\.max_update_norm = 1e-06\)"
    ):
        list(federation.run())
    assert [record.folded for record in federation.history] == [(), ()]
    for round in (1, 2, 3):
        assert f"round {round}: no sum was unmasked: its norm is" in caplog.text


def test_the_ledger_is_the_bytes_of_both_directions(secure: Experiment) -> None:
    experiment = secure.with_values(SHORT | DROPOUT | {"federation.rounds": 2})
    backend = Recording(experiment)
    history = list(Federation(experiment, backend).run())
    assert [len(record.folded) for record in history] == [4, 3]
    for record in history:
        session = backend.open_session(record.round, [c.client for c in record.clients])
        assert session is not None
        whole, broadcast = traffic(session), len(backend.sent[record.round][4])
        for found, client, expected in zip(record.ledger, record.clients, whole, strict=True):
            if len(record.folded) == 4:
                assert (found.down - broadcast, found.up) == (expected.down, expected.up)
            elif client.fault:  # it has taken the first two steps, and read the answers
                assert 0 < found.up < expected.up - 8 * session.length
                assert 0 < found.down - broadcast < expected.down


def test_a_lost_server_changes_no_bit(secure: Experiment) -> None:
    """Lost while keys are agreed on, while updates come, and while the sum is unmasked."""
    experiment = secure.with_values(SHORT | {"federation.rounds": 2})
    backend = Fragile(experiment, [3, 10, 22])
    federation = Federation(experiment, backend)  # type: ignore[arg-type]
    list(finished_rounds(federation))
    assert [backend.calls[i - 1] for i in (3, 10, 22)] == ["exchange", "report", "exchange"]
    assert numbers(federation.history) == numbers(ended(experiment)[0])


def test_a_resumed_run_has_the_same_digests(secure: Experiment, tmp_path: Path) -> None:
    experiment = secure.with_values(SHORT | {"federation.rounds": 2})
    whole, restored = interrupted(experiment, tmp_path, after=1)
    assert numbers(restored.history) == numbers(whole.history)
    assert restored.backend.adapter() == whole.backend.adapter()


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"method": "centralised"}, "method 'centralised' has no updates"),
        (
            UNIFORM | {"server.robust": "median", "federation.min_updates": 4},
            "server.robust 'median' compares single updates",
        ),
        ({"server.aggregation": "flora"}, "server.aggregation 'flora' takes more of the updates"),
        ({"server.aggregation": "hetlora"}, "allowed: fedit, ffa-lora, rolora, fedsa-lora"),
        (
            {"federation.mode": "fedbuff", "federation.buffer": 3},
            "federation.mode 'fedbuff' makes a round of clients",
        ),
        (
            {"federation.cohort": 1, "federation.client_fraction": None}
            | {"federation.min_updates": 1, "secure.threshold": 1},
            "1 client is sampled",
        ),
        ({"secure.threshold": 2}, "it is from 3 to 4"),
        ({"secure.threshold": 5}, "it is from 3 to 4"),
        ({"federation.over_selection": 0.5}, "it is from 4 to 6"),
        (
            {"federation.over_selection": 1.0, "secure.threshold": 4},
            r"samples 8 clients, and more than half .* the cohort of 4.*; allowed: 0\.75 and less",
        ),
        ({"federation.min_updates": 2}, r"federation\.min_updates = 2 would fold fewer"),
        ({"uplink.bits": 8}, r"uplink\.bits = 8 rounds to codes"),
        ({"uplink.bits": 8, "uplink.error_feedback": True}, r"uplink\.error_feedback adds"),
        (
            {"lora.client_ranks": [2, 4], "server.aggregation": "hetlora"},
            r"lora\.client_ranks gives clients",
        ),
        ({"downlink.client_mask": 0.5}, r"downlink\.client_mask has every client"),
        ({"downlink.rotate": "client"}, r"downlink\.rotate 'client' turns each"),
        (UNIFORM | {"dp.clip": 0.1, "secure.bits": 32}, r"dp\.clip with secure\.bits = 32"),
        (
            UNIFORM | ADAPTING | {"secure.clip": 0.4},
            r"numbers of up to 0\.5 in every update, and secure\.clip = 0\.4 is below",
        ),
        (
            UNIFORM | ADAPTING | {"dp.noise": "clients"},  # 1/2 and 8 / sqrt(3)
            r"numbers of up to 5\.12 in every update, and secure\.clip = 1 is below",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(
    secure: Experiment, values: dict[str, object], reason: str
) -> None:
    experiment = secure.with_values(values)
    with pytest.raises(ConfigError, match=rf"^secure\.threshold = \d: .*{reason}"):
        check_combinations(experiment)


@pytest.mark.parametrize("clip", [1e39, 1e-31])
def test_a_range_that_there_are_no_integers_for_is_refused(secure: Experiment, clip: float) -> None:
    with pytest.raises(ConfigError, match=r"^secure\.clip = .* with secure\.bits = 64"):
        preflight.check([secure.with_values({"secure.clip": clip})])


def test_a_missing_library_is_refused_before_any_compute(
    secure: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.startswith("Crypto")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "Crypto", None)
    with pytest.raises(UserError, match=r"pip install 'fedlpp_ray\[privacy\]'"):
        check_combinations(secure)
