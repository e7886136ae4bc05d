"""Client-level differential privacy in whole rounds: the clip, the noise, and what they cost."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import safetensors.torch
import torch

from fedlpp_ray.config import ConfigError, Experiment
from fedlpp_ray.errors import UserError
from fedlpp_ray.federation import Federation, RoundRecord, preflight
from fedlpp_ray.federation.aggregator import Aggregator
from fedlpp_ray.federation.client import ClientHost
from fedlpp_ray.federation.combinations import check_combinations
from fedlpp_ray.federation.in_process import InProcess
from fedlpp_ray.federation.private import Private, delta
from fedlpp_ray.federation.records import Assignment
from fedlpp_ray.federation.results import result, to_json
from fedlpp_ray.federation.server import CLIPPING, Server
from fedlpp_ray.messages import Envelope, MessageError, encode
from fedlpp_ray.privacy.dp import BELOW, CLIP, clipped, epsilon_of, norm
from fedlpp_ray.state import State
from fedlpp_ray.tracking.metrics import metric_names, round_metrics
from tests.federation.test_loop import interrupted, numbers

UNIFORM: dict[str, object] = {"server.weighting": "uniform", "federation.local_steps": 2}
CLIPPED = UNIFORM | {"dp.clip": 0.05, "dp.noise_multiplier": 0.0}
NOISED: dict[str, object] = {"dp.noise_multiplier": 0.8}
ADAPTIVE = CLIPPED | {"dp.adaptive": True, "dp.noise_multiplier": 0.5, "dp.count_noise": 1.0}
CLIENTS = (0, 1, 2, 3)
"""As many as a cohort has."""


def run(experiment: Experiment) -> list[RoundRecord]:
    preflight.check([experiment])
    return list(Federation(experiment, InProcess(experiment)).run())


def moved(experiment: Experiment, clients: tuple[int, ...] = CLIENTS) -> State:
    """S after a first round of made-up updates, less S before it, float64."""
    server = Server(experiment)
    before = dict(server._state)
    broadcast = server.encode_broadcast(1)
    server.open_round(1, [Assignment(client, 1) for client in CLIENTS], {1: broadcast})
    for client in clients:
        server.receive(1, client, sent(server, client))
    server.aggregate(1)
    return {n: t.double() - before[n].double() for n, t in server._state.items()}


def update(server: Server, client: int, size: float) -> State:
    """Random numbers of this norm."""
    random = torch.Generator().manual_seed(client)
    schema = {n: s for n, s in server._wire.update(1, 4).items() if n != BELOW}
    state = {n: torch.randn(shape, generator=random) for n, shape in schema.items()}
    return {n: t * (size / norm(state)) for n, t in state.items()}


def sent(server: Server, client: int, size: float = 3.0) -> bytes:
    """An update that a client has protected."""
    found = server._private
    assert found is not None
    state = found.protect(1, client, update(server, client, size), {CLIP: torch.tensor([0.05])})
    return coded(server, client, state)


def coded(server: Server, client: int, state: State) -> bytes:
    envelope = Envelope("update", 1, client, server.examples()[client])
    return encode(envelope, state, server._wire.uplink)


def flat(state: State) -> torch.Tensor:
    return torch.cat([state[name].flatten() for name in sorted(state)])


@pytest.mark.parametrize("bits", [32, 8])
def test_a_wide_clip_without_noise_changes_no_bit(tiny_experiment: Experiment, bits: int) -> None:
    plain = tiny_experiment.with_values(UNIFORM | {"uplink.bits": bits})
    loose = plain.with_values({"dp.clip": 1e6, "dp.noise_multiplier": 0.0})
    assert [r.digest for r in run(loose)] == [r.digest for r in run(plain)]


def test_a_client_clips_the_difference_to_the_broadcast(tiny_experiment: Experiment) -> None:
    """By more than its last training went: the same update, shorter."""
    found = []
    for clip in (1e6, 0.05):
        experiment = tiny_experiment.with_values(CLIPPED | {"dp.clip": clip})
        host, server = ClientHost(experiment), Server(experiment)
        broadcast = server.encode_broadcast(1)
        payload = host.train(1, 2, broadcast).payload
        found.append(safetensors.torch.load(payload))
    free, short = found
    assert norm(free) > 0.1
    assert norm(short) == pytest.approx(0.05, rel=1e-6)
    for name, tensor in clipped(free, 0.05).items():
        assert torch.equal(tensor, short[name])


@pytest.mark.parametrize("returned", [CLIENTS, CLIENTS[:3]])
def test_the_mean_is_over_the_planned_cohort(
    tiny_experiment: Experiment, returned: tuple[int, ...]
) -> None:
    """Of clipped updates, without noise. Tolerance: fp32 of the state."""
    experiment = tiny_experiment.with_values(CLIPPED)
    server = Server(experiment)
    short = [flat(clipped(update(server, client, 3.0), 0.05)) for client in returned]
    expected = torch.stack(short).double().sum(0) / 4
    torch.testing.assert_close(flat(moved(experiment, returned)), expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("values", "returned", "variance"),
    [
        ({}, 4, 1.0),
        ({}, 2, 1.0),  # whoever returns
        ({"dp.noise": "clients", "federation.min_updates": 4}, 4, 1.0),
        ({"dp.noise": "clients", "federation.min_updates": 2}, 2, 1.0),
        ({"dp.noise": "clients", "federation.min_updates": 2}, 4, 2.0),  # more than is needed
        # z_delta = (0.8^-2 - (2 0.5)^-2)^(-1/2)
        ({"dp.adaptive": True, "dp.count_noise": 0.5}, 4, (0.8**-2 - 1) ** -1 / 0.64),
    ],
)
def test_noise_on_the_mean_has_its_variance(
    tiny_experiment: Experiment, values: dict[str, object], returned: int, variance: float
) -> None:
    """(z C / n)^2, at five standard errors, sqrt(2 / numbers) each."""
    loud = CLIPPED | values | NOISED
    quiet = loud | {"dp.noise_multiplier": 0.0}
    after, before = (
        flat(moved(tiny_experiment.with_values(v), CLIENTS[:returned])) for v in (loud, quiet)
    )
    numbers = len(after)
    assert numbers > 2000
    found = float((after - before).square().mean()) / (0.8 * 0.05 / 4) ** 2
    assert found == pytest.approx(variance, rel=5 * math.sqrt(2 / numbers))


@pytest.mark.parametrize("noise", ["server", "clients"])
def test_no_two_rounds_have_the_same_noise(tiny_experiment: Experiment, noise: str) -> None:
    """It would cancel in what the server's state moves by from one to the next."""
    rules = Private(tiny_experiment.with_values(CLIPPED | {"dp.noise": noise} | NOISED))
    zeros = {"A": torch.zeros(100)}
    found = []
    for round in (1, 2):
        share = rules.protect(round, 0, zeros, {})
        mean, _, _ = rules.settle(round, {n: t.double() for n, t in share.items()}, CLIENTS, 0.05)
        found.append(mean["A"])
    assert abs(float(torch.corrcoef(torch.stack(found))[0, 1])) < 0.5
    assert found[0].std() > 0


def correlation(first: torch.Tensor, second: torch.Tensor) -> float:
    """In standard errors, 1 / sqrt(numbers)."""
    return abs(float(torch.corrcoef(torch.stack([first, second]))[0, 1])) * math.sqrt(len(first))


@pytest.mark.parametrize(
    "other",
    [
        {"clients": CLIENTS[:3]},  # a round repeated with others, after its broadcast had gone out
        {"shift": 1e-9},  # another run of the seed, in which one client's data differ
        {"dp.noise_multiplier": 0.4},  # multiples of one noise cancel as well
        {"federation.client_fraction": 1.0},
    ],
    ids=["clients", "data", "multiplier", "cohort"],
)
def test_no_two_sums_have_the_same_noise(
    tiny_experiment: Experiment, other: dict[str, object]
) -> None:
    """Their difference would be a client's update without any, and so it is none."""
    values = {n: v for n, v in other.items() if "." in n}
    random = torch.Generator().manual_seed(0)
    sums = {name: torch.randn(500, generator=random, dtype=torch.float64) for name in "AB"}
    changed = sums | {"A": sums["A"].clone()}
    changed["A"][7] += float(other.get("shift", 0.0))  # type: ignore[arg-type]
    noise = []
    for keys, mean, clients in (
        ({}, sums, CLIENTS),
        ({}, sums, CLIENTS[::-1]),
        (values, changed, other.get("clients", CLIENTS)),
    ):
        experiment = tiny_experiment.with_values(CLIPPED | NOISED | keys)
        found, _, _ = Private(experiment).settle(1, mean, clients, 0.05)  # type: ignore[arg-type]
        share = len(clients) / experiment.federation.cohort_size  # type: ignore[arg-type]
        noise.append({name: found[name] - mean[name] * share for name in found})
    first, same, second = noise
    for name in "AB":
        assert torch.equal(first[name], same[name])
        assert first[name].std() > 0
        assert correlation(first[name], second[name]) < 5


def test_who_returns_changes_the_noise_of_the_whole_round(tiny_experiment: Experiment) -> None:
    loud = tiny_experiment.with_values(CLIPPED | NOISED)
    quiet = loud.with_values({"dp.noise_multiplier": 0.0})
    three, four = (flat(moved(loud, c)) - flat(moved(quiet, c)) for c in (CLIENTS[:3], CLIENTS))
    assert correlation(three, four) < 5


@pytest.mark.parametrize("change", [{"shift": 1e-6}, {"federation.min_updates": 2}])
def test_a_client_repeats_a_share_of_the_noise_for_the_same_update_alone(
    tiny_experiment: Experiment, change: dict[str, float]
) -> None:
    values = CLIPPED | NOISED | {"dp.noise": "clients", "federation.min_updates": 4}
    random = torch.Generator().manual_seed(0)
    update = {name: 1e-3 * torch.randn(500, generator=random) for name in "AB"}
    changed = update | {"A": update["A"].clone()}
    changed["A"][7] += change.get("shift", 0.0)
    sent = Private(tiny_experiment.with_values(values)).protect(1, 3, update, {})
    again = Private(tiny_experiment.with_values(values)).protect(1, 3, update, {})
    keys = {name: value for name, value in change.items() if "." in name}
    other = Private(tiny_experiment.with_values(values | keys)).protect(1, 3, changed, {})
    for name in "AB":
        assert torch.equal(sent[name], again[name])
        assert correlation(sent[name] - update[name], other[name] - changed[name]) < 5


def test_the_server_refuses_what_is_not_clipped(tiny_experiment: Experiment) -> None:
    for values in ({}, {"dp.noise": "clients", "dp.noise_multiplier": 0.5}):
        server = Server(tiny_experiment.with_values(CLIPPED | values))
        opened(server)
        server.receive(1, 0, sent(server, 0))
        with pytest.raises(MessageError, match=r"clipped to dp\.clip = 0\.05 it is at most"):
            server.receive(1, 1, coded(server, 1, update(server, 1, 3.0)))


def opened(server: Server) -> None:
    cohort = [Assignment(client, 1) for client in CLIENTS]
    server.open_round(1, cohort, {1: server.encode_broadcast(1)})


@pytest.mark.parametrize("secured", [False, True])
@pytest.mark.parametrize("adaptive", [False, True])
def test_the_limit_of_an_update_is_without_what_its_client_adds(
    tiny_experiment: Experiment, *, adaptive: bool, secured: bool
) -> None:
    """Noise of a norm of hundreds, and a count of a half and its noise."""
    noise = {"dp.noise": "clients", "dp.noise_multiplier": 72.0 if adaptive else 36.0}
    values = (
        CLIPPED | {"dp.clip": 1.0, "federation.rounds": 1, "server.max_update_norm": 0.5} | noise
    )
    values |= {"dp.adaptive": True, "dp.count_noise": 42.0} if adaptive else {}
    values |= (
        {"secure.threshold": 3, "federation.min_updates": 3, "secure.clip": 1e4} if secured else {}
    )
    experiment = tiny_experiment.with_values(values)
    preflight.check([experiment])
    (record,) = Federation(experiment, InProcess(experiment)).run()
    assert [client.fault for client in record.clients] == [None] * 4


def test_the_server_clips_what_rounding_has_enlarged(tiny_experiment: Experiment) -> None:
    values = {"uplink.bits": "ternary", "uplink.rounding": "nearest"}
    server = Server(tiny_experiment.with_values(CLIPPED | values))
    opened(server)
    hostile = coded(server, 0, update(server, 0, 3.0))
    server.receive(1, 0, hostile)
    assert server._aggregator is not None
    assert norm(dict(server._aggregator.total.direction())) == pytest.approx(0.05, rel=1e-6)


def test_the_server_refuses_a_count_of_more_than_one(tiny_experiment: Experiment) -> None:
    server = Server(tiny_experiment.with_values(ADAPTIVE))
    opened(server)
    state = update(server, 0, 0.01) | {BELOW: torch.tensor([1.0])}
    with pytest.raises(MessageError, match=r"dp:below is 1; at most 0\.5"):
        server.receive(1, 0, coded(server, 0, state))


@pytest.mark.parametrize("first", [1e-3, 50.0])
def test_the_clip_travels_and_goes_where_updates_are(
    tiny_experiment: Experiment, first: float
) -> None:
    """All of the first round's updates are within it, or none: up or down by the formula."""
    values = {"dp.clip": first, "dp.count_noise": 0.01, "dp.noise_multiplier": 0.0}
    experiment = tiny_experiment.with_values(ADAPTIVE | values)
    backend = InProcess(experiment)
    federation = Federation(experiment, backend)
    history = list(federation.run())
    found = [record.privacy for record in history]
    assert found[0] is not None
    assert found[1] is not None
    assert found[0].clip == pytest.approx(first)
    assert found[0].below == pytest.approx(float(first > 1), abs=0.05)
    assert found[1].clip == pytest.approx(first * math.exp(-0.2 * (found[0].below - 0.5)))
    assert (found[1].clip < found[0].clip) == (first > 1)
    last = safetensors.torch.load(backend.encode_broadcast(4)[4])[CLIP]
    assert safetensors.torch.load(backend.adapter()[CLIPPING])[CLIP] == last
    assert last != pytest.approx(first)


def test_a_client_that_does_not_return_is_neither_within_the_clip_nor_beyond(
    tiny_experiment: Experiment,
) -> None:
    quiet = {"dp.noise_multiplier": 0.0, "dp.count_noise": 1e-6}
    server = Server(tiny_experiment.with_values(ADAPTIVE | quiet))
    opened(server)
    server.receive(1, 0, sent(server, 0, size=0.01))
    server.receive(1, 1, sent(server, 1, size=0.01))
    server.receive(1, 2, sent(server, 2, size=3.0))
    server.aggregate(1)
    assert server.clipping()[1] == pytest.approx((1 + 1 + 0 + 0.5) / 4, abs=1e-5)


def test_an_abandoned_round_leaves_the_clip_and_is_paid_for(tiny_experiment: Experiment) -> None:
    values = {"simulation.dropout": 0.6, "federation.min_updates": 2, "federation.rounds": 6}
    history = run(tiny_experiment.with_values(ADAPTIVE | values))
    spent = [record.privacy for record in history]
    idle = [i for i, record in enumerate(history[:-1]) if not record.folded]
    assert idle
    assert len(idle) < 5
    for i in idle:
        assert spent[i].below is None  # type: ignore[union-attr]
        assert spent[i + 1].clip == spent[i].clip  # type: ignore[union-attr]
    epsilons = [each.epsilon for each in spent if each]
    assert len(epsilons) == 6
    assert epsilons == sorted(set(epsilons))


@pytest.mark.parametrize("noise", ["server", "clients"])
def test_a_resumed_run_has_the_same_noise_clip_and_epsilon(
    tiny_experiment: Experiment, tmp_path: Path, noise: str
) -> None:
    experiment = tiny_experiment.with_values(ADAPTIVE | {"dp.noise": noise})
    whole, restored = interrupted(experiment, tmp_path, after=2)
    assert numbers(restored.history) == numbers(whole.history)
    assert restored.backend.adapter() == whole.backend.adapter()


def test_sums_of_parts_give_the_bits_of_one(tiny_experiment: Experiment) -> None:
    experiment, digests = tiny_experiment.with_values(ADAPTIVE), []
    for split in (4, 1):
        server = Server(experiment)
        cohort, broadcasts = [Assignment(c, 1) for c in CLIENTS], {1: server.encode_broadcast(1)}
        server.open_round(1, cohort, broadcasts)
        node = Aggregator(server.opening(1, cohort, broadcasts))
        for client in CLIENTS[:split]:
            server.receive(1, client, sent(server, client))
        for client in CLIENTS[split:]:
            node.receive(client, sent(server, client))
        if node.clients:
            server.merge(1, node.partial())
        digests.append((server.aggregate(1), server.clipping()))
    assert digests[0] == digests[1]


def test_epsilon_is_in_the_ledger_the_result_and_the_metrics(tiny_experiment: Experiment) -> None:
    experiment = tiny_experiment.with_values(ADAPTIVE | {"federation.rounds": 2})
    backend = InProcess(experiment)
    history = list(Federation(experiment, backend).run())
    for record in history:
        known = {"clients": 8, "sampled": 4, "noise_multiplier": 0.5, "delta": 8**-1.1}
        assert record.privacy is not None
        assert record.privacy.epsilon == epsilon_of(record.round, **known)  # type: ignore[arg-type]
    written = json.loads(to_json(result(experiment, history, backend.measure_floor())))
    assert written["history"][1]["privacy"]["epsilon"] == history[1].privacy.epsilon  # type: ignore[union-attr]
    assert [RoundRecord.from_dict(r.to_dict()) for r in history] == history
    metrics = round_metrics(history)
    assert metrics["dp/epsilon"] == history[1].privacy.epsilon  # type: ignore[union-attr]
    assert {"dp/epsilon", "dp/clip", "dp/below"} <= metrics.keys() & set(metric_names(experiment))


def test_a_history_written_before_there_was_privacy_is_read(tiny_experiment: Experiment) -> None:
    (record,) = run(tiny_experiment.with_values({"federation.rounds": 1}))
    old = record.to_dict()
    assert old.pop("privacy") is None
    assert RoundRecord.from_dict(old) == record
    assert "dp/epsilon" not in round_metrics([record])


def test_over_selected_clients_count_as_sampled(tiny_experiment: Experiment) -> None:
    values = {"federation.over_selection": 0.5, "dp.noise_multiplier": 2.0, "federation.rounds": 1}
    experiment = tiny_experiment.with_values(CLIPPED | values)
    (record,) = run(experiment)
    assert record.privacy is not None
    assert record.privacy.epsilon == epsilon_of(
        1, clients=8, sampled=6, noise_multiplier=2.0, delta=delta(experiment)
    )


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"server.robust": "median"}, r"server\.robust 'median' is no sum of updates"),
        ({"server.weighting": "examples"}, r"weighting 'examples' multiplies.*allowed: uniform"),
        ({"server.aggregation": "hetlora"}, r"'hetlora' is no plain mean.*fedit, ffa-lora, rolora"),
        ({"server.aggregation": "flora"}, r"'flora' is no plain mean"),
        ({"server.aggregation": "fedsa-lora", "evaluation.server": False}, r"'fedsa-lora' is no"),
        (
            {"client.scaffold": True, "client.optimizer": "sgd"},
            r"client\.scaffold makes a second mean",
        ),
        ({"uplink.bits": 4, "uplink.error_feedback": True}, r"uplink\.error_feedback adds"),
        ({"federation.mode": "fedbuff"}, r"federation\.mode 'fedbuff'.*allowed: synchronous"),
        ({"federation.sampling": "examples"}, r"federation\.sampling 'examples'.*uniform"),
        ({"federation.max_participations": 9}, r"federation\.max_participations = 9 .*null"),
        (
            {
                "federation.local_steps": None,
                "federation.local_epochs": 1,
                "federation.deadline": 9.0,
            },
            r"federation\.local_epochs lets",
        ),
        ({"downlink.server_mask": 0.1}, r"downlink\.server_mask and downlink\.client_mask"),
        ({"dp.noise": "clients", "uplink.bits": 16}, r"dp\.noise 'clients' with uplink.bits = 16"),
        ({"dp.adaptive": True, "downlink.every": 2}, r"dp\.adaptive.*downlink\.every = 2"),
        ({"dp.adaptive": True}, r"dp\.count_noise = 0\.2 takes all.*allowed: above 0\.5"),
        ({"method": "centralised"}, r"method 'centralised' has no updates"),
        (
            {"federation.clients": 1, "federation.client_fraction": 1.0},
            r"dp\.delta is 1 with one client",
        ),
    ],
)
def test_what_the_guarantee_does_not_hold_with_is_refused(
    tiny_experiment: Experiment, values: dict[str, object], words: str
) -> None:
    experiment = tiny_experiment.with_values(UNIFORM | {"dp.clip": 1.0} | values)
    with pytest.raises(ConfigError, match=rf"^dp\.clip: .*{words}"):
        check_combinations(experiment)


def test_adaptive_without_a_clip_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"dp\.adaptive needs dp\.clip"):
        Experiment().with_values({"dp.adaptive": True})


def test_a_missing_accountant_is_named(
    tiny_experiment: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"fedlpp_ray\[privacy\]"):
        check_combinations(tiny_experiment.with_values(UNIFORM | {"dp.clip": 1.0}))


def test_privacy_goes_with_turning_rounding_and_every_optimiser(
    tiny_experiment: Experiment,
) -> None:
    """And what the server adds is not past the clip after it has turned it back."""
    values = {"downlink.rotate": "round", "uplink.bits": 4, "server.optimizer": "fedadam"}
    experiment = tiny_experiment.with_values(
        ADAPTIVE | values | {"server.lr": 0.01, "server.aggregation": "rolora"}
    )
    history = run(experiment)
    assert all(len(record.folded) == 4 for record in history)
    server = Server(experiment)
    opened(server)
    server.receive(1, 0, sent(server, 0))
    assert server._aggregator is not None
    total = dict(server._aggregator.total.direction())
    total.pop(BELOW)
    assert norm(total) <= 0.05
